"""Training a ranker: first the user model on frozen vectors, then encoder and user model together.

The first phase costs seconds, because every item vector is computed once, and gives the encoder's
gradient a direction worth following. In the second phase a step encodes a bounded number of the
batch's distinct items with gradient, from hidden states kept in memory; the other items keep the
vector they last had (embeddings of bounded staleness, as in GRAM, Yang et al. 2022,
https://arxiv.org/abs/2104.04850), and all vectors are renewed before every validation.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from recflow.core.errors import ConfigError
from recflow.core.seeding import make_rng
from recflow.modeling.batching import (
    ClickBatch,
    HiddenStates,
    click_batch,
    count_clicks,
    draw_clicks,
    index_impressions,
    items_in_use,
    local_rows,
    spread,
)
from recflow.modeling.encoder import (
    TextEncoder,
    load_pretrained,
    mixed_precision,
)
from recflow.modeling.memory import peak_rss_bytes
from recflow.modeling.objectives import click_loss, mean_auc
from recflow.modeling.optimiser import Optimiser, deterministic
from recflow.modeling.ranker import RankerParts, count_parameters, save_ranker, score_slates
from recflow.modeling.texts import TOKENIZER_NAME, Rows, TextTokenizer
from recflow.modeling.tracking import Progress, Tracker
from recflow.modeling.tuning import STRATEGIES, apply_strategy
from recflow.modeling.user_model import (
    ItemStates,
    UserModel,
    UserModelShape,
    fit_feature_scale,
)

logger = logging.getLogger("recflow.training")

_STEPS_BETWEEN_METRICS = 10
_SCALE_SAMPLE = 1_000  # impressions that fit the scale of the features


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """How to train a ranker. The defaults suit two CPU cores and a few minutes.

    Attributes:
        strategy: Which encoder weights learn: a name of ``recflow.modeling.tuning.STRATEGIES``.
        tuned_layers: How many of the last layers ``top_k_layers`` trains.
        max_tokens: Longest text in tokens, special tokens included.
        history_length: Newest clicks used of a user, in training and in scoring alike.
        negatives: Most non-clicked candidates sampled for a click.
        clicks_per_impression: Most clicks of one impression in an epoch.
        max_impressions_per_epoch: Most impressions in an epoch.
        max_validation_impressions: Most impressions scored after an epoch, evenly spread in time.
        head_epochs: Epochs of the user model on frozen vectors.
        encoder_epochs: Epochs of encoder and user model together.
        head_batch_size: Clicks a step of the first phase.
        encoder_batch_size: Clicks a step of the second phase.
        max_texts_per_step: Distinct items encoded with gradient in a step.
        head_learning_rate: Peak learning rate of the user model; a tenth of it in the second
            phase.
        encoder_learning_rate: Peak learning rate of the encoder.
        weight_decay: AdamW's decoupled weight decay.
        warmup_share: Share of a phase's steps in which the learning rate rises.
        gradient_clip: Largest gradient norm.
        patience: Epochs of a phase without a better validation AUC after which it ends.
        dropout: Dropout before the appeal network.
        categories: Whether categories are used beside the text.
        max_cache_bytes: Most memory for kept hidden states.
        threads: Threads torch may use.
        seed: Seed of everything random.
    """

    strategy: str = "top_k_layers"
    tuned_layers: int = 2
    max_tokens: int = 64
    history_length: int = 50
    negatives: int = 8
    clicks_per_impression: int = 4
    max_impressions_per_epoch: int = 20_000
    max_validation_impressions: int = 4_000
    head_epochs: int = 4
    encoder_epochs: int = 2
    head_batch_size: int = 128
    encoder_batch_size: int = 256
    max_texts_per_step: int = 256
    head_learning_rate: float = 2e-3
    encoder_learning_rate: float = 5e-5
    weight_decay: float = 0.01
    warmup_share: float = 0.1
    gradient_clip: float = 1.0
    patience: int = 2
    dropout: float = 0.2
    categories: bool = True
    max_cache_bytes: int = 2 * 1024**3
    threads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        if self.strategy not in STRATEGIES:
            raise ConfigError.of("strategy", self.strategy, ", ".join(sorted(STRATEGIES)))
        at_least_one = (
            "tuned_layers history_length negatives clicks_per_impression max_impressions_per_epoch "
            "max_validation_impressions head_epochs head_batch_size encoder_batch_size "
            "max_texts_per_step patience max_cache_bytes threads"
        )
        for key in at_least_one.split():
            if getattr(self, key) < 1:
                raise ConfigError.of(key, getattr(self, key), "a whole number of at least 1")
        for key in ("head_learning_rate", "encoder_learning_rate", "gradient_clip"):
            if not getattr(self, key) > 0:
                raise ConfigError.of(key, getattr(self, key), "a number above 0")
        for key in ("warmup_share", "dropout"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError.of(key, getattr(self, key), "at least 0 and below 1")
        for key in ("encoder_epochs", "weight_decay", "seed"):
            if getattr(self, key) < 0:
                raise ConfigError.of(key, getattr(self, key), "at least 0")
        if not 4 <= self.max_tokens <= 512:
            raise ConfigError.of("max_tokens", self.max_tokens, "4 to 512")


@dataclass(frozen=True, slots=True)
class EpochReport:
    """One pass over the training impressions.

    Attributes:
        phase: ``head`` (frozen vectors) or ``encoder``.
        epoch: Number within the phase, from 1.
        steps: Optimiser steps.
        clicks: Click samples.
        loss: Mean cross-entropy of a click among its sampled candidates.
        validation_auc: Mean AUC of the validation impressions.
        seconds: Wall time, validation included.
    """

    phase: str
    epoch: int
    steps: int
    clicks: int
    loss: float
    validation_auc: float
    seconds: float


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What training did and what it took.

    Attributes:
        strategy: Fine-tuning strategy.
        epochs: Every epoch, in order.
        best_epoch: Number of the epoch whose state was kept, from 1, over both phases.
        best_validation_auc: Its validation AUC.
        seconds: Wall time from loading to saving.
        steps: Optimiser steps.
        impressions_per_second: Click samples over the seconds of the epochs.
        cached_texts: Texts whose lower hidden states were kept.
        cache_seconds: Seconds it took to compute them.
        parameters: Weights of the ranker.
        trainable_parameters: Those that could learn.
        peak_rss_bytes: Peak resident memory of the process so far.
    """

    strategy: str
    epochs: tuple[EpochReport, ...]
    best_epoch: int
    best_validation_auc: float
    seconds: float
    steps: int
    impressions_per_second: float
    cached_texts: int
    cache_seconds: float
    parameters: int
    trainable_parameters: int
    peak_rss_bytes: int


@dataclass(frozen=True, slots=True)
class _Phase:
    """A stretch of training with its own schedule."""

    name: str
    epochs: int
    batch_size: int
    head_learning_rate: float
    encoder_learning_rate: float = 0.0

    @property
    def encoder_learns(self) -> bool:
        return self.encoder_learning_rate > 0


def train_ranker(
    *,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    base_model: Path,
    output: Path,
    config: TrainingConfig,
    tracker: Tracker,
) -> TrainingReport:
    """Fine-tune a ranker and write it.

    The same arguments give the same files, byte for byte, on one machine with one number of
    threads.

    Args:
        items: Item features.
        train: Training impressions.
        validation: Validation impressions; they choose the epoch that is kept.
        base_model: Hugging Face directory of the pretrained encoder.
        output: Existing empty directory for the ranker.
        config: How to train.
        tracker: Told the configuration, the loss and the validation AUC.

    Raises:
        ArtifactError: ``base_model`` is not a complete encoder.
        ConfigError: The configuration does not fit the encoder, or its memory limit the data.
        ContractError: An impression names an unknown item, or no impression can be learnt from.
        PermanentError: The loss or a gradient is not a number.
    """
    started = time.monotonic()
    tracker.log_params(asdict(config))
    with deterministic(config.seed, config.threads):
        run = _TrainingRun(items, train, validation, base_model, config, tracker)
        for phase in run.phases():
            run.train_phase(phase)
        save_ranker(output, run.encoder, base_model / TOKENIZER_NAME, run.parts())
        return run.report(time.monotonic() - started)


@dataclass(frozen=True, slots=True)
class _BestState:
    """Weights of the best epoch so far."""

    validation_auc: float
    epoch: int
    user_model: dict[str, Tensor]
    encoder: dict[str, Tensor]  # only what can learn


class _ItemVectors:
    """Vectors of all items of a run; a step renews some of them with gradient.

    Attributes:
        cache_seconds: Seconds spent on the hidden states below the lowest trainable layer.
    """

    def __init__(
        self, encoder: TextEncoder, tokens: list[list[int]], lowest: int, max_bytes: int
    ) -> None:
        progress = Progress("encoding the items", len(tokens), "texts")
        with mixed_precision():
            self._hidden = HiddenStates(
                encoder, tokens, layer=lowest, max_bytes=max_bytes, on_texts=progress.advance
            )
        self.cache_seconds = progress.close()
        self._kept = torch.empty(len(tokens), encoder.dimension)
        self.renew(np.arange(len(tokens)))

    def renew(self, rows: Rows) -> None:
        """Encode these items again."""
        with torch.no_grad(), mixed_precision():
            self._kept[torch.from_numpy(rows)] = self._hidden.encode(rows)

    def kept(self, rows: Rows) -> Tensor:
        """Vectors ``[rows, dimension]`` as last computed."""
        return self._kept[torch.from_numpy(rows)]

    def partly_encoded(self, rows: Rows, encoded: Rows) -> Tensor:
        """Vectors ``[rows, dimension]``; those at the positions ``encoded`` carry gradients."""
        places = torch.from_numpy(encoded)
        with mixed_precision():
            fresh = self._hidden.encode(rows[encoded])
        vectors = self.kept(rows).index_copy(0, places, fresh)
        self._kept[torch.from_numpy(rows[encoded])] = fresh.detach()
        return vectors


class _TrainingRun:
    """State of one training: data, model, item vectors, best state."""

    def __init__(
        self,
        items: pl.DataFrame,
        train: pl.DataFrame,
        validation: pl.DataFrame,
        base_model: Path,
        config: TrainingConfig,
        tracker: Tracker,
    ) -> None:
        self._config, self._tracker = config, tracker
        # The encoder stays in evaluation mode: with dropout, fresh vectors would differ from kept
        # ones of the same weights, and every similarity between the two would be noise.
        self.encoder = load_pretrained(base_model)
        if config.max_tokens > self.encoder.longest_text:
            raise ConfigError.of(
                "max_tokens",
                config.max_tokens,
                f"at most {self.encoder.longest_text}, as many as {base_model} has positions for",
            )
        lowest = apply_strategy(config.strategy, self.encoder, tuned_layers=config.tuned_layers)
        self._encoder_learns = lowest < len(self.encoder.layers)

        used = items_in_use(items, [train, validation], config.history_length)
        self._train = index_impressions(train, used, config.history_length)
        self._validation = spread(
            index_impressions(validation, used, config.history_length),
            config.max_validation_impressions,
        )
        self._train.require_contrasts("training")
        self._validation.require_contrasts("validation")
        seen = self._train.distinct_items
        self._known_categories = used.categories_of(seen) if config.categories else []
        self._categories = torch.from_numpy(used.category_numbers(self._known_categories))
        tokens = TextTokenizer(base_model / TOKENIZER_NAME, config.max_tokens)(used.texts)
        self._vectors = _ItemVectors(self.encoder, tokens, lowest, config.max_cache_bytes)

        self._user_model = UserModel(
            UserModelShape(
                dimension=self.encoder.dimension,
                categories=len(self._known_categories),
                history_length=config.history_length,
            ),
            dropout=config.dropout,
        )
        self._user_model.centre.copy_(self._vectors.kept(seen).mean(0))
        self._fit_feature_scale()
        self._items = len(used)
        self._epochs: list[EpochReport] = []
        self._step = 0
        self._best: _BestState | None = None

    def phases(self) -> list[_Phase]:
        """The phases of this run, in order."""
        config = self._config
        head = _Phase("head", config.head_epochs, config.head_batch_size, config.head_learning_rate)
        if not self._encoder_learns or config.encoder_epochs == 0:
            return [head]
        return [
            head,
            _Phase(
                "encoder",
                config.encoder_epochs,
                config.encoder_batch_size,
                config.head_learning_rate / 10,
                config.encoder_learning_rate,
            ),
        ]

    def train_phase(self, phase: _Phase) -> None:
        """Train until the phase ends or validation has not improved for ``patience`` epochs."""
        optimiser = self._optimiser(phase)
        without_gain = 0
        for epoch in range(1, phase.epochs + 1):
            report = self._train_epoch(phase, epoch, optimiser)
            self._epochs.append(report)
            without_gain = 0 if self._keep_if_best(report) else without_gain + 1
            if without_gain == self._config.patience:
                break
        self.restore_best()

    def restore_best(self) -> None:
        """Go back to the state with the best validation AUC."""
        assert self._best is not None, "every phase has at least one epoch"
        self._user_model.load_state_dict(self._best.user_model)
        self.encoder.load_state_dict(self._best.encoder, strict=False)

    def parts(self) -> RankerParts:
        """What a ranker needs beside the encoder."""
        return RankerParts(self._user_model, self._known_categories, self._config.max_tokens)

    def report(self, seconds: float) -> TrainingReport:
        """Sum up the run."""
        assert self._best is not None, "every phase has at least one epoch"
        clicks = sum(epoch.clicks for epoch in self._epochs)
        modules = (self.encoder, self._user_model)
        return TrainingReport(
            strategy=self._config.strategy,
            epochs=tuple(self._epochs),
            best_epoch=self._best.epoch,
            best_validation_auc=self._best.validation_auc,
            seconds=seconds,
            steps=self._step,
            impressions_per_second=clicks / sum(epoch.seconds for epoch in self._epochs),
            cached_texts=len(self._categories),
            cache_seconds=self._vectors.cache_seconds,
            parameters=sum(map(count_parameters, modules)),
            trainable_parameters=sum(
                p.numel() for module in modules for p in module.parameters() if p.requires_grad
            ),
            peak_rss_bytes=peak_rss_bytes(),
        )

    def _optimiser(self, phase: _Phase) -> Optimiser:
        config = self._config
        clicks = count_clicks(
            self._train,
            clicks_per_impression=config.clicks_per_impression,
            max_impressions=config.max_impressions_per_epoch,
        )
        groups = [(self._user_model.parameters(), phase.head_learning_rate)]
        if phase.encoder_learns:
            groups.append((self.encoder.parameters(), phase.encoder_learning_rate))
        return Optimiser(
            groups,
            steps=phase.epochs * math.ceil(clicks / phase.batch_size),
            warmup_share=config.warmup_share,
            weight_decay=config.weight_decay,
            gradient_clip=config.gradient_clip,
        )

    def _keep_if_best(self, epoch: EpochReport) -> bool:
        if self._best is not None and epoch.validation_auc <= self._best.validation_auc:
            return False
        learning = {name for name, p in self.encoder.named_parameters() if p.requires_grad}
        self._best = _BestState(
            validation_auc=epoch.validation_auc,
            epoch=len(self._epochs),
            user_model=_copies(self._user_model.state_dict()),
            encoder=_copies({k: v for k, v in self.encoder.state_dict().items() if k in learning}),
        )
        return True

    def _fit_feature_scale(self) -> None:
        sample = spread(self._train, _SCALE_SAMPLE)
        fit_feature_scale(
            self._user_model,
            self._describe_all(),
            torch.from_numpy(sample.histories.pad(right_aligned=True)),
            torch.from_numpy(sample.slates.pad()),
        )

    def _describe_all(self) -> ItemStates:
        rows = np.arange(len(self._categories))
        with torch.no_grad():
            return self._user_model.describe_items(self._vectors.kept(rows), self._categories)

    def _train_epoch(self, phase: _Phase, epoch: int, optimiser: Optimiser) -> EpochReport:
        config, started = self._config, time.monotonic()
        rng = make_rng(config.seed, "clicks", phase.name, epoch)
        clicks = draw_clicks(
            self._train,
            clicks_per_impression=config.clicks_per_impression,
            max_impressions=config.max_impressions_per_epoch,
            rng=rng,
        )
        progress = Progress(f"{phase.name} epoch {epoch}/{phase.epochs}", len(clicks), "clicks")
        self._user_model.train()
        losses: list[float] = []
        for start in range(0, len(clicks), phase.batch_size):
            drawn = clicks[start : start + phase.batch_size]
            batch = click_batch(self._train, drawn, config.negatives, rng)
            loss = self._train_step(batch, phase, optimiser, rng)
            losses.append(loss * len(drawn))
            progress.advance(len(drawn), f"loss {loss:.4f}")
        progress.close()
        auc = self._validate(phase)
        report = EpochReport(
            phase=phase.name,
            epoch=epoch,
            steps=len(losses),
            clicks=len(clicks),
            loss=sum(losses) / len(clicks),
            validation_auc=auc,
            seconds=time.monotonic() - started,
        )
        self._tracker.log_metrics(
            {"epoch_loss": report.loss, "validation_auc": auc}, step=self._step
        )
        logger.info(
            "%s epoch %d: loss %.4f, validation AUC %.4f, %.0f s",
            *(phase.name, epoch, report.loss, auc, report.seconds),
        )
        return report

    def _train_step(
        self, batch: ClickBatch, phase: _Phase, optimiser: Optimiser, rng: np.random.Generator
    ) -> float:
        rows = batch.distinct_items
        if phase.encoder_learns:
            encoded = _choose_encoded(batch, rows, self._config.max_texts_per_step, rng)
            vectors = self._vectors.partly_encoded(rows, encoded)
        else:
            vectors = self._vectors.kept(rows)
        items = self._user_model.describe_items(vectors, self._categories[rows])
        scores = self._user_model(
            items, local_rows(batch.history, rows), local_rows(batch.candidates, rows)
        )
        loss = click_loss(scores, torch.from_numpy(batch.candidates >= 0))
        self._step += 1
        where = f"step {self._step} ({phase.name}), impressions {batch.impressions.tolist()}"
        value = optimiser.step(loss, where)
        if self._step % _STEPS_BETWEEN_METRICS == 0:
            metrics = {"loss": value, "learning_rate": optimiser.learning_rate}
            self._tracker.log_metrics(metrics, step=self._step)
        return value

    def _validate(self, phase: _Phase) -> float:
        self._user_model.eval()
        if phase.encoder_learns:
            self._vectors.renew(np.arange(len(self._categories)))
        data = self._validation
        scores = score_slates(self._user_model, self._describe_all(), data.histories, data.slates)
        return mean_auc(scores, data.clicked, data.slates.offsets)


def _choose_encoded(batch: ClickBatch, rows: Rows, limit: int, rng: np.random.Generator) -> Rows:
    """Positions in ``rows`` of the items to encode with gradient: candidates first, then clicks."""
    in_history_only = ~np.isin(rows, batch.candidates)
    return np.sort(np.lexsort((rng.random(len(rows)), in_history_only))[:limit])


def _copies(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}

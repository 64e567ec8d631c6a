"""Training a ranker: first the user model on frozen vectors, then encoder and user model together.

The first phase costs seconds, because every item vector is computed once, and gives the encoder's
gradient a direction worth following. In the second phase a step encodes a bounded number of the
batch's distinct items with gradient, from hidden states that are kept on disk; the other items keep
the vector they last had (embeddings of bounded staleness, as in GRAM, Yang et al. 2022,
https://arxiv.org/abs/2104.04850), and all vectors are renewed before every validation.

A training that was killed goes on from its last checkpoint along the very same trajectory: whatever
is random in a step follows from the seed and the number of the step.
"""

from __future__ import annotations

import gc
import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import polars as pl
import torch
from torch import Tensor

from recflow.core.artifacts import JsonValue
from recflow.core.errors import ConfigError
from recflow.core.seeding import derive_seed, make_rng
from recflow.modeling.batching import spread
from recflow.modeling.checkpoints import (
    Checkpoints,
    TrainingProgress,
    below,
    load_optimiser,
    optimiser_tensors,
    prefixed,
)
from recflow.modeling.config import TrainingConfig
from recflow.modeling.distribution import (
    Alone,
    Team,
    choose_device,
    fill,
    whole,
    without_exchange,
    without_gradients,
)
from recflow.modeling.encoder import (
    TextEncoder,
    load_pretrained,
    mixed_precision,
    weights_digest,
)
from recflow.modeling.hidden_states import HiddenStates, HiddenStateStore
from recflow.modeling.item_encoder import ItemEncoder
from recflow.modeling.memory import peak_rss_bytes, release_memory
from recflow.modeling.objectives import greater_is_better, validation_metric
from recflow.modeling.optimiser import Optimiser, ParameterGroup, deterministic
from recflow.modeling.ranker import RankerParts, count_parameters, save_ranker
from recflow.modeling.ranking_model import RankingModel
from recflow.modeling.reports import EpochReport, TrainingReport
from recflow.modeling.sampling import StepBatch, draw_clicks, overlapping, prefetched
from recflow.modeling.texts import TOKENIZER_NAME
from recflow.modeling.tracking import Progress, Tracker
from recflow.modeling.training_data import TrainingData, prepare_data
from recflow.modeling.tuning import Tuning, apply_strategy, layer_of
from recflow.modeling.user_model import UserModel, UserModelShape

logger = logging.getLogger("recflow.training")

_SCALE_SAMPLE: Final = 1_000  # impressions that fit the scale of the features
_HEAD_SHARE: Final = 0.1  # of the head's learning rate, while the encoder learns too
# What may differ between a training and the one that resumes it.
_WITHOUT_EFFECT: Final = (
    ("distribution",),
    ("device",),
    ("schedule", "checkpoint_seconds"),
    ("speed", "prefetch_batches"),
    ("speed", "max_cache_bytes"),
)

EpochListener = Callable[[EpochReport], None]


def train_ranker(
    *,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    base_model: Path,
    output: Path,
    config: TrainingConfig,
    tracker: Tracker,
    cache_directory: Path | None = None,
    checkpoints: Path | None = None,
    on_epoch: EpochListener | None = None,
) -> TrainingReport:
    """Fine-tune a ranker and write it.

    The same arguments give the same files, byte for byte, on one machine with one number of
    threads and processes, however often the training was killed and started again.

    Args:
        items: Item features.
        train: Training impressions, in order of time.
        validation: Validation impressions; they choose the epoch that is kept.
        base_model: Hugging Face directory of the pretrained encoder.
        output: Existing empty directory for the ranker.
        config: How to train.
        tracker: Told the configuration, each step's loss, and each epoch's validation.
        cache_directory: Where hidden states are kept for this training and later ones; ``None``
            keeps them until the end.
        checkpoints: Folder for the state of this training alone; one found there is resumed, and
            it is removed at the end. ``None`` writes none.
        on_epoch: Told each epoch's report; what it raises ends the training.

    Raises:
        ArtifactError: ``base_model`` is not a complete encoder, or a checkpoint or kept hidden
            states are damaged or belong to something else.
        ConfigError: The configuration does not fit the encoder, the machine, or the data.
        ContractError: An impression names an unknown item, or no impression can be learnt from.
        PermanentError: The loss or a gradient is not a number.
        TransientError: The disk is full.
    """
    tracker.log_params(cast("Mapping[str, JsonValue]", asdict(config)))
    if config.distribution.processes > 1:
        # Imported here because the processes it starts import this module.
        from recflow.modeling.launch import train_in_processes as begin
    else:
        begin = train_as_member
    return begin(
        items=items,
        train=train,
        validation=validation,
        base_model=base_model,
        output=output,
        config=config,
        tracker=tracker,
        cache_directory=cache_directory,
        checkpoints=checkpoints,
        on_epoch=on_epoch,
    )


def train_as_member(
    *,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    base_model: Path,
    output: Path,
    config: TrainingConfig,
    tracker: Tracker,
    cache_directory: Path | None,
    checkpoints: Path | None,
    on_epoch: EpochListener | None,
    team: Team | None = None,
) -> TrainingReport:
    """Train in this process, alone or as one of a team; the first of a team writes and reports.

    The arguments are those of :func:`train_ranker`.
    """
    started, peak_before = time.monotonic(), peak_rss_bytes()
    team = team or Alone()
    with ExitStack() as stack:
        stack.enter_context(deterministic(config.seed, config.threads))
        if cache_directory is None:
            # Processes without a common folder fill one each.
            cache_directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data = prepare_data(
            items=items,
            train=train,
            validation=validation,
            tokenizer_path=base_model / TOKENIZER_NAME,
            config=config,
        )
        run = TrainingRun(data, base_model, config, team, cache_directory, checkpoints)
        run.train(tracker, on_epoch)
        if team.rank == 0:
            save_ranker(output, run.finished_encoder(), base_model / TOKENIZER_NAME, run.parts())
        team.barrier()
        run.forget_checkpoints()
        return run.report(time.monotonic() - started, peak_before)


@dataclass(frozen=True, slots=True)
class _Phase:
    """A stretch of training with its own schedule."""

    name: str
    epochs: int
    batch_size: int
    encoder_learns: bool


class TrainingRun:
    """State of one training: data, model, progress, best weights."""

    def __init__(
        self,
        data: TrainingData,
        base_model: Path,
        config: TrainingConfig,
        team: Team,
        cache_directory: Path,
        checkpoints: Path | None,
    ) -> None:
        """Load the encoder, compute what never changes, and resume where a checkpoint is found.

        Args:
            data: What is read.
            base_model: Hugging Face directory of the pretrained encoder.
            config: How to train.
            team: The processes that train together.
            cache_directory: Where hidden states are kept.
            checkpoints: Where the state of this training is kept.
        """
        self._data, self._base_model, self._config, self._team = data, base_model, config, team
        self._device = choose_device(config.device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._encoder, self._tuning = _tuned_encoder(base_model, config)
        # By name: spreading the weights over processes puts others in their place.
        learning = {n: p.numel() for n, p in self._encoder.named_parameters() if p.requires_grad}
        self._learning = frozenset(learning)
        self._counts = count_parameters(self._encoder), sum(learning.values())
        self._checkpoints = None if checkpoints is None else self._checkpoints_in(checkpoints)
        with mixed_precision(self._device, config.speed.precision != "fp32"):
            bf16 = torch.is_autocast_enabled(self._device.type)
        if config.speed.precision == "bf16" and not bf16:
            raise ConfigError.of("precision", "bf16", f"auto or fp32 on this {self._device.type}")
        self._precision = "bf16" if bf16 else "fp32"
        self._encoder.to(self._device)
        self._encoder.use_open_attention(config.speed.open_attention)
        self._states = self._hidden_states(cache_directory)
        if self._learning and config.speed.compile:
            self._encoder.compile_layers(self._tuning.constant_layers or 0)
        self._encoder.use_checkpointing(config.speed.gradient_checkpointing)

        self._model = self._make_model()
        self._wrapped: torch.nn.Module = self._model
        if config.distribution.shard_encoder:
            self._wrapped = team.spread(self._model, list(self._encoder.layers))
        without_gradients(self._wrapped, "renew")
        scale_sample = data.train.take(spread(len(data.train), _SCALE_SAMPLE))
        without_gradients(self._wrapped, "fit_scale", scale_sample, data.seen)

        self._progress = TrainingProgress()
        self._best: dict[str, Tensor] = {}
        self._resumed: dict[str, Tensor] | None = None
        if self._checkpoints is not None:
            self._resume(self._checkpoints)
        self._resumed_at = self._progress.steps
        self._checkpoint_due = time.monotonic() + config.schedule.checkpoint_seconds

    def train(self, tracker: Tracker, on_epoch: EpochListener | None) -> None:
        """Go through the phases from where the progress is."""
        phases = self._phases()
        for phase in phases[self._progress.phase :]:
            optimiser = self._begin_phase(phase)
            for _ in range(self._progress.epoch, phase.epochs + 1):
                if self._progress.epochs_without_gain == self._config.schedule.patience:
                    break
                report = self._train_epoch(phase, optimiser, tracker)
                self._end_epoch(report, optimiser, tracker)
                if on_epoch is not None:
                    on_epoch(report)
            self._load_weights(self._best)
            self._progress.next_phase()

    def finished_encoder(self) -> TextEncoder:
        """The encoder of the best epoch, with added matrices folded in."""
        encoder, tuning = self._encoder, self._tuning
        if self._config.distribution.shard_encoder:
            # Its weights are spread over the processes: rebuild it whole.
            encoder, tuning = _tuned_encoder(self._base_model, self._config)
            learned = below("encoder.", self._best)
            encoder.load_state_dict(learned, strict=False)
        tuning.merge()
        return encoder.cpu()

    def parts(self) -> RankerParts:
        """What a ranker needs beside the encoder."""
        user_model = self._new_user_model()
        user_model.load_state_dict(below("user_model.", self._best))
        data = self._data
        return RankerParts(
            user_model=user_model,
            categories=data.categories,
            max_tokens=self._config.max_tokens,
            item_ids=data.item_ids,
            user_ids=data.user_ids,
        )

    def forget_checkpoints(self) -> None:
        """Remove the state of this training, which is done."""
        if self._checkpoints is not None and self._team.rank == 0:
            self._checkpoints.remove()

    def report(self, seconds: float, peak_before: int = 0) -> TrainingReport:
        """Sum up the run, which took so long in a process that had held so many bytes before."""
        epochs, states = self._progress.epochs, self._states
        head = count_parameters(self._model.user_model)
        return TrainingReport(
            strategy=self._config.tuning.strategy,
            primary_metric=self._config.schedule.primary_metric,
            epochs=tuple(epochs),
            best_epoch=self._progress.best_epoch,
            best_validation=self._progress.best_validation,
            seconds=seconds,
            steps=self._progress.steps,
            resumed_at_step=self._resumed_at,
            impressions_per_second=sum(e.clicks for e in epochs)
            / sum(e.seconds - e.validation_seconds for e in epochs),
            cached_texts=len(states.lengths) if states else 0,
            reused_texts=states.reused if states else 0,
            cache_seconds=states.seconds if states else 0.0,
            parameters=self._counts[0] + head,
            trainable_parameters=self._counts[1] + head,
            processes=self._team.size,
            precision=self._precision,
            peak_rss_bytes=peak_rss_bytes(),
            peak_rss_before_bytes=peak_before,
            peak_device_bytes=torch.cuda.max_memory_reserved(self._device)
            if self._device.type == "cuda"
            else 0,
        )

    # ------------------------------------------------------------------ one epoch

    def _train_epoch(self, phase: _Phase, optimiser: Optimiser, tracker: Tracker) -> EpochReport:
        config, progress, team = self._config, self._progress, self._team
        rng = make_rng(config.seed, "clicks", phase.name, progress.epoch)
        clicks = draw_clicks(
            self._data.train,
            self._data.samples,
            clicks_per_impression=config.objective.clicks_per_impression,
            max_impressions=config.schedule.max_impressions_per_epoch,
            rng=rng,
        )
        if config.speed.batching == "overlapping":
            clicks = overlapping(clicks, phase.batch_size, rng)
        steps = math.ceil(len(clicks) / phase.batch_size)
        local = self._local_sgd
        rank, size = (0, 1) if local else (team.rank, team.size)
        batches = self._data.batches(config, rank, size)

        def make(number: int) -> list[StepBatch]:
            drawn = clicks[number * phase.batch_size : (number + 1) * phase.batch_size]
            share = drawn[team.rank :: team.size] if local and len(drawn) >= team.size else drawn
            seeds = ("batch", phase.name, progress.epoch, number)
            return batches.step(
                share, encoder_learns=phase.encoder_learns, rng=make_rng(config.seed, *seeds)
            )

        bar = Progress(
            f"{phase.name} epoch {progress.epoch}/{phase.epochs}", len(clicks), "clicks",
            done=progress.clicks, visible=team.rank == 0,
        )  # fmt: skip
        began, before = time.monotonic(), progress.seconds
        self._model.user_model.train()
        numbers = range(progress.step, steps)
        for parts in prefetched(make, numbers, config.speed.prefetch_batches):
            drawn = min(phase.batch_size, len(clicks) - progress.step * phase.batch_size)
            loss = self._train_step(parts, optimiser, phase)
            progress.step += 1
            progress.steps += 1
            progress.clicks += drawn
            progress.loss += loss * drawn
            progress.texts += sum(len(part.encoded) for part in parts)
            progress.seconds = before + time.monotonic() - began
            bar.advance(drawn, f"loss {loss:.4f}")
            metrics = {"loss": loss, "learning_rate": optimiser.learning_rate}
            tracker.log_metrics(metrics, step=progress.steps)
            if progress.step < steps and self._is_checkpoint_due():
                self._save_checkpoint(optimiser)
        bar.close()
        optimiser.clear()  # nothing needs the last gradients, and validation needs room
        if local:
            self._average(optimiser)
        validated = time.monotonic()
        release_memory()
        validation = self._validate(phase)
        release_memory()
        now = time.monotonic()
        return EpochReport(
            phase=phase.name,
            epoch=progress.epoch,
            steps=steps,
            clicks=len(clicks),
            texts=progress.texts,
            loss=team.sum([progress.loss])[0] / team.size / len(clicks),
            validation=validation,
            seconds=before + now - began,
            validation_seconds=now - validated,
        )

    def _train_step(self, parts: list[StepBatch], optimiser: Optimiser, phase: _Phase) -> float:
        progress, team = self._progress, self._team
        torch.manual_seed(derive_seed(self._config.seed, "step", progress.steps, team.rank))
        optimiser.clear()
        value = torch.zeros((), device=self._device)
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            with nullcontext() if is_last else without_exchange(self._wrapped):
                loss = self._wrapped("loss", part.to(self._device))
                value += loss.detach()
                penalty = self._tuning.penalty() if phase.encoder_learns and is_last else None
                if penalty is not None:
                    loss = loss + penalty / team.size
                # Wrapped models average gradients; the parts of a loss are to be added.
                (loss if self._local_sgd else loss * team.size).backward()
            if not is_last:
                # Parts are there to save memory, and no two are alike: the next one would lie
                # beside the holes that this one leaves.
                release_memory()
        loss_of_step = value.item() if self._local_sgd else team.sum([value.item()])[0]
        impressions = [number for part in parts for number in part.impressions.tolist()]
        where = f"step {progress.steps + 1} ({phase.name}), impressions {impressions}"
        optimiser.apply(loss_of_step, where)
        if phase.encoder_learns:
            self._tuning.after_step(optimiser.steps_taken)
        if self._local_sgd and (progress.step + 1) % self._config.distribution.local_steps == 0:
            self._average(optimiser)
        return loss_of_step

    def _validate(self, phase: _Phase) -> float:
        self._model.user_model.eval()
        if phase.encoder_learns:
            without_gradients(self._wrapped, "renew")
        data = self._data.validation
        scores = without_gradients(self._wrapped, "scores", data, self._data.validation_users)
        metric = validation_metric(
            self._config.schedule.primary_metric,
            scores,
            clicked=data.clicked,
            offsets=data.slates.offsets,
            ratings=data.ratings.astype(np.float64) - self._data.mean_rating,
        )
        # One opinion for all: a last bit that differs must not send processes different ways.
        return self._team.sum([metric])[0] / self._team.size

    def _end_epoch(self, report: EpochReport, optimiser: Optimiser, tracker: Tracker) -> None:
        progress = self._progress
        progress.epochs.append(report)
        sign = 1 if greater_is_better(self._config.schedule.primary_metric) else -1
        gain = sign * (report.validation - progress.best_validation)
        if not progress.best_epoch or gain > 0:
            progress.best_epoch, progress.best_validation = len(progress.epochs), report.validation
            progress.epochs_without_gain = 0
            self._best.clear()  # before its successor is there: it is as large as the weights
            self._best = {name: value.clone() for name, value in self._weights().items()}
        else:
            progress.epochs_without_gain += 1
        metric = f"validation_{self._config.schedule.primary_metric}"
        numbers = {"epoch_loss": report.loss, metric: report.validation}
        tracker.log_metrics(numbers, step=progress.steps)
        if self._team.rank == 0:
            logger.info(
                "%s epoch %d: loss %.4f, validation %s %.4f, %.0f s",
                *(report.phase, report.epoch, report.loss),
                *(self._config.schedule.primary_metric, report.validation, report.seconds),
            )
        progress.next_epoch()
        self._save_checkpoint(optimiser)

    # ------------------------------------------------------------------ building and resuming

    @property
    def _local_sgd(self) -> bool:
        return self._team.size > 1 and self._config.distribution.synchronisation == "local_sgd"

    def _phases(self) -> list[_Phase]:
        schedule = self._config.schedule
        head = _Phase("head", schedule.head_epochs, schedule.head_batch_size, False)
        if not self._learning or not schedule.encoder_epochs:
            return [head]
        encoder = _Phase("encoder", schedule.encoder_epochs, schedule.encoder_batch_size, True)
        return [head, encoder] if schedule.head_epochs else [encoder]

    def _hidden_states(self, directory: Path) -> HiddenStates | None:
        config, layers, team = self._config, self._tuning.constant_layers, self._team
        if not (config.speed.cache_hidden_states and layers):
            return None
        store = HiddenStateStore(directory, max_bytes=config.speed.max_cache_bytes)
        tokens = self._data.tokens
        bar = Progress("encoding the items", len(tokens), "texts", visible=team.rank == 0)
        states = store.states(
            self._encoder,
            tokens,
            layer=layers,
            precision=self._precision,
            on_texts=bar.advance,
            share=(team.rank, team.size),
            barrier=team.barrier,
        )
        bar.close()
        return states

    def _make_model(self) -> RankingModel:
        config = self._config
        items = ItemEncoder(
            self._encoder,
            self._data.tokens,
            constant_layers=self._tuning.constant_layers,
            states=self._states,
            speed=config.speed,
            max_tokens=config.max_tokens,
            device=self._device,
        )
        return RankingModel(
            self._encoder,
            self._new_user_model().to(self._device),
            items=items,
            features=self._data.features,
            objective=config.objective,
            team=self._team,
            exchange=not self._local_sgd,
            device=self._device,
        )

    def _new_user_model(self) -> UserModel:
        data, config = self._data, self._config
        shape = UserModelShape.of(
            config.user_model,
            dimension=self._encoder.dimension,
            categories=len(data.categories),
            items=len(data.item_ids),
            users=len(data.user_ids),
        )
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(config.seed, "user model"))
            return UserModel(shape, dropout=config.user_model.dropout)

    def _begin_phase(self, phase: _Phase) -> Optimiser:
        release_memory()
        config = self._config
        if not config.distribution.shard_encoder:
            for name, parameter in self._encoder.named_parameters():
                parameter.requires_grad_(phase.encoder_learns and name in self._learning)
            if not self._local_sgd:
                # The wrapper of the phase before must be gone first: it would exchange as well.
                self._wrapped = self._model
                gc.collect()
                self._wrapped = self._team.wrap(self._model)
        per_epoch = math.ceil(self._data.clicks_per_epoch(config) / phase.batch_size)
        steps = phase.epochs * per_epoch
        head_rate = config.optimiser.head_learning_rate
        groups = [
            ParameterGroup(
                self._model.user_model.parameters(),
                head_rate * (_HEAD_SHARE if phase.encoder_learns else 1),
            )
        ]
        if phase.encoder_learns:
            groups += _layer_groups(self._encoder, config)
            self._tuning.start(steps)
        optimiser = Optimiser(
            groups,
            steps=steps,
            warmup_share=config.optimiser.warmup_share,
            weight_decay=config.optimiser.weight_decay,
            gradient_clip=config.optimiser.gradient_clip,
            steps_taken=(self._progress.epoch - 1) * per_epoch + self._progress.step,
        )
        if self._resumed is not None:
            load_optimiser(self._model, optimiser, below("optimiser.", self._resumed))
            if phase.encoder_learns:
                self._tuning.load_state(below("tuning.", self._resumed))
            self._resumed = None
        return optimiser

    def _is_checkpoint_due(self) -> bool:
        # Between two averages the processes of local SGD have no common state.
        if self._checkpoints is None or self._local_sgd:
            return False
        late = self._team.rank == 0 and time.monotonic() >= self._checkpoint_due
        return self._team.sum([float(late)])[0] > 0

    def _save_checkpoint(self, optimiser: Optimiser) -> None:
        if self._checkpoints is None:
            return
        tensors = {
            **prefixed("model.", self._weights()),
            **prefixed("best.", self._best),
            **prefixed("optimiser.", optimiser_tensors(self._model, optimiser)),
            **prefixed("tuning.", self._tuning.state()),
            "kept": self._model.kept.cpu(),
        }
        if self._team.rank == 0:
            self._checkpoints.save(self._progress, tensors)
        self._team.barrier()
        self._checkpoint_due = time.monotonic() + self._config.schedule.checkpoint_seconds

    def _checkpoints_in(self, directory: Path) -> Checkpoints:
        """Name what this training is made from, while its weights are whole."""
        return Checkpoints(
            directory,
            config=_without_effectless(asdict(self._config)),
            parents={
                "base_model": weights_digest(self._encoder, len(self._encoder.layers)),
                "data": self._data.digest(),
            },
        )

    def _resume(self, checkpoints: Checkpoints) -> None:
        found = checkpoints.load()
        if found is None:
            return
        self._progress, tensors = found
        self._best = below("best.", tensors)
        self._load_weights(below("model.", tensors))
        self._model.kept.copy_(tensors["kept"])
        self._resumed = tensors
        logger.info("resuming at step %d", self._progress.steps)

    def _weights(self) -> dict[str, Tensor]:
        """Everything that learns and the user model's scales, whole, and not always copies."""
        learning = {f"encoder.{name}" for name in self._learning}
        return {
            name: whole(value)
            for name, value in self._model.state_dict().items()
            if name in learning or name.startswith("user_model.")
        }

    def _load_weights(self, weights: Mapping[str, Tensor]) -> None:
        state = self._model.state_dict()
        for name, value in weights.items():
            fill(state[name], value)

    def _average(self, optimiser: Optimiser) -> None:
        """Make the processes of local SGD agree, on weights and on AdamW's moments."""
        moments = [
            tensor
            for state in optimiser.adamw.state.values()
            for key, tensor in state.items()
            if key != "step"
        ]
        learning = [p for p in self._model.parameters() if p.requires_grad]
        self._team.average([*(p.data for p in learning), *moments])


def _tuned_encoder(base_model: Path, config: TrainingConfig) -> tuple[TextEncoder, Tuning]:
    encoder = load_pretrained(base_model, pooling=config.pooling)
    if config.max_tokens > encoder.longest_text:
        raise ConfigError.of(
            "max_tokens",
            config.max_tokens,
            f"at most {encoder.longest_text}, as many as {base_model} has positions for",
        )
    torch.manual_seed(derive_seed(config.seed, "tuning"))
    return encoder, apply_strategy(config.tuning, encoder)


def _layer_groups(encoder: TextEncoder, config: TrainingConfig) -> list[ParameterGroup]:
    """The encoder's weights by layer; each layer below learns slower by the decay."""
    by_layer: dict[int, list[torch.nn.Parameter]] = {}
    for name, parameter in encoder.named_parameters():
        by_layer.setdefault(layer_of(encoder, name), []).append(parameter)
    rate, decay = config.optimiser.encoder_learning_rate, config.optimiser.layer_decay
    last = len(encoder.layers)
    return [
        ParameterGroup(parameters, rate * decay ** max(0, last - layer))
        for layer, parameters in sorted(by_layer.items(), reverse=True)
    ]


def _without_effectless(config: dict[str, Any]) -> dict[str, JsonValue]:
    """The part of a configuration that decides where training goes."""
    for *groups, key in _WITHOUT_EFFECT:
        place = config
        for group in groups:
            place = place[group]
        del place[key]
    return config

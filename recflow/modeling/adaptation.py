"""Adapting an encoder to the texts of a domain before any click is looked at.

Two ways, both from the item texts alone. *Contrastive* (SimCSE, Gao et al. 2021,
https://aclanthology.org/2021.emnlp-main.552): a text is encoded twice under dropout; its two
vectors are to be closer to each other than to those of the other texts of the batch. *Masked
language modelling* (BERT, Devlin et al. 2019, https://aclanthology.org/N19-1423; for this purpose
Gururangan et al. 2020, https://aclanthology.org/2020.acl-main.740): hidden tokens are guessed.

One text in twenty is held out; the state with the best loss on those is what is written, and that
may be the encoder as it was.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from recflow.core.errors import ConfigError, ContractError
from recflow.core.seeding import derive_seed, make_rng
from recflow.modeling.adaptation_config import MASKED_LANGUAGE, AdaptationConfig
from recflow.modeling.config import TuningConfig
from recflow.modeling.distribution import choose_device
from recflow.modeling.encoder import (
    ADDITIONS,
    WEIGHTS_NAME,
    TextEncoder,
    load_pretrained,
    mixed_precision,
)
from recflow.modeling.layout import CONFIG_NAME
from recflow.modeling.memory import peak_rss_bytes
from recflow.modeling.optimiser import Optimiser, ParameterGroup, deterministic
from recflow.modeling.texts import TOKENIZER_NAME, Rows, TextTokenizer, pad_tokens
from recflow.modeling.tracking import Progress, Tracker
from recflow.modeling.tuning import apply_strategy

logger = logging.getLogger("recflow.training")

Flags = NDArray[np.bool_]

_HELD_OUT_SHARE: Final = 0.05
_FEWEST_TEXTS: Final = 4  # two to learn from, two to compare
_MASK_TOKENS: Final = ("[MASK]", "<mask>")
_HEAD_LEARNING_RATE: Final = 1e-3  # of the masked-language head, which starts from nothing
_SHARE_HIDDEN: Final = 0.8  # of the chosen tokens; half of the rest become another token
_SHARE_CHANGED: Final = 0.1


@dataclass(frozen=True, slots=True)
class AdaptationPoint:
    """The losses at a validation.

    Attributes:
        step: Optimiser steps so far.
        loss: Mean training loss since the last validation; ``None`` before the first step.
        held_out_loss: Loss on the held-out texts, always under the same noise.
    """

    step: int
    loss: float | None
    held_out_loss: float


@dataclass(frozen=True, slots=True)
class AdaptationReport:
    """What an adaptation did.

    Attributes:
        method: How.
        texts: Distinct texts learnt from.
        held_out_texts: Distinct texts the loss was watched on.
        steps: Optimiser steps taken.
        best_step: The step whose state was written.
        held_out_loss_before: Held-out loss of the encoder as it was; in masked-language modelling
            with a head that knows nothing yet.
        held_out_loss: Held-out loss of what was written.
        curve: The losses on the way.
        seconds: Wall time from loading to saving.
        texts_per_second: Training texts over the seconds of the steps.
        peak_rss_bytes: Peak resident memory of the process so far.
    """

    method: str
    texts: int
    held_out_texts: int
    steps: int
    best_step: int
    held_out_loss_before: float
    held_out_loss: float
    curve: tuple[AdaptationPoint, ...]
    seconds: float
    texts_per_second: float
    peak_rss_bytes: int


def adapt_encoder(
    *,
    texts: Sequence[str],
    base_model: Path,
    output: Path,
    config: AdaptationConfig,
    tracker: Tracker,
) -> AdaptationReport:
    """Adapt an encoder to texts and write it as a Hugging Face directory.

    The same arguments give the same files, byte for byte, on one machine with one number of
    threads.

    Args:
        texts: Texts of the domain; equal ones count once.
        base_model: Hugging Face directory of the pretrained encoder.
        output: Existing empty directory for ``config.json``, ``model.safetensors`` and
            ``tokenizer.json``.
        config: How to adapt.
        tracker: Told the configuration and the losses.

    Raises:
        ArtifactError: ``base_model`` is not a complete encoder.
        ConfigError: The configuration does not fit the encoder or the machine.
        ContractError: There are too few distinct texts.
        PermanentError: The loss or a gradient is not a number; names the texts of the batch.
    """
    started = time.monotonic()
    tracker.log_params(asdict(config))
    with deterministic(config.seed, config.threads):
        run = _Adaptation(texts, base_model, config, tracker)
        run.train()
        run.save(base_model, output)
    return run.report(time.monotonic() - started)


class _Adaptation:
    """State of one adaptation."""

    def __init__(
        self, texts: Sequence[str], base_model: Path, config: AdaptationConfig, tracker: Tracker
    ) -> None:
        self._config, self._tracker = config, tracker
        self._device = choose_device(config.device)
        self._encoder = load_pretrained(base_model, pooling=config.pooling).to(self._device)
        if config.max_tokens > self._encoder.longest_text:
            raise ConfigError.of(
                "max_tokens",
                config.max_tokens,
                f"at most {self._encoder.longest_text}, as many as {base_model} has positions for",
            )
        self._check_precision()
        strategy = (
            TuningConfig("full")
            if config.tuned_layers is None
            else TuningConfig("top_k_layers", tuned_layers=config.tuned_layers)
        )
        apply_strategy(strategy, self._encoder)
        tokenizer = TextTokenizer(base_model / TOKENIZER_NAME, config.max_tokens)
        specials = frozenset(tokenizer([""])[0])
        self._objective = _make_objective(self._encoder, tokenizer, specials, config)

        self._tokens, self._numbers = _distinct(tokenizer(texts), shortest=len(specials) + 1)
        if len(self._tokens) < _FEWEST_TEXTS:
            raise ContractError(
                f"{len(self._tokens)} distinct texts are too few to adapt an encoder to; at least "
                f"{_FEWEST_TEXTS} are needed"
            )
        order = make_rng(config.seed, "held-out texts").permutation(len(self._tokens))
        held_out = max(2, round(len(order) * _HELD_OUT_SHARE))
        self._held_out, self._train = np.sort(order[:held_out]), np.sort(order[held_out:])
        batches = math.ceil(len(self._train) / config.batch_size)
        self._steps = min(config.max_steps, config.epochs * batches)
        self._seconds, self._texts_seen = 0.0, 0

        loss = self._held_out_loss()
        self._curve = [AdaptationPoint(0, None, loss)]
        self._best = self._curve[0]
        self._best_state = self._learning_state()

    def train(self) -> None:
        """Take the steps, look at the held-out texts now and then, and end with the best state."""
        config = self._config
        optimiser = Optimiser(
            [
                ParameterGroup(self._encoder.parameters(), config.learning_rate),
                ParameterGroup(self._objective.parameters(), _HEAD_LEARNING_RATE),
            ],
            steps=self._steps,
            warmup_share=config.warmup_share,
            weight_decay=config.weight_decay,
            gradient_clip=config.gradient_clip,
        )
        bar = Progress(f"adapting ({config.method})", self._steps, "steps")
        losses: list[float] = []
        for step, batch in enumerate(islice(self._batches(), self._steps), start=1):
            losses.append(self._train_step(step, batch, optimiser))
            bar.advance(1, f"loss {losses[-1]:.4f}")
            if step % config.steps_between_validations == 0 or step == self._steps:
                self._validate(step, sum(losses) / len(losses))
                losses = []
        bar.close()
        self._encoder.load_state_dict(self._best_state, strict=False)

    def save(self, base_model: Path, output: Path) -> None:
        """Write a directory that is loaded like ``base_model``."""
        state = self._encoder.transformer.state_dict()
        weights = {
            name: value.detach().cpu().contiguous()
            for name, value in state.items()
            if not name.startswith(f"{ADDITIONS}.")  # pooling: learnt again by whoever wants it
        }
        save_file(weights, output / WEIGHTS_NAME, metadata={"format": "pt"})
        for name in (CONFIG_NAME, TOKENIZER_NAME):
            shutil.copyfile(base_model / name, output / name)

    def report(self, seconds: float) -> AdaptationReport:
        """Sum up the run."""
        return AdaptationReport(
            method=self._config.method,
            texts=len(self._train),
            held_out_texts=len(self._held_out),
            steps=self._steps,
            best_step=self._best.step,
            held_out_loss_before=self._curve[0].held_out_loss,
            held_out_loss=self._best.held_out_loss,
            curve=tuple(self._curve),
            seconds=seconds,
            texts_per_second=self._texts_seen / self._seconds if self._seconds else 0.0,
            peak_rss_bytes=peak_rss_bytes(),
        )

    def _check_precision(self) -> None:
        with mixed_precision(self._device):
            native = torch.is_autocast_enabled(self._device.type)
        if self._config.precision == "bf16" and not native:
            raise ConfigError.of("precision", "bf16", f"auto or fp32 on this {self._device.type}")

    def _batches(self) -> Iterator[Rows]:
        """Texts of similar length together, in random order; without end."""
        lengths = np.array([len(self._tokens[row]) for row in self._train])
        count = math.ceil(len(self._train) / self._config.batch_size)
        epoch = 0
        while True:
            rng = make_rng(self._config.seed, "batches", epoch)
            order = rng.permutation(len(self._train))
            order = order[np.argsort(lengths[order], kind="stable")]
            # Batches of nearly equal size: alone in a batch, a text has nothing to differ from.
            batches = np.array_split(self._train[order], count)
            for number in rng.permutation(count):
                yield batches[number]
            epoch += 1

    def _train_step(self, step: int, batch: Rows, optimiser: Optimiser) -> float:
        started = time.monotonic()
        with active_dropout(self._encoder, self._config.dropout):
            loss = self._loss(batch, make_rng(self._config.seed, "masks", step))
            where = f"step {step}, texts {[self._numbers[row] for row in batch]}"
            value = optimiser.step(loss, where)
        self._seconds += time.monotonic() - started
        self._texts_seen += len(batch)
        self._tracker.log_metrics({"loss": value}, step=step)
        return value

    def _loss(self, batch: Rows, rng: np.random.Generator) -> Tensor:
        ids, mask = pad_tokens([self._tokens[row] for row in batch])
        with mixed_precision(self._device, self._config.precision != "fp32"):
            return self._objective.loss(ids, mask, rng)

    def _validate(self, step: int, loss: float) -> None:
        point = AdaptationPoint(step, loss, self._held_out_loss())
        self._curve.append(point)
        self._tracker.log_metrics({"held_out_loss": point.held_out_loss}, step=step)
        logger.info("step %d: loss %.4f, held-out loss %.4f", step, loss, point.held_out_loss)
        if point.held_out_loss < self._best.held_out_loss:
            self._best, self._best_state = point, self._learning_state()

    def _held_out_loss(self) -> float:
        """Mean loss on the held-out texts, under the same dropout and masks every time."""
        seed = derive_seed(self._config.seed, "held-out noise")
        rng = make_rng(self._config.seed, "held-out masks")
        order = self._held_out[np.argsort([len(self._tokens[row]) for row in self._held_out])]
        batches = np.array_split(order, math.ceil(len(order) / self._config.batch_size))
        total = 0.0
        with (
            torch.random.fork_rng(),
            torch.no_grad(),
            active_dropout(self._encoder, self._config.dropout),
        ):
            torch.manual_seed(seed)
            for batch in batches:
                total += self._loss(batch, rng).item() * len(batch)
        return total / len(order)

    def _learning_state(self) -> dict[str, Tensor]:
        return {
            name: parameter.detach().clone()
            for name, parameter in self._encoder.named_parameters()
            if parameter.requires_grad
        }


class _Objective(Protocol):
    """A loss on texts without labels."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Weights that learn besides the encoder's and are thrown away afterwards."""
        ...

    def loss(self, ids: Rows, mask: Flags, rng: np.random.Generator) -> Tensor:
        """Mean loss of texts ``[texts, tokens]``; ``mask`` is true where there is a token."""
        ...


class _Contrastive:
    """Cross-entropy of a text's second view among those of all texts of the batch."""

    def __init__(self, encoder: TextEncoder, temperature: float) -> None:
        self._encoder, self._temperature = encoder, temperature

    def parameters(self) -> Iterable[nn.Parameter]:
        return ()

    def loss(self, ids: Rows, mask: Flags, rng: np.random.Generator) -> Tensor:
        del rng  # the two views differ by torch's own dropout
        both = (torch.from_numpy(np.concatenate([part, part])) for part in (ids, mask))
        first, second = self._encoder(*(part.to(self._encoder.device) for part in both)).chunk(2)
        similarities = first.float() @ second.float().T / self._temperature
        return functional.cross_entropy(
            similarities, torch.arange(len(ids), device=similarities.device)
        )


class _MaskedLanguage:
    """Cross-entropy of hidden tokens, guessed through BERT's head over the embedding table."""

    def __init__(
        self, encoder: TextEncoder, mask_token: int, specials: frozenset[int], share: float
    ) -> None:
        self._encoder, self._mask_token, self._share = encoder, mask_token, share
        self._specials = sorted(specials)
        self._table: Tensor = cast("Any", encoder.transformer).get_input_embeddings().weight
        tokens, width = self._table.shape
        self._head = nn.Sequential(
            nn.Linear(encoder.width, width), nn.GELU(), nn.LayerNorm(width)
        ).to(encoder.device)
        self._bias = nn.Parameter(torch.zeros(tokens, device=encoder.device))

    def parameters(self) -> Iterable[nn.Parameter]:
        return [*self._head.parameters(), self._bias]

    def loss(self, ids: Rows, mask: Flags, rng: np.random.Generator) -> Tensor:
        encoder = self._encoder
        maskable = mask & ~np.isin(ids, self._specials)
        corrupted, chosen = self._corrupt(ids, maskable, rng)
        present = torch.from_numpy(mask).to(encoder.device)
        hidden = encoder.embed(torch.from_numpy(corrupted).to(encoder.device))
        hidden = encoder.run_layers(hidden, present, 0, len(encoder.layers))
        norm = encoder.architecture.final_norm
        states = (hidden if norm is None else norm(hidden))[torch.from_numpy(chosen)]
        guesses = self._head(states) @ self._table.T + self._bias
        return functional.cross_entropy(
            guesses.float(), torch.from_numpy(ids[chosen]).to(encoder.device)
        )

    def _corrupt(self, ids: Rows, maskable: Flags, rng: np.random.Generator) -> tuple[Rows, Flags]:
        """Hide some tokens, change a few, and say which were chosen; in each text at least one."""
        lot = np.where(maskable, rng.random(ids.shape), 1.0)
        chosen = lot < self._share
        chosen[np.arange(len(ids)), lot.argmin(1)] = True
        fate = rng.random(ids.shape)
        others = rng.integers(len(self._table), size=ids.shape)
        corrupted = np.where(chosen & (fate < _SHARE_HIDDEN), self._mask_token, ids)
        changed = chosen & (fate >= 1 - _SHARE_CHANGED)
        return np.where(changed, others, corrupted), chosen


def _make_objective(
    encoder: TextEncoder,
    tokenizer: TextTokenizer,
    specials: frozenset[int],
    config: AdaptationConfig,
) -> _Objective:
    if config.method != MASKED_LANGUAGE:
        return _Contrastive(encoder, config.temperature)
    if encoder.architecture.causal:
        raise ConfigError.of(
            "method",
            config.method,
            f"contrastive for a {encoder.config.model_type}, whose tokens do not see what follows",
        )
    vocabulary = Tokenizer.from_file(str(tokenizer.path))
    found = [vocabulary.token_to_id(token) for token in _MASK_TOKENS]
    known = [number for number in found if number is not None]
    if not known:
        raise ConfigError.of(
            "method",
            config.method,
            f"contrastive where the tokenizer has no {' or '.join(_MASK_TOKENS)}",
        )
    return _MaskedLanguage(encoder, known[0], specials, config.masked_share)


@contextmanager
def active_dropout(encoder: TextEncoder, share: float) -> Generator[None]:
    """Drop this share of activations and attention weights inside the block.

    Afterwards the encoder is in evaluation mode and its dropout as it was configured.

    Raises:
        ConfigError: The encoder has no place for dropout, so that all views would be equal.
    """
    places = [
        (module, name)
        for module in encoder.modules()
        for name in (("p",) if isinstance(module, nn.Dropout) else ("attention_dropout",))
        if isinstance(getattr(module, name, None), float | int)
    ]
    if not places:
        raise ConfigError.of(
            "base_model", encoder.config.model_type, "an encoder whose layers have dropout"
        )
    before = [getattr(module, name) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, share)
        encoder.train()
        yield
    finally:
        encoder.eval()
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def _distinct(tokens: Iterable[list[int]], shortest: int) -> tuple[list[list[int]], list[int]]:
    """Distinct token ids of texts that are long enough, and the number of the first text of each.

    Texts that differ only behind the cut would repel each other though nothing tells them apart.
    """
    first: dict[tuple[int, ...], int] = {}
    for number, text in enumerate(tokens):
        if len(text) >= shortest:
            first.setdefault(tuple(text), number)
    return [list(text) for text in first], list(first.values())

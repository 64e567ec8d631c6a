"""What the compression steps share: teacher vectors, the training that recovers them, accuracy.

Recovery pulls a changed encoder's item vectors back to those of the encoder it was made of. It
needs item texts only, no clicks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, Protocol

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from recflow.core.columns import Columns
from recflow.core.seeding import make_rng
from recflow.modeling.encoder import TextEncoder, TorchRuntime, mixed_precision
from recflow.modeling.objectives import mean_auc
from recflow.modeling.optimiser import Optimiser, ParameterGroup
from recflow.modeling.ranker import Ranker
from recflow.modeling.texts import Rows, Vectors, length_buckets, pad_tokens
from recflow.modeling.tracking import Progress, Tracker

STEPS_BETWEEN_METRICS: Final = 10

_WARMUP_SHARE: Final = 0.1


class RecoveryKeys(Protocol):
    """What the configurations of the steps that recover have in common."""

    @property
    def recovery_steps(self) -> int:
        """Optimiser steps; 0 changes nothing."""
        ...

    @property
    def recovery_batch_size(self) -> int:
        """Texts a step."""
        ...

    @property
    def learning_rate(self) -> float:
        """Peak learning rate."""
        ...

    @property
    def weight_decay(self) -> float:
        """AdamW's decoupled weight decay."""
        ...

    @property
    def gradient_clip(self) -> float:
        """Largest gradient norm."""
        ...

    @property
    def seed(self) -> int:
        """Seed of the order of the texts."""
        ...


def recover(
    student: TextEncoder,
    tokens: Sequence[list[int]],
    targets: Vectors,
    config: RecoveryKeys,
    *,
    tracker: Tracker,
    learning: Iterable[nn.Parameter],
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Pull the student's vectors to the targets by their cosine.

    Every text takes its turn before any comes again. Afterwards all weights want gradients.

    Args:
        student: The encoder to train, in evaluation mode: its targets know no dropout.
        tokens: Token ids of each text.
        targets: Unit vector that each text should have, ``[texts, dimension]``.
        config: How to train it.
        tracker: Told the mean distance, 1 - cosine, now and then.
        learning: The student's weights that learn; the others stay as they are.
        after_step: Called after every step, for what a step must not undo.

    Raises:
        PermanentError: A loss or gradient is not a number.
    """
    steps = config.recovery_steps
    if steps == 0:
        return
    student.requires_grad_(False)
    parameters = list(learning)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = Optimiser(
        [ParameterGroup(parameters, config.learning_rate)],
        steps=steps,
        warmup_share=_WARMUP_SHARE,
        weight_decay=config.weight_decay,
        gradient_clip=config.gradient_clip,
    )
    progress = Progress("recovering", steps, "steps")
    wanted = torch.from_numpy(targets)
    batches = text_batches(
        tokens, steps=steps, batch_size=config.recovery_batch_size, seed=config.seed
    )
    for step, texts in enumerate(batches, start=1):
        vectors = encode_tokens(student, [tokens[text] for text in texts])
        distance = 1 - (vectors * wanted[texts]).sum(-1).mean()
        value = optimiser.step(distance, f"recovery step {step}")
        after_step()
        progress.advance(1, f"distance {value:.4f}")
        if step % STEPS_BETWEEN_METRICS == 0:
            tracker.log_metrics({"recovery_distance": value}, step=step)
    progress.close()
    student.requires_grad_(True)


def text_batches(
    tokens: Sequence[list[int]], *, steps: int, batch_size: int, seed: int
) -> Iterator[Rows]:
    """``steps`` batches of texts of similar length, in random order, all texts in turn.

    Args:
        tokens: Token ids of each text.
        steps: How many batches.
        batch_size: Texts of a batch.
        seed: Seed of the order.

    Yields:
        Numbers of the texts of a batch.
    """
    rng = make_rng(seed, "recovery")
    lengths = np.array([len(text) for text in tokens], dtype=np.int64)
    left = steps
    while left > 0:
        shuffled = rng.permutation(len(lengths))
        buckets = list(length_buckets(lengths[shuffled], batch_size))
        for place in rng.permutation(len(buckets))[:left]:
            yield shuffled[buckets[place]]
        left -= len(buckets)


def encode_tokens(encoder: TextEncoder, tokens: Sequence[list[int]]) -> Tensor:
    """Unit vectors ``[texts, dimension]`` of one batch, with gradients where weights want them."""
    ids, mask = map(torch.from_numpy, pad_tokens(tokens))
    with mixed_precision():
        return encoder(ids, mask)


def encode_all(encoder: TextEncoder, tokens: Sequence[list[int]]) -> Vectors:
    """Unit vectors ``[texts, dimension]`` of all texts, in length buckets, without gradients."""
    runtime = TorchRuntime(encoder, None)
    vectors = np.empty((len(tokens), encoder.dimension), dtype=np.float32)
    for bucket in length_buckets(np.array([len(text) for text in tokens], dtype=np.int64)):
        vectors[bucket] = runtime([tokens[text] for text in bucket])
    return vectors


def mean_cosine(encoder: TextEncoder, tokens: Sequence[list[int]], targets: Vectors) -> float:
    """Mean cosine between the encoder's vectors and unit vectors ``[texts, dimension]``."""
    return float(np.einsum("ij,ij->i", encode_all(encoder, tokens), targets).mean())


def evenly_drawn(impressions: pl.DataFrame, most: int) -> pl.DataFrame:
    """Every impression, or every n-th one so that there are at most ``most``."""
    return impressions.gather_every(max(1, math.ceil(len(impressions) / most)))


def validation_auc(
    ranker: Ranker,
    items: pl.DataFrame,
    impressions: pl.DataFrame,
    vectors: Callable[[Rows], Vectors] | None = None,
) -> float:
    """Mean AUC of a ranker over the impressions.

    Args:
        ranker: The ranker.
        items: Item features.
        impressions: Impressions with labels.
        vectors: Looks up the vectors of rows of ``items``; where there is none, texts are encoded.

    Raises:
        ContractError: An item is unknown, or no impression has both a click and a non-click.
    """
    scores = ranker.scorer("validation", items, vectors).score(impressions)
    lengths = scores.list.len().cast(pl.Int64).to_numpy()
    return mean_auc(
        scores.explode().to_numpy(),
        impressions[Columns.LABELS].explode().cast(pl.Boolean).to_numpy(),
        np.concatenate([[0], np.cumsum(lengths)]),
    )

"""Sparsity: single weights of the layers' matrices become zero, where they are.

This makes the file smaller, since it holds sparse matrices packed
(:mod:`recflow.modeling.packing`), and nothing else. No runtime here is faster for it: the matrices
in memory keep their shapes, and a dense product multiplies zeros like any other number. Sparse
kernels of processors pay only far above the shares that keep the accuracy, and 2:4 is executed by
some GPUs alone (Mishra et al. 2021, https://arxiv.org/abs/2104.08378). Whoever needs speed removes
whole heads and channels (:mod:`recflow.compression.prune`).

A weight's score is its size, or its size times that of its input: |w| · ‖x‖ is what the output
changes by (Sun et al. 2024, Wanda, https://arxiv.org/abs/2306.11695). A short training then pulls
the vectors back to the parent's; zeros stay zero.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import polars as pl
import torch
from torch import Tensor, nn

from recflow.compression.config import SparsificationConfig
from recflow.compression.recovery import (
    encode_all,
    evenly_drawn,
    mean_cosine,
    recover,
    validation_auc,
)
from recflow.compression.spectra import Moments, layer_matrices, measure_moments
from recflow.core.seeding import make_rng
from recflow.modeling.batching import items_in_use
from recflow.modeling.encoder import WEIGHTS_NAME, TorchRuntime
from recflow.modeling.layout import read_ranker_config
from recflow.modeling.memory import peak_rss_bytes
from recflow.modeling.optimiser import deterministic
from recflow.modeling.ranker import (
    Ranker,
    count_parameters,
    load_encoder,
    load_parts,
    save_ranker,
)
from recflow.modeling.texts import TOKENIZER_NAME, TextTokenizer
from recflow.modeling.tracking import Tracker

_GROUP, _KEPT_OF_GROUP = 4, 2


@dataclass(frozen=True, slots=True)
class SparsificationReport:
    """What became zero and what that cost.

    Attributes:
        zero_share: Share of the layers' matrices that is zero.
        parameters: Weights of the encoder, zeros included.
        nonzero_parameters: Those that are not zero.
        parent_bytes: Size of the parent's encoder weights.
        bytes: Size of the sparse encoder's weights, packed.
        cosine_before_recovery: Mean cosine of item vectors to the parent's, before the recovery.
        cosine: The same at the end.
        parent_validation_auc: Mean AUC of the parent on (a part of) validation.
        validation_auc: The sparse ranker's on the same impressions.
        recovery_steps: Optimiser steps of the recovery.
        seconds: Wall time.
        peak_rss_bytes: Peak resident memory of the process so far.
    """

    zero_share: float
    parameters: int
    nonzero_parameters: int
    parent_bytes: int
    bytes: int
    cosine_before_recovery: float
    cosine: float
    parent_validation_auc: float
    validation_auc: float
    recovery_steps: int
    seconds: float
    peak_rss_bytes: int


def sparsify_ranker(
    *,
    parent: Path,
    output: Path,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    config: SparsificationConfig,
    tracker: Tracker,
) -> SparsificationReport:
    """Write a ranker whose encoder has sparse matrices; it is as fast as its parent.

    Args:
        parent: Directory of a PyTorch ranker.
        output: Existing empty directory.
        items: Item features.
        train: Training impressions; the texts of their items decide what matters.
        validation: Validation impressions, to report the accuracy.
        config: What becomes zero, and how to recover.
        tracker: Told the configuration, the distance to the parent and the result.

    Raises:
        ArtifactError: The parent is not a complete PyTorch ranker.
        ContractError: An impression names an unknown item.
        PermanentError: A loss or gradient is not a number.
    """
    started = time.monotonic()
    tracker.log_params(asdict(config))
    described = read_ranker_config(parent)
    parts = load_parts(parent, described)
    tokenizer = TextTokenizer(parent / TOKENIZER_NAME, parts.max_tokens)
    with deterministic(config.seed, config.threads):
        teacher, student = load_encoder(parent, described), load_encoder(parent, described)
        matrices = layer_matrices(student)
        index = items_in_use(items, [train], parts.user_model.shape.history_length)
        tokens = tokenizer(index.texts)
        targets = encode_all(teacher, tokens)

        moments: dict[str, Moments] = {}
        if config.score == "activation":
            drawn = make_rng(config.seed, "calibration").permutation(len(tokens))
            sample = [tokens[text] for text in drawn[: config.calibration_texts]]
            moments = measure_moments(student, matrices, sample)
        masks = {
            name: kept_weights(matrix.weight, config, moments.get(name))
            for name, matrix in matrices.items()
        }
        for name, matrix in matrices.items():
            _keep_mean(matrix, masks[name], moments.get(name))
        _set_zeros(matrices, masks)
        before = mean_cosine(student, tokens, targets)
        recover(
            student,
            tokens,
            targets,
            config,
            tracker=tracker,
            learning=student.layers.parameters(),
            after_step=partial(_set_zeros, matrices, masks),
        )
        after = mean_cosine(student, tokens, targets)

        save_ranker(output, student, tokenizer.path, parts)
        sampled = evenly_drawn(validation, config.max_validation_impressions)
        parent_auc, auc = (
            validation_auc(Ranker(TorchRuntime(encoder, None), tokenizer, parts), items, sampled)
            for encoder in (teacher, student)
        )
    tracker.log_metrics({"validation_auc": auc, "cosine": after}, step=config.recovery_steps)
    zeros = sum(int((matrix.weight == 0).sum()) for matrix in matrices.values())
    return SparsificationReport(
        zero_share=zeros / sum(matrix.weight.numel() for matrix in matrices.values()),
        parameters=count_parameters(student),
        nonzero_parameters=sum(int(p.count_nonzero()) for p in student.parameters()),
        parent_bytes=(parent / WEIGHTS_NAME).stat().st_size,
        bytes=(output / WEIGHTS_NAME).stat().st_size,
        cosine_before_recovery=before,
        cosine=after,
        parent_validation_auc=parent_auc,
        validation_auc=auc,
        recovery_steps=config.recovery_steps,
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss_bytes(),
    )


def kept_weights(weight: Tensor, config: SparsificationConfig, moments: Moments | None) -> Tensor:
    """Where a matrix keeps its weights.

    Args:
        weight: ``[outputs, inputs]``.
        config: Pattern and share.
        moments: Of the inputs; ``None`` scores the size of the weights alone. With them, the
            weights of one output are compared with each other, as Wanda does; without, all.

    Returns:
        Mask ``[outputs, inputs]``. Of 2:4, inputs beyond the last whole group of four are kept.
    """
    scores = weight.detach().abs()
    if moments is not None:
        squares = moments.covariance.diagonal() + moments.mean.square()
        scores = scores * squares.sqrt().to(scores.dtype)
    if config.pattern == "2:4":
        whole = weight.shape[1] // _GROUP * _GROUP
        groups = scores[:, :whole].unflatten(1, (-1, _GROUP))
        mask = torch.ones_like(scores, dtype=torch.bool)
        mask[:, :whole] = _highest(groups, _KEPT_OF_GROUP).flatten(1)
        return mask
    rows = scores if moments is not None else scores.flatten()[None]
    kept = round(rows.shape[1] * (1 - config.share))
    return _highest(rows, kept).view_as(scores)


def _highest(scores: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` highest along the last dimension; of equal ones the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, value=True)


def _keep_mean(matrix: nn.Linear, mask: Tensor, moments: Moments | None) -> None:
    """Let the bias take over the mean of what is lost, where the inputs are known."""
    if moments is None or matrix.bias is None:
        return
    with torch.no_grad():
        lost = matrix.weight.masked_fill(mask, 0).to(torch.float64) @ moments.mean
        matrix.bias.add_(lost)


def _set_zeros(matrices: Mapping[str, nn.Linear], masks: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, matrix in matrices.items():
            matrix.weight.masked_fill_(~masks[name], 0)

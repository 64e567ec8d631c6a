"""How well matrices survive a lower rank, and which rank each of them gets.

Of ``y = W x + b`` the best map of rank ``r`` keeps the ``r`` directions of ``y`` that vary most:
with the eigenvectors ``U`` of the outputs' covariance, ``W ≈ U (Uᵀ W)``, and the bias takes the
mean of what is lost. That is the activation-aware optimum (Yu and Wu 2023,
https://ojs.aaai.org/index.php/AAAI/article/view/26304; Chen et al. 2021, DRONE,
https://neurips.cc/virtual/2021/poster/28707, and Wang et al. 2024, SVD-LLM,
https://arxiv.org/abs/2403.07378, reach it through a root of the inputs' second moment) and needs no
inverse. The plain criterion takes the singular vectors of ``W`` itself instead, as
if all inputs were alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recflow.core.errors import ConfigError
from recflow.modeling.encoder import TextEncoder
from recflow.modeling.low_rank import token_table
from recflow.modeling.texts import length_buckets, pad_tokens


@dataclass(frozen=True, slots=True)
class Moments:
    """First two moments of the inputs of a matrix, float64.

    Attributes:
        mean: ``[inputs]``.
        covariance: ``[inputs, inputs]``.
    """

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The directions of a matrix's outputs in the order in which they matter.

    Attributes:
        basis: Orthonormal directions ``[outputs, directions]``, the most important first.
        energies: Share of the outputs' energy along each of them ``[directions]``; together 1.
    """

    basis: Tensor
    energies: Tensor


@dataclass(frozen=True, slots=True)
class Candidate:
    """What the allocation knows of one matrix.

    Attributes:
        rows: Its height.
        columns: Its width.
        energies: Those of its :class:`Spectrum`.
    """

    rows: int
    columns: int
    energies: Tensor


def layer_matrices(encoder: TextEncoder) -> dict[str, nn.Linear]:
    """The matrices of the transformer layers, by their name within the transformer."""
    inside = set(encoder.layers.modules())
    return {
        name: module
        for name, module in encoder.transformer.named_modules()
        if isinstance(module, nn.Linear) and module in inside
    }


def measure_moments(
    encoder: TextEncoder, matrices: Mapping[str, nn.Linear], tokens: list[list[int]]
) -> dict[str, Moments]:
    """Moments of what goes into each matrix, over all tokens of some texts but padding.

    A matrix without bias cannot make up for a lost mean: its mean is left at 0 and belongs to the
    second moment instead.

    Args:
        encoder: The encoder; it computes in float32.
        matrices: Linear layers of it that see states ``[texts, tokens, inputs]``.
        tokens: Token ids of the texts.
    """
    totals = {
        name: Moments(
            torch.zeros(matrix.in_features, dtype=torch.float64),
            torch.zeros(matrix.in_features, matrix.in_features, dtype=torch.float64),
        )
        for name, matrix in matrices.items()
    }
    count = 0
    for bucket in length_buckets(np.array([len(text) for text in tokens], dtype=np.int64)):
        ids, mask = map(torch.from_numpy, pad_tokens([tokens[place] for place in bucket]))
        hooks = [
            matrix.register_forward_pre_hook(partial(_add_moments, totals[name], mask))
            for name, matrix in matrices.items()
        ]
        try:
            with torch.inference_mode():
                encoder(ids, mask)
        finally:
            for hook in hooks:
                hook.remove()
        count += int(mask.sum())
    return {
        name: _moments(totals[name], count, centred=matrix.bias is not None)
        for name, matrix in matrices.items()
    }


def _add_moments(total: Moments, mask: Tensor, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    del module
    states = inputs[0][mask]
    total.mean.add_(states.sum(0))
    total.covariance.add_(states.T @ states)


def _moments(total: Moments, count: int, *, centred: bool) -> Moments:
    second = total.covariance / count
    if not centred:
        return Moments(torch.zeros_like(total.mean), second)
    mean = total.mean / count
    return Moments(mean, second - mean[:, None] * mean[None, :])


def token_moments(encoder: TextEncoder, tokens: list[list[int]]) -> Moments:
    """Moments of the one-hot inputs of the token embedding table: how often each token occurs.

    Each token counts once more than it occurs, so that those to come keep some weight. There is no
    bias behind a table, hence no mean; the covariance is diagonal, and only that is stored.

    Returns:
        ``covariance`` is the diagonal ``[rows]``.
    """
    rows = token_table(encoder.transformer).num_embeddings
    flat = torch.tensor([token for text in tokens for token in text])
    counts = torch.bincount(flat, minlength=rows).to(torch.float64) + 1
    return Moments(torch.zeros(rows, dtype=torch.float64), counts / counts.sum())


def output_spectrum(weight: Tensor, moments: Moments | None) -> Spectrum:
    """The directions of a matrix's outputs by their energy.

    Args:
        weight: Matrix ``[outputs, inputs]``.
        moments: Of the inputs, whose covariance may be a diagonal ``[inputs]``; ``None`` takes all
            inputs to be alike, which is the SVD of the weights.
    """
    matrix = weight.detach().to(torch.float64)
    outputs, inputs = matrix.shape
    if outputs <= inputs:
        gram = _times_covariance(matrix, moments) @ matrix.T
        energies, basis = torch.linalg.eigh(gram)
        energies, basis = energies.flip(0).clamp_min(0), basis.flip(1)
    else:
        if moments is not None:
            values, vectors = torch.linalg.eigh(_square(moments.covariance))
            matrix = matrix @ (vectors * values.clamp_min(0).sqrt())
        basis, singular, _ = torch.linalg.svd(matrix, full_matrices=False)
        energies = singular.square()
    return Spectrum(basis, energies / energies.sum())


def _times_covariance(matrix: Tensor, moments: Moments | None) -> Tensor:
    if moments is None:
        return matrix
    diagonal = moments.covariance.ndim == 1
    return matrix * moments.covariance if diagonal else matrix @ moments.covariance


def _square(covariance: Tensor) -> Tensor:
    return covariance.diag() if covariance.ndim == 1 else covariance


def lost_mean(weight: Tensor, basis: Tensor, moments: Moments) -> Tensor:
    """Mean of the outputs outside ``basis`` ``[outputs, rank]``: what the bias can take over."""
    mean = weight.detach().to(torch.float64) @ moments.mean
    return mean - basis @ (basis.T @ mean)


def output_error(weight: Tensor, basis: Tensor, moments: Moments, *, mean_kept: bool) -> float:
    """Mean squared error of the outputs as a share of their variance.

    Args:
        weight: Matrix ``[outputs, inputs]``.
        basis: Orthonormal directions that are left, ``[outputs, rank]``.
        moments: Of the inputs.
        mean_kept: Whether a bias takes over :func:`lost_mean`.
    """
    matrix = weight.detach().to(torch.float64)
    lost = matrix - basis @ (basis.T @ matrix)
    error = (_times_covariance(lost, moments) * lost).sum()
    if not mean_kept:
        error = error + lost_mean(weight, basis, moments).square().sum()
    return float(error / (_times_covariance(matrix, moments) * matrix).sum())


@dataclass(frozen=True, slots=True)
class _Option:
    """One choice for a matrix: its rank (0 leaves it whole), weights, and share of energy lost."""

    rank: int
    weights: int
    error: float


@dataclass(frozen=True, slots=True)
class _Upgrade:
    """From one option of a matrix to a better one."""

    matrix: str
    option: int
    weights: int
    gain: float


def allocate_ranks(
    candidates: Mapping[str, Candidate], ratio: float, multiple: int = 1
) -> dict[str, int]:
    """Ranks that keep a share of the weights and lose the least energy, summed over the matrices.

    Every matrix starts at its lowest rank. What a further weight gains falls along the lower convex
    hull of a matrix's options, so taking the best upgrade of all matrices first is the optimum of
    the Lagrangian; what is then left of the budget goes to single steps. To be whole is the last
    option of each matrix: beyond ``rows · columns / (rows + columns)`` a rank saves nothing.

    Args:
        candidates: The matrices by name.
        ratio: Share of their weights to keep at most.
        multiple: Ranks are multiples of it.

    Returns:
        Rank of each matrix that is to be factorised; the others stay whole.

    Raises:
        ConfigError: Even the lowest ranks keep more than ``ratio``.
    """
    options = {name: _options(candidate, multiple) for name, candidate in candidates.items()}
    everything = sum(candidate.rows * candidate.columns for candidate in candidates.values())
    budget = int(ratio * everything)
    chosen = dict.fromkeys(options, 0)
    left = budget - sum(choices[0].weights for choices in options.values())
    if left < 0:
        least = (budget - left) / everything
        raise ConfigError.of("ratio", ratio, f"at least {least:.3f} for ranks of {multiple}")
    upgrades = [
        upgrade for name, choices in options.items() for upgrade in _hull_upgrades(name, choices)
    ]
    closed: set[str] = set()
    for upgrade in sorted(upgrades, key=lambda one: -one.gain):
        if upgrade.matrix not in closed and upgrade.weights <= left:
            chosen[upgrade.matrix] = upgrade.option
            left -= upgrade.weights
        else:
            closed.add(upgrade.matrix)
    while steps := [
        step
        for name, choices in options.items()
        if chosen[name] + 1 < len(choices)
        and (step := _upgrade(name, choices, chosen[name], chosen[name] + 1)).weights <= left
    ]:
        best = max(steps, key=lambda one: one.gain)
        chosen[best.matrix] = best.option
        left -= best.weights
    ranks = {name: choices[chosen[name]].rank for name, choices in options.items()}
    return {name: rank for name, rank in ranks.items() if rank}


def _options(candidate: Candidate, multiple: int) -> list[_Option]:
    """From the lowest rank to the whole matrix, by rising weights."""
    rows, columns = candidate.rows, candidate.columns
    lost = 1 - candidate.energies.cumsum(0)
    ranks = range(multiple, min(rows, columns) + 1, multiple)
    options = [
        _Option(rank, rank * (rows + columns), float(lost[rank - 1]))
        for rank in ranks
        if rank * (rows + columns) < rows * columns
    ]
    return [*options, _Option(0, rows * columns, 0.0)]


def _upgrade(name: str, options: list[_Option], start: int, stop: int) -> _Upgrade:
    weights = options[stop].weights - options[start].weights
    gain = (options[start].error - options[stop].error) / weights
    return _Upgrade(name, stop, weights, gain)


def _hull_upgrades(name: str, options: list[_Option]) -> list[_Upgrade]:
    """Upgrades along the lower convex hull of (weights, error): gain per weight never rises."""
    hull = [0]
    for point in range(1, len(options)):
        while len(hull) > 1 and (
            _upgrade(name, options, hull[-2], hull[-1]).gain
            <= _upgrade(name, options, hull[-1], point).gain
        ):
            hull.pop()
        hull.append(point)
    return [_upgrade(name, options, start, stop) for start, stop in pairwise(hull)]

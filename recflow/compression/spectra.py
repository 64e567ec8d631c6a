"""How well matrices survive a lower rank, and which rank each of them gets.

Of ``y = W x + b`` the best map of rank ``r`` keeps the ``r`` directions of ``y`` that vary most:
with the eigenvectors ``U`` of the outputs' covariance, ``W ≈ U (Uᵀ W)``, and the bias takes the
mean of what is lost. That is the activation-aware optimum (Yu and Wu 2023,
https://ojs.aaai.org/index.php/AAAI/article/view/26304; Chen et al. 2021, DRONE,
https://neurips.cc/virtual/2021/poster/28707, and Wang et al. 2024, SVD-LLM,
https://arxiv.org/abs/2403.07378, reach it through a root of the inputs' second moment) and needs no
inverse. But it takes an error of one output to be as bad as that of any other. With the second
moment ``G`` of the gradients of the item vectors by ``y``, the error of ``G½ y`` is, to first
order, the squared change of the item vectors, in the same unit for all matrices: the curvature of
K-FAC (Martens and Grosse 2015, https://arxiv.org/abs/1503.05671), where Hsu et al. 2022
(https://arxiv.org/abs/2207.00112) weigh whole rows. The plainest criterion takes the singular
vectors of ``W`` itself, as if all inputs and outputs were alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recflow.core.errors import ConfigError
from recflow.modeling.encoder import TextEncoder
from recflow.modeling.low_rank import token_table
from recflow.modeling.texts import Rows, length_buckets, pad_tokens

_DAMPING = 0.01  # of the mean diagonal of a sensitivity


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

    Of all directions together ``expand @ project`` is the identity on the outputs; of the first
    ``r`` it is the projection that loses least.

    Attributes:
        expand: From directions to outputs ``[outputs, directions]``.
        project: From outputs to directions ``[directions, outputs]``.
        energies: What the loss of each costs ``[directions]``, falling.
    """

    expand: Tensor
    project: Tensor
    energies: Tensor

    def first(self, rank: int) -> Spectrum:
        """The ``rank`` directions that matter most."""
        return Spectrum(self.expand[:, :rank], self.project[:rank], self.energies[:rank])

    def lost(self, outputs: Tensor) -> Tensor:
        """What of ``[outputs, ...]`` none of the directions holds."""
        return outputs - self.expand @ (self.project @ outputs)


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


def measure_sensitivity(
    encoder: TextEncoder,
    matrices: Mapping[str, nn.Module],
    tokens: list[list[int]],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Second moment of the gradients of the item vectors by each matrix's outputs.

    A vector times random numbers has gradients whose second moment is that of the whole Jacobian,
    so one backward pass is enough (Hutchinson's estimator).

    Args:
        encoder: The encoder; it computes in float32.
        matrices: Modules of it whose outputs are states ``[texts, tokens, outputs]``.
        tokens: Token ids of the texts.
        generator: Of the random numbers.

    Returns:
        ``[outputs, outputs]`` float64 of each, over all tokens of a text but padding, per text.
    """
    totals: dict[str, Tensor] = {}
    encoder.requires_grad_(False)
    for bucket in length_buckets(np.array([len(text) for text in tokens], dtype=np.int64)):
        ids, mask = map(torch.from_numpy, pad_tokens([tokens[place] for place in bucket]))
        hooks = [
            module.register_forward_hook(partial(_watch_gradient, totals, name, mask))
            for name, module in matrices.items()
        ]
        try:
            vectors = encoder(ids, mask)
        finally:
            for hook in hooks:
                hook.remove()
        (vectors * torch.randn(vectors.shape, generator=generator)).sum().backward()
    encoder.requires_grad_(True)
    return {name: total / len(tokens) for name, total in totals.items()}


def _watch_gradient(
    totals: dict[str, Tensor],
    name: str,
    mask: Tensor,
    module: nn.Module,
    inputs: tuple[Any, ...],
    outputs: Tensor,
) -> Tensor:
    """Once the gradient of ``outputs`` is known, add its second moment."""
    del module, inputs

    def add(gradient: Tensor) -> None:
        chosen = gradient[mask]
        moment = (chosen.T @ chosen).to(torch.float64)
        totals[name] = totals[name] + moment if name in totals else moment

    watched = outputs if outputs.requires_grad else outputs.requires_grad_(True)
    watched.register_hook(add)
    return watched


def output_spectrum(
    weight: Tensor, moments: Moments | None, sensitivity: Tensor | None = None
) -> Spectrum:
    """The directions of a matrix's outputs by their energy.

    Args:
        weight: Matrix ``[outputs, inputs]``.
        moments: Of the inputs, whose covariance may be a diagonal ``[inputs]``; ``None`` takes all
            inputs to be alike, which is the SVD of the weights.
        sensitivity: Second moment of the gradients ``[outputs, outputs]``; the energies are then
            absolute. ``None`` takes all outputs to be alike, and the energies are shares of their
            sum.
    """
    matrix = weight.detach().to(torch.float64)
    if sensitivity is None:
        basis, energies = _principal(matrix, moments)
        return Spectrum(basis, basis.T, energies / energies.sum())
    # Directions without any gradient on these texts must not become free of charge.
    damping = _DAMPING * sensitivity.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(sensitivity + damping)
    root, inverse = ((vectors * values.pow(power)) @ vectors.T for power in (0.5, -0.5))
    basis, energies = _principal(root @ matrix, moments)
    return Spectrum(inverse @ basis, basis.T @ root, energies)


def _principal(matrix: Tensor, moments: Moments | None) -> tuple[Tensor, Tensor]:
    """Principal directions of ``matrix @ inputs`` ``[outputs, directions]`` and their energies."""
    outputs, inputs = matrix.shape
    if outputs <= inputs:
        energies, basis = torch.linalg.eigh(_times_covariance(matrix, moments) @ matrix.T)
        return basis.flip(1), energies.flip(0).clamp_min(0)
    if moments is not None:
        values, vectors = torch.linalg.eigh(_square(moments.covariance))
        matrix = matrix @ (vectors * values.clamp_min(0).sqrt())
    basis, singular, _ = torch.linalg.svd(matrix, full_matrices=False)
    return basis, singular.square()


def _times_covariance(matrix: Tensor, moments: Moments | None) -> Tensor:
    if moments is None:
        return matrix
    diagonal = moments.covariance.ndim == 1
    return matrix * moments.covariance if diagonal else matrix @ moments.covariance


def _square(covariance: Tensor) -> Tensor:
    return covariance.diag() if covariance.ndim == 1 else covariance


def output_error(weight: Tensor, kept: Spectrum, moments: Moments, *, mean_kept: bool) -> float:
    """Mean squared error of the outputs as a share of their variance.

    Args:
        weight: Matrix ``[outputs, inputs]``.
        kept: The directions that are left.
        moments: Of the inputs.
        mean_kept: Whether a bias takes over the mean of what is lost.
    """
    matrix = weight.detach().to(torch.float64)
    lost = kept.lost(matrix)
    error = (_times_covariance(lost, moments) * lost).sum()
    if not mean_kept:
        error = error + (lost @ moments.mean).square().sum()
    return float(error / (_times_covariance(matrix, moments) * matrix).sum())


@dataclass(frozen=True, slots=True)
class _Options:
    """The choices for one matrix, from the lowest rank to the whole matrix.

    Attributes:
        ranks: Rank of each choice; 0 leaves the matrix whole.
        weights: Weights of each, rising.
        errors: Share of the energy that each loses, falling.
    """

    ranks: Rows
    weights: Rows
    errors: NDArray[np.float64]

    def best_upgrade(self, chosen: int, left: int) -> tuple[float, int]:
        """Of the choices above ``chosen`` the one that gains most a weight, and that gain.

        That is the next corner of the lower convex hull of what ``left`` weights can pay for;
        ``chosen`` itself, with a gain below 0, where they can pay for nothing.
        """
        extra = self.weights[chosen + 1 :] - self.weights[chosen]
        extra = extra[extra <= left]
        if not len(extra):
            return -1.0, chosen
        errors = self.errors[chosen + 1 : chosen + 1 + len(extra)]
        gains = (self.errors[chosen] - errors) / extra
        return float(gains.max()), chosen + 1 + int(gains.argmax())


def allocate_ranks(
    candidates: Mapping[str, Candidate], ratio: float, multiple: int = 1
) -> dict[str, int]:
    """Ranks that keep a share of the weights and lose the least energy, summed over the matrices.

    Every matrix starts at its lowest rank; then the upgrade that gains most a weight is taken, of
    whichever matrix, as long as the budget pays for one. Along the convex hulls of the matrices'
    choices that is the optimum of the Lagrangian. To be whole is the last choice of each matrix:
    beyond ``rows · columns / (rows + columns)`` a rank saves nothing.

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
    least = sum(int(choices.weights[0]) for choices in options.values())
    left = int(ratio * everything) - least
    if left < 0:
        allowed = f"at least {least / everything:.3f} for ranks of {multiple}"
        raise ConfigError.of("ratio", ratio, allowed)
    chosen = dict.fromkeys(options, 0)
    upgrades = {name: choices.best_upgrade(0, left) for name, choices in options.items()}
    while upgrades:
        name = max(upgrades, key=lambda one: upgrades[one][0])
        gain, choice = upgrades[name]
        weights = options[name].weights
        extra = int(weights[choice] - weights[chosen[name]])
        if gain < 0:
            del upgrades[name]
            continue
        if extra <= left:
            chosen[name], left = choice, left - extra
        upgrades[name] = options[name].best_upgrade(chosen[name], left)
    ranks = {name: int(choices.ranks[chosen[name]]) for name, choices in options.items()}
    return {name: rank for name, rank in ranks.items() if rank}


def _options(candidate: Candidate, multiple: int) -> _Options:
    rows, columns = candidate.rows, candidate.columns
    highest = (rows * columns - 1) // (rows + columns)
    ranks = np.arange(multiple, highest + 1, multiple)
    energies = candidate.energies.numpy()
    errors = energies.sum() - energies.cumsum()[ranks - 1]
    return _Options(
        ranks=np.append(ranks, 0),
        weights=np.append(ranks * (rows + columns), rows * columns),
        errors=np.append(errors, 0.0),
    )

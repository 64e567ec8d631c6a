import numpy as np
import pytest
import torch
from torch import Tensor

from recflow.compression.spectra import (
    Candidate,
    Moments,
    allocate_ranks,
    output_error,
    output_spectrum,
)
from recflow.core.errors import ConfigError


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _anisotropic(inputs: int) -> tuple[Tensor, Moments]:
    """Inputs of very different sizes in a turned basis, with a mean."""
    turn = torch.linalg.qr(_random(inputs, inputs, seed=1)).Q
    scales = torch.logspace(1, -2, inputs, dtype=torch.float64)
    data = _random(4000, inputs, seed=2) * scales @ turn + 3 * turn[-1]
    mean = data.mean(0)
    return data, Moments(mean, data.T @ data / len(data) - mean[:, None] * mean)


def _sensitivity(outputs: int) -> Tensor:
    gradients = _random(500, outputs, seed=3) * torch.logspace(0, -2, outputs, dtype=torch.float64)
    return gradients.T @ gradients / 500


@pytest.mark.parametrize("sensitive", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(12, 20), (20, 12), (16, 16)])
def test_at_full_rank_nothing_is_lost(outputs: int, inputs: int, sensitive: bool) -> None:
    weight, (_, moments) = _random(outputs, inputs), _anisotropic(inputs)
    for given in (moments, None):
        spectrum = output_spectrum(weight, given, _sensitivity(outputs) if sensitive else None)
        assert spectrum.lost(weight).abs().max() < 1e-9
        assert (spectrum.energies.diff() <= 1e-12).all()
        if not sensitive:
            assert spectrum.energies.sum() == pytest.approx(1)
        error = output_error(weight, spectrum, moments, mean_kept=True)
        assert error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("outputs", "inputs"), [(12, 20), (20, 12)])
def test_the_error_is_that_of_the_data_and_of_the_spectrum(outputs: int, inputs: int) -> None:
    weight, (data, moments) = _random(outputs, inputs), _anisotropic(inputs)
    kept = output_spectrum(weight, moments).first(3)
    outcome = data @ weight.T
    lost = kept.lost(outcome.T).T
    variance = (outcome - outcome.mean(0)).square().sum()
    expected = float((lost - lost.mean(0)).square().sum() / variance)
    assert output_error(weight, kept, moments, mean_kept=True) == pytest.approx(expected)
    assert 1 - float(kept.energies.sum()) == pytest.approx(expected)
    without_mean = float(lost.square().sum() / variance)
    assert output_error(weight, kept, moments, mean_kept=False) == pytest.approx(without_mean)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_knowing_the_gradients_loses_less_of_what_counts(rank: int) -> None:
    weight, (data, moments), sensitivity = _random(16, 16), _anisotropic(16), _sensitivity(16)
    outcome = (data - moments.mean) @ weight.T

    def change(given: Tensor | None) -> float:
        lost = output_spectrum(weight, moments, given).first(rank).lost(outcome.T)
        return float(((sensitivity @ lost) * lost).sum())

    assert change(sensitivity) < 0.9 * change(None)


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_knowing_the_inputs_beats_plain_svd(rank: int) -> None:
    weight, (_, moments) = _random(16, 16), _anisotropic(16)
    errors = [
        output_error(weight, output_spectrum(weight, given).first(rank), moments, mean_kept=True)
        for given in (moments, None)
    ]
    assert errors[0] < 0.8 * errors[1]


def test_a_diagonal_covariance_is_the_same_as_its_square() -> None:
    weight, diagonal = _random(6, 9), torch.rand(9, dtype=torch.float64) + 0.1
    zero = torch.zeros(9, dtype=torch.float64)
    flat, square = (Moments(zero, one) for one in (diagonal, diagonal.diag()))
    energies = [output_spectrum(weight, moments).energies for moments in (flat, square)]
    torch.testing.assert_close(*energies)
    kept = output_spectrum(weight, flat).first(2)
    errors = [output_error(weight, kept, one, mean_kept=True) for one in (flat, square)]
    assert errors[0] == pytest.approx(errors[1])


def _candidate(rows: int, columns: int, decay: float) -> Candidate:
    energies = torch.logspace(0, -decay, min(rows, columns), dtype=torch.float64)
    return Candidate(rows, columns, energies / energies.sum())


def _weights(candidates: dict[str, Candidate], ranks: dict[str, int]) -> int:
    return sum(
        ranks[name] * (one.rows + one.columns) if name in ranks else one.rows * one.columns
        for name, one in candidates.items()
    )


def test_a_flat_spectrum_gets_the_higher_rank() -> None:
    candidates = {"flat": _candidate(64, 64, 1), "steep": _candidate(64, 64, 6)}
    ranks = allocate_ranks(candidates, 0.5)
    assert ranks["flat"] > 1.5 * ranks["steep"]


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("ratio", np.linspace(0.2, 0.95, 6).tolist())
def test_the_ratio_is_nearly_reached_and_never_passed(ratio: float, multiple: int) -> None:
    candidates = {
        str(number): _candidate(rows, columns, decay)
        for number, (rows, columns, decay) in enumerate(
            [(32, 32, 2), (64, 32, 1), (32, 96, 4), (48, 32, 0.5), (32, 32, 3)]
        )
    }
    ranks = allocate_ranks(candidates, ratio, multiple)
    everything = _weights(candidates, {})
    kept = _weights(candidates, ranks)
    assert ratio - multiple * (32 + 96) / everything < kept / everything <= ratio
    for name, rank in ranks.items():
        one = candidates[name]
        assert rank % multiple == 0
        assert 0 < rank * (one.rows + one.columns) < one.rows * one.columns


def test_what_a_rank_would_not_shrink_stays_whole() -> None:
    flat = _candidate(32, 32, 0)
    steep = _candidate(64, 64, 8)
    ranks = allocate_ranks({"flat": flat, "steep": steep}, 0.6)
    assert "flat" not in ranks
    assert 0 < ranks["steep"] < 32


def test_no_other_pair_of_ranks_within_the_budget_loses_less() -> None:
    candidates = {"a": _candidate(24, 24, 2), "b": _candidate(24, 24, 3)}
    ranks = allocate_ranks(candidates, 0.5)

    def lost(chosen: dict[str, int]) -> float:
        return sum(1 - float(candidates[n].energies[:r].sum()) for n, r in chosen.items())

    budget = 0.5 * _weights(candidates, {})
    others = ({"a": a, "b": b} for a in range(1, 12) for b in range(1, 12))
    best = min(lost(pair) for pair in others if _weights(candidates, pair) <= budget)
    assert lost(ranks) == pytest.approx(best)


def test_a_ratio_below_the_lowest_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ratio = 0\.1 .* at least 0\.500"):
        allocate_ranks({"a": _candidate(32, 32, 1)}, 0.1, multiple=8)

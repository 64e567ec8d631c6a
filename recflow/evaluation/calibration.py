"""From scores to probabilities and ratings, fitted on the validation split only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from recflow.core.errors import ContractError
from recflow.evaluation.slates import FloatArray

_MAX_STEPS = 100
_RELATIVE_TOLERANCE = 1e-12
_RIDGE = 1e-9  # keeps the Hessian invertible when all scores are equal


@dataclass(frozen=True, slots=True)
class PlattScaling:
    """``P(click) = sigmoid(slope * score + intercept)``."""

    slope: float
    intercept: float

    def log_odds(self, scores: FloatArray) -> FloatArray:
        """Calibrated log-odds, float64, shape of ``scores``."""
        return self.slope * scores + self.intercept

    def probabilities(self, scores: FloatArray) -> FloatArray:
        """Calibrated click probability, float64, shape of ``scores``."""
        return _sigmoid(self.log_odds(scores))


@dataclass(frozen=True, slots=True)
class LinearMap:
    """``rating = slope * score + intercept``."""

    slope: float
    intercept: float

    def __call__(self, scores: FloatArray) -> FloatArray:
        """Predicted rating, float64, shape of ``scores``."""
        return self.slope * scores + self.intercept


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Candidates of similar predicted probability.

    Attributes:
        count: Candidates in the bin.
        predicted: Their mean predicted probability.
        observed: The share of them that was clicked.
    """

    count: int
    predicted: float
    observed: float


def fit_platt(scores: FloatArray, labels: npt.NDArray[Any]) -> PlattScaling:
    """Fit the click probability to scores: logistic regression with Platt's smoothed targets.

    Newton's method with step halving on standardised scores (Platt, 1999; Lin, Lin & Weng, 2007, *A
    note on Platt's probabilistic outputs*). The smoothed targets keep the fit finite when the
    scores separate the classes.

    Args:
        scores: Finite scores, float64 [n].
        labels: 1 where clicked, else 0, [n].

    Raises:
        ContractError: There is no click or no non-click to fit to.
    """
    clicks = float(labels.sum())
    others = float(len(labels)) - clicks
    if not clicks or not others:
        raise ContractError(
            f"calibration needs clicks and non-clicks; there are {clicks:.0f} and {others:.0f}"
        )
    center, scale = float(scores.mean()), float(scores.std()) or 1.0
    targets = np.where(labels == 1, (clicks + 1) / (clicks + 2), 1 / (others + 2))
    design = np.stack([(scores - center) / scale, np.ones_like(scores)])
    slope, intercept = _minimise(design, targets, np.array([0.0, np.log(clicks / others)]))
    return PlattScaling(slope / scale, intercept - slope * center / scale)


def log_losses(log_odds: FloatArray, labels: npt.NDArray[Any]) -> FloatArray:
    """``-log P(label)`` of each candidate in nats, computed from log-odds without overflow."""
    return np.logaddexp(0.0, log_odds) - labels * log_odds


def reliability(
    probabilities: FloatArray, labels: npt.NDArray[Any], bins: int
) -> tuple[ReliabilityBin, ...]:
    """Compare predicted with seen click rates over at most ``bins`` bins of equal count.

    Click rates are small and skewed: bins of equal width would put almost all candidates in the
    first (Nguyen & O'Connor, 2015). Equal probabilities share a bin, so there may be fewer.
    """
    if not len(probabilities):
        return ()
    inner = np.linspace(0, 1, bins + 1)[1:-1]
    edges = np.unique(np.quantile(probabilities, inner, method="inverted_cdf"))
    member = np.searchsorted(edges, probabilities, side="left")
    counts = np.bincount(member)
    predicted = np.bincount(member, weights=probabilities)
    observed = np.bincount(member, weights=labels)
    return tuple(
        ReliabilityBin(int(n), float(p / n), float(o / n))
        for n, p, o in zip(counts, predicted, observed, strict=True)
        if n
    )


def calibration_error(bins: tuple[ReliabilityBin, ...]) -> float:
    """Expected calibration error: mean ``|predicted - observed|``, weighted by count."""
    total = sum(b.count for b in bins)
    return sum(b.count * abs(b.predicted - b.observed) for b in bins) / total


def fit_linear(scores: FloatArray, ratings: FloatArray) -> LinearMap:
    """Least-squares line from scores to ratings; the mean rating where all scores are equal.

    Raises:
        ContractError: There is no rating to fit to.
    """
    if not len(ratings):
        raise ContractError("the rating map needs at least one rating")
    centered = scores - scores.mean()
    spread = float(centered @ centered)
    slope = float(centered @ ratings) / spread if spread > 0 else 0.0
    return LinearMap(slope, float(ratings.mean() - slope * scores.mean()))


def _minimise(design: FloatArray, targets: FloatArray, start: FloatArray) -> tuple[float, float]:
    """Weights [2] with the least mean log-loss of ``targets`` given ``design`` [2, n]."""
    weights = start
    loss = float(log_losses(weights @ design, targets).mean())
    for _ in range(_MAX_STEPS):
        probabilities = _sigmoid(weights @ design)
        gradient = design @ (probabilities - targets) / len(targets)
        curvature = (design * (probabilities * (1 - probabilities))) @ design.T / len(targets)
        step = np.linalg.solve(curvature + _RIDGE * np.eye(2), gradient)
        previous = loss
        while True:
            loss = float(log_losses((weights - step) @ design, targets).mean())
            if loss <= previous or not np.any(np.abs(step) > _RELATIVE_TOLERANCE):
                break
            step = step / 2
        weights = weights - step
        if previous - loss <= _RELATIVE_TOLERANCE * max(previous, 1.0):
            break
    return float(weights[0]), float(weights[1])


def _sigmoid(values: FloatArray) -> FloatArray:
    return np.exp(-np.logaddexp(0.0, -values))

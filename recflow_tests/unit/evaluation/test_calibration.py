import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from recflow.core.errors import ContractError
from recflow.evaluation.calibration import (
    ReliabilityBin,
    calibration_error,
    fit_linear,
    fit_platt,
    log_losses,
    reliability,
)


def test_platt_agrees_with_weighted_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(3, 2, size=500)
    labels = (rng.random(500) < 1 / (1 + np.exp(2 - scores / 2))).astype(int)
    clicks, others = labels.sum(), (1 - labels).sum()
    # A smoothed target t is a click of weight t and a non-click of weight 1 - t.
    target = np.where(labels == 1, (clicks + 1) / (clicks + 2), 1 / (others + 2))
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(
        np.tile(scores, 2)[:, None],
        np.repeat([1, 0], 500),
        sample_weight=np.concatenate([target, 1 - target]),
    )
    platt = fit_platt(scores, labels)
    assert platt.slope == pytest.approx(model.coef_[0, 0], rel=1e-4)
    assert platt.intercept == pytest.approx(model.intercept_[0], rel=1e-4)


def test_platt_stays_finite_where_scores_separate_the_classes() -> None:
    scores = np.array([0.0, 1.0, 2.0, 3.0])
    platt = fit_platt(scores, np.array([0, 0, 1, 1]))
    assert np.isfinite([platt.slope, platt.intercept]).all()
    probabilities = platt.probabilities(scores)
    assert probabilities[:2].max() < 0.5 < probabilities[2:].min()


def test_platt_of_constant_scores_is_the_click_rate() -> None:
    labels = np.array([1] * 100 + [0] * 300)
    platt = fit_platt(np.full(400, 7.0), labels)
    assert platt.probabilities(np.array([7.0]))[0] == pytest.approx(0.25, abs=0.003)


@pytest.mark.parametrize("factor", [1e-8, 1.0, 1e8])
def test_platt_does_not_depend_on_the_scale_of_the_scores(factor: float) -> None:
    rng = np.random.default_rng(3)
    scores, labels = rng.normal(size=300), rng.integers(0, 2, size=300)
    expected = fit_platt(scores, labels).probabilities(scores)
    scaled = fit_platt(scores * factor, labels).probabilities(scores * factor)
    np.testing.assert_allclose(scaled, expected, atol=1e-6)


@pytest.mark.parametrize("labels", [[0, 0], [1, 1], []])
def test_platt_needs_both_outcomes(labels: list[int]) -> None:
    with pytest.raises(ContractError, match="needs clicks and non-clicks"):
        fit_platt(np.zeros(len(labels)), np.array(labels))


def test_log_loss_by_hand_and_without_overflow() -> None:
    losses = log_losses(np.array([0.0, np.log(3.0), -1e6, 1e6]), np.array([1, 0, 0, 0]))
    np.testing.assert_allclose(losses, [np.log(2), np.log(4), 0.0, 1e6], atol=1e-12)


def test_reliability_by_hand() -> None:
    probabilities = np.array([0.1, 0.1, 0.3, 0.4])
    bins = reliability(probabilities, np.array([0, 1, 0, 1]), bins=2)
    assert bins == (ReliabilityBin(2, 0.1, 0.5), ReliabilityBin(2, pytest.approx(0.35), 0.5))
    assert calibration_error(bins) == pytest.approx((2 * 0.4 + 2 * 0.15) / 4)


def test_equal_probabilities_share_a_bin() -> None:
    bins = reliability(np.full(10, 0.2), np.array([1, 0] * 5), bins=5)
    assert bins == (ReliabilityBin(10, pytest.approx(0.2), 0.5),)


def test_reliability_counts_everything_once() -> None:
    rng = np.random.default_rng(4)
    probabilities, labels = rng.random(1003), rng.integers(0, 2, 1003)
    bins = reliability(probabilities, labels, bins=15)
    assert len(bins) == 15
    assert sum(b.count for b in bins) == 1003
    assert max(b.count for b in bins) - min(b.count for b in bins) <= 1
    assert sum(b.count * b.observed for b in bins) == pytest.approx(labels.sum())
    assert reliability(np.empty(0), np.empty(0), bins=15) == ()


def test_line_agrees_with_polyfit_and_is_the_mean_of_constant_scores() -> None:
    rng = np.random.default_rng(5)
    scores, ratings = rng.normal(size=50), rng.normal(size=50)
    line = fit_linear(scores, ratings)
    np.testing.assert_allclose([line.slope, line.intercept], np.polyfit(scores, ratings, 1))
    flat = fit_linear(np.full(50, 3.0), ratings)
    assert flat(np.array([99.0]))[0] == pytest.approx(ratings.mean())
    with pytest.raises(ContractError, match="at least one rating"):
        fit_linear(np.empty(0), np.empty(0))

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from recflow.core.errors import ConfigError, ContractError
from recflow.core.seeding import make_rng
from recflow.evaluation.metrics import ranking_metrics
from recflow.modeling.config import METRICS, ObjectiveConfig
from recflow.modeling.objectives import (
    greater_is_better,
    mean_auc,
    mean_ndcg,
    per_click_losses,
    rating_rmse,
    validation_metric,
)

SCORES = torch.tensor([[1.0, 0.0, 5.0], [0.5, 2.0, -1.0]])
PRESENT = torch.tensor([[True, True, False], [True, True, True]])


def random_slates(seed: int, ties: int = 6):
    rng = make_rng(seed, "slates")
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 30, 50))])
    scores = rng.integers(0, ties, offsets[-1]).astype(np.float64)
    return scores, rng.random(offsets[-1]) < 0.3, offsets


def test_cross_entropy_by_hand() -> None:
    losses = per_click_losses(ObjectiveConfig(), SCORES, PRESENT)
    second = math.log(math.exp(0.5) + math.exp(2) + math.exp(-1)) - 0.5
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-1)), second])


def test_the_target_may_be_any_column() -> None:
    losses = per_click_losses(ObjectiveConfig(), SCORES, PRESENT, target=torch.tensor([1, 2]))
    second = math.log(math.exp(0.5) + math.exp(2) + math.exp(-1)) + 1
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(1)), second])


def test_binary_cross_entropy_by_hand() -> None:
    config = ObjectiveConfig(loss="binary_cross_entropy")
    losses = per_click_losses(config, SCORES, PRESENT, target=torch.tensor([0, 1]))

    def softplus(x: float) -> float:
        return math.log(1 + math.exp(x))

    first = (softplus(-1) + softplus(0)) / 2
    second = (softplus(0.5) + softplus(-2) + softplus(-1)) / 3
    assert losses.tolist() == pytest.approx([first, second])


def test_squared_error_by_hand() -> None:
    config = ObjectiveConfig(loss="mean_squared_error")
    losses = per_click_losses(
        config, SCORES, PRESENT, target=torch.tensor([1, 0]), ratings=torch.tensor([-1.5, 2.0])
    )
    assert losses.tolist() == pytest.approx([1.5**2, 1.5**2])
    with pytest.raises(ConfigError, match="mean_squared_error"):
        per_click_losses(config, SCORES, PRESENT)


def test_contrastive_by_hand() -> None:
    config = ObjectiveConfig(loss="contrastive", temperature=0.5)
    shares = torch.tensor([0.5, 0.25, 0.25])
    losses = per_click_losses(
        config, SCORES, PRESENT, target=torch.tensor([0, 2]), log_frequency=shares.log()
    )
    # exp(score / temperature) over the share
    first, second = [math.exp(2) / 0.5, 1 / 0.25], [math.e / 0.5, math.exp(4) * 4, math.exp(-2) * 4]
    expected = [-math.log(first[0] / sum(first)), -math.log(second[2] / sum(second))]
    assert losses.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "contrastive"])
def test_absent_candidates_have_no_gradient(loss: str) -> None:
    scores = SCORES.clone().requires_grad_()
    per_click_losses(ObjectiveConfig(loss=loss), scores, PRESENT).sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert torch.equal(scores.grad != 0, PRESENT)


def test_losses_of_clicks_do_not_mix() -> None:
    for loss in ("cross_entropy", "binary_cross_entropy", "contrastive"):
        together = per_click_losses(ObjectiveConfig(loss=loss), SCORES, PRESENT)
        alone = [
            per_click_losses(ObjectiveConfig(loss=loss), SCORES[[row]], PRESENT[[row]])
            for row in range(2)
        ]
        torch.testing.assert_close(together, torch.cat(alone))


def test_auc_by_hand() -> None:
    # First: the click beats one of two others. Second: a tie, half credit. Third: no click.
    scores = np.array([0.5, 0.9, 0.1, 1.0, 1.0, 3.0, 4.0])
    clicked = np.array([True, False, False, True, False, False, False])
    assert mean_auc(scores, clicked, np.array([0, 3, 5, 7])) == (0.5 + 0.5) / 2


def test_ndcg_by_hand() -> None:
    # First: clicks at ranks 1 and 3 of 3. Second: tied with one other at ranks 1 and 2.
    scores = np.array([3.0, 2.0, 1.0, 1.0, 1.0, 0.0])
    clicked = np.array([True, False, True, True, False, False])
    first = (1 + 1 / 2) / (1 + 1 / math.log2(3))
    second = (1 + 1 / math.log2(3)) / 2
    offsets = np.array([0, 3, 6])
    assert mean_ndcg(scores, clicked, offsets) == pytest.approx((first + second) / 2)
    assert mean_ndcg(scores, clicked, offsets, k=1) == pytest.approx((1 + 0.5) / 2)


def test_auc_agrees_with_scikit_learn() -> None:
    scores, clicked, offsets = random_slates(0)
    spans = [slice(a, b) for a, b in itertools.pairwise(offsets)]
    expected = [
        roc_auc_score(clicked[span], scores[span])
        for span in spans
        if 0 < clicked[span].sum() < clicked[span].size
    ]
    assert mean_auc(scores, clicked, offsets) == pytest.approx(np.mean(expected), abs=1e-12)


@settings(deadline=None)
@given(seed=st.integers(0, 1_000), ties=st.integers(1, 60))
def test_validation_measures_as_evaluation_does(seed: int, ties: int) -> None:
    scores, clicked, offsets = random_slates(seed, ties)
    expected = ranking_metrics(scores, clicked.astype(np.int8), offsets)
    for name in ("auc", "ndcg@10"):
        value = validation_metric(name, scores, clicked=clicked, offsets=offsets)
        assert value == pytest.approx(np.nanmean(expected[name]), abs=1e-12)


@pytest.mark.parametrize("metric", [mean_auc, mean_ndcg])
def test_nothing_to_rank_is_an_error(metric) -> None:
    with pytest.raises(ContractError, match="no impression has both"):
        metric(np.array([1.0, 2.0]), np.array([True, True]), np.array([0, 2]))
    with pytest.raises(ContractError, match="no impression has both"):
        metric(np.empty(0), np.empty(0, dtype=np.bool_), np.array([0, 0]))


def test_rmse_looks_at_rated_candidates() -> None:
    ratings = np.array([1.0, np.nan, -1.0], dtype=np.float32)
    scores, clicked = np.array([0.0, 9.0, 1.0]), np.array([True, False, False])
    expected = math.sqrt((1 + 4) / 2)
    assert rating_rmse(scores, ratings) == pytest.approx(expected)
    value = validation_metric(
        "rating_rmse", scores, clicked=clicked, offsets=np.array([0, 3]), ratings=ratings
    )
    assert value == pytest.approx(expected)
    with pytest.raises(ContractError, match="rating"):
        rating_rmse(scores, np.full(3, np.nan))


def test_a_metric_that_cannot_be_measured_is_refused() -> None:
    scores, clicked, offsets = random_slates(0)
    for name in ("rating_rmse", "luck"):
        with pytest.raises(ConfigError, match=name):
            validation_metric(name, scores, clicked=clicked, offsets=offsets)


def test_only_an_error_is_better_when_smaller() -> None:
    assert [name for name in METRICS if not greater_is_better(name)] == ["rating_rmse"]

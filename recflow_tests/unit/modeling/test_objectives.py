import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from recflow.core.errors import ContractError
from recflow.core.seeding import make_rng
from recflow.modeling.objectives import click_loss, mean_auc


def test_auc_by_hand() -> None:
    # First: the click beats one of two others. Second: a tie, half credit. Third: no click.
    scores = np.array([0.5, 0.9, 0.1, 1.0, 1.0, 3.0, 4.0])
    clicked = np.array([True, False, False, True, False, False, False])
    assert mean_auc(scores, clicked, np.array([0, 3, 5, 7])) == (0.5 + 0.5) / 2


def test_auc_agrees_with_scikit_learn() -> None:
    rng = make_rng(0, "auc")
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 30, 50))])
    scores = rng.integers(0, 6, offsets[-1]).astype(np.float64)  # many ties
    clicked = rng.random(offsets[-1]) < 0.3
    spans = [slice(a, b) for a, b in itertools.pairwise(offsets)]
    expected = [
        roc_auc_score(clicked[span], scores[span])
        for span in spans
        if 0 < clicked[span].sum() < clicked[span].size
    ]
    assert mean_auc(scores, clicked, offsets) == pytest.approx(np.mean(expected), abs=1e-12)


def test_auc_of_nothing_is_an_error() -> None:
    with pytest.raises(ContractError):
        mean_auc(np.array([1.0, 2.0]), np.array([True, True]), np.array([0, 2]))


def test_absent_candidates_do_not_count() -> None:
    scores = torch.tensor([[1.0, 0.0, 5.0]])
    loss = click_loss(scores, torch.tensor([[True, True, False]]))
    assert float(loss) == pytest.approx(np.log(1 + np.exp(-1.0)))

"""What training minimises, and what validation maximises."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from recflow.core.errors import ContractError


def click_loss(scores: Tensor, present: Tensor) -> Tensor:
    """Cross-entropy of the click among its sampled candidates, mean over the clicks.

    Args:
        scores: ``[clicks, candidates]``; the first column is the clicked item.
        present: False where the slate had no more candidates, ``[clicks, candidates]``.
    """
    masked = scores.masked_fill(~present, -torch.inf)
    return functional.cross_entropy(masked, torch.zeros(len(scores), dtype=torch.long))


def mean_auc(
    scores: NDArray[np.float64], clicked: NDArray[np.bool_], offsets: NDArray[np.int64]
) -> float:
    """Mean over impressions of the area under the ROC curve; ties count half.

    Impressions without a click or without a non-click have no AUC and are left out. Computed from
    the rank sum of the clicked candidates (Mann–Whitney U).

    Args:
        scores: Scores of all candidates, end to end.
        clicked: Whether each was clicked.
        offsets: Where each impression begins, and the end.

    Raises:
        ContractError: No impression has both a click and a non-click.
    """
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    order = np.lexsort((scores, owner))
    sorted_scores, sorted_owner = scores[order], owner[order]
    starts_tie = np.ones(len(order), dtype=np.bool_)
    starts_tie[1:] = (np.diff(sorted_scores) != 0) | (np.diff(sorted_owner) != 0)
    first = np.flatnonzero(starts_tie)
    last = np.append(first[1:], len(order)) - 1
    rank = ((first + last) / 2)[np.cumsum(starts_tie) - 1] - offsets[sorted_owner] + 1
    sorted_clicked = clicked[order]
    impressions = len(offsets) - 1
    clicks = np.bincount(sorted_owner, weights=sorted_clicked, minlength=impressions)
    others = np.diff(offsets) - clicks
    rank_sum = np.bincount(sorted_owner, weights=rank * sorted_clicked, minlength=impressions)
    both = (clicks > 0) & (others > 0)
    if not both.any():
        raise ContractError("no impression has both a clicked and a non-clicked candidate")
    above = rank_sum[both] - clicks[both] * (clicks[both] + 1) / 2
    return float(np.mean(above / (clicks[both] * others[both])))

"""What training minimises, and what validation measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from recflow.core.errors import ConfigError, ContractError
from recflow.modeling.config import METRICS, ObjectiveConfig
from recflow.modeling.texts import Rows

Floats = NDArray[np.floating[Any]]
Flags = NDArray[np.bool_]


def per_click_losses(
    config: ObjectiveConfig,
    scores: Tensor,
    present: Tensor,
    *,
    target: Tensor | None = None,
    ratings: Tensor | None = None,
    log_frequency: Tensor | None = None,
) -> Tensor:
    """The loss of each click, ``[clicks]``.

    ``cross_entropy`` and ``contrastive`` are the negative log-likelihood of the click among the
    present candidates. ``contrastive`` divides the scores by the temperature; where candidates are
    the clicks of a batch, popular items are drawn more often, and subtracting the logarithm of that
    frequency makes up for it (Yi et al. 2019, *Sampling-bias-corrected neural modeling for large
    corpus item recommendations*). ``binary_cross_entropy`` is the mean over the present candidates;
    ``mean_squared_error`` compares the score of the click with its rating.

    Args:
        config: The loss and its temperature.
        scores: ``[clicks, candidates]``.
        present: False where the slate had no more candidates, ``[clicks, candidates]``; True for
            every click.
        target: Column of each click, ``[clicks]``; None where it is the first one.
        ratings: Ratings less the mean rating of train, ``[clicks]``; for ``mean_squared_error``.
        log_frequency: Logarithm of how often each candidate is drawn, ``[candidates]``; for
            ``contrastive``.

    Raises:
        ConfigError: The loss needs ratings and there are none.
    """
    if target is None:
        target = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
    if config.loss == "mean_squared_error":
        if ratings is None:
            raise ConfigError.of("loss", config.loss, "another loss where clicks have no ratings")
        return (scores.gather(1, target[:, None]).squeeze(1) - ratings).square()
    if config.loss == "binary_cross_entropy":
        return _binary_losses(scores, present, target)
    if config.loss == "contrastive":
        scores = scores / config.temperature
        if log_frequency is not None:
            scores = scores - log_frequency
    return functional.cross_entropy(
        scores.masked_fill(~present, -torch.inf), target, reduction="none"
    )


def _binary_losses(scores: Tensor, present: Tensor, target: Tensor) -> Tensor:
    clicked = functional.one_hot(target, scores.shape[1]).to(scores.dtype)
    losses = functional.binary_cross_entropy_with_logits(scores, clicked, reduction="none")
    return (losses * present).sum(1) / present.sum(1)


def validation_metric(
    name: str, scores: Floats, *, clicked: Flags, offsets: Rows, ratings: Floats | None = None
) -> float:
    """Measure scores by one of ``recflow.modeling.config.METRICS``.

    Args:
        name: Which.
        scores: Scores of all candidates, end to end.
        clicked: Whether each was clicked.
        offsets: Where each impression begins, and the end.
        ratings: What each candidate's score should be, NaN where it has no rating.

    Raises:
        ConfigError: The metric is unknown, or needs ratings and there are none.
        ContractError: Nothing can be measured.
    """
    if name == "auc":
        return mean_auc(scores, clicked, offsets)
    if name == "ndcg@10":
        return mean_ndcg(scores, clicked, offsets)
    if name != "rating_rmse":
        raise ConfigError.of("primary_metric", name, ", ".join(METRICS))
    if ratings is None:
        raise ConfigError.of("primary_metric", name, "another metric where there are no ratings")
    return rating_rmse(scores, ratings)


def greater_is_better(name: str) -> bool:
    """Whether a validation metric is an accuracy rather than an error."""
    return name != "rating_rmse"


def mean_auc(scores: Floats, clicked: Flags, offsets: Rows) -> float:
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
    ranked = _rank(scores, clicked, offsets)
    beaten = np.diff(offsets)[ranked.owner] - ranked.place
    clicks, others = ranked.clicks, np.diff(offsets) - ranked.clicks
    above = ranked.sum_by_impression(beaten) - clicks * (clicks + 1) / 2
    both = ranked.contrasts
    return float(np.mean(above[both] / (clicks[both] * others[both])))


def mean_ndcg(scores: Floats, clicked: Flags, offsets: Rows, k: int = 10) -> float:
    """Mean over impressions of nDCG@k with gain 1 and discount ``log2(rank + 1)``.

    Of tied candidates each place gets the share of them that was clicked, the expected value over
    all orders. Arguments, errors and what is left out as in :func:`mean_auc`.
    """
    ranked = _rank(scores, clicked, offsets)
    discount = 1 / np.log2(np.arange(k) + 2)
    gains = np.where(ranked.place < k, discount[np.minimum(ranked.place, k - 1)], 0.0)
    best = np.concatenate([[0.0], np.cumsum(discount)])[np.minimum(ranked.clicks, k)]
    both = ranked.contrasts
    return float(np.mean(ranked.sum_by_impression(gains)[both] / best[both]))


def rating_rmse(scores: Floats, ratings: Floats) -> float:
    """Root mean squared error of the scores where there is a rating.

    Raises:
        ContractError: There is no rating.
    """
    rated = ~np.isnan(ratings)
    if not rated.any():
        raise ContractError("no candidate has a rating, so there is nothing to compare with")
    return float(np.sqrt(np.mean((scores[rated] - ratings[rated]) ** 2)))


@dataclass(frozen=True, slots=True)
class _Ranking:
    """All candidates, best first within their impression.

    Attributes:
        owner: Impression of each candidate.
        place: Its place in it, from 0.
        share: Clicked share of the candidates it is tied with, itself included.
        clicks: Clicks of each impression.
        contrasts: Whether each impression has both a click and a non-click.
    """

    owner: Rows
    place: Rows
    share: Floats
    clicks: Rows
    contrasts: Flags

    def sum_by_impression(self, values: Floats | Rows) -> Floats:
        """Sum over each impression's clicks of a value of their place, expected over ties."""
        sums = np.bincount(self.owner, weights=values * self.share, minlength=len(self.clicks))
        return sums.astype(np.float64)  # integers where there is nothing to sum


def _rank(scores: Floats, clicked: Flags, offsets: Rows) -> _Ranking:
    lengths = np.diff(offsets)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    clicks = np.bincount(owner, weights=clicked, minlength=len(lengths)).astype(np.int64)
    contrasts = (clicks > 0) & (clicks < lengths)
    if not contrasts.any():
        raise ContractError("no impression has both a clicked and a non-clicked candidate")
    order = np.lexsort((-scores, owner))
    starts_tie = np.ones(len(order), dtype=np.bool_)
    starts_tie[1:] = (np.diff(scores[order]) != 0) | (np.diff(owner) != 0)
    tie = np.cumsum(starts_tie) - 1
    share = np.bincount(tie, weights=clicked[order]) / np.bincount(tie)
    return _Ranking(owner, np.arange(len(order)) - offsets[owner], share[tie], clicks, contrasts)

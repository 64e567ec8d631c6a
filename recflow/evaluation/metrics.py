"""Ranking metrics of an impression, with ties treated exactly.

Definitions are those of the official MIND evaluation script (Wu et al., 2020, *MIND: A Large-scale
Dataset for News Recommendation*): AUC within the impression; MRR as the mean reciprocal rank of
*all* clicked candidates; nDCG@k with gain ``2**label - 1`` and discount ``log2(rank + 1)``.

Where scores tie, the official script ranks by position in the file, so that a constant scorer is
judged by how the log happens to be ordered. Here every metric is its expectation over all orders
of the tied candidates, drawn uniformly (McSherry & Najork, 2008, *Computing information retrieval
performance measures efficiently in the presence of tied scores*). All four metrics are linear in
"is the candidate at rank r clicked", so the expectation is exact and cheap: replace the label at
each rank by the clicked share of its group of ties. For AUC this is half credit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from recflow.evaluation.slates import BoolArray, FloatArray, IntArray, dense_blocks

RANKING_METRICS = ("auc", "mrr", "ndcg@5", "ndcg@10")
RETRIEVAL_CUTOFFS = (10, 50, 100)
TOP_K = 10


@dataclass(frozen=True, slots=True)
class Metric:
    """What a metric is called, which way is better, and what it means in a sentence.

    Attributes:
        label: Short name for tables.
        greater_is_better: ``None`` where neither direction is better in itself.
        description: One sentence for the report.
    """

    label: str
    greater_is_better: bool | None
    description: str


METRICS: dict[str, Metric] = {
    "auc": Metric(
        "AUC", True, "Chance that a clicked candidate scores above one not clicked, per impression."
    ),
    "mrr": Metric("MRR", True, "Mean reciprocal rank of the clicked candidates, per impression."),
    "ndcg@5": Metric("nDCG@5", True, "Discounted gain of the first 5, relative to the best order."),
    "ndcg@10": Metric(
        "nDCG@10", True, "Discounted gain of the first 10, relative to the best order."
    ),
    "log_loss": Metric("log-loss", False, "Log-loss of the calibrated click probability (nats)."),
    "brier": Metric("Brier", False, "Mean squared error of the calibrated click probability."),
    "click_rmse": Metric("RMSE click", False, "Root of the Brier score."),
    "calibration_error": Metric(
        "ECE", False, "Mean distance of predicted and seen click rate over bins of equal count."
    ),
    "rating_rmse": Metric("RMSE rating", False, "Root mean squared error of the rating."),
    **{
        f"recall@{k}": Metric(
            f"recall@{k}", True, f"Share of clicked items in the first {k} of the whole catalogue."
        )
        for k in RETRIEVAL_CUTOFFS
    },
    **{
        f"hit_rate@{k}": Metric(
            f"hit@{k}", True, f"Chance of a clicked item in the first {k} of the whole catalogue."
        )
        for k in RETRIEVAL_CUTOFFS
    },
    f"coverage@{TOP_K}": Metric(
        f"coverage@{TOP_K}",
        True,
        f"Share of the catalogue that is in at least one first {TOP_K} of the sample.",
    ),
    f"novelty@{TOP_K}": Metric(
        f"novelty@{TOP_K}",
        None,
        f"Mean self-information of the first {TOP_K} by clicks in train (bits).",
    ),
    f"popularity_bias@{TOP_K}": Metric(
        "popularity bias",
        None,
        f"Popularity percentile of the first {TOP_K} minus that of what was clicked; 0 is neutral.",
    ),
}


def ranking_metrics(
    scores: FloatArray, labels: npt.NDArray[Any], offsets: IntArray
) -> dict[str, FloatArray]:
    """Compute AUC, MRR, nDCG@5 and nDCG@10 of each impression.

    An impression without a click or without a non-click ranks nothing: all four metrics are NaN
    there (so also where there is a single candidate or none), and means leave it out.

    Args:
        scores: Finite scores of all candidates, float64 [elements]; higher is better.
        labels: 1 where clicked, else 0, any integer type [elements].
        offsets: Where impressions start, int64 [impressions + 1].

    Returns:
        Of each name in :data:`RANKING_METRICS` the value per impression, float64 [impressions].
    """
    values = np.full((len(offsets) - 1, len(RANKING_METRICS)), np.nan)
    for rows, positions in dense_blocks(offsets):
        values[rows] = _metrics_of_block(scores[positions], labels[positions])
    return {name: values[:, column] for column, name in enumerate(RANKING_METRICS)}


def discounts(length: int, cutoff: int) -> FloatArray:
    """``1 / log2(rank + 1)`` for ranks 1 to ``cutoff``, 0 after, float64 [length]."""
    ranks = np.arange(1, length + 1)
    return np.where(ranks <= cutoff, 1.0 / np.log2(ranks + 1.0), 0.0)


def expected_gains(ranked_scores: FloatArray, ranked_labels: npt.NDArray[Any]) -> FloatArray:
    """Chance that the candidate at each rank is clicked when ties are ordered at random.

    Args:
        ranked_scores: Scores in descending order, [n, length].
        ranked_labels: The labels in that order, [n, length].

    Returns:
        float64 [n, length]: the label where the score is unique in its row, else the clicked share
        of the candidates tied with it.
    """
    starts_group: BoolArray = np.ones(ranked_scores.shape, dtype=np.bool_)
    np.not_equal(ranked_scores[:, 1:], ranked_scores[:, :-1], out=starts_group[:, 1:])
    if starts_group.all():
        return ranked_labels.astype(np.float64)
    group = np.cumsum(starts_group.ravel()) - 1  # every row starts a group: none spans two rows
    clicked_share = np.bincount(group, weights=ranked_labels.ravel()) / np.bincount(group)
    return clicked_share[group].reshape(ranked_scores.shape)


def _metrics_of_block(scores: FloatArray, labels: npt.NDArray[Any]) -> FloatArray:
    """The four metrics of impressions of equal length: [n, length] twice -> [n, 4]."""
    length = scores.shape[1]
    order = np.argsort(-scores, axis=1)
    gains = expected_gains(
        np.take_along_axis(scores, order, axis=1), np.take_along_axis(labels, order, axis=1)
    )
    clicks: IntArray = labels.sum(axis=1, dtype=np.int64)
    others = length - clicks
    ranks_from_below = np.arange(length, 0, -1, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):  # undefined rows are overwritten below
        # Mann-Whitney: rank sum of the clicked, less its smallest possible value, per pair.
        auc: FloatArray = (gains @ ranks_from_below - clicks * (clicks + 1) / 2) / (clicks * others)
        mrr: FloatArray = gains @ (1.0 / np.arange(1.0, length + 1)) / clicks
        columns = [auc, mrr]
        for cutoff in (5, 10):
            weights = discounts(length, cutoff)
            ideal = np.concatenate([[0.0], np.cumsum(weights)])[clicks]
            columns.append(gains @ weights / ideal)
    values = np.stack(columns, axis=1)
    values[(clicks == 0) | (others == 0)] = np.nan
    return values

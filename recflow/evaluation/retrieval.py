"""Retrieval from the whole catalogue: where the clicked items land, and what is shown first.

For an impression at time t the catalogue is every item of the snapshot except those published
after t (where the time is known) and those the user has clicked before; the items clicked in the
impression always stay in. Scores of a whole catalogue are too many to keep, so each row is reduced
at once to what the metrics need: for each clicked item how many items score above it and how many
score the same, and the first ten.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import numpy as np
import polars as pl

from recflow.core.columns import Columns
from recflow.core.seeding import make_rng
from recflow.evaluation.metrics import RETRIEVAL_CUTOFFS, TOP_K
from recflow.evaluation.slates import (
    BoolArray,
    Float32Array,
    FloatArray,
    IntArray,
    ItemIndex,
    clicked_items,
    clicked_lists,
    flatten,
    offsets_of,
    rows_of,
    sums_by,
)

ROW, ABOVE, TIED, TOP = "row", "above", "tied", "top"

RANKS_SCHEMA = pl.Schema(
    {
        ROW: pl.Int64,
        Columns.IMPRESSION_ID: pl.String,
        ABOVE: pl.List(pl.Int64),
        TIED: pl.List(pl.Int64),
        TOP: pl.List(pl.String),
    }
)
"""One row a sampled impression: its row in the test split, of each clicked item the items above it
and tied with it (itself counted), and the first ten items in order."""


class Catalogue:
    """What could be recommended, and when it came out."""

    def __init__(self, items: pl.DataFrame) -> None:
        """Take the items of a snapshot.

        Args:
            items: Table ``ITEM_FEATURES``.
        """
        ordered = items.select(Columns.ITEM_ID, Columns.PUBLISHED_AT).sort(Columns.ITEM_ID)
        self.index = ItemIndex(ordered[Columns.ITEM_ID])
        earliest = np.iinfo(np.int64).min
        published = ordered[Columns.PUBLISHED_AT].cast(pl.Int64).fill_null(earliest)
        self._published = published.to_numpy()

    @property
    def item_ids(self) -> list[str]:
        """All item ids, sorted."""
        return cast("list[str]", self.index.item_ids.to_list())

    def rank(self, scores: Float32Array, impressions: pl.DataFrame, seed: int) -> pl.DataFrame:
        """Reduce catalogue scores to ranks.

        Args:
            scores: Finite scores, float32 [impressions, items], in the order of :attr:`item_ids`.
            impressions: Table ``SPLIT_IMPRESSIONS`` with the column ``row``, the position of each
                in the test split.
            seed: Decides how ties among the first ten are broken, per impression.

        Returns:
            Table of :data:`RANKS_SCHEMA`.
        """
        targets = self._codes_by_row(clicked_lists(impressions))
        histories = self._codes_by_row(impressions[Columns.HISTORY])
        times = impressions[Columns.TIME].cast(pl.Int64).to_numpy()
        identifiers = cast("list[str]", impressions[Columns.IMPRESSION_ID].to_list())
        numbers = cast("list[int]", impressions[ROW].to_list())
        ranks: list[tuple[int, str, list[int], list[int], list[str]]] = []
        for row, (number, identifier) in enumerate(zip(numbers, identifiers, strict=True)):
            eligible = self._published <= times[row]
            eligible[histories[row]] = False
            eligible[targets[row]] = True
            pool = scores[row, eligible]
            of_targets = scores[row, targets[row]]
            above = (pool > of_targets[:, None]).sum(axis=1)
            tied = (pool == of_targets[:, None]).sum(axis=1)
            first = _first(scores[row], eligible, make_rng(seed, "catalogue ties", identifier))
            top = cast("list[str]", self.index.item_ids.gather(first).to_list())
            ranks.append((number, identifier, above.tolist(), tied.tolist(), top))
        return pl.DataFrame(ranks, schema=RANKS_SCHEMA, orient="row")

    def _codes_by_row(self, lists: pl.Series) -> list[IntArray]:
        codes = self.index.codes(flatten(lists))
        return [part[part >= 0] for part in np.split(codes, offsets_of(lists)[1:-1])]


@dataclass(frozen=True, slots=True)
class ItemPopularity:
    """How often each item was clicked in train.

    Attributes:
        index: The catalogue's items.
        self_information: ``-log2`` of the smoothed share of train clicks, bits, float64 [items].
        percentile: Mid-rank of the train clicks among the items, in 0 to 1, float64 [items].
    """

    index: ItemIndex
    self_information: FloatArray
    percentile: FloatArray

    @classmethod
    def of(cls, train: pl.DataFrame, index: ItemIndex) -> ItemPopularity:
        """Count the clicks of ``train``; one is added to each item, as new items have none."""
        clicks = index.counts(clicked_items(train))
        share = (clicks + 1) / (clicks.sum() + len(clicks))
        ordered = np.sort(clicks)
        below = np.searchsorted(ordered, clicks, side="left")
        upto = np.searchsorted(ordered, clicks, side="right")
        return cls(index, -np.log2(share), (below + upto) / 2 / len(clicks))


def recall(ranks: pl.DataFrame, cutoff: int) -> FloatArray:
    """Expected share of each row's clicked items within the first ``cutoff``, float64 [rows].

    An item with ``above`` items over it in a group of ``tied`` (itself counted) is within the
    first k with probability ``(k - above) / tied``, cut to 0 and 1.
    """
    offsets = offsets_of(ranks[ABOVE])
    above, tied = _flat_ints(ranks[ABOVE]), _flat_ints(ranks[TIED])
    within = np.clip((cutoff - above) / tied, 0.0, 1.0)
    return sums_by(rows_of(offsets), within, ranks.height) / np.diff(offsets)


def hit_rate(ranks: pl.DataFrame, cutoff: int) -> FloatArray:
    """Chance that at least one clicked item is within the first ``cutoff``, float64 [rows].

    Only the best-placed clicked items matter. With m items tied there, c of them clicked, and s
    places left within the cutoff, none is shown with probability ``C(m-c, s) / C(m, s)``.
    """
    chances = np.empty(ranks.height)
    rows = cast("Iterable[tuple[list[int], list[int]]]", ranks.select(ABOVE, TIED).iter_rows())
    for row, (above, tied) in enumerate(rows):
        best = min(above)
        size, clicked = tied[above.index(best)], above.count(best)
        places = min(max(cutoff - best, 0), size)
        before = np.arange(clicked, dtype=np.int64)
        left_out = np.divide(size - places - before, size - before)
        chances[row] = 1.0 - np.prod(np.maximum(left_out, 0.0))
    return chances


def coverage(ranks: pl.DataFrame, catalogue_size: int) -> float:
    """Share of the catalogue that is among the first ten of any row; grows with the rows."""
    return flatten(ranks[TOP]).n_unique() / catalogue_size


def novelty(ranks: pl.DataFrame, popularity: ItemPopularity) -> FloatArray:
    """Mean self-information of each row's first ten, bits, float64 [rows].

    Zhou et al., 2010, *Solving the apparent diversity-accuracy dilemma of recommender systems*.
    """
    return _means(ranks[TOP], popularity.self_information, popularity.index)


def popularity_bias(
    ranks: pl.DataFrame, impressions: pl.DataFrame, popularity: ItemPopularity
) -> FloatArray:
    """Mean popularity percentile of the first ten less that of the clicked items, float64 [rows].

    Above 0 the scorer shows more popular items than the same users chose (popularity lift,
    Abdollahpouri et al., 2020).

    Args:
        ranks: Table of :data:`RANKS_SCHEMA`.
        impressions: The impressions of the same rows.
        popularity: Clicks in train.
    """
    shown = _means(ranks[TOP], popularity.percentile, popularity.index)
    chosen = _means(clicked_lists(impressions), popularity.percentile, popularity.index)
    return shown - chosen


def retrieval_metrics(
    ranks: pl.DataFrame, impressions: pl.DataFrame, popularity: ItemPopularity
) -> dict[str, FloatArray]:
    """All retrieval metrics that are means over rows: name -> float64 [rows]."""
    values = {f"recall@{k}": recall(ranks, k) for k in RETRIEVAL_CUTOFFS}
    values |= {f"hit_rate@{k}": hit_rate(ranks, k) for k in RETRIEVAL_CUTOFFS}
    values[f"novelty@{TOP_K}"] = novelty(ranks, popularity)
    values[f"popularity_bias@{TOP_K}"] = popularity_bias(ranks, impressions, popularity)
    return values


def _first(scores: Float32Array, eligible: BoolArray, rng: np.random.Generator) -> IntArray:
    """Codes of the ten best eligible items, best first, ties in random order."""
    codes = rng.permutation(np.flatnonzero(eligible))
    pool = scores[codes]
    size = min(TOP_K, len(codes))
    threshold = np.partition(pool, len(pool) - size)[len(pool) - size]
    # All items above the threshold, then as many at it as there is room for, in permuted order.
    sure, at = np.flatnonzero(pool > threshold), np.flatnonzero(pool == threshold)
    chosen = np.concatenate([sure, at[: size - len(sure)]])
    return codes[chosen[np.argsort(-pool[chosen], kind="stable")]]


def _means(lists: pl.Series, values: FloatArray, index: ItemIndex) -> FloatArray:
    """Mean value of the known items of each list, NaN where none is known, float64 [rows]."""
    codes, rows = index.codes(flatten(lists)), rows_of(offsets_of(lists))
    known = codes >= 0
    totals = sums_by(rows[known], values[codes[known]], len(lists))
    counts = np.bincount(rows[known], minlength=len(lists))
    means = np.full(len(lists), np.nan)
    return np.divide(totals, counts, out=means, where=counts > 0)


def _flat_ints(lists: pl.Series) -> IntArray:
    return flatten(lists).to_numpy()

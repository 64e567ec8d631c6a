"""What a model must beat: scorers that need no training worth the name.

All are point-in-time: an impression's scores use its history, facts about the items, and clicks
of train – or, for the decayed counters, clicks older than the stated delay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import polars as pl

from recflow.core.columns import Columns
from recflow.core.errors import ConfigError, ContractError
from recflow.core.seeding import derive_seed
from recflow.evaluation.scoring import Board
from recflow.evaluation.slates import (
    Float32Array,
    FloatArray,
    IntArray,
    ItemIndex,
    as_lists,
    clicked_lists,
    flatten,
    offsets_of,
    row_chunks,
    rows_of,
)

HISTORY_LIMIT = 50
"""The newest items of a history that profile baselines read, as many as the models do."""

_MICROSECONDS_PER_HOUR = 3_600_000_000


class RandomScorer:
    """A uniform number for each pair of impression and item, whatever the order they come in."""

    name = "random"
    board: Board = "content-only"

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def score(self, impressions: pl.DataFrame) -> pl.Series:
        """See :class:`recflow.evaluation.scoring.Scorer`."""
        offsets = offsets_of(impressions[Columns.CANDIDATES])
        rows = self._keys("impression", impressions[Columns.IMPRESSION_ID])[rows_of(offsets)]
        items = self._keys("item", flatten(impressions[Columns.CANDIDATES]))
        return as_lists(Columns.SCORES, _uniform(rows ^ items), offsets)

    def score_catalogue(self, impressions: pl.DataFrame, item_ids: Sequence[str]) -> Float32Array:
        """See :class:`recflow.evaluation.scoring.Scorer`."""
        rows = self._keys("impression", impressions[Columns.IMPRESSION_ID])
        items = self._keys("item", pl.Series(item_ids, dtype=pl.String))
        return _uniform(rows[:, None] ^ items).astype(np.float32)

    def _keys(self, purpose: str, identifiers: pl.Series) -> npt.NDArray[np.uint64]:
        """A stable hash of each id; each distinct id is hashed once."""
        index = ItemIndex(identifiers.unique().sort())
        distinct = cast("list[str]", index.item_ids.to_list())
        keys = [derive_seed(self._seed, "random scorer", purpose, i) for i in distinct]
        return np.array(keys, dtype=np.uint64)[index.codes(identifiers)]


class PopularityScorer:
    """Clicks of the item in train; 0 for an item train never saw clicked."""

    name = "popularity"
    board: Board = "counter-aware"

    def __init__(self, train: pl.DataFrame) -> None:
        """Count the clicks.

        Args:
            train: Table ``SPLIT_IMPRESSIONS``.
        """
        clicked = flatten(clicked_lists(train))
        self._index = ItemIndex(clicked.unique().sort())
        self._clicks = np.append(self._index.counts(clicked), 0.0)  # code -1 reads the last: 0

    def score(self, impressions: pl.DataFrame) -> pl.Series:
        """See :class:`recflow.evaluation.scoring.Scorer`."""
        candidates = impressions[Columns.CANDIDATES]
        clicks = self._clicks[self._index.codes(flatten(candidates))]
        return as_lists(Columns.SCORES, clicks, offsets_of(candidates))

    def score_catalogue(self, impressions: pl.DataFrame, item_ids: Sequence[str]) -> Float32Array:
        """See :class:`recflow.evaluation.scoring.Scorer`."""
        clicks = self._clicks[self._index.codes(item_ids)].astype(np.float32)
        return np.tile(clicks, (impressions.height, 1))


class DecayedPopularityScorer:
    """Clicks of the item, each worth half as much after every half-life, known after a delay.

    The score of item i at time t is ``sum of 2 ** -((t - delay - s) / half_life)`` over the
    clicks on i at times s strictly before ``t - delay``. The delay is how long a click takes to
    reach the counters the serving side reads; it is part of the name because it decides the score.
    """

    board: Board = "counter-aware"

    def __init__(
        self, logs: Sequence[pl.DataFrame], *, half_life_hours: float, delay_minutes: float
    ) -> None:
        """Prepare the counters.

        Args:
            logs: The splits whose clicks the counters may see, tables ``SPLIT_IMPRESSIONS``.
            half_life_hours: Hours after which a click counts half.
            delay_minutes: Minutes until a click is counted.

        Raises:
            ConfigError: The half-life is not positive or the delay negative.
        """
        if not half_life_hours > 0:
            raise ConfigError.of("half_life_hours", half_life_hours, "more than 0")
        if not delay_minutes >= 0:
            raise ConfigError.of("delay_minutes", delay_minutes, "0 or more")
        self.name = f"popularity_decayed_{half_life_hours:g}h_delay_{delay_minutes:g}min"
        self._half_life = half_life_hours * _MICROSECONDS_PER_HOUR
        self._delay = round(delay_minutes * _MICROSECONDS_PER_HOUR / 60)
        clicks = pl.concat([_click_times(log) for log in logs])
        events = clicks.group_by(Columns.ITEM_ID, "at").len("clicks").sort(Columns.ITEM_ID, "at")
        counter = _decayed_sums(events, self._half_life)
        self._clicked = ItemIndex(events[Columns.ITEM_ID].unique().sort())
        self._counters = events.with_columns(pl.Series("counter", counter)).sort("at")

    def score(self, impressions: pl.DataFrame) -> pl.Series:
        """See :class:`recflow.evaluation.scoring.Scorer`."""
        candidates = impressions[Columns.CANDIDATES]
        offsets = offsets_of(candidates)
        times = self._cutoffs(impressions)[rows_of(offsets)]
        return as_lists(Columns.SCORES, self._counts(flatten(candidates), times), offsets)

    def score_catalogue(self, impressions: pl.DataFrame, item_ids: Sequence[str]) -> Float32Array:
        """See :class:`recflow.evaluation.scoring.Scorer`."""
        clicked = np.flatnonzero(self._clicked.codes(item_ids) >= 0)  # all others count 0
        items = pl.Series(item_ids, dtype=pl.String).gather(np.tile(clicked, impressions.height))
        times = np.repeat(self._cutoffs(impressions), len(clicked))
        counts = np.zeros((impressions.height, len(item_ids)), dtype=np.float32)
        shape = (impressions.height, len(clicked))
        counts[:, clicked] = self._counts(items, times).reshape(shape)
        return counts

    def _cutoffs(self, impressions: pl.DataFrame) -> IntArray:
        """The time up to which counters are known, microseconds, int64 [impressions]."""
        return impressions[Columns.TIME].cast(pl.Int64).to_numpy() - self._delay

    def _counts(self, item_ids: pl.Series, cutoffs: IntArray) -> FloatArray:
        """Decayed clicks of each item strictly before its cutoff, float64 [n]."""
        wanted = pl.DataFrame({Columns.ITEM_ID: item_ids, "cutoff": cutoffs}).with_row_index()
        found = (
            wanted.sort("cutoff")
            .join_asof(
                self._counters,
                left_on="cutoff",
                right_on="at",
                by=Columns.ITEM_ID,
                strategy="backward",
                allow_exact_matches=False,
                check_sortedness=False,  # both sides are sorted above
            )
            .sort("index")
        )
        ages = (found["cutoff"] - found["at"]).to_numpy() / self._half_life
        return np.nan_to_num(found["counter"].to_numpy() * np.exp2(-ages))  # no click yet: 0


class CategoryShareScorer:
    """Share of the candidate's category among the newest items of the history.

    0 where the history is empty or the category unknown.
    """

    name = "category_share"
    board: Board = "content-only"

    def __init__(self, items: pl.DataFrame, *, history_limit: int = HISTORY_LIMIT) -> None:
        """Learn the items' categories.

        Args:
            items: Table ``ITEM_FEATURES``.
            history_limit: How many of the newest items of a history are read.
        """
        categories = ItemIndex(items[Columns.CATEGORY].unique().sort())
        one_hot = np.eye(len(categories), dtype=np.float32)[
            categories.codes(items[Columns.CATEGORY])
        ]
        one_hot[(items[Columns.CATEGORY] == "").to_numpy()] = 0.0
        self._profiles = _Profiles(items[Columns.ITEM_ID], one_hot, history_limit)

    def score(self, impressions: pl.DataFrame) -> pl.Series:
        """See :class:`recflow.evaluation.scoring.Scorer`."""
        return self._profiles.score(impressions)

    def score_catalogue(self, impressions: pl.DataFrame, item_ids: Sequence[str]) -> Float32Array:
        """See :class:`recflow.evaluation.scoring.Scorer`."""
        return self._profiles.score_catalogue(impressions, item_ids)


class TextSimilarityScorer:
    """Cosine of the candidate's text vector with the mean of the history's: no training at all.

    Vectors are scaled to length 1, then the mean over the items shown in train is taken away: raw
    sentence vectors share a large common part that hides what differs between texts. 0 where
    the history is empty or a vector unknown.
    """

    board: Board = "content-only"

    def __init__(
        self,
        item_ids: Sequence[str] | pl.Series,
        vectors: Float32Array,
        train: pl.DataFrame,
        *,
        history_limit: int = HISTORY_LIMIT,
        name: str = "text_similarity",
    ) -> None:
        """Centre the vectors.

        Args:
            item_ids: The items.
            vectors: A text vector of each, float32 [items, dimensions].
            train: Table ``SPLIT_IMPRESSIONS``; the centre is fitted on the items it shows.
            history_limit: How many of the newest items of a history are read.
            name: Name of the scorer.

        Raises:
            ContractError: The numbers of items and vectors differ, or train shows none of them.
        """
        if len(item_ids) != len(vectors):
            raise ContractError(f"{name}: {len(vectors)} vectors for {len(item_ids)} items")
        self.name = name
        shown = ItemIndex(item_ids).codes(flatten(train[Columns.CANDIDATES]).unique())
        fitted = np.sort(shown[shown >= 0])
        if not len(fitted):
            raise ContractError(f"{name}: no item shown in train has a vector to centre on")
        unit = _normalised(vectors)
        centred = _normalised(unit - unit[fitted].mean(axis=0))
        self._profiles = _Profiles(item_ids, centred, history_limit, normalise=True)

    def score(self, impressions: pl.DataFrame) -> pl.Series:
        """See :class:`recflow.evaluation.scoring.Scorer`."""
        return self._profiles.score(impressions)

    def score_catalogue(self, impressions: pl.DataFrame, item_ids: Sequence[str]) -> Float32Array:
        """See :class:`recflow.evaluation.scoring.Scorer`."""
        return self._profiles.score_catalogue(impressions, item_ids)


class OracleScorer:
    """The utilities that simulated clicks were drawn from: nothing can be expected to beat it.

    It stands on the board of the models, as their ceiling.
    """

    name = "oracle"
    board: Board = "content-only"

    def __init__(self, truth: pl.DataFrame) -> None:
        """Take the ground truth.

        Args:
            truth: ``impression_id`` and ``utility`` (``List(Float64)``, aligned with the
                candidates), one row an impression.
        """
        self._truth = truth.select(
            Columns.IMPRESSION_ID, pl.col("utility").cast(pl.List(pl.Float64))
        )

    def score(self, impressions: pl.DataFrame) -> pl.Series:
        """See :class:`recflow.evaluation.scoring.Scorer`.

        Raises:
            ContractError: The truth lacks an impression.
        """
        found = impressions.select(Columns.IMPRESSION_ID).join(
            self._truth, on=Columns.IMPRESSION_ID, how="left", maintain_order="left", validate="m:1"
        )
        missing = found.filter(pl.col("utility").is_null())
        if missing.height:
            raise ContractError(
                f"the ground truth lacks {missing.height} impressions, the first "
                f"{missing[Columns.IMPRESSION_ID][0]!r}; simulate the logs again"
            )
        return found["utility"].alias(Columns.SCORES)

    def score_catalogue(
        self,
        impressions: pl.DataFrame,  # noqa: ARG002 - the Protocol's
        item_ids: Sequence[str],  # noqa: ARG002 - the Protocol's
    ) -> Float32Array:
        """Not possible.

        Raises:
            ContractError: Always: the truth knows the shown candidates only.
        """
        raise ContractError("the oracle knows the candidates only; use catalogue_sample=0")


class _Profiles:
    """Dot product of an item's vector with the mean vector of a history's newest items."""

    def __init__(
        self,
        item_ids: Sequence[str] | pl.Series,
        vectors: Float32Array,
        history_limit: int,
        *,
        normalise: bool = False,
    ) -> None:
        if history_limit < 1:
            raise ConfigError.of("history_limit", history_limit, "1 or more")
        self._index = ItemIndex(item_ids)
        # Code -1, an unknown item, reads the last row: a zero vector.
        self._vectors = np.vstack([vectors, np.zeros((1, vectors.shape[1]), dtype=np.float32)])
        self._limit = history_limit
        self._normalise = normalise

    def score(self, impressions: pl.DataFrame) -> pl.Series:
        candidates = impressions[Columns.CANDIDATES]
        offsets = offsets_of(candidates)
        codes = self._index.codes(flatten(candidates))
        history, history_offsets = self._histories(impressions)
        elements = (len(codes) + len(history)) // max(impressions.height, 1) + 1
        scores = np.empty(len(codes))
        for rows in row_chunks(impressions.height, elements * self._vectors.shape[1]):
            profiles = self._means(history, history_offsets[rows.start : rows.stop + 1])
            owner = rows_of(offsets[rows.start : rows.stop + 1])
            part = slice(int(offsets[rows.start]), int(offsets[rows.stop]))
            scores[part] = np.einsum("ij,ij->i", profiles[owner], self._vectors[codes[part]])
        return as_lists(Columns.SCORES, scores, offsets)

    def score_catalogue(self, impressions: pl.DataFrame, item_ids: Sequence[str]) -> Float32Array:
        profiles = self._means(*self._histories(impressions))
        return profiles @ self._vectors[self._index.codes(item_ids)].T

    def _histories(self, impressions: pl.DataFrame) -> tuple[IntArray, IntArray]:
        """Codes of the newest history items of all rows, and the offsets of the rows."""
        histories = impressions[Columns.HISTORY].list.tail(self._limit)
        return self._index.codes(flatten(histories)), offsets_of(histories)

    def _means(self, codes: IntArray, offsets: IntArray) -> Float32Array:
        """Profile of each row; zero where the history holds no known item."""
        codes, owner = codes[offsets[0] : offsets[-1]], rows_of(offsets)
        codes, owner = codes[codes >= 0], owner[codes >= 0]
        counts = np.bincount(owner, minlength=len(offsets) - 1)
        filled = np.flatnonzero(counts)
        sums = np.zeros((len(counts), self._vectors.shape[1]), dtype=np.float32)
        if len(filled):
            starts = np.searchsorted(owner, filled)
            sums[filled] = np.add.reduceat(self._vectors[codes], starts, axis=0)
        if self._normalise:
            return _normalised(sums)
        return sums / np.maximum(counts, 1)[:, None].astype(np.float32)


def _click_times(log: pl.DataFrame) -> pl.DataFrame:
    """Item and time (microseconds) of each click; a click is dated by its impression."""
    clicks = clicked_lists(log)
    times = log[Columns.TIME].cast(pl.Int64).to_numpy()
    return pl.DataFrame(
        {Columns.ITEM_ID: flatten(clicks), "at": times[rows_of(offsets_of(clicks))]},
        schema={Columns.ITEM_ID: pl.String, "at": pl.Int64},
    )


def _decayed_sums(events: pl.DataFrame, half_life: float) -> FloatArray:
    """Decayed clicks of each event's item at its own time, itself counted, float64 [events].

    A segmented scan by doubling (Hillis & Steele, 1986): after step k each sum covers the last
    ``2 ** k`` events of the item. Unlike a difference of exponentials it cannot overflow.
    """
    items = events[Columns.ITEM_ID].rle_id().to_numpy()
    times = events["at"].to_numpy()
    sums = events["clicks"].cast(pl.Float64).to_numpy().copy()
    step = 1
    while step < len(sums):
        same = items[step:] == items[:-step]
        if not same.any():
            break
        age = np.where(same, times[step:] - times[:-step], 0) / half_life
        sums[step:] += np.where(same, sums[:-step] * np.exp2(-age), 0.0)
        step *= 2
    return sums


def _normalised(vectors: Float32Array) -> Float32Array:
    """Rows scaled to length 1; zero rows stay zero."""
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None]
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def _uniform(keys: npt.NDArray[np.uint64]) -> FloatArray:
    """Mix integers into uniform numbers in [0, 1) by the finaliser of SplitMix64 (Steele, 2014)."""
    mixed = keys + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53

"""From tables to arrays: items numbered once, and lists of them stored end to end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from recflow.core.columns import Columns
from recflow.core.errors import ContractError
from recflow.modeling.texts import Rows
from recflow.modeling.vocabulary import number_ids


@dataclass(frozen=True, slots=True)
class Ragged:
    """Lists of different length, stored end to end.

    Attributes:
        values: The lists' elements.
        offsets: List ``i`` is ``values[offsets[i]:offsets[i + 1]]``; one longer than the lists.
    """

    values: Rows
    offsets: Rows

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Rows:
        """Length of each list."""
        return np.diff(self.offsets)

    def take(self, lists: Rows) -> Ragged:
        """Some of the lists, in that order."""
        lengths = self.lengths[lists]
        offsets = _offsets(lengths)
        positions = np.arange(offsets[-1]) + np.repeat(self.offsets[lists] - offsets[:-1], lengths)
        return Ragged(self.values[positions], offsets)

    def pad(self, *, right_aligned: bool = False) -> Rows:
        """One row a list, -1 where it has no element; ``[lists, longest]``, at least one wide."""
        lengths = self.lengths
        width = max(int(lengths.max(initial=0)), 1)
        columns = np.arange(width)
        filled = (
            columns >= width - lengths[:, None] if right_aligned else columns < lengths[:, None]
        )
        padded = np.full((len(self), width), -1, dtype=np.int64)
        padded[filled] = self.values
        return padded


class ItemIndex:
    """Numbers the items of a table by their row.

    Attributes:
        ids: Item ids in row order.
        texts: Their texts.
    """

    def __init__(self, items: pl.DataFrame) -> None:
        """Index an item-features table.

        Raises:
            ContractError: An item id occurs twice.
        """
        if items[Columns.ITEM_ID].is_duplicated().any():
            twice = items[Columns.ITEM_ID].filter(items[Columns.ITEM_ID].is_duplicated())[0]
            raise ContractError(f"item {twice!r} occurs twice in the item features")
        self.ids: list[str] = items[Columns.ITEM_ID].to_list()
        self.texts: list[str] = items[Columns.TEXT].to_list()
        self._categories = items[Columns.CATEGORY]
        self._rows = items.select(Columns.ITEM_ID).with_row_index("row")

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: pl.Series) -> Rows:
        """Row of each item id.

        Raises:
            ContractError: An id is not in the item features.
        """
        wanted = ids.rename(Columns.ITEM_ID).cast(pl.String).to_frame()
        rows = wanted.join(self._rows, on=Columns.ITEM_ID, how="left", maintain_order="left")["row"]
        if rows.null_count():
            unknown = wanted.filter(rows.is_null())[Columns.ITEM_ID]
            raise ContractError(
                f"{unknown.n_unique()} items of the impressions are not in the item features, "
                f"e.g. {unknown[0]!r}; clean the logs against the same item table"
            )
        return rows.cast(pl.Int64).to_numpy()

    def ragged(self, lists: pl.Series) -> Ragged:
        """Rows of lists of item ids.

        Raises:
            ContractError: An id is not in the item features.
        """
        lengths = lists.list.len().cast(pl.Int64).to_numpy()
        return Ragged(self.rows(lists.filter(lists.list.len() > 0).explode()), _offsets(lengths))

    def categories_of(self, rows: Rows) -> list[str]:
        """Distinct non-empty categories of some items, sorted."""
        found = self._categories.gather(rows).drop_nulls().unique().sort()
        return [category for category in found.to_list() if category]

    def category_numbers(self, known: list[str]) -> Rows:
        """Number of each item's category: 1 + its place in ``known``, 0 where it is not there."""
        return number_ids(self._categories, known)

    def numbers(self, known_ids: list[str]) -> Rows:
        """Number of each item: 1 + its place in ``known_ids``, 0 where it is not there."""
        return number_ids(pl.Series(self.ids, dtype=pl.String), known_ids)


@dataclass(frozen=True, slots=True)
class IndexedImpressions:
    """Impressions as item rows.

    Attributes:
        histories: The newest clicks, oldest first.
        slates: The candidates.
        clicked: For each candidate, end to end, whether it was clicked.
        ratings: Rating of each candidate, end to end; NaN where there is none.
    """

    histories: Ragged
    slates: Ragged
    clicked: NDArray[np.bool_]
    ratings: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.slates)

    @property
    def distinct_items(self) -> Rows:
        """Rows of all items that occur, sorted."""
        return np.unique(np.concatenate([self.histories.values, self.slates.values]))

    @property
    def click_counts(self) -> Rows:
        """Clicks of each impression."""
        sums = np.concatenate([[0], np.cumsum(self.clicked)])
        return np.diff(sums[self.slates.offsets])

    @property
    def contrasts(self) -> NDArray[np.bool_]:
        """Whether each impression has both a click and a non-click; others teach nothing."""
        clicks = self.click_counts
        return (clicks > 0) & (clicks < self.slates.lengths)

    @property
    def contrasting_clicks(self) -> NDArray[np.bool_]:
        """For each candidate, whether it is a click that stands beside a non-click."""
        return self.clicked & np.repeat(self.contrasts, self.slates.lengths)

    @property
    def rated(self) -> NDArray[np.bool_]:
        """For each candidate, whether it has a rating."""
        return ~np.isnan(self.ratings)

    def require_contrasts(self, split: str) -> None:
        """Raise unless some impression has both a click and a non-click.

        Raises:
            ContractError: Names the split.
        """
        if not self.contrasts.any():
            raise ContractError(
                f"no {split} impression has both a clicked and a non-clicked candidate, so there "
                "is nothing to learn from or to compare; widen the window of days"
            )

    def require_ratings(self, split: str) -> None:
        """Raise unless some candidate has a rating.

        Raises:
            ContractError: Names the split.
        """
        if not self.rated.any():
            raise ContractError(
                f"no {split} impression has a rating, so mean_squared_error has nothing to learn "
                "from; choose another loss"
            )

    def take(self, impressions: Rows) -> IndexedImpressions:
        """Some of the impressions, in that order."""
        places = Ragged(np.arange(len(self.clicked)), self.slates.offsets).take(impressions)
        return IndexedImpressions(
            histories=self.histories.take(impressions),
            slates=Ragged(self.slates.values[places.values], places.offsets),
            clicked=self.clicked[places.values],
            ratings=self.ratings[places.values],
        )


def index_impressions(
    impressions: pl.DataFrame, items: ItemIndex, history_length: int
) -> IndexedImpressions:
    """Look up the items of impressions that have labels.

    Args:
        impressions: Split impressions.
        items: Item table that holds every id.
        history_length: Newest clicks to keep.

    Raises:
        ContractError: An item is unknown, or a slate and its labels differ in length.
    """
    slates, labels = impressions[Columns.CANDIDATES], impressions[Columns.LABELS]
    if not (slates.list.len() == labels.list.len()).all():
        raise ContractError("a slate and its labels differ in length; rebuild the split")
    clicked = labels.filter(labels.list.len() > 0).explode().cast(pl.Boolean).to_numpy()
    return IndexedImpressions(
        histories=items.ragged(impressions[Columns.HISTORY].list.tail(history_length)),
        slates=items.ragged(slates),
        clicked=clicked,
        ratings=_ratings(impressions),
    )


def _ratings(impressions: pl.DataFrame) -> NDArray[np.float32]:
    """Rating of each candidate, end to end, NaN where there is none."""
    lengths = impressions[Columns.CANDIDATES].list.len().cast(pl.Int64).to_numpy()
    ratings = np.full(int(lengths.sum()), np.nan, dtype=np.float32)
    if Columns.RATING in impressions.columns:
        lists = impressions[Columns.RATING]
        rated = lists.list.len().fill_null(0).cast(pl.Int64).to_numpy() > 0
        values = lists.filter(rated).explode().cast(pl.Float32)
        ratings[np.repeat(rated, lengths)] = values.fill_null(np.nan).to_numpy()
    return ratings


def items_in_use(items: pl.DataFrame, tables: list[pl.DataFrame], history_length: int) -> ItemIndex:
    """Index of the items that occur in any of the tables of impressions, in the order of ``items``.

    Raises:
        ContractError: An item is not in ``items``.
    """
    index = ItemIndex(items)
    rows = [
        index.ragged(lists).values
        for table in tables
        for lists in (table[Columns.HISTORY].list.tail(history_length), table[Columns.CANDIDATES])
    ]
    return ItemIndex(items[np.unique(np.concatenate(rows))])


def spread(impressions: int, limit: int) -> Rows:
    """Numbers of at most ``limit`` impressions at even distances."""
    wanted = min(limit, impressions)
    return np.linspace(0, impressions - 1, wanted).round().astype(np.int64)


def local_rows(rows_of_items: Rows, rows: Rows) -> Tensor:
    """Number items by their place in ``rows``, which is sorted; -1 stays -1."""
    return torch.from_numpy(np.where(rows_of_items < 0, -1, np.searchsorted(rows, rows_of_items)))


def _offsets(lengths: Rows) -> Rows:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

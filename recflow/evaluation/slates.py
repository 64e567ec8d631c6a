"""Ragged arrays: the lists of many impressions as one flat array and its offsets.

Row ``i`` of a ragged array is ``values[offsets[i]:offsets[i + 1]]``. Everything in this package
works on that layout, so that no loop over impressions runs in Python.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa  # type: ignore[reportMissingTypeStubs]

from recflow.core.columns import Columns

BoolArray: TypeAlias = npt.NDArray[np.bool_]
Float32Array: TypeAlias = npt.NDArray[np.float32]
FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]

_CELLS_AT_ONCE = 4_000_000
_arrow = cast("Any", pa)  # pyarrow carries no types


def offsets_of(lists: pl.Series) -> IntArray:
    """Offsets int64 [rows + 1] of a list column without nulls."""
    offsets = np.zeros(len(lists) + 1, dtype=np.int64)
    np.cumsum(lists.list.len().to_numpy(), out=offsets[1:])
    return offsets


def flatten(lists: pl.Series) -> pl.Series:
    """All elements of a list column, in order; an empty list contributes nothing."""
    return lists.explode(empty_as_null=False, keep_nulls=False)


def rows_of(offsets: IntArray) -> IntArray:
    """Row of each flat element, int64 [elements]."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def sums_by(group: IntArray, weights: npt.NDArray[Any], groups: int) -> FloatArray:
    """Sum of ``weights`` in each of ``groups`` groups, float64 [groups]."""
    return np.bincount(group, weights=weights, minlength=groups).astype(np.float64)


def as_lists(name: str, values: npt.NDArray[Any] | pl.Series, offsets: IntArray) -> pl.Series:
    """Build a list column from flat values and offsets; the inverse of :func:`flatten`."""
    flat = cast("Any", values.to_arrow() if isinstance(values, pl.Series) else values)
    return pl.Series(name, _arrow.LargeListArray.from_arrays(offsets, flat))


def dense_blocks(offsets: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
    """Cut ragged rows into dense blocks of rows of equal length, a few million cells each.

    Yields:
        Row numbers int64 [n] and the flat positions of their elements int64 [n, length]. Rows
        without elements are left out.
    """
    lengths = np.diff(offsets)
    for length in np.unique(lengths[lengths > 0]).tolist():
        rows = np.flatnonzero(lengths == length)
        step = max(1, _CELLS_AT_ONCE // length)
        for start in range(0, len(rows), step):
            block = rows[start : start + step]
            yield block, offsets[block][:, None] + np.arange(length)


def row_chunks(rows: int, cells_per_row: int) -> Iterator[slice]:
    """Cut rows into slices of a few million cells each, to bound memory."""
    step = max(1, _CELLS_AT_ONCE // max(cells_per_row, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class ItemIndex:
    """Item ids as integers: the position of each in a fixed list of ids."""

    def __init__(self, item_ids: Sequence[str] | pl.Series) -> None:
        self._table = pl.DataFrame(
            {Columns.ITEM_ID: pl.Series(item_ids, dtype=pl.String)}
        ).with_row_index("code")
        self._column = self._table[Columns.ITEM_ID]

    def __len__(self) -> int:
        return self._table.height

    @property
    def item_ids(self) -> pl.Series:
        """The ids, in the order of their codes."""
        return self._column

    def codes(self, item_ids: Sequence[str] | pl.Series) -> IntArray:
        """Code of each id, int64 [n]; -1 where the id is not in the index."""
        wanted = pl.DataFrame({Columns.ITEM_ID: pl.Series(item_ids, dtype=pl.String)})
        found = wanted.join(self._table, on=Columns.ITEM_ID, how="left", maintain_order="left")
        return found["code"].cast(pl.Int64).fill_null(-1).to_numpy().copy()

    def counts(self, item_ids: pl.Series) -> FloatArray:
        """How often each id of the index occurs in ``item_ids``, float64 [ids]."""
        codes = self.codes(item_ids)
        return np.bincount(codes[codes >= 0], minlength=len(self)).astype(np.float64)


def clicked_lists(impressions: pl.DataFrame) -> pl.Series:
    """The clicked candidates of each impression, a list column."""
    offsets = offsets_of(impressions[Columns.CANDIDATES])
    clicked = flatten(impressions[Columns.LABELS]).to_numpy() == 1
    ends = np.concatenate([[0], np.cumsum(clicked)])[offsets]
    candidates = flatten(impressions[Columns.CANDIDATES])
    return as_lists("clicked", candidates.filter(clicked), ends)


def clicked_items(impressions: pl.DataFrame) -> pl.Series:
    """The clicked item of every click, one element a click, in row order."""
    return flatten(clicked_lists(impressions))

"""Histories as of the time of an impression.

What a log calls the history is often frozen: EB-NeRD writes the one of the start of the split into
every impression of the week, MIND the one of the start of the log. What the user clicked since then
is in the log too, as the clicks of earlier impressions. This module puts the two together.

The history of an impression at time t is

1. the logged history, followed by
2. the items the user clicked in impressions of the window strictly before t, in the order of their
   first click (time, then impression id, then place in the slate), without those the log holds
   already, each once,

of which the newest ``max_history`` are kept. Clicking an item again does not move it.

*Logged histories that were cut.* A log that is brought up to date holds the window's own clicks;
where cleaning cut it to the newest ``max_history``, the older of these clicks are missing from it.
They are not new: put behind the log they would push out what is. So where the log fills
``max_history``, it is taken to cover every click up to the time since which a tenth of its items
(three at least) were clicked within the window; only later clicks are added. In the second week of
EB-NeRD demo, at 50 items, half of the clicks added without this rule are old ones, with it 0.6 %.
Cleaning should therefore keep at least as many items as a snapshot uses.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import polars as pl

from recflow.core.columns import IMPRESSION_FEATURES, SPLIT_IMPRESSIONS, Columns
from recflow.core.errors import ConfigError

# How much of a full logged history must have been clicked in the window to prove that the log was
# brought up to date since: one or two returns to old items are no proof.
_COVERED_SHARE = 0.1
_COVERED_ITEMS = 3

# Rows worked on at a time: bounds the memory, whatever the size of the window.
_CHUNK_ROWS = 50_000

_USER = "_user"
_MOMENT = "_moment"
_ROW = "_row"
_ITEM = "_item"
_CLICK = "_click"

_Ints = npt.NDArray[np.int64]


def extend_histories(window: pl.DataFrame, *, max_history: int) -> pl.DataFrame:
    """Extend each logged history with the user's earlier clicks (see the module's docstring).

    Args:
        window: Impressions of a window of days (contract ``IMPRESSION_FEATURES``), in any order.
        max_history: The newest so many items of a history are kept.

    Returns:
        The impressions sorted by time and id (contract ``SPLIT_IMPRESSIONS``). ``history_length``
        is the length of the new history; its first ``logged_history_length`` items are the newest
        of the logged ones, the rest were added; ``history_until`` is when the last of these was
        first clicked, null where nothing was added.

    Raises:
        ConfigError: ``max_history`` is below 1.
        ContractError: ``window`` does not have the columns and types of its contract.
    """
    if max_history < 1:
        raise ConfigError.of("max_history", max_history, "1 or more items")
    IMPRESSION_FEATURES.check_schema(window.schema)
    keys = _keys(window)
    clicks = _first_clicks(window, keys)
    counts, added = _additions(window, keys, clicks, max_history)

    # Additions lie in the order of `keys`, by user; the result is in the order of time.
    begin = np.cumsum(counts) - counts
    chronological = (
        keys.with_row_index("_key").sort(_MOMENT, Columns.IMPRESSION_ID).select(_ROW, "_key")
    )
    pieces = [SPLIT_IMPRESSIONS.empty()]
    for chunk in chronological.iter_slices(_CHUNK_ROWS):
        key = chunk["_key"].to_numpy()
        owner, place = _ranges(begin[key], counts[key])
        additions = (
            clicks[added[place]]
            .select(_ITEM, Columns.TIME)
            .with_columns(pl.Series(_ROW, owner))
            .group_by(_ROW, maintain_order=True)
            .agg(_ITEM, pl.col(Columns.TIME).last().alias(Columns.HISTORY_UNTIL))
        )
        pieces.append(_append(window[chunk[_ROW]], additions, max_history))
    return pl.concat(pieces)


def _keys(window: pl.DataFrame) -> pl.DataFrame:
    """Row number, user and time of each impression as dense ranks, sorted by user and time."""
    return (
        window.lazy()
        .select(
            pl.col(Columns.USER_ID).rank("dense").cast(pl.Int64).alias(_USER),
            pl.col(Columns.TIME).rank("dense").cast(pl.Int64).alias(_MOMENT),
            Columns.TIME,
            Columns.IMPRESSION_ID,
        )
        .with_row_index(_ROW)
        .sort(_USER, _MOMENT, Columns.IMPRESSION_ID)
        .collect()
    )


def _first_clicks(window: pl.DataFrame, keys: pl.DataFrame) -> pl.DataFrame:
    """Each user's first click on each item, sorted by user, time, impression and place."""
    clicked = (
        window.lazy()
        .with_row_index(_ROW)
        .filter(pl.col(Columns.CLICK_COUNT) > 0)
        .select(_ROW, pl.col(Columns.CANDIDATES).alias(_ITEM), Columns.LABELS)
        .explode(_ITEM, Columns.LABELS)
        .filter(pl.col(Columns.LABELS) == 1)
        .select(_ROW, _ITEM)
    )
    return (
        keys.lazy()
        .join(clicked, on=_ROW, maintain_order="left_right")
        .select(_USER, _MOMENT, Columns.TIME, _ITEM)
        .unique([_USER, _ITEM], keep="first", maintain_order=True)
        .with_row_index(_CLICK)
        .with_columns(pl.col(_CLICK).cast(pl.Int64))
        .collect()
    )


def _additions(
    window: pl.DataFrame, keys: pl.DataFrame, clicks: pl.DataFrame, max_history: int
) -> tuple[_Ints, _Ints]:
    """Choose the clicks to add to each history.

    Returns:
        How many are added to each row of ``keys``, and which (rows of ``clicks``, oldest first),
        one row's after another's.
    """
    begin, end = _earlier_clicks(keys, clicks)
    moments = clicks[_MOMENT].to_numpy()
    counts, added = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for offset in range(0, keys.height, _CHUNK_ROWS):
        rows = slice(offset, offset + _CHUNK_ROWS)
        chunk = keys[rows]
        history = window[Columns.HISTORY].gather(chunk[_ROW])
        length = history.list.len().to_numpy().astype(np.int64)
        # No more than these can be needed: the log holds at most `length` of them.
        start = np.maximum(begin[rows], end[rows] - (max_history + length))
        width = end[rows] - start
        owner, click = _ranges(start, width)
        stop = np.cumsum(width)

        logged = np.zeros(click.size, np.bool_)
        row, logged_click = _logged_clicks(chunk[_USER], history, clicks, start, end[rows])
        logged[(stop - width - start)[row] + logged_click] = True

        covered = np.where(
            length >= max_history,
            _covered_until(owner[logged], moments[click[logged]], len(length), max_history),
            -1,
        )
        new = ~logged & (moments[click] > covered[owner])
        so_far = np.concatenate([[0], np.cumsum(new)])
        newest = new & (so_far[stop][owner] - so_far[1:] < max_history)
        counts.append(np.bincount(owner[newest], minlength=len(length)))
        added.append(click[newest])
    return np.concatenate(counts), np.concatenate(added)


def _earlier_clicks(keys: pl.DataFrame, clicks: pl.DataFrame) -> tuple[_Ints, _Ints]:
    """Range of rows of ``clicks`` that are the user's own strictly before each row of ``keys``."""
    span = keys.height + 1  # above every rank of a time
    clicked_at = clicks.select(pl.col(_USER) * span + pl.col(_MOMENT)).to_series().to_numpy()
    user, moment = keys[_USER].to_numpy(), keys[_MOMENT].to_numpy()
    begin = np.searchsorted(clicked_at, user * span, side="left")
    end = np.searchsorted(clicked_at, user * span + moment, side="left")
    return begin, end


def _logged_clicks(
    user: pl.Series, history: pl.Series, clicks: pl.DataFrame, start: _Ints, end: _Ints
) -> tuple[_Ints, _Ints]:
    """Find the clicks of each row's range [start, end) that its logged history holds.

    Returns:
        Two arrays of one length: position of the row, and row of ``clicks``.
    """
    concerned = end > start
    if not concerned.any():
        return np.empty(0, np.int64), np.empty(0, np.int64)
    low = int(start[concerned].min())
    reachable = clicks.slice(low, int(end[concerned].max()) - low).select(_USER, _ITEM, _CLICK)
    found = (
        pl.DataFrame([user, history.alias(_ITEM), pl.Series("start", start), pl.Series("end", end)])
        .with_row_index(_ROW)
        .filter(pl.col("end") > pl.col("start"))
        .explode(_ITEM, empty_as_null=False)
        .join(reachable, on=[_USER, _ITEM])
        .filter(pl.col(_CLICK).is_between("start", "end", closed="left"))
    )
    return found[_ROW].to_numpy().astype(np.int64), found[_CLICK].to_numpy()


def _covered_until(owner: _Ints, moments: _Ints, rows: int, max_history: int) -> _Ints:
    """Moment up to which a logged history of ``max_history`` items covers the window's clicks.

    Args:
        owner: Row of each click that the log holds, ascending.
        moments: Moment of each of these clicks, ascending within a row.
        rows: Number of rows.
        max_history: Length of the log.

    Returns:
        One moment a row; -1 where too few clicks prove nothing.
    """
    needed = max(_COVERED_ITEMS, math.ceil(_COVERED_SHARE * max_history))
    counts = np.bincount(owner, minlength=rows)
    proven = np.flatnonzero(counts >= needed)
    covered = np.full(rows, -1, np.int64)
    covered[proven] = moments[np.cumsum(counts)[proven] - needed]
    return covered


def _append(rows: pl.DataFrame, additions: pl.DataFrame, max_history: int) -> pl.DataFrame:
    """Put the additions (``_row``, items, time of the last) behind the logged histories."""
    history, added = pl.col(Columns.HISTORY), pl.col(_ITEM)
    return (
        rows.lazy()
        .with_row_index(_ROW)
        .with_columns(pl.col(_ROW).cast(pl.Int64))
        .join(additions.lazy(), on=_ROW, how="left", maintain_order="left")
        .with_columns(added.fill_null([]))
        .with_columns(history.list.tail(max_history - added.list.len().cast(pl.Int64)))
        .with_columns(
            history.list.len().alias(Columns.LOGGED_HISTORY_LENGTH),
            pl.concat_list(history, added),
        )
        .with_columns(history.list.len().alias(Columns.HISTORY_LENGTH))
        .pipe(SPLIT_IMPRESSIONS.conform)
        .collect()
    )


def _ranges(begin: _Ints, counts: _Ints) -> tuple[_Ints, _Ints]:
    """Number the elements of many ranges: of which range it is, and its value from begin on."""
    owner = np.repeat(np.arange(len(counts)), counts)
    before = np.cumsum(counts) - counts
    return owner, np.arange(len(owner)) + (begin - before)[owner]

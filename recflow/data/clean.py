"""Cleaning: every row is either kept and sound, or in quarantine with the reason.

Rows in = rows kept + rows quarantined. Ids that no item has are taken out of slates, clicks and
histories and counted; an impression goes only when that leaves it without a candidate or without
its clicks. Kept rows stay in the order given, and so do the candidates and the history in a row.

Which of several duplicates is the first is decided by file and row, never by the order of the
frame, so that shuffled input keeps the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import polars as pl

from recflow.core.columns import (
    IMPRESSIONS,
    ITEMS,
    QUARANTINE,
    Columns,
    Reason,
    TableContract,
)
from recflow.core.errors import ConfigError, ContractError
from recflow.data.sources.base import EARLIEST_TIME, within_calendar
from recflow.data.text import normalise_text

# Times before EARLIEST_TIME or from this on are typing or unit errors: zero, year 9999. Readers may
# be stricter; cleaning must not depend on the day it runs.
LATEST_TIME = datetime(2100, 1, 1, tzinfo=UTC)

# An item without title is named by the first words of its body.
TITLE_WORDS_FROM_BODY = 30

_RAW_CHARACTERS = 500
_DETAIL_CHARACTERS = 300
# Histories are exploded a slice at a time, which bounds the memory whatever their length.
_SLICE_ROWS = 20_000

_REMOVALS: tuple[str, ...] = (
    "dangling_history_ids",
    "dangling_candidate_ids",
    "dangling_clicked_ids",
    "duplicate_candidates",
    "duplicate_clicks",
    "truncated_history_ids",
)

_ROW = "_row"
_ID = "_id"
_POSITION = "_position"
_SLATE = "_slate"
_SHOWN_BEFORE = "_shown_before"
_CLICKS_BEFORE = "_clicks_before"


@dataclass(frozen=True, slots=True)
class Cleaned:
    """A cleaned table, what had to go, and the counts that prove that nothing was lost.

    Attributes:
        rows: The rows kept; conforms to the table's contract.
        quarantine: The rows not kept (contract ``QUARANTINE``).
        counts: Flat snake_case counts for asset metadata; ``rows_in`` is always ``rows_kept`` +
            ``rows_quarantined``.
    """

    rows: pl.DataFrame
    quarantine: pl.DataFrame
    counts: dict[str, int]


def clean_items(raw: pl.DataFrame) -> Cleaned:
    """Clean items: text normalised, ids unique, nothing without text.

    An item with a body but no title stays: the first words of the body become its title (counted).
    Blank categories become null, impossible publication times too (counted).

    Args:
        raw: Items as read, with the columns and types of the contract ``ITEMS`` and any values.

    Returns:
        The items kept, in the order given. Of several rows with one id the first in the source is
        kept.

    Raises:
        ContractError: ``raw`` has other columns or types, or a row without its source.
    """
    raw = _checked(ITEMS, raw)
    title, body = pl.col(Columns.TITLE), pl.col(Columns.BODY)
    untitled = (title == "") & (body != "")
    published = pl.col(Columns.PUBLISHED_AT)
    category = normalise_text(pl.col(Columns.CATEGORY, Columns.SUBCATEGORY))
    rows = raw.with_row_index(_ROW).with_columns(
        normalise_text(title),
        normalise_text(body),
        category.replace("", None),
        pl.col(Columns.ENTITIES).fill_null([]).list.drop_nulls(),
        pl.when(_possible(published)).then(published).alias(Columns.PUBLISHED_AT),
    )
    counts = {
        "impossible_published_at": _sum(raw, ~_possible(published)),
        "titles_from_body": _sum(rows, untitled),
    }
    opening = rf"^\S+(?: \S+){{0,{TITLE_WORDS_FROM_BODY - 1}}}"
    rows = rows.with_columns(
        pl.when(untitled)
        .then(body.str.extract(f"({opening})"))
        .otherwise(title)
        .alias(Columns.TITLE),
        pl.when(untitled)
        .then(body.str.replace(f"{opening} ?", ""))
        .otherwise(body)
        .alias(Columns.BODY),
    )
    rows, unusable = _judge(
        rows,
        (_blank(pl.col(Columns.ITEM_ID)), Reason.MISSING_ID, pl.lit("item_id is missing")),
        (title == "", Reason.EMPTY_TEXT, pl.lit("neither the title nor the body has any text")),
    )
    repeated = _repeats(rows, [Columns.ITEM_ID], Reason.DUPLICATE_ITEM, "same item_id")
    return _cleaned(ITEMS, raw, rows, [unusable], repeated, counts)


def clean_impressions(raw: pl.DataFrame, item_ids: pl.Series, *, max_history: int) -> Cleaned:
    """Clean the impressions of one day.

    Args:
        raw: Impressions as read, with the columns and types of the contract ``IMPRESSIONS`` and
            any values. An empty ``clicked`` is a slate without a click, which is valid; a null one
            is not known and therefore quarantined. A null ``history`` is an empty one.
        item_ids: Ids of the items that exist (String); nulls and repeats do not matter.
        max_history: The newest so many known items of a history are kept.

    Returns:
        The impressions kept, in the order given. The counts of dangling and repeated ids are over
        the rows whose fields were readable.

    Raises:
        ConfigError: ``max_history`` is below 1.
        ContractError: ``raw`` has other columns or types, or a row without its source.
    """
    if max_history < 1:
        raise ConfigError.of("max_history", max_history, "1 or more items")
    raw = _checked(IMPRESSIONS, raw)
    known = item_ids.cast(pl.String).drop_nulls().unique().alias(_ID).to_frame()

    kept: list[pl.DataFrame] = [IMPRESSIONS.empty().with_row_index(_ROW)]
    rejected: list[pl.DataFrame] = []
    counts = dict.fromkeys(_REMOVALS, 0)
    for piece in raw.with_row_index(_ROW).iter_slices(_SLICE_ROWS):
        readable, unreadable = _judge_fields(piece)
        sound, unsound = _clean_lists(readable, known, max_history, counts)
        kept.append(sound)
        rejected += [unreadable, unsound]

    rows = pl.concat(kept)
    same_id = _repeats(
        rows, [Columns.IMPRESSION_ID], Reason.DUPLICATE_IMPRESSION, "same impression_id"
    )
    duplicates = pl.concat([same_id, _same_slates(rows, same_id)])
    return _cleaned(IMPRESSIONS, raw, rows, rejected, duplicates, counts)


def _judge_fields(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Part impressions whose fields can be read from those whose cannot."""
    time, rating = pl.col(Columns.TIME), pl.col(Columns.RATING)
    candidates, clicked = pl.col(Columns.CANDIDATES), pl.col(Columns.CLICKED)
    not_shown = clicked.list.drop_nulls().list.set_difference(candidates.fill_null([]))
    return _judge(
        rows,
        *(
            (_blank(pl.col(name)), Reason.MISSING_ID, pl.lit(f"{name} is missing"))
            for name in (Columns.IMPRESSION_ID, Columns.USER_ID)
        ),
        (time.is_null(), Reason.UNREADABLE_TIME, pl.lit("time is missing or unreadable")),
        (
            ~_possible(time),
            Reason.IMPOSSIBLE_TIME,
            pl.format(
                "time is {}, outside {} to {}",
                time.dt.to_string("%Y-%m-%d %H:%M:%S"),
                pl.lit(f"{EARLIEST_TIME:%Y-%m-%d}"),
                pl.lit(f"{LATEST_TIME:%Y-%m-%d}"),
            ),
        ),
        (
            candidates.list.len().fill_null(0) == 0,
            Reason.NO_CANDIDATE_LEFT,
            pl.lit("the slate is empty"),
        ),
        (clicked.is_null(), Reason.MALFORMED_FIELD, pl.lit("clicked is missing")),
        (
            rating.list.len() != candidates.list.len(),
            Reason.MALFORMED_FIELD,
            pl.format("{} ratings for {} candidates", rating.list.len(), candidates.list.len()),
        ),
        (
            rating.list.eval(pl.element().is_finite().not_()).list.any(),
            Reason.MALFORMED_FIELD,
            pl.lit("a rating is not a finite number"),
        ),
        (
            not_shown.list.len() > 0,
            Reason.CLICK_NOT_SHOWN,
            pl.format("clicked {}, which the slate does not show", not_shown.list.join(", ")),
        ),
    )


def _clean_lists(
    rows: pl.DataFrame, known: pl.DataFrame, max_history: int, counts: dict[str, int]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Take dangling and repeated ids out of the lists; part the rows that keep enough.

    Adds what was removed to ``counts``.
    """
    candidates, clicked, history = (
        pl.col(name) for name in (Columns.CANDIDATES, Columns.CLICKED, Columns.HISTORY)
    )
    rows = rows.with_columns(
        history.fill_null([]),
        candidates.list.len().alias(_SHOWN_BEFORE),
        clicked.list.len().alias(_CLICKS_BEFORE),
    )
    rows, dangling, _ = _without_unknown(rows, Columns.HISTORY, known)
    counts["dangling_history_ids"] += dangling
    rows, dangling, repeated = _without_unknown(rows, Columns.CLICKED, known, distinct=True)
    counts["dangling_clicked_ids"] += dangling
    counts["duplicate_clicks"] += repeated
    rows, dangling, repeated = _without_unknown(rows, Columns.CANDIDATES, known, distinct=True)
    counts["dangling_candidate_ids"] += dangling
    counts["duplicate_candidates"] += repeated

    newest = history.list.tail(max_history)
    counts["truncated_history_ids"] += _sum(rows, history.list.len() - newest.list.len())
    kept, rejected = _judge(
        rows.with_columns(newest),
        (
            candidates.list.len() == 0,
            Reason.NO_CANDIDATE_LEFT,
            pl.format("none of the {} candidates is a known item", _SHOWN_BEFORE),
        ),
        (
            (clicked.list.len() == 0) & (pl.col(_CLICKS_BEFORE) > 0),
            Reason.NO_CLICK_LEFT,
            pl.format("none of the {} clicked ids is a known item", _CLICKS_BEFORE),
        ),
    )
    return kept.drop(_SHOWN_BEFORE, _CLICKS_BEFORE), rejected


def _without_unknown(
    rows: pl.DataFrame, column: str, known: pl.DataFrame, *, distinct: bool = False
) -> tuple[pl.DataFrame, int, int]:
    """Take ids that are not in ``known``, and repeats where ``distinct``, out of one list column.

    Candidates take their ratings with them. Only the rows that change are built again.

    Returns:
        The rows, the number of unknown (or null) ids removed, and the number of repeats removed.
    """
    ids = pl.col(column).alias(_ID)
    unknown = (
        rows.select(_ROW, ids).explode(_ID, empty_as_null=False).join(known, on=_ID, how="anti")
    )
    suspects = unknown.select(_ROW)
    if distinct:
        repeats = pl.col(column).list.n_unique() < pl.col(column).list.len()
        suspects = pl.concat([suspects, rows.filter(repeats).select(_ROW)])
    if suspects.is_empty():
        return rows, 0, 0

    first = pl.struct(_ROW, _ID).is_first_distinct() if distinct else pl.lit(True)
    entries = (
        rows.join(suspects, on=_ROW, how="semi", maintain_order="left")
        .select(_ROW, ids, pl.int_ranges(pl.col(column).list.len()).alias(_POSITION))
        .explode(_ID, _POSITION)
        .join(known.with_columns(known=True), on=_ID, how="left", maintain_order="left")
        .with_columns(pl.col("known").fill_null(value=False), first.alias("first"))
    )
    keep = pl.col("known") & pl.col("first")
    changed = entries.group_by(_ROW, maintain_order=True).agg(pl.col(_ID, _POSITION).filter(keep))
    rows = rows.join(changed, on=_ROW, how="left", maintain_order="left")
    rows = rows.with_columns(pl.coalesce(_ID, column).alias(column))
    if column == Columns.CANDIDATES:
        rating = pl.col(Columns.RATING)
        rows = rows.with_columns(
            pl.when(pl.col(_POSITION).is_null())
            .then(rating)
            .otherwise(rating.list.gather(pl.col(_POSITION)))
        )
    return (
        rows.drop(_ID, _POSITION),
        unknown.height,
        _sum(entries, pl.col("known") & ~pl.col("first")),
    )


def _judge(
    rows: pl.DataFrame, *rules: tuple[pl.Expr, Reason, pl.Expr]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Part rows by rules ``(broken, reason, detail)``; the first one broken is the reason.

    Returns:
        The rows that break none, and ``_row``, reason and detail of the others.
    """
    judged = rows.with_columns(
        pl.coalesce(
            pl.when(broken).then(pl.lit(reason.value)) for broken, reason, _ in rules
        ).alias(Columns.REASON)
    )
    sound = judged.filter(pl.col(Columns.REASON).is_null()).drop(Columns.REASON)
    rejected = judged.filter(pl.col(Columns.REASON).is_not_null()).select(
        _ROW,
        Columns.REASON,
        pl.coalesce(pl.when(broken).then(detail) for broken, _, detail in rules).alias(
            Columns.DETAIL
        ),
    )
    return sound, rejected


def _repeats(rows: pl.DataFrame, key: list[str], reason: Reason, what: str) -> pl.DataFrame:
    """Find the rows whose ``key`` an earlier row of the source has.

    Returns:
        ``_row``, reason and detail of each but the first row of every key.
    """
    shared = rows.select(_ROW, *key, Columns.SOURCE_FILE, Columns.SOURCE_ROW).filter(
        pl.struct(key).is_duplicated()
    )
    return (
        shared.sort(Columns.SOURCE_FILE, Columns.SOURCE_ROW, _ROW)
        .with_columns(
            pl.col(Columns.SOURCE_FILE, Columns.SOURCE_ROW).first().over(key).name.prefix("first_"),
            pl.struct(key).is_first_distinct().alias("is_first"),
        )
        .filter(~pl.col("is_first"))
        .select(
            _ROW,
            pl.lit(reason.value).alias(Columns.REASON),
            pl.format(
                "{} as {} row {}",
                pl.lit(what),
                f"first_{Columns.SOURCE_FILE}",
                f"first_{Columns.SOURCE_ROW}",
            ).alias(Columns.DETAIL),
        )
    )


def _same_slates(rows: pl.DataFrame, excluded: pl.DataFrame) -> pl.DataFrame:
    """Find impressions that show a user the same slate at the same time as an earlier row."""
    moment = [Columns.USER_ID, Columns.TIME]
    # Comparing lists is slow, and hardly any two impressions share user and time.
    shared = (
        rows.filter(pl.struct(moment).is_duplicated())
        .join(excluded, on=_ROW, how="anti")
        .with_columns(pl.struct(Columns.CANDIDATES).struct.json_encode().alias(_SLATE))
    )
    return _repeats(
        shared,
        [*moment, _SLATE],
        Reason.DUPLICATE_IMPRESSION,
        "same user, time and candidates",
    )


def _cleaned(
    contract: TableContract,
    raw: pl.DataFrame,
    rows: pl.DataFrame,
    rejected: list[pl.DataFrame],
    duplicates: pl.DataFrame,
    counts: dict[str, int],
) -> Cleaned:
    """Put the result together: rows without the duplicates, the quarantine, the counts."""
    if not duplicates.is_empty():  # else spare the copy
        rows = rows.join(duplicates, on=_ROW, how="anti", maintain_order="left")
    quarantine = _quarantine(contract, raw, pl.concat([*rejected, duplicates]).sort(_ROW))
    return Cleaned(
        rows=contract.conform(rows.lazy()).collect(),
        quarantine=quarantine,
        counts={
            "rows_in": raw.height,
            "rows_kept": rows.height,
            "rows_quarantined": quarantine.height,
            **counts,
        },
    )


def _quarantine(contract: TableContract, raw: pl.DataFrame, rejected: pl.DataFrame) -> pl.DataFrame:
    """Write the rejected rows of ``raw`` as quarantine rows, with their content as JSON."""
    content = [n for n in contract.names if n not in (Columns.SOURCE_FILE, Columns.SOURCE_ROW)]
    pieces = [
        raw[piece[_ROW]].select(
            pl.lit(contract.name).alias(Columns.TABLE),
            piece[Columns.REASON],
            piece[Columns.DETAIL].str.slice(0, _DETAIL_CHARACTERS),
            Columns.SOURCE_FILE,
            Columns.SOURCE_ROW,
            pl.struct(content)
            .struct.json_encode()
            .str.slice(0, _RAW_CHARACTERS)
            .alias(Columns.RAW),
        )
        for piece in rejected.iter_slices(_SLICE_ROWS)
    ]
    return pl.concat([QUARANTINE.empty(), *pieces])


def _checked(contract: TableContract, raw: pl.DataFrame) -> pl.DataFrame:
    """Refuse what is the reader's fault; make every time one that can be written."""
    contract.check_schema(raw.schema)
    for name in (Columns.SOURCE_FILE, Columns.SOURCE_ROW):
        # Written by our own readers, never by the log: a null is a defect of the reader.
        if raw[name].has_nulls():
            raise ContractError(
                f"table {contract.name!r} has rows without {name}; the reader must set it"
            )
    return raw.with_columns(within_calendar(pl.selectors.datetime()))


def _blank(text: pl.Expr) -> pl.Expr:
    return text.fill_null("").str.strip_chars() == ""


def _possible(time: pl.Expr) -> pl.Expr:
    return time.is_between(pl.lit(EARLIEST_TIME), pl.lit(LATEST_TIME), closed="left")


def _sum(frame: pl.DataFrame, expression: pl.Expr) -> int:
    """Sum of an expression over a frame; nulls count nothing."""
    return int(frame.select(expression.cast(pl.Int64).sum()).item())

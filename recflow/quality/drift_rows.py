"""One row an impression: what drift is measured on.

The candidates of an impression depend on each other, so counting each of them makes any two halves
of a day look different. One candidate is drawn from every impression, and one of its clicks.
"""

from __future__ import annotations

from datetime import date, timedelta
from typing import Final

import numpy as np
import polars as pl

from recflow.core.columns import ITEM_FEATURES, SPLIT_IMPRESSIONS, Columns
from recflow.core.seeding import make_rng

LOOKBACK_DAYS: Final = 2
"""Days before a day in which an item that is not new must have been shown."""

MOST_HOURS: Final = 30 * 24
_LOOKBACK_HOURS: Final = 24 * LOOKBACK_DAYS


class Rows:
    """Columns of the rows."""

    IMPRESSION = "impression"
    USER = "user"
    DAY = "day"
    HELD_OUT = "held_out"
    CATEGORY_SHOWN = "category_shown"
    CATEGORY_CLICKED = "category_clicked"
    TEXT_LENGTH = "text_length"
    HOUR = "hour"
    HISTORY_LENGTH = "history_length"
    CANDIDATE_AGE = "candidate_age"
    CANDIDATES = "candidates"
    CLICKS = "clicks"
    NEW = "new"
    DATED = "dated"
    SCORE = "score"
    PREDICTED = "predicted"

    SCHEMA = pl.Schema(
        {
            IMPRESSION: pl.String,
            USER: pl.String,
            DAY: pl.Date,
            HELD_OUT: pl.Boolean,
            CATEGORY_SHOWN: pl.String,
            CATEGORY_CLICKED: pl.String,
            TEXT_LENGTH: pl.Int32,
            HOUR: pl.Int8,
            HISTORY_LENGTH: pl.Int32,
            CANDIDATE_AGE: pl.Float64,
            CANDIDATES: pl.Int32,
            CLICKS: pl.Int32,
            NEW: pl.Int8,
            DATED: pl.Int8,
            SCORE: pl.Float64,
            PREDICTED: pl.Float64,
        }
    )


def first_shown(window: pl.DataFrame) -> pl.DataFrame:
    """When each item was first shown: ``item_id``, ``time``, sorted by both.

    Args:
        window: Impressions of a window of days; candidates and time are looked at.
    """
    return (
        window.lazy()
        .select(pl.col(Columns.CANDIDATES).alias(Columns.ITEM_ID), Columns.TIME)
        .explode(Columns.ITEM_ID)
        .group_by(Columns.ITEM_ID)
        .agg(pl.col(Columns.TIME).min())
        .sort(Columns.TIME, Columns.ITEM_ID)
        .collect()
    )


def describe_impressions(
    impressions: pl.DataFrame,
    items: pl.DataFrame,
    window: pl.DataFrame,
    *,
    held_out: bool,
    seed: int,
    scores: pl.Series | None = None,
    probabilities: pl.Series | None = None,
) -> pl.DataFrame:
    """Describe impressions by one row each.

    An item is new on a day that shows it when none of the :data:`LOOKBACK_DAYS` days before did.
    Its age is the time since it was published or, where that is unknown, since it was first shown
    in these days, so at most two days. Both are null on days of which the window does not hold the
    days before.

    Args:
        impressions: The impressions (contract ``SPLIT_IMPRESSIONS``).
        items: Their items (contract ``ITEM_FEATURES``).
        window: Impressions of these days and the days before, for what was shown when.
        held_out: Whether no model was trained on them.
        seed: Seed of the drawn candidates.
        scores: A score for each candidate, ``List(Float64)``.
        probabilities: A click probability for each candidate, ``List(Float64)``.

    Returns:
        A frame of the schema ``Rows.SCHEMA``, sorted by day and impression.

    Raises:
        ContractError: A frame does not have the columns and types of its contract.
    """
    SPLIT_IMPRESSIONS.check_schema(impressions.schema)
    ITEM_FEATURES.check_schema(items.schema)
    listed = impressions.with_columns(
        pl.Series("_scores", scores, dtype=pl.List(pl.Float64))
        if scores is not None
        else pl.lit(None, pl.List(pl.Float64)).alias("_scores"),
        pl.Series("_probabilities", probabilities, dtype=pl.List(pl.Float64))
        if probabilities is not None
        else pl.lit(None, pl.List(pl.Float64)).alias("_probabilities"),
    ).with_columns(pl.col(Columns.TIME).dt.date().alias(Columns.DAY))
    drawn = _draw(listed, seed)
    about = items.lazy().select(
        Columns.ITEM_ID, Columns.CATEGORY, Columns.TEXT_CHARACTERS, Columns.PUBLISHED_AT
    )
    clicked = about.select(
        pl.col(Columns.ITEM_ID).alias("_clicked"),
        pl.col(Columns.CATEGORY).alias(Rows.CATEGORY_CLICKED),
    )
    shown = _shown_by_day(window).lazy()
    days = set(window.select(pl.col(Columns.TIME).dt.date().unique()).to_series().to_list())
    dated = [day for day in days if _has_days_before(day, days)]
    before = _first_in_lookback(shown)
    time, published = pl.col(Columns.TIME), pl.col(Columns.PUBLISHED_AT)
    hours = (time - pl.coalesce(published, "_first")).dt.total_seconds() / 3600
    known = pl.col(Rows.DAY).is_in(dated)
    return (
        drawn.lazy()
        .join(about, left_on="_shown", right_on=Columns.ITEM_ID, how="left")
        .join(clicked, on="_clicked", how="left")
        .join(
            before, left_on=["_shown", Rows.DAY], right_on=[Columns.ITEM_ID, Rows.DAY], how="left"
        )
        .with_columns(
            pl.lit(held_out).alias(Rows.HELD_OUT),
            pl.col(Columns.CATEGORY).alias(Rows.CATEGORY_SHOWN),
            pl.col(Columns.TEXT_CHARACTERS).alias(Rows.TEXT_LENGTH),
            pl.when(published.is_not_null() | known)
            .then(
                pl.when(published.is_not_null())
                .then(hours.clip(0, MOST_HOURS))
                .otherwise(hours.clip(0, _LOOKBACK_HOURS))
            )
            .alias(Rows.CANDIDATE_AGE),
            pl.when(known).then(~pl.col("_before")).cast(pl.Int8).alias(Rows.NEW),
            pl.when(known).then(1).cast(pl.Int8).alias(Rows.DATED),
        )
        .select(pl.col(name).cast(kind) for name, kind in Rows.SCHEMA.items())
        .sort(Rows.DAY, Rows.IMPRESSION)
        .collect()
    )


def _draw(listed: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Draw a candidate and a clicked one of every impression, the same whatever the row order."""
    ordered = listed.sort(Columns.TIME, Columns.IMPRESSION_ID)
    parts: list[pl.DataFrame] = []
    for (day,), rows in ordered.group_by([Columns.DAY], maintain_order=True):
        rng = make_rng(seed, "candidates", str(day))
        count = rows[Columns.CANDIDATES].list.len().to_numpy()
        clicks = rows[Columns.LABELS].list.eval(pl.element() == 1).list.sum().to_numpy()
        parts.append(
            rows.with_columns(
                pl.Series("_place", np.floor(rng.random(len(count)) * count).astype(np.int64)),
                pl.Series("_click", np.floor(rng.random(len(count)) * clicks).astype(np.int64)),
            )
        )
    frame = pl.concat(parts) if parts else ordered.with_columns(_place=0, _click=0)
    places = pl.col(Columns.LABELS).list.eval(pl.arg_where(pl.element() == 1))
    return frame.select(
        pl.col(Columns.IMPRESSION_ID).alias(Rows.IMPRESSION),
        pl.col(Columns.USER_ID).alias(Rows.USER),
        Columns.TIME,
        pl.col(Columns.DAY).alias(Rows.DAY),
        pl.col(Columns.HOUR).alias(Rows.HOUR),
        pl.col(Columns.HISTORY_LENGTH).alias(Rows.HISTORY_LENGTH),
        pl.col(Columns.CANDIDATE_COUNT).alias(Rows.CANDIDATES),
        pl.col(Columns.CLICK_COUNT).alias(Rows.CLICKS),
        pl.col(Columns.CANDIDATES).list.get(pl.col("_place")).alias("_shown"),
        pl.col(Columns.CANDIDATES)
        .list.get(places.list.get(pl.col("_click"), null_on_oob=True), null_on_oob=True)
        .alias("_clicked"),
        pl.col("_scores").list.get(pl.col("_place")).alias(Rows.SCORE),
        # The sum of no list is 0, which would be a prediction.
        pl.when(pl.col("_probabilities").is_not_null())
        .then(pl.col("_probabilities").list.sum())
        .alias(Rows.PREDICTED),
    )


def _shown_by_day(window: pl.DataFrame) -> pl.DataFrame:
    """First time of each item on each day: ``item_id``, ``day``, ``time``."""
    return (
        window.lazy()
        .select(
            pl.col(Columns.CANDIDATES).alias(Columns.ITEM_ID),
            Columns.TIME,
            pl.col(Columns.TIME).dt.date().alias(Rows.DAY),
        )
        .explode(Columns.ITEM_ID)
        .group_by(Columns.ITEM_ID, Rows.DAY)
        .agg(pl.col(Columns.TIME).min())
        .collect()
    )


def _first_in_lookback(shown: pl.LazyFrame) -> pl.LazyFrame:
    """Of each item and day: its first time in the lookback, and whether that was before the day."""
    ago = pl.concat(
        shown.select(
            Columns.ITEM_ID,
            (pl.col(Rows.DAY) + timedelta(days=back)).alias(Rows.DAY),
            pl.col(Columns.TIME).alias("_first"),
            pl.lit(back > 0).alias("_before"),
        )
        for back in range(LOOKBACK_DAYS + 1)
    )
    return ago.group_by(Columns.ITEM_ID, Rows.DAY).agg(
        pl.col("_first").min(), pl.col("_before").any()
    )


def _has_days_before(day: date, days: set[date]) -> bool:
    """Whether the lookback is inside the window, and not all of its days are missing."""
    lookback = {day - timedelta(days=back) for back in range(1, LOOKBACK_DAYS + 1)}
    return min(days) <= min(lookback) and bool(days & lookback)

"""Splits by time, and the claims about them that must hold.

A training snapshot reads a window of UTC days that ends at its last day and cuts it at midnight:
training days, then validation days, then test days. Nothing is drawn at random.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TypeAlias

import polars as pl

from recflow.core.columns import IMPRESSION_FEATURES, Columns
from recflow.core.errors import ConfigError, SourceError
from recflow.data.history import extend_histories

TRAIN_PRECEDES_VALIDATION = "train_precedes_validation"
NO_IMPRESSION_IN_TWO_SPLITS = "no_impression_in_two_splits"
FEATURES_ARE_POINT_IN_TIME = "features_are_point_in_time"

_MAX_EXAMPLES = 5
_SPLIT = "split"
_ROW = "_row"
_FIRST_CLICK = "_first_click"
_WHO = (
    Columns.IMPRESSION_ID,
    Columns.USER_ID,
    Columns.TIME,
    Columns.SOURCE_FILE,
    Columns.SOURCE_ROW,
)

Fact: TypeAlias = "str | int | float | bool | None"


def window_keys(last_day: str, days: int) -> list[str]:
    """Partition keys of the window of ``days`` days that ends with ``last_day``, oldest first."""
    end = date.fromisoformat(last_day)
    return [(end - timedelta(days=back)).isoformat() for back in reversed(range(days))]


@dataclass(frozen=True, slots=True)
class SplitConfig:
    """How a snapshot's window is cut.

    Attributes:
        window_days: Days of the window, ending at the snapshot's day.
        validation_days: Days before the test days.
        test_days: Last days of the window.
        max_history: The newest so many items of a history are kept.

    Raises:
        ConfigError: A value is below 1, or nothing of the window is left for training.
    """

    window_days: int
    validation_days: int
    test_days: int
    max_history: int

    def __post_init__(self) -> None:
        for key in ("window_days", "validation_days", "test_days", "max_history"):
            value: int = getattr(self, key)
            if value < 1:
                raise ConfigError.of(key, value, "1 or more")
        held_out = self.validation_days + self.test_days
        if held_out >= self.window_days:
            raise ConfigError.of(
                "window_days",
                self.window_days,
                f"more than the {held_out} days of validation and test together",
            )

    def days_of(self, last_day: date) -> dict[str, tuple[date, date]]:
        """First and last day of each split, in the order train, validation, test."""
        test = last_day - timedelta(days=self.test_days - 1)
        validation = test - timedelta(days=self.validation_days)
        one = timedelta(days=1)
        return {
            "train": (last_day - timedelta(days=self.window_days - 1), validation - one),
            "validation": (validation, test - one),
            "test": (test, last_day),
        }


@dataclass(frozen=True, slots=True)
class Splits:
    """The splits of a snapshot (contract ``SPLIT_IMPRESSIONS``), each sorted by time and id."""

    train: pl.DataFrame
    validation: pl.DataFrame
    test: pl.DataFrame

    def together(self, *columns: str) -> pl.LazyFrame:
        """Some columns of all splits, with the column ``split``."""
        return pl.concat(
            frame.lazy().select(*columns, pl.lit(name).alias(_SPLIT))
            for name, frame in (
                ("train", self.train),
                ("validation", self.validation),
                ("test", self.test),
            )
        )


@dataclass(frozen=True, slots=True)
class Claim:
    """A statement about splits and whether it holds.

    Attributes:
        name: Name of the check.
        holds: Whether it holds.
        description: What is claimed, one sentence.
        facts: What was seen.
        examples: At most five offending rows, with their source file and row.
    """

    name: str
    holds: bool
    description: str
    facts: dict[str, Fact]
    examples: list[dict[str, Fact]]


def missing_days(present: Collection[date], *, last_day: date, window_days: int) -> list[date]:
    """List the days of the window ending at ``last_day`` that are not ``present``, in order."""
    window = (last_day - timedelta(days=age) for age in reversed(range(window_days)))
    return [day for day in window if day not in present]


def split_by_time(window: pl.DataFrame, *, last_day: date, config: SplitConfig) -> Splits:
    """Cut a window of days into train, validation and test, with histories as of each impression.

    Histories are extended before the cut: a test impression sees the clicks of training days and
    of earlier test impressions, each strictly before its own time.

    Args:
        window: Impressions (contract ``IMPRESSION_FEATURES``), in any order. Rows of days outside
            the window take no part.
        last_day: Last day of the window (UTC).
        config: The lengths.

    Raises:
        ContractError: ``window`` does not have the columns and types of its contract.
        ConfigError: A split has no impressions: the window does not fit the days there are.
        SourceError: A split has impressions but not one click.
    """
    IMPRESSION_FEATURES.check_schema(window.schema)
    days = config.days_of(last_day)
    day = pl.col(Columns.TIME).dt.date()
    inside = window.filter(day.is_between(days["train"][0], last_day))
    _require_clicks(inside, days)
    extended = extend_histories(inside, max_history=config.max_history)
    return Splits(**{name: extended.filter(day.is_between(*span)) for name, span in days.items()})


def _require_clicks(window: pl.DataFrame, days: dict[str, tuple[date, date]]) -> None:
    by_day = (
        window.lazy()
        .group_by(pl.col(Columns.TIME).dt.date().alias(Columns.DAY))
        .agg(pl.col(Columns.CLICK_COUNT).sum())
        .collect()
    )
    clicks: dict[date, int] = dict(by_day.iter_rows())
    first_day, last_day = days["train"][0], days["test"][1]
    missing = missing_days(clicks, last_day=last_day, window_days=(last_day - first_day).days + 1)
    seen = (
        f"days of the window {first_day} to {last_day} present: {_listed(sorted(clicks))}; "
        f"missing: {_listed(missing)}"
    )
    for name, (first, last) in days.items():
        present = [day for day in clicks if first <= day <= last]
        if not present:
            raise ConfigError(
                f"the {name} split, {first} to {last}, has no impressions ({seen}); choose another "
                "last day, a shorter window_days, or ingest the missing days"
            )
        if not any(clicks[day] for day in present):
            raise SourceError(
                f"the {name} split, {first} to {last}, has impressions but no click, so there is "
                f"nothing to learn or to measure ({seen}); check the click column of the source or "
                "choose a longer window_days"
            )


def _listed(days: list[date]) -> str:
    """Write days as runs: ``2023-05-18..2023-05-20, 2023-05-22``; ``none`` when there are none."""
    runs: list[tuple[date, date]] = []
    for day in days:
        if runs and day - runs[-1][1] == timedelta(days=1):
            runs[-1] = (runs[-1][0], day)
        else:
            runs.append((day, day))
    return ", ".join(f"{a}" if a == b else f"{a}..{b}" for a, b in runs) or "none"


def train_precedes_validation(splits: Splits) -> Claim:
    """Claim that every training impression is before every validation one, and those before test.

    Args:
        splits: The splits of a snapshot, none of them empty.
    """
    spans = (
        splits.together(Columns.TIME)
        .group_by(_SPLIT)
        .agg(first=pl.col(Columns.TIME).min(), last=pl.col(Columns.TIME).max())
        .collect()
    )
    first, last = ({row[_SPLIT]: row[end] for row in spans.to_dicts()} for end in ("first", "last"))
    late = pl.concat(
        frame.lazy()
        .filter(pl.col(Columns.TIME) >= first[following])
        .select(*_WHO, pl.lit(name).alias(_SPLIT))
        for name, following, frame in (
            ("train", "validation", splits.train),
            ("validation", "test", splits.validation),
        )
    ).collect()
    facts: dict[str, Fact] = {"impressions_too_late": late.height}
    for name in ("train", "validation", "test"):
        facts[f"{name}_first"] = first[name].isoformat()
        facts[f"{name}_last"] = last[name].isoformat()
    return Claim(
        TRAIN_PRECEDES_VALIDATION,
        late.is_empty(),
        "Every training impression is earlier than every validation impression, and every "
        "validation impression earlier than every test impression.",
        facts,
        _examples(late),
    )


def no_impression_in_two_splits(splits: Splits) -> Claim:
    """Claim that no impression is in two splits, told by id, user and time and by source row."""
    rows = splits.together(*_WHO)
    identities = (
        [Columns.IMPRESSION_ID, Columns.USER_ID, Columns.TIME],
        [Columns.SOURCE_FILE, Columns.SOURCE_ROW],
    )
    in_two = [pl.col(_SPLIT).n_unique().over(identity) > 1 for identity in identities]
    shared = rows.filter(pl.any_horizontal(in_two)).collect()
    return Claim(
        NO_IMPRESSION_IN_TWO_SPLITS,
        shared.is_empty(),
        "No impression is in two splits, whether told by id, user and time or by its source row.",
        {
            "train_impressions": splits.train.height,
            "validation_impressions": splits.validation.height,
            "test_impressions": splits.test.height,
            "impressions_in_two_splits": shared.height,
        },
        _examples(shared),
    )


def features_are_point_in_time(splits: Splits) -> Claim:
    """Claim that no history holds anything its impression's user had not clicked by then.

    Worked out again from the clicks of the splits, apart from the code that extends histories:
    every item behind the logged part was first clicked by that user strictly before the impression,
    in this order, and ``history_until`` is the time of the last of them.

    What the source logged has no times to check. ``logs_holding_own_click`` counts the impressions
    whose logged history holds an item clicked in that very impression: somebody coming back to it
    where they are few, a log written after the click where they are many.
    """
    rows = (
        splits.together(
            *_WHO,
            Columns.HISTORY,
            Columns.CANDIDATES,
            Columns.LABELS,
            Columns.HISTORY_LENGTH,
            Columns.LOGGED_HISTORY_LENGTH,
            Columns.HISTORY_UNTIL,
        )
        .with_row_index(_ROW)
        .collect()
    )
    time, length = pl.col(Columns.TIME), pl.col(Columns.HISTORY).list.len()
    logged, until = pl.col(Columns.LOGGED_HISTORY_LENGTH), pl.col(Columns.HISTORY_UNTIL)
    added = (
        rows.lazy()
        .select(
            _ROW,
            Columns.USER_ID,
            Columns.TIME,
            pl.col(Columns.HISTORY).list.slice(logged).alias(Columns.ITEM_ID),
        )
        .explode(Columns.ITEM_ID, empty_as_null=False)
        .join(
            _first_click_times(rows),
            on=[Columns.USER_ID, Columns.ITEM_ID],
            how="left",
            maintain_order="left",
        )
        .group_by(_ROW)
        .agg(
            pl.len().alias("added"),
            (pl.col(_FIRST_CLICK).is_null() | (pl.col(_FIRST_CLICK) >= time)).any().alias("early"),
            (pl.col(_FIRST_CLICK).diff() < pl.duration()).any().alias("disordered"),
            pl.col(_FIRST_CLICK).max().alias("newest"),
        )
    )
    judged = (
        rows.lazy()
        .select(
            _ROW,
            *_WHO,
            _SPLIT,
            until,
            ((length != pl.col(Columns.HISTORY_LENGTH)) | (logged > length)).alias("wrong_length"),
            pl.col(Columns.HISTORY).list.head(logged).alias("logged"),
        )
        .join(added, on=_ROW, how="left")
        .join(_clicks(rows).group_by(_ROW).agg(Columns.ITEM_ID), on=_ROW, how="left")
        .with_columns(
            pl.col("logged").list.set_intersection(Columns.ITEM_ID).list.len().alias("own"),
            pl.col("added").fill_null(0),
            pl.col("early", "disordered").fill_null(value=False),
            (until.ne_missing(pl.col("newest")) | (until >= time).fill_null(value=False)).alias(
                "wrong_until"
            ),
        )
        .drop("logged", Columns.ITEM_ID)
        .collect()
    )
    faults = {
        "early": "history_holds_unclicked_items",
        "disordered": "history_out_of_order",
        "wrong_until": "history_until_wrong",
        "wrong_length": "history_length_wrong",
    }
    offending = judged.filter(pl.any_horizontal(*faults)).sort(_ROW)
    return Claim(
        FEATURES_ARE_POINT_IN_TIME,
        offending.is_empty(),
        "Every item added to a history was clicked by that user strictly before the impression.",
        {
            "impressions": judged.height,
            "histories_extended": int((judged["added"] > 0).sum()),
            "items_added": int(judged["added"].sum()),
            "logs_holding_own_click": int((judged["own"] > 0).sum()),
            **{fact: int(judged[fault].sum()) for fault, fact in faults.items()},
        },
        _examples(offending.select(*_WHO, _SPLIT, until, *faults)),
    )


def _first_click_times(rows: pl.DataFrame) -> pl.LazyFrame:
    """When each user first clicked each item: user_id, item_id, first click."""
    return (
        _clicks(rows)
        .group_by(Columns.USER_ID, Columns.ITEM_ID)
        .agg(pl.col(Columns.TIME).min().alias(_FIRST_CLICK))
    )


def _clicks(rows: pl.DataFrame) -> pl.LazyFrame:
    """Every click: row, user_id, time, item_id."""
    return (
        rows.lazy()
        .select(
            _ROW,
            Columns.USER_ID,
            Columns.TIME,
            pl.col(Columns.CANDIDATES).alias(Columns.ITEM_ID),
            Columns.LABELS,
        )
        .explode(Columns.ITEM_ID, Columns.LABELS)
        .filter(pl.col(Columns.LABELS) == 1)
        .drop(Columns.LABELS)
    )


def _examples(offending: pl.DataFrame) -> list[dict[str, Fact]]:
    """First offending rows as plain values, times in ISO format."""
    times = pl.selectors.datetime().dt.to_string("iso:strict")
    return offending.head(_MAX_EXAMPLES).with_columns(times).to_dicts()

"""What every source of logs provides, and the bookkeeping they share.

A source *judges* each raw row (see :class:`Judged`): the first problem that applies decides whether
the row becomes a row of its table or of the quarantine, so rows in = rows kept + rows quarantined.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Final, Protocol

import polars as pl

from recflow.core.artifacts import sha256_of
from recflow.core.columns import IMPRESSIONS, ITEMS, QUARANTINE, Columns, Reason
from recflow.core.errors import SourceError

EARLIEST_TIME: Final = datetime(1990, 1, 1, tzinfo=UTC)
_FUTURE_TOLERANCE = timedelta(days=1)
_RAW_CHARACTERS = 500
_HASH_CONTENT_BELOW_BYTES = 64 << 20
_READABLE = "readable"
_PROBLEM = "_problem"


@dataclass(frozen=True, slots=True)
class RawTable:
    """A table as the log has it, and the rows that could not be read.

    Attributes:
        rows: Columns of the table's contract, in order, values not yet cleaned; impressions also
            have ``day``, the UTC day of their time.
        quarantine: Columns of ``core.columns.QUARANTINE``; of impressions also ``day``. Rows
            without a usable time belong to the first readable day of their file.
    """

    rows: pl.LazyFrame
    quarantine: pl.LazyFrame


class Source(Protocol):
    """A folder of logs in one format, read as the two tables."""

    @property
    def name(self) -> str:
        """Name of the format."""
        ...

    @property
    def directory(self) -> Path:
        """Folder of the logs."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 that changes when a file of the log does."""
        ...

    def days(self) -> list[date]:
        """UTC days with at least one readable impression, ascending."""
        ...

    def impressions(self, start: date, end: date) -> RawTable:
        """Impressions of the days from ``start`` up to, not including, ``end``."""
        ...

    def items(self) -> RawTable:
        """The whole catalogue."""
        ...

    def truth(self, start: date, end: date) -> pl.LazyFrame | None:
        """True click probabilities, where the log was simulated; otherwise None.

        Returns:
            ``impression_id`` and ``utility``: the probability that each candidate is clicked
            (List(Float64)), in slate order, for the days from ``start`` up to ``end``.
        """
        ...


@dataclass(frozen=True, slots=True)
class Problem:
    """A reason to quarantine a raw row.

    Attributes:
        reason: The reason.
        applies: Whether a row has the problem; never null.
        detail: The sentence for people; evaluated on quarantined rows only.
    """

    reason: Reason
    applies: pl.Expr
    detail: pl.Expr


class Judged:
    """Raw rows, each with the first problem that applies to it.

    Args:
        frame: Raw rows with ``source_file`` and ``source_row``.
        problems: What may be wrong with a row, the first to report first.
        raw: The row as text.
    """

    def __init__(self, frame: pl.LazyFrame, problems: Sequence[Problem], raw: pl.Expr) -> None:
        self._frame = frame.with_columns(
            pl.coalesce(
                pl.when(problem.applies).then(pl.lit(number, pl.UInt8))
                for number, problem in enumerate(problems)
            ).alias(_PROBLEM)
        )
        self._problems = problems
        self._raw = raw

    def readable(self) -> pl.LazyFrame:
        """Rows without a problem, with their raw columns."""
        return self._frame.filter(pl.col(_PROBLEM).is_null()).drop(_PROBLEM)

    def survey(self) -> pl.LazyFrame:
        """Distinct ``source_file``, ``readable`` and ``day``."""
        readable = pl.col(_PROBLEM).is_null().alias(_READABLE)
        return self._frame.select(Columns.SOURCE_FILE, readable, Columns.DAY).unique()

    def quarantine(self, table: str, *extra: str) -> pl.LazyFrame:
        """Rows with a problem, as rows of the quarantine.

        Args:
            table: Table the rows were meant for.
            extra: Raw columns to keep beside those of the contract.
        """
        number = pl.col(_PROBLEM)
        reasons = {n: problem.reason.value for n, problem in enumerate(self._problems)}
        return self._frame.filter(number.is_not_null()).select(
            pl.lit(table).alias(Columns.TABLE),
            number.replace_strict(reasons, return_dtype=pl.String).alias(Columns.REASON),
            pl.coalesce(
                pl.when(number == n).then(problem.detail)
                for n, problem in enumerate(self._problems)
            ).alias(Columns.DETAIL),
            Columns.SOURCE_FILE,
            Columns.SOURCE_ROW,
            self._raw.str.slice(0, _RAW_CHARACTERS).alias(Columns.RAW),
            *extra,
        )


class LogSource(ABC):
    """Bookkeeping common to the formats: fingerprint, days, and which day a row belongs to.

    Args:
        name: Name of the format.
        directory: Folder of the logs.
        files: Every file the log consists of.
    """

    def __init__(self, name: str, directory: Path, files: Sequence[Path]) -> None:
        self.name = name
        self.directory = directory
        self._files = sorted(files)

    @abstractmethod
    def _judge_impressions(self) -> Judged:
        """Judge every raw impression; its rows have ``day``, null where the time is unusable."""

    @abstractmethod
    def _shape_impressions(self, readable: pl.LazyFrame) -> pl.LazyFrame:
        """Turn readable raw rows into rows of the impressions contract."""

    @abstractmethod
    def items(self) -> RawTable:
        """The whole catalogue."""

    def fingerprint(self) -> str:
        """SHA-256 over the path, size and content of every file.

        Large logs count with their modification time instead of their content.
        """
        by_content = sum(file.stat().st_size for file in self._files) < _HASH_CONTENT_BELOW_BYTES
        lines = [self.name]
        for file in self._files:
            status = file.stat()
            state = sha256_of(file) if by_content else str(status.st_mtime_ns)
            lines.append(f"{self._name_of(file)}\0{status.st_size}\0{state}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def days(self) -> list[date]:
        """UTC days with at least one readable impression, ascending.

        Raises:
            SourceError: A file has no readable impression at all.
        """
        return self._readable_days[Columns.DAY].unique().sort().to_list()

    def impressions(self, start: date, end: date) -> RawTable:
        """Impressions of the days from ``start`` up to, not including, ``end``.

        A quarantined row belongs to the day of its time when that day has readable impressions,
        otherwise to the first readable day of its file: over all days nothing is lost.

        Raises:
            SourceError: A file has no readable impression at all.
        """
        judged = self._judge_impressions()
        in_range = pl.col(Columns.DAY).is_between(start, end, closed="left")
        rows = self._shape_impressions(judged.readable().filter(in_range))
        return RawTable(
            IMPRESSIONS.conform(rows).with_columns(
                pl.col(Columns.TIME).dt.date().alias(Columns.DAY)
            ),
            self._quarantine_by_day(judged).filter(in_range),
        )

    def truth(self, start: date, end: date) -> pl.LazyFrame | None:  # noqa: ARG002
        """None: nobody knows the true click probabilities of a real log."""
        return None

    def _quarantine_by_day(self, judged: Judged) -> pl.LazyFrame:
        if self._survey.filter(~pl.col(_READABLE)).is_empty():  # the usual case, and a pass saved
            return QUARANTINE.empty().lazy().with_columns(pl.lit(None, pl.Date).alias(Columns.DAY))
        first_days = self._readable_days.group_by(Columns.SOURCE_FILE).agg(
            pl.col(Columns.DAY).min()
        )
        first_day = pl.col(Columns.SOURCE_FILE).replace_strict(
            first_days[Columns.SOURCE_FILE], first_days[Columns.DAY], return_dtype=pl.Date
        )
        day = pl.col(Columns.DAY)
        return (
            judged.quarantine(IMPRESSIONS.name, Columns.DAY)
            .with_columns(
                pl.when(day.is_in(self.days())).then(day).otherwise(first_day).alias(Columns.DAY)
            )
            .select(*QUARANTINE.names, Columns.DAY)
        )

    @cached_property
    def _readable_days(self) -> pl.DataFrame:
        """``source_file``, ``day``: which days each file has readable impressions of."""
        found = self._survey.filter(_READABLE).select(Columns.SOURCE_FILE, Columns.DAY)
        for file in self._impression_files:
            if self._name_of(file) not in found[Columns.SOURCE_FILE]:
                self._raise_unreadable(file)
        return found

    @cached_property
    def _survey(self) -> pl.DataFrame:
        """Every combination of ``source_file``, ``readable`` and ``day`` there is in the log."""
        return self._judge_impressions().survey().collect(engine="streaming")

    @property
    @abstractmethod
    def _impression_files(self) -> Sequence[Path]:
        """The files that hold impressions."""

    def _raise_unreadable(self, file: Path) -> None:
        problems = (
            self._judge_impressions()
            .quarantine(IMPRESSIONS.name)
            .filter(pl.col(Columns.SOURCE_FILE) == self._name_of(file))
        )
        first = problems.sort(Columns.SOURCE_ROW).head(1).collect(engine="streaming")
        if first.is_empty():
            raise SourceError(f"{file} has no rows; remove the file or fetch it again")
        row, detail = first[Columns.SOURCE_ROW].item(), first[Columns.DETAIL].item()
        raise SourceError(
            f"{file} has no readable impression: line or row {row}: {detail}. Check that it is "
            f"the {self.name} format (see data/README.md)"
        )

    def _name_of(self, file: Path) -> str:
        return file.relative_to(self.directory).as_posix()

    def _prefixes(self, files: Sequence[Path], usual_name: str) -> dict[str, str]:
        """What to put before the ids of each file so that they differ between files.

        Nothing where there is one file; otherwise the folder, and the file name without its
        suffixes unless that is the usual one.
        """
        if len(files) == 1:
            return {self._name_of(files[0]): ""}
        prefixes: dict[str, str] = {}
        for file in files:
            relative = file.relative_to(self.directory)
            stem = relative.name.partition(".")[0]
            parts = [*relative.parent.parts, *([] if stem == usual_name else [stem])]
            prefixes[self._name_of(file)] = "/".join(parts or [stem]) + ":"
        return prefixes


def shape_items(judged: Judged, rows: pl.LazyFrame) -> RawTable:
    """Pair readable items with those that are not, both by their contracts."""
    return RawTable(ITEMS.conform(rows), QUARANTINE.conform(judged.quarantine(ITEMS.name)))


def within_calendar(time: pl.Expr) -> pl.Expr:
    """Move times beyond the years 1 to 9999 to their ends: Polars panics when it formats them."""
    return time.clip(datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC))


def latest_time() -> datetime:
    """The latest time an event may have: a day from now, for clocks that run ahead."""
    return datetime.now(UTC) + _FUTURE_TOLERANCE


def time_problems(time: pl.Expr, unreadable_detail: pl.Expr) -> tuple[Problem, Problem]:
    """The two ways in which a time can be unusable.

    Args:
        time: The parsed time (UTC), null where it could not be parsed.
        unreadable_detail: What to say where it could not.
    """
    latest = latest_time()
    return (
        Problem(Reason.UNREADABLE_TIME, time.is_null(), unreadable_detail),
        Problem(
            Reason.IMPOSSIBLE_TIME,
            ~time.is_between(EARLIEST_TIME, latest),
            pl.format(
                "time {} is not between {} and now",
                time.dt.strftime("%Y-%m-%d %H:%M:%S"),
                pl.lit(f"{EARLIEST_TIME:%Y-%m-%d}"),
            ),
        ),
    )


def usable_day(time: pl.Expr) -> pl.Expr:
    """The UTC day of a usable time, null otherwise."""
    usable = time.is_between(EARLIEST_TIME, latest_time())
    return pl.when(usable).then(time.dt.date()).alias(Columns.DAY)


def require_directory(directory: Path, expected: str) -> None:
    """Raise unless ``directory`` is a folder with something in it.

    Args:
        directory: The folder.
        expected: Which files it should hold.

    Raises:
        SourceError: It is missing, no folder, or empty.
    """
    if not directory.is_dir():
        what = "is no folder" if directory.exists() else "does not exist"
        raise SourceError(f"{directory} {what}; expected a folder with {expected}")
    if not any(directory.iterdir()):
        raise SourceError(f"{directory} is empty; expected {expected}")

"""MovieLens-100K as RecBole atomic files: ``ml-100k.inter`` and ``ml-100k.item``.

Format: https://recbole.io/docs/user_guide/data/atomic_files.html

MovieLens logs ratings, not slates. People rated page by page in one sitting, so a user's *rating
session* is read as an impression: the candidates are the films rated in it, the clicked ones those
rated 4 or 5.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Final

import polars as pl

from recflow.core.columns import UTC_TIME, Columns, Reason
from recflow.core.errors import SourceError
from recflow.data.sources.base import (
    Judged,
    LogSource,
    Problem,
    RawTable,
    require_directory,
    shape_items,
    time_problems,
    usable_day,
    within_calendar,
)
from recflow.data.sources.lines import LINE, check_text_file, first_line, scan_lines
from recflow.data.sources.tabular import fields, line_problems, missing

CLICKED_FROM_RATING: Final = 4.0
# Of the 99,057 pauses between a user's ratings 98.1 % are shorter than half an hour and 1.6 %
# longer than six; only 0.3 % lie between, so any limit in that range cuts nearly the same sessions.
SESSION_PAUSE: Final = timedelta(minutes=30)

_EXPECTED = "ml-100k.inter and ml-100k.item (RecBole atomic files)"
_REMEDY = f"Expected {_EXPECTED}; `make demo` fetches them."
_INTER_HEADER = ("user_id:token", "item_id:token", "rating:float", "timestamp:float")
_ITEM_HEADER = (
    "item_id:token",
    "movie_title:token_seq",
    "release_year:token",
    "class:token_seq",
)
_RATINGS = (0.5, 5.0)
_IS_HEADER = pl.col(Columns.SOURCE_ROW) == 1
_TRAILING_ARTICLE = r"^(.+), (The|A|An)( \(.*\))?$"


class MovielensSource(LogSource):
    """Reader of MovieLens-100K.

    Each rating is a source row; an impression's ``source_row`` is the line of its session's first
    rating in the file. The history column is empty: the log has none of its own.

    Args:
        directory: Folder with the two files, at the top or below.

    Raises:
        SourceError: A file is missing, empty, or has another header.
    """

    def __init__(self, directory: Path) -> None:
        require_directory(directory, _EXPECTED)
        self._ratings = _find(directory, "ml-100k.inter", _INTER_HEADER)
        self._films = _find(directory, "ml-100k.item", _ITEM_HEADER)
        super().__init__("movielens", directory, [self._ratings, self._films])

    @property
    def _impression_files(self) -> Sequence[Path]:
        return [self._ratings]

    def _judge_impressions(self) -> Judged:
        return self._judged_ratings

    @cached_property
    def _judged_ratings(self) -> Judged:
        # the file is two megabytes, and sessions need it whole
        frame = (
            scan_lines([self._ratings], self.directory)
            .filter(~_IS_HEADER)
            .with_columns(fields(("user", "item", "rating_text", "timestamp")))
            .with_columns(
                pl.col("rating_text").cast(pl.Float32, strict=False).alias("stars"),
                _time_of("timestamp").alias(Columns.TIME),
            )
            .collect()
        )
        time = pl.col(Columns.TIME)
        lowest, highest = (pl.lit(limit) for limit in _RATINGS)
        problems = (
            *line_problems(len(_INTER_HEADER)),
            missing("user"),
            missing("item"),
            *time_problems(
                time, pl.format("timestamp '{}' is no number of seconds since 1970", "timestamp")
            ),
            Problem(
                Reason.MALFORMED_FIELD,
                ~pl.col("stars").is_between(*_RATINGS).fill_null(value=False),
                pl.format("rating '{}' is no number from {} to {}", "rating_text", lowest, highest),
            ),
            Problem(
                Reason.DUPLICATE_IMPRESSION,
                ~pl.struct("user", "item").is_first_distinct(),
                pl.format("user {} rated film {} before", "user", "item"),
            ),
        )
        return Judged(_with_sessions(frame).lazy(), problems, pl.col(LINE))

    def _shape_impressions(self, readable: pl.LazyFrame) -> pl.LazyFrame:
        start = pl.col("session_start")
        clicked = pl.col("stars") >= CLICKED_FROM_RATING
        return (
            readable.sort("shuffle_key")
            .group_by("user", start)
            .agg(
                pl.col("item").alias(Columns.CANDIDATES),
                pl.col("item").filter(clicked).alias(Columns.CLICKED),
                pl.col("stars").alias(Columns.RATING),
                pl.col(Columns.SOURCE_FILE).first(),
                pl.col(Columns.SOURCE_ROW).min(),
            )
            .select(
                pl.format("{}-{}", "user", start.dt.epoch("s")).alias(Columns.IMPRESSION_ID),
                pl.col("user").alias(Columns.USER_ID),
                start.alias(Columns.TIME),
                pl.lit([], pl.List(pl.String)).alias(Columns.HISTORY),
                Columns.CANDIDATES,
                Columns.CLICKED,
                Columns.RATING,
                Columns.SOURCE_FILE,
                Columns.SOURCE_ROW,
            )
            .sort(Columns.TIME, Columns.IMPRESSION_ID)
        )

    def items(self) -> RawTable:
        """The films: title, then year and genres as the body; the first genre is the category."""
        frame = (
            scan_lines([self._films], self.directory)
            .filter(~_IS_HEADER)
            .with_columns(fields(("film", "title", "year", "genres")))
        )
        judged = Judged(frame, (*line_problems(len(_ITEM_HEADER)), missing("film")), pl.col(LINE))
        year = pl.col("year").cast(pl.Int32, strict=False)
        genres = pl.col("genres").str.split(" ").list.filter(pl.element() != "")
        rows = judged.readable().select(
            pl.col("film").alias(Columns.ITEM_ID),
            # "Usual Suspects, The" is how a catalogue sorts, not how people write
            pl.col("title").str.replace(_TRAILING_ARTICLE, "$2 $1$3").alias(Columns.TITLE),
            pl.concat_str(
                pl.col("year").replace("", None),
                genres.list.join(", ").replace("", None),
                separator=". ",
                ignore_nulls=True,
            ).alias(Columns.BODY),
            genres.list.first().alias(Columns.CATEGORY),
            genres.list.get(1, null_on_oob=True).alias(Columns.SUBCATEGORY),
            pl.lit([], pl.List(pl.String)).alias(Columns.ENTITIES),
            pl.datetime(year, 1, 1, time_unit="us", time_zone="UTC").alias(Columns.PUBLISHED_AT),
            Columns.SOURCE_FILE,
            Columns.SOURCE_ROW,
        )
        return shape_items(judged, rows)


def _find(directory: Path, name: str, header: Sequence[str]) -> Path:
    """Find and check one file and its header line."""
    files = sorted(directory.rglob(name))
    if len(files) != 1:
        found = "no" if not files else f"{len(files)} files named"
        raise SourceError(f"{directory} has {found} {name}. {_REMEDY}")
    file = files[0]
    check_text_file(file, len(header), _REMEDY)
    seen = first_line(file)
    if seen != "\t".join(header):
        raise SourceError(
            f"{file}, line 1: the header is {seen!r}, expected {chr(9).join(header)!r}. {_REMEDY}"
        )
    return file


def _time_of(field: str) -> pl.Expr:
    """Seconds since 1970 as a time; null where the text is no number a time can hold."""
    microseconds = pl.col(field).cast(pl.Float64, strict=False) * 1e6
    return within_calendar(microseconds.cast(pl.Int64, strict=False).cast(UTC_TIME))


def _with_sessions(ratings: pl.DataFrame) -> pl.DataFrame:
    """Add ``session_start`` and the ``day`` it is on, and ``shuffle_key``, which orders a slate.

    A session that passes midnight belongs to the day it started on.
    """
    time, user = pl.col(Columns.TIME), pl.col("user")
    pause = time.diff().over("user") > SESSION_PAUSE
    return (
        ratings.sort("user", Columns.TIME, maintain_order=True)
        .with_columns(pause.fill_null(value=True).cum_sum().over("user").alias("session"))
        .with_columns(time.first().over("user", "session").alias("session_start"))
        .with_columns(
            usable_day(pl.col("session_start")),
            pl.struct(user, "item").map_batches(_shuffle_keys, pl.Binary).alias("shuffle_key"),
        )
    )


def _shuffle_keys(pairs: pl.Series) -> pl.Series:
    """Hash of user and item: an order that knows neither ratings nor times."""
    return pl.Series(
        pairs.name,
        [
            hashlib.blake2b(f"{pair['user']}\0{pair['item']}".encode(), digest_size=8).digest()
            for pair in pairs.to_list()
        ],
        pl.Binary,
    )

"""EB-NeRD: Parquet files ``behaviors``, ``history`` and ``articles`` (https://recsys.eb.dk).

Only what was known when the slate was shown is read: read times, scroll depths and counters of the
articles are later knowledge and stay in the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, TypeAlias

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

_Kind: TypeAlias = "type[pl.DataType] | None"  # None: anything that can be written as text

_BEHAVIORS: Final[Mapping[str, _Kind]] = {
    "impression_id": None,
    "user_id": None,
    "impression_time": pl.Datetime,
    "article_ids_inview": pl.List,
    "article_ids_clicked": pl.List,
}
_HISTORY: Final[Mapping[str, _Kind]] = {
    "user_id": None,
    "impression_time_fixed": pl.List,
    "article_id_fixed": pl.List,
}
_ARTICLES: Final[Mapping[str, _Kind]] = {
    "article_id": None,
    "title": pl.String,
    "subtitle": pl.String,
    "category": None,
    "subcategory": pl.List,
}
_ARTICLES_OPTIONAL: Final[Mapping[str, pl.DataType]] = {
    "body": pl.String(),
    "category_str": pl.String(),
    "ner_clusters": pl.List(pl.String),
    "published_time": pl.Datetime("us"),
}
_EXPECTED = (
    "articles.parquet and, at the top or in folders such as train/ and validation/, "
    "behaviors.parquet beside history.parquet"
)
_INDEX = "row_index"


class EbnerdSource(LogSource):
    """Reader of EB-NeRD folders, demo, small and large alike.

    Times are taken as UTC: the files hold none of a zone. A user's history is the one of the split
    folder the impression is in, frozen at the start of that split.

    Args:
        directory: Folder with ``articles.parquet`` and one or several pairs of
            ``behaviors.parquet`` and ``history.parquet``.

    Raises:
        SourceError: Files or columns are missing, of another type, or truncated, or a history
            file has a user twice.
    """

    def __init__(self, directory: Path) -> None:
        require_directory(directory, _EXPECTED)
        self._behaviors = _find(directory, "behaviors.parquet")
        self._articles = _find(directory, "articles.parquet")
        self._histories = [file.with_name("history.parquet") for file in self._behaviors]
        for history in self._histories:
            if not history.is_file():
                raise SourceError(f"{history} is missing; expected {_EXPECTED}")
        super().__init__("ebnerd", directory, [*self._behaviors, *self._histories, *self._articles])
        _check_files(self._behaviors, _BEHAVIORS)
        _check_files(self._histories, _HISTORY)
        _check_files(self._articles, _ARTICLES)
        for history in self._histories:
            _check_users_differ(history)

    @property
    def _impression_files(self) -> Sequence[Path]:
        return self._behaviors

    def _judge_impressions(self) -> Judged:
        frame = pl.concat([self._scan_behaviors(file) for file in self._behaviors])
        time = pl.col("impression_time")
        shown, clicked = pl.col("article_ids_inview"), pl.col("article_ids_clicked")
        frame = frame.with_columns(usable_day(time))
        problems = (
            _missing("impression_id"),
            _missing("user_id"),
            *time_problems(time, pl.lit("the impression_time is missing")),
            *_list_problems("article_ids_inview"),
            Problem(
                Reason.MALFORMED_FIELD,
                shown.list.len() == 0,
                pl.lit("the list article_ids_inview is empty"),
            ),
            *_list_problems("article_ids_clicked"),
            Problem(
                Reason.CLICK_NOT_SHOWN,
                (clicked.list.set_difference(shown).list.len() > 0).fill_null(value=False),
                pl.format(
                    "article {} was clicked but is not in article_ids_inview",
                    clicked.list.set_difference(shown).list.first(),
                ),
            ),
        )
        raw = pl.struct(list(_BEHAVIORS)).struct.json_encode()
        return Judged(frame, problems, raw)

    def _shape_impressions(self, readable: pl.LazyFrame) -> pl.LazyFrame:
        histories = pl.concat([self._scan_history(file) for file in self._histories])
        prefixes = self._prefixes(self._behaviors, "behaviors")
        prefix = pl.col(Columns.SOURCE_FILE).replace_strict(prefixes, return_dtype=pl.String)
        strings = pl.List(pl.String)
        return readable.join(
            histories, on=[Columns.SOURCE_FILE, "user_id"], how="left", maintain_order="left"
        ).select(
            (prefix + pl.col("impression_id")).alias(Columns.IMPRESSION_ID),
            pl.col("user_id").alias(Columns.USER_ID),
            pl.col("impression_time").alias(Columns.TIME),
            pl.col("history").cast(strings).fill_null([]).alias(Columns.HISTORY),
            pl.col("article_ids_inview").cast(strings).alias(Columns.CANDIDATES),
            pl.col("article_ids_clicked").cast(strings).alias(Columns.CLICKED),
            pl.lit(None).alias(Columns.RATING),
            Columns.SOURCE_FILE,
            Columns.SOURCE_ROW,
        )

    def items(self) -> RawTable:
        """The whole catalogue: title, subtitle and body where there is one."""
        frame = pl.concat([self._scan_articles(file) for file in self._articles])
        judged = Judged(
            frame,
            (_missing("article_id"),),
            pl.struct("article_id", "title", "subtitle", "category").struct.json_encode(),
        )
        rows = judged.readable().select(
            pl.col("article_id").alias(Columns.ITEM_ID),
            pl.col("title").fill_null("").alias(Columns.TITLE),
            pl.concat_str("subtitle", "body", separator=" ", ignore_nulls=True)
            .str.strip_chars()
            .alias(Columns.BODY),
            pl.coalesce("category_str", "category").alias(Columns.CATEGORY),
            pl.col("subcategory").list.first().cast(pl.String).alias(Columns.SUBCATEGORY),
            pl.col("ner_clusters")
            .fill_null([])
            .list.drop_nulls()
            .list.unique(maintain_order=True)
            .alias(Columns.ENTITIES),
            pl.col("published_time").dt.replace_time_zone("UTC").alias(Columns.PUBLISHED_AT),
            Columns.SOURCE_FILE,
            Columns.SOURCE_ROW,
        )
        return shape_items(judged, rows)

    def _scan_behaviors(self, file: Path) -> pl.LazyFrame:
        return self._scan(file).select(
            Columns.SOURCE_FILE,
            Columns.SOURCE_ROW,
            pl.col("impression_id", "user_id").cast(pl.String),
            _as_utc(file, "impression_time"),
            pl.col("article_ids_inview", "article_ids_clicked").cast(pl.List(pl.Int64)),
        )

    def _scan_history(self, file: Path) -> pl.LazyFrame:
        """``source_file`` of the behaviors beside it, ``user_id``, ``history`` oldest first."""
        behaviors = file.with_name("behaviors.parquet")
        by_time = pl.col("impression_time_fixed").list.eval(pl.element().arg_sort())
        return pl.scan_parquet(file, glob=False).select(
            pl.lit(self._name_of(behaviors)).alias(Columns.SOURCE_FILE),
            pl.col("user_id").cast(pl.String),
            pl.col("article_id_fixed")
            .cast(pl.List(pl.Int64))
            .list.gather(by_time, null_on_oob=True)
            .list.drop_nulls()
            .alias("history"),
        )

    def _scan_articles(self, file: Path) -> pl.LazyFrame:
        present = pl.read_parquet_schema(file)
        optional = [
            (pl.col(name) if name in present else pl.lit(None)).cast(dtype).alias(name)
            for name, dtype in _ARTICLES_OPTIONAL.items()
        ]
        return self._scan(file).select(
            Columns.SOURCE_FILE,
            Columns.SOURCE_ROW,
            pl.col("article_id", "category").cast(pl.String),
            "title",
            "subtitle",
            "subcategory",
            *optional,
        )

    def _scan(self, file: Path) -> pl.LazyFrame:
        return pl.scan_parquet(
            file, glob=False, row_index_name=_INDEX, row_index_offset=1
        ).with_columns(
            pl.lit(self._name_of(file)).alias(Columns.SOURCE_FILE),
            pl.col(_INDEX).cast(pl.Int64).alias(Columns.SOURCE_ROW),
        )


def _find(directory: Path, name: str) -> list[Path]:
    files = sorted(directory.rglob(name))
    if not files:
        raise SourceError(f"{directory} has no {name}; expected {_EXPECTED}")
    return files


def _check_files(files: Sequence[Path], required: Mapping[str, _Kind]) -> None:
    for file in files:
        schema = _schema_of(file)
        missing = [name for name in required if name not in schema]
        if missing:
            raise SourceError(
                f"{file} lacks the columns {missing}; it has {schema.names()}. Splits without "
                "clicks (the hidden test set) cannot be read; move them out of the folder."
            )
        for name, kind in required.items():
            if kind is not None and not isinstance(schema[name], kind):
                raise SourceError(
                    f"{file}: column {name!r} is {schema[name]}, expected {kind.__name__}; "
                    "use the files as published"
                )


def _schema_of(file: Path) -> pl.Schema:
    try:
        return pl.Schema(pl.read_parquet_schema(file))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise SourceError(
            f"{file} is no Parquet file or was cut short ({error}); fetch it again"
        ) from error


def _check_users_differ(history: Path) -> None:
    users = pl.scan_parquet(history, glob=False).select("user_id")
    repeated = users.group_by("user_id").len().filter(pl.col("len") > 1).head(1).collect()
    if not repeated.is_empty():
        user = repeated["user_id"].item()
        raise SourceError(f"{history} has user {user} twice; a user has one row of history")


def _as_utc(file: Path, column: str) -> pl.Expr:
    dtype = pl.read_parquet_schema(file)[column]
    time = pl.col(column)
    if isinstance(dtype, pl.Datetime) and dtype.time_zone is not None:
        return within_calendar(time.dt.convert_time_zone("UTC").cast(UTC_TIME))
    return within_calendar(time.dt.replace_time_zone("UTC").cast(UTC_TIME))


def _missing(field: str) -> Problem:
    return Problem(Reason.MISSING_ID, pl.col(field).is_null(), pl.lit(f"the {field} is missing"))


def _list_problems(field: str) -> tuple[Problem, Problem]:
    column = pl.col(field)
    return (
        Problem(Reason.MALFORMED_FIELD, column.is_null(), pl.lit(f"the list {field} is missing")),
        Problem(
            Reason.MALFORMED_FIELD,
            (column.list.len() != column.list.drop_nulls().list.len()).fill_null(value=False),
            pl.lit(f"the list {field} has a missing article id"),
        ),
    )

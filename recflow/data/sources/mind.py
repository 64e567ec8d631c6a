"""MIND: tab-separated ``behaviors.tsv`` and ``news.tsv``.

Format: https://github.com/msnews/msnews.github.io/blob/master/assets/doc/introduction.md
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final, cast

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
)
from recflow.data.sources.lines import LINE, check_text_file, scan_lines
from recflow.data.sources.tabular import fields, line_problems, missing

TIME_FORMAT: Final = "%m/%d/%Y %I:%M:%S %p"
BEHAVIOR_FIELDS: Final = ("impression_id", "user_id", "time", "history", "impressions")
NEWS_FIELDS: Final = (
    "news_id",
    "category",
    "subcategory",
    "title",
    "abstract",
    "url",
    "title_entities",
    "abstract_entities",
)

_EXPECTED = "behaviors.tsv and news.tsv (or .tsv.gz), at the top or in folders below"
_REMEDY = "See data/README.md for the MIND format."
_CLICKED_SUFFIX = "-1"
_CANDIDATE = r"[^ ]+-[01]"
_SLATE = rf"^{_CANDIDATE}(?: {_CANDIDATE})*$"


class MindSource(LogSource):
    """Reader of MIND-format logs, in one folder or several (``train/``, ``dev/``, day files).

    Args:
        directory: Folder with ``behaviors*.tsv`` and ``news*.tsv``, plain or gzip-compressed, at
            any depth.
        name: Name of the source, for formats that build on this one.

    Raises:
        SourceError: Files are missing, empty, or obviously not tab-separated text.
    """

    def __init__(self, directory: Path, name: str = "mind", extra_files: Sequence[Path] = ()):
        require_directory(directory, _EXPECTED)
        self._behaviors = _find(directory, "behaviors", len(BEHAVIOR_FIELDS))
        self._news = _find(directory, "news", len(NEWS_FIELDS))
        super().__init__(name, directory, [*self._behaviors, *self._news, *extra_files])

    @property
    def _impression_files(self) -> Sequence[Path]:
        return self._behaviors

    def _judge_impressions(self) -> Judged:
        lines = scan_lines(self._behaviors, self.directory)
        time = pl.col(Columns.TIME)
        frame = lines.with_columns(fields(BEHAVIOR_FIELDS)).with_columns(
            time.str.to_datetime(TIME_FORMAT, time_unit="us", time_zone="UTC", strict=False).alias(
                "parsed_time"
            ),
            pl.col("history").str.strip_chars(" "),
            pl.col("impressions").str.strip_chars(" "),
        )
        frame = frame.with_columns(usable_day(pl.col("parsed_time")))
        problems = (
            *line_problems(len(BEHAVIOR_FIELDS)),
            missing("impression_id"),
            missing("user_id"),
            *time_problems(
                pl.col("parsed_time"),
                pl.format("time '{}' is not like '11/15/2019 8:55:22 AM'", time),
            ),
            Problem(
                Reason.MALFORMED_FIELD,
                pl.col("impressions") == "",
                pl.lit("the list of impressions is empty"),
            ),
            Problem(
                Reason.MALFORMED_FIELD,
                ~pl.col("impressions").str.contains(_SLATE),
                pl.format(
                    "impression '{}' is not an item id followed by -0 or -1", _first_wrong_token()
                ),
            ),
            Problem(
                Reason.MALFORMED_FIELD,
                pl.col("history").str.contains("  ", literal=True),
                pl.lit("the history has more than one space between two items"),
            ),
        )
        return Judged(frame, problems, pl.col(LINE))

    def _shape_impressions(self, readable: pl.LazyFrame) -> pl.LazyFrame:
        tokens = pl.col("impressions").str.split(" ")
        item = pl.element().str.head(-len(_CLICKED_SUFFIX))
        is_clicked = pl.element().str.ends_with(_CLICKED_SUFFIX)
        history = pl.col("history").replace("", None).str.split(" ").fill_null([])
        prefixes = self._prefixes(self._behaviors, "behaviors")
        return readable.select(
            _prefixed(prefixes).alias(Columns.IMPRESSION_ID),
            Columns.USER_ID,
            pl.col("parsed_time").alias(Columns.TIME),
            history.alias(Columns.HISTORY),
            tokens.list.eval(item).alias(Columns.CANDIDATES),
            tokens.list.filter(is_clicked).list.eval(item).alias(Columns.CLICKED),
            pl.lit(None).alias(Columns.RATING),
            Columns.SOURCE_FILE,
            Columns.SOURCE_ROW,
        )

    def items(self) -> RawTable:
        """The whole catalogue: title, abstract, categories, Wikidata ids of the entities."""
        lines = scan_lines(self._news, self.directory)
        entities = ("title_entities", "abstract_entities")
        frame = lines.with_columns(fields(NEWS_FIELDS)).with_columns(
            pl.col(name)
            .map_batches(_wikidata_ids, return_dtype=pl.List(pl.String), is_elementwise=True)
            .alias(f"{name}_ids")
            for name in entities
        )
        problems = (
            *line_problems(len(NEWS_FIELDS)),
            missing("news_id"),
            *(
                Problem(
                    Reason.MALFORMED_FIELD,
                    pl.col(f"{name}_ids").is_null(),
                    pl.format("{} is no JSON list of objects", pl.lit(name)),
                )
                for name in entities
            ),
        )
        judged = Judged(frame, problems, pl.col(LINE))
        rows = judged.readable().select(
            pl.col("news_id").alias(Columns.ITEM_ID),
            pl.col("title").alias(Columns.TITLE),
            pl.col("abstract").alias(Columns.BODY),
            pl.col("category").replace("", None).alias(Columns.CATEGORY),
            pl.col("subcategory").replace("", None).alias(Columns.SUBCATEGORY),
            pl.concat_list(f"{name}_ids" for name in entities)
            .list.unique(maintain_order=True)
            .alias(Columns.ENTITIES),
            pl.lit(None, UTC_TIME).alias(Columns.PUBLISHED_AT),
            Columns.SOURCE_FILE,
            Columns.SOURCE_ROW,
        )
        return shape_items(judged, rows)


def _find(directory: Path, stem: str, columns: int) -> list[Path]:
    """Find and check the files whose name starts with ``stem``."""
    files = sorted([*directory.rglob(f"{stem}*.tsv"), *directory.rglob(f"{stem}*.tsv.gz")])
    if not files:
        raise SourceError(f"{directory} has no {stem}.tsv; expected {_EXPECTED}")
    for file in files:
        if file.suffix == ".gz" and file.with_suffix("") in files:
            raise SourceError(f"{file} is there twice, plain and compressed; remove one of them")
        check_text_file(file, columns, _REMEDY)
    return files


def _first_wrong_token() -> pl.Expr:
    tokens = pl.col("impressions").str.split(" ")
    wrong = ~pl.element().str.contains(rf"^{_CANDIDATE}$")
    return tokens.list.eval(pl.element().filter(wrong)).list.first()


def _prefixed(prefixes: dict[str, str]) -> pl.Expr:
    identifier = pl.col(Columns.IMPRESSION_ID)
    if len(prefixes) == 1:
        return identifier
    return pl.col(Columns.SOURCE_FILE).replace_strict(prefixes) + identifier


def _wikidata_ids(column: pl.Series) -> pl.Series:
    """Parse entity JSON; null where it is no list of objects, an empty list where there is none."""
    parsed = [_ids_of(text) for text in cast("list[str | None]", column.to_list())]
    return pl.Series(column.name, parsed, pl.List(pl.String))


def _ids_of(text: str | None) -> list[str] | None:
    if text is None or text in ("", "[]"):
        return []
    try:
        entities = cast("object", json.loads(text))
    except (ValueError, RecursionError):
        return None
    if not isinstance(entities, list):
        return None
    ids: list[str] = []
    for entity in cast("list[object]", entities):
        if not isinstance(entity, dict):
            return None
        identifier = cast("dict[str, object]", entity).get("WikidataId")
        if isinstance(identifier, str) and identifier:
            ids.append(identifier)
    return ids

"""Column names, table contracts, and the quarantine.

A :class:`TableContract` is the single description of a table: the reading code conforms to it, the
Great Expectations suite is built from it, and Dagster shows it as the asset's column schema.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

import polars as pl

from recflow.core.errors import ContractError

PolarsType: TypeAlias = pl.DataType | type[pl.DataType]

UTC_TIME = pl.Datetime("us", "UTC")


class Columns:
    """Names of the columns that more than one module uses."""

    # items
    ITEM_ID = "item_id"
    TITLE = "title"
    BODY = "body"
    CATEGORY = "category"
    SUBCATEGORY = "subcategory"
    ENTITIES = "entities"
    PUBLISHED_AT = "published_at"

    # impressions
    IMPRESSION_ID = "impression_id"
    USER_ID = "user_id"
    TIME = "time"
    HISTORY = "history"
    CANDIDATES = "candidates"
    CLICKED = "clicked"
    RATING = "rating"

    # where a row came from
    SOURCE_FILE = "source_file"
    SOURCE_ROW = "source_row"

    # quarantine
    TABLE = "table"
    REASON = "reason"
    DETAIL = "detail"
    RAW = "raw"
    DAY = "day"

    # features of an item
    TEXT = "text"
    TITLE_WORDS = "title_words"
    TEXT_CHARACTERS = "text_characters"

    # features of an impression
    LABELS = "labels"
    HOUR = "hour"
    WEEKDAY = "weekday"
    CANDIDATE_COUNT = "candidate_count"
    CLICK_COUNT = "click_count"
    HISTORY_LENGTH = "history_length"
    CLICK_RATE = "click_rate"

    # point-in-time evidence, added when histories are extended
    LOGGED_HISTORY_LENGTH = "logged_history_length"
    HISTORY_UNTIL = "history_until"

    # scores
    SCORES = "scores"
    SCORER = "scorer"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a contract.

    Attributes:
        name: Column name.
        dtype: Polars data type; lists hold their element type.
        description: What the values mean, with their unit. Shown in Dagster.
        nullable: Whether nulls are allowed.
        unique: Whether values must differ between the rows of one partition.
        minimum: Smallest allowed value (numbers) or length (strings and lists), if any.
        maximum: Largest allowed value or length, if any.
    """

    name: str
    dtype: PolarsType
    description: str
    nullable: bool = False
    unique: bool = False
    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True, slots=True)
class TableContract:
    """What a table promises: its columns in order, their types and limits.

    Attributes:
        name: Name of the table.
        description: One sentence for people.
        columns: The columns, in order.
        equal_lengths: Groups of list columns whose lists have equal length in every row; null
            lists of a nullable column are exempt.
    """

    name: str
    description: str
    columns: tuple[Column, ...]
    equal_lengths: tuple[tuple[str, ...], ...] = field(default=())

    @property
    def names(self) -> list[str]:
        """Column names in order."""
        return [column.name for column in self.columns]

    @property
    def schema(self) -> pl.Schema:
        """The Polars schema."""
        return pl.Schema({column.name: column.dtype for column in self.columns})

    def __getitem__(self, name: str) -> Column:
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(name)

    def empty(self) -> pl.DataFrame:
        """Return a frame of this table without rows."""
        return pl.DataFrame(schema=self.schema)

    def conform(self, frame: pl.LazyFrame) -> pl.LazyFrame:
        """Select this table's columns in order, cast to its types.

        Raises:
            ContractError: A column is missing. Values are not looked at.
        """
        missing = sorted(set(self.names) - set(frame.collect_schema().names()))
        if missing:
            raise ContractError(f"table {self.name!r} lacks the columns {missing}")
        return frame.select(pl.col(c.name).cast(c.dtype) for c in self.columns)

    def check_schema(self, schema: pl.Schema) -> None:
        """Raise unless ``schema`` has exactly this table's columns and types, in order.

        Raises:
            ContractError: Names the first difference.
        """
        if schema.names() != self.names:
            raise ContractError(
                f"table {self.name!r} has the columns {schema.names()}, expected {self.names}"
            )
        for column in self.columns:
            if schema[column.name] != column.dtype:
                raise ContractError(
                    f"column {self.name}.{column.name} is {schema[column.name]}, "
                    f"expected {column.dtype}"
                )


_SOURCE_COLUMNS = (
    Column(Columns.SOURCE_FILE, pl.String, "File the row was read from, below the source folder"),
    Column(
        Columns.SOURCE_ROW,
        pl.Int64,
        "Row in that file, counted from 1 (lines of text files, rows of Parquet files)",
        minimum=1,
    ),
)

ITEMS = TableContract(
    "items",
    "What can be recommended, one row an item.",
    (
        Column(Columns.ITEM_ID, pl.String, "Identifier, unique", unique=True, minimum=1),
        Column(Columns.TITLE, pl.String, "Title; the first part of the text", minimum=1),
        Column(Columns.BODY, pl.String, "Abstract, subtitle or body; may be empty"),
        Column(Columns.CATEGORY, pl.String, "Category", nullable=True),
        Column(Columns.SUBCATEGORY, pl.String, "Subcategory", nullable=True),
        Column(Columns.ENTITIES, pl.List(pl.String), "Knowledge-base ids named in the text"),
        Column(Columns.PUBLISHED_AT, UTC_TIME, "Publication time (UTC)", nullable=True),
        *_SOURCE_COLUMNS,
    ),
)

IMPRESSIONS = TableContract(
    "impressions",
    "What was shown to whom and what was clicked, one row an impression.",
    (
        Column(
            Columns.IMPRESSION_ID, pl.String, "Identifier, unique in a day", unique=True, minimum=1
        ),
        Column(Columns.USER_ID, pl.String, "User", minimum=1),
        Column(Columns.TIME, UTC_TIME, "When the slate was shown (UTC)"),
        Column(Columns.HISTORY, pl.List(pl.String), "Items clicked before, oldest first"),
        Column(Columns.CANDIDATES, pl.List(pl.String), "Items shown, in order", minimum=1),
        Column(Columns.CLICKED, pl.List(pl.String), "Items clicked, a subset of the candidates"),
        Column(
            Columns.RATING,
            pl.List(pl.Float32),
            "Explicit rating of each candidate; null where the source has none",
            nullable=True,
        ),
        *_SOURCE_COLUMNS,
    ),
    equal_lengths=((Columns.CANDIDATES, Columns.RATING),),
)


class Reason(StrEnum):
    """Why a row is in quarantine. The value is what the table stores."""

    # the line itself
    WRONG_COLUMN_COUNT = "wrong_column_count"
    NOT_UTF8 = "not_utf8"
    NUL_BYTE = "nul_byte"
    MALFORMED_FIELD = "malformed_field"
    # identity
    MISSING_ID = "missing_id"
    DUPLICATE_ITEM = "duplicate_item"
    DUPLICATE_IMPRESSION = "duplicate_impression"
    # items
    EMPTY_TEXT = "empty_text"
    # impressions
    UNREADABLE_TIME = "unreadable_time"
    IMPOSSIBLE_TIME = "impossible_time"
    NO_CANDIDATE_LEFT = "no_candidate_left"
    NO_CLICK_LEFT = "no_click_left"
    CLICK_NOT_SHOWN = "click_not_shown"


QUARANTINE = TableContract(
    "quarantine",
    "Rows that could not be used, with the reason and where they came from.",
    (
        Column(Columns.TABLE, pl.String, "Table the row was meant for: items or impressions"),
        Column(Columns.REASON, pl.String, "One of recflow.core.columns.Reason"),
        Column(Columns.DETAIL, pl.String, "What was wrong with this row, for people"),
        *_SOURCE_COLUMNS,
        Column(Columns.RAW, pl.String, "The row as text, cut to 500 characters"),
    ),
)

ITEM_FEATURES = TableContract(
    "item_features",
    "Items as the encoder reads them.",
    (
        Column(Columns.ITEM_ID, pl.String, "Identifier, unique", unique=True, minimum=1),
        Column(Columns.TEXT, pl.String, "Text the encoder reads, whitespace normalised", minimum=1),
        Column(Columns.CATEGORY, pl.String, "Category; empty where unknown"),
        Column(Columns.SUBCATEGORY, pl.String, "Subcategory; empty where unknown"),
        Column(Columns.PUBLISHED_AT, UTC_TIME, "Publication time (UTC)", nullable=True),
        Column(Columns.TITLE_WORDS, pl.Int32, "Words in the title", minimum=1, maximum=1_000),
        Column(Columns.TEXT_CHARACTERS, pl.Int32, "Characters in the text", minimum=1),
        *_SOURCE_COLUMNS,
    ),
)

IMPRESSION_FEATURES = TableContract(
    "impression_features",
    "Impressions with what can be computed from the row alone.",
    (
        Column(
            Columns.IMPRESSION_ID, pl.String, "Identifier, unique in a day", unique=True, minimum=1
        ),
        Column(Columns.USER_ID, pl.String, "User", minimum=1),
        Column(Columns.TIME, UTC_TIME, "When the slate was shown (UTC)"),
        Column(Columns.HISTORY, pl.List(pl.String), "Items clicked before, oldest first"),
        Column(Columns.CANDIDATES, pl.List(pl.String), "Items shown, in order", minimum=1),
        Column(Columns.LABELS, pl.List(pl.Int8), "1 where the candidate was clicked, else 0"),
        Column(
            Columns.RATING,
            pl.List(pl.Float32),
            "Explicit rating of each candidate; null where the source has none",
            nullable=True,
        ),
        Column(Columns.HOUR, pl.Int8, "Hour of the day (UTC)", minimum=0, maximum=23),
        Column(Columns.WEEKDAY, pl.Int8, "ISO weekday, Monday = 1", minimum=1, maximum=7),
        Column(Columns.CANDIDATE_COUNT, pl.Int32, "Candidates in the slate", minimum=1),
        Column(Columns.CLICK_COUNT, pl.Int32, "Clicked candidates", minimum=0),
        Column(Columns.HISTORY_LENGTH, pl.Int32, "Items in the logged history", minimum=0),
        Column(Columns.CLICK_RATE, pl.Float32, "Clicked share of the slate", minimum=0, maximum=1),
        *_SOURCE_COLUMNS,
    ),
    equal_lengths=((Columns.CANDIDATES, Columns.LABELS, Columns.RATING),),
)

SPLIT_IMPRESSIONS = TableContract(
    "split_impressions",
    "Impressions of one split of a training snapshot, with the history as of their time.",
    (
        *IMPRESSION_FEATURES.columns,
        Column(
            Columns.LOGGED_HISTORY_LENGTH,
            pl.Int32,
            "How many leading items of the history the source logged; the rest are clicks of "
            "earlier impressions",
            minimum=0,
        ),
        Column(
            Columns.HISTORY_UNTIL,
            UTC_TIME,
            "Time of the newest click added to the history; strictly before the impression",
            nullable=True,
        ),
    ),
    equal_lengths=IMPRESSION_FEATURES.equal_lengths,
)


def reasons_of(quarantine: pl.DataFrame) -> dict[str, int]:
    """Count quarantined rows by reason, most frequent first; empty when there are none."""
    counts = (
        quarantine.group_by(Columns.REASON)
        .len()
        .sort(["len", Columns.REASON], descending=[True, False])
    )
    return {str(reason): int(n) for reason, n in counts.iter_rows()}

"""EB-NeRD logs, on tiny Parquet files in the published layout."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from recflow.core.columns import ITEMS, Columns
from recflow.core.errors import SourceError
from recflow.data.sources.ebnerd import EbnerdSource
from recflow_tests.unit.sources.helpers import read_all

TIME = datetime(2023, 5, 21, 21, 6, 50)
BEHAVIOR_SCHEMA = {
    "impression_id": pl.UInt32,
    "article_id": pl.Int32,
    "impression_time": pl.Datetime("us"),
    "read_time": pl.Float32,
    "article_ids_inview": pl.List(pl.Int32),
    "article_ids_clicked": pl.List(pl.Int32),
    "user_id": pl.UInt32,
    "next_read_time": pl.Float32,
}
GOOD: dict[str, Any] = {
    "impression_id": 1,
    "article_id": None,
    "impression_time": TIME,
    "read_time": 987.5,
    "article_ids_inview": [30, 10, 20],
    "article_ids_clicked": [10],
    "user_id": 7,
    "next_read_time": 987.5,
}


def write_split(folder: Path, *behaviors: dict[str, Any], users: tuple[int, ...] = (7,)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(list(behaviors), schema=BEHAVIOR_SCHEMA, orient="row").write_parquet(
        folder / "behaviors.parquet"
    )
    pl.DataFrame(
        {
            "user_id": users,
            # the second click is the older one
            "impression_time_fixed": [[datetime(2023, 5, 2), datetime(2023, 5, 1)]] * len(users),
            "article_id_fixed": [[20, 10]] * len(users),
            "read_time_fixed": [[1.0, 2.0]] * len(users),
        },
        schema={
            "user_id": pl.UInt32,
            "impression_time_fixed": pl.List(pl.Datetime("us")),
            "article_id_fixed": pl.List(pl.Int32),
            "read_time_fixed": pl.List(pl.Float32),
        },
    ).write_parquet(folder / "history.parquet")
    return folder


def write_articles(folder: Path, **optional: pl.Series) -> None:
    frame = pl.DataFrame(
        {
            "article_id": [10, 20, None],
            "title": ["Ten", None, "Nameless"],
            "subtitle": ["First", "Second", ""],
            "category": [142, 118, 1],
            "subcategory": [[196, 271], [], None],
            "total_pageviews": [5, 6, 7],
        },
        schema={
            "article_id": pl.Int32,
            "title": pl.String,
            "subtitle": pl.String,
            "category": pl.Int16,
            "subcategory": pl.List(pl.Int16),
            "total_pageviews": pl.Int32,
        },
    )
    frame.with_columns(**optional).write_parquet(folder / "articles.parquet")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    write_split(tmp_path / "train", GOOD)
    write_articles(tmp_path)
    return tmp_path


def test_impressions_are_read_field_by_field(log: Path):
    rows, quarantine = read_all(EbnerdSource(log))
    assert quarantine.is_empty()
    assert rows.to_dicts() == [
        {
            "impression_id": "1",
            "user_id": "7",
            "time": TIME.replace(tzinfo=UTC),
            "history": ["10", "20"],
            "candidates": ["30", "10", "20"],
            "clicked": ["10"],
            "rating": None,
            "source_file": "train/behaviors.parquet",
            "source_row": 1,
            "day": date(2023, 5, 21),
        }
    ]


def test_a_split_uses_its_own_history_and_ids_stay_unique(log: Path):
    write_split(log / "validation", GOOD, GOOD | {"impression_id": 2, "user_id": 8}, users=(7, 9))
    history = log / "validation" / "history.parquet"
    pl.read_parquet(history).with_columns(article_id_fixed=pl.lit([None, 30])).cast(
        {"article_id_fixed": pl.List(pl.Int32)}
    ).write_parquet(history)
    rows, _ = read_all(EbnerdSource(log))
    assert dict(rows.select("impression_id", "history").iter_rows()) == {
        "train:1": ["10", "20"],
        "validation:1": ["30"],
        "validation:2": [],
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"impression_id": None}, "missing_id"),
        ({"user_id": None}, "missing_id"),
        ({"impression_time": None}, "unreadable_time"),
        ({"impression_time": datetime(1970, 1, 1)}, "impossible_time"),
        ({"article_ids_inview": None}, "malformed_field"),
        ({"article_ids_inview": []}, "malformed_field"),
        ({"article_ids_inview": [10, None]}, "malformed_field"),
        ({"article_ids_clicked": None}, "malformed_field"),
        ({"article_ids_clicked": [None]}, "malformed_field"),
        ({"article_ids_clicked": [10, 99]}, "click_not_shown"),
    ],
)
def test_damaged_impressions_go_to_quarantine(log: Path, change: dict[str, Any], reason: str):
    write_split(log / "train", GOOD, GOOD | change, GOOD | {"article_ids_clicked": []})
    rows, rejected = read_all(EbnerdSource(log))
    assert rows["source_row"].to_list() == [1, 3]
    (row,) = rejected.to_dicts()
    assert row["reason"] == reason
    assert row["detail"]
    assert (row["source_file"], row["source_row"]) == ("train/behaviors.parquet", 2)
    assert row["day"] == date(2023, 5, 21)
    assert "987.5" not in row["raw"]  # what happened after the click is not even quoted


def test_items_without_optional_columns(log: Path):
    table = EbnerdSource(log).items()
    rows = table.rows.collect()
    ITEMS.check_schema(rows.schema)
    assert rows.drop(Columns.SOURCE_FILE).rows() == [
        ("10", "Ten", "First", "142", "196", [], None, 1),
        ("20", "", "Second", "118", None, [], None, 2),
    ]
    rejected = table.quarantine.collect()
    assert rejected.select("reason", "source_row").rows() == [("missing_id", 3)]


def test_items_with_optional_columns(log: Path):
    write_articles(
        log,
        body=pl.Series(["Body", None, ""]),
        category_str=pl.Series(["sport", None, "x"]),
        ner_clusters=pl.Series([["Kim", "Kim", "Bo"], None, []]),
        published_time=pl.Series([TIME, None, None]),
    )
    rows = EbnerdSource(log).items().rows.collect()
    assert rows["body"].to_list() == ["First Body", "Second"]
    assert rows["category"].to_list() == ["sport", "118"]
    assert rows["entities"].to_list() == [["Kim", "Bo"], []]
    assert rows["published_at"].to_list() == [TIME.replace(tzinfo=UTC), None]


def test_times_with_a_zone_are_converted(log: Path):
    file = log / "train" / "behaviors.parquet"
    pl.read_parquet(file).with_columns(
        pl.col("impression_time").dt.replace_time_zone("Europe/Copenhagen")
    ).write_parquet(file)
    rows, _ = read_all(EbnerdSource(log))
    assert rows["time"].to_list() == [datetime(2023, 5, 21, 19, 6, 50, tzinfo=UTC)]


@pytest.mark.parametrize("microseconds", [2**63 - 1, -(2**63) + 1])
def test_times_beyond_the_calendar(log: Path, microseconds: int):
    file = log / "train" / "behaviors.parquet"
    frame = pl.read_parquet(file)
    wrong = frame.with_columns(impression_time=pl.lit(microseconds).cast(pl.Datetime("us")))
    pl.concat([frame, wrong]).write_parquet(file)
    _, rejected = read_all(EbnerdSource(log))
    assert rejected.select("reason", "source_row").rows() == [("impossible_time", 2)]


@pytest.mark.parametrize(
    "name", ["train/behaviors.parquet", "train/history.parquet", "articles.parquet"]
)
def test_truncated_parquet(log: Path, name: str):
    file = log / name
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(SourceError, match=f"{name} is no Parquet file or was cut short"):
        EbnerdSource(log)
    file.write_bytes(b"")
    with pytest.raises(SourceError, match=f"{name} is no Parquet file or was cut short"):
        EbnerdSource(log)


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("train/behaviors.parquet", "article_ids_clicked"),
        ("train/history.parquet", "article_id_fixed"),
        ("articles.parquet", "subtitle"),
    ],
)
def test_missing_columns(log: Path, name: str, column: str):
    pl.read_parquet(log / name).drop(column).write_parquet(log / name)
    with pytest.raises(SourceError, match=rf"{name} lacks the columns \['{column}'\]"):
        EbnerdSource(log)


def test_columns_of_another_type(log: Path):
    file = log / "train" / "behaviors.parquet"
    pl.read_parquet(file).cast({"impression_time": pl.String}).write_parquet(file)
    with pytest.raises(SourceError, match="'impression_time' is String, expected Datetime"):
        EbnerdSource(log)


def test_missing_files(log: Path):
    (log / "train" / "history.parquet").unlink()
    with pytest.raises(SourceError, match=r"train/history\.parquet is missing"):
        EbnerdSource(log)


def test_a_user_with_two_histories(log: Path):
    write_split(log / "train", GOOD, users=(7, 7))
    with pytest.raises(SourceError, match=r"history\.parquet has user 7 twice"):
        EbnerdSource(log)


def test_no_impressions_at_all(log: Path):
    write_split(log / "train")
    with pytest.raises(SourceError, match=r"train/behaviors\.parquet has no rows"):
        EbnerdSource(log).days()

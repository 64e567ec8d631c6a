"""MovieLens-100K: ratings become sessions, no rating gets lost."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from recflow.core.columns import ITEMS, Columns
from recflow.core.errors import SourceError
from recflow.data.sources.movielens import MovielensSource
from recflow_tests.unit.sources.helpers import read_all

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ITEM_HEADER = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
MIDNIGHT = 883_612_800  # 1998-01-01 00:00 UTC
FILMS = (
    "1\tToy Story\t1995\tAnimation Children's Comedy\n"
    "2\tUsual Suspects, The\t1995\tCrime Thriller\n"
    "3\tPostino, Il\t1994\tDrama\n"
    "4\tunknown\t\t\n"
    "5\tCity of Lost Children, The (Cite)\tv1995\tSci-Fi\n"
)


def write_movielens(folder: Path, ratings: str, films: str = FILMS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ml-100k.inter").write_text(HEADER + ratings)
    (folder / "ml-100k.item").write_text(ITEM_HEADER + films)
    return folder


def rating(user: int, film: int, stars: float | str, seconds: int) -> str:
    return f"{user}\t{film}\t{stars}\t{MIDNIGHT + seconds}\n"


def test_sessions_end_after_half_an_hour_and_may_pass_midnight(tmp_path: Path):
    ratings = (
        rating(7, 1, 5, 3_600)  # line 2: a second session, 3,000 s after the first
        + rating(7, 2, 4, -1_200)  # line 3: the first session starts on New Year's Eve
        + rating(7, 3, 3, 600)  # line 4: exactly 1,800 s later, still the first session
        + rating(8, 1, 1, 600)
    )
    rows, rejected = read_all(MovielensSource(write_movielens(tmp_path, ratings)))
    assert rejected.is_empty()
    sessions = rows.select("impression_id", "day", "source_row").rows()
    assert sessions == [
        (f"7-{MIDNIGHT - 1_200}", date(1997, 12, 31), 3),
        (f"8-{MIDNIGHT + 600}", date(1998, 1, 1), 5),
        (f"7-{MIDNIGHT + 3_600}", date(1998, 1, 1), 2),
    ]
    first = rows.row(0, named=True)
    assert first["time"] == datetime(1997, 12, 31, 23, 40, tzinfo=UTC)
    assert first["history"] == []
    assert dict(zip(first["candidates"], first["rating"], strict=True)) == {"2": 4.0, "3": 3.0}
    assert first["clicked"] == ["2"]
    assert rows.row(1, named=True)["clicked"] == []


def test_the_order_of_a_slate_knows_neither_lines_nor_times_nor_ratings(tmp_path: Path):
    films = range(1, 41)
    forward = "".join(rating(7, film, 1 + film % 5, film) for film in films)
    backward = "".join(rating(7, film, 5 - film % 5, 100 - film) for film in reversed(films))
    slates = [
        read_all(MovielensSource(write_movielens(tmp_path / name, ratings)))[0]["candidates"].item()
        for name, ratings in (("forward", forward), ("backward", backward))
    ]
    assert slates[0].to_list() == slates[1].to_list()
    assert slates[0].to_list() != [str(film) for film in films]
    assert sorted(slates[0].to_list(), key=int) == [str(film) for film in films]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("7\t9\t4\n", "wrong_column_count"),
        (f"\t9\t4\t{MIDNIGHT}\n", "missing_id"),
        (f"7\t\t4\t{MIDNIGHT}\n", "missing_id"),
        ("7\t9\t4\tnoon\n", "unreadable_time"),
        ("7\t9\t4\tnan\n", "unreadable_time"),
        ("7\t9\t4\t1e30\n", "unreadable_time"),
        ("7\t9\t4\t9e12\n", "impossible_time"),
        ("7\t9\t4\t0\n", "impossible_time"),
        (rating(7, 9, "good", 5), "malformed_field"),
        (rating(7, 9, 6, 5), "malformed_field"),
        (rating(7, 9, "nan", 5), "malformed_field"),
        (rating(7, 1, 5, 90_000), "duplicate_impression"),
    ],
)
def test_damaged_ratings_go_to_quarantine(tmp_path: Path, line: str, reason: str):
    log = write_movielens(tmp_path, rating(7, 1, 5, 10) + line + rating(7, 2, 5, 20))
    rows, rejected = read_all(MovielensSource(log))
    assert rows["candidates"].list.len().sum() == 2
    assert rejected.select("reason", "source_row").rows() == [(reason, 3)]
    assert rejected["detail"].item()
    assert rejected["day"].item() == date(1998, 1, 1)


def test_films(tmp_path: Path):
    log = write_movielens(tmp_path, rating(7, 1, 5, 1), FILMS + "no\ttabs\n\tx\t1990\tDrama\n")
    table = MovielensSource(log).items()
    rows = table.rows.collect()
    ITEMS.check_schema(rows.schema)
    first_of_1995 = datetime(1995, 1, 1, tzinfo=UTC)
    first_of_1994 = datetime(1994, 1, 1, tzinfo=UTC)
    assert rows.drop(Columns.ENTITIES, Columns.SOURCE_FILE, Columns.SOURCE_ROW).rows() == [
        (
            "1",
            "Toy Story",
            "1995. Animation, Children's, Comedy",
            "Animation",
            "Children's",
            first_of_1995,
        ),
        ("2", "The Usual Suspects", "1995. Crime, Thriller", "Crime", "Thriller", first_of_1995),
        ("3", "Postino, Il", "1994. Drama", "Drama", None, first_of_1994),
        ("4", "unknown", "", None, None, None),
        ("5", "The City of Lost Children (Cite)", "v1995. Sci-Fi", "Sci-Fi", None, None),
    ]
    assert rows[Columns.SOURCE_ROW].to_list() == [2, 3, 4, 5, 6]
    assert table.quarantine.collect()["reason"].to_list() == ["wrong_column_count", "missing_id"]


def test_another_header(tmp_path: Path):
    log = write_movielens(tmp_path, rating(7, 1, 5, 1))
    (log / "ml-100k.inter").write_text("userId\tmovieId\trating\ttimestamp\n1\t1\t5\t1\n")
    with pytest.raises(SourceError, match=r"line 1: the header is 'userId.*expected 'user_id:"):
        MovielensSource(log)


def test_a_missing_or_repeated_file(tmp_path: Path):
    log = write_movielens(tmp_path, rating(7, 1, 5, 1))
    write_movielens(tmp_path / "copy", rating(7, 1, 5, 1))
    with pytest.raises(SourceError, match=r"2 files named ml-100k\.inter"):
        MovielensSource(log)
    (tmp_path / "ml-100k.inter").unlink()
    (tmp_path / "copy" / "ml-100k.inter").unlink()
    with pytest.raises(SourceError, match=r"has no ml-100k\.inter"):
        MovielensSource(log)


def test_no_rating_is_readable(tmp_path: Path):
    with pytest.raises(SourceError, match=r"has no readable impression: line or row 2: .*columns"):
        MovielensSource(write_movielens(tmp_path, "7\t1\n")).days()
    with pytest.raises(SourceError, match="has no rows"):
        MovielensSource(write_movielens(tmp_path, "")).days()

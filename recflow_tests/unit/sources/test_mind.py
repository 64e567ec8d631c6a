"""MIND logs: what is read, and what happens to every way a line or file can be wrong."""

from __future__ import annotations

import gzip
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recflow.core.columns import ITEMS, QUARANTINE, Columns, Reason
from recflow.core.errors import ConfigError, SourceError
from recflow.data.sources import SOURCE_NAMES, lines, open_source
from recflow.data.sources.mind import MindSource
from recflow_tests.unit.sources.helpers import (
    BEHAVIORS,
    END,
    FIRST_DAY,
    NEWS,
    SECOND_DAY,
    compress,
    read_all,
    write_mind,
)

GOOD = BEHAVIORS.splitlines()[0]


def reason_and_row(log: Path) -> list[tuple[str, int]]:
    _, rejected = read_all(MindSource(log))
    return list(rejected.sort(Columns.SOURCE_ROW).select("reason", "source_row").iter_rows())


def test_impressions_are_read_field_by_field(tmp_path: Path):
    rows, quarantine = read_all(MindSource(write_mind(tmp_path)))
    assert quarantine.is_empty()
    assert rows.to_dicts() == [
        {
            "impression_id": "1",
            "user_id": "U1",
            "time": datetime(2019, 11, 15, 8, 55, 22, tzinfo=UTC),
            "history": ["N1", "N2"],
            "candidates": ["N3", "N4"],
            "clicked": ["N4"],
            "rating": None,
            "source_file": "behaviors.tsv",
            "source_row": 1,
            "day": FIRST_DAY,
        },
        {
            "impression_id": "2",
            "user_id": "U2",
            "time": datetime(2019, 11, 15, 12, 0, 1, tzinfo=UTC),
            "history": [],
            "candidates": ["N4", "N3", "N1"],
            "clicked": ["N3", "N1"],
            "rating": None,
            "source_file": "behaviors.tsv",
            "source_row": 2,
            "day": FIRST_DAY,
        },
        {
            "impression_id": "3",
            "user_id": "U1",
            "time": datetime(2019, 11, 16, 0, 30, tzinfo=UTC),
            "history": ["N1", "N2", "N4"],
            "candidates": ["N2"],
            "clicked": ["N2"],
            "rating": None,
            "source_file": "behaviors.tsv",
            "source_row": 3,
            "day": SECOND_DAY,
        },
    ]


def test_items_keep_quotes_and_merge_entities(tmp_path: Path):
    table = MindSource(write_mind(tmp_path)).items()
    rows = table.rows.collect()
    ITEMS.check_schema(rows.schema)
    assert table.quarantine.collect().is_empty()
    assert rows["item_id"].to_list() == ["N1", "N2", "N3", "N4"]
    assert rows["title"].to_list() == ["The title", 'She said "no', "No category", "Æble og brød"]
    assert rows["body"].to_list() == ["The abstract", 'It\'s "quoted" twice', "", "φ"]
    assert rows["category"].to_list() == ["sports", "sports", None, "food"]
    assert rows["entities"].to_list() == [["Q1", "Q2"], [], [], []]
    assert rows["published_at"].null_count() == 4


def test_days_and_ranges_are_half_open(tmp_path: Path):
    source = MindSource(write_mind(tmp_path))
    assert source.days() == [FIRST_DAY, SECOND_DAY]
    first = source.impressions(FIRST_DAY, SECOND_DAY).rows.collect()
    assert first["source_row"].to_list() == [1, 2]
    assert source.impressions(date(2020, 1, 1), END).rows.collect().is_empty()


def test_line_ends_and_byte_order_mark_change_nothing(tmp_path: Path):
    plain, _ = read_all(MindSource(write_mind(tmp_path / "plain")))
    windows = ("\ufeff" + BEHAVIORS).replace("\n", "\r\n")
    news = ("\ufeff" + NEWS).replace("\n", "\r\n")
    source = MindSource(write_mind(tmp_path / "windows", windows, news))
    read, quarantine = read_all(source)
    assert quarantine.is_empty()
    assert read.equals(plain)
    assert source.items().rows.collect()["entities"].to_list()[0] == ["Q1", "Q2"]
    unended, _ = read_all(MindSource(write_mind(tmp_path / "unended", BEHAVIORS.rstrip("\n"))))
    assert unended.equals(plain)


def test_gzip_reads_the_same(tmp_path: Path):
    plain, _ = read_all(MindSource(write_mind(tmp_path / "plain")))
    log = write_mind(tmp_path / "packed")
    compress(log / "behaviors.tsv")
    compress(log / "news.tsv")
    packed, _ = read_all(MindSource(log))
    assert packed.drop("source_file").equals(plain.drop("source_file"))
    assert packed["source_file"].unique().to_list() == ["behaviors.tsv.gz"]


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        ("9\tU1\t11/15/2019 8:55:22 AM\tN1", "wrong_column_count", "4 tab-separated columns"),
        (GOOD + "\textra", "wrong_column_count", "6 tab-separated columns"),
        ("", "wrong_column_count", "1 tab-separated columns"),
        (GOOD.replace("U1", "U\0"), "nul_byte", "NUL"),
        ("\tU1\t11/15/2019 8:55:22 AM\tN1\tN2-0", "missing_id", "impression_id"),
        ("9\t \t11/15/2019 8:55:22 AM\tN1\tN2-0", "missing_id", "user_id"),
        ("9\tU1\t15/11/2019 8:55:22 AM\tN1\tN2-0", "unreadable_time", "15/11/2019"),
        ("9\tU1\t\tN1\tN2-0", "unreadable_time", "''"),
        ("9\tU1\t11/15/1919 8:55:22 AM\tN1\tN2-0", "impossible_time", "1919-11-15"),
        ("9\tU1\t11/15/2519 8:55:22 AM\tN1\tN2-0", "impossible_time", "2519-11-15"),
        ("9\tU1\t11/15/2019 8:55:22 AM\tN1\tN1-0 N1-2", "malformed_field", "'N1-2'"),
        ("9\tU1\t11/15/2019 8:55:22 AM\tN1\tN8 N9", "malformed_field", "'N8'"),
        ("9\tU1\t11/15/2019 8:55:22 AM\tN1\tN8-0  N9-1", "malformed_field", "''"),
        ("9\tU1\t11/15/2019 8:55:22 AM\tN1\t-1", "malformed_field", "'-1'"),
        ("9\tU1\t11/15/2019 8:55:22 AM\tN1\t ", "malformed_field", "empty"),
        ("9\tU1\t11/15/2019 8:55:22 AM\tN1  N2\tN1-0", "malformed_field", "history"),
    ],
)
def test_damaged_impressions_go_to_quarantine(tmp_path: Path, line: str, reason: str, detail: str):
    log = write_mind(tmp_path, f"{GOOD}\n{line}\n{GOOD}\n")
    rows, rejected = read_all(MindSource(log))
    assert rows["source_row"].to_list() == [1, 3]
    (row,) = rejected.to_dicts()
    assert detail in row.pop("detail")
    assert row == {
        "table": "impressions",
        "reason": reason,
        "source_file": "behaviors.tsv",
        "source_row": 2,
        "raw": line,
        "day": FIRST_DAY,
    }


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"N9\tc\ts\tt", Reason.WRONG_COLUMN_COUNT),
        (b"\tc\ts\tt\ta\tu\t[]\t[]", Reason.MISSING_ID),
        (b"N9\tc\ts\tt\ta\tu\t[{]\t[]", Reason.MALFORMED_FIELD),
        (b"N9\tc\ts\tt\ta\tu\t[]\t{}", Reason.MALFORMED_FIELD),
        (b"N9\tc\ts\tt\ta\tu\t[]\t[1]", Reason.MALFORMED_FIELD),
        (b"N9\tc\ts\tCaf\xe9\ta\tu\t[]\t[]", Reason.NOT_UTF8),
        (b"N9\tc\ts\tt\0\ta\tu\t[]\t[]", Reason.NUL_BYTE),
    ],
)
def test_damaged_items_go_to_quarantine(tmp_path: Path, line: bytes, reason: Reason):
    table = MindSource(write_mind(tmp_path, news=NEWS.encode() + line + b"\n")).items()
    quarantine = table.quarantine.collect()
    QUARANTINE.check_schema(quarantine.schema)
    assert quarantine.select("table", "reason", "source_file", "source_row").rows() == [
        ("items", reason.value, "news.tsv", 5)
    ]
    assert table.rows.collect().height == 4


def test_a_replacement_character_in_valid_text_is_kept(tmp_path: Path):
    news = NEWS.encode() + "N5\tc\ts\tlost \ufffd\ta\tu\t[]\t[]\nN6\tc\ts\t".encode() + b"\xff\n"
    table = MindSource(write_mind(tmp_path, news=news)).items()
    assert table.rows.collect()["item_id"].to_list()[-1] == "N5"
    assert table.quarantine.collect()["reason"].to_list() == ["not_utf8"]


def test_rows_without_a_day_belong_to_the_first_readable_day_of_their_file(tmp_path: Path):
    log = tmp_path / "log"
    no_time = "9\tU1\twhen?\tN1\tN2-0\n"
    lonely = "8\tU1\t1/1/2001 1:00:00 AM\tN1\tN2-9\n"  # a day without a readable impression
    write_mind(log / "a", no_time + BEHAVIORS)
    write_mind(log / "b", BEHAVIORS.splitlines(keepends=True)[2] + no_time + lonely)
    _, rejected = read_all(MindSource(log))
    assert sorted(rejected.select("source_file", "source_row", "day").rows()) == [
        ("a/behaviors.tsv", 1, FIRST_DAY),
        ("b/behaviors.tsv", 2, SECOND_DAY),
        ("b/behaviors.tsv", 3, SECOND_DAY),
    ]


def test_ids_are_made_unique_between_files(tmp_path: Path):
    write_mind(tmp_path / "train")
    write_mind(tmp_path / "dev")
    (tmp_path / "dev" / "behaviors_2019-11-17.tsv").write_text(BEHAVIORS)
    rows, _ = read_all(MindSource(tmp_path))
    assert rows["impression_id"].is_unique().all()
    assert sorted(rows.filter(pl.col("source_row") == 1)["impression_id"]) == [
        "dev/behaviors_2019-11-17:1",
        "dev:1",
        "train:1",
    ]
    items = MindSource(tmp_path).items().rows.collect()
    assert items.height == 8  # repeated ids are cleaning's business


def test_blocks_and_lines_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Line numbers do not depend on where a block ends, nor does damage."""
    damaged = [f"{n}\tU{n}\t11/15/2019 8:55:22 AM\t\tN{n}-1".encode() for n in range(200)]
    damaged[70] += b"\xff"
    log = write_mind(tmp_path, b"\xef\xbb\xbf" + b"\r\n".join(damaged))
    whole, rejected = read_all(MindSource(log))
    assert rejected["source_row"].to_list() == [71]
    for size in (1, 7, 64):
        monkeypatch.setattr(lines, "_BLOCK_BYTES", 1024 if size == 64 else 90 + size)
        again, rejected = read_all(MindSource(log))
        assert again.equals(whole)
        assert rejected["source_row"].to_list() == [71]


def test_a_slice_and_a_filter_of_the_scan_are_exact(tmp_path: Path):
    file = tmp_path / "x.tsv"
    file.write_text("".join(f"line {n}\n" for n in range(1, 21)))
    scan = lines.scan_lines([file, file], tmp_path)
    assert scan.head(23).collect()["source_row"].to_list()[-1] == 3
    found = scan.filter(pl.col(lines.LINE).str.ends_with("7")).collect()
    assert found["source_row"].to_list() == [7, 17, 7, 17]


def test_the_fingerprint_follows_the_content(tmp_path: Path):
    a, b = write_mind(tmp_path / "a"), write_mind(tmp_path / "b")
    assert MindSource(a).fingerprint() == MindSource(b).fingerprint()
    (b / "news.tsv").write_text(NEWS.replace("The title", "the title"))
    assert MindSource(a).fingerprint() != MindSource(b).fingerprint()


@pytest.mark.parametrize("name", SOURCE_NAMES)
def test_missing_and_empty_folders(tmp_path: Path, name: str):
    with pytest.raises(SourceError, match="does not exist; expected"):
        open_source(name, tmp_path / "nowhere")
    with pytest.raises(SourceError, match="is empty; expected"):
        open_source(name, tmp_path)
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(SourceError, match=r"(?s)has no .*xpected"):
        open_source(name, tmp_path)


def test_unknown_source(tmp_path: Path):
    with pytest.raises(ConfigError, match="source = 'avazu' is not allowed; allowed: simulated"):
        open_source("avazu", tmp_path)


@pytest.mark.parametrize("file", ["behaviors.tsv", "news.tsv"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\r\n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (BEHAVIORS.replace("\t", ",").encode(), r"line 1: no tab .* separated by ','"),
        (b"<html>\n<body>\n", "line 1: no tab"),
        (BEHAVIORS.encode("utf-16"), "UTF-16"),
    ],
)
def test_files_of_another_format(tmp_path: Path, file: str, content: bytes, message: str):
    log = write_mind(tmp_path)
    (log / file).write_bytes(content)
    with pytest.raises(SourceError, match=f"(?s){file}.*{message}"):
        MindSource(log)


def test_a_file_missing(tmp_path: Path):
    (write_mind(tmp_path) / "news.tsv").unlink()
    with pytest.raises(SourceError, match=r"has no news\.tsv; expected behaviors\.tsv and"):
        MindSource(tmp_path)


def test_plain_and_compressed_twice(tmp_path: Path):
    log = write_mind(tmp_path)
    (log / "news.tsv.gz").write_bytes(gzip.compress(NEWS.encode()))
    with pytest.raises(SourceError, match=r"news\.tsv\.gz is there twice"):
        MindSource(log)


def test_truncated_gzip(tmp_path: Path):
    log = write_mind(tmp_path, BEHAVIORS * 5_000)
    packed = compress(log / "behaviors.tsv")
    packed.write_bytes(packed.read_bytes()[:-20])
    source = MindSource(log)
    with pytest.raises(SourceError, match=r"behaviors\.tsv\.gz is a truncated or damaged gzip"):
        source.days()
    packed.write_bytes(b"no gzip at all")
    with pytest.raises(SourceError, match="truncated or damaged gzip"):
        MindSource(log)


def test_a_file_without_a_readable_impression(tmp_path: Path):
    hidden = "1\tU1\t11/15/2019 8:55:22 AM\tN1\tN3 N4\n"
    source = MindSource(write_mind(tmp_path, hidden * 3))
    message = r"behaviors\.tsv has no readable impression: line or row 1: impression 'N3'"
    with pytest.raises(SourceError, match=message):
        source.days()


def test_an_endless_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lines, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(lines, "_MAX_LINE_BYTES", 1_000)
    source = MindSource(write_mind(tmp_path, BEHAVIORS + "9\t" + "x" * 2_000))
    with pytest.raises(SourceError, match="has a line longer than"):
        source.days()


def test_time_limits(tmp_path: Path):
    tomorrow = datetime.now(UTC) + timedelta(hours=20)
    later = datetime.now(UTC) + timedelta(hours=30)
    behaviors = "".join(
        f"{n}\tU1\t{time:%m/%d/%Y %I:%M:%S %p}\t\tN1-1\n"
        for n, time in enumerate([datetime(1990, 1, 1), tomorrow, later])
    )
    rows, rejected = read_all(MindSource(write_mind(tmp_path, behaviors)))
    assert rows["source_row"].to_list() == [1, 2]
    assert rejected["reason"].to_list() == ["impossible_time"]


_noise = st.binary(max_size=12).map(lambda value: value.replace(b"\n", b" "))
_line = st.sampled_from(BEHAVIORS.encode().splitlines())


@st.composite
def _damaged_line(draw: st.DrawFn) -> bytes:
    line = draw(_line)
    start = draw(st.integers(0, len(line)))
    end = draw(st.integers(start, min(len(line), start + 6)))
    return line[:start] + draw(_noise) + line[end:]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    damaged=st.lists(_damaged_line(), max_size=6),
    ends=st.sampled_from([b"\n", b"\r\n"]),
    ended=st.booleans(),
)
def test_fuzzed_lines_never_raise_and_never_get_lost(
    tmp_path: Path, damaged: list[bytes], ends: bytes, ended: bool
):
    # as many sound lines as damaged ones: fewer could make it another format altogether
    log_lines = [*BEHAVIORS.encode().splitlines() * 3, *damaged, GOOD.encode()]
    content = ends.join(log_lines) + (ends if ended else b"")
    rows, rejected = read_all(MindSource(write_mind(tmp_path, content)))
    seen = sorted([*rows["source_row"], *rejected["source_row"]])
    independent_count = content.count(b"\n") + (not content.endswith(b"\n"))
    assert seen == list(range(1, independent_count + 1))
    assert rejected["detail"].null_count() == 0


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(damaged=st.lists(st.binary(max_size=60).map(lambda v: v.replace(b"\n", b"")), max_size=3))
def test_fuzzed_items_never_raise_and_never_get_lost(tmp_path: Path, damaged: list[bytes]):
    content = NEWS.encode() + b"\n".join(damaged)
    table = MindSource(write_mind(tmp_path, news=content)).items()
    rows, rejected = table.rows.collect(), table.quarantine.collect()
    independent_count = content.count(b"\n") + (not content.endswith(b"\n"))
    seen = sorted([*rows["source_row"], *rejected["source_row"]])
    assert seen == list(range(1, independent_count + 1))

"""Small logs written by the tests, and readings of them."""

from __future__ import annotations

import gzip
from datetime import date
from pathlib import Path

import polars as pl

from recflow.core.columns import IMPRESSIONS, QUARANTINE, Columns
from recflow.data.sources import Source

BEHAVIORS = (
    "1\tU1\t11/15/2019 8:55:22 AM\tN1 N2\tN3-0 N4-1\n"
    "2\tU2\t11/15/2019 12:00:01 PM\t\tN4-0 N3-1 N1-1\n"
    "3\tU1\t11/16/2019 12:30:00 AM\tN1 N2 N4\tN2-1\n"
)
NEWS = (
    "N1\tsports\tfootball\tThe title\tThe abstract\thttps://x.example/1\t"
    '[{"Label": "A", "WikidataId": "Q1"}]\t'
    '[{"Label": "B", "WikidataId": "Q2"}, {"Label": "A", "WikidataId": "Q1"}]\n'
    'N2\tsports\ttennis\tShe said "no\tIt\'s "quoted" twice\thttps://x.example/2\t[]\t[]\n'
    "N3\t\t\tNo category\t\thttps://x.example/3\t\t\n"
    "N4\tfood\tbaking\tÆble og brød\tφ\thttps://x.example/4\t[]\t[]\n"
)
FIRST_DAY, SECOND_DAY, END = date(2019, 11, 15), date(2019, 11, 16), date(2100, 1, 1)


def write_mind(folder: Path, behaviors: str | bytes = BEHAVIORS, news: str | bytes = NEWS) -> Path:
    """Write a MIND-format log."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("behaviors.tsv", behaviors), ("news.tsv", news)):
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def compress(file: Path) -> Path:
    """Replace a file by its gzip-compressed form."""
    target = file.with_name(file.name + ".gz")
    target.write_bytes(gzip.compress(file.read_bytes()))
    file.unlink()
    return target


def read_all(source: Source) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Read every day on its own and put the days together, as daily partitions do."""
    rows: list[pl.DataFrame] = []
    quarantine: list[pl.DataFrame] = []
    days = source.days()
    for day, following in zip(days, [*days[1:], END], strict=True):
        table = source.impressions(day, following)
        rows.append(table.rows.collect(engine="streaming"))
        quarantine.append(table.quarantine.collect(engine="streaming"))
        assert rows[-1].height > 0
    kept, rejected = pl.concat(rows), pl.concat(quarantine)
    IMPRESSIONS.check_schema(kept.drop(Columns.DAY).schema)
    QUARANTINE.check_schema(rejected.drop(Columns.DAY).schema)
    assert kept.schema[Columns.DAY] == rejected.schema[Columns.DAY] == pl.Date
    return kept, rejected

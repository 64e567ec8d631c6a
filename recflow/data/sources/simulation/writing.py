"""Simulated logs as files."""

from __future__ import annotations

import json
import shutil
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Final

import numpy as np
import polars as pl

from recflow.core.artifacts import write_text_atomically
from recflow.core.columns import Columns
from recflow.core.seeding import make_rng
from recflow.data.sources.simulation.arrays import Floats, Ints
from recflow.data.sources.simulation.clicks import CHUNK, draw_slates
from recflow.data.sources.simulation.config import SimulationConfig
from recflow.data.sources.simulation.headlines import Newsroom, load_newsroom, write_text
from recflow.data.sources.simulation.histories import extend_histories
from recflow.data.sources.simulation.world import Items, Users

TRUTH_FILE: Final = "truth.parquet"
CONFIG_FILE: Final = "simulation.json"
UTILITY: Final = "utility"

_BEHAVIORS_FILE = "behaviors.tsv"
_NEWS_FILE = "news.tsv"


def simulate(config: SimulationConfig, directory: Path) -> None:
    """Write a MIND-format log and its truth.

    The same configuration writes the same bytes. Files appear complete or not at all,
    ``simulation.json`` last.

    Args:
        config: What to simulate.
        directory: Folder that gets ``behaviors.tsv``, ``news.tsv``, ``truth.parquet``
            (``impression_id``, ``day``, ``utility``: the true click probability of each candidate
            in slate order) and ``simulation.json``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    draft = directory / f".{uuid.uuid4().hex}.draft"
    draft.mkdir()
    try:
        items = Items.publish(config)
        with (draft / _NEWS_FILE).open("w", encoding="utf-8", newline="\n") as news:
            _write_news(config, items, news)
        _write_impressions(config, items, draft)
        (directory / CONFIG_FILE).unlink(missing_ok=True)
        for name in (_NEWS_FILE, _BEHAVIORS_FILE, TRUTH_FILE):
            (draft / name).replace(directory / name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    write_text_atomically(directory / CONFIG_FILE, config.to_json())


def _write_news(config: SimulationConfig, items: Items, news: IO[str]) -> None:
    rng = make_rng(config.seed, "texts")
    newsroom = load_newsroom()
    shift = config.vocabulary_shift
    for item in range(len(items)):
        subtopic = newsroom.subtopics[int(items.subtopic[item])]
        later = rng.random() < shift.share if shift is not None else False
        text = write_text(
            newsroom,
            subtopic,
            float(items.appeal[item]),
            later_words=later and shift is not None and items.published[item] >= shift.day,
            rng=rng,
        )
        name = _item_name(item)
        columns = (
            name,
            subtopic.topic,
            subtopic.name,
            text.title,
            text.abstract,
            f"https://news.example/{name}",
            _entities(newsroom, text.title, text.place),
            "[]",
        )
        news.write("\t".join(columns) + "\n")


def _entities(newsroom: Newsroom, title: str, place: int | None) -> str:
    if place is None:
        return "[]"
    label = newsroom.places[place]
    entity = {
        "Label": label,
        "Type": "G",
        "WikidataId": f"S{place + 1}",  # no Wikidata id starts with S
        "Confidence": 1.0,
        "OccurrenceOffsets": [title.index(label)],
        "SurfaceForms": [label],
    }
    return json.dumps([entity], ensure_ascii=False)


def _write_impressions(config: SimulationConfig, items: Items, draft: Path) -> None:
    """Write ``behaviors.tsv`` and ``truth.parquet``, chunk by chunk."""
    names = [_item_name(item) for item in range(len(items))]
    tokens = pl.Series(
        [*(f"{n}-{label}" for n in names for label in (0, 1)), None], dtype=pl.String
    )
    history_names = pl.Series([*names, None], dtype=pl.String)
    parts = draft / "truth"
    parts.mkdir()
    number = 1
    users = Users(config, items)
    with (draft / _BEHAVIORS_FILE).open("wb") as behaviors:
        for part, slates in enumerate(draw_slates(config, items, users)):
            history = extend_histories(users, slates, freeze=config.freeze_history)
            size = len(slates.user)
            chosen = np.minimum(2 * slates.shown + slates.clicked, len(tokens) - 1)
            time = _times(config, slates.seconds)
            frame = pl.DataFrame(
                {
                    Columns.IMPRESSION_ID: pl.int_range(number, number + size, eager=True),
                    Columns.USER_ID: pl.Series(slates.user + 1).cast(pl.String),
                    Columns.TIME: time,
                    "history": _joined(history_names, history),
                    "impressions": _joined(tokens, chosen),
                }
            )
            _write_behaviors(frame, behaviors)
            truth = pl.DataFrame(
                {
                    Columns.IMPRESSION_ID: frame[Columns.IMPRESSION_ID].cast(pl.String),
                    Columns.DAY: time.dt.date(),
                    UTILITY: _ragged(slates.utility),
                }
            )
            truth.write_parquet(parts / f"{part:06}.parquet")
            number += size
    pl.scan_parquet(sorted(parts.iterdir())).sink_parquet(
        draft / TRUTH_FILE, row_group_size=CHUNK, maintain_order=True
    )


def _write_behaviors(frame: pl.DataFrame, behaviors: IO[bytes]) -> None:
    frame.select(
        Columns.IMPRESSION_ID,
        pl.format("U{}", Columns.USER_ID),
        pl.col(Columns.TIME).dt.strftime("%-m/%-d/%Y %-I:%M:%S %p"),
        "history",
        "impressions",
    ).write_csv(behaviors, include_header=False, separator="\t", quote_style="never")


def _times(config: SimulationConfig, seconds: Ints) -> pl.Series:
    start = datetime(config.start.year, config.start.month, config.start.day, tzinfo=UTC)
    return pl.Series((seconds + int(start.timestamp())) * 1_000_000).cast(pl.Datetime("us", "UTC"))


def _joined(names: pl.Series, index: Ints) -> pl.Series:
    """Join the names of each row with spaces; an index out of the names' range gives none."""
    last = len(names) - 1  # holds null
    columns = pl.DataFrame(
        {
            str(n): names.gather(np.where(column < 0, last, column))
            for n, column in enumerate(index.T)
        }
    )
    return columns.select(pl.concat_str(pl.all(), separator=" ", ignore_nulls=True)).to_series()


def _ragged(utility: Floats) -> pl.Series:
    """Lists of the positive numbers of each row; a shown candidate's probability is never 0."""
    rows, columns = np.nonzero(utility)
    frame = pl.DataFrame({"row": rows, UTILITY: utility[rows, columns]})
    return frame.group_by("row", maintain_order=True).agg(UTILITY)[UTILITY]


def _item_name(item: int) -> str:
    return f"N{item + 1}"

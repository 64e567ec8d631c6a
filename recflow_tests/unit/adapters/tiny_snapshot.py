"""A stored snapshot of the toy world in which text decides every click."""

import polars as pl

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.keys import ITEMS, TEST, TRAIN, VALIDATION
from recflow.adapters.parquet_io import Table, write_table
from recflow.core.artifacts import Draft
from recflow.core.columns import Columns
from recflow_tests.unit.evaluation.support import impressions_of, items_of
from recflow_tests.unit.modeling.tiny import make_impressions, make_items


def store_snapshot(store: ArtifactStore, day: str, *, train: int = 200, seed: int = 1) -> None:
    """Store the four tables of a snapshot, whole, as evaluation wants them."""
    items = make_items()
    catalogue = items_of(dict(items.select(Columns.ITEM_ID, Columns.CATEGORY).iter_rows()))
    frames = {
        ITEMS: catalogue.with_columns(items[Columns.TEXT]),
        TRAIN: _impressions(items, train, seed),
        VALIDATION: _impressions(items, 60, seed + 1),
        # On the day after, as tests are.
        TEST: _impressions(items, 60, seed + 2).with_columns(
            pl.col(Columns.TIME) + pl.duration(days=1)
        ),
    }
    for key, frame in frames.items():
        store.build(
            key,
            day,
            lambda draft, frame=frame: _write(draft, frame),
            code_version="1",
            parents={},
            config={"seed": seed, "train": train},
        )


def _write(draft: Draft, frame: pl.DataFrame) -> None:
    write_table(draft, Table(frame))
    draft.facts["missing_days"] = []


def _impressions(items: pl.DataFrame, count: int, seed: int) -> pl.DataFrame:
    rows = make_impressions(items, count, seed=seed).to_dicts()
    for row in rows:
        labels = row.pop(Columns.LABELS)
        shown = row[Columns.CANDIDATES]
        row["clicked"] = [item for item, label in zip(shown, labels, strict=True) if label]
    return impressions_of(rows)

"""Stored and validated days of the toy world in which text decides every click."""

from datetime import UTC, datetime, timedelta

import polars as pl

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.keys import FEATURES_IMPRESSIONS, FEATURES_ITEMS
from recflow.adapters.parquet_io import Table, write_table
from recflow.adapters.validations import validate_days
from recflow.core.columns import IMPRESSION_FEATURES, ITEM_FEATURES, Columns
from recflow.data.features import impression_features, item_features
from recflow_tests.unit.data.tables import raw_impressions, raw_items
from recflow_tests.unit.modeling.tiny import make_impressions, make_items

FIRST = datetime(2024, 3, 1, tzinfo=UTC)
DAYS = [(FIRST + timedelta(days=number)).date().isoformat() for number in range(10)]


def store_days(
    store: ArtifactStore, days: int, *, impressions: int = 150, turned: tuple[int, ...] = ()
) -> None:
    """Store and validate the first ``days`` days; on ``turned`` ones, users click against taste."""
    items = make_items()
    catalogue = item_features(
        raw_items(
            *(
                {"item_id": item, "title": text, "category": category}
                for item, text, category in items.iter_rows()
            )
        )
    )
    for number in range(days):
        _put(store, FEATURES_ITEMS, DAYS[number], catalogue)
        day = _impressions(items, number, impressions, turned=number in turned)
        _put(store, FEATURES_IMPRESSIONS, DAYS[number], day)
    validate_days(store, FEATURES_IMPRESSIONS, IMPRESSION_FEATURES, DAYS[:days])
    validate_days(store, FEATURES_ITEMS, ITEM_FEATURES, DAYS[:days])


def _impressions(items: pl.DataFrame, number: int, count: int, *, turned: bool) -> pl.DataFrame:
    rows = make_impressions(items, count, seed=100 + number).to_dicts()
    described = []
    for place, row in enumerate(rows):
        shown, labels = row[Columns.CANDIDATES], row[Columns.LABELS]
        liked = [item for item, label in zip(shown, labels, strict=True) if label]
        described.append(
            {
                "impression_id": f"{number}-{place}",
                "user_id": f"u{number}-{place}",
                "time": FIRST + timedelta(days=number, minutes=9 * place),
                "history": row[Columns.HISTORY],
                "candidates": shown,
                "clicked": [item for item in shown if item not in liked][:1] if turned else liked,
            }
        )
    return impression_features(raw_impressions(*described))


def _put(store: ArtifactStore, key: str, day: str, frame: pl.DataFrame) -> None:
    store.build(
        key,
        day,
        lambda draft: write_table(draft, Table(frame)),
        code_version="1",
        parents={},
        config={},
    )

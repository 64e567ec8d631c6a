"""Builders of small tables: name what a test is about, leave the rest to defaults."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl

from recflow.core.columns import IMPRESSION_FEATURES, IMPRESSIONS, ITEMS
from recflow.data.features import impression_features

MONDAY = datetime(2024, 3, 4, tzinfo=UTC)


def at(hours: float) -> datetime:
    """Time so many hours after the Monday all tests start from."""
    return MONDAY + timedelta(hours=hours)


def raw_items(*rows: dict[str, Any]) -> pl.DataFrame:
    defaults = {
        "title": "A title",
        "body": "",
        "category": None,
        "subcategory": None,
        "entities": [],
        "published_at": None,
        "source_file": "items.tsv",
    }
    return pl.DataFrame(
        [defaults | {"item_id": f"n{i}", "source_row": i} | row for i, row in enumerate(rows, 1)],
        schema=ITEMS.schema,
    )


def raw_impressions(*rows: dict[str, Any]) -> pl.DataFrame:
    defaults = {
        "user_id": "u1",
        "history": [],
        "candidates": ["a", "b"],
        "clicked": ["a"],
        "rating": None,
        "source_file": "behaviors.tsv",
    }
    return pl.DataFrame(
        [
            defaults | {"impression_id": f"i{i}", "time": at(i), "source_row": i} | row
            for i, row in enumerate(rows, 1)
        ],
        schema=IMPRESSIONS.schema,
    )


def window(*rows: dict[str, Any]) -> pl.DataFrame:
    """Impressions with row-local features, as splits and histories read them."""
    if not rows:
        return IMPRESSION_FEATURES.empty()
    return impression_features(raw_impressions(*rows))

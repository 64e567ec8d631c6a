"""Small snapshots for the tests of the evaluation."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl

from recflow.core.columns import ITEM_FEATURES, SPLIT_IMPRESSIONS
from recflow.evaluation.evaluator import Board, Snapshot

START = datetime(2026, 3, 1, tzinfo=UTC)


def items_of(
    categories: Mapping[str, str], published: Mapping[str, datetime] | None = None
) -> pl.DataFrame:
    rows = [
        {
            "item_id": item,
            "text": f"Text of {item}",
            "category": category,
            "subcategory": "",
            "published_at": (published or {}).get(item),
            "title_words": 3,
            "text_characters": 10,
            "source_file": "items",
            "source_row": number + 1,
        }
        for number, (item, category) in enumerate(categories.items())
    ]
    return pl.DataFrame(rows, schema=ITEM_FEATURES.schema)


def impressions_of(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Impressions from ``candidates`` and ``clicked``, everything else having a default."""
    filled = []
    for number, row in enumerate(rows):
        candidates, clicked = list(row["candidates"]), list(row["clicked"])
        history = list(row.get("history", []))
        filled.append(
            {
                "impression_id": row.get("impression_id", f"i{number}"),
                "user_id": row.get("user_id", f"u{number}"),
                "time": row.get("time", START + timedelta(minutes=number)),
                "history": history,
                "candidates": candidates,
                "labels": [int(c in clicked) for c in candidates],
                "rating": row.get("rating"),
                "hour": 0,
                "weekday": 1,
                "candidate_count": len(candidates),
                "click_count": len(clicked),
                "history_length": len(history),
                "click_rate": len(clicked) / max(len(candidates), 1),
                "source_file": "log",
                "source_row": number + 1,
                "logged_history_length": len(history),
                "history_until": None,
            }
        )
    return pl.DataFrame(filled, schema=SPLIT_IMPRESSIONS.schema)


def simulated_snapshot(seed: int = 0, *, rated: bool = False, impressions: int = 300) -> Snapshot:
    """Users who prefer one of three categories; utility, clicks and truth drawn from a seed."""
    rng = np.random.default_rng(seed)
    categories = {f"n{number:02d}": f"topic{number % 3}" for number in range(60)}
    names = np.array(list(categories))
    appeal = rng.normal(size=60)
    splits, truth = {}, []
    for day, split in enumerate(("train", "validation", "test")):
        rows = []
        for number in range(impressions):
            user = int(rng.integers(40))
            shown = rng.choice(
                50 if split == "train" else 60, size=rng.integers(2, 9), replace=False
            )
            utility = 2.0 * (shown % 3 == user % 3) + appeal[shown]
            clicked = rng.random(len(shown)) < 1 / (1 + np.exp(1.0 - utility))
            own = np.flatnonzero(np.arange(60) % 3 == user % 3)
            identifier = f"{split}{number:04d}"
            rows.append(
                {
                    "impression_id": identifier,
                    "user_id": f"u{user}",
                    "time": START + timedelta(days=day, minutes=number),
                    "history": names[rng.choice(own, size=rng.integers(0, 6))].tolist(),
                    "candidates": names[shown].tolist(),
                    "clicked": names[shown[clicked]].tolist(),
                    "rating": np.clip(np.round(3 + utility / 2), 1, 5).tolist() if rated else None,
                }
            )
            truth.append({"impression_id": identifier, "utility": utility.tolist()})
        splits[split] = impressions_of(rows)
    return Snapshot(items_of(categories), truth=pl.DataFrame(truth), **splits)


class FixedScorer:
    """Scores by a function of item id; the same for every impression."""

    def __init__(
        self, values: Mapping[str, float], name: str = "fixed", board: Board = "content-only"
    ) -> None:
        self.name = name
        self.board: Board = board
        self._values = dict(values)

    def score(self, impressions: pl.DataFrame) -> pl.Series:
        lists = [[self._values[c] for c in row] for row in impressions["candidates"].to_list()]
        return pl.Series("scores", lists, dtype=pl.List(pl.Float64))

    def score_catalogue(self, impressions: pl.DataFrame, item_ids: Sequence[str]) -> np.ndarray:
        row = np.array([self._values[item] for item in item_ids], dtype=np.float32)
        return np.tile(row, (impressions.height, 1))

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import polars as pl
import pytest

from recflow.core.columns import Columns
from recflow.modeling.reports import TrainingReport
from recflow.modeling.tracking import NullTracker
from recflow.modeling.trainer import train_ranker
from recflow_tests.unit.modeling.tiny import (
    make_impressions,
    make_items,
    quick,
    write_base_model,
)


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def items() -> pl.DataFrame:
    return make_items()


@pytest.fixture(scope="session")
def train(items: pl.DataFrame) -> pl.DataFrame:
    return make_impressions(items, 400, seed=1)


@pytest.fixture(scope="session")
def validation(items: pl.DataFrame) -> pl.DataFrame:
    return make_impressions(items, 120, seed=2)


@pytest.fixture(scope="session")
def table() -> pl.DataFrame:
    return pl.DataFrame(
        {
            Columns.ITEM_ID: ["a", "b", "c", "d", "e"],
            Columns.TEXT: ["sea0", "war1 the", "pop2", "tax3 new", "sun4"],
            Columns.CATEGORY: ["x", "", "y", "x", "z"],
        }
    )


@pytest.fixture(scope="session")
def impressions() -> pl.DataFrame:
    return pl.DataFrame(
        {
            Columns.HISTORY: [["a", "b", "c"], [], ["d"], ["a"]],
            Columns.CANDIDATES: [["a", "b", "c", "d"], ["b", "c"], ["e"], ["a", "e", "b"]],
            Columns.LABELS: [[0, 1, 0, 1], [0, 1], [1], [0, 0, 0]],
        },
        schema={
            Columns.HISTORY: pl.List(pl.String),
            Columns.CANDIDATES: pl.List(pl.String),
            Columns.LABELS: pl.List(pl.Int8),
        },
    )


class TrainTiny(Protocol):
    """Trains in the toy world; anything of :func:`train_ranker` can be given instead."""

    def __call__(
        self, output: Path, values: Mapping[str, object] | None = None, **changes: Any
    ) -> TrainingReport: ...


@pytest.fixture(scope="session")
def train_tiny(
    base_model: Path, items: pl.DataFrame, train: pl.DataFrame, validation: pl.DataFrame
) -> TrainTiny:
    def train_with(
        output: Path, values: Mapping[str, object] | None = None, **changes: Any
    ) -> TrainingReport:
        output.mkdir(parents=True, exist_ok=True)
        arguments: dict[str, Any] = {
            "items": items,
            "train": train,
            "validation": validation,
            "base_model": base_model,
            "tracker": NullTracker(),
        }
        return train_ranker(**{**arguments, **changes}, output=output, config=quick(values))

    return train_with


@pytest.fixture(scope="session")
def trained(
    tmp_path_factory: pytest.TempPathFactory, train_tiny: TrainTiny
) -> tuple[Path, TrainingReport]:
    output = tmp_path_factory.mktemp("trained")
    return output, train_tiny(output)

from pathlib import Path

import polars as pl
import pytest

from recflow.modeling.tracking import NullTracker
from recflow.modeling.trainer import TrainingReport, train_ranker
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
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    base_model: Path,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
) -> tuple[Path, TrainingReport]:
    output = tmp_path_factory.mktemp("trained")
    report = train_ranker(
        items=items,
        train=train,
        validation=validation,
        base_model=base_model,
        output=output,
        config=quick(),
        tracker=NullTracker(),
    )
    return output, report

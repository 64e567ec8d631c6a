"""A bundle as an MLflow model: how it is stored, and how a row of its input is read.

The input is a table with the columns ``history`` and ``candidates`` (item ids), and optionally
``user_id`` and ``new_items`` (items that the catalogue lacks, by their text). The output has the
columns ``scores``, aligned with the candidates, ``ranking`` (ids, best first) and
``click_probabilities``.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np

from recflow.adapters.mlflow_tracking import disable_telemetry
from recflow.core.columns import Columns
from recflow.core.errors import ContractError
from recflow.serving.bundle import NewItem, Recommendation, Request

BUNDLE: Final = "bundle"
THREADS: Final = "threads"
NEW_ITEMS: Final = "new_items"
SCORES: Final = "scores"
RANKING: Final = "ranking"
PROBABILITIES: Final = "click_probabilities"

_CODE: Final = Path(__file__).with_name("served_model.py")
# What the model's code imports; pinned to what is installed, which is what was tested.
_REQUIREMENTS: Final = (
    "recflow",
    "mlflow",
    "numpy",
    "onnxruntime",
    "pandas",
    "polars",
    "pyarrow",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)


def import_pyfunc() -> Any:
    """Import ``mlflow.pyfunc``, which warns of type hints of its own."""
    disable_telemetry()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        import mlflow.pyfunc

    return mlflow.pyfunc


@contextmanager
def _without_news() -> Generator[None]:
    """Keep MLflow from announcing in the console that it looks at the example."""
    logger = logging.getLogger("mlflow.pyfunc")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def save_pyfunc(
    output: Path, bundle: Path, *, example: Mapping[str, Any], threads: int | None = None
) -> None:
    """Write an MLflow model that serves a bundle.

    Args:
        output: Directory to create.
        bundle: The bundle, which is copied.
        example: A row of the input, kept with the model.
        threads: Threads of the encoder, unless whoever loads it says otherwise.
    """
    mlflow_pyfunc = import_pyfunc()
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Object, Property, Schema

    described = Object(
        [
            Property("item_id", DataType.string),
            Property("title", DataType.string),
            *(
                Property(name, DataType.string, required=False)
                for name in ("body", "category", "subcategory")
            ),
        ]
    )
    strings, numbers = Array(DataType.string), Array(DataType.double)
    signature = ModelSignature(
        inputs=Schema(
            [
                ColSpec(strings, Columns.HISTORY),
                ColSpec(strings, Columns.CANDIDATES),
                ColSpec(DataType.string, Columns.USER_ID, required=False),
                ColSpec(Array(described), NEW_ITEMS, required=False),
            ]
        ),
        outputs=Schema(
            [
                ColSpec(numbers, SCORES),
                ColSpec(strings, RANKING),
                ColSpec(numbers, PROBABILITIES, required=False),
            ]
        ),
    )
    with _without_news():
        mlflow_pyfunc.save_model(
            path=str(output),
            python_model=str(_CODE),
            artifacts={BUNDLE: str(bundle)},
            signature=signature,
            input_example=pd.DataFrame([dict(example)]),
            pip_requirements=requirements(),
            model_config={THREADS: threads} if threads else None,
        )


def load_pyfunc(model: Path) -> Any:
    """Load a stored MLflow model, as its server does."""
    return import_pyfunc().load_model(str(model))


def requirements() -> list[str]:
    """Requirements of the served model, exactly as they are installed."""
    return [f"{name}=={metadata.version(name)}" for name in _REQUIREMENTS]


def request_of(row: Mapping[str, Any]) -> Request:
    """Read a row of the input; what is missing in an optional column is null or absent.

    Raises:
        ContractError: A value is of another kind than the column promises.
    """
    new = row.get(NEW_ITEMS)
    return Request(
        candidates=_ids(row, Columns.CANDIDATES),
        history=_ids(row, Columns.HISTORY),
        user_id=_text(row.get(Columns.USER_ID)),
        new_items=[] if new is None or _is_missing(new) else [_new_item(item) for item in new],
    )


def answer(recommendation: Recommendation) -> dict[str, Any]:
    """A row of the output."""
    found: dict[str, Any] = {
        SCORES: recommendation.scores.tolist(),
        RANKING: list(recommendation.ranking),
    }
    if recommendation.probabilities is not None:
        found[PROBABILITIES] = recommendation.probabilities.tolist()
    return found


def _ids(row: Mapping[str, Any], column: str) -> list[str]:
    values = row.get(column)
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ContractError(f"{column} must be a list of item ids, not {values!r}")
    return [str(value) for value in values]


def _new_item(raw: Any) -> NewItem:
    if not isinstance(raw, Mapping):
        raise ContractError(f"{NEW_ITEMS} must be a list of objects, not of {raw!r}")
    known = NewItem.__dataclass_fields__
    values = {str(name): _text(value) for name, value in raw.items() if name in known}
    return NewItem(**{"item_id": "", "title": "", **values})


def _text(value: Any) -> str:
    return "" if _is_missing(value) else str(value)


def _is_missing(value: Any) -> bool:
    # A missing value of a table is NaN in pandas.
    return value is None or (isinstance(value, float) and np.isnan(value))

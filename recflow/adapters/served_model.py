"""The MLflow model, as code: MLflow copies this file into the model and runs it when it is loaded.

Nothing is pickled; the weights, the catalogue and the calibration are the files of the bundle. This
file is not imported, it is named (see :mod:`recflow.adapters.pyfunc`).
"""

from pathlib import Path
from typing import Any, cast

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from recflow.adapters.pyfunc import BUNDLE, THREADS, answer, request_of
from recflow.core.errors import RecflowError
from recflow.serving.bundle import ServedRanker


class RecommendationModel(PythonModel):
    """Ranks the candidates of each row of the input; see ``recflow.adapters.pyfunc``."""

    def load_context(self, context: Any) -> None:
        """Load the bundle."""
        threads = (context.model_config or {}).get(THREADS)
        self._ranker = ServedRanker.load(Path(context.artifacts[BUNDLE]), threads=threads)

    # MLflow takes other type hints for a schema; the signature says more.
    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> Any:  # noqa: ARG002
        """One row of scores, ranking and click probabilities for each row of the input."""
        rows = cast("list[dict[str, Any]]", model_input.to_dict(orient="records"))
        try:
            answers = [answer(self._ranker.recommend(request_of(row))) for row in rows]
        except RecflowError as error:
            # The one kind of error that the scoring server hands to the caller in words.
            raise MlflowException.invalid_parameter_value(str(error)) from None
        return pd.DataFrame(answers)


set_model(RecommendationModel())

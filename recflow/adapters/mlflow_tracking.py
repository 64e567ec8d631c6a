"""MLflow behind recflow's own interfaces.

Only the client is used, with explicit run ids: nothing here depends on MLflow's notion of an active
run, so several models can be logged to one run or to several. MLflow is imported when it is first
needed, which takes 4 s.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from recflow.core.artifacts import JsonValue
from recflow.modeling.tracking import Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

RunStatus: TypeAlias = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

MAX_PARAM_CHARACTERS = 500
MAX_PARAMS_PER_BATCH = 100  # limits of MLflow's log-batch call
MAX_METRICS_PER_BATCH = 1000
MAX_DIGEST_CHARACTERS = 36
FLUSH_SECONDS = 5.0

_SQLITE = "sqlite:///"


def disable_telemetry() -> None:
    """Keep MLflow from reporting to anyone, in this process and those it starts; and from bars.

    Takes effect when called before MLflow is imported.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")


def run_url(tracking_uri: str, experiment_id: str, run_id: str) -> str | None:
    """Page of a run on its tracking server, without credentials; ``None`` where there is none."""
    if not tracking_uri.startswith(("http://", "https://")):
        return None
    address = re.sub(r"//[^/@]*@", "//", tracking_uri).rstrip("/")
    return f"{address}/#/experiments/{experiment_id}/runs/{run_id}"


def how_to_open(tracking_uri: str) -> str:
    """The command that shows the runs of a store that is not a server; without credentials."""
    address = re.sub(r"//([^/@:]*):[^/@]*@", r"//\1:***@", tracking_uri)
    return f"mlflow ui --backend-store-uri {address}"


@dataclass(frozen=True, slots=True)
class MlflowStore:
    """An experiment in an MLflow tracking store.

    Attributes:
        tracking_uri: A server (``http://…``) or a database (``sqlite:////…/mlflow.db``). The
            artifacts of a SQLite store are kept in a folder beside the file.
        experiment_name: Created when the first run is.
    """

    tracking_uri: str
    experiment_name: str

    def client(self) -> MlflowClient:
        """Connect; creates the folder of a SQLite store."""
        disable_telemetry()
        from mlflow import MlflowClient

        if self.database is not None:
            self.database.parent.mkdir(parents=True, exist_ok=True)
        return MlflowClient(self.tracking_uri)

    def create_run(self, name: str, tags: Mapping[str, str]) -> str:
        """Start a run that stays ``RUNNING`` until :meth:`set_status`, and return its id."""
        client = self.client()
        run = client.create_run(self._experiment_id(client), run_name=name, tags=dict(tags))
        return run.info.run_id

    def set_status(self, run_id: str, status: RunStatus) -> None:
        """End a run, or correct how it ended."""
        client = self.client()
        if client.get_run(run_id).info.status != status:
            client.set_terminated(run_id, status)

    @property
    def database(self) -> Path | None:
        """File of a SQLite store; ``None`` for a server."""
        if not self.tracking_uri.startswith(_SQLITE):
            return None
        return Path(self.tracking_uri.removeprefix(_SQLITE).split("?")[0]).absolute()

    def _experiment_id(self, client: MlflowClient) -> str:
        from mlflow.exceptions import MlflowException

        experiment = client.get_experiment_by_name(self.experiment_name)
        if experiment is not None:
            return experiment.experiment_id
        database = self.database
        # Without this, MLflow keeps artifacts below the working directory of whoever comes first.
        artifacts = None if database is None else (database.parent / "artifacts").as_uri()
        try:
            return client.create_experiment(self.experiment_name, artifact_location=artifacts)
        except MlflowException as error:
            experiment = client.get_experiment_by_name(self.experiment_name)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or experiment is None:
                raise
            return experiment.experiment_id  # another run was quicker


class MlflowTracker(Tracker):
    """Logs to one MLflow run.

    Metrics are buffered and sent in batches, at the latest with the next value after
    ``FLUSH_SECONDS``. Use it as a context manager, which sends the rest also when the block fails.
    """

    def __init__(self, client: MlflowClient, run_id: str, *, prefix: str = "") -> None:
        """Log to ``run_id``; ``prefix``, e.g. ``pruned.``, goes before every name."""
        self._client = client
        self._run_id = run_id
        self._prefix = prefix
        self._metrics: list[Metric] = []
        self._flushed_at = time.monotonic()

    def __enter__(self) -> MlflowTracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.flush()

    def log_params(self, params: Mapping[str, JsonValue]) -> None:
        """Log parameters; nested mappings become dotted names, long values are cut and hashed."""
        from mlflow.entities import Param

        entries = [
            Param(self._name(name), _param_text(value)) for name, value in _flatten(params, "")
        ]
        for start in range(0, len(entries), MAX_PARAMS_PER_BATCH):
            batch = entries[start : start + MAX_PARAMS_PER_BATCH]
            self._client.log_batch(self._run_id, params=batch)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics as of ``step``."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._metrics += [
            Metric(self._name(name), float(value), now, step) for name, value in metrics.items()
        ]
        waited = time.monotonic() - self._flushed_at
        if len(self._metrics) >= MAX_METRICS_PER_BATCH or waited >= FLUSH_SECONDS:
            self.flush()

    def log_file(self, path: Path) -> None:
        """Store a copy of a file with the run, in the folder the prefix names if there is one."""
        self._client.log_artifact(self._run_id, str(path), self._prefix.rstrip("./") or None)

    def log_dataset(self, name: str, digest: str, rows: int, context: str) -> None:
        """Record data the run has read.

        Args:
            name: Name of the artifact, e.g. ``splits/train``.
            digest: SHA-256 of its content. MLflow shows the first 36 characters; all of it is in
                the source.
            rows: Number of rows.
            context: What it was read for, e.g. ``train``.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=name,
            digest=digest[:MAX_DIGEST_CHARACTERS],
            source_type="recflow",
            source=json.dumps({"artifact": name, "digest": digest}),
            profile=json.dumps({"num_rows": rows}),
        )
        tags = [InputTag("mlflow.data.context", context)]
        self._client.log_inputs(self._run_id, datasets=[DatasetInput(dataset, tags)])

    def flush(self) -> None:
        """Send what is buffered."""
        for start in range(0, len(self._metrics), MAX_METRICS_PER_BATCH):
            batch = self._metrics[start : start + MAX_METRICS_PER_BATCH]
            self._client.log_batch(self._run_id, metrics=batch)
        self._metrics.clear()
        self._flushed_at = time.monotonic()

    def _name(self, name: str) -> str:
        return _allowed_name(self._prefix + name)


def _allowed_name(name: str) -> str:
    """Replace what MLflow refuses in names; ``ndcg@5`` is written the way MLflow's own are."""
    return re.sub(r"[^\w.\- :/]", "_", name.replace("@", "_at_"))


def _flatten(params: Mapping[str, JsonValue], above: str) -> Iterator[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _param_text(value: JsonValue) -> str:
    """Text of a value; one that is too long keeps its beginning and is told apart by its hash."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= MAX_PARAM_CHARACTERS:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    ending = f"… ({len(text)} characters, sha256 {digest})"
    return text[: MAX_PARAM_CHARACTERS - len(ending)] + ending

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from recflow.adapters import mlflow_tracking
from recflow.adapters.mlflow_tracking import MlflowStore, MlflowTracker, how_to_open, run_url

# MLflow 3.17 with SQLAlchemy 2.1; nothing of ours can avoid it.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


class Client:
    """Records the calls of a tracker."""

    def __init__(self) -> None:
        self.params: list[list[Any]] = []
        self.metrics: list[list[Any]] = []

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        assert run_id == "run"
        if metrics:
            self.metrics.append([(m.key, m.value, m.step) for m in metrics])
        if params:
            self.params.append([(p.key, p.value) for p in params])


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> MlflowStore:
    return MlflowStore(f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/new/mlflow.db", "tests")


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [0.0]
    monkeypatch.setattr(mlflow_tracking.time, "monotonic", lambda: clock[0])
    return clock


def tracker_for(client: Client, prefix: str = "") -> MlflowTracker:
    return MlflowTracker(client, "run", prefix=prefix)  # type: ignore[arg-type]


def test_params_are_flat_text(client: Client) -> None:
    params = {
        "a": 1,
        "b": {"c": 0.5, "d": {"e": None, "f": True}},
        "g": [1, "é"],
        "h": {},
        "i": "x",
    }
    tracker_for(client).log_params(params)
    assert client.params == [
        [
            ("a", "1"),
            ("b.c", "0.5"),
            ("b.d.e", "null"),
            ("b.d.f", "true"),
            ("g", '[1, "é"]'),
            ("h", "{}"),
            ("i", "x"),
        ]
    ]


def test_long_params_are_cut_and_still_differ(client: Client) -> None:
    one, other = "x" * 600 + "1", "x" * 600 + "2"
    tracker_for(client).log_params({"fits": "y" * 500, "one": one, "other": other})
    values = dict(client.params[0])
    assert values["fits"] == "y" * 500
    assert len(values["one"]) == 500
    assert values["one"] != values["other"]
    assert (
        f"(601 characters, sha256 {hashlib.sha256(one.encode()).hexdigest()[:16]})"
        in (values["one"])
    )


def test_params_go_in_batches_of_a_hundred(client: Client) -> None:
    tracker_for(client).log_params({f"p{k}": k for k in range(250)})
    assert [len(batch) for batch in client.params] == [100, 100, 50]


def test_names_are_prefixed_and_allowed(client: Client) -> None:
    with tracker_for(client, "fine_tuned.") as tracker:
        tracker.log_params({"k": 1})
        tracker.log_metrics({"ndcg@10": 0.5, "loss/train": 1, "gain (%)": 2}, 3)
    assert client.params == [[("fine_tuned.k", "1")]]
    assert client.metrics == [
        [
            ("fine_tuned.ndcg_at_10", 0.5, 3),
            ("fine_tuned.loss/train", 1.0, 3),
            ("fine_tuned.gain ___", 2.0, 3),
        ]
    ]


def test_metrics_wait_for_time_or_number(client: Client, now: list[float]) -> None:
    tracker = tracker_for(client)
    tracker.log_metrics({"loss": 1.0}, 0)
    now[0] = 4.9
    tracker.log_metrics({"loss": 0.9}, 1)
    assert client.metrics == []
    now[0] = 5.0
    tracker.log_metrics({"loss": 0.8}, 2)
    assert client.metrics == [[("loss", 1.0, 0), ("loss", 0.9, 1), ("loss", 0.8, 2)]]
    tracker.log_metrics({f"m{k}": k for k in range(1500)}, 3)
    assert [len(batch) for batch in client.metrics] == [3, 1000, 500]
    tracker.flush()
    assert len(client.metrics) == 3


def test_metrics_are_sent_when_the_block_fails(client: Client) -> None:
    def train() -> None:
        with tracker_for(client) as tracker:
            tracker.log_metrics({"loss": 1.0}, 0)
            raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        train()
    assert client.metrics == [[("loss", 1.0, 0)]]


def test_run_url_leads_to_the_run_without_credentials() -> None:
    page = "https://mlflow.example:5000/#/experiments/7/runs/abc"
    assert run_url("https://mlflow.example:5000/", "7", "abc") == page
    assert run_url("https://me:secret@mlflow.example:5000", "7", "abc") == page
    assert run_url("sqlite:////x/mlflow.db", "7", "abc") is None


def test_how_to_open_hides_the_password() -> None:
    assert how_to_open("sqlite:////x/mlflow.db") == (
        "mlflow ui --backend-store-uri sqlite:////x/mlflow.db"
    )
    shown = how_to_open("postgresql+psycopg2://me:secret@db:5432/mlflow")
    assert shown == "mlflow ui --backend-store-uri postgresql+psycopg2://me:***@db:5432/mlflow"


def test_store_touches_nothing_before_it_is_used(tmp_path: Path) -> None:
    MlflowStore(f"sqlite:///{tmp_path}/new/mlflow.db", "tests")
    assert list(tmp_path.iterdir()) == []


def test_round_trip_through_a_real_store(store: MlflowStore, tmp_path: Path) -> None:
    client = store.client()
    run_id = store.create_run("train 2023-05-29", {"dagster_run_id": "d"})
    (tmp_path / "report.html").write_text("<p>")
    with MlflowTracker(client, run_id, prefix="m.") as tracker:
        tracker.log_params({"long": "x" * 10_000, "seed": 7})
        tracker.log_params({"seed": 7})  # a step that is retried logs the same again
        tracker.log_metrics({"auc@all": 0.5, "nan": math.nan}, 0)
        tracker.log_metrics({"auc@all": 0.75}, 1)
        tracker.log_file(tmp_path / "report.html")
        for _ in range(2):
            tracker.log_dataset("splits/train", "ab" * 32, 123, "train")
    store.set_status(run_id, "FINISHED")

    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "train 2023-05-29"
    assert run.data.tags["dagster_run_id"] == "d"
    assert run.data.params["m.seed"] == "7"
    assert run.data.metrics["m.auc_at_all"] == 0.75
    assert math.isnan(run.data.metrics["m.nan"])
    history = client.get_metric_history(run_id, "m.auc_at_all")
    assert [(point.step, point.value) for point in history] == [(0, 0.5), (1, 0.75)]
    assert [file.path for file in client.list_artifacts(run_id, "m")] == ["m/report.html"]
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "splits/train"
    assert dataset.dataset.digest == ("ab" * 32)[:36]
    assert json.loads(dataset.dataset.source)["digest"] == "ab" * 32
    assert json.loads(dataset.dataset.profile) == {"num_rows": 123}
    assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", "train")]


def test_artifacts_lie_beside_the_database(store: MlflowStore) -> None:
    run_id = store.create_run("r", {})
    folder = Path(store.tracking_uri.removeprefix("sqlite:///")).parent
    uri = store.client().get_run(run_id).info.artifact_uri
    assert uri.startswith((folder / "artifacts").as_uri())


def test_status_can_be_corrected(store: MlflowStore) -> None:
    run_id = store.create_run("r", {})
    client = store.client()
    assert client.get_run(run_id).info.status == "RUNNING"
    for status in ("FINISHED", "FAILED", "FAILED", "KILLED"):
        store.set_status(run_id, status)
        assert client.get_run(run_id).info.status == status

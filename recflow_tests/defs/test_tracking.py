import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from recflow.adapters.mlflow_tracking import MlflowStore
from recflow.defs.tracking import MLFLOW_RUN_TAG, mlflow_resource, tracking_sensors
from recflow_tests.defs import tracking_location as location

pytestmark = [
    # MLflow 3.17 with SQLAlchemy 2.1; nothing of ours can avoid it.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
]

STEPS = ["first", "second", "third"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> MlflowStore:
    """One store for the module: creating its tables takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "new" / "mlflow.db"
    return MlflowStore(f"sqlite:///{path}", "tests")


@pytest.fixture
def instance(
    tmp_path: Path, store: MlflowStore, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dg.DagsterInstance]:
    monkeypatch.setenv("MLFLOW_URI", store.tracking_uri)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    with dg.DagsterInstance.get() as instance:
        yield instance


def runs_of(store: MlflowStore, dagster_run_id: str) -> list[Any]:
    client = store.client()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(
        client.search_runs(experiments, filter_string=f"tags.dagster_run_id = '{dagster_run_id}'")
    )


def only_run(store: MlflowStore, dagster_run_id: str) -> Any:
    runs = runs_of(store, dagster_run_id)
    assert len(runs) == 1
    return runs[0]


def materialize(
    instance: dg.DagsterInstance, store: MlflowStore, **kwargs: Any
) -> dg.ExecuteInProcessResult:
    resource = mlflow_resource.configured(
        {"tracking_uri": store.tracking_uri, "experiment_name": "tests"}
    )
    return dg.materialize(
        location.ASSETS,
        instance=instance,
        resources={"mlflow": resource},
        raise_on_error=False,
        **kwargs,
    )


def execute(instance: dg.DagsterInstance) -> dg.DagsterRun:
    """Run a job under the tracked executor, in this process."""
    result = dg.execute_job(
        dg.reconstructable(everything),
        instance=instance,
        run_config={"execution": {"config": {"in_process": {}}}},
    )
    run = instance.get_run_by_id(result.run_id)
    assert run is not None
    return run


def everything() -> dg.JobDefinition:
    return location.defs.resolve_job_def("everything")


def test_run_logs_everything_and_finishes(instance: dg.DagsterInstance, store: MlflowStore) -> None:
    result = materialize(instance, store, tags={"dagster/partition": "2023-05-29"})
    assert result.success
    run = only_run(store, result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        f"{step}.{name}": value
        for step in STEPS
        for name, value in {"name": step, "optimiser.rate": "0.1"}.items()
    }
    assert set(run.data.metrics) == {f"{step}.loss" for step in STEPS}
    history = store.client().get_metric_history(run.info.run_id, "third.loss")
    assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]


def test_runs_lead_to_each_other(instance: dg.DagsterInstance, store: MlflowStore) -> None:
    result = materialize(instance, store, tags={"dagster/partition": "2023-05-29"})
    run = only_run(store, result.run_id)
    assert run.info.run_name.endswith(" 2023-05-29")
    assert run.data.tags["dagster.partition"] == "2023-05-29"
    assert run.data.tags["dagster.job"] == result.dagster_run.job_name
    dagster_run = instance.get_run_by_id(result.run_id)
    assert dagster_run is not None
    assert dagster_run.tags[MLFLOW_RUN_TAG] == run.info.run_id
    (event,) = result.asset_materializations_for_node("first")
    assert event.metadata["mlflow_run_id"].value == run.info.run_id
    assert store.tracking_uri in str(event.metadata["mlflow_run"].value)


@pytest.mark.parametrize(
    ("mode", "success", "status"),
    [("bad", False, "FAILED"), ("late", False, "FAILED"), ("retry", True, "FINISHED")],
)
def test_mlflow_run_ends_like_the_dagster_run(
    instance: dg.DagsterInstance,
    store: MlflowStore,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    success: bool,
    status: str,
) -> None:
    monkeypatch.setenv("MODE", mode)
    result = materialize(instance, store)
    assert result.success == success
    assert only_run(store, result.run_id).info.status == status
    tracked = execute(instance)
    assert tracked.is_success == success
    assert only_run(store, tracked.run_id).info.status == status


def test_run_that_inherits_the_tag_gets_its_own_mlflow_run(
    instance: dg.DagsterInstance, store: MlflowStore
) -> None:
    parent = materialize(instance, store)
    parent_id = only_run(store, parent.run_id).info.run_id
    # Dagster copies a run's tags to its re-execution.
    child = materialize(instance, store, tags={MLFLOW_RUN_TAG: parent_id})
    assert only_run(store, child.run_id).info.run_id != parent_id
    assert len(runs_of(store, parent.run_id)) == 1


def test_artifacts_are_kept_beside_the_database(
    instance: dg.DagsterInstance, store: MlflowStore
) -> None:
    result = materialize(instance, store)
    folder = Path(store.tracking_uri.removeprefix("sqlite:///")).parent
    uri = only_run(store, result.run_id).info.artifact_uri
    assert uri.startswith((folder / "artifacts").as_uri())


def test_nothing_is_created_where_nothing_is_logged(
    tmp_path: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_URI", f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    result = dg.execute_job(
        dg.reconstructable(everything),
        instance=instance,
        asset_selection=[dg.AssetKey("plain")],
        run_config={"execution": {"config": {"in_process": {}}}},
    )
    assert result.success
    with dg.build_resources({"mlflow": location.defs.resources["mlflow"]}) as resources:
        assert resources.mlflow == MlflowStore(os.environ["MLFLOW_URI"], "tests")
    assert not (tmp_path / "mlflow").exists()
    run = instance.get_run_by_id(result.run_id)
    assert run is not None
    assert MLFLOW_RUN_TAG not in run.tags


@pytest.mark.parametrize(
    ("sensor", "status"), list(zip(tracking_sensors, ["FAILED", "KILLED", "FINISHED"], strict=True))
)
def test_sensors_end_runs_that_were_left_open(
    instance: dg.DagsterInstance, store: MlflowStore, sensor: dg.SensorDefinition, status: str
) -> None:
    result = materialize(instance, store)
    mlflow_run = only_run(store, result.run_id).info.run_id
    store.client().set_terminated(mlflow_run, "RUNNING")

    evaluate(sensor, instance, store, result.run_id)
    assert only_run(store, result.run_id).info.status == status


def test_sensor_ticks_with_the_resources_of_the_location(
    instance: dg.DagsterInstance, store: MlflowStore
) -> None:
    sensor = tracking_sensors[2]
    with tick_context(instance, cursor=None) as context:
        cursor = sensor.evaluate_tick(context).cursor
    result = materialize(instance, store)
    run_id = only_run(store, result.run_id).info.run_id
    store.client().set_terminated(run_id, "RUNNING")
    with tick_context(instance, cursor) as context:
        (reaction,) = sensor.evaluate_tick(context).dagster_run_reactions
    assert reaction.error is None
    assert only_run(store, result.run_id).info.status == "FINISHED"


def tick_context(instance: dg.DagsterInstance, cursor: str | None) -> dg.SensorEvaluationContext:
    return dg.build_sensor_context(
        instance=instance,
        cursor=cursor,
        repository_def=location.defs.get_repository_def(),
        resources=location.defs.resources,
    )


def test_sensors_leave_the_run_a_tag_was_inherited_from(
    instance: dg.DagsterInstance, store: MlflowStore
) -> None:
    parent = materialize(instance, store)
    parent_id = only_run(store, parent.run_id).info.run_id
    resource = dg.ResourceDefinition.hardcoded_resource(store)
    child = dg.materialize(
        [location.plain],
        instance=instance,
        tags={MLFLOW_RUN_TAG: parent_id},
        resources={"mlflow": resource},
    )
    evaluate(tracking_sensors[0], instance, store, child.run_id)
    assert only_run(store, parent.run_id).info.status == "FINISHED"


def evaluate(
    sensor: dg.SensorDefinition, instance: dg.DagsterInstance, store: MlflowStore, run_id: str
) -> None:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    (record,) = instance.get_records_for_run(
        run_id, of_type=dg.DagsterEventType.RUN_SUCCESS
    ).records
    event = record.event_log_entry.dagster_event
    assert event is not None
    context = dg.build_run_status_sensor_context(
        sensor.name, event, instance, run, resources={"mlflow": store}
    )
    sensor(context)


def test_sensors_run_without_being_switched_on() -> None:
    assert [sensor.name for sensor in tracking_sensors] == [
        "mlflow_close_failed_runs",
        "mlflow_close_canceled_runs",
        "mlflow_close_finished_runs",
    ]
    assert {sensor.default_status for sensor in tracking_sensors} == {
        dg.DefaultSensorStatus.RUNNING
    }


def test_loading_the_module_imports_no_mlflow() -> None:
    code = (
        "import sys, recflow.defs.tracking;"
        "heavy = {'mlflow', 'dagster_mlflow', 'pandas'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Real processes


def start_cli(tmp_path: Path, **environment: str) -> subprocess.Popen[bytes]:
    command = ["-m", "dagster", "asset", "materialize", "--select", "first,second,third,report"]
    module = "recflow_tests.defs.tracking_location"
    with (tmp_path / "log.txt").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, *command, "-m", module],
            env=os.environ | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def newest_run(instance: dg.DagsterInstance) -> dg.DagsterRun:
    return instance.get_runs(limit=1)[0]


@pytest.mark.integration
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("mode", "code", "status"), [("", 0, "FINISHED"), ("kill", 1, "FAILED")])
def test_one_mlflow_run_across_step_processes(
    tmp_path: Path,
    instance: dg.DagsterInstance,
    store: MlflowStore,
    mode: str,
    code: int,
    status: str,
) -> None:
    process = start_cli(tmp_path, MODE=mode)
    assert process.wait(timeout=500) == code, (tmp_path / "log.txt").read_text()
    run = only_run(store, newest_run(instance).run_id)
    assert run.info.status == status
    assert {f"{step}.name" for step in STEPS} <= set(run.data.params)
    log = (tmp_path / "log.txt").read_text()
    assert "BetaWarning" not in log
    assert "DeprecationWarning" not in log


@pytest.mark.integration
@pytest.mark.timeout(600)
def test_interrupted_run_is_killed_in_mlflow(
    tmp_path: Path, instance: dg.DagsterInstance, store: MlflowStore
) -> None:
    started = tmp_path / "started"
    process = start_cli(tmp_path, MODE="wait", STARTED=str(started))
    deadline = time.monotonic() + 400
    while not started.exists():
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=90)
    assert only_run(store, newest_run(instance).run_id).info.status == "KILLED"

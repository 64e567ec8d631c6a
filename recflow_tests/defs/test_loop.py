"""The loop: what drift launches, what keeps two from training one snapshot, and what fails."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.events import StepMaterializationData
from dagster._core.remote_origin import (
    RegisteredCodeLocationOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
)

from recflow.adapters.keys import DRIFT, FINE_TUNED, ITEM_VECTORS, REPORT
from recflow.core.artifacts import Artifact, Manifest, StoredFile
from recflow.core.errors import ArtifactError
from recflow.definitions import defs
from recflow.defs.common import artifact_metadata
from recflow.defs.jobs import TRAIN_TAGS
from recflow.defs.monitoring.evidence import read_evidence
from recflow.defs.monitoring.sensors import retraining
from recflow.defs.monitoring.training_runs import find_training, newest_snapshot
from recflow.hardware.requirements import GPU_MEMORY, GPU_TYPE
from recflow.quality.evidence import DriftEvidence
from recflow.quality.trigger import TriggerPolicy

pytestmark = pytest.mark.filterwarnings("ignore:Asset job .* materializes assets with varying")

POLICY = TriggerPolicy(days_needed=2, days_looked_at=3, cooldown_days=2)
DRIFT_KEY, REPORT_KEY = dg.AssetKey(DRIFT.split("/")), dg.AssetKey(REPORT.split("/"))
QUEUED, STARTED = dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.STARTED
FAILED, SUCCEEDED = dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.SUCCESS


@pytest.fixture(scope="module")
def stored_instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dg.DagsterInstance]:
    """One for the module: making its tables takes seconds."""
    # Ticks of schedules need an instance that another process could open.
    with dg.DagsterInstance.local_temp(str(tmp_path_factory.mktemp("instance"))) as instance:
        yield instance


@pytest.fixture
def instance(stored_instance: dg.DagsterInstance) -> dg.DagsterInstance:
    stored_instance.wipe()
    return stored_instance


def january(number: int) -> str:
    return f"2024-01-{number:02}"


def found(
    instance: dg.DagsterInstance, number: int, *drifted: str, report: str = "", **others: Any
) -> DriftEvidence:
    """A day's drift, stored and reported as assets do; another report has another digest."""
    day = date(2024, 1, number)
    facts = DriftEvidence(day, "", drifted=drifted, **others).to_facts()
    artifact = Artifact(
        Path("store", DRIFT, str(day)),
        Manifest(
            key=DRIFT,
            partition=str(day),
            fingerprint="",
            parents={},
            config={},
            facts={**facts, "rows": 1000},
            files={"report.json": StoredFile(report or f"report-{number}", 1)},
            created_at="",
            library_versions={},
        ),
    )
    instance.report_runless_asset_event(
        dg.AssetMaterialization(DRIFT_KEY, partition=str(day), metadata=artifact_metadata(artifact))
    )
    return DriftEvidence(day, artifact.digest, drifted=drifted, **others)


def run_of(
    instance: dg.DagsterInstance,
    job: str,
    number: int,
    status: dg.DagsterRunStatus = STARTED,
    tags: Mapping[str, str] | None = None,
    assets: Sequence[str] | None = None,
) -> str:
    """A run in the instance, as whoever launched it left it; a successful one made its report."""

    @dg.op
    def step() -> None: ...

    @dg.job(name=job)
    def stand_in() -> None:
        step()

    run = instance.create_run_for_job(
        stand_in if assets is None else defs.resolve_implicit_global_asset_job_def(),
        status=status,
        tags={"dagster/partition": january(number), **(tags or {})},
        asset_selection=frozenset(dg.AssetKey(key.split("/")) for key in assets)
        if assets is not None
        else None,
        remote_job_origin=RemoteJobOrigin(
            RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("tests"), "repository"), job
        ),
    )
    if status == SUCCEEDED:
        report(instance, number, run.run_id)
    return run.run_id


def report(instance: dg.DagsterInstance, number: int, run_id: str) -> None:
    event = dg.DagsterEvent(
        event_type_value=dg.DagsterEventType.ASSET_MATERIALIZATION.value,
        job_name="any",
        event_specific_data=StepMaterializationData(
            dg.AssetMaterialization(REPORT_KEY, partition=january(number))
        ),
    )
    instance.report_dagster_event(event, run_id)


def tick(instance: dg.DagsterInstance, policy: TriggerPolicy = POLICY) -> dg.RunRequest | str:
    result = retraining(instance, policy)
    if isinstance(result, dg.SkipReason):
        assert result.skip_message
        return result.skip_message
    return result


# What is known


def test_the_newest_report_of_each_of_the_newest_days_counts(
    instance: dg.DagsterInstance,
) -> None:
    found(instance, 3, "hour")
    fifth = found(instance, 5, "hour", champion="7", champion_snapshot="2023-12-31")
    fourth = found(instance, 4, decayed=True)
    third = found(instance, 3, report="again")
    assert read_evidence(instance, 2) == [fourth, fifth]
    assert read_evidence(instance, 9) == [third, fourth, fifth]


def test_nothing_is_known_of_an_empty_instance(instance: dg.DagsterInstance) -> None:
    assert read_evidence(instance, 3) == []
    assert newest_snapshot(instance) is None
    assert tick(instance) == "no day has a drift report yet"


@pytest.mark.parametrize("metadata", [{}, {"digest": "abc"}])
def test_a_day_without_verdict_is_said_by_its_name(
    instance: dg.DagsterInstance, metadata: dict[str, str]
) -> None:
    instance.report_runless_asset_event(
        dg.AssetMaterialization(DRIFT_KEY, partition="2024-01-05", metadata=metadata)
    )
    with pytest.raises(ArtifactError, match=r"drift of 2024-01-05 .* materialise it again"):
        retraining(instance, POLICY)


@pytest.mark.parametrize("job", ["train", "full", "retrain"])
def test_trainings_are_known_by_their_job(instance: dg.DagsterInstance, job: str) -> None:
    run_of(instance, "ingest", 9)
    run_of(instance, job, 5, QUEUED)
    assert newest_snapshot(instance) == date(2024, 1, 5)


def test_trainings_are_known_by_what_they_make(instance: dg.DagsterInstance) -> None:
    run_of(instance, "assets", 9, assets=[ITEM_VECTORS])
    run_of(instance, "assets", 8, FAILED, assets=[FINE_TUNED])
    assert newest_snapshot(instance) is None
    run_of(instance, "assets", 5, assets=[ITEM_VECTORS, FINE_TUNED])
    assert newest_snapshot(instance) == date(2024, 1, 5)
    # Older snapshots that are trained later change nothing.
    run_of(instance, "train", 3, SUCCEEDED)
    assert newest_snapshot(instance) == date(2024, 1, 5)
    run_of(instance, "train", 6, SUCCEEDED)
    assert newest_snapshot(instance) == date(2024, 1, 6)


def test_runs_of_other_locations_are_passed_over(instance: dg.DagsterInstance) -> None:
    run_of(instance, "train", 5, tags={"dagster/partition": "europe|2024-01-05"})
    run_of(instance, "train", 4, tags={"dagster/partition": ""})
    assert newest_snapshot(instance) is None


def test_a_snapshot_stays_trained_when_its_run_is_forgotten(instance: dg.DagsterInstance) -> None:
    instance.report_runless_asset_event(dg.AssetMaterialization(REPORT_KEY, partition="2024-01-05"))
    assert str(find_training(instance, date(2024, 1, 5))) == "snapshot 2024-01-05 was trained"
    assert newest_snapshot(instance) == date(2024, 1, 5)


def test_a_run_that_failed_after_its_report_has_trained(instance: dg.DagsterInstance) -> None:
    # The gate refused what was trained: training it again tomorrow would end the same.
    report(instance, 5, run_of(instance, "retrain", 5, FAILED))
    assert newest_snapshot(instance) == date(2024, 1, 5)


@pytest.mark.parametrize(
    ("tags", "who"),
    [
        ({"recflow/trigger": "nightly", "dagster/schedule_name": "other"}, "nightly"),
        ({"dagster/sensor_name": "someone"}, "someone"),
        ({"dagster/backfill": "abcdef"}, "abcdef"),
        ({}, "by hand"),
    ],
)
@pytest.mark.parametrize(("status", "state"), [(STARTED, "is being"), (SUCCEEDED, "was")])
def test_who_trains_a_snapshot_can_be_said(
    instance: dg.DagsterInstance,
    tags: dict[str, str],
    who: str,
    status: dg.DagsterRunStatus,
    state: str,
) -> None:
    run_id = run_of(instance, "full", 5, status, tags)
    said = str(find_training(instance, date(2024, 1, 5)))
    assert said == f"snapshot 2024-01-05 {state} trained by run {run_id[:8]} ({who})"
    assert find_training(instance, date(2024, 1, 4)) is None


# The sensor


def test_the_sensor_is_off_until_it_is_switched_on() -> None:
    repository = defs.get_repository_def()
    sensor = repository.get_sensor_def("retrain_on_drift")
    assert sensor.default_status == dg.DefaultSensorStatus.STOPPED
    assert "recflow loop on" in (sensor.description or "")
    schedule = repository.get_schedule_def("monitor_daily")
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    assert "recflow loop on" in (schedule.description or "")


def test_calm_days_launch_nothing(instance: dg.DagsterInstance) -> None:
    for number in range(1, 9):
        found(instance, number)
    assert tick(instance) == "0 of the last 3 days are beyond a limit; 2 of 3 are needed"


def test_drift_requests_one_run_with_what_its_steps_need(instance: dg.DagsterInstance) -> None:
    found(instance, 8, "hour")
    assert "1 of the last 1 days" in str(tick(instance))
    found(instance, 9, "hour", "click_rate")
    request = tick(instance)
    assert isinstance(request, dg.RunRequest)
    assert request.partition_key == "2024-01-09"
    assert {GPU_TYPE, GPU_MEMORY} <= TRAIN_TAGS.keys()
    assert TRAIN_TAGS.items() <= request.tags.items()
    assert request.tags["recflow/trigger"] == "drift"
    assert request.tags["recflow/snapshot"] == "2024-01-09"
    assert request.tags["recflow/reason"].startswith(
        "2 of the last 2 days are beyond a limit: hour"
    )
    # The same evidence, the same key.
    again = tick(instance)
    assert isinstance(again, dg.RunRequest)
    assert again.run_key == request.run_key


def test_the_sensor_of_the_location_asks_its_job(instance: dg.DagsterInstance) -> None:
    repository = defs.get_repository_def()
    sensor = repository.get_sensor_def("retrain_on_drift")
    assert [target.job_name for target in sensor.targets] == ["retrain"]
    with dg.build_sensor_context(instance=instance, repository_def=repository) as context:
        assert sensor.evaluate_tick(context).skip_message == "no day has a drift report yet"
        found(instance, 8, "hour")
        found(instance, 9, decayed=True)
        (request,) = sensor.evaluate_tick(context).run_requests or ()
    assert request.partition_key == "2024-01-09"
    assert request.job_name in (None, "retrain")
    assert "the champion ranks worse on 2024-01-09" in request.tags["recflow/reason"]


def test_cooldown_begins_when_a_training_is_launched(instance: dg.DagsterInstance) -> None:
    run_of(instance, "retrain", 7, QUEUED)
    found(instance, 8, "hour")
    found(instance, 9, "hour")
    assert "next on 2024-01-10" in str(tick(instance))
    found(instance, 10, "hour")
    assert isinstance(tick(instance), dg.RunRequest)


def test_a_run_that_was_created_but_not_handed_over_is_requested_again(
    instance: dg.DagsterInstance,
) -> None:
    found(instance, 8, "hour")
    found(instance, 9, "hour")
    request = tick(instance)
    assert isinstance(request, dg.RunRequest)
    assert request.run_key is not None
    # The daemon was killed between the two; Dagster finds the run by its key and hands it over.
    run_of(
        instance,
        "retrain",
        9,
        dg.DagsterRunStatus.NOT_STARTED,
        {"dagster/run_key": request.run_key},
    )
    again = tick(instance)
    assert isinstance(again, dg.RunRequest)
    assert again.run_key == request.run_key


def test_evidence_that_launched_a_run_that_failed_launches_no_other(
    instance: dg.DagsterInstance,
) -> None:
    found(instance, 8, "hour")
    found(instance, 9, "hour")
    request = tick(instance)
    assert isinstance(request, dg.RunRequest)
    assert request.run_key is not None
    run_id = run_of(instance, "retrain", 9, FAILED, {"dagster/run_key": request.run_key})
    said = str(tick(instance))
    assert f"run {run_id[:8]} was launched for that already and ended as FAILURE" in said
    assert "launch the job retrain for 2024-01-09" in said
    # A longer look back is no new evidence either; another day is.
    assert isinstance(tick(instance, TriggerPolicy(1, 7, 0)), str)
    found(instance, 10, "hour")
    later = tick(instance)
    assert isinstance(later, dg.RunRequest)
    assert later.run_key != request.run_key


def test_reasons_of_any_length_become_tags(instance: dg.DagsterInstance) -> None:
    found(instance, 8, *(f"measure_{n}" for n in range(200)))
    found(instance, 9, *(f"measure_{n}" for n in range(200)))
    request = tick(instance)
    assert isinstance(request, dg.RunRequest)
    assert len(request.tags["recflow/reason"]) == 500


# Nightly and drift


def tick_of(schedule: str, instance: dg.DagsterInstance, day: int) -> dg.RunRequest | str:
    """The tick in the night that follows a day."""
    repository = defs.get_repository_def()
    # Left open, the context would leave its instance to whatever loads definitions next.
    with dg.build_schedule_context(
        instance=instance,
        repository_def=repository,
        scheduled_execution_time=datetime(2024, 1, day, 3, tzinfo=UTC) + timedelta(days=1),
    ) as context:
        result = repository.get_schedule_def(schedule).evaluate_tick(context)
    if result.run_requests:
        return result.run_requests[0]
    assert result.skip_message
    return result.skip_message


def nightly(instance: dg.DagsterInstance, day: int) -> dg.RunRequest | str:
    return tick_of("nightly", instance, day)


def launch(
    instance: dg.DagsterInstance, job: str, request: dg.RunRequest | str, status: Any = QUEUED
) -> str:
    """What the daemon makes of a request."""
    assert isinstance(request, dg.RunRequest), request
    assert request.partition_key is not None
    assert request.run_key is not None
    tags = {**request.tags, "dagster/run_key": request.run_key}
    return run_of(instance, job, int(request.partition_key[-2:]), status, tags)


def test_nightly_first_then_drift(instance: dg.DagsterInstance) -> None:
    run_id = launch(instance, "full", nightly(instance, 9))
    found(instance, 8, "hour")
    found(instance, 9, "hour")
    said = f"snapshot 2024-01-09 is being trained by run {run_id[:8]} (nightly)"
    assert tick(instance) == said
    assert nightly(instance, 9) == said


def test_drift_after_a_finished_nightly(instance: dg.DagsterInstance) -> None:
    run_id = launch(instance, "full", nightly(instance, 9), SUCCEEDED)
    found(instance, 8, "hour")
    found(instance, 9, "hour")
    assert tick(instance) == f"snapshot 2024-01-09 was trained by run {run_id[:8]} (nightly)"


@pytest.mark.parametrize(("status", "state"), [(QUEUED, "is being"), (SUCCEEDED, "was")])
def test_drift_first_then_nightly(
    instance: dg.DagsterInstance, status: dg.DagsterRunStatus, state: str
) -> None:
    found(instance, 8, "hour")
    found(instance, 9, "hour")
    run_id = launch(instance, "retrain", tick(instance), status)
    said = f"snapshot 2024-01-09 {state} trained by run {run_id[:8]} (drift)"
    assert nightly(instance, 9) == said
    assert tick(instance) == said
    # The night after trains the next day.
    assert isinstance(nightly(instance, 10), dg.RunRequest)


def test_the_nightly_run_is_known_by_its_day(instance: dg.DagsterInstance) -> None:
    request = nightly(instance, 9)
    assert isinstance(request, dg.RunRequest)
    assert request.run_key == request.partition_key == "2024-01-09"
    assert request.tags["recflow/trigger"] == "nightly"
    assert request.tags["recflow/snapshot"] == "2024-01-09"
    assert TRAIN_TAGS.items() <= request.tags.items()
    launch(instance, "full", request, FAILED)
    again = nightly(instance, 9)
    # Whether its run is launched again is Dagster's to say, by the key.
    assert isinstance(again, dg.RunRequest)
    assert again.run_key == request.run_key


def test_every_run_of_a_day_carries_it_however_it_is_started() -> None:
    for job in ("monitor", "train", "full", "retrain"):
        definition = defs.resolve_job_def(job)
        tags = definition.get_tags_for_partition_key("2024-01-09", None)
        assert tags["recflow/snapshot"] == "2024-01-09", job


def test_the_daily_look_at_drift_requests_the_newest_complete_day(
    instance: dg.DagsterInstance,
) -> None:
    assert defs.get_repository_def().get_schedule_def("monitor_daily").job.name == "monitor"
    request = tick_of("monitor_daily", instance, 9)
    assert isinstance(request, dg.RunRequest)
    assert request.run_key == request.partition_key == "2024-01-09"
    assert request.tags["recflow/snapshot"] == "2024-01-09"
    # It makes no model, and waits for no GPU.
    assert GPU_TYPE not in request.tags

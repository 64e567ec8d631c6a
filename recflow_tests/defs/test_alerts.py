"""Failures speak: what is told of a run, once, in the log and at a webhook that may be gone."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import dagster as dg
import pytest

from recflow.adapters.webhook import Webhook
from recflow.core.errors import ArtifactError
from recflow.definitions import defs
from recflow.defs.monitoring.alerts import alert_sensors

FAILED, CHECKED, CHECKED_FAILED, CHECKED_CANCELED = range(4)
DAYS = dg.StaticPartitionsDefinition(["2024-01-05"])


@dg.asset(key=["models", "fine_tuned"], partitions_def=DAYS)
def fine_tuned(context: dg.AssetExecutionContext) -> None:
    if context.run.tags.get("fails") == "permanent":
        raise ArtifactError("splits/train is missing; materialise it first")
    if context.run.tags.get("fails") == "bug":
        try:
            _ = {}["key"]
        except KeyError as error:
            raise RuntimeError("it broke") from error


@dg.asset_check(asset=fine_tuned)
def holds() -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=True)


@dg.asset_check(asset=fine_tuned)
def warns() -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        passed=False, severity=dg.AssetCheckSeverity.WARN, description="titles drifted – ümlaut"
    )


@dg.asset_check(asset=fine_tuned)
def errs() -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=False)


@dg.asset(key=["models", "blocked"], partitions_def=DAYS)
def blocked() -> None: ...


@dg.asset_check(asset=blocked, blocking=True)
def blocks() -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=False, description="rows are missing")


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def received() -> Iterator[tuple[str, list[dict[str, str]]]]:
    messages: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/t0ken", messages
    server.shutdown()
    thread.join()
    server.server_close()


def run_of(instance: dg.DagsterInstance, assets: list[Any], **tags: str) -> str:
    result = dg.materialize(
        assets,
        instance=instance,
        partition_key="2024-01-05",
        tags=tags,
        raise_on_error=False,
    )
    return result.run_id


def evaluate(
    instance: dg.DagsterInstance, run_id: str, webhook: Webhook | None, which: int
) -> None:
    """The tick of one sensor for the end of one run."""
    run = instance.get_run_by_id(run_id)
    assert run is not None
    ended = {
        dg.DagsterRunStatus.SUCCESS: dg.DagsterEventType.RUN_SUCCESS,
        dg.DagsterRunStatus.FAILURE: dg.DagsterEventType.RUN_FAILURE,
    }[run.status]
    (record,) = instance.get_records_for_run(run_id, of_type=ended).records
    event = record.event_log_entry.dagster_event
    assert event is not None
    sensor = alert_sensors(webhook, "http://localhost:3000/")[which]
    context = dg.build_run_status_sensor_context(sensor.name, event, instance, run)
    sensor(context.for_run_failure() if which == FAILED else context)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        (
            "permanent",
            "models/fine_tuned: ArtifactError: splits/train is missing; materialise it first",
        ),
        ("bug", "models/fine_tuned: RuntimeError: it broke"),
    ],
)
def test_a_failed_run_says_why(
    instance: dg.DagsterInstance,
    received: tuple[str, list[dict[str, str]]],
    fails: str,
    reason: str,
) -> None:
    url, messages = received
    run_id = run_of(instance, [fine_tuned], fails=fails)
    evaluate(instance, run_id, Webhook(url), FAILED)
    (message,) = messages
    assert message == {
        "id": f"{run_id}-run_failed",
        "kind": "run_failed",
        "headline": "assets of 2024-01-05 failed",
        "reason": reason,
        "run_id": run_id,
        "job": "assets",
        "partition": "2024-01-05",
        "link": f"http://localhost:3000/runs/{run_id}",
        "text": f"assets of 2024-01-05 failed\n{reason}\nhttp://localhost:3000/runs/{run_id}",
    }


def test_checks_that_did_not_hold_are_told_of_together_though_the_run_succeeded(
    instance: dg.DagsterInstance, received: tuple[str, list[dict[str, str]]]
) -> None:
    url, messages = received
    run_id = run_of(instance, [fine_tuned, holds, warns, errs])
    evaluate(instance, run_id, Webhook(url), CHECKED)
    (message,) = messages
    assert message["kind"] == "checks_failed"
    assert message["headline"] == "assets of 2024-01-05 has 2 checks that failed"
    assert sorted(message["reason"].splitlines()) == [
        "ERROR models/fine_tuned: errs",
        "WARN models/fine_tuned: warns – titles drifted – ümlaut",
    ]


def test_a_blocking_check_is_told_of_with_the_run_that_it_stopped(
    instance: dg.DagsterInstance, received: tuple[str, list[dict[str, str]]]
) -> None:
    url, messages = received
    run_id = run_of(instance, [blocked, blocks])
    evaluate(instance, run_id, Webhook(url), CHECKED_FAILED)
    assert messages[0]["headline"] == "assets of 2024-01-05 has a check that failed"
    assert messages[0]["reason"] == "ERROR models/blocked: blocks – rows are missing"
    evaluate(instance, run_id, Webhook(url), FAILED)
    assert messages[1]["kind"] == "run_failed"
    assert "blocks" in messages[1]["reason"]


def test_where_everything_holds_nobody_is_told(
    instance: dg.DagsterInstance, received: tuple[str, list[dict[str, str]]]
) -> None:
    url, messages = received
    evaluate(instance, run_of(instance, [fine_tuned, holds]), Webhook(url), CHECKED)
    assert messages == []


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:1/t0ken"])
def test_the_log_has_it_whether_or_not_anybody_listens(
    instance: dg.DagsterInstance, capfd: pytest.CaptureFixture[str], url: str | None
) -> None:
    run_id = run_of(instance, [fine_tuned], fails="permanent")
    capfd.readouterr()
    webhook = Webhook(url, pause=0.01) if url else None
    evaluate(instance, run_id, webhook, FAILED)
    logged = "".join(capfd.readouterr())
    assert "assets of 2024-01-05 failed" in logged
    assert "splits/train is missing" in logged
    assert ("nobody was told at the webhook: 127.0.0.1 cannot be reached" in logged) == bool(url)
    assert "t0ken" not in logged


def test_they_run_without_being_switched_on() -> None:
    names = [sensor.name for sensor in alert_sensors(None, "")]
    repository = defs.get_repository_def()
    for name in names:
        sensor = repository.get_sensor_def(name)
        assert sensor.default_status == dg.DefaultSensorStatus.RUNNING
    assert len(names) == 4

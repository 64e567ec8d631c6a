"""The loop in real processes: drift launches one training whatever is killed; failures speak."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from recflow.adapters.keys import DRIFT
from recflow.quality.evidence import DriftEvidence
from recflow.settings import PROJECT_ROOT
from recflow_tests.integration.deployment import Deployment
from recflow_tests.integration.loop_location import FAILS, TRAINED
from recflow_tests.integration.queue_location import BASE_MODEL, DEVICES

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

SENSOR = "retrain_on_drift"


@dataclass
class Receiver:
    """A webhook on this machine, busy at first."""

    url: str = ""
    requests: int = 0
    messages: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def receiver() -> Iterator[Receiver]:
    received = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.requests += 1
            if received.requests > 1:
                received.messages.append(json.loads(body))
            self.send_response(200 if received.requests > 1 else 503)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    received.url = f"http://127.0.0.1:{server.server_port}/hooks/s3cret"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class Site:
    """A deployment whose code server and daemon run, and its instance as this process sees it."""

    home: Path
    environment: dict[str, str]
    instance: dg.DagsterInstance
    webhook: Receiver
    daemon: subprocess.Popen[bytes] | None = None

    @property
    def workspace(self) -> Path:
        return self.home / "workspace.yaml"

    @property
    def trained(self) -> list[str]:
        file = self.home / "trained"
        return file.read_text().split() if file.exists() else []

    def log(self, name: str) -> Path:
        return self.home / f"{name}.log"

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with self.log(name).open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", *arguments],
                env=self.environment,
                cwd=PROJECT_ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start_daemon(self) -> None:
        self.daemon = self.start("daemon", "dagster._daemon", "run", "-w", str(self.workspace))

    def kill_daemon(self) -> None:
        assert self.daemon is not None
        assert self.daemon.poll() is None, self.log("daemon").read_text()
        self.daemon.kill()
        self.daemon.wait()

    def loop(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "recflow.cli", "loop", *arguments, "-w", str(self.workspace)],
            env=self.environment,
            cwd=PROJECT_ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def found(self, *days: int, drifted: Sequence[str] = ()) -> None:
        """What the daily look at drift reports."""
        for number in days:
            day = date(2024, 1, number)
            evidence = DriftEvidence(day, f"report-{number}", drifted=drifted)
            facts = {**evidence.to_facts(), "digest": evidence.digest}
            self.instance.report_runless_asset_event(
                dg.AssetMaterialization(
                    dg.AssetKey(DRIFT.split("/")), partition=str(day), metadata=facts
                )
            )

    def runs(self) -> list[dg.DagsterRun]:
        """Runs that the sensor launched, the oldest first."""
        found = self.instance.get_runs(dg.RunsFilter(tags={"dagster/sensor_name": SENSOR}))
        return list(reversed(found))

    def ticks(self, since: float = 0.0) -> list[Any]:
        """Ticks of the sensor that began after a time, the newest first."""
        (state,) = (
            state
            for state in self.instance.all_instigator_state()
            if state.instigator_name == SENSOR
        )
        ticks = self.instance.get_ticks(state.instigator_origin_id, state.selector_id)
        return [tick for tick in ticks if tick.timestamp > since]

    def wait(self, seconds: float, what: str, until: Callable[[], Any], pause: float = 0.2) -> Any:
        ends = time.monotonic() + seconds
        while not (result := until()):
            assert time.monotonic() < ends, (
                f"{what}: {[(t.status, t.skip_reason) for t in self.ticks()[:5]]}\n"
                f"{self.log('daemon').read_text()[-6000:]}"
            )
            time.sleep(pause)
        return result

    def wait_until_it_says(self, words: str) -> None:
        def said() -> bool:
            return any(words in (tick.skip_reason or "") for tick in self.ticks(began))

        began = time.time()
        self.wait(180, words, said)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with ExitStack() as stack:
        webhook = stack.enter_context(receiver())
        place = Deployment(
            tmp_path,
            Path(BASE_MODEL),
            settings={
                "DEVICES": ",".join(DEVICES),
                "ALERT_WEBHOOK": webhook.url,
                "WEB_URL": "http://dagster.example/",
                # A cooldown, and no retraining that nothing but an earlier alarm asks for.
                "RETRAIN_COOLDOWN_DAYS": "2",
                "RETRAIN_SETTLE_DAYS": "0",
            },
        )
        files = {TRAINED: str(tmp_path / "trained"), FAILS: str(tmp_path / "fails")}
        monkeypatch.setenv("DAGSTER_HOME", str(place.dagster_home))
        instance = stack.enter_context(dg.DagsterInstance.get())
        site = Site(tmp_path, {**place.environment(), **files}, instance, webhook)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = {"host": "127.0.0.1", "port": port, "location_name": "loop"}
        site.workspace.write_text(yaml.safe_dump({"load_from": [{"grpc_server": server}]}))
        location = site.start(
            "location",
            *("dagster", "api", "grpc", "--host", "127.0.0.1", "--port", str(port)),
            *("-m", "recflow_tests.integration.loop_location", "--location-name", "loop"),
        )
        try:
            wait_for_server(location, port, site.log("location"))
            yield site
        finally:
            for process in (site.daemon, location):
                if process is not None and process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def wait_for_server(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(300):
        assert process.poll() is None, log.read_text()
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    pytest.fail(log.read_text())


def test_drift_launches_one_training_whatever_is_killed(site: Site) -> None:
    assert "retrain_on_drift is on" in site.loop("on")
    site.found(1, 2, 3)
    site.start_daemon()
    site.wait(180, "a tick", lambda: site.instance.all_instigator_state() and site.ticks())
    site.wait_until_it_says("0 of the last 3 days are beyond a limit; 2 of 3 are needed")
    assert site.runs() == []

    # Killed while the sensor is asked, and again as soon as there is a run.
    site.found(4, 5, drifted=["click_rate"])
    injected = time.time()
    site.wait(180, "a tick that goes on", lambda: site.ticks(injected), pause=0.005)
    site.kill_daemon()
    site.start_daemon()
    site.wait(180, "a run", site.runs, pause=0.005)
    site.kill_daemon()
    site.start_daemon()
    site.wait_until_it_says("snapshot 2024-01-05 was trained by run")
    (run,) = site.runs()
    assert site.trained == ["2024-01-05"]
    assert run.job_name == "retrain"
    assert run.tags["dagster/partition"] == "2024-01-05"
    assert run.tags["recflow/gpu_type"] == "l4"
    assert int(run.tags["recflow/gpu_memory_gib"]) > 0
    assert run.tags["recflow/snapshot"] == "2024-01-05"
    assert run.tags["recflow/trigger"] == "drift"
    assert "click_rate on 2 days" in run.tags["recflow/reason"]

    # The check that did not hold is told of, though the run succeeded and the webhook was busy.
    site.wait(180, "the check", lambda: site.webhook.messages)
    (message,) = site.webhook.messages
    assert message["kind"] == "checks_failed"
    assert message["headline"] == "retrain of 2024-01-05 has a check that failed"
    assert message["reason"] == "WARN evaluation/report: is_better – not by much"
    assert message["link"] == f"http://dagster.example/runs/{run.run_id}"

    # Two days must lie between; then other evidence launches another run, which fails.
    (site.home / "fails").touch()
    site.found(6, 7, drifted=["click_rate"])
    site.wait_until_it_says("next on 2024-01-08")
    site.found(8, drifted=["click_rate"])
    site.wait_until_it_says("was launched for that already and ended as FAILURE")
    _, second = site.runs()
    assert second.tags["recflow/snapshot"] == "2024-01-08"
    assert site.trained == ["2024-01-05", "2024-01-08"]
    site.wait(180, "the failure", lambda: len(site.webhook.messages) > 1)
    failure = site.webhook.messages[1]
    assert failure["run_id"] == second.run_id
    assert failure["headline"] == "retrain of 2024-01-08 failed"
    assert failure["reason"] == (
        "evaluation/report: ArtifactError: the logs of 2024-01-08 are <gone> & no more"
    )
    assert "&lt;gone&gt; &amp; no more" in failure["text"]

    def status_with_reason() -> str:
        said = site.loop("status")
        return said if "was launched for that already" in said else ""

    # A tick that is under way has no reason yet.
    status = site.wait(60, "the reason", status_with_reason)
    assert "no daemon runs" not in status
    assert "retrain_on_drift is off" in site.loop("off")
    assert len(site.runs()) == 2
    assert len(site.webhook.messages) == 2


def test_the_command_turns_the_switches_of_the_web_ui(tmp_path: Path) -> None:
    place = Deployment(tmp_path, Path(BASE_MODEL), settings={"DEVICES": ",".join(DEVICES)})

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            env=place.environment(),
            cwd=PROJECT_ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    # As the web UI that `recflow dev` starts has them.
    module = ("-m", "recflow.definitions")
    said = run("recflow.cli", "loop", "on", "--nightly").splitlines()
    assert said == [
        "nightly is on",
        "no daemon runs here, so nothing happens yet; start it with: dagster dev "
        "-m recflow.definitions",
    ]
    running = run("dagster", "schedule", "list", "--running", *module)
    assert "Schedule: nightly [RUNNING]" in running
    assert "monitor_daily" not in running
    run("dagster", "sensor", "start", SENSOR, *module)
    status = run("recflow.cli", "loop", "status")
    states = {line.split()[0]: line.split()[1] for line in status.splitlines()[:3]}
    assert states == {"monitor_daily": "off", "nightly": "on", SENSOR: "on"}
    run("recflow.cli", "loop", "off")
    assert "nightly" not in run("dagster", "schedule", "list", "--running", *module)
    assert SENSOR not in run("dagster", "sensor", "list", "--running", *module)

"""A running deployment: what the web UI shows of needs, and the queue that holds by GPU type."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from recflow.adapters.requirements import Need
from recflow.defs.monitoring.training_runs import SNAPSHOT_TAG
from recflow.hardware.requirements import KUBERNETES, RAY
from recflow.settings import PROJECT_ROOT
from recflow_tests.integration.deployment import Deployment
from recflow_tests.integration.queue_location import BASE_MODEL, DEVICES, NEEDS, RELEASE

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

LOCATIONS = {"recflow": "recflow.definitions", "queue": "recflow_tests.integration.queue_location"}
LAUNCH = """
mutation ($params: ExecutionParams!) {
  launchRun(executionParams: $params) {
    __typename
    ... on LaunchRunSuccess { run { runId tags { key value } } }
    ... on PythonError { message }
    ... on RunConfigValidationInvalid { errors { message } }
  }
}"""
RUNS = """
query ($ids: [String!]) {
  runsOrError(filter: {runIds: $ids}) {
    ... on Runs { results { runId status startTime endTime tags { key value } } }
  }
}"""
LOADED = """
{ workspaceOrError { ... on Workspace { locationEntries {
    name loadStatus locationOrLoadError { __typename ... on PythonError { message } }
} } } }"""
ASSETS = """
{ assetNodes {
    assetKey { path }
    repository { location { name } }
    tags { key value }
    pools
    op { metadata { key value } }
    metadataEntries {
      label
      ... on TextMetadataEntry { text }
      ... on MarkdownMetadataEntry { mdStr }
    }
} }"""


@dataclass(frozen=True)
class WebUI:
    """The web server of a running deployment.

    Attributes:
        address: Where it answers.
        release: The file that ends the trainings of the location ``queue``.
    """

    address: str
    release: Path

    def ask(self, query: str, variables: Mapping[str, Any] | None = None) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.address}/graphql",
            data=json.dumps({"query": query, "variables": dict(variables or {})}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            content = json.load(answer)
        assert "errors" not in content, content["errors"]
        return content["data"]

    def wait_until_loaded(self, process: subprocess.Popen[bytes], log: Path) -> None:
        """Until every location is loaded by a server that answers."""
        for _ in range(180):
            assert process.poll() is None, log.read_text()
            try:
                entries = self.ask(LOADED)["workspaceOrError"]["locationEntries"]
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                entries = []
            if {entry["name"] for entry in entries if entry["loadStatus"] == "LOADED"} >= set(
                LOCATIONS
            ):
                for entry in entries:
                    problem = entry["locationOrLoadError"]
                    assert problem["__typename"] != "PythonError", problem["message"]
                return
            time.sleep(1)
        pytest.fail(f"the web UI did not come up: {log.read_text()}")

    def launch(self, job: str, tags: Mapping[str, str]) -> str:
        selector = {
            "repositoryLocationName": "queue",
            "repositoryName": "__repository__",
            "jobName": job,
        }
        params = {
            "selector": selector,
            "runConfigData": {},
            "executionMetadata": {"tags": pairs(tags)},
        }
        answer = self.ask(LAUNCH, {"params": params})["launchRun"]
        assert answer["__typename"] == "LaunchRunSuccess", answer
        return answer["run"]["runId"]

    def wait_for(
        self, runs: list[str], seconds: float, until: Callable[[list[str]], bool]
    ) -> list[dict[str, Any]]:
        """Records of runs, as soon as their states are as wanted; none of them may fail."""
        ends = time.monotonic() + seconds
        while True:
            found = self.ask(RUNS, {"ids": runs})["runsOrError"]["results"]
            states = [run["status"] for run in found]
            assert not {"FAILURE", "CANCELED"} & set(states), found
            if until(states):
                return found
            assert time.monotonic() < ends, found
            time.sleep(0.5)


def pairs(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in tags.items()]


def values(found: list[dict[str, str]]) -> dict[str, str]:
    return {entry["key"]: entry["value"] for entry in found}


@pytest.fixture(scope="module")
def web_ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    """Web server, daemon and both code locations, under the instance file that recflow ships."""
    home = tmp_path_factory.mktemp("queue")
    # The preset's name: there are sizes to plan with, and no weights.
    place = Deployment(home, Path(BASE_MODEL), settings={"DEVICES": ",".join(DEVICES)})
    workspace = home / "workspace.yaml"
    modules = [
        {
            "python_module": {
                "module_name": module,
                "location_name": name,
                "working_directory": str(PROJECT_ROOT),
            }
        }
        for name, module in LOCATIONS.items()
    ]
    workspace.write_text(yaml.safe_dump({"load_from": modules}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, release = home / "dagster.log", home / "release"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "dagster", "dev", "-w", str(workspace)),
                *("--host", "127.0.0.1", "--port", str(port)),
            ],
            env={**place.environment(), RELEASE: str(release)},
            cwd=PROJECT_ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        ui = WebUI(f"http://127.0.0.1:{port}", release)
        ui.wait_until_loaded(process, log)
        yield ui
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_the_web_ui_shows_what_every_model_asset_needs(web_ui: WebUI) -> None:
    nodes = {
        "/".join(node["assetKey"]["path"]): node
        for node in web_ui.ask(ASSETS)["assetNodes"]
        if node["repository"]["location"]["name"] == "recflow"
    }
    for key, need in NEEDS.items():
        assert_shown(nodes[key], need)
    assert nodes["models/fine_tuned"]["pools"] == ["gpu_l4"]
    assert nodes["evaluation/predictions"]["pools"] == ["compute"]
    assert not any("gpu" in tag["key"] for tag in nodes["raw/items"]["tags"])


def assert_shown(node: dict[str, Any], need: Need) -> None:
    requirement = need.requirement
    assert requirement is not None
    assert requirement.tags.items() <= values(node["tags"]).items()
    assert node["pools"] == [requirement.pool]
    op = values(node["op"]["metadata"])
    assert requirement.tags.items() <= op.items()
    assert json.loads(op[KUBERNETES]) == requirement.kubernetes
    assert json.loads(op[RAY]) == requirement.ray
    shown = {entry["label"]: entry for entry in node["metadataEntries"]}
    assert shown["device"]["text"] == requirement.device.label
    assert need.plan is not None
    for part in need.plan.memory.parts:
        assert f"| {part} |" in shown["planned_memory"]["mdStr"]


def test_runs_of_one_gpu_type_or_one_day_wait_for_each_other_and_for_no_others(
    web_ui: WebUI,
) -> None:
    training = NEEDS["models/fine_tuned"].requirement
    scoring = NEEDS["evaluation/predictions"].requirement
    assert training is not None
    assert scoring is not None
    assert (training.gpu_type, scoring.gpu_type) == ("l4", "none")

    days = ("2024-01-01", "2024-01-02", "2024-01-03")
    same = [web_ui.launch("training", {**training.run_tags, SNAPSHOT_TAG: day}) for day in days]
    web_ui.wait_for(same, seconds=120, until=lambda runs: "STARTED" in runs)
    # The training that runs ends when it is told to. Others are begun and done beside it, by a
    # daemon that looked at the waiting ones first.
    others = [web_ui.launch("scoring", scoring.run_tags), web_ui.launch("scoring", {})]
    beside = web_ui.wait_for(others, seconds=120, until=lambda runs: set(runs) == {"SUCCESS"})
    waiting = web_ui.wait_for(same, seconds=0, until=lambda _: True)
    assert sorted(run["status"] for run in waiting) == ["QUEUED", "QUEUED", "STARTED"]
    (of_one_day,) = (values(run["tags"])[SNAPSHOT_TAG] for run in waiting if run["startTime"])
    # What writes the day that is being trained waits, whatever GPU it needs; other days do not.
    same_day = web_ui.launch("scoring", {SNAPSHOT_TAG: of_one_day})
    other_day = web_ui.launch("scoring", {SNAPSHOT_TAG: "2023-01-01"})
    web_ui.wait_for([other_day], seconds=120, until=lambda runs: runs == ["SUCCESS"])
    web_ui.wait_for([same_day], seconds=0, until=lambda runs: runs == ["QUEUED"])
    web_ui.release.touch()
    web_ui.wait_for([same_day], seconds=180, until=lambda runs: runs == ["SUCCESS"])
    done = web_ui.wait_for(same, seconds=180, until=lambda runs: set(runs) == {"SUCCESS"})

    assert all(values(run["tags"])["recflow/gpu_type"] == "l4" for run in done)
    spans = sorted((run["startTime"], run["endTime"]) for run in done)
    for (_, end), (start, _) in itertools.pairwise(spans):
        assert start >= end
    first_start, first_end = spans[0]
    for run in beside:
        assert first_start < run["startTime"] < run["endTime"] < first_end

"""Gate, promotion, approval, rollback and serving, in the processes that people start."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recflow.adapters.drift import evidence_of
from recflow.adapters.gate import read_decision
from recflow.adapters.mlflow_registry import ModelRegistry
from recflow.adapters.mlflow_tracking import MlflowStore
from recflow.adapters.snapshots import load_snapshot
from recflow.modeling.ranker import load_ranker
from recflow.serving.bundle import catalogue_vectors
from recflow.settings import PROJECT_ROOT
from recflow_tests.integration.deployment import QUICK, TRAIN, Deployment
from recflow_tests.unit.adapters.registry_world import WHY, RegistryWorld

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(1200),
    # MLflow 3.17 with SQLAlchemy 2.1; nothing of ours can avoid it.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
]

FIRST, SECOND, THIRD = "2024-01-12", "2024-01-13", "2024-01-14"
STORED = ["raw", "cleaned", "features", "validations"]
# Learns nothing, and without categories all that is left is the tiny encoder's random weights.
UNTRAINED = {
    **QUICK["models__fine_tuned"]["config"],
    "optimiser": {"head_learning_rate": 1e-12, "encoder_learning_rate": 1e-12},
    "user_model": {"categories": False},
}


def training(*, learns: bool, gate: Mapping[str, Any] | None = None) -> dict[str, Any]:
    names = ("evaluation__predictions", "evaluation__measurements", "evaluation__report")
    ops = {name: QUICK[name] for name in names}
    ops["models__fine_tuned"] = QUICK["models__fine_tuned"] if learns else {"config": UNTRAINED}
    ops["promotion__gate"] = {"config": {"bootstrap_samples": 200, **(gate or {})}}
    return ops


class World:
    """A deployment with a family of one model, and its registry."""

    def __init__(self, ingested: Deployment, home: Path) -> None:
        family = home / "family.toml"
        family.write_text("")
        self.home, self.base_model, self.family = home, ingested.base_model, family
        for table in STORED:
            shutil.copytree(ingested.store.root / table, home / "store" / table)
        self.registry = ModelRegistry(
            MlflowStore(f"sqlite:///{home}/mlflow/mlflow.db", "recflow"), "recflow"
        )

    def deployment(self, **settings: str) -> Deployment:
        return Deployment(
            self.home, self.base_model, settings={"FAMILY": str(self.family), **settings}
        )

    def recflow(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "recflow.cli", *arguments)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env=self.deployment().environment(),
            cwd=PROJECT_ROOT,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def world(ingested: Deployment, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(ingested, tmp_path_factory.mktemp("promotion"))


@pytest.fixture(scope="module")
def first(world: World) -> World:
    """A first champion that has learned nothing; nobody would let it through but a test."""
    done = world.deployment().materialise(
        TRAIN, FIRST, training(learns=False, gate={"min_baseline_lead": -1.0})
    )
    assert done.returncode == 0, done.stderr
    assert world.registry.aliases() == {"champion": "1"}
    return world


@pytest.fixture(scope="module")
def waiting(first: World) -> World:
    """A better candidate, where a person decides."""
    # On so few impressions an interval is wide.
    done = first.deployment(APPROVAL="required").materialise(
        TRAIN, SECOND, training(learns=True, gate={"epsilon": 0.05})
    )
    assert done.returncode == 0, done.stderr
    assert "candidate_may_become_champion holds" in done.stderr
    assert first.registry.aliases() == {"champion": "1", "candidate": "2"}
    return first


@pytest.fixture(scope="module")
def approved(waiting: World) -> World:
    shown = waiting.recflow("champion")
    assert "version 2: fine_tuned of snapshot 2024-01-13" in shown.stdout, shown.stderr
    assert "waits for an approval" in shown.stdout
    done = waiting.recflow("approve", "--reason", "it ranks better")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The champion is version 2; before, it was version 1\n"
    return waiting


def test_an_approved_candidate_is_the_champion_and_the_history_says_why(approved: World) -> None:
    assert approved.registry.aliases() == {"champion": "2", "previous_champion": "1"}
    last = approved.registry.history()[-1]
    assert (last.action, last.version, last.former) == ("promoted", "2", "1")
    assert last.reason == "it ranks better"
    gate = approved.deployment().store.get("promotion/gate", SECOND)
    assert last.gate == gate.digest
    decision = read_decision(gate)
    assert decision.metrics["fine_tuned"] > decision.metrics["champion"]
    again = approved.recflow("approve")
    assert again.returncode == 2
    assert "no candidate of recflow waits" in again.stderr


def test_a_worse_candidate_is_blocked_with_its_reasons(approved: World) -> None:
    done = approved.deployment().materialise(
        TRAIN, THIRD, training(learns=False, gate={"max_p99_ms": 0.0001})
    )
    assert done.returncode == 1
    assert "candidate_may_become_champion FAILED (ERROR)" in done.stderr
    assert "a loss of 0.002 cannot be excluded" in done.stderr
    assert "the limit is 0.0001 ms" in done.stderr
    assert "passed: the served model, loaded anew" in done.stderr
    assert "Traceback" not in done.stderr
    assert approved.registry.aliases() == {"champion": "2", "previous_champion": "1"}
    page = approved.deployment().store.get("promotion/gate", THIRD).file("gate.html").read_text()
    assert "fine_tuned is blocked" in page


def test_an_older_snapshot_is_not_judged_against_a_champion_that_knows_it(
    approved: World,
) -> None:
    done = approved.deployment().materialise(
        'key:"promotion/gate"', FIRST, {"promotion__gate": {"config": {"epsilon": 0.9}}}
    )
    assert done.returncode == 1
    assert "it would be asked what it has been told" in done.stderr


def test_a_second_run_of_the_same_snapshot_changes_nothing(approved: World) -> None:
    before = approved.registry.history()
    done = approved.deployment().materialise(
        "group:promotion", SECOND, {"promotion__gate": {"config": {"bootstrap_samples": 200}}}
    )
    assert done.returncode == 0, done.stderr
    assert approved.registry.history() == before
    assert approved.registry.aliases() == {"champion": "2", "previous_champion": "1"}


@contextmanager
def started(health: str, log: Path, *arguments: str, **environment: str) -> Iterator[str]:
    """Start a server of MLflow on a free port of this machine, and yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", *arguments),
                *("--host", "127.0.0.1", "--port", str(port)),
            ],
            env={
                **os.environ,
                # It starts programs of the environment by their names.
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
                "MLFLOW_DISABLE_TELEMETRY": "true",
                # Jobs of generative AI: seven processes more, for nothing.
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                **environment,
            },
            cwd=PROJECT_ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                with urllib.request.urlopen(f"{address}/{health}", timeout=5):
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.3)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def test_the_day_after_is_measured_against_the_champion(approved: World) -> None:
    done = approved.deployment().materialise("group:monitoring", THIRD)
    assert done.returncode == 0, done.stderr
    # A day of the sample has about a hundred impressions.
    assert "monitoring/drift: no_drift holds" in done.stderr
    drift = approved.deployment().store.get("monitoring/drift", THIRD)
    evidence = evidence_of(drift)
    assert (evidence.champion, evidence.champion_snapshot) == ("2", SECOND)
    assert drift.facts["judged"] is False
    assert "too few rows to judge" in str(drift.facts["state"])
    assert 0 < float(str(drift.facts["auc"])) < 1
    assert "Drift of 2024-01-14" in drift.file("drift.html").read_text()


@pytest.fixture(scope="module")
def server(approved: World) -> Iterator[str]:
    """``mlflow models serve`` of the champion, as its address."""
    registry = approved.registry
    with started(
        "ping",
        approved.home / "serve.log",
        *("models", "serve", "--model-uri", f"models:/{registry.name}@champion"),
        *("--env-manager", "local"),
        MLFLOW_TRACKING_URI=registry.store.tracking_uri,
    ) as address:
        yield address


def ask(address: str, *rows: Mapping[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(
        f"{address}/invocations",
        data=json.dumps({"dataframe_records": list(rows)}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_champion_is_served_with_exactly_the_scores_of_training(
    approved: World, server: str
) -> None:
    store = approved.deployment().store
    data = load_snapshot(store, SECOND)
    ranker = load_ranker(store.get("models/fine_tuned", SECOND).path, threads=1)
    vectors = catalogue_vectors(ranker, data.items)
    scorer = ranker.scorer("fine_tuned", data.items, vectors=vectors.__getitem__)
    test = data.splits.test.head(20)
    rows = [
        {name: row[name] for name in ("history", "candidates", "user_id")}
        for row in test.iter_rows(named=True)
    ]
    status, answers = ask(server, *rows)
    assert status == 200, answers
    for number, answer in enumerate(answers["predictions"]):
        own = np.array(scorer.score(test[number])[0].to_list())
        assert np.array_equal(np.array(answer["scores"]), own)
        assert answer["ranking"][0] == rows[number]["candidates"][int(own.argmax())]
        assert all(0 < p < 1 for p in answer["click_probabilities"])


def test_the_server_ranks_new_items_and_names_those_it_does_not_know(server: str) -> None:
    new = {"item_id": "tomorrow", "title": "A title of tomorrow", "category": "news"}
    status, answers = ask(server, {"history": [], "candidates": ["tomorrow"], "new_items": [new]})
    assert status == 200, answers
    assert answers["predictions"][0]["ranking"] == ["tomorrow"]
    status, answer = ask(server, {"history": [], "candidates": ["tomorrow"]})
    assert status == 400
    assert "item 'tomorrow' of candidates is not in the catalogue" in answer["message"]


# Last: what follows changes what users get.
def test_a_rollback_by_command_and_one_by_job(approved: World) -> None:
    done = approved.recflow("rollback", "--reason", "clicks fell")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The champion is version 1; before, it was version 2\n"
    assert approved.registry.aliases() == {"champion": "1", "previous_champion": "2"}
    champion = approved.registry.champion(approved.home / "fetched")
    assert champion is not None
    assert champion.snapshot == FIRST

    config = approved.home / "rollback.yaml"
    reason = {"reason": "it was the weather"}
    config.write_text(json.dumps({"ops": {"roll_back_champion": {"config": reason}}}))
    done = approved.run(
        *("-m", "dagster", "job", "execute", "-m", "recflow.definitions", "-j", "rollback"),
        *("--config", str(config)),
    )
    assert done.returncode == 0, done.stderr
    assert approved.registry.aliases() == {"champion": "2", "previous_champion": "1"}
    last = approved.registry.history()[-1]
    assert (last.action, last.reason) == ("rolled_back", "it was the weather")
    assert last.run


def test_a_server_keeps_the_registry_as_a_file_does(tmp_path: Path) -> None:
    with started(
        "health",
        tmp_path / "server.log",
        *("server", "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"),
        *("--artifacts-destination", str(tmp_path / "artifacts"), "--workers", "1"),
    ) as address:
        there = RegistryWorld(tmp_path, MlflowStore(address, "tests"), "recflow")
        assert there.registry.champion(there.cache) is None
        first, second = there.promoted("a"), there.promoted("b")
        assert there.served() == "b"
        assert there.registry.aliases() == {"champion": second, "previous_champion": first}
        there.registry.rollback(WHY)
        assert there.served() == "a"
        assert [event[0] for event in there.events()] == [
            *("registered", "promoted", "registered", "promoted", "rolled_back")
        ]

"""The whole lineage in real processes, as a newcomer and as continuous integration run it."""

import json
import shutil
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest

from recflow.compression.family import load_family
from recflow.settings import PROJECT_ROOT
from recflow_tests.integration.deployment import (
    LAST_DAY,
    QUICK,
    TRAIN,
    Deployment,
    days,
)

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

FAMILY = load_family()
TABLES = [
    f"{stage}/{t}" for stage in ("raw", "cleaned", "features") for t in ("impressions", "items")
]
REPEATABLE = [
    *("splits/train", "splits/validation", "splits/test", "splits/items"),
    *(FAMILY.key(name) for name in FAMILY.names),
    "models/item_vectors",
    "evaluation/predictions",
]
SCORERS = {
    *("random", "category_share", "text_similarity", "popularity", "oracle"),
    *("popularity_decayed_4h_delay_1440min", "popularity_decayed_4h_delay_10min"),
    *FAMILY.names,
    *("fine_tuned_vectors_int8", "fine_tuned_vectors_pq"),
}


@pytest.fixture(scope="module")
def trained(ingested: Deployment) -> Deployment:
    done = ingested.materialise(TRAIN, str(LAST_DAY), QUICK)
    assert done.returncode == 0, done.stderr
    return ingested


def test_every_day_is_stored_and_accounted_for(ingested: Deployment) -> None:
    for table in TABLES:
        assert list(ingested.store.existing(table, days())) == days()
    logged = len((PROJECT_ROOT / "data/sample/behaviors.tsv").read_text().splitlines())
    cleaned = ingested.store.existing("cleaned/impressions", days()).values()
    assert sum(a.facts["rows"] + a.facts["quarantined"] for a in cleaned) == logged  # type: ignore[operator]


def test_every_validation_is_kept_with_its_day(ingested: Deployment) -> None:
    for table in ("features/impressions", "features/items"):
        validations = ingested.store.existing(f"validations/{table}", days())
        assert list(validations) == days()
        for day, validation in validations.items():
            assert validation.facts["success"] is True
            assert day in validation.file("summary.html").read_text()


def test_report_shows_every_scorer_with_intervals(trained: Deployment) -> None:
    report = trained.store.get("evaluation/report", str(LAST_DAY))
    content = json.loads(report.file("report.json").read_text())
    scorers = {entry["name"]: entry for entry in content["scorers"]}
    assert set(scorers) == SCORERS
    for entry in scorers.values():
        auc = entry["metrics"]["auc"]
        assert auc["low"] <= auc["value"] <= auc["high"]
    page = report.file("report.html").read_text()
    assert all(name in page for name in SCORERS)
    assert "http-equiv" in page
    measured = {name for name, entry in scorers.items() if entry["cost"] is not None}
    assert measured == set(FAMILY.names)


def test_training_is_one_finished_mlflow_run(trained: Deployment) -> None:
    database = sqlite3.connect(trained.home / "mlflow" / "mlflow.db")
    runs = database.execute("select run_uuid, status from runs").fetchall()
    assert [status for _, status in runs] == ["FINISHED"]
    (run, _) = runs[0]
    metrics = {k for (k,) in database.execute("select distinct key from metrics")}
    assert any(key.startswith("fine_tuned.") for key in metrics)
    assert any(key.startswith("report.") for key in metrics)
    tags = dict(database.execute("select key, value from tags where run_uuid = ?", (run,)))
    assert tags["dagster_run_id"]
    assert {n for (n,) in database.execute("select name from datasets")} >= {"splits/train"}


def test_second_run_repeats_nothing(trained: Deployment) -> None:
    def made() -> dict[Path, str]:
        manifests = sorted((trained.home / "store").rglob("manifest.json"))
        return {path: path.read_text() for path in manifests}

    before = made()
    done = trained.materialise(TRAIN, str(LAST_DAY), QUICK)
    assert done.returncode == 0, done.stderr
    assert made() == before


def test_killed_run_leaves_nothing_half_and_reruns_to_the_same_result(
    trained: Deployment, tmp_path: Path
) -> None:
    second = Deployment(tmp_path, trained.base_model)
    for table in [*TABLES, "validations/features/impressions", "validations/features/items"]:
        shutil.copytree(trained.store.root / table, second.store.root / table)

    process = subprocess.Popen(
        second.command(TRAIN, str(LAST_DAY), QUICK),
        env=second.environment(),
        cwd=PROJECT_ROOT,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    checkpoints = second.home / "checkpoints" / "models" / "fine_tuned"
    deadline = time.monotonic() + 300
    while not list(checkpoints.glob("*/newest")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not second.store.path("models/fine_tuned", str(LAST_DAY)).exists()

    done = second.materialise(TRAIN, str(LAST_DAY), QUICK)
    assert done.returncode == 0, done.stderr
    fine_tuned = second.store.get("models/fine_tuned", str(LAST_DAY))
    assert fine_tuned.facts["resumed_at_step"] > 0  # type: ignore[operator]
    assert second.digests(*REPEATABLE) == trained.digests(*REPEATABLE)
    assert not list(checkpoints.iterdir())


def test_the_report_shows_the_family_as_a_tree_with_its_frontier(trained: Deployment) -> None:
    report = trained.store.get("evaluation/report", str(LAST_DAY))
    (board,) = json.loads(report.file("report.json").read_text())["compression"]
    members = {member["name"]: member for member in board["members"]}
    assert set(members) == set(FAMILY.names)
    assert members["distilled_trimmed_quantized"]["parent"] == "distilled_trimmed"
    verdicts = {member["verdict"] for member in members.values()}
    assert "frontier" in verdicts
    assert "unjudged" not in verdicts
    for name in FAMILY.variants:
        change = members[name]["against_root"]["difference"]
        assert change["low"] <= change["value"] <= change["high"]


def test_the_report_prices_every_model_and_shows_what_was_predicted(trained: Deployment) -> None:
    report = trained.store.get("evaluation/report", str(LAST_DAY))
    costs = json.loads(report.file("report.json").read_text())["costs"]
    devices = [device["name"] for device in costs["devices"]]
    assert [model["name"] for model in costs["models"]] == FAMILY.names
    for model in costs["models"]:
        assert [cost["device"] for cost in model["serving"]] == devices
        assert model["cheapest_serving"] in devices
        assert model["cheapest_training"] in devices
        assert model["measured_training_seconds"] > 0
    predicted = {
        (row["model"], row["run"]) for row in costs["compared"] if row["predicted"] is not None
    }
    assert {("fine_tuned", "training"), *((n, "inference") for n in FAMILY.names)} <= predicted
    assert not any("No prediction was kept" in note for note in costs["notes"])


# Last, because what it makes is judged with the other models from then on.
def test_a_model_found_for_a_budget_joins_the_report(trained: Deployment) -> None:
    limits = {"max_megabytes": 0.5, "max_auc_loss": 0.9}
    space = {"distill_layers": [0], "prune_shares": [1.0], "trim": [True]}
    config = {"models__compressed": {"config": {**limits, **space}}}
    done = trained.materialise('key:"models/compressed"', str(LAST_DAY), config)
    assert done.returncode == 0, done.stderr
    assert "models/compressed: meets_budget holds" in done.stderr
    found = trained.store.get("models/compressed", str(LAST_DAY))
    assert found.facts["chain"] == ["trim", "quantize int8_static"]

    done = trained.materialise("group:evaluation", str(LAST_DAY), QUICK)
    assert done.returncode == 0, done.stderr
    report = trained.store.get("evaluation/report", str(LAST_DAY))
    (board,) = json.loads(report.file("report.json").read_text())["compression"]
    assert {member["name"] for member in board["members"]} == {*FAMILY.names, "compressed"}

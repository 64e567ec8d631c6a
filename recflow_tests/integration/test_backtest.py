"""The command ``recflow backtest`` on a tiny encoder, with the drift, trigger and gate that run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recflow.data.sources.simulated import SimulationConfig, simulate
from recflow.data.sources.simulation import ColdUsers, TopicSurge
from recflow.settings import PROJECT_ROOT
from recflow_tests.unit.modeling.tiny import write_base_model

pytestmark = pytest.mark.integration

LOG = SimulationConfig(
    seed=3,
    days=10,
    impressions=4_000,
    users=1_500,
    items_per_day=60,
    topic_surge=TopicSurge(day=5, topic="sports", factor=20.0),
    cold_users=ColdUsers(day=0, share=0.7),
)


def test_a_surge_is_noticed_followed_up_and_reported(tmp_path: Path) -> None:
    write_base_model(tmp_path / "encoder")
    simulate(LOG, tmp_path / "logs")
    command = [sys.executable, "-m", "recflow.cli", "backtest", "--data", "simulated"]
    command += ["--dir", str(tmp_path / "logs"), "--work", str(tmp_path / "work")]
    command += ["--base-model", str(tmp_path / "encoder"), "--window-days", "5"]
    command += ["--set", "max_tokens=16", "--set", "user_model.history_length=10"]

    finished = subprocess.run(
        command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr

    page = Path(finished.stdout.rpartition("Report: ")[2].strip())
    assert page.is_relative_to(tmp_path / "work" / "report")
    document = json.loads(page.with_name("backtest.json").read_text(encoding="utf-8"))
    (log,) = document["logs"]
    policies = {policy["name"]: policy for policy in log["policies"]}
    assert list(policies) == ["never", "nightly", "drift", "evenly_spaced"]
    assert policies["nightly"]["runs"] == 4
    # The surge begins on the first day that is walked, while older items still fill most slates;
    # two alarming days make a run.
    first = policies["drift"]["trainings"][0]
    assert first["day"] in {"2024-01-07", "2024-01-08"}
    assert "category_clicked on 2 days" in first["reason"]
    assert policies["drift"]["runs"] <= 3
    assert policies["evenly_spaced"]["runs"] == policies["drift"]["runs"]
    for policy in policies.values():
        assert all(day["snapshot"] < day["day"] for day in policy["days"])
    assert {path.name for path in page.parent.iterdir()} == {
        "backtest.html",
        "backtest.json",
        "backtest.txt",
        "backtest_simulated_auc.png",
        "backtest_simulated_ndcg10.png",
    }

    again = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "training on" not in again.stdout
    assert "measuring" not in again.stdout
    assert (
        page.with_name("backtest.json").read_text(encoding="utf-8")
        == json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    )

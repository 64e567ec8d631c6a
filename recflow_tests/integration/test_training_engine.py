"""What the training engine can do, started from Dagster as its users start it."""

import json
from pathlib import Path
from typing import Any

import pytest

from recflow.modeling.ranker import load_ranker
from recflow_tests.integration.deployment import LAST_DAY, QUICK, Deployment

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

COMMON = QUICK["models__fine_tuned"]["config"]
FINE_TUNED = 'key:"models/fine_tuned"'


@pytest.fixture(scope="module")
def split(ingested: Deployment) -> Deployment:
    done = ingested.materialise("group:splits", str(LAST_DAY))
    assert done.returncode == 0, done.stderr
    return ingested


def materialise(deployment: Deployment, key: str, config: dict[str, Any]) -> dict[str, Any]:
    """Make one asset and return the facts of its artifact."""
    op = key.replace("/", "__")
    done = deployment.materialise(f'key:"{key}"', str(LAST_DAY), {op: {"config": config}})
    assert done.returncode == 0, done.stderr
    return deployment.store.get(key, str(LAST_DAY)).facts


def test_two_processes_train_with_lora(split: Deployment) -> None:
    config = {
        **COMMON,
        "tuning": {"strategy": "lora", "tuned_layers": 1, "rank": 4},
        "distribution": {"processes": 2},
        "configuration": "ignore",
    }
    facts = materialise(split, "models/fine_tuned", config)
    assert (facts["strategy"], facts["processes"]) == ("lora", 2)
    assert load_ranker(split.store.path("models/fine_tuned", str(LAST_DAY)), threads=1)
    stored = json.loads(
        (split.store.path("models/fine_tuned", str(LAST_DAY)) / "manifest.json").read_text()
    )
    assert stored["config"]["tuning"]["rank"] == 4


def test_training_reads_what_the_search_found(split: Deployment) -> None:
    found = materialise(
        split,
        "models/configuration",
        {
            **COMMON,
            "minutes": 5.0,
            "max_trials": 3,
            "space": {"objective.negatives": {"choices": [2, 6]}},
        },
    )
    assert len(found["trial_seconds"]) == 3
    artifact = split.store.get("models/configuration", str(LAST_DAY))
    facts = materialise(split, "models/fine_tuned", COMMON)
    assert facts["strategy"] == "top_k_layers"
    manifest = split.store.get("models/fine_tuned", str(LAST_DAY)).manifest
    assert manifest.parents["models/configuration"] == artifact.digest


def test_adapting_the_encoder_helps_or_not_and_says_so(split: Deployment) -> None:
    adapted = materialise(split, "models/adapted_encoder", {"max_tokens": 32, "max_steps": 4})
    assert adapted["held_out_loss"] <= adapted["held_out_loss_before"]
    facts = materialise(split, "studies/label_efficiency", {**COMMON, "shares": [0.1, 1.0]})
    assert len(facts["rows"]) == 2
    facts = materialise(
        split, "models/fine_tuned", {**COMMON, "start_from": "adapted", "configuration": "ignore"}
    )
    parents = split.store.get("models/fine_tuned", str(LAST_DAY)).manifest.parents
    assert "models/adapted_encoder" in parents


def test_strategies_are_compared_in_one_table(split: Deployment, tmp_path: Path) -> None:
    facts = materialise(
        split, "studies/strategies", {**COMMON, "strategies": ["frozen", "adapters"]}
    )
    rows = {row["strategy"]: row for row in facts["rows"]}
    assert set(rows) == {"frozen", "adapters"}
    assert rows["frozen"]["trainable_parameters"] < rows["adapters"]["trainable_parameters"]
    assert rows["frozen"]["gain"] is None
    assert rows["adapters"]["gain"]["low"] <= rows["adapters"]["gain"]["high"]

"""The assets of the training engine, run by Dagster on a stored snapshot with a tiny encoder."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from recflow.adapters import planning
from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.keys import (
    ADAPTED_ENCODER,
    CONFIGURATION,
    FINE_TUNED,
    LABEL_EFFICIENCY_STUDY,
    STRATEGIES_STUDY,
)
from recflow.defs.models import assets as models
from recflow.defs.resources import BaseModelResource, StoreResource
from recflow.defs.search import assets as search
from recflow.defs.studies import assets as studies
from recflow.defs.tracking import mlflow_resource
from recflow.hardware.machine import FreeMemory
from recflow.settings import load_settings
from recflow_tests.unit.adapters.tiny_snapshot import store_snapshot
from recflow_tests.unit.modeling.tiny import write_base_model

pytestmark = [
    # MLflow 3.17 with SQLAlchemy 2.1; nothing of ours can avoid it.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
    pytest.mark.filterwarnings("ignore:Parameter `allow_nonexistent_upstream_partitions`"),
]

DAY, NEXT_DAY = "2024-01-10", "2024-01-11"
ASSETS = [
    models.fine_tuned,
    search.configuration,
    studies.adapted_encoder,
    studies.label_efficiency,
    studies.strategies,
]
# Enough to run every line, not enough to learn much.
TINY: dict[str, Any] = {
    "max_tokens": 16,
    "tuning": {"tuned_layers": 1},
    "user_model": {"history_length": 5},
    "schedule": {"head_epochs": 1, "encoder_epochs": 1},
}


class Deployment:
    """A store with two days' snapshots, and Dagster on it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.store = ArtifactStore(home / "store")
        self.base_model = write_base_model(home / "base")
        for day, seed in ((DAY, 1), (NEXT_DAY, 5)):
            store_snapshot(self.store, day, seed=seed)

    def run(
        self, key: str, config: Mapping[str, Any], day: str = DAY, *, fails: bool = False
    ) -> dict[str, Any]:
        """Materialise one asset; its metadata, or the error's sentence."""
        result = dg.materialize(
            ASSETS,
            selection=dg.AssetSelection.assets(key.split("/")),
            partition_key=day,
            run_config={"ops": {key.replace("/", "__"): {"config": dict(config)}}},
            resources={
                "store": StoreResource(root=str(self.store.root)),
                "base_model": BaseModelResource(name=str(self.base_model)),
                "mlflow": mlflow_resource.configured(
                    {
                        "tracking_uri": f"sqlite:///{self.home / 'mlflow.db'}",
                        "experiment_name": "tests",
                    }
                ),
            },
            raise_on_error=not fails,
        )
        assert result.success != fails
        if fails:
            (failure,) = result.get_step_failure_events()
            assert failure.step_failure_data.error is not None
            return {"error": str(failure.step_failure_data.error)}
        (event,) = result.get_asset_materialization_events()
        metadata = event.materialization.metadata
        return {name: value.value for name, value in metadata.items()}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for module in (models, search, studies):
            patch.setattr(module, "settings", load_settings(home=home, threads=1))
        yield Deployment(home)


@pytest.fixture(scope="module")
def searched(deployment: Deployment) -> dict[str, Any]:
    space = {"user_model.dropout": {"low": 0.0, "high": 0.4}, "tuning.rank": {"choices": [2, 4]}}
    return deployment.run(CONFIGURATION, {**TINY, "max_trials": 2, "minutes": 5, "space": space})


def test_the_found_configuration_is_read_and_set_values_win(
    deployment: Deployment, searched: dict[str, Any]
) -> None:
    found = searched["values"]
    assert set(found) <= {"user_model.dropout", "tuning.rank"}
    assert "| trial | state | auc |" in searched["trials_table"]

    shown = deployment.run(FINE_TUNED, {**TINY, "tuning": {"tuned_layers": 1, "rank": 3}})
    assert shown["configuration_found_in"] == DAY
    in_force = shown["values_that_differ_from_the_defaults"]
    assert in_force == {**found, "tuning.rank": 3, **_flat(TINY)}
    manifest = deployment.store.get(FINE_TUNED, DAY).manifest
    assert manifest.parents[CONFIGURATION] == deployment.store.get(CONFIGURATION, DAY).digest
    config: Any = manifest.config
    assert config["tuning"]["rank"] == 3
    if found:
        assert config["user_model"]["dropout"] == found["user_model.dropout"]


def test_later_days_read_it_too_unless_told_not_to(
    deployment: Deployment, searched: dict[str, Any]
) -> None:
    assert deployment.run(FINE_TUNED, TINY, NEXT_DAY)["configuration_found_in"] == DAY
    shown = deployment.run(FINE_TUNED, {**TINY, "configuration": "ignore"}, NEXT_DAY)
    assert shown["configuration_found_in"] == "none"
    assert shown["values_that_differ_from_the_defaults"] == _flat(TINY)
    assert CONFIGURATION not in deployment.store.get(FINE_TUNED, NEXT_DAY).manifest.parents


def test_training_starts_from_the_adapted_encoder_when_told(deployment: Deployment) -> None:
    refused = deployment.run(FINE_TUNED, {**TINY, "start_from": "adapted"}, NEXT_DAY, fails=True)
    assert "materialise it first" in refused["error"]
    deployment.run(ADAPTED_ENCODER, {"max_steps": 3, "max_tokens": 16, "batch_size": 8}, NEXT_DAY)
    deployment.run(FINE_TUNED, {**TINY, "start_from": "adapted"}, NEXT_DAY)
    adapted = deployment.store.get(ADAPTED_ENCODER, NEXT_DAY)
    assert deployment.store.get(FINE_TUNED, NEXT_DAY).manifest.parents[ADAPTED_ENCODER] == (
        adapted.digest
    )


def test_values_that_do_not_go_together_end_the_step_with_a_sentence(
    deployment: Deployment,
) -> None:
    config = {"tuning": {"strategy": "adalora", "rank": 30}, "configuration": "ignore"}
    refused = deployment.run(FINE_TUNED, config, fails=True)
    assert "initial_rank = 24 is not allowed; allowed: more than rank 30" in refused["error"]


def test_what_was_planned_is_shown_beside_what_was_measured(deployment: Deployment) -> None:
    shown = deployment.run(FINE_TUNED, {**TINY, "configuration": "ignore", "rebuild": True})
    facts = deployment.store.get(FINE_TUNED, DAY).facts
    rows: Any = facts["plan"]
    compared = {row["name"]: row for row in rows}
    assert compared.keys() >= {"head step", "encoder step", "training"}
    assert shown["plan"].startswith("| | predicted | measured | error |")
    assert all(f"\n| {name} | " in shown["plan"] for name in compared)
    step = compared["encoder step"]
    assert shown["predicted_step_seconds"] == step["predicted"] > 0
    assert shown["measured_step_seconds"] == step["measured"] > 0
    if peak := compared.get("peak memory"):  # this process may have held more before
        assert shown["predicted_peak_memory_bytes"] == peak["predicted"]
        assert shown["measured_peak_memory_bytes"] == facts["peak_rss_bytes"]


def test_a_training_without_memory_is_refused_unless_told_to_go_on(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stored() -> list[Path]:
        return sorted(path for path in (deployment.home / "store").rglob("*") if path.is_file())

    monkeypatch.setattr(planning, "free_memory", lambda _: FreeMemory(1_000))
    monkeypatch.setattr(planning, "own_memory", lambda: 0)
    config = {**TINY, "configuration": "ignore", "tuning": {"tuned_layers": 1, "rank": 5}}
    before = stored()
    refusal = r"HardwareError: this training needs .* set memory: go_on"
    for key in (FINE_TUNED, CONFIGURATION, STRATEGIES_STUDY):
        own = config if key == FINE_TUNED else {**TINY, "tuning": {"rank": 5}}
        refused = deployment.run(key, own, NEXT_DAY, fails=True)
        (sentence,) = re.findall(refusal, refused["error"])
        assert "the largest part is " in sentence
        assert stored() == before

    shown = deployment.run(FINE_TUNED, {**config, "memory": "go_on"}, NEXT_DAY)
    told = deployment.store.get(FINE_TUNED, NEXT_DAY)
    assert shown["digest"] == told.digest
    assert "memory" not in told.manifest.config
    monkeypatch.undo()
    again = deployment.run(FINE_TUNED, {**config, "rebuild": True}, NEXT_DAY)
    assert again["digest"] == told.digest
    assert deployment.store.get(FINE_TUNED, NEXT_DAY).manifest.fingerprint == (
        told.manifest.fingerprint
    )


@pytest.mark.integration
def test_the_studies_print_their_tables(deployment: Deployment) -> None:
    deployment.run(ADAPTED_ENCODER, {"max_steps": 3, "max_tokens": 16, "batch_size": 8})
    labels = deployment.run(
        LABEL_EFFICIENCY_STUDY, {**TINY, "shares": [0.5, 1.0], "bootstrap_samples": 50}
    )
    assert labels["table"].startswith("| labels |")
    strategies = deployment.run(
        STRATEGIES_STUDY, {**TINY, "strategies": ["frozen", "lora"], "bootstrap_samples": 50}
    )
    heads, _, frozen, lora = strategies["table"].splitlines()
    assert heads.startswith("| strategy | learns |")
    assert frozen.startswith("| frozen |")
    assert "| 5e-04 |" in lora
    rows: list[Any] = strategies["rows"]
    assert rows[0]["trainable_parameters"] < rows[1]["trainable_parameters"] < 20_000
    assert all(row["seconds"] > 0 and row["clicks_per_second"] > 0 for row in rows)
    assert rows[0]["gain"] is None
    gain = rows[1]["gain"]
    assert gain["low"] <= gain["value"] <= gain["high"]
    assert gain["value"] == pytest.approx(rows[1]["auc"]["value"] - rows[0]["auc"]["value"])


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": found for inner, found in value.items()}
        else:
            flat[key] = value
    return flat

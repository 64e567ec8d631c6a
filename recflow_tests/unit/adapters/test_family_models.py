"""The family of smaller models on a stored snapshot: made from its parent, or refused."""

from pathlib import Path
from typing import Any

import pytest

from recflow.adapters import planning, step_plans
from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.budget_search import (
    BudgetSearchConfig,
    budget_claim,
    budget_table,
    build_compressed,
)
from recflow.adapters.keys import COMPRESSED, FINE_TUNED, TEST, TRAIN
from recflow.adapters.models import build_fine_tuned, build_variant, open_models
from recflow.adapters.planning import PlanningConfig, compared_facts
from recflow.adapters.snapshots import load_snapshot
from recflow.compression.budget import Budget, ChainSpace
from recflow.compression.config import QuantizationConfig
from recflow.compression.family import Family, family_from, with_deployment
from recflow.core.artifacts import Artifact
from recflow.core.errors import ArtifactError, ConfigError, HardwareError, ParityError
from recflow.hardware.machine import FreeMemory
from recflow.modeling.ranker import load_ranker
from recflow.modeling.tracking import NullTracker
from recflow_tests.unit.adapters.tiny_snapshot import store_snapshot
from recflow_tests.unit.modeling.tiny import quick, write_base_model

DAY = "2024-01-10"
FAMILY = family_from(
    {
        "trimmed": {"parent": "fine_tuned", "step": "trim"},
        "small": {"parent": "trimmed", "step": "quantize"},
    }
)
# No latency limit: what a test asserts must not depend on the clock.
SPACE = ChainSpace(distill_layers=(0, 1), prune_shares=(1.0,), trim=(True,))
SEARCH = BudgetSearchConfig(bootstrap_samples=20, texts=16, threads=1)


class World:
    """A store with a snapshot and a fine-tuned model."""

    def __init__(self, folder: Path) -> None:
        self.base_model = write_base_model(folder / "base")
        self.store = ArtifactStore(folder / "store")
        store_snapshot(self.store, DAY)
        self.fine_tune()

    def fine_tune(self, **values: Any) -> Artifact:
        once = {"schedule.head_epochs": 1, "schedule.encoder_epochs": 1}
        return build_fine_tuned(
            self.store,
            DAY,
            base_model=self.base_model,
            config=quick({**once, **values}),
            tracker=NullTracker(),
            code_version="1",
        )

    def make(
        self, name: str, family: Family = FAMILY, config: Any = None, **options: Any
    ) -> Artifact:
        variant = family.variants[name]
        return build_variant(
            self.store,
            DAY,
            family,
            name,
            config=config or with_deployment(variant.config, seed=0, threads=1),
            tracker=NullTracker(),
            code_version="1",
            **options,
        )

    def search(self, budget: Budget, space: ChainSpace = SPACE) -> Artifact:
        return build_compressed(
            self.store,
            DAY,
            budget=budget,
            space=space,
            config=SEARCH,
            tracker=NullTracker(),
            code_version="1",
        )


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> World:
    """For tests that add models and change none."""
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_each_model_of_a_chain_names_its_parent(shared: World) -> None:
    trimmed, small = shared.make("trimmed"), shared.make("small")
    root = shared.store.get(FINE_TUNED, DAY)
    assert trimmed.manifest.parents[FINE_TUNED] == root.digest
    assert small.manifest.parents["models/trimmed"] == trimmed.digest
    assert FINE_TUNED not in small.manifest.parents
    assert TEST not in small.manifest.parents  # a model never depends on the test split
    assert small.manifest.config["step"] == "quantize"
    assert shared.make("small").reused
    stored = load_snapshot(shared.store, DAY)
    assert list(open_models(shared.store, DAY, stored, FAMILY)) == FAMILY.names
    assert load_ranker(small.path).encode(["sea0 the"]).shape == (1, 32)


def test_steps_are_planned_before_and_measured_after(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_plans, "free_memory", lambda: FreeMemory(1_000))
    monkeypatch.setattr(planning, "own_memory", lambda: 0)
    refusal = r"the step trim needs .* of memory and \S+ GiB are left for it; the largest part is"
    with pytest.raises(HardwareError, match=refusal) as refused:
        world.make("trimmed")
    assert str(refused.value).endswith("to start all the same, set memory: go_on")
    assert not world.store.path("models/trimmed", DAY).exists()

    told = world.make("trimmed", planning=PlanningConfig(memory="go_on"))
    monkeypatch.undo()
    small = world.make("small")
    for model in (told, small):
        compared = {row.name: row for row in compared_facts(model.facts)}
        assert compared["training"].predicted > 0
        assert compared["training"].measured >= model.facts["seconds"]  # type: ignore[operator]
        assert model.facts["planned_memory_parts"]["context"] > 0  # type: ignore[index, call-overload]
        assert "memory" not in model.manifest.config
    assert world.make("trimmed", rebuild=True).digest == told.digest


def test_a_parent_that_is_not_there_is_named(world: World) -> None:
    with pytest.raises(ArtifactError, match=r"models/trimmed.*materialise it first"):
        world.make("small")


def test_an_altered_parent_is_refused(world: World) -> None:
    weights = world.store.path(FINE_TUNED, DAY) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(ArtifactError, match="was altered"):
        world.make("trimmed")
    assert not world.store.path("models/trimmed", DAY).exists()


def test_a_parent_made_from_another_grandparent_is_refused(world: World) -> None:
    world.make("trimmed")
    world.fine_tune(**{"optimiser.head_learning_rate": 3e-3})
    with pytest.raises(ArtifactError, match="made from another models/fine_tuned than the stored"):
        world.make("small")
    world.make("trimmed")
    world.make("small")


def test_a_parent_made_from_other_splits_is_refused(world: World) -> None:
    store_snapshot(world.store, DAY, train=150)
    with pytest.raises(ArtifactError, match=f"made from another {TRAIN} than the stored"):
        world.make("trimmed")


def test_a_variant_that_breaks_parity_is_not_stored(shared: World) -> None:
    family = family_from({"broken": {"parent": "fine_tuned", "step": "quantize"}})
    # No float32 export is exact to the last bit.
    config = QuantizationConfig(parity_tolerance=1e-12, threads=1)
    with pytest.raises(ParityError):
        shared.make("broken", family, config)
    assert not shared.store.path("models/broken", DAY).exists()
    stored = load_snapshot(shared.store, DAY)
    with pytest.raises(ArtifactError, match="materialise it first"):
        open_models(shared.store, DAY, stored, family)


def test_the_first_chain_within_the_budget_is_stored(shared: World) -> None:
    found = shared.search(Budget(max_megabytes=1.0, max_auc_loss=0.9))
    assert found.facts["chain"] == ["trim", "quantize int8_static"]
    assert found.facts["meets_budget"] is True
    assert budget_claim(found).holds
    notes = [trial["note"] for trial in found.facts["trials"]]  # type: ignore[index, union-attr]
    assert notes == ["", "not needed"]
    assert found.manifest.parents[FINE_TUNED] == shared.store.get(FINE_TUNED, DAY).digest
    made = shared.store.get("searched/trim_int8_static", DAY)
    assert (found.path / "model.onnx").read_bytes() == (made.path / "model.onnx").read_bytes()
    assert load_ranker(found.path).encode(["sea0 the"]).shape == (1, 32)
    table = budget_table(found).splitlines()
    assert table[0].startswith("| chain | max_auc_loss | max_megabytes |")
    assert "**trim → quantize int8_static**" in table[3]
    assert shared.store.get(COMPRESSED, DAY).digest == found.digest


def test_an_infeasible_budget_says_so_and_shows_the_nearest(shared: World) -> None:
    found = shared.search(Budget(max_megabytes=1e-6))
    assert found.facts["meets_budget"] is False
    # All are too large by the forecast; the smallest of them was made all the same.
    assert found.facts["chain"] == ["distill 1", "trim", "quantize int8_static"]
    claim = budget_claim(found)
    assert not claim.holds
    assert "no chain meets the budget; the nearest, distill 1 → trim" in claim.description
    assert claim.facts["exceeds_max_megabytes"] > 1_000  # type: ignore[operator]
    assert "too large by the forecast" in budget_table(found)


def test_a_space_that_does_not_fit_is_refused_before_work(shared: World) -> None:
    with pytest.raises(ConfigError, match="fewer than the 2 layers"):
        shared.search(Budget(max_megabytes=1.0), ChainSpace(distill_layers=(2,)))

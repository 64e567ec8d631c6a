"""Costs of a stored family: every model on every device, beside what was measured."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.costs import Demand, PriceList, cost_section
from recflow.adapters.evaluations import (
    ScoringConfig,
    build_predictions,
    build_report,
    report_context,
)
from recflow.adapters.item_vectors import build_vector_stores
from recflow.adapters.keys import MEASUREMENTS, REPORT
from recflow.adapters.models import open_models
from recflow.adapters.planning import measured_facts
from recflow.adapters.snapshots import load_snapshot
from recflow.compression.config import VectorStoreConfig
from recflow.compression.family import family_from
from recflow.core.artifacts import Artifact
from recflow.core.cost import CostSection, ModelCost, cheapest
from recflow.core.errors import ConfigError
from recflow.core.measurement import Energy, Measurement
from recflow.evaluation.evaluator import EvaluationConfig
from recflow.hardware.calibration import default_calibration, save_calibration
from recflow.hardware.catalogue import load_catalogue
from recflow.hardware.plan import Measured
from recflow_tests.unit.adapters.test_family_models import DAY, World
from recflow_tests.unit.adapters.test_stored_measurements import MEASURED

FAMILY = family_from(
    {
        "trimmed": {"parent": "fine_tuned", "step": "trim"},
        "small": {"parent": "trimmed", "step": "quantize"},
    }
)
_PLANNED = ("plan", "planned_step")
ENERGY = Energy(2.0, "RAPL: package-0")
SPEED = Measured("throughput", "texts/s", 120.0, 100.0)
MEMORY = Measured("peak memory", "bytes", 3.9e8, 4e8)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tmp_path_factory.mktemp("world"))
    for name in FAMILY.variants:
        made.make(name, FAMILY)
    return made


@pytest.fixture(scope="module")
def models(world: World) -> dict[str, Artifact]:
    return open_models(world.store, DAY, load_snapshot(world.store, DAY), FAMILY)


@pytest.fixture(scope="module")
def plan(world: World, models: dict[str, Artifact]) -> Callable[..., CostSection]:
    def planned(prices: PriceList | None = None, **values: Any) -> CostSection:
        asked: dict[str, Any] = {
            "family": FAMILY,
            "models": models,
            "data": load_snapshot(world.store, DAY),
            "measurements": measurements(),
            "measured_plans": {"small": measured_facts([SPEED, MEMORY])["plan"]},
            "prices": prices or PriceList.read(),
        }
        return cost_section(**{**asked, **values})

    return planned


@pytest.fixture(scope="module")
def section(plan: Callable[..., CostSection]) -> CostSection:
    return plan()


def measurements() -> list[Measurement]:
    return [replace(MEASURED, name=name, energy=ENERGY) for name in FAMILY.names]


def model_of(section: CostSection, name: str) -> ModelCost:
    (found,) = [model for model in section.models if model.name == name]
    return found


def own_catalogue(file: Path, text: str) -> PriceList:
    file.write_text(text, encoding="utf-8")
    return PriceList.read(file)


def test_every_model_is_planned_on_every_device(section: CostSection) -> None:
    devices = list(load_catalogue())
    assert [device.name for device in section.devices] == devices
    assert [model.name for model in section.models] == FAMILY.names
    for model in section.models:
        assert [cost.device for cost in model.serving] == devices
        assert model.note == ""
        for cost in model.serving:
            assert 0 < cost.texts_per_second <= cost.limit_texts_per_second
            assert cost.fits
        for run in model.training:
            assert 0 < run.limit_seconds <= run.seconds
    root, *others = (tuple(cost.device for cost in model.training) for model in section.models)
    assert list(root) == devices
    # Steps that make smaller models run on processors.
    processors = tuple(name for name, device in load_catalogue().items() if not device.is_gpu)
    assert others == [processors] * 2
    assert sum("not planned for GPUs" in note for note in section.notes) == 1


def test_prices_follow_from_time_and_the_hourly_price(section: CostSection) -> None:
    catalogue = load_catalogue()
    for model in section.models:
        for cost in model.serving:
            device, seconds = catalogue[cost.device], 1e6 / cost.recommendations_per_second
            assert cost.usd == pytest.approx(seconds / 3_600 * device.price.usd_per_hour)
            assert cost.watt_hours == pytest.approx(seconds / 3_600 * device.watts)


def test_a_smaller_model_is_cheaper_to_serve(section: CostSection) -> None:
    (root,) = [c for c in model_of(section, "fine_tuned").serving if c.device == "cpu-8"]
    (small,) = [c for c in model_of(section, "small").serving if c.device == "cpu-8"]
    assert small.memory_bytes < root.memory_bytes
    assert small.usd < root.usd


def test_a_lower_price_is_a_lower_cost(
    plan: Callable[..., CostSection], section: CostSection, tmp_path: Path
) -> None:
    text = "devices: {t4: {price: {usd_per_hour: 0.0005}}}\nremove: [h200]\n"
    own = plan(own_catalogue(tmp_path / "own.yaml", text))
    assert "h200" not in [device.name for device in own.devices]
    for name in FAMILY.names:
        before, after = model_of(section, name).serving, model_of(own, name).serving
        t4 = {cost.device: cost for cost in before}["t4"], {c.device: c for c in after}["t4"]
        assert t4[1].usd < t4[0].usd
        assert t4[1].watt_hours == t4[0].watt_hours
        chosen = cheapest(after)
        assert chosen is not None
        assert chosen.device == "t4"


def test_a_measured_machine_speaks_for_its_kind_only(
    plan: Callable[..., CostSection], section: CostSection
) -> None:
    catalogue = load_catalogue()
    usual = default_calibration(catalogue["cpu-2"])
    slow = {name: share / 2 for name, share in usual.matrix_share.items()}
    # A machine without a GPU that is no device of the catalogue.
    measured = replace(usual, device="this-machine", matrix_share=slow)
    found = plan(PriceList(catalogue, measured))
    for before, after in zip(section.models[0].training, found.models[0].training, strict=True):
        is_gpu = catalogue[before.device].is_gpu
        assert (after.seconds == before.seconds) == is_gpu
    # One of the catalogue's own speaks for that one alone.
    found = plan(PriceList(catalogue, replace(measured, device="cpu-8")))
    changed = [
        after.device
        for before, after in zip(section.models[0].training, found.models[0].training, strict=True)
        if after.seconds != before.seconds
    ]
    assert changed == ["cpu-8"]


def test_whether_factors_were_measured_passes_through(section: CostSection) -> None:
    catalogue = load_catalogue()
    for cost in section.models[0].training:
        assert cost.is_calibrated == default_calibration(catalogue[cost.device]).is_measured


def test_predictions_stand_beside_measurements_with_the_limit(section: CostSection) -> None:
    training = [r for r in section.compared if (r.model, r.run) == ("fine_tuned", "training")]
    whole = next(row for row in training if row.name == "training")
    # The plan was made and kept before the training; no training outruns the machine.
    assert whole.predicted is not None
    assert whole.limit is not None
    assert 0 < whole.limit < min(whole.measured, whole.predicted)
    # Missing where this process had held more before the training.
    assert all(row.limit is None for row in training if row.unit == "bytes")

    speed, memory = [r for r in section.compared if (r.model, r.run) == ("small", "inference")]
    assert (speed.predicted, speed.measured) == (120.0, 100.0)
    assert speed.limit is not None
    assert speed.limit > 120.0
    assert (memory.predicted, memory.measured, memory.limit) == (3.9e8, 4e8, None)


def test_what_was_never_predicted_is_not_predicted_afterwards(
    plan: Callable[..., CostSection], section: CostSection, models: dict[str, Artifact]
) -> None:
    (row,) = [r for r in section.compared if (r.model, r.run) == ("trimmed", "inference")]
    assert (row.predicted, row.measured) == (None, MEASURED.texts_per_second)
    assert row.limit is not None
    assert sum("fine_tuned, trimmed were measured" in note for note in section.notes) == 1

    (before,) = [
        r
        for r in section.compared
        if (r.model, r.run, r.name) == ("trimmed", "training", "training")
    ]
    assert before.predicted is not None
    assert before.limit is not None
    assert 0 < before.limit < before.measured
    facts = {k: v for k, v in models["trimmed"].facts.items() if k not in _PLANNED}
    manifest = replace(models["trimmed"].manifest, facts=facts)
    found = plan(models={**models, "trimmed": replace(models["trimmed"], manifest=manifest)})
    (step,) = [r for r in found.compared if (r.model, r.run) == ("trimmed", "training")]
    assert (step.name, step.predicted) == ("training", None)
    assert step.limit is not None
    assert 0 < step.limit < step.measured


def test_a_root_of_another_recflow_is_priced_with_what_is_known(
    plan: Callable[..., CostSection], models: dict[str, Artifact]
) -> None:
    root = models["fine_tuned"]

    def changed(facts: dict[str, Any], config: dict[str, Any]) -> dict[str, Artifact]:
        manifest = replace(root.manifest, facts=facts, config=config)
        return {**models, "fine_tuned": replace(root, manifest=manifest)}

    old = {k: v for k, v in root.facts.items() if k not in ("plan", "planned_training")}
    found = plan(models=changed(old, root.manifest.config))
    (row,) = [r for r in found.compared if (r.model, r.run) == ("fine_tuned", "training")]
    assert (row.predicted, row.measured) == (None, root.facts["seconds"])
    assert row.limit is not None
    assert 0 < row.limit < row.measured
    assert sum("No prediction was kept when fine_tuned was" in note for note in found.notes) == 1

    found = plan(models=changed(old, {**root.manifest.config, "max_tokens": "many"}))
    assert all(model.training == () for model in found.models)
    assert all(len(model.serving) == len(found.devices) for model in found.models)
    assert found.training_run == ""
    assert (
        sum("training of fine_tuned cannot be planned: max_tokens" in n for n in found.notes) == 1
    )


def test_a_model_of_unknown_sizes_has_a_note_and_no_price(
    plan: Callable[..., CostSection], models: dict[str, Artifact]
) -> None:
    # Nothing says which steps lead from the root to an exported model.
    found = plan(models={**models, "compressed": models["small"]})
    odd = model_of(found, "compressed")
    assert (odd.serving, odd.training) == ((), ())
    assert "not planned" in odd.note
    assert "Making compressed is not planned." in found.notes


def test_measured_time_and_energy_are_those_of_the_facts(
    section: CostSection, models: dict[str, Artifact], world: World
) -> None:
    demand = Demand.of(load_snapshot(world.store, DAY), history_length=5)
    for model in section.models:
        assert model.measured_seconds == models[model.name].facts["seconds"]
        # 2 J for a thousand texts, in Wh for a million recommendations.
        assert model.measured_watt_hours == pytest.approx(2.0 * demand.texts * 1_000 / 3_600)
        assert model.energy_source == "RAPL: package-0"
    assert sum("encoding" in note for note in section.notes) == 1


def test_no_energy_is_claimed_where_no_meter_was_read(plan: Callable[..., CostSection]) -> None:
    silent = plan(measurements=[MEASURED])
    assert {model.measured_watt_hours for model in silent.models} == {None}
    assert [model.energy_source for model in silent.models] == ["no RAPL counter", "", ""]
    assert not any("Energy" in note for note in silent.notes)


def test_demand_is_counted_in_the_test_days(world: World) -> None:
    data = load_snapshot(world.store, DAY)
    demand = Demand.of(data, history_length=2)
    test = data.splits.test
    seen = {
        item
        for frame in (data.splits.train, data.splits.validation)
        for row in frame.iter_rows(named=True)
        for item in [*row["history"], *row["candidates"]]
    }
    shown = {i for row in test.iter_rows(named=True) for i in [*row["history"], *row["candidates"]]}
    assert demand.new_items == max(1, len(shown - seen))
    assert demand.texts == demand.new_items / test.height
    assert (demand.candidates, demand.items) == (5, data.items.height)
    lengths = [min(2, len(history)) for history in test["history"].to_list()]
    assert demand.history == pytest.approx(sum(lengths) / len(lengths))


@pytest.mark.parametrize("text", [None, "devices: {t4: {price: {usd_per_hour: -1}}}", "[1"])
def test_an_unusable_catalogue_is_refused_in_one_sentence(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "own.yaml"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"own\.yaml") as caught:
        PriceList.read(file)
    assert "\n" not in str(caught.value)
    if text is not None and "price" in text:
        assert "price.usd_per_hour = -1 is not allowed" in str(caught.value)


class _NoTruth:
    """Logs of which nobody knows the truth."""

    def truth(self, *_: object) -> None:
        return None


def store_measurements(store: ArtifactStore, models: dict[str, Artifact]) -> None:
    def build(draft: Any) -> None:
        content = json.dumps([asdict(each) for each in measurements()])
        (draft.path / "measurements.json").write_text(content, encoding="utf-8")
        draft.facts["plan"] = {"small": measured_facts([SPEED, MEMORY])["plan"]}

    store.build(
        MEASUREMENTS,
        DAY,
        build,
        code_version="1",
        parents={model.manifest.key: model for model in models.values()},
        config={},
    )


def test_a_report_has_costs_and_follows_the_catalogue(
    world: World, models: dict[str, Artifact], tmp_path: Path
) -> None:
    store_measurements(world.store, models)
    build_vector_stores(
        world.store, DAY, family=FAMILY, stores=[VectorStoreConfig(threads=1)], code_version="1"
    )
    build_predictions(
        world.store, DAY, family=FAMILY, base_model=world.base_model,
        config=ScoringConfig(catalogue_sample=10, seed=0, threads=1), code_version="1",
    )  # fmt: skip

    def report(**values: Any) -> Artifact:
        source: Any = _NoTruth()
        return build_report(
            world.store, DAY, family=FAMILY, source=source, window=[DAY],
            context=report_context("toy", DAY), config=EvaluationConfig(bootstrap_samples=20),
            code_version="1", **values,
        )  # fmt: skip

    first = report()
    document = json.loads(first.file("report.json").read_text(encoding="utf-8"))
    assert [model["name"] for model in document["costs"]["models"]] == FAMILY.names
    assert '<section id="money">' in first.file("report.html").read_text(encoding="utf-8")
    assert "cheapest serving" in first.file("table.txt").read_text(encoding="utf-8")
    assert report().reused

    file = tmp_path / "own.yaml"
    file.write_text("remove: [h200]", encoding="utf-8")
    own = report(catalogue=file)
    assert not own.reused
    assert own.manifest.key == REPORT
    file.write_text("remove: [h200] # not sold here", encoding="utf-8")
    assert report(catalogue=file).reused  # the devices count, not the words
    measured = tmp_path / "machine.json"
    save_calibration(default_calibration(load_catalogue()["cpu-2"]), measured)
    assert not report(catalogue=file, calibration=measured).reused

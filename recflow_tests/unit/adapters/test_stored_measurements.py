"""Measurements survive their JSON, and those of another recflow are refused with the remedy."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from recflow.adapters import serving_plans
from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.evaluations import load_measurements
from recflow.adapters.keys import MEASUREMENTS
from recflow.adapters.models import open_models
from recflow.adapters.planning import Machine, PlanningConfig
from recflow.adapters.serving_plans import encoding_beside, encoding_facts, plan_encoding
from recflow.adapters.snapshots import load_snapshot
from recflow.compression.measure import MeasurementConfig
from recflow.core.artifacts import Artifact, Draft
from recflow.core.errors import ArtifactError
from recflow.core.measurement import Energy, Latency, Measurement
from recflow.defs.planned import plans_metadata
from recflow.hardware.catalogue import load_catalogue
from recflow.hardware.plan import InferencePlan, Memory
from recflow_tests.unit.adapters.test_family_models import DAY, FAMILY, World

MEASURED = Measurement(
    name="fine_tuned",
    runtime="torch",
    threads=1,
    size_bytes=90_000_000,
    serving_bytes=91_000_000,
    parameters=22_000_000,
    load_seconds=0.5,
    texts_per_second=100.0,
    throughput_spread=0.05,
    latencies=(Latency(1, 6.0, 7.0, 8.0, 300, 0.01), Latency(32, 90.0, 95.0, 99.0, 50, -0.02)),
    peak_rss_bytes=400_000_000,
    energy=Energy(None, "no RAPL counter"),
)


def stored(folder: Path, content: list[dict[str, Any]]) -> Artifact:
    def build(draft: Draft) -> None:
        (draft.path / "measurements.json").write_text(json.dumps(content), encoding="utf-8")

    return ArtifactStore(folder).build(
        MEASUREMENTS, "2026-03-03", build, code_version="1", parents={}, config={}
    )


def test_measurements_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert load_measurements(stored(tmp_path, [asdict(MEASURED)])) == [MEASURED]


@pytest.mark.parametrize("change", [{"energy": ...}, {"serving_bytes": ...}, {"colour": "red"}])
def test_measurements_of_another_recflow_are_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    entry = {key: value for key, value in (asdict(MEASURED) | change).items() if value is not ...}
    with pytest.raises(ArtifactError, match=f"materialise {MEASUREMENTS} again"):
        load_measurements(stored(tmp_path, [entry]))


def test_a_plan_is_set_beside_what_was_measured() -> None:
    plan = InferencePlan(
        device=load_catalogue()["cpu-8"],
        precision="fp32",
        memory=Memory({"weights": 90_000_000, "context": 210_000_000}),
        flops_per_text=1e9,
        flops_per_recommendation=1e9,
        limit_texts_per_second=400.0,
        texts_per_second=150.0,
        recommendations_per_second=150.0,
        latency_seconds=0.009,
        is_calibrated=True,
        threads=1,
    )
    # What could not be planned has no row.
    unknown = replace(MEASURED, name="unknown")
    assert encoding_facts({"fine_tuned": plan}, [MEASURED, unknown]) == {
        "plan": {
            "fine_tuned": [
                {
                    "name": "peak memory",
                    "unit": "bytes",
                    "predicted": 300_000_000,
                    "measured": 400_000_000,
                },
                {"name": "throughput", "unit": "texts/s", "predicted": 150.0, "measured": 100.0},
                {
                    "name": "latency of one text",
                    "unit": "seconds",
                    "predicted": 0.009,
                    "measured": 0.006,
                },
            ]
        }
    }
    bulk = replace(MEASURED, latencies=MEASURED.latencies[1:])
    assert [row.name for row in encoding_beside(plan, bulk)] == ["peak memory", "throughput"]


def test_what_is_measured_is_planned_with_the_lengths_of_its_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)
    world.make("trimmed")
    world.make("small")
    models = open_models(world.store, DAY, load_snapshot(world.store, DAY), FAMILY)
    machine = Machine(load_catalogue()["cpu-8"])
    monkeypatch.setattr(serving_plans, "this_processor", lambda _: machine)

    def plans(texts: list[str], threads: int = 1) -> dict[str, InferencePlan]:
        config = MeasurementConfig(threads=threads)
        return plan_encoding(FAMILY, models, texts, config, PlanningConfig())

    short, long = plans(["sea0"] * 8), plans(["sea0 war1 the"] * 8)
    assert list(short) == FAMILY.names
    for name, plan in short.items():
        # Two special tokens a text.
        assert long[name].flops_per_text / plan.flops_per_text == pytest.approx(5 / 3, rel=0.1)
        assert plan.latency_seconds > 0
        assert plan.memory.parts["weights"] > 0
        assert "item vectors" not in plan.memory.parts
    # More threads than cores are measured, and planned as all cores.
    assert {plan.threads for plan in plans(["sea0"], threads=64).values()} == {8}


def test_measurements_without_a_plan_are_shown_without() -> None:
    assert plans_metadata(None) == {}
    rows = encoding_facts({}, [MEASURED])["plan"]
    assert plans_metadata(rows) == {}

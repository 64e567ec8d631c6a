"""What a training is going to take: read from its tables, refused where it does not fit, kept."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from recflow.adapters import planning
from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.models import build_fine_tuned
from recflow.adapters.planning import (
    PEAK_MEMORY,
    PlanningConfig,
    compared_facts,
    compared_table,
    machine_of,
    measured_beside,
    plan_of_training,
    training_workload,
    with_held,
)
from recflow.adapters.snapshots import load_snapshot
from recflow.core.artifacts import Artifact
from recflow.core.columns import Columns
from recflow.core.errors import ContractError, HardwareError
from recflow.hardware.calibration import default_calibration, save_calibration
from recflow.hardware.machine import FreeMemory
from recflow.hardware.plan import Measured
from recflow.modeling.reports import EpochReport, TrainingReport
from recflow.modeling.tracking import NullTracker
from recflow.modeling.training_data import prepare_data
from recflow_tests.unit.adapters.tiny_snapshot import store_snapshot
from recflow_tests.unit.modeling.tiny import (
    make_impressions,
    make_items,
    quick,
    write_base_model,
)

DAY = "2024-01-10"
ONCE = quick({"schedule.head_epochs": 1, "schedule.encoder_epochs": 1})


def impressions(*rows: tuple[list[str], list[str], list[int]]) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {
                Columns.USER_ID: f"u{number}",
                Columns.TIME: datetime(2024, 1, 1, tzinfo=UTC),
                Columns.HISTORY: history,
                Columns.CANDIDATES: candidates,
                Columns.LABELS: labels,
            }
            for number, (history, candidates, labels) in enumerate(rows)
        ],
        schema_overrides={Columns.HISTORY: pl.List(pl.String), Columns.LABELS: pl.List(pl.Int8)},
    )


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("base"))


def test_the_workload_is_counted_from_the_tables(base_model: Path) -> None:
    items = pl.DataFrame(
        {
            Columns.ITEM_ID: ["a", "b", "c", "d", "e", "unused"],
            Columns.TEXT: ["sea0", "sea1 sea2", "war0 war1 war2", "the", "the a", "old " * 10],
            Columns.CATEGORY: ["x", "", "y", None, "z", "v"],
        }
    )
    train = impressions(
        (["d", "a", "b"], ["a", "b", "c"], [1, 1, 0]),  # two clicks; "d" is beyond the history
        ([], ["a", "c"], [0, 1]),  # one click, a cold user
        (["a"], ["a"], [1]),  # nothing to compare the click with
        (["b"], ["b", "c"], [0, 0]),  # no click
    )
    validation = impressions((["c"], ["e", "a"], [1, 0]))
    config = quick({"user_model.history_length": 2, "user_model.user_ids": True})
    workload = training_workload(
        items=items,
        train=train,
        validation=validation,
        tokenizer=base_model / "tokenizer.json",
        config=config,
        other_table_bytes=1_000,
    )
    assert (workload.impressions, workload.validation_impressions) == (4, 1)
    assert workload.clicks == 3
    assert workload.history == (2 + 0) / 2  # of those that are learnt from
    assert workload.slate == (3 + 2 + 1 + 2) / 4
    assert workload.items == 4  # a, b, c, e
    assert workload.users == 4
    assert workload.categories == 2  # x and y; z is seen in validation alone, b has none
    # Two special tokens each: 3, 4, 5 and 4 tokens.
    assert workload.lengths.mean == 4.0
    tables = sum(frame.estimated_size() for frame in (items, train, validation))
    assert workload.table_bytes == 1_000 + tables
    # Slates have 2 candidates on average, all of which a step sees: each occurrence counts once.
    # a: 2 + 3, b: 2 + 2, c: 0 + 3.
    assert workload.popularity.distinct(1e9) == pytest.approx(3)
    assert sum(share for _, share in workload.popularity.groups) == pytest.approx(1)
    assert max(share / n for n, share in workload.popularity.groups) == pytest.approx(5 / 12, 0.01)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"objective.clicks_per_impression": 1},
        {"schedule.max_impressions_per_epoch": 50},
        {"user_model.history_length": 2, "schedule.max_validation_impressions": 10},
    ],
)
def test_the_workload_agrees_with_what_the_training_prepares(
    base_model: Path, values: dict[str, Any]
) -> None:
    items, config = make_items(), quick(values)
    tables: dict[str, Any] = {
        "items": items,
        "train": make_impressions(items, 120, seed=1),
        "validation": make_impressions(items, 30, seed=2),
    }
    tokenizer = base_model / "tokenizer.json"
    data = prepare_data(**tables, tokenizer_path=tokenizer, config=config)
    workload = training_workload(**tables, tokenizer=tokenizer, config=config)
    assert workload.clicks == data.clicks_per_epoch(config)
    assert workload.items == len(data.tokens)
    assert workload.validation_impressions == len(data.validation)
    assert workload.categories == len(data.categories)
    tokens = [len(text) for text in data.tokens]
    assert workload.lengths.mean == pytest.approx(sum(tokens) / len(tokens), rel=0.02)


def test_ratings_are_counted_where_they_are_learnt_from(base_model: Path) -> None:
    items = make_items()
    frame = make_impressions(items, 3, seed=1)
    ratings = pl.Series(
        Columns.RATING,
        [[5.0, None, 3.0, None, None], [None] * 5, [1.0, 2.0, float("nan"), 4.0, 5.0]],
        dtype=pl.List(pl.Float32),
    )
    config = quick(
        {"objective.loss": "mean_squared_error", "schedule.primary_metric": "rating_rmse"}
    )
    rated = frame.with_columns(ratings)
    tables: dict[str, Any] = {"items": items, "train": rated, "validation": frame}
    tokenizer = base_model / "tokenizer.json"
    assert training_workload(**tables, tokenizer=tokenizer, config=config).clicks == 2 + 4
    tables["train"] = frame
    with pytest.raises(ContractError, match="anything to learn from"):
        training_workload(**tables, tokenizer=tokenizer, config=config)


def build(folder: Path, base_model: Path, **arguments: Any) -> Artifact:
    store = ArtifactStore(folder / "store")
    store_snapshot(store, DAY)
    return build_fine_tuned(
        store,
        DAY,
        base_model=base_model,
        config=ONCE,
        tracker=NullTracker(),
        code_version="1",
        cache_directory=folder / "cache",
        checkpoints=folder / "checkpoints",
        **arguments,
    )


def test_a_training_without_memory_is_refused_before_it_begins(
    tmp_path: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(planning, "free_memory", lambda _: FreeMemory(1_000))
    monkeypatch.setattr(planning, "own_memory", lambda: 0)
    with pytest.raises(HardwareError) as refused:
        build(tmp_path, base_model)
    sentence = str(refused.value)
    assert sentence.startswith("this training needs ")
    assert "the largest part is context with" in sentence
    assert "nothing makes it fit here" in sentence
    assert sentence.endswith("to start all the same, set memory: go_on")
    assert "\n" not in sentence
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]
    assert not [*(tmp_path / "store" / "models").rglob("*.*")]

    trained = build(tmp_path, base_model, planning=PlanningConfig(memory="go_on"))
    assert trained.facts["steps"]
    assert "it starts all the same" in caplog.text
    # A model that is stored needs no memory, whatever the policy.
    assert build(tmp_path, base_model).reused


def test_the_advice_is_a_change_that_fits(
    tmp_path: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(tmp_path)
    store_snapshot(store, DAY)
    data = load_snapshot(store, DAY)
    config = quick({"max_tokens": 32, "tuning.strategy": "full", "speed.max_texts_per_step": 0})
    monkeypatch.setattr(planning, "own_memory", lambda: 0)
    planned = plan_of_training(
        items=data.items,
        train=data.splits.train,
        validation=data.splits.validation,
        base_model=base_model,
        config=config,
        planning=PlanningConfig(),
    )
    free = planned.plan.host_memory.total - 1
    monkeypatch.setattr(planning, "free_memory", lambda _: FreeMemory(free))
    with pytest.raises(HardwareError, match=r"it would fit with \w+\.\w+: \w+ \(0\."):
        planned.require_memory("refuse")
    monkeypatch.setattr(planning, "free_memory", lambda _: FreeMemory(free + 1))
    planned.require_memory("refuse")


def test_kept_hidden_states_make_no_training_refused(
    tmp_path: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(tmp_path)
    store_snapshot(store, DAY)
    data = load_snapshot(store, DAY)
    monkeypatch.setattr(planning, "own_memory", lambda: 0)
    planned = plan_of_training(
        items=data.items,
        train=data.splits.train,
        validation=data.splits.validation,
        base_model=base_model,
        config=ONCE,
        planning=PlanningConfig(),
    )
    parts = planned.plan.host_memory.parts
    left = planned.plan.host_memory.total - parts["hidden states"]
    monkeypatch.setattr(planning, "free_memory", lambda _: FreeMemory(left))
    planned.require_memory("refuse")
    # What the process holds besides is part of its peak.
    more = with_held(planned.plan, parts["context"] + parts["tables"] + 5_000)
    assert more.host_memory.parts["held before"] == 5_000
    assert more.memory.total == planned.plan.memory.total + 5_000
    assert with_held(planned.plan, parts["context"]) == planned.plan


def test_a_model_keeps_what_was_planned_and_has_the_same_digest(
    tmp_path: Path, base_model: Path
) -> None:
    artifact = build(tmp_path, base_model)
    compared = {row.name: row for row in compared_facts(artifact.facts)}
    assert {"head step", "encoder step", "hidden states", "training"} <= compared.keys()
    assert all(row.predicted > 0 and row.measured > 0 for row in compared.values())
    assert compared["training"].measured == artifact.facts["seconds"]
    raised = artifact.facts["peak_rss_bytes"] > artifact.facts["peak_rss_before_bytes"]  # type: ignore[operator]
    assert (PEAK_MEMORY in compared) == raised
    assert set(artifact.facts["planned_memory_parts"]) >= {"weights", "context", "tables"}  # type: ignore[arg-type]
    assert "plan" not in artifact.manifest.config
    again = build(
        tmp_path / "other", base_model, planning=PlanningConfig(memory="go_on"), rebuild=True
    )
    assert again.digest == artifact.digest
    assert again.manifest.fingerprint == artifact.manifest.fingerprint


def report_of(**values: Any) -> TrainingReport:
    epochs = (
        EpochReport("head", 1, 10, 100, 0, 0.5, 0.6, 6.0, 1.0),
        EpochReport("head", 2, 10, 100, 0, 0.5, 0.6, 8.0, 3.0),
        EpochReport("encoder", 1, 5, 100, 50, 0.5, 0.6, 14.0, 4.0),
    )
    given: dict[str, Any] = {
        "strategy": "lora", "primary_metric": "auc", "epochs": epochs, "best_epoch": 1,
        "best_validation": 0.6, "seconds": 40.0, "steps": 25, "resumed_at_step": 0,
        "impressions_per_second": 1.0, "cached_texts": 40, "reused_texts": 0, "cache_seconds": 2.0,
        "parameters": 1, "trainable_parameters": 1, "processes": 1, "precision": "fp32",
        "peak_rss_bytes": 900, "peak_rss_before_bytes": 500,
    }  # fmt: skip
    return TrainingReport(**{**given, **values})


def test_measurements_stand_beside_what_was_planned(tmp_path: Path, base_model: Path) -> None:
    store = ArtifactStore(tmp_path)
    store_snapshot(store, DAY)
    data = load_snapshot(store, DAY)
    plan = plan_of_training(
        items=data.items,
        train=data.splits.train,
        validation=data.splits.validation,
        base_model=base_model,
        config=ONCE,
        planning=PlanningConfig(),
    ).plan
    seconds = {stage.name: stage.seconds for stage in plan.stages}

    def compared(**values: Any) -> dict[str, Measured]:
        return {row.name: row for row in measured_beside(plan, report_of(**values))}

    found = compared()
    assert found[PEAK_MEMORY].measured == 900
    assert found[PEAK_MEMORY].predicted == plan.host_memory.total
    assert found["head step"].measured == (5 + 5) / 20
    assert found["head validation"].measured == 2.0
    assert found["encoder step"].measured == 10 / 5
    assert found["encoder validation"].predicted == seconds["validation"] + seconds["encoding"]
    assert found["hidden states"].measured == 2.0
    # 20 head steps, 5 encoder steps, 3 validations, all items encoded before and after an epoch.
    assert found["training"].predicted == pytest.approx(
        20 * seconds["head"] + 5 * seconds["encoder"] + 3 * seconds["validation"]
        + 2 * seconds["encoding"] + seconds["hidden states"]
    )  # fmt: skip
    assert PEAK_MEMORY not in compared(peak_rss_bytes=500)
    assert "hidden states" not in compared(reused_texts=40)
    assert "training" not in compared(resumed_at_step=3)
    on_gpu = compared(peak_device_bytes=7)["peak device memory"]
    assert on_gpu.predicted == plan.memory.total - plan.memory.parts["context"]


def test_a_comparison_is_read_back_and_shown() -> None:
    rows = [Measured("peak memory", "bytes", 3 << 29, 1 << 30), Measured("step", "seconds", 0.1, 2)]
    facts = planning.measured_facts(rows)
    assert compared_facts(facts) == rows
    assert compared_facts({}) == []
    assert compared_table(rows).splitlines()[2:] == [
        "| peak memory | 1.50 GiB | 1.00 GiB | +50% |",
        "| step | 100.00 ms | 2.0 s | -95% |",
    ]


def test_measured_factors_count_on_the_kind_of_machine_that_was_measured(tmp_path: Path) -> None:
    usual = machine_of(ONCE, PlanningConfig())
    assert usual.calibration is None
    file = tmp_path / "machine.json"
    measured = replace(default_calibration(usual.device), operator_seconds=0.125)
    save_calibration(measured, file)
    assert machine_of(ONCE, PlanningConfig(calibration=file)) == replace(
        usual, calibration=measured
    )
    # What was measured on a GPU says nothing of the processor.
    save_calibration(replace(measured, device_context_bytes=1), file)
    assert machine_of(ONCE, PlanningConfig(calibration=file)) == usual

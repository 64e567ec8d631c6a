"""The comparison of strategies; the trainings themselves run in test_training_assets."""

from pathlib import Path
from typing import Any

import pytest

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.keys import STRATEGIES_STUDY
from recflow.adapters.strategies import StrategiesConfig, build_strategies, strategies_table
from recflow.core.artifacts import Draft
from recflow.core.errors import ConfigError, PermanentError
from recflow.modeling.config import STRATEGIES
from recflow.modeling.tracking import NullTracker
from recflow_tests.unit.adapters.tiny_snapshot import store_snapshot
from recflow_tests.unit.modeling.tiny import quick, write_base_model

DAY = "2024-01-10"


def build(store: ArtifactStore, base_model: Path, study: StrategiesConfig) -> None:
    build_strategies(
        store,
        DAY,
        base_model=base_model,
        config=quick(),
        study=study,
        tracker=NullTracker(),
        code_version="1",
    )


def test_every_strategy_is_compared_unless_told_otherwise() -> None:
    assert StrategiesConfig().strategies == STRATEGIES


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"strategies": ("frozen", "magic")}, "strategy = 'magic'"),
        ({"strategies": ("full", "lora")}, "each once, frozen among them"),
        ({"strategies": ("frozen", "frozen")}, "each once"),
        ({"overrides": {"magic": {}}}, "strategy = 'magic'"),
        ({"bootstrap_samples": 0}, "bootstrap_samples = 0"),
    ],
)
def test_an_impossible_comparison_is_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        StrategiesConfig(**values)


def test_an_impossible_override_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    store_snapshot(store, DAY)
    study = StrategiesConfig(overrides={"lora": {"tuning.rank": 0}})
    with pytest.raises(ConfigError, match="rank = 0"):
        build(store, tmp_path, study)
    assert not store.partitions(STRATEGIES_STUDY)


def test_a_strategy_that_cannot_be_trained_is_named_with_the_reason(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    store_snapshot(store, DAY)
    base_model = write_base_model(tmp_path / "base")
    (base_model / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(
        PermanentError, match=r"the strategy frozen cannot be trained: .*cannot be loaded"
    ):
        build(store, base_model, StrategiesConfig(strategies=("frozen",)))
    assert not store.partitions(STRATEGIES_STUDY)


def test_the_table_has_a_line_for_each_strategy(tmp_path: Path) -> None:
    def row(strategy: str, gain: dict[str, float] | None) -> dict[str, Any]:
        return {
            "strategy": strategy,
            "encoder_learning_rate": 5e-5,
            "trainable_parameters": 1_234,
            "parameters": 22_000_000,
            "seconds": 61.4,
            "clicks_per_second": 812.6,
            "peak_rss_bytes": 1_500 * 2**20,
            "validation": 0.61234,
            "auc": {"value": 0.6, "low": 0.59, "high": 0.61},
            "ndcg@10": {"value": 0.4, "low": 0.39, "high": 0.41},
            "gain": gain,
        }

    def write(draft: Draft) -> None:
        gain = {"value": 0.01, "low": -0.002, "high": 0.022}
        draft.facts |= {
            "primary_metric": "auc",
            "rows": [row("frozen", None), row("lora", gain)],  # type: ignore[dict-item]
        }

    study = ArtifactStore(tmp_path).build(
        STRATEGIES_STUDY, DAY, write, code_version="1", parents={}, config={}
    )
    assert strategies_table(study).splitlines() == [
        "| strategy | learns | of | encoder rate | s | clicks/s | peak RSS | validation auc "
        "| test AUC | nDCG@10 | AUC over frozen |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| frozen | 1,234 | 22,000,000 | – | 61 | 813 | 1,500 MiB | 0.6123 "
        "| 0.6000 [0.5900, 0.6100] | 0.4000 [0.3900, 0.4100] | – |",
        "| lora | 1,234 | 22,000,000 | 5e-05 | 61 | 813 | 1,500 MiB | 0.6123 "
        "| 0.6000 [0.5900, 0.6100] | 0.4000 [0.3900, 0.4100] | +0.0100 [-0.0020, +0.0220] |",
    ]

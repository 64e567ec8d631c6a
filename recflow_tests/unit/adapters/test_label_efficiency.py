"""Adapting the encoder of a stored snapshot, and the study of what that gains."""

import logging
from pathlib import Path

import polars as pl
import pytest
import torch

from recflow.adapters.adaptation import build_adapted_encoder, known_texts
from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.evaluations import _label_efficiency_study
from recflow.adapters.keys import (
    ADAPTED_ENCODER,
    ITEMS,
    LABEL_EFFICIENCY_STUDY,
    TEST,
    TRAIN,
    VALIDATION,
)
from recflow.adapters.label_efficiency import (
    LabelEfficiencyConfig,
    build_label_efficiency,
    label_efficiency_table,
    label_shares,
)
from recflow.adapters.parquet_io import Table, write_table
from recflow.adapters.snapshots import load_snapshot
from recflow.core.artifacts import Artifact
from recflow.core.columns import Columns
from recflow.core.errors import ArtifactError, ConfigError
from recflow.evaluation.scoring import Predictions
from recflow.modeling.adaptation_config import AdaptationConfig
from recflow.modeling.encoder import load_pretrained
from recflow.modeling.tracking import NullTracker
from recflow_tests.unit.evaluation.support import simulated_snapshot
from recflow_tests.unit.modeling.tiny import TOPICS, quick, words_of, write_base_model

DAY = "2026-03-03"
CONFIG = quick({"schedule.head_epochs": 1, "schedule.encoder_epochs": 1})
STUDY = LabelEfficiencyConfig(shares=(1.0, 0.2), bootstrap_samples=20)
ADAPTATION = AdaptationConfig(
    max_tokens=16, learning_rate=1e-3, epochs=2, max_steps=3, batch_size=16, threads=1
)


def put(store: ArtifactStore, key: str, frame: pl.DataFrame, version: str = "1") -> None:
    store.build(
        key,
        DAY,
        lambda draft: write_table(draft, Table(frame)),
        code_version=version,
        parents={},
        config={},
    )


def put_snapshot(store: ArtifactStore) -> None:
    """Sixty items whose texts are words of their topic; train never shows the last ten."""
    snapshot = simulated_snapshot(impressions=60)
    texts = [
        " ".join([*words_of(TOPICS[number % 3])[number % 5 :], "the", words_of("tax")[number % 6]])
        for number in range(snapshot.items.height)
    ]
    put(store, ITEMS, snapshot.items.with_columns(pl.Series(Columns.TEXT, texts)))
    for key, frame in (
        (TRAIN, snapshot.train), (VALIDATION, snapshot.validation), (TEST, snapshot.test),
    ):  # fmt: skip
        put(store, key, frame)


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> ArtifactStore:
    store = ArtifactStore(tmp_path_factory.mktemp("store"))
    put_snapshot(store)
    adapt(store, base_model)
    study(store, base_model)
    return store


def adapt(store: ArtifactStore, base_model: Path) -> Artifact:
    return build_adapted_encoder(
        store,
        DAY,
        base_model=base_model,
        config=ADAPTATION,
        tracker=NullTracker(),
        code_version="1",
    )


class Recorder(NullTracker):
    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def log_metrics(self, metrics, step) -> None:
        self.metrics |= metrics


def study(store: ArtifactStore, base_model: Path, tracker: NullTracker | None = None) -> Artifact:
    return build_label_efficiency(
        store,
        DAY,
        base_model=base_model,
        config=CONFIG,
        study=STUDY,
        tracker=tracker or NullTracker(),
        code_version="1",
        cache_directory=store.root.with_name("cache"),
    )


def test_only_texts_known_by_the_end_of_train_are_read(store: ArtifactStore) -> None:
    data = load_snapshot(store, DAY)
    train = data.splits.train
    shown = {item for row in train[Columns.CANDIDATES].to_list() for item in row}
    clicked = {item for row in train[Columns.HISTORY].to_list() for item in row}
    rows = data.items.sort(Columns.ITEM_ID).iter_rows(named=True)
    texts = [row[Columns.TEXT] for row in rows if row[Columns.ITEM_ID] in shown | clicked]
    assert known_texts(data) == texts
    assert len(texts) < data.items.height


def test_the_adapted_encoder_is_a_base_model(store: ArtifactStore, base_model: Path) -> None:
    adapted = store.get(ADAPTED_ENCODER, DAY)
    ids = torch.tensor([[2, 7, 8, 3]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    before, after = load_pretrained(base_model), load_pretrained(adapted.path)
    assert not torch.equal(before(ids, mask), after(ids, mask))
    assert set(adapted.manifest.parents) == {ITEMS, TRAIN}
    assert adapted.facts["steps"] == 3
    assert adapt(store, base_model).reused


def test_the_study_compares_at_every_share(store: ArtifactStore, base_model: Path) -> None:
    recorder = Recorder()
    artifact = study(store, base_model, recorder)
    assert artifact.reused
    few, many = label_shares(artifact)
    assert (few.share, few.impressions, many.share, many.impressions) == (0.2, 12, 1.0, 60)
    assert recorder.metrics["gain_0.2.auc"] == few.difference["auc"].value
    assert set(artifact.facts["seconds"]) == {  # type: ignore[arg-type]
        "pretrained_0.2", "adapted_0.2", "pretrained_1", "adapted_1",
    }  # fmt: skip
    tests = load_snapshot(store, DAY).splits.test
    for name in artifact.facts["seconds"]:  # type: ignore[union-attr]
        assert Predictions.load(artifact.path / name).test.height == tests.height


def test_the_study_is_made_from_everything_it_read(store: ArtifactStore) -> None:
    parents = store.get(LABEL_EFFICIENCY_STUDY, DAY).manifest.parents
    assert set(parents) == {ITEMS, TRAIN, VALIDATION, TEST, ADAPTED_ENCODER}


def test_the_table_has_a_row_a_share(store: ArtifactStore) -> None:
    artifact = store.get(LABEL_EFFICIENCY_STUDY, DAY)
    lines = label_efficiency_table(artifact).splitlines()
    few = label_shares(artifact)[0]
    assert len(lines) == 4
    assert lines[2].startswith("| 20 % | 12 | ")
    assert f"{few.difference['auc'].value:+.4f} [" in lines[2]
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_an_encoder_adapted_from_another_one_is_refused(
    store: ArtifactStore, tmp_path: Path
) -> None:
    other = write_base_model(tmp_path / "other", seed=1)
    with pytest.raises(ArtifactError, match=rf"adapted from another encoder than {other}"):
        study(store, other)


def test_the_report_shows_no_study_of_other_splits(
    store: ArtifactStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = _label_efficiency_study(store, load_snapshot(store, DAY), DAY)
    assert found is not None
    assert found.digest == store.get(LABEL_EFFICIENCY_STUDY, DAY).digest
    assert _label_efficiency_study(ArtifactStore(tmp_path), load_snapshot(store, DAY), DAY) is None
    train = load_snapshot(store, DAY).splits.train
    changed = ArtifactStore(tmp_path / "changed")
    put_snapshot(changed)
    put(changed, TRAIN, train.head(30), version="2")
    with caplog.at_level(logging.WARNING, logger="recflow"):
        assert _label_efficiency_study(store, load_snapshot(changed, DAY), DAY) is None
    assert "made from other splits" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shares", ()),
        ("shares", (0.0, 1.0)),
        ("shares", (1.5,)),
        ("shares", (0.1, 0.1)),
        ("most_repeats", 0),
        ("bootstrap_samples", 0),
    ],
)
def test_impossible_configuration_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        LabelEfficiencyConfig(**{key: value})  # type: ignore[arg-type]

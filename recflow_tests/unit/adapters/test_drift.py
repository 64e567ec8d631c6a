"""The drift of a day is measured against the champion's own days, kept, and read back."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recflow.adapters import drift
from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.champion import Champion
from recflow.adapters.drift import PAGE, RESULT, build_drift, evidence_of, no_drift
from recflow.adapters.keys import DRIFT, FEATURES_ITEMS, validation_of
from recflow.adapters.snapshots import build_snapshot
from recflow.core.artifacts import Artifact
from recflow.core.errors import ArtifactError, ContractError, SourceError
from recflow.data.split import SplitConfig
from recflow.modeling.reports import TrainingReport
from recflow.quality.drift_config import DriftConfig
from recflow_tests.unit.adapters.tiny_days import DAYS, store_days

# pyright: reportUnusedImport=false
from recflow_tests.unit.modeling.conftest import (  # noqa: F401
    base_model,
    items,
    train,
    train_tiny,
    trained,
    validation,
)

pytestmark = [
    # Great Expectations, Evidently and what they import; nothing of ours can avoid it.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SNAPSHOT, CALM, TURNED = DAYS[5], DAYS[6], DAYS[7]
WINDOW = 6
CONFIG = DriftConfig(least_impressions=100, bootstrap_samples=200, permutations=100)
Days = tuple[ArtifactStore, Champion]


@pytest.fixture(scope="module")
def days(
    tmp_path_factory: pytest.TempPathFactory,
    trained: tuple[Path, TrainingReport],  # noqa: F811
) -> Days:
    store = ArtifactStore(tmp_path_factory.mktemp("store"))
    store_days(store, 8, turned=(7,))
    build_snapshot(
        store,
        SNAPSHOT,
        window=DAYS[:WINDOW],
        config=SplitConfig(window_days=WINDOW, validation_days=1, test_days=2, max_history=8),
        code_version="1",
    )
    champion = Champion("3", SNAPSHOT, "fine_tuned", "d" * 64, trained[0])
    return store, champion


def build(days: Days, day: str, champion: Champion | None, **changes: Any) -> Artifact:
    place = DAYS.index(day)
    arguments: Mapping[str, Any] = {
        "champion": champion,
        "window": DAYS[max(0, place + 1 - WINDOW) : place + 1],
        "max_history": 8,
        "config": CONFIG,
        "threads": 1,
        "code_version": "1",
        **changes,
    }
    return build_drift(days[0], day, **arguments)


def content(artifact: Artifact) -> dict[str, Any]:
    return json.loads(artifact.file(RESULT).read_text(encoding="utf-8"))


def test_a_day_like_the_champions_days_has_not_drifted(days: Days) -> None:
    artifact = build(days, CALM, days[1])
    evidence = evidence_of(artifact)
    assert (evidence.champion, evidence.champion_snapshot) == ("3", SNAPSHOT)
    assert not evidence.alarming
    assert no_drift(artifact).holds
    assert artifact.facts["impressions"] == 150
    assert artifact.facts["reference_days"] == 6
    # The champion was trained on this world: it ranks nearly perfectly on both sides.
    assert artifact.facts["auc"] > 0.9
    assert artifact.facts["auc_on_test_days"] > 0.9
    measured = {m["name"]: m for m in content(artifact)["measures"]}
    assert measured["score"]["value"] is not None
    assert measured["calibration"]["current"] == pytest.approx(1.0, abs=0.3)
    assert PAGE in artifact.manifest.files


def test_clicks_against_the_champions_taste_are_decay(days: Days) -> None:
    artifact = build(days, TURNED, days[1])
    evidence = evidence_of(artifact)
    assert evidence.decayed
    claim = no_drift(artifact)
    assert not claim.holds
    assert "auc is 0." in claim.description
    assert artifact.facts["auc"] < 0.5
    assert artifact.facts["auc_change_high"] < -0.3


def test_the_same_day_is_measured_once_and_comes_out_the_same(days: Days) -> None:
    first = build(days, CALM, days[1])
    assert build(days, CALM, days[1]).reused
    again = build(days, CALM, days[1], rebuild=True)
    assert not again.reused
    assert again.digest == first.digest


def test_another_champion_is_another_comparison(days: Days) -> None:
    build(days, CALM, days[1])
    other = replace(days[1], version="4", digest="e" * 64)
    artifact = build(days, CALM, other)
    assert not artifact.reused
    assert evidence_of(artifact).champion == "4"


def test_without_a_champion_the_days_before_are_the_reference(days: Days) -> None:
    artifact = build(days, TURNED, None)
    evidence = evidence_of(artifact)
    assert (evidence.champion, evidence.champion_snapshot, evidence.decayed) == ("", "", False)
    assert artifact.facts["compared_with"] == "the 5 days before it"
    missing = artifact.facts["not_measured"]
    assert missing["score"] == missing["calibration"] == "there is no champion to score with"
    assert missing["embeddings"]
    assert "auc" not in artifact.facts
    assert content(artifact)["decays"] == []


def test_a_day_the_champion_has_seen_is_no_evidence_against_it(days: Days) -> None:
    evidence = evidence_of(build(days, DAYS[4], days[1]))
    assert evidence.champion == ""


def test_a_day_of_few_impressions_is_not_judged(days: Days) -> None:
    config = replace(CONFIG, least_impressions=1_000)
    artifact = build(days, TURNED, days[1], config=config)
    assert not evidence_of(artifact).alarming
    assert artifact.facts["judged"] is False
    assert "too few rows to judge" in no_drift(artifact).description


def test_days_that_are_missing_are_named(days: Days) -> None:
    with pytest.raises(SourceError, match=f"{DAYS[9]} has no impressions or no items to compare"):
        build(days, DAYS[9], days[1])
    with pytest.raises(SourceError, match=f"{DAYS[0]} has nothing to be compared with"):
        build(days, DAYS[0], None)


def test_days_that_nobody_validated_are_refused(tmp_path: Path, days: Days) -> None:
    store = ArtifactStore(tmp_path)
    store_days(store, 2, impressions=5)
    path = store.path(validation_of(FEATURES_ITEMS), DAYS[1])
    path.rename(path.with_name(".gone"))
    with pytest.raises(ContractError, match=f"{FEATURES_ITEMS} of {DAYS[1]} has not been"):
        build((store, days[1]), DAYS[1], None)


def test_what_fails_half_way_leaves_nothing(days: Days, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise ArtifactError("no page today")

    before = build(days, CALM, days[1])
    monkeypatch.setattr(drift, "drift_html", fail)
    with pytest.raises(ArtifactError, match="no page today"):
        build(days, CALM, days[1], rebuild=True)
    assert days[0].get(DRIFT, CALM).digest == before.digest
    folder = days[0].path(DRIFT, CALM).parent
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]

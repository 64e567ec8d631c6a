"""The found configuration as an artifact, from a search that really trains (a tiny encoder)."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.keys import CONFIGURATION, ITEMS, TEST, TRAIN, VALIDATION
from recflow.adapters.search import build_configuration, found_values, trials_table
from recflow.core.artifacts import Artifact
from recflow.core.errors import ConfigError
from recflow.modeling.search_space import Choices, Range, SearchConfig
from recflow.modeling.tracking import NullTracker
from recflow_tests.unit.adapters.tiny_snapshot import store_snapshot
from recflow_tests.unit.modeling.tiny import quick, write_base_model

DAY = "2024-01-10"
BASE = quick({"schedule.head_epochs": 1, "schedule.encoder_epochs": 0})
CONFIG = SearchConfig(
    minutes=5,
    max_trials=4,
    space={
        "optimiser.head_learning_rate": Range(1e-5, 3e-2, log=True),
        "user_model.kind": Choices(("late_fusion", "mean")),
    },
)


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    store_snapshot(ArtifactStore(home / "store"), DAY)
    return home


@pytest.fixture(scope="module")
def found(home: Path, base_model: Path) -> Artifact:
    return search(home, base_model)


def search(home: Path, base_model: Path, **changes: Any) -> Artifact:
    arguments: dict[str, Any] = {
        "base_model": base_model,
        "base_config": BASE,
        "config": CONFIG,
        "studies": home / "studies",
        "cache_directory": home / "cache",
        "tracker": NullTracker(),
        "code_version": "1",
    }
    return build_configuration(ArtifactStore(home / "store"), DAY, **{**arguments, **changes})


def test_what_was_found_and_what_it_was_made_from(found: Artifact) -> None:
    values = found_values(found)
    assert values == found.facts["values"]
    assert set(values) == set(CONFIG.space)
    assert found.facts["trials"] == 4
    assert found.facts["best_metric"] >= found.facts["base_metric"]  # type: ignore[operator]
    assert set(found.manifest.parents) == {TRAIN, VALIDATION, ITEMS}
    assert TEST not in found.manifest.parents


def test_the_table_shows_every_trial_and_marks_the_best(found: Artifact) -> None:
    heads, _, *rows = trials_table(found).splitlines()
    assert heads == "| trial | state | auc | s | optimiser.head_learning_rate | user_model.kind |"
    assert len(rows) == 4
    best = found.facts["best_trial"]
    assert [("**best**" in row) for row in rows] == [number == best for number in range(4)]
    assert f"{BASE.optimiser.head_learning_rate:.4g} | late_fusion" in rows[0]


def test_the_table_shows_what_mattered_where_that_is_known(found: Artifact) -> None:
    facts: dict[str, Any] = {**found.facts, "importances": {"user_model.kind": 0.75}}
    manifest = dataclasses.replace(found.manifest, facts=facts)
    last = trials_table(dataclasses.replace(found, manifest=manifest)).splitlines()[-1]
    assert last == "|  | importance |  |  | 0% | 75% |"


def test_files_hold_no_timings(found: Artifact) -> None:
    trials = json.loads(found.file("trials.json").read_text())
    assert all("seconds" not in trial for trial in trials)
    assert len(found.facts["trial_seconds"]) == 4  # type: ignore[arg-type]


def test_a_search_is_not_repeated_and_goes_on_with_more_trials(
    home: Path, base_model: Path, found: Artifact, tmp_path: Path
) -> None:
    assert search(home, base_model).reused
    before = json.loads(found.file("trials.json").read_text())
    shutil.copytree(home, tmp_path / "home")
    more = search(tmp_path / "home", base_model, config=dataclasses.replace(CONFIG, max_trials=5))
    after = json.loads(more.file("trials.json").read_text())
    assert after[:4] == before
    assert len(after) == 5
    assert more.facts["trial_seconds"][:4] == found.facts["trial_seconds"]  # type: ignore[index]


def test_a_rebuilt_search_finds_the_same(tmp_path: Path, base_model: Path) -> None:
    store_snapshot(ArtifactStore(tmp_path / "store"), DAY)
    first = search(tmp_path, base_model)
    again = search(tmp_path, base_model, rebuild=True)
    assert not again.reused
    assert again.digest == first.digest
    assert again.manifest.created_at >= first.manifest.created_at


def test_an_impossible_space_is_refused_before_anything_is_read(
    tmp_path: Path, base_model: Path
) -> None:
    config = SearchConfig(space={"tuning.rank": Range(0, 4)})
    with pytest.raises(ConfigError, match="rank = 0"):
        search(tmp_path, base_model, config=config)
    assert not list((tmp_path).iterdir())
    assert not ArtifactStore(tmp_path).partitions(CONFIGURATION)

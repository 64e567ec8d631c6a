"""Only validated days enter a snapshot, and a snapshot never mixes its splits."""

from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.keys import (
    FEATURES_IMPRESSIONS,
    FEATURES_ITEMS,
    ITEMS,
    TEST,
    TRAIN,
    VALIDATION,
)
from recflow.adapters.parquet_io import Table, write_table
from recflow.adapters.snapshots import build_snapshot, load_snapshot
from recflow.adapters.validations import SUMMARY, validate_days
from recflow.core.artifacts import Artifact
from recflow.core.columns import IMPRESSION_FEATURES, ITEM_FEATURES, Columns
from recflow.core.errors import ContractError, SourceError
from recflow.data.features import item_features
from recflow.data.split import SplitConfig
from recflow_tests.unit.data.tables import MONDAY, at, raw_items, window

pytestmark = pytest.mark.filterwarnings("ignore:module 'sre_:DeprecationWarning")

DAYS = [(MONDAY + timedelta(days=day)).date().isoformat() for day in range(4)]
CONFIG = SplitConfig(window_days=4, validation_days=1, test_days=1, max_history=10)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def put(store: ArtifactStore, key: str, day: str, frame: pl.DataFrame, version: str = "1") -> None:
    store.build(
        key,
        day,
        lambda draft: write_table(draft, Table(frame)),
        code_version=version,
        parents={},
        config={},
    )


def put_day(store: ArtifactStore, number: int, *, title: str = "A title") -> None:
    rows = [{"impression_id": f"{number}-{n}", "time": at(24 * number + n)} for n in (1, 2)]
    put(store, FEATURES_IMPRESSIONS, DAYS[number], window(*rows))
    items = raw_items({"item_id": "a", "title": title}, {"item_id": "b"})
    put(store, FEATURES_ITEMS, DAYS[number], item_features(items))


def validate(store: ArtifactStore) -> dict[str, dict[str, Artifact]]:
    return {
        FEATURES_IMPRESSIONS: validate_days(store, FEATURES_IMPRESSIONS, IMPRESSION_FEATURES, DAYS),
        FEATURES_ITEMS: validate_days(store, FEATURES_ITEMS, ITEM_FEATURES, DAYS),
    }


def build(store: ArtifactStore) -> dict[str, Artifact]:
    return build_snapshot(store, DAYS[-1], window=DAYS, config=CONFIG, code_version="1")


def test_snapshot_of_validated_days(store: ArtifactStore) -> None:
    for number in (0, 2, 3):  # the second day is missing: allowed, and counted
        put_day(store, number, title=f"Title of day {number}")
    validate(store)
    built = build(store)
    rows = {key: artifact.facts["rows"] for key, artifact in built.items()}
    assert rows == {TRAIN: 2, VALIDATION: 2, TEST: 2, ITEMS: 2}
    assert built[TRAIN].facts["missing_days"] == [DAYS[1]]
    snapshot = load_snapshot(store, DAYS[-1])
    assert snapshot.splits.test[Columns.HISTORY].to_list() == [["a"], ["a"]]
    # The newest day's text of an item is the one that counts.
    texts = dict(snapshot.items.select(Columns.ITEM_ID, Columns.TEXT).iter_rows())
    assert texts["a"].startswith("Title of day 3")
    assert all(artifact.reused for artifact in build(store).values())


def test_days_that_nobody_validated_are_refused(store: ArtifactStore) -> None:
    for number in range(4):
        put_day(store, number)
    with pytest.raises(ContractError, match=f"features/impressions of {DAYS[0]} has not been"):
        build(store)
    assert not store.path(TRAIN, DAYS[-1]).exists()


def test_a_day_that_changed_after_its_validation_is_refused(store: ArtifactStore) -> None:
    for number in range(4):
        put_day(store, number)
    validate(store)
    changed = item_features(raw_items({"item_id": "c"}))
    put(store, FEATURES_ITEMS, DAYS[2], changed, version="2")
    with pytest.raises(ContractError, match=f"features/items of {DAYS[2]} has not been validated"):
        build(store)


def test_a_day_that_failed_is_refused_and_its_summary_speaks_of_it(store: ArtifactStore) -> None:
    for number in range(4):
        put_day(store, number, title="word " * 1200 if number == 1 else "A title")
    validations = validate(store)[FEATURES_ITEMS]
    success = {day: validation.facts["success"] for day, validation in validations.items()}
    assert success == {DAYS[0]: True, DAYS[1]: False, DAYS[2]: True, DAYS[3]: True}
    assert DAYS[1] in validations[DAYS[1]].file(SUMMARY).read_text()
    with pytest.raises(ContractError, match=f"features/items of {DAYS[1]} failed its validation"):
        build(store)


def test_validations_count_the_rows_of_their_own_day(store: ArtifactStore) -> None:
    for number in range(2):
        put_day(store, number)
    validations = validate(store)[FEATURES_IMPRESSIONS]
    assert [validation.facts["rows"] for validation in validations.values()] == [2, 2]


def test_validated_days_are_not_validated_again(store: ArtifactStore) -> None:
    put_day(store, 0)
    validate(store)
    assert all(v.reused for table in validate(store).values() for v in table.values())


def test_nothing_stored_is_an_error_that_says_what_to_do(store: ArtifactStore) -> None:
    with pytest.raises(SourceError, match="materialise features/impressions and features/items"):
        build(store)

"""Days of tables: stored in one pass, rebuilt only when their input changed, never half."""

from collections.abc import Mapping
from datetime import date
from pathlib import Path

import polars as pl
import pytest

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.parquet_io import (
    QUARANTINED,
    Table,
    build_days,
    ingest_impressions,
    ingest_items,
    read_frame,
)
from recflow.core.artifacts import Artifact
from recflow.core.columns import Columns, Reason
from recflow.core.errors import SourceError
from recflow.data.sources import open_source
from recflow_tests.unit.sources.helpers import BEHAVIORS, write_mind

DAYS = ["2019-11-14", "2019-11-15", "2019-11-16"]


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def ingest(store: ArtifactStore, logs: Path, days: list[str] = DAYS) -> dict[str, Artifact]:
    return ingest_impressions(
        store, "raw/impressions", open_source("mind", logs), days, code_version="1"
    )


def test_each_day_gets_its_rows_in_source_order(store: ArtifactStore, tmp_path: Path) -> None:
    built = ingest(store, write_mind(tmp_path / "logs"))
    assert list(built) == DAYS[1:]  # the log has nothing on the 14th
    ids = {d: read_frame(a)[Columns.IMPRESSION_ID].to_list() for d, a in built.items()}
    assert ids == {"2019-11-15": ["1", "2"], "2019-11-16": ["3"]}
    assert [a.facts["rows"] for a in built.values()] == [2, 1]


def test_bad_lines_are_stored_beside_the_rows(store: ArtifactStore, tmp_path: Path) -> None:
    logs = write_mind(tmp_path / "logs", BEHAVIORS + "4\tU1\tyesterday\t\tN1-1\nbroken\n")
    built = ingest(store, logs)
    quarantine = pl.concat(read_frame(a, QUARANTINED) for a in built.values())
    assert sorted(quarantine[Columns.REASON]) == [
        Reason.UNREADABLE_TIME,
        Reason.WRONG_COLUMN_COUNT,
    ]
    assert sorted(quarantine[Columns.SOURCE_ROW]) == [4, 5]
    assert sum(a.facts["rows"] + a.facts["quarantined"] for a in built.values()) == 5  # type: ignore[operator]


def test_a_day_is_the_same_whether_ingested_alone_or_in_a_range(tmp_path: Path) -> None:
    logs = write_mind(tmp_path / "logs")
    together = ingest(ArtifactStore(tmp_path / "a"), logs)
    alone = ingest(ArtifactStore(tmp_path / "b"), logs, ["2019-11-16"])
    assert alone["2019-11-16"].digest == together["2019-11-16"].digest


def test_ingested_days_are_reused_until_the_log_changes(
    store: ArtifactStore, tmp_path: Path
) -> None:
    logs = write_mind(tmp_path / "logs")
    ingest(store, logs)
    assert all(artifact.reused for artifact in ingest(store, logs).values())
    write_mind(logs, BEHAVIORS + "4\tU9\t11/16/2019 1:00:00 PM\t\tN1-1 N2-0\n")
    again = ingest(store, logs)
    assert not any(artifact.reused for artifact in again.values())
    assert again["2019-11-16"].facts["rows"] == 2


def test_days_the_log_lacks_are_an_error_that_names_those_it_has(
    store: ArtifactStore, tmp_path: Path
) -> None:
    logs = write_mind(tmp_path / "logs")
    with pytest.raises(SourceError, match=r"no impressions from 2020-01-01.*2019-11-15 to 2019-"):
        ingest(store, logs, ["2020-01-01"])


def test_an_unreadable_log_leaves_nothing_behind(store: ArtifactStore, tmp_path: Path) -> None:
    logs = write_mind(tmp_path / "logs", BEHAVIORS.replace("\t", ","))
    with pytest.raises(SourceError):
        ingest(store, logs)
    assert not store.root.exists() or not list(store.root.iterdir())


def test_the_catalogue_is_stored_under_every_day(store: ArtifactStore, tmp_path: Path) -> None:
    source = open_source("mind", write_mind(tmp_path / "logs"))
    built = ingest_items(store, "raw/items", source, DAYS, code_version="1")
    assert list(built) == DAYS
    assert len({artifact.digest for artifact in built.values()}) == 1
    assert read_frame(built[DAYS[0]])[Columns.ITEM_ID].to_list() == ["N1", "N2", "N3", "N4"]


def lengths(inputs: Mapping[str, Artifact]) -> Table:
    frame = read_frame(inputs["raw/impressions"])
    return Table(frame.select(pl.col(Columns.CANDIDATES).list.len().alias("n")), facts={"seen": 1})


def build_lengths(store: ArtifactStore, days: list[str] = DAYS, **config: int) -> dict:
    return build_days(
        store,
        "lengths",
        days,
        lengths,
        parents=["raw/impressions"],
        code_version="1",
        config=config,
    )


def test_days_without_input_are_absent(store: ArtifactStore, tmp_path: Path) -> None:
    ingest(store, write_mind(tmp_path / "logs"))
    built = build_lengths(store)
    assert list(built) == DAYS[1:]
    assert read_frame(built["2019-11-15"])["n"].to_list() == [2, 3]
    assert built["2019-11-15"].facts == {"rows": 2, "seen": 1}


def test_days_are_rebuilt_when_configuration_or_parents_change(
    store: ArtifactStore, tmp_path: Path
) -> None:
    logs = write_mind(tmp_path / "logs")
    ingest(store, logs)
    build_lengths(store, k=1)
    assert all(a.reused for a in build_lengths(store, k=1).values())
    assert not any(a.reused for a in build_lengths(store, k=2).values())
    # Only the 16th changes, so only the 16th is built again.
    write_mind(logs, BEHAVIORS.replace("N2-1", "N2-1 N1-0"))
    ingest(store, logs)
    assert {d: a.reused for d, a in build_lengths(store, k=2).items()} == {
        "2019-11-15": True,
        "2019-11-16": False,
    }


def test_no_input_at_all_is_an_error(store: ArtifactStore) -> None:
    with pytest.raises(SourceError, match="no day of"):
        build_lengths(store)


def test_newest_days_alone_do_not_read_outside_them(store: ArtifactStore, tmp_path: Path) -> None:
    ingest(store, write_mind(tmp_path / "logs"), ["2019-11-16"])
    assert not store.path("raw/impressions", "2019-11-15").exists()
    assert date.fromisoformat(next(iter(build_lengths(store)))) == date(2019, 11, 16)

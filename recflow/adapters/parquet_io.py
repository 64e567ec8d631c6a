"""Frames as Parquet files inside artifacts, and whole days of a log written in one pass."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, timedelta
from functools import cache
from pathlib import Path

import polars as pl

from recflow.adapters.artifact_store import ArtifactStore
from recflow.core.artifacts import Artifact, Draft, JsonValue
from recflow.core.columns import IMPRESSIONS, ITEMS, QUARANTINE, Columns, TableContract, reasons_of
from recflow.core.errors import SourceError
from recflow.data.sources.base import RawTable, Source

ROWS = "rows"
QUARANTINED = "quarantine"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows to store, with the rows that were set aside and facts about both."""

    rows: pl.DataFrame
    quarantine: pl.DataFrame | None = None
    facts: Mapping[str, int] = field(default_factory=lambda: {})


def write_frame(draft: Draft, name: str, frame: pl.DataFrame) -> None:
    """Write ``<name>.parquet`` into the draft."""
    frame.write_parquet(draft.path / f"{name}.parquet", compression="zstd", compression_level=3)


def read_frame(artifact: Artifact, name: str = ROWS) -> pl.DataFrame:
    """Read ``<name>.parquet`` of an artifact."""
    return pl.read_parquet(artifact.file(f"{name}.parquet"))


def read_frames(artifacts: Iterable[Artifact], contract: TableContract) -> pl.DataFrame:
    """Read and stack the rows of several artifacts, in the order given."""
    return pl.concat([contract.empty(), *(read_frame(artifact) for artifact in artifacts)])


def write_table(draft: Draft, table: Table) -> None:
    """Write the rows and the quarantine of a table, and their counts as facts."""
    write_frame(draft, ROWS, table.rows)
    draft.facts |= {"rows": table.rows.height, **table.facts}
    if table.quarantine is not None:
        write_frame(draft, QUARANTINED, table.quarantine)
        draft.facts["quarantined"] = table.quarantine.height
        draft.facts["quarantined_by_reason"] = {**reasons_of(table.quarantine)}


def row_count(artifact: Artifact) -> int:
    """Rows of a stored table."""
    return _int(artifact.facts["rows"])


def total_counts(artifacts: Iterable[Artifact], fact: str) -> dict[str, int]:
    """Add up a fact that holds counts by name, most frequent first."""
    totals: dict[str, int] = {}
    for artifact in artifacts:
        counts = artifact.facts.get(fact)
        for name, count in (counts if isinstance(counts, dict) else {}).items():
            totals[name] = totals.get(name, 0) + _int(count)
    return dict(sorted(totals.items(), key=lambda item: (-item[1], item[0])))


def build_days(
    store: ArtifactStore,
    key: str,
    days: Sequence[str],
    build: Callable[[Mapping[str, Artifact]], Table],
    *,
    parents: Sequence[str],
    code_version: str,
    config: Mapping[str, JsonValue],
    rebuild: bool = False,
) -> dict[str, Artifact]:
    """Build a daily table for each of ``days`` whose parents are stored.

    Args:
        store: Where parents are read and the table is written.
        key: Artifact key of the table.
        days: Partition keys, oldest first.
        build: Makes a day's table from the same day of each parent.
        parents: Artifact keys of the parents.
        code_version: Version of the code ``build`` runs.
        config: Configuration ``build`` depends on.
        rebuild: Build also what is already stored.

    Returns:
        The artifact of each day that has one; days without input are absent.

    Raises:
        SourceError: No day has input.
    """
    stored = {parent: store.existing(parent, days) for parent in parents}
    built: dict[str, Artifact] = {}
    for day in days:
        inputs = {parent: stored[parent][day] for parent in parents if day in stored[parent]}
        if len(inputs) < len(parents):
            continue

        def build_day(draft: Draft, inputs: Mapping[str, Artifact] = inputs) -> None:
            write_table(draft, build(inputs))

        built[day] = store.build(
            key,
            day,
            build_day,
            code_version=code_version,
            parents=inputs,
            config=config,
            rebuild=rebuild,
        )
    if not built:
        raise SourceError(
            f"{key} has nothing to read from {days[0]} to {days[-1]}: no day of {list(parents)} is "
            "stored. Materialise those days first, or choose days the log has."
        )
    return built


def ingest_impressions(
    store: ArtifactStore,
    key: str,
    source: Source,
    days: Sequence[str],
    *,
    code_version: str,
    rebuild: bool = False,
) -> dict[str, Artifact]:
    """Store the raw impressions of ``days``, reading the source once and in a stream.

    Returns:
        The artifact of each day the log has; days without a row are absent.

    Raises:
        SourceError: The log has none of the days, or cannot be read.
    """
    config: dict[str, JsonValue] = {"source": source.name, "files": source.fingerprint()}
    found = {
        day: store.find(key, day, code_version=code_version, parents={}, config=config)
        for day in days
    }
    stored = {day: artifact for day, artifact in found.items() if artifact and not rebuild}
    wanted = [day for day in days if day not in stored]
    if wanted:
        first, last = date.fromisoformat(wanted[0]), date.fromisoformat(wanted[-1])
        raw = source.impressions(first, last + timedelta(days=1))
        with _staged_by_day(store.root, raw) as (rows_of, quarantine_of):
            for day in wanted:
                rows, quarantine = rows_of.get(day), quarantine_of.get(day)
                if rows is None and quarantine is None:
                    continue

                def build(
                    draft: Draft,
                    rows: Path | None = rows,
                    quarantine: Path | None = quarantine,
                ) -> None:
                    write_table(
                        draft,
                        Table(
                            _read_staged(rows, IMPRESSIONS), _read_staged(quarantine, QUARANTINE)
                        ),
                    )

                stored[day] = store.build(
                    key,
                    day,
                    build,
                    code_version=code_version,
                    parents={},
                    config=config,
                    rebuild=rebuild,
                )
    if not stored:
        have = source.days()
        raise SourceError(
            f"no impressions from {days[0]} to {days[-1]} in {source.directory}; "
            f"the log has {len(have)} days from {have[0]} to {have[-1]}"
        )
    return {day: stored[day] for day in days if day in stored}


def ingest_items(
    store: ArtifactStore,
    key: str,
    source: Source,
    days: Sequence[str],
    *,
    code_version: str,
    rebuild: bool = False,
) -> dict[str, Artifact]:
    """Store the catalogue as it is now under each of ``days``, reading it once."""
    config: dict[str, JsonValue] = {"source": source.name, "files": source.fingerprint()}
    catalogue = cache(lambda: _collect_catalogue(source))
    return {
        day: store.build(
            key,
            day,
            lambda draft: write_table(draft, catalogue()),
            code_version=code_version,
            parents={},
            config=config,
            rebuild=rebuild,
        )
        for day in days
    }


def _collect_catalogue(source: Source) -> Table:
    raw = source.items()
    rows, quarantine = pl.collect_all([raw.rows, raw.quarantine])
    return Table(
        ITEMS.conform(rows.lazy()).collect(), QUARANTINE.conform(quarantine.lazy()).collect()
    )


@contextmanager
def _staged_by_day(root: Path, raw: RawTable) -> Generator[tuple[dict[str, Path], dict[str, Path]]]:
    """Split rows and quarantine by day on disk, so that no more than one day is held in memory."""
    scratch = root / f".staging.{uuid.uuid4().hex}"
    try:
        yield (
            _split_by_day(raw.rows, scratch / ROWS),
            _split_by_day(raw.quarantine, scratch / QUARANTINED),
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _split_by_day(frame: pl.LazyFrame, folder: Path) -> dict[str, Path]:
    folder.mkdir(parents=True)
    frame.sink_parquet(pl.PartitionBy(folder, key=Columns.DAY, include_key=False), mkdir=True)
    return {path.name.removeprefix(f"{Columns.DAY}="): path for path in sorted(folder.iterdir())}


def _read_staged(folder: Path | None, contract: TableContract) -> pl.DataFrame:
    """Read a day's staged files in source order, whatever order they were written in."""
    if folder is None:
        return contract.empty()
    frame = pl.read_parquet(folder / "*.parquet")
    return contract.conform(frame.lazy()).collect().sort(Columns.SOURCE_FILE, Columns.SOURCE_ROW)


def _int(value: JsonValue) -> int:
    assert isinstance(value, int)
    return value

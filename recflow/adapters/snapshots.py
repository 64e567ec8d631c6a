"""Training snapshots: a window of validated days, split by time, stored as four artifacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache, cached_property

import polars as pl

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.keys import (
    FEATURES_IMPRESSIONS,
    FEATURES_ITEMS,
    ITEMS,
    TEST,
    TRAIN,
    VALIDATION,
)
from recflow.adapters.parquet_io import Table, read_frame, read_frames, write_table
from recflow.adapters.validations import require_valid
from recflow.core.artifacts import Artifact, Draft, JsonValue
from recflow.core.columns import IMPRESSION_FEATURES, ITEM_FEATURES, Columns
from recflow.core.errors import SourceError
from recflow.data.split import SplitConfig, Splits, missing_days, split_by_time

SPLIT_KEYS = (TRAIN, VALIDATION, TEST, ITEMS)


@dataclass(frozen=True)
class Snapshot:
    """A stored snapshot; its tables are read when they are first asked for.

    Attributes:
        artifacts: The artifacts of :data:`SPLIT_KEYS`, by key.
    """

    artifacts: Mapping[str, Artifact]

    @cached_property
    def items(self) -> pl.DataFrame:
        """The catalogue."""
        return read_frame(self.artifacts[ITEMS])

    @cached_property
    def splits(self) -> Splits:
        """Training, validation and test impressions."""
        return Splits(*(read_frame(self.artifacts[key]) for key in (TRAIN, VALIDATION, TEST)))


def build_snapshot(
    store: ArtifactStore,
    snapshot: str,
    *,
    window: Sequence[str],
    config: SplitConfig,
    code_version: str,
    rebuild: bool = False,
) -> dict[str, Artifact]:
    """Read the window's validated days, extend the histories, split by time, and store the splits.

    Args:
        store: Where the days are read and the splits are written.
        snapshot: Partition key of the snapshot: the last day of the window.
        window: Partition keys of the window's days, oldest first.
        config: Lengths of the splits and of the histories.
        code_version: Version of the splitting code.
        rebuild: Build also what is already stored.

    Returns:
        The artifacts of :data:`SPLIT_KEYS`, by key.

    Raises:
        SourceError: No day of the window is stored.
        ContractError: A day of the window is not validated, or failed its validation.
    """
    impressions = store.existing(FEATURES_IMPRESSIONS, window)
    items = store.existing(FEATURES_ITEMS, window)
    if not impressions or not items:
        raise SourceError(
            f"snapshot {snapshot} has no day to read from {window[0]} to {window[-1]}; "
            f"materialise {FEATURES_IMPRESSIONS} and {FEATURES_ITEMS} for that window first"
        )
    require_valid(store, FEATURES_IMPRESSIONS, impressions)
    require_valid(store, FEATURES_ITEMS, items)
    present = {date.fromisoformat(day) for day in impressions}
    last_day = date.fromisoformat(snapshot)
    missing = missing_days(present, last_day=last_day, window_days=config.window_days)
    tables = cache(lambda: _tables(impressions, items, last_day, config))
    parents = {
        **{f"{FEATURES_IMPRESSIONS}/{day}": artifact for day, artifact in impressions.items()},
        **{f"{FEATURES_ITEMS}/{day}": artifact for day, artifact in items.items()},
    }

    def build(key: str) -> Artifact:
        def write(draft: Draft) -> None:
            write_table(draft, tables()[key])
            draft.facts |= {
                "days_in_window": len(window),
                "days_present": len(present),
                "days_missing": len(missing),
                "missing_days": [day.isoformat() for day in missing],
            }

        return store.build(
            key,
            snapshot,
            write,
            code_version=code_version,
            parents=parents,
            config=_as_json(config),
            rebuild=rebuild,
        )

    return {key: build(key) for key in SPLIT_KEYS}


def load_snapshot(store: ArtifactStore, snapshot: str) -> Snapshot:
    """Open a stored snapshot.

    Raises:
        ArtifactError: A part of it is missing or altered.
    """
    return Snapshot({key: store.get(key, snapshot) for key in SPLIT_KEYS})


def _tables(
    impressions: Mapping[str, Artifact],
    items: Mapping[str, Artifact],
    last_day: date,
    config: SplitConfig,
) -> dict[str, Table]:
    window = read_frames(impressions.values(), IMPRESSION_FEATURES)
    splits = split_by_time(window, last_day=last_day, config=config)
    return {
        TRAIN: _split_table(splits.train),
        VALIDATION: _split_table(splits.validation),
        TEST: _split_table(splits.test),
        ITEMS: Table(newest_of_each_item(items)),
    }


def newest_of_each_item(items: Mapping[str, Artifact]) -> pl.DataFrame:
    """The catalogue of the window: of each item the row of the newest day that has it."""
    stacked = read_frames((items[day] for day in sorted(items)), ITEM_FEATURES)
    return stacked.unique(Columns.ITEM_ID, keep="last").sort(Columns.ITEM_ID)


def _split_table(frame: pl.DataFrame) -> Table:
    return Table(
        frame,
        facts={
            "users": frame[Columns.USER_ID].n_unique(),
            "clicks": int(frame[Columns.CLICK_COUNT].sum()),
            "cold_impressions": frame.filter(pl.col(Columns.HISTORY_LENGTH) == 0).height,
        },
    )


def _as_json(config: SplitConfig) -> dict[str, JsonValue]:
    return {**asdict(config)}

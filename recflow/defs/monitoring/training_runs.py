"""Which snapshots are trained or being trained, as far as Dagster's instance knows.

A snapshot is trained once its report is there, whichever job or click made it, and whether or not
the gate then let the model through. It is being trained while a run is queued or runs that will
make it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import cast

import dagster as dg

from recflow.adapters.keys import FINE_TUNED, REPORT

SNAPSHOT_TAG = "recflow/snapshot"
"""Day of the run; the run queue starts one run at a time for each."""
TRIGGER_TAG = "recflow/trigger"
"""What requested the run: ``nightly`` or ``drift``."""
REASON_TAG = "recflow/reason"
"""Why, in words."""

TRAINING_JOBS = frozenset({"train", "full", "retrain"})
_PARTITION_TAG = "dagster/partition"
_RUN_KEY_TAG = "dagster/run_key"
# What says who started a run that has no tag of ours, the most telling first.
_ORIGIN_TAGS = ("dagster/schedule_name", "dagster/sensor_name", "dagster/backfill")
_TRAINED_ASSETS = frozenset(dg.AssetKey(key.split("/")) for key in (FINE_TUNED, REPORT))
_REPORT_ASSET = dg.AssetKey(REPORT.split("/"))
# A run that was not handed to the queue yet counts for nothing: where a daemon is killed between
# the two, it is the next request with the same key that hands it over.
_IN_PROGRESS = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


@dataclass(frozen=True, slots=True)
class Training:
    """A run that trains, or trained, a snapshot.

    Attributes:
        run_id: Dagster's run; empty where it is not known any more.
        snapshot: Last day of the snapshot.
        trigger: Who started it, e.g. ``nightly``, ``drift`` or ``by hand``.
        done: Whether it has made the snapshot's report.
    """

    run_id: str
    snapshot: date
    trigger: str
    done: bool

    def __str__(self) -> str:
        """As the reason why nobody else has to train the snapshot."""
        state = "was" if self.done else "is being"
        who = f" by run {self.run_id[:8]} ({self.trigger})" if self.run_id else ""
        return f"snapshot {self.snapshot} {state} trained{who}"


def find_training(instance: dg.DagsterInstance, snapshot: date) -> Training | None:
    """Return who is training a snapshot, or has trained it; ``None`` where it is to be trained."""
    running = [run for run in _running(instance) if run.snapshot == snapshot]
    return running[0] if running else _trained(instance, snapshot)


def newest_snapshot(instance: dg.DagsterInstance) -> date | None:
    """Return the newest snapshot that is trained or being trained, if there is one."""
    trained = instance.get_latest_storage_id_by_partition(
        _REPORT_ASSET, dg.DagsterEventType.ASSET_MATERIALIZATION
    )
    days = [date.fromisoformat(day) for day in trained]
    return max([*days, *(run.snapshot for run in _running(instance))], default=None)


def find_launched(instance: dg.DagsterInstance, run_key: str) -> dg.DagsterRun | None:
    """Return the run that was launched with a run key, if it has ended."""
    runs = instance.get_runs(dg.RunsFilter(tags={_RUN_KEY_TAG: run_key}), limit=1)
    return runs[0] if runs and runs[0].is_finished else None


def partition_of(run: dg.DagsterRun) -> str:
    """Day of a run, or an empty text."""
    return run.tags.get(_PARTITION_TAG, "")


def _running(instance: dg.DagsterInstance) -> Sequence[Training]:
    """Trainings that are queued or run, the newest first."""
    runs = instance.get_runs(dg.RunsFilter(statuses=_IN_PROGRESS))
    return [
        _training(run, snapshot, done=False)
        for run in runs
        if _trains(run) and (snapshot := _snapshot_of(run))
    ]


def _trained(instance: dg.DagsterInstance, snapshot: date) -> Training | None:
    found = instance.fetch_materializations(
        dg.AssetRecordsFilter(_REPORT_ASSET, asset_partitions=[str(snapshot)]), limit=1
    )
    for record in found.records:
        run = instance.get_run_by_id(record.run_id)
        # Runs can be deleted, and events be reported without one.
        return _training(run, snapshot, done=True) if run else Training("", snapshot, "", True)
    return None


def _training(run: dg.DagsterRun, snapshot: date, *, done: bool) -> Training:
    origins = (run.tags.get(tag) for tag in (TRIGGER_TAG, *_ORIGIN_TAGS))
    trigger = next((origin for origin in origins if origin), "by hand")
    return Training(run.run_id, snapshot, trigger, done)


def _snapshot_of(run: dg.DagsterRun) -> date | None:
    # Another location of the same instance may have a job of the same name, and other partitions.
    try:
        return date.fromisoformat(partition_of(run))
    except ValueError:
        return None


def _trains(run: dg.DagsterRun) -> bool:
    if run.asset_selection is None:
        return run.job_name in TRAINING_JOBS
    return bool(_TRAINED_ASSETS & cast("frozenset[dg.AssetKey]", run.asset_selection))

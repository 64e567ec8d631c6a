"""What benchmarks do in processes of their own, so that peak memory is that of the work alone."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil


def in_own_process(module: str, option: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """Run a benchmark's module in a fresh process and return the JSON object it prints last.

    Args:
        module: Name of the module.
        option: What tells it to do a job.
        job: The job.
    """
    run = subprocess.run(
        [sys.executable, "-m", module, option, json.dumps(job)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def train_here(job: Mapping[str, Any], *, checkpoints: bool = False) -> dict[str, Any]:
    """Train on a stored snapshot in this process and return the report.

    Args:
        job: ``store`` and ``snapshot``, ``base_model``, ``threads``, ``values`` of the
            configuration.
        checkpoints: Whether the training keeps its state, as it does when Dagster runs it.
    """
    from recflow.adapters.artifact_store import ArtifactStore
    from recflow.adapters.snapshots import load_snapshot
    from recflow.modeling.config import TrainingConfig, with_values
    from recflow.modeling.tracking import NullTracker
    from recflow.modeling.trainer import train_ranker

    data = load_snapshot(ArtifactStore(Path(job["store"])), job["snapshot"])
    with tempfile.TemporaryDirectory() as output, tempfile.TemporaryDirectory() as state:
        report = train_ranker(
            items=data.items,
            train=data.splits.train,
            validation=data.splits.validation,
            base_model=Path(job["base_model"]),
            output=Path(output),
            config=with_values(TrainingConfig(threads=job["threads"]), job["values"]),
            tracker=NullTracker(),
            checkpoints=Path(state) / "training" if checkpoints else None,
        )
    return asdict(report)


def others_share() -> Callable[[], float]:
    """Begin to watch the processors.

    Returns:
        What, once the work is done, tells the share of the processors' time that went to others
        than this process and the children that it has waited for: other programs, and machines that
        share the processors with this virtual one. Times measured beside much of that are no times
        of a quiet machine.
    """
    before = _processor_seconds()

    def ended() -> float:
        whole, idle, own = (
            now - then for now, then in zip(_processor_seconds(), before, strict=True)
        )
        return max(0.0, whole - idle - own) / whole if whole else 0.0

    return ended


def _processor_seconds() -> tuple[float, float, float]:
    """Of all processors: in all, idle; and of this process and its ended children."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    whole = times.user + times.system + idle + getattr(times, "nice", 0.0)
    whole += sum(getattr(times, kind, 0.0) for kind in ("irq", "softirq", "steal"))
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return whole, idle, sum(each.ru_utime + each.ru_stime for each in used)

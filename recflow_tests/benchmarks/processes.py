"""What benchmarks do in processes of their own, so that peak memory is that of the work alone."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any


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

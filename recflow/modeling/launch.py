"""Several processes for one training: ``torchrun`` starts them, and they report back.

The parent writes the tables and a description of the job into a folder, starts the processes, and
passes what the first of them reports on to its own tracker; so nothing of MLflow or Dagster has to
exist in them. The same worker runs under any other launcher that sets torch's environment, such as
several machines with ``torchrun --nnodes``, on a folder of :func:`write_job`:

    torchrun --nproc-per-node 2 -m recflow.modeling.launch JOB_FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import polars as pl

import recflow.core.errors as errors
from recflow.core.artifacts import JsonValue, write_text_atomically
from recflow.core.errors import RecflowError
from recflow.modeling.config import TrainingConfig, config_from
from recflow.modeling.distribution import choose_device, joined_team
from recflow.modeling.reports import EpochReport, TrainingReport
from recflow.modeling.tracking import NullTracker, Tracker
from recflow.modeling.trainer import EpochListener, train_as_member

_JOB, _EVENTS, _REPORT, _ERROR = "job.json", "events.jsonl", "report.json", "error.json"
_TABLES: Final = ("items", "train", "validation")
_SECONDS_BETWEEN_LOOKS: Final = 0.2
_SECONDS_TO_STOP: Final = 10.0


def train_in_processes(
    *,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    base_model: Path,
    output: Path,
    config: TrainingConfig,
    tracker: Tracker,
    cache_directory: Path | None,
    checkpoints: Path | None,
    on_epoch: EpochListener | None,
) -> TrainingReport:
    """Train with ``config.distribution.processes`` processes on this machine.

    The arguments are those of :func:`recflow.modeling.trainer.train_ranker`.

    Raises:
        RecflowError: What the processes raised, or that one of them was killed.
    """
    with tempfile.TemporaryDirectory(prefix="recflow-training-") as folder:
        job = Path(folder)
        write_job(
            job,
            items=items,
            train=train,
            validation=validation,
            base_model=base_model,
            output=output,
            config=config,
            cache_directory=cache_directory or job / "cache",
            checkpoints=checkpoints,
            parent=os.getpid(),
        )
        processes = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node", str(config.distribution.processes)),
                *("-m", "recflow.modeling.launch", str(job)),
            ],
            env={**os.environ, "OMP_NUM_THREADS": str(config.threads)},
            start_new_session=True,
        )
        try:
            for event in _events(job / _EVENTS, processes):
                _pass_on(event, tracker, on_epoch)
        finally:
            _stop(processes)
        return _result(job, processes.returncode)


def write_job(
    job: Path,
    *,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    base_model: Path,
    output: Path,
    config: TrainingConfig,
    cache_directory: Path,
    checkpoints: Path | None = None,
    parent: int | None = None,
) -> None:
    """Describe a training in a folder, for processes that any launcher starts.

    On several machines the paths must mean the same on each; ``report.json`` appears at the end.

    Args:
        job: Existing folder.
        items: Item features.
        train: Training impressions.
        validation: Validation impressions.
        base_model: Hugging Face directory of the pretrained encoder.
        output: Existing empty directory for the ranker.
        config: How to train.
        cache_directory: Where hidden states are kept.
        checkpoints: Where the state of this training is kept.
        parent: Process without which the training stops.
    """
    tables = {"items": items, "train": train, "validation": validation}
    for name, table in tables.items():
        table.write_parquet(job / f"{name}.parquet")
    description = {
        "base_model": str(base_model.absolute()),
        "output": str(output.absolute()),
        "cache_directory": str(cache_directory.absolute()),
        "checkpoints": None if checkpoints is None else str(checkpoints.absolute()),
        "config": asdict(config),
        "parent": parent,
    }
    write_text_atomically(job / _JOB, json.dumps(description, indent=2))


def _events(path: Path, processes: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """What the first process writes, until all have ended."""
    while not path.exists() and processes.poll() is None:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        rest = ""
        while True:
            ended = processes.poll() is not None
            rest += lines.read()
            *complete, rest = rest.split("\n")
            yield from map(json.loads, complete)
            if ended:
                return
            time.sleep(_SECONDS_BETWEEN_LOOKS)


def _pass_on(event: Mapping[str, Any], tracker: Tracker, on_epoch: EpochListener | None) -> None:
    if "metrics" in event:
        tracker.log_metrics(event["metrics"], step=event["step"])
    elif on_epoch is not None:
        on_epoch(EpochReport(**event["epoch"]))


def _stop(processes: subprocess.Popen[bytes]) -> None:
    """End whatever still runs, also when the parent was interrupted."""
    if processes.poll() is None:
        os.killpg(processes.pid, signal.SIGTERM)
        try:
            processes.wait(_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            os.killpg(processes.pid, signal.SIGKILL)
            processes.wait()


def _result(job: Path, returncode: int) -> TrainingReport:
    if (job / _ERROR).exists():
        told = json.loads((job / _ERROR).read_text(encoding="utf-8"))
        raise getattr(errors, told["kind"])(told["message"])
    if returncode or not (job / _REPORT).exists():
        raise RecflowError(
            f"a process of the training ended with status {returncode}; the lines above say why. "
            "Running it again goes on from the last checkpoint"
        )
    return TrainingReport.from_dict(json.loads((job / _REPORT).read_text(encoding="utf-8")))


class _EventWriter(NullTracker):
    """Reports to the parent, line by line, and notices when it is gone."""

    def __init__(self, path: Path, parent: int | None) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._parent = parent

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._write({"metrics": dict(metrics), "step": step})

    def epoch(self, report: EpochReport) -> None:
        self._write({"epoch": asdict(report)})

    def _write(self, event: Mapping[str, JsonValue]) -> None:
        if self._parent is not None and not _is_alive(self._parent):
            raise RecflowError("whoever started this training is gone, so it stops")
        self._file.write(json.dumps(event) + "\n")


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def run_member(job: Path) -> None:
    """Do this process' part of the job in a folder; called under ``torchrun``.

    Raises:
        RecflowError: What the training raised; the first to fail also writes it down.
    """
    described = json.loads((job / _JOB).read_text(encoding="utf-8"))
    config = config_from(TrainingConfig, described["config"])
    checkpoints = described["checkpoints"]
    try:
        with joined_team(choose_device(config.device)) as team:
            first = team.rank == 0
            writer = _EventWriter(job / _EVENTS, described["parent"]) if first else None
            report = train_as_member(
                **{name: pl.read_parquet(job / f"{name}.parquet") for name in _TABLES},
                base_model=Path(described["base_model"]),
                output=Path(described["output"]),
                config=config,
                tracker=writer or NullTracker(),
                cache_directory=Path(described["cache_directory"]),
                checkpoints=None if checkpoints is None else Path(checkpoints),
                on_epoch=writer.epoch if writer else None,
                team=team,
            )
            if first:
                write_text_atomically(job / _REPORT, json.dumps(asdict(report)))
    except RecflowError as error:
        told = {"kind": type(error).__name__, "message": str(error)}
        write_text_atomically(job / _ERROR, json.dumps(told))
        raise


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("recflow").setLevel(logging.INFO)
    run_member(Path(sys.argv[1]))

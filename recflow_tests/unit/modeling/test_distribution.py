"""Real processes under ``torchrun``; each start costs some seconds of importing torch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recflow.core.errors import ConfigError, RecflowError
from recflow.modeling.launch import write_job
from recflow.modeling.ranker import load_ranker
from recflow.modeling.reports import TrainingReport
from recflow.modeling.tracking import NullTracker
from recflow_tests.unit.modeling.conftest import TrainTiny
from recflow_tests.unit.modeling.test_checkpoints import KilledError, KillsAt
from recflow_tests.unit.modeling.test_trainer import hashes
from recflow_tests.unit.modeling.tiny import quick

SAME_STEPS = {
    "schedule.head_epochs": 1,
    "schedule.encoder_epochs": 1,
    "speed.precision": "fp32",
    "speed.max_texts_per_step": 15,  # odd: two processes get an uneven deal
}
TWO = {**SAME_STEPS, "distribution.processes": 2}


class Losses(NullTracker):
    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}

    def log_metrics(self, metrics, step) -> None:
        if "loss" in metrics:
            self.by_step[step] = metrics["loss"]


def run(train_tiny: TrainTiny, output: Path, values, **changes) -> tuple[Losses, TrainingReport]:
    losses = Losses()
    return losses, train_tiny(output, values, tracker=losses, **changes)


def assert_same_scores(one: Path, two: Path, items: pl.DataFrame, rows: pl.DataFrame) -> None:
    """The same scores but for a constant of the slate.

    Weights are not compared: what adds the same to a whole slate has no gradient but rounding
    errors, of which AdamW makes steps of full size.
    """
    scores = [load_ranker(path, threads=1).scorer("a", items).score(rows) for path in (one, two)]
    centred = [(s.list.eval(pl.element() - pl.element().mean())).explode() for s in scores]
    np.testing.assert_allclose(*(c.to_numpy() for c in centred), atol=2e-2)  # of bf16


@pytest.fixture(scope="module")
def alone(
    train_tiny: TrainTiny, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Losses, TrainingReport]:
    output = tmp_path_factory.mktemp("alone")
    return output, *run(train_tiny, output, SAME_STEPS)


@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_take_the_steps_of_one(
    shard: bool,
    alone: tuple[Path, Losses, TrainingReport],
    train_tiny: TrainTiny,
    items: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
) -> None:
    output, losses, report = alone
    values = {**TWO, "distribution.shard_encoder": shard}
    seen, told = run(train_tiny, tmp_path, values)
    assert seen.by_step.keys() == losses.by_step.keys()
    ours, theirs = (np.array([x.by_step[k] for k in x.by_step]) for x in (losses, seen))
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert_same_scores(output, tmp_path, items, validation)
    assert told.processes == 2
    assert [epoch.clicks for epoch in told.epochs] == [epoch.clicks for epoch in report.epochs]
    assert told.best_validation == pytest.approx(report.best_validation, abs=2e-3)


def test_a_checkpoint_of_two_processes_resumes_on_one(
    alone: tuple[Path, Losses, TrainingReport],
    train_tiny: TrainTiny,
    items: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
) -> None:
    every_step = {"schedule.checkpoint_seconds": 0.0}
    checkpoints = tmp_path / "checkpoints"
    with pytest.raises(KilledError):
        train_tiny(
            tmp_path / "two",
            {**TWO, **every_step},
            checkpoints=checkpoints,
            tracker=KillsAt(18),
        )
    reached = json.loads((checkpoints / "newest" / "progress.json").read_text())["steps"]
    # The parent hears of a step a moment after it was taken.
    assert 17 <= reached <= 26
    _, report = run(
        train_tiny, tmp_path / "one", {**SAME_STEPS, **every_step}, checkpoints=checkpoints
    )
    assert report.resumed_at_step == reached
    assert_same_scores(alone[0], tmp_path / "one", items, validation)


def test_local_sgd_learns(train_tiny: TrainTiny, tmp_path: Path) -> None:
    values = {**TWO, "distribution.synchronisation": "local_sgd", "distribution.local_steps": 4}
    report = train_tiny(tmp_path, values)
    assert report.processes == 2
    assert report.best_validation > 0.85


def test_what_the_processes_raise_reaches_the_caller(train_tiny: TrainTiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_tokens = 33 is not allowed; allowed: at most 32"):
        train_tiny(tmp_path, {**TWO, "max_tokens": 33})


def test_a_killed_process_is_an_error(
    train_tiny: TrainTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recflow.modeling.launch.sys.executable", "/bin/false")
    with pytest.raises(RecflowError, match="ended with status 1"):
        train_tiny(tmp_path, TWO)


def test_one_process_has_nobody_to_spread_weights_over(
    train_tiny: TrainTiny, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="shard_encoder"):
        train_tiny(tmp_path, {"distribution.shard_encoder": True})


def test_a_described_training_runs_under_another_launcher(
    base_model: Path,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    alone: tuple[Path, Losses, TrainingReport],
    tmp_path: Path,
) -> None:
    job, output = tmp_path / "job", tmp_path / "output"
    job.mkdir()
    output.mkdir()
    write_job(
        job,
        items=items,
        train=train,
        validation=validation,
        base_model=base_model,
        output=output,
        config=quick(SAME_STEPS),
        cache_directory=tmp_path / "cache",
    )
    # Without torchrun's environment, one process does it all.
    subprocess.run([sys.executable, "-m", "recflow.modeling.launch", str(job)], check=True)
    assert hashes(output) == hashes(alone[0])
    report = TrainingReport.from_dict(json.loads((job / "report.json").read_text()))
    assert report.best_validation == alone[2].best_validation

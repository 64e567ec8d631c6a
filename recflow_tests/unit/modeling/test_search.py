"""The search, with a training of its own: its metric is known in closed form."""

import dataclasses
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from recflow.core.errors import ArtifactError, ConfigError, ContractError, TransientError
from recflow.modeling import search as searching
from recflow.modeling.config import TrainingConfig, with_values
from recflow.modeling.reports import EpochReport
from recflow.modeling.search import SearchReport, search_configuration
from recflow.modeling.search_space import (
    Choices,
    Range,
    SearchConfig,
    check_space,
    default_space,
    space_as_json,
    space_from,
)
from recflow.modeling.tracking import NullTracker
from recflow.modeling.trainer import train_ranker
from recflow_tests.unit.modeling.tiny import make_items, quick

BASE = with_values(
    TrainingConfig(), {"schedule.head_epochs": 3, "optimiser.head_learning_rate": 1e-2}
)
SPACE = {
    "optimiser.head_learning_rate": Range(1e-4, 1e-1, log=True),
    "user_model.dropout": Range(0.0, 0.5),
    "tuning.strategy": Choices(("frozen", "top_k_layers")),
    "objective.negatives": Range(1, 9),
}
BEST_DROPOUT = 0.4
FEW = SearchConfig(minutes=1, max_trials=8, space=SPACE)


def epoch_report(number: int, metric: float) -> EpochReport:
    return EpochReport("head", number, 1, 1, 1, 0.5, metric, 0.1, 0.05)


def metric_of(config: TrainingConfig, epoch: int) -> float:
    """Better the closer dropout is to .4, and with every epoch."""
    return 0.9 - abs(config.user_model.dropout - BEST_DROPOUT) - 0.1 / epoch


@dataclasses.dataclass
class Trainer:
    """Stands in for ``train_ranker``; a subject a test wants to see goes wrong in ``spoil``."""

    configs: list[TrainingConfig] = dataclasses.field(default_factory=list)
    outputs: list[Path] = dataclasses.field(default_factory=list)
    epochs: int = 0
    spoil: Callable[[int, int], None] = lambda *_: None

    def __call__(
        self, *, config: TrainingConfig, on_epoch: Any, output: Path, **others: Any
    ) -> None:
        self.configs.append(config)
        assert output.is_dir()
        self.outputs.append(output)
        for epoch in range(1, config.schedule.head_epochs + 1):
            self.spoil(len(self.configs) - 1, epoch)
            self.epochs += 1
            on_epoch(epoch_report(epoch, metric_of(config, epoch)))


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    trainer = Trainer()
    monkeypatch.setattr(searching, "train_ranker", trainer)
    return trainer


@pytest.fixture
def search(
    tmp_path: Path, items: pl.DataFrame, train: pl.DataFrame, validation: pl.DataFrame
) -> Callable[..., SearchReport]:
    def run(study: str = "study.db", **changes: Any) -> SearchReport:
        arguments: dict[str, Any] = {
            "items": items,
            "train": train,
            "validation": validation,
            "base_model": tmp_path,
            "base_config": BASE,
            "config": FEW,
            "study_path": tmp_path / study,
            "cache_directory": None,
            "tracker": NullTracker(),
        }
        return search_configuration(**{**arguments, **changes})

    return run


def without_seconds(report: SearchReport) -> dict[str, Any]:
    content = dataclasses.asdict(report)
    content["seconds"] = 0
    for trial in content["trials"]:
        trial["seconds"] = 0
    return content


def test_finds_something_better_than_the_base(
    trainer: Trainer, search: Callable[..., SearchReport], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "recflow.training")
    report = search()
    assert len(report.trials) == 8
    assert trainer.configs[0] == BASE
    base = metric_of(BASE, 3)
    assert report.base_metric == report.trials[0].metric == pytest.approx(base)
    assert report.best_metric > base
    assert report.best == report.trials[report.best_trial].values
    assert metric_of(with_values(BASE, report.best), 3) == pytest.approx(report.best_metric)
    assert report.best_metric == max(t.metric or 0 for t in report.trials if t.state == "complete")
    assert report.importances == {}  # too few trials to tell
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("trial ")]
    assert len(lines) == 8
    assert not any(output.exists() for output in trainer.outputs)
    json.dumps(dataclasses.asdict(report))


def test_what_moves_the_metric_is_found(
    trainer: Trainer, search: Callable[..., SearchReport]
) -> None:
    report = search(config=SearchConfig(minutes=1, max_trials=50, space=SPACE))
    assert next(iter(report.importances)) == "user_model.dropout"
    assert sum(report.importances.values()) == pytest.approx(1)
    assert report.best["user_model.dropout"] == pytest.approx(BEST_DROPOUT, abs=0.02)


def test_bad_trials_are_pruned_and_the_base_never_is(
    trainer: Trainer, search: Callable[..., SearchReport]
) -> None:
    report = search(config=dataclasses.replace(FEW, max_trials=12))
    pruned = [trial for trial in report.trials if trial.state == "pruned"]
    assert pruned
    assert all(trial.epochs < 3 for trial in pruned)
    assert report.trials[0].state == "complete"
    assert trainer.epochs == sum(trial.epochs for trial in report.trials)
    # Never before there is a median of five to be behind of.
    assert all(trial.number >= 5 for trial in pruned)


def test_the_base_is_kept_where_nothing_beats_it(
    trainer: Trainer, search: Callable[..., SearchReport]
) -> None:
    base = with_values(BASE, {"user_model.dropout": BEST_DROPOUT})
    report = search(base_config=base)
    assert report.best_trial == 0
    assert with_values(base, report.best) == base


def test_a_base_outside_the_space_is_tried_as_it_is(
    trainer: Trainer, search: Callable[..., SearchReport]
) -> None:
    config = SearchConfig(minutes=1, max_trials=3, space={"user_model.dropout": Range(0.0, 0.1)})
    report = search(config=config)
    assert trainer.configs[0] == BASE
    assert report.trials[0].values == {}
    assert report.best == {}
    assert {tuple(trial.values) for trial in report.trials[1:]} == {("user_model.dropout",)}


def test_the_smallest_error_is_the_best(
    trainer: Trainer, search: Callable[..., SearchReport]
) -> None:
    base = with_values(
        BASE, {"objective.loss": "mean_squared_error", "schedule.primary_metric": "rating_rmse"}
    )
    report = search(base_config=base)
    assert report.best_metric == min(t.metric for t in report.trials if t.state == "complete")  # type: ignore[type-var]
    assert report.best_metric < report.base_metric


def test_same_seed_same_trials(trainer: Trainer, search: Callable[..., SearchReport]) -> None:
    first = search("first.db")
    assert without_seconds(search("second.db")) == without_seconds(first)
    other = dataclasses.replace(FEW, seed=1)
    assert without_seconds(search("third.db", config=other)) != without_seconds(first)


@pytest.mark.parametrize(("trial", "epoch"), [(0, 3), (4, 2), (7, 1)])
def test_a_killed_search_goes_on_as_if_it_had_not_been(
    trainer: Trainer, search: Callable[..., SearchReport], trial: int, epoch: int
) -> None:
    whole = search("whole.db")

    def kill(*place: int) -> None:
        if place == (trial, epoch):
            raise KeyboardInterrupt

    trainer.configs.clear()
    trainer.spoil = kill
    with pytest.raises(KeyboardInterrupt):
        search()
    trainer.spoil = lambda *_: None
    assert without_seconds(search()) == without_seconds(whole)
    # The trial that was killed is the only one that was trained twice.
    assert trainer.configs[trial] == trainer.configs[trial + 1]
    assert len(trainer.configs) == 9


def test_a_process_that_is_killed_leaves_a_study_to_go_on_with(
    trainer: Trainer, search: Callable[..., SearchReport], tmp_path: Path
) -> None:
    """SIGKILL in the middle of the third trial, in a process of its own."""
    script = f"""
import os, signal
from pathlib import Path
import polars as pl
from recflow.modeling import search
from recflow.modeling.tracking import NullTracker
from recflow.modeling.trainer import train_ranker
from recflow_tests.unit.modeling.tiny import make_items, quick
from recflow_tests.unit.modeling import test_search as here
from recflow_tests.unit.modeling.tiny import make_impressions, make_items

trainer = here.Trainer()
def kill(trial, epoch):
    if (trial, epoch) == (2, 2):
        os.kill(os.getpid(), signal.SIGKILL)
trainer.spoil = kill
search.train_ranker = trainer
items = make_items()
search.search_configuration(
    items=items, train=make_impressions(items, 400, seed=1),
    validation=make_impressions(items, 120, seed=2), base_model=Path({str(tmp_path)!r}),
    base_config=here.BASE, config=here.FEW,
    study_path=Path({str(tmp_path / "study.db")!r}), cache_directory=None, tracker=NullTracker(),
)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    report = search()
    assert len(report.trials) == 8
    assert len(trainer.configs) == 6
    assert without_seconds(report) == without_seconds(search("whole.db"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time that passes when a test says so."""
    now = [0.0]
    monkeypatch.setattr(searching.time, "monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_the_budget_ends_the_search_with_the_running_epoch(
    trainer: Trainer, search: Callable[..., SearchReport], clock: Callable[[float], None]
) -> None:
    trainer.spoil = lambda *_: clock(10)  # 30 s a trial
    config = dataclasses.replace(FEW, minutes=1.25)  # two trials and a half
    report = search(config=config)
    assert [trial.state for trial in report.trials] == ["complete", "complete"]
    assert trainer.epochs == 8
    assert report.seconds == 80

    # Nothing is left of the budget, so nothing is trained; another minute repeats the third.
    assert search(config=config).trials == report.trials
    assert trainer.epochs == 8
    more = search(config=dataclasses.replace(config, minutes=2.25))
    assert len(more.trials) == 3
    assert trainer.configs[2] == trainer.configs[3]
    assert more.seconds == 140


def test_the_base_is_finished_whatever_the_budget(
    trainer: Trainer, search: Callable[..., SearchReport], clock: Callable[[float], None]
) -> None:
    trainer.spoil = lambda *_: clock(1_000)
    report = search()
    assert [trial.state for trial in report.trials] == ["complete"]
    assert report.best_metric == report.base_metric


def test_values_that_cannot_be_trained_fail_their_trial_only(
    trainer: Trainer, search: Callable[..., SearchReport]
) -> None:
    space = {"tuning.rank": Range(2, 40), "tuning.strategy": Choices(("adalora", "top_k_layers"))}

    def refuse(trial: int, epoch: int) -> None:
        if trial == 1:
            raise ContractError("the loss is not a number at step 3")

    trainer.spoil = refuse
    report = search(config=SearchConfig(minutes=1, max_trials=12, space=space))
    failed = {trial.number: trial.note for trial in report.trials if trial.state == "failed"}
    # AdaLoRA cannot start from rank 24 and end with more: found when the two meet, not before.
    assert any("initial_rank = 24 is not allowed" in note for note in failed.values())
    assert "the loss is not a number at step 3" in failed.values()
    assert len(report.trials) == 12


def test_a_base_that_cannot_be_trained_ends_the_search(
    trainer: Trainer, search: Callable[..., SearchReport]
) -> None:
    def refuse(*_: int) -> None:
        raise ContractError("no training impression has a click")

    trainer.spoil = refuse
    with pytest.raises(ContractError, match="no training impression"):
        search()


def test_the_study_of_something_else_is_refused(
    trainer: Trainer, search: Callable[..., SearchReport], train: pl.DataFrame, tmp_path: Path
) -> None:
    search()
    for changes, what in (
        ({"train": train.head(10)}, "training impressions"),
        ({"base_config": with_values(BASE, {"seed": 1})}, "base configuration"),
        ({"config": SearchConfig(minutes=1)}, "space"),
    ):
        with pytest.raises(ConfigError, match=rf"study.db was made with another {what};"):
            search(**changes)
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ConfigError, match="another pretrained encoder;"):
        search()


def test_a_file_that_is_no_study_is_refused_and_left_alone(
    trainer: Trainer, search: Callable[..., SearchReport], tmp_path: Path
) -> None:
    (tmp_path / "study.db").write_text("shopping list\n" * 100)
    with pytest.raises(ArtifactError, match=r"study.db is not the file of a study"):
        search()
    assert (tmp_path / "study.db").read_text() == "shopping list\n" * 100


def test_two_processes_do_not_share_a_study(
    trainer: Trainer, search: Callable[..., SearchReport]
) -> None:
    def search_too(*_: int) -> None:
        with pytest.raises(TransientError, match="another process works on the study"):
            search()

    trainer.spoil = search_too
    search(config=SearchConfig(minutes=1, max_trials=1, space=SPACE))


def test_the_tracker_hears_of_every_trial(
    trainer: Trainer, search: Callable[..., SearchReport]
) -> None:
    class Recorder(NullTracker):
        def __init__(self) -> None:
            self.metrics: list[tuple[int, dict[str, float]]] = []

        def log_metrics(self, metrics: Any, step: int) -> None:
            self.metrics.append((step, dict(metrics)))

    recorder = Recorder()
    report = search(tracker=recorder)
    assert [step for step, _ in recorder.metrics] == list(range(8))
    assert [m["trial_metric"] for _, m in recorder.metrics] == [t.metric for t in report.trials]
    assert recorder.metrics[-1][1]["best_metric"] == report.best_metric


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        ({"tuning.ranks": {"low": 1, "high": 2}}, "configuration key = 'tuning.ranks'"),
        ({"tuning.rank": {"low": 0, "high": 2}}, "tuning.rank cannot be searched: rank = 0"),
        ({"tuning.rank": {"low": 1.5, "high": 2}}, "rank = 1.5 is not allowed; allowed: a value"),
        ({"tuning.rank": {"low": 8, "high": 4}}, "space of tuning.rank = [8, 4]"),
        ({"tuning.strategy": {"choices": ["lora", "magic"]}}, "strategy = 'magic'"),
        ({"tuning.strategy": {"low": 1, "high": 2}}, "strategy = 1 is not allowed"),
        ({"user_model.dropout": {"low": 0.0, "high": 1.0}}, "dropout = 1.0"),
        ({"user_model.dropout": {"low": 0.0, "high": 0.5, "log": True}}, "low above 0 with log"),
        ({"user_model.dropout": {"low": 0.0}}, "space of user_model.dropout = {'low': 0.0}"),
        ({"user_model.dropout": [0.1, 0.2]}, 'or {"choices": [..]}'),
        ({"user_model.dropout": {"choices": []}}, "at least one"),
        ({"schedule.primary_metric": {"choices": ["auc"]}}, "space = 'schedule.primary_metric'"),
        ({"seed": {"low": 0, "high": 9}}, "allowed: other keys than"),
        ({}, "at least one key"),
    ],
)
def test_an_impossible_space_is_refused_before_any_work(
    trainer: Trainer, search: Callable[..., SearchReport], tmp_path: Path, space: Any, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        search(config=SearchConfig(space=space_from(space)))
    assert not trainer.configs
    assert not (tmp_path / "study.db").exists()


@pytest.mark.parametrize(("key", "value"), [("minutes", 0), ("max_trials", 0), ("seed", -1)])
def test_an_impossible_budget_is_refused(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{key} = {value} is not allowed"):
        SearchConfig(**{key: value})  # type: ignore[arg-type]


def test_the_default_space_can_be_searched_and_written_down() -> None:
    space = default_space()
    check_space(space, TrainingConfig())
    assert space_from(json.loads(json.dumps(space_as_json(space)))) == space


def test_real_training_is_searched_and_pruned(
    search: Callable[..., SearchReport],
    base_model: Path,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
) -> None:
    base = quick({"schedule.head_epochs": 2, "schedule.encoder_epochs": 1})
    space = {
        "optimiser.head_learning_rate": Range(1e-7, 2e-2, log=True),
        "tuning.strategy": Choices(("frozen", "top_k_layers", "lora")),
    }
    report = search(
        base_model=base_model,
        base_config=base,
        config=SearchConfig(minutes=2, max_trials=14, space=space),
        cache_directory=tmp_path / "cache",
    )
    assert {trial.state for trial in report.trials} == {"complete", "pruned"}
    assert report.best_metric >= report.base_metric

    again = tmp_path / "again"
    again.mkdir()
    trained = train_ranker(
        items=make_items(),
        train=train,
        validation=validation,
        base_model=base_model,
        output=again,
        config=with_values(base, report.best),
        tracker=NullTracker(),
    )
    assert trained.best_validation == report.best_metric

import dataclasses
import sys
from datetime import date
from pathlib import Path

import pytest

from recflow import backtesting
from recflow.backtesting import (
    QUICK,
    SCENARIOS,
    BacktestOptions,
    Scenario,
    options_of,
    simulated_log,
)
from recflow.cli import main
from recflow.core.errors import ConfigError
from recflow.data.sources.simulation import (
    ClickRateShift,
    ColdUsers,
    SimulationConfig,
    TopicSurge,
    VocabularyShift,
)
from recflow.modeling.config import TrainingConfig
from recflow.quality.trigger import TriggerPolicy

pytestmark = pytest.mark.filterwarnings("ignore:module 'sre_:DeprecationWarning")

PLAIN = {
    "window_days": 7,
    "validation_days": 1,
    "test_days": 1,
    "max_history": 50,
    "days": None,
    "base_model": None,
    "trigger": {},
    "full": False,
    "changes": (),
}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["recflow", "backtest", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_scenarios_differ_in_the_drift_alone() -> None:
    drift, calm = SCENARIOS["drift"].config, SCENARIOS["calm"].config
    assert drift.topic_surge is not None
    assert dataclasses.replace(drift, topic_surge=None) == calm
    assert list(SCENARIOS["drift"].events) == [date(2024, 1, 10)]
    assert SCENARIOS["calm"].events == {}


def test_events_are_dated_and_what_holds_from_the_start_is_none() -> None:
    config = SimulationConfig(
        start=date(2024, 3, 1),
        topic_surge=TopicSurge(day=9, topic="food", factor=2.5),
        vocabulary_shift=VocabularyShift(day=3, share=0.5),
        click_rate_shift=ClickRateShift(day=9, factor=2.0),
        cold_users=ColdUsers(day=0),
    )
    assert Scenario("", config).events == {
        date(2024, 3, 4): "new words in 50%",
        date(2024, 3, 10): "food ×2.5, click odds ×2",
    }


def test_defaults_are_those_of_the_deployed_sensor_and_train_quickly() -> None:
    assert options_of(**PLAIN) == BacktestOptions()
    assert BacktestOptions().trigger == TriggerPolicy()
    assert BacktestOptions().training.tuning.strategy == QUICK["tuning.strategy"]


def test_a_full_training_is_a_deployments_with_what_is_set() -> None:
    options = options_of(**PLAIN | {"full": True, "changes": ("tuning.rank=8", "seed=3")})
    expected = TrainingConfig(tuning=dataclasses.replace(TrainingConfig().tuning, rank=8), seed=3)
    assert options.training == expected


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"window_days": 2}, "window_days"),
        ({"trigger": {"days_needed": 4}}, "days_looked_at"),
        ({"changes": ("epochs",)}, "key=value"),
    ],
)
def test_impossible_options_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        options_of(**PLAIN | change)


def test_a_folder_with_another_log_is_not_walked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SimulationConfig(impressions=20, users=5, days=2, items_per_day=20)
    monkeypatch.setattr(backtesting, "SCENARIOS", {"small": Scenario("Small.", small)})
    log = simulated_log("small", tmp_path / "small", None, BacktestOptions())
    assert [str(day) for day in log.days] == ["2024-01-01", "2024-01-02"]
    assert log.description == "Small. 20 impressions in 2 days."
    with pytest.raises(ConfigError, match="holds another simulated log than small; remove"):
        simulated_log("small", tmp_path / "small", 8, BacktestOptions())
    assert simulated_log("small", tmp_path / "other", 8, BacktestOptions()).name == "small (seed 8)"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--scenario", "storm"], "scenario = 'storm' is not allowed; allowed: drift, calm"),
        (["--data", "mind"], "--dir = None is not allowed"),
        (["--data", "csv", "--dir", "."], "source = 'csv'"),
        (["--days-needed", "9"], "days_looked_at = 3"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_2(
    arguments: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert run(monkeypatch, *arguments, "--work", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.startswith("recflow: ")
    assert says in error

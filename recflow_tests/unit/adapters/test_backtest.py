import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.backtest import (
    MODELS,
    SCORES,
    Contest,
    JudgeAsPromoted,
    Log,
    RetrainOnDrift,
    StoredWorld,
    prepare_days,
    run_backtest,
)
from recflow.adapters.champion import Champion
from recflow.core.artifacts import JsonValue
from recflow.core.columns import Columns
from recflow.core.errors import ConfigError
from recflow.data.history import extend_histories
from recflow.data.sources.simulated import SimulatedSource, SimulationConfig, simulate
from recflow.data.sources.simulation import ColdUsers, TopicSurge
from recflow.data.split import SplitConfig
from recflow.evaluation.backtest import Backtest, Judging, Trained, Verdict
from recflow.evaluation.gate import GateConfig
from recflow.evaluation.metrics import ranking_metrics
from recflow.evaluation.slates import flatten, offsets_of
from recflow.modeling.ranker import load_ranker
from recflow.quality.evidence import DriftEvidence
from recflow.quality.trigger import TriggerPolicy
from recflow.settings import PROJECT_ROOT
from recflow_tests.unit.modeling.tiny import quick, write_base_model

pytestmark = pytest.mark.filterwarnings("ignore:module 'sre_:DeprecationWarning")

SURGE = 4  # the day with number 4, the fifth
LOG = SimulationConfig(
    seed=3,
    days=8,
    impressions=1_600,
    users=600,
    items_per_day=30,
    topic_surge=TopicSurge(day=SURGE, topic="sports", factor=20.0),
    cold_users=ColdUsers(day=0, share=0.7),
)
DAYS = [LOG.start + timedelta(days=n) for n in range(LOG.days)]
SPLIT = SplitConfig(window_days=3, validation_days=1, test_days=1, max_history=10)
QUICK = {"tuning.strategy": "frozen", "schedule.head_epochs": 3}
# One core draws the same numbers; the tiny encoder knows none of the words, so categories decide.
TRIGGER = TriggerPolicy(days_needed=1, days_looked_at=1, cooldown_days=0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny encoder and a store of prepared days."""
    folder = tmp_path_factory.mktemp("backtest")
    write_base_model(folder / "encoder")
    simulate(LOG, folder / "logs")
    days = prepare_days(
        ArtifactStore(folder / "store"), SimulatedSource(folder / "logs"), max_history=10
    )
    assert days == DAYS
    return folder


def copy_of(prepared: Path, folder: Path) -> Path:
    shutil.copytree(prepared, folder, dirs_exist_ok=True)
    return folder


def admit_all(contest: Contest) -> Verdict:
    return Verdict(True, f"{contest.snapshot.splits.test.height} impressions")


def world_in(
    folder: Path,
    tell: Callable[[str], None] = print,
    gate: Callable[[Contest], Verdict] = admit_all,
) -> StoredWorld:
    return StoredWorld(
        ArtifactStore(folder / "store"),
        split=SPLIT,
        config=quick(QUICK),
        base_model=folder / "encoder",
        cache_directory=folder / "cache",
        gate=gate,
        tell=tell,
    )


class SurgeMeasured:
    """Alarms on the days after a surge that the champion's training days have not seen."""

    identity: Mapping[str, JsonValue] = {"limit": 0.1}

    def __call__(self, day: date, champion: Champion) -> DriftEvidence:
        known = date.fromisoformat(champion.snapshot) - timedelta(days=2) >= DAYS[SURGE]
        drifted = ("category_shown",) if day >= DAYS[SURGE] and not known else ()
        return DriftEvidence(day, "digest", champion.version, champion.snapshot, drifted)


def run(folder: Path, tell: Callable[[str], None] = print) -> Backtest:
    return run_backtest(
        Log("toy", DAYS),
        world_in(folder, tell),
        window_days=SPLIT.window_days,
        measure=SurgeMeasured(),
        trigger=TRIGGER,
        judging=Judging(bootstrap_samples=200),
        tell=tell,
    )


def run_and_die(folder: str, at_training: str) -> None:
    """Start a backtest and die by SIGKILL when it is about to train on a snapshot."""

    def tell(line: str) -> None:
        if line == f"training on snapshot {at_training}":
            os.kill(os.getpid(), signal.SIGKILL)

    run(Path(folder), tell)


@pytest.fixture(scope="module")
def whole(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Backtest]:
    """A backtest that nobody disturbed."""
    folder = copy_of(prepared, tmp_path_factory.mktemp("whole"))
    return folder, run(folder)


def test_policies_on_a_surge(whole: tuple[Path, Backtest]) -> None:
    _, result = whole
    # Three days make the first model; the five after them are walked, and four end in a decision.
    assert result.first_snapshot == DAYS[2]
    assert [day.day for day in result["never"].days] == DAYS[3:]
    assert result["nightly"].runs == 4
    # Surge on day 4: alarms on 4, 5, 6; the snapshot of 6 is the first that trains on day 4.
    assert [training.day for training in result["drift"].trainings] == DAYS[4:7]
    assert result["evenly_spaced"].runs == 3
    assert [day.snapshot for day in result["drift"].days] == [*[DAYS[2]] * 2, *DAYS[4:7]]
    # After the surge nothing else may differ between the two: from then on both train every day.
    assert result["drift"].days[-1].metrics == result["nightly"].days[-1].metrics
    last = {p.name: p.days[-1].metrics["auc"].value for p in result.policies}
    assert last["nightly"] > last["never"] + 0.05


def test_a_snapshot_is_trained_once_and_charged_to_each_policy(
    whole: tuple[Path, Backtest],
) -> None:
    folder, result = whole
    assert ArtifactStore(folder / "store").partitions(MODELS) == [str(day) for day in DAYS[2:7]]
    cost = {training.day: training.seconds for training in result["nightly"].trainings}
    assert all(seconds > 0 for seconds in cost.values())
    assert result["drift"].seconds == pytest.approx(sum(cost[day] for day in DAYS[4:7]))


def test_a_day_is_scored_with_histories_as_of_each_impression(
    whole: tuple[Path, Backtest],
) -> None:
    """Computed again from the features of the days, without snapshots and stored scores."""
    folder, result = whole
    store, day = ArtifactStore(folder / "store"), DAYS[5]
    window = pl.concat(
        pl.read_parquet(store.get("features/impressions", str(d)).file("rows.parquet"))
        for d in DAYS[3:6]
    )
    items = pl.read_parquet(store.get("features/items", str(day)).file("rows.parquet"))
    shown = extend_histories(window, max_history=10).filter(pl.col(Columns.TIME).dt.date() == day)
    scorer = load_ranker(store.path(MODELS, str(DAYS[4])), threads=1).scorer("again", items)
    values = ranking_metrics(
        flatten(scorer.score(shown)).to_numpy(),
        flatten(shown[Columns.LABELS]).to_numpy(),
        offsets_of(shown[Columns.LABELS]),
    )
    served = result["nightly"].days[2]
    assert (served.day, served.snapshot) == (day, DAYS[4])
    assert served.impressions == int((~np.isnan(values["auc"])).sum())
    assert served.metrics["auc"].value == pytest.approx(float(np.nanmean(values["auc"])))
    assert served.metrics["ndcg@10"].value == pytest.approx(float(np.nanmean(values["ndcg@10"])))


def test_no_model_learned_from_a_day_it_scores(whole: tuple[Path, Backtest]) -> None:
    folder, _ = whole
    world = world_in(folder)
    store = ArtifactStore(folder / "store")
    for snapshot in DAYS[2:7]:
        newest = pl.read_parquet(store.get("splits/validation", str(snapshot)).file("rows.parquet"))
        model = world.train(snapshot)
        assert model.learned_until == newest[Columns.TIME].max()
        assert model.learned_until.date() == snapshot - timedelta(days=1)
    scored = [partition.split(".") for partition in store.partitions(SCORES)]
    assert all(snapshot <= day for day, snapshot in scored)
    # A model meets its own snapshot's day at the gate only; users never see that.
    assert any(snapshot == day for day, snapshot in scored)


def test_a_killed_backtest_goes_on_where_it_was(
    prepared: Path, tmp_path: Path, whole: tuple[Path, Backtest]
) -> None:
    folder = copy_of(prepared, tmp_path)
    script = (
        "from recflow_tests.unit.adapters.test_backtest import run_and_die; "
        f"run_and_die({str(folder)!r}, {str(DAYS[5])!r})"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT_ROOT, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    store = ArtifactStore(folder / "store")
    before = {key: store.get(MODELS, key).manifest.created_at for key in store.partitions(MODELS)}
    assert sorted(before) == [str(day) for day in DAYS[2:5]]

    lines: list[str] = []
    result = run(folder, lines.append)
    trained = [line for line in lines if line.startswith("training")]
    assert trained == [f"training on snapshot {day}" for day in DAYS[5:7]]
    _, expected = whole
    for policy, reference in zip(result.policies, expected.policies, strict=True):
        assert policy.metrics == reference.metrics
        assert policy.days == reference.days

    lines.clear()
    assert run(folder, lines.append) == result
    assert not any(line.startswith("training") for line in lines)


def test_the_gate_sees_both_models_on_the_snapshots_test_day(
    prepared: Path, tmp_path: Path
) -> None:
    seen: list[Contest] = []

    def gate(contest: Contest) -> Verdict:
        seen.append(contest)
        return Verdict(False, "not today")

    world = world_in(copy_of(prepared, tmp_path), gate=gate)
    champion, candidate = world.train(DAYS[2]), world.train(DAYS[3])
    assert world.admit(candidate, champion, DAYS[3]) == Verdict(False, "not today")
    (contest,) = seen
    assert contest.snapshot.splits.test[Columns.TIME].dt.date().unique().to_list() == [DAYS[3]]
    slates = contest.snapshot.splits.test[Columns.CANDIDATES].list.len()
    assert contest.candidate.list.len().equals(slates)
    assert contest.champion.list.len().equals(slates)
    assert not contest.candidate.equals(contest.champion)


def contest_on(world: StoredWorld, **changes: Any) -> Contest:
    """The model of the day after the surge against the first one, on the last day before it."""
    seen: list[Contest] = []

    def gate(contest: Contest) -> Verdict:
        seen.append(contest)
        return Verdict(True)

    world._gate = gate
    world.admit(world.train(DAYS[6]), world.train(DAYS[2]), DAYS[6])
    return replace(seen[0], **changes)


def test_a_better_candidate_passes_productions_gate(whole: tuple[Path, Backtest]) -> None:
    contest = contest_on(world_in(whole[0]))
    verdict = JudgeAsPromoted(GateConfig())(contest)
    assert verdict.admitted, verdict.reason
    assert "against the champion; a loss of 0.002 is excluded" in verdict.reason


def test_a_worse_candidate_is_rejected_with_every_reason(whole: tuple[Path, Backtest]) -> None:
    contest = contest_on(world_in(whole[0]))
    turned = contest.candidate.list.eval(-pl.element())
    verdict = JudgeAsPromoted(GateConfig())(replace(contest, candidate=turned))
    assert not verdict.admitted
    assert "a loss of 0.002 cannot be excluded" in verdict.reason
    assert "served" not in verdict.reason


def test_a_champion_that_has_seen_the_test_days_is_no_judge(whole: tuple[Path, Backtest]) -> None:
    world = world_in(whole[0])
    known = replace(world.train(DAYS[2]), learned_until=datetime(2024, 1, 7, 1, tzinfo=UTC))
    contest = contest_on(world, champion_of=known)
    verdict = JudgeAsPromoted(GateConfig())(contest)
    assert not verdict.admitted
    assert "it would be asked what it has been told" in verdict.reason


def test_equal_encoders_are_kept_once(whole: tuple[Path, Backtest]) -> None:
    folder, _ = whole
    store = ArtifactStore(folder / "store")
    files = [store.path(MODELS, key) / "model.safetensors" for key in store.partitions(MODELS)]
    assert len({file.stat().st_ino for file in files}) == 1
    store.get(MODELS, str(DAYS[4])).verify()


def test_the_drift_policy_asks_the_production_trigger(prepared: Path, tmp_path: Path) -> None:
    world = world_in(copy_of(prepared, tmp_path))
    model = world.train(DAYS[2])
    policy = RetrainOnDrift(world, SurgeMeasured(), TriggerPolicy(days_needed=2, days_looked_at=3))
    first = policy.decide(DAYS[3], model, DAYS[2])
    assert (first.retrain, first.reason) == (
        False,
        "0 of the last 1 days are beyond a limit; 2 of 3 are needed",
    )
    assert not policy.decide(DAYS[4], model, DAYS[2]).retrain
    third = policy.decide(DAYS[5], model, DAYS[2])
    assert third.retrain
    assert third.reason == "2 of the last 3 days are beyond a limit: category_shown on 2 days"
    assert [evidence.champion for evidence in policy.evidence] == [str(DAYS[2])] * 3


@pytest.mark.parametrize("days", [DAYS[:4], [DAYS[0], *DAYS[3:]]])
def test_a_window_that_leaves_nothing_to_walk_is_refused(
    whole: tuple[Path, Backtest], days: list[date]
) -> None:
    folder, _ = whole
    with pytest.raises(ConfigError, match="window_days"):
        run_backtest(
            Log("toy", days),
            world_in(folder),
            window_days=3,
            measure=SurgeMeasured(),
            trigger=TRIGGER,
            judging=Judging(),
            tell=print,
        )


def test_trained_facts_come_from_the_artifact(whole: tuple[Path, Backtest]) -> None:
    folder, _ = whole
    facts = ArtifactStore(folder / "store").get(MODELS, str(DAYS[2])).facts
    model = world_in(folder).train(DAYS[2])
    assert isinstance(model, Trained)
    assert (model.seconds, model.cpu_seconds) == (facts["seconds"], facts["cpu_seconds"])

from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from recflow.core.errors import ConfigError, ContractError, LeakageError
from recflow.evaluation.backtest import (
    QUALITY_SCHEMA,
    Choice,
    Judging,
    NeverRetrain,
    RetrainNightly,
    RetrainOn,
    Trained,
    Verdict,
    Walk,
    compare,
    evenly_spaced,
    require_unseen,
    walk,
)

FIRST = date(2024, 1, 7)
DAYS = [FIRST + timedelta(days=n) for n in range(1, 6)]  # the 8th to the 12th


def trained(snapshot: date, seconds: float = 10.0) -> Trained:
    night = datetime(snapshot.year, snapshot.month, snapshot.day, tzinfo=UTC)
    return Trained(snapshot, night - timedelta(seconds=1), seconds, 2 * seconds)


@dataclass
class FakeWorld:
    """Quality falls by 0.1 for each day between a model's snapshot and the day it scores."""

    rejects: set[date] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def train(self, snapshot: date) -> Trained:
        self.asked.append(f"train {snapshot.day}")
        return trained(snapshot, seconds=float(snapshot.day))

    def quality(self, model: Trained, day: date) -> pl.DataFrame:
        self.asked.append(f"score {day.day} with {model.snapshot.day}")
        auc = 1.0 - 0.1 * (day - model.snapshot).days
        rows = [("ann", auc, auc / 2), ("bob", auc, auc / 2), ("bob", np.nan, np.nan)]
        return pl.DataFrame(rows, schema=QUALITY_SCHEMA, orient="row")

    def admit(self, candidate: Trained, champion: Trained, day: date) -> Verdict:
        self.asked.append(f"judge {candidate.snapshot.day} against {champion.snapshot.day}")
        return Verdict(day not in self.rejects, "worse" if day in self.rejects else "")


@dataclass
class Scripted:
    """Retrains on given days and writes down what it is told."""

    name: str
    on: set[date]
    told: list[tuple[int, int, int]] = field(default_factory=list)

    def decide(self, day: date, champion: Trained, last_trained: date) -> Choice:
        self.told.append((day.day, champion.snapshot.day, last_trained.day))
        return Choice(day in self.on, "scripted", seconds=0.5, cpu_seconds=0.25)


def walked(policy, world=None) -> Walk:
    return walk(DAYS, first=trained(FIRST), policy=policy, world=world or FakeWorld())


def test_a_day_is_scored_before_anything_learns_from_it():
    world = FakeWorld()
    walked(RetrainNightly(), world)
    assert world.asked == [
        "score 8 with 7", "train 8", "judge 8 against 7",
        "score 9 with 8", "train 9", "judge 9 against 8",
        "score 10 with 9", "train 10", "judge 10 against 9",
        "score 11 with 10", "train 11", "judge 11 against 10",
        "score 12 with 11",
    ]  # fmt: skip


def test_nothing_is_decided_after_the_last_day():
    policy = Scripted("scripted", on={DAYS[-1]})
    result = walked(policy)
    assert [day for day, _, _ in policy.told] == [8, 9, 10, 11]
    assert result.trainings == ()
    assert (result.looking_seconds, result.looking_cpu_seconds) == (4 * 0.5, 4 * 0.25)


def test_a_rejected_model_is_charged_and_not_deployed():
    policy = Scripted("scripted", on={DAYS[1], DAYS[2]})
    result = walked(policy, FakeWorld(rejects={DAYS[1]}))
    assert [served.snapshot.day for served in result.served] == [7, 7, 7, 10, 10]
    assert [(t.day.day, t.admitted, t.verdict) for t in result.trainings] == [
        (9, False, "worse"),
        (10, True, ""),
    ]
    # The policy is told of the champion that is left, and of the run that came to nothing.
    assert policy.told == [(8, 7, 7), (9, 7, 7), (10, 7, 9), (11, 10, 10)]
    assert [t.seconds for t in result.trainings] == [9.0, 10.0]


@pytest.mark.parametrize("learned_until", [DAYS[0] - timedelta(days=1), DAYS[0]])
def test_a_model_whose_snapshot_reaches_a_day_must_not_score_it(learned_until):
    newest = datetime(learned_until.year, learned_until.month, learned_until.day, tzinfo=UTC)
    with pytest.raises(LeakageError, match="must not score 2024-01-08"):
        require_unseen(Trained(DAYS[0], newest, 1.0, 1.0), DAYS[0])


def test_a_model_that_learned_from_a_day_must_not_score_it():
    leaking = Trained(FIRST, datetime(2024, 1, 8, 0, 0, tzinfo=UTC), 1.0, 1.0)
    with pytest.raises(LeakageError, match="learned until 2024-01-08T00:00:00"):
        require_unseen(leaking, DAYS[0])
    require_unseen(leaking, DAYS[1])


def test_a_walk_stops_at_a_leaking_model():
    class Leaking(FakeWorld):
        def train(self, snapshot: date) -> Trained:
            return trained(snapshot + timedelta(days=1))

    with pytest.raises(LeakageError, match="snapshot 2024-01-09"):
        walked(RetrainNightly(), Leaking())


def test_evenly_spaced_days_keep_their_distance():
    days = [date(2024, 1, n) for n in range(1, 12)]
    # Day number k * 12 / 4 = 3, 6, 9.
    assert sorted(day.day for day in evenly_spaced(days, 3)) == [3, 6, 9]
    assert evenly_spaced(days, 0) == frozenset()
    assert evenly_spaced(days, 11) == frozenset(days)
    with pytest.raises(ConfigError, match="runs = 12"):
        evenly_spaced(days, 12)


@pytest.mark.parametrize("count", range(1, 9))
def test_as_many_days_are_chosen_as_runs_are_wanted(count):
    assert len(evenly_spaced(DAYS + [d + timedelta(days=5) for d in DAYS[:3]], count)) == count


def result_of(*policies, judging=None):
    walks = [walked(policy) for policy in policies]
    return compare("toy", walks, judging or Judging(bootstrap_samples=50, usd_per_hour=36.0))


def test_gains_and_shares_by_hand():
    calendar = RetrainOn("calendar", frozenset({DAYS[1]}))
    result = result_of(NeverRetrain(), RetrainNightly(), calendar)
    # Never: 1, 2, 3, 4, 5 days old: 1 - 0.1 * 3 = 0.7. Nightly: one day old each day: 0.9.
    # The calendar's: 1, 2, 1, 2, 3 days old: 1 - 0.1 * 9 / 5 = 0.82; (0.82 - 0.7) / 0.2 = 0.6.
    assert result["never"].metrics["auc"].value == pytest.approx(0.7)
    assert result["nightly"].metrics["auc"].value == pytest.approx(0.9)
    assert result["calendar"].metrics["auc"].value == pytest.approx(0.82)
    assert result["calendar"].metrics["ndcg@10"].value == pytest.approx(0.41)
    assert result["calendar"].gain["auc"].value == pytest.approx(0.12)
    assert result["calendar"].behind["auc"].value == pytest.approx(-0.08)
    assert result["calendar"].kept["auc"].value == pytest.approx(0.6)
    # Both users are served alike, so every resample says the same.
    assert result["calendar"].kept["auc"].low == pytest.approx(0.6)
    assert result["calendar"].kept["auc"].high == pytest.approx(0.6)
    assert result["never"].gain == {}
    assert result["nightly"].kept["auc"].value == pytest.approx(1.0)


def test_costs_by_hand():
    result = result_of(NeverRetrain(), RetrainNightly())
    # Snapshots 8 to 11, so many seconds each: 38 s; 36 dollars an hour are a cent a second.
    assert result["nightly"].runs == 4
    assert result["nightly"].seconds == 38.0
    assert result["nightly"].cpu_seconds == 76.0
    assert result["nightly"].usd == pytest.approx(0.38)
    assert (result["never"].runs, result["never"].usd) == (0, 0.0)


def test_impressions_without_anything_to_rank_take_no_part():
    day = result_of(NeverRetrain(), RetrainNightly())["never"].days[2]
    assert (day.day.day, day.snapshot.day, day.impressions) == (10, 7, 2)
    assert day.metrics["auc"].value == pytest.approx(0.7)


def test_intervals_come_from_whole_users():
    """One user with many impressions, one with few: resampled impressions would vary less."""

    class TwoUsers(FakeWorld):
        def quality(self, model: Trained, day: date) -> pl.DataFrame:
            rows = [("ann", 1.0, 1.0)] * 9 + [("bob", 0.0, 0.0)]
            return pl.DataFrame(rows, schema=QUALITY_SCHEMA, orient="row")

    walks = [walked(policy, TwoUsers()) for policy in (NeverRetrain(), RetrainNightly())]
    day = compare("toy", walks, Judging(bootstrap_samples=400))["never"].days[0]
    assert day.metrics["auc"].value == pytest.approx(0.9)
    # A quarter of the draws of two users is twice the same: the interval holds all of 0 to 1.
    assert (day.metrics["auc"].low, day.metrics["auc"].high) == (0.0, 1.0)


def test_there_is_no_share_of_a_gain_that_is_not_sure():
    class Unchanging(FakeWorld):
        def quality(self, model: Trained, day: date) -> pl.DataFrame:
            rows = [("ann", 0.6, 0.3), ("bob", 0.8, 0.4)]
            return pl.DataFrame(rows, schema=QUALITY_SCHEMA, orient="row")

    walks = [walked(policy, Unchanging()) for policy in (NeverRetrain(), RetrainNightly())]
    result = compare("toy", walks, Judging(bootstrap_samples=50))
    assert result["nightly"].gain["auc"].value == 0.0
    assert result["nightly"].kept == {}


def test_policies_must_be_told_apart_and_hold_both_ends():
    for policies in ([NeverRetrain()], [NeverRetrain(), RetrainNightly(), RetrainNightly()]):
        with pytest.raises(ConfigError, match="policies"):
            result_of(*policies)


def test_walks_over_other_impressions_are_not_compared():
    class Other(FakeWorld):
        def quality(self, model: Trained, day: date) -> pl.DataFrame:
            return super().quality(model, day).reverse()

    walks = [walked(NeverRetrain()), walked(RetrainNightly(), Other())]
    with pytest.raises(ContractError, match="the same impressions of 2024-01-08"):
        compare("toy", walks, Judging(bootstrap_samples=50))


@pytest.mark.parametrize(
    ("key", "value"), [("bootstrap_samples", 0), ("confidence", 1.0), ("usd_per_hour", -1.0)]
)
def test_impossible_judging_is_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        Judging(**{key: value})

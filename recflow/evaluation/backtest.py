"""Backtests of retraining: walk the days of a log as they came, and compare policies.

On each day the deployed model scores every impression before anything learns from that day. Then
the policy looks at the day and decides; a model trained on the snapshot that ends with the day
serves from the next day on, unless the gate rejects it. A model therefore never scores a day that
its snapshot reaches; :func:`walk` raises where one would.

How to train, score and judge is the :class:`World`'s; this module keeps the books: who served when,
what was trained, what it cost, and what share of the best policy's gain a cheaper one keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Protocol

import numpy as np
import polars as pl

from recflow.core.columns import Columns
from recflow.core.errors import ConfigError, ContractError, LeakageError
from recflow.core.seeding import make_rng
from recflow.evaluation.evaluator import Estimate
from recflow.evaluation.significance import bootstrap_ratios, codes_of, percentile_interval
from recflow.evaluation.slates import FloatArray, IntArray, sums_by

METRICS = ("auc", "ndcg@10")
"""What a day's quality is measured in."""

QUALITY_SCHEMA = pl.Schema({Columns.USER_ID: pl.String, **dict.fromkeys(METRICS, pl.Float64)})
"""Quality of a day: one row an impression; NaN where there is nothing to rank."""

NEVER, NIGHTLY = "never", "nightly"
"""What every other policy is measured between."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A model as the books know it.

    Attributes:
        snapshot: Last day of the snapshot: nothing later had any influence, not even on the gate.
        learned_until: Time of the newest impression that training or the choice of the epoch saw.
        seconds: Wall time of its training.
        cpu_seconds: Processor time of its training, all threads together.
    """

    snapshot: date
    learned_until: datetime
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Choice:
    """What a policy wants at the end of a day.

    Attributes:
        retrain: Whether to train on the snapshot that ends with the day.
        reason: Why, or why not.
        seconds: Wall time that looking at the day took.
        cpu_seconds: Processor time that it took.
    """

    retrain: bool
    reason: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says of a candidate.

    Attributes:
        admitted: Whether it is deployed.
        reason: Why not; or what was compared.
    """

    admitted: bool
    reason: str = ""


class World(Protocol):
    """A log, and everything that can be done with it."""

    def train(self, snapshot: date) -> Trained:
        """The model of a snapshot; the same one however often it is asked for."""
        ...

    def quality(self, model: Trained, day: date) -> pl.DataFrame:
        """Metrics of each impression of a day (:data:`QUALITY_SCHEMA`)."""
        ...

    def admit(self, candidate: Trained, champion: Trained, day: date) -> Verdict:
        """Compare a candidate with the champion on the test days of the snapshot of ``day``."""
        ...


class Policy(Protocol):
    """When to retrain. One instance serves one walk: it may remember the days it has seen."""

    @property
    def name(self) -> str:
        """Unique name."""
        ...

    def decide(self, day: date, champion: Trained, last_trained: date) -> Choice:
        """Decide at the end of a day.

        Args:
            day: The day that ended.
            champion: The model that served it.
            last_trained: Last day of the snapshot that was trained most recently.
        """
        ...


@dataclass(frozen=True, slots=True)
class NeverRetrain:
    """Keep the first model."""

    name: str = NEVER

    def decide(self, day: date, champion: Trained, last_trained: date) -> Choice:  # noqa: ARG002
        """Do nothing."""
        return Choice(False, "never retrains")


@dataclass(frozen=True, slots=True)
class RetrainNightly:
    """Retrain after every day."""

    name: str = NIGHTLY

    def decide(self, day: date, champion: Trained, last_trained: date) -> Choice:  # noqa: ARG002
        """Retrain."""
        return Choice(True, "every night")


@dataclass(frozen=True, slots=True)
class RetrainOn:
    """Retrain after given days: the control that spends as many runs without looking.

    Attributes:
        name: Unique name.
        days: The days.
    """

    name: str
    days: frozenset[date]

    def decide(self, day: date, champion: Trained, last_trained: date) -> Choice:  # noqa: ARG002
        """Retrain where the day is one of those."""
        return Choice(day in self.days, "by the calendar")


def evenly_spaced(days: Sequence[date], runs: int) -> frozenset[date]:
    """Choose ``runs`` of the days, as far from each other and from both ends as they can be.

    The k-th of n days in N is day number ``round(k * (N + 1) / (n + 1))``, counted from 1.

    Raises:
        ConfigError: There are fewer days than runs.
    """
    if not 0 <= runs <= len(days):
        raise ConfigError.of("runs", runs, f"0 to {len(days)}, one a day")
    places = (round(k * (len(days) + 1) / (runs + 1)) for k in range(1, runs + 1))
    return frozenset(days[place - 1] for place in places)


@dataclass(frozen=True, slots=True)
class Served:
    """A day as the users saw it.

    Attributes:
        day: The day.
        snapshot: Snapshot of the model that served.
        quality: Metrics of each impression (:data:`QUALITY_SCHEMA`).
    """

    day: date
    snapshot: date
    quality: pl.DataFrame


@dataclass(frozen=True, slots=True)
class Retraining:
    """A training that a policy asked for.

    Attributes:
        day: Last day of the snapshot; the model could serve from the next day on.
        reason: Why it was asked for.
        admitted: Whether the gate let it through.
        verdict: What the gate said.
        seconds: Wall time of the training.
        cpu_seconds: Processor time of the training.
    """

    day: date
    reason: str
    admitted: bool
    verdict: str
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Walk:
    """What one policy did over the days.

    Attributes:
        policy: Name of the policy.
        served: Every day, in order.
        trainings: Every training, in order.
        looking_seconds: Wall time spent on looking at the days.
        looking_cpu_seconds: Processor time spent on that.
    """

    policy: str
    served: tuple[Served, ...]
    trainings: tuple[Retraining, ...]
    looking_seconds: float
    looking_cpu_seconds: float


def walk(
    days: Sequence[date],
    *,
    first: Trained,
    policy: Policy,
    world: World,
    tell: Callable[[str], None] | None = None,
) -> Walk:
    """Walk the days with a policy.

    After the last day nothing is decided: what would be trained then serves no day of the walk.

    Args:
        days: The days, ascending.
        first: The model that is deployed before the first day; its training is not charged.
        policy: When to retrain.
        world: The log.
        tell: Receives a line for each training.

    Raises:
        LeakageError: A model would score a day that it, or the gate that let it through, has seen.
    """
    champion, last_trained = first, first.snapshot
    served: list[Served] = []
    trainings: list[Retraining] = []
    looking = looking_cpu = 0.0
    for day in days:
        require_unseen(champion, day)
        served.append(Served(day, champion.snapshot, world.quality(champion, day)))
        if day == days[-1]:
            break
        choice = policy.decide(day, champion, last_trained)
        looking += choice.seconds
        looking_cpu += choice.cpu_seconds
        if not choice.retrain:
            continue
        candidate = world.train(day)
        last_trained = day
        verdict = world.admit(candidate, champion, day)
        trainings.append(
            Retraining(
                day=day,
                reason=choice.reason,
                admitted=verdict.admitted,
                verdict=verdict.reason,
                seconds=candidate.seconds,
                cpu_seconds=candidate.cpu_seconds,
            )
        )
        if tell is not None:
            tell(f"{policy.name}: {day} {'deployed' if verdict.admitted else 'rejected'}")
        if verdict.admitted:
            champion = candidate
    return Walk(policy.name, tuple(served), tuple(trainings), looking, looking_cpu)


def require_unseen(model: Trained, day: date) -> None:
    """Raise unless a model knows nothing of a day.

    Raises:
        LeakageError: Its snapshot reaches the day, or it learned from an impression of it.
    """
    if model.snapshot >= day or model.learned_until.date() >= day:
        raise LeakageError(
            f"the model of snapshot {model.snapshot}, which learned until "
            f"{model.learned_until.isoformat()}, must not score {day}: deploy it from the day "
            "after its snapshot on"
        )


@dataclass(frozen=True, slots=True)
class DayResult:
    """One day of one policy.

    Attributes:
        day: The day.
        snapshot: Snapshot of the model that served.
        impressions: Impressions with a click and a non-click.
        metrics: Mean over these by metric, with the interval over users.
    """

    day: date
    snapshot: date
    impressions: int
    metrics: Mapping[str, Estimate]


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """One policy over all days.

    Attributes:
        name: The policy.
        metrics: Mean over the impressions of all days, by metric.
        gain: That less the never-retrained model's, paired; empty for the latter.
        kept: Share of the nightly policy's gain; without a metric whose nightly gain is not above
            zero for sure, because a share of nothing says nothing.
        behind: Metric less the nightly policy's, paired; empty for the latter.
        trainings: Every training.
        seconds: Wall time of all trainings.
        cpu_seconds: Processor time of all trainings.
        usd: Price of the wall time of all trainings.
        looking_seconds: Wall time spent on looking at the days.
        looking_cpu_seconds: Processor time spent on that.
        days: Every day.
    """

    name: str
    metrics: Mapping[str, Estimate]
    gain: Mapping[str, Estimate]
    kept: Mapping[str, Estimate]
    behind: Mapping[str, Estimate]
    trainings: tuple[Retraining, ...]
    seconds: float
    cpu_seconds: float
    usd: float
    looking_seconds: float
    looking_cpu_seconds: float
    days: tuple[DayResult, ...]

    @property
    def runs(self) -> int:
        """Number of trainings, those that the gate rejected included."""
        return len(self.trainings)

    @property
    def rejected(self) -> int:
        """Number of trainings that the gate rejected."""
        return sum(not training.admitted for training in self.trainings)


@dataclass(frozen=True, slots=True)
class Backtest:
    """Policies compared on one log.

    Attributes:
        name: Name of the log.
        description: What it is, a sentence.
        first_snapshot: Snapshot of the model that every policy starts with.
        policies: The policies, in the order they were walked.
        confidence: Share of the resamples inside an interval.
        bootstrap_samples: Resamples behind each interval.
        events: What happens in the log on which day, e.g. a drift that was simulated.
    """

    name: str
    description: str
    first_snapshot: date
    policies: tuple[PolicyResult, ...]
    confidence: float
    bootstrap_samples: int
    events: Mapping[date, str] = field(default_factory=lambda: {})

    def __getitem__(self, name: str) -> PolicyResult:
        """The result of one policy."""
        for policy in self.policies:
            if policy.name == name:
                return policy
        raise KeyError(name)


@dataclass(frozen=True, slots=True)
class Judging:
    """How walks are compared.

    Attributes:
        bootstrap_samples: Resamples of users behind each interval.
        confidence: Share of the resamples inside an interval.
        seed: Seed of the draws.
        usd_per_hour: Price of the machine that trains.
    """

    bootstrap_samples: int = 1_000
    confidence: float = 0.95
    seed: int = 0
    usd_per_hour: float = 0.0

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        if self.bootstrap_samples < 1:
            raise ConfigError.of("bootstrap_samples", self.bootstrap_samples, "1 or more")
        if not 0 < self.confidence < 1:
            raise ConfigError.of("confidence", self.confidence, "between 0 and 1, e.g. 0.95")
        if self.usd_per_hour < 0:
            raise ConfigError.of("usd_per_hour", self.usd_per_hour, "0 or more")


def compare(
    name: str,
    walks: Sequence[Walk],
    judging: Judging,
    *,
    description: str = "",
    events: Mapping[date, str] | None = None,
) -> Backtest:
    """Compare walks over the same days.

    Intervals come from whole users drawn with replacement, the same draws for every policy, so that
    gains and shares are paired.

    Args:
        name: Name of the log.
        walks: One a policy; ``never`` and ``nightly`` must be among them.
        judging: How to compare.
        description: What the log is.
        events: What happens in the log on which day.

    Raises:
        ConfigError: A policy is there twice, or one of the two is missing.
        ContractError: The walks are not over the same days and impressions, or a day has nothing
            to rank.
    """
    names = [one.policy for one in walks]
    if len(set(names)) < len(names) or not {NEVER, NIGHTLY} <= set(names):
        raise ConfigError.of("policies", names, f"distinct ones, {NEVER} and {NIGHTLY} among them")
    _require_same_days(walks)
    overall = _Resampled([_stacked(one) for one in walks], judging, "overall")
    daily = [
        _Resampled([one.served[number].quality for one in walks], judging, str(served.day))
        for number, served in enumerate(walks[0].served)
    ]
    never, nightly = names.index(NEVER), names.index(NIGHTLY)

    def judged(place: int, one: Walk) -> PolicyResult:
        gain = {m: overall.difference(m, place, never) for m in METRICS if place != never}
        return PolicyResult(
            name=one.policy,
            metrics={m: overall.mean(m, place) for m in METRICS},
            gain=gain,
            kept={
                m: share
                for m in gain
                if (share := overall.share(m, place, never, nightly)) is not None
            },
            behind={m: overall.difference(m, place, nightly) for m in METRICS if place != nightly},
            trainings=one.trainings,
            seconds=(seconds := sum(t.seconds for t in one.trainings)),
            cpu_seconds=sum(t.cpu_seconds for t in one.trainings),
            usd=seconds / 3_600 * judging.usd_per_hour,
            looking_seconds=one.looking_seconds,
            looking_cpu_seconds=one.looking_cpu_seconds,
            days=tuple(
                DayResult(
                    day=served.day,
                    snapshot=served.snapshot,
                    impressions=resampled.evaluated,
                    metrics={m: resampled.mean(m, place) for m in METRICS},
                )
                for served, resampled in zip(one.served, daily, strict=True)
            ),
        )

    return Backtest(
        name=name,
        description=description,
        first_snapshot=walks[0].served[0].snapshot,
        policies=tuple(judged(place, one) for place, one in enumerate(walks)),
        confidence=judging.confidence,
        bootstrap_samples=judging.bootstrap_samples,
        events=dict(events or {}),
    )


def _require_same_days(walks: Sequence[Walk]) -> None:
    for one in walks[1:]:
        for reference, served in zip(walks[0].served, one.served, strict=False):
            users = reference.quality[Columns.USER_ID]
            if reference.day != served.day or not users.equals(served.quality[Columns.USER_ID]):
                raise ContractError(
                    f"policies {walks[0].policy} and {one.policy} did not score the same "
                    f"impressions of {reference.day}; walk them over one log"
                )
        if len(one.served) != len(walks[0].served):
            raise ContractError(
                f"policies {walks[0].policy} and {one.policy} walked {len(walks[0].served)} and "
                f"{len(one.served)} days; walk them over the same"
            )


def _stacked(one: Walk) -> pl.DataFrame:
    return pl.concat([served.quality for served in one.served])


class _Resampled:
    """Means of every policy over users drawn with replacement; all policies see the same draws."""

    def __init__(self, tables: Sequence[pl.DataFrame], judging: Judging, purpose: str) -> None:
        self._confidence = judging.confidence
        users: list[str] = tables[0][Columns.USER_ID].to_list()
        codes, count = codes_of(users)
        defined: IntArray = np.flatnonzero(~np.isnan(tables[0][METRICS[0]].to_numpy()))
        if not len(defined):
            raise ContractError(
                "a day has no impression with a click and a non-click, so nothing can be ranked; "
                "walk days that have some"
            )
        self.evaluated = len(defined)
        columns = [table[metric].to_numpy()[defined] for table in tables for metric in METRICS]
        sums: FloatArray = np.stack(
            [sums_by(codes[defined], column, count) for column in columns], axis=1
        )
        sizes: FloatArray = sums_by(codes[defined], np.ones(len(defined)), count)
        below: FloatArray = np.repeat(sizes[:, None], len(columns), axis=1)
        self._means: FloatArray = sums.sum(axis=0) / sizes.sum()
        rng = make_rng(judging.seed, "backtest", purpose)
        self._replicates = bootstrap_ratios(sums, below, judging.bootstrap_samples, rng)

    def mean(self, metric: str, place: int) -> Estimate:
        column = _column(metric, place)
        return self._estimate(float(self._means[column]), self._replicates[:, column])

    def difference(self, metric: str, place: int, other: int) -> Estimate:
        one, two = _column(metric, place), _column(metric, other)
        return self._estimate(
            float(self._means[one] - self._means[two]),
            self._replicates[:, one] - self._replicates[:, two],
        )

    def share(self, metric: str, place: int, low: int, high: int) -> Estimate | None:
        """Where ``place`` lies between ``low`` (0) and ``high`` (1); None where they are one."""
        whole = self.difference(metric, high, low)
        if whole.low is None or whole.low <= 0:
            return None
        one, bottom, top = (_column(metric, p) for p in (place, low, high))
        r = self._replicates
        with np.errstate(divide="ignore", invalid="ignore"):
            shares: FloatArray = (r[:, one] - r[:, bottom]) / (r[:, top] - r[:, bottom])
        value = float(self._means[one] - self._means[bottom]) / whole.value
        return self._estimate(value, shares)

    def _estimate(self, value: float, replicates: FloatArray) -> Estimate:
        interval = percentile_interval(replicates, self._confidence)
        return Estimate(value, *(interval or ()))


def _column(metric: str, place: int) -> int:
    return place * len(METRICS) + METRICS.index(metric)

"""When drift is reason enough to retrain: a decision on evidence, without clock or scheduler.

The sensor of the deployment and the backtest ask the same function, so that what was measured in
the backtest is what runs.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta

from recflow.core.errors import ConfigError
from recflow.quality.evidence import DriftEvidence


@dataclass(frozen=True, slots=True)
class TriggerPolicy:
    """When to retrain.

    Attributes:
        days_needed: So many of the days looked at must be alarming: one bad day is no trend.
        days_looked_at: The newest so many days with a report of the present champion.
        cooldown_days: Days of the log that must lie between the snapshots of two retrainings.
        decay_at_once: Retrain on the first day that the champion ranks significantly worse.
        settle_days: Once a drift has led to a retraining, retrain after each cooldown until a
            snapshot ends so many days after the drift's first alarming day; 0 for never. The
            snapshot that is triggered holds its newest days out, so it learned from hardly any day
            after the change; as a reference it holds them, so that nothing alarms any more.

    Raises:
        ConfigError: A value is impossible.
    """

    days_needed: int = 2
    days_looked_at: int = 3
    cooldown_days: int = 0
    decay_at_once: bool = True
    settle_days: int = 7

    def __post_init__(self) -> None:
        if self.days_needed < 1:
            raise ConfigError.of("days_needed", self.days_needed, "1 or more")
        if self.days_looked_at < self.days_needed:
            raise ConfigError.of(
                "days_looked_at", self.days_looked_at, f"days_needed ({self.days_needed}) or more"
            )
        if self.cooldown_days < 0:
            raise ConfigError.of("cooldown_days", self.cooldown_days, "0 or more")
        if self.settle_days < 0:
            raise ConfigError.of("settle_days", self.settle_days, "0 or more")


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, and why.

    Attributes:
        reason: Why, in words for the person who looks at the sensor.
        snapshot: The snapshot to train; ``None`` where nothing is to be done.
        run_key: Identity of the evidence: the same evidence gives the same key.
    """

    reason: str
    snapshot: date | None = None
    run_key: str | None = None

    @property
    def retrain(self) -> bool:
        """Whether to retrain."""
        return self.snapshot is not None


def decide(
    evidence: Sequence[DriftEvidence], policy: TriggerPolicy, *, last_retrained: date | None
) -> Decision:
    """Decide on what is known so far.

    Args:
        evidence: The newest report of each day, in any order. Days compared with another champion
            than the newest day was are left out: they say nothing of the present one.
        policy: When to retrain.
        last_retrained: Newest snapshot that was trained or is being trained, whether or not it
            became champion.
    """
    if not evidence:
        return Decision("no day has a drift report yet")
    ordered = sorted(evidence, key=lambda e: e.day)
    newest = ordered[-1]
    recent = [e for e in ordered if e.champion == newest.champion][-policy.days_looked_at :]
    if last_retrained is not None:
        if newest.day <= last_retrained:
            return Decision(f"snapshot {last_retrained} covers the newest day, {newest.day}")
        recent = [e for e in recent if e.day > last_retrained]
    alarming = [e for e in recent if e.alarming]
    decayed = newest.decayed and policy.decay_at_once
    seen = f"{len(alarming)} of the last {len(recent)} days are beyond a limit"
    if last_retrained is not None and newest.day >= _ready(last_retrained, policy):
        drift = _last_drift(ordered, last_retrained, policy)
        if drift and (last_retrained - drift[0].day).days < policy.settle_days:
            return Decision(
                f"the drift that began on {drift[0].day} ({_names(drift)}) has not settled: "
                f"snapshot {last_retrained} holds few days after that",
                newest.day,
                run_key([*drift, newest]),
            )
    if not decayed and len(alarming) < policy.days_needed:
        return Decision(f"{seen}; {policy.days_needed} of {policy.days_looked_at} are needed")
    if not newest.alarming:
        return Decision(f"{seen}, but the newest, {newest.day}, is not: it has passed")
    if last_retrained is not None:
        ready = _ready(last_retrained, policy)
        if newest.day < ready:
            return Decision(
                f"{seen}, but snapshot {last_retrained} was trained less than "
                f"{policy.cooldown_days + 1} days before {newest.day}; next on {ready}"
            )
    return Decision(_reason(newest, alarming, seen), newest.day, run_key(alarming))


def run_key(evidence: Sequence[DriftEvidence]) -> str:
    """Identity of the evidence that a retraining is requested for.

    The policy is no part of it: who changes the policy does not ask for a training of what was
    trained on already.

    Args:
        evidence: The alarming days, oldest first; at least one.
    """
    lines = "\n".join(f"{e.day} {e.digest} {e.champion}" for e in evidence)
    return f"drift-{evidence[-1].day}-{hashlib.sha256(lines.encode()).hexdigest()[:16]}"


def _ready(last_retrained: date, policy: TriggerPolicy) -> date:
    """First day whose snapshot may be trained after the last one."""
    return last_retrained + timedelta(days=policy.cooldown_days + 1)


def _last_drift(
    ordered: Sequence[DriftEvidence], last_retrained: date, policy: TriggerPolicy
) -> list[DriftEvidence]:
    """The alarming days up to a snapshot that belong to one drift; empty if it is of none.

    Alarming days belong together where no ``days_looked_at`` days lie between them. Of them it
    does not matter which champion a day was compared with.
    """
    drift: list[DriftEvidence] = []
    for one in ordered:
        if one.alarming and one.day <= last_retrained:
            if drift and (one.day - drift[-1].day).days > policy.days_looked_at:
                drift = []
            drift.append(one)
    began = len(drift) >= policy.days_needed or any(one.decayed for one in drift)
    return drift if began else []


def _names(evidence: Sequence[DriftEvidence]) -> str:
    decay = ["decay"] if any(e.decayed for e in evidence) else []
    return ", ".join([*decay, *dict.fromkeys(name for e in evidence for name in e.drifted)])


def _reason(newest: DriftEvidence, alarming: Sequence[DriftEvidence], seen: str) -> str:
    counts = Counter(name for e in alarming for name in e.drifted)
    parts = [f"{name} on {days} days" for name, days in counts.most_common()]
    if newest.decayed:
        parts.insert(0, f"the champion ranks worse on {newest.day} than on its test days")
    return f"{seen}: {'; '.join(parts)}"

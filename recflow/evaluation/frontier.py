"""Which models are worth keeping: those that no other one can replace without a loss.

The rule. Model A *can replace* model B if

1. A is about as accurate: its primary metric is not below B's by more than :data:`LARGEST_LOSS` of
   B's, nor distinguishably below: the interval of the paired difference A − B reaches 0 (without an
   interval: the difference is not below 0);
2. A costs no more, beyond the tolerance, in any cost known of both: median latency of one text,
   time per text in bulk, peak memory, size on disk; and
3. A is better in something: distinguishably more accurate (the interval lies above 0), or cheaper
   by more than the tolerance in one of the costs.

What is measured with a clock differs from run to run, and so does memory: within :data:`TOLERANCE`
of each other two such numbers count as equal. Size has no tolerance. So two models that are the
same in everything never replace each other. The largest loss keeps small test sets honest: with few
users hardly any difference is distinguishable, and the smallest model would replace everything.

A model is *dominated* if a model of the frontier can replace it. The frontier is found by keeping
every model that none of those left can replace, dropping all that the kept ones can replace, and so
on (the kernel of the relation). Plain Pareto dominance needs no such order; but "about as accurate"
is not transitive: A may stand in for B and B for C while A is worse than C.
Then C stays, as the model that could replace it is gone. Should models replace each other in a
circle, which tolerances allow, nothing that is left is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from recflow.core.errors import ConfigError
from recflow.core.measurement import Measurement
from recflow.evaluation.evaluator import Paired

LARGEST_LOSS: Final = 0.01
"""Share of the accuracy that a replacement may lose, if the loss may as well be noise."""

TOLERANCE: Final = 0.05
"""Relative difference of latency, throughput or memory that is taken for noise."""


@dataclass(frozen=True, slots=True)
class Cost:
    """One of the costs that are compared.

    Attributes:
        name: What it is, for people.
        unit: Its unit.
        tolerance: Relative difference that counts as none.
        of: Its value for a measurement, less being better; ``None`` where it was not measured.
    """

    name: str
    unit: str
    tolerance: float
    of: Callable[[Measurement], float | None]


def _latency(measurement: Measurement) -> float | None:
    return next((x.p50 for x in measurement.latencies if x.batch_size == 1), None)


def _time_per_text(measurement: Measurement) -> float | None:
    return 1_000 / measurement.texts_per_second if measurement.texts_per_second > 0 else None


COSTS: Final = (
    Cost("latency of one text", "ms", TOLERANCE, _latency),
    Cost("time per text in bulk", "ms", TOLERANCE, _time_per_text),
    Cost("peak memory", "MB", TOLERANCE, lambda m: m.peak_rss_bytes / 1e6),
    Cost("size on disk", "MB", 0.0, lambda m: m.serving_bytes / 1e6),
)


@dataclass(frozen=True, slots=True)
class Replacement:
    """Why one model can replace another.

    Attributes:
        by: The model that takes its place.
        gain: Accuracy of ``by`` less that of the one replaced.
        more_accurate: Whether that is distinguishably above 0.
        ratios: Cost of ``by`` as a share of that of the one replaced, by name of the cost; those
            known of both.
        cheaper: Names of the costs in which ``by`` is cheaper beyond the tolerance.
    """

    by: str
    gain: Paired
    more_accurate: bool
    ratios: Mapping[str, float]
    cheaper: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Frontier:
    """Which models are dominated.

    Attributes:
        kept: Models that no kept model can replace, in the order given.
        dominated: By dominated model, every kept model that can replace it, most accurate first.
        unjudged: Models without a measurement: they neither dominate nor are dominated.
    """

    kept: tuple[str, ...]
    dominated: Mapping[str, tuple[Replacement, ...]]
    unjudged: tuple[str, ...]


def frontier(
    names: Sequence[str],
    measurements: Mapping[str, Measurement],
    gain: Callable[[str, str], Paired],
) -> Frontier:
    """Find the models worth keeping.

    Args:
        names: The models.
        measurements: What each costs, by name; a model may be missing.
        gain: Accuracy of the first model less that of the second, paired; greater is better.

    Returns:
        The frontier; with one model or none there is nothing to dominate.

    Raises:
        ConfigError: A model is named twice.
    """
    if len(set(names)) < len(names):
        raise ConfigError.of("names", list(names), "every model once")
    judged = [name for name in names if name in measurements]
    replacing = {
        name: {
            other: found
            for other in judged
            if other != name
            and (
                found := replacement(
                    other, gain(other, name), measurements[other], measurements[name]
                )
            )
        }
        for name in judged
    }
    left, kept = list(judged), list[str]()
    while left:
        # In a circle nothing is free, and no model of it has a better claim than another.
        free = [name for name in left if not replacing[name].keys() & set(left)] or left
        kept += free
        left = [
            name for name in left if name not in free and not replacing[name].keys() & set(free)
        ]
    return Frontier(
        kept=tuple(name for name in judged if name in kept),
        dominated={
            name: tuple(
                sorted(
                    (found for other, found in replacing[name].items() if other in kept),
                    key=lambda found: (-found.gain.difference.value, found.by),
                )
            )
            for name in judged
            if name not in kept
        },
        unjudged=tuple(name for name in names if name not in measurements),
    )


def replacement(by: str, gain: Paired, own: Measurement, other: Measurement) -> Replacement | None:
    """Whether one model can replace another; see the rule above.

    Args:
        by: Name of the first.
        gain: Its accuracy less the other's.
        own: What it costs.
        other: What the other costs.

    Returns:
        Why it can, or ``None`` if it cannot.
    """
    difference = gain.difference
    best = difference.value if difference.high is None else difference.high
    worst = difference.value if difference.low is None else difference.low
    if not (best >= 0 and gain.relative.value >= -LARGEST_LOSS):  # also if one is NaN
        return None
    ratios: dict[str, float] = {}
    cheaper: list[str] = []
    for cost in COSTS:
        mine, theirs = cost.of(own), cost.of(other)
        if mine is None or theirs is None:
            continue
        ratios[cost.name] = mine / theirs if theirs else math.inf if mine else 1.0
        if mine > theirs * (1 + cost.tolerance):
            return None
        if mine * (1 + cost.tolerance) < theirs:
            cheaper.append(cost.name)
    if not cheaper and not worst > 0:
        return None
    return Replacement(by, gain, worst > 0, ratios, tuple(cheaper))

"""May this model become the champion? Every requirement, with what was seen and what is allowed.

The candidate and the champion scored the same impressions, and intervals are paired (see
:mod:`recflow.evaluation.significance`): what is hard for both does not blur their difference. The
question is one of non-inferiority: a candidate is let through unless it may be worse by more than
``epsilon``. A better one is not asked for, because a model of the same quality that has seen newer
days is the better one tomorrow; a long row of small losses is prevented by a small ``epsilon``.

Everything is judged, also after something failed: who mends a candidate wants all reasons at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from typing import Final, Literal, TypeAlias, cast

from recflow.core.artifacts import JsonValue
from recflow.core.errors import ConfigError
from recflow.evaluation.evaluator import Estimate, Evaluation, EvaluationConfig, ScorerResult
from recflow.evaluation.metrics import METRICS, RANKING_METRICS

CHAMPION: Final = "champion"
"""Name of the champion's scores beside those of the candidate."""

CHECKED_SEGMENTS: Final = ("cold_users", "new_items")
"""Segments that are guarded beside the categories (``category:…``)."""

Outcome: TypeAlias = Literal["may_become_champion", "already_champion", "blocked"]
Verdict: TypeAlias = Literal["passed", "failed", "not_judged"]


@dataclass(frozen=True, slots=True)
class GateConfig:
    """What is required.

    Attributes:
        primary_metric: Ranking metric that is compared; higher is better.
        epsilon: Largest loss of it that may not be excluded.
        confidence: Share of the resamples inside an interval.
        bootstrap_samples: Resamples behind each interval.
        seed: Seed of the draws.
        max_segment_loss: Largest loss of the metric in a segment.
        min_segment_impressions: Impressions below which a segment is not judged.
        min_baseline_lead: Least lead of the first champion over every content-only baseline that
            must be beyond doubt.
        max_p99_ms: Limit of the 99th percentile of the latency of one text; ``None`` for none.
        max_memory_mib: Limit of the peak memory of a process that uses the model.
        max_megabytes: Limit of the size of everything that serving reads, in 10^6 bytes.
        max_usd_per_million: Limit of the price of a million recommendations.

    Raises:
        ConfigError: A value is impossible.
    """

    primary_metric: str = "auc"
    epsilon: float = 0.002
    confidence: float = 0.95
    bootstrap_samples: int = 1_000
    seed: int = 0
    max_segment_loss: float = 0.02
    min_segment_impressions: int = 200
    min_baseline_lead: float = 0.0
    max_p99_ms: float | None = None
    max_memory_mib: float | None = None
    max_megabytes: float | None = None
    max_usd_per_million: float | None = None

    def __post_init__(self) -> None:
        if self.primary_metric not in RANKING_METRICS:
            raise ConfigError.of("primary_metric", self.primary_metric, ", ".join(RANKING_METRICS))
        for name in ("epsilon", "max_segment_loss"):
            value = cast("float", getattr(self, name))
            if not 0 <= value < 1:
                raise ConfigError.of(name, value, "a loss of the metric, from 0 to less than 1")
        if self.min_segment_impressions < 1:
            raise ConfigError.of(
                "min_segment_impressions", self.min_segment_impressions, "1 or more"
            )
        if not -1 <= self.min_baseline_lead < 1:
            raise ConfigError.of(
                "min_baseline_lead", self.min_baseline_lead, "a difference of the metric, -1 to 1"
            )
        for name in ("max_p99_ms", "max_memory_mib", "max_megabytes", "max_usd_per_million"):
            value = cast("float | None", getattr(self, name))
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError.of(name, value, "a positive number, or nothing for no limit")
        self.evaluation({})  # the rest is refused where it is used

    def evaluation(self, parents: Mapping[str, str]) -> EvaluationConfig:
        """How the predictions are evaluated, by pairs of scorer and what it is compared with."""
        return EvaluationConfig(
            primary_metric=self.primary_metric,
            bootstrap_samples=self.bootstrap_samples,
            confidence=self.confidence,
            seed=self.seed,
            references={},
            parents=parents,
        )


@dataclass(frozen=True, slots=True)
class Incumbent:
    """The champion that a candidate is compared with.

    Attributes:
        version: Version in the registry.
        snapshot: Partition of its snapshot.
        digest: Digest of its artifact.
        seen_until: Last day (UTC) that it was trained or chosen on.
    """

    version: str
    snapshot: str
    digest: str
    seen_until: date


@dataclass(frozen=True, slots=True)
class Costs:
    """What the candidate costs; ``None`` where that was not measured or planned.

    Attributes:
        p99_ms: 99th percentile of the latency of one text, in milliseconds.
        memory_mib: Peak memory of a process that uses it, in MiB.
        megabytes: Size of everything that serving reads, in 10^6 bytes.
        usd_per_million: Price of a million recommendations on the cheapest device that fits.
    """

    p99_ms: float | None = None
    memory_mib: float | None = None
    megabytes: float | None = None
    usd_per_million: float | None = None


@dataclass(frozen=True, slots=True)
class Parity:
    """Whether the model that is served says what the model that was judged says.

    Attributes:
        impressions: Test impressions that both scored.
        scores: Scores that were compared.
        different: Scores that are not the same number, bit for bit.
        largest_difference: Largest difference between two of them.
        example: The first difference, in words; empty where there is none.
        distance_to_judged: Largest difference to the scores that were judged, which were computed
            for many impressions at a time; rounding makes it small, not zero.
    """

    impressions: int
    scores: int
    different: int
    largest_difference: float
    example: str = ""
    distance_to_judged: float = 0.0


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that is judged.

    Attributes:
        candidate: Name of the candidate's scores.
        digest: Digest of the candidate's artifact.
        first_test_day: First day (UTC) of the test split.
        evaluation: The candidate beside the champion or, where there is none, the baselines.
        baselines: Names of the content-only baselines; looked at where there is no champion.
        incumbent: The champion, if there is one.
        costs: What the candidate costs.
        parity: Whether it is served as it was judged.
    """

    candidate: str
    digest: str
    first_test_day: date
    evaluation: Evaluation
    baselines: Sequence[str]
    incumbent: Incumbent | None
    costs: Costs
    parity: Parity


@dataclass(frozen=True, slots=True)
class Requirement:
    """One requirement and how it went.

    Attributes:
        name: Short name, e.g. ``not_worse_than_champion`` or ``segment:cold_users``.
        verdict: How it went.
        value: The number that was judged; ``None`` where there is none.
        limit: What it was held against; ``None`` where there is none.
        reason: The same in words.
    """

    name: str
    verdict: Verdict
    value: float | None
    limit: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class GateDecision:
    """What the gate says.

    Attributes:
        candidate: Name of the candidate.
        digest: Digest of its artifact.
        champion: Version of the champion it was compared with; empty where there is none.
        outcome: What follows.
        requirements: Every requirement, in the order in which they were judged.
        metrics: The primary metric of everybody who was compared, by name.
        config: What was required.
    """

    candidate: str
    digest: str
    champion: str
    outcome: Outcome
    requirements: tuple[Requirement, ...]
    metrics: Mapping[str, float] = field(default_factory=lambda: {})
    config: GateConfig = field(default_factory=GateConfig)

    @property
    def passed(self) -> bool:
        """Whether the candidate may be, or is, the champion."""
        return self.outcome != "blocked"

    @property
    def failed(self) -> tuple[Requirement, ...]:
        """The requirements that were not met."""
        return tuple(item for item in self.requirements if item.verdict == "failed")

    @property
    def reasons(self) -> list[str]:
        """Every requirement in a line, those that were not met first."""
        order: dict[Verdict, int] = {"failed": 0, "passed": 1, "not_judged": 2}
        ordered = sorted(self.requirements, key=lambda item: order[item.verdict])
        return [f"{item.verdict.replace('_', ' ')}: {item.reason}" for item in ordered]

    def to_json(self) -> dict[str, JsonValue]:
        """As plain JSON values; what is not a finite number is null."""
        return {
            "candidate": self.candidate,
            "digest": self.digest,
            "champion": self.champion,
            "outcome": self.outcome,
            "passed": self.passed,
            "requirements": [
                cast(
                    "JsonValue",
                    {
                        **asdict(item),
                        "value": _finite(item.value),
                        "limit": _finite(item.limit),
                    },
                )
                for item in self.requirements
            ],
            "metrics": {name: _finite(value) for name, value in self.metrics.items()},
            "config": cast("JsonValue", asdict(self.config)),
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, JsonValue]) -> GateDecision:
        """Read what :meth:`to_json` wrote.

        Raises:
            KeyError, TypeError: It is something else.
        """
        requirements = cast("list[dict[str, JsonValue]]", raw["requirements"])
        return cls(
            candidate=str(raw["candidate"]),
            digest=str(raw["digest"]),
            champion=str(raw["champion"]),
            outcome=cast("Outcome", raw["outcome"]),
            requirements=tuple(
                Requirement(**item)  # pyright: ignore[reportArgumentType]
                for item in requirements
            ),
            metrics=cast("dict[str, float]", raw["metrics"]),
            config=GateConfig(**cast("dict[str, float]", raw["config"])),  # pyright: ignore[reportArgumentType]
        )


def judge(evidence: Evidence, config: GateConfig) -> GateDecision:
    """Decide whether a candidate may become the champion.

    Args:
        evidence: What was found. The evaluation was made with ``config.evaluation(parents)``,
            where the parent of the candidate is :data:`CHAMPION` or, without a champion, the
            parent of every baseline is the candidate.
        config: What is required.

    Returns:
        The decision; ``blocked`` as soon as one requirement failed. What could not be judged does
        not block, but a limit without a number to hold against it does.
    """
    incumbent = evidence.incumbent
    if incumbent is not None and incumbent.digest == evidence.digest:
        same = Requirement(
            "already_champion",
            "passed",
            None,
            None,
            f"the candidate is the champion already, version {incumbent.version}",
        )
        return _decision(evidence, config, [same, _parity(evidence.parity)], "already_champion")
    requirements = [
        *(
            _against_baselines(evidence, config)
            if incumbent is None
            else _against_champion(evidence, incumbent, config)
        ),
        *_budgets(evidence.costs, config),
        _parity(evidence.parity),
    ]
    return _decision(evidence, config, requirements, "may_become_champion")


def _decision(
    evidence: Evidence, config: GateConfig, requirements: list[Requirement], outcome: Outcome
) -> GateDecision:
    blocked = any(item.verdict == "failed" for item in requirements)
    primary = config.primary_metric
    return GateDecision(
        candidate=evidence.candidate,
        digest=evidence.digest,
        champion=evidence.incumbent.version if evidence.incumbent else "",
        outcome="blocked" if blocked else outcome,
        requirements=tuple(requirements),
        metrics={r.name: r.metrics[primary].value for r in evidence.evaluation.scorers},
        config=config,
    )


def _against_champion(
    evidence: Evidence, incumbent: Incumbent, config: GateConfig
) -> list[Requirement]:
    """Compare with the champion – unless it knows the answers already."""
    if incumbent.seen_until >= evidence.first_test_day:
        return [
            Requirement(
                "champion_has_not_seen_the_test",
                "failed",
                None,
                None,
                f"the champion, version {incumbent.version} of snapshot {incumbent.snapshot}, was "
                f"trained on days up to {incumbent.seen_until}, and the test begins on "
                f"{evidence.first_test_day}: it would be asked what it has been told; put forward "
                "a snapshot that ends later",
            )
        ]
    unseen = Requirement(
        "champion_has_not_seen_the_test",
        "passed",
        None,
        None,
        f"the champion, version {incumbent.version} of snapshot {incumbent.snapshot}, has seen "
        f"days up to {incumbent.seen_until}; the test begins on {evidence.first_test_day}",
    )
    result = evidence.evaluation[evidence.candidate]
    comparison = result.parent
    assert comparison is not None, "the evaluation compares the candidate with the champion"
    label = METRICS[config.primary_metric].label
    difference = comparison.differences[config.primary_metric]
    low = _low(difference)
    better = low > -config.epsilon
    overall = Requirement(
        "not_worse_than_champion",
        "passed" if better else "failed",
        low,
        -config.epsilon,
        f"{label} {result.metrics[config.primary_metric].value:.4f}, "
        f"{_with_interval(difference)} against the champion; a loss of {config.epsilon:g} "
        f"{'is excluded' if better else 'cannot be excluded'}",
    )
    return [unseen, overall, *_segments(result, comparison.segments, label, config)]


def _segments(
    result: ScorerResult, differences: Mapping[str, Estimate], label: str, config: GateConfig
) -> list[Requirement]:
    """Guard the groups that a mean over all impressions hides."""
    found: list[Requirement] = []
    for segment in result.segments:
        if segment.name not in CHECKED_SEGMENTS and not segment.name.startswith("category:"):
            continue
        difference = differences[segment.name]
        many = segment.impressions
        if many < config.min_segment_impressions:
            found.append(
                Requirement(
                    f"segment:{segment.name}",
                    "not_judged",
                    difference.value,
                    -config.max_segment_loss,
                    f"{segment.label}: {many} impressions are fewer than "
                    f"{config.min_segment_impressions} ({label} {_with_interval(difference)})",
                )
            )
            continue
        large = difference.value < -config.max_segment_loss
        certain = difference.high is not None and difference.high < 0
        found.append(
            Requirement(
                f"segment:{segment.name}",
                "failed" if large and certain else "passed",
                difference.value,
                -config.max_segment_loss,
                f"{segment.label}: {label} {_with_interval(difference)} over {many} impressions; "
                f"the largest loss allowed is {config.max_segment_loss:g}"
                f"{', and this one may be chance' if large and not certain else ''}",
            )
        )
    return found


def _against_baselines(evidence: Evidence, config: GateConfig) -> list[Requirement]:
    """The first champion: better than everything that takes no training, beyond doubt."""
    label = METRICS[config.primary_metric].label
    found: list[Requirement] = []
    for name in evidence.baselines:
        difference = evidence.evaluation.pairs[evidence.candidate, name].difference
        low, least = _low(difference), config.min_baseline_lead
        better = low > least
        more = f" by more than {least:+g}" if least else ""
        found.append(
            Requirement(
                f"beats:{name}",
                "passed" if better else "failed",
                low,
                least,
                f"{label} {_with_interval(difference)} against {name}, a baseline that nobody has "
                f"to train; {'better' if better else 'not better'}{more}"
                f"{'' if better else ' beyond doubt'}",
            )
        )
    return found


def _budgets(costs: Costs, config: GateConfig) -> list[Requirement]:
    rows = (
        ("max_p99_ms", "latency", costs.p99_ms, config.max_p99_ms, "ms (p99 of one text)"),
        ("max_memory_mib", "memory", costs.memory_mib, config.max_memory_mib, "MiB at the peak"),
        ("max_megabytes", "size", costs.megabytes, config.max_megabytes, "MB on disk"),
        (
            "max_usd_per_million",
            "price",
            costs.usd_per_million,
            config.max_usd_per_million,
            "USD per million recommendations",
        ),
    )
    return [_budget(*row) for row in rows]


def _budget(
    name: str, what: str, value: float | None, limit: float | None, unit: str
) -> Requirement:
    seen = "unknown" if value is None else f"{value:.4g} {unit}"
    if limit is None:
        return Requirement(name, "not_judged", value, None, f"{what}: {seen}; there is no limit")
    held = value is not None and value <= limit
    return Requirement(
        name,
        "passed" if held else "failed",
        value,
        limit,
        f"{what}: {seen}; the limit is {limit:g} {unit}",
    )


def _parity(parity: Parity) -> Requirement:
    same = parity.scores > 0 and parity.different == 0
    if same:
        reason = (
            f"the served model, loaded anew and asked in JSON, gave exactly the same "
            f"{parity.scores} scores of {parity.impressions} test impressions"
        )
    elif not parity.scores:
        reason = "nothing was asked of the served model"
    else:
        reason = (
            f"the served model gave other numbers for {parity.different} of {parity.scores} "
            f"scores, by up to {parity.largest_difference:.3g}: {parity.example}"
        )
    return Requirement(
        "served_as_judged", "passed" if same else "failed", float(parity.different), 0.0, reason
    )


def _low(difference: Estimate) -> float:
    """Lower end of the interval; the difference itself where nothing could be resampled."""
    return difference.value if difference.low is None else difference.low


def _with_interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:+.4f}"
    return f"{estimate.value:+.4f} ({estimate.low:+.4f} to {estimate.high:+.4f})"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

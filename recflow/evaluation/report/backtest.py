"""The report of backtests: one HTML file, one JSON file, one table for the terminal, pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from typing import Any, TypeAlias, cast

from recflow.core.artifacts import JsonValue
from recflow.evaluation.backtest import METRICS, NEVER, NIGHTLY, Backtest, PolicyResult
from recflow.evaluation.evaluator import Estimate
from recflow.evaluation.metrics import METRICS as METRIC_INFOS
from recflow.evaluation.report import charts
from recflow.evaluation.report.page import environment

SCHEMA_VERSION = 1
"""Version of the JSON's layout; raised whenever a reader of the old one would fail or err."""

Json: TypeAlias = dict[str, JsonValue]

_DECIMALS = 6
_NONE = "–"


@dataclass(frozen=True, slots=True)
class BacktestContext:
    """What a report of backtests says beside the results.

    Attributes:
        title: Title of the report.
        command: The command that makes it.
        machine: Where it was made, and what an hour of that costs, in a sentence.
        protocol: How it was made, a sentence each.
        versions: Library versions.
    """

    title: str
    command: str
    machine: str
    protocol: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=lambda: {})


def backtest_document(results: Sequence[Backtest], context: BacktestContext) -> Json:
    """The report as JSON values, numbers rounded to six decimals."""
    return {
        "schema_version": SCHEMA_VERSION,
        "title": context.title,
        "command": context.command,
        "machine": context.machine,
        "protocol": list(context.protocol),
        "versions": dict(context.versions),
        "logs": [_log(result) for result in results],
    }


def backtest_json(results: Sequence[Backtest], context: BacktestContext) -> str:
    """The report as JSON, ending in a newline."""
    document = backtest_document(results, context)
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def backtest_html(results: Sequence[Backtest], context: BacktestContext) -> str:
    """The report as a self-contained HTML page: no script, no network, light and dark."""
    return (
        environment()
        .get_template("backtest.html.j2")
        .render(
            document=cast("Any", backtest_document(results, context)),
            charts={
                (result.name, metric): _chart(result, metric)
                for result in results
                for metric in METRICS
            },
            metrics={name: METRIC_INFOS[name] for name in METRICS},
            never=NEVER,
            nightly=NIGHTLY,
        )
    )


def backtest_table(result: Backtest) -> str:
    """One row a policy; no trailing newline."""
    rows = [["policy", "AUC", "nDCG@10", "AUC gained", "of nightly's", "runs", "rejected",
             "training s", "CPU s", "USD",
             "looking CPU s"]]  # fmt: skip
    for policy in result.policies:
        gain, kept = policy.gain.get("auc"), policy.kept.get("auc")
        rows.append(
            [
                policy.name,
                _interval(policy.metrics["auc"], ".4f"),
                _interval(policy.metrics["ndcg@10"], ".4f"),
                _NONE if gain is None else _interval(gain, "+.4f"),
                _NONE if kept is None else _interval(kept, ".0%"),
                str(policy.runs),
                str(policy.rejected),
                f"{policy.seconds:.0f}",
                f"{policy.cpu_seconds:.0f}",
                f"{policy.usd:.4f}",
                f"{policy.looking_cpu_seconds:.0f}",
            ]
        )
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    days = result.policies[0].days
    heading = (
        f"{result.name}: {len(days)} days, {days[0].day} to {days[-1].day}, "
        f"{sum(day.impressions for day in days):,} impressions; {result.confidence:.0%} intervals "
        f"from {result.bootstrap_samples:,} resamples of users"
    )
    return "\n".join([heading, *lines])


def backtest_picture(result: Backtest, metric: str) -> bytes:
    """A metric day by day as a PNG picture: aggregate numbers only."""
    dates, lines = _lines(result, metric)
    title = f"{result.name}: {METRIC_INFOS[metric].label} by day and policy"
    return charts.days_picture(title, METRIC_INFOS[metric].label, dates, lines, result.events)


def _chart(result: Backtest, metric: str) -> Any:
    dates, lines = _lines(result, metric)
    salt = f"backtest {result.name} {metric}"
    return charts.days(salt, METRIC_INFOS[metric].label, dates, lines, result.events)


def _lines(result: Backtest, metric: str) -> tuple[list[date], list[charts.DayLine]]:
    dates = [day.day for day in result.policies[0].days]

    def line(policy: PolicyResult) -> charts.DayLine:
        return charts.DayLine(
            name=policy.name,
            values=[day.metrics[metric].value for day in policy.days],
            retrained=[dates.index(t.day) for t in policy.trainings if t.admitted],
            rejected=[dates.index(t.day) for t in policy.trainings if not t.admitted],
        )

    return dates, [line(policy) for policy in result.policies[: charts.MAX_LINES]]


def _log(result: Backtest) -> Json:
    return {
        "name": result.name,
        "description": result.description,
        "first_snapshot": str(result.first_snapshot),
        "days": [str(day.day) for day in result.policies[0].days],
        "impressions": sum(day.impressions for day in result.policies[0].days),
        "events": {str(day): event for day, event in result.events.items()},
        "confidence": result.confidence,
        "bootstrap_samples": result.bootstrap_samples,
        "policies": [_policy(policy, result) for policy in result.policies],
    }


def _policy(policy: PolicyResult, result: Backtest) -> Json:
    nightly = result[NIGHTLY].runs
    return {
        "name": policy.name,
        "metrics": _estimates(policy.metrics),
        "gain_over_never": _estimates(policy.gain),
        "share_of_nightly_gain": _estimates(policy.kept),
        "less_nightly": _estimates(policy.behind),
        "runs": policy.runs,
        "share_of_nightly_runs": _rounded(policy.runs / nightly) if nightly else None,
        "rejected": policy.rejected,
        "training_seconds": _rounded(policy.seconds),
        "training_cpu_seconds": _rounded(policy.cpu_seconds),
        "training_usd": _rounded(policy.usd),
        "looking_seconds": _rounded(policy.looking_seconds),
        "looking_cpu_seconds": _rounded(policy.looking_cpu_seconds),
        "trainings": [
            {
                **asdict(training),
                "day": str(training.day),
                "seconds": _rounded(training.seconds),
                "cpu_seconds": _rounded(training.cpu_seconds),
            }
            for training in policy.trainings
        ],
        "days": [
            {
                "day": str(day.day),
                "snapshot": str(day.snapshot),
                "impressions": day.impressions,
                "metrics": _estimates(day.metrics),
            }
            for day in policy.days
        ],
    }


def _estimates(values: Mapping[str, Estimate]) -> Json:
    return {
        name: {key: _rounded(number) for key, number in asdict(value).items()}
        for name, value in values.items()
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, _DECIMALS)


def _interval(value: Estimate, shape: str) -> str:
    if value.low is None or value.high is None:
        return format(value.value, shape)
    return f"{value.value:{shape}} [{value.low:{shape}}, {value.high:{shape}}]"

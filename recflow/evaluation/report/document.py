"""The report as plain data: what the JSON file holds and the page is drawn from.

``schema.json`` beside this module documents it. Numbers are rounded to six decimals: enough for any
reader, and the same bytes whatever the order in which a machine adds up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from typing import TypeAlias, cast

from recflow.core.artifacts import JsonValue
from recflow.core.cost import CostSection, ModelCost, PlannedAndMeasured, cheapest
from recflow.core.errors import ConfigError
from recflow.core.measurement import Latency, Measurement
from recflow.evaluation.evaluator import (
    Comparison,
    Estimate,
    Evaluation,
    Paired,
    ScorerResult,
    SegmentResult,
)
from recflow.evaluation.label_efficiency import LabelShare
from recflow.evaluation.metrics import METRICS
from recflow.evaluation.report.context import ReportContext
from recflow.evaluation.report.family import Group, Relative, groups_of, paired, reason

SCHEMA_VERSION = 1
"""Version of the JSON's layout; raised whenever a reader of the old one would fail or err."""

Json: TypeAlias = dict[str, JsonValue]

_DECIMALS = 6
_FIGURES = 6  # significant: prices are far below a cent, energies far above a joule


def report_json(
    evaluation: Evaluation, measurements: Sequence[Measurement], context: ReportContext
) -> str:
    """The report as JSON of version :data:`SCHEMA_VERSION`, ending in a newline.

    Args:
        evaluation: The results.
        measurements: What the models cost, each named like its scorer.
        context: Data, training and provenance.

    Raises:
        ConfigError: A measurement belongs to no scorer, or two to one.
    """
    document = document_of(evaluation, measurements, context)
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def schema() -> Json:
    """The JSON schema (draft 2020-12) of the report."""
    text = (
        resources.files("recflow.evaluation.report")
        .joinpath("schema.json")
        .read_text(encoding="utf-8")
    )
    return cast("Json", json.loads(text))


def document_of(
    evaluation: Evaluation, measurements: Sequence[Measurement], context: ReportContext
) -> Json:
    """The report as JSON values; see :func:`report_json`."""
    costs = by_scorer(evaluation, measurements)
    config = evaluation.config
    used = {name for result in evaluation.scorers for name in result.metrics}
    return {
        "schema_version": SCHEMA_VERSION,
        "title": context.title,
        "data": {
            "name": context.data_name,
            "snapshot_date": context.snapshot_date,
            "days": list(context.days),
            "missing_days": list(context.missing_days),
            "rows": dict(context.row_counts),
            "quarantine": dict(context.quarantine),
        },
        "protocol": {
            "primary_metric": config.primary_metric,
            "bootstrap_samples": config.bootstrap_samples,
            "confidence": config.confidence,
            "cluster": config.cluster,
            "seed": config.seed,
            "counts": cast("Json", asdict(evaluation.counts)),
            "train_mean_rating_rmse": _number(evaluation.train_mean_rating_rmse),
        },
        "metrics": {
            name: cast("Json", asdict(metric)) for name, metric in METRICS.items() if name in used
        },
        "scorers": [_scorer(result, evaluation, costs) for result in evaluation.scorers],
        "training": {
            model: [{key: _number(value) for key, value in point.items()} for point in points]
            for model, points in context.training.items()
        },
        "label_efficiency": [_label_share(row) for row in context.label_efficiency],
        "compression": [
            {
                "board": group.board,
                "members": [_member(relative, group, evaluation) for relative in group.relatives],
            }
            for group in groups_of(evaluation, costs, context.family)
        ],
        "item_vectors": [
            {
                key: _number(value) if isinstance(value, int | float) else value
                for key, value in asdict(codec).items()
            }
            for codec in context.item_vectors
        ],
        "costs": _costs(context.costs, [result.name for result in evaluation.scorers]),
        "provenance": {
            "command": context.command,
            "links": dict(context.links),
            "versions": dict(context.versions),
            "parents": dict(context.parents),
        },
    }


def by_scorer(
    evaluation: Evaluation, measurements: Sequence[Measurement]
) -> dict[str, Measurement]:
    """The measurements by the scorer that they belong to; see :func:`report_json`."""
    names = [result.name for result in evaluation.scorers]
    costs = {measurement.name: measurement for measurement in measurements}
    if len(costs) != len(measurements):
        raise ConfigError("two measurements have the same name; measure each variant once")
    for name in costs:
        if name not in names:
            raise ConfigError.of("measurement of", name, f"one of the scorers {', '.join(names)}")
    return costs


def _scorer(
    result: ScorerResult, evaluation: Evaluation, costs: Mapping[str, Measurement]
) -> JsonValue:
    parent = result.parent.other if result.parent else None
    calibration = result.calibration
    return {
        "name": result.name,
        "board": result.board,
        "metrics": _estimates(result.metrics),
        "reference": _comparison(result.reference),
        "parent": _comparison(result.parent),
        "relative_to_parent": _relative(result.name, parent, evaluation, costs),
        "oracle_share": _estimate(result.oracle_share) if result.oracle_share else None,
        "calibration": {
            "slope": _number(calibration.slope),
            "intercept": _number(calibration.intercept),
            "curve": [
                {
                    "count": b.count,
                    "predicted": _number(b.predicted),
                    "observed": _number(b.observed),
                }
                for b in result.reliability
            ],
        }
        if calibration
        else None,
        "segments": [_segment(segment) for segment in result.segments],
        "cost": _cost(costs[result.name]) if result.name in costs else None,
    }


def _label_share(row: LabelShare) -> JsonValue:
    return {
        "share": _number(row.share),
        "impressions": row.impressions,
        "pretrained": _estimates(row.pretrained),
        "adapted": _estimates(row.adapted),
        "difference": _estimates(row.difference),
    }


def _estimates(estimates: Mapping[str, Estimate]) -> Json:
    return {name: _estimate(estimate) for name, estimate in estimates.items()}


def _estimate(estimate: Estimate) -> Json:
    return {
        "value": _number(estimate.value),
        "low": _number(estimate.low),
        "high": _number(estimate.high),
    }


def _comparison(comparison: Comparison | None) -> JsonValue:
    if comparison is None:
        return None
    return {"name": comparison.other, "differences": _estimates(comparison.differences)}


def _segment(segment: SegmentResult) -> Json:
    return {
        "name": segment.name,
        "label": segment.label,
        "impressions": segment.impressions,
        "primary": _estimate(segment.primary),
    }


def _member(relative: Relative, group: Group, evaluation: Evaluation) -> JsonValue:
    member, frontier = relative.member, group.frontier
    name, primary = member.name, evaluation.config.primary_metric
    replaced_by = frontier.dominated.get(name, ())
    return {
        "name": name,
        "parent": member.parent,
        "step": member.step,
        "description": member.description,
        "depth": relative.depth,
        "root": relative.root,
        "against_parent": None
        if member.parent is None
        else _paired(paired(evaluation, name, member.parent)),
        "against_root": None
        if name == relative.root
        else _paired(paired(evaluation, name, relative.root)),
        "verdict": "dominated"
        if replaced_by
        else "unjudged"
        if name in frontier.unjudged
        else "frontier",
        "replaced_by": [
            {
                "name": found.by,
                **_paired(found.gain),
                "more_accurate": found.more_accurate,
                "cost_ratios": {cost: _number(ratio) for cost, ratio in found.ratios.items()},
                "cheaper": list(found.cheaper),
                "reason": reason(found, primary),
            }
            for found in replaced_by
        ],
    }


def _paired(comparison: Paired) -> Json:
    return {
        "difference": _estimate(comparison.difference),
        "relative": _estimate(comparison.relative),
    }


def _relative(
    name: str, parent: str | None, evaluation: Evaluation, costs: Mapping[str, Measurement]
) -> JsonValue:
    """What a variant loses and saves: the primary metric's relative change, and cost ratios."""
    if parent is None:
        return None
    primary = evaluation.config.primary_metric
    before = evaluation[parent].metrics[primary].value
    change = (evaluation[name].metrics[primary].value - before) / before if before else None
    relative: Json = {"primary_change": _number(change)}
    if name in costs and parent in costs:
        own, other = costs[name], costs[parent]
        relative |= {
            "size_ratio": _ratio(own.size_bytes, other.size_bytes),
            "throughput_ratio": _ratio(own.texts_per_second, other.texts_per_second),
            "peak_rss_ratio": _ratio(own.peak_rss_bytes, other.peak_rss_bytes),
        }
    return relative


def _cost(measurement: Measurement) -> Json:
    return {
        "runtime": measurement.runtime,
        "threads": measurement.threads,
        "size_bytes": measurement.size_bytes,
        "serving_bytes": measurement.serving_bytes,
        "parameters": measurement.parameters,
        "load_seconds": _number(measurement.load_seconds),
        "texts_per_second": _number(measurement.texts_per_second),
        "throughput_spread": _number(measurement.throughput_spread),
        "peak_rss_bytes": measurement.peak_rss_bytes,
        "energy": {
            "joules_per_1000_texts": _number(measurement.energy.joules_per_1000_texts),
            "source": measurement.energy.source,
        },
        "latencies": [
            _latency(latency)
            for latency in sorted(measurement.latencies, key=lambda latency: latency.batch_size)
        ],
    }


def _latency(latency: Latency) -> Json:
    return {
        "batch_size": latency.batch_size,
        "p50_ms": _number(latency.p50),
        "p95_ms": _number(latency.p95),
        "p99_ms": _number(latency.p99),
        "samples": latency.samples,
        "drift": _number(latency.drift),
    }


def _costs(section: CostSection | None, scorers: Sequence[str]) -> JsonValue:
    """The section on costs; each model must be a scorer, and each device be described."""
    if section is None:
        return None
    devices = [device.name for device in section.devices]
    named = [model.name for model in section.models]
    for name in [*named, *(row.model for row in section.compared)]:
        if name not in scorers:
            raise ConfigError.of("costs of", name, f"one of the scorers {', '.join(scorers)}")
    if len(set(named)) < len(named):
        raise ConfigError("two costs have the same name; plan each model once")
    for model in section.models:
        for cost in (*model.serving, *model.training):
            if cost.device not in devices:
                raise ConfigError.of(
                    f"device of {model.name}", cost.device, f"one of {', '.join(devices)}"
                )
    return {
        "recommendation": section.recommendation,
        "training_run": section.training_run,
        "machine": section.machine,
        "notes": list(section.notes),
        "devices": [_figures(asdict(device)) for device in section.devices],
        "models": [_model_cost(model) for model in section.models],
        "compared": [_compared(row) for row in section.compared],
    }


def _model_cost(model: ModelCost) -> Json:
    serving, training = cheapest(model.serving), cheapest(model.training)
    return {
        "name": model.name,
        "note": model.note,
        "measured_training_seconds": _figure(model.measured_seconds),
        "measured_watt_hours_per_million": _figure(model.measured_watt_hours),
        "energy_source": model.energy_source,
        "cheapest_serving": serving.device if serving else None,
        "cheapest_training": training.device if training else None,
        "serving": [_figures(asdict(cost)) for cost in model.serving],
        "training": [_figures(asdict(cost)) for cost in model.training],
    }


def _compared(row: PlannedAndMeasured) -> Json:
    return _figures({**asdict(row), "error": row.error})


def _figures(values: Mapping[str, object]) -> Json:
    """The values with every number rounded to the same significant figures."""
    return {
        key: _figure(value) if isinstance(value, float) else cast("JsonValue", value)
        for key, value in values.items()
    }


def _figure(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{_FIGURES}g}") + 0.0


def _ratio(value: float, base: float) -> float | None:
    return _number(value / base) if base else None


def _number(value: float | None) -> float | None:
    """Rounded; ``None`` for what is not a finite number, as JSON has no NaN."""
    if value is None or not math.isfinite(value):
        return None
    return round(value, _DECIMALS) + 0.0  # -0.0 becomes 0.0

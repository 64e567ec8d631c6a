"""The result as plain text, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from recflow.core.cost import CostSection, cheapest
from recflow.core.measurement import Measurement
from recflow.evaluation.evaluator import BOARDS, Board, Estimate, Evaluation, ScorerResult
from recflow.evaluation.label_efficiency import METRICS as LABEL_METRICS
from recflow.evaluation.label_efficiency import LabelShare
from recflow.evaluation.metrics import METRICS
from recflow.evaluation.report.context import ReportContext
from recflow.evaluation.report.document import by_scorer
from recflow.evaluation.report.family import groups_of

_NONE = "–"


def result_table(
    evaluation: Evaluation, measurements: Sequence[Measurement], context: ReportContext
) -> str:
    """One table a board, one row a scorer, best first; no trailing newline.

    Args:
        evaluation: The results.
        measurements: What the models cost, each named like its scorer.
        context: Names the report and the data.

    Raises:
        ConfigError: A measurement or a member of the family belongs to no scorer, or two to one.
    """
    costs = by_scorer(evaluation, measurements)
    counts, config = evaluation.counts, evaluation.config
    heading = (
        f"{context.title} – {context.data_name}\n"
        f"{counts.evaluated:,} test impressions of {counts.users:,} users; "
        f"{config.confidence:.0%} intervals from {config.bootstrap_samples:,} resamples of "
        f"{config.cluster}s"
    )
    verdicts = _verdicts(evaluation, costs, context)
    tables = [
        _board_table(evaluation, board, costs, verdicts)
        for board in BOARDS
        if evaluation.board(board)
    ]
    if context.label_efficiency:
        tables.append(_label_efficiency_table(context.label_efficiency))
    if context.costs is not None and context.costs.models:
        tables.append(_money_table(context.costs))
    return "\n\n".join([heading, *tables])


def _verdicts(
    evaluation: Evaluation, costs: dict[str, Measurement], context: ReportContext
) -> dict[str, str]:
    """By model that was compared with another one: whether it is dominated, and by whom."""
    verdicts: dict[str, str] = {}
    for group in groups_of(evaluation, costs, context.family):
        judged = dict.fromkeys(group.frontier.kept, "on the frontier")
        for name, replaced_by in group.frontier.dominated.items():
            judged[name] = f"dominated by {replaced_by[0].by}"
        if len(judged) > 1:
            verdicts |= judged
    return verdicts


def _board_table(
    evaluation: Evaluation,
    board: Board,
    costs: dict[str, Measurement],
    verdicts: dict[str, str],
) -> str:
    primary = evaluation.config.primary_metric
    reference = evaluation.config.references.get(board)
    others = [name for name in ("auc", "mrr", "ndcg@10") if name != primary]
    header = [board, METRICS[primary].label, *(METRICS[name].label for name in others)]
    header += [f"vs {reference}" if reference else "", "size on disk", "p50 batch 1"]
    compared = any(result.name in verdicts for result in evaluation.board(board))
    header += ["cost and accuracy"] * compared
    lines = [header]
    for result in evaluation.board(board):
        lines.append(
            [
                result.name,
                _with_interval(result.metrics[primary], ".4f"),
                *(f"{result.metrics[name].value:.4f}" for name in others),
                _difference(result, primary),
                *_cost(costs.get(result.name)),
                *[verdicts.get(result.name, _NONE)] * compared,
            ]
        )
    return _aligned(lines)


def _label_efficiency_table(rows: Sequence[LabelShare]) -> str:
    lines = [["labels", "impressions"]]
    for name in LABEL_METRICS:
        label = METRICS[name].label
        lines[0] += [f"{label} pretrained", f"{label} adapted", "difference"]
    for row in rows:
        line = [f"{row.share * 100:g} %", f"{row.impressions:,}"]
        for name in LABEL_METRICS:
            line += [
                _with_interval(row.pretrained[name], ".4f"),
                _with_interval(row.adapted[name], ".4f"),
                _with_interval(row.difference[name], "+.4f"),
            ]
        lines.append(line)
    return _aligned(lines)


def _money_table(section: CostSection) -> str:
    """A row a model: where it is served cheapest, what making it costs, and its memory."""
    header = ["planned", "cheapest serving", "USD/M recs", "Wh/M recs, at most"]
    header += ["USD training", "memory predicted", "measured"]
    lines = [header]
    for model in section.models:
        serving, training = cheapest(model.serving), cheapest(model.training)
        memory = next(
            (
                row
                for row in section.compared
                if (row.model, row.run, row.unit) == (model.name, "inference", "bytes")
            ),
            None,
        )
        line = [model.name]
        line += (
            [serving.device, f"{serving.usd:.3g}", f"{serving.watt_hours:.3g}"]
            if serving
            else [_NONE] * 3
        )
        line.append(f"{training.usd:.3g}" if training else _NONE)
        predicted = memory.predicted if memory else None
        line.append(_NONE if predicted is None else f"{predicted / 1e6:,.0f} MB")
        line.append(_NONE if memory is None else f"{memory.measured / 1e6:,.0f} MB")
        lines.append(line)
    return _aligned(lines)


def _difference(result: ScorerResult, metric: str) -> str:
    if result.reference is None or metric not in result.reference.differences:
        return _NONE
    return _with_interval(result.reference.differences[metric], "+.4f")


def _with_interval(estimate: Estimate, spec: str) -> str:
    if estimate.low is None or estimate.high is None:
        return format(estimate.value, spec)
    return f"{estimate.value:{spec}} [{estimate.low:{spec}}, {estimate.high:{spec}}]"


def _cost(measurement: Measurement | None) -> list[str]:
    if measurement is None:
        return [_NONE, _NONE]
    single = [latency.p50 for latency in measurement.latencies if latency.batch_size == 1]
    return [
        f"{measurement.serving_bytes / 1e6:.1f} MB",
        f"{single[0]:.2f} ms" if single else _NONE,
    ]


def _aligned(lines: list[list[str]]) -> str:
    """Pad the cells: names to the left, everything else to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rows.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(rows)

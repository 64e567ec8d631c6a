"""The report as one HTML file: no script, no network, light and dark, readable on a phone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from recflow.core.measurement import Measurement
from recflow.evaluation.baselines import OracleScorer
from recflow.evaluation.evaluator import BOARDS, Board, Evaluation
from recflow.evaluation.label_efficiency import METRICS as LABEL_METRICS
from recflow.evaluation.metrics import METRICS, RANKING_METRICS, RETRIEVAL_CUTOFFS, TOP_K
from recflow.evaluation.report import charts
from recflow.evaluation.report.context import ReportContext
from recflow.evaluation.report.document import document_of

_BOARD_NOTES: dict[Board, str] = {
    "content-only": "Scorers that know texts, categories and the user's history, but no click "
    "counts. They can rank an item nobody has seen yet.",
    "counter-aware": "Scorers that may also use click counters, with the delay stated in their "
    "name. They are not comparable with the other board: fresh counters beat any text.",
}
_PROBABILITY_METRICS = ("log_loss", "brier", "click_rmse", "calibration_error", "rating_rmse")
_RETRIEVAL_METRICS = (
    *(f"recall@{k}" for k in RETRIEVAL_CUTOFFS),
    *(f"hit_rate@{k}" for k in RETRIEVAL_CUTOFFS),
    f"coverage@{TOP_K}",
    f"novelty@{TOP_K}",
    f"popularity_bias@{TOP_K}",
)


def report_html(
    evaluation: Evaluation, measurements: Sequence[Measurement], context: ReportContext
) -> str:
    """The report as a self-contained HTML page.

    Args:
        evaluation: The results.
        measurements: What the models cost, each named like its scorer.
        context: Data, training and provenance.

    Raises:
        ConfigError: A measurement belongs to no scorer, or two to one.
    """
    document = cast("dict[str, Any]", document_of(evaluation, measurements, context))
    boards = [_BoardView(document, board) for board in BOARDS if evaluation.board(board)]
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            document=document,
            boards=boards,
            headlines=[line for view in boards for line in _headlines(view)],
            training=_training_charts(document["training"]),
            metric_infos=document["metrics"],
            ranking_metrics=RANKING_METRICS,
            probability_metrics=_PROBABILITY_METRICS,
            retrieval_metrics=_RETRIEVAL_METRICS,
            label_metrics=LABEL_METRICS,
            label_infos=METRICS,
        )
    )


@dataclass(frozen=True, slots=True)
class _Headline:
    """One of the large numbers at the top."""

    label: str
    value: str
    note: str


class _BoardView:
    """What the template needs of one board."""

    def __init__(self, document: Mapping[str, Any], board: Board) -> None:
        protocol = document["protocol"]
        self.name = board
        self.note = _BOARD_NOTES[board]
        self.primary: str = protocol["primary_metric"]
        self.label = METRICS[self.primary].label
        self.scorers: list[dict[str, Any]] = [s for s in document["scorers"] if s["board"] == board]
        self.measured = [s for s in self.scorers if s["cost"]]
        self.has_variants = any(s["relative_to_parent"] for s in self.measured)
        self.reference = next(
            (s["reference"]["name"] for s in self.scorers if s["reference"]), None
        )
        self.segments: list[dict[str, Any]] = self.scorers[0]["segments"]
        self.has_oracle = any(s["oracle_share"] for s in self.scorers)
        self.forest = self._forest()
        self.cost = self._cost()
        self.reliability = self._reliability()

    def metrics(self, wanted: Sequence[str]) -> list[str]:
        """Those of the wanted metrics that a scorer of this board has."""
        return [name for name in wanted if any(name in s["metrics"] for s in self.scorers)]

    def _point(self, scorer: Mapping[str, Any]) -> charts.Point:
        estimate = scorer["metrics"][self.primary]
        value = estimate["value"]
        low, high = (value if estimate[end] is None else estimate[end] for end in ("low", "high"))
        return charts.Point(scorer["name"], value, low, high, strong=bool(scorer["cost"]))

    def _forest(self) -> Markup:
        values = {s["name"]: s["metrics"][self.primary]["value"] for s in self.scorers}
        reference = None if self.reference is None else values[self.reference]
        points = [self._point(scorer) for scorer in self.scorers]
        return charts.forest(f"forest {self.name}", self.label, points, reference)

    def _cost(self) -> Markup | None:
        points = [
            charts.CostPoint(
                self._point(scorer),
                scorer["cost"]["latencies"][0]["p50_ms"],
                scorer["cost"]["size_bytes"] / 1e6,
            )
            for scorer in self.measured
            if scorer["cost"]["latencies"]
        ]
        return charts.cost(f"cost {self.name}", self.label, points) if points else None

    def _reliability(self) -> Markup | None:
        """Curves of the models and the reference, or of the best where no model was measured."""
        shown = [s for s in self.scorers if s["cost"] or s["name"] == self.reference]
        curves = {
            scorer["name"]: [
                (b["predicted"], b["observed"]) for b in scorer["calibration"]["curve"]
            ]
            for scorer in (shown if self.measured else self.scorers)[: charts.MAX_LINES]
            if scorer["calibration"]
        }
        return charts.reliability(f"reliability {self.name}", curves) if curves else None


def _headlines(view: _BoardView) -> list[_Headline]:
    """The best scorer of the board, and the smallest of its compressed variants."""
    best = next(s for s in view.scorers if s["name"] != OracleScorer.name)
    note = best["name"]
    if best["reference"]:
        gain = best["reference"]["differences"][view.primary]
        note += f", {_signed(gain['value'])} over {best['reference']['name']}"
    value = best["metrics"][view.primary]
    lines = [
        _Headline(f"best {view.label}, {view.name}", _plain(value["value"]), note),
    ]
    variants = [s for s in view.measured if "size_ratio" in (s["relative_to_parent"] or ())]
    if variants:
        small = min(variants, key=lambda s: s["cost"]["size_bytes"])
        relative = small["relative_to_parent"]
        lines.append(
            _Headline(
                f"size of {small['name']}",
                f"{relative['size_ratio']:.0%}",
                f"of {small['parent']['name']}, at {relative['throughput_ratio']:.1f}× its speed "
                f"and {_percent(relative['primary_change'])} {view.label}",
            )
        )
    return lines


def _training_charts(training: Mapping[str, Sequence[Mapping[str, float | None]]]) -> list[Any]:
    """For each model its name and a chart a series, in the order the series appear."""
    views: list[Any] = []
    for model, points in training.items():
        names = list(dict.fromkeys(key for point in points for key in point if key != "epoch"))
        drawn: list[Markup] = []
        for name in names:
            values = [
                (epoch, value)
                for position, point in enumerate(points)
                if (value := point.get(name)) is not None
                and (epoch := point.get("epoch", position)) is not None
            ]
            if values:
                drawn.append(charts.training(f"training {model} {name}", name, values))
        views.append({"model": model, "charts": drawn})
    return views


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("recflow.evaluation.report", "templates"),
        autoescape=True,  # names, titles and reasons come from data
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: dict[str, Callable[..., str | bool]] = {
        "plain": _plain,
        "short": _short,
        "breakable": _breakable,
        "signed": _signed,
        "megabytes": _megabytes,
        "milliseconds": _milliseconds,
        "millions": _millions,
        "thousands": _thousands,
        "percent": _percent,
        "verdict": _verdict,
        "is_web_link": _is_web_link,
    }
    cast("dict[str, Callable[..., str | bool]]", environment.filters).update(filters)  # pyright: ignore[reportUnknownMemberType]
    return environment


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}".replace("-", "−")


def _short(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.4f}".replace("-", "−")


def _breakable(name: str) -> Markup:
    """The escaped name with places where a narrow column may break it."""
    return Markup("_<wbr>").join(name.split("_"))


def _verdict(estimate: Mapping[str, float | None], greater_is_better: bool | None) -> str:
    """``better`` or ``worse`` where the interval excludes 0 and the metric has a direction."""
    low, high = estimate["low"], estimate["high"]
    if low is None or high is None or low <= 0 <= high or greater_is_better is None:
        return "unclear"
    return "better" if (low > 0) == greater_is_better else "worse"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def _milliseconds(value: float | None) -> str:
    """Three digits or so: more would be noise."""
    if value is None:
        return "–"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def _thousands(count: int) -> str:
    return f"{count:,}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:+.1%}".replace("-", "−")


def _is_web_link(url: str) -> bool:
    return url.startswith(("https://", "http://"))

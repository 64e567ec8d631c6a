"""The report as one HTML file: no script, no network, light and dark, readable on a phone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from recflow.core.measurement import Measurement
from recflow.evaluation.baselines import OracleScorer
from recflow.evaluation.evaluator import BOARDS, Board, Evaluation
from recflow.evaluation.frontier import LARGEST_LOSS, TOLERANCE
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

_DEVICE_COLUMNS = 4  # more would not be read on a phone; the rest is one click away
_DURATIONS = {3_600.0: "h", 60.0: "min", 1.0: "s", 1e-3: "ms"}


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
    groups = [_GroupView(document, group) for group in document["compression"]]
    money = _MoneyView(document) if document["costs"] else None
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            document=document,
            boards=boards,
            groups=groups,
            money=money,
            tolerance=TOLERANCE,
            largest_loss=LARGEST_LOSS,
            headlines=[
                *(_best(view) for view in boards),
                *(line for group in groups if (line := _smallest(group))),
                *([line] if money and (line := _cheapest(money)) else []),
            ],
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
        self.dominated = {
            member["name"]
            for group in document["compression"]
            for member in group["members"]
            if member["replaced_by"]
        }
        self.reference = next(
            (s["reference"]["name"] for s in self.scorers if s["reference"]), None
        )
        self.segments: list[dict[str, Any]] = self.scorers[0]["segments"]
        self.has_oracle = any(s["oracle_share"] for s in self.scorers)
        self.forest = self._forest()
        self.curves_left_out = 0
        self.reliability = self._reliability()

    def metrics(self, wanted: Sequence[str]) -> list[str]:
        """Those of the wanted metrics that a scorer of this board has."""
        return [name for name in wanted if any(name in s["metrics"] for s in self.scorers)]

    def _forest(self) -> Markup:
        values = {s["name"]: s["metrics"][self.primary]["value"] for s in self.scorers}
        reference = None if self.reference is None else values[self.reference]
        points = [
            _point(scorer, self.primary, strong=bool(scorer["cost"])) for scorer in self.scorers
        ]
        return charts.forest(f"forest {self.name}", self.label, points, reference)

    def _reliability(self) -> Markup | None:
        """Curves of the reference and the models, or of the best where no model was measured.

        A chart has fewer lines than a family has members: the dominated ones are left out first.
        """
        shown = [s for s in self.scorers if s["cost"] or s["name"] == self.reference]
        ranked = sorted(
            (s for s in (shown if self.measured else self.scorers) if s["calibration"]),
            key=lambda s: (s["name"] != self.reference, s["name"] in self.dominated),
        )
        self.curves_left_out = max(0, len(ranked) - charts.MAX_LINES) if self.measured else 0
        curves = {
            scorer["name"]: [
                (b["predicted"], b["observed"]) for b in scorer["calibration"]["curve"]
            ]
            for scorer in ranked[: charts.MAX_LINES]
        }
        return charts.reliability(f"reliability {self.name}", curves) if curves else None


@dataclass(frozen=True, slots=True)
class _Row:
    """A model of a group: its number in charts and table, its place in the family, its results."""

    number: int
    member: Mapping[str, Any]
    scorer: Mapping[str, Any]
    root: Mapping[str, Any]

    @property
    def cost(self) -> Any:
        """What it costs, as in the JSON; ``None`` where it was not measured."""
        return self.scorer["cost"]

    def ratio(self, key: str) -> float | None:
        """A cost as a share of the root's."""
        own, root = self.scorer["cost"], self.root["cost"]
        if self.scorer is self.root or not own or not root or not root[key]:
            return None
        return own[key] / root[key]


class _GroupView:
    """What the template needs of the models compared in accuracy and cost."""

    def __init__(self, document: Mapping[str, Any], group: Mapping[str, Any]) -> None:
        scorers = {scorer["name"]: scorer for scorer in document["scorers"]}
        self.board: str = group["board"]
        self.primary: str = document["protocol"]["primary_metric"]
        self.label = METRICS[self.primary].label
        self.rows = [
            _Row(number, member, scorers[member["name"]], scorers[member["root"]])
            for number, member in enumerate(group["members"], start=1)
        ]
        self.measured = [row for row in self.rows if row.cost]
        self.is_family = any(row.member["parent"] is not None for row in self.rows)
        self.root = self.rows[0].member["name"]
        self.dominated = [row for row in self.rows if row.member["replaced_by"]]
        sources: set[str] = {row.cost["energy"]["source"] for row in self.measured}
        self.energy_sources = sorted(sources)
        latencies: list[dict[str, Any]] = [
            x for row in self.measured for x in row.cost["latencies"]
        ]
        self.samples: dict[int, int] = {x["batch_size"]: x["samples"] for x in latencies}
        self.drift = max((abs(x["drift"] or 0.0) for x in latencies), default=0.0)
        self.charts = self._charts()

    def _charts(self) -> list[Markup]:
        if not self.measured:
            return []
        name = f"{self.board} {self.label}"
        charts_: list[Markup] = []
        timed = [
            (row, median)
            for row in self.measured
            if (median := _median_of_one(row.cost)) is not None
        ]
        if timed:
            points = [
                self._point(row, median, row.cost["peak_rss_bytes"] / 1e6) for row, median in timed
            ]
            unit = "median latency of one text, ms"
            charts_.append(charts.cost(f"latency {name}", self.label, unit, points, "MB memory"))
        points = [self._point(row, row.cost["serving_bytes"] / 1e6) for row in self.measured]
        charts_.append(charts.cost(f"size {name}", self.label, "size on disk, MB", points))
        return charts_

    def _point(self, row: _Row, cost: float, area: float = 1.0) -> charts.CostPoint:
        kept = row.member["verdict"] == "frontier"
        return charts.CostPoint(
            row.number, _point(row.scorer, self.primary, strong=kept), cost, area
        )


@dataclass(frozen=True, slots=True)
class _Priced:
    """A model with its number and what it costs, device by device."""

    number: int
    scorer: Mapping[str, Any]
    model: Mapping[str, Any]

    def cost(self, run: str, device: str) -> Any:
        """The cost of a run on a device, as in the JSON; ``None`` where nobody planned it."""
        return next((cost for cost in self.model[run] if cost["device"] == device), None)

    def cheapest(self, run: str) -> Any:
        """The cost of a run on the cheapest device that can do it; ``None`` where none can."""
        device = self.model[f"cheapest_{run}"]
        return None if device is None else self.cost(run, device)


class _MoneyView:
    """What the template needs of money, energy and limits."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        section = document["costs"]
        self.section: Mapping[str, Any] = section
        self.primary: str = document["protocol"]["primary_metric"]
        self.label = METRICS[self.primary].label
        self.devices: dict[str, dict[str, Any]] = {d["name"]: d for d in section["devices"]}
        scorers = {scorer["name"]: scorer for scorer in document["scorers"]}
        models = {model["name"]: model for model in section["models"]}
        # The numbers that the models have in the tables of their families.
        members = [m["name"] for group in document["compression"] for m in group["members"]]
        ordered = [name for name in members if name in models]
        ordered += [name for name in models if name not in members]
        self.rows = [
            _Priced(number, scorers[name], models[name])
            for number, name in enumerate(ordered, start=1)
        ]
        self.shown = {run: self._shown(run) for run in ("serving", "training")}
        self.root = next((m["root"] for g in document["compression"] for m in g["members"]), None)
        self.unplanned = [row for row in self.rows if row.model["note"]]
        sources: set[str] = {row.model["energy_source"] for row in self.rows}
        self.energy_sources = sorted(sources - {""})
        self.is_metered = any(
            row.model["measured_watt_hours_per_million"] is not None for row in self.rows
        )
        self.assumed = [
            f"{run} on {devices}"
            for run in ("serving", "training")
            if (devices := self._assumed(run)) is not None
        ]
        self.chart = self._chart()

    def _assumed(self, run: str) -> str | None:
        """The devices on which no efficiency of a run was measured; ``None`` where all were."""
        planned = {
            name: [cost for row in self.rows if (cost := row.cost(run, name))]
            for name in self.devices
        }
        known = {
            name: any(cost["is_calibrated"] for cost in costs)
            for name, costs in planned.items()
            if costs
        }
        assumed = [name for name in known if not known[name]]
        if not assumed:
            return None
        if len(assumed) == len(known):
            return "every device"
        if assumed == [name for name in known if self.devices[name]["kind"] == "gpu"]:
            return "every GPU"
        return "; ".join(self.devices[name]["label"] for name in assumed)

    def _shown(self, run: str) -> list[str]:
        """The devices that get a column: the cheapest ones, and one of each kind at least.

        A device is as cheap as its median price over the models that fit.
        """
        wins = Counter(row.model[f"cheapest_{run}"] for row in self.rows)
        medians: dict[str, float] = {}
        for name in self.devices:
            prices = sorted(
                cost["usd"]
                for row in self.rows
                if (cost := row.cost(run, name)) and cost["fits"] and cost["usd"] is not None
            )
            if prices:
                medians[name] = prices[len(prices) // 2]
        ranked = sorted(medians, key=lambda name: (-wins[name], medians[name]))
        shown = ranked[:_DEVICE_COLUMNS]
        for kind in ("cpu", "gpu"):
            if not any(self.devices[name]["kind"] == kind for name in shown):
                shown += [n for n in ranked if self.devices[n]["kind"] == kind][:1]
        return shown

    def _chart(self) -> Markup | None:
        """Each model on the device that serves it cheapest."""
        series: dict[str, list[charts.CostPoint]] = {}
        for row in self.rows:
            cost = row.cheapest("serving")
            if cost and cost["usd"]:  # a price of nothing has no place on a log scale
                point = _point(row.scorer, self.primary, strong=True)
                label = self.devices[cost["device"]]["label"]
                series.setdefault(label, []).append(
                    charts.CostPoint(row.number, point, cost["usd"])
                )
        if not series:
            return None
        unit = "USD per million recommendations"
        return charts.prices(f"money {self.label}", self.label, unit, series)


def _median_of_one(cost: Mapping[str, Any]) -> float | None:
    return next((x["p50_ms"] for x in cost["latencies"] if x["batch_size"] == 1), None)


def _point(scorer: Mapping[str, Any], metric: str, *, strong: bool) -> charts.Point:
    estimate = scorer["metrics"][metric]
    value = estimate["value"]
    low, high = (value if estimate[end] is None else estimate[end] for end in ("low", "high"))
    return charts.Point(scorer["name"], value, low, high, strong=strong)


def _best(view: _BoardView) -> _Headline:
    """The best scorer of the board."""
    best = next(s for s in view.scorers if s["name"] != OracleScorer.name)
    note = best["name"]
    if best["reference"]:
        gain = best["reference"]["differences"][view.primary]
        note += f", {_signed(gain['value'])} over {best['reference']['name']}"
    value = best["metrics"][view.primary]
    return _Headline(f"best {view.label}, {view.name}", _plain(value["value"]), note)


def _smallest(group: _GroupView) -> _Headline | None:
    """The smallest compressed variant on the frontier."""
    variants = [
        row
        for row in group.measured
        if row.member["against_root"] and row.root["cost"] and not row.member["replaced_by"]
    ]
    if not variants:
        return None
    small = min(variants, key=lambda row: row.scorer["cost"]["serving_bytes"])
    change = small.member["against_root"]["relative"]["value"]
    return _Headline(
        f"size of {small.member['name']}",
        f"{small.ratio('serving_bytes'):.0%}",
        f"of {small.member['root']}, at {small.ratio('texts_per_second'):.1f}× its speed "
        f"and {_change(change)} {group.label}",
    )


def _cheapest(money: _MoneyView) -> _Headline | None:
    """What the root's recommendations cost where they are cheapest, and the least of all models."""
    priced = [(row, cost) for row in money.rows if (cost := row.cheapest("serving"))]
    if not priced:
        return None
    row, cost = next((p for p in priced if p[0].model["name"] == money.root), priced[0])
    least, least_cost = min(priced, key=lambda p: p[1]["usd"])
    note = f"{row.model['name']} on {money.devices[cost['device']]['label']}"
    if least is not row:
        note += f"; {_money(least_cost['usd'])} for {least.model['name']}"
    return _Headline("a million recommendations, planned", _money(cost["usd"]), note)


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


def environment() -> Environment:
    """The templates, with everything escaped and the filters that format numbers."""
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
        "change": _change,
        "verdict": _verdict,
        "money": _money,
        "watt_hours": _watt_hours,
        "duration": _duration,
        "size": _size,
        "rate": _rate,
        "quantity": _quantity,
        "percent": _percent,
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


def _change(share: float | None) -> str:
    return "–" if share is None else f"{share:+.2%}".replace("-", "−")


def _digits(value: float, digits: int = 3) -> str:
    """So many significant digits, without an exponent; none behind the point are lost before it."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 9)}f}"


def _money(usd: float | None) -> str:
    if usd is None:
        return "–"
    return f"${usd:,.2f}" if usd >= 1 else f"${_digits(usd)}"


def _watt_hours(energy: float | None) -> str:
    if energy is None:
        return "–"
    return f"{_digits(energy / 1e3)} kWh" if energy >= 1e3 else f"{_digits(energy)} Wh"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    for size, unit in ((7_200.0, 3_600.0), (180.0, 60.0), (1.0, 1.0), (1e-3, 1e-3)):
        if seconds >= size:
            return f"{_digits(seconds / unit)} {_DURATIONS[unit]}"
    return f"{_digits(seconds * 1e6)} µs"


def _size(count: float | None) -> str:
    if count is None:
        return "–"
    return f"{_digits(count / 1e9)} GB" if count >= 1e9 else f"{_digits(count / 1e6)} MB"


def _rate(per_second: float | None) -> str:
    return "–" if per_second is None else _digits(per_second)


def _quantity(value: float | None, unit: str) -> str:
    """A number with its unit as people write it."""
    if value is None:
        return "–"
    written = {"bytes": _size, "seconds": _duration}.get(unit)
    return written(value) if written else f"{_digits(value)} {unit}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:+.0%}".replace("-", "−")


def _is_web_link(url: str) -> bool:
    return url.startswith(("https://", "http://"))

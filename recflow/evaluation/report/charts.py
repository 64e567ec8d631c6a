"""The report's charts: SVG that takes its colours from the page, so that dark mode works.

Matplotlib writes fixed colours. The charts are drawn in marker colours nobody would choose, which
are replaced by the page's CSS variables; text stays text in the page's font. The same input gives
the same bytes: no date, and ids hashed with the chart's name as salt.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, cast

from markupsafe import Markup, escape

_INK, _MUTED, _RULE, _ACCENT = "#010203", "#010204", "#010205", "#010206"
_SERIES = ("#020201", "#020202", "#020203", "#020204", "#020205", "#020206")
_MARKERS = ("o", "s", "^", "D", "v", "P")  # for those who cannot tell the colours apart
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _RULE: "var(--rule)",
    _ACCENT: "var(--accent)",
    **{color: f"var(--series-{number})" for number, color in enumerate(_SERIES, start=1)},
}
_WIDTH = 4.8  # inches; scaled to a phone the 10-point text is still read without zooming
_LONG_NAME = 24  # letters


@dataclass(frozen=True, slots=True)
class _Palette:
    """Colours of a drawing."""

    ink: str
    muted: str
    rule: str
    series: tuple[str, ...]

    @property
    def style(self) -> dict[str, Any]:
        """Matplotlib's settings."""
        return {
            "axes.edgecolor": self.rule,
            "axes.grid": True,
            "axes.labelcolor": self.muted,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.axisbelow": True,
            "font.size": 10,
            "grid.color": self.rule,
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "legend.labelcolor": self.ink,
            "svg.fonttype": "none",
            "text.color": self.ink,
            "text.parse_math": False,  # a "$" in a name is a "$"
            "xtick.color": self.rule,
            "xtick.labelcolor": self.muted,
            "ytick.color": self.rule,
            "ytick.labelcolor": self.muted,
        }


_PAGE = _Palette(_INK, _MUTED, _RULE, _SERIES)
# The page's colours in light mode, for pictures that stand alone.
_PICTURE = _Palette(
    "#1d1c1a",
    "#66625c",
    "#e2ded7",
    ("#0a6c5d", "#c2571a", "#3f5fb5", "#9a3d86", "#8a6d00", "#5b6770"),
)

MAX_LINES = len(_SERIES)
"""How many lines one chart can tell apart."""


@dataclass(frozen=True, slots=True)
class Point:
    """A named number with its interval.

    Attributes:
        name: What is measured.
        value: The number.
        low: Lower end of the interval.
        high: Upper end.
        strong: Whether to draw it in the accent colour.
    """

    name: str
    value: float
    low: float
    high: float
    strong: bool = False


@dataclass(frozen=True, slots=True)
class CostPoint:
    """A model's accuracy and one of its costs.

    Attributes:
        number: What the dot is labelled with.
        point: Its accuracy; strong if the model is on the frontier.
        cost: The cost.
        area: What the area of the dot stands for.
    """

    number: int
    point: Point
    cost: float
    area: float = 1.0


@dataclass(frozen=True, slots=True)
class DayLine:
    """A policy over the days of a walk.

    Attributes:
        name: Its name.
        values: Its quality, day by day.
        retrained: Numbers of the days after which a new model was deployed, from 0.
        rejected: Numbers of the days after which one was trained and not deployed.
    """

    name: str
    values: Sequence[float]
    retrained: Sequence[int] = ()
    rejected: Sequence[int] = ()


def forest(salt: str, label: str, points: Sequence[Point], reference: float | None) -> Markup:
    """Intervals one above the other, best at the top, and a line at the reference's value."""

    def draw(axes: Any) -> None:
        rows = range(len(points) - 1, -1, -1)
        for row, point in zip(rows, points, strict=True):
            color = _ACCENT if point.strong else _MUTED
            axes.plot([point.low, point.high], [row, row], color=color, linewidth=2.2)
            axes.plot([point.value], [row], "o", color=color, markersize=6)
        if reference is not None:
            axes.axvline(reference, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_yticks(list(rows), [_in_two_lines(point.name) for point in points])
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
        axes.set_ylim(-0.6, len(points) - 0.4)
        axes.grid(visible=False, axis="y")
        axes.locator_params(axis="x", nbins=4)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(label)

    return _svg(salt, f"{label} of each scorer with its interval", 0.75 + 0.3 * len(points), draw)


def _in_two_lines(name: str) -> str:
    """Long names broken at the underscore next to their middle, so that the chart has room too."""
    breaks = [place for place, letter in enumerate(name) if letter == "_"]
    if len(name) <= _LONG_NAME or not breaks:
        return name
    place = min(breaks, key=lambda place: abs(place - len(name) / 2)) + 1
    return f"{name[:place]}\n{name[place:]}"


def cost(
    salt: str, label: str, unit: str, points: Sequence[CostPoint], area: str | None = None
) -> Markup:
    """Accuracy over a cost, which is drawn on a log scale.

    Filled dots are on the frontier; hollow ones are dominated. Where areas show a second cost, a
    line joins the frontier.

    Args:
        salt: Name of the chart.
        label: What is accuracy.
        unit: What the cost is and its unit.
        points: The models, with numbers instead of names: a dozen names would cover the dots.
        area: Unit of what the areas stand for, for the legend; ``None`` where all are the same.
    """
    from matplotlib import ticker

    largest = max(point.area for point in points)
    kept = sorted((p for p in points if p.point.strong), key=lambda p: p.cost)

    def size(value: float) -> float:
        return 30 + 330 * value / largest if area else 60

    def draw(axes: Any) -> None:
        if area:
            axes.plot(
                [p.cost for p in kept],
                [p.point.value for p in kept],
                color=_ACCENT,
                linewidth=1.2,
                linestyle=(0, (4, 3)),
            )
        for model in sorted(points, key=lambda p: -p.area):
            point, color = model.point, _ACCENT if model.point.strong else _MUTED
            spread = [[point.value - point.low], [point.high - point.value]]
            axes.errorbar(
                [model.cost], [point.value], yerr=spread, fmt="none", ecolor=color, alpha=0.35
            )
            axes.scatter(
                [model.cost],
                [point.value],
                s=size(model.area),
                facecolors=color if point.strong else "none",
                edgecolors=color,
                linewidths=1.4,
                alpha=0.75 if point.strong else 1,
            )
        # Dots of constant size, outside the drawing, explain the marks.
        axes.scatter([], [], s=50, color=_ACCENT, label="on the frontier")
        axes.scatter([], [], s=50, facecolors="none", edgecolors=_MUTED, label="dominated")
        if area:
            smallest = min(point.area for point in points)
            for value in dict.fromkeys((smallest, largest)):
                axes.scatter(
                    [], [], s=size(value), facecolors="none", edgecolors=_INK, linewidths=0.8,
                    label=f"{value:,.0f} {area}",
                )  # fmt: skip
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=9, borderpad=0.8,
            labelspacing=0.9,
        )  # fmt: skip
        axes.set_xlabel(f"{unit} (log scale)")
        axes.set_ylabel(label)
        _number(axes, points, [size(point.area) for point in points])

    return _svg(salt, f"{label} over {unit} of each model", 3.9, draw)


def prices(salt: str, label: str, unit: str, series: Mapping[str, Sequence[CostPoint]]) -> Markup:
    """Accuracy over a price, which is drawn on a log scale, with a colour and a mark a device.

    Args:
        salt: Name of the chart.
        label: What is accuracy.
        unit: What is paid, in what, for what.
        series: The models by the device they are priced on, all above 0. Of more devices than
            :data:`MAX_LINES` those after the first share the last colour.
    """
    from matplotlib import ticker

    looks = list(zip(_SERIES, _MARKERS, strict=True))
    marks = {name: looks[min(n, len(looks) - 1)] for n, name in enumerate(series)}
    points = [point for models in series.values() for point in models]

    def draw(axes: Any) -> None:
        for name, models in series.items():
            color, marker = marks[name]
            values = [model.point.value for model in models]
            spread = [
                [model.point.value - model.point.low for model in models],
                [model.point.high - model.point.value for model in models],
            ]
            costs = [model.cost for model in models]
            axes.errorbar(costs, values, yerr=spread, fmt="none", ecolor=color, alpha=0.35)
            axes.scatter(costs, values, s=60, marker=marker, color=color, alpha=0.8, label=name)
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=9)
        axes.set_xlabel(f"{unit} (log scale)")
        axes.set_ylabel(label)
        _number(axes, points, [60.0] * len(points))

    return _svg(salt, f"{label} over {unit} of each model", 3.9, draw)


def _number(axes: Any, points: Sequence[CostPoint], sizes: Sequence[float]) -> None:
    """Write each model's number beside its dot, where it covers the fewest other marks."""
    axes.figure.draw_without_rendering()  # only now is it known where a point will be
    scale = axes.figure.dpi / 72
    centres = [axes.transData.transform((p.cost, p.point.value)) / scale for p in points]
    taken = [(*centre, math.sqrt(size) / 2) for centre, size in zip(centres, sizes, strict=True)]
    for point, (x, y), area in zip(points, centres, sizes, strict=True):
        distance = math.sqrt(area) / 2 + 6.5

        def crowding(place: tuple[float, float]) -> float:
            gaps = (math.dist(place, mark[:2]) - mark[2] for mark in taken)
            return sum(max(0.0, 6.0 - gap) for gap in gaps)

        places = [
            (x + factor * distance * math.cos(angle), y + factor * distance * math.sin(angle))
            for factor in (1.0, 1.5, 2.0)
            for angle in (math.pi / 4 * eighth for eighth in (0, 1, 7, 3, 5, 4, 2, 6))
        ]
        place = min(places, key=crowding)
        taken.append((*place, 5.0))
        axes.annotate(
            str(point.number),
            (point.cost, point.point.value),
            xytext=(place[0] - x, place[1] - y),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
        )


def reliability(salt: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> Markup:
    """Seen over predicted click rate, and the diagonal of perfect calibration.

    Of more than :data:`MAX_LINES` curves the first are drawn.
    """
    top = max((max(point) for curve in curves.values() for point in curve), default=1.0) * 1.05

    def draw(axes: Any) -> None:
        axes.plot([0, top], [0, top], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for color, marker, (name, curve) in zip(_SERIES, _MARKERS, curves.items(), strict=False):
            axes.plot(
                [predicted for predicted, _ in curve],
                [observed for _, observed in curve],
                f"{marker}-",
                color=color,
                markersize=4,
                linewidth=1.5,
                label=name,
            )
        axes.set_xlim(0, top)
        axes.set_ylim(0, top)
        axes.set_xlabel("predicted click probability")
        axes.set_ylabel("share clicked")
        axes.legend(loc="upper left", fontsize=9)

    return _svg(salt, "Calibration: share clicked over predicted probability", 3.5, draw)


def training(salt: str, series: str, points: Sequence[tuple[float, float]]) -> Markup:
    """One series of a training run over its epochs."""

    def draw(axes: Any) -> None:
        axes.plot(
            [epoch for epoch, _ in points],
            [value for _, value in points],
            "o-",
            color=_ACCENT,
            markersize=4,
            linewidth=1.8,
        )
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("epoch")
        axes.set_ylabel(series)

    return _svg(salt, f"{series} over the epochs", 2.4, draw)


def days(
    salt: str,
    label: str,
    dates: Sequence[date],
    lines: Sequence[DayLine],
    events: Mapping[date, str],
) -> Markup:
    """Quality of policies day by day; below it, when each of them retrained.

    Args:
        salt: Name of the chart.
        label: What quality is.
        dates: The days.
        lines: At most :data:`MAX_LINES` policies.
        events: What happened on a day, written at a line across.
    """

    def draw(figure: Any) -> None:
        _draw_days(figure, _PAGE, label, dates, lines, events)

    description = f"{label} of each policy day by day, and the days after which it retrained"
    return _svg_of_figure(salt, description, 3.6 + 0.2 * len(lines), draw)


def days_picture(
    title: str,
    label: str,
    dates: Sequence[date],
    lines: Sequence[DayLine],
    events: Mapping[date, str],
) -> bytes:
    """The chart of :func:`days` as a PNG picture on white that stands alone."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    library, new_figure = cast("Any", mpl), cast("Any", Figure)
    with library.rc_context(_PICTURE.style):
        size = (1.6 * _WIDTH, 3.6 + 0.2 * len(lines))
        figure = new_figure(figsize=size, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        _draw_days(figure, _PICTURE, label, dates, lines, events)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": ""})
    return buffer.getvalue()


def _draw_days(
    figure: Any,
    palette: _Palette,
    label: str,
    dates: Sequence[date],
    lines: Sequence[DayLine],
    events: Mapping[date, str],
) -> None:
    above, below = figure.subplots(
        2, sharex=True, gridspec_kw={"height_ratios": [12, 0.4 + len(lines)]}
    )
    places = range(len(dates))
    for day, event in events.items():
        if day not in dates:
            continue
        for axes in (above, below):
            axes.axvline(
                dates.index(day) - 0.5, color=palette.muted, linewidth=1, linestyle=(0, (4, 3))
            )
        above.annotate(
            event,
            (dates.index(day) - 0.5, 1),
            xycoords=above.get_xaxis_transform(),
            xytext=(3, -2),
            textcoords="offset points",
            va="top",
            fontsize=8,
            color=palette.muted,
        )
    for number, line in enumerate(lines):
        color, marker, row = palette.series[number], _MARKERS[number], len(lines) - 1 - number
        above.plot(
            places, line.values, f"{marker}-", color=color, markersize=3.5, label=line.name,
            # Policies that serve the same model coincide: the ones below stay visible.
            linewidth=1.4 + 1.1 * (len(lines) - 1 - number),
        )  # fmt: skip
        below.plot(line.retrained, [row] * len(line.retrained), marker, color=color, markersize=5)
        below.plot(
            line.rejected, [row] * len(line.rejected), marker, color=color, markersize=5,
            markerfacecolor="none",
        )  # fmt: skip
    above.set_ylabel(label)
    above.margins(y=0.12)
    above.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=min(len(lines), 4), fontsize=9)
    below.set_yticks(range(len(lines)), [line.name for line in reversed(lines)], fontsize=8)
    below.set_ylim(-0.7, len(lines) - 0.3)
    below.tick_params(axis="y", length=0, labelcolor=palette.ink)
    below.grid(visible=False, axis="y")
    step = max(1, math.ceil(len(dates) / 7))
    shown = [place for place in places if place % step == 0]
    below.set_xticks(shown, [f"{dates[place]:%m-%d}" for place in shown])
    below.set_xlabel("day; below: trained after it (hollow: rejected by the gate)")


def _svg(salt: str, description: str, height: float, draw: Any) -> Markup:
    """Draw on fresh axes and return an ``<svg>`` element for the page."""

    def on_axes(figure: Any) -> None:
        draw(figure.subplots())

    return _svg_of_figure(salt, description, height, on_axes)


def _svg_of_figure(salt: str, description: str, height: float, draw: Any) -> Markup:
    """Draw on a fresh figure and return an ``<svg>`` element for the page."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    library, new_figure = cast("Any", mpl), cast("Any", Figure)  # partly unknown types
    with library.rc_context(_PAGE.style | {"svg.hashsalt": salt}), warnings.catch_warnings():
        # The browser's fonts draw the text; that Matplotlib's lack a glyph changes nothing.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = new_figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # repeated in every chart, used by none
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    opening = f'<svg class="chart" role="img" aria-label="{escape(description)}"'
    return Markup(opening + text.removeprefix("<svg"))  # noqa: S704 - Matplotlib escapes all text

"""The report's charts: SVG that takes its colours from the page, so that dark mode works.

Matplotlib writes fixed colours. The charts are drawn in marker colours nobody would choose, which
are replaced by the page's CSS variables; text stays text in the page's font. The same input gives
the same bytes: no date, and ids hashed with the chart's name as salt.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from markupsafe import Markup, escape

_INK, _MUTED, _RULE, _ACCENT = "#010203", "#010204", "#010205", "#010206"
_SERIES = ("#020201", "#020202", "#020203", "#020204", "#020205", "#020206")
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _RULE: "var(--rule)",
    _ACCENT: "var(--accent)",
    **{color: f"var(--series-{number})" for number, color in enumerate(_SERIES, start=1)},
}
_WIDTH = 4.8  # inches; scaled to a phone the 10-point text is still read without zooming
_STYLE: dict[str, Any] = {
    "axes.edgecolor": _RULE,
    "axes.grid": True,
    "axes.labelcolor": _MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "font.size": 10,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "svg.fonttype": "none",
    "text.color": _INK,
    "text.parse_math": False,  # a "$" in a name is a "$"
    "xtick.color": _RULE,
    "xtick.labelcolor": _MUTED,
    "ytick.color": _RULE,
    "ytick.labelcolor": _MUTED,
}

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
    """A model's accuracy and cost.

    Attributes:
        point: Its accuracy.
        latency_ms: Median latency of one text, milliseconds.
        size_mb: Size of the weights, megabytes.
    """

    point: Point
    latency_ms: float
    size_mb: float


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
        axes.set_yticks(list(rows), [point.name for point in points])
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
        axes.set_ylim(-0.6, len(points) - 0.4)
        axes.grid(visible=False, axis="y")
        axes.locator_params(axis="x", nbins=4)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(label)

    return _svg(salt, f"{label} of each scorer with its interval", 0.75 + 0.3 * len(points), draw)


def cost(salt: str, label: str, points: Sequence[CostPoint]) -> Markup:
    """Accuracy over latency; the area of a dot is the size of the model."""
    from matplotlib import ticker

    largest = max(point.size_mb for point in points)

    def draw(axes: Any) -> None:
        for color, model in zip(_cycle(len(points)), points, strict=True):
            point = model.point
            spread = [[point.value - point.low], [point.high - point.value]]
            axes.errorbar(
                [model.latency_ms], [point.value], yerr=spread, fmt="none", ecolor=color, alpha=0.6
            )
            area = 40 + 360 * model.size_mb / largest
            axes.scatter([model.latency_ms], [point.value], s=area, color=color, alpha=0.75)
            # An empty dot of constant size for the legend; the real ones differ in area.
            name = f"{point.name}, {model.size_mb:.1f} MB"
            axes.plot([], [], "o", color=color, markersize=7, label=name)
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=9)
        axes.set_xlabel("median latency of one text, ms (log scale)")
        axes.set_ylabel(label)

    return _svg(salt, f"{label} over latency of each model", 3.6, draw)


def reliability(salt: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> Markup:
    """Seen over predicted click rate, and the diagonal of perfect calibration."""
    top = max((max(point) for curve in curves.values() for point in curve), default=1.0) * 1.05

    def draw(axes: Any) -> None:
        axes.plot([0, top], [0, top], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for color, (name, curve) in zip(_cycle(len(curves)), curves.items(), strict=True):
            axes.plot(
                [predicted for predicted, _ in curve],
                [observed for _, observed in curve],
                "o-",
                color=color,
                markersize=3.5,
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


def _cycle(count: int) -> list[str]:
    return [_SERIES[number % len(_SERIES)] for number in range(count)]


def _svg(salt: str, description: str, height: float, draw: Any) -> Markup:
    """Draw on fresh axes and return an ``<svg>`` element for the page."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    library, new_figure = cast("Any", mpl), cast("Any", Figure)  # partly unknown types
    with library.rc_context(_STYLE | {"svg.hashsalt": salt}), warnings.catch_warnings():
        # The browser's fonts draw the text; that Matplotlib's lack a glyph changes nothing.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = new_figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure.subplots())
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

"""The drift of a day as one HTML file: Evidently's report below a table of what was judged.

Evidently gets the columns as the labels that the distances were computed on, so the number it shows
is the number that was judged.
"""

from __future__ import annotations

import html
import os
import re
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import polars as pl

from recflow.quality.drift import Decay, DriftReport, Measure, at_most, code_column
from recflow.quality.drift_config import DISTRIBUTIONS, HELD_OUT_ONLY, DriftConfig
from recflow.quality.drift_rows import Rows

if TYPE_CHECKING:
    import pandas as pd
    from evidently.core.report import Snapshot

_IDENTIFIER: Final = re.compile(
    r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|(?<=metric_)[0-9a-f]{32}"
)
_HEADINGS: Final = (
    *("measure", "differs by", "limit", "by chance", "usual", "day", "reference", "verdict"),
)


def run_evidently(
    report: DriftReport, current: pl.DataFrame, reference: pl.DataFrame, config: DriftConfig
) -> Snapshot | None:
    """Run Evidently's drift metrics on the columns that were measured.

    Args:
        report: What was measured; its limits are Evidently's thresholds.
        current: Rows of the day, as they were measured.
        reference: Rows of the reference days.
        config: The configuration they were measured with.

    Returns:
        Evidently's snapshot; ``None`` where no column was measured.
    """
    # Read when the package is imported; a report must not report to anyone.
    os.environ["DO_NOT_TRACK"] = "1"
    from evidently import DataDefinition, Dataset, Report  # 8 s: not before it is needed
    from evidently.metrics import ValueDrift

    limits = {
        m.name: m.limit
        for m in report.measures
        if m.name in DISTRIBUTIONS and m.value is not None and m.limit is not None
    }
    if not limits:
        return None
    frames = _frames(list(limits), at_most(current, config), at_most(reference, config), config)
    definition = DataDefinition(categorical_columns=list(limits))
    sides = [Dataset.from_pandas(frame, data_definition=definition) for frame in frames]
    metrics: list[Any] = [
        ValueDrift(column=name, method="jensenshannon", threshold=limit)
        for name, limit in limits.items()
    ]
    return Report(metrics).run(sides[0], sides[1])


def drift_html(
    report: DriftReport, current: pl.DataFrame, reference: pl.DataFrame, config: DriftConfig
) -> str:
    """Render the drift of a day as one self-contained page.

    Args:
        report: What was measured.
        current: Rows of the day, as they were measured.
        reference: Rows of the reference days.
        config: The configuration they were measured with.

    Returns:
        An HTML page; the same arguments give the same page. Every text of the data is escaped.
    """
    snapshot = run_evidently(report, current, reference, config)
    if snapshot is None:
        return f'<!DOCTYPE html><html><head><meta charset="utf-8"></head>{_summary(report)}</html>'
    page = _with_fixed_identifiers(snapshot.get_html_str(as_iframe=False))
    head, body, tail = page.partition("<body>")
    return head + body + _summary(report) + tail


def _frames(
    names: list[str], current: pl.DataFrame, reference: pl.DataFrame, config: DriftConfig
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Labels of each column on both sides; rows without a value have none."""
    import pandas as pd

    held_out = reference[Rows.HELD_OUT].to_numpy()
    columns: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for name in names:
        base = reference.filter(Rows.HELD_OUT) if name in HELD_OUT_ONLY else reference
        coded = code_column(name, current[name], base[name], bins=config.bins)
        assert coded is not None
        # The last one is what code -1 finds.
        labels = np.array([*(_plain(label) for label in coded.labels), None], dtype=object)
        columns[0][name] = labels[coded.current]
        found = np.full(reference.height, -1, np.int64)
        found[held_out if name in HELD_OUT_ONLY else slice(None)] = coded.reference
        columns[1][name] = labels[found]
    return pd.DataFrame(columns[0]), pd.DataFrame(columns[1])


def _plain(label: str) -> str:
    """A label that is harmless wherever the page puts it."""
    return html.escape(label).replace("\\", "&#92;").replace("`", "&#96;") or "(none)"


def _with_fixed_identifiers(page: str) -> str:
    """Number the random identifiers in the order of their first use."""
    numbers: dict[str, str] = {}

    def number(match: re.Match[str]) -> str:
        return numbers.setdefault(match[0], f"recflow-{len(numbers):08d}")

    return _IDENTIFIER.sub(number, page)


def _summary(report: DriftReport) -> str:
    rows = [*map(_measure_cells, report.measures), *map(_decay_cells, report.decays)]
    heads = "".join(f"<th>{name}</th>" for name in _HEADINGS)
    lines = "".join(f"<tr>{''.join(f'<td>{_text(c)}</td>' for c in row)}</tr>" for row in rows)
    counts = (
        f"{report.impressions:,} impressions of {report.day} and "
        f"{report.reference_impressions:,} of {report.reference_days} reference days"
    )
    return (
        '<div style="font-family:sans-serif;max-width:70rem;margin:2rem auto">'
        f"<h1>Drift of {report.day}</h1><p>{html.escape(report.sentence())}</p>"
        f'<p>{counts}</p><table cellpadding="6" style="border-collapse:collapse" border="1">'
        f"<tr>{heads}</tr>{lines}</table></div>"
    )


def _measure_cells(m: Measure) -> list[str | float | None]:
    verdict = m.note or ("drifted" if m.drifted else "within the limit")
    return [m.name, m.value, m.limit, m.chance, m.usual, m.current, m.reference, verdict]


def _decay_cells(d: Decay) -> list[str | float | None]:
    verdict = (
        f"{'decayed' if d.decayed else 'not decayed'}; interval of the difference "
        f"{d.low:+.4f} to {d.high:+.4f}"
    )
    return [d.metric, d.difference, d.limit, None, d.usual, d.current, d.reference, verdict]


def _text(cell: str | float | None) -> str:
    if cell is None:
        return ""
    return f"{cell:.4f}" if isinstance(cell, float) else html.escape(str(cell))

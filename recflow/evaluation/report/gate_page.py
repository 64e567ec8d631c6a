"""The gate's decision as a page: every requirement, what was seen, and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from recflow.evaluation.gate import GateDecision, Outcome
from recflow.evaluation.metrics import METRICS
from recflow.evaluation.report.page import environment

_TITLES: Final[Mapping[Outcome, str]] = {
    "may_become_champion": "may become the champion",
    "already_champion": "is the champion already",
    "blocked": "is blocked",
}


@dataclass(frozen=True, slots=True)
class GatePage:
    """What the page says beside the decision.

    Attributes:
        snapshot: Partition of the snapshot.
        first_test_day: First day of its test split.
        impressions: Test impressions that count.
        users: Users of the test split.
        parents: Digest of what was judged, by key.
    """

    snapshot: str
    first_test_day: str
    impressions: int
    users: int
    parents: Mapping[str, str]


def gate_html(decision: GateDecision, page: GatePage) -> str:
    """The decision as a self-contained HTML page; every text is escaped."""
    return (
        environment()
        .get_template("gate.html.j2")
        .render(
            decision=decision,
            page=page,
            title=f"{decision.candidate} {_TITLES[decision.outcome]}",
            label=METRICS[decision.config.primary_metric].label,
            scores=sorted(decision.metrics.items(), key=lambda item: -item[1]),
        )
    )

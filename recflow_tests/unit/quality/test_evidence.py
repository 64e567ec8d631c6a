import json
from datetime import date
from typing import Any

import pytest

from recflow.core.errors import ArtifactError
from recflow.quality.evidence import DriftEvidence

DAY = date(2026, 1, 5)
FACTS: dict[str, Any] = {
    "champion": "7",
    "champion_snapshot": "2025-12-31",
    "drifted": ["click_rate", "hour"],
    "decayed": False,
}


def test_facts_hold_everything_but_day_and_digest() -> None:
    evidence = DriftEvidence(DAY, "abc", "7", "2025-12-31", ("click_rate", "hour"))
    assert evidence.to_facts() == FACTS
    stored = json.loads(json.dumps({**evidence.to_facts(), "rows": 12}))
    assert DriftEvidence.from_facts(DAY, "abc", stored) == evidence


def test_without_a_champion_the_names_are_empty() -> None:
    evidence = DriftEvidence(DAY, "abc")
    assert evidence.to_facts()["champion"] == ""
    assert DriftEvidence.from_facts(DAY, "abc", evidence.to_facts()) == evidence


@pytest.mark.parametrize(
    ("drifted", "decayed", "alarming"),
    [((), False, False), (("hour",), False, True), ((), True, True)],
)
def test_any_limit_passed_is_an_alarm(
    drifted: tuple[str, ...], decayed: bool, alarming: bool
) -> None:
    assert DriftEvidence(DAY, "abc", drifted=drifted, decayed=decayed).alarming == alarming


@pytest.mark.parametrize(
    ("name", "value"),
    [("drifted", "hour"), ("decayed", 1), ("champion", None), ("champion_snapshot", 20260105)],
)
def test_facts_of_anything_else_are_refused(name: str, value: Any) -> None:
    for facts in ({**FACTS, name: value}, {k: v for k, v in FACTS.items() if k != name}):
        with pytest.raises(ArtifactError, match=r"drift of 2026-01-05 .* materialise it again"):
            DriftEvidence.from_facts(DAY, "abc", facts)

"""A snapshot that a drift triggers holds hardly any day after it: others have to follow."""

from datetime import date, timedelta

import pytest

from recflow.core.errors import ConfigError
from recflow.quality.evidence import DriftEvidence
from recflow.quality.trigger import TriggerPolicy, decide

FIRST = date(2024, 1, 1)
POLICY = TriggerPolicy(days_needed=2, days_looked_at=3, cooldown_days=2, settle_days=7)


def day(number: int) -> date:
    return FIRST + timedelta(days=number)


def seen(number: int, *drifted: str, champion: str = "1", decayed: bool = False) -> DriftEvidence:
    return DriftEvidence(day(number), f"digest {number}", champion, "", drifted, decayed)


# Days 9 and 10 alarm, snapshot 10 is trained and becomes champion 2, to which nothing is new.
DRIFT = [seen(9, "category_shown"), seen(10, "category_shown", "click_rate")]


def runs(policy: TriggerPolicy, evidence: list[DriftEvidence], until: int) -> list[int]:
    """Days of the retrainings where each is done at once."""
    trained, last = [], None
    for number in range(9, until):
        known = [one for one in evidence if one.day <= day(number)]
        decision = decide(known, policy, last_retrained=last)
        if decision.snapshot is not None:
            assert decision.snapshot == day(number)
            last = decision.snapshot
            trained.append(number)
    return trained


def calm(*numbers: int) -> list[DriftEvidence]:
    return [seen(number, champion="2") for number in numbers]


@pytest.mark.parametrize(
    ("cooldown", "settle", "expected"),
    [
        # Day 9 is the first alarming one; a snapshot of day 16 or later has settled.
        (2, 7, [10, 13, 16]),
        (0, 7, [10, 11, 12, 13, 14, 15, 16]),
        (1, 7, [10, 12, 14, 16]),
        (2, 8, [10, 13, 16, 19]),
        (2, 1, [10]),
        (2, 0, [10]),
    ],
)
def test_retrainings_go_on_until_a_snapshot_has_settled(
    cooldown: int, settle: int, expected: list[int]
) -> None:
    policy = TriggerPolicy(2, 3, cooldown, settle_days=settle)
    assert runs(policy, [*DRIFT, *calm(*range(11, 30))], 30) == expected


def test_the_reason_names_the_drift() -> None:
    decision = decide([*DRIFT, *calm(11, 12, 13)], POLICY, last_retrained=day(10))
    assert decision.reason == (
        "the drift that began on 2024-01-10 (category_shown, click_rate) has not settled: "
        "snapshot 2024-01-11 holds few days after that"
    )
    assert decision.run_key != decide(DRIFT, POLICY, last_retrained=None).run_key


def test_a_drift_that_goes_on_is_one_drift() -> None:
    """A day off in between does not make two of it; that it is never calm makes more runs."""
    again = [seen(number, "click_rate", champion="2") for number in (12, 13, 15, 16)]
    evidence = sorted([*DRIFT, *again, *calm(11, 14, *range(17, 30))], key=lambda e: e.day)
    assert runs(POLICY, evidence, 30) == [10, 13, 16]


def test_a_later_drift_begins_anew() -> None:
    """Day 20 is more than three days after day 10."""
    later = [seen(20, "hour", champion="2"), seen(21, "hour", champion="2")]
    evidence = [*DRIFT, *calm(*range(11, 20)), *later, *calm(*range(22, 40))]
    assert runs(POLICY, evidence, 40) == [10, 13, 16, 21, 24, 27]


def test_a_missed_day_only_delays() -> None:
    known = [*DRIFT, *calm(11, 15)]
    assert decide(known, POLICY, last_retrained=day(10)).snapshot == day(15)


def test_one_decayed_day_is_a_drift_one_drifted_day_is_none() -> None:
    for alarm, expected in ((seen(10, decayed=True), day(13)), (seen(10, "hour"), None)):
        known = [alarm, *calm(11, 12, 13)]
        assert decide(known, POLICY, last_retrained=day(10)).snapshot == expected


def test_nothing_follows_a_snapshot_of_before_the_drift() -> None:
    known = [seen(11, "hour"), *(seen(number) for number in (12, 13, 14))]
    assert not decide(known, POLICY, last_retrained=day(10)).retrain


def test_days_to_settle_are_not_negative() -> None:
    with pytest.raises(ConfigError, match="settle_days = -1"):
        TriggerPolicy(settle_days=-1)

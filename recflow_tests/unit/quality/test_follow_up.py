"""A snapshot that a drift triggers holds hardly any day after it: another one has to follow."""

from datetime import date, timedelta

from recflow.quality.evidence import DriftEvidence
from recflow.quality.trigger import TriggerPolicy, decide

FIRST = date(2024, 1, 1)
POLICY = TriggerPolicy(days_needed=2, days_looked_at=3, cooldown_days=2)


def seen(day: int, *drifted: str, champion: str = "1", decayed: bool = False) -> DriftEvidence:
    return DriftEvidence(
        FIRST + timedelta(days=day), f"digest {day}", champion, "", drifted, decayed
    )


def day(number: int) -> date:
    return FIRST + timedelta(days=number)


# Days 9 and 10 alarm, snapshot 10 is trained and becomes champion 2, to which nothing is new.
DRIFT = [seen(9, "category_shown"), seen(10, "category_shown", "click_rate")]


def test_another_snapshot_follows_after_the_cooldown():
    calm = [seen(number, champion="2") for number in (11, 12, 13)]
    for known in (calm[:1], calm[:2]):
        assert not decide([*DRIFT, *known], POLICY, last_retrained=day(10)).retrain
    decision = decide([*DRIFT, *calm], POLICY, last_retrained=day(10))
    assert decision.snapshot == day(13)
    assert decision.reason == (
        "snapshot 2024-01-11 ended on a day beyond a limit and learned from hardly any day after "
        "that: category_shown, click_rate"
    )
    assert decision.run_key != decide(DRIFT, POLICY, last_retrained=None).run_key


def test_a_follow_up_that_ended_on_a_quiet_day_is_the_last():
    known = [*DRIFT, *(seen(number, champion="2") for number in (11, 12, 13))]
    later = [*known, *(seen(number, champion="3") for number in range(14, 20))]
    assert not decide(later, POLICY, last_retrained=day(13)).retrain


def test_a_follow_up_in_a_drift_that_goes_on_is_followed_too():
    known = [*DRIFT, *(seen(number, "click_rate", champion="2") for number in (11, 12, 13))]
    later = [*known, *(seen(number, champion="3") for number in (14, 15, 16))]
    assert decide(later[:-1], POLICY, last_retrained=day(13)).snapshot is None
    assert decide(later, POLICY, last_retrained=day(13)).snapshot == day(16)


def test_a_missed_day_only_delays_the_follow_up():
    known = [*DRIFT, seen(11, champion="2"), seen(15, champion="2")]
    assert decide(known, POLICY, last_retrained=day(10)).snapshot == day(15)


def test_decay_is_followed_up_as_well():
    known = [seen(10, decayed=True), *(seen(number, champion="2") for number in (11, 12, 13))]
    decision = decide(known, POLICY, last_retrained=day(10))
    assert decision.snapshot == day(13)
    assert decision.reason.endswith("after that: decay")


def test_nothing_follows_a_snapshot_that_ended_on_a_quiet_day():
    known = [seen(9), seen(10), *(seen(number, champion="2") for number in (11, 12, 13, 14))]
    assert not decide(known, POLICY, last_retrained=day(10)).retrain


def test_follow_ups_can_be_switched_off():
    alone = TriggerPolicy(days_needed=2, days_looked_at=3, cooldown_days=2, follow_up=False)
    calm = [seen(number, champion="2") for number in (11, 12, 13)]
    assert not decide([*DRIFT, *calm], alone, last_retrained=day(10)).retrain

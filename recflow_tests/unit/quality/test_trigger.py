"""When to retrain: every case is derived by hand from the words of the policy."""

from collections.abc import Sequence
from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recflow.core.errors import ConfigError
from recflow.quality.evidence import DriftEvidence
from recflow.quality.trigger import Decision, TriggerPolicy, decide

POLICY = TriggerPolicy(days_needed=2, days_looked_at=3, cooldown_days=2)


def january(number: int) -> date:
    return date(2026, 1, number)


def day(
    number: int, *drifted: str, decayed: bool = False, champion: str = "7", digest: str = ""
) -> DriftEvidence:
    return DriftEvidence(
        day=january(number),
        digest=digest or f"report-{number}",
        champion=champion,
        drifted=drifted,
        decayed=decayed,
    )


def ask(
    *evidence: DriftEvidence, last: int | None = None, policy: TriggerPolicy = POLICY
) -> Decision:
    return decide(evidence, policy, last_retrained=None if last is None else january(last))


@pytest.mark.parametrize(
    ("evidence", "last", "snapshot", "says"),
    [
        ((), None, None, "no day has a drift report yet"),
        ((day(5),), None, None, "0 of the last 1 days are beyond a limit; 2 of 3 are needed"),
        ((day(4), day(5, "hour")), None, None, "1 of the last 2 days"),
        ((day(4, "hour"), day(5, "hour")), None, 5, "2 of the last 2 days are beyond a limit"),
        # The second of three days is calm: two of three are enough.
        ((day(3, "hour"), day(4), day(5, "clicks")), None, 5, "2 of the last 3 days"),
        # Four days apart: the 2nd is not one of the last three.
        ((day(2, "hour"), day(3), day(4), day(5, "hour")), None, None, "1 of the last 3 days"),
        # It has passed: the newest day is calm again.
        ((day(3, "hour"), day(4, "hour"), day(5)), None, None, "it has passed"),
        # Days without a report do not count: the last three are the 1st, 2nd and 9th.
        ((day(1, "hour"), day(2), day(9, "hour")), None, 9, "2 of the last 3 days"),
        # One day is enough where the champion ranks worse.
        ((day(4), day(5, decayed=True)), None, 5, "the champion ranks worse on 2026-01-05"),
        # It ranked worse, on one day, and no longer does.
        ((day(4, decayed=True), day(5)), None, None, "1 of the last 2 days"),
        # What a snapshot was trained on says nothing about what was trained on it.
        ((day(4, "hour"), day(5, "hour")), 5, None, "snapshot 2026-01-05 covers the newest day"),
        ((day(4, "hour"), day(5, "hour")), 8, None, "covers the newest day, 2026-01-05"),
        ((day(4, "hour"), day(5, "hour")), 4, None, "1 of the last 1 days"),
        # Two days must lie between: after the 10th they are the 11th and 12th.
        ((day(11, "hour"), day(12, "hour")), 10, None, "next on 2026-01-13"),
        ((day(12, decayed=True),), 10, None, "next on 2026-01-13"),
        ((day(12, "hour"), day(13, "hour")), 10, 13, "2 of the last 2 days"),
    ],
)
def test_decisions(
    evidence: Sequence[DriftEvidence], last: int | None, snapshot: int | None, says: str
) -> None:
    decision = ask(*evidence, last=last)
    assert decision.snapshot == (None if snapshot is None else january(snapshot))
    assert decision.retrain == (snapshot is not None)
    assert (decision.run_key is None) == (snapshot is None)
    assert says in decision.reason


def test_days_compared_with_another_champion_say_nothing() -> None:
    assert not ask(day(4, "hour", champion="6"), day(5, "hour")).retrain
    # After a rollback the newest day is compared with the old one again, whose days count.
    back = (day(3, "hour"), day(4, champion="8"), day(5, "hour"))
    assert ask(*back).snapshot == january(5)


def test_without_cooldown_the_next_two_days_are_enough() -> None:
    policy = TriggerPolicy(days_needed=2, days_looked_at=2, cooldown_days=0)
    assert not ask(day(11, "hour"), last=10, policy=policy).retrain
    assert ask(day(11, "hour"), day(12, "hour"), last=10, policy=policy).retrain
    assert ask(day(11, decayed=True), last=10, policy=policy).snapshot == january(11)


def test_decay_can_be_made_to_count_like_any_other_day() -> None:
    patient = TriggerPolicy(days_needed=2, days_looked_at=3, decay_at_once=False)
    assert not ask(day(4), day(5, decayed=True), policy=patient).retrain
    assert ask(day(4, decayed=True), day(5, decayed=True), policy=patient).retrain


def test_the_reason_counts_days_by_measure_the_most_frequent_first() -> None:
    evidence = (day(3, "hour"), day(4, "click_rate"), day(5, "hour", decayed=True))
    assert ask(*evidence).reason == (
        "3 of the last 3 days are beyond a limit: the champion ranks worse on 2026-01-05 than on "
        "its test days; hour on 2 days; click_rate on 1 days"
    )


def test_the_key_is_the_identity_of_the_alarming_days() -> None:
    evidence = [day(3, "hour"), day(4), day(5, "hour")]
    key = ask(*evidence).run_key
    assert key is not None
    assert key.startswith("drift-2026-01-05-")

    def changed(**other: str) -> str | None:
        return ask(*evidence[:2], day(5, "hour", **other)).run_key

    assert changed() == key
    # Materialised again, with another outcome: other evidence.
    assert changed(digest="again") != key
    # A calm day is not what the training is for.
    assert ask(evidence[0], day(4, digest="again"), evidence[2]).run_key == key
    # Whoever changes the policy does not ask for the same training again.
    longer = TriggerPolicy(days_needed=2, days_looked_at=7, cooldown_days=0)
    assert ask(*evidence, policy=longer).run_key == key
    # One more bad day is one more reason.
    assert ask(*evidence, day(6, "hour")).run_key != key


evidences = st.lists(
    st.builds(
        DriftEvidence,
        day=st.integers(0, 40).map(lambda n: january(1) + timedelta(days=n)),
        digest=st.sampled_from(["a", "b", "c"]),
        champion=st.sampled_from(["", "1", "2"]),
        drifted=st.lists(st.sampled_from(["hour", "clicks"]), max_size=2, unique=True).map(tuple),
        decayed=st.booleans(),
    ),
    unique_by=lambda e: e.day,
    max_size=12,
)
policies = st.tuples(st.integers(1, 4), st.integers(0, 4), st.integers(0, 5), st.booleans()).map(
    lambda v: TriggerPolicy(v[0], v[0] + v[1], v[2], v[3])
)
last_days = st.none() | st.integers(0, 40).map(lambda n: january(1) + timedelta(days=n))


@given(evidences.flatmap(lambda e: st.tuples(st.just(e), st.permutations(e))), policies, last_days)
def test_the_order_of_the_evidence_does_not_matter(
    both: tuple[list[DriftEvidence], list[DriftEvidence]], policy: TriggerPolicy, last: date | None
) -> None:
    given_order, other_order = both
    assert decide(given_order, policy, last_retrained=last) == decide(
        other_order, policy, last_retrained=last
    )


@given(evidences, policies, last_days)
def test_what_was_trained_is_new_alarming_and_after_the_cooldown(
    evidence: list[DriftEvidence], policy: TriggerPolicy, last: date | None
) -> None:
    decision = decide(evidence, policy, last_retrained=last)
    if decision.snapshot is None:
        return
    newest = max(evidence, key=lambda e: e.day)
    assert decision.snapshot == newest.day
    # Quiet days make a run only while a drift that made one has not settled.
    assert newest.alarming or any(
        e.alarming and last is not None and e.day <= last < e.day + timedelta(policy.settle_days)
        for e in evidence
    )
    if last is not None:
        assert (newest.day - last).days > policy.cooldown_days
    # Once it has been trained, the same evidence asks for nothing.
    assert not decide(evidence, policy, last_retrained=decision.snapshot).retrain


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"days_needed": 0}, "days_needed = 0 is not allowed; allowed: 1 or more"),
        ({"days_needed": 4, "days_looked_at": 3}, r"days_looked_at = 3 .* days_needed \(4\)"),
        ({"cooldown_days": -1}, "cooldown_days = -1 is not allowed; allowed: 0 or more"),
    ],
)
def test_impossible_policies_are_refused(values: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TriggerPolicy(**values)

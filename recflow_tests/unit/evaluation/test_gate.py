"""The gate, on logs small enough to derive every number by hand.

Each impression shows the items ``a`` and ``b``, and one of them was clicked: its AUC is 1 where a
scorer puts that one first, 0 where it puts it last, and 1/2 where the scores are equal. A scorer is
described by the AUC it reaches in each impression.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date

import polars as pl
import pytest

from recflow.core.errors import ConfigError
from recflow.evaluation.evaluator import Evaluation, Predictions, Snapshot, evaluate
from recflow.evaluation.gate import (
    CHAMPION,
    Costs,
    Evidence,
    GateConfig,
    GateDecision,
    Incumbent,
    Parity,
    Requirement,
    judge,
)
from recflow.evaluation.report.gate_page import GatePage, gate_html
from recflow_tests.unit.evaluation.support import impressions_of, items_of

CONFIG = GateConfig(bootstrap_samples=200, min_segment_impressions=4)
SAME = Parity(impressions=3, scores=6, different=0, largest_difference=0.0)
OLD = Incumbent("1", "2024-01-08", "old", date(2024, 1, 7))
FIRST_TEST_DAY = date(2024, 1, 8)


def snapshot(impressions: int, cold: int = 0) -> Snapshot:
    """Impressions of as many users, each with a click on ``a``; the first ``cold`` without history.

    Both items were shown in train, and both are of the category "news".
    """
    train = impressions_of([{"candidates": ["a", "b"], "clicked": ["a"], "impression_id": "t"}])
    test = [
        {
            "candidates": ["a", "b"],
            "clicked": ["a"],
            "history": [] if number < cold else ["b"],
            "impression_id": f"i{number:03d}",
        }
        for number in range(impressions)
    ]
    return Snapshot(
        items_of({"a": "news", "b": "news"}), train, train.clear(), impressions_of(test)
    )


def predictions(name: str, data: Snapshot, aucs: Sequence[float]) -> Predictions:
    """Scores that reach these AUCs: ``b`` always has the score 0."""
    scores = [[2 * auc - 1, 0.0] for auc in aucs]
    frame = pl.DataFrame(
        {"impression_id": data.test["impression_id"], "scores": scores},
        schema={"impression_id": pl.String, "scores": pl.List(pl.Float64)},
    )
    return Predictions(name, "content-only", frame.clear(), frame, None)


def evaluation(
    data: Snapshot, aucs: Mapping[str, Sequence[float]], config: GateConfig = CONFIG
) -> Evaluation:
    others = [name for name in aucs if name != "model"]
    parents = {"model": CHAMPION} if CHAMPION in aucs else dict.fromkeys(others, "model")
    everyone = [predictions(name, data, values) for name, values in aucs.items()]
    return evaluate(everyone, data, config.evaluation(parents))


def evidence(found: Evaluation, incumbent: Incumbent | None = OLD, **changes: object) -> Evidence:
    baselines = [result.name for result in found.scorers if result.name not in ("model", CHAMPION)]
    whole = Evidence(
        candidate="model",
        digest="new",
        first_test_day=FIRST_TEST_DAY,
        evaluation=found,
        baselines=baselines,
        incumbent=incumbent,
        costs=Costs(),
        parity=SAME,
    )
    return replace(whole, **changes)


def requirement(decision: GateDecision, name: str) -> Requirement:
    return next(item for item in decision.requirements if item.name == name)


def test_a_candidate_that_ranks_the_same_may_become_champion() -> None:
    data = snapshot(8)
    decision = judge(evidence(evaluation(data, {"model": [1.0] * 8, CHAMPION: [1.0] * 8})), CONFIG)
    assert decision.outcome == "may_become_champion"
    overall = requirement(decision, "not_worse_than_champion")
    # Equal in every impression: the difference is 0 in every resample.
    assert (overall.value, overall.limit, overall.verdict) == (0.0, -0.002, "passed")
    assert decision.champion == "1"
    assert decision.metrics == {"model": 1.0, CHAMPION: 1.0}


@pytest.mark.parametrize(("epsilon", "verdict"), [(0.3, "passed"), (0.25, "failed")])
def test_the_whole_interval_must_lie_above_the_allowed_loss(epsilon: float, verdict: str) -> None:
    # The champion is right everywhere; the candidate is undecided (AUC 1/2) in every second
    # impression – of the same user, so that all resamples have the difference -1/4.
    data = snapshot(8)
    one_user = data.test.with_columns(pl.lit("u").alias("user_id"))
    data = replace(data, test=one_user)
    config = replace(CONFIG, epsilon=epsilon, max_segment_loss=0.5)
    found = evaluation(data, {"model": [1.0, 0.5] * 4, CHAMPION: [1.0] * 8}, config)
    decision = judge(evidence(found), config)
    overall = requirement(decision, "not_worse_than_champion")
    assert (overall.value, overall.verdict) == (-0.25, verdict)
    assert decision.passed == (verdict == "passed")


def test_a_loss_that_may_be_chance_blocks_all_the_same() -> None:
    # Equal on average, by very different impressions: the interval reaches far below zero.
    data = snapshot(8)
    found = evaluation(data, {"model": [1.0, 0.0] * 4, CHAMPION: [0.0, 1.0] * 4})
    decision = judge(evidence(found), CONFIG)
    overall = requirement(decision, "not_worse_than_champion")
    assert overall.value is not None
    assert -1 <= overall.value < -0.002
    assert overall.verdict == "failed"
    assert "cannot be excluded" in overall.reason


def test_pairing_makes_what_is_hard_for_both_cancel_out() -> None:
    # Half of the impressions are lost by both. Unpaired intervals would be as wide as those of two
    # independent means; paired, every resample has the difference 0.
    data = snapshot(8)
    found = evaluation(data, {"model": [1.0, 0.0] * 4, CHAMPION: [1.0, 0.0] * 4})
    assert requirement(judge(evidence(found), CONFIG), "not_worse_than_champion").value == 0.0


def test_a_segment_that_loses_certainly_blocks_a_better_mean() -> None:
    # 4 cold users: from 1 to 0, a loss of 1 in every resample. 12 warm users: from 0 to 1.
    data = snapshot(16, cold=4)
    found = evaluation(data, {"model": [0.0] * 4 + [1.0] * 12, CHAMPION: [1.0] * 4 + [0.0] * 12})
    decision = judge(evidence(found), CONFIG)
    # Mean of the differences: (-4 + 12) / 16.
    assert decision.metrics["model"] - decision.metrics[CHAMPION] == 0.5
    cold = requirement(decision, "segment:cold_users")
    assert (cold.verdict, cold.value, cold.limit) == ("failed", -1.0, -0.02)
    assert "segment:cold_users" in {item.name for item in decision.failed}
    assert not decision.passed


def test_a_segment_whose_loss_may_be_chance_does_not_block() -> None:
    # Cold users: -1, +1, -1, 0 – a mean of -1/4, whose interval includes 0.
    data = snapshot(16, cold=4)
    found = evaluation(
        data,
        {"model": [0.0, 1.0, 0.0, 1.0] + [1.0] * 12, CHAMPION: [1.0, 0.0, 1.0, 1.0] + [0.0] * 12},
    )
    cold = requirement(judge(evidence(found), CONFIG), "segment:cold_users")
    assert (cold.verdict, cold.value) == ("passed", -0.25)
    assert "may be chance" in cold.reason


def test_a_certain_loss_within_the_limit_does_not_block() -> None:
    data = snapshot(16, cold=4)
    config = replace(CONFIG, max_segment_loss=0.5)
    found = evaluation(
        data, {"model": [0.5] * 4 + [1.0] * 12, CHAMPION: [1.0] * 4 + [0.0] * 12}, config
    )
    cold = requirement(judge(evidence(found), config), "segment:cold_users")
    assert (cold.verdict, cold.value) == ("passed", -0.5)


def test_a_small_segment_is_named_and_not_judged() -> None:
    data = snapshot(16, cold=3)
    found = evaluation(data, {"model": [0.0] * 3 + [1.0] * 13, CHAMPION: [1.0] * 3 + [0.0] * 13})
    decision = judge(evidence(found), CONFIG)
    cold = requirement(decision, "segment:cold_users")
    assert cold.verdict == "not_judged"
    assert "3 impressions are fewer than 4" in cold.reason
    assert decision.passed
    assert requirement(decision, "segment:category:news").verdict == "passed"


def test_warm_users_and_known_items_are_no_guarded_segments() -> None:
    data = snapshot(8)
    decision = judge(evidence(evaluation(data, {"model": [1.0] * 8, CHAMPION: [1.0] * 8})), CONFIG)
    segments = {item.name for item in decision.requirements if item.name.startswith("segment:")}
    assert segments == {"segment:category:news"}


@pytest.mark.parametrize(
    ("seen_until", "verdict"), [(date(2024, 1, 7), "passed"), (date(2024, 1, 8), "failed")]
)
def test_a_champion_that_has_seen_the_test_is_not_compared_with(
    seen_until: date, verdict: str
) -> None:
    data = snapshot(8)
    found = evaluation(data, {"model": [1.0] * 8, CHAMPION: [0.0] * 8})
    decision = judge(evidence(found, replace(OLD, seen_until=seen_until)), CONFIG)
    unseen = requirement(decision, "champion_has_not_seen_the_test")
    assert unseen.verdict == verdict
    compared = "not_worse_than_champion" in {item.name for item in decision.requirements}
    assert compared == decision.passed == (verdict == "passed")


def test_the_first_champion_must_beat_every_baseline() -> None:
    # Against "low" the difference is 1 everywhere. Against "close" it is 1 in 4 of 8 impressions
    # and -1 in 4: nothing is certain.
    data = snapshot(8)
    found = evaluation(
        data, {"model": [1.0] * 4 + [0.0] * 4, "low": [0.0] * 8, "close": [0.0] * 4 + [1.0] * 4}
    )
    decision = judge(evidence(found, None), CONFIG)
    assert requirement(decision, "beats:close").verdict == "failed"
    # Of 8 users, at least one of the 4 that "low" loses is drawn in all but 1 of 256 resamples.
    assert [item.name for item in decision.failed] == ["beats:close"]
    better = evaluation(data, {"model": [1.0] * 8, "low": [0.0] * 8, "close": [0.5] * 8})
    decision = judge(evidence(better, None), CONFIG)
    assert decision.outcome == "may_become_champion"
    assert decision.champion == ""
    assert requirement(decision, "beats:close").value == 0.5


def test_being_as_good_as_a_baseline_is_not_enough() -> None:
    data = snapshot(8)
    found = evaluation(data, {"model": [1.0] * 8, "equal": [1.0] * 8})
    assert requirement(judge(evidence(found, None), CONFIG), "beats:equal").verdict == "failed"


@pytest.mark.parametrize(
    ("limit", "costs", "broken"),
    [
        ({"max_p99_ms": 5.0}, Costs(p99_ms=5.0), []),
        ({"max_p99_ms": 5.0}, Costs(p99_ms=5.1), ["max_p99_ms"]),
        ({"max_memory_mib": 100.0}, Costs(memory_mib=101.0), ["max_memory_mib"]),
        ({"max_megabytes": 23.0}, Costs(megabytes=90.0), ["max_megabytes"]),
        ({"max_usd_per_million": 1.0}, Costs(usd_per_million=1.5), ["max_usd_per_million"]),
        # A limit that nothing can be held against is not met.
        ({"max_usd_per_million": 1.0}, Costs(), ["max_usd_per_million"]),
        ({}, Costs(p99_ms=1e9, memory_mib=1e9, megabytes=1e9, usd_per_million=1e9), []),
    ],
)
def test_budgets_are_upper_limits(limit: dict[str, float], costs: Costs, broken: list[str]) -> None:
    data = snapshot(8)
    config = replace(CONFIG, **limit)
    found = evaluation(data, {"model": [1.0] * 8, CHAMPION: [1.0] * 8}, config)
    decision = judge(evidence(found, costs=costs), config)
    assert [item.name for item in decision.failed] == broken


@pytest.mark.parametrize(
    "parity",
    [Parity(3, 6, 1, 1e-16, "impression i001, candidate 0"), Parity(0, 0, 0, 0.0)],
)
def test_a_served_model_must_say_exactly_the_same(parity: Parity) -> None:
    data = snapshot(8)
    found = evaluation(data, {"model": [1.0] * 8, CHAMPION: [0.0] * 8})
    decision = judge(evidence(found, parity=parity), CONFIG)
    assert [item.name for item in decision.failed] == ["served_as_judged"]
    assert parity.example in decision.failed[0].reason


def test_the_champion_itself_passes_without_comparison() -> None:
    data = snapshot(8)
    found = evaluation(data, {"model": [0.0] * 8, CHAMPION: [1.0] * 8})
    decision = judge(evidence(found, replace(OLD, digest="new")), CONFIG)
    assert decision.outcome == "already_champion"
    assert decision.passed
    assert "already" in decision.requirements[0].reason


def test_every_reason_is_listed_those_that_failed_first() -> None:
    data = snapshot(8, cold=4)
    config = replace(CONFIG, max_p99_ms=1.0, max_megabytes=1.0)
    found = evaluation(data, {"model": [0.0] * 8, CHAMPION: [1.0] * 8}, config)
    decision = judge(evidence(found, costs=Costs(p99_ms=2.0, megabytes=0.5)), config)
    verdicts = [reason.split(":")[0] for reason in decision.reasons]
    assert verdicts == ["failed"] * 4 + ["passed"] * 3 + ["not judged"] * 2
    assert {item.name for item in decision.failed} == {
        "not_worse_than_champion",
        "segment:cold_users",
        "segment:category:news",
        "max_p99_ms",
    }


def test_a_decision_is_read_back_as_it_was_written() -> None:
    data = snapshot(8)
    decision = judge(evidence(evaluation(data, {"model": [1.0] * 8, CHAMPION: [1.0] * 8})), CONFIG)
    assert GateDecision.from_json(decision.to_json()) == decision


def test_the_page_shows_every_requirement_and_escapes_what_comes_from_data() -> None:
    data = snapshot(8)
    data = replace(data, items=items_of({"a": "<script>x</script>", "b": "news"}))
    found = evaluation(data, {"model": [1.0] * 8, CHAMPION: [1.0] * 8})
    decision = judge(evidence(found), CONFIG)
    page = gate_html(
        decision, GatePage("2024-01-10", "2024-01-08", 8, 8, {"models/fine_tuned": "abc"})
    )
    assert "segment:category:&lt;script&gt;x&lt;/script&gt;" in page
    assert "<script" not in page
    for item in decision.requirements:
        if "<" not in item.name:
            assert item.name in page
    assert "model may become the champion" in page


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("primary_metric", "log_loss"),
        ("epsilon", -0.1),
        ("max_segment_loss", 1.0),
        ("min_segment_impressions", 0),
        ("max_p99_ms", 0.0),
        ("max_megabytes", float("nan")),
        ("confidence", 1.0),
        ("bootstrap_samples", 0),
    ],
)
def test_impossible_requirements_are_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        GateConfig(**{key: value})  # type: ignore[arg-type]

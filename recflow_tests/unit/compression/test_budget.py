import math
from typing import Any

import pytest

from recflow.compression.budget import (
    Budget,
    ChainSpace,
    EncoderSize,
    Trial,
    best_trial,
    candidates,
    excesses,
    worth_making,
)
from recflow.core.errors import ConfigError

# All-MiniLM-L6-v2, with a quarter of its tokens in use.
SIZE = EncoderSize(
    layers=6,
    layer_weights=10_646_784,
    table_weights=11_720_448,
    table_share=0.25,
    other_weights=198_528,
    beside_bytes=1_300_000,
)


def trial(name: str = "a", size: float = 20, p99: float = 2, loss: float = 0.01) -> Trial:
    costs = {
        "max_megabytes": size,
        "max_p99_ms": p99,
        "max_memory_mib": 100.0,
        "max_auc_loss": loss,
    }
    return Trial(name, ("quantize",), size, costs)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({}, "at least one of max_megabytes, max_p99_ms"),
        ({"max_megabytes": 0.0}, "max_megabytes = 0.0 is not allowed; allowed: above 0"),
        ({"max_p99_ms": -1.0}, "max_p99_ms = -1.0"),
        ({"max_auc_loss": 1.0}, "max_auc_loss = 1.0 is not allowed; allowed: above 0 and below 1"),
    ],
)
def test_impossible_budgets(limits: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Budget(**limits)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    "space",
    [
        {"trim": ()},
        {"distill_layers": (3, 3)},
        {"distill_layers": (-1,)},
        {"prune_shares": (0.0,)},
        {"low_rank_ratios": (1.2,)},
        {"precisions": ("int2",)},
    ],
)
def test_impossible_spaces(space: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ChainSpace(**space)


def test_every_combination_is_one_chain_from_the_gentlest_on() -> None:
    space = ChainSpace(distill_layers=(0, 3), prune_shares=(1.0, 0.5), trim=(False, True))
    found = candidates(space, SIZE)
    assert len(found) == len({c.name for c in found}) == 8
    capacities = [c.capacity for c in found]
    assert capacities == sorted(capacities, reverse=True)
    # Among equals the larger one, which is not trimmed, comes first.
    assert [c.name for c in found[:2]] == ["int8_static", "trim_int8_static"]
    assert found[-1].name == "distill3_prune50_trim_int8_static"
    chain = found[-1].family("searched")
    assert chain.steps(found[-1].name) == ["distill", "prune", "trim", "quantize"]
    assert chain.key(found[-1].name) == "searched/distill3_prune50_trim_int8_static"


def test_the_forecast_adds_up_the_parts() -> None:
    space = ChainSpace(distill_layers=(3,), prune_shares=(1.0,), trim=(True,))
    (only,) = candidates(space, SIZE)
    weights = 10_646_784 / 2 + 11_720_448 / 4 + 198_528
    assert only.megabytes == pytest.approx(weights / 1e6 + 1.3)
    assert worth_making(only, Budget(max_megabytes=9.0))
    assert not worth_making(only, Budget(max_megabytes=6.0))
    assert worth_making(only, Budget(max_p99_ms=1.0))


def test_a_student_has_fewer_layers_than_its_teacher() -> None:
    with pytest.raises(ConfigError, match="fewer than the 6 layers"):
        candidates(ChainSpace(distill_layers=(6,)), SIZE)


def test_a_broken_limit_is_named_with_the_share_it_is_exceeded_by() -> None:
    budget = Budget(max_megabytes=10, max_p99_ms=4, max_auc_loss=0.005)
    assert excesses(trial(size=20, p99=4, loss=0.01), budget) == {
        "max_megabytes": pytest.approx(1.0),
        "max_auc_loss": pytest.approx(1.0),
    }
    # A gain is no loss, and what cannot be told is not within the limit.
    assert not excesses(trial(size=1, loss=-0.3), budget)
    assert math.isnan(excesses(trial(size=1, loss=math.nan), budget)["max_auc_loss"])


def test_the_least_loss_within_the_budget_wins() -> None:
    budget = Budget(max_megabytes=25)
    trials = [trial("a", loss=0.02), trial("b", loss=0.01), trial("c", size=30, loss=0.0)]
    best, meets = best_trial(trials, budget)
    assert best is trials[1]
    assert meets


def test_without_one_the_nearest_is_shown() -> None:
    budget = Budget(max_megabytes=10, max_auc_loss=0.01)
    # Twice the size, against half as much loss again: the second is nearer.
    trials = [trial("a", size=20, loss=0.001), trial("b", size=11, loss=0.015)]
    best, meets = best_trial([*trials, Trial("c", (), 5.0, note="not begun")], budget)
    assert best is trials[1]
    assert not meets


def test_nothing_made_gives_nothing() -> None:
    assert best_trial([Trial("c", (), 5.0)], Budget(max_megabytes=1)) == (None, False)

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recflow.core.errors import ConfigError
from recflow.core.measurement import Energy, Latency, Measurement
from recflow.evaluation.evaluator import Estimate, Paired
from recflow.evaluation.frontier import LARGEST_LOSS, TOLERANCE, frontier, replacement

AUC = 0.7


def costing(
    name: str = "m", *, ms: float = 10.0, speed: float = 100.0, rss: int = 500, size: int = 90
) -> Measurement:
    """A measurement of a model; memory and size in MB."""
    return Measurement(
        name=name,
        runtime="torch",
        threads=1,
        size_bytes=size * 1_000_000,
        serving_bytes=size * 1_000_000,
        parameters=1,
        load_seconds=0.1,
        texts_per_second=speed,
        throughput_spread=0.0,
        latencies=(Latency(1, ms, ms, ms, 300, 0.0), Latency(32, 1.0, 1.0, 1.0, 50, 0.0)),
        peak_rss_bytes=rss * 1_000_000,
        energy=Energy(None, "no counter"),
    )


def gain(value: float, noise: float | None = 0.01) -> Paired:
    """A difference of AUC with an interval of ``noise`` to both sides."""

    def estimate(scale: float) -> Estimate:
        if noise is None:
            return Estimate(value * scale)
        return Estimate(value * scale, (value - noise) * scale, (value + noise) * scale)

    return Paired(estimate(1), estimate(1 / AUC))


def gains(auc: Mapping[str, float], noise: float | None = 0.001) -> Callable[[str, str], Paired]:
    return lambda one, other: gain(auc[one] - auc[other], noise)


SAME = gain(0.0)
CHEAP = costing(ms=5, speed=200, rss=250, size=45)


# One model in the place of another


@pytest.mark.parametrize(
    ("difference", "can"),
    [
        (gain(0.0), True),
        (gain(-0.006, noise=0.006), True),  # the interval touches 0
        (gain(-0.006, noise=0.005), False),  # distinguishably worse
        (gain(-0.0069, noise=0.02), True),  # 1 % of 0.7 is 0.007
        (gain(-0.0071, noise=0.02), False),  # may be noise, but is too much to lose
        (gain(0.02, noise=0.001), True),
        (gain(0.0, noise=None), True),
        (gain(-0.0001, noise=None), False),  # nothing says that it is noise
        (gain(float("nan")), False),
    ],
)
def test_accuracy_decides_by_the_paired_interval(difference: Paired, can: bool) -> None:
    assert (replacement("cheap", difference, CHEAP, costing()) is not None) == can


@pytest.mark.parametrize(
    "dearer",
    [{"ms": 10.6}, {"speed": 94.0}, {"rss": 526}, {"size": 91}],
    ids=lambda dearer: next(iter(dearer)),
)
def test_one_dearer_cost_is_enough_to_stay(dearer: dict[str, float]) -> None:
    better = gain(0.05)
    assert replacement("other", better, costing(**dearer), costing()) is None  # type: ignore[arg-type]
    assert replacement("other", better, costing(), costing()) is not None


@pytest.mark.parametrize(
    ("equal", "cheaper"),
    [
        ({"ms": 9.6}, {"ms": 9.5}),
        ({"speed": 104.9}, {"speed": 105.2}),
        ({"rss": 477}, {"rss": 476}),
        ({"size": 90}, {"size": 89}),
    ],
    ids=["ms", "speed", "rss", "size"],
)
def test_only_more_than_the_tolerance_is_cheaper(
    equal: dict[str, float], cheaper: dict[str, float]
) -> None:
    assert replacement("other", SAME, costing(**equal), costing()) is None  # type: ignore[arg-type]
    found = replacement("other", SAME, costing(**cheaper), costing())  # type: ignore[arg-type]
    assert found is not None
    assert len(found.cheaper) == 1


def test_a_cost_that_is_not_known_of_both_is_left_out() -> None:
    untimed = replace(costing(rss=250), latencies=())
    found = replacement("other", SAME, untimed, costing(ms=0.001))
    assert found is not None
    assert found.cheaper == ("peak memory",)
    assert set(found.ratios) == {"time per text in bulk", "peak memory", "size on disk"}


def test_the_reason_names_what_is_better() -> None:
    found = replacement("cheap", gain(0.02, noise=0.01), CHEAP, costing())
    assert found is not None
    assert found.more_accurate
    assert found.ratios == pytest.approx(
        {
            "latency of one text": 0.5,
            "time per text in bulk": 0.5,
            "peak memory": 0.5,
            "size on disk": 0.5,
        }
    )
    touching = replacement("cheap", gain(0.01, noise=0.01), CHEAP, costing())
    assert touching is not None
    assert not touching.more_accurate


# All models


def test_a_trade_off_dominates_nobody() -> None:
    found = frontier(
        ["large", "small"],
        {"large": costing(), "small": CHEAP},
        gains({"large": 0.7, "small": 0.65}),
    )
    assert found.kept == ("large", "small")
    assert found.dominated == {}


def test_the_dominated_name_who_replaces_them_most_accurate_first() -> None:
    costs = {
        "large": costing(),
        "slow": costing(ms=20),
        "small": CHEAP,
        "smaller": costing(ms=4, speed=250, rss=200, size=40),
    }
    auc = {"large": 0.7, "slow": 0.64, "small": 0.66, "smaller": 0.65}
    found = frontier(list(costs), costs, gains(auc))
    assert found.kept == ("large", "small", "smaller")
    assert list(found.dominated) == ["slow"]
    assert [r.by for r in found.dominated["slow"]] == ["large", "small", "smaller"]


def test_models_that_are_the_same_both_stay() -> None:
    costs = {"a": costing(), "b": costing()}
    assert frontier(["a", "b"], costs, gains({"a": 0.7, "b": 0.7})).kept == ("a", "b")


def test_one_model_or_none_is_never_dominated() -> None:
    assert frontier(["a"], {"a": costing()}, gains({"a": 0.7})).kept == ("a",)
    nobody = frontier([], {}, gains({}))
    assert (nobody.kept, nobody.dominated, nobody.unjudged) == ((), {}, ())


def test_a_model_that_was_not_measured_is_not_judged() -> None:
    found = frontier(["a", "b"], {"a": costing()}, gains({"a": 0.1, "b": 0.9}))
    assert (found.kept, found.dominated, found.unjudged) == (("a",), {}, ("b",))
    with pytest.raises(ConfigError, match="every model once"):
        frontier(["a", "a"], {}, gains({}))


def test_who_is_dominated_by_a_dominated_model_only_stays() -> None:
    """b can replace a, c can replace b, but c loses too much to replace a."""
    auc = {"a": 0.7, "b": 0.694, "c": 0.688}
    costs = {
        "a": costing(size=90),
        "b": costing(size=60),
        "c": costing(size=30),
    }
    found = frontier(list(costs), costs, gains(auc, noise=0.05))
    assert found.kept == ("a", "c")
    assert [r.by for r in found.dominated["b"]] == ["c"]


def test_models_that_replace_each_other_in_a_circle_all_stay() -> None:
    """Each is within the tolerance of the next in all costs, and two steps better in one."""
    step = 1 + 0.9 * TOLERANCE
    costs = {
        "a": costing(ms=10, speed=100, rss=round(500 * step)),
        "b": costing(ms=10 * step**2, speed=100 * step, rss=500),
        "c": costing(ms=10 * step, speed=100 * step**2, rss=round(500 * step**2)),
    }
    auc = dict.fromkeys(costs, 0.7)
    replaces = {
        (one, other)
        for one, other in permutations(costs, 2)
        if replacement(one, gains(auc)(one, other), costs[one], costs[other])
    }
    assert replaces == {("a", "b"), ("b", "c"), ("c", "a")}
    assert frontier(list(costs), costs, gains(auc)).kept == ("a", "b", "c")


MODEL = st.tuples(
    st.floats(0.6, 0.8), st.floats(1, 30), st.floats(50, 500), st.integers(100, 900),
    st.integers(5, 90),
)  # fmt: skip


@given(st.lists(MODEL, min_size=1, max_size=8), st.sampled_from([None, 0.0, 0.005, 0.05]))
def test_every_model_is_kept_or_replaced_by_a_kept_one(
    models: Sequence[tuple[float, float, float, int, int]], noise: float | None
) -> None:
    names = [f"m{number}" for number in range(len(models))]
    auc = {name: model[0] for name, model in zip(names, models, strict=True)}
    costs = {
        name: costing(ms=ms, speed=speed, rss=rss, size=size)
        for name, (_, ms, speed, rss, size) in zip(names, models, strict=True)
    }
    found = frontier(names, costs, gains(auc, noise))
    assert found.kept
    assert sorted([*found.kept, *found.dominated]) == names
    for name, replaced_by in found.dominated.items():
        assert replaced_by
        for one in replaced_by:
            assert one.by in found.kept
            assert auc[one.by] >= auc[name] - LARGEST_LOSS * AUC - 1e-12
            assert costs[one.by].serving_bytes <= costs[name].serving_bytes
    best = max(auc.values())
    assert any(auc[name] > best - len(names) * LARGEST_LOSS * AUC for name in found.kept)
    assert set(frontier(names[::-1], costs, gains(auc, noise)).kept) == set(found.kept)

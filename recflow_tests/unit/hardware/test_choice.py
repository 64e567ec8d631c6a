from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recflow.core.errors import ConfigError, HardwareError
from recflow.hardware.catalogue import find_device, load_catalogue
from recflow.hardware.choice import advise, choose, shortage
from recflow.hardware.device import GIB, Device
from recflow.hardware.plan import Advice, Memory, Stage, TrainingPlan
from recflow.hardware.planner import plan_training
from recflow.hardware.presets import PRESETS, find_shape
from recflow.hardware.workload import TrainingWorkload
from recflow.modeling.config import TrainingConfig, with_values

WORKLOAD = TrainingWorkload.typical()
DEVICES = load_catalogue()


def _config(**values: Any) -> TrainingConfig:
    return with_values(
        TrainingConfig(), {key.replace("__", "."): value for key, value in values.items()}
    )


def _plan(model: str, config: TrainingConfig, device: str | Device = "h200") -> TrainingPlan:
    place = find_device(device) if isinstance(device, str) else device
    return plan_training(find_shape(model), config, WORKLOAD, place)


def _made(device: Device, memory: int, host: int, seconds: float) -> TrainingPlan:
    return TrainingPlan(
        device=device,
        devices=1,
        precision="fp32",
        memory=Memory({"weights": memory // 3, "activations": memory - memory // 3}),
        host_memory=Memory({"tables": host}),
        stages=(Stage("head", 1, 1.0, seconds, seconds),),
        parameters=1,
        trainable_parameters=1,
        clicks=1,
        texts_per_step=1.0,
        is_calibrated=False,
    )


PLANS = st.lists(
    st.builds(
        _made,
        st.sampled_from(list(DEVICES.values())),
        st.integers(1, 200 * GIB),
        st.integers(1, 300 * GIB),
        st.floats(1, 1e6),
    ),
    min_size=1,
    max_size=12,
)


@given(plans=PLANS, hours=st.none() | st.floats(0.01, 300))
def test_the_choice_is_the_cheapest_that_fits_memory_and_time(
    plans: list[TrainingPlan], hours: float | None
) -> None:
    possible = [
        plan
        for plan in plans
        if plan.memory.total <= plan.device.memory_bytes
        and plan.host_memory.total <= plan.device.host_memory_bytes
        and (hours is None or plan.seconds <= hours * 3600)
    ]
    if not possible:
        with pytest.raises(HardwareError):
            choose(plans, hours)
        return
    chosen = choose(plans, hours)
    assert chosen in possible
    assert all((chosen.usd, chosen.seconds) <= (other.usd, other.seconds) for other in possible)
    # The order of the plans does not decide.
    other = choose(plans[::-1], hours)
    assert (other.device.name, other.usd, other.seconds) == (
        chosen.device.name, chosen.usd, chosen.seconds,
    )  # fmt: skip


def test_the_quicker_of_two_that_cost_the_same() -> None:
    device = find_device("l4")
    double = replace(device, name="double", price=replace(device.price, usd_per_hour=2 * 0.9776))
    slow, quick = _made(device, 1, 1, 3600), _made(double, 1, 1, 1800)
    assert slow.usd == quick.usd
    assert choose([slow, quick]) is quick


def test_no_room_names_the_nearest_device_its_largest_part_and_what_helps() -> None:
    small, near = find_device("t4"), find_device("l4")
    plans = [_made(small, 24 * GIB, 1, 1), _made(near, 24 * GIB, 1, 1)]
    with pytest.raises(HardwareError) as error:
        choose(plans)
    assert str(error.value) == (
        "the training fits no device; l4 comes nearest but needs 24.0 GiB of 22.0 GiB, "
        "most of it activations (16.0 GiB)"
    )
    asked: list[str] = []

    def advice(device: Device) -> Sequence[Advice]:
        asked.append(device.name)
        return [Advice("speed.micro_batches: 2", 1, True, device.name)]

    with pytest.raises(HardwareError, match=r"; it fits with speed\.micro_batches: 2$"):
        choose(plans, advice=advice)
    assert asked == ["l4"]
    with pytest.raises(HardwareError, match="take a smaller base model"):
        choose(plans, advice=lambda _: [])


def test_no_time_names_the_quickest_device() -> None:
    plans = [_made(find_device("t4"), 1, 1, 7200), _made(find_device("l4"), 1, 1, 5400)]
    with pytest.raises(HardwareError, match=r"within 1 h; the quickest, l4, takes 1\.5 h"):
        choose(plans, 1)


def test_the_host_counts_too() -> None:
    plan = _made(find_device("l4"), 1, 33 * GIB, 1)
    assert not plan.fits
    assert shortage(plan) == ("its host needs 33.0 GiB of 32.0 GiB, most of it tables (33.0 GiB)")
    # Two GPUs have two shares of a machine around them.
    assert replace(plan, devices=2).fits
    assert shortage(replace(plan, devices=2)) is None


@pytest.mark.parametrize(
    ("plans", "hours", "key"),
    [([], None, "devices"), ([_made(DEVICES["l4"], 1, 1, 1)], 0, "hours")],
)
def test_impossible_choices_are_refused(
    plans: list[TrainingPlan], hours: float | None, key: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{key} = "):
        choose(plans, hours)


# ---------------------------------------------------------------------- advice

CASES: list[tuple[str, dict[str, Any], str]] = [
    ("Qwen3-8B", {"tuning.strategy": "full"}, "h200"),
    ("Qwen3-8B", {"tuning.strategy": "full"}, "a100-80"),
    ("Qwen3-8B", {"tuning.strategy": "full", "speed.max_texts_per_step": 0}, "l40s"),
    ("Qwen3-0.6B", {"tuning.strategy": "full"}, "l4"),
    ("bert-large-uncased", {"tuning.strategy": "full", "speed.max_texts_per_step": 0}, "t4"),
    (
        "bert-base-uncased",
        {"tuning.strategy": "full", "speed.max_texts_per_step": 0, "speed.precision": "fp32"},
        "cpu-2",
    ),
    (
        "ModernBERT-large",
        {
            "tuning.strategy": "lora", "tuning.tuned_layers": 28, "speed.distinct_items": False,
            "speed.max_texts_per_step": 0, "max_tokens": 128,
        },
        "a10g",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model", "values", "name"), CASES)
def test_every_advice_is_a_configuration_that_fits(
    model: str, values: dict[str, Any], name: str
) -> None:
    shape, config, device = find_shape(model), with_values(TrainingConfig(), values), DEVICES[name]
    assert not plan_training(shape, config, WORKLOAD, device).fits
    found = advise(shape, config, WORKLOAD, device)
    assert found
    for advice in found:
        plan = plan_training(shape, with_values(config, advice.values), WORKLOAD, device)
        assert plan.fits
        assert (advice.fits, advice.memory, advice.device) == (True, plan.memory.total, name)
        # The words are the values, as they are written in a configuration.
        assert advice.change == ", ".join(
            f"{key}: {str(value).lower() if isinstance(value, bool) else value}"
            for key, value in advice.values.items()
        )
        # No change of it can be left out.
        changes = dict(advice.values)
        for key in changes:
            if len(changes) > 1 and key != "tuning.tuned_layers":
                rest = {other: value for other, value in changes.items() if other != key}
                try:
                    lighter = with_values(config, rest)
                except ConfigError:
                    continue
                assert not plan_training(shape, lighter, WORKLOAD, device).fits


def _kinds(advice: Advice) -> set[str]:
    """The independent changes of one advice."""
    groups = {"tuning.tuned_layers": "tuning.strategy"}
    groups["distribution.processes"] = "distribution.shard_encoder"
    return {groups.get(key, key) for key in advice.values}


def test_combinations_are_told_only_where_nothing_suffices_alone() -> None:
    shape, config = find_shape("Qwen3-0.6B"), _config(tuning__strategy="full")
    alone = advise(shape, config, WORKLOAD, DEVICES["l4"])
    assert len(alone) > 3
    assert all(len(_kinds(advice)) == 1 for advice in alone)
    combined = advise(shape, config, WORKLOAD, replace(DEVICES["l4"], memory_gib=3.0))
    assert combined
    assert {len(_kinds(advice)) for advice in combined} == {2}


def test_no_advice_where_it_fits_or_nothing_helps() -> None:
    shape, config = find_shape("bert-base-uncased"), TrainingConfig()
    assert advise(shape, config, WORKLOAD, DEVICES["l4"]) == []
    tiny = replace(DEVICES["l4"], memory_gib=0.01)
    assert advise(shape, config, WORKLOAD, tiny) == []


def test_advice_never_contradicts_the_configuration() -> None:
    shape = find_shape("Qwen3-0.6B")
    small = replace(DEVICES["l4"], memory_gib=3.0)
    for strategy in ("top_k_layers", "lora", "adalora", "adapters", "full"):
        local = "every_step" if strategy == "adalora" else "local_sgd"
        config = _config(tuning__strategy=strategy, distribution__synchronisation=local)
        for advice in advise(shape, config, WORKLOAD, small):
            assert "distribution.shard_encoder" not in advice.values
            with_values(config, advice.values)


# ----------------------------------------------- what changes do to the memory

MODELS = st.sampled_from(list(PRESETS))
SETTINGS = st.fixed_dictionaries(
    {
        "schedule.encoder_batch_size": st.sampled_from([16, 64, 256, 1024]),
        "speed.max_texts_per_step": st.sampled_from([0, 64, 512]),
        "speed.precision": st.sampled_from(["auto", "fp32"]),
        "speed.cache_hidden_states": st.booleans(),
        "max_tokens": st.sampled_from([32, 128]),
    }
)
PLACES = st.sampled_from(["cpu-8", "t4", "l4", "h200"])
Change = Callable[[int], dict[str, Any]]


def _total(model: str, values: dict[str, Any], device: str) -> int:
    return _plan(model, with_values(TrainingConfig(), values), device).memory.total


@given(model=MODELS, values=SETTINGS, device=PLACES)
@settings(deadline=None, max_examples=60)
def test_low_rank_never_holds_more_weights_and_states(
    model: str, values: dict[str, Any], device: str
) -> None:
    low = {"tuning.strategy": "lora", "tuning.tuned_layers": find_shape(model).layers}
    held = [
        sum(
            size
            for part, size in _plan(
                model, with_values(TrainingConfig(), {**values, **changes}), device
            ).memory.parts.items()
            if part in ("weights", "gradients", "optimiser states", "best weights")
        )
        for changes in (low, {"tuning.strategy": "full"})
    ]
    assert held[0] < held[1]


@pytest.mark.parametrize("model", ["Qwen3-0.6B", "Qwen3-8B", "Meta-Llama-3-8B"])
@pytest.mark.parametrize("device", ["cpu-8", "t4", "h200"])
def test_low_rank_needs_less_where_weights_decide(model: str, device: str) -> None:
    # Of small encoders with many texts the activations decide, and low-rank matrices add some.
    low = {"tuning.strategy": "lora", "tuning.tuned_layers": find_shape(model).layers}
    few = {"speed.max_texts_per_step": 64}
    assert _total(model, {**few, **low}, device) < _total(
        model, {**few, "tuning.strategy": "full"}, device
    )


@given(
    model=MODELS,
    values=SETTINGS,
    device=PLACES,
    strategy=st.sampled_from(["full", "top_k_layers", "lora", "adalora", "adapters"]),
)
@settings(deadline=None, max_examples=60)
def test_recomputing_activations_never_needs_more(
    model: str, values: dict[str, Any], device: str, strategy: str
) -> None:
    values = {**values, "tuning.strategy": strategy, "tuning.tuned_layers": 4}
    recomputed = {**values, "speed.gradient_checkpointing": True}
    assert _total(model, recomputed, device) <= _total(model, values, device)


@given(
    model=MODELS,
    values=SETTINGS,
    device=st.sampled_from(["t4", "l4", "h200"]),
    strategy=st.sampled_from(["full", "top_k_layers", "lora"]),
    processes=st.sampled_from([1, 2, 4]),
)
@settings(deadline=None, max_examples=60)
def test_sharding_over_more_gpus_needs_less_of_each(
    model: str, values: dict[str, Any], device: str, strategy: str, processes: int
) -> None:
    values = {**values, "tuning.strategy": strategy, "tuning.tuned_layers": 2}
    totals = [
        _total(
            model,
            {
                **values,
                "distribution.shard_encoder": count > 1,
                "distribution.processes": count,
            },
            device,
        )
        for count in (processes, 2 * processes)
    ]
    assert totals[1] < totals[0]

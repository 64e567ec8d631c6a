"""Plans of trainings: numbers derived by hand, and how they move."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recflow.core.errors import ConfigError
from recflow.hardware.calibration import default_calibration
from recflow.hardware.catalogue import load_catalogue
from recflow.hardware.plan import TrainingPlan
from recflow.hardware.planner import Work, plan_training, training_work
from recflow.hardware.presets import find_shape
from recflow.hardware.workload import Popularity, TextLengths, TrainingWorkload
from recflow.modeling.config import TrainingConfig, with_values

DEVICES = load_catalogue()
CPU, L4, T4 = DEVICES["cpu-2"], DEVICES["l4"], DEVICES["t4"]
MINILM = find_shape("all-MiniLM-L6-v2")
# 1,000 items of 16 tokens each, so that every batch is 16 long.
WORKLOAD = replace(
    TrainingWorkload.typical(clicks=4_096, history=20.0, slate=30.0, items=1_000),
    lengths=TextLengths((16,)),
)


ALL_TEXTS = {"speed.max_texts_per_step": 0}


def plan(values: dict[str, Any] | None = None, device: Any = CPU) -> TrainingPlan:
    return plan_training(MINILM, with_values(TrainingConfig(), values or {}), WORKLOAD, device)


def test_two_layers_of_minilm_by_hand() -> None:
    # A layer: 4 × 384² + 2 × 384 × 1,536 weights, 4 × 384 + 1,536 + 384 biases, 4 × 384 of norms.
    layer = 4 * 384**2 + 2 * 384 * 1_536 + 9 * 384 + 1_536
    planned = plan()
    head = planned.trainable_parameters - 2 * layer
    assert 384**2 < head < 384**2 * 1.2
    parts = planned.memory.parts
    assert parts["weights"] == 4 * (MINILM.parameters + head)
    assert parts["gradients"] == 4 * (2 * layer + head)
    assert parts["optimiser states"] == 8 * (2 * layer + head)
    assert parts["best weights"] == parts["gradients"]
    # 1,000 texts × 16 tokens × 384 values of two bytes.
    assert parts["hidden states"] == 1_000 * 16 * 384 * 2
    # 256 texts × 16 tokens × 2 layers × (40 × 384 bytes, and 2 a head and token that it sees), and
    # 4 × 384 above; with the heap's share.
    heap = default_calibration(CPU).heap_share("bert", "bf16", "plain")
    kept = 256 * 16 * (2 * (40 * 384 + 2 * 12 * 16) + 4 * 384)
    assert parts["activations"] == pytest.approx(kept * heap, rel=1e-6)


def test_operations_of_a_step_by_hand() -> None:
    stage = plan().stage("encoder")
    assert stage is not None
    matrices = 4 * 384**2 + 2 * 384 * 1_536
    # Forward, and backward for inputs and weights: 3 × 2 operations a weight and token; but no
    # gradient is wanted of what the lower layer takes its queries, keys and values from.
    products = (6 * matrices * 2 - 2 * 3 * 384**2) * 256 * 16
    attention = 3.5 * 4 * 16 * 384 * 256 * 16 * 2
    # The rest is the user model's.
    assert products + attention < stage.flops < (products + attention) * 1.15
    assert stage.repeats == 2 * 4_096 / 256


def test_a_step_encodes_distinct_items_and_no_more_than_it_is_told() -> None:
    everything = plan({"speed.max_texts_per_step": 0})
    draws = 256 * (20 + 9)
    assert everything.texts_per_step == pytest.approx(WORKLOAD.popularity.distinct(draws), abs=1)
    assert everything.texts_per_step <= 1_000
    assert plan({"speed.max_texts_per_step": 100}).texts_per_step == 100
    again = plan({"speed.max_texts_per_step": 0, "speed.distinct_items": False})
    assert again.texts_per_step == draws


def test_distinct_items_of_equally_frequent_ones() -> None:
    # Two draws of four items: four pairs of sixteen are equal, so 2 - 4 / 16 on average.
    assert Popularity(((4, 1.0),)).distinct(2) == pytest.approx(1.75)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"tuning.strategy": "frozen"}, {}),
        ({}, {"tuning.strategy": "full"}),
        ({"speed.max_texts_per_step": 64}, {}),
        ({}, {"speed.precision": "fp32"}),
        ({"speed.gradient_checkpointing": True}, {}),
        (ALL_TEXTS | {"speed.micro_batches": 4}, ALL_TEXTS),
        ({}, {"speed.dynamic_padding": False}),
    ],
)  # fmt: skip
def test_what_takes_less_memory(less: dict[str, Any], more: dict[str, Any]) -> None:
    for device in (CPU, L4):
        assert plan(less, device).memory.total < plan(more, device).memory.total


def test_spreading_weights_leaves_each_device_its_part() -> None:
    full = {"tuning.strategy": "full"}
    alone = plan(full, L4)
    spread = plan({**full, "distribution.processes": 4, "distribution.shard_encoder": True}, L4)
    encoder = 4 * MINILM.parameters
    assert alone.memory.parts["weights"] - spread.memory.parts["weights"] == encoder * 3 // 4
    assert spread.devices == 4
    assert spread.usd == pytest.approx(spread.seconds / 3_600 * L4.price.usd_per_hour * 4)


@settings(max_examples=40, deadline=None)
@given(
    texts=st.integers(0, 600),
    batch=st.sampled_from([16, 64, 256, 1_024]),
    strategy=st.sampled_from(["frozen", "top_k_layers", "full", "lora", "adalora", "adapters"]),
    device=st.sampled_from(sorted(DEVICES)),
)
def test_no_plan_is_quicker_than_its_limit(
    texts: int, batch: int, strategy: str, device: str
) -> None:
    planned = plan(
        {
            "speed.max_texts_per_step": texts,
            "schedule.encoder_batch_size": batch,
            "tuning.strategy": strategy,
        },
        DEVICES[device],
    )
    assert all(stage.seconds >= stage.limit_seconds for stage in planned.stages)
    assert all(size > 0 for size in planned.memory.parts.values())
    assert planned.usd > 0


def test_a_gpu_without_bfloat16_multiplies_float32() -> None:
    assert plan(device=T4).precision == "fp32"
    with pytest.raises(ConfigError, match=r"precision = 'bf16' is not allowed; .* on t4"):
        plan({"speed.precision": "bf16"}, T4)


def test_more_layers_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="tuned_layers = 7 is not allowed; allowed: 1 to 6"):
        plan({"tuning.tuned_layers": 7})


def test_plans_of_what_was_never_measured_say_so() -> None:
    assert plan(device=DEVICES["cpu-2-zen4"]).is_calibrated
    for other in (CPU, L4):  # on whose kind nothing was measured
        assert not plan(device=other).is_calibrated


def works(values: dict[str, Any] | None = None) -> dict[str, Work]:
    config = with_values(TrainingConfig(), values or {})
    return training_work(MINILM, config, WORKLOAD, CPU, default_calibration(CPU))


def test_products_are_compiled_when_their_shape_is_first_seen() -> None:
    # Three sizes of matrices. Hidden states: 32 texts of 16 at a time. All items: fifteen batches
    # of 64 texts, one of 40. Steps: batches of 64, of which only both gradients are new.
    found, epochs = works(), TrainingConfig().schedule.encoder_epochs
    assert found["hidden states"].kernels == 3 * 1
    assert found["encoding"].kernels * (1 + epochs) == 3 * 2
    steps = epochs * 4_096 / TrainingConfig().schedule.encoder_batch_size
    assert found["encoder"].kernels * steps == pytest.approx(3 * 2)
    parts = plan().memory.parts
    assert parts["kernels"] == (3 + 6 + 6) * default_calibration(CPU).kernel_bytes
    assert all(work.kernels == 0 for work in works({"speed.precision": "fp32"}).values())


def test_low_rank_matrices_move_bytes_in_the_layers_they_are_in() -> None:
    plain, low_rank = works(), works({"tuning.strategy": "lora"})
    assert low_rank["hidden states"] == plain["hidden states"]
    # 256 texts of 16 tokens in two layers: ten bytes forwards and fifteen backwards for each of the
    # ends of four matrices of 384 × 384 and two of 384 × 1,536. AdamW's ten passes over two layers
    # against those over matrices of rank r at the same ends. Gradients of the matrices: of four
    # batches, widened (6 bytes), three times added (12); and the matrices rounded once, not for
    # each batch, as those that do not learn are.
    ends = 4 * 768 + 2 * 1_920
    layer = 4 * 384**2 + 2 * 384 * 1_536 + 9 * 384 + 1_536
    learning = 2 * layer - 2 * TrainingConfig().tuning.rank * ends
    gradients = 2 * (4 * 384**2 + 2 * 384 * 1_536) * (4 * 6 + 3 * 12 + 6 - 4 * 6)
    more = 256 * 16 * 2 * (10 + 15) * ends - 40 * learning - gradients
    assert low_rank["encoder"].bytes - plain["encoder"].bytes == pytest.approx(more)


def test_gradients_stop_where_nothing_below_learns() -> None:
    matrices, tokens = 4 * 384**2 + 2 * 384 * 1_536, 256 * 16
    found = {name: works({"tuning.strategy": name})["encoder"] for name in ("adapters", "lora")}
    # With adapters one of two layers passes gradients on, with low-rank matrices both do, of the
    # lower one all but the queries, keys and values.
    assert found["lora"].flops - found["adapters"].flops == pytest.approx(
        2 * tokens * (matrices - 3 * 384**2)
    )


def test_recomputing_is_one_more_pass_forwards() -> None:
    plain = works({"tuning.strategy": "full"})["encoder"]
    again = works({"tuning.strategy": "full", "speed.gradient_checkpointing": True})["encoder"]
    matrices, tokens = 4 * 384**2 + 2 * 384 * 1_536, 256 * 16
    forward = 6 * tokens * (2 * matrices + 4 * 16 * 384)
    assert again.flops - plain.flops == pytest.approx(forward)
    assert again.bytes > plain.bytes
    assert again.operators - plain.operators == 4 * 6 * 35


def test_the_gradient_of_the_token_table_is_as_large_as_the_table() -> None:
    few, many = (
        works({"tuning.strategy": "full", "speed.max_texts_per_step": texts})["encoder"]
        for texts in (64, 128)
    )
    two_layers = [
        works({"tuning.tuned_layers": 6, "speed.max_texts_per_step": texts})["encoder"]
        for texts in (64, 128)
    ]
    # One batch more: written as zeros, and added to the one before.
    table = MINILM.embedding_parameters * (4 + 12)
    grown = (many.bytes - few.bytes) - (two_layers[1].bytes - two_layers[0].bytes)
    assert grown == pytest.approx(table)


def test_parts_of_a_step_are_dispatched_one_by_one() -> None:
    whole, parts = works(), works({"speed.micro_batches": 4})
    assert parts["head"].operators - whole["head"].operators == 3 * 200
    assert parts["head"].float_flops > whole["head"].float_flops  # items are shared by fewer clicks

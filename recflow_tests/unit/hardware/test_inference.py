"""Plans of serving: derived by hand, and how they move with what is served."""

import math
from dataclasses import replace

import pytest

from recflow.core.errors import ConfigError
from recflow.hardware.catalogue import load_catalogue
from recflow.hardware.device import Device, Price
from recflow.hardware.inference import ONNXRUNTIME, PRECISIONS, ServedModel, plan_inference
from recflow.hardware.presets import PRESETS, find_shape
from recflow.hardware.shape import EncoderShape
from recflow.hardware.workload import InferenceWorkload, TextLengths

CPU = Device(
    name="cpu",
    label="two cores",
    kind="cpu",
    memory_gib=16,
    bandwidth_gb_s=40,
    teraflops={"fp32": 0.4, "bf16": 0.8, "int8": 1.6},
    watts=60,
    host_memory_gib=16,
    cores=2,
    price=Price(0.1, "2026-01-01", "a test"),
    source="a test",
)
T4 = replace(CPU, name="t4", kind="gpu", teraflops={"fp32": 8.1, "int8": 130.0}, bandwidth_gb_s=320)
MINILM = EncoderShape.from_config(
    {
        "model_type": "bert",
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
    }
)
TEXTS = InferenceWorkload(
    items=0, history=0, candidates=0, texts=1, lengths=TextLengths((10,)), batch=32
)


def total(model: ServedModel, workload: InferenceWorkload = TEXTS) -> int:
    return plan_inference(model, workload, CPU).memory.total


def test_operations_of_a_text_are_two_a_weight_and_token() -> None:
    plan = plan_inference(ServedModel.of(MINILM), TEXTS, CPU)
    # matrices: 6 * (4 * 384^2 + 2 * 384 * 1536) = 10,616,832; attention: 4 * 10 * 384 * 6 a token
    assert plan.flops_per_text == 10 * (2 * 10_616_832 + 4 * 10 * 384 * 6)


def test_loading_float32_into_pytorch_takes_the_file_and_the_weights() -> None:
    parts = plan_inference(ServedModel.of(MINILM), TEXTS, CPU).memory.parts
    assert parts["weights"] == parts["loading"] == 4 * MINILM.parameters


def test_a_store_of_float32_vectors() -> None:
    workload = replace(TEXTS, items=1_000, candidates=10, history=5)
    few = replace(workload, batch=1)
    parts = plan_inference(ServedModel.of(MINILM, "int4"), few, CPU).memory.parts
    assert parts["item vectors"] == 1_000 * (4 * 384 + 190)


@pytest.mark.parametrize("precision", ["fp16", "int8_dynamic", "int8_static", "int4"])
def test_fewer_bits_take_less_than_float32_in_the_same_runtime(precision: str) -> None:
    wide = ServedModel(MINILM, ONNXRUNTIME, "fp32")
    narrow = replace(wide, precision=precision)
    assert narrow.stored_bytes < wide.stored_bytes
    weights = [
        plan_inference(model, TEXTS, CPU).memory.parts["weights"] for model in (narrow, wide)
    ]
    assert weights[0] < weights[1]


def test_zeros_shrink_the_file_only() -> None:
    dense, sparse = (ServedModel(MINILM, zero_share=share) for share in (0.0, 0.5))
    assert sparse.stored_bytes < dense.stored_bytes
    plans = [plan_inference(model, TEXTS, CPU) for model in (dense, sparse)]
    assert plans[0].texts_per_second == plans[1].texts_per_second
    assert plans[0].memory.parts["weights"] == plans[1].memory.parts["weights"]


def test_layers_of_their_own_sizes_need_kernels_of_their_own() -> None:
    many = replace(TEXTS, items=200_000)  # a service in which loading is not the largest moment
    one, two = (replace(many, lengths=TextLengths(lengths)) for lengths in ((10,), (10, 20)))

    def kernels(model: ServedModel, workload: InferenceWorkload, device: Device = CPU) -> int:
        return plan_inference(model, workload, device).memory.parts.get("kernels", 0)

    unlike = ServedModel(MINILM, matrix_sizes=30)
    assert kernels(unlike, one) == 10 * kernels(ServedModel(MINILM), one) > 0
    assert kernels(unlike, two) == 2 * kernels(unlike, one)
    assert kernels(unlike, one, replace(CPU, teraflops={"fp32": 0.4})) == 0


def test_memory_grows_with_items_and_with_the_batch() -> None:
    model = ServedModel.of(MINILM, "int8_static")
    scored = replace(TEXTS, candidates=10, history=5)
    sizes = [total(model, replace(scored, items=items)) for items in (0, 10_000, 100_000)]
    assert sizes == sorted(set(sizes))
    requests = [
        plan_inference(model, replace(TEXTS, batch=batch), CPU).memory.parts["request"]
        for batch in (1, 8, 64)
    ]
    assert requests == sorted(set(requests))


def test_deeper_encoders_are_slower_and_more_threads_faster() -> None:
    deep, shallow = (ServedModel.of(MINILM.scaled(layers=layers)) for layers in (6, 3))
    assert (
        plan_inference(deep, TEXTS, CPU).texts_per_second
        < plan_inference(shallow, TEXTS, CPU).texts_per_second
    )
    one, two = (plan_inference(deep, TEXTS, CPU, threads=threads) for threads in (1, 2))
    assert one.texts_per_second < two.texts_per_second
    assert one.latency_seconds > two.latency_seconds


def test_no_bfloat16_means_float32() -> None:
    plan = plan_inference(ServedModel.of(MINILM, "bf16"), TEXTS, T4)
    assert plan.precision == "fp32"
    assert not plan.is_calibrated


def test_only_what_was_measured_is_called_calibrated() -> None:
    tiles = replace(CPU, teraflops={"fp32": 0.4, "bf16": 6.4, "int8": 12.8})
    plans = [plan_inference(ServedModel.of(MINILM), TEXTS, each) for each in (CPU, tiles, T4)]
    assert [plan.is_calibrated for plan in plans] == [True, False, False]


def test_nothing_is_faster_than_the_limit() -> None:
    for runtime, precisions in PRECISIONS.items():
        for precision in precisions:
            for device in (CPU, T4):
                plan = plan_inference(ServedModel(MINILM, runtime, precision), TEXTS, device)
                assert 0 < plan.texts_per_second < plan.limit_texts_per_second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runtime": "tensorrt"}, "runtime = 'tensorrt'"),
        ({"precision": "int8_static"}, "precision = 'int8_static'"),
        ({"low_rank_share": 0.0}, "low_rank_share"),
        ({"zero_share": 1.0}, "zero_share"),
        ({"weight_bytes": 0}, "weight_bytes"),
        ({"matrix_sizes": 0}, "matrix_sizes"),
        ({"factorised": -1}, "factorised"),
    ],
)
def test_impossible_models_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServedModel(**{"shape": MINILM, **change})


def test_impossible_workloads_are_refused() -> None:
    model = ServedModel.of(MINILM)
    with pytest.raises(ConfigError, match="ask for nothing"):
        plan_inference(model, replace(TEXTS, texts=0), CPU)
    with pytest.raises(ConfigError, match="batch = 0"):
        plan_inference(model, replace(TEXTS, batch=0), CPU)
    with pytest.raises(ConfigError, match="threads = 3"):
        plan_inference(model, TEXTS, CPU, threads=3)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_device_has_a_finite_plan_of_every_preset(preset: str) -> None:
    shape = find_shape(preset)
    for device in load_catalogue().values():
        for precision in ("fp32", "int8_dynamic"):
            plan = plan_inference(ServedModel.of(shape, precision), InferenceWorkload(), device)
            assert 0 < plan.memory.total < math.inf
            assert 0 < plan.usd_per_million < math.inf
            assert 0 < plan.latency_seconds < math.inf


def test_a_machine_four_times_as_large_ranks_for_four_times_as_many_users() -> None:
    looked_up = replace(TEXTS, items=1_000, texts=0, candidates=20, history=10)
    large = replace(
        CPU,
        cores=8,
        bandwidth_gb_s=4 * CPU.bandwidth_gb_s,
        teraflops={name: 4 * rate for name, rate in CPU.teraflops.items()},
    )
    small, wide = (plan_inference(ServedModel.of(MINILM), looked_up, each) for each in (CPU, large))
    assert wide.recommendations_per_second == pytest.approx(4 * small.recommendations_per_second)
    one = plan_inference(ServedModel.of(MINILM), looked_up, CPU, threads=1)
    assert one.recommendations_per_second < small.recommendations_per_second

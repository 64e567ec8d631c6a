"""Plans of steps against the sizes of what the steps make, and against what must be larger."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recflow.compression.allocation import KeptParts
from recflow.compression.config import (
    DistillationConfig,
    LowRankConfig,
    PruningConfig,
    QuantizationConfig,
    SparsificationConfig,
    TrimmingConfig,
    VectorStoreConfig,
)
from recflow.compression.measure import MeasurementConfig
from recflow.compression.prune import prune_layer
from recflow.compression.student import build_student, choose_layers
from recflow.core.errors import ConfigError
from recflow.hardware.device import Device, Price
from recflow.hardware.plan import TrainingPlan
from recflow.hardware.shape import EncoderShape
from recflow.hardware.steps import _CHAIN, KINDS, child_shape, plan_step  # pyright: ignore[reportPrivateUsage]
from recflow.hardware.workload import TextLengths, TrainingWorkload
from recflow.modeling.adaptation_config import AdaptationConfig
from recflow.modeling.encoder import TextEncoder, load_pretrained
from recflow.modeling.ranker import count_parameters
from recflow_tests.unit.modeling.families import CONFIGS, write_family
from recflow_tests.unit.modeling.tiny import write_base_model

MACHINE = Device(
    name="cpu-small",
    label="A machine",
    kind="cpu",
    memory_gib=16,
    bandwidth_gb_s=20,
    teraflops={"fp32": 0.2, "bf16": 0.4},
    watts=100,
    host_memory_gib=16,
    cores=4,
    price=Price(0.1, "2025-01-01", "test"),
    source="test",
)
WORKLOAD = TrainingWorkload.typical(clicks=2_000, items=2_000, tokens=12.0)
MINI = EncoderShape.from_config(
    {
        "model_type": "bert",
        "vocab_size": 30_522,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1_536,
    }
)
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "adapt": asdict(AdaptationConfig()),
    "compressed": {},
    "distill": asdict(DistillationConfig()),
    "item_vectors": asdict(VectorStoreConfig()),
    "low_rank": asdict(LowRankConfig()),
    "measurements": asdict(MeasurementConfig()),
    "predictions": {"catalogue_sample": 1_000},
    "prune": asdict(PruningConfig()),
    "quantize": asdict(QuantizationConfig()),
    "sparsify": asdict(SparsificationConfig()),
    "trim": asdict(TrimmingConfig()),
}


def _plan(
    kind: str,
    parent: EncoderShape = MINI,
    workload: TrainingWorkload = WORKLOAD,
    device: Device = MACHINE,
    **values: Any,
) -> TrainingPlan:
    config = CONFIGURATIONS[kind] | values
    child = child_shape(kind, parent, config, workload)
    return plan_step(kind, parent, child, config, workload, device)


@pytest.fixture
def encoder(tmp_path: Path) -> TextEncoder:
    tokenizer = write_base_model(tmp_path / "base") / "tokenizer.json"
    return load_pretrained(write_family("bert", tmp_path / "bert", tokenizer))


PARENT = EncoderShape.from_config(CONFIGS["bert"]().to_dict())


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("width", [0, 16])
def test_a_student_has_the_weights_that_were_counted(
    encoder: TextEncoder, layers: int, width: int
) -> None:
    basis = torch.linalg.qr(torch.randn(32, 32)).Q[:, :width] if width else None
    student = build_student(encoder, choose_layers(3, layers), basis)
    shape = child_shape("distill", PARENT, asdict(DistillationConfig(layers=layers, width=width)))
    assert shape.parameters == count_parameters(student)
    assert shape.layers * shape.layer_parameters == count_parameters(student.layers)


def test_uniform_pruning_leaves_the_weights_that_were_counted(encoder: TextEncoder) -> None:
    config = PruningConfig(allocation="uniform", head_share=0.25, channel_share=0.5)
    shape = child_shape("prune", PARENT, asdict(config))
    for layer in range(3):
        prune_layer(encoder, layer, KeptParts(torch.arange(3), torch.arange(24)))
    assert (shape.heads, shape.channels) == (3, 24)
    assert shape.parameters == count_parameters(encoder)


def test_shares_of_weights_are_shares_of_the_matrices() -> None:
    pruned = child_shape("prune", MINI, asdict(PruningConfig(target_share=0.5)))
    factorised = child_shape("low_rank", MINI, asdict(LowRankConfig(ratio=0.5)))
    for shape in (pruned, factorised):
        assert shape.matrix_parameters == MINI.matrix_parameters / 2
    assert factorised.heads == MINI.heads


def test_trimming_keeps_common_tokens_those_of_the_texts_and_no_more_than_there_are() -> None:
    config = CONFIGURATIONS["trim"]
    small = child_shape("trim", MINI, config, replace(WORKLOAD, items=100))
    large = child_shape("trim", MINI, config, WORKLOAD)
    assert 5_000 < small.vocabulary < large.vocabulary < MINI.vocabulary
    few = MINI.scaled(vocabulary=300)
    assert child_shape("trim", few, config, WORKLOAD) == few


def test_every_kind_has_a_configuration_here() -> None:
    assert set(CONFIGURATIONS) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_needs_more_for_a_larger_encoder_and_takes_longer(kind: str) -> None:
    small, large = _plan(kind), _plan(kind, replace(MINI, layers=12))
    assert large.memory.total > small.memory.total
    assert large.seconds > small.seconds
    assert large.flops > small.flops
    assert small.memory == small.host_memory
    assert small.memory.total > 4 * MINI.parameters + small.memory.parts["context"]
    assert small.fits
    assert not replace(small, device=replace(MACHINE, memory_gib=0.5)).fits


@pytest.mark.parametrize("kind", ["distill", "prune", "low_rank", "sparsify", "adapt"])
def test_longer_texts_need_more_activations(kind: str) -> None:
    longer = replace(WORKLOAD, lengths=TextLengths.typical(40.0, 64))
    assert _plan(kind, workload=longer).memory.total > _plan(kind).memory.total


@pytest.mark.parametrize("kind", ["distill", "prune", "low_rank", "sparsify", "adapt"])
def test_float32_compiles_no_kernels(kind: str) -> None:
    plain = replace(MACHINE, teraflops={"fp32": 0.2})
    parts = _plan(kind, device=plain).memory.parts
    assert "kernels" not in parts
    assert _plan(kind).memory.parts["kernels"] > 0
    assert _plan(kind, device=plain).precision == "fp32"


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("distill", {"layers": 1}),
        ("prune", {"recovery_steps": 0}),
        ("low_rank", {"criterion": "energy", "recovery_steps": 0}),
        ("sparsify", {"score": "magnitude", "recovery_steps": 0}),
        ("quantize", {"precision": "bf16"}),
        ("measurements", {"models": 2}),
    ],
)
def test_less_to_do_needs_less(kind: str, values: dict[str, Any]) -> None:
    less = _plan(kind, **values)
    assert less.memory.total < _plan(kind).memory.total
    assert less.seconds < _plan(kind).seconds


def test_training_stages_are_repeated_as_configured() -> None:
    recovery = _plan("prune", recovery_steps=37).stage("recovery")
    assert recovery is not None
    assert recovery.repeats == 37
    texts = _plan("distill", epochs=2, batch_size=50).stage("learning from texts")
    assert texts is not None
    assert texts.repeats == 80
    assert _plan("distill", click_steps=0).stage("learning from clicks") is None


def test_a_search_needs_what_its_steps_need() -> None:
    whole = _plan("compressed").memory.total
    assert whole >= max(_plan(kind).memory.total for kind in ("distill", "prune", "quantize"))


def test_unknown_steps_and_gpus_are_refused() -> None:
    gpu = replace(MACHINE, name="some-gpu", kind="gpu")
    with pytest.raises(ConfigError, match=r"some-gpu.*processors"):
        _plan("trim", device=gpu)
    with pytest.raises(ConfigError, match=r"step.*'shrink'.*distill"):
        child_shape("shrink", MINI, {})
    with pytest.raises(ConfigError, match=r"step.*'shrink'.*quantize"):
        plan_step("shrink", MINI, MINI, {}, WORKLOAD, MACHINE)


def test_memory_says_when_the_peak_is() -> None:
    # What statistics and recovery have freed is still resident when accuracies are measured.
    assert _plan("low_rank").memory.moment == "validation"
    assert _plan("low_rank").memory.parts["freed"] > 8 * 2 * MINI.layers * MINI.channels**2
    few = replace(WORKLOAD, validation_impressions=100)
    assert _plan("quantize", workload=few).memory.moment == "observing"
    assert _plan("quantize", workload=few, precision="fp16").memory.moment == "graph"


def test_the_chain_of_a_search_has_the_defaults_of_its_steps() -> None:
    expected = {
        "distill": asdict(DistillationConfig(layers=4)),
        "prune": asdict(PruningConfig(target_share=0.6)),
        "trim": asdict(TrimmingConfig()),
        "quantize": asdict(QuantizationConfig(precision="int8_static")),
    }
    assert set(_CHAIN) == set(expected)
    for kind, values in _CHAIN.items():
        assert dict(values) == {key: expected[kind][key] for key in values}

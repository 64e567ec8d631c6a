import dataclasses
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from recflow.compression import quantize
from recflow.compression.config import PRECISIONS, QuantizationConfig
from recflow.compression.quantize import QuantizationReport, quantize_ranker
from recflow.core.errors import ArtifactError, ConfigError, ParityError
from recflow.modeling.encoder import TextEncoder, build_encoder, describe_encoder, load_pretrained
from recflow.modeling.layout import read_ranker_config
from recflow.modeling.ranker import load_encoder, load_parts, load_ranker, save_ranker
from recflow.modeling.tracking import NullTracker
from recflow.modeling.trainer import TrainingReport
from recflow_tests.unit.compression.rankers import ranker_of_family
from recflow_tests.unit.modeling.families import CONFIGS

# Of 32 channels, a few that turn weigh more than of the hundreds of a real encoder.
QUICK = QuantizationConfig(
    sample_texts=40, calibration_texts=40, padding_tolerance=0.1, min_mean_cosine=0.9, threads=1
)


class Quantize(Protocol):
    """Quantizes in the toy world."""

    def __call__(self, parent: Path, output: Path, **changes: Any) -> QuantizationReport: ...


@pytest.fixture(scope="module")
def quantize_tiny(items: pl.DataFrame, train: pl.DataFrame, validation: pl.DataFrame) -> Quantize:
    def quantized(parent: Path, output: Path, **changes: Any) -> QuantizationReport:
        output.mkdir(exist_ok=True)
        arguments = {"items": items, "train": train, "validation": validation}
        known = {key: changes.pop(key, value) for key, value in arguments.items()}
        return quantize_ranker(
            parent=parent,
            output=output,
            config=dataclasses.replace(QUICK, **changes),
            tracker=NullTracker(),
            **known,
        )

    return quantized


@pytest.fixture(scope="module")
def int8(
    tmp_path_factory: pytest.TempPathFactory,
    trained: tuple[Path, TrainingReport],
    quantize_tiny: Quantize,
) -> tuple[Path, QuantizationReport]:
    output = tmp_path_factory.mktemp("int8")
    return output, quantize_tiny(trained[0], output)


def scores(path: Path, items: pl.DataFrame, impressions: pl.DataFrame) -> np.ndarray:
    scorer = load_ranker(path, threads=1).scorer("x", items)
    return scorer.score(impressions).explode().to_numpy()


@pytest.mark.parametrize(
    ("precision", "least_cosine", "largest_share"),
    [
        ("fp32", 0.99999, 2.0),  # the tiny graph is mostly names of operators
        ("fp16", 0.9999, 1.5),
        ("bf16", 0.999, 0.6),
        ("int8_dynamic", 0.99, 1.5),
        ("int8_static", 0.99, 1.5),
        ("int4", 0.93, 1.5),
    ],
)
def test_every_precision_scores_like_its_parent(
    trained: tuple[Path, TrainingReport],
    quantize_tiny: Quantize,
    items: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
    precision: str,
    least_cosine: float,
    largest_share: float,
) -> None:
    report = quantize_tiny(trained[0], tmp_path, precision=precision)
    assert report.precision == precision == read_ranker_config(tmp_path)["precision"]
    assert least_cosine < report.mean_cosine < 1.00001
    assert report.min_cosine <= report.mean_cosine
    assert report.parity_max_difference < 1e-5
    assert report.validation_auc == pytest.approx(report.parent_validation_auc, abs=0.05)
    assert report.bytes < largest_share * report.parent_bytes
    assert np.corrcoef(*(scores(p, items, validation) for p in (trained[0], tmp_path)))[0, 1] > 0.9
    json.dumps(dataclasses.asdict(report))


def test_all_precisions_are_tested_above() -> None:
    marks = test_every_precision_scores_like_its_parent.pytestmark  # type: ignore[attr-defined]
    assert {row[0] for row in marks[0].args[1]} == set(PRECISIONS)


def test_the_report_tells_what_was_compared(int8: tuple[Path, QuantizationReport]) -> None:
    path, report = int8
    assert report.parity_cases == 10  # three batch sizes: short, long and mixed; the extremes
    assert 0 < report.padding_difference < 0.1  # the scale is the whole batch's
    assert report.bytes == (path / "model.onnx").stat().st_size


def test_static_ranges_make_vectors_independent_of_the_batch(
    trained: tuple[Path, TrainingReport], quantize_tiny: Quantize, tmp_path: Path
) -> None:
    report = quantize_tiny(
        trained[0], tmp_path, precision="int8_static", calibration="percentile", smoothing=0.0
    )
    assert report.padding_difference < 1e-5


def test_bfloat16_is_stored_and_held_as_such(
    trained: tuple[Path, TrainingReport], quantize_tiny: Quantize, tmp_path: Path
) -> None:
    quantize_tiny(trained[0], tmp_path, precision="bf16")
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    encoder = load_encoder(tmp_path, read_ranker_config(tmp_path))
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    runtime = load_ranker(tmp_path, threads=1)._runtime
    held = runtime._encoder.layers[0].output.dense.weight.dtype  # type: ignore[attr-defined]
    assert held == (torch.bfloat16 if native else torch.float32)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_exported_and_loaded(
    trained: tuple[Path, TrainingReport],
    base_model: Path,
    quantize_tiny: Quantize,
    items: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
    family: str,
) -> None:
    parent = ranker_of_family(family, trained[0], base_model, tmp_path, adapters=True)
    output = tmp_path / "quantized"
    report = quantize_tiny(parent, output)
    assert report.parity_max_difference < 1e-5
    found = [scores(path, items, validation) for path in (parent, output)]
    assert np.corrcoef(*found)[0, 1] > 0.95


def composed(trained: Path, base_model: Path, folder: Path) -> TextEncoder:
    """What a chain leaves: one pruned, narrow, half-empty layer, low ranks, a projection."""
    description = describe_encoder(load_pretrained(base_model))
    description["transformer"] |= {
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
    }
    description["layers"] = [{"heads": 1, "channels": 24}]
    description["projection"] = 32
    description["ranks"] = {"encoder.layer.0.attention.self.query": 4}
    encoder = build_encoder(description)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(std=0.3, generator=generator)
        for module in encoder.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
        encoder.layers[0].intermediate.dense.weight[:, ::2] = 0.0
    parts = load_parts(trained, read_ranker_config(trained))
    save_ranker(folder, encoder, base_model / "tokenizer.json", parts)
    return encoder


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_the_other_steps_write_is_accepted(
    trained: tuple[Path, TrainingReport],
    base_model: Path,
    quantize_tiny: Quantize,
    items: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
    precision: str,
) -> None:
    parent, output = tmp_path / "parent", tmp_path / "output"
    parent.mkdir()
    composed(trained[0], base_model, parent)
    quantize_tiny(parent, output, precision=precision)
    assert len(scores(output, items, validation)) == 5 * len(validation)


def test_quantizing_twice_gives_the_same_bytes(
    int8: tuple[Path, QuantizationReport],
    trained: tuple[Path, TrainingReport],
    quantize_tiny: Quantize,
    tmp_path: Path,
) -> None:
    quantize_tiny(trained[0], tmp_path)
    for file in int8[0].iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    "limits",
    [
        {"parity_tolerance": 1e-12},
        {"padding_tolerance": 1e-9},
        {"min_mean_cosine": 1.0},
        {"min_cosine": 1.0},
        {"precision": "int4", "min_cosine": 0.9999},
        {"precision": "bf16", "min_mean_cosine": 1.0},
    ],
)
def test_nothing_is_written_when_a_limit_is_broken(
    trained: tuple[Path, TrainingReport],
    quantize_tiny: Quantize,
    tmp_path: Path,
    limits: dict[str, Any],
) -> None:
    with pytest.raises(ParityError):
        quantize_tiny(trained[0], tmp_path, **limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("defect", ["mask", "weight"])
def test_a_broken_export_is_not_written(
    trained: tuple[Path, TrainingReport],
    quantize_tiny: Quantize,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    defect: str,
) -> None:
    whole = quantize.export_encoder

    def broken(encoder: TextEncoder) -> bytes:
        model = onnx.load_model_from_string(whole(encoder))
        if defect == "mask":
            for node in model.graph.node:
                if node.op_type == "MultiHeadAttention":
                    node.input[4] = ""
        else:
            bias = next(t for t in model.graph.initializer if list(t.dims) == [64])
            values = onnx.numpy_helper.to_array(bias) + np.float32(0.5)
            bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        return model.SerializeToString()

    monkeypatch.setattr(quantize, "export_encoder", broken)
    with pytest.raises(ParityError, match="differs from PyTorch"):
        quantize_tiny(trained[0], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_quantization_is_not_written(
    trained: tuple[Path, TrainingReport],
    quantize_tiny: Quantize,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = quantize.quantize_graph

    def broken(*arguments: Any) -> bytes:
        model = onnx.load_model_from_string(whole(*arguments))
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT8 and list(tensor.dims) == [64, 32]:
                flipped = -onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(flipped, tensor.name))
        return model.SerializeToString()

    monkeypatch.setattr(quantize, "quantize_graph", broken)
    with pytest.raises(ParityError, match="int8_dynamic have a mean cosine"):
        quantize_tiny(trained[0], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["int8_dynamic", "bf16"])
def test_a_quantized_parent_is_refused_before_work(
    trained: tuple[Path, TrainingReport],
    quantize_tiny: Quantize,
    tmp_path: Path,
    precision: str,
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    quantize_tiny(trained[0], first, precision=precision)
    for file in first.glob("model.*"):
        file.unlink()  # refused by its description, before any weight is read
    with pytest.raises(ConfigError, match=f"a ranker in {precision}.*quantization comes last"):
        quantize_tiny(first, second)
    assert list(second.iterdir()) == []


def test_no_texts_is_an_error(
    trained: tuple[Path, TrainingReport],
    quantize_tiny: Quantize,
    train: pl.DataFrame,
    tmp_path: Path,
) -> None:
    with pytest.raises(ArtifactError, match="no item texts"):
        quantize_tiny(trained[0], tmp_path, train=train.clear())


def test_damaged_graphs_are_refused(int8: tuple[Path, QuantizationReport], tmp_path: Path) -> None:
    for file in int8[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"broken")
    with pytest.raises(ArtifactError, match="not a usable ONNX model"):
        load_ranker(tmp_path)
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        load_ranker(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("precision", "int3"),
        ("calibration", "entropy"),
        ("parity_tolerance", 0),
        ("padding_tolerance", 1.0),
        ("min_mean_cosine", 0),
        ("min_cosine", 1.5),
        ("smoothing", 1.0),
        ("block_size", 24),
        ("sample_texts", 0),
        ("calibration_texts", 0),
        ("threads", 0),
        ("seed", -1),
    ],
)
def test_impossible_configuration_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        QuantizationConfig(**{key: value})

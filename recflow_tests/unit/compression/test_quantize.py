import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import polars as pl
import pytest
import torch

from recflow.compression.quantize import (
    QuantizationConfig,
    QuantizationReport,
    check_parity,
    export_encoder,
    quantize_ranker,
)
from recflow.core.errors import ArtifactError, ConfigError, ParityError
from recflow.modeling.encoder import TorchRuntime, load_pretrained
from recflow.modeling.onnx_runtime import OnnxRuntime
from recflow.modeling.ranker import load_ranker
from recflow.modeling.trainer import TrainingReport
from recflow_tests.unit.compression.rankers import ranker_of_family
from recflow_tests.unit.modeling.families import CONFIGS

QUICK = QuantizationConfig(sample_texts=40, threads=1)


@pytest.fixture(scope="module")
def quantized(
    tmp_path_factory: pytest.TempPathFactory,
    trained: tuple[Path, TrainingReport],
    items: pl.DataFrame,
) -> tuple[Path, QuantizationReport]:
    output = tmp_path_factory.mktemp("quantized")
    return output, quantize_ranker(parent=trained[0], output=output, items=items, config=QUICK)


def test_int8_vectors_stay_close(quantized: tuple[Path, QuantizationReport]) -> None:
    path, report = quantized
    assert report.parity_cases == 10  # three batch sizes: short, long and mixed; the extremes
    assert report.parity_max_difference < 1e-5
    assert report.mean_cosine > 0.99
    assert report.min_cosine <= report.mean_cosine
    assert report.bytes == (path / "model.onnx").stat().st_size
    json.dumps(dataclasses.asdict(report))


def test_weights_are_int8_per_channel(quantized: tuple[Path, QuantizationReport]) -> None:
    graph = onnx.load(quantized[0] / "model.onnx").graph
    operators = {node.op_type for node in graph.node}
    assert "MatMulInteger" in operators
    assert "MatMul" in operators  # attention scores: activations times activations
    matrices = {t.name: t for t in graph.initializer if t.data_type == onnx.TensorProto.INT8}
    scales = {t.name: t for t in graph.initializer if t.name.endswith("_scale")}
    per_channel = [name for name, t in scales.items() if t.dims and t.dims[0] > 1]
    assert len(matrices) >= 12  # six matrices in each of two layers
    assert len(per_channel) >= 12


def test_the_quantized_ranker_scores_like_its_parent(
    quantized: tuple[Path, QuantizationReport],
    trained: tuple[Path, TrainingReport],
    items: pl.DataFrame,
    validation: pl.DataFrame,
) -> None:
    scores = [
        load_ranker(path, threads=1).scorer("x", items).score(validation).explode().to_numpy()
        for path in (trained[0], quantized[0])
    ]
    assert np.corrcoef(*scores)[0, 1] > 0.99


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_exported_and_loaded(
    trained: tuple[Path, TrainingReport],
    base_model: Path,
    items: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
    family: str,
) -> None:
    parent = ranker_of_family(family, trained[0], base_model, tmp_path, adapters=True)
    output = tmp_path / "quantized"
    output.mkdir()
    report = quantize_ranker(parent=parent, output=output, items=items, config=QUICK)
    assert report.parity_max_difference < 1e-5
    scores = [
        load_ranker(path, threads=1).scorer("x", items).score(validation).explode().to_numpy()
        for path in (parent, output)
    ]
    assert np.corrcoef(*scores)[0, 1] > 0.95


def test_quantizing_twice_gives_the_same_bytes(
    quantized: tuple[Path, QuantizationReport],
    trained: tuple[Path, TrainingReport],
    items: pl.DataFrame,
    tmp_path: Path,
) -> None:
    quantize_ranker(parent=trained[0], output=tmp_path, items=items, config=QUICK)
    for file in quantized[0].iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_export_leaves_the_encoder_without_dropout(base_model: Path) -> None:
    encoder = load_pretrained(base_model)
    tokens = [[2, 7, 8, 9, 3]]
    before = TorchRuntime(encoder, 1, mixed=False)(tokens)
    export_encoder(encoder)
    assert not any(module.training for module in encoder.modules())
    with torch.inference_mode():
        after = encoder(torch.tensor(tokens), torch.ones(1, 5, dtype=torch.bool)).numpy()
    np.testing.assert_allclose(before, after, atol=1e-6)


def test_padding_does_not_reach_the_exported_vectors(base_model: Path) -> None:
    exported = OnnxRuntime(export_encoder(load_pretrained(base_model)), 1)
    short, long = [2, 7, 3], [2, *range(5, 14), 3]
    np.testing.assert_allclose(exported([short, long])[0], exported([short])[0], atol=1e-6)


def test_an_export_of_other_weights_is_refused(base_model: Path) -> None:
    encoder = load_pretrained(base_model)
    exported = OnnxRuntime(export_encoder(encoder), 1)
    with torch.no_grad():
        encoder.layers[1].output.dense.weight.add_(0.1 * torch.eye(32, 64))
    with pytest.raises(ParityError, match=r"for 2 texts of \[3, 4\] tokens"):
        check_parity(encoder, exported, [[[2, 7, 3], [2, 7, 8, 3]]], 1e-4)


@pytest.mark.parametrize("limits", [{"parity_tolerance": 1e-12}, {"min_cosine": 1.0}])
def test_nothing_is_written_without_parity(
    trained: tuple[Path, TrainingReport],
    items: pl.DataFrame,
    tmp_path: Path,
    limits: dict[str, float],
) -> None:
    config = dataclasses.replace(QUICK, **limits)
    with pytest.raises(ParityError):
        quantize_ranker(parent=trained[0], output=tmp_path, items=items, config=config)
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_parent_is_refused(
    quantized: tuple[Path, QuantizationReport], items: pl.DataFrame, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="a torch one is needed"):
        quantize_ranker(parent=quantized[0], output=tmp_path, items=items, config=QUICK)


def test_no_texts_is_an_error(
    trained: tuple[Path, TrainingReport], items: pl.DataFrame, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="no item texts"):
        quantize_ranker(parent=trained[0], output=tmp_path, items=items.clear(), config=QUICK)


def test_damaged_graphs_are_refused(
    quantized: tuple[Path, QuantizationReport], tmp_path: Path
) -> None:
    for file in quantized[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"broken")
    with pytest.raises(ArtifactError, match="not a usable ONNX model"):
        load_ranker(tmp_path)
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        load_ranker(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("parity_tolerance", 0), ("min_cosine", 1.5), ("sample_texts", 0)]
)
def test_impossible_configuration_is_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=key):
        QuantizationConfig(**{key: value})  # type: ignore[arg-type]

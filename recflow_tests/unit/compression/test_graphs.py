from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, numpy_helper

from recflow.compression import graphs
from recflow.compression.export import export_encoder
from recflow.modeling.encoder import load_pretrained
from recflow.modeling.onnx_runtime import OnnxRuntime
from recflow.modeling.texts import Vectors

TEXTS = [[2, 7, 3], [2, 7, 8, 3], [2, *range(5, 14), 3], [2, 9, 3], [2, 20, 30, 11, 3]]


@pytest.fixture(scope="module")
def exported(base_model: Path) -> bytes:
    return export_encoder(load_pretrained(base_model))


def load(exported: bytes) -> ModelProto:
    return onnx.load_model_from_string(exported)


def vectors(model: ModelProto) -> Vectors:
    return OnnxRuntime(model.SerializeToString(), 1)(TEXTS)


def constants(model: ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def operators(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_observed_ranges_leave_the_padding_out(exported: bytes) -> None:
    model = load(exported)
    alone = graphs.observe(model, [[text] for text in TEXTS], threads=1)
    padded = graphs.observe(model, [TEXTS], threads=1)
    assert len(alone) == 8  # four inputs of matrices in each of two layers
    for name, seen in alone.items():
        np.testing.assert_allclose(padded[name].channels, seen.channels, atol=1e-5)
        assert padded[name].low == pytest.approx(seen.low, abs=1e-5)
        assert padded[name].high == pytest.approx(seen.high, abs=1e-5)
        assert seen.low <= 0 <= seen.high


def test_percentiles_are_narrower_than_all_values(exported: bytes) -> None:
    model = load(exported)
    everything = graphs.observe(model, [TEXTS], threads=1)
    most = graphs.observe(model, [TEXTS], threads=1, percentile=True)
    for name, seen in everything.items():
        assert seen.low <= most[name].low <= most[name].high <= seen.high
    assert any(most[name].high < seen.high for name, seen in everything.items())


def test_smoothing_changes_no_vector_and_evens_out_the_channels(exported: bytes) -> None:
    model = load(exported)
    before = graphs.observe(model, [TEXTS], threads=1)
    graphs.smooth(model, before, 0.65)
    np.testing.assert_allclose(vectors(model), vectors(load(exported)), atol=1e-5)
    after = graphs.observe(model, [TEXTS], threads=1)

    def unevenness(channels: np.ndarray) -> float:
        return float(channels.max() / np.median(channels))

    assert len(after) == len(before)
    assert np.mean([unevenness(seen.channels) for seen in after.values()]) < np.mean(
        [unevenness(seen.channels) for seen in before.values()]
    )


def test_tables_have_a_scale_for_each_row(exported: bytes) -> None:
    model = load(exported)
    graphs.quantize_tables(model)
    tensors = constants(model)
    rows = {name: t for name, t in tensors.items() if name.endswith("_rows")}
    assert len(rows) == 3  # tokens, positions, token types
    for name, values in rows.items():
        table = name.removesuffix("_rows")
        assert values.dtype == np.int8
        assert tensors[f"{table}_scales"].shape == (len(values), 1)
        assert table not in tensors
        used = np.abs(values).max(axis=1)
        assert set(used[used > 0]) == {127}  # each row fills the range: no row widens another's
    cosines = np.einsum("ij,ij->i", vectors(model), vectors(load(exported)))
    assert cosines.min() > 0.999


def test_halves_are_stored_and_computed_in_float32(exported: bytes) -> None:
    model = load(exported)
    graphs.store_halves(model)
    large = [t for t in model.graph.initializer if len(t.dims) == 2]
    assert {t.data_type for t in large} == {TensorProto.FLOAT16}
    assert len(model.SerializeToString()) < 0.75 * len(exported)
    np.testing.assert_allclose(vectors(model), vectors(load(exported)), atol=1e-3)


def test_dynamic_weights_are_int8_per_channel_and_attention_stays_float(exported: bytes) -> None:
    model = graphs.quantize_dynamically(load(exported))
    tensors = constants(model)
    kinds = operators(model)
    products = [node for node in model.graph.node if node.op_type == "MatMulInteger"]
    assert len(products) == 8
    for node in products:
        matrix = tensors[node.input[1]]
        assert matrix.dtype == np.int8
        scale = tensors[node.input[1].replace("_quantized", "_scale")]
        assert scale.shape == (matrix.shape[1],)  # one for the whole matrix lost several times more
    assert kinds.count("MultiHeadAttention") == 2
    assert "QAttention" not in kinds
    assert "MatMul" not in kinds


def test_static_weights_are_int8_per_channel_and_ranges_are_constants(exported: bytes) -> None:
    model = load(exported)
    seen = graphs.observe(model, [TEXTS], threads=1)
    graphs.quantize_statically(model, seen)
    tensors = constants(model)
    int8 = {name: t for name, t in tensors.items() if t.dtype == np.int8 and t.ndim == 2}
    assert len(int8) == 8
    for name, matrix in int8.items():
        scales = tensors[name.replace("_int8", "_scale")]
        assert scales.shape == (matrix.shape[1],)
        assert len(set(scales.tolist())) > 1
    assert operators(model).count("QuantizeLinear") == 8
    cosines = np.einsum("ij,ij->i", vectors(model), vectors(load(exported)))
    assert cosines.min() > 0.98


def test_static_vectors_do_not_depend_on_the_other_texts(exported: bytes) -> None:
    model = load(exported)
    graphs.quantize_statically(model, graphs.observe(model, [TEXTS], threads=1))
    runtime = OnnxRuntime(model.SerializeToString(), 1)
    np.testing.assert_allclose(runtime(TEXTS)[0], runtime(TEXTS[:1])[0], atol=1e-5)


@pytest.mark.parametrize("block_size", [16, 32])
def test_four_bits_by_blocks(exported: bytes, block_size: int) -> None:
    model = graphs.quantize_blocks(load(exported), block_size)
    blocks = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert len(blocks) == 8
    attributes = {a.name: a.i for a in blocks[0].attribute}
    assert (attributes["bits"], attributes["block_size"]) == (4, block_size)
    cosines = np.einsum("ij,ij->i", vectors(model), vectors(load(exported)))
    assert 0.9 < cosines.min() < 0.9999


@given(
    st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), min_size=1),
    st.sampled_from([0, 1]),
)
def test_rounding_is_off_by_half_a_step_at_most(values: list[list[float]], axis: int) -> None:
    matrix = np.array(values, np.float32)
    scales = graphs._scales(matrix, axis)
    rounded = graphs._rounded(matrix, scales)
    assert (np.abs(rounded * scales - matrix) <= 0.501 * scales + 1e-6).all()

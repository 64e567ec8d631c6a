from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from recflow.compression.export import check_padding, check_parity, export_encoder, parity_cases
from recflow.core.errors import ParityError
from recflow.modeling.encoder import TextEncoder, TorchRuntime, load_pretrained
from recflow.modeling.onnx_runtime import OnnxRuntime
from recflow.modeling.texts import Vectors, pad_tokens

TEXTS = [[2, 7, 3], [2, 7, 8, 3], [2, *range(5, 14), 3], [2, 9, 3]]


class Runtime:
    """An encoder that is whatever the function says."""

    dimension = 32

    def __init__(self, encoder: TextEncoder, *, blind: bool) -> None:
        self._encoder, self._blind = encoder, blind

    def __call__(self, tokens: list[list[int]]) -> Vectors:
        ids, mask = (torch.from_numpy(array) for array in pad_tokens(tokens))
        with torch.inference_mode():
            return self._encoder(ids, torch.ones_like(mask) if self._blind else mask).numpy()


def graph_of(exported: bytes) -> onnx.GraphProto:
    return onnx.load_model_from_string(exported).graph


def test_the_export_equals_pytorch_on_batches_of_all_sizes(base_model: Path) -> None:
    encoder = load_pretrained(base_model)
    exported = OnnxRuntime(export_encoder(encoder), 1)
    assert check_parity(encoder, exported, parity_cases(TEXTS * 20), 1e-5) < 1e-5


def test_a_model_equals_itself(base_model: Path) -> None:
    encoder = load_pretrained(base_model)
    runtime = TorchRuntime(encoder, 1, mixed=False)
    before = runtime(TEXTS)
    export_encoder(encoder)
    cosines = np.einsum("ij,ij->i", before, runtime(TEXTS))
    np.testing.assert_allclose(cosines, 1.0, atol=1e-6)


def test_export_leaves_the_encoder_without_dropout(base_model: Path) -> None:
    encoder = load_pretrained(base_model)
    tokens = [[2, 7, 8, 9, 3]]
    before = TorchRuntime(encoder, 1, mixed=False)(tokens)
    export_encoder(encoder)
    assert not any(module.training for module in encoder.modules())
    with torch.inference_mode():
        after = encoder(torch.tensor(tokens), torch.ones(1, 5, dtype=torch.bool)).numpy()
    np.testing.assert_allclose(before, after, atol=1e-6)


def test_an_encoder_in_training_mode_is_exported_without_dropout(base_model: Path) -> None:
    encoder = load_pretrained(base_model)
    expected = TorchRuntime(encoder, 1, mixed=False)(TEXTS)
    encoder.train()
    exported = OnnxRuntime(export_encoder(encoder), 1)
    np.testing.assert_allclose(exported(TEXTS), expected, atol=1e-5)


def test_attention_of_bert_is_one_operator_over_one_joint_projection(base_model: Path) -> None:
    graph = graph_of(export_encoder(load_pretrained(base_model)))
    operators = [node.op_type for node in graph.node]
    assert operators.count("MultiHeadAttention") == 2
    assert "Softmax" not in operators
    constants = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    products = [constants[n.input[1]] for n in graph.node if n.op_type == "MatMul"]
    assert products == [[32, 96], [32, 32], [32, 64], [64, 32]] * 2


@pytest.mark.parametrize("exported", [False, True])
def test_padding_does_not_reach_a_vector(base_model: Path, exported: bool) -> None:
    encoder = load_pretrained(base_model)
    runtime = (
        OnnxRuntime(export_encoder(encoder), 1)
        if exported
        else TorchRuntime(encoder, 1, mixed=False)
    )
    assert check_padding(runtime, "it", TEXTS, 1e-5) < 1e-5


def test_a_runtime_that_ignores_the_mask_is_refused(base_model: Path) -> None:
    encoder = load_pretrained(base_model)
    check_padding(Runtime(encoder, blind=False), "it", TEXTS, 1e-5)
    with pytest.raises(ParityError, match="in it, padding turns the vector of a text of 3 tokens"):
        check_padding(Runtime(encoder, blind=True), "it", TEXTS, 0.01)


def test_vectors_that_are_no_numbers_are_refused(base_model: Path) -> None:
    encoder = load_pretrained(base_model)
    with torch.no_grad():
        encoder.layers[0].output.dense.weight.fill_(torch.nan)
    with pytest.raises(ParityError, match="padding"):
        check_padding(TorchRuntime(encoder, 1, mixed=False), "it", TEXTS, 0.5)


def test_an_export_of_other_weights_is_refused(base_model: Path) -> None:
    encoder = load_pretrained(base_model)
    exported = OnnxRuntime(export_encoder(encoder), 1)
    with torch.no_grad():
        encoder.layers[1].output.dense.weight.add_(0.1 * torch.eye(32, 64))
    with pytest.raises(ParityError, match=r"for 2 texts of \[3, 4\] tokens"):
        check_parity(encoder, exported, [[[2, 7, 3], [2, 7, 8, 3]]], 1e-4)


def test_an_export_whose_attention_sees_padding_is_refused(base_model: Path) -> None:
    encoder = load_pretrained(base_model)
    model = onnx.load_model_from_string(export_encoder(encoder))
    attention = [node for node in model.graph.node if node.op_type == "MultiHeadAttention"]
    for node in attention:
        node.input[4] = ""  # the key padding mask
    blind = OnnxRuntime(model.SerializeToString(), 1)
    check_parity(encoder, blind, [[TEXTS[0]]], 1e-5)  # without padding nobody would notice
    with pytest.raises(ParityError, match="differs from PyTorch"):
        check_parity(encoder, blind, parity_cases(TEXTS), 1e-4)


def test_one_altered_weight_is_noticed(base_model: Path) -> None:
    encoder = load_pretrained(base_model)
    model = onnx.load_model_from_string(export_encoder(encoder))
    tensor = next(t for t in model.graph.initializer if list(t.dims) == [64, 32])
    values = numpy_helper.to_array(tensor).copy()
    values[3, 5] += 1.0
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(ParityError, match="differs from PyTorch"):
        check_parity(encoder, OnnxRuntime(model.SerializeToString(), 1), parity_cases(TEXTS), 1e-4)

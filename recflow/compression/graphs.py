"""Rewrite an ONNX graph: other numbers for its weights and activations, the same function.

Only products with a constant matrix are quantized. The scores and probabilities of attention are
products of two activations; they, softmax, layer normalisation, pooling and the unit length stay in
float32: they cost little, and 8 bits there cost accuracy. Scales of weights are per channel (of
embeddings per row, so per token): one for a whole matrix lost several times more accuracy.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from recflow.modeling.onnx_runtime import INPUT_NAMES
from recflow.modeling.texts import pad_tokens

Floats = NDArray[np.float32]

_SMALLEST: Final = 1e-8
_NARROWEST_TABLE: Final = 16
_LEAST_SMOOTHING: Final = 0.1
_PERCENTILE: Final = 99.99
_SAMPLED_VALUES: Final = 200_000


@dataclass(frozen=True, slots=True)
class Activations:
    """What was seen of one activation where there are tokens.

    Attributes:
        channels: Largest size of each channel, float32 ``[width]``.
        low: Smallest value, at most 0.
        high: Largest value, at least 0.
    """

    channels: Floats
    low: float
    high: float


def observe(
    model: ModelProto, batches: Iterable[list[list[int]]], *, threads: int, percentile: bool = False
) -> dict[str, Activations]:
    """What goes into the products with constant matrices, on real texts.

    Args:
        model: Float32 graph of an encoder.
        batches: Token ids; what stands at padding is left out.
        threads: Threads of an operator.
        percentile: Take the ranges to hold 99.99 % of the values instead of all.
    """
    watched = list(_products(model))
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    observed.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in watched)
    options = onnxruntime.SessionOptions()
    # Optimised, an activation might be gone.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        observed.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    seen: dict[str, list[Activations]] = {name: [] for name in watched}
    for batch in batches:
        ids, mask = pad_tokens(batch)
        feed = dict(zip(INPUT_NAMES, (ids, mask.astype(ids.dtype)), strict=True))
        for name, value in zip(
            watched, cast("list[Floats]", session.run(watched, feed)), strict=True
        ):
            rows = value[mask] if value.shape[:2] == mask.shape else value
            seen[name].append(_summary(rows.reshape(-1, rows.shape[-1]), percentile))
    return {
        name: Activations(
            channels=np.max([part.channels for part in parts], axis=0),
            low=min(part.low for part in parts),
            high=max(part.high for part in parts),
        )
        for name, parts in seen.items()
    }


def _summary(rows: Floats, percentile: bool) -> Activations:
    low, high = float(rows.min()), float(rows.max())
    if percentile:
        some = rows.ravel()[:: max(1, rows.size // _SAMPLED_VALUES)]
        low, high = np.percentile(some, [100 - _PERCENTILE, _PERCENTILE]).tolist()
    return Activations(np.abs(rows).max(axis=0), min(low, 0.0), max(high, 0.0))


def smooth(model: ModelProto, activations: Mapping[str, Activations], strength: float) -> None:
    """Move what few large channels of the activations cost in precision into the weights.

    A channel is divided by ``max|activation| ** strength / max|weight| ** (1 - strength)`` and its
    row of the matrix multiplied by it: the product stays the same, but one scale fits all channels.
    Source: SmoothQuant, Xiao et al. 2023, https://arxiv.org/abs/2211.10438.

    Args:
        model: Changed in place.
        activations: Of :func:`observe`.
        strength: Above 0, to 1, where all channels become equally large.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    users = Counter(name for node in model.graph.node for name in node.input)
    smoothed: set[str] = set()
    for name, nodes in _products(model).items():
        if any(users[node.input[1]] > 1 for node in nodes):
            continue  # another product with the same matrix reads another activation
        matrices = [numpy_helper.to_array(weights[node.input[1]]) for node in nodes]
        largest = np.max([np.abs(matrix).max(axis=1) for matrix in matrices], axis=0)
        factors = np.maximum(activations[name].channels, 1e-5) ** strength
        factors /= np.maximum(largest, 1e-5) ** (1 - strength)
        # Channels that are nearly always zero would be blown up with whatever they hold elsewhere.
        factors = np.maximum(factors / np.median(factors), _LEAST_SMOOTHING).astype(np.float32)
        for node, matrix in zip(nodes, matrices, strict=True):
            _store(weights[node.input[1]], matrix * factors[:, None])
            node.input[0] = f"{name}_smooth"
        model.graph.initializer.append(_tensor(f"{name}_smoothing", 1 / factors))
        smoothed.add(name)
    new: list[NodeProto] = []
    for node in model.graph.node:
        divided = [name for name in node.output if name in smoothed]
        new.append(node)
        new += [_node("Mul", [name, f"{name}_smoothing"], f"{name}_smooth") for name in divided]
    _replace_nodes(model, new)


def quantize_tables(model: ModelProto) -> None:
    """Embedding tables in int8 with a scale for each row; changes ``model`` in place.

    ONNX Runtime's own quantization gives a table one scale; one outlying token widens it for all.
    """
    tables = _tables(model)
    for tensor in _tensors(model, tables):
        values = numpy_helper.to_array(tensor)
        scales = _scales(values, axis=1)
        model.graph.initializer.extend(
            [
                _tensor(f"{tensor.name}_rows", _rounded(values, scales)),
                _tensor(f"{tensor.name}_scales", scales),
            ]
        )

    def gather(node: NodeProto) -> list[NodeProto]:
        table, rows, vectors = node.input[0], node.input[1], node.output[0]
        return [
            _node("Gather", [f"{table}_rows", rows], f"{vectors}_rows"),
            _node("Cast", [f"{vectors}_rows"], f"{vectors}_floats", to=TensorProto.FLOAT),
            _node("Gather", [f"{table}_scales", rows], f"{vectors}_scales"),
            _node("Mul", [f"{vectors}_floats", f"{vectors}_scales"], vectors),
        ]

    _replace_gathers(model, tables, gather)


def store_halves(model: ModelProto) -> None:
    """Matrices and embedding tables stored in float16; changes ``model`` in place.

    ONNX Runtime's processor kernels compute in float32: it widens the matrices once, when the
    model is loaded, and of the tables only the rows it looks up.
    """
    tables = _tables(model)
    matrices = {node.input[1] for nodes in _products(model).values() for node in nodes}
    casts: list[NodeProto] = []
    for tensor in _tensors(model, tables | matrices):
        values = numpy_helper.to_array(tensor).astype(np.float16)
        if tensor.name in tables:
            _store(tensor, values)
            continue
        model.graph.initializer.append(_tensor(f"{tensor.name}_half", values))
        casts.append(_node("Cast", [f"{tensor.name}_half"], tensor.name, to=TensorProto.FLOAT))

    def gather(node: NodeProto) -> list[NodeProto]:
        vectors = node.output[0]
        return [
            _node("Gather", list(node.input), f"{vectors}_half"),
            _node("Cast", [f"{vectors}_half"], vectors, to=TensorProto.FLOAT),
        ]

    _remove_constants(model, matrices)
    _replace_nodes(model, [*casts, *model.graph.node])
    _replace_gathers(model, tables, gather)


def quantize_dynamically(model: ModelProto) -> ModelProto:
    """Products with constant matrices in 8 bits, the activations' scale taken per call."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet_logging(), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        quantize_dynamic(
            model,
            file,
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul"],
        )
        return onnx.load(file)


def quantize_statically(model: ModelProto, activations: Mapping[str, Activations]) -> None:
    """Products with constant matrices in 8 bits, with ranges of activations known beforehand.

    Written as pairs of QuantizeLinear and DequantizeLinear around both factors, which ONNX Runtime
    makes integer products of; the products' results stay in float32. Its own calibration would
    count the padding, and cannot take percentiles over batches of different lengths.

    Args:
        model: Changed in place.
        activations: Of :func:`observe`, of this graph.
    """
    products = _products(model)
    constants = model.graph.initializer
    matrices = {node.input[1] for nodes in products.values() for node in nodes}
    unpacked: list[NodeProto] = []
    for tensor in _tensors(model, matrices):
        name, values = tensor.name, numpy_helper.to_array(tensor)
        scales = _scales(values, axis=0)
        constants.extend(
            [
                _tensor(f"{name}_int8", _rounded(values, scales)),
                _tensor(f"{name}_scale", scales[0]),
                _tensor(f"{name}_zero", np.zeros(values.shape[1], np.int8)),
            ]
        )
        parts = [f"{name}_int8", f"{name}_scale", f"{name}_zero"]
        unpacked.append(_node("DequantizeLinear", parts, f"{name}_floats", axis=1))
    for name, nodes in products.items():
        scale = max(activations[name].high - activations[name].low, _SMALLEST) / 255
        zero = np.uint8(np.clip(round(-activations[name].low / scale), 0, 255))
        constants.append(_tensor(f"{name}_scale", np.array(scale, np.float32)))
        constants.append(_tensor(f"{name}_zero", np.array(zero)))
        for node in nodes:
            node.input[0] = f"{name}_floats"
            node.input[1] = f"{node.input[1]}_floats"
    _remove_constants(model, matrices)
    new = unpacked
    for node in model.graph.node:
        new.append(node)
        for name in node.output:
            if name in products:
                ranged = [f"{name}_scale", f"{name}_zero"]
                new.append(_node("QuantizeLinear", [name, *ranged], f"{name}_uint8"))
                new.append(_node("DequantizeLinear", [f"{name}_uint8", *ranged], f"{name}_floats"))
    _replace_nodes(model, new)


def quantize_blocks(model: ModelProto, block_size: int) -> ModelProto:
    """Constant matrices in 4 bits, each block of ``block_size`` weights with its own scale.

    The activations are rounded to 8 bits, also by blocks, for each token alone (accuracy level 4
    of MatMulNBits).
    """
    with _quiet_logging():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            model, bits=4, block_size=block_size, is_symmetric=False, accuracy_level=4
        )
        quantizer.process()
    return cast("Any", quantizer.model).model


def _products(model: ModelProto) -> dict[str, list[NodeProto]]:
    """Matrix products of an activation with a constant, by the name of the activation."""
    constants = {tensor.name for tensor in model.graph.initializer}
    products: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            products.setdefault(node.input[0], []).append(node)
    return products


def _tables(model: ModelProto) -> set[str]:
    """Float32 matrices of which rows are looked up, and nothing else is done."""
    matrices = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT
        and len(tensor.dims) == 2
        and tensor.dims[1] >= _NARROWEST_TABLE
    }
    looked_up = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    elsewhere = {
        name
        for node in model.graph.node
        for place, name in enumerate(node.input)
        if node.op_type != "Gather" or place != 0
    }
    return (matrices & looked_up) - elsewhere


def _replace_gathers(
    model: ModelProto, tables: set[str], gather: Callable[[NodeProto], list[NodeProto]]
) -> None:
    """Replace the look-ups in these tables, and drop the constants that nothing reads any more."""
    new: list[NodeProto] = []
    for node in model.graph.node:
        is_look_up = node.op_type == "Gather" and node.input[0] in tables
        new += gather(node) if is_look_up else [node]
    _replace_nodes(model, new)
    read = {name for node in model.graph.node for name in node.input}
    _remove_constants(model, {t.name for t in model.graph.initializer} - read)


def _tensors(model: ModelProto, names: set[str]) -> list[TensorProto]:
    return [tensor for tensor in model.graph.initializer if tensor.name in names]


def _remove_constants(model: ModelProto, names: set[str]) -> None:
    left = [tensor for tensor in model.graph.initializer if tensor.name not in names]
    del model.graph.initializer[:]
    model.graph.initializer.extend(left)


def _replace_nodes(model: ModelProto, nodes: Sequence[NodeProto]) -> None:
    copies = []
    for node in nodes:
        copies.append(onnx.NodeProto())
        copies[-1].CopyFrom(node)  # deleting frees what the graph holds
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _node(operator: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(operator, inputs, [output], f"{output}_{operator}", **attributes)


def _tensor(name: str, values: NDArray[Any]) -> TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(values), name)


def _store(tensor: TensorProto, values: NDArray[Any]) -> None:
    tensor.CopyFrom(_tensor(tensor.name, values))


def _scales(values: Floats, axis: int) -> Floats:
    """Scale with which each row (axis 1) or column (axis 0) fills -127 to 127."""
    largest = np.abs(values).max(axis=axis, keepdims=True)
    return (np.maximum(largest, _SMALLEST) / 127).astype(np.float32)


def _rounded(values: Floats, scales: Floats) -> NDArray[np.int8]:
    return np.clip(np.rint(values / scales), -127, 127).astype(np.int8)


@contextmanager
def _quiet_logging() -> Generator[None]:
    """Silence advice to optimise first, which the session does.

    It is given on the root logger; were there no handler, logging would install one that repeats
    every later message.
    """
    root, silent = logging.getLogger(), logging.NullHandler()
    level = root.level
    root.addHandler(silent)
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(silent)

"""What serving takes: memory by part, operations, texts a second, money, before it is run.

What is served is an encoder with the user model behind it. A request brings the clicks of a user
and candidates; vectors of known items are looked up in a store, texts of new ones are encoded.

Memory follows what the two runtimes do with a file of weights, seen in fresh processes:

* PyTorch maps the file and copies every tensor into its module, so that loading takes the file
  *and* the weights in float32; a model stored in bfloat16 is widened first and rounded afterwards.
  Under autocast each matrix is rounded for the one product it takes part in and dropped again: the
  cache of rounded weights is off in inference mode, so there is no second copy, but every call
  reads the float32 weights and writes the rounded ones.
* ONNX Runtime widens float16 matrices to float32 when it loads them, keeps embedding tables as they
  are stored, and packs matrices for its kernels beside what it has read. How much it holds for a
  byte of matrices is fitted (:mod:`recflow.hardware.serving_factors`).
* Zeros save nothing but disk: sparse files are unpacked when they are loaded.

Operations are those of :mod:`recflow.hardware.planner`, forwards only. Time is a roofline (Williams
et al. 2009, https://doi.org/10.1145/1498765.1498785) whose two terms add up instead of overlapping,
plus what dispatching operators takes. At batch 1 the weights that are streamed from memory count
most, as in the decoding of Pope et al. 2022, section 2 (https://arxiv.org/abs/2211.05102).

A GPU that does not multiply bfloat16, as the T4, is planned in float32: bfloat16 would be emulated
there. PyTorch does not use TF32 for matrix products unless told to; ONNX Runtime does. On GPUs
everything is taken to be in the GPU's memory, item vectors too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from recflow.core.errors import ConfigError
from recflow.hardware.calibration import Calibration, default_calibration
from recflow.hardware.device import Device, Precision
from recflow.hardware.plan import InferencePlan, Memory
from recflow.hardware.serving_factors import ServingFactors, default_factors
from recflow.hardware.shape import EncoderShape
from recflow.hardware.workload import InferenceWorkload

TORCH: Final = "torch"
ONNXRUNTIME: Final = "onnxruntime"
PRECISIONS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        TORCH: ("fp32", "bf16"),
        ONNXRUNTIME: ("fp32", "fp16", "int8_dynamic", "int8_static", "int4"),
    }
)
"""What each runtime executes, named as by ``recflow.compression.config.QuantizationConfig``."""

_FLOAT: Final = 4
_HALF: Final = 2
_SCALE: Final = 4  # bytes of a float32 scale
_TEXTS_AT_ONCE: Final = 256  # sorted by length together, as recflow.compression.measure does
_BLOCK_ITEMS: Final = 16_384  # decoded at a time by a search: recflow.compression.vector_store
_CENTROIDS: Final = 256
_ID_BYTES: Final = 190  # of an item: its id, its place in a list and in a dictionary
_HEAD_WIDTH: Final = 32
_CATEGORY_WIDTH: Final = 16
_SUMMARIES: Final = 12  # six of each of two channels: recflow.modeling.late_fusion
_SUMMARY_OPERATIONS: Final = 5
_LAYER_SIZES: Final = 3  # of a layer's matrices: square, up and down
_LAYER_MATRICES: Final = 6  # queries, keys, values, output, up, down
_KERNELS: Final = 1024  # that oneDNN keeps: ONEDNN_PRIMITIVE_CACHE_CAPACITY


@dataclass(frozen=True, slots=True)
class ServedModel:
    """An encoder as it is stored and executed.

    Attributes:
        shape: Sizes of the encoder after everything that was done to it.
        runtime: ``torch`` or ``onnxruntime``.
        precision: One of :data:`PRECISIONS` of the runtime.
        weight_bytes: Size of the file of weights; ``None`` computes it.
        low_rank_share: Weights that are left of the matrices' where they are stored as the product
            of two narrow ones; operations shrink alike.
        zero_share: Weights of the matrices that are zero. They make the file smaller, and nothing
            else.
        dimension: Width of the vectors; ``None`` for that of the hidden states.
        block_size: Weights that share a scale in ``int4``.
        matrix_sizes: Distinct sizes among the matrices of all layers; ``None`` where all layers are
            alike.
        factorised: Matrices that are stored as two: each is one more product to dispatch.
    """

    shape: EncoderShape
    runtime: str = TORCH
    precision: str = "fp32"
    weight_bytes: int | None = None
    low_rank_share: float = 1.0
    zero_share: float = 0.0
    dimension: int | None = None
    block_size: int = 32
    matrix_sizes: int | None = None
    factorised: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        if self.runtime not in PRECISIONS:
            raise ConfigError.of("runtime", self.runtime, ", ".join(PRECISIONS))
        if self.precision not in PRECISIONS[self.runtime]:
            raise ConfigError.of(
                "precision",
                self.precision,
                f"{', '.join(PRECISIONS[self.runtime])} with {self.runtime}",
            )
        if self.weight_bytes is not None and self.weight_bytes < 1:
            raise ConfigError.of("weight_bytes", self.weight_bytes, "at least 1")
        if not 0 < self.low_rank_share <= 1:
            raise ConfigError.of("low_rank_share", self.low_rank_share, "above 0, at most 1")
        if not 0 <= self.zero_share < 1:
            raise ConfigError.of("zero_share", self.zero_share, "0 to below 1")
        if self.dimension is not None and self.dimension < 1:
            raise ConfigError.of("dimension", self.dimension, "at least 1")
        if self.block_size < 1:
            raise ConfigError.of("block_size", self.block_size, "at least 1")
        if self.matrix_sizes is not None and self.matrix_sizes < 1:
            raise ConfigError.of("matrix_sizes", self.matrix_sizes, "at least 1")
        if self.factorised < 0:
            raise ConfigError.of("factorised", self.factorised, "0 or more")

    @classmethod
    def of(cls, shape: EncoderShape, precision: str = "fp32") -> ServedModel:
        """A model in a precision, on the runtime that recflow executes it with.

        Raises:
            ConfigError: No runtime has the precision.
        """
        if precision in PRECISIONS[TORCH]:
            return cls(shape, TORCH, precision)
        return cls(shape, ONNXRUNTIME, precision)

    @property
    def width(self) -> int:
        """Width of the vectors."""
        return self.dimension or self.shape.width

    @property
    def matrix_weights(self) -> float:
        """Weights of the matrices of all layers."""
        return self.shape.layers * self.shape.matrix_parameters * self.low_rank_share

    @property
    def other_weights(self) -> float:
        """Biases and scales of all layers and above; always in float32."""
        shape = self.shape
        biases = shape.layers * (shape.layer_parameters - shape.matrix_parameters)
        return biases + shape.top_parameters

    @property
    def table_bytes(self) -> float:
        """Bytes of the embeddings as they are stored."""
        table, width = self.shape.embedding_parameters, self.shape.embedding_width
        match self.precision:
            case "fp32":
                return table * _FLOAT
            case "bf16" | "fp16":
                return table * _HALF
            case _:  # a byte a weight and a scale a row
                return table * (1 + _SCALE / width)

    @property
    def matrix_bytes(self) -> float:
        """Bytes of the matrices of all layers as they are stored, zeros included."""
        weights, width = self.matrix_weights, self.shape.width
        match self.precision:
            case "fp32":
                return weights * _FLOAT
            case "bf16" | "fp16":
                return weights * _HALF
            case "int4":  # four bits, a float32 scale and a zero point of four bits a block
                return weights * (0.5 + (_SCALE + 0.5) / self.block_size)
            case _:  # a byte a weight and a scale for each of the columns
                return weights * (1 + _SCALE / width)

    @property
    def stored_bytes(self) -> float:
        """Size of the file of weights."""
        if self.weight_bytes is not None:
            return self.weight_bytes
        # Non-zero weights with a bit each that says where they are: recflow.modeling.packing.
        kept = self.matrix_bytes
        if self.zero_share:
            kept = min(kept, kept * (1 - self.zero_share) + self.matrix_weights / 8)
        small = _HALF if self.precision == "bf16" else _FLOAT
        return self.table_bytes + kept + self.other_weights * small


def plan_inference(
    model: ServedModel,
    workload: InferenceWorkload,
    device: Device,
    calibration: Calibration | None = None,
    *,
    threads: int | None = None,
    factors: ServingFactors | None = None,
) -> InferencePlan:
    """Plan serving one model.

    Args:
        model: What is served.
        workload: What is asked. Without candidates nothing is scored and no user model is loaded:
            a service that turns texts into vectors.
        device: Where it runs.
        calibration: What the very machine reaches; what its matrix rate and bandwidth are above or
            below those of its class, serving is too.
        threads: Threads on a CPU; ``None`` for all cores.
        factors: What runtimes hold and reach; ``None`` for those of the kind of device.

    Raises:
        ConfigError: The workload asks for nothing or has an impossible number, or there are more
            threads than cores.
    """
    _check(workload, device, threads)
    return _Serving(
        model, workload, device, calibration, threads, factors or default_factors(device)
    ).plan()


class _Serving:
    """The numbers of one plan."""

    def __init__(
        self,
        model: ServedModel,
        workload: InferenceWorkload,
        device: Device,
        calibration: Calibration | None,
        threads: int | None,
        factors: ServingFactors,
    ) -> None:
        self.model, self.workload, self.device = model, workload, device
        self.factors, self.threads = factors, threads
        self.lengths = workload.lengths.cut(model.shape.longest_text)
        self.half = model.runtime == TORCH and device.supports("bf16")
        self.executed: Precision = _executed(model, device)
        usual = default_calibration(device)
        own = calibration or usual
        width = model.shape.width
        self.matrix_ratio = own.share(self.executed, width) / usual.share(self.executed, width)
        self.bandwidth_ratio = own.bandwidth_share / usual.bandwidth_share
        self.is_scoring = workload.candidates > 0
        self.vector_bytes = (
            float(_FLOAT * model.width) if workload.vector_bytes is None else workload.vector_bytes
        )
        self.requested = workload.history + workload.candidates

    # ------------------------------------------------------------------ memory

    def memory(self) -> Memory:
        """Memory at its largest: while the model is loaded, or while it answers."""
        held = {"weights": self.weights(), "context": self.context()}
        loading = held | {"loading": self.loading()}
        serving = held | {
            "tokenizer": self.model.shape.vocabulary * self.factors.token_bytes,
            "item vectors": self.item_vectors(),
            "index": self.index(),
            "request": self.request(),
            "kernels": self.kernels(),
        }
        if self.device.is_gpu:
            del serving["tokenizer"]
        step, load = Memory(_rounded(serving), "request"), Memory(_rounded(loading), "loading")
        return load if load.total > step.total and not self.device.is_gpu else step

    def weights(self) -> float:
        """Bytes of the weights in the form that the runtime executes."""
        model, shape = self.model, self.model.shape
        small = model.other_weights * _FLOAT
        if model.runtime == TORCH:
            rounded = model.precision == "bf16" and self.half
            size = _HALF if rounded else _FLOAT
            return (model.matrix_weights + shape.embedding_parameters) * size + small
        matrices = model.matrix_bytes
        if model.precision == "fp16" and not self.device.is_gpu:
            matrices = model.matrix_weights * _FLOAT
        packed = 1.0 if self.device.is_gpu else self.factors.packing[model.precision]
        return matrices * packed + model.table_bytes + small

    def loading(self) -> float:
        """Bytes that loading takes beside the weights."""
        model, shape = self.model, self.model.shape
        if model.runtime == TORCH:
            widened = model.precision == "bf16" and self.half
            # What is packed is unpacked first: the weights once more, in the file's precision.
            tensors = (_HALF if model.precision == "bf16" else _FLOAT) * (
                model.matrix_weights + shape.embedding_parameters + model.other_weights
            )
            mapped = tensors if not model.zero_share else tensors + model.stored_bytes
            wide = model.matrix_weights + shape.embedding_parameters
            return mapped + (wide * (_FLOAT - _HALF) if widened else 0.0)
        if model.precision == "fp16":
            return model.matrix_weights * _FLOAT * self.factors.widening
        return 0.0

    def context(self) -> float:
        """Bytes of a process that has loaded nothing yet."""
        factors = self.factors
        if self.device.is_gpu:
            return float(factors.device_context_bytes)
        if self.model.runtime == TORCH:
            return float(factors.context_bytes[TORCH])
        return float(factors.context_bytes["scoring" if self.is_scoring else ONNXRUNTIME])

    def item_vectors(self) -> float:
        """Bytes of the store: vectors or codes, ids, and what product quantization has learnt."""
        items, width = self.workload.items, self.model.width
        if not items:
            return 0.0
        learnt = _FLOAT * width * (_CENTROIDS + width) if self.is_product_quantized else 0.0
        ids = 0 if self.device.is_gpu else _ID_BYTES
        return items * (self.vector_bytes + ids) + learnt

    def index(self) -> float:
        """Bytes that a search of the store takes beside it."""
        items, width = self.workload.items, self.model.width
        if self.is_product_quantized:
            return items * self.vector_bytes + _FLOAT * width * _CENTROIDS
        # A flat search decodes a block of items and keeps the length of every vector.
        decoded = self.vector_bytes < _FLOAT * width
        return items * _FLOAT + min(items, _BLOCK_ITEMS) * width * _FLOAT * decoded

    @property
    def is_product_quantized(self) -> bool:
        """Whether an item has less than a byte for each number of its vector."""
        return self.vector_bytes < self.model.width and self.workload.items > 0

    def request(self) -> float:
        """Bytes of one request: texts in the encoder, then vectors and similarities."""
        return max(self.encoding(), self.scoring())

    def encoding(self) -> float:
        """Bytes of activations of the largest batch."""
        if not self.workload.texts:
            return 0.0
        return max(self.activations(texts, length) for texts, length in self.batches())

    def kernels(self) -> float:
        """Bytes that the sizes of matrices and batches take, each for itself."""
        if self.device.is_gpu or not self.half or not self.workload.texts:
            return 0.0
        sizes = self.model.matrix_sizes or _LAYER_SIZES
        return min(_KERNELS, sizes * len(set(self.batches()))) * self.factors.kernel_bytes

    def activations(self, texts: int, length: int) -> float:
        """Bytes of one layer of one batch, which the next layer uses again."""
        shape, tokens = self.model.shape, texts * length
        size = _HALF if self.half else _FLOAT
        # Input and output of the activation (and the gate), and of the matrices of attention.
        row = (2 + shape.gated) * shape.channels * size
        row += 4 * shape.attention_width * size + 4 * shape.width * _FLOAT
        scores = 0 if self.model.runtime == TORCH else shape.heads * length * _FLOAT
        held = self.factors.allocator[self.model.runtime]
        if not self.device.is_gpu:
            held = self.factors.allocator.get(self.model.precision, held)
        return tokens * (row + scores) * held

    def scoring(self) -> float:
        """Bytes to rank the candidates of one user."""
        workload, width = self.workload, self.model.width
        if not self.is_scoring:
            return 0.0
        # Looked-up vectors, projected ones, and those gathered for clicks and candidates.
        gathered = 4 * self.requested * (width + _CATEGORY_WIDTH)
        compared = workload.history * workload.candidates * _SUMMARIES
        return _FLOAT * (gathered + compared)

    # ------------------------------------------------------------------ time

    def batches(self) -> list[tuple[int, int]]:
        """Texts and padded length of the batches of one bulk."""
        size = self.workload.batch
        return self.lengths.batches(max(size, _TEXTS_AT_ONCE // size * size), size)

    def flops(self, texts: float, length: float) -> float:
        """Operations to encode texts of a length."""
        shape, tokens = self.model.shape, texts * length
        matrices = 2.0 * self.model.matrix_weights * tokens
        return matrices + 4.0 * length * shape.attention_width * tokens * shape.layers

    def score_flops(self) -> float:
        """Operations to rank the candidates of one user."""
        if not self.is_scoring:
            return 0.0
        width, pairs = self.model.width, self.workload.history * self.workload.candidates
        items = 2.0 * self.requested * width * (width + _HEAD_WIDTH)
        similar = 2.0 * pairs * (width + _CATEGORY_WIDTH)
        summaries = pairs * _SUMMARIES * _SUMMARY_OPERATIONS
        return (
            items + similar + summaries + 2.0 * self.workload.candidates * _SUMMARIES * _HEAD_WIDTH
        )

    def weights_moved(self) -> float:
        """Bytes of weights that one call reads."""
        model = self.model
        if model.runtime == TORCH:
            weights = model.matrix_weights * (_HALF if self.half else _FLOAT)
            if self.half and model.precision == "fp32":
                weights += model.matrix_weights * (_FLOAT + _HALF)  # rounded anew at every call
            return weights
        if model.precision == "fp16" and not self.device.is_gpu:
            return model.matrix_weights * _FLOAT
        return model.matrix_bytes

    def activations_moved(self, texts: float, length: float) -> float:
        """Bytes of activations that all layers read and write."""
        shape = self.model.shape
        row = (2 + shape.gated) * shape.channels + 4 * shape.attention_width + 8 * shape.width
        return texts * length * shape.layers * row * _FLOAT

    def limit_seconds(self, flops: float, moved: float) -> float:
        """Seconds at the device's full rates."""
        return max(flops / self.rate, moved / self.bandwidth)

    @property
    def rate(self) -> float:
        """Operations a second of the threads that are used, as the device promises."""
        return self.device.teraflops[self.executed] * 1e12 * self.thread_share

    @property
    def bandwidth(self) -> float:
        """Bytes a second; one core alone gets more than its share of them."""
        return self.device.bandwidth_gb_s * 1e9 * math.sqrt(self.thread_share)

    @property
    def thread_share(self) -> float:
        """Share of the device that is used."""
        if self.device.is_gpu or self.threads is None:
            return 1.0
        return self.threads / self.device.cores

    def seconds(self, texts: float, length: float) -> float:
        """Seconds of one call of the encoder."""
        speed = self.factors.speed(self.model.runtime, self.model.precision, half=self.half)
        layers = self.model.shape.layers + self.model.factorised / _LAYER_MATRICES
        seconds = speed.call_seconds + layers * speed.layer_seconds
        seconds += self.flops(texts, length) / (self.rate * speed.matrix_share * self.matrix_ratio)
        bandwidth = self.bandwidth * self.bandwidth_ratio
        seconds += self.weights_moved() / (bandwidth * speed.bandwidth_share)
        seconds += self.activations_moved(texts, length) / (bandwidth * speed.activation_share)
        return seconds + texts * self.factors.text_seconds

    def score_seconds(self) -> float:
        """Seconds a user of a busy machine takes to have candidates ranked.

        What a ranking takes beside its arithmetic is the interpreter's work on one core; the other
        cores meanwhile do the same for other users, in processes of their own.
        """
        if not self.is_scoring:
            return 0.0
        at_once = self.device.cores if self.threads is None else self.threads
        speed = self.factors.speed(TORCH, "fp32", half=False)
        rate = self.device.teraflops["fp32"] * 1e12 * self.thread_share * speed.matrix_share
        bandwidth = self.bandwidth * speed.activation_share
        beside = self.factors.score_seconds / at_once
        return beside + self.score_flops() / rate + self.scoring() / bandwidth

    def plan(self) -> InferencePlan:
        """Put everything together."""
        batches, mean = self.batches(), self.lengths.mean
        texts = sum(count for count, _ in batches)
        bulk = sum(self.seconds(count, length) for count, length in batches) / texts
        limit = (
            sum(
                self.limit_seconds(
                    self.flops(count, length),
                    self.weights_moved() + self.activations_moved(count, length),
                )
                for count, length in batches
            )
            / texts
        )
        per_text = self.flops(1, mean)
        asked = self.workload.texts
        return InferencePlan(
            device=self.device,
            precision=self.executed,
            memory=self.memory(),
            flops_per_text=per_text,
            flops_per_recommendation=asked * per_text + self.score_flops(),
            limit_texts_per_second=1.0 / limit,
            texts_per_second=1.0 / bulk,
            recommendations_per_second=1.0 / (asked * bulk + self.score_seconds()),
            latency_seconds=self.seconds(1, mean),
            is_calibrated=self.factors.is_measured,
            threads=None if self.device.is_gpu else self.threads,
        )


def _executed(model: ServedModel, device: Device) -> Precision:
    """What the device multiplies the model's matrices in."""
    if model.runtime == TORCH:
        return "bf16" if device.supports("bf16") else "fp32"
    wanted: Precision
    if model.precision.startswith("int8") or (model.precision == "int4" and not device.is_gpu):
        wanted = "int8"
    elif not device.is_gpu:
        wanted = "fp32"
    else:  # tensor cores multiply float16 as fast as bfloat16, to which 4-bit weights are widened
        wanted = "tf32" if model.precision == "fp32" else "bf16"
    fallback: Precision = "fp32"
    return wanted if device.supports(wanted) else fallback


def _check(workload: InferenceWorkload, device: Device, threads: int | None) -> None:
    for key in ("items", "history", "candidates", "texts"):
        if getattr(workload, key) < 0:
            raise ConfigError.of(key, getattr(workload, key), "0 or more")
    if workload.batch < 1:
        raise ConfigError.of("batch", workload.batch, "at least 1")
    if workload.vector_bytes is not None and not workload.vector_bytes > 0:
        raise ConfigError.of("vector_bytes", workload.vector_bytes, "above 0")
    if not workload.texts and not workload.candidates:
        raise ConfigError("texts = 0 and candidates = 0 ask for nothing; one must be above 0")
    if threads is not None and not device.is_gpu and not 1 <= threads <= device.cores:
        raise ConfigError.of("threads", threads, f"1 to {device.cores}, the cores of {device.name}")


def _rounded(parts: Mapping[str, float]) -> dict[str, int]:
    return {name: math.ceil(size) for name, size in parts.items() if size > 0}

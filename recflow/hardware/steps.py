"""What making, storing and measuring smaller models takes, before it is run.

A step of :mod:`recflow.compression` is a row of moments: encoders are loaded, texts encoded, a
student learns, a graph is exported, accuracies are measured. At each moment a process holds the sum
of what lives then; its peak is the largest of them. Sizes of what lives are counted tensor by
tensor, as the steps allocate it; three things are not tensors and were measured:

* *Kernels.* oneDNN compiles a kernel for every new shape of a product in bfloat16 and keeps 1,024
  of them (https://uxlfoundation.github.io/oneDNN/dev_guide_primitive_cache.html). Texts in buckets
  of many lengths are many shapes.
* *Heap.* The C library keeps freed memory below 32 MiB a piece for later
  (https://man7.org/linux/man-pages/man3/mallopt.3.html, ``M_MMAP_THRESHOLD``): what a moment needed
  for a while stays resident, and later moments find room in part of it only.
* *Graphs.* ONNX's protocol buffers are copied whole, several times over.

Steps run on the machine's processors. Operations and time are counted as in
:mod:`recflow.hardware.planner`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

from recflow.core.errors import ConfigError
from recflow.hardware.activations import layer_saves
from recflow.hardware.calibration import (
    COMPILING_SECONDS,
    WORKING_BYTES,
    Calibration,
    default_calibration,
)
from recflow.hardware.device import Device, Precision
from recflow.hardware.plan import Memory, Stage, TrainingPlan
from recflow.hardware.shape import EncoderShape
from recflow.hardware.workload import TrainingWorkload
from recflow.modeling.config import UserModelConfig

_FLOAT: Final = 4
_HALF: Final = 2
_DOUBLE: Final = 8

# Of recflow's own modules, which this one must not import.
_BUCKET: Final = 64  # recflow.modeling.texts.BUCKET_SIZE
_CLICK_BUCKET: Final = 16  # recflow.compression.distill
_ONNX_BATCH: Final = 16  # recflow.compression.quantize
_SIMILARITIES: Final = 4_000_000  # recflow.modeling.ranker
_HISTORY: Final = UserModelConfig().history_length
_SUMMARIES: Final = 10  # tensors as large as the similarities, while they are summed up
_TIMED_ITEMS: Final = 50_000  # recflow.compression.store_report: catalogue of the timed search
_TIMED_BATCH: Final = 32
_MODELS: Final = 13  # of the family that recflow comes with

# Measured: see the benchmark recflow_tests.benchmarks.step_plan.
_KERNEL_ROW: Final = 490.0  # bytes for a row of a product, beside half a kernel of the mean size
_LOADING_SECONDS: Final = 3.0  # of encoders, tokens and tables, and of writing what is made
_PADDED_SLATES: Final = 2.0  # candidates scored for one that there is
_LEFT_BY_SCORING: Final = 0.65
_UNLIKE_BATCHES: Final = 1.6  # heap beside that of a training whose batches are alike
_SESSION: Final = 1.27  # ONNX Runtime's memory of a float32 graph, for a byte of it
_LEFT_BY_MODEL: Final = 0.35  # of its weights, when a model has been let go of


def child_shape(
    kind: str,
    parent: EncoderShape,
    config: Mapping[str, Any],
    workload: TrainingWorkload | None = None,
) -> EncoderShape:
    """Sizes of the encoder that a step makes, before it is made.

    Args:
        kind: One of :data:`KINDS`.
        parent: Sizes of the encoder that it starts from.
        config: Values of the step's configuration, by key.
        workload: What it reads: texts decide how many tokens trimming keeps. ``None`` for a
            workload without texts.

    Returns:
        Exact for ``distill``, and for ``prune`` with ``uniform``. Where layers compete for what is
        kept, the mean layer; ranks are left out of ``channels`` and ``heads``, which a low-rank
        encoder keeps. Trimming's vocabulary is an estimate.

    Raises:
        ConfigError: There is no such step.
    """
    match kind:
        case "distill":
            return _student(parent, int(config["layers"]), int(config["width"]))
        case "prune":
            return _pruned(parent, config)
        case "low_rank":
            return _low_rank(parent, config)
        case "trim":
            kept = int(config["common_tokens"]) + _characters(parent.vocabulary)
            if workload is not None:
                kept += _rare_tokens(workload)
            return parent.scaled(vocabulary=kept)
        case _:
            _planner_of(kind)
            return parent


def plan_step(
    kind: str,
    parent: EncoderShape,
    child: EncoderShape,
    config: Mapping[str, Any],
    workload: TrainingWorkload,
    device: Device,
    calibration: Calibration | None = None,
) -> TrainingPlan:
    """Plan one step in a process of its own.

    Args:
        kind: One of :data:`KINDS`.
        parent: Sizes of the encoder that it starts from.
        child: Sizes of the encoder that it makes (:func:`child_shape`); the parent's where it makes
            none.
        config: Values of the step's configuration, by key. ``measurements`` and ``predictions``
            also know ``models``, how many there are.
        workload: What it reads.
        device: The machine. Steps work on its processors.
        calibration: What such a machine reaches; ``None`` for what the catalogue's class reaches.

    Raises:
        ConfigError: There is no such step, or the device is a GPU.
    """
    plan = _planner_of(kind)
    if device.is_gpu:
        raise ConfigError.of(
            "device", device.name, "a CPU machine: smaller models are made on processors"
        )
    run = _Run(parent, child, config, workload, device, calibration or default_calibration(device))
    plan(run)
    return run.plan()


def _student(parent: EncoderShape, layers: int, width: int) -> EncoderShape:
    shorter = parent.scaled(layers=layers)
    if not 0 < width < parent.width:
        return shorter
    # Heads and channels stay; what reads and writes the hidden states becomes narrower.
    inner = 3 * parent.attention_width + parent.channels  # biases that stay
    share = width / parent.width
    biases = (parent.layer_parameters - parent.matrix_parameters - inner) * share + inner
    return replace(
        shorter,
        width=width,
        embedding_width=width,
        embedding_parameters=round(parent.embedding_parameters * share),
        matrix_parameters=parent.matrix_parameters * share,
        layer_parameters=parent.matrix_parameters * share + biases,
        top_parameters=round(parent.top_parameters * share) + width * parent.width,
    )


def _pruned(parent: EncoderShape, config: Mapping[str, Any]) -> EncoderShape:
    if config["allocation"] == "global":
        # A share of the latency is about the same share of the weights.
        share = config["target_share"] or config["target_latency_share"] or 5 / 9
        return parent.scaled(layer_share=float(share))
    heads, channels = config["head_share"], config["channel_share"]
    if heads is None and channels is None:
        heads, channels = 1 / 3, 1 / 2
    kept_heads = max(1, round(parent.heads * (1 - (heads or 0.0))))
    kept_channels = max(1, round(parent.channels * (1 - (channels or 0.0))))
    inner = kept_heads * parent.head_size
    matrices = parent.width * (4 * inner + 2 * kept_channels)
    lost = 3 * (parent.attention_width - inner) + parent.channels - kept_channels
    return replace(
        parent,
        heads=kept_heads,
        key_value_heads=kept_heads,
        channels=kept_channels,
        matrix_parameters=matrices,
        layer_parameters=matrices + parent.layer_parameters - parent.matrix_parameters - lost,
    )


def _low_rank(parent: EncoderShape, config: Mapping[str, Any]) -> EncoderShape:
    ratio = float(config["ratio"])
    lost = parent.matrix_parameters * (1 - ratio)
    table = parent.vocabulary * parent.embedding_width if config["embeddings"] else 0
    return replace(
        parent,
        matrix_parameters=parent.matrix_parameters - lost,
        layer_parameters=parent.layer_parameters - lost,
        embedding_parameters=parent.embedding_parameters - round(table * (1 - ratio)),
    )


def _characters(vocabulary: int) -> int:
    """Tokens that trimming keeps in any case: special ones and characters, about."""
    return min(vocabulary, 2_000)


def _rare_tokens(workload: TrainingWorkload) -> int:
    """Tokens of the texts that are not common ones anyway, about.

    Vocabularies grow with a power of the text (Heaps' law).
    """
    return round((workload.items * workload.lengths.mean) ** 0.72)


# ---------------------------------------------------------------------------- work and memory


@dataclass(slots=True)
class _Work:
    """Operations, bytes moved, and operators started.

    ``width`` is that of the encoder at work; 0 is that of the parent.
    """

    flops: float = 0.0
    bytes: float = 0.0
    operators: float = 0.0
    precision: Precision = "fp32"
    width: int = 0


_Product = tuple[int, int, int, bool]  # rows, inputs, outputs, whether gradients are computed


@dataclass(slots=True)
class _Run:
    """The moments of a step, as it goes along.

    Attributes:
        held: Bytes that live until they are let go of, by part.
        heap: Freed bytes that later moments may find room in.
        compiled: Bytes of the kernels of all products so far.
        compilations: How often a kernel was compiled.
        overflows: Whether there are more than are kept, so that they are compiled again.
    """

    parent: EncoderShape
    child: EncoderShape
    config: Mapping[str, Any]
    workload: TrainingWorkload
    device: Device
    calibration: Calibration
    held: dict[str, float] = field(default_factory=lambda: {})
    heap: float = 0.0
    trainable: float = 0.0
    texts: float = 0.0
    peak: Memory = field(default_factory=lambda: Memory({}))
    stages: list[Stage] = field(default_factory=lambda: [])
    products: set[_Product] = field(default_factory=lambda: set())
    compiled: float = 0.0
    compilations: int = 0
    overflows: bool = False

    def __post_init__(self) -> None:
        self.held["context"] = self.calibration.context_bytes
        self.held["context"] += WORKING_BYTES
        self.held["tables"] = self.workload.table_bytes * 2.0
        self.stages.append(Stage("start", 1, 0.0, 0.0, self.calibration.start_seconds))

    # ---------------------------------------------------------------- what lives

    @property
    def half(self) -> bool:
        """Whether matrices are multiplied in bfloat16 where that is allowed."""
        return self.device.supports("bf16")

    def hold(self, part: str, size: float) -> None:
        """Allocate what lives until it is let go of."""
        self.held[part] = self.held.get(part, 0.0) + size

    def drop(self, part: str, *, to_heap: bool = True) -> None:
        """Let go of a part; where it is made of small pieces, they stay resident."""
        size = self.held.pop(part, 0.0)
        if to_heap:
            self.heap += size

    def moment(self, name: str, temporary: float = 0.0, mapped: float = 0.0) -> None:
        """Note what lives now, with what is allocated for a while.

        Args:
            name: Of the moment.
            temporary: Bytes in small pieces: they find room in what was freed before, and stay
                resident when they are freed.
            mapped: Bytes in pieces so large that they go back to the operating system.
        """
        self.heap = max(self.heap, temporary)
        parts = {**self.held, "kernels": self.compiled, "freed": self.heap, "temporary": mapped}
        memory = Memory({k: math.ceil(v) for k, v in parts.items() if v > 0}, name)
        if memory.total > self.peak.total:
            self.peak = memory

    def gaps(self, half: bool) -> float:
        """What the allocator holds for a byte of activations."""
        family = {"modernbert": "modernbert"}.get(self.parent.model_type, "bert")
        if self.parent.causal:
            family = "decoder"
        return self.calibration.heap_share(family, "bf16" if half else "fp32", "plain")

    # ---------------------------------------------------------------- work

    def encode(
        self,
        name: str,
        shape: EncoderShape,
        texts: int,
        *,
        times: float = 1.0,
        half: bool = True,
        size: int = _BUCKET,
        widths: int = 0,
    ) -> None:
        """Encode texts without gradients, in buckets of similar length.

        Args:
            name: Of the stage.
            shape: Sizes of the encoder.
            texts: How many.
            times: How often.
            half: Whether bfloat16 is allowed.
            size: Texts of a bucket.
            widths: Distinct shapes of matrices; 0 for layers that are alike.
        """
        if not texts:
            return
        buckets = self.workload.lengths.batches(texts, size)
        half = half and self.half
        if half:
            self.compile(shape, {count * length for count, length in buckets}, False, widths)
        largest = max(count * length for count, length in buckets)
        per_token = _FLOAT * 3 * shape.width + (_HALF if half else _FLOAT) * (
            2 * shape.channels + 4 * shape.attention_width
        )
        self.moment(name, largest * per_token + _HALF * shape.matrix_parameters * half)
        self.stage(name, times, self.forward(shape, buckets, half))

    def learn(
        self,
        name: str,
        shape: EncoderShape,
        *,
        steps: int,
        texts: int,
        size: int,
        pool: int,
        learning: float,
        beside: float = 0.0,
        widths: int = 0,
        passes: float = 3.0,
        extra_per_token: float = 0.0,
        gaps: float = 1.0,
        mapped: float = 0.0,
    ) -> None:
        """Training steps on texts.

        Args:
            name: Of the stage.
            shape: Sizes of the encoder that learns.
            steps: How many.
            texts: Texts of a step.
            size: Texts of a bucket.
            pool: Texts that the batches are taken from, sorted by length; buckets of a step where
                that is ``texts``.
            learning: Weights that learn.
            beside: Bytes that a step needs besides.
            widths: Distinct shapes of matrices; 0 for layers that are alike.
            passes: Forward passes that a step's operations are worth.
            extra_per_token: Bytes kept of a token and layer besides.
            gaps: Heap beside that of batches that are alike.
            mapped: Bytes in large pieces that a step needs besides.
        """
        if not steps:
            return
        lengths = self.workload.lengths
        buckets = lengths.batches(pool, size)
        rows = {count * length for count, length in buckets}
        if pool > texts:
            # Every pass shuffles anew: the edges of the buckets move by a token or so.
            shortest = min(length for _, length in buckets)
            rows |= {size * length for length in lengths.quantiles if length >= shortest}
            most = max(buckets, key=lambda bucket: bucket[0] * bucket[1])
            step = [most]
        else:
            step = buckets
        if self.half:
            self.compile(shape, rows, True, widths)
            if self.overflows:
                self.compilations += 3 * widths * steps
        saved = layer_saves(shape, self.half)
        kept = sum(saved.bytes(count * length, length) for count, length in step)
        tokens = sum(count * length for count, length in step)
        kept = (kept + tokens * extra_per_token) * shape.layers + tokens * _FLOAT * 4 * shape.width
        if self.half:
            kept += _HALF * shape.layers * shape.matrix_parameters
        self.hold("gradients", _FLOAT * learning)
        self.hold("optimiser states", 2 * _FLOAT * learning)
        self.trainable = max(self.trainable, learning)
        self.texts = max(self.texts, float(texts))
        self.moment(name, kept * self.gaps(self.half) * gaps + beside, mapped)
        work = self.forward(shape, buckets, self.half)
        share = texts / pool if pool > texts else 1.0
        work.flops *= passes * share
        work.bytes *= passes * share
        work.operators *= passes * share
        work.bytes += 10 * _FLOAT * learning  # AdamW and the norm of the gradient
        self.stage(name, steps, work)
        self.drop("gradients")
        self.drop("optimiser states")

    def score(self, name: str, *, times: float = 1.0, impressions: int = 0) -> None:
        """Score slates: candidates and clicks are gathered, a few impressions at a time."""
        workload = self.workload
        impressions = impressions or self._validated()
        pairs = impressions * workload.slate
        at_once = min(pairs, _SIMILARITIES / _HISTORY)
        width = self.parent.width
        clicks = at_once / workload.slate * _HISTORY
        padded = at_once * _PADDED_SLATES
        scored = _FLOAT * ((clicks + padded) * width + padded * _HISTORY * _SUMMARIES)
        # What small pieces of it leave behind, and the vectors of all items, twice.
        self.held["scoring"] = scored * _LEFT_BY_SCORING + 2 * _vectors(self, self.parent)
        self.moment(name, mapped=scored)
        work = _Work(
            flops=2.0 * pairs * _HISTORY * width,
            bytes=_FLOAT * pairs * (_HISTORY * _SUMMARIES * 2 + width * 3),
            operators=100.0 * math.ceil(pairs / at_once),
        )
        self.stage(name, times, work)

    def validate(self, shape: EncoderShape, *, times: float = 1.0, half: bool = True) -> None:
        """Accuracy of a ranker: encode what validation shows, score it."""
        self.encode("encoding", shape, self.workload.items, times=times, half=half)
        self.score("validation", times=times)

    def _validated(self) -> int:
        most = int(self.config.get("max_validation_impressions", self.workload.impressions))
        return max(1, min(self.workload.validation_impressions, most))

    def compile(self, shape: EncoderShape, rows: set[int], backward: bool, widths: int = 0) -> None:
        """Note the kernels of products with so many rows."""
        kinds = shape.matrix_kinds
        if widths:
            kinds = frozenset((number, shape.width) for number in range(widths))
        new = {(row, *kind, backward) for row in rows for kind in kinds} - self.products
        self.compilations += len(new) * (3 if backward else 1)
        self.products |= new
        # One a product, two more for its gradients.
        forward = {product[:3] for product in self.products}
        of_rows = [product[0] for product in forward]
        of_rows += 2 * [product[0] for product in self.products if product[3]]
        mean = self.calibration.kernel_bytes / 2 + _KERNEL_ROW * sum(of_rows) / len(of_rows)
        self.compiled = mean * min(len(of_rows), self.calibration.kernels)
        self.overflows = len(of_rows) > self.calibration.kernels

    def forward(self, shape: EncoderShape, buckets: list[tuple[int, int]], half: bool) -> _Work:
        """Work of encoding batches without gradients."""
        work = _Work(precision="bf16" if half else "fp32", width=shape.width)
        tokens = sum(count * length for count, length in buckets)
        pairs = sum(count * length * length for count, length in buckets)
        matrices = 2.0 * shape.matrix_parameters * tokens
        work.flops = shape.layers * (matrices + 4.0 * shape.attention_width * pairs)
        saved = layer_saves(shape, half)
        kept = sum(saved.bytes(count * length, length) for count, length in buckets)
        work.bytes = shape.layers * kept * 1.5
        work.operators = shape.layers * 35 * len(buckets)
        return work

    def stage(self, name: str, repeats: float, work: _Work) -> None:
        """Add work to the stages."""
        device, factors = self.device, self.calibration
        rate = device.teraflops[work.precision] * 1e12
        bandwidth = device.bandwidth_gb_s * 1e9
        seconds = work.flops / (
            rate * factors.share(work.precision, work.width or self.parent.width)
        )
        seconds += work.bytes / (bandwidth * factors.bandwidth_share)
        seconds += work.operators * factors.operator_seconds
        limit = max(work.flops / rate, work.bytes / bandwidth)
        self.stages.append(Stage(name, repeats, work.flops, limit, seconds))

    def plan(self) -> TrainingPlan:
        """Put everything together."""
        self.stages.append(Stage("loading", 1, 0.0, 0.0, _LOADING_SECONDS))
        if self.compilations:
            self.stages.append(
                Stage("kernels", float(self.compilations), 0.0, 0.0, COMPILING_SECONDS)
            )
        return TrainingPlan(
            device=self.device,
            devices=1,
            precision="bf16" if self.half else "fp32",
            memory=self.peak,
            host_memory=self.peak,
            stages=tuple(self.stages),
            parameters=self.child.parameters,
            trainable_parameters=round(self.trainable),
            clicks=0,
            texts_per_step=self.texts,
            is_calibrated=self.calibration.is_measured,
        )


def _weights(shape: EncoderShape) -> float:
    return float(_FLOAT * shape.parameters)


def _layers(shape: EncoderShape) -> float:
    return shape.layers * shape.layer_parameters


# ---------------------------------------------------------------------------- the steps


def _load(run: _Run, part: str, shape: EncoderShape) -> None:
    """Load an encoder: built with weights of its own before those of the file replace them."""
    run.hold(part, _weights(shape))
    run.moment("loading", mapped=_weights(shape))


def _save(run: _Run, shape: EncoderShape) -> None:
    run.moment("saving", mapped=_weights(shape))


def _vectors(run: _Run, shape: EncoderShape) -> float:
    return float(run.workload.items * shape.width * _FLOAT)


def _distill(run: _Run) -> None:
    parent, child, config = run.parent, run.child, run.config
    items, lengths = run.workload.items, run.workload.lengths
    _load(run, "parent", parent)
    run.validate(parent)
    run.encode("encoding", parent, items)
    run.hold("item vectors", 2 * _vectors(run, parent))
    run.hold("child", _weights(child))
    states = 0.0
    compared = child.layers if config["hidden_layers"] == "every" else 1
    if config["hidden_weight"]:
        states = items * lengths.mean * parent.width * (_HALF if run.half else _FLOAT) * compared
        if states <= config["max_states_bytes"]:
            run.hold("hidden states", states)
            run.encode("hidden states", parent, items)
    learning = _layers(child) + child.top_parameters
    run.hold("best weights", 2 * _FLOAT * learning)
    batch = int(config["batch_size"])
    longest = max(lengths.quantiles)
    steps = min(int(config["max_steps"]), int(config["epochs"]) * math.ceil(items / batch))
    run.learn(
        "learning from texts",
        child,
        steps=steps,
        texts=batch,
        size=batch,
        pool=items,
        learning=learning,
        # States of both, gathered, as float32 and normalised, with their gradients.
        beside=6 * _FLOAT * compared * batch * longest * child.width,
    )
    run.drop("hidden states", to_heap=False)
    validations = float(config["validations"])
    run.encode("held-out texts", child, round(items * 0.05), times=2 + validations)
    run.validate(child)
    if config["click_steps"]:
        run.encode("encoding", child, items)
        texts = int(config["click_texts"])
        run.learn(
            "learning from clicks",
            child,
            steps=int(config["click_steps"]),
            texts=texts,
            size=_CLICK_BUCKET,
            pool=texts,
            learning=learning,
        )
        run.validate(child, times=validations)
    _save(run, child)


def _recover(run: _Run, widths: int = 0) -> None:
    config, child = run.config, run.child
    items = run.workload.items
    batch = int(config["recovery_batch_size"])
    run.encode("held-out texts", child, items, times=2, widths=widths)
    run.learn(
        "recovery",
        child,
        steps=int(config["recovery_steps"]),
        texts=min(batch, items),
        size=batch,
        pool=items,
        learning=_layers(child),
        widths=widths,
    )
    _save(run, child)
    run.validate(run.parent)
    run.validate(child)


def _prune(run: _Run) -> None:
    parent, config, workload = run.parent, run.config, run.workload
    _load(run, "parent", parent)
    run.encode("encoding", parent, workload.items)
    run.hold("item vectors", _vectors(run, parent))
    _load(run, "unpruned copy", parent)
    clicks = min(int(config["importance_clicks"]), workload.impressions)
    batch = int(config["importance_batch_size"])
    candidates = 1 + min(int(config["negatives"]), max(0, round(workload.slate) - 1))
    texts = max(1, round(workload.popularity.distinct(batch * candidates)))
    # All weights want gradients, embeddings too, and all candidates are padded together.
    table = float(_FLOAT * parent.embedding_parameters)
    run.hold("gradients of the embeddings", table)
    run.hold("gradients of the layers", _FLOAT * _layers(parent))
    run.learn(
        "importance",
        parent,
        steps=math.ceil(clicks / batch),
        texts=texts,
        size=texts,
        pool=texts,
        learning=0,
        gaps=_UNLIKE_BATCHES,
        mapped=table,  # the gradient of one batch, before it is added
    )
    run.drop("gradients of the embeddings", to_heap=False)
    run.drop("gradients of the layers")
    run.moment("pruning", mapped=_weights(parent))
    run.hold("child", _weights(run.child))
    run.drop("unpruned copy", to_heap=False)
    _recover(run, widths=_unlike(parent))


def _low_rank_moments(run: _Run, *, sensitivity: bool) -> None:
    """Statistics of the inputs, and of the gradients, of every matrix, in float64."""
    parent, config = run.parent, run.config
    ends = _matrices(parent)
    texts = min(int(config["calibration_texts"]), run.workload.items)
    inputs = sum(i * i for i, _ in ends) * parent.layers * _DOUBLE
    outputs = sum(o * o for _, o in ends) * parent.layers * _DOUBLE
    largest = max(i * i for i, _ in ends) * _DOUBLE
    run.hold("moments", 2 * inputs)
    run.encode("moments", parent, texts, half=False)
    run.moment("moments", mapped=2.0 * largest)
    run.drop("moments")
    run.heap -= inputs  # half of it are the moments themselves, the rest their sums
    run.hold("moments", inputs)
    if not sensitivity:
        return
    run.hold("sensitivities", outputs)
    buckets = run.workload.lengths.batches(texts, _BUCKET)
    saved = layer_saves(parent, False, weights_learn=False)
    kept = max(saved.bytes(count * length, length) for count, length in buckets)
    # Activations find no room between the sums of the moments.
    run.hold("activations", kept * parent.layers)
    run.moment("sensitivity", mapped=2.0 * max(o * o for _, o in ends) * _DOUBLE)
    run.drop("activations")
    work = run.forward(parent, buckets, False)
    work.flops *= 2
    work.bytes *= 3
    run.stage("sensitivity", 1, work)


def _matrices(shape: EncoderShape) -> list[tuple[int, int]]:
    """Inputs and outputs of each matrix of a layer."""
    w, a, k, c = shape.width, shape.attention_width, shape.key_value_width, shape.channels
    if shape.model_type == "modernbert":
        return [(w, 3 * a), (a, w), (w, 2 * c), (c, w)]
    ends = [(w, a), (w, k), (w, k), (a, w), (w, c), (c, w)]
    return [*ends, (w, c)] if shape.gated else ends


def _factorise(run: _Run) -> None:
    parent, child, config = run.parent, run.child, run.config
    _load(run, "parent", parent)
    _load(run, "child", parent)
    run.encode("encoding", parent, run.workload.items)
    run.hold("item vectors", _vectors(run, parent))
    _low_rank_moments(run, sensitivity=config["criterion"] == "sensitivity")
    ends = _matrices(parent)
    bases = sum(2 * o * min(i, o) for i, o in ends) * parent.layers * _DOUBLE
    largest = max(max(i, o) for i, o in ends) ** 2 * _DOUBLE
    run.hold("bases", bases)
    run.moment("spectra", mapped=6.0 * largest)
    work = _Work(
        # Symmetric eigenvalue problems take about 9 n^3 operations with vectors (Golub and Van
        # Loan 2013, section 8.3), two of them a matrix.
        flops=sum(18.0 * max(i, o) ** 3 for i, o in ends) * parent.layers,
        operators=30.0 * len(ends) * parent.layers,
    )
    run.stage("spectra", 1, work)
    run.drop("bases")
    run.drop("moments")
    run.drop("sensitivities")
    run.drop("child", to_heap=False)
    run.hold("child", _weights(child))
    _recover(run, widths=2 * len(ends) * parent.layers)


def _sparsify(run: _Run) -> None:
    parent, config = run.parent, run.config
    _load(run, "parent", parent)
    _load(run, "child", parent)
    run.encode("encoding", parent, run.workload.items)
    run.hold("item vectors", _vectors(run, parent))
    if config["score"] == "activation":
        _low_rank_moments(run, sensitivity=False)
    matrices = parent.layers * parent.matrix_parameters
    largest = max(i * o for i, o in _matrices(parent))
    run.hold("masks", matrices)
    # Scores, their order as 64-bit numbers and what sorting needs, of one matrix.
    run.moment("masks", largest * (3 * _FLOAT + 3 * _DOUBLE))
    _recover(run)


def _trim(run: _Run) -> None:
    parent, child, workload = run.parent, run.child, run.workload
    _load(run, "parent", parent)
    # The vocabulary in Python: a string, its number and its place in a few sets each.
    run.hold("tokenizers", parent.vocabulary * 400.0)
    _load(run, "child", parent)
    run.drop("child", to_heap=False)
    run.hold("child", _weights(child))
    _save(run, child)
    _load(run, "earlier child", parent)
    run.drop("earlier child", to_heap=False)
    run.hold("earlier child", _weights(child))
    run.validate(parent)
    run.validate(child, times=2)
    changed = min(int(run.config["max_texts"]), workload.items // 2)
    run.encode("compared texts", parent, changed, times=2)


_ONNX_BYTES: Final[Mapping[str, float]] = MappingProxyType(
    {"fp32": 4, "fp16": 2, "bf16": 2, "int8_dynamic": 1, "int8_static": 1, "int4": 0.65}
)


def _quantize(run: _Run) -> None:
    parent, config = run.parent, run.config
    precision, items = str(config["precision"]), run.workload.items
    whole = _weights(parent)
    samples = min(int(config["sample_texts"]), items)
    _load(run, "parent", parent)
    run.encode("padding", parent, 32, half=False)
    written = _ONNX_BYTES[precision] * parent.parameters
    if precision == "bf16":
        _load(run, "child", parent)
        run.drop("child", to_heap=False)
        run.hold("child", written)
    else:
        run.hold("exported graph", whole)
        run.moment("export", mapped=2.3 * whole)
        run.hold("float32 session", _SESSION * whole)
        run.moment("session", mapped=whole)
        run.encode("parity", parent, 4 * samples, half=False)
        if precision != "fp32":
            run.hold("graph", whole)
            run.moment("graph", mapped=2.5 * whole)
            if precision.startswith("int8"):
                texts = min(int(config["calibration_texts"]), items)
                times = (1 if config["smoothing"] else 0) + (precision == "int8_static")
                # The copy whose activations are outputs, its bytes, and ONNX Runtime's two.
                activations = _ONNX_BATCH * max(run.workload.lengths.quantiles) * _FLOAT
                activations *= parent.layers * (4 * parent.width + parent.channels)
                run.moment("observing", float(activations), mapped=4 * whole)
                run.encode("observing", parent, texts, times=times, half=False, size=_ONNX_BATCH)
            run.drop("graph")
        run.hold("session", written)
    run.encode("cosines", parent, samples, times=2, half=False, size=_ONNX_BATCH)
    run.encode("encoding", parent, items, times=2, half=False)
    run.score("validation", times=2)


def _item_vectors(run: _Run) -> None:
    parent = run.parent
    _load(run, "parent", parent)
    run.encode("encoding", parent, run.workload.items)
    codecs = 3  # int8, pq and, beside them, float32
    run.hold("item vectors", (1 + codecs) * _vectors(run, parent))
    timed = _TIMED_ITEMS * parent.width
    run.hold("timed catalogues", timed * (_FLOAT + 1 + 1 / 3))
    run.moment("timing", mapped=float(timed * _FLOAT))
    run.drop("timed catalogues", to_heap=False)
    run.score("validation", times=codecs)


def _predictions(run: _Run) -> None:
    parent, models = run.parent, int(run.config.get("models", _MODELS))
    _load(run, "model", parent)
    unlike = _of_family(parent) if models > 1 else 0
    run.encode("encoding", parent, run.workload.items, times=models + 1, widths=unlike)
    run.hold("left by models", (models - 1) * _LEFT_BY_MODEL * _weights(parent))
    run.score("validation", times=models, impressions=2 * run.workload.validation_impressions)
    sampled = int(run.config.get("catalogue_sample", 0))
    if sampled:
        similarities = min(_SIMILARITIES, sampled * run.workload.items * _HISTORY)
        run.moment("catalogue", mapped=float(_FLOAT * similarities * _SUMMARIES))
        work = _Work(
            flops=2.0 * sampled * run.workload.items * _HISTORY * parent.width,
            bytes=_FLOAT * sampled * run.workload.items * _HISTORY * _SUMMARIES * 2.0,
        )
        run.stage("catalogue", models, work)


def _unlike(shape: EncoderShape) -> int:
    """Shapes of the matrices of a pruned encoder: four a layer where none is like another."""
    return 4 * shape.layers


def _of_family(shape: EncoderShape) -> int:
    """The same of a family that has a pruned encoder and one whose ranks are all unlike."""
    return _unlike(shape) + 2 * len(_matrices(shape)) * shape.layers


def _measurements(run: _Run) -> None:
    parent, models = run.parent, int(run.config.get("models", _MODELS))
    # All models are timed in turns within one process.
    run.hold("models", models * _weights(parent))
    run.moment("loading", mapped=_weights(parent))
    rounds = 2.0 * float(run.config.get("throughput_rounds", 3))
    sample = int(run.config.get("throughput_texts", 256))
    if run.half:
        lengths = set(run.workload.lengths.quantiles)  # texts alone, and in batches of any text
        rows = lengths | {_TIMED_BATCH * length for length in lengths}
        run.compile(parent, rows, False, _of_family(parent) if models > 1 else 0)
    run.encode(
        "timing",
        parent,
        sample,
        times=rounds * models,
        size=_TIMED_BATCH,
        widths=_of_family(parent) if models > 1 else 0,
    )


# What the steps of a searched chain have, where the search does not say otherwise.
_CHAIN: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "distill": {
            "layers": 4,
            "width": 0,
            "epochs": 12,
            "max_steps": 300,
            "batch_size": 64,
            "hidden_layers": "last",
            "hidden_weight": 1.0,
            "click_steps": 40,
            "click_texts": 64,
            "validations": 2,
            "max_states_bytes": 2_000_000_000,
            "max_validation_impressions": 2_000,
        },
        "prune": {
            "allocation": "global",
            "target_share": 0.6,
            "target_latency_share": None,
            "importance_clicks": 256,
            "importance_batch_size": 32,
            "negatives": 4,
            "recovery_steps": 200,
            "recovery_batch_size": 64,
            "max_validation_impressions": 2_000,
        },
        "trim": {"common_tokens": 5_000, "max_texts": 2_000, "max_validation_impressions": 2_000},
        "quantize": {
            "precision": "int8_static",
            "smoothing": 0.65,
            "calibration_texts": 256,
            "sample_texts": 256,
            "max_validation_impressions": 2_000,
        },
    }
)


def _compressed(run: _Run) -> None:
    """Chains of distill, prune, trim and quantize in one process, until one meets the budget.

    A chain may leave out any step, so that each may start from the root. Whatever a step lets go of
    stays as room for the next one, and so do its kernels.
    """
    root = run.parent
    _load(run, "reference", root)
    run.validate(root)
    before = dict(run.held)
    for kind, config in _CHAIN.items():
        run.config, run.child = config, child_shape(kind, root, config, run.workload)
        _PLANNERS[kind](run)
        run.held = dict(before)
    run.config, run.child = {"models": 2}, root
    _measurements(run)


def _adapt(run: _Run) -> None:
    parent, config = run.parent, run.config
    items = run.workload.items
    tuned = config["tuned_layers"]
    learning = (
        parent.parameters
        if tuned is None
        else int(tuned) * parent.layer_parameters + parent.top_parameters
    )
    _load(run, "parent", parent)
    run.hold("best weights", 2 * _FLOAT * learning)
    batch = int(config["batch_size"])
    steps = min(int(config["max_steps"]), int(config["epochs"]) * math.ceil(items / batch))
    views = 2 if config["method"] == "contrastive" else 1
    hidden = 0.0
    if views == 1:
        longest = max(run.workload.lengths.quantiles)
        guessed = batch * longest * float(config["masked_share"])
        hidden = 3 * _FLOAT * guessed * parent.vocabulary
    run.learn(
        "adapting",
        parent,
        steps=steps,
        texts=views * batch,
        size=views * batch,
        pool=views * items,
        learning=learning,
        beside=hidden,
        # Dropout keeps its masks; attention under dropout is not fused.
        extra_per_token=5 * parent.width,
    )
    _save(run, parent)


_PLANNERS: Final[Mapping[str, Callable[[_Run], None]]] = MappingProxyType(
    {
        "adapt": _adapt,
        "compressed": _compressed,
        "distill": _distill,
        "item_vectors": _item_vectors,
        "low_rank": _factorise,
        "measurements": _measurements,
        "predictions": _predictions,
        "prune": _prune,
        "quantize": _quantize,
        "sparsify": _sparsify,
        "trim": _trim,
    }
)
KINDS: Final = tuple(_PLANNERS)


def _planner_of(kind: str) -> Callable[[_Run], None]:
    if kind not in _PLANNERS:
        raise ConfigError.of("step", kind, ", ".join(KINDS))
    return _PLANNERS[kind]

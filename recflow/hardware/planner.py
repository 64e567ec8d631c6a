"""What a training takes: memory by part, operations, time and money, before it is run.

The planner models the recommender's own step, not a language model's: a step encodes the
*distinct* items of its batch, at most ``max_texts_per_step`` of them, in buckets of similar length,
from hidden states that are kept on disk; it does not encode batch x (history + candidates) texts.

Sources of the formulas:

* Memory of weights, gradients and AdamW's two moments, 4 bytes each for what learns: Rajbhandari et
  al. 2020, ZeRO, section 3.1 (https://arxiv.org/abs/1910.02054); spread over ``n`` devices it is an
  ``n``-th (their stage 3, PyTorch's FSDP). Low-rank matrices: Hu et al. 2021
  (https://arxiv.org/abs/2106.09685).
* Activations: :mod:`recflow.hardware.activations`. Recomputing them keeps a layer's input alone:
  Chen et al. 2016 (https://arxiv.org/abs/1604.06174).
* Operations: 2 for each weight of a matrix and token forwards, 2 for the gradient of the input, 2
  for that of the weight: Kaplan et al. 2020, section 2.1 (https://arxiv.org/abs/2001.08361);
  attention's products: Hoffmann et al. 2022, appendix F (https://arxiv.org/abs/2203.15556).
* Time: the roofline of Williams et al. 2009 (https://doi.org/10.1145/1498765.1498785): the limit
  is the larger of operations over matrix rate and bytes over bandwidth; the estimate adds both,
  each at the share of the rate that was measured (:mod:`recflow.hardware.calibration`), because
  the operators of a step run one after the other.
* Distinct items of a batch: expected number of different ones among independent draws.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from recflow.core.errors import ConfigError
from recflow.hardware.activations import adapter_saves, layer_saves
from recflow.hardware.calibration import (
    COMPILING_SECONDS,
    WORKING_BYTES,
    Calibration,
    default_calibration,
)
from recflow.hardware.device import Device, Precision
from recflow.hardware.plan import Memory, Stage, TrainingPlan
from recflow.hardware.shape import EncoderShape
from recflow.hardware.workload import TextLengths, TrainingWorkload
from recflow.modeling.config import TrainingConfig

_FLOAT: Final = 4
_HALF: Final = 2
_BUCKET: Final = 64  # texts encoded together: recflow.modeling.texts.BUCKET_SIZE
_SEGMENT_BYTES: Final = 64 * 1024**2  # of hidden states, serialised with two copies beside
_SEGMENT_COPIES: Final = 4.0  # states, joined, serialised, and being written
_FILL_TOKENS: Final = 512  # tokens that are run together when hidden states are computed
_DRAWN_STEPS: Final = 64
_LEARNING_BYTES: Final = 57 << 20  # PyTorch's own, once a gradient was computed and AdamW stepped
_HEAD_WIDTH: Final = 32  # hidden width of the user model's small networks
_CATEGORY_WIDTH: Final = 16


def plan_training(
    shape: EncoderShape,
    config: TrainingConfig,
    workload: TrainingWorkload,
    device: Device,
    calibration: Calibration | None = None,
) -> TrainingPlan:
    """Plan one training.

    Args:
        shape: Sizes of the encoder.
        config: How it is trained.
        workload: What it reads.
        device: Where it runs; with ``config.distribution.processes`` above 1, on as many of them
            (on a CPU, all processes share the one machine).
        calibration: What such a device reaches; ``None`` for what the catalogue's class reaches.

    Raises:
        ConfigError: The configuration does not fit the encoder or the device.
    """
    return _Training(
        shape, config, workload, device, calibration or default_calibration(device)
    ).plan()


def training_work(
    shape: EncoderShape,
    config: TrainingConfig,
    workload: TrainingWorkload,
    device: Device,
    calibration: Calibration,
) -> dict[str, Work]:
    """The work of one repeat of each stage of a training; see :func:`plan_training`."""
    return _Training(shape, config, workload, device, calibration).works()


class _Training:
    """The numbers of one plan."""

    def __init__(
        self,
        shape: EncoderShape,
        config: TrainingConfig,
        workload: TrainingWorkload,
        device: Device,
        calibration: Calibration,
    ) -> None:
        tuning = config.tuning
        if tuning.strategy not in ("frozen", "full") and tuning.tuned_layers > shape.layers:
            raise ConfigError.of(
                "tuned_layers", tuning.tuned_layers, f"1 to {shape.layers}, the encoder's layers"
            )
        if config.speed.precision == "bf16" and not device.supports("bf16"):
            raise ConfigError.of("precision", "bf16", f"auto or fp32 on {device.name}")
        self.shape, self.config, self.workload = shape, config, workload
        self.device, self.calibration = device, calibration
        self.half = config.speed.precision != "fp32" and device.supports("bf16")
        self.precision: Precision = "bf16" if self.half else "fp32"
        self.size = _HALF if self.half else _FLOAT
        self.lengths = workload.lengths.cut(config.max_tokens)
        self.strategy = tuning.strategy
        self.learning_layers = (
            0 if tuning.strategy == "frozen"
            else shape.layers if tuning.strategy == "full"
            else tuning.tuned_layers
        )  # fmt: skip
        self.constant_layers = shape.layers - self.learning_layers
        self.keeps_states = config.speed.cache_hidden_states and self.constant_layers > 0
        self.processes = config.distribution.processes
        self.micro = max(1, config.speed.micro_batches)
        self.opens_attention = config.speed.open_attention and not device.is_gpu
        self.learns = self.learning_layers > 0 and config.schedule.encoder_epochs > 0

    # ------------------------------------------------------------------ weights

    @property
    def learning_parameters(self) -> int:
        """Weights of the encoder that learn."""
        shape, tuning, layers = self.shape, self.config.tuning, self.learning_layers
        w, a, k, c = shape.width, shape.attention_width, shape.key_value_width, shape.channels
        pooling = w if self.config.pooling == "attention" else 0
        match self.strategy:
            case "frozen":
                return 0
            case "full":
                return shape.parameters + pooling
            case "top_k_layers":
                return round(layers * shape.layer_parameters) + shape.top_parameters + pooling
            case "adapters":
                bottleneck = tuning.adapter_width
                return layers * (2 * w * bottleneck + bottleneck + 3 * w) + pooling
            case _:
                ends = self._matrix_ends(w, a, k, c)
                rank = tuning.initial_rank if self.strategy == "adalora" else tuning.rank
                extra = rank * len(ends) if self.strategy == "adalora" else 0
                return layers * (rank * sum(ends) + extra) + pooling

    def _matrix_ends(self, w: int, a: int, k: int, c: int) -> list[int]:
        """Inputs plus outputs of each matrix of a layer."""
        if self.shape.model_type == "modernbert":
            return [w + 3 * a, a + w, w + 2 * c, c + w]
        ends = [w + a, w + k, w + k, a + w, w + c, c + w]
        return [*ends, w + c] if self.shape.gated else ends

    @property
    def added_parameters(self) -> int:
        """Weights that the strategy adds to the encoder."""
        return self.learning_parameters if self.strategy in ("lora", "adalora", "adapters") else 0

    @property
    def head_parameters(self) -> int:
        """Weights of the user model, about."""
        user, width = self.config.user_model, self.shape.width
        count = width * width + width * _HEAD_WIDTH + 4 * _HEAD_WIDTH
        if user.categories:
            count += (self.workload.categories + 1) * (_CATEGORY_WIDTH + 1)
        if user.kind == "multi_head":
            count += 4 * (width + _CATEGORY_WIDTH) ** 2
        if user.item_ids:
            count += self.workload.items * (user.id_dimension + 1) + width * user.id_dimension
        if user.user_ids:
            count += self.workload.users * (user.id_dimension + 1)
        return count

    # ------------------------------------------------------------------ a step

    @property
    def clicks_per_step(self) -> int:
        """Click samples of a step of the encoder's phase."""
        return min(self.config.schedule.encoder_batch_size, max(1, self.workload.clicks))

    @property
    def candidates_per_click(self) -> float:
        """Candidates that a click is compared with, itself included."""
        sampled = self.config.objective.loss in ("cross_entropy", "binary_cross_entropy")
        return 1 + (min(self.config.objective.negatives, self.workload.slate - 1) if sampled else 0)

    @property
    def items_per_part(self) -> float:
        """Items that one micro-batch of the encoder's phase indexes."""
        return self.items_of(self.clicks_per_step / self.micro)

    def items_of(self, clicks: float) -> float:
        """Items that so many clicks index together: distinct ones, or every occurrence."""
        history = min(self.workload.history, self.config.user_model.history_length)
        draws = clicks * (history + self.candidates_per_click)
        if not self.config.speed.distinct_items:
            return draws
        return min(draws, self.workload.popularity.distinct(draws))

    @property
    def texts_per_part(self) -> int:
        """Texts that one process encodes with gradient in one micro-batch."""
        texts, limit = self.items_per_part, self.config.speed.max_texts_per_step
        if limit:
            texts = min(texts, math.ceil(limit / self.micro))
        return max(1, math.ceil(texts / self.processes))

    def buckets(self, texts: int, lengths: TextLengths | None = None) -> list[tuple[int, int]]:
        """Texts and padded length of each batch."""
        speed = self.config.speed
        return (lengths or self.lengths).batches(
            texts,
            _BUCKET,
            buckets=speed.length_buckets,
            padded_to=None if speed.dynamic_padding else self.config.max_tokens,
        )

    def activations(self) -> dict[str, float]:
        """Bytes kept for the backward pass of one micro-batch, and what is used on the way."""
        shape, width = self.shape, self.shape.width
        buckets = self.buckets(self.texts_per_part)
        tokens = sum(texts * length for texts, length in buckets)
        largest = max(texts * length for texts, length in buckets)
        saved = layer_saves(
            shape,
            self.half,
            weights_learn=self.strategy != "adapters",
            scales_learn=self.strategy in ("top_k_layers", "full"),
            open_attention=self.opens_attention,
        )
        one_layer = sum(saved.bytes(texts * length, length) for texts, length in buckets)
        layers = self.learning_layers
        added = 0.0
        if self.strategy == "adapters":
            added = (
                tokens * layers * adapter_saves(width, self.config.tuning.adapter_width, self.half)
            )
            layers -= 1  # nothing below the first adapter wants a gradient
        elif self.strategy in ("lora", "adalora"):
            matrices = len(self._matrix_ends(width, width, width, width))
            added = tokens * layers * (self.size * matrices * self.config.tuning.rank + 2 * width)
        kept = one_layer * layers + added
        if self.config.speed.gradient_checkpointing:
            # A layer's input each, and all of one layer of one batch while it is recomputed.
            kept = tokens * layers * _FLOAT * width
            kept += max(saved.bytes(texts * length, length) for texts, length in buckets)
        # Rounded copies of the matrices live as long as the graph: shared between batches where
        # they learn, one a batch where they do not.
        rounded = 0.0
        if self.half:
            copies = 1 if self.strategy in ("top_k_layers", "full") else len(buckets)
            rounded = _HALF * self.learning_layers * shape.matrix_parameters * copies
            if self.config.speed.gradient_checkpointing:
                rounded = _HALF * shape.matrix_parameters
        # Attention's working memory: scores of one batch, where they are not fused, and the
        # feed-forward part of one batch.
        working = largest * (max(shape.channels, 3 * shape.attention_width) * _FLOAT * 2)
        return {
            "activations": kept + tokens * width * _FLOAT,
            "rounded weights": rounded,
            "temporary": working,
        }

    def head_activations(self) -> float:
        """Bytes that the user model keeps of one micro-batch."""
        clicks = self.clicks_per_step / self.micro / self.processes
        history = self.config.user_model.history_length
        width = self.shape.width
        # Gathered vectors of clicks and candidates, their similarities in a dozen summaries.
        gathered = clicks * (history + self.candidates_per_click) * (width + _CATEGORY_WIDTH)
        compared = clicks * history * self.candidates_per_click * 12
        items = self.items_per_part * width * 4
        return _FLOAT * (gathered + compared + items)

    # ------------------------------------------------------------------ memory

    def memory(self) -> Memory:
        """Memory of one device in the moment of the largest use."""
        moments = {"step": self._held() | self._step()}
        if self.device.is_gpu:
            parts = moments["step"]
            parts["context"] = float(self.calibration.device_context_bytes)
            if self.learns:
                # AdamW updates all weights of a group at once, with one more copy of them.
                parts["temporary"] += _FLOAT * self.learning_parameters / self.shards
            return Memory(_rounded(parts))
        # Once the moments of AdamW are there, they stay; before, the texts are encoded once.
        moments["hidden states"] = self._held(optimiser=False) | self._filling()
        held = {
            name: self._on_host(parts, learns=name != "hidden states")
            for name, parts in moments.items()
        }
        largest = max(held, key=lambda name: sum(held[name].values()))
        return Memory(_rounded(held[largest]), moment=largest)

    def host_memory(self) -> Memory:
        """Memory of the machine around one GPU: weights are read there, twice while they load."""
        parts = {"weights": 2.0 * _FLOAT * self.shape.parameters}
        return Memory(_rounded(self._on_host(parts)))

    @property
    def shards(self) -> int:
        """Parts that weights, gradients and moments are spread over."""
        return self.processes if self.config.distribution.shard_encoder else 1

    def _held(self, *, optimiser: bool = True) -> dict[str, float]:
        """What is held all the while."""
        learning, head, shards = self.learning_parameters, self.head_parameters, self.shards
        if not self.learns:
            learning = 0
        moving = _FLOAT * (learning / shards + head)
        width = self.shape.width
        parts = {
            "weights": _FLOAT * (self.shape.parameters + self.added_parameters) / shards
            + _FLOAT * head,
            # The last vectors of all items, twice more as the user model sees them when it scores.
            "item vectors": 3.0 * _FLOAT * self.workload.items * width,
        }
        if optimiser:
            parts |= {"gradients": moving, "optimiser states": 2 * moving}
        return parts

    def _step(self) -> dict[str, float]:
        """What a step holds beside."""
        parts = {"user model": self.head_activations(), "temporary": 0.0}
        if self.learns:
            parts |= self.activations()
            heap = self.calibration.heap_share(*self._kind())
            for name in ("activations", "rounded weights"):
                parts[name] *= heap
        return parts

    def _filling(self) -> dict[str, float]:
        """What computing the hidden states holds: a segment, its copies, and its bytes."""
        segment = min(self.cache_bytes, _SEGMENT_BYTES) * _SEGMENT_COPIES
        bucket = max(texts * length for texts, length in self.buckets(_BUCKET))
        shape = self.shape
        forward = bucket * _FLOAT * (2 * shape.channels + 4 * shape.width)
        return {"temporary": segment + forward}

    def _kind(self) -> tuple[str, str, str]:
        model_type = self.shape.model_type
        family = "decoder" if self.shape.causal else "bert"
        strategy = {"lora": "low-rank", "adalora": "low-rank", "adapters": "adapters"}
        return (
            "modernbert" if model_type == "modernbert" else family,
            self.precision,
            strategy.get(self.strategy, "plain"),
        )

    def _on_host(self, parts: Mapping[str, float], *, learns: bool = True) -> dict[str, float]:
        """Add what every process holds in the machine's memory; ``learns`` once steps are taken."""
        learning = self.learning_parameters if self.learns else 0
        whole = dict(parts)
        whole["best weights"] = _FLOAT * (learning + self.head_parameters)
        whole["hidden states"] = self.cache_bytes
        # As they are read, and as arrays of row numbers.
        whole["tables"] = self.workload.table_bytes * 2.0
        whole["context"] = float(self.calibration.context_bytes)
        whole["libraries"] = WORKING_BYTES + (_LEARNING_BYTES if learns else 0.0)
        whole["kernels"] = self.kernels() * self.calibration.kernel_bytes
        # Processes of one machine map the same files.
        shared = ("hidden states",)
        return {k: v * (1 if k in shared else self.processes) for k, v in whole.items()}

    def kernels(self) -> int:
        """Matrix products of different shape that are compiled, at most as many as are kept.

        A shape is a number of rows (texts of a batch times their padded length) with the two ends
        of a matrix; backward there are two products more for a matrix that learns, one for a
        matrix that gradients only pass.
        """
        return min(sum(self.compiled().values()), self.calibration.kernels)

    def compiled(self) -> dict[str, int]:
        """Matrix products that each stage is the first to need; see :meth:`kernels`."""
        if not self.half or self.device.is_gpu:
            return {}
        ends = len(self.shape.matrix_kinds)
        below: set[int] = set()
        if self.keeps_states:
            lengths = set(self.lengths.quantiles)
            below = {max(1, _FILL_TOKENS // length) * length for length in lengths}
        every = {texts * length for texts, length in self.buckets(self.workload.items)}
        steps = self._step_rows()
        encoding = ends * len(every - below)
        encoder = ends * len(steps - every - below)
        if self.strategy in ("top_k_layers", "full"):
            encoder += 2 * ends * len(steps)
        elif steps:
            encoder += ends * len(steps)
            added = 4 if self.strategy in ("lora", "adalora") else 2
            encoding += added * len(every)
            encoder += added * 3 * len(steps)
        return {"hidden states": ends * len(below), "encoding": encoding, "encoder": encoder}

    def _step_rows(self) -> set[int]:
        """Rows of the batches that the encoder sees in its steps, by drawing some."""
        if not self.learns:
            return set()
        schedule = self.config.schedule
        steps = schedule.encoder_epochs * math.ceil(
            self.workload.clicks / schedule.encoder_batch_size
        )
        count = min(steps * self.micro, _DRAWN_STEPS)
        rows = set[int]()
        for drawn in _drawn(self.lengths, self.texts_per_part, count):
            rows |= {size * length for size, length in self.buckets(len(drawn.quantiles), drawn)}
        return rows

    @property
    def cache_bytes(self) -> float:
        """Hidden states of all texts, where they are kept."""
        if not self.keeps_states:
            return 0.0
        return self.workload.items * self.lengths.mean * self.shape.width * self.size

    # ------------------------------------------------------------------ time

    def stages(self) -> tuple[Stage, ...]:
        """The work from start to end."""
        repeats = self._repeats()
        found = [Stage("start", 1, 0.0, 0.0, self.calibration.start_seconds)]
        for name, work in self.works().items():
            if repeats[name]:
                found.append(self._stage(name, repeats[name], work))
        return tuple(found)

    def _repeats(self) -> dict[str, int]:
        """How often each stage is done."""
        workload, schedule = self.workload, self.config.schedule
        learning = schedule.encoder_epochs if self.learns else 0
        return {
            "hidden states": 1,
            "head": schedule.head_epochs * math.ceil(workload.clicks / schedule.head_batch_size),
            "encoder": learning * math.ceil(workload.clicks / schedule.encoder_batch_size),
            # All items before the first epoch, and after each in which the encoder learnt.
            "encoding": 1 + learning,
            "validation": schedule.head_epochs + learning,
        }

    def works(self) -> dict[str, Work]:
        """The work of one repeat of each stage."""
        workload, schedule = self.workload, self.config.schedule
        found: dict[str, Work] = {}
        if self.keeps_states:
            found["hidden states"] = self._encode(
                workload.items, self.constant_layers, backward=False, padded=False, constant=True
            )
        found["head"] = self._user_step(schedule.head_batch_size)
        if self.learns:
            found["encoder"] = self._encoder_step()
        above = self.learning_layers if self.keeps_states else self.shape.layers
        found["encoding"] = self._encode(workload.items, above, backward=False)
        found["validation"] = self._score(workload.validation_impressions * workload.slate)
        repeats = self._repeats()
        for name, count in self.compiled().items():
            if name in found:
                found[name].kernels = count / max(1, repeats[name])
        return found

    def _encode(
        self,
        texts: int,
        layers: int,
        *,
        backward: bool,
        padded: bool = True,
        constant: bool = False,
    ) -> Work:
        """Work of running texts through some layers; ``constant`` ones lie below all that learn."""
        shape = self.shape
        buckets = self.buckets(texts) if padded else [(texts, round(self.lengths.mean))]
        work = Work()
        weights_learn = self.strategy in ("top_k_layers", "full")
        again = backward and self.config.speed.gradient_checkpointing
        # Layers that gradients reach the input of. Nothing below the lowest one wants them, unless
        # the embeddings learn; with adapters, nothing below the lowest adapter.
        reached = layers if self.strategy == "full" else layers - 1
        first = shape.width * (shape.attention_width + 2.0 * shape.key_value_width)
        for count, length in buckets:
            tokens = count * length
            matrices = shape.matrix_parameters * layers
            passes = matrices * (2.0 if again else 1.0)
            if backward:
                passes += matrices if weights_learn else 0.0
                passes += shape.matrix_parameters * reached
                if reached < layers and self.strategy != "adapters":
                    passes += shape.matrix_parameters - first
            work.flops += 2.0 * passes * tokens
            attention = 4.0 * length * shape.attention_width * tokens
            work.flops += (
                layers * attention * ((3.5 if backward else 1.0) + (1.0 if again else 0.0))
            )
            saved = layer_saves(shape, self.half, open_attention=self.opens_attention)
            moved = (4.0 if backward else 1.5) + (1.5 if again else 0.0)
            work.bytes += layers * saved.bytes(tokens, length) * moved
            work.bytes += layers * self._moved_beside(tokens, constant=constant, backward=backward)
            work.operators += layers * ((120 if backward else 35) + (35 if again else 0))
        batches = len(buckets) if padded else math.ceil(texts * self.lengths.mean / _FILL_TOKENS)
        if not padded:
            work.operators *= batches
        if backward and weights_learn:
            work.bytes += self._gradients_moved(batches)
        elif self.half:
            # Autocast keeps the rounded matrices of those alone that learn.
            work.bytes += batches * layers * shape.matrix_parameters * (_FLOAT + _HALF)
        return work

    def _gradients_moved(self, buckets: int) -> float:
        """Bytes moved for the gradients of weights, beside those of activations.

        Each batch of texts makes gradients of all weights that learn, and all but the first are
        added to what is there: two read, one written. Under autocast matrices are rounded once a
        step, and their gradients are widened. That of the token table is as large as the table,
        however few tokens there were.
        """
        matrices = self.learning_layers * self.shape.matrix_parameters
        table = self.shape.embedding_parameters if self.strategy == "full" else 0
        added = 3.0 * _FLOAT * (buckets - 1)
        moved = matrices * added + table * (added + _FLOAT * buckets)
        if self.half:
            moved += matrices * (_FLOAT + _HALF) * (1 + buckets)
        return moved

    def _moved_beside(self, tokens: float, *, constant: bool, backward: bool) -> float:
        """Bytes that one layer moves for nothing that is kept.

        Rotating queries and keys goes over them ten times (negate, join, two products, a sum), in
        float32, and twice as often backwards. A low-rank matrix adds to the output of its matrix:
        its input is rounded and taken to few numbers; what these make is written, scaled, and
        added. Backwards the same is read and made again, and the input's gradient is widened and
        added to that of the matrix.
        """
        shape, moved = self.shape, 0.0
        if shape.is_rotated:
            rotated = 10.0 * _FLOAT * (shape.attention_width + shape.key_value_width)
            moved += rotated * (3.0 if backward else 1.0)
        if self.strategy in ("lora", "adalora") and not constant:
            w, a, k, c = shape.width, shape.attention_width, shape.key_value_width, shape.channels
            # Of a number of inputs and outputs together: they are as many in a layer.
            forwards, backwards = (10.0, 15.0) if self.half else (14.0, 18.0)
            moved += (forwards + (backwards if backward else 0.0)) * sum(
                self._matrix_ends(w, a, k, c)
            )
        return moved * tokens

    def _encoder_step(self) -> Work:
        work = Work()
        for _ in range(self.micro):
            work.add(self._encode(self.texts_per_part, self.learning_layers, backward=True))
            if not self.keeps_states and self.constant_layers:
                layers = self.constant_layers
                work.add(self._encode(self.texts_per_part, layers, backward=False, constant=True))
        work.add(self._user_step(self.clicks_per_step))
        # AdamW reads weights, gradients and two moments and writes all but the gradients, of which
        # the norm was taken and which were scaled before: ten passes.
        work.bytes += 10 * _FLOAT * self.learning_parameters
        if self.strategy == "adalora":
            # Importances and their means of three matrices, distances from orthogonal ones.
            kinds = len(self._matrix_ends(1, 1, 1, 1))
            work.operators += 120 * kinds * self.learning_layers
        return work

    def _user_step(self, clicks: float) -> Work:
        work = Work(operators=100)
        for _ in range(self.micro):
            work.add(self._user_part(clicks / self.micro))
        return work

    def _user_part(self, clicks: float) -> Work:
        history, width = self.config.user_model.history_length, self.shape.width
        candidates = self.candidates_per_click
        work = Work()
        items = self.items_of(clicks)
        work.float_flops = 6.0 * items * width * (width + _HEAD_WIDTH)
        work.float_flops += 6.0 * clicks * history * candidates * width
        gathered = clicks * (history + candidates) * width + clicks * history * candidates * 12
        work.bytes = 6.0 * _FLOAT * (gathered + items * width * 4 + self.head_parameters * 3)
        work.operators = 200
        return work

    def _score(self, pairs: float) -> Work:
        width, history = self.shape.width, self.config.user_model.history_length
        work = Work()
        work.float_flops = 2.0 * pairs * history * width
        work.bytes = _FLOAT * pairs * (history * 12 + width)
        work.operators = 100
        return work

    def _stage(self, name: str, repeats: float, work: Work) -> Stage:
        device, factors = self.device, self.calibration
        rate = device.teraflops[self.precision] * 1e12
        float_rate = device.teraflops["fp32"] * 1e12
        bandwidth = device.bandwidth_gb_s * 1e9
        limit = max(work.flops / rate + work.float_flops / float_rate, work.bytes / bandwidth)
        width = self.shape.width
        seconds = work.flops / (rate * factors.share(self.precision, width))
        seconds += work.float_flops / (float_rate * factors.share("fp32", width))
        seconds += work.bytes / (bandwidth * factors.bandwidth_share)
        seconds += work.operators * factors.operator_seconds
        seconds += work.kernels * COMPILING_SECONDS
        return Stage(name, repeats, work.flops + work.float_flops, limit, seconds)

    def plan(self) -> TrainingPlan:
        """Put everything together."""
        memory = self.memory()
        schedule = self.config.schedule
        epochs = schedule.head_epochs + (schedule.encoder_epochs if self.learns else 0)
        return TrainingPlan(
            device=self.device,
            devices=self.processes if self.device.is_gpu else 1,
            precision=self.precision,
            memory=memory,
            host_memory=self.host_memory() if self.device.is_gpu else memory,
            stages=self.stages(),
            parameters=self.shape.parameters,
            trainable_parameters=self.learning_parameters + self.head_parameters,
            clicks=self.workload.clicks * epochs,
            texts_per_step=float(self.texts_per_part * self.micro * self.processes),
            is_calibrated=self.calibration.is_measured,
        )


@lru_cache(maxsize=16)
def _drawn(lengths: TextLengths, texts: int, steps: int) -> tuple[TextLengths, ...]:
    """Lengths of the texts of some steps; the same for every device that is planned for."""
    rng = random.Random(0)  # noqa: S311 - no secret; the same plan each time
    return tuple(
        TextLengths(tuple(sorted(rng.choices(lengths.quantiles, k=texts)))) for _ in range(steps)
    )


@dataclass(slots=True)
class Work:
    """What a stretch of work asks of a device.

    Attributes:
        flops: Operations of matrix products in the precision of the training.
        float_flops: Those of the user model, which stays in float32.
        bytes: Bytes moved by element-wise work.
        operators: Operators started.
        kernels: Matrix products that are compiled first, spread over all repeats.
    """

    flops: float = 0.0
    float_flops: float = 0.0
    bytes: float = 0.0
    operators: float = 0.0
    kernels: float = 0.0

    def add(self, other: Work) -> None:
        """Add the work of another stretch."""
        self.flops += other.flops
        self.float_flops += other.float_flops
        self.bytes += other.bytes
        self.operators += other.operators
        self.kernels += other.kernels


def _rounded(parts: Mapping[str, float]) -> dict[str, int]:
    return {name: math.ceil(size) for name, size in parts.items() if size > 0}

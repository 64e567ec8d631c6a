"""What other memory estimators say of a training that recflow's planner plans.

Four tools are asked, each for the peak memory of the device that trains, in bytes:

* Hugging Face accelerate, ``accelerate estimate-memory``: the installed library itself is called,
  as its command does, on a model without weights
  (https://huggingface.co/docs/accelerate/usage_guides/model_size_estimator).
* DeepSpeed 0.19.8, ``estimate_zero2_model_states_mem_needs`` and its sister of stage 3
  (https://deepspeed.readthedocs.io/en/latest/memory.html): the published formulas. The package is
  not installed for them: it is built from source, and importing it sets up accelerators.
* EleutherAI's calculator, ``calc/calc_transformer_mem.py`` of https://github.com/EleutherAI/cookbook
  at commit 069ae2e, after "Transformer Math 101" (https://blog.eleuther.ai/transformer-math/): the
  published formulas; it is a script, no package.
* llm-analysis 0.2.2, ``LLMAnalysis.training`` (https://github.com/cli99/llm-analysis): the formulas
  of its documentation and of Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198) that it
  follows. The package asks for transformers below 5 and cannot be installed beside recflow.

Restated formulas are tested against numbers that the tools themselves returned.

None of them knows a recommender's step, so each is asked in up to three readings (`Reading`):

* ``as documented``: what the tool says of the model. Batch: the texts that one device encodes with
  gradient at once, as recflow's step has them; sequence length: what they are padded to. All
  weights learn, since no tool can be told otherwise.
* ``every occurrence``: the same with a text for every click of a history and every candidate, as
  one would count without knowing that distinct items are encoded once. Only the last two tools ask
  for a batch.
* ``what learns``: the tool's own bytes a weight and a token, applied by somebody who knows its
  sources to the weights and the layers that learn; the other weights are only held. This is better
  than the tool, and the fairest thing to compare with.

No reading contains what is outside the model: libraries, tables, kept hidden states, item vectors,
the copy of the best weights. Compare with measured memory, and with measured memory less what the
process holds before the encoder is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any, Final, Literal

from recflow.core.errors import ConfigError
from recflow.hardware.plan import TrainingPlan
from recflow.hardware.shape import EncoderShape
from recflow.modeling.config import TrainingConfig

DEEPSPEED_VERSION: Final = "0.19.8"
ELEUTHER_VERSION: Final = "069ae2e"
LLM_ANALYSIS_VERSION: Final = "0.2.2"

Reading = Literal["as documented", "every occurrence", "what learns"]
READINGS: Final[tuple[Reading, ...]] = ("as documented", "every occurrence", "what learns")

_FLOAT: Final = 4
_HALF: Final = 2


@dataclass(frozen=True, slots=True)
class Run:
    """One training, in the terms that the tools ask for.

    Attributes:
        model: Content of the encoder's ``config.json``.
        shape: Sizes of the encoder.
        config: How it is trained.
        half: Whether matrices are multiplied in bfloat16 under autocast.
        length: Tokens of a text, paddings included.
        texts: Texts that one device encodes with gradient at once: of a step's part, where the step
            is split into ``micro_batches``.
        occurrences: Clicks of histories and candidates in that part, repeated items counted again.
        trainable: Weights that learn, user model included.
    """

    model: Mapping[str, Any]
    shape: EncoderShape
    config: TrainingConfig
    half: bool
    length: int
    texts: int
    occurrences: int
    trainable: int

    def __post_init__(self) -> None:
        """Raise ConfigError where the weights are spread over devices: not compared here."""
        if self.config.distribution.shard_encoder:
            raise ConfigError.of("shard_encoder", True, "false in a comparison of estimators")

    @classmethod
    def planned(
        cls,
        model: Mapping[str, Any],
        config: TrainingConfig,
        plan: TrainingPlan,
        *,
        length: float,
        history: float,
    ) -> Run:
        """The run of a plan.

        Args:
            model: Content of the encoder's ``config.json``.
            config: How it is trained.
            plan: What recflow plans of it.
            length: Mean tokens of a text, paddings included.
            history: Mean clicks of a history.
        """
        parts = config.speed.micro_batches * config.distribution.processes
        clicks = min(config.schedule.encoder_batch_size, plan.clicks)
        sampled = config.objective.loss in ("cross_entropy", "binary_cross_entropy")
        candidates = 1 + (config.objective.negatives if sampled else 0)
        clicked = min(history, config.user_model.history_length)
        return cls(
            model=model,
            shape=EncoderShape.from_config(model),
            config=config,
            half=plan.precision == "bf16",
            length=math.ceil(length),
            texts=math.ceil(plan.texts_per_step / parts),
            occurrences=math.ceil(clicks * (clicked + candidates) / parts),
            trainable=plan.trainable_parameters,
        )

    @property
    def learning_layers(self) -> int:
        """Layers that a gradient passes through."""
        if self.config.tuning.strategy == "frozen":
            return 0
        if self.config.tuning.strategy == "full":
            return self.shape.layers
        return min(self.config.tuning.tuned_layers, self.shape.layers)

    @property
    def held(self) -> int:
        """Weights of the encoder that do not learn."""
        shape, strategy = self.shape, self.config.tuning.strategy
        if strategy == "full":
            return 0
        if strategy == "top_k_layers":
            layers = round(self.learning_layers * shape.layer_parameters)
            return shape.parameters - layers - shape.top_parameters
        return shape.parameters

    @property
    def size(self) -> int:
        """Bytes of a number in a multiplication."""
        return _HALF if self.half else _FLOAT

    def batch(self, reading: Reading) -> int:
        """Texts that a tool is told of."""
        return self.occurrences if reading == "every occurrence" else self.texts


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one tool says.

    Attributes:
        tool: Its name.
        version: Its version, or the commit of its formulas.
        reading: How it was asked.
        bytes: Peak memory of the device that trains; ``None`` where the tool cannot say it.
        note: What the number leaves out, or why there is none.
    """

    tool: str
    version: str
    reading: Reading
    bytes: int | None
    note: str


def estimate_all(run: Run) -> list[Estimate]:
    """All tools in all readings; a reading in which a tool is told the same again is left out."""
    asked: list[tuple[Callable[[Run, Reading], Estimate], bool]] = [
        (accelerate_bytes, False),
        (deepspeed_bytes, False),
        (deepspeed_stage_3_bytes, False),
        (eleuther_bytes, True),
        (llm_analysis_bytes, True),
    ]
    return [
        ask(run, reading)
        for ask, knows_batch in asked
        for reading in READINGS
        if knows_batch or reading != "every occurrence"
    ]


# --------------------------------------------------------------------- accelerate


def accelerate_bytes(run: Run, reading: Reading = "as documented") -> Estimate:
    """The column ``Training using Adam`` of ``accelerate estimate-memory``.

    Told: the model, and ``float32`` or ``float16``. It takes the largest of four stages, for a
    batch of 1 without activations: four times the weights in float32, twice in mixed precision.
    """
    from accelerate.commands.estimate import estimate_training_usage

    dtype = "float16" if run.half else "float32"
    whole, _ = _skeleton(json.dumps(dict(run.model), sort_keys=True))
    learning = whole if reading != "what learns" else _FLOAT * run.trainable
    held = 0 if reading != "what learns" else _FLOAT * run.held
    said = held + max(estimate_training_usage(learning, dtype).values())
    return Estimate("accelerate", version("accelerate"), reading, said, "without activations")


@cache
def _skeleton(model: str) -> tuple[int, int]:
    """Bytes of a model in float32, and weights of its largest module, none of them allocated."""
    import torch
    from accelerate import init_empty_weights
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoConfig, AutoModel

    values: dict[str, Any] = json.loads(model)
    config: Any = AutoConfig.for_model(values.pop("model_type"), **values)
    with init_empty_weights(include_buffers=True):
        built = AutoModel.from_config(config, dtype=torch.float32)
    modules = (sum(p.numel() for p in m.parameters(recurse=False)) for m in built.modules())
    return int(calculate_maximum_sizes(built)[0]), max(modules)


# --------------------------------------------------------------------- DeepSpeed


def deepspeed_bytes(run: Run, reading: Reading = "as documented") -> Estimate:
    """ZeRO stage 2 on one GPU, nothing offloaded.

    Told: the number of weights. Each takes 2 bytes and, over all GPUs together, 18 more: gradients
    in 16 and 32 bits, weights in 32, and Adam's two moments. Always mixed precision.
    """
    if reading == "what learns":
        return _deepspeed("ZeRO-2", reading, zero_2_bytes(run.trainable) + _HALF * run.held)
    return _deepspeed("ZeRO-2", reading, zero_2_bytes(run.shape.parameters))


def deepspeed_stage_3_bytes(run: Run, reading: Reading = "as documented") -> Estimate:
    """ZeRO stage 3 on one GPU, nothing offloaded.

    Told: the number of weights, and that of the largest module, which is gathered in 16 bits with
    its gradient: 4 bytes a weight. All weights take 18.
    """
    _, largest = _skeleton(json.dumps(dict(run.model), sort_keys=True))
    if reading == "what learns":
        return _deepspeed(
            "ZeRO-3", reading, zero_3_bytes(run.trainable, largest) + _HALF * run.held
        )
    return _deepspeed("ZeRO-3", reading, zero_3_bytes(run.shape.parameters, largest))


def zero_2_bytes(weights: int) -> int:
    """GPU memory that ``estimate_zero2_model_states_mem_needs`` says of one GPU."""
    return (2 + 18) * weights


def zero_3_bytes(weights: int, largest: int) -> int:
    """GPU memory that ``estimate_zero3_model_states_mem_needs`` says of one GPU."""
    return 18 * weights + 4 * largest


def _deepspeed(stage: str, reading: Reading, said: int) -> Estimate:
    note = "without activations; always mixed precision"
    return Estimate(f"DeepSpeed {stage}", DEEPSPEED_VERSION, reading, said, note)


# --------------------------------------------------------------------- EleutherAI


def eleuther_bytes(run: Run, reading: Reading = "as documented") -> Estimate:
    """EleutherAI's calculator, and the article behind it.

    Told, as the script's arguments: layers, width, heads, share of key-value heads, feed-forward
    width over width, matrices of the feed-forward part (3 with a gate), vocabulary, sequence
    length, batch, and for float32 ``--disable-mixed-precision --low-prec-bytes-per-val 4``. The
    script counts the weights itself, with an output layer of the vocabulary beside the embeddings.
    ``what learns`` takes the true number, and the article where it is closer to what recflow does:
    recomputing keeps a layer's input alone, and weights in float32 need no second copy.
    """
    shape, informed = run.shape, reading == "what learns"
    checkpointing = run.config.speed.gradient_checkpointing
    tokens = run.batch(reading) * run.length
    per_token = (16 * run.size + 2) * shape.width
    pairs = (2 * run.size + 1) * shape.heads * run.length
    if not informed:
        # Weights, gradients in float32, and 12: their copy in float32 and Adam's two moments.
        states = _eleuther_weights(run) * (run.size + _FLOAT + 12)
        layer = per_token if checkpointing else per_token + pairs
        said = states + tokens * shape.layers * layer
    else:
        states = run.trainable * (run.size + _FLOAT + (12 if run.half else 8)) + run.held * run.size
        layer = run.size * shape.width if checkpointing else per_token + pairs
        said = states + tokens * run.learning_layers * layer
    note = "recomputed activations" if checkpointing else "attention that is not fused"
    return Estimate("EleutherAI", ELEUTHER_VERSION, reading, round(said), note)


def _eleuther_weights(run: Run) -> float:
    """Weights as the calculator counts them."""
    shape = run.shape
    w, layers = shape.width, shape.layers
    attention = int(2 * (1 + shape.key_value_heads / shape.heads) * layers * w * w)
    forward = (3 if shape.gated else 2) * layers * w * shape.channels
    ends = 2 * shape.vocabulary * w + w * run.length
    return ends + 8 * w * layers + 2 * w + attention + forward


# --------------------------------------------------------------------- llm-analysis


def llm_analysis_bytes(run: Run, reading: Reading = "as documented") -> Estimate:
    """llm-analysis, ``training`` with its defaults: flash attention, Adam, no sharding.

    Told: layers, heads, key-value heads, width and vocabulary, as it reads them from a Hugging Face
    configuration (the feed-forward width it then takes for four times the width), 16 bits for
    everything, batch, sequence length, and full recomputation where recflow checkpoints. It adds
    the logits of a language model (twice for a batch of 1, which is not restated). It refuses 32
    bits; which GPU it is told does not change what it says, only from where on it refuses a batch.
    ``what learns`` takes the true number of weights and the true feed-forward width, and no logits.
    """
    shape, informed = run.shape, reading == "what learns"
    tool, known = "llm-analysis", LLM_ANALYSIS_VERSION
    if not informed and not run.half:
        reason = "weights and activations of 4, 8 or 16 bits only"
        return Estimate(tool, known, reading, None, reason)
    tokens, size, w = run.batch(reading) * run.length, run.size, shape.width
    channels = shape.channels if informed else 4 * w
    attention = size * (7 * w + 4 * shape.heads) + w  # with a byte a value for dropout's mask
    forward = size * (w + 2 * channels)
    norm = _FLOAT * w
    layer, last = attention + forward + 2 * norm, norm
    if run.config.speed.gradient_checkpointing:
        layer, last = size * w, 0
    if informed:
        states = run.trainable * (size + _FLOAT + (12 if run.half else 8)) + run.held * size
        said = states + tokens * run.learning_layers * layer
        return Estimate(tool, known, reading, round(said), "logits left out")
    said = _llm_analysis_weights(shape) * (size + _FLOAT + 12)
    said += tokens * (shape.layers * layer + last + size * shape.vocabulary)
    return Estimate(tool, known, reading, round(said), "with logits of the vocabulary")


def _llm_analysis_weights(shape: EncoderShape) -> float:
    """Weights as llm-analysis counts them: no biases, no positions, a norm's scales only."""
    w = shape.width
    attention = 2 * w * w + 2 * w * w * shape.key_value_heads / shape.heads
    return w * shape.vocabulary + shape.layers * (attention + 2 * w * 4 * w + 2 * w) + w

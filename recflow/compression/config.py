"""How each compression step works: one frozen dataclass a step, checked before any work starts.

Loads no PyTorch, so that Dagster definitions and the command line may import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from recflow.core.errors import ConfigError
from recflow.modeling.config import (
    require_above_zero,
    require_at_least,
    require_one_of,
    require_share,
)

BLOCK_SIZES: Final = (16, 32, 64, 128, 256)
CODECS: Final = ("float32", "float16", "int8", "pq")
CALIBRATIONS: Final = ("minmax", "percentile")
HIDDEN_LAYERS: Final = ("last", "every")
ALLOCATIONS: Final = ("uniform", "global")
CRITERIA: Final = ("sensitivity", "activation", "energy")
PATTERNS: Final = ("2:4", "unstructured")
SCORES: Final = ("magnitude", "activation")
_REMOVED_SHARES: Final = ("head_share", "channel_share")
_PRUNING_TARGETS: Final = ("target_share", "target_latency_share")
PRECISIONS: Final = ("fp32", "fp16", "bf16", "int8_dynamic", "int8_static", "int4")


@dataclass(frozen=True, slots=True)
class DistillationConfig:
    """A student of fewer layers, taught by the parent.

    It learns from item texts first (vectors and hidden states of the teacher), then from clicks
    (those of the log, and the scores the teacher gives the same slates).

    Attributes:
        layers: Layers of the student, taken evenly from the teacher's.
        width: Width of its hidden states; 0 keeps the teacher's.
        epochs: Passes over the texts of train.
        max_steps: Most optimiser steps on texts, however many texts there are.
        batch_size: Texts a step.
        learning_rate: Peak learning rate on texts.
        hidden_layers: ``last`` compares the hidden states behind the last layer, ``every`` those
            behind each layer with those behind the teacher's layer that it began as.
        hidden_weight: What the distance of hidden states counts beside that of vectors; 0 leaves
            it out.
        click_steps: Optimiser steps on clicks; 0 leaves them out.
        click_batch_size: Clicks a step.
        click_texts: Most texts encoded with gradient a step on clicks.
        negatives: Non-clicked candidates a click.
        score_weight: Share of the teacher's scores in the loss on clicks; the rest are the clicks.
        click_learning_rate: Peak learning rate on clicks.
        tune_user_model: Whether the user model learns from the clicks as well.
        weight_decay: AdamW's decoupled weight decay.
        gradient_clip: Largest gradient norm.
        validations: How often each of the two trainings is validated; its best state stays.
        max_states_bytes: Most disk for the teacher's hidden states; where they need more, the
            teacher computes them for every batch again.
        max_validation_impressions: Most impressions scored to choose and report the accuracy.
        threads: Threads torch may use.
        seed: Seed of everything random.
    """

    layers: int = 3
    width: int = 0
    epochs: int = 12
    max_steps: int = 300
    batch_size: int = 64
    learning_rate: float = 1e-3
    hidden_layers: str = "last"
    hidden_weight: float = 1.0
    click_steps: int = 40
    click_batch_size: int = 64
    click_texts: int = 64
    negatives: int = 4
    score_weight: float = 0.8
    click_learning_rate: float = 3e-5
    tune_user_model: bool = False
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    validations: int = 2
    max_states_bytes: int = 2_000_000_000
    max_validation_impressions: int = 2_000
    threads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        require_at_least(
            self,
            1,
            "layers",
            "epochs",
            "max_steps",
            "batch_size",
            "click_batch_size",
            "click_texts",
            "negatives",
            "validations",
            "max_validation_impressions",
            "threads",
        )
        require_at_least(
            self, 0, "width", "hidden_weight", "click_steps", "weight_decay", "max_states_bytes"
        )
        require_at_least(self, 0, "seed")
        require_above_zero(self, "learning_rate", "click_learning_rate", "gradient_clip")
        require_one_of(self, "hidden_layers", HIDDEN_LAYERS)
        if not 0 <= self.score_weight <= 1:
            raise ConfigError.of("score_weight", self.score_weight, "0 to 1")


@dataclass(frozen=True, slots=True)
class PruningConfig:
    """What to remove, and how to recover.

    Attributes:
        allocation: ``global`` lets the parts of all layers compete, ``uniform`` removes the same
            share of every layer.
        head_share: Share of each layer's attention heads to remove, with ``uniform``; a third where
            no share is given, none where only the other one is.
        channel_share: The same of its feed-forward channels; half where no share is given.
        target_share: Share of the layers' weights to keep, with ``global``; 5/9 where no target is
            given, which is what ``uniform`` leaves of BERT by default.
        target_latency_share: Share of the parent's time that the encoder may take, measured on this
            machine; the other target of ``global``.
        channel_multiple: With ``global``, a layer keeps a multiple of so many channels.
        importance_clicks: Training clicks that importance is measured on.
        importance_batch_size: Clicks a backward pass.
        negatives: Non-clicked candidates a click.
        recovery_steps: Optimiser steps of the recovery; 0 leaves it out.
        recovery_batch_size: Item texts a step.
        learning_rate: Peak learning rate of the recovery.
        weight_decay: AdamW's decoupled weight decay.
        gradient_clip: Largest gradient norm.
        max_validation_impressions: Most impressions scored to report the accuracy.
        threads: Threads torch may use.
        seed: Seed of everything random.
    """

    allocation: str = "global"
    head_share: float | None = None
    channel_share: float | None = None
    target_share: float | None = None
    target_latency_share: float | None = None
    channel_multiple: int = 16
    importance_clicks: int = 256
    importance_batch_size: int = 32
    negatives: int = 4
    recovery_steps: int = 200
    recovery_batch_size: int = 64
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    max_validation_impressions: int = 2_000
    threads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        require_one_of(self, "allocation", ALLOCATIONS)
        removed, targets = _given(self, *_REMOVED_SHARES), _given(self, *_PRUNING_TARGETS)
        if self.allocation == "uniform" and targets:
            raise ConfigError.of(targets[0], getattr(self, targets[0]), "none with uniform")
        if self.allocation == "global" and removed:
            raise ConfigError.of(removed[0], getattr(self, removed[0]), "none with global")
        if len(targets) > 1:
            raise ConfigError.of(" and ".join(targets), "given", "only one of them")
        require_share(self, *removed)
        require_ratio(self, *targets)
        if self.allocation == "uniform" and self.removed_heads == self.removed_channels == 0:
            raise ConfigError.of("head_share and channel_share", 0, "at least one above 0")
        at_least_one = (
            "channel_multiple importance_clicks importance_batch_size negatives "
            "recovery_batch_size max_validation_impressions threads"
        )
        for key in at_least_one.split():
            if getattr(self, key) < 1:
                raise ConfigError.of(key, getattr(self, key), "a whole number of at least 1")
        for key in ("recovery_steps", "weight_decay", "seed"):
            if getattr(self, key) < 0:
                raise ConfigError.of(key, getattr(self, key), "at least 0")
        for key in ("learning_rate", "gradient_clip"):
            if not getattr(self, key) > 0:
                raise ConfigError.of(key, getattr(self, key), "a number above 0")

    @property
    def removed_heads(self) -> float:
        """Share of each layer's heads that ``uniform`` removes."""
        return self._removed(self.head_share, 1 / 3)

    @property
    def removed_channels(self) -> float:
        """Share of each layer's channels that ``uniform`` removes."""
        return self._removed(self.channel_share, 1 / 2)

    def _removed(self, share: float | None, default: float) -> float:
        if _given(self, *_REMOVED_SHARES):
            return share or 0.0
        return default

    @property
    def kept_share(self) -> float:
        """Share of the layers' weights that ``global`` keeps where latency is not the target."""
        return 5 / 9 if self.target_share is None else self.target_share


@dataclass(frozen=True, slots=True)
class SparsificationConfig:
    """Single weights set to zero, where they are: a smaller file, but no speed.

    Attributes:
        pattern: ``2:4`` zeroes two of every four neighbours; ``unstructured`` those of the lowest
            score, wherever they are.
        share: Share of the weights set to zero; ``2:4`` needs 0.5.
        score: ``magnitude`` is the size of a weight; ``activation`` that times the size of its
            input on texts of train.
        calibration_texts: Texts of train that the inputs are measured on.
        recovery_steps: Optimiser steps of the recovery, which keeps the zeros; 0 leaves it out.
        recovery_batch_size: Item texts a step.
        learning_rate: Peak learning rate of the recovery.
        weight_decay: AdamW's decoupled weight decay.
        gradient_clip: Largest gradient norm.
        max_validation_impressions: Most impressions scored to report the accuracy.
        threads: Threads torch may use.
        seed: Seed of everything random.
    """

    pattern: str = "2:4"
    share: float = 0.5
    score: str = "activation"
    calibration_texts: int = 512
    recovery_steps: int = 200
    recovery_batch_size: int = 64
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    max_validation_impressions: int = 2_000
    threads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        require_one_of(self, "pattern", PATTERNS)
        require_one_of(self, "score", SCORES)
        require_ratio(self, "share")
        if self.pattern == "2:4" and self.share != 0.5:
            raise ConfigError.of("share", self.share, "0.5 for the pattern 2:4")
        require_at_least(
            self,
            1,
            "calibration_texts",
            "recovery_batch_size",
            "max_validation_impressions",
            "threads",
        )
        require_at_least(self, 0, "recovery_steps", "weight_decay", "seed")
        require_above_zero(self, "learning_rate", "gradient_clip")


@dataclass(frozen=True, slots=True)
class LowRankConfig:
    """Matrices replaced by the product of two narrow ones.

    Attributes:
        ratio: Share of the competing matrices' weights to keep at most.
        criterion: ``sensitivity`` keeps what changes the item vectors of train, ``activation`` what
            varies in the outputs of a matrix, ``energy`` looks at the weights alone (plain SVD).
        embeddings: Whether the token embedding table competes with the matrices of the layers.
        rank_multiple: Ranks are multiples of it; processors multiply whole vectors of 8 or 16.
        calibration_texts: Texts of train that inputs and gradients of the matrices are measured on.
        recovery_steps: Optimiser steps of the recovery; 0 leaves it out.
        recovery_batch_size: Item texts a step.
        learning_rate: Peak learning rate of the recovery.
        weight_decay: AdamW's decoupled weight decay.
        gradient_clip: Largest gradient norm.
        max_validation_impressions: Most impressions scored to report the accuracy.
        threads: Threads torch may use.
        seed: Seed of everything random.
    """

    ratio: float = 0.6
    criterion: str = "sensitivity"
    embeddings: bool = False
    rank_multiple: int = 8
    calibration_texts: int = 512
    recovery_steps: int = 200
    recovery_batch_size: int = 64
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    max_validation_impressions: int = 2_000
    threads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        require_ratio(self, "ratio")
        require_one_of(self, "criterion", CRITERIA)
        require_at_least(
            self,
            1,
            "rank_multiple",
            "calibration_texts",
            "recovery_batch_size",
            "max_validation_impressions",
            "threads",
        )
        require_at_least(self, 0, "recovery_steps", "weight_decay", "seed")
        require_above_zero(self, "learning_rate", "gradient_clip")


@dataclass(frozen=True, slots=True)
class TrimmingConfig:
    """The vocabulary cut to the tokens that occur.

    Attributes:
        min_count: Occurrences in the texts of train that keep a token.
        common_tokens: Most common tokens of the vocabulary, by their number, that are kept besides,
            as insurance against texts to come.
        max_texts: Most texts whose vectors are compared to report the risk.
        max_validation_impressions: Most impressions scored to report the accuracy.
        threads: Threads torch may use while the loss is measured.
    """

    min_count: int = 1
    common_tokens: int = 5_000
    max_texts: int = 2_000
    max_validation_impressions: int = 2_000
    threads: int = 2

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        require_at_least(self, 1, "min_count", "max_texts", "max_validation_impressions", "threads")
        require_at_least(self, 0, "common_tokens")


@dataclass(frozen=True, slots=True)
class VectorStoreConfig:
    """How the item vectors of a catalogue are stored.

    Attributes:
        codec: One of :data:`CODECS`.
        subvectors: Bytes of an item with ``pq``, a divisor of the width of the vectors; ``None``
            takes the largest that is at most a third of it.
        threads: Threads of the training of ``pq``.
        seed: Seed of its centroids.
    """

    codec: str = "int8"
    subvectors: int | None = None
    threads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        require_one_of(self, "codec", CODECS)
        require_at_least(self, 1, "threads", *_given(self, "subvectors"))
        require_at_least(self, 0, "seed")


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """Which numbers the encoder is stored and computed in, and how much deviation to accept.

    Attributes:
        precision: ``fp32`` an ONNX graph in float32; ``fp16`` the same, stored in halves (ONNX
            Runtime computes in float32 on the processor); ``bf16`` PyTorch in bfloat16;
            ``int8_dynamic`` 8-bit weights, activations in 8 bits with a scale taken per call;
            ``int8_static`` the same with scales calibrated beforehand; ``int4`` 4-bit weights,
            activations in 8 bits. Embedding tables are int8 in the last three.
        parity_tolerance: Largest difference of any vector element between the float32 export and
            PyTorch. Unit vectors have elements of about 0.05.
        padding_tolerance: Largest distance, 1 - cosine, of a text's vector alone and beside longer
            texts, as it is written. Above zero for scales that are taken per call: they depend on
            the other texts.
        min_mean_cosine: Lowest mean cosine between the vectors that are written and PyTorch's in
            float32, of real texts.
        min_cosine: Lowest cosine of any of those texts.
        smoothing: How far large channels of activations are evened out before they become 8 bits:
            0 not at all, 1 until all are equally large.
        block_size: Weights that share a scale in ``int4``; a power of two from 16 to 256.
        calibration: Range of activations in ``int8_static``: of all values, ``minmax``, or of
            99.99 %, ``percentile``.
        calibration_texts: Texts of train that smoothing and ranges are fitted on, evenly spread by
            length.
        sample_texts: Texts that parity and cosines are measured on, evenly spread by length.
        max_validation_impressions: Most impressions scored to report the accuracy.
        threads: Threads used while measuring.
        seed: Seed of everything random.
    """

    precision: str = "int8_dynamic"
    parity_tolerance: float = 1e-4
    padding_tolerance: float = 0.02
    min_mean_cosine: float = 0.95
    min_cosine: float = 0.8
    smoothing: float = 0.65
    block_size: int = 32
    calibration: str = "minmax"
    calibration_texts: int = 256
    sample_texts: int = 256
    max_validation_impressions: int = 2_000
    threads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        require_one_of(self, "precision", PRECISIONS)
        require_one_of(self, "calibration", CALIBRATIONS)
        require_ratio(self, "parity_tolerance", "padding_tolerance")
        for key in ("min_mean_cosine", "min_cosine"):
            if not 0 < getattr(self, key) <= 1:
                raise ConfigError.of(key, getattr(self, key), "above 0, at most 1")
        require_share(self, "smoothing")
        if self.block_size not in BLOCK_SIZES:
            raise ConfigError.of(
                "block_size", self.block_size, ", ".join(str(size) for size in BLOCK_SIZES)
            )
        require_at_least(
            self, 1, "calibration_texts", "sample_texts", "max_validation_impressions", "threads"
        )
        require_at_least(self, 0, "seed")


def _given(config: object, *keys: str) -> list[str]:
    """Those of the keys that are not None."""
    return [key for key in keys if getattr(config, key) is not None]


def require_ratio(config: object, *keys: str) -> None:
    """Raise ConfigError unless these attributes lie between 0 and 1, both excluded."""
    for key in keys:
        value = getattr(config, key)
        if not 0 < value < 1:
            raise ConfigError.of(key, value, "above 0 and below 1")


_ = require_share

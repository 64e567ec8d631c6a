"""How a ranker is trained: one frozen dataclass a subject, checked before any work starts.

Loads no PyTorch, so that Dagster definitions and the command line may import it.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from recflow.core.errors import ConfigError

STRATEGIES: Final = ("frozen", "top_k_layers", "full", "lora", "adalora", "adapters")
POOLINGS: Final = ("mean", "cls", "last_token", "attention")
USER_MODELS: Final = ("late_fusion", "mean", "attentive", "multi_head")
FUSIONS: Final = ("learned", "mean", "max", "top_k")
LOSSES: Final = ("cross_entropy", "binary_cross_entropy", "mean_squared_error", "contrastive")
METRICS: Final = ("auc", "ndcg@10", "rating_rmse")
PRECISIONS: Final = ("auto", "bf16", "fp32")
BATCHINGS: Final = ("random", "overlapping")
SYNCHRONISATIONS: Final = ("every_step", "local_sgd")

MOST_TOKENS = 512

OPEN_ATTENTION_TOKENS: Final = 128
"""Most tokens of a text whose attention is not fused where processors train in bfloat16.

See :mod:`recflow.modeling.attention`. The open way is the faster one beyond as well, but its
weights would need more memory than all else that a layer keeps.
"""


@dataclass(frozen=True, slots=True)
class TuningConfig:
    """Which weights of the encoder learn.

    Attributes:
        strategy: ``frozen``: none. ``top_k_layers``: the last layers. ``full``: all, embeddings
            included. ``lora``, ``adalora``, ``adapters``: small matrices added to the last layers.
        tuned_layers: How many of the last layers all strategies but ``frozen`` and ``full``
            change.
        rank: Rank of LoRA's matrices; AdaLoRA's mean rank at the end.
        initial_rank: Rank that AdaLoRA starts from.
        alpha: Numerator of LoRA's scaling ``alpha / rank``.
        adapter_width: Width of the bottleneck adapters.
    """

    strategy: str = "top_k_layers"
    tuned_layers: int = 2
    rank: int = 16
    initial_rank: int = 24
    alpha: float = 32.0
    adapter_width: int = 64

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        require_one_of(self, "strategy", STRATEGIES)
        require_at_least(self, 1, "tuned_layers", "rank", "initial_rank", "adapter_width")
        require_above_zero(self, "alpha")
        if self.strategy == "adalora" and self.initial_rank <= self.rank:
            raise ConfigError.of("initial_rank", self.initial_rank, f"more than rank {self.rank}")


@dataclass(frozen=True, slots=True)
class UserModelConfig:
    """How a user's clicks become scores of candidates.

    Attributes:
        kind: ``late_fusion`` compares each candidate with each click; ``mean``, ``attentive`` and
            ``multi_head`` first make one vector of the clicks.
        fusion: How late fusion sums up the similarities of a candidate: ``learned`` from six
            summaries, or one of them alone.
        history_length: Newest clicks used of a user, in training and in scoring alike.
        top_k: How many of the largest similarities late fusion averages.
        heads: Heads of ``multi_head``.
        categories: Whether categories are used beside the text.
        item_ids: Whether items of train get an embedding of their own. Off by default: most items
            of tomorrow are unseen.
        user_ids: The same for users.
        id_dimension: Width of these embeddings.
        dropout: Dropout inside the user model.
    """

    kind: str = "late_fusion"
    fusion: str = "learned"
    history_length: int = 50
    top_k: int = 5
    heads: int = 8
    categories: bool = True
    item_ids: bool = False
    user_ids: bool = False
    id_dimension: int = 32
    dropout: float = 0.2

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        require_one_of(self, "kind", USER_MODELS)
        require_one_of(self, "fusion", FUSIONS)
        require_at_least(self, 1, "history_length", "top_k", "heads", "id_dimension")
        require_share(self, "dropout")


@dataclass(frozen=True, slots=True)
class ObjectiveConfig:
    """What training minimises.

    Attributes:
        loss: ``cross_entropy`` of the click among sampled non-clicks of its slate;
            ``binary_cross_entropy`` of each of these; ``mean_squared_error`` of the ratings;
            ``contrastive``: cross-entropy among all items that were clicked in the batch.
        negatives: Most non-clicked candidates sampled for a click.
        clicks_per_impression: Most clicks of one impression in an epoch.
        temperature: Divides the scores of the contrastive loss.
    """

    loss: str = "cross_entropy"
    negatives: int = 8
    clicks_per_impression: int = 4
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        require_one_of(self, "loss", LOSSES)
        require_at_least(self, 1, "negatives", "clicks_per_impression")
        require_above_zero(self, "temperature")


@dataclass(frozen=True, slots=True)
class OptimiserConfig:
    """How weights move.

    Attributes:
        head_learning_rate: Peak learning rate of the user model; a tenth of it in the encoder
            phase.
        encoder_learning_rate: Peak learning rate of the encoder's last layer.
        layer_decay: Factor of the learning rate from each layer to the one below; 1 for none.
        weight_decay: AdamW's decoupled weight decay of matrices.
        warmup_share: Share of a phase's steps in which the learning rate rises.
        gradient_clip: Largest gradient norm.
    """

    head_learning_rate: float = 4e-3
    encoder_learning_rate: float = 5e-5
    layer_decay: float = 1.0
    weight_decay: float = 0.01
    warmup_share: float = 0.1
    gradient_clip: float = 1.0

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        require_above_zero(self, "head_learning_rate", "encoder_learning_rate", "gradient_clip")
        require_at_least(self, 0, "weight_decay")
        require_share(self, "warmup_share")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError.of("layer_decay", self.layer_decay, "above 0 and at most 1")


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """How long training goes on.

    Attributes:
        head_epochs: Epochs of the user model on frozen vectors.
        encoder_epochs: Epochs of encoder and user model together.
        head_batch_size: Clicks a step of the first phase, over all processes.
        encoder_batch_size: Clicks a step of the second phase, over all processes.
        max_impressions_per_epoch: Most impressions in an epoch.
        max_validation_impressions: Most impressions scored after an epoch, evenly spread in time.
        primary_metric: What validation judges an epoch by.
        patience: Epochs of a phase without a better validation after which it ends.
        checkpoint_seconds: Least time between two checkpoints; one is also written after each
            epoch.
    """

    head_epochs: int = 8
    encoder_epochs: int = 2
    head_batch_size: int = 128
    encoder_batch_size: int = 256
    max_impressions_per_epoch: int = 20_000
    max_validation_impressions: int = 4_000
    primary_metric: str = "auc"
    patience: int = 3
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        require_at_least(
            self, 1, "head_batch_size", "encoder_batch_size",
            "max_impressions_per_epoch", "max_validation_impressions", "patience",
        )  # fmt: skip
        require_at_least(self, 0, "head_epochs", "encoder_epochs", "checkpoint_seconds")
        if self.head_epochs + self.encoder_epochs == 0:
            raise ConfigError.of("head_epochs and encoder_epochs", 0, "at least one above 0")
        require_one_of(self, "primary_metric", METRICS)


@dataclass(frozen=True, slots=True)
class SpeedConfig:
    """What makes training cheap; each can be switched off, and ``make bench-train`` does.

    Attributes:
        distinct_items: Encode an item that occurs several times in a batch once.
        dynamic_padding: Pad texts to the longest of their batch instead of to ``max_tokens``.
        length_buckets: Encode texts of similar length together.
        cache_hidden_states: Compute hidden states below the lowest trainable layer once and keep
            them on disk.
        max_cache_bytes: Most disk for them.
        precision: ``bf16`` autocast, ``fp32``, or ``auto``: bf16 where the processor has it.
        open_attention: Attention of short texts as two products with a softmax between them
            instead of PyTorch's fused kernel, where a processor trains in bfloat16.
        batching: ``overlapping`` puts impressions that are close in time into one batch, whose
            items then repeat; ``random`` does not.
        max_texts_per_step: Distinct items encoded with gradient in a step, the others keep the
            vector they last had; 0 for all.
        micro_batches: Parts a batch is split into to bound memory; gradients add up.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
        compile: Compile the trainable layers with ``torch.compile``.
        prefetch_batches: Batches prepared ahead in the background; 0 prepares each when needed.
    """

    distinct_items: bool = True
    dynamic_padding: bool = True
    length_buckets: bool = True
    cache_hidden_states: bool = True
    max_cache_bytes: int = 8 * 1024**3
    precision: str = "auto"
    open_attention: bool = True
    batching: str = "random"
    max_texts_per_step: int = 256
    micro_batches: int = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    prefetch_batches: int = 2

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        require_one_of(self, "precision", PRECISIONS)
        require_one_of(self, "batching", BATCHINGS)
        require_at_least(self, 1, "max_cache_bytes", "micro_batches")
        require_at_least(self, 0, "max_texts_per_step", "prefetch_batches")
        if not self.distinct_items and self.max_texts_per_step:
            raise ConfigError.of(
                "max_texts_per_step",
                self.max_texts_per_step,
                "0 where distinct_items is off: kept vectors belong to distinct items",
            )


@dataclass(frozen=True, slots=True)
class DistributionConfig:
    """How training is spread over processes.

    Attributes:
        processes: Processes of this machine; 1 trains in the calling process.
        synchronisation: ``every_step``: gradients are summed at each step, so any number of
            processes takes the same steps. ``local_sgd``: weights are averaged now and then, for
            slow links.
        local_steps: Steps between two averages of ``local_sgd``.
        shard_encoder: Spread the encoder's weights, gradients and optimiser states over the
            processes (FSDP2), for encoders that do not fit into one.
    """

    processes: int = 1
    synchronisation: str = "every_step"
    local_steps: int = 8
    shard_encoder: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        require_at_least(self, 1, "processes", "local_steps")
        require_one_of(self, "synchronisation", SYNCHRONISATIONS)
        if self.shard_encoder and self.synchronisation == "local_sgd":
            raise ConfigError.of(
                "synchronisation", self.synchronisation, "every_step where shard_encoder is on"
            )


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """How to train a ranker. The defaults suit two CPU cores and a few minutes.

    Attributes:
        max_tokens: Longest text in tokens, special tokens included.
        pooling: How token states become a text's vector; ``auto``: mean for encoders,
            ``last_token`` for decoders.
        tuning: Which weights of the encoder learn.
        user_model: How clicks become scores.
        objective: What is minimised.
        optimiser: How weights move.
        schedule: How long it goes on.
        speed: What makes it cheap.
        distribution: How it is spread over processes.
        device: ``auto``, ``cpu``, ``cuda``, or ``cuda:1``.
        threads: Threads torch may use in each process.
        seed: Seed of everything random.
    """

    max_tokens: int = 64
    pooling: str = "auto"
    tuning: TuningConfig = field(default_factory=TuningConfig)
    user_model: UserModelConfig = field(default_factory=UserModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    distribution: DistributionConfig = field(default_factory=DistributionConfig)
    device: str = "auto"
    threads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value or combination."""
        if not 4 <= self.max_tokens <= MOST_TOKENS:
            raise ConfigError.of("max_tokens", self.max_tokens, f"4 to {MOST_TOKENS}")
        require_one_of(self, "pooling", ("auto", *POOLINGS))
        require_at_least(self, 1, "threads")
        require_at_least(self, 0, "seed")
        if self.tuning.strategy == "frozen" and not self.schedule.head_epochs:
            raise ConfigError.of("head_epochs", 0, "at least 1 where the encoder is frozen")
        local = self.distribution.synchronisation == "local_sgd"
        if self.tuning.strategy == "adalora" and (local or self.distribution.shard_encoder):
            # Each process would choose ranks of its own, or see a part of the matrices only.
            raise ConfigError.of(
                "strategy", "adalora", "lora where weights are averaged or spread over processes"
            )
        rating, measured = self.objective.loss == "mean_squared_error", self.schedule.primary_metric
        if rating != (measured == "rating_rmse"):
            raise ConfigError.of(
                "primary_metric",
                measured,
                "rating_rmse with the loss mean_squared_error, another one with another loss",
            )


ConfigClass = TypeVar("ConfigClass")


def config_from(kind: type[ConfigClass], values: Mapping[str, Any]) -> ConfigClass:
    """Build a configuration from nested plain values, such as its own ``asdict``.

    Raises:
        ConfigError: A key is unknown, or a value has another type or is impossible.
    """
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(typing.cast("Any", kind))]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in names:
            raise ConfigError.of(key, value, f"one of the keys {', '.join(names)}")
        wanted = hints[key]
        if dataclasses.is_dataclass(wanted):
            if not isinstance(value, Mapping):
                raise ConfigError.of(key, value, "a group of keys")
            arguments[key] = config_from(typing.cast("Any", wanted), value)
        else:
            arguments[key] = _typed(key, value, wanted)
    return kind(**arguments)


def with_values(config: ConfigClass, values: Mapping[str, Any]) -> ConfigClass:
    """A copy with some values changed, by dotted key, e.g. ``{"tuning.rank": 8}``.

    Raises:
        ConfigError: A key is unknown, or a value has another type or is impossible.
    """
    nested = dataclasses.asdict(typing.cast("Any", config))
    for key, value in values.items():
        *groups, name = key.split(".")
        place: Any = nested
        for group in groups:
            place = place.get(group) if isinstance(place, dict) else None
        if not isinstance(place, dict) or name not in place:
            raise ConfigError.of("configuration key", key, "a key of TrainingConfig, dotted")
        place[name] = value
    return config_from(type(config), nested)


def _typed(key: str, value: Any, wanted: Any) -> Any:
    kinds = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ConfigError.of(key, value, f"a value of type {names}")
    return value


def require_one_of(config: object, key: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless ``config.key`` is one of ``allowed``."""
    value = getattr(config, key)
    if value not in allowed:
        raise ConfigError.of(key, value, ", ".join(allowed))


def require_at_least(config: object, least: int, *keys: str) -> None:
    """Raise ConfigError unless each ``config.key`` is at least ``least``."""
    for key in keys:
        value = getattr(config, key)
        if not value >= least:
            raise ConfigError.of(key, value, f"at least {least}")


def require_above_zero(config: object, *keys: str) -> None:
    """Raise ConfigError unless each ``config.key`` is above 0."""
    for key in keys:
        value = getattr(config, key)
        if not value > 0:
            raise ConfigError.of(key, value, "above 0")


def require_share(config: object, *keys: str) -> None:
    """Raise ConfigError unless each ``config.key`` is at least 0 and below 1."""
    for key in keys:
        value = getattr(config, key)
        if not 0 <= value < 1:
            raise ConfigError.of(key, value, "at least 0 and below 1")

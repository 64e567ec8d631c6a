"""Searching the chain of steps that meets a budget: candidates, their order, and the verdict.

Pure arithmetic; :mod:`recflow.adapters.budget_search` makes and measures the models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from types import MappingProxyType
from typing import Any, Final

from recflow.compression.config import PRECISIONS, require_ratio
from recflow.compression.family import ROOT, Family, family_from
from recflow.core.errors import ConfigError
from recflow.modeling.config import require_above_zero

# Bytes a weight takes: int4 has a scale for each block of weights beside the weights.
_BYTES: Final[Mapping[str, float]] = MappingProxyType(
    {"fp32": 4, "fp16": 2, "bf16": 2, "int8_dynamic": 1, "int8_static": 1, "int4": 0.6}
)
# A forecast this far above the limit is believed without a measurement.
_FORECAST_ERROR: Final = 1.2


@dataclass(frozen=True, slots=True)
class Budget:
    """What a model may cost; ``None`` sets no limit.

    Attributes:
        max_megabytes: Everything that serving reads from disk – weights, user model, tokenizer –
            in 10^6 bytes.
        max_p99_ms: 99th percentile of the latency of one text, in milliseconds, on one thread.
        max_memory_mib: Peak memory of a fresh process that loads the model and encodes.
        max_auc_loss: Validation AUC lost, relative to the fine-tuned model's.
    """

    max_megabytes: float | None = None
    max_p99_ms: float | None = None
    max_memory_mib: float | None = None
    max_auc_loss: float | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value, or when nothing is limited."""
        limits = self.limits
        if not limits:
            names = ", ".join(limit.name for limit in fields(self))
            raise ConfigError.of("budget", None, f"at least one of {names}")
        require_above_zero(self, *limits)
        if self.max_auc_loss is not None:
            require_ratio(self, "max_auc_loss")

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        values = {limit.name: getattr(self, limit.name) for limit in fields(self)}
        return {name: float(value) for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class ChainSpace:
    """The chains that are tried: every combination of these, in the order of the steps.

    Attributes:
        distill_layers: Layers of a student; 0 is no distillation.
        prune_shares: Share of the layers' weights that pruning leaves; 1 is no pruning.
        low_rank_ratios: Share of the weights that factorising leaves; 1 is none.
        trim: Whether the vocabulary is trimmed.
        precisions: Precisions of the exported model.
    """

    distill_layers: tuple[int, ...] = (0, 4, 3, 2)
    prune_shares: tuple[float, ...] = (1.0, 0.6)
    low_rank_ratios: tuple[float, ...] = (1.0,)
    trim: tuple[bool, ...] = (False, True)
    precisions: tuple[str, ...] = ("int8_static",)

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        for key in (one.name for one in fields(self)):
            values = getattr(self, key)
            if not values or len(set(values)) < len(values):
                raise ConfigError.of(key, list(values), "one or more values, each once")
        for layers in self.distill_layers:
            if layers < 0:
                raise ConfigError.of("distill_layers", layers, "numbers of layers; 0 for none")
        for key in ("prune_shares", "low_rank_ratios"):
            for share in getattr(self, key):
                if not 0 < share <= 1:
                    raise ConfigError.of(key, share, "above 0 and at most 1")
        for precision in self.precisions:
            if precision not in PRECISIONS:
                raise ConfigError.of("precisions", precision, ", ".join(PRECISIONS))


@dataclass(frozen=True, slots=True)
class EncoderSize:
    """Where the weights and bytes of the fine-tuned model are.

    Attributes:
        layers: Transformer layers.
        layer_weights: Weights of all of them together.
        table_weights: Weights of the token table.
        table_share: Share of its tokens that trimming keeps.
        other_weights: All other weights of the encoder.
        beside_bytes: Bytes on disk of what is not the encoder.
    """

    layers: int
    layer_weights: int
    table_weights: int
    table_share: float
    other_weights: int
    beside_bytes: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """One chain.

    Attributes:
        tables: Its models as tables of a family; each descends from the one before it.
        capacity: Share of the layers' weights that is left; what the order of the trials is.
        megabytes: Forecast of its size.
    """

    tables: Mapping[str, Mapping[str, Any]]
    capacity: float
    megabytes: float

    @property
    def name(self) -> str:
        """Name of its last model."""
        return list(self.tables)[-1]

    def family(self, folder: str) -> Family:
        """The chain as a family of its own, stored below ``folder``."""
        return family_from(self.tables, folder)


@dataclass(frozen=True, slots=True)
class Trial:
    """What a chain turned out to be.

    Attributes:
        name: Name of the chain.
        steps: Its steps in words.
        forecast_megabytes: Size forecast before it was made.
        costs: Measured value by limit, of all limits of :class:`Budget`; empty where the chain was
            not made.
        auc_loss_interval: Interval of the relative AUC loss.
        validation_auc: Its AUC on validation.
        texts_per_second: Encoder throughput on one thread.
        note: Why it was not made, or could not be.
    """

    name: str
    steps: tuple[str, ...]
    forecast_megabytes: float
    costs: Mapping[str, float] = field(default_factory=lambda: {})
    auc_loss_interval: tuple[float, float] | None = None
    validation_auc: float | None = None
    texts_per_second: float | None = None
    note: str = ""


def candidates(space: ChainSpace, size: EncoderSize) -> list[Candidate]:
    """All chains, those that change the encoder least first.

    Raises:
        ConfigError: A student is asked for more layers than there are.
    """
    for layers in space.distill_layers:
        if layers >= size.layers:
            raise ConfigError.of(
                "distill_layers", layers, f"fewer than the {size.layers} layers of {ROOT}"
            )
    found = [
        _candidate(size, *choice)
        for choice in product(
            space.distill_layers,
            space.prune_shares,
            space.low_rank_ratios,
            space.trim,
            space.precisions,
        )
    ]
    # Trimming hardly changes a vector, and makes the model smaller: among equals it comes later.
    return sorted(found, key=lambda c: (-c.capacity, -c.megabytes))


def worth_making(candidate: Candidate, budget: Budget) -> bool:
    """Whether the forecast leaves a chance that the size is within the budget."""
    limit = budget.max_megabytes
    return limit is None or candidate.megabytes <= limit * _FORECAST_ERROR


def excesses(trial: Trial, budget: Budget) -> dict[str, float]:
    """By how much of the limit each broken limit is exceeded; empty if the budget is met."""
    over = {name: trial.costs[name] / limit - 1 for name, limit in budget.limits.items()}
    return {name: excess for name, excess in over.items() if excess > 0 or math.isnan(excess)}


def best_trial(trials: Sequence[Trial], budget: Budget) -> tuple[Trial | None, bool]:
    """The trial to keep, and whether it meets the budget.

    Among those that meet it, the one with the least AUC loss; if none does, the nearest: the one
    whose worst excess is least.
    """
    made = [trial for trial in trials if trial.costs]
    meeting = [trial for trial in made if not excesses(trial, budget)]
    if meeting:
        return min(meeting, key=lambda t: (t.costs["max_auc_loss"], t.costs["max_megabytes"])), True
    nearest = min(made, key=lambda t: _worst(excesses(t, budget)), default=None)
    return nearest, False


def _worst(over: Mapping[str, float]) -> tuple[float, float]:
    values = [math.inf if math.isnan(value) else value for value in over.values()]
    return max(values), sum(values)


def _candidate(
    size: EncoderSize, layers: int, share: float, ratio: float, trim: bool, precision: str
) -> Candidate:
    tables: dict[str, Mapping[str, Any]] = {}
    for name, table in _steps(layers, share, ratio, trim, precision):
        parent = list(tables)[-1] if tables else ROOT
        tables["_".join([*([parent] if tables else []), name])] = {"parent": parent, **table}
    kept = (layers or size.layers) / size.layers * share * ratio
    weights = (
        size.layer_weights * kept
        + size.table_weights * (size.table_share if trim else 1)
        + size.other_weights
    )
    size_bytes = weights * _BYTES[precision] + size.beside_bytes
    return Candidate(MappingProxyType(tables), kept, size_bytes / 1e6)


def _steps(
    layers: int, share: float, ratio: float, trim: bool, precision: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and table of each step that is taken."""
    if layers:
        yield f"distill{layers}", {"step": "distill", "layers": layers}
    if share < 1:
        yield (
            f"prune{share * 100:.0f}",
            {
                "step": "prune",
                "allocation": "global",
                "target_share": share,
            },
        )
    if ratio < 1:
        yield f"rank{ratio * 100:.0f}", {"step": "low_rank", "ratio": ratio}
    if trim:
        yield "trim", {"step": "trim"}
    yield precision, {"step": "quantize", "precision": precision}

"""What a search may change: ranges and choices over the dotted keys of ``TrainingConfig``.

Loads neither PyTorch nor Optuna, so that a wrong space is refused before either is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, TypeAlias, cast

from recflow.core.artifacts import JsonValue
from recflow.core.errors import ConfigError
from recflow.modeling.config import (
    USER_MODELS,
    TrainingConfig,
    require_above_zero,
    require_at_least,
    with_values,
)

Value: TypeAlias = "str | int | float | bool"

# What decides how a trial is judged or where it runs: two trials that differ in it cannot be
# compared.
_FIXED: Final = (
    "device",
    "distribution.processes",
    "schedule.max_validation_impressions",
    "schedule.primary_metric",
    "seed",
    "threads",
)
_NUMBERS: Final = (int, float)


@dataclass(frozen=True, slots=True)
class Range:
    """Every number from ``low`` to ``high``, both included.

    Attributes:
        low: Least value; a whole number where the key wants whole numbers.
        high: Largest value.
        log: Draw the logarithm evenly instead of the number.
    """

    low: float
    high: float
    log: bool = False

    def __contains__(self, value: object) -> bool:
        return isinstance(value, _NUMBERS) and self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Choices:
    """One of some values."""

    choices: tuple[Value, ...]

    def __contains__(self, value: object) -> bool:
        return value in self.choices


Space: TypeAlias = "Mapping[str, Range | Choices]"


def default_space() -> dict[str, Range | Choices]:
    """What is searched unless told otherwise: what moved validation most when changed by hand.

    The learning rate of the encoder reaches up to where low-rank and adapter weights, which start
    at zero, learn best.
    """
    return {
        "tuning.strategy": Choices(("top_k_layers", "lora", "adapters")),
        "tuning.tuned_layers": Range(1, 4),
        "user_model.kind": Choices(USER_MODELS),
        "user_model.dropout": Range(0.0, 0.5),
        "objective.negatives": Range(2, 16),
        "optimiser.head_learning_rate": Range(5e-4, 1e-2, log=True),
        "optimiser.encoder_learning_rate": Range(1e-5, 1e-3, log=True),
        "optimiser.layer_decay": Range(0.7, 1.0),
        "schedule.head_epochs": Range(4, 12),
    }


@dataclass(frozen=True, slots=True)
class SearchConfig:
    """How long and where to look for a better configuration.

    Attributes:
        minutes: Wall time of all trials together, over all processes that worked on the study. The
            first trial, the base configuration, is never cut short; another one that runs when
            time is up ends with its epoch.
        max_trials: Most trials.
        seed: Seed of the search; training has its own.
        space: Range or choices of each key that is searched.
    """

    minutes: float = 30.0
    max_trials: int = 50
    seed: int = 0
    space: Space = field(default_factory=default_space)

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        require_above_zero(self, "minutes")
        require_at_least(self, 1, "max_trials")
        require_at_least(self, 0, "seed")
        if not self.space:
            raise ConfigError.of("space", {}, "at least one key of TrainingConfig")


def space_from(values: Mapping[str, Any]) -> dict[str, Range | Choices]:
    """Read a space, e.g. ``{"tuning.rank": {"low": 4, "high": 32, "log": true}}``.

    Args:
        values: By dotted key, either ``low``, ``high`` and perhaps ``log``, or ``choices``.

    Raises:
        ConfigError: An entry is neither.
    """
    return {key: _dimension(key, entry) for key, entry in values.items()}


def space_as_json(space: Space) -> dict[str, JsonValue]:
    """The space as plain values; :func:`space_from` reads them."""
    return {
        key: {**asdict(dimension), "choices": list(dimension.choices)}
        if isinstance(dimension, Choices)
        else {**asdict(dimension)}
        for key, dimension in space.items()
    }


def check_space(space: Space, base: TrainingConfig) -> None:
    """Raise unless every end of a range and every choice alone gives a possible configuration.

    Raises:
        ConfigError: Names the key, the value and what is allowed.
    """
    for key, dimension in space.items():
        if key in _FIXED:
            raise ConfigError.of("space", key, f"other keys than {', '.join(_FIXED)}")
        ends = dimension.choices if isinstance(dimension, Choices) else _ends(key, dimension)
        for value in ends:
            try:
                with_values(base, {key: value})
            except ConfigError as error:
                raise ConfigError(f"the space of {key} cannot be searched: {error}") from None


def value_at(config: TrainingConfig, key: str) -> Value:
    """The value of a dotted key."""
    return cast("Value", functools.reduce(getattr, key.split("."), cast("Any", config)))


def whole_numbers(base: TrainingConfig, key: str, dimension: Range) -> bool:
    """Whether the key wants whole numbers; decided by its type, not by how the ends are written."""
    return isinstance(value_at(with_values(base, {key: dimension.low}), key), int)


def _dimension(key: str, entry: Any) -> Range | Choices:
    keys = set(cast("Mapping[str, Any]", entry)) if isinstance(entry, Mapping) else set[str]()
    if keys == {"choices"} and isinstance(entry["choices"], list | tuple) and entry["choices"]:
        return Choices(tuple(entry["choices"]))
    if {"low", "high"} <= keys <= {"low", "high", "log"}:
        return Range(**entry)
    raise ConfigError.of(
        f"space of {key}",
        entry,
        '{"low": .., "high": .., "log": true or false} or {"choices": [..]} with at least one',
    )


def _ends(key: str, dimension: Range) -> tuple[float, float]:
    low, high = dimension.low, dimension.high
    numbers = all(isinstance(x, _NUMBERS) and not isinstance(x, bool) for x in (low, high))
    if not numbers or not low < high:
        raise ConfigError.of(f"space of {key}", [low, high], "two numbers, low less than high")
    if not isinstance(cast("object", dimension.log), bool) or (dimension.log and low <= 0):
        raise ConfigError.of(
            f"space of {key}", {**asdict(dimension)}, "log true or false, and low above 0 with log"
        )
    return low, high

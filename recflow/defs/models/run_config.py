"""Run configs made from the library's dataclasses, key by key, as Dagster sees them.

Names, types, defaults and descriptions come from the dataclasses, so that a knob is written once.
A key that is not set stays unset: it then has the found configuration's value, or the default. An
unknown key, a value of another type and an unknown choice are refused when the run is launched.
"""

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any

import dagster as dg
from pydantic import Field, create_model

from recflow.compression import config as compression
from recflow.defs.common import Rebuild
from recflow.defs.resources import settings
from recflow.modeling.adaptation_config import METHODS, AdaptationConfig
from recflow.modeling.config import (
    BATCHINGS,
    FUSIONS,
    LOSSES,
    METRICS,
    POOLINGS,
    PRECISIONS,
    STRATEGIES,
    SYNCHRONISATIONS,
    USER_MODELS,
    TrainingConfig,
    with_values,
)

# What holds for every training of this deployment; no run config repeats it.
DEFAULTS = with_values(
    TrainingConfig(),
    {
        "user_model.history_length": settings.max_history,
        "seed": settings.seed,
        "threads": settings.threads,
    },
)
ADAPTATION_DEFAULTS = AdaptationConfig(seed=settings.seed, threads=settings.threads)
OF_THE_DEPLOYMENT = ("device", "seed", "threads")
CHOICES = {
    "batching": BATCHINGS,
    "fusion": FUSIONS,
    "kind": USER_MODELS,
    "loss": LOSSES,
    "method": METHODS,
    "pooling": ("auto", *POOLINGS),
    "precision": PRECISIONS,
    "primary_metric": METRICS,
    "strategy": STRATEGIES,
    "synchronisation": SYNCHRONISATIONS,
    # What means something else in one class than in the others.
    "DistillationConfig.hidden_layers": compression.HIDDEN_LAYERS,
    "LowRankConfig.criterion": compression.CRITERIA,
    "PruningConfig.allocation": compression.ALLOCATIONS,
    "QuantizationConfig.calibration": compression.CALIBRATIONS,
    "QuantizationConfig.precision": compression.PRECISIONS,
    "SparsificationConfig.pattern": compression.PATTERNS,
    "SparsificationConfig.score": compression.SCORES,
}


@functools.cache
def choice(key: str) -> Any:
    """The values of a key as an enumeration, which Dagster checks at launch.

    Its name says what is allowed. Dagster takes no optional ``Literal``.
    """
    allowed = CHOICES[key]
    name = key.rpartition(".")[2]
    return Enum(f"{name}({' | '.join(allowed)})", {value: value for value in allowed})


def as_values(config: dg.Config) -> dict[str, Any]:
    """What was set in a run config, by dotted key, as plain values."""
    values: dict[str, Any] = {}
    for key, value in config:
        if isinstance(value, dg.Config):
            values |= {f"{key}.{inner}": found for inner, found in as_values(value).items()}
        elif value is not None:
            values[key] = _plain(value)
    return values


def own_values(config: Rebuild, keys: type[Rebuild]) -> dict[str, Any]:
    """What was set of the keys that ``keys`` has beside ``rebuild``."""
    names = keys.model_fields.keys() - Rebuild.model_fields.keys()
    return {key: value for key, value in as_values(config).items() if key.split(".")[0] in names}


def training_values(config: Rebuild) -> dict[str, Any]:
    """What was set of :class:`TrainingConfig`, by dotted key."""
    return own_values(config, TrainingKeys)


def training_config(config: Rebuild) -> TrainingConfig:
    """The training configuration of a run: what was set, and the defaults.

    Raises:
        ConfigError: The values are impossible.
    """
    return with_values(DEFAULTS, training_values(config))


def run_config(
    defaults: Any, base: type[dg.Config] = Rebuild, without: tuple[str, ...] = ()
) -> Any:
    """A run config of optional keys from a dataclass, nested as that one is.

    Args:
        defaults: An instance; its values are named as the defaults.
        base: The class to extend.
        without: Keys to leave out.
    """
    hints = typing.get_type_hints(type(defaults))
    texts = _descriptions(type(defaults))
    fields: dict[str, Any] = {}
    for key in (field.name for field in dataclasses.fields(defaults)):
        default = getattr(defaults, key)
        if key in without:
            continue
        if dataclasses.is_dataclass(default):
            group = run_config(default, dg.Config)
            fields[key] = (group, Field(default_factory=group, description=texts[key]))
        else:
            own = f"{type(defaults).__name__}.{key}"
            known = own if own in CHOICES else key
            kind = choice(known) if known in CHOICES else _kind(hints[key])
            text = f"{texts[key]} Default: {default}."
            fields[key] = (kind | None, Field(None, description=text))
    name = type(defaults).__name__
    return create_model(name, __base__=base, __doc__=type(defaults).__doc__, **fields)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(element) for element in value]
    return value.value if isinstance(value, Enum) else value


def _kind(hint: Any) -> Any:
    """The type of a key, without ``None`` where that is one of its values."""
    if isinstance(hint, types.UnionType):
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    return hint


def _descriptions(kind: type) -> Mapping[str, str]:
    """What the ``Attributes`` section of a docstring says of each attribute."""
    section = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^ {4}(\w+): ((?:.+\n?)(?: {8}.+\n?)*)", section, re.MULTILINE)
    return {name: " ".join(text.replace("``", "").split()) for name, text in entries}


# The keys of ``TrainingConfig``; what a run config of training extends.
TrainingKeys: type[Rebuild] = run_config(DEFAULTS, without=OF_THE_DEPLOYMENT)

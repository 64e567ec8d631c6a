"""The family of smaller models: which step makes each model from which parent.

A family is a TOML file; each table is a model, named as its asset ``models/<name>``::

    [distilled]
    parent = "fine_tuned"
    step = "distill"
    layers = 3

    [distilled_int8]
    parent = "distilled"
    step = "quantize"

Chains of any length follow from the parents. A chain that makes no sense, an unknown name and an
impossible value are refused when the file is read. Loads no PyTorch.
"""

from __future__ import annotations

import importlib
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from recflow.compression.config import (
    DistillationConfig,
    LowRankConfig,
    PruningConfig,
    QuantizationConfig,
    SparsificationConfig,
    TrimmingConfig,
)
from recflow.core.errors import ConfigError
from recflow.modeling.config import config_from, with_values

ROOT: Final = "fine_tuned"
"""The model that the family descends from."""

ROOT_KEY: Final = f"models/{ROOT}"

DEFAULT_FAMILY: Final = Path(__file__).with_name("family.toml")

# What the deployment decides for every model; a family does not repeat it.
OF_THE_DEPLOYMENT: Final = ("seed", "threads")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,59}")
# Names of other assets in the folder of the models.
_TAKEN: Final = (ROOT, "configuration", "adapted_encoder", "item_vectors", "compressed")


@dataclass(frozen=True, slots=True)
class Step:
    """One way to make a smaller model.

    Attributes:
        name: What families call it.
        config: Class of its configuration.
        place: Module and name of the function, ``module:function``; imported when it is run.
        after: Steps that may have come before it, anywhere in the chain.
        code_version: Version of its code; what was made by another one is made again.
        kinds: Kinds shown in Dagster's web UI.
        summary: What it does, for people.
    """

    name: str
    config: type[Any]
    place: str
    after: frozenset[str]
    code_version: str
    kinds: frozenset[str]
    summary: str

    def function(self) -> Callable[..., Any]:
        """Import the function that takes the step."""
        module, _, name = self.place.partition(":")
        return getattr(importlib.import_module(module), name)


_RESHAPING = frozenset({"distill", "prune", "trim"})
_TORCH = frozenset({"pytorch"})

STEPS: Mapping[str, Step] = MappingProxyType(
    {
        step.name: step
        for step in (
            Step(
                name="distill",
                config=DistillationConfig,
                place="recflow.compression.distill:distill_ranker",
                after=_RESHAPING,
                code_version="1",
                kinds=_TORCH,
                summary="A student of fewer layers, taught by its parent's vectors, hidden states "
                "and click scores, and then by clicks.",
            ),
            Step(
                name="prune",
                config=PruningConfig,
                place="recflow.compression.prune:prune_ranker",
                after=_RESHAPING,
                code_version="2",
                kinds=_TORCH,
                summary="The least important attention heads and feed-forward channels removed, "
                "and a short training to recover.",
            ),
            Step(
                name="low_rank",
                config=LowRankConfig,
                place="recflow.compression.low_rank:low_rank_ranker",
                after=_RESHAPING,
                code_version="1",
                kinds=_TORCH,
                summary="Matrices as products of two narrow ones, the rank of each chosen by what "
                "it loses.",
            ),
            Step(
                name="sparsify",
                config=SparsificationConfig,
                place="recflow.compression.sparsify:sparsify_ranker",
                after=_RESHAPING | {"low_rank"},
                code_version="1",
                kinds=_TORCH,
                summary="Single weights set to zero: smaller on disk, not faster on a CPU.",
            ),
            Step(
                name="trim",
                config=TrimmingConfig,
                place="recflow.compression.trim:trim_ranker",
                after=frozenset({"distill", "prune", "low_rank", "sparsify"}),
                code_version="1",
                kinds=_TORCH,
                summary="The vocabulary cut to the tokens that occur in the texts of train.",
            ),
            Step(
                name="quantize",
                config=QuantizationConfig,
                place="recflow.compression.quantize:quantize_ranker",
                after=_RESHAPING | {"low_rank", "sparsify"},
                code_version="2",
                kinds=frozenset({"onnx"}),
                summary="Numbers of fewer bits; exported only if it reproduces its parent.",
            ),
        )
    }
)


@dataclass(frozen=True, slots=True)
class Variant:
    """One model of the family.

    Attributes:
        name: Its name; the asset is ``models/<name>``.
        parent: Model that it is made from.
        step: How.
        config: Configuration of the step.
    """

    name: str
    parent: str
    step: Step
    config: Any

    @property
    def summary(self) -> str:
        """The step, and what of it differs from the defaults."""
        defaults = asdict(self.step.config())
        changed = {k: v for k, v in asdict(self.config).items() if v != defaults[k]}
        options = ", ".join(f"{key} {value}" for key, value in changed.items())
        return f"{self.step.name} ({options})" if options else self.step.name


@dataclass(frozen=True, slots=True)
class Family:
    """The smaller models of a deployment, parents before their children.

    Attributes:
        variants: By name.
        folder: Where their artifacts are; the first part of their keys.
    """

    variants: Mapping[str, Variant]
    folder: str = "models"

    @property
    def names(self) -> list[str]:
        """All models, the one that they descend from first."""
        return [ROOT, *self.variants]

    @property
    def parents(self) -> dict[str, str]:
        """Each model's parent."""
        return {name: variant.parent for name, variant in self.variants.items()}

    def key(self, name: str) -> str:
        """Key of a model's artifact and asset."""
        return ROOT_KEY if name == ROOT else f"{self.folder}/{name}"

    def steps(self, name: str) -> list[str]:
        """Names of the steps from the root to a model."""
        return [variant.step.name for variant in self.chain(name)]

    def chain(self, name: str) -> list[Variant]:
        """The models from the root's child down to ``name``."""
        chain: list[Variant] = []
        while name != ROOT:
            chain.append(self.variants[name])
            name = chain[-1].parent
        return chain[::-1]


def load_family(file: Path = DEFAULT_FAMILY) -> Family:
    """Read a family.

    Raises:
        ConfigError: The file is missing, is no TOML, or describes a family that cannot be.
    """
    try:
        with file.open("rb") as opened:
            content = tomllib.load(opened)
    except OSError as error:
        raise ConfigError.of("family", str(file), "a TOML file that can be read") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not TOML: {error}") from error
    try:
        return family_from(content)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def family_from(content: Mapping[str, Any], folder: str = "models") -> Family:
    """Check a family and put parents before children.

    Args:
        content: By model: ``parent``, ``step``, and keys of the step's configuration.
        folder: Where their artifacts are.

    Raises:
        ConfigError: A name, step, parent, key or value is not allowed; models descend from each
            other in a circle; or a step cannot follow those before it.
    """
    found = {name: _variant(name, table, content) for name, table in content.items()}
    ordered: dict[str, Variant] = {}
    while len(ordered) < len(found):
        ready = [
            name
            for name, variant in found.items()
            if name not in ordered and (variant.parent == ROOT or variant.parent in ordered)
        ]
        if not ready:
            circle = sorted(found.keys() - ordered.keys())
            raise ConfigError(
                f"the models {', '.join(circle)} descend from each other in a circle; "
                f"allowed: parents that lead to {ROOT}"
            )
        ordered |= {name: found[name] for name in ready}
    family = Family(MappingProxyType(ordered), folder)
    for name in ordered:
        try:
            check_chain(family.steps(name))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
    return family


def with_deployment(config: Any, *, seed: int, threads: int) -> Any:
    """A step's configuration with what the deployment decides, as far as the step knows it."""
    values = {"seed": seed, "threads": threads}
    return with_values(config, {k: v for k, v in values.items() if hasattr(config, k)})


def check_chain(steps: list[str]) -> None:
    """Refuse a chain of steps that makes no sense.

    Raises:
        ConfigError: A step is unknown, or cannot follow one before it.
    """
    for place, name in enumerate(steps):
        if name not in STEPS:
            raise ConfigError.of("step", name, ", ".join(STEPS))
        wrong = [before for before in steps[:place] if before not in STEPS[name].after]
        if wrong:
            allowed = ", ".join(before for before in STEPS if before in STEPS[name].after)
            raise ConfigError.of(
                "chain", " → ".join(steps), f"{name} after {allowed} only, not after {wrong[0]}"
            )


def _variant(name: str, table: Any, content: Mapping[str, Any]) -> Variant:
    if not _NAME.fullmatch(name):
        raise ConfigError.of(
            "model", name, "lower-case letters, digits and underscores, at most 60"
        )
    if name in _TAKEN:
        raise ConfigError.of("model", name, f"a name other than {', '.join(_TAKEN)}")
    if not isinstance(table, Mapping):
        raise ConfigError.of(name, table, "a table with parent and step")
    values = dict(table)
    parent, step = values.pop("parent", None), values.pop("step", None)
    if parent not in (ROOT, *content):
        raise ConfigError.of(f"{name}.parent", parent, ", ".join([ROOT, *content]))
    if step not in STEPS:
        raise ConfigError.of(f"{name}.step", step, ", ".join(STEPS))
    for key in OF_THE_DEPLOYMENT:
        if key in values:
            raise ConfigError.of(f"{name}.{key}", values[key], f"the setting RECFLOW_{key.upper()}")
    try:
        config = config_from(STEPS[step].config, values)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    return Variant(name, str(parent), STEPS[step], config)

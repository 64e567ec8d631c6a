"""What every model asset of a deployment needs of a machine, planned before anything is read.

Definitions are loaded without the tables, so a news log of titles of the configured size stands for
them (:meth:`TrainingWorkload.typical`); a run plans anew from what it reads. Loads neither PyTorch
nor Polars: the code location imports this.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from recflow.adapters.keys import (
    ADAPTED_ENCODER,
    COMPRESSED,
    CONFIGURATION,
    FINE_TUNED,
    GATE,
    ITEM_VECTORS,
    LABEL_EFFICIENCY_STUDY,
    MEASUREMENTS,
    PREDICTIONS,
    STRATEGIES_STUDY,
)
from recflow.compression.family import ROOT, Family
from recflow.core.errors import ConfigError, HardwareError, RecflowError
from recflow.hardware.calibration import Calibration
from recflow.hardware.choice import choose, shortage
from recflow.hardware.device import Device
from recflow.hardware.plan import Memory, TrainingPlan
from recflow.hardware.planner import plan_training
from recflow.hardware.presets import find_shape, preset_config
from recflow.hardware.requirements import POOL, HardwareRequirement, run_tags_of
from recflow.hardware.shape import EncoderShape
from recflow.hardware.steps import child_shape, plan_step
from recflow.hardware.workload import TrainingWorkload
from recflow.modeling.adaptation_config import AdaptationConfig
from recflow.modeling.config import STRATEGIES, TrainingConfig, with_values
from recflow.modeling.search_space import Choices, Range, Space, default_space

Make: TypeAlias = "Callable[[Device], TrainingPlan]"

CATALOGUE_SAMPLE: Final = 1_000
"""Test impressions for which the whole catalogue is ranked, unless a run says otherwise."""

_FLOAT: Final = 4
_LAYERS: Final = "tuning.tuned_layers"
_WORK: Final[Mapping[str, str]] = MappingProxyType(
    {
        "compressed": "searching the chain of compression steps",
        "item_vectors": "encoding and storing the catalogue",
        "predictions": "scoring with every model",
    }
)


@dataclass(frozen=True, slots=True)
class Need:
    """What one model asset needs, or why that is not known.

    Attributes:
        work: What was planned, for people.
        requirement: What to reserve; ``None`` where nothing is known.
        plan: The plan with the largest memory of those it was made of.
        reason: Why nothing is known.
    """

    work: str
    requirement: HardwareRequirement | None = None
    plan: TrainingPlan | None = None
    reason: str | None = None

    @property
    def tags(self) -> dict[str, str]:
        """Tags of the asset; none where nothing is known."""
        return self.requirement.tags if self.requirement else {}

    @property
    def op_tags(self) -> dict[str, Any]:
        """Tags of its step; none where nothing is known."""
        return self.requirement.op_tags if self.requirement else {}

    @property
    def pool(self) -> str:
        """Pool of its step: what is not known may use every core."""
        return self.requirement.pool if self.requirement else POOL


def run_tags(needs: Iterable[Need]) -> dict[str, str]:
    """Tags of a run that makes several assets, as far as their needs are known."""
    return run_tags_of(need.requirement for need in needs if need.requirement)


def requirements_of(
    base_model: str,
    config: TrainingConfig,
    family: Family,
    devices: Iterable[Device],
    *,
    adaptation: AdaptationConfig | None = None,
    space: Space | None = None,
    max_hours: float | None = None,
    calibration: Calibration | None = None,
) -> Mapping[str, Need]:
    """Plan every model asset, and choose the cheapest device that fits each.

    Trainings use a GPU where one is cheaper or the only one that fits. Compression, scoring and
    measuring run on processors: their code uses nothing else
    (:mod:`recflow.hardware.steps` plans them).

    Args:
        base_model: The pretrained encoder; see :func:`find_shape`. Nothing is downloaded: for a
            folder that is not there yet, the sizes of the well-known encoder of its name count.
        config: How models are trained.
        family: The smaller models.
        devices: What the deployment has.
        adaptation: How the encoder is adapted; ``None`` for the defaults.
        space: What a search changes; ``None`` for the default.
        max_hours: Longest planned training.
        calibration: Factors of a machine that was measured. They count for the device that they
            name alone: assets may run on other machines than the one that was measured.

    Returns:
        By key of the asset. Nothing is raised for an encoder that is not here yet or that fits no
        device: its needs say why they are not known, and everything else still works.
    """
    try:
        shape = _shape_of(base_model)
    except RecflowError as error:
        unknown = Need("the base model", reason=str(error))
        return dict.fromkeys(_keys(family), unknown)
    planned = _Planned(shape, config, tuple(devices), max_hours, calibration)
    return planned.needs(family, adaptation or AdaptationConfig(), space or default_space())


def _shape_of(base_model: str) -> EncoderShape:
    place = Path(base_model)
    if place.is_absolute() and not place.exists() and preset_config(place.name) is not None:
        return find_shape(place.name)
    return find_shape(base_model)


def _keys(family: Family) -> list[str]:
    return [
        *(FINE_TUNED, CONFIGURATION, ADAPTED_ENCODER, STRATEGIES_STUDY, LABEL_EFFICIENCY_STUDY),
        *(family.key(name) for name in family.variants),
        *(ITEM_VECTORS, COMPRESSED, PREDICTIONS, MEASUREMENTS, GATE),
    ]


class _Planned:
    """The plans of one deployment, each made once."""

    def __init__(
        self,
        shape: EncoderShape,
        config: TrainingConfig,
        devices: tuple[Device, ...],
        max_hours: float | None,
        calibration: Calibration | None,
    ) -> None:
        self.shape, self.config = shape, config
        self.devices, self.max_hours, self.calibration = devices, max_hours, calibration
        self.workload = _workload(config)
        self._plans: dict[tuple[TrainingConfig, str], TrainingPlan] = {}

    def needs(
        self, family: Family, adaptation: AdaptationConfig, space: Space
    ) -> Mapping[str, Need]:
        """What every model asset needs, by key."""
        config, count = self.config, {"models": len(family.names)}
        training = self.of_trainings(
            f"training with the strategy {config.tuning.strategy}", [config]
        )
        found = {
            FINE_TUNED: training,
            LABEL_EFFICIENCY_STUDY: training,
            CONFIGURATION: self.of_trainings(
                "the largest training of the search", _corners(config, space, self.shape.layers)
            ),
            ADAPTED_ENCODER: self.of("adapting the encoder", [self.adapting(adaptation)]),
            STRATEGIES_STUDY: self.of_trainings(
                "the largest training of the comparison",
                _varied(config, [{"tuning.strategy": strategy} for strategy in STRATEGIES]),
                compared=True,
            ),
            **self.of_family(family),
            ITEM_VECTORS: self.of_step("item_vectors", {}),
            COMPRESSED: self.of_step("compressed", count),
            PREDICTIONS: self.of_step(
                "predictions", {**count, "catalogue_sample": CATALOGUE_SAMPLE}
            ),
            MEASUREMENTS: self.of("measuring every model", [self.measuring(count)]),
            # The champion, the candidate as it is served, and the candidate as it was judged.
            GATE: self.of(
                "scoring with the champion, and asking the served model",
                [self.step("predictions", self.shape, {"models": 3})],
            ),
        }
        return {key: found[key] for key in _keys(family)}

    # ------------------------------------------------------------------ trainings

    def factors(self, device: Device) -> Calibration | None:
        """What was measured on such a device."""
        measured = self.calibration
        return measured if measured is not None and measured.device == device.name else None

    def training(self, config: TrainingConfig, *, compared: bool = False) -> Make:
        """How to plan one training.

        Args:
            config: How it trains.
            compared: Whether it is a process of its own beside the one that compares it with
                others and holds libraries and tables too.
        """

        def plan(device: Device) -> TrainingPlan:
            key = (config, device.name)
            if key not in self._plans:
                self._plans[key] = plan_training(
                    self.shape, config, _workload(config), device, self.factors(device)
                )
            found = self._plans[key]
            if not compared:
                return found
            host = _with_comparing(found.host_memory)
            return replace(found, host_memory=host, memory=found.memory if device.is_gpu else host)

        return plan

    def of_trainings(
        self, work: str, configs: Sequence[TrainingConfig], *, compared: bool = False
    ) -> Need:
        """What an asset needs that trains in several ways, one after the other."""
        return self.of(work, [self.training(config, compared=compared) for config in configs])

    def adapting(self, adaptation: AdaptationConfig) -> Make:
        """How to plan an adaptation: as a step on processors, as its like in trainings on GPUs."""
        like = self.training(_as_training(adaptation))
        step = self.step("adapt", self.shape, asdict(adaptation))
        return lambda device: like(device) if device.is_gpu else step(device)

    # ------------------------------------------------------------------ on processors

    def of_family(self, family: Family) -> dict[str, Need]:
        """What making each smaller model needs: its step, from the model that its parent is."""
        shapes, found = {ROOT: self.shape}, dict[str, Need]()
        for name, variant in family.variants.items():
            kind, values = variant.step.name, asdict(variant.config)
            parent = shapes[variant.parent]
            shapes[name] = child_shape(kind, parent, values, self.workload)
            found[family.key(name)] = self.of_step(kind, values, parent)
        return found

    def of_step(
        self, kind: str, values: Mapping[str, Any], parent: EncoderShape | None = None
    ) -> Need:
        """What a step needs that reads a model and knows no GPU."""
        return self.of(
            _WORK.get(kind, f"the step {kind}"), [self.step(kind, parent or self.shape, values)]
        )

    def step(self, kind: str, parent: EncoderShape, values: Mapping[str, Any]) -> Make:
        """How to plan one step; see :func:`plan_step`."""
        child = child_shape(kind, parent, values, self.workload)

        def plan(device: Device) -> TrainingPlan:
            return plan_step(
                kind, parent, child, values, self.workload, device, self.factors(device)
            )

        return plan

    def measuring(self, values: Mapping[str, Any]) -> Make:
        """How to plan the measurements: memory is that of a fresh process beside the timing one."""
        timing = self.step("measurements", self.shape, values)

        def plan(device: Device) -> TrainingPlan:
            found = timing(device)
            parts = found.memory.parts
            # Weights are read beside those that the module was built with.
            fresh = parts.get("context", 0) + 2 * _FLOAT * self.shape.parameters
            memory = replace(found.memory, parts={**parts, "measured process": fresh})
            return replace(found, memory=memory, host_memory=memory)

        return plan

    # ------------------------------------------------------------------ the choice

    def of(self, work: str, makes: Sequence[Make]) -> Need:
        """What an asset needs that does several things, one after the other.

        Args:
            work: What it does, for people.
            makes: How to plan each of them.
        """
        try:
            return _need(work, cheapest(work, makes, self.devices, self.max_hours))
        except (ConfigError, HardwareError) as error:
            return Need(work, reason=str(error))


def cheapest(
    work: str, makes: Sequence[Make], devices: Iterable[Device], max_hours: float | None = None
) -> list[TrainingPlan]:
    """The plans of several things to do, one after the other, on the cheapest device they all fit.

    Which one is the largest hardly depends on the device. The choice is made for that one, and
    the others are looked at where it falls: every plan counts in the time that the location
    takes to load.

    Args:
        work: What they are, for people.
        makes: How to plan each of them for a device.
        devices: Where they may be done.
        max_hours: Longest time of each.

    Raises:
        ConfigError: No device can do it.
        HardwareError: It fits none, or takes too long on all.
    """
    reason: RecflowError = ConfigError.of("devices", [], "at least one device")
    largest: Make | None = None
    plans: list[TrainingPlan] = []
    for device in devices:
        try:
            largest = largest or _largest(makes, device)
            plans.append(largest(device))
        except ConfigError as error:
            reason = error
    while plans:
        chosen = choose(plans, max_hours, work=work)
        plans = [plan for plan in plans if plan.fits and plan is not chosen]
        try:
            found = [make(chosen.device) for make in makes]
        except ConfigError as error:
            reason = error
            continue
        unfit = [plan for plan in found if not plan.fits]
        if not unfit:
            return found
        lacking = shortage(unfit[0])
        reason = HardwareError(f"{work} fits no device; {chosen.device.name} {lacking}")
    raise reason


def _largest(makes: Sequence[Make], device: Device) -> Make:
    """The one that takes the most memory on a device."""
    if len(makes) == 1:
        return makes[0]
    return max(makes, key=lambda make: make(device).memory.total)


def _need(work: str, plans: Sequence[TrainingPlan]) -> Need:
    """What plans on one device need, made one after the other."""
    needs = [HardwareRequirement.of_plan(plan) for plan in plans]
    largest = max(plans, key=lambda plan: plan.memory.total)
    requirement = replace(
        needs[0],
        gpu_count=max(need.gpu_count for need in needs),
        gpu_memory_gib=max(need.gpu_memory_gib for need in needs),
        host_memory_gib=max(need.host_memory_gib for need in needs),
        cores=max(need.cores for need in needs),
    )
    return Need(work, requirement, largest)


def _workload(config: TrainingConfig) -> TrainingWorkload:
    """What a training reads where nothing is known of the tables."""
    return TrainingWorkload.typical(
        clicks=config.schedule.max_impressions_per_epoch,
        history=float(config.user_model.history_length),
        # Every click has the non-clicks that it is compared with.
        slate=max(30.0, 1.0 + config.objective.negatives),
        longest=config.max_tokens,
    )


def _with_comparing(memory: Memory) -> Memory:
    """The same work in a process of its own, beside one that holds libraries and tables too."""
    more = sum(memory.parts.get(part, 0) for part in ("context", "tables"))
    return replace(memory, parts={**memory.parts, "comparing process": more})


def _as_training(adaptation: AdaptationConfig) -> TrainingConfig:
    """The training whose steps are those of an adaptation.

    Of every text of a batch two encodings are compared; there are no hidden states to keep.
    """
    every = adaptation.tuned_layers is None
    return with_values(
        TrainingConfig(),
        {
            "max_tokens": adaptation.max_tokens,
            "pooling": adaptation.pooling,
            "tuning.strategy": "full" if every else "top_k_layers",
            _LAYERS: adaptation.tuned_layers or 1,
            "schedule.head_epochs": 0,
            "schedule.encoder_epochs": adaptation.epochs,
            "schedule.encoder_batch_size": adaptation.batch_size,
            "schedule.max_impressions_per_epoch": max(
                1, adaptation.max_steps * adaptation.batch_size
            ),
            "speed.cache_hidden_states": False,
            "speed.precision": adaptation.precision,
            "speed.max_texts_per_step": 2 * adaptation.batch_size,
        },
    )


def _corners(config: TrainingConfig, space: Space, layers: int) -> list[TrainingConfig]:
    """The largest trainings of a search: every choice, at the high end of every range.

    More layers than the encoder has are left out, as the search leaves such trials out.
    """
    fixed = {key: found.high for key, found in space.items() if isinstance(found, Range)}
    if _LAYERS in fixed:
        fixed[_LAYERS] = min(fixed[_LAYERS], layers)
    choices = {key: found.choices for key, found in space.items() if isinstance(found, Choices)}
    return _varied(
        config,
        [
            {**fixed, **dict(zip(choices, chosen, strict=True))}
            for chosen in itertools.product(*choices.values())
        ],
    )


def _varied(config: TrainingConfig, changes: Iterable[Mapping[str, Any]]) -> list[TrainingConfig]:
    """A configuration with each of some changes; those that contradict it are left out."""
    found: list[TrainingConfig] = []
    for values in changes:
        with contextlib.suppress(ConfigError):
            found.append(with_values(config, values))
    return found or [config]

"""What every model asset of a deployment needs of a machine, planned before anything is read.

Definitions are loaded without the tables, so a news log of titles of the configured size stands for
them (:meth:`TrainingWorkload.typical`); a run plans anew from what it reads. Loads neither PyTorch
nor Polars: the code location imports this.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

from recflow.adapters.keys import (
    ADAPTED_ENCODER,
    COMPRESSED,
    CONFIGURATION,
    FINE_TUNED,
    ITEM_VECTORS,
    LABEL_EFFICIENCY_STUDY,
    MEASUREMENTS,
    PREDICTIONS,
    STRATEGIES_STUDY,
)
from recflow.compression.family import Family
from recflow.core.errors import ConfigError, HardwareError, RecflowError
from recflow.hardware.calibration import Calibration
from recflow.hardware.choice import choose
from recflow.hardware.device import Device
from recflow.hardware.inference import ServedModel, plan_inference
from recflow.hardware.plan import InferencePlan, Memory, TrainingPlan, gib
from recflow.hardware.planner import plan_training
from recflow.hardware.presets import find_shape
from recflow.hardware.requirements import POOL, HardwareRequirement, run_tags_of
from recflow.hardware.shape import EncoderShape
from recflow.hardware.workload import InferenceWorkload, TrainingWorkload
from recflow.modeling.adaptation_config import AdaptationConfig
from recflow.modeling.config import STRATEGIES, TrainingConfig, with_values
from recflow.modeling.search_space import Choices, Range, Space, default_space

Plan: TypeAlias = "TrainingPlan | InferencePlan"

_LAYERS: Final = "tuning.tuned_layers"
_STEP_BATCH: Final = 64  # texts or clicks of a step of any compression


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
    plan: Plan | None = None
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
    measuring run on processors: their code uses nothing else.

    Args:
        base_model: The pretrained encoder; see :func:`find_shape`. Nothing is downloaded.
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
        shape = find_shape(base_model)
    except RecflowError as error:
        unknown = Need("the base model", reason=str(error))
        return dict.fromkeys(_keys(family), unknown)
    planned = _Planned(shape, config, tuple(devices), max_hours, calibration)
    return planned.needs(family, adaptation or AdaptationConfig(), space or default_space())


def _keys(family: Family) -> list[str]:
    return [
        *(FINE_TUNED, CONFIGURATION, ADAPTED_ENCODER, STRATEGIES_STUDY, LABEL_EFFICIENCY_STUDY),
        *(family.key(name) for name in family.variants),
        *(ITEM_VECTORS, COMPRESSED, PREDICTIONS, MEASUREMENTS),
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
        self._plans: dict[tuple[TrainingConfig, str], TrainingPlan] = {}

    def needs(
        self, family: Family, adaptation: AdaptationConfig, space: Space
    ) -> Mapping[str, Need]:
        """What every model asset needs, by key."""
        config = self.config
        training = self.of_trainings(f"training, strategy {config.tuning.strategy}", [config])
        step = self.of_step()
        found = {
            FINE_TUNED: training,
            LABEL_EFFICIENCY_STUDY: training,
            CONFIGURATION: self.of_trainings(
                "the largest training of the search", _corners(config, space, self.shape.layers)
            ),
            ADAPTED_ENCODER: self.of_trainings("adapting the encoder", [_as_training(adaptation)]),
            STRATEGIES_STUDY: self.of_trainings(
                "the largest training of the comparison",
                _varied(config, [{"tuning.strategy": strategy} for strategy in STRATEGIES]),
                compared=True,
            ),
            **{family.key(name): step for name in family.variants},
            COMPRESSED: step,
            ITEM_VECTORS: self.of_inference("encoding the catalogue"),
            PREDICTIONS: self.of_inference("scoring"),
            MEASUREMENTS: self.of_inference("measuring", compared=True),
        }
        return {key: found[key] for key in _keys(family)}

    # ------------------------------------------------------------------ trainings

    def factors(self, device: Device) -> Calibration | None:
        """What was measured on such a device."""
        measured = self.calibration
        return measured if measured is not None and measured.device == device.name else None

    def plan(self, config: TrainingConfig, device: Device, *, compared: bool) -> TrainingPlan:
        """Plan one training on one device.

        Args:
            config: How it trains.
            device: Where.
            compared: Whether it is a process of its own beside the one that compares it with
                others and holds the tables too.
        """
        key = (config, device.name)
        if key not in self._plans:
            self._plans[key] = plan_training(
                self.shape, config, _workload(config), device, self.factors(device)
            )
        plan = self._plans[key]
        if not compared:
            return plan
        host = _with_comparing(plan.host_memory)
        return replace(plan, host_memory=host, memory=plan.memory if device.is_gpu else host)

    def of_trainings(
        self, work: str, configs: Sequence[TrainingConfig], *, compared: bool = False
    ) -> Need:
        """What an asset needs that trains in several ways, one after the other."""
        try:
            return _need(work, self._cheapest(configs, compared))
        except (ConfigError, HardwareError) as error:
            return Need(work, reason=str(error))

    def _cheapest(self, configs: Sequence[TrainingConfig], compared: bool) -> list[TrainingPlan]:
        """The plans on the cheapest device that all of them fit."""
        devices = self._able(configs)
        # Which training is the largest hardly depends on the device. The choice is made for that
        # one, and the others are looked at where it falls: every plan counts in the time that the
        # location takes to load.
        first = devices[0]
        largest = max(
            configs, key=lambda one: self.plan(one, first, compared=compared).memory.total
        )
        while True:
            plans = [self.plan(largest, device, compared=compared) for device in devices]
            chosen = choose(plans, self.max_hours).device
            found = [self.plan(one, chosen, compared=compared) for one in configs]
            unfit = [plan for plan in found if not plan.fits]
            if not unfit:
                return found
            devices.remove(chosen)
            if not devices:
                choose(unfit)

    def _able(self, configs: Sequence[TrainingConfig]) -> list[Device]:
        """The devices that can train like this.

        Raises:
            ConfigError: There are none, or the encoder cannot be trained like this anywhere.
        """
        able: list[Device] = []
        refused = ConfigError.of("devices", [], "at least one device")
        for device in self.devices:
            try:
                for config in {one.speed.precision: one for one in configs}.values():
                    self.plan(config, device, compared=False)
            except ConfigError as error:
                refused = error
            else:
                able.append(device)
        if not able:
            raise refused
        return able

    # ------------------------------------------------------------------ on processors

    def of_step(self) -> Need:
        """What a compression step needs: as much as its heaviest kind, all weights learning.

        The parent's weights are held beside a training of all weights in small batches. A smaller
        student takes less.
        """
        work = "a compression step"
        config = with_values(
            self.config,
            {
                "tuning.strategy": "full",
                "schedule.head_epochs": 0,
                "schedule.encoder_epochs": 1,
                "schedule.encoder_batch_size": _STEP_BATCH,
                "speed.max_texts_per_step": _STEP_BATCH,
                "distribution.processes": 1,
            },
        )
        parent = 4 * self.shape.parameters
        try:
            plans: list[TrainingPlan] = []
            for device in self._processors():
                plan = self.plan(config, device, compared=False)
                memory = Memory({**plan.memory.parts, "parent": parent}, plan.memory.moment)
                plans.append(replace(plan, memory=memory, host_memory=memory))
            return _need(work, [choose(plans, self.max_hours)])
        except (ConfigError, HardwareError) as error:
            return Need(work, reason=str(error))

    def of_inference(self, work: str, *, compared: bool = False) -> Need:
        """What an asset needs that encodes the texts of a snapshot and scores with them.

        The largest model is the one that was fine-tuned; the family's are smaller. The tables are
        held beside.
        """
        config = self.config
        reads = _workload(config)
        asked = InferenceWorkload(
            items=reads.items,
            history=reads.history,
            candidates=round(reads.slate),
            lengths=reads.lengths,
        )
        try:
            plans: list[InferencePlan] = []
            for device in self._processors():
                plan = plan_inference(
                    ServedModel.of(self.shape), asked, device, self.factors(device)
                )
                # Features and splits, read and selected.
                memory = Memory(
                    {**plan.memory.parts, "tables": 2 * reads.table_bytes}, plan.memory.moment
                )
                plans.append(replace(plan, memory=_with_comparing(memory) if compared else memory))
            fitting = [plan for plan in plans if plan.fits]
            if not fitting:
                nearest = min(plans, key=lambda plan: plan.memory.total / plan.device.memory_bytes)
                raise HardwareError(
                    f"{work} fits no device; {nearest.device.name} comes nearest with "
                    f"{gib(nearest.device.memory_bytes)} of the {gib(nearest.memory.total)} needed"
                )
            return _need(work, [min(fitting, key=lambda plan: plan.usd_per_million)])
        except (ConfigError, HardwareError) as error:
            return Need(work, reason=str(error))

    def _processors(self) -> list[Device]:
        found = [device for device in self.devices if not device.is_gpu]
        if not found:
            raise ConfigError.of(
                "devices", [device.name for device in self.devices], "at least one CPU class"
            )
        return found


def _need(work: str, plans: Sequence[Plan]) -> Need:
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
    return Memory({**memory.parts, "comparing process": more}, memory.moment)


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

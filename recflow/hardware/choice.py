"""Which device to take, and what to change where a training fits none.

The choice is the cheapest plan that fits memory and a time budget. Advice is never guessed: each
change is planned anew with the same formulas, and only what then fits is given.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from recflow.core.errors import ConfigError, HardwareError
from recflow.hardware.calibration import Calibration
from recflow.hardware.device import Device
from recflow.hardware.plan import Advice, Memory, TrainingPlan, gib
from recflow.hardware.planner import plan_training
from recflow.hardware.shape import EncoderShape
from recflow.hardware.workload import TrainingWorkload
from recflow.modeling.config import TrainingConfig, with_values

_HOUR: Final = 3_600.0
_PROCESSES: Final = (2, 4, 8)
_SMALLEST_BATCH: Final = 16
_MOST_PARTS: Final = 16
_MOST_CHANGES: Final = 4  # in one combination
_MOST_COMBINATIONS: Final = 3  # told


def choose(
    plans: Iterable[TrainingPlan],
    max_hours: float | None = None,
    *,
    advice: Callable[[Device], Sequence[Advice]] | None = None,
    work: str = "the training",
) -> TrainingPlan:
    """The cheapest plan that fits; the quicker of two that cost the same.

    Args:
        plans: The same work on different devices.
        max_hours: Longest time of the training; ``None`` for any.
        advice: What would make the training fit a device, asked only where it fits none.
        work: What is planned, for people.

    Raises:
        ConfigError: There are no plans, or the time is not above 0.
        HardwareError: None fits. It names the part of the memory that is too large on the device
            that comes nearest, or the quickest device where only time is short, and what helps.
    """
    plans = list(plans)
    if not plans:
        raise ConfigError.of("devices", [], "at least one device to choose from")
    if max_hours is not None and not max_hours > 0:
        raise ConfigError.of("hours", max_hours, "above 0")
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        raise HardwareError(_no_room(min(plans, key=excess), advice, work))
    quick = [plan for plan in fitting if max_hours is None or plan.seconds <= max_hours * _HOUR]
    if not quick:
        best = min(fitting, key=lambda plan: plan.seconds)
        raise HardwareError(
            f"no device trains within {max_hours:g} h; the quickest, {best.device.name}, takes "
            f"{best.seconds / _HOUR:.1f} h: allow more hours or train on fewer clicks or epochs"
        )
    return min(quick, key=lambda plan: (plan.usd, plan.seconds, plan.device.name))


def shortage(plan: TrainingPlan) -> str | None:
    """Which memory is too small for a plan, and the plan's largest part of it.

    Returns:
        E.g. ``needs 212.2 GiB of 22.0 GiB, most of it optimiser states (84.8 GiB)``; ``None`` where
        the plan fits.
    """
    if not plan.memory.fits(plan.device.memory_bytes):
        return _needs(plan.memory, plan.device.memory_bytes)
    if not plan.host_memory.fits(plan.host_memory_bytes):
        return f"its host {_needs(plan.host_memory, plan.host_memory_bytes)}"
    return None


def advise(
    shape: EncoderShape,
    config: TrainingConfig,
    workload: TrainingWorkload,
    device: Device,
    calibration: Calibration | None = None,
) -> list[Advice]:
    """Changes of the configuration that make a training fit a device.

    Args:
        shape: Sizes of the encoder.
        config: How it would be trained.
        workload: What it reads.
        device: Where it does not fit.
        calibration: What such a device reaches; see :func:`plan_training`.

    Returns:
        From the most harmless to the most far-reaching: of each kind of change the mildest one that
        suffices alone; where none does, the combinations of the fewest changes. Nothing where the
        training fits already or no change helps.

    Raises:
        ConfigError: The configuration does not fit the encoder.
    """
    planned = _Planned(shape, config, workload, device, calibration)
    if planned.plan({}).fits:
        return []
    levers = list(_levers(shape, config, device))
    alone = [planned.first_that_fits([lever.values], {}) for lever in levers]
    found = [values for values in alone if values is not None]
    if not found:
        found = _combinations(planned, levers)
    return [planned.advice(values) for values in found]


@dataclass(frozen=True, slots=True)
class _Lever:
    """One kind of change: its values from mild to strong."""

    values: tuple[Mapping[str, Any], ...]


def _levers(shape: EncoderShape, config: TrainingConfig, device: Device) -> Iterator[_Lever]:
    """What could be changed, from the most harmless to the most far-reaching.

    The order: what gives the same model (parts of a batch, recomputing, keeping hidden states or
    not), hardly another one (bf16, fewer texts a step, smaller batches), another one (low
    rank, fewer layers), the same one on more devices.
    """
    speed, schedule, tuning = config.speed, config.schedule, config.tuning
    parts = _doubled(speed.micro_batches, _MOST_PARTS)
    yield _Lever(tuple({"speed.micro_batches": count} for count in parts))
    if not speed.gradient_checkpointing:
        yield _Lever(({"speed.gradient_checkpointing": True},))
    yield _Lever(({"speed.cache_hidden_states": not speed.cache_hidden_states},))
    if speed.precision == "fp32" and device.supports("bf16"):
        yield _Lever(({"speed.precision": "bf16"},))
    if speed.distinct_items:
        texts = speed.max_texts_per_step or 2 * schedule.encoder_batch_size
        fewer = _halved(texts, _SMALLEST_BATCH)
        yield _Lever(tuple({"speed.max_texts_per_step": count} for count in fewer))
    batches = _halved(schedule.encoder_batch_size, _SMALLEST_BATCH)
    yield _Lever(tuple({"schedule.encoder_batch_size": size} for size in batches))
    if tuning.strategy in ("full", "top_k_layers"):
        full = tuning.strategy == "full"
        layers = shape.layers if full else tuning.tuned_layers
        yield _Lever(
            tuple(
                {"tuning.strategy": "lora", "tuning.tuned_layers": count}
                for count in (layers, *(_halved(layers, 1) if full else ()))
            )
        )
    if tuning.strategy not in ("frozen", "full"):
        fewer = _halved(tuning.tuned_layers, 1)
        yield _Lever(tuple({"tuning.tuned_layers": count} for count in fewer))
    yield _Lever(tuple(_spread(config)))


def _spread(config: TrainingConfig) -> Iterator[dict[str, Any]]:
    """More processes, each with a part of the batch, and then with a part of the encoder too."""
    spread = config.distribution
    shards = config.tuning.strategy != "adalora" and spread.synchronisation == "every_step"
    if shards and spread.processes > 1 and not spread.shard_encoder:
        yield {"distribution.shard_encoder": True}
    for count in _PROCESSES:
        if count > spread.processes:
            yield {"distribution.processes": count}
            if shards and not spread.shard_encoder:
                yield {"distribution.processes": count, "distribution.shard_encoder": True}


class _Planned:
    """Plans of one training with changes, each made once."""

    def __init__(
        self,
        shape: EncoderShape,
        config: TrainingConfig,
        workload: TrainingWorkload,
        device: Device,
        calibration: Calibration | None,
    ) -> None:
        self._arguments = (shape, workload, device, calibration)
        self._config = config
        self._plans: dict[tuple[tuple[str, Any], ...], TrainingPlan] = {}

    def plan(self, values: Mapping[str, Any]) -> TrainingPlan:
        """The plan with some values changed."""
        key = tuple(sorted(values.items()))
        if key not in self._plans:
            shape, workload, device, calibration = self._arguments
            config = with_values(self._config, values)
            self._plans[key] = plan_training(shape, config, workload, device, calibration)
        return self._plans[key]

    def first_that_fits(
        self, levers: Sequence[Sequence[Mapping[str, Any]]], given: Mapping[str, Any]
    ) -> Mapping[str, Any] | None:
        """The first combination of one value of each lever that fits beside the given values."""
        for chosen in itertools.product(*levers):
            values = dict(given)
            for change in chosen:
                values |= change
            if self.fits(values):
                return values
        return None

    def fits(self, values: Mapping[str, Any]) -> bool:
        """Whether it fits with these values; not where they contradict each other."""
        try:
            return self.plan(values).fits
        except ConfigError:
            return False

    def advice(self, values: Mapping[str, Any]) -> Advice:
        plan = self.plan(values)
        change = ", ".join(f"{key}: {_written(value)}" for key, value in values.items())
        return Advice(change, plan.memory.total, plan.fits, plan.device.name, dict(values))


def _combinations(planned: _Planned, levers: Sequence[_Lever]) -> list[Mapping[str, Any]]:
    """The combinations of the fewest changes that fit, each as mild as it may be."""
    levers = [lever for lever in levers if lever.values]
    for count in range(2, min(_MOST_CHANGES, len(levers)) + 1):
        found: list[Mapping[str, Any]] = []
        # The strongest values decide whether a combination can fit at all.
        for chosen in sorted(itertools.combinations(range(len(levers)), count), key=sum):
            if planned.fits(_merged(levers[index].values[-1] for index in chosen)):
                values = planned.first_that_fits([levers[index].values for index in chosen], {})
                if values is not None and values not in found:
                    found.append(values)
            if len(found) == _MOST_COMBINATIONS:
                break
        if found:
            return found
    return []


def _merged(changes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for change in changes:
        values |= change
    return values


def _doubled(start: int, most: int) -> list[int]:
    found: list[int] = []
    while (start := start * 2) <= most:
        found.append(start)
    return found


def _halved(start: int, least: int) -> list[int]:
    found: list[int] = []
    while (start := start // 2) >= least:
        found.append(start)
    return found


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def excess(plan: TrainingPlan) -> float:
    """Need over memory, of the device or its host, the tighter one; it fits up to 1."""
    return max(
        plan.memory.total / plan.device.memory_bytes,
        plan.host_memory.total / plan.host_memory_bytes,
    )


def _needs(memory: Memory, size: int) -> str:
    part = memory.largest
    return (
        f"needs {gib(memory.total)} of {gib(size)}, most of it {part} ({gib(memory.parts[part])})"
    )


def _no_room(
    plan: TrainingPlan, advice: Callable[[Device], Sequence[Advice]] | None, work: str
) -> str:
    text = f"{work} fits no device; {plan.device.name} comes nearest but {shortage(plan)}"
    if advice is None:
        return text
    changes = advice(plan.device)
    if not changes:
        return f"{text}; no change of its configuration helps: take a smaller base model"
    return f"{text}; it fits with " + " or with ".join(each.change for each in changes)

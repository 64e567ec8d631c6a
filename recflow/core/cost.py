"""What models cost on kinds of devices; shared by those who plan and those who report.

Money and energy are those of a busy machine at its list price and its power limit. What was
measured stands beside what was predicted, never in its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

Run = Literal["training", "inference"]
"""What was predicted and then measured: the making of a model, or its use."""


@dataclass(frozen=True, slots=True)
class PricedDevice:
    """A device of the catalogue, as far as a reader of costs wants to know it.

    Attributes:
        name: Name in tags and on the command line.
        label: Name for people.
        kind: ``gpu``, or ``cpu`` for a whole machine without one.
        memory_bytes: Memory that models live in.
        watts: Power limit.
        usd_per_hour: What an hour costs, in US dollars.
        price_date: When that was looked up, ``YYYY-MM-DD``.
        price_source: Where.
        data_source: Data sheet of memory, bandwidth and rates.
    """

    name: str
    label: str
    kind: str
    memory_bytes: int
    watts: float
    usd_per_hour: float
    price_date: str
    price_source: str
    data_source: str


@dataclass(frozen=True, slots=True)
class ServingCost:
    """What it takes to serve one model on one device.

    Attributes:
        device: Name of the device.
        fits: Whether the memory suffices.
        memory_bytes: Memory needed.
        texts_per_second: Texts a second, in batches, at the efficiency that is expected.
        limit_texts_per_second: Texts a second at the device's full rates: no program is faster.
        recommendations_per_second: Recommendations a second.
        usd: Price of a million recommendations.
        watt_hours: Energy of a million recommendations at the power limit: an upper bound.
        is_calibrated: Whether the efficiency was measured on such a device, not assumed.
    """

    device: str
    fits: bool
    memory_bytes: int
    texts_per_second: float
    limit_texts_per_second: float
    recommendations_per_second: float
    usd: float
    watt_hours: float
    is_calibrated: bool


@dataclass(frozen=True, slots=True)
class TrainingCost:
    """What it takes to make one model from its parent on one device.

    Attributes:
        device: Name of the device.
        fits: Whether its memory and that of the machine around it suffice.
        memory_bytes: Memory needed of the device.
        seconds: Seconds from start to end, at the efficiency that is expected.
        limit_seconds: Seconds at the device's full rates: no program is faster.
        usd: Price of the run.
        watt_hours: Energy of the run at the power limit: an upper bound.
        is_calibrated: Whether the efficiency was measured on such a device, not assumed.
    """

    device: str
    fits: bool
    memory_bytes: int
    seconds: float
    limit_seconds: float
    usd: float
    watt_hours: float
    is_calibrated: bool


Cost = TypeVar("Cost", ServingCost, TrainingCost)


def cheapest(costs: Iterable[Cost]) -> Cost | None:
    """The cheapest that fits; ``None`` where nothing does. Of equal prices, the first."""
    possible = [cost for cost in costs if cost.fits and math.isfinite(cost.usd)]
    return min(possible, key=lambda cost: cost.usd, default=None)


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What one model costs.

    Attributes:
        name: The model, named like its scorer.
        serving: Serving it, a device each; empty where that cannot be planned.
        training: Making it from its parent, a device each; empty where that cannot be planned.
        note: Why something is missing; empty where nothing is.
        measured_seconds: Seconds that making it took on the machine that did.
        measured_watt_hours: Energy of a million recommendations as a meter counted it on the
            machine that measured; ``None`` where nothing could be read.
        energy_source: What was read, or why nothing could be; empty where nobody tried.
    """

    name: str
    serving: tuple[ServingCost, ...] = ()
    training: tuple[TrainingCost, ...] = ()
    note: str = ""
    measured_seconds: float | None = None
    measured_watt_hours: float | None = None
    energy_source: str = ""


@dataclass(frozen=True, slots=True)
class PlannedAndMeasured:
    """A prediction beside what was seen.

    Attributes:
        model: The model, named like its scorer.
        run: Making it, or using it.
        name: What, e.g. ``peak memory``.
        unit: ``bytes``, ``seconds``, or another unit in words, e.g. ``texts/s``.
        predicted: Before the run; ``None`` where nothing was.
        measured: In the run.
        limit: What the full rates of the machine would allow; ``None`` where they are unknown.
    """

    model: str
    run: Run
    name: str
    unit: str
    predicted: float | None
    measured: float
    limit: float | None = None

    @property
    def error(self) -> float | None:
        """Predicted over measured, less 1; ``None`` where either is missing."""
        if self.predicted is None or not self.measured:
            return None
        return self.predicted / self.measured - 1


@dataclass(frozen=True, slots=True)
class CostSection:
    """Everything a report says about costs.

    Attributes:
        devices: The devices that were planned for.
        models: The models.
        compared: Predictions beside measurements.
        recommendation: What one recommendation is, in a sentence.
        training_run: What one training run is, in a sentence.
        machine: Where everything measured was measured, in a sentence.
        notes: What else one must know to read the numbers, a sentence each.
    """

    devices: tuple[PricedDevice, ...]
    models: tuple[ModelCost, ...]
    compared: tuple[PlannedAndMeasured, ...]
    recommendation: str
    training_run: str
    machine: str
    notes: tuple[str, ...] = ()

"""What was planned: memory by part, operations, time, money."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from recflow.hardware.device import GIB, Device

_HOUR = 3_600.0


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by part, at the moment of the largest use.

    Attributes:
        parts: Bytes of each part; what names mean is said where the plan is made.
        moment: When that is: ``step``, ``checkpoint``, ``loading``, …
    """

    parts: Mapping[str, int]
    moment: str = "step"

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def largest(self) -> str:
        """Name of the largest part."""
        return max(self.parts, key=lambda name: self.parts[name])

    def fits(self, size: int) -> bool:
        """Whether it fits into so many bytes."""
        return self.total <= size


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of work of one kind.

    Attributes:
        name: ``start``, ``hidden states``, ``head``, ``encoder``, ``validation``.
        repeats: Steps, or how often it is done.
        flops: Floating-point operations of one repeat.
        limit_seconds: Seconds of one repeat at the device's full rates: the roofline.
        seconds: Seconds of one repeat with the efficiency that was calibrated.
    """

    name: str
    repeats: float
    flops: float
    limit_seconds: float
    seconds: float


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What one training takes on one device.

    Attributes:
        device: The device.
        devices: How many of them, each with a process of its own.
        precision: What matrices are multiplied in.
        memory: Memory of one device; of the machine where that is a CPU.
        host_memory: Memory of the machine; the same as ``memory`` on a CPU.
        stages: The work, stage by stage.
        parameters: Weights of the encoder.
        trainable_parameters: Those that learn, user model included.
        clicks: Click samples of all epochs.
        texts_per_step: Texts encoded with gradient in a step of the encoder's phase.
        is_calibrated: Whether efficiencies were measured on such a device, not assumed.
    """

    device: Device
    devices: int
    precision: str
    memory: Memory
    host_memory: Memory
    stages: tuple[Stage, ...]
    parameters: int
    trainable_parameters: int
    clicks: int
    texts_per_step: float
    is_calibrated: bool

    @property
    def fits(self) -> bool:
        """Whether both memories suffice."""
        device = self.memory.fits(self.device.memory_bytes)
        return device and self.host_memory.fits(self.host_memory_bytes)

    @property
    def host_memory_bytes(self) -> int:
        """Memory of the machine: around each GPU what the catalogue says for one."""
        return self.device.host_memory_bytes * self.devices

    @property
    def seconds(self) -> float:
        """Seconds from start to end."""
        return sum(stage.repeats * stage.seconds for stage in self.stages)

    @property
    def limit_seconds(self) -> float:
        """Seconds that the device's full rates would leave."""
        return sum(stage.repeats * stage.limit_seconds for stage in self.stages)

    @property
    def flops(self) -> float:
        """Floating-point operations of the whole training."""
        return sum(stage.repeats * stage.flops for stage in self.stages)

    def stage(self, name: str) -> Stage | None:
        """One of the stages; ``None`` where the training has none of that name."""
        return next((stage for stage in self.stages if stage.name == name), None)

    @property
    def usd(self) -> float:
        """What the whole training costs."""
        return self.seconds / _HOUR * self.device.price.usd_per_hour * self.devices

    @property
    def seconds_per_million_clicks(self) -> float:
        """Seconds for a million click samples, start left out."""
        start = self.stage("start")
        working = self.seconds - (start.seconds if start else 0.0)
        return working / max(self.clicks, 1) * 1e6

    @property
    def watt_hours(self) -> float:
        """Energy at the device's power limit: an upper bound."""
        return self.seconds / _HOUR * self.device.watts * self.devices

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and metadata."""
        return {
            "device": self.device.name,
            "devices": self.devices,
            "precision": self.precision,
            "fits": self.fits,
            "memory_bytes": self.memory.total,
            "memory_parts": dict(self.memory.parts),
            "memory_moment": self.memory.moment,
            "host_memory_bytes": self.host_memory.total,
            "stages": [asdict(stage) for stage in self.stages],
            "parameters": self.parameters,
            "trainable_parameters": self.trainable_parameters,
            "clicks": self.clicks,
            "texts_per_step": self.texts_per_step,
            "flops": self.flops,
            "seconds": self.seconds,
            "limit_seconds": self.limit_seconds,
            "seconds_per_million_clicks": self.seconds_per_million_clicks,
            "usd": self.usd,
            "watt_hours_at_most": self.watt_hours,
            "is_calibrated": self.is_calibrated,
        }


@dataclass(frozen=True, slots=True)
class InferencePlan:
    """What serving one model takes on one device.

    Attributes:
        device: The device.
        precision: What matrices are multiplied in.
        memory: Memory by part: ``weights``, ``item vectors``, ``request``, ``context`` …
        flops_per_text: Operations to encode one text of mean length.
        flops_per_recommendation: Operations of one recommendation, texts included.
        limit_texts_per_second: Texts a second at the device's full rates.
        texts_per_second: Texts a second with the efficiency that was calibrated, in batches.
        recommendations_per_second: Recommendations a second of a busy machine, on which every core
            ranks for a user of its own; ``memory`` is that of one process.
        latency_seconds: Seconds to encode one text alone.
        is_calibrated: Whether efficiencies were measured on such a device, not assumed.
        threads: Threads on a CPU; all cores where ``None``.
    """

    device: Device
    precision: str
    memory: Memory
    flops_per_text: float
    flops_per_recommendation: float
    limit_texts_per_second: float
    texts_per_second: float
    recommendations_per_second: float
    latency_seconds: float
    is_calibrated: bool
    threads: int | None = None

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return self.memory.fits(self.device.memory_bytes)

    @property
    def usd_per_million(self) -> float:
        """What a million recommendations cost on a busy machine."""
        return 1e6 / self.recommendations_per_second / _HOUR * self.device.price.usd_per_hour

    @property
    def watt_hours_per_million(self) -> float:
        """Energy of a million recommendations at the device's power limit: an upper bound."""
        return 1e6 / self.recommendations_per_second / _HOUR * self.device.watts

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and metadata."""
        return {
            "device": self.device.name,
            "precision": self.precision,
            "fits": self.fits,
            "memory_bytes": self.memory.total,
            "memory_parts": dict(self.memory.parts),
            "flops_per_text": self.flops_per_text,
            "flops_per_recommendation": self.flops_per_recommendation,
            "limit_texts_per_second": self.limit_texts_per_second,
            "texts_per_second": self.texts_per_second,
            "recommendations_per_second": self.recommendations_per_second,
            "latency_seconds": self.latency_seconds,
            "usd_per_million": self.usd_per_million,
            "watt_hours_per_million_at_most": self.watt_hours_per_million,
            "is_calibrated": self.is_calibrated,
            "threads": self.threads,
        }


@dataclass(frozen=True, slots=True)
class Measured:
    """A prediction beside what was seen.

    Attributes:
        name: What, e.g. ``peak memory``.
        unit: ``bytes``, ``seconds`` or ``texts/s``.
        predicted: Before the run.
        measured: In the run.
    """

    name: str
    unit: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.measured - 1 if self.measured else float("inf")


@dataclass(frozen=True, slots=True)
class Advice:
    """One way to make a plan fit.

    Attributes:
        change: What to set, in words and keys, e.g. ``tuning.strategy: lora``.
        memory: What it would take then.
        fits: Whether that fits.
        device: On what.
        values: The same as values of the training's configuration, by dotted key.
    """

    change: str
    memory: int
    fits: bool
    device: str
    values: Mapping[str, Any] = field(default_factory=lambda: {})


def gib(size: float) -> str:
    """Bytes as GiB for people."""
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:.1f} GiB"

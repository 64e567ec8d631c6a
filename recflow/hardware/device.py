"""A kind of device that training or serving can run on, as the catalogue describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

GIB: Final = 1 << 30

Kind = Literal["cpu", "gpu"]
Precision = Literal["fp32", "tf32", "bf16", "int8"]


@dataclass(frozen=True, slots=True)
class Price:
    """What an hour costs.

    Attributes:
        usd_per_hour: On-demand price of a machine with one of the devices, in US dollars.
        date: When it was looked up, ``YYYY-MM-DD``.
        source: Where: provider, region, machine.
    """

    usd_per_hour: float
    date: str
    source: str


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of GPU, or a class of CPU machines.

    Attributes:
        name: Name in tags and on the command line: lower case, digits and dashes.
        label: Name for people.
        kind: ``gpu``, or ``cpu`` for a whole machine without one.
        memory_gib: Memory in GiB that models and activations live in: the GPU's, or the machine's.
        bandwidth_gb_s: Its memory bandwidth, in 10^9 bytes a second.
        teraflops: Dense matrix rate by precision, in 10^12 operations a second; a precision that
            the device does not multiply natively is left out.
        watts: Power limit of the GPU, or of the machine's processors' share.
        host_memory_gib: Memory of the machine around one GPU; for a CPU, ``memory_gib``.
        cores: Processor cores of that machine (virtual ones, as clouds count them).
        node_labels: Kubernetes labels of nodes that have it.
        instances: Machines of clouds that have one, as ``provider:name``.
        processor: Words that tell a CPU class' processors from others: the vendor, ``family-26``,
            and flags, as ``/proc/cpuinfo`` has them. None for any processor.
        price: What an hour costs.
        source: Data sheet of memory, bandwidth and rates.
    """

    name: str
    label: str
    kind: Kind
    memory_gib: float
    bandwidth_gb_s: float
    teraflops: Mapping[Precision, float]
    watts: float
    host_memory_gib: float
    cores: int
    price: Price
    source: str
    node_labels: Mapping[str, str] = field(default_factory=lambda: {})
    instances: tuple[str, ...] = ()
    processor: tuple[str, ...] = ()

    @property
    def is_gpu(self) -> bool:
        """Whether it is an accelerator beside a host."""
        return self.kind == "gpu"

    @property
    def memory_bytes(self) -> int:
        """Memory that models and activations live in."""
        return round(self.memory_gib * GIB)

    @property
    def host_memory_bytes(self) -> int:
        """Memory of the machine."""
        return round(self.host_memory_gib * GIB)

    def supports(self, precision: Precision) -> bool:
        """Whether it multiplies this precision natively."""
        return precision in self.teraflops

"""How much of a device's promise recflow's own steps reach, and what its processes hold anyway.

A roofline needs rates that a program reaches, not those of the data sheet. :mod:`recflow.hardware.
probe` measures them on a machine and writes them to a file. Shares of devices that were never
measured are assumptions, and every plan that rests on them says so.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from recflow.core.artifacts import write_text_atomically
from recflow.core.errors import ConfigError
from recflow.hardware.device import Device

COMPILING_SECONDS: Final = 0.8e-3
"""Of one matrix product of a new shape: see the benchmark recflow_tests.benchmarks.step_plan."""

WORKING_BYTES: Final = 50 << 20
"""Buffers of threads and libraries, from the first text encoded on."""

_LAYOUT: Final = 2
_MEBIBYTE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Calibration:
    """Factors of one kind of device.

    Attributes:
        device: Name of the device, or of the machine that was measured.
        is_measured: Whether the factors were fitted to runs on such a device.
        matrix_share: Share of the matrix rate that an encoder's matrices reach the more closely the
            wider they are, by precision.
        half_width: Width of an encoder at which half of that share is reached; 0 where the width
            makes no difference.
        bandwidth_share: Share of the bandwidth that element-wise work reaches.
        operator_seconds: Seconds every operator takes beside its work: dispatch, launch.
        start_seconds: Seconds until a training process has imported and loaded everything.
        context_bytes: Memory of a training process before it reads anything: interpreter,
            libraries.
        device_context_bytes: Memory that a GPU's driver and libraries hold.
        heap: What the allocator holds for a byte that the backward pass needs, at least 1: what is
            freed between tensors that stay leaves holes. By ``family precision strategy``, e.g.
            ``bert bf16 low-rank``; see :meth:`heap_share`.
        kernel_bytes: Memory of one compiled matrix product. oneDNN compiles one for every shape in
            bfloat16, and keeps a limited number.
        kernels: That number.
        source: Where the factors are from.
    """

    device: str
    is_measured: bool
    matrix_share: Mapping[str, float]
    half_width: float
    bandwidth_share: float
    operator_seconds: float
    start_seconds: float
    context_bytes: int
    device_context_bytes: int
    heap: Mapping[str, float]
    kernel_bytes: int
    kernels: int
    source: str

    def share(self, precision: str, width: float) -> float:
        """Share of the matrix rate that encoders of a width reach in a precision.

        A product's blocks are copied and its sums started and written once for as many operations
        as its inner dimension has; Hockney's ``r = r_inf / (1 + n_half / n)`` (Hockney and
        Jesshope 1988, Parallel Computers 2) has one number for all of that: the length
        at which half of the rate is reached.

        Args:
            precision: What is multiplied.
            width: Width of the hidden states.
        """
        widest = self.matrix_share.get(precision, min(self.matrix_share.values()))
        return widest / (1 + self.half_width / width)

    def speaks_for(self, device: Device, known: Collection[str]) -> bool:
        """Whether the factors count for a device.

        Those of a device of the catalogue count for it alone; those of a machine that is not in it
        count for all devices of its kind, of whose rates they are shares.

        Args:
            device: The device.
            known: Names of the catalogue's devices.
        """
        same_kind = (self.device_context_bytes > 0) == device.is_gpu
        return self.device == device.name or (self.device not in known and same_kind)

    def heap_share(self, family: str, precision: str, strategy: str) -> float:
        """What the allocator holds for a byte that is needed.

        Args:
            family: ``bert``, ``modernbert`` or ``decoder``.
            precision: ``fp32`` or ``bf16``.
            strategy: ``plain``, ``low-rank`` or ``adapters``.
        """
        for names in ((family, precision, strategy), ("bert", precision, strategy), ("any",)):
            share = self.heap.get(" ".join(names))
            if share is not None:
                return share
        return 1.0


def default_calibration(device: Device) -> Calibration:
    """Factors of a kind of device where none were measured on the very machine.

    Those of processors are shares of rates that were measured on one kind. Others are assumed to
    reach the same shares of theirs, and their plans do not call themselves calibrated.
    """
    if device.is_gpu:
        return replace(_ASSUMED_GPU, device=device.name)
    found = replace(_MEASURED_CPU, device=device.name)
    if _MEASURED_PROCESSOR.issubset(device.processor):
        return found
    return replace(found, is_measured=False, source=f"as on another processor: {found.source}")


def save_calibration(calibration: Calibration, file: Path) -> None:
    """Write the factors as JSON; the file appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"layout": _LAYOUT, **asdict(calibration)}
    write_text_atomically(file, json.dumps(content, indent=2, sort_keys=True) + "\n")


def load_calibration(file: Path) -> Calibration:
    """Read the factors of a machine.

    Raises:
        ConfigError: The file is not one of :func:`save_calibration`.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("layout") != _LAYOUT:
            raise ValueError("another layout")
        return Calibration(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file} holds no calibration ({error}); `recflow probe` writes it anew"
        ) from error


_MEASURED_PROCESSOR: Final = frozenset({"AuthenticAMD", "family-25"})
_MEASURED_CPU: Final = Calibration(
    device="cpu",
    is_measured=True,
    matrix_share={"fp32": 0.83, "bf16": 0.85},
    half_width=80.0,
    bandwidth_share=0.41,
    operator_seconds=53e-6,
    start_seconds=10.0,
    context_bytes=555 * _MEBIBYTE,
    device_context_bytes=0,
    heap={
        "bert fp32 plain": 1.15,
        "bert bf16 plain": 1.29,
        "bert fp32 low-rank": 2.09,
        "bert bf16 low-rank": 1.63,
        "bert fp32 adapters": 1.46,
        "bert bf16 adapters": 1.63,
        "modernbert fp32 plain": 1.43,
        "modernbert bf16 plain": 1.58,
        "modernbert fp32 low-rank": 1.91,
        "modernbert bf16 low-rank": 1.86,
        "decoder fp32 plain": 1.19,
        "decoder bf16 plain": 1.31,
        "decoder fp32 low-rank": 1.80,
        "decoder bf16 low-rank": 1.60,
    },
    kernel_bytes=round(0.6 * _MEBIBYTE),
    kernels=1_024,
    # Times: the half of the grid of docs/planner.md that formulas were made with.
    source="memory: `recflow probe`; times: `python -m recflow_tests.benchmarks.planner --fit`, 17 "
    "trainings; two virtual cores of an AMD EPYC (Zen 4), 2 threads, nothing else running",
)
_ASSUMED_GPU: Final = Calibration(
    device="gpu",
    is_measured=False,
    matrix_share={"fp32": 0.5, "tf32": 0.35, "bf16": 0.3},
    half_width=0.0,
    bandwidth_share=0.6,
    operator_seconds=10e-6,
    start_seconds=30.0,
    context_bytes=900 * _MEBIBYTE,
    device_context_bytes=600 * _MEBIBYTE,
    heap={"any": 1.15},
    kernel_bytes=0,
    kernels=0,
    source="assumed, not measured: no training of recflow ran on a GPU yet",
)

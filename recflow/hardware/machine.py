"""The machine that this process runs on: what kind of device it is, and what memory is free.

A process in a container may use less than the machine has. Its limits are those of its control
group and of every group above: a limit of Docker or of a Kubernetes pod stands in one of them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

import psutil

from recflow.core.errors import HardwareError
from recflow.hardware.device import GIB, Device, Precision, Price

_CGROUPS: Final = Path("/sys/fs/cgroup")
_MEMBERSHIP: Final = Path("/proc/self/cgroup")
_PROCESSORS: Final = Path("/proc/cpuinfo")
# Linux' names of what PyTorch needs to multiply bfloat16: AVX-512 and AMX, SVE and NEON.
_BF16_FLAGS: Final = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})
# Version 1 says "no limit" with the largest multiple of a page that fits into 63 bits.
_UNLIMITED: Final = 1 << 60


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A limit of a control group.

    Attributes:
        limit: Most bytes that the processes of the group may use together.
        used: Bytes that they use; file pages that nobody has touched lately are left out, because
            the kernel gives them back before it ends a process.
    """

    limit: int
    used: int

    @property
    def free(self) -> int:
        """Bytes left."""
        return max(0, self.limit - self.used)


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Memory that a training may still take, in bytes.

    Attributes:
        host: Of the machine.
        device: Of the GPU; ``None`` without one.
    """

    host: int
    device: int | None = None


def this_machine(
    catalogue: Mapping[str, Device] | None = None,
    *,
    accelerator: str | None = None,
    bf16: bool | None = None,
) -> Device:
    """This machine as a device.

    Memory and cores are its own. Rates, power and price are those of the catalogue's class: for a
    GPU its model; for a CPU, of the classes of its kind of processor (of all, where none is of its
    kind), the one of the nearest number of cores, times the ratio of cores.

    Args:
        catalogue: The classes; ``None`` for the catalogue that recflow comes with.
        accelerator: PyTorch's name of a GPU, e.g. ``cuda:0``; ``None`` for the machine without one.
            Only a GPU needs PyTorch.
        bf16: Whether the processor multiplies bfloat16; ``None`` asks the operating system.

    Raises:
        HardwareError: The catalogue has no class of the kind.
    """
    if catalogue is None:
        from recflow.hardware.catalogue import load_catalogue

        catalogue = load_catalogue()
    if accelerator is not None:
        return _this_gpu(catalogue, accelerator)
    cores, memory = usable_cores(), host_memory() / GIB
    classes, words = _classes(catalogue, "cpu"), processor_words()
    alike = [each for each in classes if each.processor and words.issuperset(each.processor)]
    kind = min(alike or classes, key=lambda each: (abs(math.log(each.cores / cores)), each.cores))
    ratio = cores / kind.cores
    rates: dict[Precision, float] = {name: rate * ratio for name, rate in kind.teraflops.items()}
    if not (multiplies_bfloat16() if bf16 is None else bf16):
        rates.pop("bf16", None)
    elif "bf16" not in rates:
        rates["bf16"] = rates["fp32"]
    note = f"class {kind.name}" + (
        "" if ratio == 1 else f", scaled to {cores} of {kind.cores} cores"
    )
    return replace(
        kind,
        name="this-machine",
        label=f"this machine ({cores} cores, {memory:.0f} GiB, like {kind.label})",
        memory_gib=memory,
        host_memory_gib=memory,
        cores=cores,
        bandwidth_gb_s=kind.bandwidth_gb_s * ratio,
        teraflops=rates,
        watts=kind.watts * ratio,
        price=Price(
            kind.price.usd_per_hour * ratio, kind.price.date, f"{kind.price.source}; {note}"
        ),
        source=f"{kind.source}; {note}",
    )


def free_memory(accelerator: str | None = None) -> FreeMemory:
    """Memory that this process may still take.

    Of the machine it is what the kernel can give without swapping (``MemAvailable``), and no more
    than what any control group of this process leaves. Of a GPU it is what its driver calls free;
    what PyTorch has reserved in this process counts as used.

    Args:
        accelerator: PyTorch's name of a GPU, e.g. ``cuda:0``; ``None`` without one.
    """
    free = min([psutil.virtual_memory().available, *(limit.free for limit in memory_limits())])
    if accelerator is None:
        return FreeMemory(free)
    import torch

    left, _ = cast("tuple[int, int]", cast("Any", torch.cuda).mem_get_info(accelerator))
    return FreeMemory(free, left)


def host_memory() -> int:
    """Bytes of memory that the processes of this machine, or of this container, have together."""
    return min([psutil.virtual_memory().total, *(limit.limit for limit in memory_limits())])


def own_memory() -> int:
    """Bytes of this process that are in memory now, pages of mapped files included."""
    return psutil.Process().memory_info().rss


def usable_cores() -> int:
    """Processor cores that this process may run on, virtual ones counted."""
    # Not every platform can say which processors a process may use.
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def multiplies_bfloat16(processors: Path = _PROCESSORS) -> bool:
    """Whether the processor says that it multiplies bfloat16; ``False`` where nothing is said."""
    return not _BF16_FLAGS.isdisjoint(processor_words(processors))


def processor_words(processors: Path = _PROCESSORS) -> frozenset[str]:
    """What the first processor says of itself: its vendor, ``family-26``, its flags.

    Nothing where the operating system does not write it to a file, as Linux does.
    """
    try:
        text = processors.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    found: set[str] = set()
    for line in text.split("\n\n")[0].splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "cpu family":
            found.add(f"family-{value}")
        elif key in ("vendor_id", "flags", "Features"):
            found |= set(value.split())
    return frozenset(found)


def memory_limits(
    cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP
) -> tuple[MemoryLimit, ...]:
    """Limits of the control groups of this process, version 1 and 2, from its own upwards.

    Args:
        cgroups: Where the control groups are mounted.
        membership: The groups that the process is in, as the kernel writes them.

    Returns:
        Nothing where there are no control groups or none has a limit.
    """
    found: list[MemoryLimit] = []
    for folder in _groups(cgroups, membership):
        limit = _number(folder, "memory.max", "memory.limit_in_bytes")
        used = _number(folder, "memory.current", "memory.usage_in_bytes")
        if limit is None or used is None or limit >= _UNLIMITED:
            continue
        idle = _statistic(folder / "memory.stat", "total_inactive_file", "inactive_file")
        found.append(MemoryLimit(limit, max(0, used - idle)))
    return tuple(found)


def _groups(cgroups: Path, membership: Path) -> Iterator[Path]:
    """Folders of the groups of this process and of all above, as far as they can be seen.

    Inside a container the membership may name a path of the host that is not mounted there; then
    the container's own group is the root of what is mounted.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            roots = [cgroups, cgroups / "unified"]
        elif "memory" in controllers.split(","):
            roots = [cgroups / "memory", cgroups / controllers]
        else:
            continue
        for root in dict.fromkeys(roots):
            group = root / path.lstrip("/")
            yield from (group, *(above for above in group.parents if above.is_relative_to(root)))


def _number(folder: Path, *names: str) -> int | None:
    """What the first of these files that is there says; ``None`` for ``max`` or no file."""
    for name in names:
        try:
            text = (folder / name).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        return int(text) if text.isdigit() else None
    return None


def _statistic(file: Path, *names: str) -> int:
    """The first of these entries; 0 where there is none."""
    try:
        entries = dict(line.split() for line in file.read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return 0
    return next((int(entries[name]) for name in names if name in entries), 0)


def _this_gpu(catalogue: Mapping[str, Device], accelerator: str) -> Device:
    import torch

    properties = cast("Any", torch.cuda).get_device_properties(accelerator)
    name, memory = str(properties.name), properties.total_memory / GIB
    kind = _gpu_class(catalogue, name, memory)
    host = host_memory() / GIB
    return replace(
        kind, label=f"{name}, {memory:.0f} GiB", memory_gib=memory, host_memory_gib=host,
        cores=usable_cores(),
    )  # fmt: skip


def _gpu_class(catalogue: Mapping[str, Device], name: str, memory_gib: float) -> Device:
    """The catalogue's class of a GPU, by NVIDIA's name of it; else the one of the nearest memory.

    The labels of Kubernetes nodes hold that name with dashes (GPU feature discovery).
    """
    label = name.replace(" ", "-").casefold()
    kinds = _classes(catalogue, "gpu")
    named = [
        kind for kind in kinds if label in {value.casefold() for value in kind.node_labels.values()}
    ]
    words = set(re.split(r"[^a-z0-9]+", name.casefold()))
    alike = [kind for kind in kinds if set(kind.name.split("-")) & words - {"rtx", "nvidia"}]
    return min(
        named or alike or kinds, key=lambda kind: (abs(kind.memory_gib - memory_gib), kind.name)
    )


def _classes(catalogue: Mapping[str, Device], kind: str) -> list[Device]:
    found = [device for device in catalogue.values() if device.kind == kind]
    if not found:
        raise HardwareError(
            f"the catalogue of devices has no {kind}, so this machine's rates are unknown; "
            f"add a device with kind: {kind} to the file of RECFLOW_CATALOGUE"
        )
    return found

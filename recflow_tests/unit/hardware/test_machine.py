"""What this machine has and what of it is free, read from folders as the kernel writes them."""

import os
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from recflow.core.errors import HardwareError
from recflow.hardware import machine
from recflow.hardware.device import GIB, Device, Kind, Precision, Price
from recflow.hardware.machine import (
    FreeMemory,
    MemoryLimit,
    free_memory,
    host_memory,
    memory_limits,
    multiplies_bfloat16,
    own_memory,
    processor_words,
    this_machine,
    usable_cores,
)

UNLIMITED = "9223372036854771712"


def device(name: str, kind: Kind, cores: int = 8, memory: float = 32, **others: object) -> Device:
    rates: Mapping[Precision, float] = {"fp32": 1.0, "bf16": 2.0}
    return Device(
        name=name,
        label=name.upper(),
        kind=kind,
        memory_gib=memory,
        bandwidth_gb_s=40.0,
        teraflops=rates,
        watts=100.0,
        host_memory_gib=64,
        cores=cores,
        price=Price(0.4, "2026-01-01", "a list"),
        source="a data sheet",
        **others,  # type: ignore[arg-type]
    )


CATALOGUE = {
    each.name: each
    for each in (
        device("cpu-8", "cpu", 8),
        device("cpu-32", "cpu", 32),
        device("l4", "gpu", memory=24, node_labels={"nvidia.com/gpu.product": "NVIDIA-L4"}),
        device("a100-40", "gpu", memory=40),
        device(
            "a100-80",
            "gpu",
            memory=80,
            node_labels={"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"},
        ),
    )
}


class Groups:
    """Control groups below a folder, and the file that says which of them a process is in."""

    def __init__(self, folder: Path) -> None:
        self.root, self.membership = folder / "cgroup", folder / "membership"
        self.root.mkdir()
        self.member()

    def member(self, *lines: str) -> None:
        self.membership.write_text("".join(f"{line}\n" for line in lines))

    def group(self, path: str, **files: str) -> None:
        folder = self.root / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(text)

    def limits(self) -> tuple[MemoryLimit, ...]:
        return memory_limits(self.root, self.membership)


@pytest.fixture
def groups(tmp_path: Path) -> Groups:
    return Groups(tmp_path)


def test_the_limit_of_a_pod_is_that_of_a_group_above(groups: Groups) -> None:
    groups.member("0::/kubepods/pod1/container")
    groups.group("", cgroup__controllers="memory")
    groups.group("kubepods", memory__max="max\n", memory__current="900\n")
    groups.group(
        "kubepods/pod1",
        memory__max="1000\n",
        memory__current="700\n",
        memory__stat="anon 400\nfile 250\ninactive_file 200\nactive_file 50\n",
    )
    groups.group("kubepods/pod1/container", memory__max="max\n", memory__current="600\n")
    # 700 used, of which 200 are pages the kernel drops when it needs them.
    assert groups.limits() == (MemoryLimit(1000, 500),)
    assert groups.limits()[0].free == 500


def test_a_container_that_sees_only_its_own_group(groups: Groups) -> None:
    # The membership names a path of the host; mounted is the container's group alone.
    groups.member("0::/system.slice/docker-4711.scope")
    groups.group("", memory__max="800", memory__current="0")
    assert groups.limits() == (MemoryLimit(800, 0),)


def test_version_1_has_other_names_and_a_number_for_no_limit(groups: Groups) -> None:
    groups.member("9:name=systemd:/", "4:memory:/docker/abc", "2:cpu,cpuacct:/docker/abc", "0::/")
    groups.group("memory", memory__limit_in_bytes=UNLIMITED, memory__usage_in_bytes="5000")
    groups.group(
        "memory/docker/abc",
        memory__limit_in_bytes="2000",
        memory__usage_in_bytes="1800",
        memory__stat="cache 900\ninactive_file 1\ntotal_inactive_file 300\n",
    )
    assert groups.limits() == (MemoryLimit(2000, 1500),)


def test_every_limit_on_the_way_up_counts(groups: Groups) -> None:
    groups.member("0::/outer/inner")
    groups.group("outer", memory__max="1000", memory__current="990")
    groups.group("outer/inner", memory__max="500", memory__current="100")
    groups.group("other", memory__max="1", memory__current="1")
    assert groups.limits() == (MemoryLimit(500, 100), MemoryLimit(1000, 990))


def test_a_group_beyond_its_limit_leaves_nothing(groups: Groups) -> None:
    assert MemoryLimit(10, 12).free == 0


@pytest.mark.parametrize("content", ["", "garbage\n", "0::\n"])
def test_no_groups_no_limits(groups: Groups, content: str) -> None:
    groups.membership.write_text(content)
    assert groups.limits() == ()
    groups.membership.unlink()
    assert groups.limits() == ()


def test_free_memory_is_the_least_of_machine_and_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    available = psutil.virtual_memory().available
    monkeypatch.setattr(machine, "memory_limits", lambda: (MemoryLimit(1 << 50, 0),))
    assert free_memory().host == pytest.approx(available, rel=0.3)
    assert host_memory() == psutil.virtual_memory().total
    monkeypatch.setattr(machine, "memory_limits", lambda: (MemoryLimit(3000, 1000),))
    assert free_memory() == FreeMemory(2000)
    assert host_memory() == 3000


def test_own_memory_grows_with_what_is_held() -> None:
    before = own_memory()
    held = bytearray(os.urandom(1 << 16) * 1024)  # 64 MiB, every page written
    assert own_memory() - before > 60 << 20
    del held


def test_this_machine_scales_the_nearest_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 4)
    monkeypatch.setattr(machine, "host_memory", lambda: 10 * GIB)
    here = this_machine(CATALOGUE, bf16=True)
    assert (here.kind, here.cores, here.memory_gib, here.host_memory_gib) == ("cpu", 4, 10, 10)
    assert here.teraflops == {"fp32": 0.5, "bf16": 1.0}
    assert (here.bandwidth_gb_s, here.watts, here.price.usd_per_hour) == (20, 50, 0.2)
    assert "class cpu-8, scaled to 4 of 8 cores" in here.source
    assert here.name == "this-machine"
    monkeypatch.setattr(machine, "usable_cores", lambda: 30)
    assert "class cpu-32" in this_machine(CATALOGUE, bf16=True).source


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"AuthenticAMD", "family-26", "avx512_bf16"}, "zen5-16"),
        ({"AuthenticAMD", "family-25"}, "zen4-64"),  # its kind counts more than its size
        ({"GenuineIntel", "family-6", "amx_bf16"}, "any-8"),  # none of its kind: any, by size
        (set(), "any-8"),
    ],
)
def test_this_machine_is_of_the_class_of_its_processor(
    words: set[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = (
        device("zen5-2", "cpu", 2, processor=("AuthenticAMD", "family-26")),
        device("zen5-16", "cpu", 16, processor=("AuthenticAMD", "family-26")),
        device("zen4-64", "cpu", 64, processor=("AuthenticAMD", "family-25")),
        device("any-8", "cpu", 8),
    )
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    monkeypatch.setattr(machine, "processor_words", lambda: frozenset(words))
    here = this_machine({each.name: each for each in classes}, bf16=True)
    assert f"class {expected}" in here.source


def test_a_processor_is_known_by_vendor_family_and_flags(tmp_path: Path) -> None:
    text = "processor : 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nflags : fpu sse\n"
    (tmp_path / "cpuinfo").write_text(f"{text}\nprocessor : 1\nflags : other\n")
    words = processor_words(tmp_path / "cpuinfo")
    assert words == {"AuthenticAMD", "family-26", "fpu", "sse"}


def test_a_precision_that_the_processor_lacks_is_not_promised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    assert not this_machine(CATALOGUE, bf16=False).supports("bf16")
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: False)
    assert this_machine(CATALOGUE).teraflops == {"fp32": 1.0}


def test_this_machine_has_what_the_system_says() -> None:
    here = this_machine(CATALOGUE)
    assert here.cores == usable_cores() >= 1
    assert here.memory_bytes == pytest.approx(host_memory())
    assert 0 < free_memory().host <= here.memory_bytes


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16 amx_tile\n", True),
        ("processor : 0\nflags\t\t: fpu avx2 avx512f\n", False),
        ("processor : 0\nFeatures\t: fp asimd sve bf16\n", True),
        ("processor : 0\nmodel name : some bf16 processor\n", False),
        ("", False),
    ],
)
def test_bfloat16_is_read_from_the_processors_flags(tmp_path: Path, text: str, found: bool) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert multiplies_bfloat16(tmp_path / "cpuinfo") is found
    assert not multiplies_bfloat16(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "memory", "expected"),
    [
        ("NVIDIA L4", 22.0, "l4"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "a100-80"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "a100-40"),  # by its model and the nearest memory
        ("Another Maker 9000", 23.0, "l4"),  # by memory alone
    ],
)
def test_a_gpu_is_found_in_the_catalogue(name: str, memory: float, expected: str) -> None:
    assert machine._gpu_class(CATALOGUE, name, memory).name == expected


def test_a_catalogue_without_the_kind_is_refused() -> None:
    gpus = {name: each for name, each in CATALOGUE.items() if each.is_gpu}
    with pytest.raises(HardwareError, match=r"no cpu.*RECFLOW_CATALOGUE"):
        this_machine(gpus)

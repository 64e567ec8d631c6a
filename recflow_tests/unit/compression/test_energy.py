from pathlib import Path

import pytest

from recflow.compression.energy import find_meter

FULL = 1_000_000


def write_zone(root: Path, folder: str, name: str, microjoules: int) -> Path:
    zone = root / folder
    zone.mkdir(parents=True)
    (zone / "name").write_text(f"{name}\n", encoding="ascii")
    (zone / "max_energy_range_uj").write_text(f"{FULL}\n", encoding="ascii")
    show(zone, microjoules)
    return zone


def show(zone: Path, microjoules: int) -> None:
    (zone / "energy_uj").write_text(f"{microjoules}\n", encoding="ascii")


def test_packages_and_their_memory_are_added_and_nothing_twice(tmp_path: Path) -> None:
    counted = [
        write_zone(tmp_path, "intel-rapl:0", "package-0", 10),
        write_zone(tmp_path, "intel-rapl:0:1", "dram", 20),
        write_zone(tmp_path, "intel-rapl:1", "package-1", 30),
    ]
    left_out = [
        write_zone(tmp_path, "intel-rapl:0:0", "core", 40),
        write_zone(tmp_path, "intel-rapl:2", "psys", 50),
        write_zone(tmp_path, "intel-rapl-mmio:0", "package-0", 60),
    ]
    meter, source = find_meter(tmp_path)
    assert meter is not None
    assert source == "RAPL: package-0, dram-0, package-1"
    assert meter.joules() == 0
    for zone in counted:
        show(zone, 100_000)
    for zone in left_out:
        show(zone, 900_000)
    assert meter.joules() == pytest.approx((3 * 100_000 - 60) / 1e6)


def test_a_counter_may_start_again_at_zero(tmp_path: Path) -> None:
    zone = write_zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    meter, _ = find_meter(tmp_path)
    assert meter is not None
    show(zone, 50_000)  # 100,000 to the end, and 50,000 of the next round
    assert meter.joules() == pytest.approx(0.15)
    show(zone, 40_000)  # all but 10,000 of a round
    assert meter.joules() == pytest.approx(0.15 + 0.99)
    assert meter.joules() == pytest.approx(0.15 + 0.99)  # nothing was drawn since


def test_a_machine_without_counters_says_so(tmp_path: Path) -> None:
    write_zone(tmp_path, "dtpm", "package-0", 1)
    for root in (tmp_path, tmp_path / "nothing"):
        meter, reason = find_meter(root)
        assert meter is None
        assert reason == f"no RAPL counter of a processor package below {root}"


def test_counters_of_root_are_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_zone(tmp_path, "intel-rapl:0", "package-0", 1)
    read = Path.read_text

    def refuse(self: Path, *args: object, **kwargs: object) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return read(self, encoding="ascii")

    monkeypatch.setattr(Path, "read_text", refuse)  # tests may run as root, who may read all
    meter, reason = find_meter(tmp_path)
    assert meter is None
    assert reason.endswith("may be read by root only")


@pytest.mark.parametrize("broken", ["energy_uj", "max_energy_range_uj"])
def test_damaged_counters_are_not_an_error(tmp_path: Path, broken: str) -> None:
    zone = write_zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (zone / broken).write_text("none\n", encoding="ascii")
    assert find_meter(tmp_path)[0] is None
    (zone / broken).unlink()
    meter, reason = find_meter(tmp_path)
    assert meter is None
    assert broken in reason

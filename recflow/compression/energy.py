"""How much energy the processor drew: RAPL counters, where Linux exposes them.

RAPL (running average power limit) counts the energy of each processor package, and of its memory
where that has a counter of its own, on Intel processors and on AMD's since Zen. Linux shows the
counters as a folder a zone below ``/sys/class/powercap``
(https://docs.kernel.org/power/powercap/powercap.html). They belong to the whole machine: what else
runs is counted too. Since 2020 only root may read them, because they leak what a processor computes
(https://platypusattack.com); virtual machines seldom have them at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class RaplMeter:
    """Adds up the joules of several counters, each of which starts again at 0 when it is full.

    Attributes:
        zones: Names of the counters, e.g. ``package-0``.
    """

    def __init__(self, zones: dict[str, Path]) -> None:
        """Start counting.

        Args:
            zones: Folder of each counter, by the zone's name.

        Raises:
            OSError: A counter cannot be read.
            ValueError: A counter does not hold a number.
        """
        self.zones = tuple(zones)
        self._counters = [_Counter.open(folder) for folder in zones.values()]

    def joules(self) -> float:
        """Joules since the meter was made.

        To be called at least once in the time a counter needs to fill, which is minutes at full
        load: that a counter went round twice cannot be seen.
        """
        return sum(counter.advance() for counter in self._counters) / 1e6


@dataclass(slots=True)
class _Counter:
    """One counter of microjoules.

    Attributes:
        file: Where it is read.
        full: What it counts up to before it starts again at 0.
        last: What it showed last.
        total: Microjoules since it was opened.
    """

    file: Path
    full: int
    last: int
    total: int = 0

    @classmethod
    def open(cls, folder: Path) -> _Counter:
        file = folder / "energy_uj"
        return cls(file, full=_number(folder / "max_energy_range_uj"), last=_number(file))

    def advance(self) -> int:
        now = _number(self.file)
        self.total += now - self.last if now >= self.last else self.full - self.last + now
        self.last = now
        return self.total


def find_meter(root: Path = POWERCAP) -> tuple[RaplMeter | None, str]:
    """Open the counters of all packages and of their memory.

    Cores and graphics are part of a package's counter, so they are not added again; neither are the
    ``psys`` zone, which counts the whole platform, and ``intel-rapl-mmio``, which shows the same
    packages a second time.

    Args:
        root: Linux' folder of power zones.

    Returns:
        The meter and what it reads, or ``None`` and the reason.
    """
    try:
        zones = {
            name: folder
            for folder in sorted(root.glob("intel-rapl:*"))
            if (name := _zone(folder)) is not None
        }
        if not zones:
            return None, f"no RAPL counter of a processor package below {root}"
        return RaplMeter(zones), f"RAPL: {', '.join(zones)}"
    except PermissionError:
        return None, f"the RAPL counters below {root} may be read by root only"
    except (OSError, ValueError) as error:
        return None, f"the RAPL counters below {root} cannot be read: {error}"


def _zone(folder: Path) -> str | None:
    """Name of a zone that counts, ``dram`` with its package's number; ``None`` for the others."""
    name = (folder / "name").read_text(encoding="ascii").strip()
    if name.startswith("package"):
        return name
    return f"dram-{folder.name.split(':')[1]}" if name == "dram" else None


def _number(file: Path) -> int:
    return int(file.read_text(encoding="ascii"))

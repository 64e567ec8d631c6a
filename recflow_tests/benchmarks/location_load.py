"""Seconds to load the code location: ``python -m recflow_tests.benchmarks.location_load``.

A fresh process imports ``recflow.definitions`` and resolves its asset graph, which every Dagster
process does first; beside it one that imports Dagster alone, the floor no code location goes below.
The two take turns, so that a machine that slows down slows both.
"""

import statistics
import subprocess
import sys
import time

ROUNDS = 7
COMMANDS = {
    "dagster alone": "import dagster",
    "recflow.definitions": "from recflow.definitions import defs; defs.resolve_asset_graph()",
}


def seconds_of(script: str) -> float:
    """Wall time of a fresh interpreter that runs ``script``."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", script], check=True)
    return time.perf_counter() - started


def main() -> None:
    """Measure and print a Markdown table; the first round warms the file cache and is dropped."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS + 1):
        for name, script in COMMANDS.items():
            times[name].append(seconds_of(script))
    print("| process | median s | fastest s | slowest s |")
    print("|---|---:|---:|---:|")
    for name, measured in times.items():
        warm = measured[1:]
        print(f"| {name} | {statistics.median(warm):.2f} | {min(warm):.2f} | {max(warm):.2f} |")


if __name__ == "__main__":
    main()

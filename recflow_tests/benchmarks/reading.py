"""Rows per second and peak memory of reading a log, against the pandas way, on the same file.

Run ``python -m recflow_tests.benchmarks.reading [--rows 10000 100000 1000000]``. Logs are simulated
in a temporary folder. Each reader runs in a process of its own and does the same work: from
``behaviors.tsv`` to the impressions table as one Parquet file or folder a day. recflow's reader
also judges every line and writes the quarantine. Imports are not counted. Ratios are to the
first reader. pandas needs about 4.5 GB a million rows: give ``--readers recflow`` beyond that.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

DEFAULT_ROWS = (10_000, 100_000, 1_000_000)
_KIBIBYTE, _MEBIBYTE = 1 << 10, 1 << 20


def read_with_recflow(log: Path, output: Path) -> None:
    """Stream the impressions, and what is no impression, into a folder a day."""
    import polars as pl

    from recflow.data.sources import open_source

    source = open_source("mind", log)
    days = source.days()
    table = source.impressions(days[0], days[-1] + timedelta(days=1))
    for name, frame in (("rows", table.rows), ("quarantine", table.quarantine)):
        frame.sink_parquet(pl.PartitionBy(output / name, key="day"), mkdir=True)


def read_with_pandas(log: Path, output: Path) -> None:
    """Load the file whole and take its lists apart row by row, as public MIND readers do."""
    import pandas as pd

    names = ["impression_id", "user_id", "time", "history", "impressions"]
    frame = pd.read_csv(log / "behaviors.tsv", sep="\t", header=None, names=names)
    frame["time"] = pd.to_datetime(frame["time"], format="%m/%d/%Y %I:%M:%S %p")
    frame["history"] = frame["history"].fillna("").str.split()
    candidates, clicked = [], []
    for impressions in frame["impressions"].str.split():
        shown, chosen = [], []
        for impression in impressions:
            item, label = impression.rsplit("-", 1)
            shown.append(item)
            if int(label) == 1:
                chosen.append(item)
        candidates.append(shown)
        clicked.append(chosen)
    frame["candidates"], frame["clicked"] = candidates, clicked
    frame = frame.drop(columns="impressions")
    (output / "rows").mkdir(parents=True)
    for day, rows in frame.groupby(frame["time"].dt.date):
        rows.to_parquet(output / "rows" / f"{day}.parquet", compression="zstd", index=False)


READERS: dict[str, Callable[[Path, Path], None]] = {
    "pandas": read_with_pandas,
    "recflow": read_with_recflow,
}


def measure(reader: str, log: Path, output: Path) -> dict[str, float]:
    """Run one reader in this process; seconds, CPU seconds, peak resident memory in MiB."""
    import pandas as pd  # noqa: F401 - paid by nobody's clock
    import polars as pl  # noqa: F401

    import recflow.data.sources  # noqa: F401

    start, cpu_start = time.perf_counter(), time.process_time()
    READERS[reader](log, output)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIBIBYTE
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": peak / _MEBIBYTE}


def content_of(output: Path) -> tuple[int, ...]:
    """Rows, history items, candidates and clicks of a reader's output: equal for all readers."""
    import polars as pl

    lists = ("history", "candidates", "clicked")
    counts = pl.scan_parquet(output / "rows" / "**" / "*.parquet").select(
        pl.len(), *(pl.col(name).list.len().cast(pl.Int64).sum() for name in lists)
    )
    return counts.collect(engine="streaming").row(0)


def simulate_log(rows: int, folder: Path) -> None:
    """Simulate a log of ``rows`` impressions over two weeks."""
    from recflow.data.sources.simulated import SimulationConfig, simulate

    simulate(SimulationConfig(impressions=rows, users=max(1_000, rows // 10)), folder)


def compare(rows: int, readers: Sequence[str], folder: Path) -> list[str]:
    """Simulate a log, run the readers on it, and return a row of the result table for each."""
    log = folder / "log"
    simulate_log(rows, log)
    size = (log / "behaviors.tsv").stat().st_size / _MEBIBYTE
    measured: dict[str, dict[str, float]] = {}
    contents: dict[str, tuple[int, ...]] = {}
    for reader in readers:
        output = folder / reader
        command = [sys.executable, "-m", __spec__.name, "--measure", reader, str(log), str(output)]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        measured[reader] = json.loads(run.stdout)
        contents[reader] = content_of(output)
    if len(set(contents.values())) != 1:
        raise SystemExit(f"the readers disagree: {contents}")
    base = measured[readers[0]]
    return [
        f"| {rows:,} | {size:,.0f} | {reader} | {rows / result['seconds']:,.0f} "
        f"| {base['seconds'] / result['seconds']:.1f}× | {result['cpu_seconds']:,.1f} "
        f"| {base['cpu_seconds'] / result['cpu_seconds']:.1f}× | {result['peak_mib']:,.0f} "
        f"| {base['peak_mib'] / result['peak_mib']:.1f}× |"
        for reader, result in measured.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Print the comparison as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=DEFAULT_ROWS)
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--measure", nargs=3, metavar=("READER", "LOG", "OUTPUT"))
    options: Any = parser.parse_args(arguments)
    if options.measure:
        reader, log, output = options.measure
        print(json.dumps(measure(reader, Path(log), Path(output))))
        return
    print("| rows | log MiB | reader | rows/s | faster | CPU s | less | peak MiB | less |")
    print("|---:|---:|---|---:|---:|---:|---:|---:|---:|", flush=True)
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            print(*compare(rows, options.readers, Path(folder)), sep="\n", flush=True)


if __name__ == "__main__":
    main()

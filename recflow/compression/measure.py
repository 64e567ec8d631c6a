"""What a variant costs: latency, throughput, energy, load time, memory, size.

Latency, throughput and energy of all variants are taken in turns within one process (see
:mod:`recflow.compression.timing`). Load time and memory come from a fresh process for each variant,
one process after the other.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recflow.compression.energy import POWERCAP, find_meter
from recflow.compression.timing import Batch, Timings, time_in_turns
from recflow.core.artifacts import MANIFEST_NAME
from recflow.core.errors import ArtifactError, ConfigError
from recflow.core.measurement import Energy, Latency, Measurement
from recflow.core.seeding import make_rng
from recflow.modeling.config import require_at_least
from recflow.modeling.encoder import WEIGHTS_NAME
from recflow.modeling.layout import ONNXRUNTIME, read_ranker_config
from recflow.modeling.onnx_runtime import ONNX_NAME
from recflow.modeling.ranker import load_ranker

_PROBE = "recflow.compression.probe"
_PROBE_SECONDS = 300.0

Encode = Callable[[Batch], object]


@dataclass(frozen=True, slots=True)
class MeasurementConfig:
    """How long and how carefully to measure.

    A latency is taken ``2 * rounds * calls`` times: 300 times of one text, 40 times of 32 texts, if
    nothing else is said.

    Attributes:
        threads: Threads of every variant.
        batch_sizes: Batch sizes whose latency is taken.
        calls: Timed batches of each of these sizes in one turn.
        rounds: Rounds of the latencies; every variant has two turns a round.
        warmup_batches: Batches of each size that every variant encodes before the first turn.
        throughput_texts: Texts encoded at a time for throughput and energy.
        throughput_rounds: Rounds of the throughput.
        seed: Seed of the texts drawn.
    """

    threads: int = 1
    batch_sizes: tuple[int, ...] = (1, 32)
    calls: tuple[int, ...] = (15, 2)
    rounds: int = 10
    warmup_batches: int = 3
    throughput_texts: int = 256
    throughput_rounds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        require_at_least(self, 1, "threads", "rounds", "throughput_texts", "throughput_rounds")
        require_at_least(self, 0, "warmup_batches", "seed")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError.of("batch_sizes", self.batch_sizes, "one or more numbers from 1 on")
        if len(self.calls) != len(self.batch_sizes) or min(self.calls) < 1:
            raise ConfigError.of(
                "calls", self.calls, f"{len(self.batch_sizes)} numbers from 1 on, one a batch size"
            )


def measure(
    variants: Mapping[str, Path],
    texts: Sequence[str],
    config: MeasurementConfig,
    *,
    powercap: Path = POWERCAP,
) -> list[Measurement]:
    """Measure rankers side by side.

    Args:
        variants: Directory of each ranker, by name.
        texts: Real item texts; their lengths decide the numbers.
        config: How to measure.
        powercap: Linux' folder of power zones, from which the energy is read.

    Returns:
        One measurement a variant, in the order of ``variants``.

    Raises:
        ConfigError: There are no texts.
        ArtifactError: A variant cannot be loaded.
    """
    if not texts:
        raise ConfigError.of("texts", [], "at least one item text")
    described = {name: read_ranker_config(path) for name, path in variants.items()}
    rng = make_rng(config.seed, "measure")
    encoders: dict[str, Encode] = {
        name: load_ranker(path, threads=config.threads).encode for name, path in variants.items()
    }
    latencies = {
        size: _time_batches(encoders, texts, size, calls, config, rng)
        for size, calls in zip(config.batch_sizes, config.calls, strict=True)
    }
    sample = _draw(texts, config.throughput_texts, rng)
    meter, source = find_meter(powercap)
    bulk = time_in_turns(
        encoders,
        [[sample[: max(config.batch_sizes)], sample]] * (2 * config.throughput_rounds),
        meter=meter.joules if meter else None,
    )
    encoders.clear()  # the fresh processes shall have the memory
    return [
        _measurement(
            name,
            path,
            described[name],
            latencies=tuple(_latency(size, timed[name]) for size, timed in latencies.items()),
            bulk=bulk[name],
            energy_source=source,
            sample=sample,
            threads=config.threads,
        )
        for name, path in variants.items()
    ]


def serving_bytes(path: Path) -> int:
    """Size of a stored ranker: every file in its folder but the artifact store's manifest."""
    return sum(
        file.stat().st_size
        for file in path.rglob("*")
        if file.is_file() and file.name != MANIFEST_NAME
    )


def _measurement(
    name: str,
    path: Path,
    described: Mapping[str, Any],
    *,
    latencies: tuple[Latency, ...],
    bulk: Timings,
    energy_source: str,
    sample: list[str],
    threads: int,
) -> Measurement:
    weights = ONNX_NAME if described["runtime"] == ONNXRUNTIME else WEIGHTS_NAME
    low, median, high = np.percentile(len(sample) / np.array(bulk.seconds), [25, 50, 75]).tolist()
    thousands = len(sample) * len(bulk.joules) / 1_000
    fresh = _probe(path, sample, threads)
    return Measurement(
        name=name,
        runtime=described["runtime"],
        threads=threads,
        size_bytes=(path / weights).stat().st_size,
        serving_bytes=serving_bytes(path),
        parameters=int(described["parameters"]),
        load_seconds=float(fresh["load_seconds"]),
        texts_per_second=median,
        throughput_spread=(high - low) / median,
        latencies=latencies,
        peak_rss_bytes=int(fresh["peak_rss_bytes"]),
        energy=Energy(sum(bulk.joules) / thousands if bulk.joules else None, energy_source),
    )


def _time_batches(
    encoders: Mapping[str, Encode],
    texts: Sequence[str],
    size: int,
    calls: int,
    config: MeasurementConfig,
    rng: np.random.Generator,
) -> dict[str, Timings]:
    """Time batches of one size; every variant encodes the same ones."""
    for _ in range(config.warmup_batches):
        batch = _draw(texts, size, rng)
        for encode in encoders.values():
            encode(batch)
    turns = [[_draw(texts, size, rng) for _ in range(1 + calls)] for _ in range(2 * config.rounds)]
    return time_in_turns(encoders, turns)


def _draw(texts: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """``count`` texts, without replacement as long as there are enough."""
    places = rng.choice(len(texts), size=count, replace=count > len(texts))
    return [texts[int(place)] for place in places]


def _latency(size: int, timings: Timings) -> Latency:
    times = np.array(timings.seconds) * 1_000
    p50, p95, p99 = np.percentile(times, [50, 95, 99]).tolist()
    first, second = (float(np.median(half)) for half in np.array_split(times, 2))
    return Latency(size, p50, p95, p99, samples=len(times), drift=second / first - 1)


def _probe(path: Path, texts: list[str], threads: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", _PROBE, str(path), str(threads)],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        timeout=_PROBE_SECONDS,
        check=False,
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ArtifactError(f"{path} cannot be loaded in a fresh process: {reason[0]}")
    return json.loads(done.stdout.splitlines()[-1])

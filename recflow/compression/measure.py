"""What a variant costs: latency, throughput, load time, memory, size.

Latencies of all variants are taken in turn within one process, and who begins changes with every
round, so that a machine that slows down slows all of them. Load time and memory come from a fresh
process for each variant.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recflow.core.errors import ArtifactError, ConfigError
from recflow.core.measurement import Latency, Measurement
from recflow.core.seeding import make_rng
from recflow.modeling.encoder import WEIGHTS_NAME
from recflow.modeling.layout import ONNXRUNTIME, read_ranker_config
from recflow.modeling.onnx_runtime import ONNX_NAME
from recflow.modeling.ranker import Ranker, load_ranker

_PROBE = "recflow.compression.probe"
_PROBE_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class MeasurementConfig:
    """How long and how carefully to measure.

    Attributes:
        threads: Threads of every variant.
        batch_sizes: Batch sizes whose latency is taken.
        warmup_rounds: Rounds before the clock counts.
        rounds: Timed batches of each variant and batch size.
        throughput_texts: Texts encoded at a time for the throughput.
        throughput_rounds: How often; the median counts.
        seed: Seed of the texts drawn.
    """

    threads: int = 1
    batch_sizes: tuple[int, ...] = (1, 32)
    warmup_rounds: int = 3
    rounds: int = 40
    throughput_texts: int = 256
    throughput_rounds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        for key in ("threads", "rounds", "throughput_texts", "throughput_rounds"):
            if getattr(self, key) < 1:
                raise ConfigError.of(key, getattr(self, key), "a whole number of at least 1")
        if self.warmup_rounds < 0:
            raise ConfigError.of("warmup_rounds", self.warmup_rounds, "at least 0")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError.of("batch_sizes", self.batch_sizes, "one or more numbers from 1 on")


def measure(
    variants: Mapping[str, Path], texts: Sequence[str], config: MeasurementConfig
) -> list[Measurement]:
    """Measure rankers side by side.

    Args:
        variants: Directory of each ranker, by name.
        texts: Real item texts; their lengths decide the numbers.
        config: How to measure.

    Returns:
        One measurement a variant, in the order of ``variants``.

    Raises:
        ConfigError: There are no texts.
        ArtifactError: A variant cannot be loaded.
    """
    if not texts:
        raise ConfigError.of("texts", [], "at least one item text")
    rankers = {name: load_ranker(path, threads=config.threads) for name, path in variants.items()}
    rng = make_rng(config.seed, "measure")
    latencies = {size: _latencies(rankers, texts, size, config, rng) for size in config.batch_sizes}
    rates = _throughput(rankers, _draw(texts, config.throughput_texts, rng), config)
    sample = _draw(texts, config.throughput_texts, rng)
    return [
        _measurement(name, path, latencies, rates[name], sample, config)
        for name, path in variants.items()
    ]


def _measurement(
    name: str,
    path: Path,
    latencies: Mapping[int, Mapping[str, list[float]]],
    texts_per_second: float,
    sample: list[str],
    config: MeasurementConfig,
) -> Measurement:
    described = read_ranker_config(path)
    weights = ONNX_NAME if described["runtime"] == ONNXRUNTIME else WEIGHTS_NAME
    fresh = _probe(path, sample, config.threads)
    return Measurement(
        name=name,
        runtime=described["runtime"],
        threads=config.threads,
        size_bytes=(path / weights).stat().st_size,
        parameters=int(described["parameters"]),
        load_seconds=float(fresh["load_seconds"]),
        texts_per_second=texts_per_second,
        latencies=tuple(_latency(size, times[name]) for size, times in latencies.items()),
        peak_rss_bytes=int(fresh["peak_rss_bytes"]),
    )


def _latencies(
    rankers: Mapping[str, Ranker],
    texts: Sequence[str],
    size: int,
    config: MeasurementConfig,
    rng: np.random.Generator,
) -> dict[str, list[float]]:
    """Milliseconds of each timed batch of each variant; all see the same batches."""
    times: dict[str, list[float]] = {name: [] for name in rankers}
    for number in range(config.warmup_rounds + config.rounds):
        batch = _draw(texts, size, rng)
        for name in _rotated(list(rankers), number):
            started = time.perf_counter()
            rankers[name].encode(batch)
            if number >= config.warmup_rounds:
                times[name].append((time.perf_counter() - started) * 1_000)
    return times


def _throughput(
    rankers: Mapping[str, Ranker], texts: list[str], config: MeasurementConfig
) -> dict[str, float]:
    """Texts a second of each variant, in length buckets; the median of the rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in rankers}
    for number in range(config.throughput_rounds):
        for name in _rotated(list(rankers), number):
            started = time.perf_counter()
            rankers[name].encode(texts)
            seconds[name].append(time.perf_counter() - started)
    return {name: len(texts) / float(np.median(taken)) for name, taken in seconds.items()}


def _rotated(names: list[str], number: int) -> list[str]:
    start = number % max(len(names), 1)
    return names[start:] + names[:start]


def _draw(texts: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """``count`` texts, without replacement as long as there are enough."""
    places = rng.choice(len(texts), size=count, replace=count > len(texts))
    return [texts[int(place)] for place in places]


def _latency(size: int, times: list[float]) -> Latency:
    p50, p95, p99 = np.percentile(times, [50, 95, 99]).tolist()
    return Latency(batch_size=size, p50=p50, p95=p95, p99=p99, samples=len(times))


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

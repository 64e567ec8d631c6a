"""What a model costs to run, as measured; shared by those who measure and those who report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Latency:
    """Latency of encoding one batch, in milliseconds.

    Attributes:
        batch_size: Texts in a batch.
        p50: Median over the timed batches.
        p95: 95th percentile.
        p99: 99th percentile.
        samples: Timed batches; of 100 or fewer the 99th percentile is little but the slowest.
        drift: Median of the second half of the timed batches, relative to that of the first, less
            1: how much the machine itself changed meanwhile.
    """

    batch_size: int
    p50: float
    p95: float
    p99: float
    samples: int
    drift: float


@dataclass(frozen=True, slots=True)
class Energy:
    """Energy of encoding texts, where the machine tells.

    Attributes:
        joules_per_1000_texts: Everything the meter counted meanwhile, idle power included; ``None``
            where nothing could be read.
        source: What was read, or why nothing could be.
    """

    joules_per_1000_texts: float | None
    source: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """Cost of one model variant on the machine that measured it.

    Attributes:
        name: Variant, e.g. ``fine_tuned``.
        runtime: What executes it, e.g. ``torch`` or ``onnxruntime``.
        threads: Threads the runtime was allowed to use.
        size_bytes: Size of the encoder's weights on disk (safetensors or ONNX files).
        serving_bytes: Size of every file that serving reads: weights, user model, tokenizer,
            vocabulary, configuration.
        parameters: Number of weights.
        load_seconds: Seconds from a fresh process having imported its libraries to a usable model.
        texts_per_second: Encoder throughput over real texts with their real length distribution;
            the median of the rounds.
        throughput_spread: Interquartile range of the rounds' throughput, relative to the median.
        latencies: Encoder latency by batch size.
        peak_rss_bytes: Peak resident memory of a fresh process that loads the model and encodes.
        energy: Energy of encoding.
    """

    name: str
    runtime: str
    threads: int
    size_bytes: int
    serving_bytes: int
    parameters: int
    load_seconds: float
    texts_per_second: float
    throughput_spread: float
    latencies: tuple[Latency, ...]
    peak_rss_bytes: int
    energy: Energy

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
        samples: Timed batches.
    """

    batch_size: int
    p50: float
    p95: float
    p99: float
    samples: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """Cost of one model variant on the machine that measured it.

    Attributes:
        name: Variant, e.g. ``fine_tuned``.
        runtime: What executes it, e.g. ``torch`` or ``onnxruntime``.
        threads: Threads the runtime was allowed to use.
        size_bytes: Size of the weights on disk (safetensors or ONNX files).
        parameters: Number of weights.
        load_seconds: Seconds from a fresh process having imported its libraries to a usable model.
        texts_per_second: Encoder throughput over real texts with their real length distribution.
        latencies: Encoder latency by batch size.
        peak_rss_bytes: Peak resident memory of a fresh process that loads the model and encodes.
    """

    name: str
    runtime: str
    threads: int
    size_bytes: int
    parameters: int
    load_seconds: float
    texts_per_second: float
    latencies: tuple[Latency, ...]
    peak_rss_bytes: int

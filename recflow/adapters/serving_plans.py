"""What encoding with stored models is going to take on this machine, and what it was seen to take.

A measurement encodes texts and scores nothing: it is planned as a service without candidates whose
texts are the measured ones, on as many threads. Plans decide nothing about what is measured; they
are kept among the facts of the measurements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import cast

from recflow.adapters.costs import TEXTS_PER_SECOND
from recflow.adapters.planning import PEAK_MEMORY, PlanningConfig, this_processor
from recflow.adapters.served import served_models
from recflow.compression.family import Family
from recflow.compression.measure import MeasurementConfig
from recflow.core.artifacts import Artifact, JsonValue
from recflow.core.measurement import Measurement
from recflow.hardware.inference import plan_inference
from recflow.hardware.plan import InferencePlan, Measured
from recflow.hardware.workload import InferenceWorkload, TextLengths
from recflow.modeling.layout import read_ranker_config
from recflow.modeling.texts import BUCKET_SIZE, TOKENIZER_NAME, TextTokenizer

LATENCY = "latency of one text"
THROUGHPUT = "throughput"


def plan_encoding(
    family: Family,
    models: Mapping[str, Artifact],
    texts: Sequence[str],
    config: MeasurementConfig,
    planning: PlanningConfig,
) -> dict[str, InferencePlan]:
    """Plan the encoding that is about to be measured.

    Args:
        family: Says what each model descends from.
        models: Stored models by name.
        texts: What is measured with; every model's own tokenizer decides their lengths.
        config: How it is measured.
        planning: What plans are made with.

    Returns:
        By name; a model whose sizes cannot be read is left out.

    Raises:
        ArtifactError: A model's tokenizer is missing or none.
        ConfigError: The calibration is unreadable.
    """
    machine = this_processor(planning)
    found: dict[str, InferencePlan] = {}
    for name, model in served_models(family, models).items():
        path = models[name].path
        most = int(read_ranker_config(path)["max_tokens"])
        tokens = TextTokenizer(path / TOKENIZER_NAME, most)(list(texts))
        workload = InferenceWorkload(
            items=0,
            history=0,
            candidates=0,
            texts=1,
            lengths=TextLengths.of([len(text) for text in tokens]),
            batch=min(BUCKET_SIZE, config.throughput_texts),
        )
        # More threads than cores are measured, but do no more at a time than the cores.
        threads = min(config.threads, machine.device.cores)
        found[name] = plan_inference(
            model, workload, machine.device, machine.calibration, threads=threads
        )
    return found


def encoding_beside(plan: InferencePlan, measurement: Measurement) -> list[Measured]:
    """Set what encoding took beside what was planned.

    Returns:
        Peak memory of a fresh process in bytes, texts a second in bulk, and the median seconds of
        one text alone, if that was measured.
    """
    found = [
        Measured(PEAK_MEMORY, "bytes", plan.memory.total, measurement.peak_rss_bytes),
        Measured(THROUGHPUT, TEXTS_PER_SECOND, plan.texts_per_second, measurement.texts_per_second),
    ]
    for latency in measurement.latencies:
        if latency.batch_size == 1:
            found.append(Measured(LATENCY, "seconds", plan.latency_seconds, latency.p50 / 1_000))
    return found


def encoding_facts(
    plans: Mapping[str, InferencePlan], measurements: Sequence[Measurement]
) -> dict[str, JsonValue]:
    """What an artifact keeps of the comparisons: the fact ``plan``, by model."""
    compared: dict[str, JsonValue] = {
        each.name: [
            cast("dict[str, JsonValue]", asdict(row))
            for row in encoding_beside(plans[each.name], each)
        ]
        for each in measurements
        if each.name in plans
    }
    return {"plan": compared}

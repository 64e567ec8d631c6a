"""What training reports: plain numbers, epoch by epoch and in sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class EpochReport:
    """One pass over the training impressions.

    Attributes:
        phase: ``head`` (frozen vectors) or ``encoder``.
        epoch: Number within the phase, from 1.
        steps: Optimiser steps.
        clicks: Click samples.
        texts: Texts encoded with gradient, by all processes.
        loss: Mean loss of a click.
        validation: The primary metric on the validation impressions.
        seconds: Wall time, validation included.
        validation_seconds: Wall time of the validation.
    """

    phase: str
    epoch: int
    steps: int
    clicks: int
    texts: int
    loss: float
    validation: float
    seconds: float
    validation_seconds: float


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What training did and what it took.

    Attributes:
        strategy: Fine-tuning strategy.
        primary_metric: What validation judged an epoch by.
        epochs: Every epoch, in order.
        best_epoch: Number of the epoch whose state was kept, from 1, over both phases.
        best_validation: Its validation metric.
        seconds: Wall time from loading to saving; of the last attempt where training was resumed.
        steps: Optimiser steps.
        resumed_at_step: Steps that an earlier attempt had taken; 0 where there was none.
        impressions_per_second: Click samples over the seconds of the epochs, validation left out.
        cached_texts: Texts whose lower hidden states were kept.
        reused_texts: Those that an earlier run had computed.
        cache_seconds: Seconds it took to compute the others.
        parameters: Weights of the ranker.
        trainable_parameters: Those that could learn.
        processes: Processes that trained together.
        precision: ``bf16`` or ``fp32``: what the matrices were multiplied in.
        peak_rss_bytes: Peak resident memory of the process so far.
        peak_rss_before_bytes: The same before the training; a peak that did not rise is not the
            training's.
        peak_device_bytes: Most memory that PyTorch reserved on the GPU; 0 without one.
    """

    strategy: str
    primary_metric: str
    epochs: tuple[EpochReport, ...]
    best_epoch: int
    best_validation: float
    seconds: float
    steps: int
    resumed_at_step: int
    impressions_per_second: float
    cached_texts: int
    reused_texts: int
    cache_seconds: float
    parameters: int
    trainable_parameters: int
    processes: int
    precision: str
    peak_rss_bytes: int
    peak_rss_before_bytes: int = 0
    peak_device_bytes: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingReport:
        """Rebuild a report from its ``asdict``."""
        epochs = tuple(EpochReport(**epoch) for epoch in values["epochs"])
        return cls(**{**values, "epochs": epochs})

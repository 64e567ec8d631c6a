"""What a compression step or an adaptation is going to take, and what it took beside.

The same as :mod:`recflow.adapters.planning` for what is no training from clicks: planned from the
stored parent and the tables, refused where memory is short, kept among the facts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from recflow.adapters.planning import (
    PEAK_MEMORY,
    WHOLE,
    PlanningConfig,
    measured_facts,
    memory_left,
    require_memory,
    this_processor,
    training_workload,
    with_held,
)
from recflow.adapters.served import served_model
from recflow.adapters.snapshots import Snapshot
from recflow.core.artifacts import Artifact, JsonValue
from recflow.core.errors import ArtifactError, ConfigError, ContractError
from recflow.hardware.inference import ServedModel
from recflow.hardware.machine import free_memory, own_memory
from recflow.hardware.plan import Measured, TrainingPlan
from recflow.hardware.shape import EncoderShape
from recflow.hardware.steps import child_shape, plan_step
from recflow.modeling.config import TrainingConfig
from recflow.modeling.layout import read_ranker_config
from recflow.modeling.memory import peak_rss_bytes
from recflow.modeling.texts import TOKENIZER_NAME

logger = logging.getLogger("recflow.hardware")


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step that is about to start in this process.

    Attributes:
        plan: What it takes, with what the process held before.
        peak_before: Peak memory of the process in bytes, before the step.
        started: When the step began, on the monotonic clock.
    """

    plan: TrainingPlan
    peak_before: int = field(default_factory=peak_rss_bytes)
    started: float = field(default_factory=time.monotonic)

    def facts(self) -> dict[str, JsonValue]:
        """What an artifact keeps of plan and step, once the step has ended.

        A peak that did not rise is not the step's and is left out.
        """
        seconds, peak = time.monotonic() - self.started, peak_rss_bytes()
        start = self.plan.stage("start")  # of a process, which has been started
        planned = self.plan.seconds - (start.repeats * start.seconds if start else 0.0)
        rows = [Measured(WHOLE, "seconds", planned, seconds)]
        if peak > self.peak_before:
            rows.insert(0, Measured(PEAK_MEMORY, "bytes", self.plan.host_memory.total, peak))
        return {
            **measured_facts(rows),
            "planned_memory_parts": {**self.plan.host_memory.parts},
            "planned_step": cast("JsonValue", self.plan.as_dict()),
        }


def require_variant(
    data: Snapshot, *, kind: str, parent: Artifact, config: Any, planning: PlanningConfig
) -> PlannedStep | None:
    """Plan a step of compression and refuse it where memory is short.

    Args:
        data: The snapshot, which this process holds.
        kind: Name of the step.
        parent: The model that it starts from.
        config: Configuration of the step.
        planning: What plans are made with, and what follows where memory is short.

    Returns:
        ``None`` where the parent's sizes cannot be read, e.g. because it is an ONNX graph; the log
        says why. The step itself says whether it can start from it.

    Raises:
        HardwareError: It needs more memory than there is.
    """
    try:
        shape = planned_shape(served_model(parent))
        most = int(read_ranker_config(parent.path)["max_tokens"])
        tokenizer = parent.path / TOKENIZER_NAME
        plan = _plan(data, kind, shape, asdict(config), tokenizer, most, planning)
    except (ArtifactError, ConfigError, ContractError) as error:
        logger.warning("no plan of the step %s: %s", kind, error)
        return None
    return _required(plan, kind, planning)


def require_adaptation(
    data: Snapshot, *, base_model: Path, config: Any, planning: PlanningConfig
) -> PlannedStep | None:
    """Plan the adaptation of an encoder and refuse it where memory is short.

    Args:
        data: The snapshot, which this process holds.
        base_model: Hugging Face directory of the encoder.
        config: How it is adapted.
        planning: What plans are made with, and what follows where memory is short.

    Returns:
        ``None`` where the encoder's sizes or the texts cannot be read; the log says why.

    Raises:
        HardwareError: It needs more memory than there is.
    """
    try:
        shape, values = EncoderShape.read(base_model), asdict(config)
        tokenizer = base_model / TOKENIZER_NAME
        plan = _plan(data, "adapt", shape, values, tokenizer, config.max_tokens, planning)
    except (ArtifactError, ConfigError, ContractError) as error:
        logger.warning("no plan of adapting the encoder: %s", error)
        return None
    return _required(plan, "adapt", planning)


def planned_shape(model: ServedModel) -> EncoderShape:
    """The sizes with products of two narrow matrices counted as what is left of the matrices."""
    shape = model.shape
    kept = shape.matrix_parameters * model.low_rank_share
    lost = shape.matrix_parameters - kept
    return replace(shape, matrix_parameters=kept, layer_parameters=shape.layer_parameters - lost)


def _plan(
    data: Snapshot,
    kind: str,
    parent: EncoderShape,
    config: Mapping[str, Any],
    tokenizer: Path,
    max_tokens: int,
    planning: PlanningConfig,
) -> TrainingPlan:
    workload = training_workload(
        items=data.items,
        train=data.splits.train,
        validation=data.splits.validation,
        tokenizer=tokenizer,
        config=TrainingConfig(max_tokens=max_tokens),
        other_table_bytes=int(data.splits.test.estimated_size()),
    )
    machine = this_processor(planning)
    child = child_shape(kind, parent, config, workload)
    plan = plan_step(kind, parent, child, config, workload, machine.device, machine.calibration)
    return with_held(plan, own_memory())


def _required(plan: TrainingPlan, kind: str, planning: PlanningConfig) -> PlannedStep:
    require_memory(
        plan,
        memory_left(plan, free_memory()),
        work=f"the step {kind}",
        reclaimable=(),  # a step holds its hidden states itself
        go_on=planning.memory == "go_on",
    )
    return PlannedStep(plan)

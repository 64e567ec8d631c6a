"""What a training is going to take, told before it starts, and what it took, told beside it.

A plan is made from the tables that are about to be read, for the machine and in the process that
is about to work. It decides nothing about the result: it is kept among the facts of an artifact,
which belong neither to its fingerprint nor to its digest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, cast

import polars as pl
import torch

from recflow.adapters.snapshots import Snapshot
from recflow.core.artifacts import JsonValue
from recflow.core.columns import Columns
from recflow.core.errors import ContractError, HardwareError
from recflow.hardware.calibration import Calibration, load_calibration
from recflow.hardware.device import GIB, Device
from recflow.hardware.machine import FreeMemory, free_memory, own_memory, this_machine
from recflow.hardware.plan import Advice, Measured, Memory, TrainingPlan, gib
from recflow.hardware.planner import plan_training
from recflow.hardware.shape import EncoderShape
from recflow.hardware.workload import Popularity, TextLengths, TrainingWorkload
from recflow.modeling.batching import spread
from recflow.modeling.config import TrainingConfig
from recflow.modeling.distribution import choose_device
from recflow.modeling.encoder import mixed_precision
from recflow.modeling.reports import TrainingReport
from recflow.modeling.texts import TOKENIZER_NAME, TextTokenizer

logger = logging.getLogger("recflow.hardware")

MemoryPolicy: TypeAlias = Literal["refuse", "go_on"]

PEAK_MEMORY: Final = "peak memory"
DEVICE_PEAK_MEMORY: Final = "peak device memory"
WHOLE: Final = "training"  # all that was done, loading of the process left out

# Names of parts in the planner's memory.
_CONTEXT, _TABLES, _HIDDEN_STATES = "context", "tables", "hidden states"
_HELD_BEFORE: Final = "held before"
# Pages of mapped files: the kernel drops them when memory is short and reads them again.
_RECLAIMABLE: Final = (_HIDDEN_STATES,)
_SAMPLED_TEXTS: Final = 2_000


@dataclass(frozen=True, slots=True)
class PlanningConfig:
    """What plans are made with, and what follows from them.

    Attributes:
        memory: ``refuse`` work that needs more memory than is free, or ``go_on`` with a warning.
        calibration: File of ``recflow probe``; where there is none, or it is of a processor and a
            GPU trains, the catalogue's class of this machine counts.
        catalogue: The user's own catalogue of devices, beside recflow's.
    """

    memory: MemoryPolicy = "refuse"
    calibration: Path | None = None
    catalogue: Path | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that is planned for.

    Attributes:
        device: What it is.
        calibration: What was measured on it; ``None`` where nothing was.
        accelerator: PyTorch's name of the GPU; ``None`` on a CPU.
    """

    device: Device
    calibration: Calibration | None = None
    accelerator: str | None = None


@dataclass(frozen=True, slots=True)
class PlannedTraining:
    """A training that is about to start on this machine.

    Attributes:
        shape: Sizes of the encoder.
        config: How it is trained.
        workload: What it reads.
        machine: Where.
        in_new_processes: Whether it runs in processes that are still to be started.
        plan: What it takes. The memory of the machine has the part ``held before``: what this
            process holds beyond the libraries and the tables, be it Dagster or earlier work.
    """

    shape: EncoderShape
    config: TrainingConfig
    workload: TrainingWorkload
    machine: Machine
    plan: TrainingPlan
    in_new_processes: bool = False

    def advise(self, left: FreeMemory) -> list[Advice]:
        """What would make it fit into the memory that is left."""
        from recflow.hardware.choice import advise

        device = self.machine.device
        smaller = replace(
            device,
            host_memory_gib=left.host / GIB,
            memory_gib=(left.host if left.device is None else left.device) / GIB,
        )
        return advise(self.shape, self.config, self.workload, smaller, self.machine.calibration)

    def require_memory(self, policy: MemoryPolicy) -> None:
        """Refuse to start where memory is short, or warn; see :func:`require_memory`."""
        left = free_memory(self.machine.accelerator)
        if not self.in_new_processes:
            left = memory_left(self.plan, left)
        require_memory(self.plan, left, lambda: self.advise(left), go_on=policy == "go_on")

    def facts(self, report: TrainingReport) -> dict[str, JsonValue]:
        """What an artifact keeps of plan and training."""
        return {
            **measured_facts(measured_beside(self.plan, report)),
            "planned_memory_parts": {**self.plan.host_memory.parts},
            "planned_training": cast("JsonValue", self.plan.as_dict()),
        }


def require_training(
    data: Snapshot,
    *,
    base_model: Path,
    config: TrainingConfig,
    planning: PlanningConfig,
    in_new_process: bool = False,
) -> PlannedTraining:
    """Plan a training on a snapshot and refuse it where memory is short.

    Args:
        data: The snapshot, all of which this process holds.
        base_model: Hugging Face directory of the encoder.
        config: How it is going to be trained.
        planning: What plans are made with, and what follows where memory is short.
        in_new_process: Whether a process of its own is going to be started for it.

    Raises:
        ArtifactError: ``base_model`` has no readable ``config.json`` or ``tokenizer.json``.
        ConfigError: The configuration does not fit the encoder or the machine.
        ContractError: There is no impression to learn from.
        HardwareError: It needs more memory than there is.
    """
    planned = plan_of_training(
        items=data.items,
        train=data.splits.train,
        validation=data.splits.validation,
        base_model=base_model,
        config=config,
        planning=planning,
        other_table_bytes=int(data.splits.test.estimated_size()),
        in_new_process=in_new_process,
    )
    planned.require_memory(planning.memory)
    return planned


def plan_of_training(
    *,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    base_model: Path,
    config: TrainingConfig,
    planning: PlanningConfig,
    other_table_bytes: int = 0,
    in_new_process: bool = False,
) -> PlannedTraining:
    """Plan a training for this machine, from the tables that it is going to read.

    Args:
        items: Item features.
        train: Training impressions.
        validation: Validation impressions.
        base_model: Hugging Face directory of the encoder.
        config: How it is going to be trained.
        planning: What plans are made with.
        other_table_bytes: Memory of tables that the process holds besides.
        in_new_process: Whether a process of its own is going to be started for it.

    Raises:
        ArtifactError: ``base_model`` has no readable ``config.json`` or ``tokenizer.json``.
        ConfigError: The configuration does not fit the encoder or the machine.
        ContractError: There is no impression to learn from.
    """
    workload = training_workload(
        items=items,
        train=train,
        validation=validation,
        tokenizer=base_model / TOKENIZER_NAME,
        config=config,
        other_table_bytes=other_table_bytes,
    )
    shape, machine = EncoderShape.read(base_model), machine_of(config, planning)
    plan = plan_training(shape, config, workload, machine.device, machine.calibration)
    starts = in_new_process or config.distribution.processes > 1
    if not starts:
        plan = with_held(plan, own_memory())
    return PlannedTraining(shape, config, workload, machine, plan, starts)


def machine_of(config: TrainingConfig, planning: PlanningConfig) -> Machine:
    """The machine that a configuration trains on: this one, with its GPU if that is chosen.

    Raises:
        ConfigError: PyTorch does not see the device, or the calibration is unreadable.
        HardwareError: The catalogue has no class of the kind.
    """
    return _machine(choose_device(config.device), planning)


def this_processor(planning: PlanningConfig) -> Machine:
    """The machine without its GPUs, as models are served on it.

    Raises:
        ConfigError: The calibration is unreadable.
        HardwareError: The catalogue has no processor.
    """
    return _machine(torch.device("cpu"), planning)


def _machine(chosen: torch.device, planning: PlanningConfig) -> Machine:
    from recflow.hardware.catalogue import load_catalogue

    file = planning.calibration
    accelerator = str(chosen) if chosen.type == "cuda" else None
    catalogue = load_catalogue(planning.catalogue)
    with mixed_precision(chosen):
        bf16 = torch.is_autocast_enabled(chosen.type)
    device = this_machine(catalogue, accelerator=accelerator, bf16=bf16)
    calibration = load_calibration(file) if file and file.is_file() else None
    # Only a GPU's context is in a driver: a processor's factors say nothing of a GPU.
    if calibration is None or (calibration.device_context_bytes > 0) != device.is_gpu:
        return Machine(device, None, accelerator)
    return Machine(device, calibration, accelerator)


def training_workload(
    *,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    tokenizer: Path,
    config: TrainingConfig,
    other_table_bytes: int = 0,
) -> TrainingWorkload:
    """Measure what a training reads, as far as it decides memory and time.

    Counts are exact; lengths of texts are those of at most 2,000 texts, evenly spread over the
    items in use.

    Args:
        items: Item features.
        train: Training impressions.
        validation: Validation impressions.
        tokenizer: The encoder's ``tokenizer.json``.
        config: How it is going to be trained.
        other_table_bytes: Memory of tables that the process holds besides.

    Raises:
        ArtifactError: The tokenizer is missing or is none.
        ContractError: There is no impression to learn from.
    """
    user, schedule, objective = config.user_model, config.schedule, config.objective
    samples = _samples(train, rated=objective.loss == "mean_squared_error")
    learnt_from = train.filter(samples > 0)
    if learnt_from.is_empty():
        raise ContractError(
            "no training impression has anything to learn from; widen the window of days"
        )
    kept = samples.filter(samples > 0).clip(upper_bound=objective.clicks_per_impression)
    share = min(1.0, schedule.max_impressions_per_epoch / len(kept))
    slate = _mean(train[Columns.CANDIDATES].list.len())

    occurring = [_occurrences(table, user.history_length) for table in (train, validation)]
    used = items.join(pl.concat(occurring), on=Columns.ITEM_ID, how="semi")
    tokens = TextTokenizer(tokenizer, config.max_tokens)(
        used[Columns.TEXT][spread(used.height, _SAMPLED_TEXTS)].to_list() if used.height else []
    )
    seen = used.join(occurring[0], on=Columns.ITEM_ID, how="semi")
    categories = seen[Columns.CATEGORY].drop_nulls().unique() if user.categories else pl.Series([])
    return TrainingWorkload(
        impressions=train.height,
        clicks=round(float(kept.sum()) * share),
        validation_impressions=min(validation.height, schedule.max_validation_impressions),
        history=_mean(learnt_from[Columns.HISTORY].list.tail(user.history_length).list.len()),
        slate=slate,
        items=used.height,
        lengths=TextLengths.of([len(text) for text in tokens]),
        popularity=_popularity(occurring[0], slate, config),
        table_bytes=other_table_bytes
        + sum(int(table.estimated_size()) for table in (items, train, validation)),
        categories=int((categories.str.len_bytes() > 0).sum()) if len(categories) else 0,
        users=train[Columns.USER_ID].n_unique() if user.user_ids else 0,
    )


def with_held(plan: TrainingPlan, held: int) -> TrainingPlan:
    """The plan of a training in a process that already holds so many bytes.

    The planner counts a process of its own: libraries and tables. What else is in this one is added
    as ``held before``, so that need and peak speak of the same process.
    """
    known = sum(plan.host_memory.parts.get(name, 0) for name in (_CONTEXT, _TABLES))
    more = max(0, held - known)

    def with_more(memory: Memory) -> Memory:
        return replace(memory, parts={**memory.parts, _HELD_BEFORE: more}) if more else memory

    host = with_more(plan.host_memory)
    return replace(plan, host_memory=host, memory=plan.memory if plan.device.is_gpu else host)


def memory_left(plan: TrainingPlan, free: FreeMemory) -> FreeMemory:
    """What a training in this process may use: what is free, and what the process holds of it.

    The plan counts libraries and tables, which are in memory already.
    """
    return replace(free, host=free.host + min(own_memory(), plan.host_memory.total))


def require_memory(
    plan: TrainingPlan,
    left: FreeMemory,
    advise: Callable[[], Sequence[Advice]] | None = None,
    *,
    go_on: bool = False,
    work: str = "this training",
    reclaimable: Sequence[str] = _RECLAIMABLE,
) -> None:
    """Refuse work that would not fit.

    A training's kept hidden states are pages of a mapped file: they count in a process' memory, but
    the kernel drops them when memory is short. They make no training refused. Neither does a GPU's
    context, which whoever asks for its free memory has already made.

    Args:
        plan: What it takes.
        left: What it may use.
        advise: What would make it fit, asked only where it does not; ``None`` where nothing is
            known that would.
        go_on: Warn, and let it start all the same.
        work: What it is, for the sentence.
        reclaimable: Parts that the kernel drops when memory is short.

    Raises:
        HardwareError: Says what is needed, what is there, which part is the largest, what would
            make it fit, and how to start all the same.
    """
    missing = _missing(plan, left, reclaimable)
    if missing is None:
        return
    place, memory, have = missing
    sentence = (
        f"{work} needs {gib(memory.total)} of {place} and {gib(have)} are left for it; "
        f"the largest part is {memory.largest} with {gib(memory.parts[memory.largest])}"
    )
    if advise is not None:
        sentence += f"; {_advice(advise())}"
    if not go_on:
        raise HardwareError(f"{sentence}; to start all the same, set memory: go_on")
    logger.warning("%s; it starts all the same, as memory: go_on says", sentence)


def measured_beside(plan: TrainingPlan, report: TrainingReport) -> list[Measured]:
    """Set what a training took beside what was planned.

    What cannot be compared is left out: the peak memory of a process that had held more before,
    hidden states that an earlier run had kept, the whole of a training that was resumed.

    Args:
        plan: The plan, with what the process held (:func:`with_held`).
        report: What the training reported.

    Returns:
        Peak memory in bytes; seconds of a step of either phase, of a validation after either, of
        computing the hidden states, and of everything that was done, loading of the process left
        out. Stages that were ended early count as often as they were done.
    """
    found: list[Measured] = []
    if report.peak_rss_bytes > report.peak_rss_before_bytes:
        planned = _of_one_process(plan.host_memory, report.processes)
        found.append(Measured(PEAK_MEMORY, "bytes", planned, report.peak_rss_bytes))
    if report.peak_device_bytes:
        # The allocator of PyTorch does not see what the driver holds.
        parts = plan.memory.parts
        planned = plan.memory.total - parts.get(_CONTEXT, 0)
        found.append(Measured(DEVICE_PEAK_MEMORY, "bytes", planned, report.peak_device_bytes))

    seconds = {stage.name: stage.seconds for stage in plan.stages}
    whole = 0.0
    for phase in ("head", "encoder"):
        epochs = [epoch for epoch in report.epochs if epoch.phase == phase]
        steps = sum(epoch.steps for epoch in epochs)
        if not steps or phase not in seconds:
            continue
        stepping = sum(epoch.seconds - epoch.validation_seconds for epoch in epochs)
        found.append(Measured(f"{phase} step", "seconds", seconds[phase], stepping / steps))
        # After an epoch in which the encoder learned, every item is encoded anew.
        validation = seconds.get("validation", 0.0)
        validation += seconds.get("encoding", 0.0) if phase == "encoder" else 0.0
        validated = sum(epoch.validation_seconds for epoch in epochs) / len(epochs)
        found.append(Measured(f"{phase} validation", "seconds", validation, validated))
        whole += seconds[phase] * steps + validation * len(epochs)
    if report.cached_texts and not report.reused_texts and _HIDDEN_STATES in seconds:
        found.append(
            Measured(_HIDDEN_STATES, "seconds", seconds[_HIDDEN_STATES], report.cache_seconds)
        )
        whole += seconds[_HIDDEN_STATES]
    if not report.resumed_at_step:
        whole += seconds.get("encoding", 0.0)  # of all items, before the first epoch
        found.append(Measured(WHOLE, "seconds", whole, report.seconds))
    return found


def measured_facts(compared: Sequence[Measured]) -> dict[str, JsonValue]:
    """What an artifact keeps of a comparison: the fact ``plan``."""
    return {"plan": [cast("dict[str, JsonValue]", asdict(row)) for row in compared]}


def compared_facts(facts: Mapping[str, JsonValue]) -> list[Measured]:
    """The comparison that an artifact keeps; nothing where it was stored before there were any."""
    rows = facts.get("plan")
    if not isinstance(rows, list):
        return []
    return [Measured(**cast("dict[str, Any]", row)) for row in rows]


def compared_table(compared: Sequence[Measured]) -> str:
    """A comparison as a Markdown table."""
    lines = ["| | predicted | measured | error |", "|---|---:|---:|---:|"]
    lines += [
        f"| {row.name} | {_amount(row.predicted, row.unit)} | {_amount(row.measured, row.unit)} "
        f"| {row.error:+.0%} |"
        for row in compared
    ]
    return "\n".join(lines)


def compared_models_table(compared: Mapping[str, Sequence[Measured]]) -> str:
    """The comparisons of several models as one Markdown table."""
    lines = ["| model | | predicted | measured | error |", "|---|---|---:|---:|---:|"]
    for model, rows in compared.items():
        lines += [f"| {model} {line}" for line in compared_table(rows).splitlines()[2:]]
    return "\n".join(lines)


def _missing(
    plan: TrainingPlan, left: FreeMemory, reclaimable: Sequence[str]
) -> tuple[str, Memory, int] | None:
    """Where memory is short, what is needed there, and what there is."""
    host = _without(plan.host_memory, *reclaimable)
    if left.device is not None:
        device = _without(plan.memory, _CONTEXT)
        if not device.fits(left.device):
            return f"memory of {plan.device.label}", device, left.device
    return None if host.fits(left.host) else ("memory", host, left.host)


def _without(memory: Memory, *names: str) -> Memory:
    return replace(memory, parts={k: v for k, v in memory.parts.items() if k not in names})


def _advice(advice: Sequence[Advice]) -> str:
    helps = [each for each in advice if each.fits]
    if helps:
        listed = ", or ".join(f"{each.change} ({gib(each.memory)})" for each in helps[:3])
        return f"it would fit with {listed}"
    if advice:
        nearest = min(advice, key=lambda each: each.memory)
        return f"nothing makes it fit here, {nearest.change} comes nearest ({gib(nearest.memory)})"
    return "nothing makes it fit here"


def _of_one_process(memory: Memory, processes: int) -> float:
    """Memory that one of several processes shows; each maps the same hidden states."""
    shared = memory.parts.get(_HIDDEN_STATES, 0)
    return shared + (memory.total - shared) / processes


def _amount(value: float, unit: str) -> str:
    if unit == "bytes":
        return gib(value)
    if unit != "seconds":
        return f"{value:,.4g} {unit}"
    return f"{value:,.1f} s" if value >= 1 else f"{value * 1e3:,.2f} ms"


def _samples(train: pl.DataFrame, *, rated: bool) -> pl.Series:
    """Candidates of each impression that there is something to learn from."""
    if rated:
        if Columns.RATING not in train.columns:
            return pl.zeros(train.height, dtype=pl.Int64, eager=True)
        known = pl.element().is_not_null() & pl.element().is_not_nan()
        ratings = pl.col(Columns.RATING).cast(pl.List(pl.Float64))
        return train.select(ratings.list.eval(known).list.sum().fill_null(0).cast(pl.Int64))[
            Columns.RATING
        ]
    clicks = pl.col(Columns.LABELS).list.sum().cast(pl.Int64)
    contrasts = clicks < pl.col(Columns.LABELS).list.len()
    return train.select(pl.when(contrasts).then(clicks).otherwise(0).alias("samples"))["samples"]


def _occurrences(table: pl.DataFrame, history_length: int) -> pl.DataFrame:
    """How often each item occurs in the newest clicks of histories, and among candidates."""
    newest = table[Columns.HISTORY].list.tail(history_length)
    lists = {Columns.HISTORY: newest, Columns.CANDIDATES: table[Columns.CANDIDATES]}
    counted = [
        ids.explode().drop_nulls().cast(pl.String).alias(Columns.ITEM_ID).to_frame()
        .with_columns((pl.lit(int(name == role), pl.Int64)).alias(role) for role in lists)
        for name, ids in lists.items()
    ]  # fmt: skip
    return pl.concat(counted).group_by(Columns.ITEM_ID).sum()


def _popularity(occurrences: pl.DataFrame, slate: float, config: TrainingConfig) -> Popularity:
    """How often items are drawn: clicks of histories, and the candidates that are sampled."""
    objective = config.objective
    sampled = objective.loss in ("cross_entropy", "binary_cross_entropy")
    drawn = 1 + (min(objective.negatives, slate - 1) if sampled else 0)
    shares = occurrences[Columns.HISTORY] + occurrences[Columns.CANDIDATES] * (drawn / slate)
    # Counts are whole: thousandths of a draw.
    return Popularity.of((shares * 1_000).ceil().cast(pl.Int64).to_list())


def _mean(values: pl.Series) -> float:
    mean = values.mean()
    return float(mean) if isinstance(mean, int | float) else 0.0

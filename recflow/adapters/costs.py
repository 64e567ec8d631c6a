"""What every model of a snapshot costs on every device of the catalogue, for the report.

Nothing is run here: costs are planned from the sizes of the stored models and from what the
snapshot's log asks for. What was measured when the models were made and timed is put beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, cast

import polars as pl

from recflow.adapters.keys import MEASUREMENTS
from recflow.adapters.planning import (
    WHOLE,
    compared_facts,
    measured_beside,
    training_workload,
)
from recflow.adapters.served import served_models
from recflow.adapters.snapshots import Snapshot
from recflow.adapters.step_plans import planned_shape
from recflow.compression.family import ROOT, Family
from recflow.core.artifacts import Artifact, JsonValue, fingerprint_of
from recflow.core.columns import Columns
from recflow.core.cost import (
    CostSection,
    ModelCost,
    PlannedAndMeasured,
    PricedDevice,
    ServingCost,
    TrainingCost,
    cheapest,
)
from recflow.core.errors import ArtifactError, ConfigError, ContractError, HardwareError
from recflow.core.measurement import Measurement
from recflow.hardware.calibration import Calibration, load_calibration
from recflow.hardware.catalogue import load_catalogue
from recflow.hardware.device import Device
from recflow.hardware.inference import ServedModel, plan_inference
from recflow.hardware.machine import this_machine
from recflow.hardware.plan import InferencePlan, Stage, TrainingPlan
from recflow.hardware.planner import plan_training
from recflow.hardware.shape import EncoderShape
from recflow.hardware.steps import plan_step
from recflow.hardware.workload import InferenceWorkload, TextLengths, TrainingWorkload
from recflow.modeling.batching import spread
from recflow.modeling.config import TrainingConfig, config_from
from recflow.modeling.layout import read_ranker_config
from recflow.modeling.reports import TrainingReport
from recflow.modeling.texts import BUCKET_SIZE, TOKENIZER_NAME, TextTokenizer

TEXTS_PER_SECOND: Final = "texts/s"
"""Unit of throughput in comparisons."""

_SAMPLED_TEXTS: Final = 2_000
_MILLION: Final = 1e6
_HOUR: Final = 3_600.0


@dataclass(frozen=True, slots=True)
class PriceList:
    """The devices that costs are planned for, and what a machine was measured to reach.

    Attributes:
        devices: By name.
        calibration: Of the machine that was measured; ``None`` where none was.
    """

    devices: Mapping[str, Device]
    calibration: Calibration | None = None

    @classmethod
    def read(cls, catalogue: Path | None = None, calibration: Path | None = None) -> PriceList:
        """Read both files.

        Args:
            catalogue: The user's own catalogue, beside recflow's.
            calibration: File of ``recflow probe``.

        Raises:
            ConfigError: A file cannot be read or has an unknown key or an impossible value.
        """
        return cls(
            load_catalogue(catalogue),
            None if calibration is None else load_calibration(calibration),
        )

    def digests(self) -> dict[str, JsonValue]:
        """What identifies the content of both, for the configuration of what is made of them."""
        # The order counts: it is that of the report.
        devices = [cast("JsonValue", asdict(device)) for device in self.devices.values()]
        found: dict[str, JsonValue] = {
            "catalogue": fingerprint_of("catalogue", "", "", {}, {"devices": devices})
        }
        if self.calibration is not None:
            factors = cast("JsonValue", asdict(self.calibration))
            found["calibration"] = fingerprint_of("calibration", "", "", {}, {"factors": factors})
        return found

    def calibration_of(self, device: Device) -> Calibration | None:
        """What was measured, where that speaks for such a device."""
        measured = self.calibration
        if measured is None or measured.speaks_for(device, self.devices):
            return measured
        return None


@dataclass(frozen=True, slots=True)
class Demand:
    """What one recommendation is, as the snapshot's test days ask for it.

    Attributes:
        candidates: Candidates of an impression, mean.
        history: Clicks of its user that the user model reads, mean.
        items: Items of the catalogue, whose vectors are kept.
        new_items: Items that test shows or tells of and the days before did not, at least 1.
        impressions: Impressions of test.
    """

    candidates: int
    history: float
    items: int
    new_items: int
    impressions: int

    @classmethod
    def of(cls, data: Snapshot, history_length: int) -> Demand:
        """Count it in the log.

        Args:
            data: The snapshot.
            history_length: Clicks of a history that the user model reads.
        """
        splits = data.splits
        known = pl.concat([_occurring(splits.train), _occurring(splits.validation)])
        new = _occurring(splits.test).join(known, on=Columns.ITEM_ID, how="anti").height
        used = splits.test[Columns.HISTORY].list.tail(history_length).list.len()
        return cls(
            candidates=max(1, round(_mean(splits.test[Columns.CANDIDATES].list.len()))),
            history=_mean(used),
            items=data.items.height,
            # No new item in a few days is not none ever: without one, every model would cost alike.
            new_items=max(1, new),
            impressions=max(1, splits.test.height),
        )

    @property
    def texts(self) -> float:
        """Texts that are encoded for one recommendation: each new item once."""
        return self.new_items / self.impressions

    def workload(self, lengths: TextLengths) -> InferenceWorkload:
        """The demand on a model, whose tokenizer decides the lengths."""
        return InferenceWorkload(
            items=self.items,
            history=self.history,
            candidates=self.candidates,
            texts=self.texts,
            lengths=lengths,
            batch=BUCKET_SIZE,
        )

    def sentences(self) -> str:
        """What it is, for people."""
        return (
            f"One recommendation ranks {self.candidates:,} candidates for a user with "
            f"{self.history:.1f} clicks, as the mean test impression does. Item vectors are kept "
            f"in float32; new items are encoded once, which the test days needed for "
            f"{self.new_items:,} of {self.items:,} items in {self.impressions:,} impressions: "
            f"{self.texts:.3g} texts a recommendation."
        )


def cost_section(
    *,
    family: Family,
    models: Mapping[str, Artifact],
    data: Snapshot,
    measurements: Sequence[Measurement],
    measured_plans: Mapping[str, JsonValue],
    prices: PriceList,
) -> CostSection:
    """Plan every model on every device, and set beside it what was measured.

    Args:
        family: The models.
        models: Their artifacts, and that of one found for a budget, by name.
        data: The snapshot that they were made from.
        measurements: What they cost on the machine that measured.
        measured_plans: By model what was planned for that machine and seen there, the rows of
            :func:`recflow.adapters.planning.measured_facts`; missing where nobody planned.
        prices: The devices.

    Raises:
        ArtifactError: A model's configuration or tokenizer is missing or none.
    """
    user_model = read_ranker_config(models[ROOT].path)["user_model"]
    demand = Demand.of(data, int(user_model["history_length"]))
    machine = _machine(prices.devices)
    serving = _servings(family, models, data, demand)
    makings, unplanned = _makings(family, models, serving, data)
    training, impossible = _training_costs(makings, prices)
    measured = {each.name: each for each in measurements}
    compared, missing = _compared(models, serving, makings, measured, measured_plans, machine)
    costs = [
        ModelCost(
            name,
            serving=serving[name].costs(prices) if name in serving else (),
            training=training.get(name, ()),
            note="" if name in serving else "serving it is not planned: its sizes are unknown.",
            measured_seconds=_seconds(artifact),
            measured_watt_hours=_watt_hours(measured.get(name), demand),
            energy_source=measured[name].energy.source if name in measured else "",
        )
        for name, artifact in models.items()
    ]
    root, of_root = serving.get(ROOT), makings.get(ROOT)
    return CostSection(
        devices=tuple(_priced(device) for device in prices.devices.values()),
        models=tuple(costs),
        compared=tuple(compared),
        recommendation=demand.sentences(),
        training_run=of_root.sentences() if isinstance(of_root, _Training) else "",
        machine=_where(machine, measurements),
        notes=(
            *([root.without_kept_vectors(prices)] if root else []),
            *unplanned,
            *impossible,
            *missing,
            *_energy_notes(costs),
        ),
    )


@dataclass(frozen=True, slots=True)
class _Serving:
    """A model as it is served, and what is asked of it."""

    model: ServedModel
    asked: InferenceWorkload

    def costs(self, prices: PriceList) -> tuple[ServingCost, ...]:
        """Serving it, a device each."""
        return tuple(
            _serving_cost(
                plan_inference(self.model, self.asked, device, prices.calibration_of(device))
            )
            for device in prices.devices.values()
        )

    def limit(self, device: Device, threads: int) -> float:
        """Texts a second at the full rates of so many threads, or of all cores if fewer."""
        threads = min(threads, device.cores)
        plan = plan_inference(self.model, self.asked, device, threads=threads)
        return plan.limit_texts_per_second

    def without_kept_vectors(self, prices: PriceList) -> str:
        """The worst case beside the usual one, in a sentence."""
        worst = _Serving(self.model, replace(self.asked, texts=1.0))
        usual, dear = cheapest(self.costs(prices)), cheapest(worst.costs(prices))
        if usual is None or dear is None:
            return f"{ROOT} fits on no device of the catalogue."
        return (
            f"With one new text in every request, the worst case, a million recommendations of "
            f"{ROOT} would cost ${dear.usd:,.3g} where they are cheapest, instead of "
            f"${usual.usd:,.3g}."
        )


def _servings(
    family: Family, models: Mapping[str, Artifact], data: Snapshot, demand: Demand
) -> dict[str, _Serving]:
    """What is planned for each model whose sizes are known."""
    found: dict[str, _Serving] = {}
    texts = data.items[Columns.TEXT][spread(data.items.height, _SAMPLED_TEXTS)].to_list()
    for name, model in served_models(family, models).items():
        path = models[name].path
        most = int(read_ranker_config(path)["max_tokens"])
        # A trimmed vocabulary splits words into more tokens: lengths are the model's own.
        tokens = TextTokenizer(path / TOKENIZER_NAME, most)(texts)
        lengths = TextLengths.of([len(text) for text in tokens])
        found[name] = _Serving(model, demand.workload(lengths))
    return found


@dataclass(frozen=True, slots=True)
class _Training:
    """The training of the root."""

    shape: EncoderShape
    config: TrainingConfig
    workload: TrainingWorkload

    def plan(self, device: Device, calibration: Calibration | None = None) -> TrainingPlan:
        """Plan it for a device.

        Raises:
            ConfigError: The configuration does not fit the device.
        """
        return plan_training(self.shape, self.config, self.workload, device, calibration)

    def limits(self, artifact: Artifact, machine: Device) -> dict[str, float]:
        """Seconds that the full rates of the machine that trained would have left.

        By name of what was compared. The stages are those that were planned on that machine, or
        for this one where none were.
        """
        names = [field.name for field in fields(TrainingReport)]
        facts = {name: artifact.facts[name] for name in names if name in artifact.facts}
        try:
            plan, report = self.plan(machine), TrainingReport.from_dict(facts)
        except (ConfigError, KeyError, TypeError):  # it cannot run here, or another recflow ran it
            return {}
        planned, stages = artifact.facts.get("planned_training"), plan.stages
        if isinstance(planned, dict):
            stages = [Stage(**cast("Any", stage)) for stage in cast("list[Any]", planned["stages"])]
        plan = replace(
            plan, stages=tuple(replace(stage, seconds=stage.limit_seconds) for stage in stages)
        )
        rows = measured_beside(plan, report)
        return {row.name: row.predicted for row in rows if row.unit == "seconds"}

    def sentences(self) -> str:
        """What one run is, for people."""
        schedule = self.config.schedule
        return (
            f"One training run makes {ROOT} of its pretrained encoder "
            f"({self.config.tuning.strategy}): {self.workload.clicks:,} clicks an epoch, "
            f"{schedule.head_epochs} epochs of the user model and {schedule.encoder_epochs} of the "
            "encoder, none ended early. That of another model is its step from its parent, in a "
            "process of its own."
        )


@dataclass(frozen=True, slots=True)
class _Step:
    """The step that makes a model from its parent."""

    kind: str
    parent: EncoderShape
    child: EncoderShape
    config: Mapping[str, Any]
    workload: TrainingWorkload

    def plan(self, device: Device, calibration: Calibration | None = None) -> TrainingPlan:
        """Plan it for a device.

        Raises:
            ConfigError: The device is a GPU, which steps do not use.
        """
        return plan_step(
            self.kind, self.parent, self.child, self.config, self.workload, device, calibration
        )

    def limits(self, artifact: Artifact, machine: Device) -> dict[str, float]:
        """Seconds that the full rates of the machine that planned it, else of this one, leave."""
        planned = artifact.facts.get("planned_step")
        kept = planned.get("limit_seconds") if isinstance(planned, dict) else None
        seconds = kept if isinstance(kept, float) else self.plan(machine).limit_seconds
        return {WHOLE: seconds}


def _makings(
    family: Family,
    models: Mapping[str, Artifact],
    serving: Mapping[str, _Serving],
    data: Snapshot,
) -> tuple[dict[str, _Training | _Step], list[str]]:
    """How each model is made, and why that of some cannot be planned."""
    try:
        root = _training_of(models[ROOT], data)
    except (ArtifactError, ConfigError, ContractError, KeyError) as error:
        return {}, [f"The training of {ROOT} cannot be planned: {error}."]
    found: dict[str, _Training | _Step] = {ROOT: root}
    for name, variant in family.variants.items():
        if name in serving and variant.parent in serving:
            values = models[name].manifest.config
            found[name] = _Step(
                variant.step.name,
                planned_shape(serving[variant.parent].model),
                planned_shape(serving[name].model),
                # Values that a later recflow added have their defaults.
                {**asdict(variant.config), **values},
                root.workload,
            )
    unplanned = [name for name in models if name not in found]
    return found, [f"Making {name} is not planned." for name in unplanned]


def _training_of(root: Artifact, data: Snapshot) -> _Training:
    """The root's training as it was configured."""
    names = {field.name for field in fields(TrainingConfig)}
    values = {key: value for key, value in root.manifest.config.items() if key in names}
    config = config_from(TrainingConfig, values)
    transformer = read_ranker_config(root.path)["encoder"]["transformer"]
    workload = training_workload(
        items=data.items,
        train=data.splits.train,
        validation=data.splits.validation,
        tokenizer=root.path / TOKENIZER_NAME,
        config=config,
        other_table_bytes=int(data.splits.test.estimated_size()),
    )
    return _Training(EncoderShape.from_config(transformer), config, workload)


def _training_costs(
    makings: Mapping[str, _Training | _Step], prices: PriceList
) -> tuple[dict[str, tuple[TrainingCost, ...]], list[str]]:
    """Making each model on each device, and why some cannot be made on some."""
    found: dict[str, tuple[TrainingCost, ...]] = {}
    notes: list[str] = []
    for name, making in makings.items():
        costs: list[TrainingCost] = []
        for device in prices.devices.values():
            if isinstance(making, _Step) and device.is_gpu:
                continue
            try:
                costs.append(_training_cost(making.plan(device, prices.calibration_of(device))))
            except ConfigError as error:
                notes.append(f"{name} cannot be made on {device.label}: {error}.")
        found[name] = tuple(costs)
    if any(isinstance(making, _Step) for making in makings.values()):
        notes.append(
            "Smaller models are made on processors: their steps are not planned for GPUs. Planned "
            "runs start with their process, measured ones when it has loaded its libraries."
        )
    return found, notes


def _compared(
    models: Mapping[str, Artifact],
    serving: Mapping[str, _Serving],
    makings: Mapping[str, _Training | _Step],
    measured: Mapping[str, Measurement],
    measured_plans: Mapping[str, JsonValue],
    machine: Device,
) -> tuple[list[PlannedAndMeasured], list[str]]:
    """Predictions beside measurements, and which are missing."""
    found: list[PlannedAndMeasured] = []
    notes: list[str] = []
    for name, artifact in models.items():
        limits = makings[name].limits(artifact, machine) if name in makings else {}
        rows, seconds = compared_facts(artifact.facts), _seconds(artifact)
        found += [
            PlannedAndMeasured(name, "training", **asdict(row), limit=limits.get(row.name))
            for row in rows
        ]
        if seconds is not None and not any(row.name == WHOLE for row in rows):
            found.append(
                PlannedAndMeasured(
                    name, "training", WHOLE, "seconds", None, seconds, limits.get(WHOLE)
                )
            )
    if not compared_facts(models[ROOT].facts):
        notes.append(
            f"No prediction was kept when {ROOT} was trained; materialise "
            f"{models[ROOT].manifest.key} again for one."
        )
    unplanned: list[str] = []
    for name, measurement in measured.items():
        limit = serving[name].limit(machine, measurement.threads) if name in serving else None
        rows = compared_facts({"plan": measured_plans.get(name)})
        found += [
            PlannedAndMeasured(
                name,
                "inference",
                **asdict(row),
                limit=limit if row.unit == TEXTS_PER_SECOND else None,
            )
            for row in rows
        ]
        if not rows:
            unplanned.append(name)
        if not any(row.unit == TEXTS_PER_SECOND for row in rows):
            speed = measurement.texts_per_second
            found.append(
                PlannedAndMeasured(
                    name, "inference", "throughput", TEXTS_PER_SECOND, None, speed, limit
                )
            )
    if unplanned:
        which = "the models" if len(unplanned) == len(measured) else ", ".join(unplanned)
        notes.append(
            f"No prediction was kept when {which} were measured; materialise {MEASUREMENTS} again "
            "for some."
        )
    return found, notes


def _serving_cost(plan: InferencePlan) -> ServingCost:
    return ServingCost(
        device=plan.device.name,
        fits=plan.fits,
        memory_bytes=plan.memory.total,
        texts_per_second=plan.texts_per_second,
        limit_texts_per_second=plan.limit_texts_per_second,
        recommendations_per_second=plan.recommendations_per_second,
        usd=plan.usd_per_million,
        watt_hours=plan.watt_hours_per_million,
        is_calibrated=plan.is_calibrated,
    )


def _training_cost(plan: TrainingPlan) -> TrainingCost:
    return TrainingCost(
        device=plan.device.name,
        fits=plan.fits,
        memory_bytes=plan.memory.total,
        seconds=plan.seconds,
        limit_seconds=plan.limit_seconds,
        usd=plan.usd,
        watt_hours=plan.watt_hours,
        is_calibrated=plan.is_calibrated,
    )


def _priced(device: Device) -> PricedDevice:
    return PricedDevice(
        name=device.name,
        label=device.label,
        kind=device.kind,
        memory_bytes=device.memory_bytes,
        watts=device.watts,
        usd_per_hour=device.price.usd_per_hour,
        price_date=device.price.date,
        price_source=device.price.source,
        data_source=device.source,
    )


def _machine(devices: Mapping[str, Device]) -> Device:
    """This machine; rates are those of recflow's catalogue where the user's has no processor."""
    try:
        return this_machine(devices)
    except HardwareError:
        return this_machine()


def _where(machine: Device, measurements: Sequence[Measurement]) -> str:
    """Where everything measured was measured, for people."""
    threads = sorted({each.threads for each in measurements})
    timed = f"Encoding was timed with {_either(threads)}. " if threads else ""
    return (
        f"{timed}The limit of serving is what the full rates of {machine.label} would allow so "
        "many threads. A training's limit is that of the machine that planned it; without a plan, "
        "of this one."
    )


def _either(threads: Sequence[int]) -> str:
    unit = "thread" if threads == [1] else "threads"
    return f"{' or '.join(map(str, threads))} {unit}"


def _seconds(artifact: Artifact) -> float | None:
    """Seconds that making it took."""
    seconds = artifact.facts.get("seconds")
    return float(seconds) if isinstance(seconds, int | float) else None


def _watt_hours(measurement: Measurement | None, demand: Demand) -> float | None:
    """Energy to encode the texts of a million recommendations, as the meter counted it."""
    if measurement is None or measurement.energy.joules_per_1000_texts is None:
        return None
    joules = measurement.energy.joules_per_1000_texts / 1_000 * demand.texts * _MILLION
    return joules / _HOUR


def _energy_notes(costs: Sequence[ModelCost]) -> list[str]:
    if all(cost.measured_watt_hours is None for cost in costs):
        return []
    return ["Energy as measured is that of encoding texts; scoring was not metered."]


def _occurring(impressions: pl.DataFrame) -> pl.DataFrame:
    """The distinct items of histories and among candidates."""
    lists = [impressions[name].explode() for name in (Columns.HISTORY, Columns.CANDIDATES)]
    found = pl.concat([ids.cast(pl.String).rename(Columns.ITEM_ID) for ids in lists])
    return found.drop_nulls().unique().to_frame()


def _mean(values: pl.Series) -> float:
    mean = values.mean()
    return float(mean) if isinstance(mean, int | float) else 0.0

"""What ``recflow plan`` answers: one training on every device, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from recflow.core.errors import ConfigError, HardwareError
from recflow.hardware.calibration import Calibration, default_calibration, load_calibration
from recflow.hardware.catalogue import load_catalogue, pick_device
from recflow.hardware.choice import advise, choose, excess, shortage
from recflow.hardware.device import GIB, Device
from recflow.hardware.inference import ServedModel, plan_inference
from recflow.hardware.plan import Advice, InferencePlan, TrainingPlan, gib
from recflow.hardware.planner import plan_training
from recflow.hardware.presets import find_shape
from recflow.hardware.shape import EncoderShape
from recflow.hardware.workload import InferenceWorkload, TrainingWorkload
from recflow.modeling.config import TrainingConfig, with_values

_LAYOUT: Final = 1
_PIPED_WIDTH: Final = 80
_ADVISED_DEVICES: Final = 3
_COLUMNS_OF_PARTS: Final = 4


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What is to be planned.

    Attributes:
        model: Name or place of the encoder; see :func:`find_shape`.
        shape: Its sizes.
        config: How it is trained.
        workload: What it reads.
        served: The encoder as it is served afterwards.
        asked: What the service answers.
        devices: Where it may run.
        calibration: Factors measured on a machine; ``None`` for those that recflow comes with.
        max_hours: Time budget of the choice; ``None`` for any.
        known: Names of all devices of the catalogue.
    """

    model: str
    shape: EncoderShape
    config: TrainingConfig
    workload: TrainingWorkload
    served: ServedModel
    asked: InferenceWorkload
    devices: tuple[Device, ...]
    calibration: Calibration | None = None
    max_hours: float | None = None
    known: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        model: str,
        *,
        values: Mapping[str, Any] | None = None,
        changes: Sequence[str] = (),
        clicks: int | None = None,
        items: int | None = None,
        tokens: float | None = None,
        history: int | None = None,
        candidates: int | None = None,
        texts: float | None = None,
        serve_precision: str = "fp32",
        devices: Sequence[str] = (),
        catalogue: Path | None = None,
        calibration: Path | None = None,
        max_hours: float | None = None,
    ) -> PlanRequest:
        """Read what the command line says.

        Args:
            model: See :func:`find_shape`.
            values: Values of :class:`TrainingConfig` by dotted key.
            changes: More of them as ``key=value``.
            clicks: Click samples of an epoch.
            items: Items whose texts are in use.
            tokens: Mean length of a text in tokens.
            history: Clicks of a history that are used; also ``user_model.history_length``.
            candidates: Candidates of a recommendation.
            texts: Texts that are encoded for a recommendation; see :class:`InferenceWorkload`.
            serve_precision: One of :data:`recflow.hardware.inference.PRECISIONS`.
            devices: Names of devices; all of the catalogue where there are none.
            catalogue: The user's file of devices.
            calibration: File of :func:`save_calibration`.
            max_hours: Time budget of the choice.

        Raises:
            ArtifactError: The model's configuration is not JSON.
            ConfigError: Anything else is wrong.
        """
        shape = find_shape(model)
        known = load_catalogue(catalogue)
        chosen = [pick_device(known, name) for name in dict.fromkeys(devices)]
        given = {**(values or {}), **dict(parse_change(text) for text in changes)}
        if history is not None:
            given.setdefault("user_model.history_length", history)
        config = with_values(TrainingConfig(), given)
        for name, value in (
            ("clicks", clicks), ("items", items), ("history", history), ("hours", max_hours),
        ):  # fmt: skip
            if value is not None and not value > 0:
                raise ConfigError.of(name, value, "above 0")
        if tokens is not None and not 1 <= tokens <= config.max_tokens:
            raise ConfigError.of("tokens", tokens, f"1 to max_tokens, {config.max_tokens}")
        if config.max_tokens > shape.longest_text:
            raise ConfigError.of(
                "max_tokens",
                config.max_tokens,
                f"at most {shape.longest_text}, the encoder's longest",
            )
        told: dict[str, Any] = {
            "clicks": clicks,
            "items": items,
            "tokens": tokens,
            "history": history,
        }
        told = {name: value for name, value in told.items() if value is not None}
        asked: dict[str, Any] = {"items": items, "candidates": candidates, "texts": texts}
        asked = {name: value for name, value in asked.items() if value is not None}
        # Every click has the non-clicks that it is compared with.
        slate = max(30.0, 1.0 + config.objective.negatives)
        workload = TrainingWorkload.typical(**told, slate=slate, longest=config.max_tokens)
        used = float(config.user_model.history_length)
        return cls(
            model=model,
            shape=shape,
            config=config,
            workload=workload,
            served=ServedModel.of(shape, serve_precision),
            asked=InferenceWorkload(**asked, history=used, lengths=workload.lengths),
            devices=tuple(chosen or known.values()),
            calibration=load_calibration(calibration) if calibration else None,
            max_hours=max_hours,
            known=frozenset(known),
        )

    def calibration_of(self, device: Device) -> Calibration:
        """The factors that count for a device: what was measured, where that speaks for it."""
        measured = self.calibration
        if measured is not None and measured.speaks_for(device, self.known):
            return measured
        return default_calibration(device)


@dataclass(frozen=True, slots=True)
class Row:
    """One device.

    Attributes:
        device: The device.
        plan: What the training takes on it; ``None`` where it cannot train like this.
        refused: Why it cannot; ``None`` where it can.
        calibration: The factors of the plan.
        serving: What serving the model takes on it.
    """

    device: Device
    plan: TrainingPlan | None
    refused: str | None
    calibration: Calibration
    serving: InferencePlan

    @property
    def fits(self) -> bool:
        """Whether the training can run there."""
        return self.plan is not None and self.plan.fits


@dataclass(frozen=True, slots=True)
class PlanTable:
    """One training on every device, and which one to take.

    Attributes:
        request: What was planned.
        rows: One for each device.
        choice: The cheapest device that fits memory and time; ``None`` where none does.
        reason: Why none was chosen; ``None`` where one was.
        advice: What would make it fit devices that it does not fit.
    """

    request: PlanRequest
    rows: tuple[Row, ...]
    choice: TrainingPlan | None
    reason: str | None
    advice: tuple[Advice, ...]

    @classmethod
    def of(cls, request: PlanRequest) -> PlanTable:
        """Plan the training on every device.

        Raises:
            ConfigError: No device can train like this, or the service is asked for nothing.
        """
        rows = tuple(_row(request, device) for device in request.devices)
        plans = [row.plan for row in rows if row.plan is not None]
        if not plans:
            raise ConfigError(next(row.refused for row in rows if row.refused is not None))
        choice, reason = None, None
        try:
            choice = choose(plans, request.max_hours)
        except HardwareError as error:
            reason = str(error)
        return cls(request, rows, choice, reason, tuple(_advice(request, plans, choice)))

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON.

        ``layout`` (1), ``model``, ``shape`` (fields of :class:`EncoderShape` and ``parameters``),
        ``config`` (of :class:`TrainingConfig`), ``workload``, ``served`` (``runtime``,
        ``precision``, ``items``, ``history``, ``candidates``, ``texts``), ``max_hours``,
        ``choice`` (a device's name or null), ``reason`` (why there is none, or null), ``advice``
        (``device``, ``change``, ``values`` by dotted configuration key, ``memory_bytes``),
        ``devices``: for each ``name``, ``label``, ``memory_bytes``, ``host_memory_bytes``,
        ``price`` (``usd_per_hour``, ``date``, ``source``), ``fits``, ``shortage`` (a sentence or
        null), ``refused`` (a sentence or null), ``factors`` (``measured``, ``source``),
        ``training`` (:meth:`TrainingPlan.as_dict`, or null where it was refused) and ``serving``
        (:meth:`InferencePlan.as_dict`).
        """
        request = self.request
        return {
            "layout": _LAYOUT,
            "model": request.model,
            "shape": {**asdict(request.shape), "parameters": request.shape.parameters},
            "config": asdict(request.config),
            "workload": request.workload.as_dict(),
            "served": {
                "runtime": request.served.runtime,
                "precision": request.served.precision,
                "items": request.asked.items,
                "history": request.asked.history,
                "candidates": request.asked.candidates,
                "texts": request.asked.texts,
            },
            "max_hours": request.max_hours,
            "choice": self.choice.device.name if self.choice else None,
            "reason": self.reason,
            "advice": [
                {
                    "device": each.device,
                    "change": each.change,
                    "values": dict(each.values),
                    "memory_bytes": each.memory,
                }
                for each in self.advice
            ],
            "devices": [_row_as_dict(row) for row in self.rows],
        }

    def print(self, console: Console | None = None) -> None:
        """Print it for people: at most as wide as the terminal, 80 columns into a pipe."""
        if console is None:
            console = Console()
            if not console.is_terminal:
                console.width = _PIPED_WIDTH
        for part in self._rendered():
            console.print(part, highlight=False)

    def _rendered(self) -> Iterator[Table | Text]:
        request, shape = self.request, self.request.shape
        tuning, schedule = request.config.tuning, request.config.schedule
        yield Text(
            f"{request.model}: {shape.parameters / 1e6:,.1f} M parameters, "
            f"{shape.layers} layers of {shape.width}. Strategy {tuning.strategy}, "
            f"{schedule.encoder_batch_size} clicks a step, {request.workload.clicks:,} an epoch, "
            f"{schedule.head_epochs} + {schedule.encoder_epochs} epochs."
        )
        asked = request.asked
        yield Text(
            f"Served in {request.served.precision}: {asked.candidates} candidates and "
            f"{asked.texts:g} new texts a recommendation."
        )
        yield self._devices()
        yield from self._parts()
        yield from self._conclusions()

    def _devices(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("Device", no_wrap=True)
        table.add_column("Fits", no_wrap=True)
        for name in ("GiB needed", "1 M clicks", "Run", "$ a run", "$ 1 M rec."):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            plan, size = row.plan, row.device.memory_bytes / GIB
            served = _usd(row.serving.usd_per_million) if row.serving.fits else "no room"
            if plan is None:
                table.add_row(row.device.name, "no", f"- of {size:.0f}", "", "", "", served)
                continue
            chosen = self.choice is not None and plan.device.name == self.choice.device.name
            table.add_row(
                Text(row.device.name, style="bold" if chosen else ""),
                "yes" if plan.fits else "no",
                f"{plan.memory.total / GIB:.1f} of {size:.0f}",
                duration(plan.seconds_per_million_clicks),
                duration(plan.seconds),
                _usd(plan.usd),
                served,
                style="" if plan.fits else "dim",
            )
        return table

    def _parts(self) -> Iterator[Table]:
        """Memory by part; devices that hold the same share a column."""
        columns: dict[tuple[tuple[str, int], ...], list[str]] = {}
        for row in self.rows:
            if row.plan is not None:
                columns.setdefault(tuple(row.plan.memory.parts.items()), []).append(row.device.name)
        groups = list(columns.items())
        for start in range(0, len(groups), _COLUMNS_OF_PARTS):
            some = groups[start : start + _COLUMNS_OF_PARTS]
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
            table.add_column("GiB of")
            for _, names in some:
                table.add_column(Text(", ".join(names)), justify="right", max_width=26)
            for part in dict.fromkeys(name for parts, _ in some for name, _ in parts):
                sizes = [dict(parts).get(part) for parts, _ in some]
                table.add_row(part, *("" if size is None else _gib(size) for size in sizes))
            yield table

    def _conclusions(self) -> Iterator[Text]:
        if self.choice is not None:
            limit = self.request.max_hours
            within = "" if limit is None else f" within {limit:g} h"
            yield Text(
                f"Choice: {self.choice.device.name}, the cheapest that fits{within}: "
                f"${self.choice.usd:.3f} and {duration(self.choice.seconds)} a run."
            )
        else:
            yield Text(f"No choice: {self.reason}.")
        yield from self._shortages()
        if not any(row.fits for row in self.rows) and not self.advice:
            yield Text("No change of its configuration makes it fit: take a smaller base model.")
        for name in dict.fromkeys(each.device for each in self.advice):
            yield Text(f"It would fit {name} with one of:")
            for each in self.advice:
                if each.device == name:
                    yield Text(f"  {each.change}  ({gib(each.memory)})")
        for measured, said in ((True, "measured on such devices"), (False, "assumed")):
            names = [r.device.name for r in self.rows if r.calibration.is_measured == measured]
            if names:
                yield Text(f"Training factors {said}: {', '.join(names)}.")
        dates = sorted(row.device.price.date for row in self.rows)
        span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        yield Text(f"Prices of {span}; --json says where from, --catalogue FILE puts in yours.")

    def _shortages(self) -> Iterator[Text]:
        """Which part is the largest where a training does not fit, and where it cannot run."""
        largest: dict[str, list[str]] = {}
        for row in self.rows:
            plan = row.plan
            if plan is None:
                yield Text(f"Not on {row.device.name}: {row.refused}.")
            elif not plan.memory.fits(row.device.memory_bytes):
                largest.setdefault(plan.memory.largest, []).append(row.device.name)
            elif not plan.fits:
                part = f"{plan.host_memory.largest} in the host's memory"
                largest.setdefault(part, []).append(row.device.name)
        for part, names in largest.items():
            yield Text(f"Too large for {', '.join(names)}; most of it: {part}.")


def duration(seconds: float) -> str:
    """Seconds for people: ``42 s``, ``7.5 min``, ``3.2 h``, ``4.1 d``."""
    for size, unit in ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _row(request: PlanRequest, device: Device) -> Row:
    calibration = request.calibration_of(device)
    # Serving has factors of its own; a measured machine only moves them.
    measured = calibration if calibration is request.calibration else None
    serving = plan_inference(request.served, request.asked, device, measured)
    try:
        plan = plan_training(request.shape, request.config, request.workload, device, calibration)
    except ConfigError as error:
        return Row(device, None, str(error), calibration, serving)
    return Row(device, plan, None, calibration, serving)


def _advice(
    request: PlanRequest, plans: Iterable[TrainingPlan], choice: TrainingPlan | None
) -> Iterator[Advice]:
    """For the devices that come nearest, among those that would cost less than the choice."""
    unfit = [plan for plan in plans if not plan.fits]
    if choice is not None:
        unfit = [plan for plan in unfit if plan.usd < choice.usd]
    for plan in sorted(unfit, key=excess)[:_ADVISED_DEVICES]:
        yield from advise(
            request.shape,
            request.config,
            request.workload,
            plan.device,
            request.calibration_of(plan.device),
        )


def _row_as_dict(row: Row) -> dict[str, Any]:
    device, plan = row.device, row.plan
    return {
        "name": device.name,
        "label": device.label,
        "memory_bytes": device.memory_bytes,
        "host_memory_bytes": device.host_memory_bytes,
        "price": asdict(device.price),
        "fits": row.fits,
        "shortage": None if plan is None else shortage(plan),
        "refused": row.refused,
        "factors": {"measured": row.calibration.is_measured, "source": row.calibration.source},
        "training": None if plan is None else plan.as_dict(),
        "serving": row.serving.as_dict(),
    }


def _usd(amount: float) -> str:
    return f"{amount:.3f}" if amount < 1 else f"{amount:.2f}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def parse_change(text: str) -> tuple[str, Any]:
    """Key and value of ``key=value``; the value is JSON where it can be read as such."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError.of("set", text, "key=value, e.g. tuning.rank=8")
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        return key.strip(), value.strip()

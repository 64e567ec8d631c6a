"""Backtests from the command line: which logs, how they are trained on, and where results go.

Simulated logs are stated here, drifts and all. The trigger's values are the production's defaults;
they were chosen on other seeds than those that are reported (see docs/adr/0018).
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from recflow.core.artifacts import library_versions, write_text_atomically
from recflow.core.errors import ConfigError
from recflow.data.sources import open_source
from recflow.data.sources.simulation import ColdUsers, SimulationConfig, TopicSurge
from recflow.data.split import SplitConfig
from recflow.demo import fetch_base_model, home_of, simulate_logs
from recflow.hardware.machine import this_machine
from recflow.hardware.plan_table import parse_change
from recflow.modeling.config import TrainingConfig, with_values
from recflow.quality.trigger import TriggerPolicy

if TYPE_CHECKING:
    from recflow.adapters.backtest import Log
    from recflow.evaluation.backtest import Backtest
    from recflow.evaluation.report.backtest import BacktestContext

QUICK: Final[Mapping[str, object]] = {
    "tuning.strategy": "frozen",
    "schedule.head_epochs": 4,
    "schedule.max_impressions_per_epoch": 6_000,
    "threads": 1,
}
"""How a backtest trains unless told otherwise: the encoder stays as it is, its hidden states are
kept between trainings, and the user model learns for a few epochs; seconds a training."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A simulated log.

    Attributes:
        description: What happens in it, a sentence.
        config: How it is simulated.
    """

    description: str
    config: SimulationConfig

    @property
    def events(self) -> dict[date, str]:
        """What drifts on which day; what holds from the first day on is no event."""
        found: dict[int, list[str]] = {}
        config = self.config
        if (surge := config.topic_surge) is not None:
            found.setdefault(surge.day, []).append(f"{surge.topic} ×{surge.factor:g}")
        if (words := config.vocabulary_shift) is not None:
            found.setdefault(words.day, []).append(f"new words in {words.share:.0%}")
        if (rate := config.click_rate_shift) is not None:
            found.setdefault(rate.day, []).append(f"click odds ×{rate.factor:g}")
        if (cold := config.cold_users) is not None:
            found.setdefault(cold.day, []).append(f"{cold.share:.0%} new users")
        return {
            config.start + timedelta(days=day): ", ".join(events)
            for day, events in sorted(found.items())
            if day > 0
        }


def _calm(**changes: object) -> SimulationConfig:
    # Most visitors of a news site are seen once: what is wanted now is then not in their history,
    # only a model can know it.
    calm = SimulationConfig(
        seed=29, days=30, impressions=30_000, users=8_000, cold_users=ColdUsers(day=0, share=0.6)
    )
    return dataclasses.replace(calm, **changes)  # pyright: ignore[reportArgumentType]


SCENARIOS: Final[Mapping[str, Scenario]] = {
    "drift": Scenario(
        "A simulated news log in which from the tenth day on one topic is published and clicked "
        "far more: the odds that an item is about sports, and is clicked then, grow eightfold.",
        _calm(topic_surge=TopicSurge(day=9, topic="sports", factor=8.0)),
    ),
    "calm": Scenario(
        "The same simulated news log without any drift: there is nothing to gain by retraining.",
        _calm(),
    ),
}
"""The simulated logs that ``make backtest`` walks, by name."""


@dataclass(frozen=True, slots=True)
class BacktestOptions:
    """How a log is walked.

    Attributes:
        split: How snapshots are cut.
        training: How models are trained.
        trigger: When drift is reason enough to retrain.
        days: Most days of the log that are used; ``None`` for all.
        base_model: Hugging Face directory of the encoder; ``None`` fetches MiniLM.
        bootstrap_samples: Resamples behind each interval.
        seed: Seed of what is drawn while judging.
    """

    split: SplitConfig = field(
        default_factory=lambda: SplitConfig(
            window_days=7, validation_days=1, test_days=1, max_history=50
        )
    )
    training: TrainingConfig = field(default_factory=lambda: with_values(TrainingConfig(), QUICK))
    trigger: TriggerPolicy = field(default_factory=TriggerPolicy)
    days: int | None = None
    base_model: Path | None = None
    bootstrap_samples: int = 1_000
    seed: int = 0


def options_of(
    *,
    window_days: int,
    validation_days: int,
    test_days: int,
    max_history: int,
    days: int | None,
    base_model: Path | None,
    trigger: Mapping[str, int],
    full: bool,
    changes: Sequence[str],
) -> BacktestOptions:
    """Options from plain values.

    Args:
        window_days: See :class:`SplitConfig`, as the next three.
        validation_days: Days for validation.
        test_days: Days for the gate.
        max_history: Clicks of a history kept.
        days: Most days of the log that are used; ``None`` for all.
        base_model: Hugging Face directory of the encoder; ``None`` fetches MiniLM.
        trigger: Values of :class:`TriggerPolicy` that differ from its defaults.
        full: Train as a deployment does, not quickly.
        changes: More values of :class:`TrainingConfig`, as ``key=value``.

    Raises:
        ConfigError: A value is impossible.
    """
    values = {} if full else dict(QUICK)
    return BacktestOptions(
        split=SplitConfig(
            window_days=window_days,
            validation_days=validation_days,
            test_days=test_days,
            max_history=max_history,
        ),
        training=with_values(
            TrainingConfig(), {**values, **dict(parse_change(text) for text in changes)}
        ),
        trigger=TriggerPolicy(**trigger),  # pyright: ignore[reportArgumentType]
        days=days,
        base_model=base_model,
    )


def run_backtests(
    data: str,
    directory: Path | None,
    *,
    scenarios: Sequence[str] | None,
    seed: int | None,
    options: BacktestOptions,
    work: Path | None,
    command: str,
    say: Callable[[str], None],
) -> tuple[Path, str]:
    """Walk the logs that are asked for and write the report.

    Args:
        data: Format of the logs, one of ``SOURCE_NAMES``.
        directory: Folder of the logs; ``None`` for simulated scenarios.
        scenarios: Names of :data:`SCENARIOS`; all where none are given.
        seed: Seed of the simulations; ``None`` for the scenarios' own.
        options: How logs are walked.
        work: Folder for everything that is made; ``None`` for one below the project's.
        command: The command that the report names.
        say: Receives lines for the user.

    Returns:
        The HTML page, and the tables for the terminal.

    Raises:
        ConfigError: A format without folder, an unknown scenario, or an impossible window.
    """
    began = time.monotonic()

    def tell(line: str) -> None:
        say(f"[{time.monotonic() - began:5.0f} s] {line}")

    work = work or home_of("backtest")
    results: list[Backtest] = []
    if directory is not None:
        place = work / data
        tell(f"{data}: preparing the days of the log")
        results.append(walk_log(read_log(data, directory, place, options), place, options, tell))
    elif data == "simulated":
        for name in scenarios or SCENARIOS:
            place = work / (name if seed is None else f"{name}-{seed}")
            tell(f"{name}: preparing the days of the log")
            log = simulated_log(name, place, seed, options)
            results.append(walk_log(log, place, options, tell))
    else:
        raise ConfigError.of("--dir", None, f"the folder of your logs in the format {data}")
    folder = work / "report" / (data if seed is None else f"{data}-{seed}")
    page = write_report(results, folder, command, options)
    return page, (folder / "backtest.txt").read_text(encoding="utf-8")


def simulated_log(name: str, work: Path, seed: int | None, options: BacktestOptions) -> Log:
    """Simulate a scenario's log, unless it is there, and prepare its days.

    Args:
        name: One of :data:`SCENARIOS`.
        work: Folder of this log alone.
        seed: Seed of the simulation; ``None`` for the scenario's.
        options: How it is going to be walked.

    Raises:
        ConfigError: There is no such scenario, or ``work`` holds another log.
    """
    if name not in SCENARIOS:
        raise ConfigError.of("scenario", name, ", ".join(SCENARIOS))
    scenario = SCENARIOS[name]
    config = scenario.config
    if seed is not None:
        config = dataclasses.replace(config, seed=seed)
    folder = work / "logs"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        simulate_logs(config, folder)
    written = SimulationConfig.from_json((folder / "simulation.json").read_text(encoding="utf-8"))
    if written != config:
        raise ConfigError(f"{folder} holds another simulated log than {name}; remove {work}")
    title = name if seed is None else f"{name} (seed {seed})"
    described = f"{scenario.description} {config.impressions:,} impressions in {config.days} days."
    return read_log("simulated", folder, work, options, title, described, scenario.events)


def read_log(
    data: str,
    directory: Path,
    work: Path,
    options: BacktestOptions,
    name: str = "",
    description: str = "",
    events: Mapping[date, str] | None = None,
) -> Log:
    """Prepare the days of a log that lies in a folder.

    Args:
        data: Format of the log, one of ``SOURCE_NAMES``.
        directory: The folder.
        work: Folder of this log alone, for everything that is made of it.
        options: How it is going to be walked.
        name: Name of the log in the report; the format if not given.
        description: What it is, a sentence.
        events: What happens in it on which day.

    Raises:
        SourceError: The log cannot be read.
    """
    from recflow.adapters.artifact_store import ArtifactStore
    from recflow.adapters.backtest import Log, prepare_days

    source = open_source(data, directory)
    store = ArtifactStore(work / "store")
    days = prepare_days(store, source, max_history=options.split.max_history)
    return Log(
        name or data, days[: options.days], description or f"A log in the format {data}.",
        events or {},
    )  # fmt: skip


def walk_log(
    log: Log, work: Path, options: BacktestOptions, say: Callable[[str], None]
) -> Backtest:
    """Walk a prepared log with every policy.

    Args:
        log: The log.
        work: Its folder: what is stored there is not made again.
        options: How it is walked.
        say: Receives lines for the user.
    """
    from recflow.adapters.artifact_store import ArtifactStore
    from recflow.adapters.backtest import (
        JudgeAsPromoted,
        MeasureDriftOfDays,
        StoredWorld,
        run_backtest,
    )
    from recflow.evaluation.backtest import Judging
    from recflow.evaluation.gate import GateConfig
    from recflow.quality.drift_config import DriftConfig

    store = ArtifactStore(work / "store")
    world = StoredWorld(
        store,
        split=options.split,
        config=options.training,
        base_model=options.base_model or fetch_base_model(),
        cache_directory=work / "cache",
        gate=JudgeAsPromoted(GateConfig(seed=options.seed)),
        tell=say,
    )
    judging = Judging(
        bootstrap_samples=options.bootstrap_samples,
        seed=options.seed,
        usd_per_hour=this_machine().price.usd_per_hour,
    )
    return run_backtest(
        log,
        world,
        window_days=options.split.window_days,
        measure=MeasureDriftOfDays(
            store,
            window_days=options.split.window_days,
            max_history=options.split.max_history,
            config=DriftConfig(seed=options.seed),
            threads=options.training.threads,
        ),
        trigger=options.trigger,
        judging=judging,
        tell=say,
    )


def write_report(
    results: Sequence[Backtest], folder: Path, command: str, options: BacktestOptions
) -> Path:
    """Write ``backtest.html``, ``backtest.json``, ``backtest.txt`` and a picture of each log.

    Returns:
        The HTML page.
    """
    from recflow.evaluation.backtest import METRICS
    from recflow.evaluation.report.backtest import (
        backtest_html,
        backtest_json,
        backtest_picture,
        backtest_table,
    )

    context = _context(command, options)
    table = "\n\n".join(backtest_table(result) for result in results)
    write_text_atomically(folder / "backtest.txt", table + "\n")
    write_text_atomically(folder / "backtest.json", backtest_json(results, context))
    write_text_atomically(folder / "backtest.html", backtest_html(results, context))
    for result in results:
        name = "".join(c if c.isalnum() else "_" for c in result.name).strip("_")
        for metric in METRICS:
            picture = folder / f"backtest_{name}_{metric.replace('@', '')}.png"
            draft = picture.with_name(f".{picture.name}.{uuid.uuid4().hex}.tmp")
            draft.write_bytes(backtest_picture(result, metric))
            draft.replace(picture)
    return folder / "backtest.html"


def _context(command: str, options: BacktestOptions) -> BacktestContext:
    from recflow.evaluation.report.backtest import BacktestContext

    machine, split, trigger = this_machine(), options.split, options.trigger
    price = machine.price
    return BacktestContext(
        title="When is it worth retraining?",
        command=command,
        machine=f"Trained on {machine.label} at {price.usd_per_hour:.3f} USD an hour "
        f"({price.source}, {price.date}).",
        protocol=(
            f"A snapshot reads {split.window_days} days: {split.validation_days} for validation "
            f"and {split.test_days} for the gate's comparison, the older ones for training "
            f"({options.training.tuning.strategy}, {options.training.schedule.head_epochs} epochs "
            "of the user model).",
            f"The policy drift retrains when {trigger.days_needed} of {trigger.days_looked_at} "
            f"days are beyond a limit{', or the champion ranks worse' * trigger.decay_at_once}, "
            f"then until a snapshot ends {trigger.settle_days} days after the drift began, with "
            f"{trigger.cooldown_days} days between snapshots: the trigger of the deployed sensor. "
            "Its values were not chosen on the logs reported here.",
            "The policy evenly_spaced trains as often as drift did, by the calendar; how often "
            "that is, it could not have known before.",
        ),
        versions=library_versions(),
    )

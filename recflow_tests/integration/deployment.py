"""A deployment of its own for a test: settings, Dagster instance, store, and the real commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from recflow.adapters.artifact_store import ArtifactStore
from recflow.settings import PROJECT_ROOT

SAMPLE = PROJECT_ROOT / "data" / "sample"
FIRST_DAY, LAST_DAY = date(2024, 1, 1), date(2024, 1, 14)
INGEST = "group:ingest or group:prepare or group:features"
TRAIN = "group:splits or group:models or group:evaluation or group:promotion"

# Enough to run every line, not enough to learn much.
QUICK: dict[str, Any] = {
    "models__fine_tuned": {
        "config": {
            "max_tokens": 32,
            "tuning": {"tuned_layers": 1},
            # A checkpoint after every step, so that a kill always finds one.
            "schedule": {"head_epochs": 1, "encoder_epochs": 1, "checkpoint_seconds": 0.0},
        }
    },
    # The tiny encoder has two layers.
    "models__distilled": {
        "config": {"layers": 1, "max_steps": 4, "click_steps": 2, "validations": 1}
    },
    "models__pruned": {"config": {"recovery_steps": 5}},
    "models__low_rank": {"config": {"recovery_steps": 2}},
    "models__sparse": {"config": {"recovery_steps": 2}},
    "evaluation__predictions": {"config": {"catalogue_sample": 50}},
    "evaluation__measurements": {"config": {"texts": 32}},
    "evaluation__report": {"config": {"bootstrap_samples": 100}},
    # It has not learned enough to beat a baseline beyond doubt.
    "promotion__gate": {"config": {"min_baseline_lead": -1.0, "bootstrap_samples": 100}},
}


@dataclass(frozen=True)
class Deployment:
    """A folder that everything is written below, and the environment that says so."""

    home: Path
    base_model: Path
    logs: Path = SAMPLE
    settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dagster_home.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(
            PROJECT_ROOT / "docker" / "dagster.yaml", self.dagster_home / "dagster.yaml"
        )

    @property
    def dagster_home(self) -> Path:
        return self.home / "dagster"

    @property
    def store(self) -> ArtifactStore:
        return ArtifactStore(self.home / "store")

    def environment(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RECFLOW_")}
        settings = {
            "SOURCE": "simulated",
            "SOURCE_DIR": str(self.logs),
            "HOME": str(self.home),
            "BASE_MODEL": str(self.base_model),
            "FIRST_DAY": str(FIRST_DAY),
            "LAST_DAY": str(LAST_DAY),
            "THREADS": "1",
            **self.settings,
        }
        return {
            **inherited,
            **{f"RECFLOW_{name}": value for name, value in settings.items()},
            "DAGSTER_HOME": str(self.dagster_home),
        }

    def command(
        self, select: str, partition: str, ops: Mapping[str, Any] | None = None
    ) -> list[str]:
        option = "--partition-range" if "..." in partition else "--partition"
        config = {
            "execution": {"config": {"in_process": {}}},
            "loggers": {"console": {}},
            "ops": dict(ops or {}),
        }
        return [
            *(sys.executable, "-m", "dagster", "asset", "materialize"),
            *("-m", "recflow.definitions", "--select", select, option, partition),
            *("--config-json", json.dumps(config)),
        ]

    def materialise(
        self, select: str, partition: str, ops: Mapping[str, Any] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(select, partition, ops),
            env=self.environment(),
            cwd=PROJECT_ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    def digests(self, *keys: str) -> dict[str, str]:
        return {key: self.store.get(key, str(LAST_DAY)).digest for key in keys}


def days() -> list[str]:
    span = (LAST_DAY - FIRST_DAY).days + 1
    return [str(FIRST_DAY + timedelta(days=offset)) for offset in range(span)]

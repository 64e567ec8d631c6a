"""A code location whose steps need what model assets need, and only wait."""

import os
import time
from pathlib import Path

import dagster as dg

from recflow.adapters.keys import FINE_TUNED, PREDICTIONS
from recflow.adapters.requirements import Need, requirements_of, run_tags
from recflow.compression.family import load_family
from recflow.hardware.catalogue import load_catalogue
from recflow.modeling.config import TrainingConfig

BASE_MODEL = "bert-base-uncased"
DEVICES = ("cpu-8", "l4")
# Environment variable: the file that ends the waiting of trainings.
RELEASE = "QUEUE_TEST_RELEASE"
LONGEST_WAIT = 240.0
CATALOGUE = load_catalogue()
NEEDS = requirements_of(
    BASE_MODEL,
    TrainingConfig(),
    load_family(),
    [CATALOGUE[name] for name in DEVICES],
    max_hours=8.0,
)


def _job(name: str, need: Need, *, waits: bool) -> dg.JobDefinition:
    @dg.op(name=f"{name}_step", tags=need.op_tags, pool=need.pool)
    def step() -> None:
        ends = time.monotonic() + LONGEST_WAIT
        while waits and not Path(os.environ[RELEASE]).exists():
            if time.monotonic() > ends:
                raise TimeoutError("nobody released the training")
            time.sleep(0.2)

    @dg.job(name=name, tags=run_tags([need]), executor_def=dg.in_process_executor)
    def job() -> None:
        step()

    return job


defs = dg.Definitions(
    jobs=[
        _job("training", NEEDS[FINE_TUNED], waits=True),
        _job("scoring", NEEDS[PREDICTIONS], waits=False),
    ]
)

"""A code location whose steps need what model assets need, and only wait."""

import time

import dagster as dg

from recflow.adapters.keys import FINE_TUNED, PREDICTIONS
from recflow.adapters.requirements import Need, requirements_of, run_tags
from recflow.compression.family import load_family
from recflow.hardware.catalogue import load_catalogue
from recflow.modeling.config import TrainingConfig

BASE_MODEL = "bert-base-uncased"
DEVICES = ("cpu-8", "l4")
SECONDS = 6.0
CATALOGUE = load_catalogue()
NEEDS = requirements_of(
    BASE_MODEL,
    TrainingConfig(),
    load_family(),
    [CATALOGUE[name] for name in DEVICES],
    max_hours=8.0,
)


def _waiting_job(name: str, need: Need) -> dg.JobDefinition:
    @dg.op(name=f"{name}_step", tags=need.op_tags, pool=need.pool)
    def wait() -> None:
        time.sleep(SECONDS)

    @dg.job(name=name, tags=run_tags([need]), executor_def=dg.in_process_executor)
    def job() -> None:
        wait()

    return job


defs = dg.Definitions(
    jobs=[_waiting_job("training", NEEDS[FINE_TUNED]), _waiting_job("scoring", NEEDS[PREDICTIONS])]
)

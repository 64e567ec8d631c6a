"""A small code location for the tests of recflow.defs.tracking, loaded by real processes.

``MLFLOW_URI`` says where to log, ``MODE`` what goes wrong in the asset ``third``.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import dagster as dg

from recflow.defs.tracking import (
    mlflow_resource,
    run_metadata,
    tracked_executor,
    tracker_of,
    tracking_sensors,
)


def mode() -> str:
    return os.environ.get("MODE", "")


def train(mlflow: Any, name: str) -> dg.MaterializeResult:
    with tracker_of(mlflow, prefix=f"{name}.") as tracker:
        tracker.log_params({"name": name, "optimiser": {"rate": 0.1}})
        for step in range(3):
            tracker.log_metrics({"loss": 1 / (step + 1)}, step)
    return dg.MaterializeResult(metadata=run_metadata(mlflow))


@dg.asset
def first(mlflow: dg.ResourceParam[Any]) -> dg.MaterializeResult:
    return train(mlflow, "first")


@dg.asset
def second(mlflow: dg.ResourceParam[Any]) -> dg.MaterializeResult:
    return train(mlflow, "second")


@dg.asset(deps=[first, second], retry_policy=dg.RetryPolicy(max_retries=1))
def third(context: dg.AssetExecutionContext, mlflow: dg.ResourceParam[Any]) -> dg.MaterializeResult:
    result = train(mlflow, "third")
    if mode() == "retry" and context.retry_number == 0:
        raise RuntimeError("fails once")
    if mode() == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode() == "wait":
        Path(os.environ["STARTED"]).touch()
        time.sleep(120)
    return result


@dg.asset_check(asset=third, blocking=True)
def is_good() -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=mode() != "bad")


@dg.asset(deps=[third])
def report() -> None:
    """Uses no MLflow, and comes last."""
    if mode() == "late":
        raise dg.Failure("fails last", allow_retries=False)


@dg.asset
def plain() -> None:
    """Uses no MLflow, and nothing that does."""


ASSETS = [first, second, third, is_good, report]
defs = dg.Definitions(
    assets=[first, second, third, report, plain],
    asset_checks=[is_good],
    jobs=[dg.define_asset_job("everything")],
    executor=tracked_executor,
    sensors=tracking_sensors,
    resources={
        "mlflow": mlflow_resource.configured(
            {"tracking_uri": {"env": "MLFLOW_URI"}, "experiment_name": "tests"}
        )
    },
)

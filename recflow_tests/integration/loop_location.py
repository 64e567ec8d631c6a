"""A code location with the real loop, in which only the training is a stand-in.

The sensor, the schedules, the jobs with their tags and the alerts are those of recflow, and look
more often than there. The job ``retrain`` makes one asset, whose step appends its day to a file,
and fails where another file is.
"""

import os
from pathlib import Path

import dagster as dg

from recflow.adapters.keys import DRIFT, REPORT
from recflow.core.errors import ArtifactError
from recflow.defs.console import console_logger
from recflow.defs.jobs import full_job, monitor_job, retrain_job
from recflow.defs.monitoring.alerts import alert_sensors, configured_webhook
from recflow.defs.monitoring.sensors import drift_sensor
from recflow.defs.partitions import DAILY
from recflow.defs.resources import settings
from recflow.defs.schedules import SCHEDULES

# Environment variables: files that are written to, and whose presence makes the training fail.
TRAINED, FAILS = "LOOP_TEST_TRAINED", "LOOP_TEST_FAILS"


@dg.asset(key=DRIFT.split("/"), group_name="monitoring", partitions_def=DAILY)
def drift() -> None: ...


@dg.asset(key=REPORT.split("/"), group_name="evaluation", partitions_def=DAILY)
def report(context: dg.AssetExecutionContext) -> None:
    """Train, in the time that it takes to write a line."""
    with Path(os.environ[TRAINED]).open("a") as file:
        file.write(f"{context.partition_key}\n")
    if Path(os.environ[FAILS]).exists():
        raise ArtifactError(f"the logs of {context.partition_key} are <gone> & no more")


@dg.asset_check(asset=report)
def is_better() -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        passed=False, severity=dg.AssetCheckSeverity.WARN, description="not by much"
    )


defs = dg.Definitions(
    assets=[drift, report],
    asset_checks=[is_better],
    jobs=[full_job, monitor_job, retrain_job],
    schedules=SCHEDULES,
    sensors=[
        drift_sensor(every=1),
        *alert_sensors(configured_webhook(), settings.web_url, every=1),
    ],
    loggers={"console": console_logger},
    executor=dg.in_process_executor,
)

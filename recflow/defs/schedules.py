"""The daily schedules: all of it for the newest complete day, or only a look at it."""

from datetime import date

import dagster as dg

from recflow.defs.jobs import TRAIN_TAGS, full_job, monitor_job
from recflow.defs.monitoring.training_runs import SNAPSHOT_TAG, TRIGGER_TAG, find_training
from recflow.defs.partitions import DAILY, newest_complete_day
from recflow.defs.resources import settings

_CRON = f"{settings.nightly_minute} {settings.nightly_hour} * * *"


@dg.schedule(
    name="nightly",
    job=full_job,
    cron_schedule=_CRON,
    execution_timezone=settings.timezone,
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="Retrains on the newest complete day (UTC), whether or not anything drifted. Off "
    "until switched on: here, or by `recflow loop on --nightly`.",
)
def nightly_schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    """Request one run for the newest complete day, unless somebody else trains it."""
    day = newest_complete_day(DAILY, context.scheduled_execution_time)
    if day is None:
        return dg.SkipReason(f"no complete day since {settings.first_day}")
    if training := find_training(context.instance, date.fromisoformat(day)):
        return dg.SkipReason(str(training))
    # The key is the day: a tick that is repeated does not train the same snapshot again.
    return dg.RunRequest(
        run_key=day,
        partition_key=day,
        tags={**TRAIN_TAGS, TRIGGER_TAG: "nightly", SNAPSHOT_TAG: day},
    )


@dg.schedule(
    name="monitor_daily",
    job=monitor_job,
    cron_schedule=_CRON,
    execution_timezone=settings.timezone,
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="Ingests the newest complete day (UTC) and looks how far it drifted, which the "
    "sensor retrain_on_drift decides by. Off until switched on: here, or by `recflow loop on`.",
)
def monitor_schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    """Request one run for the newest complete day."""
    day = newest_complete_day(DAILY, context.scheduled_execution_time)
    if day is None:
        return dg.SkipReason(f"no complete day since {settings.first_day}")
    # The tag keeps it from writing the tables of a day beside a training that ingests the same.
    return dg.RunRequest(run_key=day, partition_key=day, tags={SNAPSHOT_TAG: day})


SCHEDULES = [nightly_schedule, monitor_schedule]

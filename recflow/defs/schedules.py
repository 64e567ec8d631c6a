"""The nightly schedule: everything for the newest complete day."""

import dagster as dg

from recflow.defs.jobs import TRAIN_TAGS, full_job
from recflow.defs.partitions import DAILY, newest_complete_day
from recflow.defs.resources import settings


@dg.schedule(
    name="nightly",
    job=full_job,
    cron_schedule=f"{settings.nightly_minute} {settings.nightly_hour} * * *",
    execution_timezone=settings.timezone,
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="Retrains on the newest complete day (UTC); off until switched on.",
)
def nightly_schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    """Request one run for the newest complete day."""
    day = newest_complete_day(DAILY, context.scheduled_execution_time)
    if day is None:
        return dg.SkipReason(f"no complete day since {settings.first_day}")
    # The key is the day: a tick that is repeated does not train the same snapshot again.
    return dg.RunRequest(run_key=day, partition_key=day, tags=TRAIN_TAGS)


SCHEDULES = [nightly_schedule]

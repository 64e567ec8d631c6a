"""Days and windows: every asset is partitioned by the UTC day of the logs."""

from datetime import date, datetime, timedelta

import dagster as dg

from recflow.defs.resources import settings


def daily_partitions(first_day: date, last_day: date | None) -> dg.DailyPartitionsDefinition:
    """Return one partition a UTC day, from ``first_day`` up to and including ``last_day``.

    Without ``last_day`` the newest partition is the newest complete day.
    """
    # Dagster's end date is exclusive.
    end = (last_day + timedelta(days=1)).isoformat() if last_day else None
    return dg.DailyPartitionsDefinition(start_date=first_day.isoformat(), end_date=end)


def newest_complete_day(days: dg.DailyPartitionsDefinition, now: datetime) -> str | None:
    """Return the partition of the newest UTC day that had ended at ``now``, if any."""
    keys = days.get_partition_keys(current_time=now)
    return keys[-1] if keys else None


def window_mapping(days: int) -> dg.TimeWindowPartitionMapping:
    """Map a snapshot day to the window of ``days`` days that ends with it.

    Days before the first partition are allowed: they count as missing.
    """
    return dg.TimeWindowPartitionMapping(
        start_offset=-(days - 1), end_offset=0, allow_nonexistent_upstream_partitions=True
    )


DAILY = daily_partitions(settings.first_day, settings.last_day)
WINDOW = window_mapping(settings.window_days)
# For what reads the newest of earlier days; the lineage shows a year of them.
EARLIER = window_mapping(365)
ONE_RUN = dg.BackfillPolicy.single_run()

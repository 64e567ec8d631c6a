"""Dagster glue, one folder a stage."""

import warnings

import dagster as dg

# Both are used on purpose: one run a backfill, and windows that begin before the first day.
for _parameter in ("backfill_policy", "allow_nonexistent_upstream_partitions"):
    warnings.filterwarnings("ignore", message=f"Parameter `{_parameter}`", category=dg.BetaWarning)

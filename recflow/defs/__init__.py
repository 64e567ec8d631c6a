"""Dagster glue, one folder a stage."""

import warnings

import dagster as dg

# Used on purpose: one run a backfill, windows that begin before the first day, selection by group.
for _parameter in ("backfill_policy", "allow_nonexistent_upstream_partitions", "include_sources"):
    warnings.filterwarnings("ignore", message=f"Parameter `{_parameter}`", category=dg.BetaWarning)
# A range of these jobs is one run a day: what the policy with the fewest days a run asks for.
for _job in ("full", "monitor"):
    warnings.filterwarnings(
        "ignore", message=f"Asset job {_job} materializes assets with varying BackfillPolicies"
    )

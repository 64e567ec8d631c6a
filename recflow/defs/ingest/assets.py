"""Raw logs into daily tables, every row kept or quarantined."""

import dagster as dg

from recflow.adapters.keys import RAW_IMPRESSIONS, RAW_ITEMS
from recflow.adapters.parquet_io import ingest_impressions, ingest_items
from recflow.core.columns import IMPRESSIONS, ITEMS
from recflow.defs.common import (
    OWNERS,
    Rebuild,
    code_version_of,
    daily_asset,
    days_result,
)
from recflow.defs.partitions import ONE_RUN
from recflow.defs.resources import LogsResource, StoreResource

GROUP = "ingest"

logs_spec = dg.AssetSpec(
    ["source", "logs"],
    group_name=GROUP,
    owners=OWNERS,
    kinds={"file"},
    description="The folder of raw logs that the site writes: who was shown what, and clicked.",
)
catalogue_spec = dg.AssetSpec(
    ["source", "catalogue"],
    group_name=GROUP,
    owners=OWNERS,
    kinds={"file"},
    description="The folder's catalogue: the text of everything that can be recommended.",
)


@daily_asset(
    RAW_IMPRESSIONS,
    group=GROUP,
    kinds={"polars", "parquet"},
    contract=IMPRESSIONS,
    deps=[logs_spec],
    backfill_policy=ONE_RUN,
    code_version="1",
    description="A day of impressions as logged; lines that are no impression go to quarantine.",
)
def raw_impressions(
    context: dg.AssetExecutionContext, config: Rebuild, logs: LogsResource, store: StoreResource
) -> dg.MaterializeResult:
    """Read the day's impressions from the logs."""
    built = ingest_impressions(
        store.open(),
        RAW_IMPRESSIONS,
        logs.open(),
        context.partition_keys,
        code_version=code_version_of(context),
        rebuild=config.rebuild,
    )
    return days_result(context, built)


@daily_asset(
    RAW_ITEMS,
    group=GROUP,
    kinds={"polars", "parquet"},
    contract=ITEMS,
    deps=[catalogue_spec],
    backfill_policy=ONE_RUN,
    code_version="1",
    description="The catalogue as exported on that day.",
)
def raw_items(
    context: dg.AssetExecutionContext, config: Rebuild, logs: LogsResource, store: StoreResource
) -> dg.MaterializeResult:
    """Read the catalogue."""
    built = ingest_items(
        store.open(),
        RAW_ITEMS,
        logs.open(),
        context.partition_keys,
        code_version=code_version_of(context),
        rebuild=config.rebuild,
    )
    return days_result(context, built)

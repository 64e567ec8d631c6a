"""Cleaned tables: what can be used, and everything else with its reason."""

from collections.abc import Mapping, Sequence

import dagster as dg
import polars as pl

from recflow.adapters.keys import CLEANED_IMPRESSIONS, CLEANED_ITEMS, RAW_IMPRESSIONS, RAW_ITEMS
from recflow.adapters.parquet_io import QUARANTINED, Table, build_days, read_frame, total_counts
from recflow.core.artifacts import Artifact
from recflow.core.columns import IMPRESSIONS, ITEMS, Columns
from recflow.data.clean import Cleaned, clean_impressions, clean_items
from recflow.defs.common import (
    Rebuild,
    code_version_of,
    counts_table,
    daily_asset,
    days_result,
    keys_of,
)
from recflow.defs.partitions import ONE_RUN
from recflow.defs.resources import StoreResource, settings

GROUP = "prepare"
ROWS_ADD_UP = "rows_add_up"


@daily_asset(
    CLEANED_ITEMS,
    group=GROUP,
    kinds={"polars", "parquet"},
    contract=ITEMS,
    deps=keys_of([RAW_ITEMS]),
    backfill_policy=ONE_RUN,
    code_version="1",
    description="The catalogue without duplicated ids and items that have no text.",
)
def cleaned_items(
    context: dg.AssetExecutionContext, config: Rebuild, store: StoreResource
) -> dg.MaterializeResult:
    """Clean the catalogue."""
    built = build_days(
        store.open(),
        CLEANED_ITEMS,
        context.partition_keys,
        lambda inputs: _table(inputs[RAW_ITEMS], clean_items(read_frame(inputs[RAW_ITEMS]))),
        parents=[RAW_ITEMS],
        code_version=code_version_of(context),
        config={},
        rebuild=config.rebuild,
    )
    return days_result(context, built)


@daily_asset(
    CLEANED_IMPRESSIONS,
    group=GROUP,
    kinds={"polars", "parquet"},
    contract=IMPRESSIONS,
    deps=keys_of([RAW_IMPRESSIONS, CLEANED_ITEMS]),
    backfill_policy=ONE_RUN,
    code_version="1",
    description="Impressions whose every item is known; the rest is in quarantine with its reason.",
)
def cleaned_impressions(
    context: dg.AssetExecutionContext, config: Rebuild, store: StoreResource
) -> dg.MaterializeResult:
    """Clean the day's impressions."""

    def clean(inputs: Mapping[str, Artifact]) -> Table:
        items = read_frame(inputs[CLEANED_ITEMS])[Columns.ITEM_ID]
        raw = read_frame(inputs[RAW_IMPRESSIONS])
        cleaned = clean_impressions(raw, items, max_history=settings.max_history)
        return _table(inputs[RAW_IMPRESSIONS], cleaned)

    built = build_days(
        store.open(),
        CLEANED_IMPRESSIONS,
        context.partition_keys,
        clean,
        parents=[RAW_IMPRESSIONS, CLEANED_ITEMS],
        code_version=code_version_of(context),
        config={"max_history": settings.max_history},
        rebuild=config.rebuild,
    )
    return days_result(context, built)


def _rows_add_up(
    store: StoreResource, days: Sequence[str], raw: str, cleaned: str
) -> dg.AssetCheckResult:
    """Compare what was read with what was kept and quarantined, over the stored days."""
    before = store.open().existing(raw, days)
    after = store.open().existing(cleaned, days)
    read = {day: _rows_and_quarantined(artifact) for day, artifact in before.items()}
    accounted = {day: _rows_and_quarantined(artifact) for day, artifact in after.items()}
    lost = {day: rows - accounted.get(day, 0) for day, rows in read.items()}
    lost = {day: rows for day, rows in lost.items() if rows}
    reasons = total_counts(after.values(), "quarantined_by_reason")
    return dg.AssetCheckResult(
        passed=not lost,
        description=(
            f"rows lost or invented by day: {lost}"
            if lost
            else "rows read = rows kept + rows quarantined, every day"
        ),
        metadata={
            "rows_read": sum(read.values()),
            "rows_kept": sum(read_frame(a).height for a in after.values()),
            "rows_quarantined": sum(reasons.values()),
            "quarantined_by_reason": counts_table("reason", reasons),
        },
    )


@dg.asset_check(
    asset=CLEANED_ITEMS.split("/"),
    name=ROWS_ADD_UP,
    blocking=True,
    description="Every catalogue row read is kept or in quarantine.",
)
def item_rows_add_up(
    context: dg.AssetCheckExecutionContext, store: StoreResource
) -> dg.AssetCheckResult:
    """Check that no catalogue row was lost."""
    return _rows_add_up(store, context.partition_keys, RAW_ITEMS, CLEANED_ITEMS)


@dg.asset_check(
    asset=CLEANED_IMPRESSIONS.split("/"),
    name=ROWS_ADD_UP,
    blocking=True,
    description="Every log line read is kept or in quarantine.",
)
def impression_rows_add_up(
    context: dg.AssetCheckExecutionContext, store: StoreResource
) -> dg.AssetCheckResult:
    """Check that no impression was lost."""
    return _rows_add_up(store, context.partition_keys, RAW_IMPRESSIONS, CLEANED_IMPRESSIONS)


def _rows_and_quarantined(artifact: Artifact) -> int:
    """Count what is stored, not what was reported."""
    return read_frame(artifact).height + read_frame(artifact, QUARANTINED).height


def _table(raw: Artifact, cleaned: Cleaned) -> Table:
    """Keep the reader's quarantine with the cleaning's: one table of all that was set aside."""
    return Table(
        cleaned.rows,
        pl.concat([read_frame(raw, QUARANTINED), cleaned.quarantine]),
        cleaned.counts,
    )

"""Features of items and impressions, validated before anything learns from them."""

import json
from collections.abc import Sequence

import dagster as dg

from recflow.adapters.keys import (
    CLEANED_IMPRESSIONS,
    CLEANED_ITEMS,
    FEATURES_IMPRESSIONS,
    FEATURES_ITEMS,
)
from recflow.adapters.parquet_io import Table, build_days, read_frame
from recflow.core.artifacts import Artifact
from recflow.core.columns import IMPRESSION_FEATURES, ITEM_FEATURES, TableContract
from recflow.data.features import impression_features, item_features
from recflow.defs.common import (
    Rebuild,
    code_version_of,
    daily_asset,
    days_result,
    keys_of,
    link_to,
)
from recflow.defs.partitions import ONE_RUN
from recflow.defs.resources import StoreResource

GROUP = "features"
MEETS_CONTRACT = "meets_contract"


@daily_asset(
    FEATURES_ITEMS,
    group=GROUP,
    kinds={"polars", "parquet"},
    contract=ITEM_FEATURES,
    deps=keys_of([CLEANED_ITEMS]),
    backfill_policy=ONE_RUN,
    code_version="1",
    description="Items as the encoder reads them: one text, category, lengths.",
)
def features_items(
    context: dg.AssetExecutionContext, config: Rebuild, store: StoreResource
) -> dg.MaterializeResult:
    """Compute the features of items."""
    built = build_days(
        store.open(),
        FEATURES_ITEMS,
        context.partition_keys,
        lambda inputs: Table(item_features(read_frame(inputs[CLEANED_ITEMS]))),
        parents=[CLEANED_ITEMS],
        code_version=code_version_of(context),
        config={},
        rebuild=config.rebuild,
    )
    return days_result(context, built)


@daily_asset(
    FEATURES_IMPRESSIONS,
    group=GROUP,
    kinds={"polars", "parquet"},
    contract=IMPRESSION_FEATURES,
    deps=keys_of([CLEANED_IMPRESSIONS]),
    backfill_policy=ONE_RUN,
    code_version="1",
    description="Impressions with what the row alone tells; nothing is fitted here.",
)
def features_impressions(
    context: dg.AssetExecutionContext, config: Rebuild, store: StoreResource
) -> dg.MaterializeResult:
    """Compute the features of the day's impressions."""
    built = build_days(
        store.open(),
        FEATURES_IMPRESSIONS,
        context.partition_keys,
        lambda inputs: Table(impression_features(read_frame(inputs[CLEANED_IMPRESSIONS]))),
        parents=[CLEANED_IMPRESSIONS],
        code_version=code_version_of(context),
        config={},
        rebuild=config.rebuild,
    )
    return days_result(context, built)


@dg.asset_check(
    asset=FEATURES_ITEMS.split("/"),
    name=MEETS_CONTRACT,
    blocking=True,
    description="Great Expectations suite made from the contract of item features.",
)
def item_features_meet_contract(
    context: dg.AssetCheckExecutionContext, store: StoreResource
) -> dg.AssetCheckResult:
    """Validate the features of items."""
    return _validate(store, FEATURES_ITEMS, ITEM_FEATURES, context.partition_keys)


@dg.asset_check(
    asset=FEATURES_IMPRESSIONS.split("/"),
    name=MEETS_CONTRACT,
    blocking=True,
    description="Great Expectations suite made from the contract of impression features.",
)
def impression_features_meet_contract(
    context: dg.AssetCheckExecutionContext, store: StoreResource
) -> dg.AssetCheckResult:
    """Validate the features of the day's impressions."""
    return _validate(store, FEATURES_IMPRESSIONS, IMPRESSION_FEATURES, context.partition_keys)


def _validate(
    store: StoreResource, key: str, contract: TableContract, days: Sequence[str]
) -> dg.AssetCheckResult:
    from recflow.adapters.validations import SUMMARY, validate_days

    validations = validate_days(store.open(), key, contract, days)
    failed = {day: v for day, v in validations.items() if not v.facts["success"]}
    shown = failed or validations
    return dg.AssetCheckResult(
        passed=bool(validations) and not failed,
        description=(
            "; ".join(f"{day}: {v.facts['failed']}" for day, v in failed.items())
            if failed
            else f"{len(validations)} days meet the contract"
        ),
        metadata={
            "days_validated": len(validations),
            "days_failed": len(failed),
            "failed_expectations": dg.MetadataValue.json(
                {day: _failures(validation) for day, validation in failed.items()}
            ),
            **{f"summary_{day}": link_to(v.file(SUMMARY)) for day, v in list(shown.items())[-3:]},
        },
    )


def _failures(validation: Artifact) -> list[dict[str, object]]:
    """The failed expectations with their counts and examples, as stored."""
    content = json.loads(validation.file("validation.json").read_text(encoding="utf-8"))
    return [entry for entry in content["expectations"] if not entry["success"]]

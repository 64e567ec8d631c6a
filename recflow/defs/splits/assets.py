"""Training snapshots: the window of days that ends with the partition's day, split by time."""

from collections.abc import Iterator

import dagster as dg

from recflow.adapters.keys import (
    FEATURES_IMPRESSIONS,
    FEATURES_ITEMS,
    ITEMS,
    TEST,
    TRAIN,
    VALIDATION,
)
from recflow.core.columns import ITEM_FEATURES, SPLIT_IMPRESSIONS
from recflow.data.split import (
    SplitConfig,
    features_are_point_in_time,
    no_impression_in_two_splits,
    train_precedes_validation,
    window_keys,
)
from recflow.defs.common import (
    OWNERS,
    Rebuild,
    artifact_result,
    claim_result,
    code_version_of,
    table_metadata,
)
from recflow.defs.partitions import DAILY, WINDOW
from recflow.defs.resources import StoreResource, settings

GROUP = "splits"
CLAIMS = (train_precedes_validation, no_impression_in_two_splits, features_are_point_in_time)
SPLIT_CONFIG = SplitConfig(
    window_days=settings.window_days,
    validation_days=settings.validation_days,
    test_days=settings.test_days,
    max_history=settings.max_history,
)
_DESCRIPTIONS = {
    TRAIN: "The older days of the window: what models are fitted on.",
    VALIDATION: "The days after train: early stopping, calibration and every choice.",
    TEST: "The newest days: looked at by the report alone.",
    ITEMS: "The catalogue of the window, the newest row of each item.",
}


def _spec(key: str) -> dg.AssetSpec:
    return dg.AssetSpec(
        key.split("/"),
        deps=[
            dg.AssetDep(source.split("/"), partition_mapping=WINDOW)
            for source in (FEATURES_IMPRESSIONS, FEATURES_ITEMS)
        ],
        partitions_def=DAILY,
        group_name=GROUP,
        owners=OWNERS,
        kinds={"polars", "parquet"},
        tags={"recflow/stage": "splits"},
        metadata=table_metadata(ITEM_FEATURES if key == ITEMS else SPLIT_IMPRESSIONS),
        code_version="1",
        description=_DESCRIPTIONS[key],
    )


@dg.multi_asset(specs=[_spec(key) for key in _DESCRIPTIONS], name="splits")
def splits(
    context: dg.AssetExecutionContext, config: Rebuild, store: StoreResource
) -> Iterator[dg.MaterializeResult]:
    """Split the window by time."""
    from recflow.adapters.snapshots import build_snapshot

    built = build_snapshot(
        store.open(),
        context.partition_key,
        window=window_keys(context.partition_key, settings.window_days),
        config=SPLIT_CONFIG,
        code_version=code_version_of(context),
        rebuild=config.rebuild,
    )
    for key, artifact in built.items():
        yield artifact_result(key, artifact, {"dagster/row_count": artifact.facts["rows"]})


@dg.multi_asset_check(
    specs=[
        dg.AssetCheckSpec(
            claim.__name__,
            asset=TRAIN.split("/"),
            blocking=True,
            description=(claim.__doc__ or "").strip().splitlines()[0],
        )
        for claim in CLAIMS
    ],
    name="splits_are_honest",
)
def splits_are_honest(
    context: dg.AssetCheckExecutionContext, store: StoreResource
) -> Iterator[dg.AssetCheckResult]:
    """Check that no split knows its own future."""
    from recflow.adapters.snapshots import load_snapshot

    snapshot = load_snapshot(store.open(), context.partition_key)
    for claim in CLAIMS:
        yield claim_result(TRAIN, claim(snapshot.splits))

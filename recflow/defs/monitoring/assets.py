"""The drift of each day, and whether it is beyond a limit."""

import dagster as dg
from pydantic import Field

from recflow.adapters.keys import CHAMPION, DRIFT, FEATURES_IMPRESSIONS, FEATURES_ITEMS
from recflow.data.split import window_keys
from recflow.defs.common import (
    Rebuild,
    artifact_result,
    claim_result,
    code_version_of,
    daily_asset,
    keys_of,
    link_to,
)
from recflow.defs.models.run_config import own_values, run_config
from recflow.defs.partitions import EARLIER, WINDOW
from recflow.defs.resources import RegistryResource, StoreResource, settings
from recflow.hardware.requirements import POOL
from recflow.quality.drift_config import DriftConfig

GROUP = "monitoring"
NO_DRIFT = "no_drift"

DriftKeys: type[Rebuild] = run_config(DriftConfig(seed=settings.seed), without=("ignored", "seed"))


class DriftRunConfig(DriftKeys):
    """When a measure has drifted; see ``DriftConfig`` for the limits."""

    ignored: list[str] = Field([], description="Measures that are shown and never alarm")


@daily_asset(
    DRIFT,
    group=GROUP,
    kinds={"evidently", "html"},
    deps=[
        dg.AssetDep(key, partition_mapping=WINDOW)
        for key in keys_of([FEATURES_IMPRESSIONS, FEATURES_ITEMS])
    ]
    # Whichever was promoted last.
    + [dg.AssetDep(key, partition_mapping=EARLIER) for key in keys_of([CHAMPION])],
    # Scores a day and imports what training imports: not beside a training.
    pool=POOL,
    code_version="1",
    description="How far the day is from the days of the champion: features, texts, scores, "
    "calibration, and what the champion still ranks; Evidently's page and its numbers.",
)
def drift(
    context: dg.AssetExecutionContext,
    config: DriftRunConfig,
    store: StoreResource,
    registry: RegistryResource,
) -> dg.MaterializeResult:
    """Measure the drift of the day."""
    from recflow.adapters.drift import PAGE, build_drift

    day = context.partition_key
    artifact = build_drift(
        store.open(),
        day,
        champion=registry.open().champion(settings.champions_dir),
        window=window_keys(day, settings.window_days),
        max_history=settings.max_history,
        config=drift_config(config),
        threads=settings.threads,
        code_version=code_version_of(context),
        rebuild=config.rebuild,
    )
    return artifact_result(DRIFT, artifact, {"page": link_to(artifact.file(PAGE))})


@dg.asset_check(
    asset=DRIFT.split("/"),
    name=NO_DRIFT,
    description="No measure is beyond its limit, and the champion ranks as on its test days.",
)
def nothing_drifted(
    context: dg.AssetCheckExecutionContext, store: StoreResource
) -> dg.AssetCheckResult:
    """Show the state of the day in words."""
    from recflow.adapters.drift import no_drift

    artifact = store.open().get(DRIFT, context.partition_key)
    return claim_result(DRIFT, no_drift(artifact), severity=dg.AssetCheckSeverity.WARN)


def drift_config(config: DriftRunConfig) -> DriftConfig:
    """The limits of a run: what was set, and the defaults.

    Raises:
        ConfigError: The values are impossible.
    """
    values = own_values(config, DriftKeys)
    return DriftConfig(seed=settings.seed, ignored=tuple(config.ignored), **values)

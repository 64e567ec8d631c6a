"""The Dagster code location: collects the stages and applies what holds for all of them."""

from datetime import timedelta
from typing import cast

import dagster as dg

from recflow.defs.compression import assets as compression
from recflow.defs.console import console_logger
from recflow.defs.evaluation import assets as evaluation
from recflow.defs.features import assets as features
from recflow.defs.ingest import assets as ingest
from recflow.defs.jobs import JOBS
from recflow.defs.models import assets as models
from recflow.defs.monitoring import assets as monitoring
from recflow.defs.monitoring.alerts import alert_sensors, configured_webhook
from recflow.defs.monitoring.sensors import drift_sensor
from recflow.defs.prepare import assets as prepare
from recflow.defs.promotion import assets as promotion
from recflow.defs.resources import make_resources, settings
from recflow.defs.schedules import SCHEDULES
from recflow.defs.search import assets as search
from recflow.defs.splits import assets as splits
from recflow.defs.studies import assets as studies
from recflow.defs.tracking import tracked_executor, tracking_sensors

STAGES = [
    *(ingest, prepare, features, monitoring, splits, search, models, compression, evaluation),
    *(promotion, studies),
]

# A nightly retraining that succeeded is at most this old.
FRESH_FOR = timedelta(hours=36)


FRESH_GROUPS = {models.GROUP, evaluation.GROUP}


# The stages hold nothing that Dagster's other kinds of loadable assets would allow.
ASSETS = cast(
    "list[dg.AssetsDefinition | dg.AssetSpec]",
    dg.load_assets_from_modules(STAGES, include_specs=True),
)


def _with_freshness(spec: dg.AssetSpec) -> dg.AssetSpec:
    """Expect new models and reports every night, unless the logs have ended."""
    if settings.last_day is not None or spec.group_name not in FRESH_GROUPS:
        return spec
    return dg.apply_freshness_policy(spec, dg.FreshnessPolicy.time_window(fail_window=FRESH_FOR))


defs = dg.Definitions(
    assets=dg.map_asset_specs(_with_freshness, ASSETS),
    asset_checks=dg.load_asset_checks_from_modules(STAGES),
    jobs=JOBS,
    schedules=SCHEDULES,
    sensors=[
        *tracking_sensors,
        drift_sensor(),
        *alert_sensors(configured_webhook(), settings.web_url),
    ],
    resources=make_resources(),
    loggers={"console": console_logger},
    executor=tracked_executor,
)

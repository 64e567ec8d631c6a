"""The Dagster code location: collects the stages and applies what holds for all of them."""

from datetime import timedelta

import dagster as dg

from recflow.defs.console import console_logger
from recflow.defs.evaluation import assets as evaluation
from recflow.defs.features import assets as features
from recflow.defs.ingest import assets as ingest
from recflow.defs.jobs import JOBS
from recflow.defs.models import assets as models
from recflow.defs.prepare import assets as prepare
from recflow.defs.resources import make_resources, settings
from recflow.defs.schedules import SCHEDULES
from recflow.defs.splits import assets as splits
from recflow.defs.tracking import tracking_sensors

STAGES = [ingest, prepare, features, splits, models, evaluation]

# A nightly retraining that succeeded is at most this old.
FRESH_FOR = timedelta(hours=36)


def _with_freshness(definitions: dg.Definitions) -> dg.Definitions:
    """Expect new results every night, unless the logs have ended."""
    if settings.last_day is not None:
        return definitions
    policy = dg.FreshnessPolicy.time_window(fail_window=FRESH_FOR)
    return definitions.map_asset_specs(
        func=lambda spec: dg.apply_freshness_policy(spec, policy),
        selection=dg.AssetSelection.groups("models", "evaluation"),
    )


defs = _with_freshness(
    dg.Definitions(
        assets=[ingest.logs_spec, ingest.catalogue_spec, *dg.load_assets_from_modules(STAGES)],
        asset_checks=dg.load_asset_checks_from_modules(STAGES),
        jobs=JOBS,
        schedules=SCHEDULES,
        sensors=tracking_sensors,
        resources=make_resources(),
        loggers={"console": console_logger},
    )
)

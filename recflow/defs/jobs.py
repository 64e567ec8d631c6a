"""Jobs started by name: ingest or monitor a day, train a snapshot, or all of it; search, study."""

import dagster as dg

from recflow.adapters.keys import (
    ADAPTED_ENCODER,
    COMPRESSED,
    CONFIGURATION,
    FINE_TUNED,
    GATE,
    ITEM_VECTORS,
    LABEL_EFFICIENCY_STUDY,
    MEASUREMENTS,
    PREDICTIONS,
    STRATEGIES_STUDY,
)
from recflow.defs.hardware import run_tags
from recflow.defs.monitoring.training_runs import SNAPSHOT_TAG
from recflow.defs.partitions import DAILY
from recflow.defs.promotion.jobs import PROMOTION_JOBS
from recflow.defs.resources import family

# One line an event, and no stack trace for mistakes the user can mend.
_CONSOLE = {"loggers": {"console": {}}}
INGEST_GROUPS = ("ingest", "prepare", "features")
TRAIN_GROUPS = ("splits", "models", "evaluation", "promotion")
# What the run queue limits runs by: what the most demanding step of the job needs.
TRAIN_TAGS = run_tags(
    [
        *(FINE_TUNED, ITEM_VECTORS, PREDICTIONS, MEASUREMENTS, GATE),
        *(family.key(name) for name in family.variants),
    ]
)
# However a run of one day is started, its tag lets the run queue start one at a time for the day.
_ONE_DAY = dg.PartitionedConfig(
    partitions_def=DAILY,
    run_config_for_partition_key_fn=lambda _: _CONSOLE,
    tags_for_partition_key_fn=lambda day: {SNAPSHOT_TAG: day},
)

ingest_job = dg.define_asset_job(
    "ingest",
    selection=dg.AssetSelection.groups(*INGEST_GROUPS),
    config=_CONSOLE,
    description="Raw logs to validated features, for one day or a range of days in one run.",
)
monitor_job = dg.define_asset_job(
    "monitor",
    selection=dg.AssetSelection.groups(*INGEST_GROUPS, "monitoring"),
    config=_ONE_DAY,
    description="Ingest one day and measure how far it is from the days of the champion.",
)
train_job = dg.define_asset_job(
    "train",
    selection=dg.AssetSelection.groups(*TRAIN_GROUPS),
    config=_ONE_DAY,
    tags=TRAIN_TAGS,
    description="Split, train, compress and evaluate the snapshot that ends with the day, and "
    "promote its candidate.",
)
full_job = dg.define_asset_job(
    "full",
    selection=dg.AssetSelection.groups(*INGEST_GROUPS, *TRAIN_GROUPS),
    config=_ONE_DAY,
    tags=TRAIN_TAGS,
    description="Everything for one day: ingest it, then train the snapshot that ends with it.",
)
retrain_job = dg.define_asset_job(
    "retrain",
    selection=dg.AssetSelection.groups(*TRAIN_GROUPS),
    config=_ONE_DAY,
    tags=TRAIN_TAGS,
    description="What the sensor retrain_on_drift launches: as train, for days that are ingested.",
)
search_job = dg.define_asset_job(
    "search",
    selection=dg.AssetSelection.groups("search"),
    config=_CONSOLE,
    tags=run_tags([CONFIGURATION]),
    description="Search the training configuration on a snapshot; later trainings read it.",
)
compress_job = dg.define_asset_job(
    "compress",
    selection=dg.AssetSelection.groups("compression"),
    config=_CONSOLE,
    tags=run_tags([COMPRESSED]),
    description="Search the chain of compression steps that meets a budget, on a snapshot.",
)
studies_job = dg.define_asset_job(
    "studies",
    selection=dg.AssetSelection.groups("studies"),
    config=_CONSOLE,
    tags=run_tags([ADAPTED_ENCODER, LABEL_EFFICIENCY_STUDY, STRATEGIES_STUDY]),
    description="Compare what the training engine can do on a snapshot; takes hours.",
)
JOBS = [
    *(ingest_job, monitor_job, train_job, full_job, retrain_job),
    *(search_job, compress_job, studies_job),
    *PROMOTION_JOBS,
]

"""Jobs people start by name: ingest a day, train a snapshot, or all of it; search, study."""

import dagster as dg

# One line an event, and no stack trace for mistakes the user can mend.
_CONSOLE = {"loggers": {"console": {}}}
INGEST_GROUPS = ("ingest", "prepare", "features")
TRAIN_GROUPS = ("splits", "models", "evaluation")

ingest_job = dg.define_asset_job(
    "ingest",
    selection=dg.AssetSelection.groups(*INGEST_GROUPS),
    config=_CONSOLE,
    description="Raw logs to validated features, for one day or a range of days in one run.",
)
train_job = dg.define_asset_job(
    "train",
    selection=dg.AssetSelection.groups(*TRAIN_GROUPS),
    config=_CONSOLE,
    description="Split, train, compress and evaluate the snapshot that ends with the day.",
)
full_job = dg.define_asset_job(
    "full",
    selection=dg.AssetSelection.groups(*INGEST_GROUPS, *TRAIN_GROUPS),
    config=_CONSOLE,
    description="Everything for one day: ingest it, then train the snapshot that ends with it.",
)
search_job = dg.define_asset_job(
    "search",
    selection=dg.AssetSelection.groups("search"),
    config=_CONSOLE,
    description="Search the training configuration on a snapshot; later trainings read it.",
)
compress_job = dg.define_asset_job(
    "compress",
    selection=dg.AssetSelection.groups("compression"),
    config=_CONSOLE,
    description="Search the chain of compression steps that meets a budget, on a snapshot.",
)
studies_job = dg.define_asset_job(
    "studies",
    selection=dg.AssetSelection.groups("studies"),
    config=_CONSOLE,
    description="Compare what the training engine can do on a snapshot; takes hours.",
)
JOBS = [ingest_job, train_job, full_job, search_job, compress_job, studies_job]

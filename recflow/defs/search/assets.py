"""The training configuration that did best on validation, found by trials."""

from typing import Any, Literal

import dagster as dg
from pydantic import Field

from recflow.adapters.keys import CONFIGURATION, ITEMS, TRAIN, VALIDATION
from recflow.defs.common import artifact_result, code_version_of, keys_of
from recflow.defs.hardware import model_asset
from recflow.defs.models.assets import pretrained_spec
from recflow.defs.models.run_config import TrainingKeys, training_config
from recflow.defs.planned import MEMORY
from recflow.defs.resources import BaseModelResource, StoreResource, settings
from recflow.defs.tracking import run_metadata, tracker_of
from recflow.modeling.search_space import (
    SearchConfig,
    default_space,
    space_as_json,
    space_from,
)

GROUP = "search"


class SearchRunConfig(TrainingKeys):
    """Budget and space of the search; the other keys are what all trials have in common."""

    minutes: float = Field(30.0, description="Wall time of all trials together")
    max_trials: int = Field(50, description="Most trials")
    space: dict[str, Any] = Field(
        space_as_json(default_space()),
        description='What is searched, by dotted key: {"low": .., "high": .., "log": true} or '
        '{"choices": [..]}',
    )
    memory: Literal["refuse", "go_on"] = Field("refuse", description=MEMORY)


@model_asset(
    CONFIGURATION,
    group=GROUP,
    kinds={"optuna", "json"},
    deps=[pretrained_spec, *keys_of([TRAIN, VALIDATION, ITEMS])],
    code_version="1",
    description="Values of the training configuration that did best on the snapshot's validation "
    "split; models/fine_tuned of this day and later ones reads them.",
)
def configuration(
    context: dg.AssetExecutionContext,
    config: SearchRunConfig,
    store: StoreResource,
    base_model: BaseModelResource,
    mlflow: dg.ResourceParam[Any],
) -> dg.MaterializeResult:
    """Search the training configuration."""
    from recflow.adapters.planning import PlanningConfig
    from recflow.adapters.search import build_configuration, trials_table

    with tracker_of(mlflow, prefix="search.") as tracker:
        artifact = build_configuration(
            store.open(),
            context.partition_key,
            base_model=base_model.path,
            base_config=training_config(config),
            config=SearchConfig(
                minutes=config.minutes,
                max_trials=config.max_trials,
                seed=settings.seed,
                space=space_from(config.space),
            ),
            studies=settings.studies_dir,
            cache_directory=settings.cache_dir,
            tracker=tracker,
            code_version=code_version_of(context),
            planning=PlanningConfig(config.memory, settings.calibration_file, settings.catalogue),
            rebuild=config.rebuild,
        )
    extra = {
        "trials_table": dg.MetadataValue.md(trials_table(artifact)),
        **run_metadata(mlflow),
    }
    return artifact_result(CONFIGURATION, artifact, extra)

"""Models: fine-tuned from the pretrained encoder, and the family of smaller ones made from it."""

from collections.abc import Mapping
from typing import Any, Literal

import dagster as dg
from pydantic import Field

from recflow.adapters.keys import (
    ADAPTED_ENCODER,
    CONFIGURATION,
    FINE_TUNED,
    ITEM_VECTORS,
    ITEMS,
    TRAIN,
    VALIDATION,
)
from recflow.adapters.mlflow_tracking import MlflowTracker
from recflow.adapters.parquet_io import row_count
from recflow.compression.config import VectorStoreConfig
from recflow.compression.family import Variant, with_deployment
from recflow.core.artifacts import Artifact
from recflow.defs.common import (
    OWNERS,
    Rebuild,
    artifact_result,
    code_version_of,
    curve_plot,
    keys_of,
)
from recflow.defs.hardware import model_asset
from recflow.defs.models.run_config import (
    DEFAULTS,
    OF_THE_DEPLOYMENT,
    TrainingKeys,
    own_values,
    run_config,
    training_values,
)
from recflow.defs.partitions import EARLIER
from recflow.defs.planned import MEMORY, plan_metadata
from recflow.defs.resources import BaseModelResource, StoreResource, family, settings
from recflow.defs.tracking import run_metadata, tracker_of
from recflow.modeling.config import with_values

GROUP = "models"

pretrained_spec = dg.AssetSpec(
    ["source", "pretrained_encoder"],
    group_name=GROUP,
    owners=OWNERS,
    kinds={"huggingface"},
    description="The pretrained text encoder that training starts from: a folder, or a model of "
    "the Hugging Face hub (all-MiniLM-L6-v2 by default).",
)


class FineTuningConfig(TrainingKeys):
    """How the encoder and the user model are trained.

    A key that is set wins over the found configuration, which wins over the default.
    """

    configuration: Literal["found", "ignore"] = Field(
        "found",
        description="found: use the newest models/configuration of this day or before, if any",
    )
    start_from: Literal["pretrained", "adapted"] = Field(
        "pretrained", description="adapted: start from models/adapted_encoder of this day"
    )
    memory: Literal["refuse", "go_on"] = Field("refuse", description=MEMORY)


@model_asset(
    FINE_TUNED,
    group=GROUP,
    kinds={"pytorch", "huggingface"},
    deps=[
        pretrained_spec,
        *keys_of([TRAIN, VALIDATION, ITEMS, ADAPTED_ENCODER]),
        dg.AssetDep(CONFIGURATION.split("/"), partition_mapping=EARLIER),
    ],
    code_version="2",
    description="The text encoder and a user model over the click history, trained on the "
    "snapshot's clicks; the best epoch on validation is kept.",
)
def fine_tuned(
    context: dg.AssetExecutionContext,
    config: FineTuningConfig,
    store: StoreResource,
    base_model: BaseModelResource,
    mlflow: dg.ResourceParam[Any],
) -> dg.MaterializeResult:
    """Fine-tune the encoder."""
    from recflow.adapters.models import build_fine_tuned
    from recflow.adapters.planning import PlanningConfig
    from recflow.adapters.training_inputs import training_inputs

    inputs = training_inputs(
        store.open(),
        context.partition_key,
        base_model=base_model.path,
        defaults=DEFAULTS,
        explicit=training_values(config),
        configuration=config.configuration,
        start_from=config.start_from,
    )
    with tracker_of(mlflow, prefix="fine_tuned.") as tracker:
        artifact = build_fine_tuned(
            store.open(),
            context.partition_key,
            base_model=inputs.base_model,
            config=inputs.config,
            parents=inputs.parents,
            cache_directory=settings.cache_dir,
            checkpoints=settings.checkpoints_dir,
            tracker=tracker,
            code_version=code_version_of(context),
            planning=PlanningConfig(config.memory, settings.calibration_file, settings.catalogue),
            rebuild=config.rebuild,
        )
        _log_datasets(tracker, store, context.partition_key)
    extra = {
        "configuration_found_in": inputs.found_in or "none",
        "values_that_differ_from_the_defaults": dict(inputs.changed),
    }
    return _model_result(FINE_TUNED, artifact, mlflow, extra)


def _variant_asset(variant: Variant) -> dg.AssetsDefinition:
    """The asset of one model of the family."""
    keys = run_config(variant.config, without=OF_THE_DEPLOYMENT)

    class StepConfig(keys):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
        __doc__ = keys.__doc__

        memory: Literal["refuse", "go_on"] = Field("refuse", description=MEMORY)

    key = family.key(variant.name)

    @model_asset(
        key,
        group=GROUP,
        kinds={*variant.step.kinds},
        deps=keys_of([family.key(variant.parent), TRAIN, VALIDATION, ITEMS]),
        code_version=variant.step.code_version,
        description=f"{variant.step.summary} Made from `{variant.parent}`.",
    )
    def model(
        context: dg.AssetExecutionContext,
        config: StepConfig,
        store: StoreResource,
        mlflow: dg.ResourceParam[Any],
    ) -> dg.MaterializeResult:
        from recflow.adapters.models import build_variant
        from recflow.adapters.planning import PlanningConfig

        with tracker_of(mlflow, prefix=f"{variant.name}.") as tracker:
            artifact = build_variant(
                store.open(),
                context.partition_key,
                family,
                variant.name,
                config=with_deployment(
                    with_values(variant.config, own_values(config, keys)),
                    seed=settings.seed,
                    threads=settings.threads,
                ),
                tracker=tracker,
                code_version=code_version_of(context),
                planning=PlanningConfig(
                    config.memory, settings.calibration_file, settings.catalogue
                ),
                rebuild=config.rebuild,
            )
        return _model_result(key, artifact, mlflow)

    return model


FAMILY_ASSETS = [_variant_asset(variant) for variant in family.variants.values()]


class ItemVectorsConfig(Rebuild):
    """How the item vectors are stored; see ``VectorStoreConfig``."""

    codecs: list[str] = Field(["int8", "pq"], description="float32, float16, int8, pq")
    subvectors: int | None = Field(
        None, description="Bytes of an item's vector with pq; at most a third of its width if unset"
    )


@model_asset(
    ITEM_VECTORS,
    group=GROUP,
    kinds={"safetensors"},
    deps=keys_of([FINE_TUNED, TRAIN, VALIDATION, ITEMS]),
    code_version="1",
    description="The fine-tuned model's vectors of the catalogue as serving keeps them: 8-bit "
    "integers, and product-quantized.",
)
def item_vectors(
    context: dg.AssetExecutionContext, config: ItemVectorsConfig, store: StoreResource
) -> dg.MaterializeResult:
    """Store the item vectors."""
    from recflow.adapters.item_vectors import build_vector_stores

    artifact = build_vector_stores(
        store.open(),
        context.partition_key,
        family=family,
        stores=[
            VectorStoreConfig(
                codec=codec,
                subvectors=config.subvectors,
                threads=settings.threads,
                seed=settings.seed,
            )
            for codec in config.codecs
        ],
        code_version=code_version_of(context),
        rebuild=config.rebuild,
    )
    return artifact_result(ITEM_VECTORS, artifact)


def _log_datasets(tracker: MlflowTracker, store: StoreResource, snapshot: str) -> None:
    """Note in MLflow which data the model was made from."""
    for key, role in ((TRAIN, "training"), (VALIDATION, "validation"), (ITEMS, "catalogue")):
        data = store.open().get(key, snapshot)
        tracker.log_dataset(key, data.digest, row_count(data), role)


def _model_result(
    key: str, artifact: Artifact, mlflow: Any, values: Mapping[str, Any] | None = None
) -> dg.MaterializeResult:
    epochs = artifact.facts.get("epochs")
    extra: dict[str, Any] = {
        **plan_metadata(artifact.facts),
        **run_metadata(mlflow),
        **(values or {}),
    }
    if isinstance(epochs, list):
        points = [epoch for epoch in epochs if isinstance(epoch, Mapping)]
        extra["learning_curve"] = curve_plot(points, "validation")
    return artifact_result(key, artifact, extra)

"""Models: fine-tuned from the pretrained encoder, and the smaller versions of it."""

from collections.abc import Mapping
from typing import Any, Literal

import dagster as dg
from pydantic import Field

from recflow.adapters.keys import (
    ADAPTED_ENCODER,
    CONFIGURATION,
    FINE_TUNED,
    ITEMS,
    PRUNED,
    QUANTIZED,
    TRAIN,
    VALIDATION,
)
from recflow.adapters.mlflow_tracking import MlflowTracker
from recflow.adapters.parquet_io import row_count
from recflow.core.artifacts import Artifact
from recflow.defs.common import (
    OWNERS,
    Rebuild,
    artifact_result,
    code_version_of,
    curve_plot,
    daily_asset,
    keys_of,
)
from recflow.defs.models.run_config import DEFAULTS, TrainingKeys, training_values
from recflow.defs.partitions import EARLIER
from recflow.defs.resources import BaseModelResource, StoreResource, settings
from recflow.defs.tracking import run_metadata, tracker_of

GROUP = "models"
# Steps that use every core; docker/dagster.yaml says how to keep them apart.
POOL = "compute"

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


class PruningRunConfig(Rebuild):
    """How much of the encoder is removed, and how it recovers; see ``PruningConfig``."""

    head_share: float = Field(1 / 3, description="Share of the attention heads removed")
    channel_share: float = Field(0.5, description="Share of the feed-forward channels removed")
    recovery_steps: int = Field(200, description="Steps of recovery training")


class QuantizationRunConfig(Rebuild):
    """How the encoder is quantized; see ``QuantizationConfig``."""

    min_cosine: float = Field(0.95, description="Least mean cosine of int8 to float32 vectors")


@daily_asset(
    FINE_TUNED,
    group=GROUP,
    kinds={"pytorch", "huggingface"},
    deps=[
        pretrained_spec,
        *keys_of([TRAIN, VALIDATION, ITEMS, ADAPTED_ENCODER]),
        dg.AssetDep(CONFIGURATION.split("/"), partition_mapping=EARLIER),
    ],
    pool=POOL,
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
            rebuild=config.rebuild,
        )
        _log_datasets(tracker, store, context.partition_key)
    extra = {
        "configuration_found_in": inputs.found_in or "none",
        "values_that_differ_from_the_defaults": dict(inputs.changed),
    }
    return _model_result(FINE_TUNED, artifact, mlflow, extra)


@daily_asset(
    PRUNED,
    group=GROUP,
    kinds={"pytorch"},
    deps=keys_of([FINE_TUNED, TRAIN, VALIDATION, ITEMS]),
    pool=POOL,
    code_version="1",
    description="The fine-tuned model with its least important attention heads and feed-forward "
    "channels removed, trained briefly to recover.",
)
def pruned(
    context: dg.AssetExecutionContext,
    config: PruningRunConfig,
    store: StoreResource,
    mlflow: dg.ResourceParam[Any],
) -> dg.MaterializeResult:
    """Prune the fine-tuned model."""
    from recflow.adapters.models import build_pruned
    from recflow.compression.config import PruningConfig

    with tracker_of(mlflow, prefix="pruned.") as tracker:
        artifact = build_pruned(
            store.open(),
            context.partition_key,
            config=PruningConfig(
                **_library_arguments(config), seed=settings.seed, threads=settings.threads
            ),
            tracker=tracker,
            code_version=code_version_of(context),
            rebuild=config.rebuild,
        )
    return _model_result(PRUNED, artifact, mlflow)


@daily_asset(
    QUANTIZED,
    group=GROUP,
    kinds={"onnx"},
    deps=keys_of([FINE_TUNED, ITEMS]),
    pool=POOL,
    code_version="1",
    description="The fine-tuned model in 8-bit integers, executed by ONNX Runtime; exported only "
    "if it reproduces the PyTorch model.",
)
def quantized(
    context: dg.AssetExecutionContext,
    config: QuantizationRunConfig,
    store: StoreResource,
    mlflow: dg.ResourceParam[Any],
) -> dg.MaterializeResult:
    """Quantize the fine-tuned model."""
    from recflow.adapters.models import build_quantized
    from recflow.compression.quantize import QuantizationConfig

    with tracker_of(mlflow, prefix="quantized.") as tracker:
        artifact = build_quantized(
            store.open(),
            context.partition_key,
            config=QuantizationConfig(**_library_arguments(config), threads=settings.threads),
            tracker=tracker,
            code_version=code_version_of(context),
            rebuild=config.rebuild,
        )
    return _model_result(QUANTIZED, artifact, mlflow)


def _log_datasets(tracker: MlflowTracker, store: StoreResource, snapshot: str) -> None:
    """Note in MLflow which data the model was made from."""
    for key, role in ((TRAIN, "training"), (VALIDATION, "validation"), (ITEMS, "catalogue")):
        data = store.open().get(key, snapshot)
        tracker.log_dataset(key, data.digest, row_count(data), role)


def _library_arguments(config: Rebuild) -> dict[str, Any]:
    """The run config's fields that the library's configuration has too."""
    return {name: value for name, value in config.model_dump().items() if name != "rebuild"}


def _model_result(
    key: str, artifact: Artifact, mlflow: Any, values: Mapping[str, Any] | None = None
) -> dg.MaterializeResult:
    epochs = artifact.facts.get("epochs")
    extra: dict[str, Any] = {**run_metadata(mlflow), **(values or {})}
    if isinstance(epochs, list):
        points = [epoch for epoch in epochs if isinstance(epoch, Mapping)]
        extra["learning_curve"] = curve_plot(points, "validation")
    return artifact_result(key, artifact, extra)

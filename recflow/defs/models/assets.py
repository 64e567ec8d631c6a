"""Models: fine-tuned from the pretrained encoder, and the smaller versions of it."""

from collections.abc import Mapping
from typing import Any, Literal

import dagster as dg
from pydantic import Field

from recflow.adapters.keys import FINE_TUNED, ITEMS, PRUNED, QUANTIZED, TRAIN, VALIDATION
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
    description="The pretrained text encoder that fine-tuning starts from (all-MiniLM-L6-v2).",
)


class FineTuningConfig(Rebuild):
    """How the encoder and the user model are trained; see ``TrainingConfig`` for the limits."""

    strategy: Literal["frozen", "top_k_layers"] = Field(
        "top_k_layers", description="Which encoder weights learn"
    )
    tuned_layers: int = Field(2, description="Last layers that top_k_layers trains")
    max_tokens: int = Field(64, description="Longest text in tokens")
    negatives: int = Field(8, description="Non-clicked candidates sampled for a click")
    clicks_per_impression: int = Field(4, description="Clicks of an impression used an epoch")
    max_impressions_per_epoch: int = Field(20_000, description="Impressions used an epoch")
    head_epochs: int = Field(4, description="Epochs of the user model on frozen vectors")
    encoder_epochs: int = Field(2, description="Epochs of encoder and user model together")
    max_texts_per_step: int = Field(256, description="Distinct items encoded with gradient a step")
    head_learning_rate: float = Field(2e-3, description="Peak learning rate of the user model")
    encoder_learning_rate: float = Field(5e-5, description="Peak learning rate of the encoder")
    patience: int = Field(2, description="Epochs without a better validation AUC until the end")


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
    deps=[pretrained_spec, *keys_of([TRAIN, VALIDATION, ITEMS])],
    pool=POOL,
    code_version="1",
    description="The encoder's last layers and a user model over the click history, trained on "
    "the snapshot's clicks; the best epoch on validation is kept.",
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
    from recflow.modeling.trainer import TrainingConfig

    with tracker_of(mlflow, prefix="fine_tuned.") as tracker:
        artifact = build_fine_tuned(
            store.open(),
            context.partition_key,
            base_model=base_model.path,
            config=TrainingConfig(
                **_library_arguments(config),
                history_length=settings.max_history,
                seed=settings.seed,
                threads=settings.threads,
            ),
            tracker=tracker,
            code_version=code_version_of(context),
            rebuild=config.rebuild,
        )
        _log_datasets(tracker, store, context.partition_key)
    return _model_result(FINE_TUNED, artifact, mlflow)


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
    from recflow.compression.prune import PruningConfig

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


def _model_result(key: str, artifact: Artifact, mlflow: Any) -> dg.MaterializeResult:
    epochs = artifact.facts.get("epochs")
    extra: dict[str, Any] = {**run_metadata(mlflow)}
    if isinstance(epochs, list):
        points = [epoch for epoch in epochs if isinstance(epoch, Mapping)]
        extra["learning_curve"] = curve_plot(points, "validation_auc")
    return artifact_result(key, artifact, extra)

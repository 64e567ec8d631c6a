"""Studies of the training engine on a snapshot; no model is served from them."""

from typing import Any, Literal

import dagster as dg
from pydantic import Field

from recflow.adapters.keys import (
    ADAPTED_ENCODER,
    ITEMS,
    LABEL_EFFICIENCY_STUDY,
    STRATEGIES_STUDY,
    TEST,
    TRAIN,
    VALIDATION,
)
from recflow.defs.common import Rebuild, artifact_result, code_version_of, keys_of
from recflow.defs.hardware import model_asset
from recflow.defs.models.assets import pretrained_spec
from recflow.defs.models.run_config import (
    ADAPTATION_DEFAULTS,
    CHOICES,
    OF_THE_DEPLOYMENT,
    TrainingKeys,
    as_values,
    choice,
    own_values,
    run_config,
    training_config,
)
from recflow.defs.planned import MEMORY, plan_metadata
from recflow.defs.resources import BaseModelResource, StoreResource, settings
from recflow.defs.tracking import run_metadata, tracker_of
from recflow.modeling.config import with_values

GROUP = "studies"
# Matrices that start at zero take larger steps than weights that are already good: Hu et al. 2021
# (LoRA) and Houlsby et al. 2019 (adapters) train with 10 to 30 times the usual rate.
LARGER_STEPS = {"optimiser.encoder_learning_rate": 5e-4}
AdaptationKeys: type[Rebuild] = run_config(ADAPTATION_DEFAULTS, without=OF_THE_DEPLOYMENT)


class AdaptationRunConfig(AdaptationKeys):
    """How the encoder is adapted to the snapshot's texts."""

    memory: Literal["refuse", "go_on"] = Field("refuse", description=MEMORY)


class LabelEfficiencyRunConfig(TrainingKeys):
    """What is compared; the other keys are what all rankers have in common."""

    shares: list[float] = Field(
        [0.01, 0.1, 1.0], description="Shares of the training impressions that are learnt from"
    )
    most_repeats: int = Field(
        10, description="Most often an impression of a small share is shown in an epoch"
    )
    bootstrap_samples: int = Field(1_000, description="Resamples behind each interval")
    memory: Literal["refuse", "go_on"] = Field("refuse", description=MEMORY)


class StrategiesRunConfig(TrainingKeys):
    """What is compared; the other keys are what all strategies have in common."""

    strategies: list[choice("strategy")] = Field(  # pyright: ignore[reportInvalidTypeForm]
        list(CHOICES["strategy"]),
        description="Strategies to train; frozen, which the others are compared with, among them",
    )
    overrides: dict[str, Any] = Field(
        dict.fromkeys(("lora", "adalora", "adapters"), LARGER_STEPS),
        description="By strategy, what differs from the common keys, by dotted key",
    )
    bootstrap_samples: int = Field(1_000, description="Resamples behind each interval")
    memory: Literal["refuse", "go_on"] = Field("refuse", description=MEMORY)


@model_asset(
    ADAPTED_ENCODER,
    group=GROUP,
    kinds={"pytorch", "huggingface"},
    deps=[pretrained_spec, *keys_of([TRAIN, ITEMS])],
    code_version="1",
    description="The pretrained encoder adapted to the texts of the snapshot, without a label; "
    "models/fine_tuned starts from it where its run config says so.",
)
def adapted_encoder(
    context: dg.AssetExecutionContext,
    config: AdaptationRunConfig,
    store: StoreResource,
    base_model: BaseModelResource,
    mlflow: dg.ResourceParam[Any],
) -> dg.MaterializeResult:
    """Adapt the encoder."""
    from recflow.adapters.adaptation import build_adapted_encoder
    from recflow.adapters.planning import PlanningConfig

    with tracker_of(mlflow, prefix="adapted_encoder.") as tracker:
        artifact = build_adapted_encoder(
            store.open(),
            context.partition_key,
            base_model=base_model.path,
            config=with_values(ADAPTATION_DEFAULTS, own_values(config, AdaptationKeys)),
            tracker=tracker,
            code_version=code_version_of(context),
            planning=PlanningConfig(config.memory, settings.calibration_file, settings.catalogue),
            rebuild=config.rebuild,
        )
    extra = {**plan_metadata(artifact.facts), **run_metadata(mlflow)}
    return artifact_result(ADAPTED_ENCODER, artifact, extra)


@model_asset(
    LABEL_EFFICIENCY_STUDY,
    group=GROUP,
    kinds={"pytorch", "parquet"},
    deps=[pretrained_spec, *keys_of([ADAPTED_ENCODER, TRAIN, VALIDATION, TEST, ITEMS])],
    code_version="1",
    description="What adapting the encoder gains where few clicks are known: rankers from the "
    "pretrained and the adapted encoder, at several shares of the clicks.",
)
def label_efficiency(
    context: dg.AssetExecutionContext,
    config: LabelEfficiencyRunConfig,
    store: StoreResource,
    base_model: BaseModelResource,
    mlflow: dg.ResourceParam[Any],
) -> dg.MaterializeResult:
    """Compare learning with few and many labels."""
    from recflow.adapters.label_efficiency import (
        LabelEfficiencyConfig,
        build_label_efficiency,
        label_efficiency_table,
    )
    from recflow.adapters.planning import PlanningConfig

    with tracker_of(mlflow, prefix="label_efficiency.") as tracker:
        artifact = build_label_efficiency(
            store.open(),
            context.partition_key,
            base_model=base_model.path,
            config=training_config(config),
            study=LabelEfficiencyConfig(
                shares=tuple(config.shares),
                most_repeats=config.most_repeats,
                bootstrap_samples=config.bootstrap_samples,
            ),
            tracker=tracker,
            code_version=code_version_of(context),
            cache_directory=settings.cache_dir,
            planning=PlanningConfig(config.memory, settings.calibration_file, settings.catalogue),
            rebuild=config.rebuild,
        )
    table = {"table": dg.MetadataValue.md(label_efficiency_table(artifact))}
    return artifact_result(LABEL_EFFICIENCY_STUDY, artifact, {**table, **run_metadata(mlflow)})


@model_asset(
    STRATEGIES_STUDY,
    group=GROUP,
    kinds={"pytorch", "parquet"},
    deps=[pretrained_spec, *keys_of([TRAIN, VALIDATION, TEST, ITEMS])],
    code_version="1",
    description="All fine-tuning strategies on the same clicks: what each learns, takes and gains "
    "over the frozen encoder.",
)
def strategies(
    context: dg.AssetExecutionContext,
    config: StrategiesRunConfig,
    store: StoreResource,
    base_model: BaseModelResource,
    mlflow: dg.ResourceParam[Any],
) -> dg.MaterializeResult:
    """Compare the fine-tuning strategies."""
    from recflow.adapters.planning import PlanningConfig
    from recflow.adapters.strategies import StrategiesConfig, build_strategies, strategies_table

    with tracker_of(mlflow, prefix="strategies.") as tracker:
        artifact = build_strategies(
            store.open(),
            context.partition_key,
            base_model=base_model.path,
            config=training_config(config),
            study=StrategiesConfig(
                strategies=tuple(as_values(config)["strategies"]),
                overrides=config.overrides,
                bootstrap_samples=config.bootstrap_samples,
            ),
            tracker=tracker,
            code_version=code_version_of(context),
            planning=PlanningConfig(config.memory, settings.calibration_file, settings.catalogue),
            rebuild=config.rebuild,
        )
    extra = {"table": dg.MetadataValue.md(strategies_table(artifact)), **run_metadata(mlflow)}
    return artifact_result(STRATEGIES_STUDY, artifact, extra)

"""Evaluation: predictions of every scorer, what models cost, and the report on both."""

from typing import Any

import dagster as dg
from pydantic import Field

from recflow.adapters.keys import (
    CLEANED_IMPRESSIONS,
    CLEANED_ITEMS,
    COMPRESSED,
    ITEM_VECTORS,
    ITEMS,
    MEASUREMENTS,
    PREDICTIONS,
    REPORT,
    TEST,
    TRAIN,
    VALIDATION,
)
from recflow.adapters.requirements import CATALOGUE_SAMPLE
from recflow.data.split import window_keys
from recflow.defs.common import (
    Rebuild,
    artifact_result,
    bar_plot,
    claim_result,
    code_version_of,
    daily_asset,
    keys_of,
    link_to,
)
from recflow.defs.hardware import model_asset
from recflow.defs.models.assets import pretrained_spec
from recflow.defs.partitions import WINDOW
from recflow.defs.planned import plans_metadata
from recflow.defs.resources import BaseModelResource, LogsResource, StoreResource, family, settings
from recflow.defs.tracking import run_metadata, tracker_of

GROUP = "evaluation"
# The last one is made when it is asked for, and judged with the others if it is there.
MODELS = [*(family.key(name) for name in family.names), COMPRESSED]
BEATS_BASELINES = "fine_tuned_beats_content_baselines"


class PredictionsConfig(Rebuild):
    """How the snapshot is scored."""

    catalogue_sample: int = Field(
        CATALOGUE_SAMPLE, description="Test impressions for which the whole catalogue is ranked"
    )


class MeasurementsConfig(Rebuild):
    """How the models' costs are measured."""

    texts: int = Field(512, description="Texts of the catalogue that are encoded")


class ReportConfig(Rebuild):
    """How the predictions are judged; see ``EvaluationConfig`` for the limits."""

    bootstrap_samples: int = Field(1_000, description="Resamples behind each interval")
    confidence: float = Field(0.95, description="Share of the resamples inside an interval")


@model_asset(
    PREDICTIONS,
    group=GROUP,
    kinds={"pytorch", "onnx", "parquet"},
    deps=[
        pretrained_spec,
        *keys_of([*MODELS, ITEM_VECTORS, TRAIN, VALIDATION, TEST, ITEMS]),
    ],
    code_version="2",
    description="Scores of validation and test by every baseline and every model.",
)
def predictions(
    context: dg.AssetExecutionContext,
    config: PredictionsConfig,
    store: StoreResource,
    base_model: BaseModelResource,
) -> dg.MaterializeResult:
    """Score the snapshot."""
    from recflow.adapters.evaluations import ScoringConfig, build_predictions

    artifact = build_predictions(
        store.open(),
        context.partition_key,
        family=family,
        base_model=base_model.path,
        config=ScoringConfig(
            catalogue_sample=config.catalogue_sample,
            seed=settings.seed,
            threads=settings.threads,
        ),
        code_version=code_version_of(context),
        rebuild=config.rebuild,
    )
    return artifact_result(PREDICTIONS, artifact)


@model_asset(
    MEASUREMENTS,
    group=GROUP,
    kinds={"pytorch", "onnx"},
    # After the predictions, not beside them: whatever else runs distorts what is measured.
    deps=keys_of([PREDICTIONS, *MODELS, ITEMS]),
    code_version="2",
    description="Size, latency, throughput and memory of every model, on this machine.",
)
def measurements(
    context: dg.AssetExecutionContext, config: MeasurementsConfig, store: StoreResource
) -> dg.MaterializeResult:
    """Measure what the models cost."""
    from recflow.adapters.evaluations import build_measurements
    from recflow.adapters.planning import PlanningConfig
    from recflow.compression.measure import MeasurementConfig

    artifact = build_measurements(
        store.open(),
        context.partition_key,
        family=family,
        texts=config.texts,
        config=MeasurementConfig(),
        code_version=code_version_of(context),
        planning=PlanningConfig(
            calibration=settings.calibration_file, catalogue=settings.catalogue
        ),
        rebuild=config.rebuild,
    )
    return artifact_result(MEASUREMENTS, artifact, plans_metadata(artifact.facts.get("plan")))


@daily_asset(
    REPORT,
    group=GROUP,
    kinds={"html", "json"},
    deps=[
        *keys_of([PREDICTIONS, MEASUREMENTS, *MODELS, ITEM_VECTORS]),
        *keys_of([TRAIN, VALIDATION, TEST, ITEMS]),
        *(
            dg.AssetDep(key, partition_mapping=WINDOW)
            for key in keys_of([CLEANED_IMPRESSIONS, CLEANED_ITEMS])
        ),
    ],
    code_version="3",
    description="Accuracy with intervals beside latency, size, memory and money; HTML and JSON.",
)
def report(
    context: dg.AssetExecutionContext,
    config: ReportConfig,
    store: StoreResource,
    logs: LogsResource,
    mlflow: dg.ResourceParam[Any],
) -> dg.MaterializeResult:
    """Evaluate the predictions and write the report."""
    from recflow.adapters.evaluations import build_report, headline, report_context
    from recflow.evaluation.evaluator import EvaluationConfig

    day = context.partition_key
    artifact = build_report(
        store.open(),
        day,
        family=family,
        source=logs.open(),
        window=window_keys(day, settings.window_days),
        context=report_context(settings.source, day),
        config=EvaluationConfig(
            bootstrap_samples=config.bootstrap_samples,
            confidence=config.confidence,
            seed=settings.seed,
        ),
        code_version=code_version_of(context),
        catalogue=settings.catalogue,
        calibration=settings.calibration_file,
        rebuild=config.rebuild,
    )
    with tracker_of(mlflow, prefix="report.") as tracker:
        tracker.log_metrics(headline(artifact), step=0)
        for name in ("report.html", "report.json"):
            tracker.log_file(artifact.file(name))
    extra = {
        "report": link_to(artifact.file("report.html")),
        "auc_by_scorer": bar_plot(headline(artifact, "auc"), "AUC"),
        **run_metadata(mlflow),
    }
    return artifact_result(REPORT, artifact, extra)


@dg.asset_check(
    asset=REPORT.split("/"),
    name=BEATS_BASELINES,
    description="The fine-tuned model ranks better than every content-only baseline (AUC).",
)
def fine_tuned_beats_content_baselines(
    context: dg.AssetCheckExecutionContext, store: StoreResource
) -> dg.AssetCheckResult:
    """Compare the fine-tuned model with the baselines."""
    from recflow.adapters.evaluations import beats_content_baselines

    artifact = store.open().get(REPORT, context.partition_key)
    return claim_result(
        REPORT, beats_content_baselines(artifact), severity=dg.AssetCheckSeverity.WARN
    )

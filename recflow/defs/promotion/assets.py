"""Promotion: the gate that a candidate passes, and the champion that users get."""

from typing import Any

import dagster as dg
from pydantic import Field

from recflow.adapters.keys import (
    CHAMPION,
    GATE,
    ITEMS,
    MEASUREMENTS,
    PREDICTIONS,
    REPORT,
    TEST,
    TRAIN,
    VALIDATION,
)
from recflow.defs.common import (
    Rebuild,
    artifact_result,
    claim_result,
    code_version_of,
    daily_asset,
    keys_of,
    link_to,
)
from recflow.defs.hardware import model_asset
from recflow.defs.promotion.jobs import PROMOTION_POOL
from recflow.defs.resources import RegistryResource, StoreResource, family, settings
from recflow.defs.tracking import run_metadata, tracker_of

GROUP = "promotion"
MAY_BECOME_CHAMPION = "candidate_may_become_champion"


class GateRunConfig(Rebuild):
    """What is required of a candidate; a limit that is null is none. See ``GateConfig``."""

    primary_metric: str = Field("auc", description="auc, mrr, ndcg@5 or ndcg@10")
    epsilon: float = Field(
        0.002, description="Largest loss against the champion that need not be excluded"
    )
    confidence: float = Field(0.95, description="Share of the resamples inside an interval")
    bootstrap_samples: int = Field(1_000, description="Resamples behind each interval")
    max_segment_loss: float = Field(0.02, description="Largest loss in a segment")
    min_segment_impressions: int = Field(
        200, description="Segments with fewer test impressions are not judged"
    )
    min_baseline_lead: float = Field(
        0.0,
        description="Lead of the first champion over every content-only baseline, beyond doubt",
    )
    max_p99_ms: float | None = Field(
        None, description="99th percentile of the latency of one text on one thread"
    )
    max_memory_mib: float | None = Field(None, description="Peak memory of a fresh process")
    max_megabytes: float | None = Field(
        None, description="Everything that serving reads, in 10^6 bytes"
    )
    max_usd_per_million: float | None = Field(
        None, description="Price of a million recommendations on the cheapest device that fits"
    )
    parity_impressions: int = Field(
        50, description="Test impressions that the served model is asked about"
    )


@model_asset(
    GATE,
    group=GROUP,
    kinds={"mlflow", "html", "json"},
    deps=keys_of(
        [
            family.key(settings.candidate),
            *(PREDICTIONS, MEASUREMENTS, REPORT),
            *(TRAIN, VALIDATION, TEST, ITEMS),
        ]
    ),
    code_version="1",
    description="The candidate held against the champion on the same impressions: accuracy, "
    "segments, costs, and whether it is served as it was judged; with the model that is served.",
)
def gate(
    context: dg.AssetExecutionContext,
    config: GateRunConfig,
    store: StoreResource,
    registry: RegistryResource,
    mlflow: dg.ResourceParam[Any],
) -> dg.MaterializeResult:
    """Judge the candidate."""
    from recflow.adapters.gate import DECISION_NAME, PAGE_NAME, GateScoring, build_gate
    from recflow.evaluation.gate import GateConfig

    artifact = build_gate(
        store.open(),
        context.partition_key,
        family=family,
        candidate=settings.candidate,
        registry=registry.open(),
        cache=settings.champions_dir,
        config=GateConfig(
            primary_metric=config.primary_metric,
            epsilon=config.epsilon,
            confidence=config.confidence,
            bootstrap_samples=config.bootstrap_samples,
            seed=settings.seed,
            max_segment_loss=config.max_segment_loss,
            min_segment_impressions=config.min_segment_impressions,
            min_baseline_lead=config.min_baseline_lead,
            max_p99_ms=config.max_p99_ms,
            max_memory_mib=config.max_memory_mib,
            max_megabytes=config.max_megabytes,
            max_usd_per_million=config.max_usd_per_million,
        ),
        scoring=GateScoring(
            parity_impressions=config.parity_impressions,
            seed=settings.seed,
            threads=settings.threads,
        ),
        code_version=code_version_of(context),
        rebuild=config.rebuild,
    )
    with tracker_of(mlflow, prefix="gate.") as tracker:
        for name in (PAGE_NAME, DECISION_NAME):
            tracker.log_file(artifact.file(name))
    return artifact_result(
        GATE, artifact, {"page": link_to(artifact.file(PAGE_NAME)), **run_metadata(mlflow)}
    )


@dg.asset_check(
    asset=GATE.split("/"),
    name=MAY_BECOME_CHAMPION,
    blocking=True,
    description="The candidate meets every requirement for becoming the champion.",
)
def candidate_may_become_champion(
    context: dg.AssetCheckExecutionContext, store: StoreResource
) -> dg.AssetCheckResult:
    """Say what the gate decided, with every reason."""
    from recflow.adapters.gate import gate_claim

    return claim_result(GATE, gate_claim(store.open().get(GATE, context.partition_key)))


@daily_asset(
    CHAMPION,
    group=GROUP,
    kinds={"mlflow"},
    deps=keys_of([GATE]),
    code_version="1",
    pool=PROMOTION_POOL,
    description="The model that users get: the candidate, registered in MLflow with the alias "
    "`champion` – or with `candidate`, where an approval is required.",
)
def champion(
    context: dg.AssetExecutionContext,
    store: StoreResource,
    registry: RegistryResource,
    mlflow: dg.ResourceParam[Any],
) -> dg.MaterializeResult:
    """Register the candidate, and promote it."""
    from recflow.adapters.gate import promote_candidate
    from recflow.adapters.mlflow_registry import Audit
    from recflow.defs.promotion.results import outcome_metadata

    outcome = promote_candidate(
        store.open().get(GATE, context.partition_key),
        registry.open(),
        needs_approval=settings.approval == "required",
        audit=Audit(
            reason=f"the candidate of snapshot {context.partition_key} passed the gate",
            run=context.run_id,
        ),
        mlflow_run=mlflow.mlflow_run_id,
    )
    state = "waits" if outcome.waits else "champion"
    return dg.MaterializeResult(
        asset_key=dg.AssetKey(CHAMPION.split("/")),
        metadata={**outcome_metadata(registry.open(), outcome), **run_metadata(mlflow)},
        data_version=dg.DataVersion(f"{outcome.version}.{state}"),
    )

"""The smallest loss within a budget: a chain of compression steps, found by trying."""

from typing import Any

import dagster as dg
from pydantic import Field

from recflow.adapters.keys import COMPRESSED, FINE_TUNED, ITEMS, TRAIN, VALIDATION
from recflow.compression.budget import Budget, ChainSpace
from recflow.defs.common import (
    Rebuild,
    artifact_result,
    claim_result,
    code_version_of,
    keys_of,
)
from recflow.defs.hardware import model_asset
from recflow.defs.resources import StoreResource, settings
from recflow.defs.tracking import run_metadata, tracker_of

GROUP = "compression"
MEETS_BUDGET = "meets_budget"
_SPACE = ChainSpace()


class BudgetRunConfig(Rebuild):
    """The limits, the chains that are tried, and for how long."""

    max_megabytes: float | None = Field(
        25.0, description="Weights, user model and tokenizer on disk, in 10^6 bytes"
    )
    max_p99_ms: float | None = Field(
        None, description="99th percentile of the latency of one text on one thread"
    )
    max_memory_mib: float | None = Field(None, description="Peak memory of a fresh process")
    max_auc_loss: float | None = Field(
        0.01, description="Validation AUC lost, relative to the fine-tuned model's"
    )
    distill_layers: list[int] = Field(
        [*_SPACE.distill_layers], description="Layers of the students tried; 0: no student"
    )
    prune_shares: list[float] = Field(
        [*_SPACE.prune_shares], description="Shares of the layers that pruning leaves; 1: none"
    )
    low_rank_ratios: list[float] = Field(
        [*_SPACE.low_rank_ratios], description="Shares that factorising leaves; 1: none"
    )
    trim: list[bool] = Field([*_SPACE.trim], description="Whether the vocabulary is trimmed")
    precisions: list[str] = Field([*_SPACE.precisions], description="Precisions tried")
    minutes: float = Field(30.0, description="No further chain is begun after this time")
    stop_at_first: bool = Field(
        True, description="Stop at the first chain that meets the budget, from the gentlest on"
    )


@model_asset(
    COMPRESSED,
    group=GROUP,
    kinds={"onnx"},
    deps=keys_of([FINE_TUNED, TRAIN, VALIDATION, ITEMS]),
    code_version="1",
    description="The model of the chain of compression steps that meets a budget of size, latency, "
    "memory and accuracy; the nearest one where none does.",
)
def compressed(
    context: dg.AssetExecutionContext,
    config: BudgetRunConfig,
    store: StoreResource,
    mlflow: dg.ResourceParam[Any],
) -> dg.MaterializeResult:
    """Search the chain that meets the budget."""
    from recflow.adapters.budget_search import BudgetSearchConfig, budget_table, build_compressed

    with tracker_of(mlflow, prefix="compressed.") as tracker:
        artifact = build_compressed(
            store.open(),
            context.partition_key,
            budget=Budget(
                max_megabytes=config.max_megabytes,
                max_p99_ms=config.max_p99_ms,
                max_memory_mib=config.max_memory_mib,
                max_auc_loss=config.max_auc_loss,
            ),
            space=ChainSpace(
                distill_layers=tuple(config.distill_layers),
                prune_shares=tuple(config.prune_shares),
                low_rank_ratios=tuple(config.low_rank_ratios),
                trim=tuple(config.trim),
                precisions=tuple(config.precisions),
            ),
            config=BudgetSearchConfig(
                minutes=config.minutes,
                stop_at_first=config.stop_at_first,
                seed=settings.seed,
                threads=settings.threads,
            ),
            tracker=tracker,
            code_version=code_version_of(context),
            rebuild=config.rebuild,
        )
    extra = {"trials_table": dg.MetadataValue.md(budget_table(artifact)), **run_metadata(mlflow)}
    return artifact_result(COMPRESSED, artifact, extra)


@dg.asset_check(
    asset=COMPRESSED.split("/"),
    name=MEETS_BUDGET,
    description="The model meets every limit of the budget it was searched for.",
)
def meets_budget(
    context: dg.AssetCheckExecutionContext, store: StoreResource
) -> dg.AssetCheckResult:
    """Say which limits the nearest model breaks."""
    from recflow.adapters.budget_search import budget_claim

    return claim_result(
        COMPRESSED, budget_claim(store.open().get(COMPRESSED, context.partition_key))
    )

"""One click: approve the candidate that waits, or roll the champion back."""

import dagster as dg
from pydantic import Field

from recflow.defs.resources import RegistryResource

# One change of the champion at a time, whoever asks for it.
PROMOTION_POOL = "promotion"
_CONSOLE = {"loggers": {"console": {}}}


class ApprovalConfig(dg.Config):
    """Which candidate is approved, and why."""

    version: str | None = Field(None, description="Version that is meant; the candidate if unset")
    reason: str = Field("approved in the web UI", description="Why, for the history")


class RollbackConfig(dg.Config):
    """Why the champion is taken back."""

    reason: str = Field("rolled back in the web UI", description="Why, for the history")


@dg.op(pool=PROMOTION_POOL, description="Makes the candidate that waits the champion.")
def approve_candidate(
    context: dg.OpExecutionContext, config: ApprovalConfig, registry: RegistryResource
) -> None:
    """Promote what waits."""
    from recflow.adapters.mlflow_registry import Audit

    audit = Audit(reason=config.reason, run=context.run_id)
    promotion = registry.open().approve(audit, config.version)
    context.log.info(promotion.sentence)


@dg.op(pool=PROMOTION_POOL, description="Makes the previous champion the champion again.")
def roll_back_champion(
    context: dg.OpExecutionContext, config: RollbackConfig, registry: RegistryResource
) -> None:
    """Return to the previous champion."""
    from recflow.adapters.mlflow_registry import Audit

    promotion = registry.open().rollback(Audit(reason=config.reason, run=context.run_id))
    context.log.info(promotion.sentence)


@dg.job(
    name="approve",
    config=_CONSOLE,
    description="Make the candidate that waits for an approval the champion.",
)
def approve_job() -> None:
    """Approve."""
    approve_candidate()


@dg.job(
    name="rollback",
    config=_CONSOLE,
    description="Make the previous champion the champion again, at once.",
)
def rollback_job() -> None:
    """Roll back."""
    roll_back_champion()


PROMOTION_JOBS = [approve_job, rollback_job]

"""What people see of the registry in Dagster."""

from typing import TYPE_CHECKING

import dagster as dg

if TYPE_CHECKING:
    from recflow.adapters.gate import PromotionOutcome
    from recflow.adapters.mlflow_registry import ModelRegistry

HOW_TO_APPROVE = "`recflow approve`, or launch the job `approve` in the web UI"


def outcome_metadata(
    registry: "ModelRegistry", outcome: "PromotionOutcome"
) -> dict[str, dg.MetadataValue]:
    """What came of a candidate, and how to approve one that waits."""
    aliases = registry.aliases()
    described = registry.version(outcome.version)
    state = "waiting for an approval" if outcome.waits else "champion"
    found: dict[str, dg.MetadataValue] = {
        "state": dg.MetadataValue.text(state),
        "version": dg.MetadataValue.text(outcome.version),
        "model": dg.MetadataValue.text(described.name),
        "digest": dg.MetadataValue.text(described.digest),
        "champion": dg.MetadataValue.text(aliases.get("champion", "none")),
        "previous_champion": dg.MetadataValue.text(aliases.get("previous_champion", "none")),
        "registered_model": dg.MetadataValue.text(registry.name),
    }
    if outcome.waits:
        found["waits_because"] = dg.MetadataValue.text(outcome.waits)
        found["how_to_approve"] = dg.MetadataValue.md(HOW_TO_APPROVE)
    if outcome.promotion is not None:
        found["changed"] = dg.MetadataValue.bool(outcome.promotion.changed)
    return found

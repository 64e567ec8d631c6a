"""What Dagster is told of plans: predictions beside what was measured, as text and to plot."""

from collections.abc import Mapping
from typing import Final

import dagster as dg

from recflow.core.artifacts import JsonValue

# Description of the key ``memory`` of what trains.
MEMORY: Final = (
    "refuse: do not begin a training that needs more memory than is free; go_on: warn and begin"
)
# Metadata that Dagster plots over time, by the name of what was compared: the first that is there.
_PLOTTED: Final[Mapping[str, tuple[str, ...]]] = {
    "peak_memory_bytes": ("peak memory",),
    "peak_device_memory_bytes": ("peak device memory",),
    "step_seconds": ("encoder step", "head step"),
    "seconds": ("training",),
}


def plan_metadata(facts: Mapping[str, JsonValue]) -> dict[str, dg.MetadataValue]:
    """Predictions of a training beside what was measured: a table, and numbers to plot.

    Args:
        facts: Facts of the model; one that was stored before there were plans has none to show.
    """
    from recflow.adapters.planning import compared_facts, compared_table

    rows = compared_facts(facts)
    if not rows:
        return {}
    found: dict[str, dg.MetadataValue] = {"plan": dg.MetadataValue.md(compared_table(rows))}
    compared = {row.name: row for row in rows}
    for key, names in _PLOTTED.items():
        row = next((compared[name] for name in names if name in compared), None)
        if row is None:
            continue
        for side, value in (("predicted", row.predicted), ("measured", row.measured)):
            found[f"{side}_{key}"] = (
                dg.MetadataValue.int(round(value))
                if row.unit == "bytes"
                else dg.MetadataValue.float(float(value))
            )
    return found


def plans_metadata(plans: JsonValue) -> dict[str, dg.MetadataValue]:
    """Predictions of several models beside what was measured: one table.

    Args:
        plans: The rows of each model, by its name; ``None`` where nothing was planned.
    """
    from recflow.adapters.planning import compared_facts, compared_models_table

    if not isinstance(plans, Mapping) or not plans:
        return {}
    compared = {name: compared_facts({"plan": rows}) for name, rows in plans.items()}
    return {"plan": dg.MetadataValue.md(compared_models_table(compared))}

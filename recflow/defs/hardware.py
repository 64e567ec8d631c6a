"""What model assets need of a machine, as Dagster shows it and acts on it.

Asset tags, step tags, pool and run tags of an asset all come from its one
:class:`~recflow.hardware.requirements.HardwareRequirement`, which is planned when the location is
loaded, for the base model, the devices and the training time of the settings.
"""

import html
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import dagster as dg

from recflow.adapters.requirements import Need, requirements_of
from recflow.adapters.requirements import run_tags as run_tags_of_needs
from recflow.defs.common import daily_asset
from recflow.defs.models.run_config import ADAPTATION_DEFAULTS, DEFAULTS
from recflow.defs.resources import calibration, devices, family, settings
from recflow.hardware.device import GIB
from recflow.hardware.plan import Memory

NEEDS: Mapping[str, Need] = requirements_of(
    settings.base_model,
    DEFAULTS,
    family,
    devices,
    adaptation=ADAPTATION_DEFAULTS,
    max_hours=settings.training_hours,
    calibration=calibration,
)
"""By key of the asset: everything that uses all cores or an accelerator."""


def model_asset(
    key: str,
    *,
    group: str,
    kinds: set[str],
    needs: Mapping[str, Need] = NEEDS,
    **options: Any,
) -> Callable[[Callable[..., Any]], dg.AssetsDefinition]:
    """:func:`daily_asset` for what needs a machine of its own: with what it needs in every form.

    Args:
        key: Slash-separated key, one of ``needs``.
        group: Group, which is also the stage.
        kinds: Kinds shown in the UI.
        needs: By key, what assets need; of this deployment unless told otherwise.
        options: Further arguments of ``dg.asset``.
    """
    need = needs[key]
    return daily_asset(
        key,
        group=group,
        kinds=kinds,
        tags=need.tags,
        metadata=need_metadata(need),
        op_tags=need.op_tags,
        pool=need.pool,
        **options,
    )


def run_tags(keys: Iterable[str]) -> dict[str, str]:
    """Tags of a run that makes these assets; those that are no model assets need nothing."""
    return run_tags_of_needs(NEEDS[key] for key in keys if key in NEEDS)


def need_metadata(need: Need) -> dict[str, dg.MetadataValue]:
    """What was planned, for people who look at the asset in the web UI."""
    found: dict[str, dg.MetadataValue] = {"planned_work": dg.MetadataValue.text(need.work)}
    if need.requirement is None or need.plan is None:
        return {**found, "hardware_unknown": dg.MetadataValue.text(need.reason or "")}
    plan, requirement = need.plan, need.requirement
    count = f"{requirement.gpu_count} × " if requirement.gpu_count > 1 else ""
    found["device"] = dg.MetadataValue.text(f"{count}{plan.device.label}")
    columns = {"device": plan.memory} if plan.device.is_gpu else {"machine": plan.memory}
    reserved = {"device": requirement.gpu_memory_gib, "machine": requirement.host_memory_gib}
    if plan.device.is_gpu:
        columns["machine"] = plan.host_memory
    found["planned_hours"] = dg.MetadataValue.float(round(plan.seconds / 3_600, 3))
    found["planned_usd"] = dg.MetadataValue.float(round(plan.usd, 3))
    found["planned_memory"] = dg.MetadataValue.md(memory_table(columns, reserved))
    return found


def memory_table(columns: Mapping[str, Memory], reserved: Mapping[str, int]) -> str:
    """Memory by part in GiB as a Markdown table, largest part first.

    Args:
        columns: Memory by whose it is.
        reserved: What is reserved of it in GiB.
    """
    sizes: dict[str, int] = {}
    for memory in columns.values():
        for part, size in memory.parts.items():
            sizes[part] = max(size, sizes.get(part, 0))
    lines = [["GiB", *columns], ["---", *("---:" for _ in columns)]]
    for part in sorted(sizes, key=lambda name: -sizes[name]):
        cells = [memory.parts.get(part) for memory in columns.values()]
        lines.append(
            [_escaped(part), *("" if cell is None else f"{cell / GIB:.2f}" for cell in cells)]
        )
    lines.append(["**all**", *(f"**{memory.total / GIB:.2f}**" for memory in columns.values())])
    lines.append(["reserved", *(str(reserved[name]) for name in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    return html.escape(text).replace("|", "&#124;")

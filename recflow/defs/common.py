"""What the stages share: partition keys, owners, and metadata people look at."""

import base64
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from recflow.adapters.parquet_io import row_count
from recflow.core.artifacts import Artifact
from recflow.core.columns import Column, TableContract
from recflow.data.split import Claim
from recflow.defs.partitions import DAILY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OWNERS = ["team:recommendation"]


class Rebuild(dg.Config):
    """Work that is already stored is reused unless this says otherwise."""

    rebuild: bool = False


def daily_asset(
    key: str,
    *,
    group: str,
    kinds: set[str],
    contract: TableContract | None = None,
    tags: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    **options: Any,
) -> Callable[[Callable[..., Any]], dg.AssetsDefinition]:
    """``dg.asset`` with what all of recflow's assets share.

    Args:
        key: Slash-separated key; the artifact is stored under the same.
        group: Group, which is also the stage.
        kinds: Kinds shown in the UI.
        contract: The table the asset is, if it is one.
        tags: Tags beside that of the stage.
        metadata: Metadata beside the table's.
        options: Further arguments of ``dg.asset``.
    """
    return dg.asset(
        key=key.split("/"),
        partitions_def=DAILY,
        group_name=group,
        owners=OWNERS,
        kinds=kinds,
        tags={"recflow/stage": group, **(tags or {})},
        metadata={**(table_metadata(contract) if contract else {}), **(metadata or {})} or None,
        **options,
    )


def code_version_of(context: dg.AssetExecutionContext) -> str:
    """Code version of the asset that is being made; artifacts are stored under the same."""
    version = context.assets_def.code_versions_by_key[next(iter(context.selected_asset_keys))]
    assert version is not None
    return version


def column_schema(contract: TableContract) -> dg.TableSchema:
    """Show a table contract as Dagster's column schema."""
    return dg.TableSchema(columns=[_table_column(column) for column in contract.columns])


def table_metadata(contract: TableContract) -> dict[str, dg.TableSchema]:
    """Definition metadata of an asset that is a table."""
    return {"dagster/column_schema": column_schema(contract)}


def artifact_metadata(artifact: Artifact) -> dict[str, dg.MetadataValue]:
    """What is worth seeing of any artifact: its facts, size, digest and place."""
    facts = {name: _as_metadata(value) for name, value in artifact.facts.items()}
    return {
        **facts,
        "digest": dg.MetadataValue.text(artifact.digest),
        "size_bytes": dg.MetadataValue.int(artifact.manifest.bytes),
        "path": dg.MetadataValue.path(artifact.path),
        "reused": dg.MetadataValue.bool(artifact.reused),
    }


def days_result(
    context: dg.AssetExecutionContext, built: Mapping[str, Artifact]
) -> dg.MaterializeResult:
    """Report a daily table: each day's counts on its partition, the totals on the run."""
    key = context.asset_key
    for day, artifact in built.items():
        context.add_asset_metadata(
            {
                "dagster/partition_row_count": row_count(artifact),
                **artifact_metadata(artifact),
            },
            asset_key=key,
            partition_key=day,
        )
    missing = [day for day in context.partition_keys if day not in built]
    totals: dict[str, dg.MetadataValue] = {
        "days": dg.MetadataValue.int(len(built)),
        "days_without_data": dg.MetadataValue.int(len(missing)),
        "rows_in_run": dg.MetadataValue.int(sum(row_count(a) for a in built.values())),
        "days_reused": dg.MetadataValue.int(sum(a.reused for a in built.values())),
    }
    if missing:
        totals["missing_days"] = dg.MetadataValue.text(", ".join(missing))
    return dg.MaterializeResult(asset_key=key, metadata=totals)


def artifact_result(
    key: str, artifact: Artifact, extra: Mapping[str, Any] | None = None
) -> dg.MaterializeResult:
    """Report one artifact, with its digest as the data version."""
    return dg.MaterializeResult(
        asset_key=dg.AssetKey(key.split("/")),
        metadata={**artifact_metadata(artifact), **(extra or {})},
        data_version=dg.DataVersion(artifact.digest),
    )


def claim_result(
    key: str, claim: Claim, severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR
) -> dg.AssetCheckResult:
    """Report a claim about an asset as an asset check."""
    return dg.AssetCheckResult(
        severity=severity,
        asset_key=dg.AssetKey(key.split("/")),
        check_name=claim.name,
        passed=claim.holds,
        description=claim.description,
        metadata={
            **{name: _as_metadata(value) for name, value in claim.facts.items()},
            "examples": dg.MetadataValue.json(claim.examples),
        },
    )


def link_to(path: Path) -> dg.MetadataValue:
    """A link that opens a local file."""
    return dg.MetadataValue.url(path.absolute().as_uri())


def curve_plot(points: Sequence[Mapping[str, Any]], series: str) -> dg.MetadataValue:
    """A small line chart of ``series`` over ``points``, shown in Dagster's Markdown."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 2.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(1, len(points) + 1), [point[series] for point in points], marker="o")
    axes.set_xlabel("epoch")
    axes.set_ylabel(series.replace("_", " "))
    return _image(figure, series)


def bar_plot(values: Mapping[str, float], label: str) -> dg.MetadataValue:
    """A small bar chart, largest first, shown in Dagster's Markdown."""
    from matplotlib.figure import Figure

    ordered = sorted(values.items(), key=lambda item: item[1])
    figure = Figure(figsize=(5, 0.4 + 0.25 * len(ordered)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh([name for name, _ in ordered], [value for _, value in ordered])
    axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=7)
    axes.margins(x=0.15)
    axes.set_xlabel(label)
    return _image(figure, label)


def counts_table(title: str, counts: Mapping[str, int]) -> dg.MetadataValue:
    """A small Markdown table of counts."""
    lines = [f"| {title} | rows |", "|---|---:|", *(f"| {k} | {v:,} |" for k, v in counts.items())]
    return dg.MetadataValue.md("\n".join(lines))


def keys_of(specs: Sequence[str]) -> list[dg.AssetKey]:
    """Asset keys from their slash-separated names."""
    return [dg.AssetKey(name.split("/")) for name in specs]


def _image(figure: "Figure", title: str) -> dg.MetadataValue:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return dg.MetadataValue.md(f"![{title}](data:image/png;base64,{encoded})")


def _table_column(column: Column) -> dg.TableColumn:
    constraints = dg.TableColumnConstraints(nullable=column.nullable, unique=column.unique)
    return dg.TableColumn(
        column.name, str(column.dtype), description=column.description, constraints=constraints
    )


def _as_metadata(value: Any) -> dg.MetadataValue:
    match value:
        case bool():
            return dg.MetadataValue.bool(value)
        case int():
            return dg.MetadataValue.int(value)
        case float():
            return dg.MetadataValue.float(value)
        case str():
            return dg.MetadataValue.text(value)
        case _:
            return dg.MetadataValue.json(value)

"""Validations of daily tables: run, kept beside the day they judge, and asked for downstream."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import polars as pl

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.keys import validation_of
from recflow.adapters.parquet_io import ROWS, row_count
from recflow.core.artifacts import Artifact, Draft
from recflow.core.columns import TableContract
from recflow.core.errors import ContractError
from recflow.quality.contracts import Validation, validate_table
from recflow.quality.summary import summary_html

SUMMARY = "summary.html"
RESULT = "validation.json"
_CODE_VERSION = "1"


def validate_days(
    store: ArtifactStore, table_key: str, contract: TableContract, days: Sequence[str]
) -> dict[str, Artifact]:
    """Validate the stored days of a table against its contract and keep each day's summary.

    Days are validated together, which is far quicker; when that fails each is validated alone, so
    that the summary of a day speaks of that day. Days with the same content share a validation,
    and days already validated are not validated again.

    Returns:
        The validation of each stored day; ``facts["success"]`` says how it ended.
    """
    tables = store.existing(table_key, days)
    found = {day: _find(store, table_key, day, table) for day, table in tables.items()}
    pending = [day for day, validation in found.items() if validation is None]
    results = _validate({tables[day].digest: tables[day] for day in pending}, contract)
    for day in pending:

        def write(draft: Draft, day: str = day) -> None:
            result = replace(results[tables[day].digest], rows=row_count(tables[day]))
            _write(draft, table_key, day, result)

        found[day] = store.build(
            validation_of(table_key),
            day,
            write,
            code_version=_CODE_VERSION,
            parents={table_key: tables[day]},
            config={},
        )
    return {day: validation for day, validation in found.items() if validation is not None}


def require_valid(store: ArtifactStore, table_key: str, tables: Mapping[str, Artifact]) -> None:
    """Raise unless every day of ``tables`` passed its validation as it is stored now.

    Raises:
        ContractError: Names the first day that was not validated or did not pass.
    """
    for day, table in tables.items():
        validation = _find(store, table_key, day, table)
        if validation is None:
            raise ContractError(
                f"{table_key} of {day} has not been validated as it is stored now; "
                "materialise it together with its checks"
            )
        if not validation.facts["success"]:
            raise ContractError(
                f"{table_key} of {day} failed its validation: {validation.facts['failed']}; "
                f"see {validation.path / SUMMARY}"
            )


def _find(store: ArtifactStore, table_key: str, day: str, table: Artifact) -> Artifact | None:
    return store.find(
        validation_of(table_key),
        day,
        code_version=_CODE_VERSION,
        parents={table_key: table},
        config={},
    )


def _validate(tables: Mapping[str, Artifact], contract: TableContract) -> dict[str, Validation]:
    """Validate tables by digest: days with the same content share one validation."""
    if len(tables) > 1:
        together = validate_table(_scan(tables.values()), contract)
        if together.success:
            return dict.fromkeys(tables, together)
    return {digest: validate_table(_scan([table]), contract) for digest, table in tables.items()}


def _scan(tables: Iterable[Artifact]) -> pl.LazyFrame:
    return pl.concat([pl.scan_parquet(table.file(f"{ROWS}.parquet")) for table in tables])


def _write(draft: Draft, table_key: str, day: str, validation: Validation) -> None:
    page = summary_html(validation, title=table_key, partition=day)
    (draft.path / SUMMARY).write_text(page, encoding="utf-8")
    content = json.dumps(validation.to_json(), indent=2, sort_keys=True)
    (draft.path / RESULT).write_text(content + "\n", encoding="utf-8")
    draft.facts |= {
        "success": validation.success,
        "rows": validation.rows,
        "expectations": len(validation.expectations),
        "failed": [f"{e.name} on {e.column or 'the table'}" for e in validation.failed()],
    }

"""The drift that was found of the newest days, as Dagster's event log has it.

The event log rather than the stored artifacts: one small query reads any number of days, whether or
not the store is on this machine, and a day that somebody wiped does not count.
"""

from collections.abc import Sequence
from datetime import date
from typing import Any

import dagster as dg

from recflow.adapters.keys import DRIFT
from recflow.core.errors import ArtifactError
from recflow.quality.evidence import DriftEvidence

_DRIFT_ASSET = dg.AssetKey(DRIFT.split("/"))


def read_evidence(instance: dg.DagsterInstance, days: int) -> Sequence[DriftEvidence]:
    """Read the newest materialisation of each of the newest days that have one, oldest day first.

    Args:
        instance: Where the materialisations are recorded.
        days: How many days at most.

    Raises:
        ArtifactError: A materialisation has no verdict.
    """
    newest = instance.get_latest_storage_id_by_partition(
        _DRIFT_ASSET, dg.DagsterEventType.ASSET_MATERIALIZATION
    )
    if not newest:
        return []
    chosen = [newest[day] for day in sorted(newest)[-days:]]
    found = instance.fetch_materializations(
        dg.AssetRecordsFilter(_DRIFT_ASSET, storage_ids=chosen), limit=len(chosen)
    )
    evidence = [_evidence_of(record) for record in found.records]
    return sorted(evidence, key=lambda e: e.day)


def _evidence_of(record: dg.EventLogRecord) -> DriftEvidence:
    materialization = record.asset_materialization
    assert materialization is not None
    assert materialization.partition is not None
    facts: dict[str, Any] = {name: value.value for name, value in materialization.metadata.items()}
    digest = facts.get("digest")
    if not isinstance(digest, str):
        raise ArtifactError(
            f"the drift of {materialization.partition} was reported without the digest of a stored "
            "report; materialise it again"
        )
    return DriftEvidence.from_facts(date.fromisoformat(materialization.partition), digest, facts)

"""What the report says besides the measurements: where the data came from, and what made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from recflow.evaluation.label_efficiency import LabelShare


@dataclass(frozen=True, slots=True)
class ReportContext:
    """The surroundings of an evaluation.

    Attributes:
        title: Title of the report.
        data_name: Which logs, for people.
        snapshot_date: The snapshot's partition, ``YYYY-MM-DD``.
        command: The command that makes this report.
        days: Days with data in the snapshot's window, ``YYYY-MM-DD``.
        missing_days: Days of the window without data.
        row_counts: Rows by table, in the order they are to be shown.
        quarantine: Quarantined rows by reason.
        training: By model one mapping an epoch (or step): ``epoch`` and any other series by name.
        label_efficiency: What adapting the encoder gained at each share of the labels; empty where
            that was not studied.
        links: Where to read on, URL by name, e.g. the MLflow run.
        versions: Library versions.
        parents: Digest by artifact that the report was made from.
    """

    title: str
    data_name: str
    snapshot_date: str
    command: str
    days: Sequence[str] = ()
    missing_days: Sequence[str] = ()
    row_counts: Mapping[str, int] = field(default_factory=lambda: {})
    quarantine: Mapping[str, int] = field(default_factory=lambda: {})
    training: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=lambda: {})
    label_efficiency: Sequence[LabelShare] = ()
    links: Mapping[str, str] = field(default_factory=lambda: {})
    versions: Mapping[str, str] = field(default_factory=lambda: {})
    parents: Mapping[str, str] = field(default_factory=lambda: {})

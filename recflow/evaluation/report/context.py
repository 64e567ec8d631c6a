"""What the report says besides the measurements: where the data came from, and what made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from recflow.core.cost import CostSection
from recflow.evaluation.label_efficiency import LabelShare


@dataclass(frozen=True, slots=True)
class FamilyMember:
    """A model and how it was made smaller.

    Attributes:
        name: The model, named like its scorer.
        parent: The model it was made from; ``None`` for the one that the family descends from.
        step: How, in a word or two, e.g. ``prune``.
        description: The step with its numbers, for people.
    """

    name: str
    parent: str | None = None
    step: str = ""
    description: str = ""


@dataclass(frozen=True, slots=True)
class ItemVectors:
    """A way to store the vectors of the items, and what it loses.

    Attributes:
        codec: Its name.
        bytes_per_item: Bytes of one item's vector.
        mean_cosine: Mean cosine of the stored vectors with the exact ones.
        recall_at_10: Share of the ten nearest items that are found.
        recall_at_100: The same of the hundred nearest.
        validation_auc: AUC on validation with the stored vectors.
    """

    codec: str
    bytes_per_item: float
    mean_cosine: float | None = None
    recall_at_10: float | None = None
    recall_at_100: float | None = None
    validation_auc: float | None = None


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
        family: The models made from each other, parents before their children. Where it is left
            empty, it is made of the parents that the evaluation was told.
        item_vectors: Ways to store the item vectors; empty where that was not studied.
        costs: Money, energy and limits on kinds of devices; ``None`` where nobody planned.
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
    family: Sequence[FamilyMember] = ()
    item_vectors: Sequence[ItemVectors] = ()
    costs: CostSection | None = None
    links: Mapping[str, str] = field(default_factory=lambda: {})
    versions: Mapping[str, str] = field(default_factory=lambda: {})
    parents: Mapping[str, str] = field(default_factory=lambda: {})

"""What the drift of a day says, in the few words that retraining is decided by.

The full report of a day is large and made with large libraries; this is what is kept of it as facts
of the artifact and as asset metadata, so that a sensor can read many days in no time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date

from recflow.core.artifacts import JsonValue
from recflow.core.errors import ArtifactError


@dataclass(frozen=True, slots=True)
class DriftEvidence:
    """What the drift of one day says.

    Attributes:
        day: The day (UTC) that was looked at.
        digest: Digest of the stored report; another report of the same day is other evidence.
        champion: Version of the champion that the day was compared with; empty where there was
            none, and the day was compared with the days before it.
        champion_snapshot: Last day of the snapshot the champion was made from; empty without one.
        drifted: Names of the measures beyond their limits, e.g. ``click_rate``.
        decayed: Whether the champion ranks significantly worse than on its own test days.
    """

    day: date
    digest: str
    champion: str = ""
    champion_snapshot: str = ""
    drifted: Sequence[str] = ()
    decayed: bool = False

    @property
    def alarming(self) -> bool:
        """Whether anything is beyond its limit."""
        return self.decayed or bool(self.drifted)

    def to_facts(self) -> dict[str, JsonValue]:
        """As facts of the artifact; day and digest are the artifact's own."""
        return {
            "champion": self.champion,
            "champion_snapshot": self.champion_snapshot,
            "drifted": list(self.drifted),
            "decayed": self.decayed,
        }

    @classmethod
    def from_facts(cls, day: date, digest: str, facts: Mapping[str, JsonValue]) -> DriftEvidence:
        """Read what :meth:`to_facts` wrote.

        Raises:
            ArtifactError: The facts are not those of a drift report.
        """
        champion = facts.get("champion")
        snapshot = facts.get("champion_snapshot")
        drifted, decayed = facts.get("drifted"), facts.get("decayed")
        if not (
            isinstance(champion, str)
            and isinstance(snapshot, str)
            and isinstance(drifted, list)
            and isinstance(decayed, bool)
        ):
            raise ArtifactError(
                f"the drift of {day} has no verdict this recflow can read; materialise it again"
            )
        return cls(
            day=day,
            digest=digest,
            champion=champion,
            champion_snapshot=snapshot,
            drifted=tuple(str(name) for name in drifted),
            decayed=decayed,
        )

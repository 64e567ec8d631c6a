"""The champion: the model that users get, as whatever compares with it needs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Champion:
    """A promoted model whose files are on this machine.

    Attributes:
        version: Version in the model registry.
        snapshot: Partition of the snapshot it was made from: the last day it may have seen is
            before the test days of that snapshot.
        name: Model of the family, e.g. ``fine_tuned``.
        digest: Digest of the artifact it is a copy of.
        path: Its directory, as :func:`recflow.modeling.ranker.load_ranker` wants it; verified.
    """

    version: str
    snapshot: str
    name: str
    digest: str
    path: Path

"""Where artifacts live: ``<root>/<key>/<partition>/``, each whole or absent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from recflow.core.artifacts import (
    Artifact,
    Draft,
    JsonValue,
    build_artifact,
    find_artifact,
    fingerprint_of,
    read_artifact,
)

_WITHOUT_PARTITION = "current"


@dataclass(frozen=True, slots=True)
class ArtifactStore:
    """Artifacts below one folder, by key and partition."""

    root: Path

    def path(self, key: str, partition: str = "") -> Path:
        """Directory of an artifact, whether or not it exists."""
        return self.root / key / (partition or _WITHOUT_PARTITION)

    def get(self, key: str, partition: str = "") -> Artifact:
        """Open an artifact, verifying every file's hash.

        Raises:
            ArtifactError: It is not there or not whole.
        """
        return read_artifact(self.path(key, partition))

    def partitions(self, key: str) -> list[str]:
        """Partitions of a key that are stored, sorted."""
        folder = self.root / key
        stored = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        # What is being built, or on its way out, has a name with a dot in front.
        return sorted(name for name in stored if not name.startswith("."))

    def existing(self, key: str, partitions: Iterable[str]) -> dict[str, Artifact]:
        """Open those of ``partitions`` that are stored, in the order given."""
        return {p: self.get(key, p) for p in partitions if self.path(key, p).exists()}

    def find(
        self,
        key: str,
        partition: str,
        *,
        code_version: str,
        parents: Mapping[str, Artifact],
        config: Mapping[str, JsonValue],
    ) -> Artifact | None:
        """Return the artifact if it is stored and was made from exactly these."""
        fingerprint = fingerprint_of(key, partition, code_version, _digests(parents), config)
        return find_artifact(self.path(key, partition), fingerprint)

    def build(
        self,
        key: str,
        partition: str,
        build: Callable[[Draft], None],
        *,
        code_version: str,
        parents: Mapping[str, Artifact],
        config: Mapping[str, JsonValue],
        rebuild: bool = False,
    ) -> Artifact:
        """Return the artifact, building it unless it is already stored (see ``build_artifact``)."""
        return build_artifact(
            self.path(key, partition),
            build,
            key=key,
            partition=partition,
            code_version=code_version,
            parents=_digests(parents),
            config=config,
            rebuild=rebuild,
        )


def _digests(parents: Mapping[str, Artifact]) -> dict[str, str]:
    return {name: artifact.digest for name, artifact in parents.items()}

"""Artifacts: a directory, a manifest, and hashes that prove both are whole.

Everything recflow stores – a day of a table, a split, a model, a report – is a directory with a
``manifest.json`` beside its files. A directory is built under a temporary name and renamed when it
is complete, so that a directory with a manifest is always whole, whatever was killed.

The manifest's *fingerprint* identifies what the artifact was made from (parents, configuration,
code version); its *digest* identifies what it contains. The same fingerprint means the same
content, so finished work can be recognised and reused.

No artifact contains pickled objects: weights are safetensors or ONNX, tables Parquet, the rest JSON
and text.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TypeAlias, cast

from recflow.core.errors import ArtifactError

MANIFEST_NAME = "manifest.json"
MANIFEST_SCHEMA_VERSION = 1
FORBIDDEN_SUFFIXES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".npy"})
_RECORDED_LIBRARIES = (
    "recflow",
    "numpy",
    "onnxruntime",
    "polars",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)

JsonValue: TypeAlias = "str | int | float | bool | list[JsonValue] | dict[str, JsonValue] | None"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """Hash and size of one file of an artifact."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artifact is, what it was made from, and the hashes of its files.

    Attributes:
        key: Name of the artifact, e.g. ``models/fine_tuned``.
        partition: Partition key (``YYYY-MM-DD``), empty where there is none.
        fingerprint: Identity of what it was made from (see :func:`fingerprint_of`).
        parents: Digest of each artifact it was made from, by name.
        config: The configuration it was made with.
        facts: Numbers about the content (row counts, metrics) that readers want without opening it.
        files: Every file below the directory, by POSIX path relative to it.
        created_at: When it was completed (UTC, ISO 8601). Not part of the digest.
        library_versions: Versions of the libraries that wrote it. Not part of the digest.
    """

    key: str
    partition: str
    fingerprint: str
    parents: dict[str, str]
    config: dict[str, JsonValue]
    facts: dict[str, JsonValue]
    files: dict[str, StoredFile]
    created_at: str
    library_versions: dict[str, str]
    schema_version: int = MANIFEST_SCHEMA_VERSION

    @property
    def digest(self) -> str:
        """SHA-256 over the names and hashes of the files: the identity of the content."""
        lines = [f"{name}\0{self.files[name].sha256}" for name in sorted(self.files)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def bytes(self) -> int:
        """Total size of the files in bytes."""
        return sum(file.bytes for file in self.files.values())

    def to_json(self) -> str:
        """Serialise with sorted keys, ending in a newline."""
        return json.dumps(asdict(self) | {"digest": self.digest}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, source: Path) -> Manifest:
        """Parse a manifest.

        Raises:
            ArtifactError: It is not JSON, lacks a key, or has an unknown schema version.
        """
        try:
            raw = cast("dict[str, object]", json.loads(text))
            version = raw.pop("schema_version")
            digest = raw.pop("digest")
            files = cast("dict[str, dict[str, object]]", raw.pop("files"))
            manifest = cls(
                **cast("dict[str, str]", raw),  # type: ignore[arg-type]
                files={
                    name: StoredFile(str(entry["sha256"]), int(cast("int", entry["bytes"])))
                    for name, entry in files.items()
                },
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{source} is not a recflow manifest: {error}") from error
        if version != MANIFEST_SCHEMA_VERSION:
            raise ArtifactError(
                f"{source} has schema version {version}; this recflow reads "
                f"{MANIFEST_SCHEMA_VERSION}. Rebuild the artifact or use the recflow that wrote it."
            )
        if digest != manifest.digest:
            raise ArtifactError(f"{source} was altered: its digest does not match its file list")
        return manifest


@dataclass(frozen=True, slots=True)
class Artifact:
    """A complete artifact on disk: where it is and what its manifest says."""

    path: Path
    manifest: Manifest
    reused: bool = False

    @property
    def digest(self) -> str:
        """Identity of the content."""
        return self.manifest.digest

    @property
    def facts(self) -> dict[str, JsonValue]:
        """The manifest's facts."""
        return self.manifest.facts

    def file(self, name: str) -> Path:
        """Path of one file of the artifact.

        Raises:
            ArtifactError: The artifact has no such file.
        """
        if name not in self.manifest.files:
            raise ArtifactError(
                f"artifact {self.manifest.key!r} has no file {name!r}; "
                f"it has {sorted(self.manifest.files)}"
            )
        return self.path / name

    def verify(self) -> None:
        """Hash every file again.

        Raises:
            ArtifactError: Names the first file that is missing, altered, or not in the manifest.
        """
        present = set(_files_below(self.path))
        for name, stored in self.manifest.files.items():
            if name not in present:
                raise ArtifactError(f"{self.path / name} is missing; rebuild the artifact")
            if sha256_of(self.path / name) != stored.sha256:
                raise ArtifactError(f"{self.path / name} was altered; rebuild the artifact")
        extra = sorted(present - set(self.manifest.files))
        if extra:
            raise ArtifactError(f"{self.path / extra[0]} is not in the manifest")


@dataclass(slots=True)
class Draft:
    """An artifact being built: write files below :attr:`path`, numbers into :attr:`facts`.

    Attributes:
        path: Where the files go.
        fingerprint: Identity of what it is made from.
        facts: Numbers about the content.
    """

    path: Path
    fingerprint: str
    facts: dict[str, JsonValue] = field(default_factory=lambda: {})


def fingerprint_of(
    key: str,
    partition: str,
    code_version: str,
    parents: Mapping[str, str],
    config: Mapping[str, JsonValue],
) -> str:
    """Identity of what an artifact is made from: SHA-256 of the canonical JSON of the arguments."""
    content = [key, partition, code_version, dict(parents), dict(config)]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file so that readers see the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_artifact(path: Path, *, verify: bool = True) -> Artifact:
    """Open a complete artifact.

    Args:
        path: The artifact's directory.
        verify: Hash every file and compare with the manifest.

    Raises:
        ArtifactError: There is no manifest, or a file does not match it.
    """
    manifest_path = path / MANIFEST_NAME
    try:
        text = manifest_path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"{path} holds no complete artifact; materialise it first") from None
    artifact = Artifact(path, Manifest.from_json(text, manifest_path))
    if verify:
        artifact.verify()
    return artifact


def find_artifact(path: Path, fingerprint: str) -> Artifact | None:
    """Return the artifact at ``path`` when it is whole and was made from ``fingerprint``.

    A directory that is missing, altered, or made from something else gives ``None``: it is to be
    built again.
    """
    try:
        artifact = read_artifact(path, verify=False)
        if artifact.manifest.fingerprint != fingerprint:
            return None
        artifact.verify()
    except ArtifactError:
        return None
    return Artifact(artifact.path, artifact.manifest, reused=True)


@contextlib.contextmanager
def draft_artifact(
    path: Path,
    *,
    key: str,
    partition: str,
    fingerprint: str,
    parents: Mapping[str, str],
    config: Mapping[str, JsonValue],
) -> Generator[Draft]:
    """Build an artifact under a temporary name and move it to ``path`` when the block ends well.

    An exception inside the block removes the draft and leaves what was at ``path`` untouched.

    Raises:
        ArtifactError: A file could hold a pickle, judged by its suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft_path = path.with_name(f".{path.name}.{uuid.uuid4().hex}.draft")
    draft_path.mkdir()
    try:
        draft = Draft(draft_path, fingerprint)
        yield draft
        manifest = Manifest(
            key=key,
            partition=partition,
            fingerprint=fingerprint,
            parents=dict(parents),
            config=dict(config),
            facts=draft.facts,
            files=_hash_files(draft_path),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            library_versions=library_versions(),
        )
        write_text_atomically(draft_path / MANIFEST_NAME, manifest.to_json())
        _replace_directory(draft_path, path)
    finally:
        shutil.rmtree(draft_path, ignore_errors=True)


def build_artifact(
    path: Path,
    build: Callable[[Draft], None],
    *,
    key: str,
    partition: str = "",
    code_version: str,
    parents: Mapping[str, str],
    config: Mapping[str, JsonValue],
    rebuild: bool = False,
) -> Artifact:
    """Return the artifact at ``path``, building it unless the same one is already there.

    Args:
        path: Directory of the artifact.
        build: Writes the files below ``draft.path`` and the numbers into ``draft.facts``.
        key: Name of the artifact.
        partition: Partition key, empty where there is none.
        code_version: Version of the code that ``build`` runs; change it when its result changes.
        parents: Digest of each artifact it is made from, by name.
        config: Configuration it is made with.
        rebuild: Build even when the same artifact is already there.
    """
    fingerprint = fingerprint_of(key, partition, code_version, parents, config)
    found = None if rebuild else find_artifact(path, fingerprint)
    if found is not None:
        return found
    with draft_artifact(
        path,
        key=key,
        partition=partition,
        fingerprint=fingerprint,
        parents=parents,
        config=config,
    ) as draft:
        build(draft)
    return read_artifact(path, verify=False)


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that decide what an artifact contains."""
    versions: dict[str, str] = {}
    for name in _RECORDED_LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _files_below(path: Path) -> Iterator[str]:
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.name != MANIFEST_NAME:
            yield file.relative_to(path).as_posix()


def _hash_files(path: Path) -> dict[str, StoredFile]:
    files: dict[str, StoredFile] = {}
    for name in _files_below(path):
        file = path / name
        if file.suffix in FORBIDDEN_SUFFIXES:
            raise ArtifactError(
                f"{name} may hold a pickle; store safetensors, ONNX, Parquet or JSON"
            )
        files[name] = StoredFile(sha256_of(file), file.stat().st_size)
    return files


def _replace_directory(source: Path, target: Path) -> None:
    """Move ``source`` to ``target``; what was there is set aside first and removed last.

    A kill between the two renames leaves no artifact at ``target``, never half of one.
    """
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
    if target.exists():
        target.rename(aside)
    source.rename(target)
    shutil.rmtree(aside, ignore_errors=True)

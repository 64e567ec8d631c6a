import json
from pathlib import Path

import pytest

from recflow.core.artifacts import (
    Artifact,
    Draft,
    build_artifact,
    draft_artifact,
    find_artifact,
    fingerprint_of,
    read_artifact,
)
from recflow.core.errors import ArtifactError


def build_hello(
    path: Path, *, rebuild: bool = False, config: int = 1, text: str = "hi"
) -> Artifact:
    def build(draft: Draft) -> None:
        (draft.path / "sub").mkdir()
        (draft.path / "sub" / "hello.txt").write_text(text)
        draft.facts["rows"] = 3

    return build_artifact(
        path,
        build,
        key="tests/hello",
        partition="2026-01-01",
        code_version="1",
        parents={"parent": "abc"},
        config={"k": config},
        rebuild=rebuild,
    )


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    built = build_hello(tmp_path / "a")
    read = read_artifact(tmp_path / "a")
    assert read.manifest == built.manifest
    assert read.facts == {"rows": 3}
    assert read.file("sub/hello.txt").read_text() == "hi"
    assert read.manifest.bytes == 2


def test_same_fingerprint_is_reused_and_another_is_rebuilt(tmp_path: Path) -> None:
    first = build_hello(tmp_path / "a")
    assert not first.reused
    again = build_hello(tmp_path / "a", text="would differ")
    assert again.reused
    assert again.digest == first.digest
    other = build_hello(tmp_path / "a", config=2, text="other")
    assert not other.reused
    assert other.digest != first.digest
    assert build_hello(tmp_path / "a", config=2, rebuild=True, text="forced").digest != other.digest


def test_failed_build_leaves_the_old_artifact_and_no_draft(tmp_path: Path) -> None:
    first = build_hello(tmp_path / "a")

    def fail(draft: Draft) -> None:
        (draft.path / "half.txt").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        build_artifact(
            tmp_path / "a", fail, key="tests/hello", code_version="2", parents={}, config={}
        )
    assert read_artifact(tmp_path / "a").digest == first.digest
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("damage", ["change", "remove", "add"])
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    artifact = build_hello(tmp_path / "a")
    file = artifact.file("sub/hello.txt")
    if damage == "change":
        file.write_text("ho")
    elif damage == "remove":
        file.unlink()
    else:
        (tmp_path / "a" / "extra.txt").write_text("?")
    with pytest.raises(ArtifactError):
        read_artifact(tmp_path / "a")
    assert find_artifact(tmp_path / "a", artifact.manifest.fingerprint) is None
    assert not build_hello(tmp_path / "a").reused


def test_altered_manifest_is_refused(tmp_path: Path) -> None:
    build_hello(tmp_path / "a")
    manifest = tmp_path / "a" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"]["sub/hello.txt"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="altered"):
        read_artifact(tmp_path / "a")
    content["schema_version"] = 99
    manifest.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="schema version 99"):
        read_artifact(tmp_path / "a")
    manifest.write_text("{")
    with pytest.raises(ArtifactError, match="not a recflow manifest"):
        read_artifact(tmp_path / "a")


def test_missing_artifact_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="materialise it first"):
        read_artifact(tmp_path / "nothing")


def test_pickles_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match="pickle"),
        draft_artifact(
            tmp_path / "a", key="k", partition="", fingerprint="f", parents={}, config={}
        ) as draft,
    ):
        (draft.path / "weights.pt").write_bytes(b"\x80")
    assert not list(tmp_path.iterdir())


def test_fingerprint_depends_on_every_argument() -> None:
    base = fingerprint_of("k", "p", "1", {"a": "x"}, {"b": 1})
    others = [
        fingerprint_of("l", "p", "1", {"a": "x"}, {"b": 1}),
        fingerprint_of("k", "q", "1", {"a": "x"}, {"b": 1}),
        fingerprint_of("k", "p", "2", {"a": "x"}, {"b": 1}),
        fingerprint_of("k", "p", "1", {"a": "y"}, {"b": 1}),
        fingerprint_of("k", "p", "1", {"a": "x"}, {"b": 2}),
    ]
    assert len({base, *others}) == 6

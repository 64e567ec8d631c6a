"""Measurements survive their JSON, and those of another recflow are refused with the remedy."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.evaluations import load_measurements
from recflow.adapters.keys import MEASUREMENTS
from recflow.core.artifacts import Artifact, Draft
from recflow.core.errors import ArtifactError
from recflow.core.measurement import Energy, Latency, Measurement

MEASURED = Measurement(
    name="fine_tuned",
    runtime="torch",
    threads=1,
    size_bytes=90_000_000,
    serving_bytes=91_000_000,
    parameters=22_000_000,
    load_seconds=0.5,
    texts_per_second=100.0,
    throughput_spread=0.05,
    latencies=(Latency(1, 6.0, 7.0, 8.0, 300, 0.01), Latency(32, 90.0, 95.0, 99.0, 50, -0.02)),
    peak_rss_bytes=400_000_000,
    energy=Energy(None, "no RAPL counter"),
)


def stored(folder: Path, content: list[dict[str, Any]]) -> Artifact:
    def build(draft: Draft) -> None:
        (draft.path / "measurements.json").write_text(json.dumps(content), encoding="utf-8")

    return ArtifactStore(folder).build(
        MEASUREMENTS, "2026-03-03", build, code_version="1", parents={}, config={}
    )


def test_measurements_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert load_measurements(stored(tmp_path, [asdict(MEASURED)])) == [MEASURED]


@pytest.mark.parametrize("change", [{"energy": ...}, {"serving_bytes": ...}, {"colour": "red"}])
def test_measurements_of_another_recflow_are_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    entry = {key: value for key, value in (asdict(MEASURED) | change).items() if value is not ...}
    with pytest.raises(ArtifactError, match=f"materialise {MEASUREMENTS} again"):
        load_measurements(stored(tmp_path, [entry]))

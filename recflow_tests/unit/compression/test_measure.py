import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from recflow.compression.measure import MeasurementConfig, measure, serving_bytes
from recflow.compression.quantize import QuantizationConfig, quantize_ranker
from recflow.core.columns import Columns
from recflow.core.errors import ArtifactError, ConfigError
from recflow.core.measurement import Energy
from recflow.modeling.tracking import NullTracker
from recflow.modeling.trainer import TrainingReport
from recflow_tests.unit.compression.test_energy import write_zone

QUICK = MeasurementConfig(
    batch_sizes=(1, 4),
    calls=(3, 2),
    rounds=2,
    warmup_batches=1,
    throughput_texts=20,
    throughput_rounds=1,
)


def test_every_variant_is_measured(
    trained: tuple[Path, TrainingReport],
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
) -> None:
    (tmp_path / "onnx").mkdir()
    quantize_ranker(
        parent=trained[0],
        output=tmp_path / "onnx",
        items=items,
        train=train,
        validation=validation,
        config=QuantizationConfig(padding_tolerance=0.1, threads=1),
        tracker=NullTracker(),
    )
    texts = items[Columns.TEXT].to_list()
    onnx, powercap = tmp_path / "onnx", tmp_path / "powercap"
    write_zone(powercap, "intel-rapl:0", "package-0", 5)
    torch_one, onnx_one = measure({"a": trained[0], "b": onnx}, texts, QUICK, powercap=powercap)
    assert (torch_one.name, torch_one.runtime) == ("a", "torch")
    assert (onnx_one.name, onnx_one.runtime) == ("b", "onnxruntime")
    assert onnx_one.size_bytes == (onnx / "model.onnx").stat().st_size
    assert torch_one.parameters == onnx_one.parameters == trained[1].parameters
    for one in (torch_one, onnx_one):
        assert [(x.batch_size, x.samples) for x in one.latencies] == [(1, 12), (4, 8)]
        assert all(0 < x.p50 <= x.p95 <= x.p99 for x in one.latencies)
        assert all(x.drift > -1 for x in one.latencies)
        assert one.texts_per_second > 0
        assert one.throughput_spread >= 0
        # The counter of this folder stands still.
        assert one.energy == Energy(0.0, "RAPL: package-0")
        assert one.size_bytes < one.serving_bytes
        assert one.load_seconds > 0
        json.dumps(dataclasses.asdict(one))
    # PyTorch alone is larger than this; an ONNX variant must not pay for it.
    assert onnx_one.peak_rss_bytes < 200 * 2**20 < torch_one.peak_rss_bytes


def test_serving_needs_every_file_but_the_manifest(tmp_path: Path) -> None:
    for name, content in (("model.onnx", "12345"), ("config.json", "123"), ("manifest.json", "1")):
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "tokenizer.json").write_text("1234567", encoding="utf-8")
    assert serving_bytes(tmp_path) == 5 + 3 + 7


def test_by_default_a_99th_percentile_of_single_texts_means_something() -> None:
    config = MeasurementConfig()
    samples = {
        size: 2 * config.rounds * calls
        for size, calls in zip(config.batch_sizes, config.calls, strict=True)
    }
    assert samples == {1: 300, 32: 40}


def test_the_onnx_path_imports_no_torch() -> None:
    code = (
        "import sys, recflow.compression.probe, recflow.modeling.onnx_runtime\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_directory_without_a_ranker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a ranker"):
        measure({"nothing": tmp_path}, ["text"], QUICK)


def test_no_texts_is_refused(trained: tuple[Path, TrainingReport]) -> None:
    with pytest.raises(ConfigError, match="texts"):
        measure({"a": trained[0]}, [], QUICK)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("threads", 0),
        ("rounds", 0),
        ("warmup_batches", -1),
        ("calls", (30,)),
        ("calls", (30, 0)),
        ("batch_sizes", ()),
        ("batch_sizes", (0,)),
    ],
)
def test_impossible_configuration_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        MeasurementConfig(**{key: value})  # type: ignore[arg-type]

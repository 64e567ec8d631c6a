import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from recflow.compression.measure import MeasurementConfig, measure
from recflow.compression.quantize import QuantizationConfig, quantize_ranker
from recflow.core.columns import Columns
from recflow.core.errors import ArtifactError, ConfigError
from recflow.modeling.trainer import TrainingReport

QUICK = MeasurementConfig(
    batch_sizes=(1, 4), warmup_rounds=1, rounds=5, throughput_texts=20, throughput_rounds=2
)


def test_every_variant_is_measured(
    trained: tuple[Path, TrainingReport], items: pl.DataFrame, tmp_path: Path
) -> None:
    quantize_ranker(
        parent=trained[0], output=tmp_path, items=items, config=QuantizationConfig(threads=1)
    )
    texts = items[Columns.TEXT].to_list()
    torch_one, onnx_one = measure({"a": trained[0], "b": tmp_path}, texts, QUICK)
    assert (torch_one.name, torch_one.runtime) == ("a", "torch")
    assert (onnx_one.name, onnx_one.runtime) == ("b", "onnxruntime")
    assert onnx_one.size_bytes == (tmp_path / "model.onnx").stat().st_size
    assert torch_one.parameters == onnx_one.parameters == trained[1].parameters
    for one in (torch_one, onnx_one):
        assert [(x.batch_size, x.samples) for x in one.latencies] == [(1, 5), (4, 5)]
        assert all(0 < x.p50 <= x.p95 <= x.p99 for x in one.latencies)
        assert one.texts_per_second > 0
        assert one.load_seconds > 0
        json.dumps(dataclasses.asdict(one))
    # PyTorch alone is larger than this; an ONNX variant must not pay for it.
    assert onnx_one.peak_rss_bytes < 200 * 2**20 < torch_one.peak_rss_bytes


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
        ("warmup_rounds", -1),
        ("batch_sizes", ()),
        ("batch_sizes", (0,)),
    ],
)
def test_impossible_configuration_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        MeasurementConfig(**{key: value})  # type: ignore[arg-type]

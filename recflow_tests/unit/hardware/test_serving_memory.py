"""The memory that a plan of serving predicts, beside that of a real process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from recflow.adapters.served import served_model
from recflow.compression.config import QuantizationConfig
from recflow.compression.export import export_encoder
from recflow.compression.quantize import quantize_graph
from recflow.hardware.inference import ONNXRUNTIME, TORCH, plan_inference
from recflow.hardware.machine import this_machine
from recflow.hardware.workload import InferenceWorkload, TextLengths
from recflow.modeling.encoder import TextEncoder, describe_encoder, save_encoder
from recflow.modeling.layout import LAYOUT
from recflow.modeling.texts import TextTokenizer
from recflow_tests.unit.modeling.tiny import TOPICS, words_of, write_base_model

TEXTS = [" ".join(words_of(topic)[: 2 + n % 5]) for n in range(50) for topic in TOPICS]
SIZES = {"small": (1, 64, 1_000), "large": (4, 512, 40_000)}  # layers, width, vocabulary
BATCH = 64


def write_model(folder: Path, size: str, runtime: str) -> Path:
    """An encoder with random weights, as far as a process needs it to encode texts."""
    layers, width, vocabulary = SIZES[size]
    path = write_base_model(folder / size / runtime)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
    )
    encoder = TextEncoder(BertModel(config, add_pooling_layer=False), "mean").eval()
    described = {"layout": LAYOUT, "runtime": runtime, "max_tokens": 16, "precision": "fp32"}
    described["encoder"] = describe_encoder(encoder)
    save_encoder(encoder, path / "model.safetensors")
    if runtime == ONNXRUNTIME:
        content = quantize_graph(
            export_encoder(encoder), [[2, 3]], QuantizationConfig(precision="fp32")
        )
        (path / "model.onnx").write_bytes(content)
    (path / "config.json").write_text(json.dumps(described))
    return path


def predicted(path: Path, runtime: str) -> int:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"runtime": TORCH}))
    model = served_model(path)
    (path / "config.json").write_text(json.dumps(config))
    if runtime == ONNXRUNTIME:
        model = served_model(path, exported_from=model)
    lengths = [len(tokens) for tokens in TextTokenizer(path / "tokenizer.json", 16)(TEXTS)]
    workload = InferenceWorkload(
        items=0, history=0, candidates=0, lengths=TextLengths.of(lengths), batch=BATCH
    )
    return plan_inference(model, workload, this_machine(), threads=1).memory.total


def measured(path: Path) -> int:
    done = subprocess.run(
        [sys.executable, "-m", "recflow.compression.probe", str(path), "1"],
        input=json.dumps(TEXTS),
        capture_output=True,
        text=True,
        check=True,
    )
    return int(json.loads(done.stdout)["peak_rss_bytes"])


@pytest.mark.parametrize("runtime", [TORCH, ONNXRUNTIME])
def test_a_fresh_process_takes_what_was_planned(tmp_path: Path, runtime: str) -> None:
    torch.manual_seed(0)
    plans, peaks = {}, {}
    for size in SIZES:
        path = write_model(tmp_path, size, runtime)
        plans[size], peaks[size] = predicted(path, runtime), measured(path)
        assert plans[size] == pytest.approx(peaks[size], rel=0.25)
    # Libraries are most of a small process: what the model adds must be right as well.
    assert plans["large"] - plans["small"] == pytest.approx(
        peaks["large"] - peaks["small"], rel=0.25
    )

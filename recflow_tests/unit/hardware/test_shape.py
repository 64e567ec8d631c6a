"""The counts of EncoderShape against Hugging Face's own models, built without weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import AutoConfig, AutoModel

from recflow.core.errors import ArtifactError, ConfigError
from recflow.hardware.presets import PRESETS, preset_config
from recflow.hardware.shape import EncoderShape
from recflow.modeling.architectures import ARCHITECTURES, find_architecture
from recflow_tests.unit.modeling.families import CONFIGS


def _model(config: hf.PretrainedConfig) -> Any:
    arguments = find_architecture(config.model_type).model_arguments
    with torch.device("meta"):
        return AutoModel.from_config(config, **arguments)


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _compare(config: hf.PretrainedConfig, written: dict[str, Any]) -> None:
    model, shape = _model(config), EncoderShape.from_config(written)
    architecture = find_architecture(config.model_type)(model)
    layers = list(architecture.layers)
    assert shape.parameters == _count(model)
    assert shape.layers == len(layers)
    assert shape.layers * shape.layer_parameters == pytest.approx(
        sum(map(_count, layers)), rel=1e-12
    )
    matrices = [p for layer in layers for p in layer.parameters() if p.dim() == 2]
    counted = sum(matrix.numel() for matrix in matrices)
    assert shape.layers * shape.matrix_parameters == pytest.approx(counted, rel=1e-12)
    # PyTorch's matrices have a row an output.
    assert shape.matrix_kinds == {(matrix.shape[1], matrix.shape[0]) for matrix in matrices}
    norm = architecture.final_norm
    assert shape.top_parameters == (0 if norm is None else _count(norm))
    assert shape.longest_text == architecture.longest_text
    assert shape.causal == architecture.causal


@pytest.mark.parametrize("family", list(CONFIGS))
def test_every_family_has_the_parameters_of_hugging_face(family: str) -> None:
    config = CONFIGS[family]()
    _compare(config, config.to_dict())


def test_every_family_is_counted() -> None:
    with pytest.raises(ConfigError) as error:
        EncoderShape.from_config({"model_type": "t5"})
    assert str(error.value).endswith("allowed: " + ", ".join(sorted(ARCHITECTURES)))


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_has_the_parameters_of_hugging_face(preset: str) -> None:
    written = preset_config(preset)
    assert written is not None
    kind = {name: value for name, value in written.items() if name != "model_type"}
    _compare(AutoConfig.for_model(written["model_type"], **kind), written)


_SMALL = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_OPTIONS: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "llama with biases": lambda: hf.LlamaConfig(
        **_SMALL, num_key_value_heads=1, attention_bias=True, mlp_bias=True
    ),
    "llama with wide heads": lambda: hf.LlamaConfig(**_SMALL, num_key_value_heads=2, head_dim=16),
    "qwen3 with biases": lambda: hf.Qwen3Config(
        **_SMALL, num_key_value_heads=2, head_dim=16, attention_bias=True
    ),
    "gemma": lambda: hf.GemmaConfig(**_SMALL, num_key_value_heads=1, head_dim=16),
    "modernbert with biases": lambda: hf.ModernBertConfig(
        **_SMALL, attention_bias=True, mlp_bias=True, norm_bias=True
    ),
    "electra of one width": lambda: hf.ElectraConfig(**_SMALL, embedding_size=32),
    "mpnet with few buckets": lambda: hf.MPNetConfig(**_SMALL, relative_attention_num_buckets=8),
    "bert without segments": lambda: hf.BertConfig(**_SMALL, type_vocab_size=1),
}


@pytest.mark.parametrize("option", list(_OPTIONS))
def test_options_of_families_are_counted(option: str) -> None:
    config = _OPTIONS[option]()
    _compare(config, config.to_dict())


def _bert(**changes: Any) -> EncoderShape:
    return EncoderShape.from_config({**hf.BertConfig(**{**_SMALL, **changes}).to_dict()})


def test_scaling_removes_layers_tokens_heads_and_channels() -> None:
    shape = _bert()
    assert shape.scaled(layers=2).parameters == _bert(num_hidden_layers=2).parameters
    assert shape.scaled(vocabulary=10).parameters == _bert(vocab_size=10).parameters
    half = shape.scaled(layer_share=0.5)
    # Half the heads and channels: half of each matrix; biases and norms stay.
    assert half.heads == 2
    assert half.channels == 24
    assert half.matrix_parameters * 2 == shape.matrix_parameters
    lost = (shape.matrix_parameters - half.matrix_parameters) * shape.layers
    assert shape.parameters - half.parameters == lost
    # Nothing grows.
    assert shape.scaled(layers=99, vocabulary=10_000) == shape


def test_reads_a_folder_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(hf.BertConfig(**_SMALL).to_dict()))
    assert EncoderShape.read(tmp_path) == EncoderShape.read(file) == _bert()


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "cannot be read"), ("[]", "an object is expected"), (None, "No such file")],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str | None, said: str) -> None:
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ArtifactError, match=said) as error:
        EncoderShape.read(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"hidden_size": None},
            "hidden_size = None is not allowed; allowed: a whole number from 1 on",
        ),
        (
            {"num_hidden_layers": 0},
            "num_hidden_layers = 0 is not allowed; allowed: a whole number from 1 on",
        ),
        (
            {"vocab_size": "30522"},
            "vocab_size = '30522' is not allowed; allowed: a whole number from 0 on",
        ),
        (
            {"intermediate_size": True},
            "intermediate_size = True is not allowed; allowed: a whole number from 0 on",
        ),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        EncoderShape.from_config({"model_type": "bert", **_SMALL, **changes})
    assert str(error.value) == sentence

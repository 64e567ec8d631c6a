import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, GPT2Config, GPT2Model

from recflow.core.errors import ArtifactError, ConfigError
from recflow.modeling.encoder import (
    TorchRuntime,
    build_encoder,
    describe_encoder,
    load_pretrained,
    load_weights,
    save_encoder,
)
from recflow.modeling.texts import TextTokenizer, encode_texts, pad_tokens
from recflow_tests.unit.modeling.tiny import write_base_model

TEXTS = ["sea0 the war1", "pop2", "tax0 tax1 tax2 tax3 tax4 tax5 new old very", "sun1 sun2"]


@pytest.fixture
def copy(base_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_model, tmp_path / "copy"))


def test_vectors_are_the_masked_mean_of_the_transformer(base_model: Path) -> None:
    tokens = TextTokenizer(base_model / "tokenizer.json", 16)(TEXTS)
    reference = AutoModel.from_pretrained(base_model, add_pooling_layer=False).eval()
    runtime = TorchRuntime(load_pretrained(base_model), 1, mixed=False)
    vectors = runtime(tokens)
    for ids, vector in zip(tokens, vectors, strict=True):
        with torch.no_grad():
            mean = reference(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-6)


def test_order_and_company_of_the_texts_do_not_matter(base_model: Path) -> None:
    runtime = TorchRuntime(load_pretrained(base_model), 1, mixed=False)
    tokenizer = TextTokenizer(base_model / "tokenizer.json", 16)
    together = encode_texts(runtime, tokenizer, TEXTS)
    alone = np.concatenate([encode_texts(runtime, tokenizer, [text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_long_texts_are_cut(base_model: Path) -> None:
    tokenizer = TextTokenizer(base_model / "tokenizer.json", 5)
    assert [len(tokens) for tokens in tokenizer(TEXTS)] == [5, 3, 5, 4]
    ids, mask = pad_tokens(tokenizer(TEXTS))
    assert ids.shape == mask.shape == (4, 5)
    assert mask.sum(1).tolist() == [5, 3, 5, 4]


def test_round_trip_of_description_and_weights(base_model: Path, tmp_path: Path) -> None:
    encoder = load_pretrained(base_model)
    save_encoder(encoder, tmp_path / "model.safetensors")
    again = build_encoder(json.loads(json.dumps(describe_encoder(encoder))))
    load_weights(again.transformer, tmp_path / "model.safetensors")
    tokens = TextTokenizer(base_model / "tokenizer.json", 16)(TEXTS)
    np.testing.assert_array_equal(TorchRuntime(again, 1)(tokens), TorchRuntime(encoder, 1)(tokens))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_directory_without_a_file_is_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        load_pretrained(copy)


def test_missing_weights_are_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"lack 1 tensors, .*layer\.1\.output\.dense\.weight"):
        load_pretrained(copy)


def test_damaged_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_pretrained(copy)


def test_a_tokenizer_of_another_vocabulary_is_refused(copy: Path, tmp_path: Path) -> None:
    other = json.loads((copy / "tokenizer.json").read_text())
    other["model"]["vocab"] |= {f"word{n}": 100 + n for n in range(50)}
    (copy / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(ArtifactError, match="belongs to another model"):
        load_pretrained(copy)


def test_a_damaged_tokenizer_is_refused(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match="is not a tokenizer"):
        load_pretrained(copy)


def test_another_architecture_is_refused(copy: Path) -> None:
    shutil.rmtree(copy)
    write_base_model(copy)
    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=4)
    GPT2Model(config).save_pretrained(copy)
    with pytest.raises(ConfigError, match=r"model_type = 'gpt2' is not allowed; allowed: bert, "):
        load_pretrained(copy)


def test_weights_of_other_sizes_are_refused(base_model: Path) -> None:
    description = describe_encoder(load_pretrained(base_model))
    description["layers"][0]["channels"] = 8
    with pytest.raises(ArtifactError, match="does not hold the weights of this model"):
        load_weights(build_encoder(description).transformer, base_model / "model.safetensors")


def test_a_description_of_nothing_is_refused() -> None:
    with pytest.raises(ArtifactError, match="description cannot be used"):
        build_encoder({})

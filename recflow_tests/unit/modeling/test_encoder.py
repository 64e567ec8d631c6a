import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, GPT2Config, GPT2Model

from recflow.core.errors import ArtifactError, ConfigError
from recflow.modeling.encoder import (
    TextEncoder,
    TorchRuntime,
    build_encoder,
    check_vocabulary,
    describe_encoder,
    load_pretrained,
    load_weights,
    mixed_precision,
    save_encoder,
)
from recflow.modeling.texts import TextTokenizer, encode_texts, pad_tokens
from recflow_tests.unit.modeling.families import CONFIGS, padded_batch, write_family
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


def _projected(base_model: Path, dimension: int) -> TextEncoder:
    transformer = load_pretrained(base_model).transformer
    return TextEncoder(transformer, projection=dimension).eval()


def test_a_projected_encoder_is_stored_with_its_projection(
    base_model: Path, tmp_path: Path
) -> None:
    encoder = _projected(base_model, 48)
    assert (encoder.width, encoder.dimension) == (32, 48)
    save_encoder(encoder, tmp_path / "model.safetensors")
    described = json.loads(json.dumps(describe_encoder(encoder)))
    assert described["projection"] == 48
    again = build_encoder(described)
    load_weights(again.transformer, tmp_path / "model.safetensors")
    tokens = TextTokenizer(base_model / "tokenizer.json", 16)(TEXTS)
    vectors = TorchRuntime(again, 1)(tokens)
    np.testing.assert_array_equal(vectors, TorchRuntime(encoder, 1)(tokens))
    assert (vectors.shape, vectors.dtype) == ((4, 48), np.float32)


def test_a_projection_comes_before_unit_length(base_model: Path) -> None:
    tokens = TextTokenizer(base_model / "tokenizer.json", 16)(TEXTS)
    plain = TorchRuntime(load_pretrained(base_model), 1, mixed=False)(tokens)
    encoder = _projected(base_model, 8)
    assert encoder.projection is not None
    projected = plain @ encoder.projection.weight.detach().numpy().T
    expected = projected / np.linalg.norm(projected, axis=1, keepdims=True)
    np.testing.assert_allclose(TorchRuntime(encoder, 1, mixed=False)(tokens), expected, atol=1e-6)


def test_a_description_from_before_projections_has_none(base_model: Path, tmp_path: Path) -> None:
    encoder = load_pretrained(base_model)
    save_encoder(encoder, tmp_path / "model.safetensors")
    described = describe_encoder(encoder)
    del described["projection"]
    again = build_encoder(described)
    load_weights(again.transformer, tmp_path / "model.safetensors")
    assert again.projection is None
    assert again.dimension == again.width == 32


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


@pytest.mark.parametrize("family", CONFIGS)
def test_missing_weights_are_refused_in_every_family(
    family: str, base_model: Path, tmp_path: Path
) -> None:
    copy = write_family(family, tmp_path, base_model / "tokenizer.json")
    weights = load_file(copy / "model.safetensors")
    lost = next(name for name in weights if "1" in name and name.endswith(".weight"))
    del weights[lost]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=rf"lack 1 tensors, e\.g\. \['{lost}'\]"):
        load_pretrained(copy)


@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_weights_in_shards_are_loaded(family: str, base_model: Path, tmp_path: Path) -> None:
    tokenizer = base_model / "tokenizer.json"
    whole = load_pretrained(write_family(family, tmp_path / "whole", tokenizer))
    shards = write_family(family, tmp_path / "shards", tokenizer, shards="20KB")
    files = sorted(shards.glob("model-*.safetensors"))
    assert len(files) > 1
    loaded = load_pretrained(shards).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in whole.state_dict().items())
    files[0].unlink()
    with pytest.raises(ArtifactError, match="cannot be loaded as an encoder"):
        load_pretrained(shards)


def test_a_configuration_that_is_not_json_is_refused(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"config\.json is not JSON"):
        load_pretrained(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="model_type = None is not allowed"):
        load_pretrained(copy)


# Tokens and rows of published models: MiniLM, ModernBERT, Qwen2.5-0.5B, Qwen2.5-7B, Qwen3-0.6B.
@pytest.mark.parametrize(
    ("tokens", "rows"),
    [(30522, 30522), (50280, 50368), (151665, 151936), (151665, 152064), (151669, 151936)],
)
def test_padded_and_reserved_rows_of_the_embeddings_are_accepted(tokens: int, rows: int) -> None:
    check_vocabulary(*_sizes(tokens, rows))


# A BERT tokenizer with RoBERTa, one token too many, Qwen's tokenizer with XLM-R, a larger gap.
@pytest.mark.parametrize(
    ("tokens", "rows"), [(30522, 50265), (30523, 30522), (151669, 250002), (30000, 30200)]
)
def test_other_sizes_of_vocabulary_are_refused(tokens: int, rows: int) -> None:
    with pytest.raises(ArtifactError, match=f"{tokens} tokens .* {rows}: .* another model"):
        check_vocabulary(*_sizes(tokens, rows))


def _sizes(tokens: int, rows: int) -> tuple[Any, Any]:
    encoder = SimpleNamespace(config=SimpleNamespace(vocab_size=rows))
    return encoder, SimpleNamespace(path="tokenizer.json", vocabulary_size=tokens)


def _pooled(encoder: TextEncoder) -> torch.Tensor:
    ids, mask = padded_batch()
    with torch.no_grad():
        return encoder(ids, mask)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_attention_pooling_starts_as_the_mean(
    family: str, base_model: Path, tmp_path: Path
) -> None:
    directory = write_family(family, tmp_path, base_model / "tokenizer.json")
    mean = _pooled(load_pretrained(directory, pooling="mean"))
    learnt = load_pretrained(directory, pooling="attention")
    torch.testing.assert_close(_pooled(learnt), mean, atol=1e-6, rtol=0)
    with torch.no_grad():
        learnt.learnt_pooling.query.add_(1.0)
    assert not torch.allclose(_pooled(learnt), mean, atol=1e-3)
    ids, mask = padded_batch()
    alone = learnt(ids[2:3, :3], mask[2:3, :3])  # padding has no weight
    torch.testing.assert_close(alone[0], _pooled(learnt)[2], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("pooling", "place"), [("cls", 0), ("last_token", -1)])
def test_one_token_can_stand_for_the_text(base_model: Path, pooling: str, place: int) -> None:
    ids, mask = padded_batch()
    encoder = load_pretrained(base_model, pooling=pooling)
    with torch.no_grad():
        hidden = encoder.run_layers(encoder.embed(ids), mask, 0, 2)
    for row, vector in enumerate(_pooled(encoder)):
        state = hidden[row, mask[row]][place]
        torch.testing.assert_close(vector, state / state.norm())


def test_poolings_that_make_no_sense_are_refused(base_model: Path, tmp_path: Path) -> None:
    decoder = write_family("llama", tmp_path, base_model / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"pooling = 'cls' is not allowed; .* for a decoder"):
        load_pretrained(decoder, pooling="cls")
    with pytest.raises(ConfigError, match="pooling = 'max' is not allowed"):
        load_pretrained(base_model, pooling="max")


def test_an_empty_text_has_a_token_and_a_finite_vector(base_model: Path, tmp_path: Path) -> None:
    directory = write_family("qwen3", tmp_path, base_model / "tokenizer.json")
    raw = json.loads((directory / "tokenizer.json").read_text())
    raw["post_processor"] = None  # as Qwen's: no special tokens
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = TextTokenizer(directory / "tokenizer.json", 16)
    assert [len(tokens) for tokens in tokenizer(["", "sea0 war1"])] == [1, 2]
    runtime = TorchRuntime(load_pretrained(directory), 1)
    assert np.isfinite(encode_texts(runtime, tokenizer, ["", "sea0 war1", ""])).all()


@pytest.mark.parametrize("strategy", ["attention", "adapters"])
def test_what_recflow_adds_is_described_and_stored(
    base_model: Path, tmp_path: Path, strategy: str
) -> None:
    encoder = load_pretrained(base_model, pooling="attention")
    if strategy == "adapters":
        encoder.add_adapter(1, 6)
    for parameter in encoder.transformer.get_submodule("recflow").parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_encoder(encoder, tmp_path / "model.safetensors")
    added = {n for n in load_file(tmp_path / "model.safetensors") if n.startswith("recflow.")}
    assert ("recflow.adapters.1.up.weight" in added) == (strategy == "adapters")
    assert "recflow.pooling.query" in added
    description = json.loads(json.dumps(describe_encoder(encoder)))
    again = build_encoder(description)
    load_weights(again.transformer, tmp_path / "model.safetensors")
    assert torch.equal(_pooled(again), _pooled(encoder))
    description["adapters"] = {"7": 6}
    with pytest.raises(ArtifactError, match="adapters behind the layers"):
        build_encoder(description)


def test_bfloat16_is_used_where_it_is_native_and_wanted() -> None:
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    matrix = torch.eye(2)
    for wanted in (True, False):
        with mixed_precision("cpu", wanted):
            kind = (matrix @ matrix).dtype
        assert kind == (torch.bfloat16 if wanted and native else torch.float32)


def test_vectors_of_hidden_states_in_bfloat16_are_float32(base_model: Path) -> None:
    encoder = load_pretrained(base_model)
    ids, mask = padded_batch()
    with torch.no_grad():
        exact = encoder.embed(ids)
        rough = encoder.pool(exact.bfloat16(), mask)
        torch.testing.assert_close(rough, encoder.pool(exact, mask), atol=1e-2, rtol=0)
    assert rough.dtype == torch.float32


def test_compiling_without_a_compiler_is_refused(
    base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match=r"compile = True .* install a C\+\+ compiler"):
        load_pretrained(base_model).compile_layers(0)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_compiled_layers_give_the_same_vectors(
    family: str, base_model: Path, tmp_path: Path
) -> None:
    encoder = load_pretrained(write_family(family, tmp_path, base_model / "tokenizer.json"))
    plain, names = _pooled(encoder), set(encoder.state_dict())
    encoder.compile_layers(1)
    torch.testing.assert_close(_pooled(encoder), plain, atol=1e-5, rtol=0)
    ids, mask = padded_batch()
    short = encoder(ids[1:3, :7], mask[1:3, :7])  # another size of batch
    torch.testing.assert_close(short, plain[1:3], atol=1e-5, rtol=0)
    assert set(encoder.state_dict()) == names


def test_weights_of_other_sizes_are_refused(base_model: Path) -> None:
    description = describe_encoder(load_pretrained(base_model))
    description["layers"][0]["channels"] = 8
    with pytest.raises(ArtifactError, match="does not hold the weights of this model"):
        load_weights(build_encoder(description).transformer, base_model / "model.safetensors")


def test_a_description_of_nothing_is_refused() -> None:
    with pytest.raises(ArtifactError, match="description cannot be used"):
        build_encoder({})

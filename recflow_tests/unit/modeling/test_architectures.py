import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, LlamaConfig, LlamaModel

from recflow.core.errors import ConfigError
from recflow.modeling.architectures import ARCHITECTURES, Bert, Decoder
from recflow.modeling.encoder import (
    TextEncoder,
    build_encoder,
    describe_encoder,
    load_pretrained,
    load_weights,
    save_encoder,
)
from recflow_tests.unit.modeling.families import (
    CONFIGS,
    DECODERS,
    LAYERS,
    padded_batch,
    write_family,
)


@pytest.fixture(scope="module", params=list(CONFIGS))
def directory(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, base_model: Path
) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return write_family(request.param, folder, base_model / "tokenizer.json")


def _reference(directory: Path) -> torch.Tensor:
    """The Hugging Face model's own last hidden state."""
    ids, mask = padded_batch()
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask.long()).last_hidden_state


def _last_hidden(encoder: TextEncoder, hidden: torch.Tensor) -> torch.Tensor:
    norm = encoder.architecture.final_norm
    return hidden if norm is None else norm(hidden)


def test_every_architecture_is_tested() -> None:
    assert set(CONFIGS) == set(ARCHITECTURES)
    assert set(DECODERS) == {name for name, family in ARCHITECTURES.items() if family.causal}


def test_hidden_states_are_those_of_hugging_face(directory: Path) -> None:
    ids, mask = padded_batch()
    encoder = load_pretrained(directory)
    expected = _reference(directory)[mask]
    with torch.no_grad():
        whole = encoder.run_layers(encoder.embed(ids), mask, 0, LAYERS)
        torch.testing.assert_close(_last_hidden(encoder, whole)[mask], expected, atol=1e-5, rtol=0)
        assert torch.isfinite(whole).all()  # padding included: NaN there would spread
        for cut in range(1, LAYERS):
            lower = encoder.run_layers(encoder.embed(ids), mask, 0, cut)
            lower[~mask] = 0  # what a store of hidden states leaves there
            upper = encoder.run_layers(lower, mask, cut, LAYERS)
            found = _last_hidden(encoder, upper)[mask]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_padding_and_company_do_not_change_a_vector(directory: Path) -> None:
    ids, mask = padded_batch()
    encoder = load_pretrained(directory)
    with torch.no_grad():
        together = encoder(ids, mask)
        for row, length in enumerate(mask.sum(1).tolist()):
            alone = encoder(ids[row : row + 1, :length], mask[row : row + 1, :length])
            torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4))


def test_auto_pools_the_mean_of_encoders_and_the_last_token_of_decoders(directory: Path) -> None:
    ids, mask = padded_batch()
    encoder, expected = load_pretrained(directory), _reference(directory)
    with torch.no_grad():
        vectors = encoder(ids, mask).numpy()
    for row, length in enumerate(mask.sum(1).tolist()):
        states = expected[row, :length]
        pooled = states[-1] if encoder.architecture.causal else states.mean(0)
        np.testing.assert_allclose(vectors[row], (pooled / pooled.norm()).numpy(), atol=1e-5)


def test_a_saved_encoder_gives_the_same_vectors(directory: Path, tmp_path: Path) -> None:
    ids, mask = padded_batch()
    encoder = load_pretrained(directory)
    save_encoder(encoder, tmp_path / "model.safetensors")
    again = build_encoder(json.loads(json.dumps(describe_encoder(encoder))))
    load_weights(again.transformer, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(again(ids, mask), encoder(ids, mask))


def test_checkpointing_changes_no_gradient(directory: Path) -> None:
    ids, mask = padded_batch()
    gradients = []
    for on in (False, True):
        encoder = load_pretrained(directory)
        encoder.use_checkpointing(on)
        encoder(ids, mask)[:, 0].sum().backward()
        gradients.append({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


def test_variants_with_another_mask_are_refused() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ConfigError, match="is_decoder = True"):
        Bert(BertModel(BertConfig(**sizes, intermediate_size=8, is_decoder=True)))
    bidirectional = LlamaModel(LlamaConfig(**sizes, intermediate_size=8))
    bidirectional.config.is_causal = False
    with pytest.raises(ConfigError, match="is_causal = False"):
        Decoder(bidirectional)

"""What the planner counts against what autograd keeps, family by family."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from recflow.hardware.activations import Saved, adapter_saves, layer_saves
from recflow.hardware.shape import EncoderShape
from recflow.modeling import attention
from recflow.modeling.architectures import find_architecture
from recflow.modeling.config import TuningConfig
from recflow.modeling.encoder import TextEncoder, mixed_precision
from recflow.modeling.tuning import apply_strategy

WIDTH, HEADS, TOKENS, RANK, BOTTLENECK = 128, 4, 12, 8, 16
SIZES: dict[str, dict[str, Any]] = {
    "bert": {"intermediate_size": 4 * WIDTH},
    "roberta": {"intermediate_size": 3 * WIDTH},
    "electra": {"intermediate_size": 4 * WIDTH, "embedding_size": 64},
    "distilbert": {"dim": WIDTH, "n_layers": 3, "n_heads": HEADS, "hidden_dim": 4 * WIDTH},
    "mpnet": {"intermediate_size": 4 * WIDTH},
    "modernbert": {"intermediate_size": 2 * WIDTH},
    "llama": {"intermediate_size": 3 * WIDTH, "num_key_value_heads": 2},
    "mistral": {"intermediate_size": 3 * WIDTH, "num_key_value_heads": 2},
    "qwen2": {"intermediate_size": 3 * WIDTH, "num_key_value_heads": 1},
    "qwen3": {"intermediate_size": 3 * WIDTH, "num_key_value_heads": 2, "head_dim": 32},
}
SPECIAL = dict.fromkeys(
    ("pad_token_id", "bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"), 0
)
HAS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


def config_of(family: str) -> Any:
    sizes = {
        "vocab_size": 100,
        "hidden_size": WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        **SPECIAL,
    }
    if family == "distilbert":
        sizes = {"vocab_size": 100, **SPECIAL}
    return AutoConfig.for_model(family, **{**sizes, **SIZES[family]})


def kept_bytes(family: str, strategy: str, half: bool, layers: int, texts: int) -> int:
    """Bytes of all tensors but weights that the graph of the last layers keeps."""
    torch.manual_seed(0)
    arguments = find_architecture(family).model_arguments
    encoder = TextEncoder(AutoModel.from_config(config_of(family), **arguments))
    config = TuningConfig(
        strategy=strategy, tuned_layers=layers, rank=RANK, adapter_width=BOTTLENECK
    )
    apply_strategy(config, encoder)
    encoder.eval()
    weights = {weight.untyped_storage().data_ptr() for weight in encoder.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hidden = torch.randn(texts, TOKENS, WIDTH)
    mask = torch.ones(texts, TOKENS, dtype=torch.bool)
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        mixed_precision("cpu", half),
    ):
        vectors = encoder.run_layers(hidden, mask, 3 - layers, 3)
    del vectors
    return sum(kept.values())


def measured(family: str, strategy: str, half: bool) -> float:
    """Bytes a token that one more layer keeps: rounded weights do not grow with the texts."""

    def of(layers: int) -> int:
        few, more = (kept_bytes(family, strategy, half, layers, texts) for texts in (16, 48))
        return more - few

    return (of(2) - of(1)) / (32 * TOKENS)


@pytest.mark.parametrize("half", [False, pytest.param(True, marks=pytest.mark.skipif(
    not HAS_BF16, reason="this processor does not multiply bfloat16"))])  # fmt: skip
@pytest.mark.parametrize("family", SIZES)
def test_counts_are_what_autograd_keeps(family: str, half: bool) -> None:
    shape = EncoderShape.from_config(config_of(family).to_dict())
    counted = layer_saves(shape, half)
    planned = counted.bytes(TOKENS, TOKENS) / TOKENS
    assert planned == pytest.approx(measured(family, "top_k_layers", half), rel=0.03)


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama", "qwen3"])
def test_frozen_weights_keep_less(family: str) -> None:
    shape = EncoderShape.from_config(config_of(family).to_dict())
    passing = layer_saves(shape, False, weights_learn=False).bytes(TOKENS, TOKENS) / TOKENS
    adapter = adapter_saves(WIDTH, BOTTLENECK, False)
    assert passing < layer_saves(shape, False).bytes(TOKENS, TOKENS) / TOKENS
    assert passing + adapter == pytest.approx(measured(family, "adapters", False), rel=0.05)


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama", "qwen3"])
def test_low_rank_matrices_keep_their_narrow_products(family: str) -> None:
    shape = EncoderShape.from_config(config_of(family).to_dict())
    matrices = {"bert": 6, "modernbert": 4}.get(family, 7)
    layer = layer_saves(shape, False, scales_learn=False).bytes(TOKENS, TOKENS) / TOKENS
    planned = layer + 4 * matrices * RANK
    assert planned == pytest.approx(measured(family, "lora", False), rel=0.05)


def test_pairs_count_where_attention_is_not_fused() -> None:
    # 10 tokens in texts of 5: 10 × 3 bytes of tokens and 10 × 5 × 2 of pairs.
    assert Saved(3.0, 2.0).bytes(10, 5) == 130
    opened = Saved(3.0, open_tokens=5, open_per_token=1.0, open_per_pair=2.0)
    assert [opened.bytes(12, length) for length in (5, 6)] == [12 * (3 + 1 + 10), 12 * 3]


@pytest.mark.skipif(not HAS_BF16, reason="this processor does not multiply bfloat16")
@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen3"])
def test_long_texts_keep_no_weights_of_attention(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = EncoderShape.from_config(config_of(family).to_dict())
    monkeypatch.setattr(attention, "_LONGEST", {torch.bfloat16: TOKENS - 1})
    fused = layer_saves(shape, True, open_attention=False)
    assert fused.bytes(TOKENS, TOKENS) / TOKENS == pytest.approx(
        measured(family, "top_k_layers", True), rel=0.03
    )

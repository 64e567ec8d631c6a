"""Open attention against PyTorch's fused one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from recflow.modeling import attention
from recflow.modeling.architectures import find_architecture
from recflow.modeling.attention import attend
from recflow.modeling.config import OPEN_ATTENTION_TOKENS
from recflow.modeling.encoder import TextEncoder

TEXTS, HEADS, TOKENS, SIZE = 3, 4, 10, 8


class Layer(nn.Module):
    def __init__(self, *, is_causal: bool = False, groups: int = 1) -> None:
        super().__init__()
        self.is_causal, self.num_key_value_groups = is_causal, groups


def inputs(
    tokens: int = TOKENS, groups: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as the layers hand them over: heads and tokens transposed."""
    torch.manual_seed(0)

    def drawn(heads: int) -> Tensor:
        made = torch.randn(TEXTS, tokens, heads, SIZE).to(dtype).transpose(1, 2)
        return made.detach().requires_grad_()

    return drawn(HEADS), drawn(HEADS // groups), drawn(HEADS // groups)


def padding(tokens: int = TOKENS) -> Tensor:
    """The second text has half as many tokens, the third a single one."""
    lengths = torch.tensor([tokens, tokens // 2, 1])
    return (torch.arange(tokens) < lengths[:, None])[:, None, None, :]


def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call that is passed on to transformers."""
    calls: list[int] = []

    def called(module: nn.Module, query: Tensor, *rest: Any, **others: Any) -> Any:
        calls.append(query.shape[2])
        return sdpa_attention_forward(module, query, *rest, **others)

    monkeypatch.setattr(attention, "sdpa_attention_forward", called)
    return calls


WINDOW = (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs() <= 2


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("is_causal", "mask"),
    [
        (False, None),
        (True, None),
        (False, padding()),
        (True, padding() & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()),
        (False, WINDOW),
    ],
    ids=["all", "causal", "padding", "padded causal", "window"],
)
def test_vectors_and_gradients_are_those_of_the_fused_kernel(
    is_causal: bool, mask: Tensor | None, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fused_calls(monkeypatch)
    exact = torch.float64  # in which no trainings are
    monkeypatch.setattr(attention, "_LONGEST", {exact: TOKENS})
    layer = Layer(is_causal=is_causal, groups=groups)
    given = inputs(groups=groups, dtype=exact)
    weights = torch.randn(TEXTS, TOKENS, HEADS, SIZE, dtype=exact)
    found: list[tuple[Tensor, ...]] = []
    for way in (attend, sdpa_attention_forward):
        attended, none = way(layer, *given, mask, scaling=0.3)
        assert none is None
        gradients = torch.autograd.grad((attended * weights).sum(), given)
        found.append((attended, *gradients))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not calls


def test_bfloat16_is_as_near_to_float32_as_the_fused_kernel() -> None:
    exact = sdpa_attention_forward(Layer(), *inputs(), padding())[0]
    rounded = inputs(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        ours = attend(Layer(), *rounded, padding())[0]
        theirs = sdpa_attention_forward(Layer(), *rounded, padding())[0]
    assert ours.dtype == theirs.dtype == torch.bfloat16
    errors = [(each.float() - exact).abs().max() for each in (ours, theirs)]
    assert errors[0] < 1.5 * errors[1]
    assert errors[0] < 0.03


def test_long_texts_are_left_to_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fused_calls(monkeypatch)
    longest = OPEN_ATTENTION_TOKENS
    for tokens in (longest, longest + 1):
        attend(Layer(), *inputs(tokens, dtype=torch.bfloat16), padding(tokens))
    assert calls == [longest + 1]


def test_float32_attends_openly_where_nothing_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fused_calls(monkeypatch)
    query, key, value = inputs()
    attend(Layer(), query, key, value, padding())
    assert calls == [TOKENS]
    attend(Layer(), query.detach(), key.detach(), value.detach(), padding())
    assert calls == [TOKENS]


def test_dropout_and_masks_of_numbers_are_left_to_transformers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = fused_calls(monkeypatch)
    given = inputs(dtype=torch.bfloat16)
    attend(Layer(), *given, padding(), dropout=0.5)
    attend(Layer(), *given, torch.zeros(TOKENS, TOKENS, dtype=torch.bfloat16))
    assert len(calls) == 2


@pytest.mark.parametrize("family", ["bert", "electra", "distilbert", "modernbert", "qwen3"])
def test_the_layers_of_a_family_attend_openly(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fused_calls(monkeypatch)
    sizes: dict[str, Any] = {
        "vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2,
        "intermediate_size": 64, "pad_token_id": 0,
    }  # fmt: skip
    if family == "distilbert":
        sizes = {"vocab_size": 50, "dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 64}
    if family == "qwen3":
        sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    if family == "modernbert":
        sizes |= dict.fromkeys(("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"), 0)
    arguments = find_architecture(family).model_arguments
    encoder = TextEncoder(
        AutoModel.from_config(AutoConfig.for_model(family, **sizes), **arguments)
    ).eval()
    ids, mask = torch.randint(1, 50, (TEXTS, TOKENS)), padding()[:, 0, 0]
    with torch.inference_mode():
        opened = encoder(ids, mask)
        assert not calls
        monkeypatch.setattr(attention, "_LONGEST", {})
        torch.testing.assert_close(opened, encoder(ids, mask), rtol=1e-5, atol=1e-6)
    assert calls == [TOKENS] * 2

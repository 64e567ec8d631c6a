"""Attention of short texts on processors, where PyTorch's fused kernel is the slower way.

The fused kernel works block by block, so that the weights of long texts need no memory. A title has
some twenty tokens: one block, mostly empty. Written as two products with a softmax between them, it
takes a fraction of the time, of the backward pass in bfloat16 a sixth
(``python -m recflow_tests.benchmarks.attention``). Of trainings in float32 it would make little and
cost memory: only without gradients they attend openly.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from recflow.modeling.config import OPEN_ATTENTION_TOKENS

NAME: Final = "recflow"
"""Of this attention among those of transformers."""
FUSED: Final = "sdpa"
"""Of the one that calls PyTorch's kernels."""

_LONGEST: Final = {torch.bfloat16: OPEN_ATTENTION_TOKENS, torch.float32: 64}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attention as the layers of transformers call it.

    Args:
        module: The layer; ``num_key_value_groups`` and ``is_causal`` are read where it has them.
        query: ``[texts, heads, tokens, head size]``.
        key: The same, of as many or fewer heads.
        value: As ``key``.
        attention_mask: True where a token sees another, broadcast to ``[texts, heads, tokens,
            tokens]``; ``None`` for all tokens, or for all up to itself where ``module`` is causal.
        dropout: Share of the weights that are dropped.
        scaling: What scores are multiplied with; ``None`` for the usual one.
        arguments: Passed on to transformers' own.

    Returns:
        ``[texts, tokens, heads, head size]``, and no weights.
    """
    if not _is_open(query, attention_mask, dropout):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **arguments
        )
    groups = int(getattr(module, "num_key_value_groups", 1))
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    tokens = query.shape[2]
    if attention_mask is None and arguments.get("is_causal", getattr(module, "is_causal", True)):
        attention_mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    scores = torch.matmul(query * (scaling or query.shape[-1] ** -0.5), key.transpose(-1, -2))
    if attention_mask is not None:
        hidden = torch.zeros_like(attention_mask, dtype=scores.dtype)
        scores += hidden.masked_fill_(~attention_mask, float("-inf"))
    # Within autocast softmax would give float32, of which the product makes a rounded copy.
    with torch.autocast("cpu", enabled=False):
        weights = torch.softmax(scores, -1)
        attended = torch.matmul(weights, value.to(weights.dtype))
    return attended.transpose(1, 2).contiguous(), None


def _is_open(query: Tensor, mask: Tensor | None, dropout: float) -> bool:
    """Whether the weights are computed as a matrix of their own."""
    if dropout or query.device.type != "cpu" or torch.onnx.is_in_onnx_export():
        return False
    if mask is not None and mask.dtype != torch.bool:
        return False
    # Rotated queries are float32 until autocast rounds them.
    half = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if half else query.dtype
    if dtype == torch.float32 and query.requires_grad:
        return False
    return query.shape[2] <= _LONGEST.get(dtype, 0)


AttentionInterface.register(NAME, attend)

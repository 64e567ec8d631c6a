"""Bytes that a transformer layer keeps for its backward pass, tensor by tensor.

The counts name what PyTorch saves in Hugging Face's layers. Attention is fused (Dao et al. 2022,
https://arxiv.org/abs/2205.14135: no matrix of attention weights is kept), but on processors that of
short texts is not, see :mod:`recflow.modeling.attention`. Korthikanti et al. 2022
(https://arxiv.org/abs/2205.05198, section 4.1) count a layer of GPT in the same way; layers here
differ by precision (autocast keeps the residual stream in float32 and rounds the input of every
matrix anew), by norms, gates, and by which weights learn. A test compares the counts with what
autograd saves, for every family.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from recflow.hardware.shape import EncoderShape
from recflow.modeling.config import OPEN_ATTENTION_TOKENS

_FLOAT: Final = 4
_DECODERS: Final = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma"})


@dataclass(frozen=True, slots=True)
class Saved:
    """Bytes kept of one layer.

    Attributes:
        per_token: Bytes a token, paddings included.
        per_pair: Bytes a pair of tokens of one text: attention weights, where they are kept.
        open_tokens: Longest texts whose attention is not fused.
        open_per_token: Bytes a token that their attention keeps beside, or less where negative.
        open_per_pair: Bytes a pair of tokens of theirs.
    """

    per_token: float
    per_pair: float = 0.0
    open_tokens: int = 0
    open_per_token: float = 0.0
    open_per_pair: float = 0.0

    def bytes(self, tokens: int, length: int) -> float:
        """Bytes of ``tokens`` in texts of ``length``."""
        kept = self.per_token + self.per_pair * length
        if length <= self.open_tokens:
            kept += self.open_per_token + self.open_per_pair * length
        return tokens * kept


def layer_saves(
    shape: EncoderShape,
    half: bool,
    *,
    weights_learn: bool = True,
    scales_learn: bool = True,
    open_attention: bool = True,
) -> Saved:
    """What one layer keeps, where its input wants a gradient.

    Args:
        shape: Sizes of the encoder.
        half: Whether matrices are multiplied in bfloat16 under autocast.
        weights_learn: Whether the matrices' inputs are needed, for the gradient of their weights or
            of the low-rank matrices beside them; else gradients only pass through.
        scales_learn: Whether the scales of norms learn, which with low-rank matrices they do not.
        open_attention: Whether attention of short texts is not fused in bfloat16, as on processors.
    """
    if shape.model_type == "modernbert":
        saved = _modernbert(shape, half, weights_learn)
        apart = -2 * shape.attention_width  # values alone are kept, not what they lay in
    elif shape.model_type in _DECODERS:
        saved = _decoder(shape, half, weights_learn, weights_learn and scales_learn)
        # Keys and values are repeated for all queries that share them.
        apart = 2 * (shape.attention_width - shape.key_value_width)
    else:
        saved, apart = _bert(shape, half, weights_learn), 0
    if not (open_attention and half) or shape.model_type == "mpnet":
        return saved
    if not weights_learn:
        apart -= shape.attention_width  # only the fused kernel needs what it made once more
    return replace(
        saved,
        open_tokens=OPEN_ATTENTION_TOKENS,
        open_per_token=2.0 * apart,
        open_per_pair=2.0 * shape.heads,
    )


def adapter_saves(width: int, bottleneck: int, half: bool) -> float:
    """What a bottleneck adapter keeps of a token: input and output of its norm, both of GELU."""
    size = 2 if half else _FLOAT
    return _FLOAT * width + size * width + 2 * size * bottleneck


def _bert(shape: EncoderShape, half: bool, learn: bool) -> Saved:
    """Post-norm: attention, add, norm, feed-forward, add, norm."""
    w, a, c = shape.width, shape.attention_width, shape.channels
    size = 2 if half else _FLOAT
    kept = size * 4 * a  # queries, keys, values, and what attention makes of them
    kept += _FLOAT * 2 * w  # the sums that the two norms take
    kept += size * c  # input of GELU
    if learn:
        # Autocast rounds the input of each of the three matrices anew; in float32 it is one tensor.
        kept += size * 3 * w if half else _FLOAT * w
        kept += size * (w + c)  # inputs of the two feed-forward matrices
    # MPNet's attention is not fused: its weights are kept, in float32 and rounded.
    pairs = shape.heads * (_FLOAT + (2 if half else 0)) if shape.model_type == "mpnet" else 0.0
    if pairs and not half:
        pairs = shape.heads * _FLOAT
    return Saved(kept, pairs)


def _modernbert(shape: EncoderShape, half: bool, learn: bool) -> Saved:
    """Pre-norm with rotated queries and keys and a gated feed-forward part."""
    w, a, c = shape.width, shape.attention_width, shape.channels
    size = 2 if half else _FLOAT
    kept = size * 3 * a  # values lie in one tensor with the queries and keys before rotation
    kept += size * 2 * a + size * a  # rotated queries and keys; what attention makes of them
    kept += _FLOAT * 2 * w  # inputs of the two norms
    kept += size * 3 * c  # both halves of the first matrix' output, and GELU's output
    if learn:
        kept += size * (2 * w + c)
    return Saved(kept)


def _decoder(shape: EncoderShape, half: bool, learn: bool, scales: bool) -> Saved:
    """Pre-norm with RMS norms, grouped queries, rotated queries and keys, a gated part."""
    w, a, k, c = shape.width, shape.attention_width, shape.key_value_width, shape.channels
    size = 2 if half else _FLOAT
    kept = size * 2 * (a + k)  # queries, keys, values, and what attention makes of them
    kept += _FLOAT * 2 * w  # inputs of the two norms
    kept += size * 3 * c  # both factors of the product, and the gate before its activation
    if shape.model_type == "qwen3":
        kept += _FLOAT * (a + k)  # inputs of the norms of queries and keys
        kept += size * (a + k) if scales else 0  # what their scales multiply
    if scales:
        kept += _FLOAT * 2 * w  # what the scales of the layer's norms multiply
    if learn:
        kept += size * 5 * w if half else _FLOAT * 2 * w  # inputs of q, k, v, gate, up
        kept += size * c  # input of down
    return Saved(kept)

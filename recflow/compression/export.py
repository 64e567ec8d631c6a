"""Export the encoder to ONNX, and prove that the graph is the same model.

Attention of BERT's layers becomes one operator of ONNX Runtime (``com.microsoft``'s
MultiHeadAttention) over one joint projection of queries, keys and values: a fifth less time at
batch 1 than the dozen operators that the exporter makes of it. Other families are exported as
PyTorch traces them.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning  # torch.jit does not export it
from torch.nn import functional
from torch.onnx import symbolic_helper

from recflow.core.errors import ParityError
from recflow.modeling.architectures import Bert
from recflow.modeling.encoder import TextEncoder, TorchRuntime
from recflow.modeling.onnx_runtime import INPUT_NAMES, ONNX_NAME, OUTPUT_NAME, OnnxRuntime
from recflow.modeling.texts import EncoderRuntime

_OPSET: Final = 17
_DOMAIN: Final = "com.microsoft"
_PARITY_BATCHES: Final = (1, 3, 32)


def export_encoder(encoder: TextEncoder) -> bytes:
    """The encoder as a float32 ONNX graph: mask-aware pooling and unit length included.

    Inputs are int64 ``input_ids`` and ``attention_mask`` ``[texts, tokens]``, the output is
    ``vectors`` ``[texts, dimension]``; both sizes of the inputs are free.
    """
    fused = isinstance(encoder.architecture, Bert)
    # The exporter puts the module it was given back into *that module's* mode. Without eval() on
    # the wrapper, dropout would be on in the encoder afterwards.
    wrapper = (_FusedBert(encoder) if fused else _ExportedEncoder(encoder)).eval()
    ids = torch.ones((2, 7), dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    axes = {0: "texts", 1: "tokens"}
    with _quiet_export(), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ONNX_NAME
        torch.onnx.export(
            wrapper,
            (ids, mask),
            file,
            dynamo=False,
            opset_version=_OPSET,
            input_names=list(INPUT_NAMES),
            output_names=[OUTPUT_NAME],
            dynamic_axes={INPUT_NAMES[0]: axes, INPUT_NAMES[1]: axes, OUTPUT_NAME: {0: "texts"}},
            custom_opsets={_DOMAIN: 1} if fused else None,
        )
        return file.read_bytes()


class _ExportedEncoder(nn.Module):
    """The encoder with the mask as integers, as ONNX callers pass it."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(ids, mask.bool())


class _FusedBert(nn.Module):
    """An encoder with BERT's layers, each attention one operator."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        layers = cast("list[Any]", list(encoder.layers))
        self.attentions = nn.ModuleList(_FusedAttention(layer.attention.self) for layer in layers)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        encoder, seen = self.encoder, mask.to(torch.int32)
        hidden = encoder.embed(ids)
        for number, attention in enumerate(self.attentions):
            layer = cast("Any", encoder.layers[number])
            attended = layer.attention.output(attention(hidden, seen), hidden)
            hidden = layer.output(layer.intermediate(attended), attended)
            if str(number) in encoder.adapters:
                hidden = encoder.adapters[str(number)](hidden)
        return encoder.pool(hidden, mask.bool())


class _FusedAttention(nn.Module):
    """Self-attention of a BERT layer; one matrix for queries, keys and values where it can be."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.parts = nn.ModuleList([attention.query, attention.key, attention.value])
        self.heads = int(attention.num_attention_heads)
        self.joint = _join(list(self.parts))

    def forward(self, hidden: Tensor, seen: Tensor) -> Tensor:
        if self.joint is None:
            query, key, value = (part(hidden) for part in self.parts)
        else:
            query, key, value = self.joint(hidden).chunk(3, dim=-1)
        return cast("Tensor", _MultiHeadAttention.apply(query, key, value, seen, self.heads))


def _join(parts: list[nn.Module]) -> nn.Linear | None:
    """One linear module with the outputs of all parts, end to end; None unless all are linear."""
    linear = [part for part in parts if type(part) is nn.Linear and part.bias is not None]
    if len(linear) < len(parts):
        return None
    joint = nn.Linear(linear[0].in_features, sum(part.out_features for part in linear))
    joint.weight = nn.Parameter(torch.cat([part.weight for part in linear]).detach())
    joint.bias = nn.Parameter(torch.cat([part.bias for part in linear]).detach())
    return joint


class _MultiHeadAttention(torch.autograd.Function):
    """Attention in PyTorch, one MultiHeadAttention of ONNX Runtime in the graph.

    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: object, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, heads: int
    ) -> Tensor:
        del ctx
        shape = (*query.shape[:2], heads, -1)
        by_head = [part.reshape(shape).transpose(1, 2) for part in (query, key, value)]
        mask = seen.bool()[:, None, None, :]
        context = functional.scaled_dot_product_attention(*by_head, attn_mask=mask)
        return context.transpose(1, 2).reshape(query.shape)

    @staticmethod
    def symbolic(
        graph: Any, query: Any, key: Any, value: Any, seen: Any, heads: int
    ) -> Any:  # the exporter's own types are private
        no_bias = symbolic_helper._optional_input_placeholder_tensor(graph)
        operator = f"{_DOMAIN}::MultiHeadAttention"
        context = graph.op(operator, query, key, value, no_bias, seen, num_heads_i=heads)
        context.setType(query.type())
        return context


def check_parity(
    encoder: TextEncoder,
    exported: OnnxRuntime,
    cases: Sequence[list[list[int]]],
    tolerance: float,
) -> float:
    """Largest difference of a vector element between PyTorch (float32) and the export.

    Args:
        encoder: The model that was exported.
        exported: The export.
        cases: Batches of token ids.
        tolerance: Largest difference allowed.

    Raises:
        ParityError: Names the batch with a larger difference.
    """
    reference = TorchRuntime(encoder, None, mixed=False)
    worst = 0.0
    for case in cases:
        difference = float(np.abs(reference(case) - exported(case)).max())
        if not difference <= tolerance:
            lengths = sorted({len(text) for text in case})
            raise ParityError(
                f"the ONNX export differs from PyTorch by {difference:.2g} (allowed {tolerance}) "
                f"for {len(case)} texts of {lengths} tokens; it is not written"
            )
        worst = max(worst, difference)
    return worst


def check_padding(
    runtime: EncoderRuntime, name: str, tokens: Sequence[list[int]], tolerance: float
) -> float:
    """Largest distance, 1 - cosine, between a text's vector alone and beside longer texts.

    Args:
        runtime: What executes the encoder.
        name: Its name in the message.
        tokens: Token ids of texts; each stands alone, and then all in one batch.
        tolerance: Largest distance allowed.

    Raises:
        ParityError: Padding changes a vector by more.
    """
    batch = sorted(tokens, key=len)
    alone = np.concatenate([runtime([text]) for text in batch])
    distances = 1 - np.einsum("ij,ij->i", alone, runtime(batch))
    worst = int(np.nan_to_num(distances, nan=np.inf).argmax())
    if not distances[worst] <= tolerance:
        raise ParityError(
            f"in {name}, padding turns the vector of a text of {len(batch[worst])} tokens by "
            f"{distances[worst]:.2g} (1 - cosine; allowed {tolerance}); it is not written"
        )
    return max(float(distances[worst]), 0.0)


def parity_cases(tokens: Sequence[list[int]]) -> list[list[list[int]]]:
    """Batches of several sizes: of short, of long, and of mixed texts, so with much padding."""
    by_length = sorted(tokens, key=len)
    cases: list[list[list[int]]] = []
    for size in _PARITY_BATCHES:
        mixed = by_length[:: max(1, len(by_length) // size)][:size]
        cases += [by_length[:size], by_length[-size:], mixed]
    return [*cases, [by_length[0], by_length[-1]]]


@contextmanager
def _quiet_export() -> Generator[None]:
    with warnings.catch_warnings():
        # The replacement exporter needs onnxscript; parity with PyTorch is checked after this one.
        warnings.filterwarnings(
            "ignore", message="You are using the legacy TorchScript", category=DeprecationWarning
        )
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.onnx")
        warnings.filterwarnings("ignore", category=TracerWarning)
        # What the exporter cannot know about an operator that is not its own.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.onnx")
        yield

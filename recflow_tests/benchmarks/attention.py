"""Open attention beside PyTorch's fused one: ``python -m recflow_tests.benchmarks.attention``.

One layer's attention over a batch of 64 texts, forwards and with its backward pass, by length of
the texts and by what is multiplied; the two ways in turns, the median of their times. Float32 with
a backward pass is fused either way.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from recflow.modeling import attention
from recflow.modeling.encoder import torch_threads

_TEXTS: Final = 64
_TURNS: Final = 15
_HEADS: Final = 12
_WAYS: Final[dict[str, Any]] = {"open": attention.attend, "fused": sdpa_attention_forward}


class _Layer(nn.Module):
    is_causal = False


def seconds(head_size: int, tokens: int, dtype: torch.dtype, *, backward: bool) -> dict[str, float]:
    """Seconds of one layer's attention, by way."""
    torch.manual_seed(0)
    shape = (_TEXTS, tokens, _HEADS, head_size)
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=backward) for _ in range(3)]
    mask = torch.ones(_TEXTS, 1, 1, tokens, dtype=torch.bool)
    mask[::2, :, :, -tokens // 8 :] = False
    gradient = torch.randn(shape, dtype=dtype)
    taken: dict[str, list[float]] = {way: [] for way in _WAYS}
    for turn in range(_TURNS + 2):
        for way, attend in _WAYS.items():
            started = time.perf_counter()
            with torch.set_grad_enabled(backward):
                query, key, value = (each.transpose(1, 2) for each in inputs)
                attended: Tensor = attend(_Layer(), query, key, value, mask)[0]
                if backward:
                    attended.backward(gradient)
            if turn > 1:  # kernels are compiled, and the heap has grown
                taken[way].append(time.perf_counter() - started)
    return {way: statistics.median(times) for way, times in taken.items()}


def table(lengths: list[int]) -> Iterator[str]:
    """Milliseconds and their ratio, as Markdown."""
    yield (
        "| heads | tokens | | forwards, ms: fused | open | times "
        "| with backward, ms: fused | open | times |"
    )
    yield "|---|---:|---" + "|---:" * 6 + "|"
    for dtype in (torch.bfloat16, torch.float32):
        for head_size in (32, 64):
            for tokens in lengths:
                cells: list[str] = []
                for backward in (False, True):
                    took = seconds(head_size, tokens, dtype, backward=backward)
                    cells += [f"{took[way] * 1e3:.1f}" for way in ("fused", "open")]
                    cells.append(f"{took['fused'] / took['open']:.1f}")
                name = str(dtype).removeprefix("torch.")
                yield f"| {_HEADS} × {head_size} | {tokens} | {name} | {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 25, 40, 64, 128, 256])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    with torch_threads(options.threads):
        for line in table(options.tokens):
            print(line, flush=True)


if __name__ == "__main__":
    main()

"""Which heads and feed-forward channels stay, and how many of them in each layer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from recflow.core.errors import ConfigError
from recflow.modeling.encoder import TextEncoder, TorchRuntime

_TIMED_TEXTS = 32
_TIMED_ROUNDS = 15
_BISECTIONS = 6


@dataclass(frozen=True, slots=True)
class LayerImportance:
    """Importance of the parts of one layer.

    Attributes:
        heads: Of each attention head, ``[heads]``.
        channels: Of each feed-forward channel, ``[channels]``.
    """

    heads: Tensor
    channels: Tensor


@dataclass(frozen=True, slots=True)
class KeptParts:
    """Numbers of the parts of one layer that stay, sorted."""

    heads: Tensor
    channels: Tensor


@dataclass(frozen=True, slots=True)
class PartWeights:
    """Weights that the layers have.

    Attributes:
        head: Weights of one attention head.
        channel: Weights of one feed-forward channel.
        fixed: Weights of all layers together that belong to neither: norms and output biases.
    """

    head: int
    channel: int
    fixed: int


def part_weights(encoder: TextEncoder) -> PartWeights:
    """Weights of the parts of an encoder that has the layers of BERT."""
    layer = cast("Any", encoder.layers[0])
    heads = int(layer.attention.self.num_attention_heads)
    query, up = layer.attention.self.query, layer.intermediate.dense
    head = (3 * (query.weight.numel() + query.bias.numel()) + query.weight.numel()) // heads
    channel = 2 * up.in_features + 1
    parts = sum(
        int(one.attention.self.num_attention_heads) * head
        + int(one.intermediate.dense.out_features) * channel
        for one in cast("list[Any]", list(encoder.layers))
    )
    everything = sum(parameter.numel() for parameter in encoder.layers.parameters())
    return PartWeights(head=head, channel=channel, fixed=everything - parts)


def keep_uniformly(
    importance: Sequence[LayerImportance], head_share: float, channel_share: float
) -> list[KeptParts]:
    """The most important parts of each layer, at least one of each kind.

    Args:
        importance: Of each layer.
        head_share: Share of every layer's heads to remove.
        channel_share: Share of every layer's channels to remove.
    """
    return [
        KeptParts(
            heads=_most_important(layer.heads, _left(len(layer.heads), head_share)),
            channels=_most_important(layer.channels, _left(len(layer.channels), channel_share)),
        )
        for layer in importance
    ]


def _left(parts: int, removed_share: float) -> int:
    return max(1, round(parts * (1 - removed_share)))


def _most_important(importance: Tensor, count: int) -> Tensor:
    return importance.argsort(descending=True, stable=True)[:count].sort().values


def keep_globally(
    importance: Sequence[LayerImportance],
    weights: PartWeights,
    target_share: float,
    channel_multiple: int,
) -> list[KeptParts]:
    """The parts of all layers that matter most for their weights, until a share is reached.

    Heads and blocks of channels of all layers compete by their importance as a multiple of the mean
    of their kind. The importance by weight does not do: that of a head is the size of a sum over
    its outputs, whose signs cancel, and hardly any head would stay. Layers are not made alike: some
    matter less as a whole. One head and one block stay in each layer.

    Args:
        importance: Of each layer.
        weights: Of the parts.
        target_share: Share of the layers' weights that stays, at most.
        channel_multiple: Channels of a block: a layer keeps a multiple of it, or all it has.

    Raises:
        ConfigError: One head and one block a layer are more than the share.
    """
    heads = [1] * len(importance)
    channels = [min(channel_multiple, len(layer.channels)) for layer in importance]
    everything = weights.fixed + sum(
        len(layer.heads) * weights.head + len(layer.channels) * weights.channel
        for layer in importance
    )
    least = weights.fixed + sum(heads) * weights.head + sum(channels) * weights.channel
    left = int(target_share * everything) - least
    if left < 0:
        raise ConfigError.of("target_share", target_share, f"at least {least / everything:.3f}")
    mean_head = _mean([layer.heads for layer in importance])
    mean_channel = _mean([layer.channels for layer in importance])
    competing = [
        bid
        for number, layer in enumerate(importance)
        for bid in (
            *_bids(number, heads, layer.heads / mean_head, 1, weights.head),
            *_bids(
                number, channels, layer.channels / mean_channel, channel_multiple, weights.channel
            ),
        )
    ]
    closed: set[tuple[int, bool]] = set()  # layer and kind that a bid was too large for
    for bid in sorted(competing, key=lambda one: -one.worth):
        kind = (bid.layer, bid.counts is heads)
        if kind not in closed and bid.weights <= left:
            bid.counts[bid.layer] += bid.parts
            left -= bid.weights
        else:
            closed.add(kind)
    return [
        KeptParts(
            heads=_most_important(layer.heads, heads[number]),
            channels=_most_important(layer.channels, channels[number]),
        )
        for number, layer in enumerate(importance)
    ]


def _mean(importance: list[Tensor]) -> float:
    return max(float(torch.cat(importance).mean()), torch.finfo(torch.float32).tiny)


@dataclass(frozen=True, slots=True)
class _Bid:
    """Parts of a layer that want to stay, and what one of them is worth."""

    counts: list[int]
    layer: int
    parts: int
    weights: int
    worth: float


def _bids(layer: int, counts: list[int], importance: Tensor, size: int, weights: int) -> list[_Bid]:
    """Blocks of ``size`` parts from the most important on, without the first, which stays."""
    ordered = importance.sort(descending=True).values[counts[layer] :]
    return [
        _Bid(counts, layer, len(block), len(block) * weights, float(block.mean()))
        for block in ordered.split(size)
    ]


def share_for_latency(
    parent: TextEncoder,
    pruned_to: Callable[[float], TextEncoder],
    tokens: Sequence[list[int]],
    target: float,
    rng: np.random.Generator,
) -> float:
    """The largest share of the weights with which an encoder needs a share of the parent's time.

    Found by halving an interval, each time with an encoder that is pruned to that share and timed
    beside the parent. Timings differ from run to run, and so may the last digits of the answer.

    Args:
        parent: The encoder before.
        pruned_to: Makes the encoder of a target share of the layers' weights; raises ConfigError
            where that is too small.
        tokens: Token ids of real texts.
        target: Share of the parent's time.
        rng: Draws the texts.

    Raises:
        ConfigError: The smallest encoder tried is still slower.
    """
    low, high, best = 0.0, 1.0, None
    slowest = 1.0
    for _ in range(_BISECTIONS):
        share = (low + high) / 2
        try:
            measured = latency_share(parent, pruned_to(share), tokens, rng)
        except ConfigError:
            low = share
            continue
        if measured <= target:
            low = best = share
        else:
            high, slowest = share, measured
    if best is None:
        allowed = f"above {slowest:.2f}, what the smallest layers tried still need"
        raise ConfigError.of("target_latency_share", target, allowed)
    return best


def latency_share(
    parent: TextEncoder,
    pruned: TextEncoder,
    tokens: Sequence[list[int]],
    rng: np.random.Generator,
) -> float:
    """Time of one encoder as a share of another's, batch by batch in turn; the median counts."""
    runtimes = [TorchRuntime(parent, None), TorchRuntime(pruned, None)]
    shares: list[float] = []
    for number in range(_TIMED_ROUNDS + 1):
        drawn = rng.choice(len(tokens), size=min(_TIMED_TEXTS, len(tokens)), replace=False)
        batch = [tokens[text] for text in drawn]
        seconds = [0.0, 0.0]
        for one in (0, 1) if number % 2 else (1, 0):
            started = time.perf_counter()
            runtimes[one](batch)
            seconds[one] = time.perf_counter() - started
        if number:  # the first round warms up
            shares.append(seconds[1] / seconds[0])
    return statistics.median(shares)

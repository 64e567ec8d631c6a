from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from recflow.compression.allocation import (
    KeptParts,
    LayerImportance,
    PartWeights,
    keep_globally,
    keep_uniformly,
    latency_share,
    part_weights,
    share_for_latency,
)
from recflow.compression.prune import pruned_copy
from recflow.core.errors import ConfigError
from recflow.modeling.encoder import load_pretrained
from recflow.modeling.ranker import count_parameters

WEIGHTS = PartWeights(head=100, channel=7, fixed=50)


def _random(seed: int, layers: int = 3) -> list[LayerImportance]:
    generator = torch.Generator().manual_seed(seed)
    return [
        LayerImportance(
            heads=torch.rand(4, generator=generator) * 10,
            channels=torch.rand(64, generator=generator),
        )
        for _ in range(layers)
    ]


def _share(importance: list[LayerImportance], kept: list[KeptParts]) -> float:
    def size(parts: list[LayerImportance] | list[KeptParts]) -> int:
        return WEIGHTS.fixed + sum(len(p.heads) * 100 + len(p.channels) * 7 for p in parts)

    return size(kept) / size(importance)


def _is_top(kept: Tensor, importance: Tensor) -> bool:
    return set(kept.tolist()) == set(importance.topk(len(kept)).indices.tolist())


def test_uniform_keeps_the_most_important_of_each_layer() -> None:
    importance = LayerImportance(
        heads=torch.tensor([0.1, 3.0, 2.0]), channels=torch.tensor([5.0, 1.0, 4.0, 2.0])
    )
    kept = keep_uniformly([importance], 0.9, 0.5)[0]
    assert kept.heads.tolist() == [1]  # at least one stays
    assert kept.channels.tolist() == [0, 2]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("target", [0.3, 0.55, 0.9])
def test_the_target_share_is_nearly_reached_and_never_passed(target: float, seed: int) -> None:
    importance = _random(seed)
    kept = keep_globally(importance, WEIGHTS, target, 8)
    everything = 50 + 3 * (4 * 100 + 64 * 7)
    assert target - 100 / everything < _share(importance, kept) <= target
    for layer, parts in zip(importance, kept, strict=True):
        assert len(parts.channels) % 8 == 0
        assert min(len(parts.heads), len(parts.channels)) > 0
        assert _is_top(parts.heads, layer.heads)
        assert _is_top(parts.channels, layer.channels)
        for numbers in (parts.heads, parts.channels):
            assert (numbers.diff() > 0).all()


def test_more_weights_never_drop_a_part() -> None:
    importance = _random(5)
    before = keep_globally(importance, WEIGHTS, 0.2, 1)
    for target in np.arange(0.25, 1, 0.05):
        after = keep_globally(importance, WEIGHTS, float(target), 1)
        for old, new in zip(before, after, strict=True):
            assert len(new.channels) >= len(old.channels) - 14  # a head that now fits costs 14
        before = after


def test_an_important_layer_keeps_more() -> None:
    strong, weak = (
        LayerImportance(torch.full((4,), 20.0 * size), torch.full((64,), size))
        for size in (1.0, 0.1)
    )
    kept = keep_globally([weak, strong], WEIGHTS, 0.5, 8)
    assert (len(kept[0].heads), len(kept[1].heads)) == (1, 4)
    assert len(kept[0].channels) < len(kept[1].channels)


def test_a_share_below_one_head_and_one_block_a_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"target_share = 0\.1 .* at least 0\.200"):
        keep_globally(_random(0), WEIGHTS, 0.1, 8)


def test_the_weights_of_the_parts_are_those_that_go(base_model: Path) -> None:
    encoder = load_pretrained(base_model)
    weights = part_weights(encoder)
    kept = [
        KeptParts(torch.arange(3), torch.arange(50)),
        KeptParts(torch.arange(4), torch.arange(64)),
    ]
    smaller = pruned_copy(encoder, kept)
    gone = weights.head + 14 * weights.channel
    assert count_parameters(encoder) - count_parameters(smaller) == gone
    assert part_weights(smaller).head == weights.head
    assert part_weights(smaller).fixed == weights.fixed


def test_the_latency_of_an_encoder_is_that_of_itself(base_model: Path) -> None:
    encoder = load_pretrained(base_model)
    tokens = [[2, *range(5, 20), 3]] * 40
    assert 0.5 < latency_share(encoder, encoder, tokens, np.random.default_rng(0)) < 2


def test_the_share_for_a_latency_is_found_by_halving(
    base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, made = load_pretrained(base_model), []

    def pruned_to(share: float) -> float:
        if share < 0.1:
            raise ConfigError("too small")
        made.append(share)
        return share

    def latency(parent: object, share: float, *_: object) -> float:
        assert parent is encoder
        return 0.2 + 0.8 * share

    monkeypatch.setattr("recflow.compression.allocation.latency_share", latency)

    def find(target: float) -> float:
        rng = np.random.default_rng(0)
        return share_for_latency(encoder, pruned_to, [[2, 3]], target, rng)  # type: ignore[arg-type]

    assert 0.5 - 1 / 64 <= find(0.6) <= 0.5
    assert len(made) == 6
    with pytest.raises(ConfigError, match=r"target_latency_share = 0\.25 .* above 0\.29"):
        find(0.25)


def test_the_unit_of_a_kind_does_not_matter() -> None:
    importance = _random(2)
    scaled = [LayerImportance(layer.heads * 1e-3, layer.channels * 50) for layer in importance]
    both = (keep_globally(given, WEIGHTS, 0.5, 8) for given in (importance, scaled))
    for one, other in zip(*both, strict=True):
        assert torch.equal(one.heads, other.heads)
        assert torch.equal(one.channels, other.channels)


def test_a_layer_keeps_whole_blocks_or_all_it_has() -> None:
    importance = [
        LayerImportance(layer.heads, layer.channels[:58])  # seven blocks of eight and two more
        for layer in _random(7)
    ]
    for target in np.arange(0.25, 0.98, 0.02):
        for parts in keep_globally(importance, WEIGHTS, float(target), 8):
            assert len(parts.channels) % 8 == 0 or len(parts.channels) == 58

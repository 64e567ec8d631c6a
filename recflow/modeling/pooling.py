"""How the token states of a text become one vector, and the bottleneck adapters between layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

from recflow.core.errors import ConfigError


class MeanPooling(nn.Module):
    """Mean of the tokens' states."""

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """``[texts, width]`` of float32 states ``[texts, tokens, width]``."""
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)


class FirstToken(nn.Module):
    """State of the first token, BERT's ``[CLS]``."""

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """``[texts, width]`` of float32 states ``[texts, tokens, width]``."""
        del mask
        return hidden[:, 0]


class LastToken(nn.Module):
    """State of the last token that is not padding."""

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """``[texts, width]`` of float32 states ``[texts, tokens, width]``."""
        last = mask.sum(1)[:, None, None] - 1
        return hidden.gather(1, last.expand(-1, 1, hidden.shape[-1])).squeeze(1)


class AttentionPooling(nn.Module):
    """Mean weighted by the softmax of each token's product with a learnt query.

    The query starts at zero, where all weights are equal: the pretrained mean.
    Source: Yang et al. 2016, https://aclanthology.org/N16-1174.
    """

    def __init__(self, width: int) -> None:
        """Start as the mean over states of ``width``."""
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """``[texts, width]`` of float32 states ``[texts, tokens, width]``."""
        scores = (hidden * self.query).sum(-1).masked_fill(~mask, float("-inf"))
        return (hidden * scores.softmax(-1).unsqueeze(-1)).sum(1)


_POOLINGS: Mapping[str, Callable[[int], nn.Module]] = MappingProxyType(
    {
        "mean": lambda _: MeanPooling(),
        "cls": lambda _: FirstToken(),
        "last_token": lambda _: LastToken(),
        "attention": AttentionPooling,
    }
)


def resolve_pooling(name: str, *, causal: bool) -> str:
    """The pooling that ``auto`` stands for: ``last_token`` for decoders, ``mean`` for encoders.

    ``last_token`` of an encoder is its closing special token, which sees the whole text: allowed.

    Raises:
        ConfigError: The name is unknown, or ``cls`` is asked of a decoder, whose first token has
            seen no other and is the same for all texts.
    """
    if name == "auto":
        return "last_token" if causal else "mean"
    allowed = [known for known in _POOLINGS if not (causal and known == "cls")]
    if name not in allowed:
        model = "a decoder" if causal else "an encoder"
        raise ConfigError.of("pooling", name, f"auto, {', '.join(allowed)} for {model}")
    return name


def build_pooling(name: str, width: int) -> nn.Module:
    """The module of a resolved pooling for states of ``width``."""
    return _POOLINGS[name](width)


class BottleneckAdapter(nn.Module):
    """A narrow residual network behind a layer; it changes nothing until it has learnt.

    Houlsby et al. 2019 (https://arxiv.org/abs/1902.00751) in the arrangement of Bapna and Firat
    2019 (https://arxiv.org/abs/1909.08478): one a layer, with its own normalisation, which makes
    it independent of the scale of a family's hidden states.
    """

    def __init__(self, dimension: int, width: int) -> None:
        """Prepare.

        Args:
            dimension: Width of the hidden states.
            width: Width of the bottleneck.
        """
        super().__init__()
        self.norm = nn.LayerNorm(dimension)
        self.down = nn.Linear(dimension, width)
        self.up = nn.Linear(width, dimension)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    @property
    def width(self) -> int:
        """Width of the bottleneck."""
        return self.down.out_features

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[texts, tokens, dimension]`` with the learnt difference added."""
        return hidden + self.up(functional.gelu(self.down(self.norm(hidden))))

"""One vector of a user, made of the clicks; a candidate's score is an inner product with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from recflow.modeling.late_fusion import START_SPREAD, attention

_SPREAD = 0.02


class UserVector(nn.Module):
    """Scores by the inner product of a candidate with a vector made of the clicks.

    A user without clicks gets a learned default vector.

    Attributes:
        scale: What inner products are multiplied by.
    """

    def __init__(self, pooling: nn.Module, *, width: int, dropout: float) -> None:
        """Build with fresh weights.

        Args:
            pooling: Makes vectors ``[users, width]`` of item vectors ``[items, width]`` and of the
                rows of the clicks, -1 where there is none, ``[users, clicks]``.
            width: Width of the item vectors, all channels together.
            dropout: Dropout of the users' vectors.
        """
        super().__init__()
        self.pooling = pooling
        self.default = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(dropout)

    def forward(self, channels: tuple[Tensor, ...], history: Tensor, candidates: Tensor) -> Tensor:
        """Scores ``[users, slate]``.

        Args:
            channels: Unit vectors of each channel, ``[items, width of the channel]``.
            history: Row of each click, newest last, -1 before the oldest, ``[users, clicks]``.
            candidates: Row of each candidate, ``[users, slate]`` or ``[1, slate]``.
        """
        vectors = torch.cat(channels, dim=-1)
        users = self.dropout(self._users(vectors, history))
        return self.scale * inner_products(users, vectors, candidates)

    def fit_scale(
        self, channels: tuple[Tensor, ...], history: Tensor, candidates: Tensor, known: Tensor
    ) -> None:
        """Start from the scale under which the ``known`` candidates differ a little."""
        vectors = torch.cat(channels, dim=-1)
        products = inner_products(self._users(vectors, history), vectors, candidates)
        self.scale.fill_(START_SPREAD / products[known].std(correction=0).clamp(min=1e-3))

    def _users(self, vectors: Tensor, history: Tensor) -> Tensor:
        """Vectors of the users, ``[users, width]``."""
        warm = (history >= 0).any(dim=1, keepdim=True)
        return torch.where(warm, self.pooling(vectors, history), self.default)


class MeanPooling(nn.Module):
    """The mean of the clicks."""

    def forward(self, vectors: Tensor, history: Tensor) -> Tensor:
        """Vectors ``[users, width]``; 0 where there is no click."""
        weights = (history >= 0).to(vectors.dtype)
        total = weighted_sum(vectors, history, weights)
        return total / weights.sum(dim=1, keepdim=True).clamp(min=1)


class AttentivePooling(nn.Module):
    """Additive attention (Wu et al. 2019, NAML, https://arxiv.org/abs/1907.05576)."""

    def __init__(self, width: int, attention_width: int) -> None:
        """Build with weights under which all clicks count nearly the same."""
        super().__init__()
        self.hidden = nn.Linear(width, attention_width)
        self.query = nn.Linear(attention_width, 1, bias=False)
        nn.init.normal_(self.query.weight, std=_SPREAD)

    def forward(self, vectors: Tensor, history: Tensor) -> Tensor:
        """Vectors ``[users, width]``; 0 where there is no click."""
        return self.pool(functional.embedding(history.clamp(min=0), vectors), history >= 0)

    def pool(self, clicks: Tensor, seen: Tensor) -> Tensor:
        """``[users, clicks, width]`` to ``[users, width]``; 0 where there is no click."""
        weights = attention(self.query(self.hidden(clicks).tanh()).squeeze(-1), seen) * seen
        return (clicks * weights[..., None]).sum(dim=1)


class MultiHeadPooling(nn.Module):
    """Self-attention between the clicks, then additive attention, as in NRMS.

    Source: Wu et al. 2019, https://aclanthology.org/D19-1671. Unlike there, the clicks are added to
    what attention makes of them, so that training starts from the similarities of the encoder.
    """

    def __init__(self, width: int, heads: int, attention_width: int) -> None:
        """Build with weights under which self-attention adds little."""
        super().__init__()
        self._heads = heads
        inner = heads * -(-width // heads)
        self.queries_keys_values = nn.Linear(width, 3 * inner)
        self.output = nn.Linear(inner, width)
        nn.init.normal_(self.output.weight, std=_SPREAD)
        nn.init.zeros_(self.output.bias)
        self.summary = AttentivePooling(width, attention_width)

    def forward(self, vectors: Tensor, history: Tensor) -> Tensor:
        """Vectors ``[users, width]``; 0 where there is no click."""
        clicks, seen = functional.embedding(history.clamp(min=0), vectors), history >= 0
        queries, keys, values = (
            self.queries_keys_values(clicks)
            .unflatten(-1, (3, self._heads, -1))
            .permute(2, 0, 3, 1, 4)  # [3, users, heads, clicks, head]
        )
        similarity = queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
        mixed = attention(similarity, seen[:, None, None, :]) @ values
        return self.summary.pool(clicks + self.output(mixed.transpose(1, 2).flatten(2)), seen)


def weighted_sum(vectors: Tensor, history: Tensor, weights: Tensor) -> Tensor:
    """Sums ``[users, width]`` of the clicks' vectors, without a copy of them for each user.

    Args:
        vectors: A vector an item.
        history: Rows of ``vectors``, -1 for none, ``[users, clicks]``.
        weights: What each counts, 0 where there is none, ``[users, clicks]``.
    """
    return functional.embedding_bag(
        history.clamp(min=0), vectors, per_sample_weights=weights, mode="sum"
    )


def inner_products(users: Tensor, vectors: Tensor, candidates: Tensor) -> Tensor:
    """Inner products ``[users, slate]`` of users ``[users, width]`` with their candidates.

    Args:
        users: A vector a user.
        vectors: A vector an item.
        candidates: Rows of ``vectors``, ``[users, slate]``, or ``[1, slate]`` for all users.
    """
    if len(candidates) == 1:
        return users @ vectors[candidates[0]].T
    return (functional.embedding(candidates, vectors) @ users[..., None]).squeeze(-1)

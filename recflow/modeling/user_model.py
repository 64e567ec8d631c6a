"""The user model: how well a candidate fits what a user clicked, by late fusion.

A user is the list of clicked items, not one vector: each candidate is compared with every item of
the history, and the similarities are summarised – their mean, maximum, mean of the largest, the
newest, and two attentive means (by similarity, by age). The summaries of two channels, the text
and the category, feed a small network. An *appeal* term judges the item alone; it is all that a
user without history gets, so cold users still receive a ranking made from content.

Nothing here is tied to an identifier: items and users unseen in training are scored like others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

_TEXT, _CATEGORY = 0, 1
_SUMMARIES = 6  # of each channel, see _summarise
_HIDDEN_SCORE = -1e4  # finite, so that a fully hidden row has no NaN gradient

UNKNOWN_CATEGORY = 0


@dataclass(frozen=True, slots=True)
class UserModelShape:
    """Sizes of a user model; with the weights, all that is needed to rebuild it.

    Attributes:
        dimension: Width of the item vectors.
        categories: Known categories, the unknown one not counted; 0 leaves categories out.
        category_dimension: Width of the category vectors.
        history_length: Newest clicks that are used, in training and in scoring alike.
        top_k: How many of the largest similarities are averaged.
        width: Hidden width of the two small networks.
    """

    dimension: int
    categories: int
    history_length: int
    category_dimension: int = 16
    top_k: int = 5
    width: int = 32

    @property
    def channels(self) -> int:
        """Text, and category where there are any."""
        return 2 if self.categories else 1


@dataclass(frozen=True, slots=True)
class ItemStates:
    """What the user model needs to know of each item; computed once an item, then indexed.

    Attributes:
        channels: Unit vectors of each channel, ``[items, width of the channel]``.
        appeal: Score of the item alone, ``[items]``.
    """

    channels: tuple[Tensor, ...]
    appeal: Tensor

    def __getitem__(self, rows: Tensor) -> ItemStates:
        """The states of some items, in that order."""
        return ItemStates(tuple(channel[rows] for channel in self.channels), self.appeal[rows])


class UserModel(nn.Module):
    """Scores candidates for click histories, from item vectors.

    Attributes:
        shape: Sizes it was built with.
        centre: Mean item vector of the training items, subtracted from unit vectors. Encoders put
            all texts into a narrow cone; without centring, similarities hardly differ.
    """

    centre: Tensor
    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, shape: UserModelShape, *, dropout: float = 0.0) -> None:
        """Build with fresh weights; the text projection starts as the identity."""
        super().__init__()
        self.shape = shape
        features = _SUMMARIES * shape.channels
        self.register_buffer("centre", torch.zeros(shape.dimension))
        self.register_buffer("feature_mean", torch.zeros(features))
        self.register_buffer("feature_scale", torch.ones(features))
        self.projection = nn.Linear(shape.dimension, shape.dimension, bias=False)
        self.sharpness = nn.Parameter(torch.full((shape.channels,), 10.0))
        self.age = nn.Parameter(torch.zeros(shape.channels, shape.history_length))
        self.linear = nn.Linear(features, 1)
        self.network = _small_network(features, shape.width)
        self.appeal = nn.Sequential(
            nn.Dropout(dropout), *_small_network(shape.dimension, shape.width)
        )
        if shape.categories:
            self.category = nn.Embedding(shape.categories + 1, shape.category_dimension)
            self.category_appeal = nn.Embedding(shape.categories + 1, 1)
            nn.init.zeros_(self.category_appeal.weight)
        nn.init.eye_(self.projection.weight)
        nn.init.constant_(self.linear.weight, 0.05)

    def describe_items(self, vectors: Tensor, categories: Tensor) -> ItemStates:
        """Prepare items for scoring.

        Args:
            vectors: Unit vectors, ``[items, dimension]``.
            categories: Category numbers, 0 for unknown, ``[items]``.
        """
        text = functional.normalize(self.projection(vectors - self.centre), dim=-1)
        appeal = self.appeal(text).squeeze(-1)
        if not self.shape.categories:
            return ItemStates((text,), appeal)
        category = functional.normalize(self.category(categories), dim=-1)
        return ItemStates((text, category), appeal + self.category_appeal(categories).squeeze(-1))

    def forward(self, items: ItemStates, history: Tensor, candidates: Tensor) -> Tensor:
        """Score candidates.

        Args:
            items: What is known of the items that the other arguments index.
            history: Row of each clicked item, newest last, -1 before the oldest,
                ``[users, clicks]``; at most ``history_length`` clicks.
            candidates: Row of each candidate, ``[users, slate]``, or ``[1, slate]`` for one slate
                that all users share; -1 where there is none (its score has no meaning).

        Returns:
            Scores ``[users, slate]``, comparable within a row.
        """
        features = self.features(items, history, candidates)
        scaled = (features - self.feature_mean) / self.feature_scale
        fit = (self.linear(scaled) + self.network(scaled)).squeeze(-1)
        warm = (history >= 0).any(dim=1, keepdim=True)
        return items.appeal[candidates.clamp(min=0)] + fit * warm

    def features(self, items: ItemStates, history: Tensor, candidates: Tensor) -> Tensor:
        """Summaries of the similarities, ``[users, slate, features]``, before they are scaled.

        The arguments are those of :meth:`forward`.
        """
        seen = history >= 0
        clicks, slate = history.clamp(min=0), candidates.clamp(min=0)
        summaries: list[Tensor] = []
        for channel, vectors in enumerate(items.channels):
            similarity = _similarities(vectors, clicks, slate)
            summaries += self._summarise(similarity, seen, channel)
        return torch.stack(summaries, dim=-1)

    def _summarise(self, similarity: Tensor, seen: Tensor, channel: int) -> list[Tensor]:
        """Six summaries ``[users, slate]`` of similarities ``[users, slate, clicks]``."""
        clicks = similarity.shape[-1]
        visible = seen[:, None, :]
        known = similarity * visible
        count = seen.sum(dim=1).clamp(min=1)[:, None]
        largest = similarity.masked_fill(~visible, -1.0)
        top = largest.topk(min(self.shape.top_k, clicks), dim=-1).values
        ranks = torch.arange(top.shape[-1], device=top.device)
        kept = top * (ranks < count[..., None])
        by_similarity = similarity * self.sharpness[channel]
        by_age = self.age[channel, -clicks:].expand_as(similarity)
        return [
            known.sum(-1) / count,
            top[..., 0],
            kept.sum(-1) / count.clamp(max=top.shape[-1]),
            known[..., -1],
            (_attention(by_similarity, visible) * known).sum(-1),
            (_attention(by_age, visible) * known).sum(-1),
        ]


def fit_feature_scale(
    model: UserModel, items: ItemStates, history: Tensor, candidates: Tensor
) -> None:
    """Set the scale of the features from a sample of training impressions with a history."""
    with torch.no_grad():
        features = model.features(items, history, candidates)
        known = (candidates >= 0) & (history >= 0).any(dim=1, keepdim=True)
        if not known.any():
            return
        model.feature_mean.copy_(features[known].mean(0))
        model.feature_scale.copy_(features[known].std(0, correction=0).clamp(min=1e-3))


def _small_network(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, 1))


def _similarities(vectors: Tensor, clicks: Tensor, slate: Tensor) -> Tensor:
    """Inner products ``[users, slate, clicks]``; a shared slate is not copied for each user."""
    if len(slate) == 1:
        return (vectors[clicks] @ vectors[slate[0]].T).transpose(1, 2)
    return vectors[slate] @ vectors[clicks].transpose(1, 2)


def _attention(logits: Tensor, visible: Tensor) -> Tensor:
    return logits.masked_fill(~visible, _HIDDEN_SCORE).softmax(dim=-1)

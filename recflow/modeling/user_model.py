"""The user model: how well a candidate fits what a user clicked.

A score has up to three terms. The *appeal* judges the item alone; it is what a user without
history gets, so cold users still receive a ranking made from content. The *fit* compares the item
with the clicks: by late fusion (:mod:`recflow.modeling.late_fusion`) or through one vector of the
user (:mod:`recflow.modeling.user_vector`). Where asked for, *identity* adds embeddings of known
items and users (:mod:`recflow.modeling.identity`); without it nothing is tied to an identifier, and
items and users unseen in training are scored like others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from recflow.core.errors import ConfigError
from recflow.modeling.config import FUSIONS, USER_MODELS, UserModelConfig
from recflow.modeling.identity import IdentityModel, IdStates
from recflow.modeling.late_fusion import LateFusion, small_network
from recflow.modeling.texts import Rows
from recflow.modeling.user_vector import (
    AttentivePooling,
    MeanPooling,
    MultiHeadPooling,
    UserVector,
)


@dataclass(frozen=True, slots=True)
class UserModelShape:
    """Sizes of a user model; with the weights, all that is needed to rebuild it.

    Attributes:
        dimension: Width of the item vectors.
        categories: Known categories, the unknown one not counted; 0 leaves categories out.
        history_length: Newest clicks that are used, in training and in scoring alike.
        kind: One of ``recflow.modeling.config.USER_MODELS``.
        fusion: One of ``recflow.modeling.config.FUSIONS``; for late fusion.
        top_k: How many of the largest similarities late fusion averages.
        heads: Heads of ``multi_head``.
        items: Known items; 0 leaves their embeddings out.
        users: Known users; 0 leaves their embeddings out.
        id_dimension: Width of these embeddings.
        category_dimension: Width of the category vectors.
        width: Hidden width of the small networks.
    """

    dimension: int
    categories: int
    history_length: int
    kind: str = "late_fusion"
    fusion: str = "learned"
    top_k: int = 5
    heads: int = 8
    items: int = 0
    users: int = 0
    id_dimension: int = 32
    category_dimension: int = 16
    width: int = 32

    @classmethod
    def of(
        cls, config: UserModelConfig, *, dimension: int, categories: int, items: int, users: int
    ) -> UserModelShape:
        """Sizes for a configuration and data; what the configuration leaves out has size 0.

        Args:
            config: How clicks become scores.
            dimension: Width of the item vectors.
            categories: Categories of train.
            items: Items of train.
            users: Users of train.
        """
        return cls(
            dimension=dimension,
            categories=categories if config.categories else 0,
            history_length=config.history_length,
            kind=config.kind,
            fusion=config.fusion,
            top_k=config.top_k,
            heads=config.heads,
            items=items if config.item_ids else 0,
            users=users if config.user_ids else 0,
            id_dimension=config.id_dimension,
        )

    @property
    def channels(self) -> tuple[int, ...]:
        """Width of each channel: text, and category where there are any."""
        if not self.categories:
            return (self.dimension,)
        return (self.dimension, self.category_dimension)

    @property
    def knows_ids(self) -> bool:
        """Whether a score depends on who the item or the user is."""
        return self.items > 0 or self.users > 0


@dataclass(frozen=True, slots=True)
class ItemFeatures:
    """What is known of each item beside its vector.

    Attributes:
        categories: Number of each item's category, 0 for unknown, ``[items]`` int64.
        ids: Number of each item with an embedding of its own, 0 for others, ``[items]`` int64.
    """

    categories: Tensor
    ids: Tensor

    def __getitem__(self, rows: Tensor | Rows) -> ItemFeatures:
        """The features of some items, in that order."""
        return ItemFeatures(self.categories[rows], self.ids[rows])

    def to(self, device: torch.device) -> ItemFeatures:
        """The same on a device."""
        return ItemFeatures(self.categories.to(device), self.ids.to(device))


@dataclass(frozen=True, slots=True)
class ItemStates:
    """What the user model needs to know of each item; computed once an item, then indexed.

    Attributes:
        channels: Unit vectors of each channel, ``[items, width of the channel]``.
        appeal: Score of the item alone, ``[items]``.
        identity: What identity adds; None where it is left out.
    """

    channels: tuple[Tensor, ...]
    appeal: Tensor
    identity: IdStates | None = None

    def __getitem__(self, rows: Tensor) -> ItemStates:
        """The states of some items, in that order."""
        return ItemStates(
            tuple(channel[rows] for channel in self.channels),
            self.appeal[rows],
            None if self.identity is None else self.identity[rows],
        )


class UserModel(nn.Module):
    """Scores candidates for click histories, from item vectors.

    Attributes:
        shape: Sizes it was built with.
        centre: Mean item vector of the training items, subtracted from unit vectors. Encoders put
            all texts into a narrow cone; without centring, similarities hardly differ.
    """

    centre: Tensor

    def __init__(self, shape: UserModelShape, *, dropout: float = 0.0) -> None:
        """Build with fresh weights; the text projection starts as the identity."""
        super().__init__()
        self.shape = shape
        self.register_buffer("centre", torch.zeros(shape.dimension))
        self.projection = nn.Linear(shape.dimension, shape.dimension, bias=False)
        self.appeal = nn.Sequential(
            nn.Dropout(dropout), *small_network(shape.dimension, shape.width)
        )
        self.fit = _fit(shape, dropout)
        if shape.categories:
            self.category = nn.Embedding(shape.categories + 1, shape.category_dimension)
            self.category_appeal = nn.Embedding(shape.categories + 1, 1)
            nn.init.zeros_(self.category_appeal.weight)
        self.identity: IdentityModel | None = None
        if shape.knows_ids:
            self.identity = IdentityModel(
                items=shape.items,
                users=shape.users,
                text_dimension=shape.dimension,
                dimension=shape.id_dimension,
                history_length=shape.history_length,
                dropout=dropout,
            )
        nn.init.eye_(self.projection.weight)

    def describe_items(self, vectors: Tensor, features: ItemFeatures) -> ItemStates:
        """Prepare items for scoring.

        Args:
            vectors: Unit vectors, ``[items, dimension]``.
            features: The rest that is known of them.
        """
        centred = vectors - self.centre
        text = functional.normalize(self.projection(centred), dim=-1)
        channels, appeal = (text,), self.appeal(text).squeeze(-1)
        if self.shape.categories:
            category = functional.normalize(self.category(features.categories), dim=-1)
            channels = (text, category)
            appeal = appeal + self.category_appeal(features.categories).squeeze(-1)
        identity = None
        if self.identity is not None:
            identity = self.identity.describe_items(text, features.ids)
        return ItemStates(channels, appeal, identity)

    def forward(
        self,
        items: ItemStates,
        history: Tensor,
        candidates: Tensor,
        users: Tensor | None = None,
    ) -> Tensor:
        """Score candidates.

        Args:
            items: What is known of the items that the other arguments index.
            history: Row of each clicked item, newest last, -1 before the oldest,
                ``[users, clicks]``; at most ``history_length`` clicks.
            candidates: Row of each candidate, ``[users, slate]``, or ``[1, slate]`` for one slate
                that all users share; -1 where there is none (its score has no meaning).
            users: Number of each user with an embedding, 0 for others, ``[users]``; None for
                nobody.

        Returns:
            Scores ``[users, slate]``, comparable within a row.
        """
        slate = candidates.clamp(min=0)
        scores = items.appeal[slate] + self.fit(items.channels, history, slate)
        if self.identity is None or items.identity is None:
            return scores
        return scores + self.identity(items.identity, history, slate, users)


def fit_feature_scale(
    model: UserModel, items: ItemStates, history: Tensor, candidates: Tensor
) -> None:
    """Set the scale of what is compared from a sample of training impressions.

    Users without history and padding do not count.
    """
    known = (candidates >= 0) & (history >= 0).any(dim=1, keepdim=True)
    if known.any():
        with torch.no_grad():
            model.fit.fit_scale(items.channels, history, candidates.clamp(min=0), known)


def _fit(shape: UserModelShape, dropout: float) -> LateFusion | UserVector:
    """The part that compares candidates with clicks.

    Raises:
        ConfigError: The kind or the fusion is unknown.
    """
    if shape.fusion not in FUSIONS:
        raise ConfigError.of("fusion", shape.fusion, ", ".join(FUSIONS))
    if shape.kind == "late_fusion":
        return LateFusion(
            fusion=shape.fusion,
            channels=len(shape.channels),
            history_length=shape.history_length,
            top_k=shape.top_k,
            width=shape.width,
        )
    width = sum(shape.channels)
    if shape.kind == "mean":
        pooling = MeanPooling()
    elif shape.kind == "attentive":
        pooling = AttentivePooling(width, shape.width)
    elif shape.kind == "multi_head":
        pooling = MultiHeadPooling(width, shape.heads, shape.width)
    else:
        raise ConfigError.of("kind", shape.kind, ", ".join(USER_MODELS))
    return UserVector(pooling, width=width, dropout=dropout)

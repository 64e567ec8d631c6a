"""Embeddings of known items and users beside the text: matrix factorisation with implicit feedback.

The score of Koren (2008, *Factorization meets the neighborhood*, SVD++), ``b_i + b_u + q_i · (p_u +
|N(u)|**-1/2 * sum of y_j)``, with two additions. An item's factors are its embedding plus a linear
map of its text, so that an item unseen in training still meets what was learned of users. And
clicks weigh by their place in the history, equally at the start.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recflow.modeling.user_vector import inner_products, weighted_sum

_SPREAD = 0.05


@dataclass(frozen=True, slots=True)
class IdStates:
    """What identity says of each item.

    Attributes:
        bias: ``b_i``, ``[items]``; 0 for an unknown item.
        factors: ``q_i``, ``[items, id dimension]``.
        implicit: ``y_j``, what a click on the item says of the user, ``[items, id dimension]``; 0
            for an unknown item.
        known: 1 for an item of train, else 0, ``[items]``.
    """

    bias: Tensor
    factors: Tensor
    implicit: Tensor
    known: Tensor

    def __getitem__(self, rows: Tensor) -> IdStates:
        """The states of some items, in that order."""
        return IdStates(self.bias[rows], self.factors[rows], self.implicit[rows], self.known[rows])


class IdentityModel(nn.Module):
    """Scores candidates by who they are and who the user is.

    Number 0 is unknown: all its embeddings are and stay 0.
    """

    def __init__(
        self,
        *,
        items: int,
        users: int,
        text_dimension: int,
        dimension: int,
        history_length: int,
        dropout: float,
    ) -> None:
        """Build with small random embeddings.

        Args:
            items: Known items.
            users: Known users.
            text_dimension: Width of the text vectors.
            dimension: Width of the embeddings.
            history_length: Most clicks of a history.
            dropout: Dropout of the factors.
        """
        super().__init__()
        self.text = nn.Linear(text_dimension, dimension, bias=False)
        self.item_bias, self.item = _embedding(items, 1, 0.0), _embedding(items, dimension)
        self.user_bias, self.user = _embedding(users, 1, 0.0), _embedding(users, dimension)
        self.implicit = _embedding(items, dimension)
        self.age = nn.Parameter(torch.zeros(history_length))
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.text.weight, std=_SPREAD)

    def describe_items(self, text: Tensor, ids: Tensor) -> IdStates:
        """Look items up.

        Args:
            text: Text vectors, ``[items, text dimension]``.
            ids: Number of each item, 0 for unknown, ``[items]``.
        """
        return IdStates(
            bias=self.item_bias(ids).squeeze(-1),
            factors=self.dropout(self.item(ids) + self.text(text)),
            implicit=self.implicit(ids),
            known=(ids > 0).to(text.dtype),
        )

    def forward(
        self, items: IdStates, history: Tensor, candidates: Tensor, users: Tensor | None
    ) -> Tensor:
        """Scores ``[users, slate]``.

        Args:
            items: What is known of the items that ``history`` and ``candidates`` index.
            history: Row of each click, newest last, -1 before the oldest, ``[users, clicks]``.
            candidates: Row of each candidate, ``[users, slate]`` or ``[1, slate]``.
            users: Number of each user, 0 for unknown, ``[users]``; None where nobody is known.
        """
        if users is None:
            users = history.new_zeros(len(history))
        factors = self.dropout(self.user(users) + self._implicit_factors(items, history))
        scores = inner_products(factors, items.factors, candidates)
        return items.bias[candidates] + self.user_bias(users) + scores

    def _implicit_factors(self, items: IdStates, history: Tensor) -> Tensor:
        """``|N(u)|**-1/2 * sum of y_j`` over the known clicks, ``[users, id dimension]``."""
        known = items.known[history.clamp(min=0)] * (history >= 0)
        weights = known * self.age[-history.shape[1] :].exp()
        total = weighted_sum(items.implicit, history, weights)
        return total / weights.sum(dim=1, keepdim=True).clamp(min=1).sqrt()


def _embedding(known: int, dimension: int, spread: float = _SPREAD) -> nn.Embedding:
    """An embedding of ``known`` numbers from 1; number 0 is and stays zero."""
    embedding = nn.Embedding(known + 1, dimension, padding_idx=0)
    with torch.no_grad():
        embedding.weight[1:].normal_(std=spread) if spread else embedding.weight.zero_()
    return embedding

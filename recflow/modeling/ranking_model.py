"""Encoder and user model as the one module that is trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recflow.modeling.batching import IndexedImpressions
from recflow.modeling.config import ObjectiveConfig
from recflow.modeling.distribution import Team
from recflow.modeling.encoder import TextEncoder
from recflow.modeling.item_encoder import ItemEncoder
from recflow.modeling.objectives import per_click_losses
from recflow.modeling.ranker import score_slates
from recflow.modeling.sampling import StepBatch, deal
from recflow.modeling.texts import Rows
from recflow.modeling.user_model import ItemFeatures, ItemStates, UserModel, fit_feature_scale


class RankingModel(nn.Module):
    """Scores clicks from item rows, and keeps the vectors of all items.

    Whatever uses weights is a *task* of :meth:`forward`, because there the wrappers for several
    processes gather and exchange what belongs to them. All but ``loss`` run without gradients.

    Attributes:
        encoder: The text encoder. It stays in evaluation mode: with dropout, fresh vectors would
            differ from kept ones of the same weights, and their similarities would be noise.
        user_model: The user model.
        kept: Vectors of all items as last computed, ``[items, dimension]``.
    """

    kept: Tensor

    def __init__(
        self,
        encoder: TextEncoder,
        user_model: UserModel,
        *,
        items: ItemEncoder,
        features: ItemFeatures,
        objective: ObjectiveConfig,
        team: Team,
        exchange: bool,
        device: torch.device,
    ) -> None:
        """Put the parts together; all items are encoded by :meth:`renew`.

        Args:
            encoder: On ``device``.
            user_model: On ``device``.
            items: Encodes rows of the item table.
            features: What is known of the items beside their texts.
            objective: What is minimised.
            team: The processes that share the work.
            exchange: Whether they share the items of a step, or each has a batch of its own.
            device: Where to compute.
        """
        super().__init__()
        self.encoder, self.user_model = encoder.eval(), user_model
        self._items, self._objective, self._team = items, objective, team
        self._exchange, self._features, self._device = exchange, features.to(device), device
        kept = torch.zeros(len(items.lengths), encoder.dimension, device=device)
        self.register_buffer("kept", kept, persistent=False)

    def forward(self, task: str, *arguments: Any) -> Any:
        """Do one of the tasks below."""
        return getattr(self, task)(*arguments)

    def loss(self, batch: StepBatch) -> Tensor:
        """This process' part of the loss of a step; the parts of all processes add up to it."""
        rows = torch.from_numpy(batch.rows).to(self._device)
        vectors = self._partly_encoded(batch, rows) if len(batch.own) else self.kept[rows]
        states = self.user_model.describe_items(vectors, self._features[rows])
        scores = self.user_model(states, batch.history, batch.candidates, batch.users)
        losses = per_click_losses(
            self._objective,
            scores,
            batch.present,
            target=batch.target,
            ratings=batch.ratings,
            log_frequency=batch.log_frequency,
        )
        return losses.sum() * batch.weight

    def renew(self) -> None:
        """Encode all items again; the processes share the work."""
        rows = np.arange(len(self.kept))
        dealt = deal(rows, self._items.lengths, self._team.size)
        own = np.split(dealt, self._team.size)[self._team.rank]
        self.kept[torch.from_numpy(dealt)] = self._team.gather(self._items(own))

    def states(self) -> ItemStates:
        """All items as the user model sees them."""
        return self.user_model.describe_items(self.kept, self._features)

    def fit_scale(self, data: IndexedImpressions, seen: Rows) -> None:
        """Centre the vectors on items of train, and scale the features by some impressions."""
        self.user_model.centre.copy_(self.kept[torch.from_numpy(seen)].mean(0))
        history = torch.from_numpy(data.histories.pad(right_aligned=True)).to(self._device)
        slates = torch.from_numpy(data.slates.pad()).to(self._device)
        fit_feature_scale(self.user_model, self.states(), history, slates)

    def scores(self, data: IndexedImpressions, users: Rows) -> np.ndarray[Any, Any]:
        """Scores of all candidates, end to end."""
        return score_slates(self.user_model, self.states(), data.histories, data.slates, users)

    def _partly_encoded(self, batch: StepBatch, rows: Tensor) -> Tensor:
        """Vectors of the batch's items; those that were chosen are fresh and carry gradients."""
        fresh = self._items(batch.own)
        if self._exchange:
            fresh = self._team.gather(fresh)
        # A text that only fills up an uneven deal is there twice; it counts once.
        places, first = np.unique(batch.encoded, return_index=True)
        fresh = fresh[torch.from_numpy(first).to(self._device)]
        places = torch.from_numpy(places).to(self._device)
        vectors = self.kept[rows].index_copy(0, places, fresh)
        self.kept[rows[places]] = fresh.detach()
        return vectors

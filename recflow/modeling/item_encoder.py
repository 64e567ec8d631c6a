"""Items to vectors, as training needs them: some rows of the item table, with gradients."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from recflow.modeling.config import SpeedConfig
from recflow.modeling.encoder import TextEncoder, mixed_precision
from recflow.modeling.hidden_states import HiddenStates
from recflow.modeling.texts import BUCKET_SIZE, Rows, length_buckets, token_mask


class ItemEncoder:
    """Encodes items by row.

    Only the layers that learn run where the hidden states below them are kept; else all of them,
    those that never change without gradients.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        tokens: list[list[int]],
        *,
        constant_layers: int | None,
        states: HiddenStates | None,
        speed: SpeedConfig,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        """Prepare.

        Args:
            encoder: On ``device``.
            tokens: Token ids of each item's text.
            constant_layers: Lowest layers that never change; ``None`` where the embeddings do.
            states: Hidden states at the input of the layer above them, or ``None``.
            speed: How texts are put together.
            max_tokens: Width that texts are padded to where padding is not dynamic.
            device: Where to compute.
        """
        self._encoder, self._states, self._speed = encoder, states, speed
        self._constant = constant_layers
        self._max_tokens, self._device = max_tokens, device
        self.lengths: Rows = np.array([len(text) for text in tokens], dtype=np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self._ids = torch.tensor([token for text in tokens for token in text], dtype=torch.long)

    def __call__(self, rows: Rows) -> Tensor:
        """Unit vectors ``[rows, dimension]`` float32, with gradients where weights want them."""
        vectors: list[Tensor] = []
        order: list[Rows] = []
        with mixed_precision(self._device, self._speed.precision != "fp32"):
            for bucket in self._ordered(rows):
                vectors.append(self._encode(rows[bucket]))
                order.append(bucket)
        inverse = np.argsort(np.concatenate(order))
        return torch.cat(vectors)[torch.from_numpy(inverse).to(self._device)]

    def _ordered(self, rows: Rows) -> list[Rows]:
        """The batches; longest first where no graph keeps them, so that each fits where one was.

        With gradients the order decides in which order these add up, and so their last bits.
        """
        buckets = list(self._buckets(rows))
        return buckets if torch.is_grad_enabled() else buckets[::-1]

    def _buckets(self, rows: Rows) -> Iterator[Rows]:
        if self._speed.length_buckets:
            return length_buckets(self.lengths[rows])
        return (
            np.arange(start, min(start + BUCKET_SIZE, len(rows)))
            for start in range(0, len(rows), BUCKET_SIZE)
        )

    def _encode(self, rows: Rows) -> Tensor:
        lengths = self.lengths[rows]
        known = torch.from_numpy(token_mask(lengths))
        if not self._speed.dynamic_padding:
            missing = self._max_tokens - known.shape[1]
            known = torch.nn.functional.pad(known, (0, missing))
        mask = known.to(self._device)
        last = len(self._encoder.layers)
        if self._states is not None and self._constant is not None:
            hidden = torch.zeros((*known.shape, self._encoder.width), device=self._device)
            hidden[mask] = self._states.gather(rows).to(self._device, torch.float32)
            hidden = self._encoder.run_layers(hidden, mask, self._constant, last)
        else:
            ids = torch.zeros(known.shape, dtype=torch.long)
            ids[known] = self._tokens_of(rows)
            hidden = self._from_tokens(ids.to(self._device), mask)
        return self._encoder.pool(hidden, mask)

    def _from_tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        first = self._constant or 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._constant is None):
            hidden = self._encoder.embed(ids)
        with torch.no_grad():
            hidden = self._encoder.run_layers(hidden, mask, 0, first)
        return self._encoder.run_layers(hidden, mask, first, len(self._encoder.layers))

    def _tokens_of(self, rows: Rows) -> Tensor:
        spans = [self._ids[self._offsets[row] : self._offsets[row + 1]] for row in rows]
        return torch.cat(spans)

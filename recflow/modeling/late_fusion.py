"""Late fusion: each candidate is compared with every click, and the similarities are summed up.

Nothing of a user is averaged before the comparison, so one click among fifty that is close to a
candidate still counts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

START_SPREAD = 0.3  # standard deviation of untrained scores, about
_HIDDEN_LOGIT = -1e4  # finite, so that a fully hidden row has no NaN gradient


class LateFusion(nn.Module):
    """How well candidates fit a history, from summaries of their similarities to its clicks.

    Of each channel (text, category) there are six summaries: mean, maximum, mean of the largest,
    the newest, and two attentive means (by similarity, by age). ``learned`` feeds all of them to a
    small network; ``mean``, ``max`` and ``top_k`` keep that one summary and learn its weight.

    Attributes:
        feature_mean: Mean of each feature over a sample of training candidates.
        feature_scale: Its standard deviation there.
    """

    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(
        self, *, fusion: str, channels: int, history_length: int, top_k: int, width: int
    ) -> None:
        """Build with fresh weights: every feature counts for the candidate, equally much.

        Args:
            fusion: One of ``recflow.modeling.config.FUSIONS``.
            channels: Vectors of an item that are compared.
            history_length: Most clicks of a history.
            top_k: How many of the largest similarities are averaged.
            width: Hidden width of the network.
        """
        super().__init__()
        self._fusion, self._top_k = fusion, top_k
        features = channels * (6 if fusion == "learned" else 1)
        self.register_buffer("feature_mean", torch.zeros(features))
        self.register_buffer("feature_scale", torch.ones(features))
        self.linear = nn.Linear(features, 1)
        nn.init.constant_(self.linear.weight, START_SPREAD * channels / features)
        self.network: nn.Sequential | None = None
        if fusion == "learned":
            self.sharpness = nn.Parameter(torch.full((channels,), 10.0))
            self.age = nn.Parameter(torch.zeros(channels, history_length))
            self.network = small_network(features, width)

    def forward(self, channels: tuple[Tensor, ...], history: Tensor, candidates: Tensor) -> Tensor:
        """Scores ``[users, slate]``, 0 for users without a click.

        Args:
            channels: Unit vectors of each channel, ``[items, width of the channel]``.
            history: Row of each click, newest last, -1 before the oldest, ``[users, clicks]``.
            candidates: Row of each candidate, ``[users, slate]`` or ``[1, slate]``.
        """
        features = self.features(channels, history, candidates)
        scaled = (features - self.feature_mean) / self.feature_scale
        scores = self.linear(scaled)
        if self.network is not None:
            scores = scores + self.network(scaled)
        return scores.squeeze(-1) * (history >= 0).any(dim=1, keepdim=True)

    def features(self, channels: tuple[Tensor, ...], history: Tensor, candidates: Tensor) -> Tensor:
        """Summaries ``[users, slate, features]``, before they are scaled."""
        seen, clicks = history >= 0, history.clamp(min=0)
        summaries: list[Tensor] = []
        for channel, vectors in enumerate(channels):
            similarity = _similarities(vectors, clicks, candidates)
            summaries += self._summarise(similarity, seen, channel)
        return torch.stack(summaries, dim=-1)

    def fit_scale(
        self, channels: tuple[Tensor, ...], history: Tensor, candidates: Tensor, known: Tensor
    ) -> None:
        """Set the scale of the features from those of the ``known`` candidates."""
        features = self.features(channels, history, candidates)[known]
        self.feature_mean.copy_(features.mean(0))
        self.feature_scale.copy_(features.std(0, correction=0).clamp(min=1e-3))

    def _summarise(self, similarity: Tensor, seen: Tensor, channel: int) -> list[Tensor]:
        """Summaries ``[users, slate]`` of similarities ``[users, slate, clicks]``."""
        visible = seen[:, None, :]
        if self._fusion == "mean":
            return [_mean(similarity, visible)]
        if self._fusion == "max":
            return [_mean_of_largest(similarity, visible, 1)]
        if self._fusion == "top_k":
            return [_mean_of_largest(similarity, visible, self._top_k)]
        known = similarity * visible
        by_similarity = similarity * self.sharpness[channel]
        by_age = self.age[channel, -similarity.shape[-1] :].expand_as(similarity)
        return [
            _mean(similarity, visible),
            _mean_of_largest(similarity, visible, 1),
            _mean_of_largest(similarity, visible, self._top_k),
            known[..., -1],
            (attention(by_similarity, visible) * known).sum(-1),
            (attention(by_age, visible) * known).sum(-1),
        ]


def attention(logits: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the visible places of the last dimension; even where none is visible."""
    return logits.masked_fill(~visible, _HIDDEN_LOGIT).softmax(dim=-1)


def small_network(inputs: int, width: int) -> nn.Sequential:
    """One hidden layer, one output."""
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, 1))


def _similarities(vectors: Tensor, clicks: Tensor, slate: Tensor) -> Tensor:
    """Inner products ``[users, slate, clicks]``; a shared slate is not copied for each user."""
    clicked = functional.embedding(clicks, vectors)  # its backward pass is cheaper than indexing's
    if len(slate) == 1:
        return (clicked @ vectors[slate[0]].T).transpose(1, 2)
    return functional.embedding(slate, vectors) @ clicked.transpose(1, 2)


def _mean(similarity: Tensor, visible: Tensor) -> Tensor:
    return (similarity * visible).sum(-1) / visible.sum(-1).clamp(min=1)


def _mean_of_largest(similarity: Tensor, visible: Tensor, limit: int) -> Tensor:
    largest = similarity.masked_fill(~visible, -1.0).topk(min(limit, similarity.shape[-1])).values
    count = visible.sum(-1, keepdim=True)
    kept = largest * (torch.arange(largest.shape[-1], device=largest.device) < count)
    return kept.sum(-1) / count.squeeze(-1).clamp(min=1, max=largest.shape[-1])

"""Matrices stored as the product of two narrow ones: ``W ≈ up · down``.

A matrix of ``out × in`` weights becomes ``rank · (out + in)`` of them, and as many multiplications
a token. Both factors are plain modules of torch, so that every runtime and exporter executes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from recflow.core.errors import ConfigError


class LowRankLinear(nn.Module):
    """A linear map through ``rank`` numbers.

    Attributes:
        down: ``in_features`` to ``rank``, without bias.
        up: ``rank`` to ``out_features``.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool) -> None:
        """Make the two matrices; ``bias`` says whether the second one has one."""
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.down.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.up.out_features

    @property
    def rank(self) -> int:
        """Width between the two matrices."""
        return self.down.out_features

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., out_features]`` of ``[..., in_features]``."""
        return self.up(self.down(inputs))


class LowRankEmbedding(nn.Module):
    """An embedding table of width ``rank``, widened afterwards.

    ALBERT's factorised embedding (Lan et al. 2020, https://arxiv.org/abs/1909.11942).

    Attributes:
        down: The table ``[rows, rank]``.
        up: ``rank`` to ``width``, without bias.
    """

    def __init__(self, rows: int, width: int, rank: int, padding_idx: int | None = None) -> None:
        """Make the table and the matrix behind it."""
        super().__init__()
        self.down = nn.Embedding(rows, rank, padding_idx=padding_idx)
        self.up = nn.Linear(rank, width, bias=False)

    @property
    def rank(self) -> int:
        """Width of the table."""
        return self.down.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """``[..., width]`` of token ids ``[...]``."""
        return self.up(self.down(ids))


LowRank = LowRankLinear | LowRankEmbedding

_PLAIN = (nn.Linear, nn.Embedding)


def low_rank_modules(model: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """Name and module of every factorised matrix of ``model``."""
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear | LowRankEmbedding):
            yield name, module


def ranks_of(model: nn.Module) -> dict[str, int]:
    """Rank of every factorised matrix, by the name of its module."""
    return {name: module.rank for name, module in low_rank_modules(model)}


def factorise(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Replace linear layers and embedding tables by low-rank ones of the same sizes.

    The weights of the new modules hold anything until they are set or loaded; a bias is kept.

    Args:
        model: Changed in place.
        ranks: Rank by name of a module of ``model``.

    Raises:
        ConfigError: A module does not exist or is neither a linear layer nor an embedding table,
            or a rank is below 1 or above the smaller side of its matrix.
    """
    modules = dict(model.named_modules())
    for name, rank in ranks.items():
        old = modules.get(name)
        # Subclasses do more than multiply; Gemma's table, for example, is scaled.
        if not isinstance(old, nn.Linear | nn.Embedding) or type(old) not in _PLAIN:
            raise ConfigError.of("ranks", name, "names of linear layers and embedding tables")
        rows, columns = old.weight.shape
        if not 1 <= rank <= min(rows, columns):
            raise ConfigError.of(f"ranks[{name}]", rank, f"from 1 to {min(rows, columns)}")
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, _empty(old, rank))


def _empty(old: nn.Linear | nn.Embedding, rank: int) -> LowRank:
    if isinstance(old, nn.Embedding):
        new = LowRankEmbedding(old.num_embeddings, old.embedding_dim, rank, old.padding_idx)
        return new.to(old.weight.device)
    biased = old.bias is not None
    new = LowRankLinear(old.in_features, old.out_features, rank, bias=biased)
    if biased:
        with torch.no_grad():
            new.up.bias.copy_(old.bias)
    return new.to(old.weight.device)


def token_table(model: nn.Module) -> nn.Embedding:
    """The table with one row a token: the model's own, or the narrow one of a low-rank one.

    Args:
        model: A Hugging Face model.
    """
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    return embeddings.down if isinstance(embeddings, LowRankEmbedding) else embeddings

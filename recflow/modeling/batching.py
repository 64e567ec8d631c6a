"""From tables to tensors: item rows, ragged lists, click samples, and texts in length buckets.

What makes training cheap is decided here: items are numbered once, every distinct item of a batch
is encoded once, texts of similar length share a bucket, and the hidden states below the lowest
trainable layer are computed once a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from recflow.core.columns import Columns
from recflow.core.errors import ConfigError, ContractError
from recflow.modeling.encoder import TextEncoder
from recflow.modeling.texts import Rows, length_buckets, pad_tokens, token_mask
from recflow.modeling.user_model import UNKNOWN_CATEGORY
from recflow.modeling.vocabulary import number_ids


@dataclass(frozen=True, slots=True)
class Ragged:
    """Lists of different length, stored end to end.

    Attributes:
        values: The lists' elements.
        offsets: List ``i`` is ``values[offsets[i]:offsets[i + 1]]``; one longer than the lists.
    """

    values: Rows
    offsets: Rows

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Rows:
        """Length of each list."""
        return np.diff(self.offsets)

    def take(self, lists: Rows) -> Ragged:
        """Some of the lists, in that order."""
        lengths = self.lengths[lists]
        offsets = _offsets(lengths)
        positions = np.arange(offsets[-1]) + np.repeat(self.offsets[lists] - offsets[:-1], lengths)
        return Ragged(self.values[positions], offsets)

    def pad(self, *, right_aligned: bool = False) -> Rows:
        """One row a list, -1 where it has no element; ``[lists, longest]``, at least one wide."""
        lengths = self.lengths
        width = max(int(lengths.max(initial=0)), 1)
        columns = np.arange(width)
        filled = (
            columns >= width - lengths[:, None] if right_aligned else columns < lengths[:, None]
        )
        padded = np.full((len(self), width), -1, dtype=np.int64)
        padded[filled] = self.values
        return padded


class ItemIndex:
    """Numbers the items of a table by their row.

    Attributes:
        ids: Item ids in row order.
        texts: Their texts.
    """

    def __init__(self, items: pl.DataFrame) -> None:
        """Index an item-features table.

        Raises:
            ContractError: An item id occurs twice.
        """
        if items[Columns.ITEM_ID].is_duplicated().any():
            twice = items[Columns.ITEM_ID].filter(items[Columns.ITEM_ID].is_duplicated())[0]
            raise ContractError(f"item {twice!r} occurs twice in the item features")
        self.ids: list[str] = items[Columns.ITEM_ID].to_list()
        self.texts: list[str] = items[Columns.TEXT].to_list()
        self._categories = items[Columns.CATEGORY]
        self._rows = items.select(Columns.ITEM_ID).with_row_index("row")

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: pl.Series) -> Rows:
        """Row of each item id.

        Raises:
            ContractError: An id is not in the item features.
        """
        wanted = ids.rename(Columns.ITEM_ID).cast(pl.String).to_frame()
        rows = wanted.join(self._rows, on=Columns.ITEM_ID, how="left", maintain_order="left")["row"]
        if rows.null_count():
            unknown = wanted.filter(rows.is_null())[Columns.ITEM_ID]
            raise ContractError(
                f"{unknown.n_unique()} items of the impressions are not in the item features, "
                f"e.g. {unknown[0]!r}; clean the logs against the same item table"
            )
        return rows.cast(pl.Int64).to_numpy()

    def ragged(self, lists: pl.Series) -> Ragged:
        """Rows of lists of item ids.

        Raises:
            ContractError: An id is not in the item features.
        """
        lengths = lists.list.len().cast(pl.Int64).to_numpy()
        return Ragged(self.rows(lists.filter(lists.list.len() > 0).explode()), _offsets(lengths))

    def categories_of(self, rows: Rows) -> list[str]:
        """Distinct non-empty categories of some items, sorted."""
        found = self._categories.gather(rows).drop_nulls().unique().sort()
        return [category for category in found.to_list() if category]

    def category_numbers(self, known: list[str]) -> Rows:
        """Number of each item's category: 1 + its place in ``known``, 0 where it is not there."""
        numbers = {category: number for number, category in enumerate(known, start=1)}
        return np.array(
            [numbers.get(category, UNKNOWN_CATEGORY) for category in self._categories.to_list()],
            dtype=np.int64,
        )

    def numbers(self, known_ids: list[str]) -> Rows:
        """Number of each item: 1 + its place in ``known_ids``, 0 where it is not there."""
        return number_ids(pl.Series(self.ids, dtype=pl.String), known_ids)


@dataclass(frozen=True, slots=True)
class IndexedImpressions:
    """Impressions as item rows.

    Attributes:
        histories: The newest clicks, oldest first.
        slates: The candidates.
        clicked: For each candidate, end to end, whether it was clicked.
    """

    histories: Ragged
    slates: Ragged
    clicked: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.slates)

    @property
    def distinct_items(self) -> Rows:
        """Rows of all items that occur, sorted."""
        return np.unique(np.concatenate([self.histories.values, self.slates.values]))

    @property
    def click_counts(self) -> Rows:
        """Clicks of each impression."""
        sums = np.concatenate([[0], np.cumsum(self.clicked)])
        return np.diff(sums[self.slates.offsets])

    @property
    def contrasts(self) -> NDArray[np.bool_]:
        """Whether each impression has both a click and a non-click; others teach nothing."""
        clicks = self.click_counts
        return (clicks > 0) & (clicks < self.slates.lengths)

    def require_contrasts(self, split: str) -> None:
        """Raise unless some impression has both a click and a non-click.

        Raises:
            ContractError: Names the split.
        """
        if not self.contrasts.any():
            raise ContractError(
                f"no {split} impression has both a clicked and a non-clicked candidate, so there "
                "is nothing to learn from or to compare; widen the window of days"
            )

    def take(self, impressions: Rows) -> IndexedImpressions:
        """Some of the impressions, in that order."""
        slates = self.slates.take(impressions)
        flags = Ragged(self.clicked.astype(np.int64), self.slates.offsets).take(impressions)
        return IndexedImpressions(
            self.histories.take(impressions), slates, flags.values.astype(np.bool_)
        )


def index_impressions(
    impressions: pl.DataFrame, items: ItemIndex, history_length: int
) -> IndexedImpressions:
    """Look up the items of impressions that have labels.

    Args:
        impressions: Split impressions.
        items: Item table that holds every id.
        history_length: Newest clicks to keep.

    Raises:
        ContractError: An item is unknown, or a slate and its labels differ in length.
    """
    slates, labels = impressions[Columns.CANDIDATES], impressions[Columns.LABELS]
    if not (slates.list.len() == labels.list.len()).all():
        raise ContractError("a slate and its labels differ in length; rebuild the split")
    clicked = labels.filter(labels.list.len() > 0).explode().cast(pl.Boolean).to_numpy()
    return IndexedImpressions(
        histories=items.ragged(impressions[Columns.HISTORY].list.tail(history_length)),
        slates=items.ragged(slates),
        clicked=clicked,
    )


def items_in_use(items: pl.DataFrame, tables: list[pl.DataFrame], history_length: int) -> ItemIndex:
    """Index of the items that occur in any of the tables of impressions, in the order of ``items``.

    Raises:
        ContractError: An item is not in ``items``.
    """
    index = ItemIndex(items)
    rows = [
        index.ragged(lists).values
        for table in tables
        for lists in (table[Columns.HISTORY].list.tail(history_length), table[Columns.CANDIDATES])
    ]
    return ItemIndex(items[np.unique(np.concatenate(rows))])


def spread(data: IndexedImpressions, limit: int) -> IndexedImpressions:
    """At most ``limit`` impressions at even distances."""
    return data.take(np.linspace(0, len(data) - 1, min(limit, len(data))).round().astype(np.int64))


def local_rows(rows_of_items: Rows, rows: Rows) -> Tensor:
    """Number items by their place in ``rows``, which is sorted; -1 stays -1."""
    return torch.from_numpy(np.where(rows_of_items < 0, -1, np.searchsorted(rows, rows_of_items)))


@dataclass(frozen=True, slots=True)
class ClickBatch:
    """Clicks with sampled non-clicks of the same slate.

    Attributes:
        impressions: Number of each click's impression, to name a bad batch.
        history: Item rows, newest last, -1 before the oldest, ``[clicks, history]``.
        candidates: The clicked item first, then non-clicked ones, -1 where the slate had no more,
            ``[clicks, 1 + negatives]``.
    """

    impressions: Rows
    history: Rows
    candidates: Rows

    @property
    def distinct_items(self) -> Rows:
        """Rows of all items that occur, sorted."""
        rows = np.unique(np.concatenate([self.history.ravel(), self.candidates.ravel()]))
        return rows[rows >= 0]


def draw_clicks(
    data: IndexedImpressions,
    *,
    clicks_per_impression: int,
    max_impressions: int,
    rng: np.random.Generator,
) -> Rows:
    """Draw the clicks of one epoch, in random order.

    Slates without a click or without a non-click teach nothing and are left out.

    Args:
        data: Impressions.
        clicks_per_impression: Most clicks of one impression, so that long slates do not outweigh
            the others.
        max_impressions: Most impressions, drawn without replacement.
        rng: Source of the draws.

    Returns:
        Impression and position in ``data.slates.values`` of each click, ``[clicks, 2]``.
    """
    usable = np.flatnonzero(data.contrasts)
    wanted = np.zeros(len(data), dtype=np.bool_)
    wanted[rng.permutation(usable)[:max_impressions]] = True
    owners = np.repeat(np.arange(len(data)), data.slates.lengths)
    positions = np.flatnonzero(data.clicked & wanted[owners])
    positions = positions[np.lexsort((rng.random(len(positions)), owners[positions]))]
    owners = owners[positions]
    rank_in_impression = np.arange(len(owners)) - np.searchsorted(owners, owners)
    kept = rank_in_impression < clicks_per_impression
    return rng.permutation(np.stack([owners[kept], positions[kept]], axis=1))


def count_clicks(
    data: IndexedImpressions, *, clicks_per_impression: int, max_impressions: int
) -> int:
    """Expected number of clicks that :func:`draw_clicks` draws; exact where none is left out."""
    clicks = np.minimum(data.click_counts[data.contrasts], clicks_per_impression)
    share = min(1.0, max_impressions / max(len(clicks), 1))
    return round(float(clicks.sum()) * share)


def click_batch(
    data: IndexedImpressions, clicks: Rows, negatives: int, rng: np.random.Generator
) -> ClickBatch:
    """Set clicks against non-clicked candidates of their slates.

    Args:
        data: Impressions.
        clicks: Some rows of :func:`draw_clicks`.
        negatives: Most non-clicked candidates a click, drawn without replacement.
        rng: Source of the draws.
    """
    slates = data.take(clicks[:, 0])
    clicked = data.slates.values[clicks[:, 1:]]
    return ClickBatch(
        impressions=clicks[:, 0],
        history=slates.histories.pad(right_aligned=True),
        candidates=np.concatenate([clicked, _draw_negatives(slates, negatives, rng)], axis=1),
    )


def _draw_negatives(slates: IndexedImpressions, limit: int, rng: np.random.Generator) -> Rows:
    """Item rows of at most ``limit`` non-clicked candidates of each slate, -1 where none is left.

    Every candidate draws a key, clicked ones the largest; the smallest keys win.
    """
    padded = slates.slates.pad()
    keys = np.full(padded.shape, 2.0)
    keys[padded >= 0] = np.where(slates.clicked, 2.0, rng.random(len(slates.clicked)))
    width = min(limit, padded.shape[1])
    order = np.argsort(keys, axis=1, kind="stable")[:, :width]
    drawn = np.take_along_axis(padded, order, axis=1)
    return np.where(np.take_along_axis(keys, order, axis=1) < 1.0, drawn, -1)


class HiddenStates:
    """Hidden states of texts at the input of one layer, computed once, kept in bfloat16.

    Attributes:
        layer: The layer whose input is kept.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        tokens: list[list[int]],
        *,
        layer: int,
        max_bytes: int,
        on_texts: Callable[[int], None],
    ) -> None:
        """Run the layers below ``layer`` over all texts.

        Args:
            encoder: In evaluation mode below ``layer``.
            tokens: Token ids of each text.
            layer: Layer whose input to keep.
            max_bytes: Most memory to use.
            on_texts: Told how many texts were done after each bucket.

        Raises:
            ConfigError: The states would need more than ``max_bytes``.
        """
        lengths = np.array([len(text) for text in tokens], dtype=np.int64)
        self.layer = layer
        self._encoder = encoder
        self._offsets = _offsets(lengths)
        needed = int(self._offsets[-1]) * encoder.dimension * torch.bfloat16.itemsize
        if needed > max_bytes:
            raise ConfigError.of(
                "max_cache_bytes",
                max_bytes,
                f"at least {needed} for these {len(tokens)} texts; raise it, lower max_tokens, "
                "or train on fewer days",
            )
        self._states = torch.empty(
            (int(self._offsets[-1]), encoder.dimension), dtype=torch.bfloat16
        )
        with torch.no_grad():
            for bucket in length_buckets(lengths):
                ids, mask = map(torch.from_numpy, pad_tokens([tokens[i] for i in bucket]))
                hidden = encoder.run_layers(encoder.embed(ids), mask, 0, layer)
                self._states[self._positions(bucket)] = hidden[mask].to(torch.bfloat16)
                on_texts(len(bucket))

    def encode(self, texts: Rows) -> Tensor:
        """Unit vectors ``[texts, dimension]``, with gradients where weights want them."""
        vectors: list[Tensor] = []
        order: list[Rows] = []
        for bucket in length_buckets(np.diff(self._offsets)[texts]):
            vectors.append(self._encode_bucket(texts[bucket]))
            order.append(bucket)
        inverse = np.argsort(np.concatenate(order))
        return torch.cat(vectors)[torch.from_numpy(inverse)]

    def _encode_bucket(self, texts: Rows) -> Tensor:
        mask = torch.from_numpy(token_mask(np.diff(self._offsets)[texts]))
        hidden = torch.zeros((*mask.shape, self._encoder.dimension))
        hidden[mask] = self._states[self._positions(texts)].float()
        upper = self._encoder.run_layers(hidden, mask, self.layer, len(self._encoder.layers))
        return self._encoder.pool(upper, mask)

    def _positions(self, texts: Rows) -> Tensor:
        kept = Ragged(np.arange(self._offsets[-1]), self._offsets).take(texts)
        return torch.from_numpy(kept.values)


def _offsets(lengths: Rows) -> Rows:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

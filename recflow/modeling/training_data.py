"""The tables of a training as arrays: what is used of the items, the clicks, the vocabularies."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from recflow.core.columns import Columns
from recflow.modeling.batching import IndexedImpressions, index_impressions, items_in_use, spread
from recflow.modeling.config import TrainingConfig
from recflow.modeling.sampling import BatchMaker, count_clicks
from recflow.modeling.texts import Rows, TextTokenizer
from recflow.modeling.user_model import ItemFeatures
from recflow.modeling.vocabulary import number_ids


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Everything a training reads, numbered.

    Attributes:
        train: Training impressions.
        validation: Validation impressions, at most as many as the configuration allows.
        samples: For each candidate of train, whether there is something to learn from it.
        tokens: Token ids of every item in use.
        features: What is known of every item beside its text.
        categories: Categories of train, in the order of their numbers.
        item_ids: Items of train, in the order of their numbers; empty where ids are off.
        user_ids: Users of train, in the order of their numbers; empty where ids are off.
        train_users: Number of each training impression's user.
        validation_users: Number of each validation impression's user.
        mean_rating: Mean rating of train; 0 where there are none.
        seen: Item rows of train.
    """

    train: IndexedImpressions
    validation: IndexedImpressions
    samples: NDArray[np.bool_]
    tokens: list[list[int]]
    features: ItemFeatures
    categories: list[str]
    item_ids: list[str]
    user_ids: list[str]
    train_users: Rows
    validation_users: Rows
    mean_rating: float
    seen: Rows

    def batches(self, config: TrainingConfig, rank: int, processes: int) -> BatchMaker:
        """What makes the batches of one process."""
        clicks = np.bincount(
            self.train.slates.values[self.samples], minlength=len(self.tokens)
        ).astype(np.float64)
        return BatchMaker(
            data=self.train,
            samples=self.samples,
            users=self.train_users,
            mean_rating=self.mean_rating,
            click_shares=np.maximum(clicks, 1) / max(clicks.sum(), 1),
            text_lengths=np.array([len(text) for text in self.tokens], dtype=np.int64),
            objective=config.objective,
            speed=config.speed,
            rank=rank,
            processes=processes,
        )

    def clicks_per_epoch(self, config: TrainingConfig) -> int:
        """Expected click samples of an epoch."""
        return count_clicks(
            self.train,
            self.samples,
            clicks_per_impression=config.objective.clicks_per_impression,
            max_impressions=config.schedule.max_impressions_per_epoch,
        )

    def digest(self) -> str:
        """SHA-256 of all that is read: the same data gives the same steps."""
        sha = hashlib.sha256()
        for split in (self.train, self.validation):
            for array in (split.histories.values, split.histories.offsets, split.slates.values,
                          split.slates.offsets, split.clicked, split.ratings):  # fmt: skip
                sha.update(np.ascontiguousarray(array).tobytes())
        for text in self.tokens:
            sha.update(np.array([len(text), *text], dtype=np.int64).tobytes())
        for array in (self.features.categories, self.features.ids):
            sha.update(array.numpy().tobytes())
        sha.update(self.train_users.tobytes() + self.validation_users.tobytes())
        return sha.hexdigest()


def prepare_data(
    *,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    tokenizer_path: Path,
    config: TrainingConfig,
) -> TrainingData:
    """Number items, users and categories, cut histories, and tokenise the texts in use.

    Vocabularies come from train alone.

    Raises:
        ContractError: An impression names an unknown item, or a split has nothing to learn from
            or to compare.
    """
    user, rating = config.user_model, config.objective.loss == "mean_squared_error"
    kept = spread(len(validation), config.schedule.max_validation_impressions)
    used = items_in_use(items, [train, validation], user.history_length)
    train_rows = index_impressions(train, used, user.history_length)
    validation = validation[kept]
    validation_rows = index_impressions(validation, used, user.history_length)
    for split, rows in (("training", train_rows), ("validation", validation_rows)):
        if rating:
            rows.require_ratings(split)
        else:
            rows.require_contrasts(split)
    seen = train_rows.distinct_items
    categories = used.categories_of(seen) if user.categories else []
    item_ids = [used.ids[row] for row in seen] if user.item_ids else []
    user_ids = train[Columns.USER_ID].unique().sort().to_list() if user.user_ids else []
    return TrainingData(
        train=train_rows,
        validation=validation_rows,
        samples=train_rows.rated if rating else train_rows.contrasting_clicks,
        tokens=TextTokenizer(tokenizer_path, config.max_tokens)(used.texts),
        features=ItemFeatures(
            categories=torch.from_numpy(used.category_numbers(categories)),
            ids=torch.from_numpy(used.numbers(item_ids)),
        ),
        categories=categories,
        item_ids=item_ids,
        user_ids=user_ids,
        train_users=number_ids(train[Columns.USER_ID], user_ids),
        validation_users=number_ids(validation[Columns.USER_ID], user_ids),
        mean_rating=float(train_rows.ratings[train_rows.rated].mean()) if rating else 0.0,
        seen=seen,
    )

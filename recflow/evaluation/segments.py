"""Groups of test impressions that a mean over all of them hides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import polars as pl

from recflow.core.columns import Columns
from recflow.evaluation.slates import (
    BoolArray,
    ItemIndex,
    clicked_lists,
    flatten,
    offsets_of,
    rows_of,
)

LARGEST_CATEGORIES = 8


@dataclass(frozen=True, slots=True)
class Segment:
    """A group of test impressions.

    Attributes:
        name: Name in the JSON, e.g. ``cold_users`` or ``category:sports``.
        label: Name for people.
        members: Which impressions belong to it, bool [impressions].
    """

    name: str
    label: str
    members: BoolArray


def segments_of(items: pl.DataFrame, train: pl.DataFrame, test: pl.DataFrame) -> list[Segment]:
    """Cut the test split by user, by novelty and by category.

    * cold and warm users: the history is empty, or not;
    * new and known items: a clicked item was never shown in train, or all were;
    * the categories with most impressions in which an item of theirs was clicked, at most
      :data:`LARGEST_CATEGORIES`, names breaking ties. An impression with several clicks can
      belong to several; unknown categories are left out.

    Segments without an impression are left out. Impressions without a click belong to neither of
    the item segments and to no category.
    """
    cold = test[Columns.HISTORY].list.len().to_numpy() == 0
    clicks = clicked_lists(test)
    rows, clicked = rows_of(offsets_of(clicks)), flatten(clicks)
    shown = ItemIndex(flatten(train[Columns.CANDIDATES]).unique().sort())
    has_click = clicks.list.len().to_numpy() > 0
    new = np.zeros(test.height, dtype=np.bool_)
    new[rows[shown.codes(clicked) < 0]] = True
    segments = [
        Segment("cold_users", "cold users", cold),
        Segment("warm_users", "warm users", ~cold),
        Segment("new_items", "new items", new),
        Segment("known_items", "known items", has_click & ~new),
    ]
    pairs = (
        pl.DataFrame({"row": rows, Columns.ITEM_ID: clicked})
        .join(items.select(Columns.ITEM_ID, Columns.CATEGORY), on=Columns.ITEM_ID)
        .filter(pl.col(Columns.CATEGORY) != "")
        .select("row", Columns.CATEGORY)
        .unique()
    )
    largest = (
        pairs.group_by(Columns.CATEGORY)
        .len()
        .sort(["len", Columns.CATEGORY], descending=[True, False])
        .head(LARGEST_CATEGORIES)
    )
    for category in cast("list[str]", largest[Columns.CATEGORY].to_list()):
        members = np.zeros(test.height, dtype=np.bool_)
        members[pairs.filter(pl.col(Columns.CATEGORY) == category)["row"].to_numpy()] = True
        segments.append(Segment(f"category:{category}", category, members))
    return [segment for segment in segments if segment.members.any()]

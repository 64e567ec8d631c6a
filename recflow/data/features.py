"""Features that need nothing but the row itself; nothing here is fitted."""

from __future__ import annotations

import polars as pl

from recflow.core.columns import (
    IMPRESSION_FEATURES,
    IMPRESSIONS,
    ITEM_FEATURES,
    ITEMS,
    Columns,
)
from recflow.data.text import compose_text, count_words, normalise_text

_ROW = "_row"
_ID = "_id"


def item_features(items: pl.DataFrame) -> pl.DataFrame:
    """Describe items as the encoder reads them.

    Args:
        items: Cleaned items (contract ``ITEMS``).

    Returns:
        One row an item, in the order given (contract ``ITEM_FEATURES``).

    Raises:
        ContractError: ``items`` does not have the columns and types of its contract.
    """
    ITEMS.check_schema(items.schema)
    title = pl.col(Columns.TITLE)
    return (
        items.lazy()
        .with_columns(
            compose_text(title, pl.col(Columns.BODY)).alias(Columns.TEXT),
            pl.col(Columns.CATEGORY, Columns.SUBCATEGORY).fill_null(""),
            count_words(normalise_text(title)).alias(Columns.TITLE_WORDS),
        )
        .with_columns(pl.col(Columns.TEXT).str.len_chars().alias(Columns.TEXT_CHARACTERS))
        .pipe(ITEM_FEATURES.conform)
        .collect()
    )


def impression_features(impressions: pl.DataFrame) -> pl.DataFrame:
    """Describe impressions by what the row alone says.

    Args:
        impressions: Cleaned impressions (contract ``IMPRESSIONS``).

    Returns:
        One row an impression, in the order given (contract ``IMPRESSION_FEATURES``).

    Raises:
        ContractError: ``impressions`` does not have the columns and types of its contract.
    """
    IMPRESSIONS.check_schema(impressions.schema)
    time, labels = pl.col(Columns.TIME), pl.col(Columns.LABELS)
    return (
        impressions.with_columns(_labels(impressions))
        .lazy()
        .with_columns(
            time.dt.hour().alias(Columns.HOUR),
            time.dt.weekday().alias(Columns.WEEKDAY),
            labels.list.len().alias(Columns.CANDIDATE_COUNT),
            labels.list.sum().alias(Columns.CLICK_COUNT),
            pl.col(Columns.HISTORY).list.len().alias(Columns.HISTORY_LENGTH),
            labels.list.mean().alias(Columns.CLICK_RATE),
        )
        .pipe(IMPRESSION_FEATURES.conform)
        .collect()
    )


def _labels(impressions: pl.DataFrame) -> pl.Series:
    """For each impression a list of Int8: 1 where the candidate was clicked, else 0."""
    rows = impressions.lazy().with_row_index(_ROW)
    shown = rows.select(_ROW, pl.col(Columns.CANDIDATES).alias(_ID)).explode(_ID)
    clicked = (
        rows.select(_ROW, pl.col(Columns.CLICKED).alias(_ID))
        .explode(_ID, empty_as_null=False)
        .unique()
        .with_columns(pl.lit(1, pl.Int8).alias(Columns.LABELS))
    )
    return (
        shown.join(clicked, on=[_ROW, _ID], how="left", maintain_order="left")
        .group_by(_ROW, maintain_order=True)
        .agg(pl.col(Columns.LABELS).fill_null(0))
        .collect()
        .get_column(Columns.LABELS)
    )

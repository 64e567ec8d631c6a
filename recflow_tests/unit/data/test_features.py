from __future__ import annotations

import polars as pl
import pytest

from recflow.core.columns import IMPRESSION_FEATURES, IMPRESSIONS, ITEM_FEATURES, ITEMS
from recflow.core.errors import ContractError
from recflow.data.features import impression_features, item_features
from recflow_tests.unit.data.tables import at, raw_impressions, raw_items


def test_an_item_becomes_a_text() -> None:
    items = raw_items({"title": "Three short words", "body": "And more", "category": "sport"})
    [row] = item_features(items).to_dicts()
    assert row["text"] == "Three short words. And more"
    assert row["text_characters"] == 27
    assert row["title_words"] == 3
    assert (row["category"], row["subcategory"]) == ("sport", "")


def test_an_impression_is_described_by_its_own_row() -> None:
    [row] = impression_features(
        raw_impressions(
            {
                "time": at(24 * 6 + 13.5),  # the Sunday after, half past one
                "history": ["x", "y"],
                "candidates": ["a", "b", "c", "d"],
                "clicked": ["d", "b"],
                "rating": [1.0, 4.0, 2.0, 5.0],
            }
        )
    ).to_dicts()
    assert row["labels"] == [0, 1, 0, 1]
    assert row["rating"] == [1.0, 4.0, 2.0, 5.0]
    assert (row["hour"], row["weekday"]) == (13, 7)
    assert (row["candidate_count"], row["click_count"], row["history_length"]) == (4, 2, 2)
    assert row["click_rate"] == 0.5


def test_a_slate_without_a_click_has_no_label() -> None:
    [row] = impression_features(raw_impressions({"clicked": []})).to_dicts()
    assert row["labels"] == [0, 0]
    assert (row["click_count"], row["click_rate"]) == (0, 0.0)


def test_a_click_written_twice_is_one_label() -> None:
    assert impression_features(raw_impressions({"clicked": ["b", "b"]}))["labels"].to_list() == [
        [0, 1]
    ]


def test_rows_keep_their_order_and_the_input_is_not_touched() -> None:
    impressions = raw_impressions(
        {"clicked": ["b"]}, {"clicked": []}, {"candidates": ["c"], "clicked": ["c"]}, {}
    )
    before = impressions.clone()
    features = impression_features(impressions)
    assert impressions.equals(before)
    assert features["impression_id"].to_list() == ["i1", "i2", "i3", "i4"]
    assert features["labels"].to_list() == [[0, 1], [0, 0], [1], [1, 0]]


def test_empty_tables_stay_tables() -> None:
    ITEM_FEATURES.check_schema(item_features(ITEMS.empty()).schema)
    IMPRESSION_FEATURES.check_schema(impression_features(IMPRESSIONS.empty()).schema)


def test_a_table_of_another_contract_is_refused() -> None:
    with pytest.raises(ContractError, match="items"):
        item_features(raw_impressions({}))
    with pytest.raises(ContractError, match=r"impressions\.time"):
        impression_features(raw_impressions({}).with_columns(pl.col("time").cast(pl.Date)))

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recflow.core.columns import Columns
from recflow.core.errors import ContractError
from recflow.modeling.batching import ItemIndex, Ragged, index_impressions, items_in_use, spread
from recflow.modeling.texts import length_buckets

LISTS = st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=8)


def _ragged(lists: list[list[int]]) -> Ragged:
    lengths = [len(row) for row in lists]
    values = np.array([value for row in lists for value in row], dtype=np.int64)
    return Ragged(values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


@given(LISTS, st.data())
def test_ragged_lists_come_back(lists: list[list[int]], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=6))
    taken = _ragged(lists).take(np.array(chosen, dtype=np.int64))
    for row, place in zip(taken.pad(), chosen, strict=True):
        assert row[row >= 0].tolist() == lists[place]
        assert (row[: len(lists[place])] >= 0).all()
    for row, place in zip(taken.pad(right_aligned=True), chosen, strict=True):
        assert row[len(row) - len(lists[place]) :].tolist() == lists[place]


def test_the_newest_clicks_are_kept(table: pl.DataFrame, impressions: pl.DataFrame) -> None:
    data = index_impressions(impressions, ItemIndex(table), history_length=2)
    assert data.histories.pad(right_aligned=True).tolist() == [[1, 2], [-1, -1], [-1, 3], [-1, 0]]
    assert data.contrasts.tolist() == [True, True, False, False]


def test_unknown_and_repeated_items_are_named(table: pl.DataFrame) -> None:
    with pytest.raises(ContractError, match="'nobody'"):
        ItemIndex(table).rows(pl.Series(["a", "nobody"]))
    with pytest.raises(ContractError, match="'a' occurs twice"):
        ItemIndex(pl.concat([table, table.head(1)]))


def test_labels_of_another_length_are_refused(
    table: pl.DataFrame, impressions: pl.DataFrame
) -> None:
    cut = impressions.with_columns(pl.col(Columns.LABELS).list.head(1))
    with pytest.raises(ContractError, match="differ in length"):
        index_impressions(cut, ItemIndex(table), history_length=2)


def test_categories_are_numbered_from_one(table: pl.DataFrame) -> None:
    index = ItemIndex(table)
    known = index.categories_of(np.array([0, 1, 2]))
    assert known == ["x", "y"]
    assert index.category_numbers(known).tolist() == [1, 0, 2, 1, 0]


def test_only_items_in_use_are_indexed(table: pl.DataFrame, impressions: pl.DataFrame) -> None:
    assert items_in_use(table, [impressions.head(2)], 1).ids == ["a", "b", "c", "d"]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=50))
def test_buckets_hold_every_text_once_in_order_of_length(lengths: list[int]) -> None:
    array = np.array(lengths, dtype=np.int64)
    places = np.concatenate(list(length_buckets(array, size=7)))
    assert sorted(places.tolist()) == list(range(len(lengths)))
    assert (np.diff(array[places]) >= 0).all()


def test_ratings_stand_beside_their_candidates(
    table: pl.DataFrame, impressions: pl.DataFrame
) -> None:
    rated = impressions.with_columns(
        pl.Series(Columns.RATING, [[1.0, 2.0, 3.0, None], None, [5.0], None], pl.List(pl.Float32))
    )
    data = index_impressions(rated, ItemIndex(table), history_length=2)
    nan = float("nan")
    np.testing.assert_array_equal(data.ratings, [1, 2, 3, nan, nan, nan, 5, nan, nan, nan])
    np.testing.assert_array_equal(data.take(np.array([2, 1])).ratings, [5, nan, nan])
    assert data.rated.tolist() == [True, True, True, False, False, False, True] + 3 * [False]


def test_impressions_are_spread_evenly_over_time() -> None:
    assert spread(9, 3).tolist() == [0, 4, 8]
    assert spread(2, 5).tolist() == [0, 1]

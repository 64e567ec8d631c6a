import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recflow.core.columns import Columns
from recflow.core.errors import ContractError
from recflow.core.seeding import make_rng
from recflow.modeling.batching import (
    HiddenStates,
    ItemIndex,
    Ragged,
    click_batch,
    count_clicks,
    draw_clicks,
    index_impressions,
    items_in_use,
)
from recflow.modeling.encoder import TorchRuntime, load_pretrained
from recflow.modeling.texts import TextTokenizer, encode_texts, length_buckets

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


@pytest.fixture(scope="module")
def table() -> pl.DataFrame:
    return pl.DataFrame(
        {
            Columns.ITEM_ID: ["a", "b", "c", "d", "e"],
            Columns.TEXT: ["sea0", "war1 the", "pop2", "tax3 new", "sun4"],
            Columns.CATEGORY: ["x", "", "y", "x", "z"],
        }
    )


@pytest.fixture(scope="module")
def impressions() -> pl.DataFrame:
    return pl.DataFrame(
        {
            Columns.HISTORY: [["a", "b", "c"], [], ["d"], ["a"]],
            Columns.CANDIDATES: [["a", "b", "c", "d"], ["b", "c"], ["e"], ["a", "e", "b"]],
            Columns.LABELS: [[0, 1, 0, 1], [0, 1], [1], [0, 0, 0]],
        },
        schema={
            Columns.HISTORY: pl.List(pl.String),
            Columns.CANDIDATES: pl.List(pl.String),
            Columns.LABELS: pl.List(pl.Int8),
        },
    )


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


def test_clicks_meet_only_non_clicks_of_their_slate(
    table: pl.DataFrame, impressions: pl.DataFrame
) -> None:
    data = index_impressions(impressions, ItemIndex(table), history_length=2)
    rng = make_rng(0, "test")
    drawn = draw_clicks(data, clicks_per_impression=4, max_impressions=10, rng=rng)
    assert sorted(map(tuple, drawn.tolist())) == [(0, 1), (0, 3), (1, 5)]
    batch = click_batch(data, drawn, negatives=3, rng=rng)
    others = {0: {0, 2}, 1: {1}}
    for impression, candidates in zip(batch.impressions, batch.candidates, strict=True):
        present = candidates[candidates >= 0].tolist()
        assert set(present[1:]) == others[int(impression)]
        assert len(present) == len(set(present))


def test_limits_of_an_epoch_hold(table: pl.DataFrame, impressions: pl.DataFrame) -> None:
    data = index_impressions(impressions, ItemIndex(table), history_length=2)
    for clicks, most, expected in ((1, 10, 2), (4, 10, 3), (1, 1, 1)):
        drawn = draw_clicks(
            data, clicks_per_impression=clicks, max_impressions=most, rng=make_rng(3, "x")
        )
        assert len(drawn) == expected
        assert count_clicks(data, clicks_per_impression=clicks, max_impressions=most) == expected


def test_negatives_are_drawn_evenly(table: pl.DataFrame) -> None:
    wide = pl.DataFrame(
        {
            Columns.HISTORY: [["a"]],
            Columns.CANDIDATES: [["a", "b", "c", "d", "e"]],
            Columns.LABELS: [[1, 0, 0, 0, 0]],
        }
    )
    data = index_impressions(wide, ItemIndex(table), history_length=1)
    rng = make_rng(0, "even")
    clicks = np.repeat([[0, 0]], 4_000, axis=0)
    drawn = click_batch(data, clicks, negatives=1, rng=rng).candidates[:, 1]
    shares = np.bincount(drawn, minlength=5) / len(drawn)
    assert shares[0] == 0
    np.testing.assert_allclose(shares[1:], 0.25, atol=0.03)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=50))
def test_buckets_hold_every_text_once_in_order_of_length(lengths: list[int]) -> None:
    array = np.array(lengths, dtype=np.int64)
    places = np.concatenate(list(length_buckets(array, size=7)))
    assert sorted(places.tolist()) == list(range(len(lengths)))
    assert (np.diff(array[places]) >= 0).all()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_kept_hidden_states_give_the_encoder_s_vectors(base_model, items, layer: int) -> None:
    encoder = load_pretrained(base_model)
    tokenizer = TextTokenizer(base_model / "tokenizer.json", 16)
    texts = items[Columns.TEXT].to_list()
    done: list[int] = []
    hidden = HiddenStates(
        encoder, tokenizer(texts), layer=layer, max_bytes=10**8, on_texts=done.append
    )
    rows = np.array([5, 0, 17, 5])
    expected = encode_texts(TorchRuntime(encoder, 1, mixed=False), tokenizer, texts)[rows]
    # bfloat16 keeps eight bits of each hidden value
    torch.testing.assert_close(
        hidden.encode(rows).detach(), torch.from_numpy(expected), atol=2e-2, rtol=0
    )
    assert sum(done) == len(texts)

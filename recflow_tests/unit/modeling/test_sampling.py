import threading
import time
from collections.abc import Iterator

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recflow.core.columns import Columns
from recflow.core.seeding import make_rng
from recflow.modeling.batching import IndexedImpressions, ItemIndex, index_impressions
from recflow.modeling.config import ObjectiveConfig, SpeedConfig
from recflow.modeling.sampling import (
    BatchMaker,
    StepBatch,
    click_batch,
    count_clicks,
    deal,
    draw_clicks,
    overlapping,
    prefetched,
)

IDS = ["a", "b", "c", "d", "e"]


@pytest.fixture(scope="module")
def data(table: pl.DataFrame, impressions: pl.DataFrame) -> IndexedImpressions:
    return index_impressions(impressions, ItemIndex(table), history_length=2)


def test_clicks_meet_only_non_clicks_of_their_slate(
    table: pl.DataFrame, impressions: pl.DataFrame
) -> None:
    data = index_impressions(impressions, ItemIndex(table), history_length=2)
    rng = make_rng(0, "test")
    drawn = draw_clicks(
        data, data.contrasting_clicks, clicks_per_impression=4, max_impressions=10, rng=rng
    )
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
        limits = {"clicks_per_impression": clicks, "max_impressions": most}
        drawn = draw_clicks(data, data.contrasting_clicks, **limits, rng=make_rng(3, "x"))
        assert len(drawn) == expected
        assert count_clicks(data, data.contrasting_clicks, **limits) == expected


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


def maker(data: IndexedImpressions, rank: int = 0, processes: int = 1, **changes) -> BatchMaker:
    options = {"objective": ObjectiveConfig(negatives=3), "speed": SpeedConfig(), **changes}
    return BatchMaker(
        data=data,
        samples=data.contrasting_clicks,
        users=np.arange(len(data)) + 1,
        mean_rating=0.0,
        click_shares=np.array([0.1, 0.2, 0.3, 0.2, 0.2]),
        text_lengths=np.array([3, 4, 3, 4, 3]),
        rank=rank,
        processes=processes,
        **options,
    )


def items_of(batch: StepBatch) -> list[tuple[set[str], set[str]]]:
    """History and candidates of each click by name, which no numbering can hide."""

    def names(places) -> set[str]:
        return {IDS[batch.rows[place]] for place in places.tolist() if place >= 0}

    return [(names(h), names(c)) for h, c in zip(batch.history, batch.candidates, strict=True)]


CLICKS = np.array([[0, 1], [0, 3], [1, 5]])
EXPECTED = [({"b", "c"}, {"b", "a", "c"}), ({"b", "c"}, {"d", "a", "c"}), (set(), {"c", "b"})]


@pytest.mark.parametrize("distinct", [True, False])
def test_a_step_scores_the_clicks_it_was_given(data: IndexedImpressions, distinct: bool) -> None:
    speed = SpeedConfig(distinct_items=distinct, max_texts_per_step=0)
    (batch,) = maker(data, speed=speed).step(CLICKS, encoder_learns=True, rng=make_rng(0, "s"))
    assert items_of(batch) == EXPECTED
    assert batch.present.sum(1).tolist() == [3, 3, 2]
    assert batch.present[:, 0].all()
    assert batch.weight == pytest.approx(1 / 3)
    assert batch.users.tolist() == [1, 1, 2]
    # four distinct items; every occurrence is 2 + 2 clicks and 3 + 3 + 2 candidates
    assert len(batch.rows) == (4 if distinct else 12)
    assert sorted(batch.encoded.tolist()) == list(range(len(batch.rows)))


def test_processes_share_clicks_and_texts(data: IndexedImpressions) -> None:
    parts = [
        maker(data, rank, 2).step(CLICKS, encoder_learns=True, rng=make_rng(0, "s"))[0]
        for rank in (0, 1)
    ]
    assert items_of(parts[0]) + items_of(parts[1]) == [EXPECTED[0], EXPECTED[2], EXPECTED[1]]
    assert parts[0].encoded.tolist() == parts[1].encoded.tolist()
    assert len(parts[0].own) == len(parts[1].own)
    assert {*parts[0].own, *parts[1].own} == set(parts[0].rows)


def test_a_process_without_a_click_still_takes_part(data: IndexedImpressions) -> None:
    batch = maker(data, rank=2, processes=3).step(
        CLICKS[:2], encoder_learns=True, rng=make_rng(0, "s")
    )[0]
    assert batch.weight == 0
    assert len(batch.history) == 1
    assert len(batch.own) == 2  # four distinct items, dealt to three


def test_parts_of_a_step_hold_each_click_once(data: IndexedImpressions) -> None:
    speed = SpeedConfig(micro_batches=2)
    parts = maker(data, speed=speed).step(CLICKS, encoder_learns=False, rng=make_rng(0, "s"))
    assert [len(part.history) for part in parts] == [2, 1]
    assert sum(part.weight * len(part.history) for part in parts) == pytest.approx(1)
    assert all(len(part.encoded) == len(part.own) == 0 for part in parts)


def test_candidates_are_encoded_before_clicks(data: IndexedImpressions) -> None:
    speed = SpeedConfig(max_texts_per_step=2)
    (batch,) = maker(data, speed=speed).step(
        np.array([[1, 5]]), encoder_learns=True, rng=make_rng(0, "s")
    )
    assert {IDS[row] for row in batch.own} == {"b", "c"}


def test_a_shared_slate_holds_every_click_and_no_click_as_negative(
    data: IndexedImpressions,
) -> None:
    objective = ObjectiveConfig(loss="contrastive")
    (batch,) = maker(data, objective=objective).step(
        CLICKS, encoder_learns=True, rng=make_rng(0, "s")
    )
    slate = [IDS[batch.rows[place]] for place in batch.candidates[0].tolist()]
    assert slate == ["b", "c", "d"]
    assert [slate[column] for column in batch.target.tolist()] == ["b", "d", "c"]
    # the first impression clicked b and d, so neither is a negative of the other
    assert batch.present.tolist() == [[True, True, False], [False, True, True], [True] * 3]
    assert batch.log_frequency is not None
    np.testing.assert_allclose(batch.log_frequency.exp(), [0.2, 0.3, 0.2], rtol=1e-6)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 5))
def test_texts_are_dealt_evenly(lengths: list[int], processes: int) -> None:
    dealt = deal(np.arange(len(lengths)), np.array(lengths), processes)
    shares = np.split(dealt, processes)
    assert {len(share) for share in shares} == {-(-len(lengths) // processes)}
    assert set(dealt.tolist()) == set(range(len(lengths)))
    tokens = [sum(lengths[place] for place in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths)


@given(st.integers(1, 60), st.integers(1, 16))
def test_overlapping_batches_hold_every_click_once(clicks: int, batch_size: int) -> None:
    drawn = np.stack([np.arange(clicks) // 2, np.arange(clicks)], axis=1)
    ordered = overlapping(drawn[::-1], batch_size, make_rng(0, "o"))
    assert sorted(map(tuple, ordered.tolist())) == sorted(map(tuple, drawn.tolist()))


def test_overlapping_batches_are_close_in_time() -> None:
    drawn = make_rng(0, "p").permutation(np.stack([np.arange(512)] * 2, axis=1))
    ordered = overlapping(drawn, 64, make_rng(0, "o"))
    neighbours = np.abs(np.diff(ordered[:, 0])) == 1
    assert neighbours.mean() > 0.9
    assert neighbours.mean() < 1


def test_work_comes_in_order_and_ahead_of_its_time() -> None:
    made: list[int] = []

    def make(number: int) -> int:
        made.append(number)
        return number * number

    results = prefetched(make, range(2, 7), ahead=2)
    assert next(results) == 4
    for _ in range(100):
        if len(made) == 3:
            break
        time.sleep(0.01)
    assert made == [2, 3, 4]
    assert list(results) == [9, 16, 25, 36]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_what_fails_in_the_background_is_raised_in_its_place(ahead: int) -> None:
    def make(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    results: Iterator[int] = prefetched(make, range(5), ahead)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]

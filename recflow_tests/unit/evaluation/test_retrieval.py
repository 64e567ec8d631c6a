import itertools
from datetime import timedelta
from math import log2

import numpy as np
import polars as pl
import pytest

from recflow.evaluation.retrieval import (
    RANKS_SCHEMA,
    Catalogue,
    ItemPopularity,
    coverage,
    hit_rate,
    novelty,
    popularity_bias,
    recall,
)
from recflow_tests.unit.evaluation.support import START, impressions_of, items_of

ITEMS = items_of(dict.fromkeys("abcdef", "x"), published={"f": START + timedelta(days=1)})


def ranks_of(above: list[list[int]], tied: list[list[int]], top: list[list[str]] | None = None):
    rows = {
        "row": range(len(above)),
        "impression_id": [str(n) for n in range(len(above))],
        "above": above,
        "tied": tied,
        "top": top or [["a"]] * len(above),
    }
    return pl.DataFrame(rows, schema=RANKS_SCHEMA)


def rank(scores: list[float], **impression: object) -> dict[str, object]:
    impressions = impressions_of([{"candidates": ["a", "b"], **impression}]).with_row_index("row")
    matrix = np.array([scores], dtype=np.float32)
    return Catalogue(ITEMS).rank(matrix, impressions, seed=0).row(0, named=True)


def test_ranks_by_hand() -> None:
    ranks = rank([0.1, 0.4, 0.9, 0.4, 0.2, 0.0], clicked=["b"])
    assert (ranks["above"], ranks["tied"]) == ([1], [2])  # c above; b and d tied
    assert ranks["top"][0] == "c"
    assert set(ranks["top"][1:3]) == {"b", "d"}
    assert ranks["top"][3:] == ["e", "a"]


def test_items_read_before_or_not_yet_published_are_no_competitors() -> None:
    ranks = rank([0.1, 0.2, 0.9, 0.8, 0.7, 1.0], clicked=["b"], history=["c", "zz"])
    assert ranks["above"] == [2]  # d and e; c was read, f comes out tomorrow
    assert "c" not in ranks["top"]
    assert "f" not in ranks["top"]


def test_a_clicked_item_always_stays_in() -> None:
    ranks = rank([0.1, 0.2, 0.9, 0.8, 0.7, 1.0], clicked=["b"], history=["b"])
    assert (ranks["above"], ranks["tied"]) == ([3], [1])


@pytest.mark.parametrize("cutoff", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("clicked", [["b"], ["b", "d"], ["a", "b", "d"]])
def test_recall_and_hit_rate_are_expectations_over_tied_orders(
    cutoff: int, clicked: list[str]
) -> None:
    scores = {"a": 0.1, "b": 0.4, "c": 0.9, "d": 0.4, "e": 0.4}
    ranks = rank([*scores.values(), 0.0], candidates=["a", "b", "d"], clicked=clicked)
    orders = [
        sorted(order, key=lambda item: -scores[item])  # stable: ties stay as permuted
        for order in itertools.permutations(scores)
    ]
    shown = [len(set(order[:cutoff]) & set(clicked)) for order in orders]
    frame = pl.DataFrame([ranks], schema=RANKS_SCHEMA)
    assert recall(frame, cutoff)[0] == pytest.approx(np.mean(shown) / len(clicked))
    assert hit_rate(frame, cutoff)[0] == pytest.approx(np.mean([n > 0 for n in shown]))


def test_recall_and_hit_rate_of_several_rows() -> None:
    ranks = ranks_of([[0], [9, 20], [10]], [[1], [1, 1], [1]])
    np.testing.assert_allclose(recall(ranks, 10), [1.0, 0.5, 0.0])
    np.testing.assert_allclose(hit_rate(ranks, 10), [1.0, 1.0, 0.0])


def test_ties_in_the_first_ten_are_broken_evenly_and_by_the_seed() -> None:
    items = items_of({f"n{number:02d}": "x" for number in range(30)})
    rows = [{"candidates": ["n00", "n01"], "clicked": ["n00"]} for _ in range(600)]
    impressions = impressions_of(rows).with_row_index("row")
    scores = np.zeros((600, 30), dtype=np.float32)
    catalogue = Catalogue(items)
    ranks = catalogue.rank(scores, impressions, seed=1)
    shown = ranks["top"].explode().value_counts()["count"]
    assert shown.min() > 140  # expected 200, standard deviation 11.5
    assert shown.max() < 260
    assert ranks.equals(catalogue.rank(scores, impressions, seed=1))
    assert not ranks.equals(catalogue.rank(scores, impressions, seed=2))
    part = impressions[100:200]
    assert catalogue.rank(scores[:100], part, seed=1).equals(ranks[100:200])


def test_beyond_accuracy_by_hand() -> None:
    items = items_of({"a": "x", "b": "x", "c": "x", "d": "x"})
    train = impressions_of(
        [{"candidates": ["a", "b"], "clicked": ["a"]}] * 3
        + [{"candidates": ["a", "b"], "clicked": ["b"]}]
    )
    popularity = ItemPopularity.of(train, Catalogue(items).index)
    # Clicks 3, 1, 0, 0, plus one each, of 8: shares 1/2, 1/4, 1/8, 1/8.
    np.testing.assert_allclose(popularity.self_information, [1, 2, 3, 3])
    # Mid-ranks among 4 items: c and d share the places 1 and 2.
    np.testing.assert_allclose(popularity.percentile, [3.5 / 4, 2.5 / 4, 1 / 4, 1 / 4])
    ranks = ranks_of([[0], [0]], [[1], [1]], top=[["a", "b"], ["a", "c"]])
    np.testing.assert_allclose(novelty(ranks, popularity), [1.5, 2.0])
    test = impressions_of(
        [{"candidates": ["a", "b"], "clicked": ["b"]}, {"candidates": ["a", "d"], "clicked": ["d"]}]
    )
    np.testing.assert_allclose(
        popularity_bias(ranks, test, popularity), [3 / 4 - 2.5 / 4, 2.25 / 4 - 1 / 4]
    )
    assert coverage(ranks, 4) == 3 / 4


def test_novelty_of_an_unclicked_item_is_finite() -> None:
    items = items_of({"a": "x", "b": "x"})
    popularity = ItemPopularity.of(impressions_of([]), Catalogue(items).index)
    np.testing.assert_allclose(popularity.self_information, log2(2))

import itertools
from math import log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score, roc_auc_score

from recflow.evaluation import slates
from recflow.evaluation.metrics import METRICS, RANKING_METRICS, ranking_metrics


def of_one(scores: list[float], labels: list[int]) -> dict[str, float]:
    offsets = np.array([0, len(scores)])
    values = ranking_metrics(np.array(scores, dtype=float), np.array(labels), offsets)
    return {name: float(value[0]) for name, value in values.items()}


def ragged(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(rows), np.cumsum([0, *map(len, rows)])


# The official MIND script, written down again: order by descending score, then sum.


def mind_dcg(labels: np.ndarray, order: np.ndarray, k: int) -> float:
    taken = labels[order[:k]]
    return float(sum((2**y - 1) / log2(rank + 2) for rank, y in enumerate(taken)))


def mind(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    order, best = np.argsort(scores)[::-1], np.argsort(labels)[::-1]
    pairs = scores[labels == 1][:, None] > scores[labels == 0]
    reciprocal = sum(y / (rank + 1) for rank, y in enumerate(labels[order]))
    return {
        "auc": float(pairs.mean()),
        "mrr": float(reciprocal / labels.sum()),
        "ndcg@5": mind_dcg(labels, order, 5) / mind_dcg(labels, best, 5),
        "ndcg@10": mind_dcg(labels, order, 10) / mind_dcg(labels, best, 10),
    }


def test_by_hand() -> None:
    # Ranks of the clicked: 2 and 4. Of the 4 pairs only (0.8, 0.7) is in the right order.
    values = of_one([0.9, 0.8, 0.7, 0.6], [0, 1, 0, 1])
    gain = (1 / log2(3) + 1 / log2(5)) / (1 / log2(2) + 1 / log2(3))
    assert values == pytest.approx(
        {"auc": 1 / 4, "mrr": (1 / 2 + 1 / 4) / 2, "ndcg@5": gain, "ndcg@10": gain}
    )


def test_cutoffs_by_hand() -> None:
    # One click at rank 6 of 12: beyond 5, within 10.
    scores, labels = list(range(12, 0, -1)), [0] * 12
    labels[5] = 1
    values = of_one(scores, labels)
    assert values["ndcg@5"] == 0
    assert values["ndcg@10"] == pytest.approx(1 / log2(7))
    assert values["auc"] == pytest.approx(6 / 11)


def test_agrees_with_the_official_definitions() -> None:
    rng = np.random.default_rng(1)
    scores, labels = [], []
    for _ in range(500):
        length = int(rng.integers(2, 40))
        clicked = np.zeros(length, dtype=np.int8)
        clicked[rng.choice(length, size=rng.integers(1, length), replace=False)] = 1
        scores.append(rng.normal(size=length))
        labels.append(clicked)
    flat, offsets = ragged(scores)
    values = ranking_metrics(flat, np.concatenate(labels), offsets)
    for row, (own, clicked) in enumerate(zip(scores, labels, strict=True)):
        for name, expected in mind(own, clicked).items():
            assert values[name][row] == pytest.approx(expected, abs=1e-9)
        assert values["auc"][row] == pytest.approx(roc_auc_score(clicked, own), abs=1e-9)


@pytest.mark.parametrize("seed", range(40))
def test_ties_are_the_expectation_over_all_orders(seed: int) -> None:
    rng = np.random.default_rng(seed)
    length = int(rng.integers(2, 7))
    scores = rng.integers(0, 3, size=length).astype(float)
    labels = np.zeros(length, dtype=int)
    labels[rng.choice(length, size=rng.integers(1, length), replace=False)] = 1
    # Breaking ties by each permutation in turn visits every order of the tied equally often.
    broken = [
        mind(scores + 0.1 * np.array(order) / length, labels)
        for order in itertools.permutations(range(length))
    ]
    values = of_one(scores.tolist(), labels.tolist())
    for name in RANKING_METRICS:
        expected = np.mean([orders[name] for orders in broken])
        assert values[name] == pytest.approx(expected, abs=1e-9)
    assert values["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    ndcg = ndcg_score(labels[None], scores[None], k=5)  # averages over ties as well
    assert values["ndcg@5"] == pytest.approx(ndcg, abs=1e-9)


def test_a_constant_scorer_gets_half_of_auc_and_the_mean_reciprocal_rank() -> None:
    values = of_one([0.3] * 4, [1, 0, 0, 0])
    assert values["auc"] == 0.5
    assert values["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_negative_zero_ties_with_zero() -> None:
    assert of_one([0.0, -0.0], [0, 1])["auc"] == 0.5


def test_nearly_equal_scores_are_not_ties() -> None:
    assert of_one([1.0, float(np.nextafter(1.0, 2.0))], [0, 1])["auc"] == 1.0


@pytest.mark.parametrize(
    ("scores", "labels"),
    [([1.0, 2.0], [0, 0]), ([1.0, 2.0], [1, 1]), ([1.0], [1]), ([1.0], [0]), ([], [])],
    ids=["no click", "all clicked", "one candidate clicked", "one candidate", "no candidate"],
)
def test_what_ranks_nothing_is_undefined(scores: list[float], labels: list[int]) -> None:
    assert all(np.isnan(value) for value in of_one(scores, labels).values())


def test_no_impression_gives_no_value() -> None:
    values = ranking_metrics(np.empty(0), np.empty(0, dtype=np.int8), np.zeros(1, dtype=np.int64))
    assert {name: value.shape for name, value in values.items()} == dict.fromkeys(
        RANKING_METRICS, (0,)
    )


def test_block_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    rows = [rng.integers(0, 5, size=rng.integers(1, 9)).astype(float) for _ in range(200)]
    scores, offsets = ragged(rows)
    labels = rng.integers(0, 2, size=len(scores))
    whole = ranking_metrics(scores, labels, offsets)
    monkeypatch.setattr(slates, "_CELLS_AT_ONCE", 7)
    for name, values in ranking_metrics(scores, labels, offsets).items():
        np.testing.assert_allclose(values, whole[name], atol=1e-12)


slate = st.lists(
    st.tuples(st.floats(-5, 5).map(lambda x: round(x, 1)), st.integers(0, 1)),
    min_size=2,
    max_size=15,
).filter(lambda pairs: 0 < sum(y for _, y in pairs) < len(pairs))


@settings(max_examples=200, deadline=None)
@given(pairs=slate, data=st.data())
def test_order_of_candidates_and_monotone_maps_do_not_matter(
    pairs: list[tuple[float, int]], data: st.DataObject
) -> None:
    scores, labels = [s for s, _ in pairs], [y for _, y in pairs]
    values = of_one(scores, labels)
    shuffled = data.draw(st.permutations(pairs))
    assert of_one([s for s, _ in shuffled], [y for _, y in shuffled]) == pytest.approx(values)
    assert of_one([s**3 + 2 * s for s in scores], labels) == pytest.approx(values)
    assert of_one([-s for s in scores], labels)["auc"] == pytest.approx(1 - values["auc"])
    assert all(0 <= value <= 1 + 1e-12 for value in values.values())


def test_every_ranking_metric_is_described() -> None:
    assert set(RANKING_METRICS) <= set(METRICS)

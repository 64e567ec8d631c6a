from datetime import timedelta

import numpy as np
import polars as pl
import pytest

from recflow.core.errors import ConfigError, ContractError
from recflow.evaluation.baselines import (
    CategoryShareScorer,
    DecayedPopularityScorer,
    OracleScorer,
    PopularityScorer,
    RandomScorer,
    TextSimilarityScorer,
)
from recflow.evaluation.evaluator import Scorer, Snapshot
from recflow_tests.unit.evaluation.support import (
    START,
    impressions_of,
    items_of,
    simulated_snapshot,
)

SNAPSHOT = simulated_snapshot()


def text_vectors(snapshot: Snapshot) -> np.ndarray:
    rng = np.random.default_rng(0)
    topics = np.arange(snapshot.items.height) % 3
    return (np.eye(8)[topics] + 0.2 * rng.normal(size=(len(topics), 8)) + 1).astype(np.float32)


def all_baselines(snapshot: Snapshot) -> list[Scorer]:
    logs = [snapshot.train, snapshot.validation, snapshot.test]
    return [
        RandomScorer(0),
        PopularityScorer(snapshot.train),
        DecayedPopularityScorer(logs, half_life_hours=4, delay_minutes=10),
        CategoryShareScorer(snapshot.items),
        TextSimilarityScorer(snapshot.items["item_id"], text_vectors(snapshot), snapshot.train),
    ]


@pytest.mark.parametrize("scorer", all_baselines(SNAPSHOT), ids=lambda scorer: scorer.name)
def test_scorers_keep_their_promises(scorer: Scorer) -> None:
    rows = SNAPSHOT.test
    scores = scorer.score(rows)
    assert scores.dtype == pl.List(pl.Float64)
    assert scores.list.len().equals(rows["candidates"].list.len(), check_names=False)
    assert np.isfinite(scores.explode().to_numpy()).all()
    # Rows and candidates in another order: the same number for each pair.
    order = np.random.default_rng(1).permutation(rows.height)
    shuffled = rows[order].with_columns(pl.col("candidates").list.reverse())
    expected = scores.gather(order).list.reverse()
    np.testing.assert_allclose(
        scorer.score(shuffled).explode().to_numpy(), expected.explode().to_numpy(), rtol=1e-5
    )
    # The catalogue's score of a candidate is the candidate's score.
    items = sorted(SNAPSHOT.items["item_id"].to_list())
    whole = scorer.score_catalogue(rows[:20], items)
    assert whole.shape == (20, len(items))
    assert whole.dtype == np.float32
    for row, (candidates, own) in enumerate(
        zip(rows["candidates"][:20].to_list(), scores[:20].to_list(), strict=True)
    ):
        columns = [items.index(candidate) for candidate in candidates]
        np.testing.assert_allclose(whole[row, columns], own, rtol=1e-5, atol=1e-6)


def test_random_is_uniform_and_seeded() -> None:
    scores = RandomScorer(0).score(SNAPSHOT.test).explode().to_numpy()
    assert scores.min() >= 0
    assert scores.max() < 1
    assert scores.mean() == pytest.approx(0.5, abs=0.03)
    assert scores.std() == pytest.approx(12**-0.5, abs=0.02)
    other = RandomScorer(1).score(SNAPSHOT.test).explode().to_numpy()
    assert abs(np.corrcoef(scores, other)[0, 1]) < 0.1


def test_popularity_counts_train_clicks() -> None:
    train = impressions_of(
        [
            {"candidates": ["a", "b", "c"], "clicked": ["a", "b"]},
            {"candidates": ["a", "b"], "clicked": ["a"]},
            {"candidates": ["c"], "clicked": []},
        ]
    )
    rows = impressions_of([{"candidates": ["c", "b", "a", "new"], "clicked": []}])
    assert PopularityScorer(train).score(rows).to_list() == [[0, 1, 2, 0]]


def test_decayed_counters_by_hand() -> None:
    hour = timedelta(hours=1)
    log = impressions_of(
        [
            {"candidates": ["a", "b"], "clicked": ["a"], "time": START},
            {"candidates": ["a", "b"], "clicked": ["a", "b"], "time": START + 2 * hour},
            {"candidates": ["a", "b"], "clicked": ["b"], "time": START + 4 * hour},
        ]
    )
    scorer = DecayedPopularityScorer([log], half_life_hours=2, delay_minutes=60)
    assert scorer.name == "popularity_decayed_2h_delay_60min"
    rows = impressions_of(
        [
            # Known up to 3 h: a clicked 3 h and 1 h before then, b 1 h before.
            {"candidates": ["a", "b", "c"], "clicked": [], "time": START + 4 * hour},
            # Known up to 2 h, exclusive: only the click at 0 h.
            {"candidates": ["a", "b", "c"], "clicked": [], "time": START + 3 * hour},
            {"candidates": ["a"], "clicked": [], "time": START},
        ]
    )
    catalogue = scorer.score_catalogue(rows, ["c", "a"])
    np.testing.assert_allclose(catalogue, [[0, 2**-1.5 + 2**-0.5], [0, 0.5], [0, 0]], rtol=1e-6)
    nobody = DecayedPopularityScorer([log[:0]], half_life_hours=2, delay_minutes=0)
    assert nobody.score_catalogue(rows, ["a", "b"]).tolist() == [[0, 0]] * 3
    assert nobody.score(rows)[2].to_list() == [0]
    first, second, third = scorer.score(rows).to_list()
    assert first == pytest.approx([2**-1.5 + 2**-0.5, 2**-0.5, 0])
    assert second == pytest.approx([0.5, 0, 0])
    assert third == [0]


def test_decayed_counters_agree_with_a_loop_over_all_clicks() -> None:
    delay, half_life = timedelta(minutes=30), timedelta(hours=3)
    logs = [SNAPSHOT.train, SNAPSHOT.validation, SNAPSHOT.test]
    clicks = [
        (item, time)
        for log in logs
        for items, labels, time in log.select("candidates", "labels", "time").iter_rows()
        for item, label in zip(items, labels, strict=True)
        if label
    ]
    rows = SNAPSHOT.test[::37]
    scorer = DecayedPopularityScorer(logs, half_life_hours=3, delay_minutes=30)
    for scores, (candidates, time) in zip(
        scorer.score(rows).to_list(), rows.select("candidates", "time").iter_rows(), strict=True
    ):
        for score, candidate in zip(scores, candidates, strict=True):
            ages = [time - delay - at for item, at in clicks if item == candidate]
            expected = sum(2 ** -(age / half_life) for age in ages if age > timedelta(0))
            assert score == pytest.approx(expected, rel=1e-9)


def test_a_click_in_the_future_changes_no_score() -> None:
    test = SNAPSHOT.test
    early, late = test[:100], test[100:]
    args = {"half_life_hours": 4, "delay_minutes": 0}
    with_late = DecayedPopularityScorer([SNAPSHOT.train, early, late], **args).score(early)
    without = DecayedPopularityScorer([SNAPSHOT.train, early], **args).score(early)
    np.testing.assert_allclose(with_late.explode().to_numpy(), without.explode().to_numpy())


def test_category_share_by_hand() -> None:
    items = items_of({"a": "news", "b": "sport", "c": "news", "d": ""})
    rows = impressions_of(
        [
            {"candidates": ["a", "b", "d"], "clicked": [], "history": ["a", "c", "b", "gone"]},
            {"candidates": ["a", "b"], "clicked": [], "history": []},
            {"candidates": ["a", "d"], "clicked": [], "history": ["d", "d", "a", "a"]},
        ]
    )
    scores = CategoryShareScorer(items).score(rows).to_list()
    assert scores[0] == pytest.approx([2 / 3, 1 / 3, 0])
    assert scores[1] == [0, 0]
    assert scores[2] == pytest.approx([1 / 2, 0])
    newest = CategoryShareScorer(items, history_limit=2).score(rows).to_list()
    assert newest[2] == pytest.approx([1, 0])


def test_text_similarity_by_hand() -> None:
    ids = ["a", "b", "c", "later"]
    vectors = np.array([[3, 0], [0, 5], [1, 1], [0, -2]], dtype=np.float32)
    train = impressions_of([{"candidates": ["a", "b"], "clicked": ["a"]}])
    scorer = TextSimilarityScorer(ids, vectors, train)
    rows = impressions_of(
        [
            {"candidates": ["a", "b", "later", "gone"], "clicked": [], "history": ["a"]},
            {"candidates": ["a"], "clicked": [], "history": ["gone"]},
        ]
    )
    # Unit vectors of a and b are the axes, their mean (1/2, 1/2): centred, a and b are opposite.
    first, second = scorer.score(rows).to_list()
    later = np.array([-0.5, -1.5])
    a = np.array([0.5, -0.5])
    cosine = later @ a / np.linalg.norm(later) / np.linalg.norm(a)
    assert first == pytest.approx([1, -1, cosine, 0], abs=1e-6)
    assert second == [0]


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="half_life_hours = 0"):
        DecayedPopularityScorer([SNAPSHOT.train], half_life_hours=0, delay_minutes=0)
    with pytest.raises(ConfigError, match="delay_minutes = -1"):
        DecayedPopularityScorer([SNAPSHOT.train], half_life_hours=1, delay_minutes=-1)
    with pytest.raises(ConfigError, match="history_limit = 0"):
        CategoryShareScorer(SNAPSHOT.items, history_limit=0)
    with pytest.raises(ContractError, match="1 vectors for 2 items"):
        TextSimilarityScorer(["a", "b"], np.ones((1, 2), dtype=np.float32), SNAPSHOT.train)
    with pytest.raises(ContractError, match="no item shown in train"):
        TextSimilarityScorer(["zz"], np.ones((1, 2), dtype=np.float32), SNAPSHOT.train)


def test_oracle_needs_every_impression() -> None:
    truth = pl.DataFrame({"impression_id": ["i0"], "utility": [[0.5, 0.1]]})
    rows = impressions_of([{"candidates": ["a", "b"], "clicked": ["a"]}] * 2)
    oracle = OracleScorer(truth)
    assert oracle.score(rows[:1]).to_list() == [[0.5, 0.1]]
    with pytest.raises(ContractError, match="lacks 1 impressions, the first 'i1'"):
        oracle.score(rows)
    with pytest.raises(ContractError, match="catalogue_sample=0"):
        oracle.score_catalogue(rows, ["a"])

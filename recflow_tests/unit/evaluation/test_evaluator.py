import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from recflow.core.columns import SPLIT_IMPRESSIONS
from recflow.core.errors import ArtifactError, ConfigError, ContractError
from recflow.evaluation.baselines import (
    CategoryShareScorer,
    PopularityScorer,
    RandomScorer,
    TextSimilarityScorer,
)
from recflow.evaluation.evaluator import (
    Evaluation,
    EvaluationConfig,
    Predictions,
    Snapshot,
    evaluate,
    predict,
)
from recflow.evaluation.metrics import METRICS
from recflow_tests.unit.evaluation.support import (
    FixedScorer,
    impressions_of,
    items_of,
    simulated_snapshot,
)
from recflow_tests.unit.evaluation.test_baselines import text_vectors

SNAPSHOT = simulated_snapshot(rated=True)
CONFIG = EvaluationConfig(bootstrap_samples=200, parents={"category_share": "random"})


def predictions_of(snapshot: Snapshot) -> list[Predictions]:
    scorers = [
        RandomScorer(0),
        PopularityScorer(snapshot.train),
        CategoryShareScorer(snapshot.items),
        TextSimilarityScorer(snapshot.items["item_id"], text_vectors(snapshot), snapshot.train),
    ]
    return [predict(scorer, snapshot, catalogue_sample=60, seed=0) for scorer in scorers]


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return evaluate(predictions_of(SNAPSHOT), SNAPSHOT, CONFIG)


def numbers(evaluation: Evaluation) -> dict[str, Any]:
    """Everything measured, as nested plain values."""
    return {result.name: dataclasses.asdict(result) for result in evaluation.scorers}


def assert_close(left: Any, right: Any) -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_close(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_close(one, other)
    elif isinstance(left, float):
        assert left == pytest.approx(right, abs=1e-9)
    else:
        assert left == right


# Predictions


class Returning(FixedScorer):
    """Returns what it is told to, whatever is asked."""

    def __init__(self, scores: Sequence[Any], catalogue: np.ndarray | None = None) -> None:
        super().__init__({}, name="broken")
        self._scores = pl.Series(scores, dtype=pl.List(pl.Float64))
        self._catalogue = catalogue

    def score(self, impressions: pl.DataFrame) -> pl.Series:
        return self._scores

    def score_catalogue(self, impressions: pl.DataFrame, item_ids: Sequence[str]) -> np.ndarray:
        assert self._catalogue is not None
        return self._catalogue


def two_impressions() -> Snapshot:
    test = impressions_of(
        [
            {"candidates": ["a", "b"], "clicked": ["a"]},
            {"candidates": ["a", "b", "c"], "clicked": ["b"]},
        ]
    )
    empty = SPLIT_IMPRESSIONS.empty()
    return Snapshot(items_of(dict.fromkeys("abc", "x")), test, empty, test)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([[1, 2], [1, 2, float("nan")]], "gave nan to a candidate of impression 'i1'"),
        ([[1, float("inf")], [1, 2, 3]], "gave inf to a candidate of impression 'i0'"),
        ([[1, 2], [1, None, 3]], "gave nan to a candidate of impression 'i1'"),
        ([[1, 2], [1, 2]], "2 scores for the 3 candidates of impression 'i1'"),
        ([[1, 2], None], "None scores for the 3 candidates of impression 'i1'"),
        ([[1, 2]], "1 values of type"),
    ],
)
def test_bad_scores_are_refused_by_name(scores: Sequence[Any], message: str) -> None:
    with pytest.raises(ContractError, match=message) as error:
        predict(Returning(scores), two_impressions(), catalogue_sample=0, seed=0)
    assert "'broken'" in str(error.value)


def test_bad_catalogue_scores_are_refused_by_name() -> None:
    good = [[1, 2], [1, 2, 3]]
    wrong_shape = Returning(good, np.zeros((2, 2), dtype=np.float32))
    with pytest.raises(ContractError, match=r"'broken' .*shape \(2, 2\); expected \(2, 3\)"):
        predict(wrong_shape, two_impressions(), catalogue_sample=2, seed=0)
    infinite = np.zeros((2, 3), dtype=np.float32)
    infinite[1, 2] = np.inf
    with pytest.raises(ContractError, match="not finite for impression 'i1'"):
        predict(Returning(good, infinite), two_impressions(), catalogue_sample=2, seed=0)
    with pytest.raises(ConfigError, match="catalogue_sample = -1"):
        predict(RandomScorer(0), two_impressions(), catalogue_sample=-1, seed=0)


def test_predictions_round_trip(tmp_path: Path) -> None:
    for sample in (0, 10):
        made = predict(RandomScorer(0), SNAPSHOT, catalogue_sample=sample, seed=0)
        made.save(tmp_path / "p")
        read = Predictions.load(tmp_path / "p")
        assert (read.scorer, read.board) == ("random", "content-only")
        assert read.test.equals(made.test)
        assert read.validation.equals(made.validation)
        if made.catalogue is None:
            assert read.catalogue is None
        else:
            assert read.catalogue is not None
            assert read.catalogue.equals(made.catalogue)
    (tmp_path / "p" / "test.parquet").unlink()
    with pytest.raises(ArtifactError, match="score the snapshot again"):
        Predictions.load(tmp_path / "p")
    with pytest.raises(ArtifactError, match="no readable predictions"):
        Predictions.load(tmp_path / "nothing")


def test_all_scorers_are_ranked_on_the_same_sample() -> None:
    samples = [p.catalogue for p in predictions_of(SNAPSHOT)]
    assert samples[0] is not None
    assert samples[0].height == 60
    for sample in samples[1:]:
        assert sample is not None
        assert sample["row"].equals(samples[0]["row"])


# Results


def test_no_result_depends_on_the_order_of_rows(evaluation: Evaluation) -> None:
    rng = np.random.default_rng(5)

    def shuffled(frame: pl.DataFrame) -> pl.DataFrame:
        return frame[rng.permutation(frame.height)]

    assert SNAPSHOT.truth is not None
    other = Snapshot(
        shuffled(SNAPSHOT.items).sort("item_id"),  # text_vectors are made in this order
        shuffled(SNAPSHOT.train),
        shuffled(SNAPSHOT.validation),
        shuffled(SNAPSHOT.test),
        shuffled(SNAPSHOT.truth),
    )
    again = evaluate(predictions_of(other)[::-1], other, CONFIG)
    assert_close(numbers(again), numbers(evaluation))


def test_a_family_is_compared_each_with_each() -> None:
    parents = {"text_similarity": "random", "category_share": "random"}
    config = dataclasses.replace(CONFIG, parents=parents)
    family = evaluate(predictions_of(SNAPSHOT), SNAPSHOT, config)
    names = ("random", "text_similarity", "category_share")
    assert set(family.pairs) == {(a, b) for a in names for b in names if a != b}
    for (one, other), pair in family.pairs.items():
        auc, base = (family[name].metrics["auc"].value for name in (one, other))
        assert pair.difference.value == pytest.approx(auc - base)
        assert pair.relative.value == pytest.approx((auc - base) / base)
        back = family.pairs[other, one].difference
        assert pair.difference.value == -back.value
        # The same resamples both ways.
        assert (pair.difference.low, pair.difference.high) == pytest.approx(
            (-(back.high or 0), -(back.low or 0))
        )
        low, high = pair.relative.low, pair.relative.high
        assert low is not None
        assert high is not None
        assert low <= pair.relative.value <= high
    # The relative difference to the parent is that of the comparison with it.
    parent = family["category_share"].parent
    assert parent is not None
    assert family.pairs["category_share", "random"].difference == parent.differences["auc"]


def test_without_parents_there_is_no_family() -> None:
    alone = evaluate(predictions_of(SNAPSHOT), SNAPSHOT, dataclasses.replace(CONFIG, parents={}))
    assert alone.pairs == {}


def test_a_second_evaluation_is_the_same(evaluation: Evaluation) -> None:
    assert evaluate(predictions_of(SNAPSHOT), SNAPSHOT, CONFIG) == evaluation


def test_ranking_metrics_are_means_over_impressions_with_both_outcomes(
    evaluation: Evaluation,
) -> None:
    scores = CategoryShareScorer(SNAPSHOT.items).score(SNAPSHOT.test).to_list()
    labels = SNAPSHOT.test["labels"].to_list()
    usable = [
        roc_auc_score(y, s) for s, y in zip(scores, labels, strict=True) if 0 < sum(y) < len(y)
    ]
    assert evaluation["category_share"].metrics["auc"].value == pytest.approx(np.mean(usable))
    counts = evaluation.counts
    assert counts.evaluated == len(usable)
    assert counts.evaluated + counts.without_click + counts.all_clicked == counts.impressions


def test_probability_metrics_agree_with_sklearn(evaluation: Evaluation) -> None:
    result = evaluation["category_share"]
    scores = CategoryShareScorer(SNAPSHOT.items).score(SNAPSHOT.test).explode().to_numpy()
    labels = SNAPSHOT.test["labels"].explode().to_numpy()
    assert result.calibration is not None
    probabilities = result.calibration.probabilities(scores)
    assert result.metrics["log_loss"].value == pytest.approx(log_loss(labels, probabilities))
    brier = brier_score_loss(labels, probabilities)
    assert result.metrics["brier"].value == pytest.approx(brier)
    assert result.metrics["click_rmse"].value == pytest.approx(brier**0.5)
    assert result.metrics["rating_rmse"].value < (evaluation.train_mean_rating_rmse or 0)


def test_calibration_never_sees_the_test_labels(evaluation: Evaluation) -> None:
    flipped = SNAPSHOT.test.with_columns(pl.col("labels").list.eval(1 - pl.element()))
    other = dataclasses.replace(SNAPSHOT, test=flipped)
    again = evaluate(predictions_of(SNAPSHOT), other, CONFIG)
    for result in evaluation.scorers:
        assert again[result.name].calibration == result.calibration
    assert again["random"].metrics["log_loss"] != evaluation["random"].metrics["log_loss"]


def test_differences_are_paired_and_signed(evaluation: Evaluation) -> None:
    share, random = evaluation["category_share"], evaluation["random"]
    assert share.parent is not None
    assert share.parent.other == "random"
    difference = share.parent.differences["auc"]
    expected = share.metrics["auc"].value - random.metrics["auc"].value
    assert difference.value == pytest.approx(expected)
    assert difference.low is not None
    assert 0 < difference.low < difference.value
    assert evaluation["text_similarity"].reference is None
    assert random.reference is not None
    assert random.reference.other == "text_similarity"


def test_oracle_bounds_everyone_and_scales_the_share(evaluation: Evaluation) -> None:
    oracle, popularity = evaluation["oracle"], evaluation["popularity"]
    assert max(r.metrics["auc"].value for r in evaluation.scorers) == oracle.metrics["auc"].value
    share = evaluation["text_similarity"].oracle_share
    assert share is not None
    way = oracle.metrics["auc"].value - popularity.metrics["auc"].value
    gain = evaluation["text_similarity"].metrics["auc"].value - popularity.metrics["auc"].value
    assert share.value == pytest.approx(gain / way)
    assert oracle.oracle_share is not None
    assert oracle.oracle_share.value == 1.0
    assert popularity.oracle_share is not None
    assert popularity.oracle_share.value == 0.0


def test_real_logs_have_no_oracle() -> None:
    snapshot = dataclasses.replace(SNAPSHOT, truth=None)
    evaluation = evaluate(predictions_of(snapshot), snapshot, CONFIG)
    assert "oracle" not in [result.name for result in evaluation.scorers]
    assert all(result.oracle_share is None for result in evaluation.scorers)


def test_segments_by_hand() -> None:
    items = items_of({"a": "news", "b": "sport", "c": "news", "new": "sport", "odd": ""})
    train = impressions_of([{"candidates": ["a", "b", "c", "odd"], "clicked": ["a"]}])
    test = impressions_of(
        [
            {"candidates": ["a", "b"], "clicked": ["a"], "history": ["c"]},  # right
            {"candidates": ["a", "new"], "clicked": ["new"], "history": ["c"]},  # wrong
            {"candidates": ["a", "b"], "clicked": ["b"]},  # wrong
            {"candidates": ["a", "odd"], "clicked": ["odd"]},  # wrong
            {"candidates": ["a", "b"], "clicked": []},  # ranks nothing
        ]
    )
    snapshot = Snapshot(items, train, SPLIT_IMPRESSIONS.empty(), test)
    scorer = FixedScorer({"a": 1.0, "b": 0.5, "c": 0.4, "new": 0.3, "odd": 0.2})
    config = EvaluationConfig(bootstrap_samples=20, references={})
    predictions = predict(scorer, snapshot, catalogue_sample=0, seed=0)
    result = evaluate([predictions], snapshot, config)["fixed"]
    found = {s.name: (s.impressions, s.primary.value) for s in result.segments}
    assert found == {
        "cold_users": (2, 0.0),
        "warm_users": (2, 0.5),
        "new_items": (1, 0.0),
        "known_items": (3, pytest.approx(1 / 3)),
        "category:sport": (2, 0.0),
        "category:news": (1, 1.0),
    }
    # An empty validation split leaves nothing to calibrate on.
    assert result.calibration is None
    assert not {"log_loss", "brier", "click_rmse", "calibration_error"} & result.metrics.keys()


def test_users_are_the_unit_of_resampling() -> None:
    # One user is always served well, the other never: 50 impressions each tell us little.
    rows = [
        {"candidates": ["a", "b"], "clicked": ["a" if user else "b"], "user_id": f"u{user}"}
        for user in (0, 1)
        for _ in range(50)
    ]
    frame = impressions_of(rows)
    snapshot = Snapshot(items_of({"a": "", "b": ""}), frame, frame, frame)
    predictions = predict(FixedScorer({"a": 1.0, "b": 0.0}), snapshot, catalogue_sample=0, seed=0)
    by_user = EvaluationConfig(bootstrap_samples=200, references={})
    auc = evaluate([predictions], snapshot, by_user)["fixed"].metrics["auc"]
    assert (auc.low, auc.value, auc.high) == (0.0, 0.5, 1.0)
    by_row = dataclasses.replace(by_user, cluster="impression")
    auc = evaluate([predictions], snapshot, by_row)["fixed"].metrics["auc"]
    assert auc.low == pytest.approx(0.4, abs=0.05)


def test_ids_may_repeat_on_another_day() -> None:
    test = SNAPSHOT.test.with_columns(pl.lit("same").alias("impression_id"))
    snapshot = dataclasses.replace(SNAPSHOT, test=test, truth=None)
    predictions = predict(PopularityScorer(snapshot.train), snapshot, catalogue_sample=50, seed=0)
    original = predict(PopularityScorer(SNAPSHOT.train), SNAPSHOT, catalogue_sample=50, seed=0)
    config = EvaluationConfig(bootstrap_samples=10, references={})
    changed = evaluate([predictions], snapshot, config)["popularity"].metrics
    expected = evaluate([original], SNAPSHOT, config)["popularity"].metrics
    assert changed["recall@10"] == expected["recall@10"]
    assert changed["auc"] == expected["auc"]


def test_every_metric_is_described(evaluation: Evaluation) -> None:
    for result in evaluation.scorers:
        assert result.metrics.keys() <= METRICS.keys()
        assert all(np.isfinite(estimate.value) for estimate in result.metrics.values())


# Refusals


def test_nothing_to_rank_is_an_error() -> None:
    rows = impressions_of([{"candidates": ["a", "b"], "clicked": []}])
    for test in (rows, SPLIT_IMPRESSIONS.empty()):
        snapshot = Snapshot(items_of({"a": "", "b": ""}), rows, rows, test)
        predictions = predict(RandomScorer(0), snapshot, catalogue_sample=5, seed=0)
        with pytest.raises(ContractError, match=f"none of the {test.height} test impressions"):
            evaluate([predictions], snapshot, EvaluationConfig(references={}))


def test_predictions_of_another_snapshot_are_refused() -> None:
    other = simulated_snapshot(seed=1)
    config = EvaluationConfig(references={})
    with pytest.raises(ContractError, match="'random' were made on another snapshot"):
        evaluate([predict(RandomScorer(0), other, catalogue_sample=0, seed=0)], SNAPSHOT, config)


def test_names_must_fit_together() -> None:
    made = predictions_of(SNAPSHOT)
    with pytest.raises(ConfigError, match="two scorers are named 'random'"):
        evaluate([*made, made[0]], SNAPSHOT, CONFIG)
    with pytest.raises(ConfigError, match=r"references\['content-only'\] = 'text_similarity'"):
        evaluate(made[:2], SNAPSHOT, EvaluationConfig())
    with pytest.raises(ConfigError, match=r"parents\['random'\] = 'popularity'"):
        evaluate(made, SNAPSHOT, EvaluationConfig(parents={"random": "popularity"}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("primary_metric", "accuracy"),
        ("bootstrap_samples", 0),
        ("confidence", 1.0),
        ("reliability_bins", 1),
        ("cluster", "day"),
    ],
)
def test_impossible_configuration_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key} = "):
        EvaluationConfig(**{key: value})


def test_a_snapshot_of_the_wrong_table_is_refused() -> None:
    with pytest.raises(ContractError, match="split_impressions"):
        dataclasses.replace(SNAPSHOT, test=SNAPSHOT.items)

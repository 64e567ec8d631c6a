import dataclasses
import json
from itertools import pairwise

import polars as pl
import pytest

from recflow.core.columns import Columns
from recflow.core.errors import ConfigError
from recflow.evaluation.evaluator import EvaluationConfig, predict
from recflow.evaluation.label_efficiency import (
    METRICS,
    LabelShare,
    judge_label_efficiency,
    nested_sample,
    scorer_name,
)
from recflow_tests.unit.evaluation.support import FixedScorer, simulated_snapshot

SNAPSHOT = simulated_snapshot(impressions=120)


def ids(frame: pl.DataFrame) -> list[str]:
    return frame[Columns.IMPRESSION_ID].to_list()


def test_samples_are_nested_and_of_the_size_asked_for() -> None:
    samples = [nested_sample(SNAPSHOT.train, share, seed=3) for share in (0.01, 0.1, 0.5, 1.0)]
    assert [sample.height for sample in samples] == [1, 12, 60, 120]
    for small, large in pairwise(samples):
        assert set(ids(small)) < set(ids(large))
    assert samples[-1].equals(SNAPSHOT.train)


def test_samples_are_in_order_of_time_whatever_the_order_of_the_rows() -> None:
    shuffled = SNAPSHOT.train.sample(fraction=1.0, shuffle=True, seed=1)
    before = shuffled.clone()
    sample = nested_sample(shuffled, 0.3, seed=0)
    assert sample[Columns.TIME].is_sorted()
    assert sample.equals(nested_sample(SNAPSHOT.train, 0.3, seed=0))
    assert shuffled.equals(before)
    assert ids(sample) != ids(nested_sample(SNAPSHOT.train, 0.3, seed=1))


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_impossible_shares_are_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="share"):
        nested_sample(SNAPSHOT.train, share, seed=0)


def test_every_share_compares_adapted_with_pretrained() -> None:
    items = SNAPSHOT.items[Columns.ITEM_ID].to_list()
    good = {item: float(int(item[1:]) % 3 == 0) for item in items}
    flat = dict.fromkeys(items, 0.0)
    values = {
        scorer_name("pretrained", 0.1): flat,
        scorer_name("adapted", 0.1): good,
        scorer_name("pretrained", 1.0): good,
        scorer_name("adapted", 1.0): good,
    }
    predictions = [
        predict(FixedScorer(scores, name), SNAPSHOT, catalogue_sample=0, seed=0)
        for name, scores in values.items()
    ]
    few, many = judge_label_efficiency(
        predictions, {1.0: 120, 0.1: 12}, SNAPSHOT, EvaluationConfig(bootstrap_samples=50)
    )
    assert (few.share, few.impressions, many.share, many.impressions) == (0.1, 12, 1.0, 120)
    assert few.pretrained["auc"].value == 0.5  # all tied
    for name in METRICS:
        gain = few.adapted[name].value - few.pretrained[name].value
        assert few.difference[name].value == pytest.approx(gain)
        # The same scores in both: paired, the difference has no width at all.
        assert dataclasses.astuple(many.difference[name]) == (0.0, 0.0, 0.0)


def test_rows_survive_json() -> None:
    items = SNAPSHOT.items[Columns.ITEM_ID].to_list()
    predictions = [
        predict(
            FixedScorer(dict.fromkeys(items, 0.0), scorer_name(start, 1.0)),
            SNAPSHOT,
            catalogue_sample=0,
            seed=0,
        )
        for start in ("pretrained", "adapted")
    ]
    (row,) = judge_label_efficiency(
        predictions, {1.0: 120}, SNAPSHOT, EvaluationConfig(bootstrap_samples=20)
    )
    assert LabelShare.from_dict(json.loads(json.dumps(dataclasses.asdict(row)))) == row

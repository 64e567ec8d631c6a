import dataclasses
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recflow.compression.config import VectorStoreConfig
from recflow.compression.recovery import validation_auc
from recflow.compression.store_report import (
    StoreMeasurementConfig,
    StoreReport,
    item_vectors_report,
)
from recflow.compression.vector_store import build_item_vectors, fit_codec
from recflow.core.columns import Columns
from recflow.core.errors import ConfigError, ContractError
from recflow.modeling.ranker import Ranker, load_ranker
from recflow.modeling.reports import TrainingReport
from recflow.modeling.texts import Rows, Vectors

QUICK = StoreMeasurementConfig(queries=12, lookup_items=5, catalogue=100, rounds=2)


@pytest.fixture(scope="module")
def ranker(trained: tuple[Path, TrainingReport]) -> Ranker:
    return load_ranker(trained[0], threads=1)


@pytest.fixture(scope="module")
def vectors(ranker: Ranker, items: pl.DataFrame) -> Vectors:
    return ranker.encode(items[Columns.TEXT].to_list())


@pytest.fixture(scope="module")
def reports(
    ranker: Ranker,
    vectors: Vectors,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
) -> dict[str, StoreReport]:
    return item_vectors_report(
        ranker=ranker,
        vectors=vectors,
        items=items,
        train=train,
        validation=validation,
        stores={name: VectorStoreConfig(codec=name) for name in ("float32", "float16", "int8")},
        config=QUICK,
    )


def test_float32_loses_nothing(
    reports: dict[str, StoreReport],
    ranker: Ranker,
    items: pl.DataFrame,
    validation: pl.DataFrame,
) -> None:
    report = reports["float32"]
    assert report.recall_at_10 == report.recall_at_100 == 1
    assert report.lowest_cosine == pytest.approx(1, abs=1e-6)
    # From texts and from the store: the same but for the batches the texts are encoded in.
    expected = validation_auc(ranker, items, validation)
    assert report.validation_auc == pytest.approx(expected, abs=0.01)
    assert (report.codec, report.bytes_per_item, report.shared_bytes) == ("float32", 128, 0)


def test_coarser_codecs_are_smaller_and_less_close(reports: dict[str, StoreReport]) -> None:
    ordered = [reports[name] for name in ("float32", "float16", "int8")]
    assert [report.bytes_per_item for report in ordered] == [128, 64, 32]
    cosines = [report.mean_cosine for report in ordered]
    assert cosines == sorted(cosines, reverse=True)
    assert 0.999 < cosines[2] < 1
    assert all(r.lowest_cosine <= r.mean_cosine + 1e-6 for r in ordered)
    assert all(r.lookup_microseconds > 0 and r.search_milliseconds > 0 for r in ordered)
    assert all(0.8 < r.recall_at_10 <= 1 for r in ordered)
    json.dumps({name: dataclasses.asdict(report) for name, report in reports.items()})


def test_codecs_learn_from_the_items_of_train_only(
    ranker: Ranker,
    vectors: Vectors,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    def spy(learnt_from: Vectors, config: VectorStoreConfig) -> object:
        seen.append(len(learnt_from))
        return fit_codec(learnt_from, config)

    monkeypatch.setattr("recflow.compression.store_report.fit_codec", spy)
    few = train.head(2).with_columns(pl.col(Columns.HISTORY).list.head(0))
    shown = few[Columns.CANDIDATES].explode().n_unique()
    assert shown < len(items)
    report = item_vectors_report(
        ranker=ranker,
        vectors=vectors,
        items=items,
        train=few,
        validation=validation,
        stores={"int8": VectorStoreConfig()},
        config=QUICK,
    )
    assert seen[0] == shown
    assert report["int8"].new_mean_cosine < 1


def test_the_scorer_uses_the_vectors_it_is_given(
    ranker: Ranker, vectors: Vectors, items: pl.DataFrame, validation: pl.DataFrame
) -> None:
    store = build_item_vectors(
        items[Columns.ITEM_ID].to_list(), vectors, fit_codec(vectors, VectorStoreConfig())
    )
    asked: list[Rows] = []

    def look_up(rows: Rows) -> Vectors:
        asked.append(rows)
        return store.source(items)(rows)

    scorer = ranker.scorer("stored", items, look_up)
    scores = scorer.score(validation).explode().to_numpy()
    expected = ranker.scorer("texts", items).score(validation).explode().to_numpy()
    assert not np.array_equal(scores, expected)
    assert np.corrcoef(scores, expected)[0, 1] > 0.999
    scorer.score(validation)
    assert len(np.concatenate(asked)) == len(np.unique(np.concatenate(asked)))  # each once
    other = build_item_vectors(["other"], vectors[:1], store.codec)
    scorer = ranker.scorer("stored", items, other.source(items))
    with pytest.raises(ContractError, match="has no stored vector"):
        scorer.score(validation)


@pytest.mark.parametrize("key", ["queries", "lookup_items", "catalogue", "rounds"])
def test_impossible_configuration_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        StoreMeasurementConfig(**{key: 0})

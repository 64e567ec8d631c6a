import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from recflow.core.columns import Columns
from recflow.core.errors import ArtifactError, ContractError
from recflow.modeling import ranker as ranker_module
from recflow.modeling.encoder import load_pretrained
from recflow.modeling.objectives import mean_auc
from recflow.modeling.ranker import RankerParts, frozen_item_vectors, load_ranker, save_ranker
from recflow.modeling.trainer import TrainingReport
from recflow.modeling.user_model import UserModel, UserModelShape
from recflow.modeling.vocabulary import VOCABULARY_NAME

SHAPE = UserModelShape(dimension=32, categories=0, history_length=5)


@pytest.fixture
def path(trained: tuple[Path, TrainingReport]) -> Path:
    return trained[0]


@pytest.fixture
def copy(path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(path, tmp_path / "copy"))


def _edit_config(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_loaded_ranker_has_the_accuracy_training_reported(
    trained: tuple[Path, TrainingReport], items: pl.DataFrame, validation: pl.DataFrame
) -> None:
    path, report = trained
    scores = load_ranker(path, threads=1).scorer("tiny", items).score(validation)
    auc = mean_auc(
        scores.explode().to_numpy(),
        validation[Columns.LABELS].explode().cast(pl.Boolean).to_numpy(),
        np.concatenate([[0], np.cumsum(scores.list.len().cast(pl.Int64).to_numpy())]),
    )
    # Training reads hidden states rounded to bfloat16.
    assert auc == pytest.approx(report.best_validation, abs=0.005)


def test_scores_keep_rows_and_slates(
    path: Path, items: pl.DataFrame, validation: pl.DataFrame
) -> None:
    scorer = load_ranker(path, threads=1).scorer("tiny", items)
    assert (scorer.name, scorer.board) == ("tiny", "content-only")
    scores = scorer.score(validation)
    assert scores.dtype == pl.List(pl.Float64)
    assert scores.list.len().equals(validation[Columns.CANDIDATES].list.len(), check_names=False)
    backwards = scorer.score(validation.reverse()).reverse()
    np.testing.assert_allclose(scores.explode(), backwards.explode(), atol=1e-5)


def test_memory_limit_does_not_change_scores(
    path: Path, items: pl.DataFrame, validation: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = load_ranker(path, threads=1).scorer("tiny", items)
    expected = scorer.score(validation)
    catalogue = scorer.score_catalogue(validation, items[Columns.ITEM_ID].to_list())
    monkeypatch.setattr(ranker_module, "_MAX_SIMILARITIES", 60)
    np.testing.assert_allclose(scorer.score(validation).explode(), expected.explode(), atol=1e-5)
    np.testing.assert_allclose(
        scorer.score_catalogue(validation, items[Columns.ITEM_ID].to_list()), catalogue, atol=1e-5
    )


def test_catalogue_scores_are_those_of_the_slate(
    path: Path, items: pl.DataFrame, validation: pl.DataFrame
) -> None:
    scorer = load_ranker(path, threads=1).scorer("tiny", items)
    ids = items[Columns.ITEM_ID].to_list()
    every = scorer.score_catalogue(validation, ids)
    assert (every.dtype, every.shape) == (np.float32, (len(validation), len(ids)))
    rows = zip(validation[Columns.CANDIDATES], scorer.score(validation), every, strict=True)
    for candidates, scores, row in rows:
        chosen = row[[ids.index(item) for item in candidates]]
        np.testing.assert_allclose(chosen, scores, atol=1e-5)


def test_no_impressions_no_scores(
    path: Path, items: pl.DataFrame, validation: pl.DataFrame
) -> None:
    scorer = load_ranker(path, threads=1).scorer("tiny", items)
    assert scorer.score(validation.clear()).len() == 0
    assert scorer.score_catalogue(validation.clear(), ["sea-0"]).shape == (0, 1)


def test_cold_users_get_the_same_content_ranking(
    path: Path, items: pl.DataFrame, validation: pl.DataFrame
) -> None:
    scorer = load_ranker(path, threads=1).scorer("tiny", items)
    cold = validation.head(2).with_columns(pl.lit([], pl.List(pl.String)).alias(Columns.HISTORY))
    scores = scorer.score_catalogue(cold, items[Columns.ITEM_ID].to_list())
    np.testing.assert_array_equal(scores[0], scores[1])
    assert np.isfinite(scores).all()
    assert len(np.unique(scores[0])) > len(items) / 2


def test_an_unknown_candidate_is_named(
    path: Path, items: pl.DataFrame, validation: pl.DataFrame
) -> None:
    scorer = load_ranker(path, threads=1).scorer("tiny", items.head(3))
    with pytest.raises(ContractError, match="not in the item features"):
        scorer.score(validation)
    with pytest.raises(ContractError, match="'nobody'"):
        scorer.score_catalogue(validation.clear(), ["nobody"])


def test_encode_is_ordered_and_of_unit_length(path: Path) -> None:
    ranker = load_ranker(path, threads=1)
    vectors = ranker.encode(["sea0 sea1", "war0", "sea0 sea1"])
    assert (vectors.dtype, vectors.shape) == (np.float32, (3, ranker.dimension))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-6)
    assert ranker.encode([]).shape == (0, ranker.dimension)


def test_frozen_vectors_cover_the_items(base_model: Path, items: pl.DataFrame) -> None:
    ids, vectors = frozen_item_vectors(base_model, items, threads=1)
    assert ids == items[Columns.ITEM_ID].to_list()
    assert vectors.shape == (len(items), 32)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "user_model.safetensors", "tokenizer.json"]
)
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        load_ranker(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "user_model.safetensors"])
def test_damaged_or_incomplete_weights_are_refused(copy: Path, name: str) -> None:
    weights = load_file(copy / name)
    weights.pop(sorted(weights)[-1])
    save_file(weights, copy / name)
    with pytest.raises(ArtifactError, match=name):
        load_ranker(copy)
    (copy / name).write_bytes(b"broken")
    with pytest.raises(ArtifactError, match=name):
        load_ranker(copy)


def test_weights_of_no_module_are_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["unexpected"] = weights[sorted(weights)[0]].clone()
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(ArtifactError, match="unexpected"):
        load_ranker(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": 99}, "layout 2"),
        ({"runtime": "abacus"}, "abacus"),
        ({"user_model": {"dimension": 32}}, "cannot be used"),
        ({"user_model": dataclasses.asdict(SHAPE) | {"kind": "oracle"}}, "cannot be used"),
        ({"encoder": {}}, "description cannot be used"),
    ],
)
def test_another_layout_is_refused(copy: Path, changes: dict[str, object], message: str) -> None:
    _edit_config(copy, **changes)
    with pytest.raises(ArtifactError, match=message):
        load_ranker(copy)


def test_a_config_that_is_not_json_is_refused(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="is not JSON"):
        load_ranker(copy)


@pytest.fixture
def with_ids(base_model: Path, items: pl.DataFrame, tmp_path: Path) -> Path:
    """An untrained ranker that knows the first ten items and two users."""
    torch.manual_seed(0)
    model = UserModel(dataclasses.replace(SHAPE, items=10, users=2))
    item_ids = items[Columns.ITEM_ID].head(10).to_list()
    parts = RankerParts(model, [], 16, item_ids, user_ids=["u1", "u0"])
    path = tmp_path / "with_ids"
    path.mkdir()
    save_ranker(path, load_pretrained(base_model), base_model / "tokenizer.json", parts)
    return path


def test_ids_survive_the_disk_and_change_the_board(
    with_ids: Path, items: pl.DataFrame, validation: pl.DataFrame
) -> None:
    ranker = load_ranker(with_ids, threads=1)
    assert ranker.parts.item_ids == items[Columns.ITEM_ID].head(10).to_list()
    assert ranker.parts.user_numbers(validation.head(3)).tolist() == [2, 1, 0]
    scorer = ranker.scorer("named", items)
    assert scorer.board == "counter-aware"
    assert "item_ids" not in (with_ids / "config.json").read_text()


def test_users_reach_their_embeddings(
    with_ids: Path, items: pl.DataFrame, validation: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = pl.concat([validation.head(1)] * 3)
    users = pl.Series(Columns.USER_ID, ["u0", "u1", "somebody"])
    scorer = load_ranker(with_ids, threads=1).scorer("named", items)
    scores = np.array(scorer.score(same.with_columns(users)).to_list())
    assert np.abs(np.diff(scores, axis=0)).max(axis=1).min() > 1e-4
    ids = items[Columns.ITEM_ID].to_list()
    monkeypatch.setattr(ranker_module, "_MAX_SIMILARITIES", 60)
    every = scorer.score_catalogue(same.with_columns(users), ids)
    chosen = every[:, [ids.index(item) for item in same[Columns.CANDIDATES][0]]]
    np.testing.assert_allclose(chosen, scores, atol=1e-5)


def test_a_ranker_without_ids_has_no_vocabulary(path: Path) -> None:
    assert not (path / VOCABULARY_NAME).exists()


def test_a_missing_vocabulary_is_named(with_ids: Path) -> None:
    (with_ids / VOCABULARY_NAME).unlink()
    with pytest.raises(ArtifactError, match=VOCABULARY_NAME):
        load_ranker(with_ids)

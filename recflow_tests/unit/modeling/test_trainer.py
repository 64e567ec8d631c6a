import dataclasses
import hashlib
import json
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from recflow.core.columns import Columns
from recflow.core.errors import ConfigError, ContractError, PermanentError
from recflow.modeling.config import LOSSES, STRATEGIES, USER_MODELS
from recflow.modeling.encoder import load_pretrained
from recflow.modeling.ranker import load_ranker
from recflow.modeling.reports import TrainingReport
from recflow.modeling.tracking import NullTracker
from recflow_tests.unit.modeling.conftest import TrainTiny
from recflow_tests.unit.modeling.tiny import make_impressions

Trained = tuple[Path, TrainingReport]
BRIEF = {"schedule.head_epochs": 1, "schedule.encoder_epochs": 1}


def hashes(directory: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.iterdir())
    }


def moved_weights(base_model: Path, output: Path) -> set[str]:
    before = load_file(base_model / "model.safetensors")
    after = load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


class Recorder(NullTracker):
    def __init__(self) -> None:
        self.params: dict[str, object] = {}
        self.metrics: list[tuple[int, dict[str, float]]] = []

    def log_params(self, params) -> None:
        self.params.update(params)

    def log_metrics(self, metrics, step) -> None:
        self.metrics.append((step, dict(metrics)))


def test_loss_falls_and_the_topic_is_learnt(trained: Trained) -> None:
    _, report = trained
    assert report.epochs[-1].loss < report.epochs[0].loss
    # One in seven users is cold and can only be guessed: .86 × 1 + .14 × .5 is the ceiling.
    assert report.best_validation > 0.85
    assert report.best_validation == max(epoch.validation for epoch in report.epochs)
    assert report.epochs[report.best_epoch - 1].validation == report.best_validation
    described = json.loads(json.dumps(dataclasses.asdict(report)))
    assert TrainingReport.from_dict(described) == report


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(
    trained: Trained, train_tiny: TrainTiny, tmp_path: Path
) -> None:
    torch.manual_seed(12345)  # the state outside must not matter
    for name, seed in (("again", 0), ("other", 1)):
        train_tiny(tmp_path / name, {"seed": seed})
    assert hashes(tmp_path / "again") == hashes(trained[0])
    assert hashes(tmp_path / "other") != hashes(trained[0])


def test_a_warm_cache_gives_the_bytes_of_a_cold_one(
    trained: Trained, train_tiny: TrainTiny, tmp_path: Path
) -> None:
    for name in ("cold", "warm"):
        report = train_tiny(tmp_path / name, cache_directory=tmp_path / "cache")
        assert hashes(tmp_path / name) == hashes(trained[0])
    assert report.reused_texts == report.cached_texts > 0


def test_only_the_chosen_layers_move(
    train_tiny: TrainTiny, base_model: Path, tmp_path: Path
) -> None:
    train_tiny(tmp_path, {"schedule.head_epochs": 0, "schedule.encoder_epochs": 1})
    moved = moved_weights(base_model, tmp_path)
    assert moved
    assert all(name.startswith("encoder.layer.1.") for name in moved)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_and_is_stored_whole(
    strategy: str, train_tiny: TrainTiny, items: pl.DataFrame, validation: pl.DataFrame,
    tmp_path: Path,
) -> None:  # fmt: skip
    values = {
        **BRIEF,
        "tuning.strategy": strategy,
        "tuning.rank": 4,
        "tuning.initial_rank": 6,
        "optimiser.encoder_learning_rate": 1e-2,
    }
    report = train_tiny(tmp_path, values)
    assert report.strategy == strategy
    phases = ["head"] if strategy == "frozen" else ["head", "encoder"]
    assert [epoch.phase for epoch in report.epochs] == phases
    scorer = load_ranker(tmp_path, threads=1).scorer("model", items)
    assert scorer.score(validation).explode().is_finite().all()


def test_frozen_strategy_leaves_the_encoder_as_it_was(
    train_tiny: TrainTiny, base_model: Path, tmp_path: Path
) -> None:
    report = train_tiny(tmp_path, {"tuning.strategy": "frozen", "schedule.head_epochs": 1})
    assert not moved_weights(base_model, tmp_path)
    assert report.trainable_parameters < report.parameters / 2


@pytest.mark.parametrize("kind", USER_MODELS)
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "mean_squared_error"])
def test_every_user_model_learns_with_every_loss(
    kind: str, loss: str, train_tiny: TrainTiny, tmp_path: Path
) -> None:
    values = {
        "user_model.kind": kind,
        "user_model.heads": 4,
        "objective.loss": loss,
        "schedule.encoder_epochs": 0,
        "schedule.patience": 4,
    }
    assert train_tiny(tmp_path, values).best_validation > 0.8


def test_ratings_are_learnt(
    train_tiny: TrainTiny, train: pl.DataFrame, validation: pl.DataFrame, tmp_path: Path
) -> None:
    # A click on the user's own topic is rated 5, everything else 1: the mean is 1.8, the
    # deviation sqrt(.2 × .8) × 4 = 1.6, which is the error of guessing the mean.
    rated = {
        name: table.with_columns((pl.col(Columns.LABELS) * 4.0 + 1).alias(Columns.RATING))
        for name, table in (("train", train), ("validation", validation))
    }
    values = {
        "objective.loss": "mean_squared_error",
        "objective.clicks_per_impression": 5,
        "schedule.primary_metric": "rating_rmse",
        "schedule.patience": 4,
    }
    report = train_tiny(tmp_path, values, **rated)
    assert report.best_validation == min(epoch.validation for epoch in report.epochs)
    assert report.best_validation < 1.0


def test_ratings_are_asked_for(train_tiny: TrainTiny, tmp_path: Path) -> None:
    values = {
        "objective.loss": "mean_squared_error",
        "schedule.primary_metric": "rating_rmse",
    }
    with pytest.raises(ContractError, match="no training impression has a rating"):
        train_tiny(tmp_path, values)


def test_tracker_hears_parameters_and_every_step(train_tiny: TrainTiny, tmp_path: Path) -> None:
    recorder = Recorder()
    report = train_tiny(tmp_path, BRIEF, tracker=recorder)
    assert recorder.params["objective"]["negatives"] == 3  # type: ignore[index]
    aucs = [m["validation_auc"] for _, m in recorder.metrics if "validation_auc" in m]
    assert aucs == [epoch.validation for epoch in report.epochs]
    steps = [step for step, m in recorder.metrics if "loss" in m]
    assert steps == list(range(1, report.steps + 1))


def test_patience_ends_a_phase_and_the_best_state_is_kept(
    train_tiny: TrainTiny, items: pl.DataFrame, validation: pl.DataFrame, tmp_path: Path
) -> None:
    # With an absurd learning rate the epochs after the first do not improve.
    values = {
        "schedule.head_epochs": 9,
        "schedule.encoder_epochs": 0,
        "schedule.patience": 1,
        "optimiser.head_learning_rate": 1e-2,
        "optimiser.weight_decay": 0.0,
    }
    report = train_tiny(tmp_path, values)
    validations = [epoch.validation for epoch in report.epochs]
    assert len(validations) < 9
    assert report.best_epoch == len(validations) - 1
    assert validations[-1] <= validations[-2]


def test_nan_names_the_batch(
    train_tiny: TrainTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "recflow.modeling.ranking_model.per_click_losses",
        lambda _, scores, *__, **___: scores.sum(1) * torch.nan,
    )
    with pytest.raises(PermanentError, match=r"loss nan .* step 1 \(head\), impressions \["):
        train_tiny(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_listener_raises_ends_the_training(train_tiny: TrainTiny, tmp_path: Path) -> None:
    class EnoughError(Exception):
        pass

    heard = []

    def listen(report) -> None:
        heard.append(report)
        raise EnoughError

    with pytest.raises(EnoughError):
        train_tiny(tmp_path, on_epoch=listen)
    assert [report.epoch for report in heard] == [1]


def test_unknown_item_is_named(train_tiny: TrainTiny, items: pl.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"1 items of the impressions .* 'sea-0'"):
        train_tiny(tmp_path, items=items.filter(pl.col(Columns.ITEM_ID) != "sea-0"))


def test_impressions_that_teach_nothing_are_refused(
    train_tiny: TrainTiny, items: pl.DataFrame, tmp_path: Path
) -> None:
    unclicked = make_impressions(items, 5, seed=1).with_columns(
        pl.col(Columns.LABELS).list.eval(pl.element() * 0)
    )
    with pytest.raises(ContractError, match="no training impression has both"):
        train_tiny(tmp_path, train=unclicked)


def test_cache_limit_names_the_remedy(train_tiny: TrainTiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_cache_bytes = 1000 "):
        train_tiny(tmp_path, {"speed.max_cache_bytes": 1000})


def test_a_category_unseen_in_training_scores_like_an_unknown_one(
    trained: Trained, items: pl.DataFrame, validation: pl.DataFrame
) -> None:
    ranker = load_ranker(trained[0], threads=1)
    strange = items.with_columns(pl.lit("never seen").alias(Columns.CATEGORY))
    empty = items.with_columns(pl.lit("").alias(Columns.CATEGORY))
    scores = [ranker.scorer("a", table).score(validation) for table in (strange, empty)]
    assert scores[0].equals(scores[1])


def test_longer_texts_than_the_encoder_has_positions_for_are_refused(
    train_tiny: TrainTiny, base_model: Path, tmp_path: Path
) -> None:
    assert load_pretrained(base_model).longest_text == 32
    with pytest.raises(ConfigError, match="max_tokens = 33 is not allowed; allowed: at most 32"):
        train_tiny(tmp_path, {"max_tokens": 33})
    assert not list(tmp_path.iterdir())

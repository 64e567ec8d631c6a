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
from recflow.modeling.encoder import load_pretrained
from recflow.modeling.ranker import load_ranker
from recflow.modeling.tracking import NullTracker
from recflow.modeling.trainer import TrainingConfig, TrainingReport, train_ranker
from recflow.modeling.tuning import apply_strategy
from recflow_tests.unit.modeling.tiny import make_impressions, quick


def _hashes(directory: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.iterdir())
    }


def test_loss_falls_and_the_topic_is_learnt(trained: tuple[Path, TrainingReport]) -> None:
    _, report = trained
    assert report.epochs[-1].loss < report.epochs[0].loss
    # One in seven users is cold and can only be guessed: .86 × 1 + .14 × .5 is the ceiling.
    assert report.best_validation_auc > 0.85
    assert report.best_validation_auc == max(epoch.validation_auc for epoch in report.epochs)
    assert report.epochs[report.best_epoch - 1].validation_auc == report.best_validation_auc
    json.dumps(dataclasses.asdict(report))


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(
    trained: tuple[Path, TrainingReport],
    base_model: Path,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
) -> None:
    torch.manual_seed(12345)  # the state outside must not matter
    for name, seed in (("again", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        train_ranker(
            items=items,
            train=train,
            validation=validation,
            base_model=base_model,
            output=tmp_path / name,
            config=quick(seed=seed),
            tracker=NullTracker(),
        )
    assert _hashes(tmp_path / "again") == _hashes(trained[0])
    assert _hashes(tmp_path / "other") != _hashes(trained[0])


def test_only_the_chosen_layers_move(
    trained: tuple[Path, TrainingReport], base_model: Path
) -> None:
    before = load_file(base_model / "model.safetensors")
    after = load_file(trained[0] / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("encoder.layer.1.") for name in moved)


def test_gradient_reaches_only_what_is_trainable(base_model: Path) -> None:
    encoder = load_pretrained(base_model)
    assert apply_strategy("top_k_layers", encoder, tuned_layers=1) == 1
    encoder(torch.tensor([[2, 7, 8, 3]]), torch.ones(1, 4, dtype=torch.bool)).sum().backward()
    with_gradient = {name for name, p in encoder.named_parameters() if p.grad is not None}
    trainable = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert with_gradient == trainable
    assert all("layers.1." in name or "layer.1." in name for name in trainable)


def test_frozen_strategy_leaves_the_encoder_as_it_was(
    base_model: Path,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
) -> None:
    report = train_ranker(
        items=items,
        train=train,
        validation=validation,
        base_model=base_model,
        output=tmp_path,
        config=quick(strategy="frozen", head_epochs=1),
        tracker=NullTracker(),
    )
    before = load_file(base_model / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {epoch.phase for epoch in report.epochs} == {"head"}
    assert report.trainable_parameters < report.parameters / 2


def test_tracker_hears_parameters_and_metrics(
    base_model: Path,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
) -> None:
    class Recorder(NullTracker):
        def __init__(self) -> None:
            self.params: dict[str, object] = {}
            self.metrics: list[tuple[int, dict[str, float]]] = []

        def log_params(self, params) -> None:
            self.params.update(params)

        def log_metrics(self, metrics, step) -> None:
            self.metrics.append((step, dict(metrics)))

    recorder = Recorder()
    report = train_ranker(
        items=items,
        train=train,
        validation=validation,
        base_model=base_model,
        output=tmp_path,
        config=quick(head_epochs=1, encoder_epochs=1),
        tracker=recorder,
    )
    assert recorder.params["negatives"] == 3
    aucs = [m["validation_auc"] for _, m in recorder.metrics if "validation_auc" in m]
    assert aucs == [epoch.validation_auc for epoch in report.epochs]
    assert [step for step, m in recorder.metrics if "loss" in m] == [10, 20]


def test_nan_names_the_batch(
    base_model: Path,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "recflow.modeling.trainer.click_loss", lambda scores, _: scores.sum() * torch.nan
    )
    with pytest.raises(PermanentError, match=r"loss nan .* step 1 \(head\), impressions \["):
        train_ranker(
            items=items,
            train=train,
            validation=validation,
            base_model=base_model,
            output=tmp_path,
            config=quick(),
            tracker=NullTracker(),
        )
    assert list(tmp_path.iterdir()) == []


def test_unknown_item_is_named(
    base_model: Path,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
) -> None:
    with pytest.raises(ContractError, match=r"1 items of the impressions .* 'sea-0'"):
        train_ranker(
            items=items.filter(pl.col(Columns.ITEM_ID) != "sea-0"),
            train=train,
            validation=validation,
            base_model=base_model,
            output=tmp_path,
            config=quick(),
            tracker=NullTracker(),
        )


def test_impressions_that_teach_nothing_are_refused(
    base_model: Path, items: pl.DataFrame, validation: pl.DataFrame, tmp_path: Path
) -> None:
    unclicked = make_impressions(items, 5, seed=1).with_columns(
        pl.col(Columns.LABELS).list.eval(pl.element() * 0)
    )
    with pytest.raises(ContractError, match="no training impression has both"):
        train_ranker(
            items=items,
            train=unclicked,
            validation=validation,
            base_model=base_model,
            output=tmp_path,
            config=quick(),
            tracker=NullTracker(),
        )


def test_cache_limit_names_the_remedy(
    base_model: Path,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=r"max_cache_bytes = 1000 .* raise it"):
        train_ranker(
            items=items,
            train=train,
            validation=validation,
            base_model=base_model,
            output=tmp_path,
            config=quick(max_cache_bytes=1000),
            tracker=NullTracker(),
        )


def test_a_category_unseen_in_training_scores_like_an_unknown_one(
    trained: tuple[Path, TrainingReport], items: pl.DataFrame, validation: pl.DataFrame
) -> None:
    ranker = load_ranker(trained[0], threads=1)
    strange = items.with_columns(pl.lit("never seen").alias(Columns.CATEGORY))
    empty = items.with_columns(pl.lit("").alias(Columns.CATEGORY))
    scores = [ranker.scorer("a", table).score(validation) for table in (strange, empty)]
    assert scores[0].equals(scores[1])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("strategy", "magic"),
        ("tuned_layers", 0),
        ("negatives", 0),
        ("max_tokens", 2),
        ("head_epochs", 0),
        ("encoder_epochs", -1),
        ("head_learning_rate", 0.0),
        ("encoder_learning_rate", float("nan")),
        ("dropout", 1.0),
        ("threads", 0),
    ],
)
def test_impossible_configuration_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        TrainingConfig(**{key: value})


def test_more_layers_than_the_encoder_has_are_refused(base_model: Path) -> None:
    with pytest.raises(ConfigError, match="tuned_layers = 3"):
        apply_strategy("top_k_layers", load_pretrained(base_model), tuned_layers=3)


def test_longer_texts_than_the_encoder_has_positions_for_are_refused(
    base_model: Path, items: pl.DataFrame, train: pl.DataFrame, tmp_path: Path
) -> None:
    assert load_pretrained(base_model).longest_text == 32
    with pytest.raises(ConfigError, match="max_tokens = 33 is not allowed; allowed: at most 32"):
        train_ranker(
            items=items,
            train=train,
            validation=train,
            base_model=base_model,
            output=tmp_path,
            config=quick(max_tokens=33),
            tracker=NullTracker(),
        )
    assert not list(tmp_path.iterdir())

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from recflow.compression import distill
from recflow.compression.config import DistillationConfig, PruningConfig
from recflow.compression.distill import DistillationReport, distill_ranker
from recflow.compression.export import export_encoder
from recflow.compression.prune import prune_ranker
from recflow.compression.student import (
    build_student,
    choose_layers,
    principal_directions,
    require_teachable,
)
from recflow.core.columns import Columns
from recflow.core.errors import ArtifactError, ConfigError, ContractError
from recflow.modeling.encoder import TextEncoder, TorchRuntime, load_pretrained
from recflow.modeling.layout import read_ranker_config
from recflow.modeling.onnx_runtime import OnnxRuntime
from recflow.modeling.ranker import load_encoder, load_ranker
from recflow.modeling.texts import TextTokenizer, encode_texts, pad_tokens
from recflow.modeling.tracking import NullTracker
from recflow.modeling.trainer import TrainingReport
from recflow_tests.unit.compression.rankers import ranker_of_family
from recflow_tests.unit.modeling.families import CONFIGS, LAYERS

QUICK = DistillationConfig(
    layers=1,
    epochs=20,
    batch_size=8,
    learning_rate=3e-3,
    click_steps=12,
    click_batch_size=16,
    click_texts=12,
    negatives=6,  # slates have four
    threads=1,
)


class _Recorder(NullTracker):
    def __init__(self) -> None:
        self.metrics: dict[str, list[float]] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append(value)


@dataclasses.dataclass
class World:
    """The parent and what it was trained on."""

    parent: Path
    items: pl.DataFrame
    train: pl.DataFrame
    validation: pl.DataFrame

    def distill(
        self, output: Path, tracker: NullTracker | None = None, **changes: Any
    ) -> DistillationReport:
        output.mkdir(exist_ok=True)
        return distill_ranker(
            parent=self.parent,
            output=output,
            items=self.items,
            train=self.train,
            validation=self.validation,
            config=dataclasses.replace(QUICK, **changes),
            tracker=tracker or NullTracker(),
        )

    def vectors(self, path: Path) -> np.ndarray[Any, Any]:
        return load_ranker(path, threads=1).encode(self.items[Columns.TEXT].to_list())


@pytest.fixture(scope="module")
def world(
    trained: tuple[Path, TrainingReport],
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
) -> World:
    return World(trained[0], items, train, validation)


@pytest.fixture(scope="module")
def distilled(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, DistillationReport, _Recorder]:
    output, tracker = tmp_path_factory.mktemp("distilled"), _Recorder()
    return output, world.distill(output, tracker), tracker


def test_the_student_has_the_layers_asked_for(
    world: World, distilled: tuple[Path, DistillationReport, _Recorder]
) -> None:
    path, report, _ = distilled
    encoder = load_encoder(path, read_ranker_config(path))
    assert (len(encoder.layers), encoder.width, encoder.dimension) == (1, 32, 32)
    assert (report.layers, report.width) == ((1,), 32)
    # 4 matrices of attention, 2 of the feed-forward part, their biases and 2 normalisations.
    layer = 4 * (32 * 32 + 32) + 2 * 32 * 64 + 64 + 32 + 4 * 32
    assert report.parent_parameters - report.parameters == layer
    assert report.bytes < report.parent_bytes
    names = {file.name for file in path.iterdir()}
    assert names == {file.name for file in world.parent.iterdir()}  # the hidden states are gone
    json.dumps(dataclasses.asdict(report))


def test_distillation_brings_held_out_texts_close_to_the_teacher(
    distilled: tuple[Path, DistillationReport, _Recorder],
) -> None:
    _, report, tracker = distilled
    assert report.held_out_texts >= 2
    assert report.cosine_after_texts > report.cosine_before_training + 0.05
    assert report.cosine > 0.9
    assert report.cosine_after_texts == max(
        report.cosine_before_training, *tracker.metrics["held_out_cosine"]
    )
    assert report.validation_auc >= max(tracker.metrics["validation_auc"])
    assert report.validation_auc > report.parent_validation_auc - 0.05
    assert {"text_loss", "text_distance", "click_loss", "score_loss"} <= tracker.metrics.keys()


def test_the_reported_accuracy_is_that_of_what_was_written(
    world: World, distilled: tuple[Path, DistillationReport, _Recorder]
) -> None:
    path, report, _ = distilled
    vectors = world.vectors(path)
    cosines = np.einsum("ij,ij->i", vectors, world.vectors(world.parent))
    assert cosines.mean() > 0.9
    scores = load_ranker(path, threads=1).scorer("d", world.items).score(world.validation)
    clicked = world.validation[Columns.LABELS]
    best = scores.list.arg_max().to_list()
    assert np.mean([labels[place] for labels, place in zip(clicked, best, strict=True)]) > 0.5
    assert report.validation_auc > 0.8


def test_the_same_seed_gives_the_same_bytes(
    world: World, distilled: tuple[Path, DistillationReport, _Recorder], tmp_path: Path
) -> None:
    world.distill(tmp_path)
    for file in distilled[0].iterdir():
        again = (tmp_path / file.name).read_bytes()
        assert hashlib.sha256(again).digest() == hashlib.sha256(file.read_bytes()).digest()


def test_the_teacher_may_run_again_instead_of_keeping_its_states(
    world: World, tmp_path: Path
) -> None:
    kept = world.distill(tmp_path / "kept", hidden_layers="every", click_steps=0)
    again = world.distill(
        tmp_path / "again", hidden_layers="every", click_steps=0, max_states_bytes=0
    )
    assert again.cosine == pytest.approx(kept.cosine, abs=0.02)
    without = world.distill(tmp_path / "without", hidden_weight=0.0, click_steps=0)
    assert without.cosine > without.cosine_before_training


def test_the_user_model_learns_only_where_that_is_asked_for(
    world: World, distilled: tuple[Path, DistillationReport, _Recorder], tmp_path: Path
) -> None:
    name = "user_model.safetensors"
    before = (world.parent / name).read_bytes()
    assert (distilled[0] / name).read_bytes() == before
    report = world.distill(
        tmp_path, tune_user_model=True, click_learning_rate=1e-2, score_weight=0.0
    )
    assert ((tmp_path / name).read_bytes() != before) == (report.best_click_step > 0)


def test_without_clicks_the_texts_decide_alone(world: World, tmp_path: Path) -> None:
    report = world.distill(tmp_path, click_steps=0)
    assert (report.click_steps, report.best_click_step) == (0, 0)
    assert report.cosine == report.cosine_after_texts


def test_clicks_that_only_harm_leave_the_state_before_them(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = iter([0.9, 0.8, 0.7, 0.75])  # parent, before, twice on the way
    monkeypatch.setattr(distill, "_auc", lambda *_: next(accuracies))
    report = world.distill(tmp_path, validations=2)
    assert (report.parent_validation_auc, report.validation_auc) == (0.9, 0.8)
    assert (report.click_steps, report.best_click_step) == (12, 0)
    assert report.cosine == report.cosine_after_texts


def test_a_narrower_student_keeps_the_width_of_the_vectors(world: World, tmp_path: Path) -> None:
    report = world.distill(tmp_path, layers=2, width=16)
    encoder = load_encoder(tmp_path, read_ranker_config(tmp_path))
    assert (len(encoder.layers), encoder.width, encoder.dimension) == (2, 16, 32)
    assert report.width == 16
    assert report.cosine > report.cosine_before_training
    assert report.cosine > 0.8
    grandchild = dataclasses.replace(world, parent=tmp_path)
    second = grandchild.distill(tmp_path / "second", layers=1)
    assert second.width == 16
    assert second.cosine > 0.8


def test_a_narrower_student_is_exported_with_its_projection(base_model: Path) -> None:
    teacher = load_pretrained(base_model)
    tokens = TextTokenizer(base_model / "tokenizer.json", 16)(["sea0 the war1", "pop2"])
    student = build_student(teacher, (1,), principal_directions(teacher, tokens, (1,), 16))
    exported = OnnxRuntime(export_encoder(student), 1)
    assert exported.dimension == 32
    expected = TorchRuntime(student, 1, mixed=False)(tokens)
    np.testing.assert_allclose(exported(tokens), expected, atol=1e-5)


def test_a_pruned_teacher_is_as_good_as_any(world: World, tmp_path: Path) -> None:
    pruned = tmp_path / "pruned"
    pruned.mkdir()
    prune_ranker(
        parent=world.parent,
        output=pruned,
        items=world.items,
        train=world.train,
        validation=world.validation,
        config=PruningConfig(
            allocation="uniform", head_share=0.25, importance_clicks=32, recovery_steps=5, threads=1
        ),
        tracker=NullTracker(),
    )
    chained = dataclasses.replace(world, parent=pruned)
    report = chained.distill(tmp_path / "student")
    described = read_ranker_config(tmp_path / "student")["encoder"]
    assert described["layers"] == read_ranker_config(pruned)["encoder"]["layers"][-1:]
    assert described["layers"][0]["heads"] == 3
    assert report.cosine > report.cosine_before_training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 2}, "layers = 2 is not allowed; allowed: 1 to 1 for this teacher"),
        ({"layers": 3, "width": 16}, "layers = 3 is not allowed; allowed: 1 to 2"),
        ({"width": 12}, "width = 12 is not allowed; allowed: 0 or a multiple of 8"),
        ({"width": 64}, "width = 64 is not allowed; allowed: 0 to 32"),
    ],
)
def test_impossible_students_are_refused_before_any_work(
    world: World, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    nothing = pl.DataFrame()
    idle = dataclasses.replace(world, items=nothing, train=nothing, validation=nothing)
    with pytest.raises(ConfigError, match=message):
        idle.distill(tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "adapters"), [("llama", False), ("electra", False), ("bert", True)]
)
def test_other_encoders_keep_their_width(
    world: World, base_model: Path, tmp_path: Path, family: str, adapters: bool
) -> None:
    parent = ranker_of_family(family, world.parent, base_model, tmp_path, adapters=adapters)
    other = dataclasses.replace(world, parent=parent)
    with pytest.raises(ConfigError, match="width = 16 is not allowed; allowed: 0, the teacher's"):
        other.distill(tmp_path / "output", width=16)


def test_a_sparse_teacher_is_refused(base_model: Path) -> None:
    teacher = load_pretrained(base_model)
    with torch.no_grad():
        for parameter in teacher.layers.parameters():
            if parameter.ndim > 1:
                parameter[:, ::2] = 0
    with pytest.raises(ConfigError, match="teacher = 'sparse' is not allowed"):
        require_teachable(teacher, layers=1, width=0)


def test_too_few_texts_are_refused(world: World, tmp_path: Path) -> None:
    same = world.items.with_columns(pl.lit("sea0 the").alias(Columns.TEXT))
    with pytest.raises(ContractError, match="1 distinct item texts"):
        dataclasses.replace(world, items=same).distill(tmp_path)


def test_a_parent_of_another_runtime_is_refused(world: World, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    for file in world.parent.iterdir():
        (parent / file.name).write_bytes(file.read_bytes())
    described = json.loads((parent / "config.json").read_text()) | {"runtime": "onnxruntime"}
    (parent / "config.json").write_text(json.dumps(described))
    with pytest.raises(ArtifactError, match="a torch one is needed"):
        dataclasses.replace(world, parent=parent).distill(tmp_path / "output")


@pytest.mark.parametrize(
    ("teacher", "student", "chosen"),
    [
        (6, 1, (5,)),
        (6, 2, (0, 5)),
        (6, 3, (0, 2, 5)),
        (6, 4, (0, 1, 3, 5)),
        (12, 6, (0, 2, 4, 6, 8, 11)),
        (3, 3, (0, 1, 2)),
    ],
)
def test_the_layers_that_stay(teacher: int, student: int, chosen: tuple[int, ...]) -> None:
    assert choose_layers(teacher, student) == chosen


@pytest.mark.parametrize("family", [name for name in CONFIGS if name != "modernbert"])
def test_a_student_of_any_family_begins_with_the_teachers_layers(
    base_model: Path, world: World, tmp_path: Path, family: str
) -> None:
    path = ranker_of_family(family, world.parent, base_model, tmp_path, adapters=True)
    teacher = load_encoder(path, read_ranker_config(path))
    tokens = TextTokenizer(base_model / "tokenizer.json", 16)(["sea0 the war1", "pop2"])
    student = build_student(teacher, (0, LAYERS - 1))
    ids, mask = map(torch.from_numpy, pad_tokens(tokens))
    expected = _without_layer(teacher, 1, ids, mask)
    torch.testing.assert_close(student(ids, mask), expected)


def _without_layer(
    teacher: TextEncoder, left_out: int, ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    hidden = teacher.embed(ids)
    for layer in range(len(teacher.layers)):
        if layer != left_out:
            hidden = teacher.run_layers(hidden, mask, layer, layer + 1)
    return teacher.pool(hidden, mask)


def test_a_family_whose_layers_differ_is_refused(
    base_model: Path, world: World, tmp_path: Path
) -> None:
    path = ranker_of_family("modernbert", world.parent, base_model, tmp_path)
    teacher = load_encoder(path, read_ranker_config(path))
    with pytest.raises(ConfigError, match="a model whose layers are built alike"):
        build_student(teacher, (1, 2))


def test_a_basis_of_full_width_gives_an_encoder_close_to_the_teacher(base_model: Path) -> None:
    teacher = load_pretrained(base_model)
    tokens = TextTokenizer(base_model / "tokenizer.json", 16)(["sea0 the war1", "pop2 tax3 sun1"])
    basis = principal_directions(teacher, tokens, (0, 1), 24)
    torch.testing.assert_close(basis.T @ basis, torch.eye(24), atol=1e-5, rtol=0)
    # Without rotation nothing is lost but rounding: gains and biases are exactly the teacher's.
    same = build_student(teacher, (0, 1), torch.eye(32))
    texts = ["sea0 the war1", "pop2"]
    tokenizer = TextTokenizer(base_model / "tokenizer.json", 16)
    vectors = [
        encode_texts(TorchRuntime(encoder, 1, mixed=False), tokenizer, texts)
        for encoder in (teacher, same)
    ]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 0},
        {"width": -1},
        {"epochs": 0},
        {"learning_rate": 0},
        {"hidden_layers": "first"},
        {"score_weight": 1.5},
        {"click_steps": -1},
    ],
)
def test_impossible_configuration_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        DistillationConfig(**changes)

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from recflow.compression.allocation import KeptParts
from recflow.compression.config import PruningConfig
from recflow.compression.prune import (
    PruningReport,
    measure_importance,
    prunable_layers,
    prune_layer,
    prune_ranker,
)
from recflow.core.columns import Columns
from recflow.core.errors import ArtifactError, ConfigError
from recflow.modeling.batching import items_in_use
from recflow.modeling.encoder import TextEncoder, TorchRuntime, load_pretrained
from recflow.modeling.layout import read_ranker_config
from recflow.modeling.low_rank import factorise
from recflow.modeling.ranker import (
    count_parameters,
    load_encoder,
    load_parts,
    load_ranker,
    save_ranker,
)
from recflow.modeling.texts import TextTokenizer, encode_texts
from recflow.modeling.tracking import NullTracker
from recflow.modeling.trainer import TrainingReport
from recflow_tests.unit.compression.rankers import ranker_of_family

QUICK = PruningConfig(
    allocation="uniform",
    head_share=0.25,
    channel_share=0.5,
    importance_clicks=64,
    recovery_steps=40,
    recovery_batch_size=8,
    learning_rate=2e-3,
    threads=1,
)


@pytest.fixture(scope="module")
def pruned(
    tmp_path_factory: pytest.TempPathFactory,
    trained: tuple[Path, TrainingReport],
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
) -> tuple[Path, PruningReport]:
    output = tmp_path_factory.mktemp("pruned")
    return output, _prune(trained[0], output, items, train, validation)


def _prune(
    parent: Path,
    output: Path,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    config: PruningConfig = QUICK,
) -> PruningReport:
    return prune_ranker(
        parent=parent,
        output=output,
        items=items,
        train=train,
        validation=validation,
        config=config,
        tracker=NullTracker(),
    )


def test_a_pruned_layer_computes_what_the_masked_parent_computes(
    base_model: Path, items: pl.DataFrame
) -> None:
    masked, smaller = load_pretrained(base_model), load_pretrained(base_model)
    kept = KeptParts(heads=torch.tensor([0, 2]), channels=torch.arange(0, 64, 3))
    width = prunable_layers(masked).head_size
    for index in range(2):
        layer = masked.layers[index]
        with torch.no_grad():
            for head in (1, 3):
                columns = slice(head * width, (head + 1) * width)
                layer.attention.output.dense.weight[:, columns] = 0
            removed = sorted(set(range(64)) - set(kept.channels.tolist()))
            layer.output.dense.weight[:, removed] = 0
        prune_layer(smaller, index, kept)
    assert [(s.heads, s.channels) for s in prunable_layers(smaller).shapes] == [(2, 22), (2, 22)]
    tokenizer = TextTokenizer(base_model / "tokenizer.json", 16)
    texts = items[Columns.TEXT].to_list()
    vectors = [
        encode_texts(TorchRuntime(encoder, 1, mixed=False), tokenizer, texts)
        for encoder in (masked, smaller)
    ]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)


@pytest.mark.parametrize(
    ("family", "adapters", "message"),
    [
        ("llama", False, "encoder to prune = 'llama' is not allowed"),
        ("distilbert", False, "encoder to prune = 'distilbert' is not allowed"),
        ("bert", True, "strategy of the encoder to prune = 'adapters' is not allowed"),
    ],
)
def test_other_encoders_are_refused_before_any_work(
    trained: tuple[Path, TrainingReport],
    base_model: Path,
    items: pl.DataFrame,
    tmp_path: Path,
    family: str,
    adapters: bool,
    message: str,
) -> None:
    parent = ranker_of_family(family, trained[0], base_model, tmp_path, adapters=adapters)
    nothing = pl.DataFrame()
    with pytest.raises(ConfigError, match=message):
        _prune(parent, tmp_path / "output", nothing, nothing, nothing)
    assert not (tmp_path / "output").exists()


def test_the_pruned_ranker_is_smaller_and_recovers(pruned: tuple[Path, PruningReport]) -> None:
    _, report = pruned
    assert report.heads == (3, 3)
    assert report.channels == (32, 32)
    # Per layer: 3 × (32 × 8 + 8) of query, key, value, 8 × 32 of the attention's output, and
    # 32 × (32 + 1) + 32 × 32 of the feed-forward part are gone.
    gone = 3 * (32 * 8 + 8) + 8 * 32 + 32 * (32 + 1) + 32 * 32
    assert report.parent_parameters - report.parameters == 2 * gone
    assert report.bytes < report.parent_bytes
    assert report.cosine > report.cosine_before_recovery
    assert report.cosine > 0.97
    json.dumps(dataclasses.asdict(report))


def test_the_pruned_ranker_loads_and_keeps_its_accuracy(
    pruned: tuple[Path, PruningReport], items: pl.DataFrame, validation: pl.DataFrame
) -> None:
    path, report = pruned
    assert load_ranker(path, threads=1).scorer("p", items).score(validation).len() == 120
    assert report.validation_auc > report.parent_validation_auc - 0.05


def test_the_same_seed_gives_the_same_bytes(
    pruned: tuple[Path, PruningReport],
    trained: tuple[Path, TrainingReport],
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
) -> None:
    _prune(trained[0], tmp_path, items, train, validation)
    for file in pruned[0].iterdir():
        again = (tmp_path / file.name).read_bytes()
        assert hashlib.sha256(again).digest() == hashlib.sha256(file.read_bytes()).digest()


def test_a_head_that_does_nothing_has_no_importance(
    trained: tuple[Path, TrainingReport], items: pl.DataFrame, train: pl.DataFrame
) -> None:
    path = trained[0]
    config = read_ranker_config(path)
    encoder, parts = load_encoder(path, config), load_parts(path, config)
    width = prunable_layers(encoder).head_size
    with torch.no_grad():
        encoder.layers[1].attention.output.dense.weight[:, width : 2 * width] = 0
        encoder.layers[0].output.dense.weight[:, 5] = 0
    tokenizer = TextTokenizer(path / "tokenizer.json", parts.max_tokens)
    index = items_in_use(items, [train], 5)
    vectors = encode_texts(TorchRuntime(encoder, 1), tokenizer, index.texts)
    importance = measure_importance(encoder, tokenizer, parts, index, vectors, train, QUICK)
    assert importance[1].heads[1] == 0
    assert (importance[1].heads > 0).sum() == 3
    assert importance[0].channels[5] == 0
    assert importance[0].channels.argmin() == 5


def test_parts_of_all_layers_compete_for_the_target(
    trained: tuple[Path, TrainingReport],
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
) -> None:
    config = PruningConfig(
        allocation="global",
        target_share=0.4,
        channel_multiple=4,
        importance_clicks=64,
        recovery_steps=0,
        threads=1,
    )
    report = _prune(trained[0], tmp_path, items, train, validation, config)
    assert 0.37 < report.kept_share <= 0.4
    assert all(channels % 4 == 0 for channels in report.channels)
    assert min(report.heads) >= 1
    encoder = load_encoder(tmp_path, read_ranker_config(tmp_path))
    shapes = prunable_layers(encoder).shapes
    assert tuple(shape.heads for shape in shapes) == report.heads
    assert tuple(shape.channels for shape in shapes) == report.channels


def test_a_latency_is_reached_by_the_largest_share_that_has_it(
    trained: tuple[Path, TrainingReport],
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def latency(parent: TextEncoder, pruned: TextEncoder, *_: object) -> float:
        """As if only the weights took time."""
        return count_parameters(pruned.layers) / count_parameters(parent.layers)

    monkeypatch.setattr("recflow.compression.allocation.latency_share", latency)
    config = PruningConfig(
        allocation="global",
        target_latency_share=0.6,
        channel_multiple=1,
        importance_clicks=64,
        recovery_steps=0,
        threads=1,
    )
    report = _prune(trained[0], tmp_path, items, train, validation, config)
    assert 0.55 < report.kept_share <= 0.6


def test_a_low_rank_parent_is_refused(
    trained: tuple[Path, TrainingReport], items: pl.DataFrame, tmp_path: Path
) -> None:
    described = read_ranker_config(trained[0])
    encoder, parts = load_encoder(trained[0], described), load_parts(trained[0], described)
    factorise(encoder.transformer, {"encoder.layer.0.output.dense": 3})
    parent, output = tmp_path / "parent", tmp_path / "output"
    for folder in (parent, output):
        folder.mkdir()
    save_ranker(parent, encoder, trained[0] / "tokenizer.json", parts)
    nothing = pl.DataFrame()
    with pytest.raises(ConfigError, match="encoder to prune = 'low-rank'"):
        _prune(parent, output, nothing, nothing, nothing)
    assert list(output.iterdir()) == []


def test_a_share_that_is_not_given_removes_nothing_beside_one_that_is() -> None:
    default = PruningConfig(allocation="uniform")
    assert (default.removed_heads, default.removed_channels) == (1 / 3, 1 / 2)
    one = PruningConfig(allocation="uniform", channel_share=0.3)
    assert (one.removed_heads, one.removed_channels) == (0, 0.3)


@pytest.mark.parametrize(
    "changes",
    [
        {"head_share": 1.0, "allocation": "uniform"},
        {"channel_share": -0.1, "allocation": "uniform"},
        {"head_share": 0, "channel_share": 0, "allocation": "uniform"},
        {"recovery_steps": -1},
        {"learning_rate": 0},
        {"importance_clicks": 0},
        {"channel_multiple": 0},
        {"allocation": "random"},
        {"target_share": 0.5, "allocation": "uniform"},  # which takes the other shares
        {"target_latency_share": 0.5, "allocation": "uniform"},
        {"head_share": 0.5},
        {"channel_share": 0.5},
        {"target_share": 1.0},
        {"target_latency_share": 0.0},
        {"target_share": 0.5, "target_latency_share": 0.5},
    ],
)
def test_impossible_configuration_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        PruningConfig(**changes)  # type: ignore[arg-type]


def test_a_parent_of_another_runtime_is_refused(
    trained: tuple[Path, TrainingReport],
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
) -> None:
    parent, output = tmp_path / "parent", tmp_path / "output"
    for folder in (parent, output):
        folder.mkdir()
    for file in trained[0].iterdir():
        (parent / file.name).write_bytes(file.read_bytes())
    described = json.loads((parent / "config.json").read_text()) | {"runtime": "onnxruntime"}
    (parent / "config.json").write_text(json.dumps(described))
    with pytest.raises(ArtifactError, match="a torch one is needed"):
        _prune(parent, output, items, train, validation)
    assert list(output.iterdir()) == []

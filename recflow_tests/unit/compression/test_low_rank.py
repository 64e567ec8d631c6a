import dataclasses
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from recflow.compression.config import CRITERIA, LowRankConfig
from recflow.compression.export import check_parity, export_encoder
from recflow.compression.low_rank import LowRankReport, factorisable, low_rank_ranker, lower_ranks
from recflow.core.columns import Columns
from recflow.core.errors import ArtifactError, ConfigError
from recflow.modeling.encoder import (
    TextEncoder,
    TorchRuntime,
    build_encoder,
    describe_encoder,
    load_pretrained,
)
from recflow.modeling.layout import read_ranker_config
from recflow.modeling.low_rank import LowRankEmbedding, LowRankLinear, factorise, token_table
from recflow.modeling.onnx_runtime import OnnxRuntime
from recflow.modeling.ranker import load_encoder, load_ranker
from recflow.modeling.texts import TextTokenizer, Vectors, encode_texts
from recflow.modeling.tracking import NullTracker
from recflow.modeling.trainer import TrainingReport
from recflow_tests.unit.compression.rankers import ranker_of_family
from recflow_tests.unit.modeling.families import CONFIGS

QUICK = LowRankConfig(
    ratio=0.5,
    rank_multiple=1,
    recovery_steps=40,
    recovery_batch_size=8,
    learning_rate=5e-4,
    threads=1,
)


@pytest.fixture(scope="module")
def low_rank(
    tmp_path_factory: pytest.TempPathFactory,
    trained: tuple[Path, TrainingReport],
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
) -> tuple[Path, LowRankReport]:
    output = tmp_path_factory.mktemp("low_rank")
    return output, _factorise(trained[0], output, items, train, validation)


def _factorise(
    parent: Path,
    output: Path,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    config: LowRankConfig = QUICK,
) -> LowRankReport:
    return low_rank_ranker(
        parent=parent,
        output=output,
        items=items,
        train=train,
        validation=validation,
        config=config,
        tracker=NullTracker(),
    )


def _vectors(encoder: TextEncoder, base_model: Path, items: pl.DataFrame) -> Vectors:
    tokenizer = TextTokenizer(base_model / "tokenizer.json", 16)
    runtime = TorchRuntime(encoder, 1, mixed=False)
    return encode_texts(runtime, tokenizer, items[Columns.TEXT].to_list())


def _tokens(base_model: Path, items: pl.DataFrame) -> list[list[int]]:
    return TextTokenizer(base_model / "tokenizer.json", 16)(items[Columns.TEXT].to_list())


def test_the_low_rank_ranker_is_smaller_and_recovers(
    low_rank: tuple[Path, LowRankReport],
) -> None:
    _, report = low_rank
    assert 0.48 < report.kept_share <= 0.5
    competing = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    saved = report.parent_parameters - report.parameters
    assert saved == round((1 - report.kept_share) * competing)
    assert report.bytes < report.parent_bytes
    assert report.cosine_before_recovery < report.cosine < 1
    assert report.validation_auc > report.parent_validation_auc - 0.05
    assert report.ranks.keys() == report.errors.keys()
    assert not report.ranks.keys() & set(report.whole)
    assert len(report.ranks) + len(report.whole) == 12
    assert all(0 < error < 1 for error in report.errors.values())
    json.dumps(dataclasses.asdict(report))


def test_the_stored_ranker_loads_with_its_ranks(
    low_rank: tuple[Path, LowRankReport], items: pl.DataFrame, validation: pl.DataFrame
) -> None:
    path, report = low_rank
    encoder = load_encoder(path, read_ranker_config(path))
    for name, rank in report.ranks.items():
        module = encoder.transformer.get_submodule(name)
        assert isinstance(module, LowRankLinear)
        assert module.rank == rank
    assert load_ranker(path, threads=1).scorer("x", items).score(validation).len() == 120


def test_the_same_seed_gives_the_same_bytes(
    low_rank: tuple[Path, LowRankReport],
    trained: tuple[Path, TrainingReport],
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
) -> None:
    _factorise(trained[0], tmp_path, items, train, validation)
    for file in low_rank[0].iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_low_rank_parent_is_refused(
    low_rank: tuple[Path, LowRankReport], items: pl.DataFrame, tmp_path: Path
) -> None:
    nothing = items.clear()
    with pytest.raises(ConfigError, match="encoder to factorise"):
        _factorise(low_rank[0], tmp_path, items, nothing, nothing)
    assert list(tmp_path.iterdir()) == []


def test_the_export_is_the_same_model_with_two_products_a_matrix(
    low_rank: tuple[Path, LowRankReport], base_model: Path, items: pl.DataFrame
) -> None:
    encoder = load_encoder(low_rank[0], read_ranker_config(low_rank[0]))
    tokens = _tokens(base_model, items)
    exported = export_encoder(encoder)
    assert check_parity(encoder, OnnxRuntime(exported, 1), [tokens[:7], tokens], 1e-5) < 1e-5


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_can_be_factorised_stored_and_rebuilt(
    trained: tuple[Path, TrainingReport],
    base_model: Path,
    items: pl.DataFrame,
    tmp_path: Path,
    family: str,
) -> None:
    parent = ranker_of_family(family, trained[0], base_model, tmp_path, adapters=True)
    encoder = load_encoder(parent, read_ranker_config(parent))
    before = _vectors(encoder, base_model, items)
    matrices = factorisable(encoder, embeddings=family != "gemma")
    lower_ranks(encoder, matrices, _tokens(base_model, items), QUICK)
    after = _vectors(encoder, base_model, items)
    assert 0.6 < np.einsum("ij,ij->i", before, after).mean() < 1 - 1e-6
    rebuilt = build_encoder(json.loads(json.dumps(describe_encoder(encoder))))
    rebuilt.load_state_dict(encoder.state_dict())
    np.testing.assert_array_equal(_vectors(rebuilt, base_model, items), after)


def test_a_table_that_does_more_than_look_up_is_refused(
    trained: tuple[Path, TrainingReport], base_model: Path, tmp_path: Path
) -> None:
    parent = ranker_of_family("gemma", trained[0], base_model, tmp_path)
    encoder = load_encoder(parent, read_ranker_config(parent))
    with pytest.raises(ConfigError, match="embeddings"):
        factorisable(encoder, embeddings=True)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_error_falls_as_the_ratio_rises(
    base_model: Path, items: pl.DataFrame, criterion: str
) -> None:
    cosines, errors = [], []
    whole = load_pretrained(base_model)
    targets, tokens = _vectors(whole, base_model, items), _tokens(base_model, items)
    for ratio in (0.3, 0.5, 0.7, 0.9):
        encoder = load_pretrained(base_model)
        matrices = factorisable(encoder, embeddings=True)
        config = dataclasses.replace(QUICK, ratio=ratio, criterion=criterion)
        chosen = lower_ranks(encoder, matrices, tokens, config)
        assert ratio - 0.02 < chosen.kept_share <= ratio
        errors.append(sum(chosen.errors.values()))
        vectors = _vectors(encoder, base_model, items)
        cosines.append(np.einsum("ij,ij->i", vectors, targets).mean())
    assert errors == sorted(errors, reverse=True)
    assert cosines == sorted(cosines)


def test_the_token_table_gets_a_narrow_one_that_keeps_its_rows(
    base_model: Path, items: pl.DataFrame
) -> None:
    encoder = load_pretrained(base_model)
    table = token_table(encoder.transformer)
    config = dataclasses.replace(QUICK, ratio=0.4, criterion="activation")
    lower_ranks(encoder, factorisable(encoder, embeddings=True), _tokens(base_model, items), config)
    factorised = encoder.transformer.get_submodule("embeddings.word_embeddings")
    assert isinstance(factorised, LowRankEmbedding)
    narrow = token_table(encoder.transformer)
    assert (narrow.num_embeddings, narrow.embedding_dim) == (table.num_embeddings, factorised.rank)
    assert narrow.padding_idx == table.padding_idx


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"encoder.layer.0.nothing": 4}, "nothing"),
        ({"encoder.layer.0": 4}, "linear layers"),
        ({"encoder.layer.0.output.dense": 0}, "from 1 to 32"),
        ({"encoder.layer.0.output.dense": 33}, "from 1 to 32"),
    ],
)
def test_impossible_ranks_are_refused(
    base_model: Path, ranks: dict[str, int], message: str
) -> None:
    encoder = load_pretrained(base_model)
    with pytest.raises(ConfigError, match=message):
        factorise(encoder.transformer, ranks)
    description = describe_encoder(encoder) | {"ranks": ranks}
    with pytest.raises(ArtifactError, match=message):
        build_encoder(description)


def test_a_description_without_ranks_is_of_whole_matrices(base_model: Path) -> None:
    description = describe_encoder(load_pretrained(base_model))
    assert description.pop("ranks") == {}
    modules = build_encoder(description).modules()
    assert not any(isinstance(module, LowRankLinear) for module in modules)


def test_a_replaced_layer_keeps_its_bias() -> None:
    biased, plain = nn.Linear(6, 5), nn.Linear(5, 4, bias=False)
    model = nn.Sequential(biased, plain)
    factorise(model, {"0": 2, "1": 3})
    state = model.state_dict()
    assert state.keys() == {
        "0.down.weight",
        "0.up.weight",
        "0.up.bias",
        "1.down.weight",
        "1.up.weight",
    }
    assert torch.equal(state["0.up.bias"], biased.bias)
    assert model(torch.ones(3, 6)).shape == (3, 4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ratio", 0.0),
        ("ratio", 1.0),
        ("ratio", 1.5),
        ("criterion", "size"),
        ("rank_multiple", 0),
        ("calibration_texts", 0),
        ("recovery_steps", -1),
        ("learning_rate", 0),
    ],
)
def test_impossible_configuration_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        LowRankConfig(**{key: value})  # type: ignore[arg-type]

import dataclasses
import json
from pathlib import Path

import polars as pl
import pytest
import torch

from recflow.compression.config import LowRankConfig, SparsificationConfig
from recflow.compression.low_rank import low_rank_ranker
from recflow.compression.sparsify import SparsificationReport, kept_weights, sparsify_ranker
from recflow.compression.spectra import Moments, layer_matrices
from recflow.core.errors import ConfigError
from recflow.modeling.layout import read_ranker_config
from recflow.modeling.ranker import load_encoder, load_ranker
from recflow.modeling.tracking import NullTracker
from recflow.modeling.trainer import TrainingReport

QUICK = SparsificationConfig(
    recovery_steps=40, recovery_batch_size=8, learning_rate=1e-3, threads=1
)
UNSTRUCTURED = dataclasses.replace(QUICK, pattern="unstructured", share=0.7)


@pytest.fixture(scope="module", params=[QUICK, UNSTRUCTURED], ids=["2:4", "unstructured"])
def sparse(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    trained: tuple[Path, TrainingReport],
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
) -> tuple[Path, SparsificationReport, SparsificationConfig]:
    output = tmp_path_factory.mktemp("sparse")
    report = _sparsify(trained[0], output, items, train, validation, request.param)
    return output, report, request.param


def _sparsify(
    parent: Path,
    output: Path,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    config: SparsificationConfig,
) -> SparsificationReport:
    return sparsify_ranker(
        parent=parent,
        output=output,
        items=items,
        train=train,
        validation=validation,
        config=config,
        tracker=NullTracker(),
    )


def test_the_share_is_zero_after_the_recovery_and_the_file_is_smaller(
    sparse: tuple[Path, SparsificationReport, SparsificationConfig],
) -> None:
    path, report, config = sparse
    assert report.zero_share == pytest.approx(config.share, abs=0.01)
    encoder = load_encoder(path, read_ranker_config(path))
    matrices = layer_matrices(encoder)
    assert len(matrices) == 12
    for matrix in matrices.values():
        zeros = (matrix.weight == 0).float()
        assert zeros.mean() == pytest.approx(config.share, abs=0.02)
        if config.pattern == "2:4":
            assert (zeros.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    weights = sum(matrix.weight.numel() for matrix in matrices.values())
    assert report.parent_bytes - report.bytes > 4 * weights * (config.share - 1 / 32) * 0.9
    zeros = round(report.zero_share * weights)
    # The row of the padding token is zero as well.
    assert report.parameters - report.nonzero_parameters >= zeros
    json.dumps(dataclasses.asdict(report))


def test_the_sparse_ranker_recovers_and_loads(
    sparse: tuple[Path, SparsificationReport, SparsificationConfig],
    items: pl.DataFrame,
    validation: pl.DataFrame,
) -> None:
    path, report, _ = sparse
    assert report.cosine_before_recovery < report.cosine < 1
    assert report.validation_auc > report.parent_validation_auc - 0.05
    assert load_ranker(path, threads=1).scorer("x", items).score(validation).len() == 120


def test_the_same_seed_gives_the_same_bytes(
    trained: tuple[Path, TrainingReport],
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
) -> None:
    config = dataclasses.replace(QUICK, recovery_steps=5)
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        _sparsify(trained[0], folder, items, train, validation, config)
    for file in folders[0].iterdir():
        assert (folders[1] / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_low_rank_parent_becomes_sparse_in_its_narrow_matrices(
    trained: tuple[Path, TrainingReport],
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
) -> None:
    parent, output = tmp_path / "parent", tmp_path / "output"
    for folder in (parent, output):
        folder.mkdir()
    low_rank_ranker(
        parent=trained[0],
        output=parent,
        items=items,
        train=train,
        validation=validation,
        config=LowRankConfig(ratio=0.6, rank_multiple=4, recovery_steps=0, threads=1),
        tracker=NullTracker(),
    )
    config = dataclasses.replace(UNSTRUCTURED, share=0.5, recovery_steps=0)
    report = _sparsify(parent, output, items, train, validation, config)
    assert report.zero_share == pytest.approx(0.5, abs=0.01)
    described = read_ranker_config(output)
    assert described["encoder"]["ranks"] == read_ranker_config(parent)["encoder"]["ranks"] != {}
    assert load_ranker(output, threads=1).scorer("x", items).score(validation).len() == 120


def _moments(sizes: list[float]) -> Moments:
    squares = torch.tensor(sizes, dtype=torch.float64).square()
    return Moments(torch.zeros(len(sizes), dtype=torch.float64), squares.diag())


def test_two_of_four_neighbours_stay() -> None:
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.1, 0.0, 0.3, -0.2, 9.0]])
    config = SparsificationConfig()
    kept = kept_weights(weight, config, None)
    # The ninth input is of no whole group.
    assert kept.long().tolist() == [[0, 1, 1, 0, 0, 0, 1, 1, 1]]
    inputs = _moments([9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert kept_weights(weight, config, inputs).long().tolist() == [[1, 1, 0, 0, 0, 0, 1, 1, 1]]


def test_unstructured_compares_all_weights_or_those_of_an_output() -> None:
    weight = torch.tensor([[5.0, 6.0, 7.0, 8.0], [1.0, 2.0, 3.0, 4.0]])
    config = SparsificationConfig(pattern="unstructured", share=0.5)
    assert kept_weights(weight, config, None).long().tolist() == [[1] * 4, [0] * 4]
    alike = _moments([1.0] * 4)
    assert kept_weights(weight, config, alike).long().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    first = _moments([9.0, 1.0, 1.0, 1.0])
    assert kept_weights(weight, config, first).long().tolist() == [[1, 0, 0, 1], [1, 0, 0, 1]]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"pattern": "1:2"}, "pattern"),
        ({"score": "luck"}, "score"),
        ({"share": 0.6}, "share"),  # 2:4 is one half
        ({"pattern": "unstructured", "share": 0.0}, "share"),
        ({"pattern": "unstructured", "share": 1.0}, "share"),
        ({"calibration_texts": 0}, "calibration_texts"),
        ({"recovery_steps": -1}, "recovery_steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_impossible_configuration_is_refused(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        SparsificationConfig(**changes)  # type: ignore[arg-type]

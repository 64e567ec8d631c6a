"""What stored models are, read from their files."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from recflow.adapters.keys import COMPRESSED, FINE_TUNED
from recflow.adapters.served import served_model, served_models
from recflow.compression.budget import Budget
from recflow.compression.family import family_from
from recflow.core.artifacts import Artifact, Manifest
from recflow.core.errors import ArtifactError
from recflow.hardware.inference import ServedModel
from recflow.modeling.architectures import LayerShape
from recflow.modeling.encoder import TextEncoder, describe_encoder, load_pretrained, save_encoder
from recflow.modeling.layout import LAYOUT
from recflow.modeling.low_rank import factorise
from recflow_tests.unit.adapters.test_family_models import DAY, FAMILY, World
from recflow_tests.unit.modeling.tiny import write_base_model

WIDTH, LAYERS, HEADS, CHANNELS = 32, 2, 4, 64
MATRICES = 4 * WIDTH**2 + 2 * WIDTH * CHANNELS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("base"))


def stored(folder: Path, encoder: TextEncoder) -> Path:
    """A PyTorch ranker as far as its encoder goes."""
    folder.mkdir()
    save_encoder(encoder, folder / "model.safetensors")
    described = {
        "layout": LAYOUT,
        "runtime": "torch",
        "max_tokens": 16,
        "parameters": 1,
        "encoder": describe_encoder(encoder),
    }
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def exported(folder: Path, precision: str = "int8_static", size: int = 1_000) -> Path:
    """An ONNX ranker; nothing of its graph is read but its size."""
    folder.mkdir()
    (folder / "model.onnx").write_bytes(bytes(size))
    described = {"layout": LAYOUT, "runtime": "onnxruntime", "precision": precision}
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def artifact(path: Path, **config: object) -> Artifact:
    return Artifact(path, Manifest("models/x", DAY, "", {}, config, {}, {}, "", {}))  # type: ignore[arg-type]


def weights(model: ServedModel) -> float:
    return model.matrix_weights + model.other_weights + model.shape.embedding_parameters


def whole(encoder: TextEncoder) -> None:
    pass


def pruned(encoder: TextEncoder) -> None:
    encoder.architecture.resize(0, LayerShape(1, 24))  # type: ignore[attr-defined]
    encoder.architecture.resize(1, LayerShape(3, 40))  # type: ignore[attr-defined]


def low_rank(encoder: TextEncoder) -> None:
    names = ("encoder.layer.0.attention.self.query", "encoder.layer.1.intermediate.dense")
    factorise(encoder.transformer, dict.fromkeys(names, 4))


def narrow_table(encoder: TextEncoder) -> None:
    factorise(encoder.transformer, {"embeddings.word_embeddings": 8})


def adapted(encoder: TextEncoder) -> None:
    encoder.add_adapter(1, 8)


def projected(encoder: TextEncoder) -> None:
    additions = encoder.transformer.get_submodule("recflow")
    additions["projection"] = nn.Linear(WIDTH, 12, bias=False)  # type: ignore[index]


@pytest.mark.parametrize("change", [whole, pruned, low_rank, narrow_table, adapted, projected])
def test_every_weight_is_counted(
    tmp_path: Path, base: Path, change: Callable[[TextEncoder], None]
) -> None:
    encoder = load_pretrained(base)
    change(encoder)
    path = stored(tmp_path / "model", encoder)
    model = served_model(path)
    assert weights(model) == sum(p.numel() for p in encoder.transformer.parameters())
    assert model.weight_bytes == (path / "model.safetensors").stat().st_size
    assert model.width == (12 if change is projected else WIDTH)
    # The file has a header beside the weights.
    computed = replace(model, weight_bytes=None).stored_bytes
    assert computed < (model.weight_bytes or 0) < computed + 16_384


def test_pruned_layers_count_by_their_mean(tmp_path: Path, base: Path) -> None:
    encoder = load_pretrained(base)
    pruned(encoder)
    shape = served_model(stored(tmp_path / "model", encoder)).shape
    assert (shape.layers, shape.heads, shape.channels) == (LAYERS, 2, 32)  # of (1, 3) and (24, 40)
    assert shape.matrix_parameters == MATRICES / 2


def test_sizes_of_matrices_are_counted_once(tmp_path: Path, base: Path) -> None:
    encoder = load_pretrained(base)
    assert served_model(stored(tmp_path / "whole", encoder)).matrix_sizes == 3
    pruned(encoder)
    # 8 x 32, 32 x 8, 24 x 32, 32 x 24 of layer 0 and, of layer 1, 40 x 32, 32 x 40; its 24
    # dimensions of three heads are sizes that layer 0 has.
    assert served_model(stored(tmp_path / "pruned", encoder)).matrix_sizes == 6


def test_low_rank_share_is_that_of_all_layers(tmp_path: Path, base: Path) -> None:
    encoder = load_pretrained(base)
    low_rank(encoder)
    model = served_model(stored(tmp_path / "model", encoder))
    # 32 x 32 became 4 * (32 + 32), 64 x 32 became 4 * (64 + 32); the others are whole.
    left = LAYERS * MATRICES - (32 * 32 - 4 * 64) - (64 * 32 - 4 * 96)
    assert model.low_rank_share == left / (LAYERS * MATRICES)
    assert model.factorised == 2


def test_zeros_are_those_that_the_file_leaves_out(tmp_path: Path, base: Path) -> None:
    encoder = load_pretrained(base)
    for layer in encoder.layers:
        with torch.no_grad():
            layer.intermediate.dense.weight[:, ::2] = 0.0  # type: ignore[index, union-attr]
    model = served_model(stored(tmp_path / "model", encoder))
    assert model.zero_share == pytest.approx(WIDTH * CHANNELS / 2 / MATRICES)
    assert weights(model) == sum(p.numel() for p in encoder.transformer.parameters())


def test_an_exported_model_has_the_shape_of_its_parent(tmp_path: Path, base: Path) -> None:
    encoder = load_pretrained(base)
    pruned(encoder)
    parent = served_model(stored(tmp_path / "parent", encoder))
    path = exported(tmp_path / "child", "int4", size=1_234)
    child = served_model(artifact(path, block_size=64), exported_from=parent)
    assert child == replace(
        parent, runtime="onnxruntime", precision="int4", weight_bytes=1_234, block_size=64
    )


def test_a_graph_without_its_parent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="PyTorch model that it was exported from is not known"):
        served_model(exported(tmp_path / "alone"))


@pytest.mark.parametrize(
    "change",
    [{"encoder": None}, {"encoder": {"layers": 3}}, {"encoder": []}],
    ids=["none", "no transformer", "no object"],
)
def test_a_description_that_is_none_is_refused(
    tmp_path: Path, base: Path, change: dict[str, object]
) -> None:
    path = stored(tmp_path / "model", load_pretrained(base))
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ArtifactError, match="the encoder's description"):
        served_model(path)


def test_damaged_weights_are_refused(tmp_path: Path, base: Path) -> None:
    path = stored(tmp_path / "model", load_pretrained(base))
    (path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ArtifactError, match="cannot be read as weights"):
        served_model(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def test_a_family(world: World) -> None:
    root = world.store.get(FINE_TUNED, DAY)
    models = {"fine_tuned": root} | {name: world.make(name) for name in FAMILY.variants}
    found = served_models(FAMILY, models)
    assert list(found) == FAMILY.names
    assert weights(found["trimmed"]) < weights(found["fine_tuned"])
    assert found["small"].shape == found["trimmed"].shape
    assert found["small"].precision == "int8_dynamic"
    assert found["small"].weight_bytes == (models["small"].path / "model.onnx").stat().st_size


def test_a_model_whose_parent_is_missing_is_left_out(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    models = {"fine_tuned": world.store.get(FINE_TUNED, DAY), "small": world.make("small")}
    with caplog.at_level(logging.WARNING):
        assert list(served_models(FAMILY, models)) == ["fine_tuned"]
    assert "no plan of serving small: it was exported from trimmed, which is not" in caplog.text


def test_what_a_search_found_is_the_end_of_its_chain(world: World) -> None:
    world.search(Budget(max_megabytes=1e-6))  # nothing fits; the smallest is made all the same
    models = {
        "fine_tuned": world.store.get(FINE_TUNED, DAY),
        "compressed": world.store.get(COMPRESSED, DAY),
    }
    assert models["compressed"].facts["chain"] == ["distill 1", "trim", "quantize int8_static"]
    found = served_models(family_from({}), models)["compressed"]
    parent = served_model(world.store.get("searched/distill1_trim", DAY))
    assert found.shape == parent.shape
    assert found.precision == "int8_static"


def test_reading_loads_no_pytorch() -> None:
    code = "import sys, recflow.adapters.served; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from recflow.core.errors import ArtifactError
from recflow.modeling.encoder import load_pretrained, load_weights, save_encoder
from recflow.modeling.packing import pack, unpack


def _sparse(*shape: int, share: float = 0.5, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    values = torch.randn(shape, generator=generator).to(dtype)
    return values.masked_fill(torch.rand(shape, generator=generator) < share, 0)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("shape", [(7, 13), (8, 8), (1, 3, 5)])
def test_packing_is_exact(shape: tuple[int, ...], share: float, dtype: torch.dtype) -> None:
    tensor = _sparse(*shape, share=share, dtype=dtype)
    tensor.view(-1)[1:3] = torch.tensor([-0.0, torch.nan], dtype=dtype)
    given = {"a.weight": tensor, "a.bias": torch.zeros(4), "ids": torch.zeros(9, 9).long()}
    back = unpack(*pack(given))
    assert back.keys() == given.keys()
    for name, value in given.items():
        assert (back[name].dtype, back[name].shape) == (value.dtype, value.shape)
        assert torch.equal(_bits(back[name]), _bits(value))


def test_only_what_becomes_smaller_is_packed() -> None:
    given = {
        "dense": torch.randn(40, 40),
        "nearly": _sparse(40, 40, share=0.05),
        "bias": _sparse(9),
    }
    written, metadata = pack(given)
    assert written.keys() == given.keys()
    assert metadata == {}
    written, metadata = pack({"sparse": _sparse(64, 64)})
    assert written.keys() == {"sparse.packed_mask", "sparse.packed_values"}
    size = sum(tensor.numel() * tensor.element_size() for tensor in written.values())
    assert size < 0.56 * 64 * 64 * 4
    assert json.loads(metadata["packed"]) == {"sparse": [64, 64]}


def _sparse_encoder(base_model: Path, path: Path) -> dict[str, Tensor]:
    encoder = load_pretrained(base_model)
    with torch.no_grad():
        for layer in encoder.layers:
            weight = layer.get_submodule("output.dense").weight
            weight.copy_(_sparse(*weight.shape))  # type: ignore[operator, misc]
    save_encoder(encoder, path)
    return encoder.transformer.state_dict()


def test_a_sparse_encoder_is_stored_smaller_and_loaded_exactly(
    base_model: Path, tmp_path: Path
) -> None:
    dense, sparse = tmp_path / "dense.safetensors", tmp_path / "sparse.safetensors"
    other = load_pretrained(base_model)
    save_encoder(other, dense)
    expected = _sparse_encoder(base_model, sparse)
    assert sparse.stat().st_size < dense.stat().st_size - 2 * 32 * 64 * 4 * 0.4
    load_weights(other.transformer, sparse)
    for name, value in other.transformer.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    "damage", ["mask missing", "values missing", "value lost", "mask cut", "extra", "not packed"]
)
def test_a_damaged_file_is_refused(base_model: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.safetensors"
    _sparse_encoder(base_model, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    mask = next(name for name in tensors if name.endswith("_mask"))
    values = mask.replace("_mask", "_values")
    if damage == "mask missing":
        del tensors[mask]
    elif damage == "values missing":
        del tensors[values]
    elif damage == "value lost":
        tensors[values] = tensors[values][1:].clone()
    elif damage == "mask cut":
        tensors[mask] = tensors[mask][:-1].clone()
    elif damage == "extra":
        tensors["another"] = torch.zeros(2)
    else:
        metadata = None
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ArtifactError, match="does not hold the weights of this model"):
        load_weights(load_pretrained(base_model).transformer, path)

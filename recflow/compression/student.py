"""Students: encoders with some of a teacher's layers, and of its width where that is asked for.

A student of the teacher's width begins as a copy of the teacher without the layers left out
(DistilBERT, Sanh et al. 2019, https://arxiv.org/abs/1910.01108). A narrower one begins in the
directions in which the teacher's hidden states are largest: one orthonormal basis for all layers,
since the residual connections add them up (SliceGPT, Ashkboos et al. 2024,
https://arxiv.org/abs/2401.15024). There a layer normalisation is no exact image of the teacher's
any more; training has to make up for it. A learnt projection brings the vectors back to the
teacher's width, so that the user model fits both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from recflow.core.errors import ConfigError
from recflow.modeling.architectures import Bert, Electra
from recflow.modeling.encoder import (
    ADDITIONS,
    TextEncoder,
    build_encoder,
    describe_encoder,
    mixed_precision,
)
from recflow.modeling.texts import length_buckets, pad_tokens

# A trained matrix has next to no weight that is exactly zero.
_SPARSE_SHARE: Final = 0.1

# Ends of the names of what reads hidden states, and of what is added to them.
_READ_STATES: Final = (
    "embeddings.weight",
    "query.weight",
    "key.weight",
    "value.weight",
    "intermediate.dense.weight",
    "pooling.query",
)
_WRITE_STATES: Final = ("output.dense.weight", "output.dense.bias")


def choose_layers(teacher_layers: int, layers: int) -> tuple[int, ...]:
    """Layers of the teacher that a student begins with: evenly spread, first and last included.

    The first one reads the embeddings and the last one writes what is pooled. On MovieLens three
    layers of six were nearer to the teacher with the first (0, 2, 5) than without it (1, 3, 5),
    before and after training.

    Args:
        teacher_layers: Layers of the teacher.
        layers: Layers of the student, at most as many.

    Returns:
        Numbers of the layers, lowest first; of a single one, the last.
    """
    if layers == 1:
        return (teacher_layers - 1,)
    return tuple(number * (teacher_layers - 1) // (layers - 1) for number in range(layers))


def require_teachable(teacher: TextEncoder, *, layers: int, width: int) -> None:
    """Raise unless the teacher can have a student of these sizes.

    Args:
        teacher: The teacher.
        layers: Layers of the student.
        width: Width of its hidden states; 0 for the teacher's.

    Raises:
        ConfigError: The student would not be smaller, its width does not fit the attention heads
            or the architecture, or the teacher's matrices were factorised or made sparse, which
            no training of all weights would keep.
    """
    narrower = 0 < width < teacher.width
    most = len(teacher.layers) if narrower else len(teacher.layers) - 1
    if width > teacher.width:
        raise ConfigError.of("width", width, f"0 to {teacher.width}, the teacher's")
    if layers > most:
        raise ConfigError.of("layers", layers, f"1 to {most} for this teacher")
    if narrower:
        _require_narrowable(teacher, width)
    if describe_encoder(teacher).get("ranks"):
        raise ConfigError.of("teacher", "low-rank", "one whose matrices are not factorised yet")
    matrices = [p for p in teacher.layers.parameters() if p.ndim > 1]
    zeros = sum(int((matrix == 0).sum()) for matrix in matrices)
    if zeros > _SPARSE_SHARE * sum(matrix.numel() for matrix in matrices):
        raise ConfigError.of("teacher", "sparse", "one whose weights were not set to zero yet")


def _require_narrowable(teacher: TextEncoder, width: int) -> None:
    architecture = teacher.architecture
    if not isinstance(architecture, Bert) or isinstance(architecture, Electra):
        raise ConfigError.of(
            "width", width, f"0, the teacher's own, for a {teacher.config.model_type}"
        )
    if width % architecture.head_size:
        size = architecture.head_size
        raise ConfigError.of("width", width, f"0 or a multiple of {size}, an attention head")
    if teacher.adapters:
        raise ConfigError.of("width", width, "0, the teacher's own, where layers have adapters")


def build_student(
    teacher: TextEncoder, kept: Sequence[int], basis: Tensor | None = None
) -> TextEncoder:
    """Make a student that begins with layers of the teacher.

    Args:
        teacher: Stays as it is.
        kept: Numbers of the layers, lowest first.
        basis: Orthonormal columns ``[width of the teacher, width of the student]``; None keeps
            the width.

    Raises:
        ConfigError: The layers of this architecture cannot take each other's place.
    """
    description = json.loads(json.dumps(describe_encoder(teacher)))
    sizes = description["transformer"]
    sizes[_name_of(teacher, "num_hidden_layers")] = len(kept)
    if sizes.get("layer_types"):
        sizes["layer_types"] = [sizes["layer_types"][layer] for layer in kept]
    if description["layers"]:
        description["layers"] = [description["layers"][layer] for layer in kept]
    numbers = {str(layer): str(number) for number, layer in enumerate(kept)}
    description["adapters"] = {
        numbers[layer]: width
        for layer, width in description["adapters"].items()
        if layer in numbers
    }
    state = _renumbered(teacher, numbers)
    if basis is not None:
        width = basis.shape[1]
        sizes["num_attention_heads"] = width // _head_size(teacher)
        sizes["hidden_size"] = width
        description["projection"] = teacher.dimension
        state = _narrowed(state, basis)
    student = build_encoder(description)
    try:
        student.transformer.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError.of(
            "teacher", teacher.config.model_type, "a model whose layers are built alike"
        ) from error
    return student


def principal_directions(
    teacher: TextEncoder, tokens: Sequence[list[int]], kept: Sequence[int], width: int
) -> Tensor:
    """The directions that hold most of the hidden states behind the embeddings and kept layers.

    The states are not centred, since their mean has to be represented as well.

    Args:
        teacher: The teacher.
        tokens: Token ids of each text.
        kept: Numbers of the layers.
        width: How many directions.

    Returns:
        Orthonormal columns ``[width of the teacher, width]``, the largest direction first.
    """
    moments = torch.zeros((teacher.width, teacher.width), dtype=torch.float64)
    lengths = torch.tensor([len(text) for text in tokens]).numpy()
    with torch.no_grad():
        for bucket in length_buckets(lengths):
            ids, mask = map(torch.from_numpy, pad_tokens([tokens[text] for text in bucket]))
            with mixed_precision():
                hidden = teacher.embed(ids)
                places, start = [hidden], 0
                for layer in kept:
                    hidden = teacher.run_layers(hidden, mask, start, layer + 1)
                    start = layer + 1
                    places.append(hidden)
            for states in places:
                rows = states[mask].to(torch.float32)
                moments += (rows.T @ rows).to(torch.float64) / rows.square().sum()
    directions = torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :width]
    # An eigenvector's sign is arbitrary: fix it, so that the same texts give the same student.
    largest = directions.abs().argmax(0)
    signs = directions[largest, torch.arange(width)].sign()
    return (directions * signs).to(torch.float32).contiguous()


def _renumbered(teacher: TextEncoder, numbers: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights of the teacher under the names of the student; layers left out are left out."""
    names = {module: name for name, module in teacher.transformer.named_modules()}
    prefixes = tuple(f"{names[module]}." for module in (teacher.layers, teacher.adapters))
    state: dict[str, Tensor] = {}
    for name, value in teacher.transformer.state_dict().items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            state[name] = value
            continue
        layer, rest = name.removeprefix(prefix).split(".", 1)
        if layer in numbers:
            state[f"{prefix}{numbers[layer]}.{rest}"] = value
    return state


def _narrowed(state: Mapping[str, Tensor], basis: Tensor) -> dict[str, Tensor]:
    """Weights of a BERT whose hidden states are the teacher's in another basis."""
    narrow: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith("LayerNorm.weight"):
            # A direction's gain is the mean of those it mixes. Fewer coordinates hold the same sum
            # of squares, so that normalisation makes each of them smaller than the teacher's.
            narrow[name] = (basis.square().T @ value) * (basis.shape[0] / basis.shape[1]) ** 0.5
        elif name.endswith("LayerNorm.bias") or name.endswith(_WRITE_STATES):
            narrow[name] = basis.T @ value
        elif name.endswith(_READ_STATES):
            narrow[name] = value @ basis
        else:
            narrow[name] = value
    projection = f"{ADDITIONS}.projection.weight"
    narrow[projection] = state[projection] @ basis if projection in state else basis
    return {name: value.contiguous() for name, value in narrow.items()}


def _name_of(teacher: TextEncoder, key: str) -> str:
    """What this family's configuration calls a standard key."""
    names: Mapping[str, Any] = getattr(teacher.config, "attribute_map", {})
    return names.get(key, key)


def _head_size(teacher: TextEncoder) -> int:
    architecture = teacher.architecture
    assert isinstance(architecture, Bert)
    return architecture.head_size

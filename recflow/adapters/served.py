"""What stored models are, as plans of serving need it: read from their files, without PyTorch.

A PyTorch model says everything about itself: sizes in its ``config.json``, ranks and zeros in the
header of its weights. An ONNX graph has lost the names of its layers; it has the shape of the
PyTorch model that it was exported from.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from recflow.compression.family import ROOT, Family
from recflow.core.artifacts import Artifact
from recflow.core.errors import ArtifactError, ConfigError
from recflow.hardware.inference import ServedModel
from recflow.hardware.shape import EncoderShape
from recflow.modeling.layout import ONNX_NAME, TORCH, WEIGHTS_NAME, read_ranker_config
from recflow.modeling.texts import TOKENIZER_NAME

logger = logging.getLogger("recflow.hardware")

_ADDED: Final = "recflow."  # what recflow.modeling.encoder adds to a pretrained encoder
_LAYER: Final = re.compile(r"\.\d+\.")
_MATRIX: Final = 2
_MASK, _VALUES = ".packed_mask", ".packed_values"  # of recflow.modeling.packing


def served_models(family: Family, models: Mapping[str, Artifact]) -> dict[str, ServedModel]:
    """What the models of a family are.

    Args:
        family: Says what each model descends from.
        models: Stored models by name; ``compressed``, which a search found, may be among them.

    Returns:
        By name, in the order of ``models``. What cannot be read, or was exported from a model that
        is not among ``models``, is left out; the log says why.
    """
    found: dict[str, ServedModel] = {}
    for name in models:
        try:
            found[name] = _member(name, family, models)
        except (ArtifactError, ConfigError) as error:
            logger.warning("no plan of serving %s: %s", name, error)
    return found


def served_model(
    model: Artifact | Path, *, exported_from: ServedModel | None = None
) -> ServedModel:
    """What a stored model is.

    Args:
        model: The artifact of a ranker, or its directory.
        exported_from: The PyTorch model that an ONNX one was made from.

    Raises:
        ArtifactError: It is no ranker or not whole, or it is an ONNX model and nothing says what
            it was exported from.
        ConfigError: Its family of encoders is not supported.
    """
    path = model if isinstance(model, Path) else model.path
    config = read_ranker_config(path)
    if config["runtime"] == TORCH:
        return _torch_model(path, config)
    if exported_from is None:
        raise ArtifactError(
            f"{path} is an ONNX graph, which says nothing of its layers, and the PyTorch model "
            "that it was exported from is not known"
        )
    made_with = {} if isinstance(model, Path) else model.manifest.config
    block_size = made_with.get("block_size")
    changes = {"block_size": block_size} if isinstance(block_size, int) else {}
    return replace(
        exported_from,
        runtime=config["runtime"],
        precision=str(config.get("precision")),
        weight_bytes=_size(path / ONNX_NAME),
        **changes,
    )


def _member(name: str, family: Family, models: Mapping[str, Artifact]) -> ServedModel:
    """One model; an exported one with the shape of its nearest PyTorch ancestor."""
    model = models[name]
    if read_ranker_config(model.path)["runtime"] == TORCH:
        return served_model(model)
    if name in family.variants:
        parent = family.variants[name].parent
        if parent not in models:
            raise ArtifactError(f"it was exported from {parent}, which is not stored")
        return served_model(model, exported_from=_member(parent, family, models))
    chain = model.facts.get("chain")
    if not isinstance(chain, list) or ROOT not in models:
        raise ArtifactError(f"{model.path} does not say which steps lead to it from {ROOT}")
    start = served_model(models[ROOT])
    return served_model(model, exported_from=_after(start, cast("list[str]", chain), model.path))


def _after(model: ServedModel, chain: list[str], path: Path) -> ServedModel:
    """The model after the steps of a search, in the words of the search's facts.

    Shares are those that were asked for; the steps meet them to within a head or a rank.
    """
    for words in chain:
        step, *options = words.split()
        try:
            match step:
                case "distill":
                    model = replace(model, shape=model.shape.scaled(layers=int(options[-1])))
                case "prune":
                    share = float(options[-1])
                    model = replace(model, shape=model.shape.scaled(layer_share=share))
                case "low_rank":
                    model = replace(model, low_rank_share=float(options[-1]))
                case "trim":
                    tokens = _tokens(path / TOKENIZER_NAME)
                    model = replace(model, shape=model.shape.scaled(vocabulary=tokens))
                case "quantize":
                    pass  # the file itself says what it is
                case _:
                    raise ArtifactError(f"{path} was made by an unknown step: {words}")
        except (IndexError, ValueError) as error:
            raise ArtifactError(f"{path} was made by a step of unknown size: {words}") from error
    return model


def _tokens(file: Path) -> int:
    """Tokens of a vocabulary."""
    try:
        return Tokenizer.from_file(str(file)).get_vocab_size()
    except Exception as error:  # tokenizers raises plain Exception for whatever is wrong
        raise ArtifactError(f"{file} is not a tokenizer: {error}") from error


@dataclass(frozen=True, slots=True)
class _Header:
    """The tensors of a file of weights.

    Attributes:
        shapes: By name, as they are once the file is loaded.
        zeros: Weights that the file leaves out because they are zero.
    """

    shapes: Mapping[str, list[int]]
    zeros: int

    def weights(self, name: str) -> int:
        """Weights of one tensor."""
        return math.prod(self.shapes[name])

    def matrix_sizes(self) -> int:
        """Distinct sizes among the matrices of the layers, whose names have the layer's number."""
        sizes = {
            tuple(shape)
            for name, shape in self.shapes.items()
            if len(shape) == _MATRIX and not name.startswith(_ADDED) and _LAYER.search(name)
        }
        return max(1, len(sizes))


def _torch_model(path: Path, config: Mapping[str, Any]) -> ServedModel:
    try:
        encoder = config["encoder"]
        shape = EncoderShape.from_config(encoder["transformer"])
        layers = [(int(each["heads"]), int(each["channels"])) for each in encoder["layers"]]
        ranks = {str(name): int(rank) for name, rank in encoder.get("ranks", {}).items()}
        projection = encoder.get("projection")
        header = _read_header(path / WEIGHTS_NAME)
        shape = _with_layers(shape, layers)
        added = sum(header.weights(name) for name in header.shapes if name.startswith(_ADDED))
        shape = replace(shape, top_parameters=shape.top_parameters + added)
        shape, share = _factorised(shape, ranks, header)
        matrices = shape.layers * shape.matrix_parameters * share
        return ServedModel(
            shape,
            precision=str(config.get("precision") or "fp32"),
            weight_bytes=_size(path / WEIGHTS_NAME),
            low_rank_share=share,
            zero_share=min(header.zeros / matrices, 1 - 1e-9),
            dimension=None if projection is None else int(projection),
            matrix_sizes=header.matrix_sizes(),
            factorised=sum(1 for name in ranks if _LAYER.search(name)),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"the encoder's description in {path} cannot be used: {error!r}") from (
            error
        )


def _with_layers(shape: EncoderShape, layers: list[tuple[int, int]]) -> EncoderShape:
    """The shape with as many heads and channels as pruning left in each layer.

    Empty where the family of encoders cannot be pruned; BERT's layers otherwise: queries, keys,
    values and their output, two matrices of the feed-forward part, a bias each, two norms.
    """
    if not layers:
        return shape
    heads = sum(each for each, _ in layers) / len(layers)
    channels = sum(each for _, each in layers) / len(layers)
    attention = heads * shape.head_size
    matrices = 4 * shape.width * attention + 2 * shape.width * channels
    return replace(
        shape,
        layers=len(layers),
        heads=max(1, round(heads)),
        key_value_heads=max(1, round(heads)),
        channels=max(1, round(channels)),
        matrix_parameters=matrices,
        layer_parameters=matrices + 3 * attention + channels + 6 * shape.width,
    )


def _factorised(
    shape: EncoderShape, ranks: Mapping[str, int], header: _Header
) -> tuple[EncoderShape, float]:
    """The shape with a factorised token table, and the share of the layers' weights left."""
    whole = shape.layers * shape.matrix_parameters
    saved = 0
    for name, rank in ranks.items():
        narrow = header.weights(f"{name}.down.weight") + header.weights(f"{name}.up.weight")
        if header.shapes[f"{name}.down.weight"] == [shape.vocabulary, rank]:
            table = shape.vocabulary * shape.embedding_width
            shape = replace(
                shape,
                embedding_width=rank,
                embedding_parameters=shape.embedding_parameters - table + narrow,
            )
        else:
            rows, _ = header.shapes[f"{name}.up.weight"]
            _, columns = header.shapes[f"{name}.down.weight"]
            saved += rows * columns - narrow
    return shape, (whole - saved) / whole


def _read_header(file: Path) -> _Header:
    """Names and sizes of the tensors; no weight is read."""
    try:
        with safe_open(file, framework="numpy") as opened:
            names: list[str] = opened.keys()
            shapes = {name: list(opened.get_slice(name).get_shape()) for name in names}
            packed = json.loads((opened.metadata() or {}).get("packed", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtifactError(f"{file} cannot be read as weights: {error}") from error
    zeros = 0
    for name, shape in cast("dict[str, list[int]]", packed).items():
        shapes.pop(name + _MASK, None)
        kept = math.prod(shapes.pop(name + _VALUES))
        shapes[name] = shape
        zeros += math.prod(shape) - kept
    return _Header(shapes, zeros)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise ArtifactError(f"{file} is missing; rebuild the model") from error

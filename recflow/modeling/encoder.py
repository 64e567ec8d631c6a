"""The text encoder: a BERT-family transformer, mean pooling, unit length.

The transformer is driven layer by layer, so that the hidden states below the lowest trainable
layer can be computed once and kept (:mod:`recflow.modeling.batching`), and so that layers whose
heads and feed-forward channels were removed run through the same code.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from recflow.core.errors import ArtifactError, ConfigError
from recflow.modeling.layout import CONFIG_NAME
from recflow.modeling.texts import TOKENIZER_NAME, TextTokenizer, Vectors, pad_tokens

WEIGHTS_NAME = "model.safetensors"

# Embedding tables are often padded to a multiple of this for faster matrix products.
_VOCABULARY_PADDING = 128
_POOLER = "pooler."


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Size of one transformer layer that may have been pruned.

    Attributes:
        heads: Attention heads left.
        channels: Feed-forward channels left.
    """

    heads: int
    channels: int


class TextEncoder(nn.Module):
    """Token ids to unit vectors.

    Attributes:
        transformer: The Hugging Face model, without pooler.
    """

    def __init__(self, transformer: nn.Module) -> None:
        """Wrap a transformer that has ``embeddings`` and ``encoder.layer``.

        Raises:
            ConfigError: The architecture is another one.
        """
        super().__init__()
        self.transformer = transformer
        layers = getattr(getattr(transformer, "encoder", None), "layer", None)
        if not isinstance(layers, nn.ModuleList) or not hasattr(layers[0], "attention"):
            raise ConfigError.of(
                "encoder architecture",
                type(transformer).__name__,
                "BERT-family models with embeddings and encoder.layer (BERT, RoBERTa, …)",
            )
        self.layers = layers

    @property
    def config(self) -> Any:
        """The Hugging Face configuration."""
        return self.transformer.config

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        return int(self.config.hidden_size)

    @property
    def longest_text(self) -> int:
        """Most tokens the encoder has positions for."""
        embeddings: Any = cast("Any", self.transformer).embeddings
        # RoBERTa's positions begin behind the padding index; BERT's embeddings have no such index.
        first_position = getattr(embeddings, "padding_idx", -1) + 1
        return int(self.config.max_position_embeddings) - first_position

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return int(self.config.hidden_size) // int(self.config.num_attention_heads)

    @property
    def shapes(self) -> list[LayerShape]:
        """Size of each layer."""
        return [
            LayerShape(
                heads=layer.attention.self.query.out_features // self.head_size,
                channels=layer.intermediate.dense.out_features,
            )
            for layer in self._blocks()
        ]

    def _blocks(self) -> list[Any]:
        return cast("list[Any]", list(self.layers))

    def embed(self, ids: Tensor) -> Tensor:
        """Embedding output ``[texts, tokens, dimension]`` of token ids ``[texts, tokens]``."""
        return cast("Any", self.transformer).embeddings(input_ids=ids)

    def run_layers(self, hidden: Tensor, mask: Tensor, start: int, stop: int) -> Tensor:
        """Run layers ``start`` to ``stop - 1``.

        Args:
            hidden: Input of layer ``start``, ``[texts, tokens, dimension]``.
            mask: True where there is a token, ``[texts, tokens]``.
            start: First layer.
            stop: One past the last layer.
        """
        visible = mask[:, None, None, :]
        for layer in self._blocks()[start:stop]:
            hidden = layer(hidden, visible)
        return hidden

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Mean over the tokens, then unit length: ``[texts, dimension]`` float32."""
        weights = mask.unsqueeze(-1).to(torch.float32)
        mean = (hidden.to(torch.float32) * weights).sum(1) / weights.sum(1)
        return functional.normalize(mean, dim=-1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors ``[texts, dimension]`` of token ids ``[texts, tokens]``."""
        hidden = self.run_layers(self.embed(ids), mask, 0, len(self.layers))
        return self.pool(hidden, mask)


@contextmanager
def torch_threads(threads: int | None) -> Generator[None]:
    """Let torch use this many threads inside the block; ``None`` leaves it as it is."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def mixed_precision(wanted: bool = True) -> torch.autocast:
    """Autocast to bfloat16 where the processor multiplies it natively; else a no-op.

    Vectors keep a cosine of .9999 to float32; matrices multiply two to three times as fast.
    """
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast("cpu", torch.bfloat16, enabled=wanted and native)


class TorchRuntime:
    """Executes an encoder with PyTorch, in bfloat16 where the processor has it."""

    def __init__(self, encoder: TextEncoder, threads: int | None, *, mixed: bool = True) -> None:
        """Prepare.

        Args:
            encoder: Used in evaluation mode.
            threads: Threads torch may use; ``None`` leaves that as it is.
            mixed: Whether bfloat16 may be used; else float32.
        """
        self._encoder, self._threads, self._mixed = encoder.eval(), threads, mixed
        self.dimension = encoder.dimension

    def __call__(self, tokens: list[list[int]]) -> Vectors:
        """Encode one padded batch."""
        ids, mask = map(torch.from_numpy, pad_tokens(tokens))
        with torch_threads(self._threads), torch.inference_mode(), mixed_precision(self._mixed):
            return self._encoder(ids, mask).numpy()


def load_pretrained(directory: Path) -> TextEncoder:
    """Load a Hugging Face model directory, refusing what would be initialised at random.

    Args:
        directory: Holds ``config.json``, ``model.safetensors`` and ``tokenizer.json``.

    Raises:
        ArtifactError: The directory, its weights, or some of them are missing, or the tokenizer
            belongs to another vocabulary.
        ConfigError: The architecture is not supported.
    """
    for name in (CONFIG_NAME, WEIGHTS_NAME, TOKENIZER_NAME):
        if not (directory / name).is_file():
            raise ArtifactError(
                f"{directory / name} is missing; a base model is a directory with "
                f"{CONFIG_NAME}, {WEIGHTS_NAME} and {TOKENIZER_NAME}"
            )
    with _quiet_transformers():
        try:
            model, loading = AutoModel.from_pretrained(
                directory,
                add_pooling_layer=False,
                attn_implementation="sdpa",
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                use_safetensors=True,
            )
        except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
            raise ArtifactError(f"{directory} cannot be loaded as an encoder: {error}") from error
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith(_POOLER))
    if missing:
        raise ArtifactError(
            f"{directory / WEIGHTS_NAME} lacks {len(missing)} weights, e.g. {missing[:3]}; "
            "they would be random. Use the complete model."
        )
    encoder = TextEncoder(model).eval()
    check_vocabulary(encoder, TextTokenizer(directory / TOKENIZER_NAME, max_tokens=8))
    return encoder


def check_vocabulary(encoder: TextEncoder, tokenizer: TextTokenizer) -> None:
    """Raise unless the tokenizer's vocabulary is the encoder's.

    Raises:
        ArtifactError: The sizes cannot belong together.
    """
    rows = int(encoder.config.vocab_size)
    if not 0 <= rows - tokenizer.vocabulary_size < _VOCABULARY_PADDING:
        raise ArtifactError(
            f"{tokenizer.path} has {tokenizer.vocabulary_size} tokens but the encoder has "
            f"embeddings for {rows}: the tokenizer belongs to another model"
        )


def describe_encoder(encoder: TextEncoder) -> dict[str, Any]:
    """JSON description from which :func:`build_encoder` makes the same modules."""
    config = json.loads(encoder.config.to_json_string(use_diff=False))
    for key in ("_name_or_path", "transformers_version", "dtype", "architectures"):
        config.pop(key, None)
    return {
        "transformer": config,
        "layers": [{"heads": s.heads, "channels": s.channels} for s in encoder.shapes],
    }


def build_encoder(description: dict[str, Any]) -> TextEncoder:
    """Make an encoder of the described sizes; its weights hold anything until they are loaded.

    Raises:
        ArtifactError: The description is not one of :func:`describe_encoder`.
    """
    try:
        raw = dict(description["transformer"])
        shapes = [LayerShape(int(s["heads"]), int(s["channels"])) for s in description["layers"]]
        config = AutoConfig.for_model(raw.pop("model_type"), **raw)
        with _quiet_transformers(), no_init_weights():
            transformer = AutoModel.from_config(
                config, add_pooling_layer=False, attn_implementation="sdpa"
            )
        encoder = TextEncoder(transformer)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"the encoder's description cannot be used: {error}") from error
    if len(shapes) != len(encoder.layers):
        raise ArtifactError(f"{len(shapes)} layer sizes for {len(encoder.layers)} layers")
    for index, shape in enumerate(shapes):
        resize_layer(encoder, index, shape)
    return encoder.eval()


def resize_layer(encoder: TextEncoder, index: int, shape: LayerShape) -> None:
    """Replace the matrices of one layer by empty ones of ``shape``."""
    layer = cast("Any", encoder.layers[index])
    attention, width = layer.attention, encoder.dimension
    inner = shape.heads * encoder.head_size
    for name in ("query", "key", "value"):
        setattr(attention.self, name, nn.Linear(width, inner))
    attention.self.num_attention_heads = shape.heads
    attention.self.all_head_size = inner
    attention.output.dense = nn.Linear(inner, width)
    layer.intermediate.dense = nn.Linear(width, shape.channels)
    layer.output.dense = nn.Linear(shape.channels, width)


def save_encoder(encoder: TextEncoder, path: Path) -> None:
    """Write the weights under their Hugging Face names, float32."""
    state = encoder.transformer.state_dict()
    save_file({name: value.detach().contiguous() for name, value in state.items()}, path)


def load_weights(module: nn.Module, path: Path) -> None:
    """Load ``path`` into ``module``; every weight must be there, with its shape, and no other.

    Raises:
        ArtifactError: The file is missing, damaged, or of another model.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; rebuild the model")
    try:
        module.load_state_dict(load_file(path), strict=True)
    except (SafetensorError, RuntimeError) as error:
        raise ArtifactError(f"{path} does not hold the weights of this model: {error}") from error


@contextmanager
def _quiet_transformers() -> Generator[None]:
    """Silence the loading report and the progress bar; what is missing is checked above."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()

"""The sizes of a text encoder, read from its ``config.json``: no weights and no PyTorch needed.

The counts follow the layers of Hugging Face's implementations, tensor by tensor; a test builds
every family from its configuration and compares them exactly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from recflow.core.errors import ArtifactError, ConfigError

CONFIG_NAME: Final = "config.json"
_RELATIVE_BUCKETS: Final = 32  # of MPNet's relative positions


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """Sizes of a transformer encoder or decoder that turns texts into vectors.

    Attributes:
        model_type: Family, as ``config.json`` names it.
        layers: Transformer layers.
        width: Width of the hidden states.
        heads: Attention heads of a layer.
        key_value_heads: Heads of keys and values, fewer than ``heads`` with grouped queries.
        head_size: Width of a head.
        channels: Width between the matrices of the feed-forward part.
        gated: Whether that part has a gate, a third matrix.
        vocabulary: Rows of the token embedding table.
        embedding_width: Width of that table.
        positions: Rows of learnt position embeddings; 0 with rotary or relative positions.
        longest_text: Most tokens of a text.
        causal: Whether a token sees the tokens before it only.
        embedding_parameters: Weights of the embeddings, everything below the lowest layer.
        layer_parameters: Weights of one layer, mean of all layers.
        top_parameters: Weights above the last layer, pooling left out.
        matrix_parameters: Weights of one layer's matrices, mean of all layers; the rest of
            ``layer_parameters`` are biases and scales.
    """

    model_type: str
    layers: int
    width: int
    heads: int
    key_value_heads: int
    head_size: int
    channels: int
    gated: bool
    vocabulary: int
    embedding_width: int
    positions: int
    longest_text: int
    causal: bool
    embedding_parameters: int
    layer_parameters: float
    top_parameters: int
    matrix_parameters: float

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> EncoderShape:
        """Read the sizes from the content of a ``config.json``.

        Raises:
            ConfigError: The family is not supported, or a size is missing or impossible.
        """
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in _READERS:
            raise ConfigError.of("model_type", model_type, ", ".join(sorted(_READERS)))
        return _READERS[model_type](_Sizes(config))

    @classmethod
    def read(cls, place: Path) -> EncoderShape:
        """Read the sizes from a ``config.json`` or from the folder that holds one.

        Raises:
            ArtifactError: There is no such file, or it is not JSON.
            ConfigError: The family is not supported, or a size is missing or impossible.
        """
        file = place / CONFIG_NAME if place.is_dir() else place
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{file} cannot be read as a model's configuration: {error}"
            ) from error
        if not isinstance(content, dict):
            raise ArtifactError(f"{file} is not a model's configuration: an object is expected")
        return cls.from_config(content)  # pyright: ignore[reportUnknownArgumentType]

    @property
    def parameters(self) -> int:
        """All weights; the pooler, which recflow does not load, is left out."""
        layers = round(self.layers * self.layer_parameters)
        return self.embedding_parameters + layers + self.top_parameters

    @property
    def attention_width(self) -> int:
        """Width of all heads' queries together."""
        return self.heads * self.head_size

    @property
    def key_value_width(self) -> int:
        """Width of all heads' keys together, or of their values."""
        return self.key_value_heads * self.head_size

    @property
    def is_rotated(self) -> bool:
        """Whether positions turn queries and keys, instead of being added to the tokens."""
        return self.model_type == "modernbert" or self.causal

    @property
    def matrix_kinds(self) -> frozenset[tuple[int, int]]:
        """Inputs and outputs of a layer's matrices; those of the same size count once."""
        w, a, k, c = self.width, self.attention_width, self.key_value_width, self.channels
        if self.model_type == "modernbert":  # joined: queries, keys and values; value and gate
            return frozenset({(w, 3 * a), (a, w), (w, 2 * c), (c, w)})
        return frozenset({(w, a), (w, k), (a, w), (w, c), (c, w)})

    def scaled(
        self,
        *,
        layers: int | None = None,
        layer_share: float = 1.0,
        vocabulary: int | None = None,
    ) -> EncoderShape:
        """The shape after compression.

        Args:
            layers: Layers that are left; ``None`` for all.
            layer_share: Share of each layer's heads and channels that is left.
            vocabulary: Rows of the token table that are left; ``None`` for all.
        """
        rows = self.vocabulary if vocabulary is None else min(vocabulary, self.vocabulary)
        biases = self.layer_parameters - self.matrix_parameters
        return replace(
            self,
            layers=self.layers if layers is None else min(layers, self.layers),
            heads=max(1, round(self.heads * layer_share)),
            key_value_heads=max(1, round(self.key_value_heads * layer_share)),
            channels=max(1, round(self.channels * layer_share)),
            vocabulary=rows,
            embedding_parameters=self.embedding_parameters
            - (self.vocabulary - rows) * self.embedding_width,
            matrix_parameters=self.matrix_parameters * layer_share,
            layer_parameters=self.matrix_parameters * layer_share + biases,
        )


class _Sizes:
    """Numbers of a ``config.json``, checked when they are read."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    @property
    def model_type(self) -> str:
        return str(self._config["model_type"])

    def number(self, *names: str, default: int | None = None) -> int:
        """The first of these keys that is there."""
        for name in names:
            value = self._config.get(name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError.of(name, value, "a whole number from 0 on")
            return value
        if default is None:
            raise ConfigError.of(names[0], None, "a whole number from 1 on")
        return default

    def positive(self, *names: str, default: int | None = None) -> int:
        """Like :meth:`number`, and above 0."""
        value = self.number(*names, default=default)
        if value < 1:
            raise ConfigError.of(names[0], value, "a whole number from 1 on")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._config.get(name, default)
        if not isinstance(value, bool):
            raise ConfigError.of(name, value, "true or false")
        return value


def _bert(sizes: _Sizes) -> EncoderShape:
    """BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, MPNet: post-norm, learnt positions."""
    width, layers = sizes.positive("hidden_size"), sizes.positive("num_hidden_layers")
    heads, channels = sizes.positive("num_attention_heads"), sizes.positive("intermediate_size")
    vocabulary = sizes.positive("vocab_size")
    positions = sizes.positive("max_position_embeddings", default=512)
    is_mpnet = sizes.model_type == "mpnet"
    electra = sizes.model_type == "electra"
    narrow = sizes.positive("embedding_size", default=128) if electra else width
    segments = 0 if is_mpnet else sizes.number("type_vocab_size", default=2)
    table = (vocabulary + positions + segments) * narrow + 2 * narrow
    if narrow != width:
        table += narrow * width + width
    if is_mpnet:
        table += sizes.positive("relative_attention_num_buckets", default=_RELATIVE_BUCKETS) * heads
    # RoBERTa's first positions belong to padding: the configuration counts two more than fit.
    padded = sizes.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet")
    return _shape(
        sizes,
        layers=layers,
        width=width,
        heads=heads,
        channels=channels,
        vocabulary=vocabulary,
        embedding_width=narrow,
        positions=positions,
        longest_text=positions - 2 * padded,
        embeddings=table,
        matrices=4 * width * width + 2 * width * channels,
        others=4 * width + channels + width + 4 * width,
    )


def _distilbert(sizes: _Sizes) -> EncoderShape:
    """DistilBERT: BERT's layers under other names, without segments."""
    width, layers = (
        sizes.positive("dim", "hidden_size"),
        sizes.positive("n_layers", "num_hidden_layers"),
    )
    heads = sizes.positive("n_heads", "num_attention_heads")
    channels = sizes.positive("hidden_dim", "intermediate_size")
    vocabulary, positions = sizes.positive("vocab_size"), sizes.positive("max_position_embeddings")
    return _shape(
        sizes,
        layers=layers,
        width=width,
        heads=heads,
        channels=channels,
        vocabulary=vocabulary,
        embedding_width=width,
        positions=positions,
        longest_text=positions,
        embeddings=(vocabulary + positions) * width + 2 * width,
        matrices=4 * width * width + 2 * width * channels,
        others=4 * width + channels + width + 4 * width,
    )


def _modernbert(sizes: _Sizes) -> EncoderShape:
    """ModernBERT: pre-norm, rotary, gated; no norm before the first layer's attention."""
    width, layers = sizes.positive("hidden_size"), sizes.positive("num_hidden_layers")
    channels, vocabulary = sizes.positive("intermediate_size"), sizes.positive("vocab_size")
    norm = width * (1 + sizes.flag("norm_bias"))
    attention_bias = 4 * width if sizes.flag("attention_bias") else 0
    mlp_bias = 2 * channels + width if sizes.flag("mlp_bias") else 0
    others = attention_bias + mlp_bias + norm + norm * (layers - 1) / layers
    return _shape(
        sizes,
        layers=layers,
        width=width,
        heads=sizes.positive("num_attention_heads"),
        channels=channels,
        vocabulary=vocabulary,
        embedding_width=width,
        positions=0,
        longest_text=sizes.positive("max_position_embeddings"),
        embeddings=vocabulary * width + norm,
        matrices=4 * width * width + 3 * width * channels,
        others=others,
        top=norm,
        gated=True,
    )


def _decoder(sizes: _Sizes) -> EncoderShape:
    """Llama, Mistral, Qwen2, Qwen3, Gemma: pre-norm, rotary, gated, grouped queries, causal."""
    width, layers = sizes.positive("hidden_size"), sizes.positive("num_hidden_layers")
    heads, channels = sizes.positive("num_attention_heads"), sizes.positive("intermediate_size")
    shared = sizes.positive("num_key_value_heads", default=heads)
    size = sizes.positive("head_dim", default=max(1, width // heads))
    vocabulary = sizes.positive("vocab_size")
    query, key = heads * size, shared * size
    others = 2 * width
    if sizes.model_type == "qwen2" or sizes.flag("attention_bias"):
        # Qwen2 has biases at queries, keys and values; attention_bias adds one at the output too.
        others += query + 2 * key + (width if sizes.model_type != "qwen2" else 0)
    if sizes.flag("mlp_bias"):
        others += 2 * channels + width
    if sizes.model_type == "qwen3":
        others += 2 * size
    return _shape(
        sizes,
        layers=layers,
        width=width,
        heads=heads,
        key_value_heads=shared,
        head_size=size,
        channels=channels,
        vocabulary=vocabulary,
        embedding_width=width,
        positions=0,
        longest_text=sizes.positive("max_position_embeddings"),
        embeddings=vocabulary * width,
        matrices=2 * width * query + 2 * width * key + 3 * width * channels,
        others=others,
        top=width,
        gated=True,
        causal=True,
    )


def _shape(
    sizes: _Sizes,
    *,
    layers: int,
    width: int,
    heads: int,
    channels: int,
    vocabulary: int,
    embedding_width: int,
    positions: int,
    longest_text: int,
    embeddings: int,
    matrices: int,
    others: float,
    top: int = 0,
    key_value_heads: int | None = None,
    head_size: int | None = None,
    gated: bool = False,
    causal: bool = False,
) -> EncoderShape:
    return EncoderShape(
        model_type=sizes.model_type,
        layers=layers,
        width=width,
        heads=heads,
        key_value_heads=key_value_heads or heads,
        head_size=head_size or max(1, width // heads),
        channels=channels,
        gated=gated,
        vocabulary=vocabulary,
        embedding_width=embedding_width,
        positions=positions,
        longest_text=longest_text,
        causal=causal,
        embedding_parameters=embeddings,
        layer_parameters=matrices + others,
        top_parameters=top,
        matrix_parameters=matrices,
    )


_READERS: Mapping[str, Callable[[_Sizes], EncoderShape]] = MappingProxyType(
    {
        "bert": _bert,
        "camembert": _bert,
        "distilbert": _distilbert,
        "electra": _bert,
        "gemma": _decoder,
        "llama": _decoder,
        "mistral": _decoder,
        "modernbert": _modernbert,
        "mpnet": _bert,
        "qwen2": _decoder,
        "qwen3": _decoder,
        "roberta": _bert,
        "xlm-roberta": _bert,
    }
)

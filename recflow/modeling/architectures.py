"""Transformer families: how to embed tokens and what each layer must be given besides its input.

Texts are padded on the right. Every mask here lets a token see itself, so that no row of attention
is empty and padding never turns into NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from recflow.core.errors import ConfigError
from recflow.modeling import attention
from recflow.modeling.config import MOST_TOKENS

LayerArguments = dict[str, Any]

_ATTENTION: Mapping[str, Any] = MappingProxyType({"attn_implementation": attention.NAME})
_SLIDING = "sliding_attention"


class Architecture(Protocol):
    """Drives the model of one family layer by layer.

    Attributes:
        causal: Whether a token sees only itself and the tokens before it.
        model_arguments: What ``AutoModel`` is given besides the configuration.
    """

    causal: ClassVar[bool]
    model_arguments: ClassVar[Mapping[str, Any]]

    def __init__(self, model: Any) -> None:
        """Take a Hugging Face model of this family.

        Raises:
            ConfigError: It is configured in a way that is not supported.
        """
        ...

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers, lowest first."""
        ...

    @property
    def final_norm(self) -> nn.Module | None:
        """Normalisation above the last layer; ``None`` where the layers do it themselves."""
        ...

    @property
    def longest_text(self) -> int:
        """Most tokens the model has positions for."""
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """Input of the lowest layer ``[texts, tokens, width]`` of ids ``[texts, tokens]``."""
        ...

    def layer_arguments(self, hidden: Tensor, mask: Tensor) -> list[LayerArguments]:
        """Keyword arguments of each layer.

        Args:
            hidden: Input of any layer, ``[texts, tokens, width]``.
            mask: True where there is a token, ``[texts, tokens]``.
        """
        ...


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Size of one BERT layer that may have been pruned.

    Attributes:
        heads: Attention heads left.
        channels: Feed-forward channels left.
    """

    heads: int
    channels: int


class Bidirectional:
    """What most families whose tokens see the whole text have in common."""

    causal: ClassVar[bool] = False
    model_arguments: ClassVar[Mapping[str, Any]] = _ATTENTION

    def __init__(self, model: Any) -> None:
        """Take the model."""
        self._model = model

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers, lowest first."""
        return self._model.encoder.layer

    @property
    def final_norm(self) -> nn.Module | None:
        """None: each layer ends with its own."""
        return None

    @property
    def longest_text(self) -> int:
        """Most tokens the model has positions for."""
        # RoBERTa's positions begin behind the padding index; BERT's embeddings have no such index.
        first_position = getattr(self._model.embeddings, "padding_idx", -1) + 1
        return int(self._model.config.max_position_embeddings) - first_position

    def embed(self, ids: Tensor) -> Tensor:
        """Input of the lowest layer ``[texts, tokens, width]`` of ids ``[texts, tokens]``."""
        return self._model.embeddings(input_ids=ids)

    def layer_arguments(self, hidden: Tensor, mask: Tensor) -> list[LayerArguments]:
        """Every token sees every token."""
        del hidden
        return [{"attention_mask": mask[:, None, None, :]}] * len(self.layers)


class Bert(Bidirectional):
    """BERT and the models with its layers: RoBERTa, XLM-R, CamemBERT.

    These are the layers whose heads and channels can be removed.
    """

    model_arguments: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {**_ATTENTION, "add_pooling_layer": False}
    )

    def __init__(self, model: Any) -> None:
        """Refuse the decoder variant, whose mask is another one."""
        if getattr(model.config, "is_decoder", False):
            raise ConfigError.of("is_decoder", True, f"false for {model.config.model_type}")
        super().__init__(model)

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        config = self._model.config
        return int(config.hidden_size) // int(config.num_attention_heads)

    @property
    def shapes(self) -> list[LayerShape]:
        """Size of each layer."""
        return [
            LayerShape(
                heads=layer.attention.self.query.out_features // self.head_size,
                channels=layer.intermediate.dense.out_features,
            )
            for layer in cast("list[Any]", list(self.layers))
        ]

    def resize(self, index: int, shape: LayerShape) -> None:
        """Replace the matrices of one layer by empty ones of ``shape``."""
        layer = cast("Any", self.layers[index])
        attention, width = layer.attention, int(self._model.config.hidden_size)
        inner = shape.heads * self.head_size
        for name in ("query", "key", "value"):
            setattr(attention.self, name, nn.Linear(width, inner))
        attention.self.num_attention_heads = shape.heads
        attention.self.all_head_size = inner
        attention.output.dense = nn.Linear(inner, width)
        layer.intermediate.dense = nn.Linear(width, shape.channels)
        layer.output.dense = nn.Linear(shape.channels, width)


class Electra(Bert):
    """BERT's layers over embeddings that may be narrower than they are."""

    model_arguments: ClassVar[Mapping[str, Any]] = _ATTENTION

    def embed(self, ids: Tensor) -> Tensor:
        """Input of the lowest layer ``[texts, tokens, width]`` of ids ``[texts, tokens]``."""
        embedded = super().embed(ids)
        project = getattr(self._model, "embeddings_project", None)
        return embedded if project is None else project(embedded)


class DistilBert(Bidirectional):
    """DistilBERT."""

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers, lowest first."""
        return self._model.transformer.layer


class MPNet(Bidirectional):
    """MPNet: relative positions, shared by all layers, are added to the attention scores."""

    # MPNet has no other implementation in transformers.
    model_arguments: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"attn_implementation": "eager", "add_pooling_layer": False}
    )

    def layer_arguments(self, hidden: Tensor, mask: Tensor) -> list[LayerArguments]:
        """Every token sees every token, by distance."""
        hidden_scores = torch.finfo(torch.float32).min * (~mask).to(torch.float32)
        arguments = {
            "attention_mask": hidden_scores[:, None, None, :],
            "position_bias": self._model.encoder.compute_position_bias(hidden),
        }
        return [arguments] * len(self.layers)


class ModernBert(Bidirectional):
    """ModernBERT: rotary positions; most layers see a window of tokens around each token."""

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers, lowest first."""
        return self._model.layers

    @property
    def final_norm(self) -> nn.Module | None:
        """Normalisation above the last layer."""
        return self._model.final_norm

    def layer_arguments(self, hidden: Tensor, mask: Tensor) -> list[LayerArguments]:
        """Tokens see all tokens, or those at most ``sliding_window`` away."""
        config = self._model.config
        distance, positions = _distances(hidden)
        near = (distance.abs() <= config.sliding_window) & mask[:, None, None, :]
        masks = {
            "full_attention": mask[:, None, None, :],
            # Padding far from the text would see nothing, and attention of nothing is NaN.
            _SLIDING: near | (distance == 0),
        }
        rotations = {
            kind: self._model.rotary_emb(_float32(hidden), positions, kind)
            for kind in set(config.layer_types)
        }
        return [
            {"attention_mask": masks[kind], "position_embeddings": rotations[kind]}
            for kind in config.layer_types
        ]


class Decoder:
    """Decoder-only language models: rotary positions, a token sees the tokens before it.

    The causal mask alone hides the padding, which is on the right, from the tokens.
    """

    causal: ClassVar[bool] = True
    model_arguments: ClassVar[Mapping[str, Any]] = _ATTENTION

    def __init__(self, model: Any) -> None:
        """Refuse the bidirectional variants, whose mask is another one."""
        if not getattr(model.config, "is_causal", True):
            raise ConfigError.of("is_causal", False, f"true for {model.config.model_type}")
        self._model = model

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers, lowest first."""
        return self._model.layers

    @property
    def final_norm(self) -> nn.Module | None:
        """Normalisation above the last layer."""
        return self._model.norm

    @property
    def longest_text(self) -> int:
        """Most tokens the model has positions for."""
        return int(self._model.config.max_position_embeddings)

    def embed(self, ids: Tensor) -> Tensor:
        """Input of the lowest layer ``[texts, tokens, width]`` of ids ``[texts, tokens]``."""
        return self._model.embed_tokens(ids)

    def layer_arguments(self, hidden: Tensor, mask: Tensor) -> list[LayerArguments]:
        """Tokens see those before them, in some layers only the nearest ``sliding_window``."""
        del mask
        distance, positions = _distances(hidden)
        rotation = self._model.rotary_emb(_float32(hidden), positions)
        return [
            {
                "attention_mask": _causal_mask(distance, window),
                "position_embeddings": rotation,
            }
            for window in self._windows()
        ]

    def _windows(self) -> list[int | None]:
        """Tokens each layer looks back; ``None`` where that is more than any text has."""
        config = self._model.config
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or [_SLIDING] * len(self.layers)
        if window is None or window >= MOST_TOKENS:
            return [None] * len(kinds)
        return [window if kind == _SLIDING else None for kind in kinds]


ARCHITECTURES: Mapping[str, type[Architecture]] = MappingProxyType(
    {
        "bert": Bert,
        "camembert": Bert,
        "distilbert": DistilBert,
        "electra": Electra,
        "gemma": Decoder,
        "llama": Decoder,
        "mistral": Decoder,
        "modernbert": ModernBert,
        "mpnet": MPNet,
        "qwen2": Decoder,
        "qwen3": Decoder,
        "roberta": Bert,
        "xlm-roberta": Bert,
    }
)
"""By the ``model_type`` of ``config.json``."""


def find_architecture(model_type: object) -> type[Architecture]:
    """The family of a ``model_type``.

    Raises:
        ConfigError: It is not supported.
    """
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ConfigError.of("model_type", model_type, ", ".join(ARCHITECTURES))
    return ARCHITECTURES[model_type]


def _causal_mask(distance: Tensor, window: int | None) -> Tensor | None:
    """Where a token sees another; ``None`` is all tokens before it, and faster than a mask."""
    if window is None and not torch.onnx.is_in_onnx_export():  # the exporter needs one
        return None
    earlier = distance >= 0
    return earlier if window is None else earlier & (distance < window)


def _distances(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """How far each token is behind each other, ``[tokens, tokens]``; positions ``[1, tokens]``."""
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    return positions[:, None] - positions[None, :], positions[None, :]


def _float32(hidden: Tensor) -> Tensor:
    """Something on the device of ``hidden`` from which rotations become float32, not bfloat16."""
    return hidden.new_empty(0, dtype=torch.float32)

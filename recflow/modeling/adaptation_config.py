"""How an encoder is adapted to the texts of a domain. Loads no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from recflow.core.errors import ConfigError
from recflow.modeling.config import (
    MOST_TOKENS,
    PRECISIONS,
    require_above_zero,
    require_at_least,
    require_one_of,
    require_share,
)

CONTRASTIVE, MASKED_LANGUAGE = "contrastive", "masked_language"
METHODS: Final = (CONTRASTIVE, MASKED_LANGUAGE)


@dataclass(frozen=True, slots=True)
class AdaptationConfig:
    """How to adapt an encoder to texts without labels.

    Attributes:
        method: ``contrastive``: two encodings of a text under dropout attract each other, those of
            other texts repel. ``masked_language``: hidden tokens are guessed from the others.
        tuned_layers: How many of the last layers learn; ``None`` for everything, embeddings
            included.
        max_tokens: Longest text in tokens, special tokens included.
        pooling: How token states become the vector that ``contrastive`` compares.
        learning_rate: Peak learning rate of the encoder.
        weight_decay: AdamW's decoupled weight decay of matrices.
        warmup_share: Share of the steps in which the learning rate rises.
        gradient_clip: Largest gradient norm.
        epochs: Passes over the texts.
        max_steps: Most optimiser steps; 0 leaves the encoder as it is.
        steps_between_validations: Steps between two looks at the held-out texts.
        batch_size: Texts a step.
        dropout: Share of activations and attention weights dropped while adapting.
        temperature: Divides the similarities of ``contrastive``.
        masked_share: Share of the tokens that ``masked_language`` hides.
        precision: ``bf16`` autocast, ``fp32``, or ``auto``: bf16 where the processor has it.
        device: ``auto``, ``cpu``, ``cuda``, or ``cuda:1``.
        threads: Threads torch may use.
        seed: Seed of everything random.
    """

    method: str = CONTRASTIVE
    tuned_layers: int | None = None
    max_tokens: int = 64
    pooling: str = "auto"
    learning_rate: float = 2e-5
    weight_decay: float = 0.01
    warmup_share: float = 0.1
    gradient_clip: float = 1.0
    epochs: int = 1
    max_steps: int = 500
    steps_between_validations: int = 25
    batch_size: int = 64
    dropout: float = 0.1
    temperature: float = 0.05
    masked_share: float = 0.15
    precision: str = "auto"
    device: str = "auto"
    threads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        require_one_of(self, "method", METHODS)
        require_one_of(self, "precision", PRECISIONS)
        if self.tuned_layers is not None:
            require_at_least(self, 1, "tuned_layers")
        if not 4 <= self.max_tokens <= MOST_TOKENS:
            raise ConfigError.of("max_tokens", self.max_tokens, f"4 to {MOST_TOKENS}")
        require_above_zero(self, "learning_rate", "gradient_clip", "temperature")
        require_share(self, "warmup_share")
        require_at_least(self, 0, "weight_decay", "max_steps", "seed")
        require_at_least(self, 1, "epochs", "steps_between_validations", "threads")
        require_at_least(self, 2, "batch_size")
        for key in ("dropout", "masked_share"):
            if not 0 < getattr(self, key) < 1:
                raise ConfigError.of(key, getattr(self, key), "above 0 and below 1")

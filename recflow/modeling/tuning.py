"""Fine-tuning strategies: which weights of the encoder learn.

A strategy marks the trainable weights and returns the lowest layer that has any; everything below
it gives the same hidden states all run long and is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from recflow.core.errors import ConfigError
from recflow.modeling.encoder import TextEncoder

Strategy = Callable[[TextEncoder, int], int]


def _frozen(encoder: TextEncoder, tuned_layers: int) -> int:  # noqa: ARG001
    """Train the user model only."""
    encoder.requires_grad_(False)
    return len(encoder.layers)


def _top_k_layers(encoder: TextEncoder, tuned_layers: int) -> int:
    """Train the last layers."""
    if not 1 <= tuned_layers <= len(encoder.layers):
        raise ConfigError.of(
            "tuned_layers", tuned_layers, f"1 to {len(encoder.layers)}, the encoder's layers"
        )
    encoder.requires_grad_(False)
    lowest = len(encoder.layers) - tuned_layers
    encoder.layers[lowest:].requires_grad_(True)
    return lowest


STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {"frozen": _frozen, "top_k_layers": _top_k_layers}
)
"""By the name used in the configuration."""


def apply_strategy(name: str, encoder: TextEncoder, *, tuned_layers: int) -> int:
    """Mark the encoder's trainable weights.

    Returns:
        The lowest layer with trainable weights; the number of layers where there is none.

    Raises:
        ConfigError: The strategy is unknown or does not fit the encoder.
    """
    if name not in STRATEGIES:
        raise ConfigError.of("strategy", name, ", ".join(sorted(STRATEGIES)))
    return STRATEGIES[name](encoder, tuned_layers)

"""Fine-tuning strategies: which weights of the encoder learn, and what that takes in training.

Strategies that leave the lower layers alone let their output be computed once. Weights that a
strategy adds are drawn from torch's generator, which the training seeds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from recflow.core.errors import ConfigError
from recflow.modeling.config import TuningConfig
from recflow.modeling.encoder import TextEncoder, layer_of

if TYPE_CHECKING:
    from peft import AdaLoraConfig, LoraConfig
    from peft.tuners.lora import LoraLayer

__all__ = ["STRATEGIES", "AdaptiveLowRank", "LowRank", "Tuning", "apply_strategy", "layer_of"]

# peft's name of the one set of matrices it adds.
_ADAPTER = "default"

# AdaLoRA: weight of the orthogonality penalty, and shares of the steps before and after the ranks
# are cut, within the ranges of the paper (appendix C).
_ORTHOGONALITY = 0.1
_FIRST_SHARE = 0.1
_LAST_SHARE = 0.3
_ALLOCATIONS = 100
_LEAST_STEPS = 4


class Tuning:
    """What a strategy did to an encoder; plain weights need nothing more.

    Attributes:
        constant_layers: Number of lowest layers whose output never changes in training; 0: only
            the embeddings' output does not; all layers: nothing learns; ``None``: everything
            changes.
    """

    def __init__(self, constant_layers: int | None) -> None:
        """Remember what is constant."""
        self.constant_layers = constant_layers

    def start(self, steps: int) -> None:
        """Say how many optimiser steps there will be, those before a resume included.

        Raises:
            ConfigError: The strategy needs more.
        """

    def penalty(self) -> Tensor | None:
        """What to add to the loss of a step; ``None`` for nothing."""
        return None

    def after_step(self, step: int) -> None:
        """Follow up optimiser step ``step``, counted from 1; its gradients are still there."""

    def state(self) -> dict[str, Tensor]:
        """What a bit-identical continuation needs besides weights and ``start``."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a :meth:`state`."""

    def merge(self) -> None:
        """Make the encoder an ordinary one with the same output; training is over."""


class LowRank(Tuning):
    """LoRA: a product of two narrow matrices is added to every matrix of the last layers.

    Hu et al. 2021, https://arxiv.org/abs/2106.09685, by peft.
    """

    def __init__(self, encoder: TextEncoder, constant_layers: int, config: LoraConfig) -> None:
        """Add the matrices; nothing else of the encoder learns afterwards."""
        super().__init__(constant_layers)
        from peft import inject_adapter_in_model

        self._transformer = encoder.transformer
        config.target_modules = _matrices(encoder, constant_layers)
        with warnings.catch_warnings():
            # peft asks whether the tied output embeddings of language models are to learn as well.
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            inject_adapter_in_model(config, cast("Any", encoder.transformer), _ADAPTER)

    def merge(self) -> None:
        """Add the products to the matrices and take everything of peft out again."""
        for name, layer in self._added_layers().items():
            layer.merge()
            self._transformer.set_submodule(name, layer.get_base_layer())
        del self._transformer.peft_config

    def _added_layers(self) -> dict[str, LoraLayer]:
        from peft.tuners.lora import LoraLayer

        modules = self._transformer.named_modules()
        return {name: module for name, module in modules if isinstance(module, LoraLayer)}


class AdaptiveLowRank(LowRank):
    """AdaLoRA: the matrices begin with a larger rank and keep it where it matters.

    Zhang et al. 2023, https://arxiv.org/abs/2303.10512, by peft: importance is smoothed over the
    steps, the total rank falls along a cubic curve, and at its end the choice is final.
    """

    def __init__(self, encoder: TextEncoder, constant_layers: int, config: AdaLoraConfig) -> None:
        """Add the matrices; nothing else of the encoder learns afterwards."""
        super().__init__(encoder, constant_layers, config)
        from peft.tuners.adalora.layer import RankAllocator

        self._config = config
        self._allocator = RankAllocator(encoder.transformer, config, _ADAPTER)
        self._steps = _LEAST_STEPS  # until start() knows better
        self._kept: dict[str, list[bool]] = {}

    def start(self, steps: int) -> None:
        """Lay the rank schedule over the steps."""
        if steps < _LEAST_STEPS:
            raise ConfigError.of("steps", steps, f"at least {_LEAST_STEPS} with adalora")
        self._steps = self._config.total_step = steps
        self._config.tinit = int(steps * _FIRST_SHARE)
        self._config.tfinal = max(1, int(steps * _LAST_SHARE))
        self._config.deltaT = max(1, steps // _ALLOCATIONS)

    def penalty(self) -> Tensor | None:
        """Mean distance of the outer matrices from orthogonal ones (equation 4 of the paper)."""
        distances = [
            torch.linalg.matrix_norm(product - torch.eye(len(product), device=product.device))
            for layer in cast("list[Any]", list(self._added_layers().values()))
            for right, left in [(layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER])]
            for product in (right @ right.T, left.T @ left)
        ]
        return _ORTHOGONALITY * torch.stack(distances).mean()

    def after_step(self, step: int) -> None:
        """Update the importances; cut the ranks, and keep what was cut at zero in the end."""
        last_cut = self._steps - self._config.tfinal
        if step > last_cut:
            self._allocator.mask_using_rank_pattern(self._transformer, self._kept)
            return
        _, kept = self._allocator.update_and_allocate(
            self._transformer, step, force_mask=step == last_cut
        )
        if step == last_cut and kept is not None:
            self._kept = kept
            self._allocator.reset_ipt()

    def state(self) -> dict[str, Tensor]:
        """Smoothed importances, or once the choice is final, which ranks were kept."""
        allocator = self._allocator
        return (
            {f"importance/{name}": value.clone() for name, value in allocator.exp_avg_ipt.items()}
            | {
                f"uncertainty/{name}": value.clone()
                for name, value in allocator.exp_avg_unc.items()
            }
            | {f"kept/{name}": torch.tensor(kept) for name, kept in self._kept.items()}
        )

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a :meth:`state`."""
        found: dict[str, dict[str, Tensor]] = {"importance": {}, "uncertainty": {}, "kept": {}}
        for key, value in state.items():
            kind, name = key.split("/", 1)
            found[kind][name] = value
        device = next(self._transformer.parameters()).device
        allocator = self._allocator
        allocator.exp_avg_ipt = {n: v.to(device) for n, v in found["importance"].items()}
        allocator.exp_avg_unc = {n: v.to(device) for n, v in found["uncertainty"].items()}
        # Overwritten by every update, but a name that it lacks would start from zero again.
        allocator.ipt = dict.fromkeys(allocator.exp_avg_ipt)
        self._kept = {name: value.tolist() for name, value in found["kept"].items()}


Strategy = Callable[[TuningConfig, TextEncoder], Tuning]


def _frozen(config: TuningConfig, encoder: TextEncoder) -> Tuning:
    """Train the user model only."""
    del config
    encoder.requires_grad_(False)
    return Tuning(len(encoder.layers))


def _full(config: TuningConfig, encoder: TextEncoder) -> Tuning:
    """Train everything."""
    del config
    encoder.requires_grad_(True)
    return Tuning(None)


def _top_k_layers(config: TuningConfig, encoder: TextEncoder) -> Tuning:
    """Train the last layers, the final norm and the pooling."""
    first = _first_tuned_layer(config, encoder)
    encoder.requires_grad_(False)
    encoder.layers[first:].requires_grad_(True)
    for module in encoder.top:
        module.requires_grad_(True)
    return Tuning(first)


def _lora(config: TuningConfig, encoder: TextEncoder) -> Tuning:
    """Train a product of narrow matrices beside each matrix of the last layers, and the pooling."""
    from peft import LoraConfig

    first = _first_tuned_layer(config, encoder)
    tuning = LowRank(
        encoder, first, LoraConfig(r=config.rank, lora_alpha=cast("int", config.alpha))
    )
    encoder.learnt_pooling.requires_grad_(True)
    return tuning


def _adalora(config: TuningConfig, encoder: TextEncoder) -> Tuning:
    """Train LoRA whose ranks are chosen in training, and the pooling."""
    from peft import AdaLoraConfig

    first = _first_tuned_layer(config, encoder)
    settings = AdaLoraConfig(
        init_r=config.initial_rank,
        target_r=config.rank,
        lora_alpha=cast("int", config.alpha),
        total_step=_LEAST_STEPS,
    )
    tuning = AdaptiveLowRank(encoder, first, settings)
    encoder.learnt_pooling.requires_grad_(True)
    return tuning


def _adapters(config: TuningConfig, encoder: TextEncoder) -> Tuning:
    """Train bottleneck adapters behind the last layers, and the pooling; the adapters stay."""
    first = _first_tuned_layer(config, encoder)
    encoder.requires_grad_(False)
    for layer in range(first, len(encoder.layers)):
        encoder.add_adapter(layer, config.adapter_width)
    encoder.learnt_pooling.requires_grad_(True)
    return Tuning(first)


STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {
        "frozen": _frozen,
        "top_k_layers": _top_k_layers,
        "full": _full,
        "lora": _lora,
        "adalora": _adalora,
        "adapters": _adapters,
    }
)
"""By the name used in the configuration."""


def apply_strategy(config: TuningConfig, encoder: TextEncoder) -> Tuning:
    """Mark the encoder's trainable weights, adding those that the strategy needs.

    Raises:
        ConfigError: The strategy does not fit the encoder.
    """
    return STRATEGIES[config.strategy](config, encoder)


def _first_tuned_layer(config: TuningConfig, encoder: TextEncoder) -> int:
    layers = len(encoder.layers)
    if config.tuned_layers > layers:
        raise ConfigError.of(
            "tuned_layers", config.tuned_layers, f"1 to {layers}, the encoder's layers"
        )
    return layers - config.tuned_layers


def _matrices(encoder: TextEncoder, first_layer: int) -> list[str]:
    """Names, within the transformer, of the matrices of attention and feed-forward."""
    tuned = set(encoder.layers[first_layer:].modules())
    return [
        name
        for name, module in encoder.transformer.named_modules()
        if isinstance(module, nn.Linear) and module in tuned
    ]

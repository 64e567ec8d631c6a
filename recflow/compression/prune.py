"""Structured pruning: attention heads and feed-forward channels are removed, not zeroed.

Importance of a head or channel is the mean size of activation × gradient of the click loss on
training impressions, the first-order estimate of what its removal costs (Michel et al. 2019,
https://arxiv.org/abs/1905.10650; Molchanov et al. 2019, https://arxiv.org/abs/1906.10771). The
matrices left are smaller, so that every runtime is faster. Each layer loses the same share, or the
parts of all layers compete for the weights that stay until a size or a latency is reached
(:mod:`recflow.compression.allocation`). A short training then pulls the vectors
back to the parent's: it needs item texts only.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from recflow.compression.allocation import (
    KeptParts,
    LayerImportance,
    keep_globally,
    keep_uniformly,
    part_weights,
    share_for_latency,
)
from recflow.compression.config import PruningConfig
from recflow.compression.recovery import (
    encode_all,
    encode_tokens,
    evenly_drawn,
    mean_cosine,
    recover,
    validation_auc,
)
from recflow.core.errors import ConfigError
from recflow.core.seeding import make_rng
from recflow.modeling.architectures import Bert, LayerShape
from recflow.modeling.batching import (
    ItemIndex,
    index_impressions,
    items_in_use,
    local_rows,
)
from recflow.modeling.config import ObjectiveConfig
from recflow.modeling.encoder import (
    WEIGHTS_NAME,
    TextEncoder,
    TorchRuntime,
)
from recflow.modeling.layout import read_ranker_config
from recflow.modeling.low_rank import ranks_of
from recflow.modeling.memory import peak_rss_bytes
from recflow.modeling.objectives import per_click_losses
from recflow.modeling.optimiser import deterministic
from recflow.modeling.ranker import (
    Ranker,
    RankerParts,
    count_parameters,
    load_encoder,
    load_parts,
    save_ranker,
)
from recflow.modeling.sampling import click_batch, draw_clicks
from recflow.modeling.texts import (
    TOKENIZER_NAME,
    TextTokenizer,
    Vectors,
)
from recflow.modeling.tracking import Tracker

_OBJECTIVE = ObjectiveConfig()


@dataclass(frozen=True, slots=True)
class PruningReport:
    """What pruning removed and what it cost.

    Attributes:
        heads: Attention heads left in each layer.
        channels: Feed-forward channels left in each layer.
        kept_share: Share of the layers' weights that is left.
        parent_parameters: Weights of the parent's encoder.
        parameters: Weights of the pruned encoder.
        parent_bytes: Size of the parent's encoder weights.
        bytes: Size of the pruned encoder's weights.
        cosine_before_recovery: Mean cosine of item vectors to the parent's, right after removal.
        cosine: The same at the end.
        parent_validation_auc: Mean AUC of the parent on (a part of) validation.
        validation_auc: The pruned ranker's on the same impressions.
        recovery_steps: Optimiser steps of the recovery.
        seconds: Wall time.
        peak_rss_bytes: Peak resident memory of the process so far.
    """

    heads: tuple[int, ...]
    channels: tuple[int, ...]
    kept_share: float
    parent_parameters: int
    parameters: int
    parent_bytes: int
    bytes: int
    cosine_before_recovery: float
    cosine: float
    parent_validation_auc: float
    validation_auc: float
    recovery_steps: int
    seconds: float
    peak_rss_bytes: int


def prune_ranker(
    *,
    parent: Path,
    output: Path,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    config: PruningConfig,
    tracker: Tracker,
) -> PruningReport:
    """Write a ranker with smaller layers.

    Args:
        parent: Directory of a PyTorch ranker.
        output: Existing empty directory.
        items: Item features.
        train: Training impressions; they decide what is important.
        validation: Validation impressions, to report the accuracy.
        config: What to remove, and how to recover.
        tracker: Told the configuration, the distillation loss and the result.

    Raises:
        ArtifactError: The parent is not a complete PyTorch ranker.
        ConfigError: Its encoder has other layers than BERT's, adapters or low-rank matrices, or
            the target cannot be reached.
        ContractError: An impression names an unknown item, or has nothing to learn from.
        PermanentError: A loss or gradient is not a number.
    """
    started = time.monotonic()
    tracker.log_params(asdict(config))
    described = read_ranker_config(parent)
    parts = load_parts(parent, described)
    tokenizer = TextTokenizer(parent / TOKENIZER_NAME, parts.max_tokens)
    with deterministic(config.seed, config.threads):
        teacher = load_encoder(parent, described)
        prunable_layers(teacher)
        index = items_in_use(items, [train], parts.user_model.shape.history_length)
        tokens = tokenizer(index.texts)
        targets = encode_all(teacher, tokens)

        student = load_encoder(parent, described)
        importance = measure_importance(student, tokenizer, parts, index, targets, train, config)
        student = pruned_copy(student, choose_kept(student, importance, tokens, config))
        before = mean_cosine(student, tokens, targets)
        recover(
            student,
            tokens,
            targets,
            config,
            tracker=tracker,
            learning=student.layers.parameters(),  # the embeddings were not touched
        )
        after = mean_cosine(student, tokens, targets)

        save_ranker(output, student, tokenizer.path, parts)
        sample = evenly_drawn(validation, config.max_validation_impressions)
        parent_auc, auc = (
            validation_auc(Ranker(TorchRuntime(encoder, None), tokenizer, parts), items, sample)
            for encoder in (teacher, student)
        )
    tracker.log_metrics({"validation_auc": auc, "cosine": after}, step=config.recovery_steps)
    return PruningReport(
        heads=tuple(shape.heads for shape in prunable_layers(student).shapes),
        channels=tuple(shape.channels for shape in prunable_layers(student).shapes),
        kept_share=count_parameters(student.layers) / count_parameters(teacher.layers),
        parent_parameters=count_parameters(teacher),
        parameters=count_parameters(student),
        parent_bytes=(parent / WEIGHTS_NAME).stat().st_size,
        bytes=(output / WEIGHTS_NAME).stat().st_size,
        cosine_before_recovery=before,
        cosine=after,
        parent_validation_auc=parent_auc,
        validation_auc=auc,
        recovery_steps=config.recovery_steps,
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss_bytes(),
    )


def prunable_layers(encoder: TextEncoder) -> Bert:
    """The architecture of an encoder whose heads and channels can be removed.

    Raises:
        ConfigError: It has other layers than BERT's, adapters behind them, or low-rank matrices.
    """
    if not isinstance(encoder.architecture, Bert):
        raise ConfigError.of(
            "encoder to prune", encoder.config.model_type, "a model with the layers of BERT"
        )
    if encoder.adapters:
        raise ConfigError.of("strategy of the encoder to prune", "adapters", "any other strategy")
    if ranks_of(encoder.transformer):
        raise ConfigError.of("encoder to prune", "low-rank", "one whose matrices are whole")
    return encoder.architecture


def measure_importance(
    encoder: TextEncoder,
    tokenizer: TextTokenizer,
    parts: RankerParts,
    index: ItemIndex,
    vectors: Vectors,
    train: pl.DataFrame,
    config: PruningConfig,
) -> list[LayerImportance]:
    """Estimate what the click loss gains from each head and channel.

    The candidates of sampled clicks are encoded with gradient; histories keep their ``vectors``.
    """
    data = index_impressions(train, index, parts.user_model.shape.history_length)
    data.require_contrasts("training")
    rng = make_rng(config.seed, "importance")
    clicks = draw_clicks(
        data,
        data.contrasting_clicks,
        clicks_per_impression=1,
        max_impressions=len(data),
        rng=rng,
    )
    clicks = clicks[: config.importance_clicks]
    tokens = tokenizer(index.texts)
    kept = torch.from_numpy(vectors)
    features, users = parts.features(index), torch.from_numpy(parts.user_numbers(train))
    encoder.requires_grad_(True)
    with _recorded_importance(encoder) as importance:
        for start in range(0, len(clicks), config.importance_batch_size):
            drawn = clicks[start : start + config.importance_batch_size]
            batch = click_batch(data, drawn, config.negatives, rng)
            rows = batch.distinct_items
            places = np.flatnonzero(np.isin(rows, batch.candidates))
            encoded = encode_tokens(encoder, [tokens[row] for row in rows[places]])
            mixed = kept[rows].index_copy(0, torch.from_numpy(places), encoded)
            scores = parts.user_model(
                parts.user_model.describe_items(mixed, features[rows]),
                local_rows(batch.history, rows),
                local_rows(batch.candidates, rows),
                users[batch.impressions],
            )
            present = torch.from_numpy(batch.candidates >= 0)
            per_click_losses(_OBJECTIVE, scores, present).mean().backward()
    encoder.zero_grad(set_to_none=True)
    return importance


@contextmanager
def _recorded_importance(encoder: TextEncoder) -> Generator[list[LayerImportance]]:
    """Add up |activation × gradient| of every head and channel over the backward passes inside."""
    importance = [
        LayerImportance(torch.zeros(shape.heads), torch.zeros(shape.channels))
        for shape in prunable_layers(encoder).shapes
    ]
    hooks: list[RemovableHandle] = []
    for layer, total in zip(encoder.layers, importance, strict=True):
        block = cast("Any", layer)
        # What goes into these two matrices is exactly the output of the heads and the channels.
        for matrix, sums in (
            (block.attention.output.dense, total.heads),
            (block.output.dense, total.channels),
        ):
            hooks.append(matrix.register_forward_pre_hook(_adder(sums)))
    try:
        yield importance
    finally:
        for hook in hooks:
            hook.remove()


def _adder(sums: Tensor) -> Any:
    """A hook that adds the first-order cost of every part of a matrix' input to ``sums``."""

    def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
        activation = inputs[0]

        def add(gradient: Tensor) -> None:
            cost = (activation.detach() * gradient).float().sum(dim=1)  # over the tokens
            sums.add_(cost.unflatten(-1, (len(sums), -1)).sum(-1).abs().sum(0))

        activation.register_hook(add)

    return hook


def pruned_copy(encoder: TextEncoder, kept: Sequence[KeptParts]) -> TextEncoder:
    """The encoder with the kept parts of its layers only; the encoder itself stays as it is."""
    smaller = copy.deepcopy(encoder)
    for layer, parts in enumerate(kept):
        prune_layer(smaller, layer, parts)
    return smaller


def choose_kept(
    encoder: TextEncoder,
    importance: Sequence[LayerImportance],
    tokens: Sequence[list[int]],
    config: PruningConfig,
) -> list[KeptParts]:
    """What stays of each layer, as the configuration has it.

    Args:
        encoder: The encoder, not pruned.
        importance: Of its layers' parts.
        tokens: Token ids of the texts that the encoder is timed on where its latency is the target.
        config: How much is to stay.

    Raises:
        ConfigError: The target cannot be reached.
    """
    if config.allocation == "uniform":
        return keep_uniformly(importance, config.removed_heads, config.removed_channels)
    weights = part_weights(encoder)

    def kept(share: float) -> list[KeptParts]:
        return keep_globally(importance, weights, share, config.channel_multiple)

    if config.target_latency_share is None:
        return kept(config.kept_share)
    share = share_for_latency(
        encoder,
        lambda share: pruned_copy(encoder, kept(share)),
        tokens,
        config.target_latency_share,
        make_rng(config.seed, "timing"),
    )
    return kept(share)


def prune_layer(encoder: TextEncoder, index: int, kept: KeptParts) -> None:
    """Rebuild one layer with the kept heads and channels only."""
    layer = cast("Any", encoder.layers[index])
    size = prunable_layers(encoder).head_size
    inner = (kept.heads[:, None] * size + torch.arange(size)).flatten()
    attention = layer.attention
    old = {
        name: cast("nn.Linear", module)
        for name, module in (
            ("query", attention.self.query),
            ("key", attention.self.key),
            ("value", attention.self.value),
            ("attention_output", attention.output.dense),
            ("intermediate", layer.intermediate.dense),
            ("output", layer.output.dense),
        )
    }
    shape = LayerShape(heads=len(kept.heads), channels=len(kept.channels))
    prunable_layers(encoder).resize(index, shape)
    for name in ("query", "key", "value"):
        _copy_rows(old[name], getattr(attention.self, name), inner)
    _copy_columns(old["attention_output"], attention.output.dense, inner)
    _copy_rows(old["intermediate"], layer.intermediate.dense, kept.channels)
    _copy_columns(old["output"], layer.output.dense, kept.channels)


def _copy_rows(source: nn.Linear, target: nn.Linear, rows: Tensor) -> None:
    with torch.no_grad():
        target.weight.copy_(source.weight[rows])
        target.bias.copy_(source.bias[rows])


def _copy_columns(source: nn.Linear, target: nn.Linear, columns: Tensor) -> None:
    with torch.no_grad():
        target.weight.copy_(source.weight[:, columns])
        target.bias.copy_(source.bias)

"""Low rank: the matrices of the layers become products of two narrow ones.

Which directions of a matrix's outputs matter is measured on the texts of train, and all matrices
compete for the weights that may stay (:mod:`recflow.compression.spectra`). A matrix that is not
worth it stays whole. A short training then pulls the vectors back to the parent's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl
import torch
from torch import Tensor, nn

from recflow.compression.config import LowRankConfig
from recflow.compression.recovery import (
    encode_all,
    evenly_drawn,
    mean_cosine,
    recover,
    validation_auc,
)
from recflow.compression.spectra import (
    Candidate,
    Moments,
    Spectrum,
    allocate_ranks,
    layer_matrices,
    measure_moments,
    measure_sensitivity,
    output_error,
    output_spectrum,
    token_moments,
)
from recflow.core.errors import ConfigError
from recflow.core.seeding import derive_seed, make_rng
from recflow.modeling.batching import items_in_use
from recflow.modeling.encoder import WEIGHTS_NAME, TextEncoder, TorchRuntime
from recflow.modeling.layout import read_ranker_config
from recflow.modeling.low_rank import LowRankEmbedding, LowRankLinear, factorise, ranks_of
from recflow.modeling.memory import peak_rss_bytes
from recflow.modeling.optimiser import deterministic
from recflow.modeling.ranker import (
    Ranker,
    count_parameters,
    load_encoder,
    load_parts,
    save_ranker,
)
from recflow.modeling.texts import TOKENIZER_NAME, TextTokenizer
from recflow.modeling.tracking import Tracker


@dataclass(frozen=True, slots=True)
class LowRankReport:
    """What the lower ranks saved and what they cost.

    Attributes:
        ranks: Rank of each factorised matrix, by its name in the transformer.
        whole: Matrices that stayed whole.
        errors: Mean squared error of each factorised matrix's outputs as a share of their
            variance, before the recovery.
        kept_share: Share of the competing matrices' weights that is left.
        parent_parameters: Weights of the parent's encoder.
        parameters: Weights of the low-rank encoder.
        parent_bytes: Size of the parent's encoder weights.
        bytes: Size of the low-rank encoder's weights.
        cosine_before_recovery: Mean cosine of item vectors to the parent's, before the recovery.
        cosine: The same at the end.
        parent_validation_auc: Mean AUC of the parent on (a part of) validation.
        validation_auc: The low-rank ranker's on the same impressions.
        recovery_steps: Optimiser steps of the recovery.
        seconds: Wall time.
        peak_rss_bytes: Peak resident memory of the process so far.
    """

    ranks: dict[str, int]
    whole: tuple[str, ...]
    errors: dict[str, float]
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


def low_rank_ranker(
    *,
    parent: Path,
    output: Path,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    config: LowRankConfig,
    tracker: Tracker,
) -> LowRankReport:
    """Write a ranker whose encoder has matrices of lower rank.

    Args:
        parent: Directory of a PyTorch ranker.
        output: Existing empty directory.
        items: Item features.
        train: Training impressions; the texts of their items decide what matters.
        validation: Validation impressions, to report the accuracy.
        config: How much to keep, and how to recover.
        tracker: Told the configuration, the distance to the parent and the result.

    Raises:
        ArtifactError: The parent is not a complete PyTorch ranker.
        ConfigError: It has low-rank matrices already, a token table that does more than look up
            where that is to be factorised, or the ratio cannot be reached.
        ContractError: An impression names an unknown item.
        PermanentError: A loss or gradient is not a number.
    """
    started = time.monotonic()
    tracker.log_params(asdict(config))
    described = read_ranker_config(parent)
    parts = load_parts(parent, described)
    tokenizer = TextTokenizer(parent / TOKENIZER_NAME, parts.max_tokens)
    with deterministic(config.seed, config.threads):
        teacher, student = load_encoder(parent, described), load_encoder(parent, described)
        matrices = factorisable(student, embeddings=config.embeddings)
        index = items_in_use(items, [train], parts.user_model.shape.history_length)
        tokens = tokenizer(index.texts)
        targets = encode_all(teacher, tokens)

        chosen = lower_ranks(student, matrices, tokens, config)
        before = mean_cosine(student, tokens, targets)
        recover(
            student,
            tokens,
            targets,
            config,
            tracker=tracker,
            learning=_learning(student),
        )
        after = mean_cosine(student, tokens, targets)

        save_ranker(output, student, tokenizer.path, parts)
        sample = evenly_drawn(validation, config.max_validation_impressions)
        parent_auc, auc = (
            validation_auc(Ranker(TorchRuntime(encoder, None), tokenizer, parts), items, sample)
            for encoder in (teacher, student)
        )
    tracker.log_metrics({"validation_auc": auc, "cosine": after}, step=config.recovery_steps)
    return LowRankReport(
        ranks=ranks_of(student.transformer),
        whole=tuple(name for name in matrices if name not in chosen.errors),
        errors=chosen.errors,
        kept_share=chosen.kept_share,
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


Matrix = nn.Linear | nn.Embedding


def factorisable(encoder: TextEncoder, *, embeddings: bool) -> dict[str, Matrix]:
    """The matrices that may get a lower rank, by their name in the transformer.

    Args:
        encoder: The encoder.
        embeddings: Whether the token embedding table is one of them.

    Raises:
        ConfigError: The encoder has low-rank matrices already, or the table cannot be factorised.
    """
    if ranks_of(encoder.transformer):
        raise ConfigError.of("encoder to factorise", "low-rank", "one whose matrices are whole")
    matrices: dict[str, Matrix] = {**layer_matrices(encoder)}
    if embeddings:
        table = encoder.transformer.get_input_embeddings()  # type: ignore[operator]
        if type(table) is not nn.Embedding:  # Gemma's, for one, is scaled
            raise ConfigError.of("embeddings", True, f"false for {encoder.config.model_type}")
        names = {module: name for name, module in encoder.transformer.named_modules()}
        matrices[names[table]] = table
    return matrices


@dataclass(frozen=True, slots=True)
class ChosenRanks:
    """What the allocation did.

    Attributes:
        errors: :func:`~recflow.compression.spectra.output_error` of each factorised matrix.
        kept_share: Share of all competing weights that is left.
    """

    errors: dict[str, float]
    kept_share: float


def lower_ranks(
    encoder: TextEncoder,
    matrices: Mapping[str, Matrix],
    tokens: list[list[int]],
    config: LowRankConfig,
) -> ChosenRanks:
    """Choose a rank for every matrix and replace those that are to have a lower one.

    Args:
        encoder: Changed in place.
        matrices: Those of :func:`factorisable`.
        tokens: Token ids of the texts of train.
        config: How much to keep, and by which criterion.

    Raises:
        ConfigError: The ratio cannot be reached.
    """
    rng = make_rng(config.seed, "calibration")
    drawn = rng.permutation(len(tokens))[: config.calibration_texts]
    sample = [tokens[text] for text in drawn]
    moments = _moments(encoder, matrices, tokens, sample)
    sensitivities: dict[str, Tensor] = {}
    if config.criterion == "sensitivity":
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "sensitivity"))
        sensitivities = measure_sensitivity(encoder, matrices, sample, generator)
    aware = config.criterion != "energy"
    weights = {name: _outputs_by_inputs(matrix) for name, matrix in matrices.items()}
    spectra = {
        name: output_spectrum(weight, moments[name] if aware else None, sensitivities.get(name))
        for name, weight in weights.items()
    }
    candidates = {
        name: Candidate(*weights[name].shape, energies=spectrum.energies)
        for name, spectrum in spectra.items()
    }
    ranks = allocate_ranks(candidates, config.ratio, config.rank_multiple)
    biased = {name for name, m in matrices.items() if getattr(m, "bias", None) is not None}
    factorise(encoder.transformer, ranks)
    errors = {}
    for name, rank in ranks.items():
        kept = spectra[name].first(rank)
        mean_kept = aware and name in biased
        module = encoder.transformer.get_submodule(name)
        _set_factors(module, weights[name], kept, moments[name] if mean_kept else None)
        errors[name] = output_error(weights[name], kept, moments[name], mean_kept=mean_kept)
    everything = sum(one.rows * one.columns for one in candidates.values())
    saved = sum(
        one.rows * one.columns - ranks[name] * (one.rows + one.columns)
        for name, one in candidates.items()
        if name in ranks
    )
    return ChosenRanks(errors, 1 - saved / everything)


def _moments(
    encoder: TextEncoder,
    matrices: Mapping[str, Matrix],
    tokens: list[list[int]],
    sample: list[list[int]],
) -> dict[str, Moments]:
    """Moments of the inputs: of matrices on a sample, of a table on all texts."""
    linear = {name: m for name, m in matrices.items() if isinstance(m, nn.Linear)}
    tables = [name for name in matrices if name not in linear]
    return {
        **measure_moments(encoder, linear, sample),
        **{name: token_moments(encoder, tokens) for name in tables},
    }


def _outputs_by_inputs(matrix: Matrix) -> Tensor:
    """The weights as ``[outputs, inputs]``; a table's input is the one-hot token."""
    weight = matrix.weight.detach()
    return weight.T if isinstance(matrix, nn.Embedding) else weight


def _set_factors(
    module: nn.Module, weight: Tensor, kept: Spectrum, moments: Moments | None
) -> None:
    """Keep some directions of the outputs; with ``moments``, the bias keeps their mean."""
    assert isinstance(module, LowRankLinear | LowRankEmbedding)
    matrix = weight.to(torch.float64)
    down = kept.project @ matrix
    # Factors of unlike sizes do not train: one learning rate would be too much for the smaller.
    balance = (down.norm(dim=1) / kept.expand.norm(dim=0)).clamp_min(1e-12).sqrt()
    up, down = kept.expand * balance, down / balance[:, None]
    with torch.no_grad():
        module.up.weight.copy_(up)
        module.down.weight.copy_(down.T if isinstance(module, LowRankEmbedding) else down)
        if moments is not None:
            module.up.bias.add_(kept.lost(matrix) @ moments.mean)


def _learning(encoder: TextEncoder) -> list[nn.Parameter]:
    """Weights of the layers, and the matrix behind a narrow token table."""
    table = encoder.transformer.get_input_embeddings()  # type: ignore[operator]
    behind = list(table.up.parameters()) if isinstance(table, LowRankEmbedding) else []
    return [*encoder.layers.parameters(), *behind]

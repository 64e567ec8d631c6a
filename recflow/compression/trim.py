"""Vocabulary trimming: the embedding table without the tokens that the texts never use.

The table of a small encoder is half of its weights and more, and a catalogue uses a part of its
tokens (Abdaoui et al. 2020, https://arxiv.org/abs/2010.05609). Texts of kept tokens get the same
vectors to the bit. Other texts are spelled with shorter tokens; how many there are, and how far
their vectors move, is measured on texts that the trimming never saw.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import nn

from recflow.compression.config import TrimmingConfig
from recflow.compression.recovery import encode_all, evenly_drawn, validation_auc
from recflow.compression.tokenizer_file import TrimmableTokenizer
from recflow.core.columns import Columns
from recflow.core.errors import ArtifactError, ConfigError, ParityError
from recflow.modeling.batching import ItemIndex, items_in_use, spread
from recflow.modeling.encoder import (
    WEIGHTS_NAME,
    TextEncoder,
    TorchRuntime,
    check_vocabulary,
    torch_threads,
)
from recflow.modeling.layout import read_ranker_config
from recflow.modeling.low_rank import token_table
from recflow.modeling.ranker import (
    Ranker,
    count_parameters,
    load_encoder,
    load_parts,
    save_ranker,
)
from recflow.modeling.texts import TOKENIZER_NAME, Rows, TextTokenizer
from recflow.modeling.tracking import Tracker


@dataclass(frozen=True, slots=True)
class VocabularyRisk:
    """What a smaller vocabulary does to texts that did not choose it.

    Attributes:
        texts: Texts looked at.
        changed_texts: Share of them that are cut into other tokens than before.
        lost_tokens: Share of their tokens that the smaller vocabulary lacks.
        more_unknown_texts: Share of the texts with more unknown tokens than before.
        mean_cosine: Mean cosine between the old and the new vectors of (a part of) the changed
            texts; 1 where none changed.
        lowest_cosine: Lowest of them.
    """

    texts: int
    changed_texts: float
    lost_tokens: float
    more_unknown_texts: float
    mean_cosine: float
    lowest_cosine: float


@dataclass(frozen=True, slots=True)
class TrimmingReport:
    """What trimming removed, and what it risks.

    Attributes:
        parent_tokens: Rows of the parent's embedding table.
        tokens: Rows of the trimmed one.
        seen_tokens: Tokens kept because the texts of train have them often enough; the rest are
            common ones, or needed to reach others.
        always_kept: Tokens kept in any case: special ones, characters.
        parent_parameters: Weights of the parent's encoder.
        parameters: Weights of the trimmed encoder.
        parent_bytes: Size of the parent's encoder weights.
        bytes: Size of the trimmed encoder's weights.
        train: The effect on the texts of train; none unless rare tokens are dropped.
        estimated: The effect on the half of train's texts that appeared later, were the vocabulary
            chosen from those that appeared earlier.
        unseen: The effect on the texts of validation that train does not have.
        parent_validation_auc: Mean AUC of the parent on (a part of) validation.
        validation_auc: The trimmed ranker's on the same impressions.
        estimated_validation_auc: The same, were the vocabulary chosen from the texts that appeared
            earlier: the accuracy when half of the catalogue is newer than the vocabulary.
        seconds: Wall time.
    """

    parent_tokens: int
    tokens: int
    seen_tokens: int
    always_kept: int
    parent_parameters: int
    parameters: int
    parent_bytes: int
    bytes: int
    train: VocabularyRisk
    estimated: VocabularyRisk
    unseen: VocabularyRisk
    parent_validation_auc: float
    validation_auc: float
    estimated_validation_auc: float
    seconds: float


def trim_ranker(
    *,
    parent: Path,
    output: Path,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    config: TrimmingConfig,
    tracker: Tracker,
) -> TrimmingReport:
    """Write a ranker that knows fewer tokens.

    Args:
        parent: Directory of a PyTorch ranker.
        output: Existing empty directory.
        items: Item features.
        train: Training impressions; the texts of their items choose the tokens.
        validation: Validation impressions, to report the risk and the accuracy.
        config: Which tokens stay.
        tracker: Told the configuration and the result.

    Raises:
        ArtifactError: The parent is not a complete PyTorch ranker.
        ConfigError: Its tokenizer is neither WordPiece nor BPE nor Unigram.
        ContractError: An impression names an unknown item, or validation has nothing to compare.
        ParityError: The trimmed tokenizer cuts a text of kept tokens otherwise.
    """
    started = time.monotonic()
    tracker.log_params(asdict(config))
    described = read_ranker_config(parent)
    source = TrimmableTokenizer(parent / TOKENIZER_NAME)
    encoder = load_encoder(parent, described)
    parts = load_parts(parent, described)
    tokenizer = TextTokenizer(parent / TOKENIZER_NAME, parts.max_tokens)
    check_vocabulary(encoder, tokenizer)
    history_length = parts.user_model.shape.history_length
    index = items_in_use(items, [train], history_length)
    choice = _Choice(source, _fixed_numbers(encoder), parts.max_tokens, config)

    seen = choice.seen(index.texts)
    kept = choice.complete(seen)
    with tempfile.TemporaryDirectory() as folder:
        smaller = _write_tokenizer(source, kept, Path(folder), parts.max_tokens)
        check_same_tokens(tokenizer, smaller, kept, index.texts)
        trimmed = load_encoder(parent, described)
        trim_encoder(trimmed, kept)
        check_vocabulary(trimmed, smaller)
        save_ranker(output, trimmed, smaller.path, parts)
        # Were the vocabulary chosen earlier: what would it do to the texts that came later?
        earlier, later = _halves(index, train, history_length)
        chosen = choice.complete(choice.seen(earlier))
        chosen_earlier = _write_tokenizer(source, chosen, Path(folder), parts.max_tokens)
    trimmed_earlier = load_encoder(parent, described)
    trim_encoder(trimmed_earlier, chosen)

    known = set(index.ids)
    shown = items_in_use(items, [validation], history_length)
    unseen = [t for i, t in zip(shown.ids, shown.texts, strict=True) if i not in known]
    sample = evenly_drawn(validation, config.max_validation_impressions)
    with torch_threads(config.threads):
        measure = _RiskMeasure(encoder, tokenizer, source.unknown, config.max_texts)
        parent_auc, auc, estimated_auc = (
            validation_auc(Ranker(TorchRuntime(model, None), words, parts), items, sample)
            for model, words in (
                (encoder, tokenizer),
                (trimmed, smaller),
                (trimmed_earlier, chosen_earlier),
            )
        )
        report = TrimmingReport(
            parent_tokens=int(encoder.config.vocab_size),
            tokens=len(kept),
            seen_tokens=len(seen - source.always_kept),
            always_kept=len(source.always_kept),
            parent_parameters=count_parameters(encoder),
            parameters=count_parameters(trimmed),
            parent_bytes=(parent / WEIGHTS_NAME).stat().st_size,
            bytes=(output / WEIGHTS_NAME).stat().st_size,
            train=measure(smaller, kept, index.texts),
            estimated=measure(chosen_earlier, chosen, later),
            unseen=measure(smaller, kept, unseen),
            parent_validation_auc=parent_auc,
            validation_auc=auc,
            estimated_validation_auc=estimated_auc,
            seconds=time.monotonic() - started,
        )
    metrics = {
        "validation_auc": auc,
        "tokens": len(kept),
        "unseen_changed_texts": report.unseen.changed_texts,
    }
    tracker.log_metrics(metrics, step=0)
    return report


def trim_encoder(encoder: TextEncoder, kept: Rows) -> None:
    """Keep some rows of the embedding table, full or low-rank.

    Args:
        encoder: Changed in place, its configuration too.
        kept: Numbers of the rows, in the order of their new numbers.

    Raises:
        ArtifactError: The table has no such row.
        ConfigError: The encoder numbers its positions from the padding token on, and that token
            would get another number.
    """
    table, config = token_table(encoder.transformer), encoder.config
    if kept.max() >= table.num_embeddings:
        raise ArtifactError(
            f"token {kept.max()} has no row in the embedding table of {table.num_embeddings}"
        )
    numbers = {int(old): new for new, old in enumerate(kept)}
    first_position = _position_padding(encoder)
    if first_position is not None and numbers.get(first_position) != first_position:
        raise ConfigError.of("kept tokens", len(kept), f"with all tokens up to {first_position}")
    rows = table.weight.detach()[torch.from_numpy(kept)]
    table.weight = nn.Parameter(rows, requires_grad=table.weight.requires_grad)
    table.num_embeddings = len(kept)
    if table.padding_idx is not None:
        table.padding_idx = numbers.get(table.padding_idx)
    named = _token_numbers(encoder)  # before the table is smaller: it says which numbers are tokens
    config.vocab_size = len(kept)
    for key, value in named.items():
        new = [numbers.get(old) for old in value]
        setattr(config, key, new if isinstance(getattr(config, key), list) else new[0])


def check_same_tokens(
    tokenizer: TextTokenizer, trimmed: TextTokenizer, kept: Rows, texts: Sequence[str]
) -> None:
    """Raise unless texts of kept tokens have the same tokens, renumbered.

    Args:
        tokenizer: That of the parent.
        trimmed: The one with fewer tokens.
        kept: Old number of each of its tokens.
        texts: Texts to compare; those with a token that is not kept are passed over.

    Raises:
        ParityError: Quotes the first text with other tokens.
    """
    known = set(kept.tolist())
    for text, old, new in zip(texts, tokenizer(texts), trimmed(texts), strict=True):
        if known.issuperset(old) and kept[new].tolist() != old:
            raise ParityError(
                f"the trimmed tokenizer of {len(kept)} tokens cuts {text!r} otherwise, though all "
                "its tokens are kept; it is not written"
            )


@dataclass(frozen=True, slots=True)
class _Choice:
    """How the tokens that stay are chosen.

    Attributes:
        source: The vocabulary.
        fixed: Tokens that the encoder refers to by number.
        max_tokens: Longest text.
        config: How often a token must occur, and how many common ones stay.
    """

    source: TrimmableTokenizer
    fixed: set[int]
    max_tokens: int
    config: TrimmingConfig

    def seen(self, texts: Sequence[str]) -> set[int]:
        """Tokens that occur often enough."""
        counts = np.zeros(self.source.size, dtype=np.int64)
        for tokens in self.source.words(texts, self.max_tokens):
            np.add.at(counts, tokens, 1)
        return set(np.flatnonzero(counts >= self.config.min_count).tolist())

    def complete(self, seen: set[int]) -> Rows:
        """These tokens and all that stay besides, in the order of their new numbers."""
        common = self.source.most_common(self.config.common_tokens)
        return self.source.select(seen | common | self.fixed)


class _RiskMeasure:
    """Compares a smaller vocabulary with the parent's."""

    def __init__(
        self, encoder: TextEncoder, tokenizer: TextTokenizer, unknown: int | None, max_texts: int
    ) -> None:
        self._encoder, self._tokenizer = encoder, tokenizer
        self._unknown, self._max_texts = unknown, max_texts

    def __call__(self, trimmed: TextTokenizer, kept: Rows, texts: Sequence[str]) -> VocabularyRisk:
        """The effect on ``texts``, in the parent's numbers, so with the parent's encoder."""
        before = self._tokenizer(texts)
        after = [kept[tokens].tolist() for tokens in trimmed(texts)]
        pairs = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
        known = set(kept.tolist())
        lost = sum(token not in known for tokens in before for token in tokens)
        unknown = sum(self._count_unknown(new) > self._count_unknown(old) for old, new in pairs)
        compared = [pairs[place] for place in spread(len(pairs), self._max_texts)]
        cosines = np.einsum(
            "ij,ij->i",
            encode_all(self._encoder, [old for old, _ in compared]),
            encode_all(self._encoder, [new for _, new in compared]),
        )
        return VocabularyRisk(
            texts=len(texts),
            changed_texts=len(pairs) / max(len(texts), 1),
            lost_tokens=lost / max(sum(map(len, before)), 1),
            more_unknown_texts=unknown / max(len(texts), 1),
            mean_cosine=float(cosines.mean()) if pairs else 1.0,
            lowest_cosine=float(cosines.min()) if pairs else 1.0,
        )

    def _count_unknown(self, tokens: list[int]) -> int:
        return 0 if self._unknown is None else tokens.count(self._unknown)


def _write_tokenizer(
    source: TrimmableTokenizer, kept: Rows, folder: Path, max_tokens: int
) -> TextTokenizer:
    file = folder / TOKENIZER_NAME
    file.write_text(source.cut(kept), encoding="utf-8")
    return TextTokenizer(file, max_tokens)


def _halves(
    index: ItemIndex, train: pl.DataFrame, history_length: int
) -> tuple[list[str], list[str]]:
    """Texts of the items that appeared first in train, and of those that appeared later."""
    lists = (train[Columns.HISTORY].list.tail(history_length), train[Columns.CANDIDATES])
    rows = [index.ragged(ids) for ids in lists]
    impressions = np.concatenate([np.repeat(np.arange(len(r)), r.lengths) for r in rows])
    times = train[Columns.TIME].rank("dense").cast(pl.Int64).to_numpy()
    first = np.full(len(index), np.iinfo(np.int64).max)
    np.minimum.at(first, np.concatenate([r.values for r in rows]), times[impressions])
    order = np.argsort(first, kind="stable")
    texts = [index.texts[row] for row in order]
    return texts[: len(texts) // 2], texts[len(texts) // 2 :]


def _fixed_numbers(encoder: TextEncoder) -> set[int]:
    """Tokens that the encoder refers to by number."""
    named = {number for numbers in _token_numbers(encoder).values() for number in numbers}
    first_position = _position_padding(encoder)
    return named if first_position is None else named | set(range(first_position + 1))


def _token_numbers(encoder: TextEncoder) -> dict[str, list[int]]:
    """Token numbers in the encoder's configuration that belong to its table, by their key."""
    found: dict[str, list[int]] = {}
    rows = int(encoder.config.vocab_size)
    for key, value in encoder.config.to_dict().items():
        numbers = value if isinstance(value, list) else [value]
        if key.endswith("_token_id") and all(isinstance(n, int) and n < rows for n in numbers):
            found[key] = numbers
    return found


def _position_padding(encoder: TextEncoder) -> int | None:
    """The padding token behind which positions are numbered, as in RoBERTa; else None."""
    embeddings: Any = getattr(encoder.transformer, "embeddings", None)
    return getattr(embeddings, "padding_idx", None)

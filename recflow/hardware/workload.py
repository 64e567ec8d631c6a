"""What a training reads and what a service answers, as far as it decides memory and time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

from recflow.core.errors import ConfigError

# Quantiles that stand for a distribution of lengths.
_QUANTILES: Final = 64
_ZIPF_GROUPS: Final = 32


@dataclass(frozen=True, slots=True)
class TextLengths:
    """Lengths of texts in tokens, special tokens included.

    Attributes:
        quantiles: Equally likely lengths, ascending.
    """

    quantiles: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raise ConfigError where there is no length, or an impossible one."""
        if not self.quantiles or min(self.quantiles) < 1:
            raise ConfigError.of("quantiles", self.quantiles, "one or more lengths from 1 on")

    @classmethod
    def of(cls, lengths: Sequence[int]) -> TextLengths:
        """The distribution of measured lengths."""
        ordered = sorted(lengths)
        if not ordered:
            raise ConfigError.of("lengths", [], "at least one text")
        step = len(ordered) / _QUANTILES
        return cls(tuple(ordered[int((i + 0.5) * step)] for i in range(_QUANTILES)))

    @classmethod
    def typical(cls, mean: float, longest: int, spread: float = 0.35) -> TextLengths:
        """A log-normal distribution, cut at ``longest``: titles and abstracts look like that.

        Args:
            mean: Mean length before the cut.
            longest: Longest text.
            spread: Standard deviation of the logarithm.
        """
        from statistics import NormalDist

        normal = NormalDist(math.log(mean) - spread**2 / 2, spread)
        points = ((i + 0.5) / _QUANTILES for i in range(_QUANTILES))
        drawn = (round(math.exp(normal.inv_cdf(point))) for point in points)
        return cls(tuple(min(longest, max(3, length)) for length in drawn))

    def cut(self, longest: int) -> TextLengths:
        """The same texts cut at ``longest`` tokens."""
        return TextLengths(tuple(min(length, longest) for length in self.quantiles))

    @property
    def mean(self) -> float:
        """Mean length."""
        return sum(self.quantiles) / len(self.quantiles)

    def drawn(self, texts: int) -> list[int]:
        """Lengths of so many texts, as the distribution expects them, ascending."""
        step = len(self.quantiles) / texts
        return [self.quantiles[int((i + 0.5) * step)] for i in range(texts)]

    def batches(
        self, texts: int, size: int, *, buckets: bool = True, padded_to: int | None = None
    ) -> list[tuple[int, int]]:
        """Texts and padded tokens a text of each batch that so many texts are encoded in.

        Args:
            texts: How many.
            size: Most texts of a batch.
            buckets: Whether texts of similar length share a batch.
            padded_to: Length that all are padded to; ``None`` for the longest of the batch.
        """
        return list(_batches(self, texts, size, buckets, padded_to))


# The same texts are planned for on every device.
@lru_cache(maxsize=1024)
def _batches(
    distribution: TextLengths, texts: int, size: int, buckets: bool, padded_to: int | None
) -> tuple[tuple[int, int], ...]:
    lengths = distribution.drawn(texts) if texts else []
    if not buckets:
        # Any order of the texts: the expected longest of a batch is that of a spread sample.
        longest = distribution.drawn(min(size, texts))[-1] if texts else 0
        lengths = [longest] * texts
    found: list[tuple[int, int]] = []
    for start in range(0, texts, size):
        batch = lengths[start : start + size]
        found.append((len(batch), padded_to or batch[-1]))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Popularity:
    """How often items occur, by groups of about equally frequent ones.

    Attributes:
        groups: Items of each group, and the share of all occurrences that falls on the group.
    """

    groups: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, counts: Sequence[int]) -> Popularity:
        """From how often each item occurs; items that do not occur are left out."""
        ordered = sorted((count for count in counts if count > 0), reverse=True)
        return cls._grouped([float(count) for count in ordered])

    @classmethod
    def zipf(cls, items: int, exponent: float = 0.8) -> Popularity:
        """The ``r``-th most frequent of the items occurs in proportion to ``r ** -exponent``."""
        if items < 1:
            raise ConfigError.of("items", items, "at least 1")
        groups: list[tuple[int, float]] = []
        edges = sorted({round(items ** (i / _ZIPF_GROUPS)) for i in range(_ZIPF_GROUPS + 1)} | {0})
        for low, high in itertools.pairwise(edges):
            middle = math.sqrt((low + 0.5) * (high + 0.5))
            groups.append((high - low, (high - low) * middle**-exponent))
        total = sum(share for _, share in groups)
        return cls(tuple((count, share / total) for count, share in groups))

    @classmethod
    def _grouped(cls, ordered: list[float]) -> Popularity:
        if not ordered:
            raise ConfigError.of("counts", [], "at least one item that occurs")
        total, items = sum(ordered), len(ordered)
        edges = sorted({round(items ** (i / _ZIPF_GROUPS)) for i in range(_ZIPF_GROUPS + 1)} | {0})
        return cls(
            tuple(
                (high - low, sum(ordered[low:high]) / total)
                for low, high in itertools.pairwise(edges)
            )
        )

    def distinct(self, draws: float) -> float:
        """Expected distinct items among so many independent draws.

        An item of probability ``p`` occurs at all with ``1 - (1 - p) ** draws``.
        """
        expected = 0.0
        for count, share in self.groups:
            each = min(share / count, 1.0 - 1e-12)
            expected += count * -math.expm1(draws * math.log1p(-each))
        return expected


@dataclass(frozen=True, slots=True)
class TrainingWorkload:
    """What a training reads.

    Attributes:
        impressions: Impressions of train that are held in memory.
        clicks: Click samples of an epoch.
        validation_impressions: Impressions that are scored after each epoch.
        history: Clicks of a user's history that are used, mean.
        slate: Candidates of an impression, mean.
        items: Items whose texts are in use.
        lengths: Their lengths in tokens.
        popularity: How often items occur in histories and among candidates.
        table_bytes: Memory of the tables that are held beside.
        categories: Distinct categories.
        users: Users with an embedding of their own, where these are on.
    """

    impressions: int
    clicks: int
    validation_impressions: int
    history: float
    slate: float
    items: int
    lengths: TextLengths
    popularity: Popularity
    table_bytes: int
    categories: int = 20
    users: int = 0

    @classmethod
    def typical(
        cls,
        *,
        clicks: int = 20_000,
        history: float = 20.0,
        slate: float = 30.0,
        items: int = 20_000,
        tokens: float = 16.0,
        longest: int = 64,
    ) -> TrainingWorkload:
        """A news log of titles, where nothing is known of the real one.

        Args:
            clicks: Click samples of an epoch.
            history: Mean clicks of a history.
            slate: Mean candidates of an impression.
            items: Items in use.
            tokens: Mean length of a text in tokens.
            longest: Longest text in tokens.
        """
        impressions = clicks
        return cls(
            impressions=impressions,
            clicks=clicks,
            validation_impressions=min(4_000, impressions),
            history=history,
            slate=slate,
            items=items,
            lengths=TextLengths.typical(tokens, longest),
            popularity=Popularity.zipf(items),
            # A row: 16-byte string views of ids, in histories and candidates, and a few scalars.
            table_bytes=round(impressions * (history + slate) * 24 + items * 400),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "impressions": self.impressions,
            "clicks": self.clicks,
            "validation_impressions": self.validation_impressions,
            "history": self.history,
            "slate": self.slate,
            "items": self.items,
            "mean_tokens": self.lengths.mean,
            "table_bytes": self.table_bytes,
        }


@dataclass(frozen=True, slots=True)
class InferenceWorkload:
    """What a service answers.

    A recommendation is the ranking of ``candidates`` for one user with ``history`` clicks; it
    finds the vectors of known items in the store and encodes ``texts`` new ones on average.

    Attributes:
        items: Items whose vectors are kept.
        history: Clicks of the user.
        candidates: Candidates that are scored.
        texts: Texts that are encoded for one recommendation, on average. 1 says that nothing is
            kept, which is the worst case of one new item a request; a catalogue whose vectors are
            kept needs next to 0.
        lengths: Their lengths in tokens.
        batch: Texts encoded together.
        vector_bytes: Bytes of a kept item vector; ``None`` for float32.
    """

    items: int = 50_000
    history: float = 50.0
    candidates: int = 100
    texts: float = 1.0
    lengths: TextLengths = field(default_factory=lambda: TextLengths.typical(16.0, 64))
    batch: int = 32
    vector_bytes: float | None = None

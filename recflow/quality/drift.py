"""Whether a day of a log is still like the days a model was made from.

Three questions are kept apart for every measure. *Could it be chance?* Clusters – the impressions
of one user on one day, which depend on each other – change sides at random; the distance that this
hardly ever exceeds is what chance can do at this number of rows (a permutation test; its tail is
that of a gamma distribution with the permutations' mean and variance, because squared distances of
shares add up like weighted chi-squares). *Is it usual?* Every reference day is compared with the
other reference days; the prediction bound of these distances is what a day may differ anyway: a
Sunday, an election, new articles. *Does it matter?* A least effect, from the configuration. A
measure has drifted when it is beyond all three, so news that is new every day is no drift.

Distances are Jensen-Shannon distances (natural logarithm, 0 to 0.83) of shares over categories or
over bins of the reference's quantiles, on one row an impression; rates are compared by the
logarithm of their odds. Item texts are compared by cohorts: the items first shown on a day.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import polars as pl

from recflow.core.artifacts import JsonValue
from recflow.core.errors import ContractError
from recflow.core.seeding import make_rng
from recflow.quality.drift_config import (
    CALIBRATION,
    CATEGORICAL,
    DISTRIBUTIONS,
    EMBEDDINGS,
    HELD_OUT_ONLY,
    MEASURES,
    NEW_ITEM_SHARE,
    RATES,
    UNSEEN_TOKENS,
    DriftConfig,
)
from recflow.quality.drift_rows import Rows

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Tokenize = Callable[[Sequence[str]], Sequence[Sequence[object]]]

_OTHER: Final = "(other)"
_MOST_CATEGORIES: Final = 50
# Fewer reference days say nothing of what is usual.
_LEAST_DAYS: Final = 3
_NEIGHBOURS: Final = 2
_LEAST_COHORT_ITEMS: Final = 10
_MOST_CLASSIFIED: Final = 3_000
_CELLS_AT_ONCE: Final = 4_000_000


@dataclass(frozen=True, slots=True)
class ItemSample:
    """Texts of distinct items.

    Attributes:
        texts: Their texts.
        first_shown: The day each was first shown, ``datetime64[D]`` [items].
        vectors: Their vectors, float32 [items, width]; ``None`` where no model encodes them.
    """

    texts: Sequence[str]
    first_shown: npt.NDArray[np.datetime64]
    vectors: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Measure:
    """How far a day is from the reference in one respect.

    Attributes:
        name: Which respect, one of :data:`MEASURES`.
        value: The distance, 0 or more; ``None`` where it cannot be measured.
        limit: The distance beyond which it has drifted; ``None`` where nothing can be judged.
        chance: What chance can do.
        usual: What a day differs anyway; ``None`` where too few days are known.
        current: The rate or share of the day, where it is one.
        reference: The same of the reference.
        drifted: Whether it is beyond the limit, and counts.
        note: Why it is not measured or not judged; empty otherwise.
    """

    name: str
    value: float | None = None
    limit: float | None = None
    chance: float | None = None
    usual: float | None = None
    current: float | None = None
    reference: float | None = None
    drifted: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class Decay:
    """What the champion ranks on the day, less what it ranked on its test days.

    Attributes:
        metric: ``auc`` or ``ndcg@10``.
        current: Mean over the day's impressions.
        reference: Mean over the test days' impressions.
        low: Lower end of the difference's interval; users of both are resampled, unpaired.
        high: Upper end.
        usual: How much a day may be below the others anyway; ``None`` where too few are known.
        limit: The difference below which it has decayed.
        decayed: Whether even the upper end is below the margin, and the difference is unusual.
    """

    metric: str
    current: float
    reference: float
    low: float
    high: float
    usual: float | None
    limit: float
    decayed: bool

    @property
    def difference(self) -> float:
        """The day's metric less the reference's."""
        return self.current - self.reference


@dataclass(frozen=True, slots=True)
class DriftReport:
    """Everything measured about a day.

    Attributes:
        day: The day.
        compared_with: What it was compared with, in words.
        impressions: Impressions of the day that were looked at.
        reference_impressions: Those of the reference.
        reference_days: Days of the reference.
        measures: One for each of :data:`MEASURES`.
        decays: One for each ranking metric; none without a champion.
        judged: Whether there were enough impressions to judge.
        least_impressions: How many are needed.
        facts: Further numbers.
    """

    day: date
    compared_with: str
    impressions: int
    reference_impressions: int
    reference_days: int
    measures: tuple[Measure, ...]
    decays: tuple[Decay, ...]
    judged: bool
    least_impressions: int
    facts: Mapping[str, float] = field(default_factory=lambda: {})

    @property
    def drifted(self) -> tuple[str, ...]:
        """Names of the measures beyond their limits."""
        return tuple(m.name for m in self.measures if m.drifted)

    @property
    def decayed(self) -> bool:
        """Whether the champion ranks worse than on its test days."""
        return any(decay.decayed for decay in self.decays)

    def sentence(self) -> str:
        """The state in words."""
        if not self.judged:
            return (
                f"{self.impressions:,} impressions are too few rows to judge; "
                f"{self.least_impressions:,} are needed"
            )
        parts = [
            f"{m.name} differs by {m.value:.3f}, limit {m.limit:.3f}"
            for m in self.measures
            if m.drifted and m.value is not None and m.limit is not None
        ]
        parts += [
            f"{d.metric} is {d.current:.4f} where it was {d.reference:.4f}"
            for d in self.decays
            if d.decayed
        ]
        state = "; ".join(parts) or "nothing is beyond its limit"
        return f"{state} (compared with {self.compared_with})"

    def to_json(self) -> dict[str, JsonValue]:
        """The report as plain JSON values."""
        raw = cast("dict[str, Any]", asdict(self))
        raw["day"] = self.day.isoformat()
        raw["facts"] = dict(self.facts)
        raw["drifted"], raw["decayed"] = list(self.drifted), self.decayed
        raw["sentence"] = self.sentence()
        return raw

    def to_facts(self) -> dict[str, JsonValue]:
        """Values and limits by flat name, to plot over days; what was not measured is left out."""
        numbers: dict[str, float | None] = {
            "impressions": self.impressions,
            "reference_impressions": self.reference_impressions,
            "reference_days": self.reference_days,
        }
        for measure in self.measures:
            numbers[measure.name] = measure.value
            numbers[f"{measure.name}_limit"] = measure.limit
            numbers[f"{measure.name}_current"] = measure.current
            numbers[f"{measure.name}_reference"] = measure.reference
        for decay in self.decays:
            name = decay.metric.replace("@", "_at_")
            numbers[name] = decay.current
            numbers[f"{name}_on_test_days"] = decay.reference
            numbers[f"{name}_change"] = decay.difference
            numbers[f"{name}_change_high"] = decay.high
            numbers[f"{name}_change_limit"] = decay.limit
        numbers |= self.facts
        facts: dict[str, JsonValue] = {k: v for k, v in numbers.items() if v is not None}
        return {
            **facts,
            "judged": self.judged,
            "compared_with": self.compared_with,
            "state": self.sentence(),
            "not_measured": {m.name: m.note for m in self.measures if m.value is None},
        }


@dataclass(frozen=True, slots=True)
class Coded:
    """A column as numbers of its labels.

    Attributes:
        labels: The labels; those of bins say their limits.
        current: Label of each current row, -1 where there is no value, int64 [rows].
        reference: The same of the reference.
    """

    labels: tuple[str, ...]
    current: IntArray
    reference: IntArray


def measure_drift(
    current: pl.DataFrame,
    reference: pl.DataFrame,
    *,
    day: date,
    compared_with: str,
    config: DriftConfig,
    new_items: ItemSample | None = None,
    known_items: ItemSample | None = None,
    tokenize: Tokenize | None = None,
    decays: Sequence[Decay] = (),
    facts: Mapping[str, float] | None = None,
) -> DriftReport:
    """Compare a day with the reference.

    Args:
        current: Rows of the day (see :class:`~recflow.quality.drift_rows.Rows`).
        reference: Rows of the reference days.
        day: The day.
        compared_with: What the reference is, in words.
        config: Limits.
        new_items: Items of the day that no reference day showed.
        known_items: Items that reference days showed.
        tokenize: Splits texts into tokens; words unless told otherwise.
        decays: What the champion lost, from :func:`judge_decay`.
        facts: Further numbers to keep.

    Returns:
        The report; it depends neither on the order of rows nor on earlier calls.

    Raises:
        ContractError: There is no row on one of the sides.
    """
    for side, rows in (("current", current), ("reference", reference)):
        if rows.is_empty():
            raise ContractError(f"the {side} side of {day} has no impressions to compare")
    judged = current.height >= config.least_impressions
    current, reference = at_most(current, config), at_most(reference, config)
    measures = {m.name: m for m in measure_rows(current, reference, config)}
    measures[UNSEEN_TOKENS] = measure_unseen_tokens(
        new_items, known_items, config, tokenize or words_of
    )
    measures[EMBEDDINGS] = measure_embeddings(new_items, known_items, config)
    return DriftReport(
        day=day,
        compared_with=compared_with,
        impressions=current.height,
        reference_impressions=reference.height,
        reference_days=reference[Rows.DAY].n_unique(),
        measures=tuple(_counting(measures[name], judged, config) for name in MEASURES),
        decays=tuple(decays) if judged else tuple(_not_counting(decay) for decay in decays),
        judged=judged,
        least_impressions=config.least_impressions,
        facts=facts or {},
    )


def measure_rows(
    current: pl.DataFrame, reference: pl.DataFrame, config: DriftConfig
) -> list[Measure]:
    """Compare what impressions tell: shares and rates, without the texts of items."""
    measures: list[Measure] = []
    for held_out in (False, True):
        names = [name for name in (*DISTRIBUTIONS, *RATES) if (name in HELD_OUT_ONLY) == held_out]
        base = reference.filter(pl.col(Rows.HELD_OUT)) if held_out else reference
        if base.is_empty():
            note = "the reference has no day that was kept out of training"
            measures += [Measure(name, note=note) for name in names]
            continue
        measures += _Comparison(current, base, reference, config).measures(names)
    return sorted(measures, key=lambda m: MEASURES.index(m.name))


def measure_unseen_tokens(
    new: ItemSample | None, known: ItemSample | None, config: DriftConfig, tokenize: Tokenize
) -> Measure:
    """Compare the share of tokens nobody saw before with that of the reference's own new items."""
    note = _cannot_judge(new, known, config)
    if new is None or known is None or not len(new.texts):
        return Measure(UNSEEN_TOKENS, note=note)
    known_tokens = list(tokenize(known.texts))
    cohorts, codes = np.unique(known.first_shown, return_inverse=True)
    owner = _owners(known_tokens, codes)
    # The first cohort is everything that was there already.
    shares = [
        _unseen([known_tokens[i] for i in np.flatnonzero(codes == code)], owner, code)[0]
        for code in range(1, len(cohorts))
        if int((codes == code).sum()) >= _LEAST_COHORT_ITEMS
    ]
    share, error = _unseen(list(tokenize(new.texts)), owner, None)
    return _beyond_usual(
        UNSEEN_TOKENS, share, shares, error, config.least_unseen_tokens, note, config
    )


def measure_embeddings(
    new: ItemSample | None, known: ItemSample | None, config: DriftConfig
) -> Measure:
    """Compare how well a classifier tells the day's new items from the reference's.

    The classifier is Evidently's: logistic regression on half of the items, judged on the others.
    """
    note = _cannot_judge(new, known, config)
    if new is None or known is None or len(new.texts) < 2:
        return Measure(EMBEDDINGS, note=note)
    if new.vectors is None or known.vectors is None:
        return Measure(EMBEDDINGS, note="no model encodes the items")
    fewest = min(len(new.texts), len(known.texts))
    if fewest < max(config.least_items, _LEAST_COHORT_ITEMS):
        return Measure(EMBEDDINGS, note=note or f"{fewest} items are too few to tell apart")
    rng = make_rng(config.seed, "classified items")
    cohorts, codes = np.unique(known.first_shown, return_inverse=True)
    usual: list[float] = []
    for code in range(1, len(cohorts)):
        own = codes == code
        if own.sum() >= max(_LEAST_COHORT_ITEMS, config.least_items) and not own.all():
            usual.append(classifier_auc(known.vectors[own], known.vectors[~own], rng))
    auc = classifier_auc(new.vectors, known.vectors, rng)
    held = [max(1, min(n, _MOST_CLASSIFIED) // 2) for n in (len(new.texts), len(known.texts))]
    # Mann-Whitney's variance when nothing differs.
    error = math.sqrt((sum(held) + 1) / (12 * held[0] * held[1]))
    return _beyond_usual(EMBEDDINGS, auc, usual, error, config.least_embedding_auc, note, config)


def judge_decay(
    metric: str,
    *,
    current: float,
    reference: float,
    replicates: FloatArray,
    day_values: Sequence[float],
    test_days: int,
    config: DriftConfig,
) -> Decay:
    """Judge whether a ranking metric is worse than on the test days.

    Args:
        metric: Its name.
        current: Mean over the day.
        reference: Mean over the test days.
        replicates: Resampled differences of the two, float64 [samples].
        day_values: The metric of each day of training; how much they scatter is usual.
        test_days: Days behind ``reference``: the fewer, the more the difference scatters.
        config: Margin and confidence.
    """
    tail = (1 - config.confidence) / 2
    low, high = (float(x) for x in np.quantile(replicates, [tail, 1 - tail]))
    gaps = [
        value - float(np.mean([*day_values[:place], *day_values[place + 1 :]]))
        for place, value in enumerate(day_values)
        if len(day_values) >= _LEAST_DAYS
    ]
    usual = _deviation_bound(gaps, config)
    if usual is not None:
        # The gaps are to the mean of all other days, the difference is to that of the test days.
        usual *= math.sqrt((1 + 1 / test_days) / (1 + 1 / (len(gaps) - 1)))
    limit = -max(config.decay_margin, usual or 0.0)
    decayed = high < -config.decay_margin and current - reference < limit
    return Decay(metric, current, reference, low, high, usual, limit, decayed)


def jensen_shannon(one: FloatArray, other: FloatArray) -> FloatArray:
    """Jensen-Shannon distance of counts, natural logarithm, over the last axis.

    The square root of the mean Kullback-Leibler divergence to the mixture (Endres & Schindelin,
    2003), as SciPy and Evidently compute it; 0 where one side has no counts.

    Args:
        one: Counts or shares, float64 [..., bins].
        other: The same, broadcast against ``one``.

    Returns:
        float64 [...].
    """
    p, q = _shares(one), _shares(other)
    mixture = (p + q) / 2
    divergence = (_relative_entropy(p, mixture) + _relative_entropy(q, mixture)) / 2
    empty = (one.sum(-1) == 0) | (other.sum(-1) == 0)
    return np.where(empty, 0.0, np.sqrt(np.maximum(divergence, 0.0)))


def classifier_auc(
    one: npt.NDArray[np.float32], other: npt.NDArray[np.float32], rng: np.random.Generator
) -> float:
    """AUC of Evidently's classifier that tells two sets of vectors apart, on held-out halves."""
    import os

    os.environ.setdefault("DO_NOT_TRACK", "1")
    import pandas as pd
    from evidently.metrics.embeddings import ModelDriftMethod  # 8 s: not before it is needed

    frames: list[pd.DataFrame] = []
    for vectors in (one, other):
        if len(vectors) > _MOST_CLASSIFIED:
            vectors = vectors[rng.choice(len(vectors), _MOST_CLASSIFIED, replace=False)]
        frames.append(pd.DataFrame(vectors))
    classify: Any = ModelDriftMethod()  # pyright: ignore[reportCallIssue]
    return float(classify(*frames)[0])


def words_of(texts: Sequence[str]) -> list[list[str]]:
    """Lower-case words of each text: runs of letters and digits."""
    words = pl.Series(texts, dtype=pl.String).str.to_lowercase().str.extract_all(r"[\p{L}\p{N}]+")
    return cast("list[list[str]]", words.to_list())


def code_column(name: str, current: pl.Series, reference: pl.Series, *, bins: int) -> Coded | None:
    """Number the labels of a column on both sides; ``None`` where one of them has no value.

    Categories beyond the fifty most frequent share one label. Bins are quantiles of the reference,
    an empty history has a bin of its own.
    """
    if current.drop_nulls().is_empty() or reference.drop_nulls().is_empty():
        return None
    if name in CATEGORICAL:
        return _code_categories(current, reference)
    return _code_numbers(current, reference, bins)


class _Comparison:
    """Current rows against base rows: observed distances, and what chance and other days do."""

    def __init__(
        self,
        current: pl.DataFrame,
        base: pl.DataFrame,
        reference: pl.DataFrame,
        config: DriftConfig,
    ) -> None:
        self.current, self.base, self.config = current, base, config
        self.only_held_out = base.height < reference.height
        self.usual_rows = _usual_rows(base, reference)
        self.cluster, self.clusters, self.current_clusters = _clusters(current, base)

    def measures(self, names: Sequence[str]) -> list[Measure]:
        missing: list[Measure] = []
        blocks: dict[str, FloatArray] = {}
        coded: dict[str, Coded] = {}
        for name in names:
            block = self._distribution(name, coded) if name in DISTRIBUTIONS else self._rate(name)
            if block is None:
                missing.append(Measure(name, note=_why_missing(name)))
            else:
                blocks[name] = block
        if not blocks:
            return missing
        stacked = np.concatenate(list(blocks.values()), axis=1)
        # Summed by cluster: [clusters, columns of all measures].
        totals = _sums_by(self.cluster, stacked)
        is_current = np.arange(self.clusters) < self.current_clusters
        observed = totals[is_current].sum(axis=0), totals[~is_current].sum(axis=0)
        permuted = self._permuted(totals)
        found: list[Measure] = []
        start = 0
        for name, block in blocks.items():
            columns = slice(start, start + block.shape[1])
            start += block.shape[1]
            sides = observed[0][columns], observed[1][columns]
            null = permuted[:, columns], totals[:, columns].sum(axis=0) - permuted[:, columns]
            if name in DISTRIBUTIONS:
                found.append(self._judge_distribution(name, coded[name], sides, null))
            else:
                found.append(self._judge_rate(name, sides, null))
        return [*found, *missing]

    def _distribution(self, name: str, coded: dict[str, Coded]) -> FloatArray | None:
        codes = code_column(name, self.current[name], self.base[name], bins=self.config.bins)
        if codes is None:
            return None
        coded[name] = codes
        both = np.concatenate([codes.current, codes.reference])
        block = np.zeros((len(both), len(codes.labels)))
        known = np.flatnonzero(both >= 0)
        block[known, both[known]] = 1.0
        return block

    def _rate(self, name: str) -> FloatArray | None:
        columns = RATES[name]
        sides = [rows.select(columns).drop_nulls() for rows in (self.current, self.base)]
        if any(side.is_empty() or side[columns[1]].sum() == 0 for side in sides):
            return None
        return np.concatenate([_rate_columns(rows, name) for rows in (self.current, self.base)])

    def _permuted(self, totals: FloatArray) -> FloatArray:
        """Sums of the current side when clusters change sides, float64 [permutations, columns]."""
        rng = make_rng(self.config.seed, "permutations")
        share = self.current_clusters / self.clusters
        sums = np.empty((self.config.permutations, totals.shape[1]))
        step = max(1, _CELLS_AT_ONCE // self.clusters)
        narrow = totals.astype(np.float32)
        for start in range(0, len(sums), step):
            size = min(step, len(sums) - start)
            drawn = rng.random((size, self.clusters), dtype=np.float32) < share
            sums[start : start + size] = drawn.astype(np.float32) @ narrow
        return sums

    def _judge_distribution(
        self,
        name: str,
        coded: Coded,
        sides: tuple[FloatArray, FloatArray],
        null: tuple[FloatArray, FloatArray],
    ) -> Measure:
        value = float(jensen_shannon(*sides))
        chance = math.sqrt(_gamma_quantile(jensen_shannon(*null) ** 2, self.config.chance))
        usual = _upper_bound(self._usual_distances(name, coded), self.config)
        limit = max(self.config.least_distance, math.hypot(chance, usual or 0.0))
        return Measure(name, value, limit, chance, usual, drifted=value > limit)

    def _judge_rate(
        self, name: str, sides: tuple[FloatArray, FloatArray], null: tuple[FloatArray, FloatArray]
    ) -> Measure:
        value = abs(float(_log_rate(name, sides[0]) - _log_rate(name, sides[1])))
        differences = _log_rate(name, null[0]) - _log_rate(name, null[1])
        chance = _normal_quantile(self.config.chance / 2) * float(np.sqrt(np.mean(differences**2)))
        usual = _deviation_bound(self._usual_differences(name), self.config)
        limit = max(math.log(self.config.least_rate_factor), math.hypot(chance, usual or 0.0))
        current, reference = (float(side[0] / side[1]) if side[1] else None for side in sides)
        return Measure(name, value, limit, chance, usual, current, reference, drifted=value > limit)

    def _usual_distances(self, name: str, coded: Coded) -> list[float]:
        rows = self.usual_rows
        values = rows[name].drop_nulls()
        if values.is_empty():
            return []
        codes = _codes_like(name, rows[name], coded, self.base[name], self.config.bins)
        counts = self._by_day(
            np.eye(len(coded.labels))[np.maximum(codes, 0)] * (codes >= 0)[:, None]
        )
        return [float(jensen_shannon(day, others)) for day, others in self._pairs(counts)]

    def _usual_differences(self, name: str) -> list[float]:
        counts = self._by_day(_rate_columns(self.usual_rows, name))
        return [
            float(_log_rate(name, day) - _log_rate(name, others))
            for day, others in self._pairs(counts)
        ]

    def _pairs(self, counts: FloatArray) -> list[tuple[FloatArray, FloatArray]]:
        """Each day and what it is compared with: the other days, or the two before it.

        What is compared with test days alone may grow along the window, as histories do.
        """
        if not self.only_held_out:
            return [(day, counts.sum(axis=0) - day) for day in counts]
        return [
            (counts[place], counts[place - _NEIGHBOURS : place].sum(axis=0))
            for place in range(_NEIGHBOURS, len(counts))
        ]

    def _by_day(self, block: FloatArray) -> FloatArray:
        """Sums of each day with enough rows that have a value; none where days are too few."""
        days, codes = np.unique(self.usual_rows[Rows.DAY].to_numpy(), return_inverse=True)
        if not len(days):
            return block
        sums = _sums_by(codes, block)
        rows = np.bincount(codes, weights=block.any(axis=1), minlength=len(days))
        sums = sums[rows >= min(self.config.least_impressions, 50)]
        return sums if len(sums) >= _LEAST_DAYS else sums[:0]


def _usual_rows(base: pl.DataFrame, reference: pl.DataFrame) -> pl.DataFrame:
    """Rows whose days are compared with each other: days of training, if base is another kind."""
    if base.height == reference.height:
        return reference
    trained = reference.filter(~pl.col(Rows.HELD_OUT))
    return trained if trained[Rows.DAY].n_unique() >= _LEAST_DAYS else reference


def _clusters(current: pl.DataFrame, base: pl.DataFrame) -> tuple[IntArray, int, int]:
    """Number users and days on each side: of each row, how many, how many of them current."""
    numbers: list[IntArray] = []
    counts: list[int] = []
    for rows in (current, base):
        rank = rows.select(pl.struct(Rows.USER, Rows.DAY).rank("dense")).to_series()
        numbers.append(rank.to_numpy().astype(np.int64) - 1 + sum(counts))
        counts.append(int(rank.n_unique()))
    return np.concatenate(numbers), sum(counts), counts[0]


def _sums_by(groups: IntArray, block: FloatArray) -> FloatArray:
    """Sum the rows of each group, numbered from 0 without gaps: float64 [groups, columns]."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    return np.add.reduceat(block[order], starts, axis=0)


def _rate_columns(rows: pl.DataFrame, name: str) -> FloatArray:
    """Numerator and denominator of each row, 0 where one is missing, float64 [rows, 2]."""
    both = rows.select(pl.col(column).cast(pl.Float64) for column in RATES[name]).to_numpy()
    return np.where(np.isnan(both).any(axis=1, keepdims=True), 0.0, both)


def _log_rate(name: str, sums: FloatArray) -> FloatArray:
    """Log-odds of a share, or the logarithm of clicks over predicted clicks; half a count added."""
    top, bottom = sums[..., 0] + 0.5, sums[..., 1] + (0.5 if name == CALIBRATION else 1.0)
    return np.log(top / bottom) if name == CALIBRATION else np.log(top / (bottom - top))


def _code_categories(current: pl.Series, reference: pl.Series) -> Coded:
    both = pl.concat([current.cast(pl.String), reference.cast(pl.String)]).rename("label")
    counted = both.drop_nulls().value_counts().sort(["count", "label"], descending=[True, False])
    kept = sorted(cast("list[str]", counted["label"][:_MOST_CATEGORIES].to_list()), key=_natural)
    labels = (*kept, _OTHER) if counted.height > _MOST_CATEGORIES else tuple(kept)
    return Coded(labels, _category_codes(current, labels), _category_codes(reference, labels))


def _category_codes(values: pl.Series, labels: Sequence[str]) -> IntArray:
    numbers = {label: code for code, label in enumerate(labels)}
    text = values.cast(pl.String)
    codes = text.replace_strict(numbers, default=numbers.get(_OTHER, -1), return_dtype=pl.Int64)
    return np.where(text.is_null().to_numpy(), -1, codes.fill_null(-1).to_numpy())


def _code_numbers(current: pl.Series, reference: pl.Series, bins: int) -> Coded:
    edges = _edges(reference, bins)
    labels = [f"{place:02}: to {edge:.4g}" for place, edge in enumerate(edges)]
    labels.append(f"{len(edges):02}: above" + (f" {edges[-1]:.4g}" if len(edges) else ""))
    return Coded(tuple(labels), _number_codes(current, edges), _number_codes(reference, edges))


def _edges(reference: pl.Series, bins: int) -> FloatArray:
    values = reference.drop_nulls().cast(pl.Float64).to_numpy()
    inner = np.arange(1, bins) / bins
    edges = np.quantile(values, inner, method="inverted_cdf")
    edges = np.unique(np.append(edges, 0.0) if (values == 0).any() else edges)
    return edges[edges < values.max()]


def _number_codes(values: pl.Series, edges: FloatArray) -> IntArray:
    numbers = values.cast(pl.Float64).fill_null(np.nan).to_numpy()
    codes = np.searchsorted(edges, numbers, side="left").astype(np.int64)
    return np.where(np.isnan(numbers), -1, codes)


def _codes_like(name: str, values: pl.Series, coded: Coded, base: pl.Series, bins: int) -> IntArray:
    """Number further values by the labels there are."""
    if name in CATEGORICAL:
        return _category_codes(values, coded.labels)
    return _number_codes(values, _edges(base, bins))


def _natural(label: str) -> tuple[int, str]:
    return (int(label), "") if label.isdecimal() else (-1, label)


def at_most(
    rows: pl.DataFrame,
    config: DriftConfig,
    *,
    order: Sequence[str] = (Rows.DAY, Rows.IMPRESSION),
    day: pl.Expr | None = None,
    draw: str = "impressions",
) -> pl.DataFrame:
    """At most ``config.most_impressions`` rows a day; more are drawn at random.

    Args:
        rows: One row an impression.
        config: How many, and the seed.
        order: Columns by which the rows are put in order.
        day: The day of a row; its column ``day`` unless told otherwise.
        draw: Name of the draw.
    """
    kept: list[pl.DataFrame] = []
    by_day = pl.col(Rows.DAY) if day is None else day
    for (key,), part in rows.sort(order).group_by([by_day], maintain_order=True):
        if part.height > config.most_impressions:
            rng = make_rng(config.seed, draw, str(key))
            chosen = rng.choice(part.height, config.most_impressions, replace=False)
            part = part[np.sort(chosen)]
        kept.append(part)
    return pl.concat(kept)


def _owners(tokens: Sequence[Sequence[object]], codes: IntArray) -> dict[object, int]:
    """The one cohort that uses a token, -1 where there are several."""
    owner: dict[object, int] = {}
    for code, text in zip(cast("list[int]", codes.tolist()), tokens, strict=True):
        for token in text:
            if owner.setdefault(token, code) != code:
                owner[token] = -1
    return owner


def _unseen(
    texts: Sequence[Sequence[object]], owner: Mapping[object, int], cohort: int | None
) -> tuple[float, float]:
    """Share of tokens that no other cohort uses, and its standard error over items."""
    unseen = np.array([sum(owner.get(t, cohort) == cohort for t in text) for text in texts], float)
    lengths = np.array([len(text) for text in texts], float)
    total = lengths.sum()
    if not total:
        return 0.0, 0.0
    share = float(unseen.sum() / total)
    return share, float(np.sqrt(((unseen - share * lengths) ** 2).sum()) / total)


def _cannot_judge(new: ItemSample | None, known: ItemSample | None, config: DriftConfig) -> str:
    if new is None or known is None:
        return "no items were given"
    if len(new.texts) < config.least_items:
        return f"{len(new.texts)} new items are too few to judge; {config.least_items} are needed"
    return ""


def _beyond_usual(
    name: str,
    current: float,
    usual: Sequence[float],
    error: float,
    least: float,
    note: str,
    config: DriftConfig,
) -> Measure:
    """Judge a number that is never 0 by how far it is above what is usual."""
    if len(usual) < _LEAST_DAYS:
        note = note or f"{len(usual)} reference days with new items do not say what is usual"
        return Measure(name, current=current, note=note)
    mean = float(np.mean(usual))
    chance = _normal_quantile(config.chance) * error
    spread = (_upper_bound(usual, config) or mean) - mean
    limit = max(least, math.hypot(chance, spread))
    value = max(0.0, current - mean)
    drifted = not note and value > limit
    return Measure(name, value, limit, chance, spread, current, mean, drifted, note)


def _counting(measure: Measure, judged: bool, config: DriftConfig) -> Measure:
    if not measure.drifted or (judged and measure.name not in config.ignored):
        return measure
    note = "does not count" if judged else "too few rows to judge"
    values = {**asdict(measure), "drifted": False, "note": note}
    return Measure(**values)


def _not_counting(decay: Decay) -> Decay:
    return Decay(**{**asdict(decay), "decayed": False})


def _why_missing(name: str) -> str:
    if name in (Rows.SCORE, CALIBRATION):
        return "there is no champion to score with"
    if name in (NEW_ITEM_SHARE, Rows.CANDIDATE_AGE):
        return "too few earlier days are known to tell the age of items"
    return "one of the sides has no value"


def _upper_bound(values: Sequence[float], config: DriftConfig) -> float | None:
    """What the next of such values hardly ever exceeds: Student's prediction bound."""
    count = len(values)
    if count < _LEAST_DAYS:
        return None
    from scipy.special import stdtrit

    spread = float(np.std(values, ddof=1)) * math.sqrt(1 + 1 / count)
    return float(np.mean(values)) + float(stdtrit(count - 1, 1 - config.unusual)) * spread


def _deviation_bound(deviations: Sequence[float], config: DriftConfig) -> float | None:
    """The same for deviations around zero, in either direction."""
    count = len(deviations)
    if count < _LEAST_DAYS:
        return None
    from scipy.special import stdtrit

    spread = math.sqrt(sum(d * d for d in deviations) / (count - 1))
    return float(stdtrit(count - 1, 1 - config.unusual / 2)) * spread


def _gamma_quantile(values: FloatArray, chance: float) -> float:
    """Upper quantile of the gamma distribution with the mean and variance of ``values``."""
    mean, variance = float(values.mean()), float(values.var())
    if mean <= 0 or variance <= 0:
        return max(mean, 0.0)
    from scipy.special import gammaincinv

    return float(gammaincinv(mean**2 / variance, 1 - chance)) * variance / mean


def _normal_quantile(tail: float) -> float:
    from scipy.special import ndtri

    return -float(ndtri(tail))


def _shares(counts: FloatArray) -> FloatArray:
    total = counts.sum(axis=-1, keepdims=True)
    return counts / np.where(total == 0, 1.0, total)


def _relative_entropy(p: FloatArray, q: FloatArray) -> FloatArray:
    safe = np.where(p > 0, p / np.where(q > 0, q, 1.0), 1.0)
    return (p * np.log(safe)).sum(axis=-1)

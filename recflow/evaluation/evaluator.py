"""Turn predictions into results: metrics, intervals, differences, segments.

The protocol in one place: ranking metrics are means over the test impressions that have at least
one click and one non-click; probabilities and ratings are calibrated on the validation split;
retrieval is measured on one sample of test impressions; intervals come from one set of bootstrap
draws over users, so that differences between scorers are paired.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Literal, cast, get_args

import numpy as np
import polars as pl

from recflow.core.columns import Columns
from recflow.core.errors import ConfigError, ContractError
from recflow.core.seeding import make_rng
from recflow.evaluation.baselines import OracleScorer, PopularityScorer
from recflow.evaluation.calibration import (
    PlattScaling,
    ReliabilityBin,
    calibration_error,
    fit_linear,
    fit_platt,
    log_losses,
    reliability,
)
from recflow.evaluation.metrics import RANKING_METRICS, TOP_K, ranking_metrics
from recflow.evaluation.retrieval import ROW, Catalogue, ItemPopularity, coverage, retrieval_metrics
from recflow.evaluation.scoring import BOARDS, Board, Predictions, Scorer, Snapshot, predict
from recflow.evaluation.segments import Segment, segments_of
from recflow.evaluation.significance import bootstrap_ratios, codes_of, percentile_interval
from recflow.evaluation.slates import (
    FloatArray,
    IntArray,
    flatten,
    offsets_of,
    rows_of,
    sums_by,
)

__all__ = [
    "BOARDS",
    "Board",
    "Estimate",
    "Evaluation",
    "EvaluationConfig",
    "Predictions",
    "Scorer",
    "ScorerResult",
    "Snapshot",
    "evaluate",
    "predict",
]

Cluster = Literal["user", "impression"]

_ROOTS = frozenset({"click_rmse", "rating_rmse"})
"""Metrics that are the square root of the mean that is resampled."""


@dataclass(frozen=True, slots=True)
class EvaluationConfig:
    """How predictions are judged.

    Attributes:
        primary_metric: Ranking metric that charts, segments and gates look at.
        bootstrap_samples: Resamples behind each interval.
        confidence: Share of the resamples inside an interval.
        seed: Seed of the draws.
        cluster: What is drawn: users (the default; impressions of a user are dependent) or
            impressions.
        references: The scorer of each board that the others are compared with. A board without a
            scorer needs none.
        parents: Scorer by scorer, the one it was made from; compressed variants are compared with
            it too. All scorers named here are a family, compared each with each.
        reliability_bins: Bins of the calibration curve.

    Raises:
        ConfigError: A value is impossible.
    """

    primary_metric: str = "auc"
    bootstrap_samples: int = 1_000
    confidence: float = 0.95
    seed: int = 0
    cluster: Cluster = "user"
    references: Mapping[Board, str] = field(
        default_factory=lambda: {"content-only": "text_similarity", "counter-aware": "popularity"}
    )
    parents: Mapping[str, str] = field(default_factory=lambda: {})
    reliability_bins: int = 15

    def __post_init__(self) -> None:
        if self.primary_metric not in RANKING_METRICS:
            raise ConfigError.of("primary_metric", self.primary_metric, ", ".join(RANKING_METRICS))
        if self.bootstrap_samples < 1:
            raise ConfigError.of("bootstrap_samples", self.bootstrap_samples, "1 or more")
        if not 0 < self.confidence < 1:
            raise ConfigError.of("confidence", self.confidence, "between 0 and 1, e.g. 0.95")
        if self.cluster not in get_args(Cluster):
            raise ConfigError.of("cluster", self.cluster, " or ".join(get_args(Cluster)))
        if self.reliability_bins < 2:
            raise ConfigError.of("reliability_bins", self.reliability_bins, "2 or more")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and the interval around it; no interval where it is not a mean over impressions."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class SegmentResult:
    """The primary metric over a segment.

    Attributes:
        name: The segment's name.
        label: Its name for people.
        impressions: Impressions of the segment with a click and a non-click.
        primary: The primary metric over them.
    """

    name: str
    label: str
    impressions: int
    primary: Estimate


@dataclass(frozen=True, slots=True)
class Comparison:
    """Differences to another scorer, paired over the same resamples.

    Attributes:
        other: The scorer compared with.
        differences: This scorer's metric less the other's, by metric.
        segments: The same of the primary metric, by name of the segment.
    """

    other: str
    differences: dict[str, Estimate]
    segments: dict[str, Estimate] = field(default_factory=lambda: {})


@dataclass(frozen=True, slots=True)
class Paired:
    """What one scorer gains over another in the primary metric, paired over the same resamples.

    Attributes:
        difference: Its metric less the other's.
        relative: The difference as a share of the other's metric; -0.01 is one percent lost.
    """

    difference: Estimate
    relative: Estimate


@dataclass(frozen=True, slots=True)
class ScorerResult:
    """Everything measured about one scorer.

    Attributes:
        name: The scorer.
        board: Its board.
        metrics: Metric by name (see :data:`recflow.evaluation.metrics.METRICS`); a metric that does
            not apply (no ratings, no retrieval, nothing to calibrate on) is absent.
        reference: Comparison with the board's reference; ``None`` for the reference itself.
        parent: Comparison with the scorer it was made from, if any.
        oracle_share: On simulated logs the share of the oracle's gain over popularity that the
            scorer recovers, in the primary metric.
        calibration: How its scores became probabilities; ``None`` where validation had no clicks.
        reliability: The calibration curve on test.
        segments: The primary metric by segment.
    """

    name: str
    board: Board
    metrics: dict[str, Estimate]
    reference: Comparison | None
    parent: Comparison | None
    oracle_share: Estimate | None
    calibration: PlattScaling | None
    reliability: tuple[ReliabilityBin, ...]
    segments: tuple[SegmentResult, ...]


@dataclass(frozen=True, slots=True)
class Counts:
    """What the numbers were measured on.

    Attributes:
        impressions: Test impressions.
        evaluated: Those with a click and a non-click, over which ranking metrics are means.
        without_click: Those left out because nothing was clicked.
        all_clicked: Those left out because everything was clicked.
        candidates: Candidates of all test impressions.
        users: Distinct users of the test split.
        catalogue_items: Items of the catalogue.
        catalogue_sample: Test impressions for which the whole catalogue was ranked.
    """

    impressions: int
    evaluated: int
    without_click: int
    all_clicked: int
    candidates: int
    users: int
    catalogue_items: int
    catalogue_sample: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of :func:`evaluate`.

    Attributes:
        config: How it was made.
        counts: What it was made on.
        scorers: One result a scorer, ordered by board, then best primary metric first.
        train_mean_rating_rmse: RMSE of predicting train's mean rating; ``None`` without ratings.
        pairs: For every two scorers of the family (see :attr:`EvaluationConfig.parents`), in both
            orders, what the first gains over the second.
    """

    config: EvaluationConfig
    counts: Counts
    scorers: tuple[ScorerResult, ...]
    train_mean_rating_rmse: float | None
    pairs: Mapping[tuple[str, str], Paired] = field(default_factory=lambda: {})

    def __getitem__(self, name: str) -> ScorerResult:
        """The result of one scorer."""
        for result in self.scorers:
            if result.name == name:
                return result
        raise KeyError(name)

    def board(self, board: Board) -> tuple[ScorerResult, ...]:
        """The results of one board, best first."""
        return tuple(result for result in self.scorers if result.board == board)


def evaluate(
    predictions: Sequence[Predictions], snapshot: Snapshot, config: EvaluationConfig
) -> Evaluation:
    """Judge predictions made on a snapshot.

    On simulated logs (``snapshot.truth``) the oracle is added, and popularity where it is missing,
    and each scorer gets the share of the oracle's gain over popularity that it recovers.

    Args:
        predictions: What each scorer said, made by :func:`predict` on the same snapshot.
        snapshot: The snapshot.
        config: How to judge.

    Raises:
        ConfigError: Two scorers share a name, or a reference or parent is not among them.
        ContractError: Predictions belong to another snapshot, or the test split holds no impression
            with a click and a non-click.
    """
    everyone = _with_ceiling(list(predictions), snapshot)
    _check_names(everyone, config)
    test = _Test(snapshot, config)
    tables = {p.scorer: _measure(p, test, config) for p in everyone}
    resampled = _Resampled(tables, test, config)
    results = [_result(p, tables[p.scorer], test, resampled, config) for p in everyone]
    results.sort(
        key=lambda r: (BOARDS.index(r.board), -r.metrics[config.primary_metric].value, r.name)
    )
    family = sorted({*config.parents, *config.parents.values()})
    return Evaluation(
        config,
        test.counts(everyone),
        tuple(results),
        test.train_mean_rating_rmse(),
        pairs={
            (one, other): Paired(
                resampled.difference(one, other, config.primary_metric),
                resampled.relative(one, other, config.primary_metric),
            )
            for one, other in permutations(family, 2)
        },
    )


class _Test:
    """The test split and what is needed from the other splits, prepared once for all scorers."""

    def __init__(self, snapshot: Snapshot, config: EvaluationConfig) -> None:
        self.snapshot = snapshot
        self.impressions = snapshot.test
        self.offsets = offsets_of(self.impressions[Columns.CANDIDATES])
        self.labels = flatten(self.impressions[Columns.LABELS]).to_numpy()
        self.rows = rows_of(self.offsets)
        self.lengths = np.diff(self.offsets)
        self.clicks = sums_by(self.rows, self.labels, self.impressions.height)
        self.evaluated = (self.clicks > 0) & (self.clicks < self.lengths)
        if not self.evaluated.any():
            raise ContractError(
                f"none of the {self.impressions.height} test impressions has both a click and a "
                "non-click, so nothing can be ranked; choose a snapshot with more test days"
            )
        cluster = Columns.USER_ID if config.cluster == "user" else Columns.IMPRESSION_ID
        identifiers = cast("list[str]", self.impressions[cluster].to_list())
        self.cluster, self.clusters = codes_of(identifiers)
        self.ratings = _ratings(self.impressions)
        self.validation_labels = flatten(snapshot.validation[Columns.LABELS]).to_numpy()
        self.validation_ratings = _ratings(snapshot.validation)
        catalogue = Catalogue(snapshot.items)
        self.popularity = ItemPopularity.of(snapshot.train, catalogue.index)
        self.segments: list[Segment] = [
            segment
            for segment in segments_of(snapshot.items, snapshot.train, self.impressions)
            if (segment.members & self.evaluated).any()
        ]

    def counts(self, predictions: Iterable[Predictions]) -> Counts:
        sampled = (p.catalogue.height for p in predictions if p.catalogue is not None)
        return Counts(
            impressions=self.impressions.height,
            evaluated=int(self.evaluated.sum()),
            without_click=int((self.clicks == 0).sum()),
            all_clicked=int(((self.clicks > 0) & (self.clicks == self.lengths)).sum()),
            candidates=len(self.labels),
            users=self.impressions[Columns.USER_ID].n_unique(),
            catalogue_items=self.snapshot.items.height,
            catalogue_sample=max(sampled, default=0),
        )

    def train_mean_rating_rmse(self) -> float | None:
        known = _ratings(self.snapshot.train)
        known = known[~np.isnan(known)]
        wanted = self.ratings[~np.isnan(self.ratings)]
        if not len(known) or not len(wanted):
            return None
        errors = wanted - float(known.mean())
        return float(np.sqrt(np.mean(errors**2)))


@dataclass(slots=True)
class _Measured:
    """What one scorer's predictions gave, before any resampling.

    Attributes:
        sums: By metric, numerator and denominator of each test impression: a metric is the ratio
            of their sums.
        fixed: Metrics that are not such a ratio.
        calibration: How scores became probabilities.
        reliability: The calibration curve.
    """

    sums: dict[str, tuple[FloatArray, FloatArray]] = field(default_factory=lambda: {})
    fixed: dict[str, float] = field(default_factory=lambda: {})
    calibration: PlattScaling | None = None
    reliability: tuple[ReliabilityBin, ...] = ()


def _measure(predictions: Predictions, test: _Test, config: EvaluationConfig) -> _Measured:
    scores = _aligned(predictions, predictions.test, test.impressions, "test")
    validation = _aligned(
        predictions, predictions.validation, test.snapshot.validation, "validation"
    )
    measured = _Measured()
    for name, values in ranking_metrics(scores, test.labels, test.offsets).items():
        measured.sums[name] = (np.nan_to_num(values), test.evaluated.astype(np.float64))
    _measure_probabilities(measured, scores, validation, test, config)
    _measure_ratings(measured, scores, validation, test)
    _measure_retrieval(measured, predictions, test)
    return measured


def _measure_probabilities(
    measured: _Measured,
    scores: FloatArray,
    validation: FloatArray,
    test: _Test,
    config: EvaluationConfig,
) -> None:
    if len(np.unique(test.validation_labels)) < 2:
        return  # nothing to calibrate on: the probability metrics do not apply
    measured.calibration = platt = fit_platt(validation, test.validation_labels)
    probabilities = platt.probabilities(scores)
    losses = log_losses(platt.log_odds(scores), test.labels)
    squares = (probabilities - test.labels) ** 2
    candidates = test.lengths.astype(np.float64)
    by_impression = sums_by(test.rows, squares, len(candidates))
    measured.sums["log_loss"] = (sums_by(test.rows, losses, len(candidates)), candidates)
    measured.sums["brier"] = (by_impression, candidates)
    measured.sums["click_rmse"] = (by_impression, candidates)
    measured.reliability = reliability(probabilities, test.labels, config.reliability_bins)
    measured.fixed["calibration_error"] = calibration_error(measured.reliability)


def _measure_ratings(
    measured: _Measured, scores: FloatArray, validation: FloatArray, test: _Test
) -> None:
    known = ~np.isnan(test.validation_ratings)
    rated = ~np.isnan(test.ratings)
    if not known.any() or not rated.any():
        return
    line = fit_linear(validation[known], test.validation_ratings[known])
    squares = (line(scores[rated]) - test.ratings[rated]) ** 2
    rows, count = test.rows[rated], test.impressions.height
    measured.sums["rating_rmse"] = (
        sums_by(rows, squares, count),
        np.bincount(rows, minlength=count).astype(np.float64),
    )


def _measure_retrieval(measured: _Measured, predictions: Predictions, test: _Test) -> None:
    ranks = predictions.catalogue
    if ranks is None or ranks.is_empty():
        return
    at = _positions(predictions, ranks, test.impressions)
    values = retrieval_metrics(ranks, test.impressions[at], test.popularity)
    sampled = np.zeros(test.impressions.height)
    sampled[at] = 1.0
    for name, of_rows in values.items():
        numerator = np.zeros(test.impressions.height)
        numerator[at] = of_rows
        measured.sums[name] = (numerator, sampled)
    measured.fixed[f"coverage@{TOP_K}"] = coverage(ranks, test.snapshot.items.height)


class _Resampled:
    """Every mean of every scorer, with its bootstrap replicates from one set of draws."""

    def __init__(
        self, tables: Mapping[str, _Measured], test: _Test, config: EvaluationConfig
    ) -> None:
        self._confidence = config.confidence
        keys: list[tuple[str, str]] = []
        columns: list[tuple[FloatArray, FloatArray]] = []
        for scorer, measured in tables.items():
            sums = dict(measured.sums)
            numerator, denominator = sums[config.primary_metric]
            for segment in test.segments:
                inside = segment.members.astype(np.float64)
                sums[_segment_key(segment)] = (numerator * inside, denominator * inside)
            for name, pair in sums.items():
                keys.append((scorer, name))
                columns.append(pair)
        above, below = (
            np.stack([sums_by(test.cluster, c[part], test.clusters) for c in columns], axis=1)
            for part in (0, 1)
        )
        rng = make_rng(config.seed, "bootstrap")
        replicates = bootstrap_ratios(above, below, config.bootstrap_samples, rng)
        values = above.sum(axis=0) / below.sum(axis=0)
        self._values: dict[tuple[str, str], float] = {}
        self._replicates: dict[tuple[str, str], FloatArray] = {}
        for column, key in enumerate(keys):
            root = key[1] in _ROOTS
            self._values[key] = float(np.sqrt(values[column]) if root else values[column])
            drawn = replicates[:, column]
            self._replicates[key] = np.sqrt(drawn) if root else drawn

    def has(self, scorer: str, name: str) -> bool:
        return (scorer, name) in self._values

    def estimate(self, scorer: str, name: str) -> Estimate:
        key = (scorer, name)
        return self._with_interval(self._values[key], self._replicates[key])

    def difference(self, scorer: str, other: str, name: str) -> Estimate:
        return self._with_interval(
            self._values[scorer, name] - self._values[other, name],
            self._replicates[scorer, name] - self._replicates[other, name],
        )

    def relative(self, scorer: str, other: str, name: str) -> Estimate:
        """The difference as a share of the other's value; resampled as one ratio."""
        base = self._replicates[other, name]
        ratios = np.full(len(base), np.nan)
        np.divide(self._replicates[scorer, name] - base, base, out=ratios, where=base != 0)
        value = self._values[other, name]
        change = (self._values[scorer, name] - value) / value if value else float("nan")
        return self._with_interval(change, ratios)

    def share(self, scorer: str, floor: str, ceiling: str, name: str) -> Estimate | None:
        """How far ``scorer`` is on the way from ``floor`` to ``ceiling``."""
        way = self._values[ceiling, name] - self._values[floor, name]
        if way <= 0:
            return None
        ways = self._replicates[ceiling, name] - self._replicates[floor, name]
        gains = self._replicates[scorer, name] - self._replicates[floor, name]
        replicates = np.full(len(ways), np.nan)
        np.divide(gains, ways, out=replicates, where=ways > 0)
        gain = self._values[scorer, name] - self._values[floor, name]
        return self._with_interval(gain / way, replicates)

    def _with_interval(self, value: float, replicates: FloatArray) -> Estimate:
        interval = percentile_interval(replicates, self._confidence)
        return Estimate(value) if interval is None else Estimate(value, *interval)


def _result(
    predictions: Predictions,
    measured: _Measured,
    test: _Test,
    resampled: _Resampled,
    config: EvaluationConfig,
) -> ScorerResult:
    name, board = predictions.scorer, predictions.board

    def compare(other: str | None) -> Comparison | None:
        if other is None or other == name:
            return None
        differences = {
            metric: resampled.difference(name, other, metric)
            for metric in measured.sums
            if resampled.has(other, metric)
        }
        segments = {
            segment.name: resampled.difference(name, other, _segment_key(segment))
            for segment in test.segments
        }
        return Comparison(other, differences, segments)

    metrics = {metric: resampled.estimate(name, metric) for metric in measured.sums}
    metrics |= {metric: Estimate(value) for metric, value in measured.fixed.items()}
    return ScorerResult(
        name=name,
        board=board,
        metrics=metrics,
        reference=compare(config.references.get(board)),
        parent=compare(config.parents.get(name)),
        oracle_share=None
        if test.snapshot.truth is None
        else resampled.share(name, PopularityScorer.name, OracleScorer.name, config.primary_metric),
        calibration=measured.calibration,
        reliability=measured.reliability,
        segments=tuple(
            SegmentResult(
                segment.name,
                segment.label,
                int((segment.members & test.evaluated).sum()),
                resampled.estimate(name, _segment_key(segment)),
            )
            for segment in test.segments
        ),
    )


def _with_ceiling(predictions: list[Predictions], snapshot: Snapshot) -> list[Predictions]:
    """Add the oracle, and popularity as the floor of its gain, where the truth is known."""
    if snapshot.truth is None:
        return predictions
    names = {p.scorer for p in predictions}
    bounds: list[Scorer] = [PopularityScorer(snapshot.train), OracleScorer(snapshot.truth)]
    return predictions + [
        predict(scorer, snapshot, catalogue_sample=0, seed=0)
        for scorer in bounds
        if scorer.name not in names
    ]


def _check_names(predictions: Sequence[Predictions], config: EvaluationConfig) -> None:
    boards: dict[str, Board] = {}
    for prediction in predictions:
        if prediction.scorer in boards:
            raise ConfigError(f"two scorers are named {prediction.scorer!r}; names must differ")
        boards[prediction.scorer] = prediction.board
    for board in sorted(set(boards.values())):
        reference = config.references.get(board)
        if reference is not None and boards.get(reference) != board:
            allowed = ", ".join(sorted(n for n, b in boards.items() if b == board))
            raise ConfigError.of(f"references[{board!r}]", reference, f"one of {allowed}")
    for scorer, parent in sorted(config.parents.items()):
        if scorer not in boards or boards.get(parent) != boards[scorer]:
            raise ConfigError.of(
                f"parents[{scorer!r}]", parent, f"two scorers of one board among {sorted(boards)}"
            )


def _aligned(
    predictions: Predictions, scores: pl.DataFrame, impressions: pl.DataFrame, split: str
) -> FloatArray:
    """The scores as one flat array, after checking that they belong to these impressions."""
    same = scores[Columns.IMPRESSION_ID].equals(impressions[Columns.IMPRESSION_ID])
    if not same or not np.array_equal(
        offsets_of(scores[Columns.SCORES]), offsets_of(impressions[Columns.CANDIDATES])
    ):
        raise ContractError(
            f"the {split} predictions of scorer {predictions.scorer!r} were made on another "
            "snapshot; score this snapshot again"
        )
    return flatten(scores[Columns.SCORES]).to_numpy()


def _positions(
    predictions: Predictions, ranks: pl.DataFrame, impressions: pl.DataFrame
) -> IntArray:
    """Row of each ranked impression among the test impressions, int64 [ranks]."""
    at = ranks[ROW].to_numpy()
    identifiers = impressions[Columns.IMPRESSION_ID]
    if at.max() >= len(identifiers) or not identifiers.gather(at).equals(
        ranks[Columns.IMPRESSION_ID]
    ):
        raise ContractError(
            f"the catalogue ranks of scorer {predictions.scorer!r} were made on another snapshot; "
            "score this snapshot again"
        )
    return at


def _ratings(impressions: pl.DataFrame) -> FloatArray:
    """Rating of each candidate, NaN where there is none, float64 [elements]."""
    offsets = offsets_of(impressions[Columns.CANDIDATES])
    ratings = np.full(int(offsets[-1]), np.nan)
    rated = impressions[Columns.RATING].is_not_null().to_numpy()
    values = flatten(impressions[Columns.RATING].drop_nulls()).cast(pl.Float64)
    ratings[rated[rows_of(offsets)]] = values.to_numpy()
    return ratings


def _segment_key(segment: Segment) -> str:
    return f"segment:{segment.name}"

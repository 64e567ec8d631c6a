"""How sure: paired cluster bootstrap over the impressions of the test split.

Impressions of one user are dependent – same taste, overlapping history – so resampling single
impressions makes intervals too narrow. Whole users are drawn with replacement instead (the cluster
bootstrap: Davison & Hinkley, 1997, *Bootstrap Methods and their Application*, section 3.8; Field &
Welsh, 2007). Every scorer sees the same draws, so that intervals of differences are paired:
what all scorers find hard cancels out. Intervals are percentile intervals.
"""

from __future__ import annotations

import numpy as np

from recflow.evaluation.slates import FloatArray, IntArray

_CELLS_AT_ONCE = 8_000_000


def bootstrap_ratios(
    numerators: FloatArray, denominators: FloatArray, samples: int, rng: np.random.Generator
) -> FloatArray:
    """Resample ``sum(numerator) / sum(denominator)`` over clusters drawn with replacement.

    A mean over impressions is such a ratio: the numerator is a cluster's sum of the metric, the
    denominator its number of impressions. All columns see the same draws.

    Args:
        numerators: float64 [clusters, columns].
        denominators: float64 [clusters, columns].
        samples: Number of resamples.
        rng: Where the draws come from.

    Returns:
        float64 [samples, columns]; NaN where a resample has nothing in the denominator.
    """
    clusters, columns = numerators.shape
    stacked = np.concatenate([numerators, denominators], axis=1)
    totals = np.empty((samples, 2 * columns))
    step = max(1, _CELLS_AT_ONCE // max(clusters, 1))
    for start in range(0, samples, step):
        stop = min(start + step, samples)
        totals[start:stop] = _draws(clusters, stop - start, rng) @ stacked
    below = totals[:, columns:]
    ratios = np.full((samples, columns), np.nan)
    np.divide(totals[:, :columns], below, out=ratios, where=below != 0)
    return ratios


def percentile_interval(replicates: FloatArray, confidence: float) -> tuple[float, float] | None:
    """Central interval that holds ``confidence`` of the replicates; ``None`` if all are NaN."""
    defined = replicates[~np.isnan(replicates)]
    if not len(defined):
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)


def codes_of(clusters: list[str]) -> tuple[IntArray, int]:
    """Number the clusters: code of each row int64 [rows], and how many there are."""
    distinct, codes = np.unique(np.array(clusters, dtype=np.str_), return_inverse=True)
    return codes.astype(np.int64), len(distinct)


def _draws(clusters: int, samples: int, rng: np.random.Generator) -> FloatArray:
    """How often each cluster is drawn in each resample, float64 [samples, clusters]."""
    drawn = rng.integers(clusters, size=(samples, clusters))
    drawn += np.arange(samples)[:, None] * clusters
    counts = np.bincount(drawn.ravel(), minlength=samples * clusters)
    return counts.reshape(samples, clusters).astype(np.float64)

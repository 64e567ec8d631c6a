"""What of a day is measured, and when a measure has drifted.

Apart from the measuring, so that the code location can show the limits without loading it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from recflow.core.errors import ConfigError
from recflow.quality.drift_rows import Rows

CATEGORICAL: Final = (Rows.CATEGORY_SHOWN, Rows.CATEGORY_CLICKED, Rows.HOUR)
NUMERIC: Final = (Rows.TEXT_LENGTH, Rows.HISTORY_LENGTH, Rows.CANDIDATE_AGE, Rows.SCORE)
DISTRIBUTIONS: Final = (*CATEGORICAL, *NUMERIC)
CLICK_RATE: Final = "click_rate"
NEW_ITEM_SHARE: Final = "new_item_share"
CALIBRATION: Final = "calibration"
UNSEEN_TOKENS: Final = "unseen_tokens"
EMBEDDINGS: Final = "embeddings"
RATES: Final[Mapping[str, tuple[str, str]]] = {
    CLICK_RATE: (Rows.CLICKS, Rows.CANDIDATES),
    NEW_ITEM_SHARE: (Rows.NEW, Rows.DATED),
    CALIBRATION: (Rows.CLICKS, Rows.PREDICTED),
}
MEASURES: Final = (*DISTRIBUTIONS, *RATES, UNSEEN_TOKENS, EMBEDDINGS)
# Compared with rows the model was not trained on, whose histories are as long as the day's.
HELD_OUT_ONLY: Final = frozenset({Rows.HISTORY_LENGTH, Rows.SCORE, CALIBRATION})


@dataclass(frozen=True, slots=True)
class DriftConfig:
    """When a measure has drifted, and how much is looked at.

    Attributes:
        least_distance: Least Jensen-Shannon distance of shares that matters.
        least_rate_factor: Least factor that matters between the odds of a rate, or between clicks
            and predicted clicks; 1.1 is a tenth more.
        least_unseen_tokens: Least share of never seen tokens, beyond the usual, that matters.
        least_embedding_auc: Least AUC of telling new items from known ones, beyond the usual, that
            matters.
        decay_margin: AUC or nDCG@10 that the champion may lose before it has decayed.
        least_impressions: A day with fewer impressions is measured, but not judged.
        least_items: New items with which texts are judged.
        chance: How often a measure may be beyond what chance can do, by chance.
        unusual: How often a day may be beyond what is usual, by chance.
        permutations: Permutations behind what chance can do.
        bootstrap_samples: Resamples behind the interval of the decay.
        confidence: Share of the resamples inside that interval.
        bins: Bins of a numeric column.
        most_impressions: So many impressions a day are looked at; more are drawn at random.
        ignored: Measures that are shown and never alarm.
        seed: Seed of everything drawn.

    Raises:
        ConfigError: A value is impossible.
    """

    least_distance: float = 0.1
    least_rate_factor: float = 1.1
    least_unseen_tokens: float = 0.05
    least_embedding_auc: float = 0.1
    decay_margin: float = 0.01
    least_impressions: int = 200
    least_items: int = 20
    chance: float = 0.001
    unusual: float = 0.005
    permutations: int = 200
    bootstrap_samples: int = 1_000
    confidence: float = 0.95
    bins: int = 10
    most_impressions: int = 20_000
    ignored: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("least_distance", "least_unseen_tokens", "least_embedding_auc", "decay_margin"):
            value: float = getattr(self, key)
            if not 0 <= value < 1:
                raise ConfigError.of(key, value, "0 to less than 1")
        if not 1 <= self.least_rate_factor < math.inf:
            raise ConfigError.of("least_rate_factor", self.least_rate_factor, "1 or more")
        for key in ("chance", "unusual", "confidence"):
            value = getattr(self, key)
            if not 0 < value < 1:
                raise ConfigError.of(key, value, "between 0 and 1")
        for key in ("least_impressions", "least_items", "bootstrap_samples", "most_impressions"):
            value = getattr(self, key)
            if value < 1:
                raise ConfigError.of(key, value, "1 or more")
        if self.permutations < 20:
            raise ConfigError.of("permutations", self.permutations, "20 or more")
        if self.bins < 2:
            raise ConfigError.of("bins", self.bins, "2 or more")
        for name in self.ignored:
            if name not in MEASURES:
                raise ConfigError.of("ignored", name, ", ".join(MEASURES))

"""What to simulate, and how the simulated world drifts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any, Final, cast

from recflow.core.errors import ConfigError
from recflow.data.sources.simulation.headlines import load_newsroom


@dataclass(frozen=True, slots=True)
class TopicSurge:
    """From ``day`` on, the odds that an item has a topic, and is clicked then, grow by a factor."""

    day: int
    topic: str
    factor: float = 3.0


@dataclass(frozen=True, slots=True)
class VocabularyShift:
    """From ``day`` on, a share of the new items is written with words never used before."""

    day: int
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class ClickRateShift:
    """From ``day`` on, the odds of a click are multiplied by ``factor``."""

    day: int
    factor: float = 2.0


@dataclass(frozen=True, slots=True)
class ColdUsers:
    """From ``day`` on, a share of the impressions is of users never seen before that day."""

    day: int
    share: float = 0.5


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    """What to simulate.

    Attributes:
        seed: Seed of everything drawn.
        start: First day of the log (UTC).
        days: Number of days.
        impressions: Impressions in all.
        users: Users known from the first day on.
        items_per_day: Items published a day.
        archive_days: Days before the log whose items fill the first histories and slates.
        item_lifetime_days: Days during which an item is shown.
        slate_min: Smallest number of candidates.
        slate_max: Largest number of candidates.
        history_max: Longest history; the newest clicks are kept.
        freeze_history: Log the clicks before the first day only, as EB-NeRD and MIND do, instead
            of the clicks up to each impression.
        cold_user_share: Share of the users without a click before the first day.
        interest_drift: Probability that a user exchanges one favourite topic in a day.
        interest_strength: Log-odds a candidate gains by the user's favourite subtopic.
        appeal_strength: Log-odds a candidate gains by one standard deviation of appeal.
        position_bias: Log-odds a candidate loses with each position.
        click_bias: Log-odds of a click without interest, at the first position.
        topic_surge: Drift of the topics, if any.
        vocabulary_shift: Drift of the words, if any.
        click_rate_shift: Drift of the click rate, if any.
        cold_users: Drift of the users, if any.
    """

    seed: int = 7
    start: date = date(2024, 1, 1)
    days: int = 14
    impressions: int = 12_000
    users: int = 1_200
    items_per_day: int = 60
    archive_days: int = 6
    item_lifetime_days: int = 3
    slate_min: int = 5
    slate_max: int = 20
    history_max: int = 30
    freeze_history: bool = False
    cold_user_share: float = 0.1
    interest_drift: float = 0.0
    interest_strength: float = 3.4
    appeal_strength: float = 0.65
    position_bias: float = 0.06
    click_bias: float = -3.0
    topic_surge: TopicSurge | None = None
    vocabulary_shift: VocabularyShift | None = None
    click_rate_shift: ClickRateShift | None = None
    cold_users: ColdUsers | None = None

    def __post_init__(self) -> None:
        for key in ("days", "impressions", "users", "items_per_day", "slate_min", "history_max"):
            _require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        for key in ("cold_user_share", "interest_drift"):
            _require(0 <= getattr(self, key) <= 1, key, getattr(self, key), "0 to 1")
        _require(self.slate_max >= self.slate_min, "slate_max", self.slate_max, "slate_min or more")
        _require(
            self.archive_days >= self.item_lifetime_days >= 1,
            "item_lifetime_days",
            self.item_lifetime_days,
            f"1 to archive_days ({self.archive_days})",
        )
        live = self.items_per_day * self.item_lifetime_days
        _require(
            live >= 2 * self.slate_max,
            "items_per_day * item_lifetime_days",
            live,
            f"at least twice slate_max ({2 * self.slate_max})",
        )
        self._check_drifts()

    def _check_drifts(self) -> None:
        for drift in (self.vocabulary_shift, self.cold_users):
            if drift is not None:
                _require(0 <= drift.share <= 1, "share", drift.share, "0 to 1")
        for drift in (self.topic_surge, self.click_rate_shift):
            if drift is not None:
                _require(drift.factor > 0, "factor", drift.factor, "more than 0")
        topics = load_newsroom().topics
        if self.topic_surge is not None:
            topic = self.topic_surge.topic
            _require(topic in topics, "topic_surge.topic", topic, ", ".join(topics))

    def to_json(self) -> str:
        """Serialise, one key a line."""
        return json.dumps(asdict(self) | {"start": self.start.isoformat()}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> SimulationConfig:
        """Parse what :meth:`to_json` wrote.

        Raises:
            ConfigError: A key is unknown or a value impossible.
        """
        try:
            raw = cast("dict[str, Any]", json.loads(text))
            if "start" in raw:
                raw["start"] = date.fromisoformat(raw["start"])
            for key, kind in _DRIFTS.items():
                if raw.get(key) is not None:
                    raw[key] = kind(**raw[key])
            return cls(**raw)
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"the simulation's configuration is not usable: {error}") from error


_DRIFTS: Final[dict[str, type[Any]]] = {
    "topic_surge": TopicSurge,
    "vocabulary_shift": VocabularyShift,
    "click_rate_shift": ClickRateShift,
    "cold_users": ColdUsers,
}


def _require(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError.of(key, value, allowed)

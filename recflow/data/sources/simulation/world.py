"""The simulated world: what is published, and who reads."""

from __future__ import annotations

from typing import Final

import numpy as np

from recflow.core.seeding import make_rng
from recflow.data.sources.simulation.arrays import (
    DECIMALS,
    Floats,
    Ints,
    normalised,
    repeats,
)
from recflow.data.sources.simulation.config import SimulationConfig
from recflow.data.sources.simulation.headlines import load_newsroom

FAVOURITE_WEIGHTS: Final = (1.0, 0.8, 0.6)

_STRAY_CLICKS = 0.15
_PROMINENCE_SPREAD = 0.6
_PROMINENCE_BY_APPEAL = 0.4


class Items:
    """The catalogue in order of publication.

    Attributes:
        published: Time of publication in days since the start of the log, ascending.
        subtopic: Index of the subtopic.
        topic: Index of the topic.
        appeal: Standardised latent appeal.
        reach: ``reach[i]`` is the summed prominence of the items before ``i``.
    """

    def __init__(self, published: Floats, subtopic: Ints, appeal: Floats, reach: Floats):
        self.published = published
        self.subtopic = subtopic
        self.topic = _topic_of_subtopic()[subtopic]
        self.appeal = appeal
        self.reach = reach

    def __len__(self) -> int:
        return len(self.published)

    @classmethod
    def publish(cls, config: SimulationConfig) -> Items:
        """Draw the catalogue."""
        rng = make_rng(config.seed, "items")
        days = config.archive_days + config.days
        count = days * config.items_per_day
        day = np.repeat(np.arange(-config.archive_days, config.days), config.items_per_day)
        published = np.sort(day + rng.random(count))
        subtopics = len(_topic_of_subtopic())
        subtopic = rng.integers(subtopics, size=count)
        if config.topic_surge is not None:
            weights = np.ones(subtopics)
            weights[_topic_of_subtopic() == surging_topic(config)] = config.topic_surge.factor
            surged = rng.choice(subtopics, size=count, p=weights / weights.sum())
            subtopic = np.where(published >= config.topic_surge.day, surged, subtopic)
        appeal = rng.standard_normal(count)
        spread = _PROMINENCE_SPREAD * rng.standard_normal(count)
        prominence = np.round(np.exp(spread + _PROMINENCE_BY_APPEAL * appeal), DECIMALS)
        return cls(published, subtopic, appeal, np.concatenate([[0.0], np.cumsum(prominence)]))


class Users:
    """Who reads: interests and the newest clicks.

    Attributes:
        topics: Favourite topics, the strongest first (users, favourites).
        subtopics: Favourite subtopic in each (users, favourites).
        clicks: Newest clicked items, right-aligned, -1 where there are fewer (users, history).
        activity: ``activity[u]`` is the summed share of traffic of the users up to ``u``.
    """

    def __init__(self, config: SimulationConfig, items: Items) -> None:
        rng = make_rng(config.seed, "users")
        self.known = config.users
        newcomers = 0 if config.cold_users is None else config.users
        count = self.known + newcomers
        topics = int(_topic_of_subtopic().max()) + 1
        self.topics = np.argsort(rng.random((count, topics)), axis=1)[:, : len(FAVOURITE_WEIGHTS)]
        self.subtopics = self._draw_subtopics(self.topics, rng)
        self.activity = np.cumsum(np.round(np.exp(rng.standard_normal(self.known)), DECIMALS))
        self.clicks = np.full((count, config.history_max), -1, dtype=np.int32)
        warm = np.flatnonzero(rng.random(self.known) >= config.cold_user_share)
        self._click_archive(warm, items, rng)

    @staticmethod
    def _draw_subtopics(topics: Ints, rng: np.random.Generator) -> Ints:
        of_topic = _topic_of_subtopic()
        first = np.searchsorted(of_topic, topics)
        size = np.searchsorted(of_topic, topics, side="right") - first
        return first + (rng.random(topics.shape) * size).astype(np.int64)

    def _click_archive(self, warm: Ints, items: Items, rng: np.random.Generator) -> None:
        """Give warm users clicks on items published before the log starts."""
        archive = np.flatnonzero(items.published < 0)
        by_subtopic = archive[np.argsort(items.subtopic[archive], kind="stable")]
        width = self.clicks.shape[1]
        shape = (len(warm), width)
        favourite = rng.choice(len(FAVOURITE_WEIGHTS), size=shape, p=normalised(FAVOURITE_WEIGHTS))
        wanted = np.take_along_axis(self.subtopics[warm], favourite, axis=1)
        first = np.searchsorted(items.subtopic[by_subtopic], wanted)
        size = np.searchsorted(items.subtopic[by_subtopic], wanted, side="right") - first
        interesting = by_subtopic[
            np.minimum(first + (rng.random(shape) * size).astype(np.int64), len(archive) - 1)
        ]
        stray = archive[rng.integers(len(archive), size=shape)]
        is_stray = (rng.random(shape) < _STRAY_CLICKS) | (size == 0)
        clicked = np.where(is_stray, stray, interesting)
        length = rng.integers(1, width + 1, size=(len(warm), 1))
        clicked[(np.arange(width) >= length) | repeats(clicked)] = -1
        self.clicks[warm] = np.sort(clicked, axis=1)  # oldest first, the absent ones in front

    def drift(self, share: float, rng: np.random.Generator) -> None:
        """Let a share of the users exchange one of their favourites for another topic."""
        moved = np.flatnonzero(rng.random(len(self.topics)) < share)
        topics = int(_topic_of_subtopic().max()) + 1
        fresh = rng.integers(topics, size=len(moved))
        is_new = (self.topics[moved] != fresh[:, None]).all(axis=1)
        moved, fresh = moved[is_new], fresh[is_new]
        slot = rng.integers(len(FAVOURITE_WEIGHTS), size=len(moved))
        self.topics[moved, slot] = fresh
        self.subtopics[moved, slot] = self._draw_subtopics(fresh, rng)


def _topic_of_subtopic() -> Ints:
    """Index of the topic of each subtopic; ascending."""
    newsroom = load_newsroom()
    topics = newsroom.topics
    return np.array([topics.index(subtopic.topic) for subtopic in newsroom.subtopics])


def surging_topic(config: SimulationConfig) -> int:
    """Index of the topic that surges; only asked where there is one."""
    assert config.topic_surge is not None
    return load_newsroom().topics.index(config.topic_surge.topic)

"""Slates shown in the simulated world, and what is clicked in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import numpy as np

from recflow.core.seeding import make_rng
from recflow.data.sources.simulation.arrays import (
    DECIMALS,
    Flags,
    Floats,
    Ints,
    normalised,
    repeats,
)
from recflow.data.sources.simulation.config import SimulationConfig
from recflow.data.sources.simulation.world import FAVOURITE_WEIGHTS, Items, Users, surging_topic

CHUNK = 50_000
_OTHER_SUBTOPIC = 0.6
_WEEKEND_TRAFFIC = 0.75
_SATURDAY = 5
_SECONDS_PER_DAY = 86_400
# Share of the day's traffic by hour, from midnight: quiet nights, a morning and an evening peak.
_HOURLY_TRAFFIC = (1, 1, 1, 1, 1, 2, 4, 6, 7, 7, 6, 6, 7, 6, 5, 5, 5, 6, 7, 8, 8, 7, 4, 2)


@dataclass(frozen=True, slots=True)
class Slates:
    """A chunk of impressions in order of time; matrices are (impressions, slate_max).

    Attributes:
        seconds: Time in seconds since the start of the log.
        user: Index of the user.
        shown: Index of the candidate; the number of items where the slate is shorter.
        utility: Probability of a click given that there is one; 0 where the slate is shorter.
        clicked: Whether the candidate was clicked.
    """

    seconds: Ints
    user: Ints
    shown: Ints
    utility: Floats
    clicked: Flags


def draw_slates(config: SimulationConfig, items: Items, users: Users) -> Iterator[Slates]:
    """Draw the impressions day by day, in order of time."""
    traffic = np.array([_traffic(config, day) for day in range(config.days)])
    share: Floats = np.cumsum(traffic) / traffic.sum()
    ends: Ints = np.rint(share * config.impressions).astype(np.int64)
    for day, count in enumerate(np.diff(ends, prepend=0)):
        rng = make_rng(config.seed, "day", day)
        if day:
            users.drift(config.interest_drift, rng)
        seconds = np.sort(_draw_seconds(int(count), rng)) + day * _SECONDS_PER_DAY
        for start in range(0, int(count), CHUNK):
            yield _draw_chunk(config, items, users, seconds[start : start + CHUNK], rng)


def _draw_chunk(
    config: SimulationConfig,
    items: Items,
    users: Users,
    seconds: Ints,
    rng: np.random.Generator,
) -> Slates:
    days = seconds / _SECONDS_PER_DAY
    user = _draw_users(config, users, days, rng)
    shown = _draw_candidates(config, items, days, rng)
    probability = _click_probability(config, items, users, days, user, shown)
    clicked = _draw_clicks(probability, rng)
    some_click = 1.0 - np.cumprod(1.0 - probability, axis=1)[:, -1:]
    return Slates(seconds, user, shown, np.round(probability / some_click, DECIMALS), clicked)


def _draw_users(
    config: SimulationConfig, users: Users, days: Floats, rng: np.random.Generator
) -> Ints:
    mass = rng.random(len(days)) * float(users.activity[-1])
    found: Ints = np.searchsorted(users.activity, mass, side="right")
    user = np.minimum(found, users.known - 1)
    drift = config.cold_users
    if drift is None:
        return user
    newcomer = users.known + rng.integers(users.known, size=len(days))
    is_new = (rng.random(len(days)) < drift.share) & (days >= drift.day)
    return np.where(is_new, newcomer, user)


def _draw_candidates(
    config: SimulationConfig, items: Items, days: Floats, rng: np.random.Generator
) -> Ints:
    """Draw distinct live items by prominence; too many are drawn, then the repeated ones go."""
    first = np.searchsorted(items.published, days - config.item_lifetime_days)
    last = np.searchsorted(items.published, days)
    low, high = items.reach[first][:, None], items.reach[last][:, None]
    drawn = 2 * config.slate_max
    mass = low + rng.random((len(days), drawn)) * (high - low)
    item = np.searchsorted(items.reach, mass, side="right") - 1
    item = np.clip(item, first[:, None], last[:, None] - 1)
    fresh = ~repeats(item)
    size = rng.integers(config.slate_min, config.slate_max + 1, size=(len(days), 1))
    kept = fresh & (np.cumsum(fresh, axis=1) <= size)
    leading = np.argsort(~kept, axis=1, kind="stable")[:, : config.slate_max]
    shown = np.where(kept, item, len(items))
    return np.take_along_axis(shown, leading, axis=1)


def _click_probability(
    config: SimulationConfig,
    items: Items,
    users: Users,
    days: Floats,
    user: Ints,
    shown: Ints,
) -> Floats:
    """Probability of each click; 0 where the slate is shorter."""
    present = shown < len(items)
    item = np.where(present, shown, 0)
    topic, subtopic = items.topic[item], items.subtopic[item]
    interest = np.zeros(shown.shape)
    for favourite, weight in enumerate(FAVOURITE_WEIGHTS):
        exact = users.subtopics[user, favourite][:, None] == subtopic
        same = users.topics[user, favourite][:, None] == topic
        interest += weight * np.where(exact, 1.0, _OTHER_SUBTOPIC * same)
    logit: Floats = (
        config.click_bias
        + config.interest_strength * interest
        + config.appeal_strength * items.appeal[item]
        - config.position_bias * np.arange(int(shown.shape[1]))
    )
    if config.click_rate_shift is not None:
        logit += np.log(config.click_rate_shift.factor) * _since(days, config.click_rate_shift.day)
    if config.topic_surge is not None:
        surging = (topic == surging_topic(config)) & _since(days, config.topic_surge.day)
        logit += np.log(config.topic_surge.factor) * surging
    return np.where(present, np.round(1.0 / (1.0 + np.exp(-logit)), DECIMALS), 0.0)


def _draw_clicks(probability: Floats, rng: np.random.Generator) -> Flags:
    """Draw independent clicks given that there is at least one.

    The first click is drawn from its distribution given that there is one, the candidates after it
    independently: exact, and without drawing slates again until one has a click.
    """
    none_before = np.cumprod(1.0 - probability, axis=1)
    reached = 1.0 - none_before  # probability of a click up to and including each position
    mass = rng.random((len(probability), 1)) * reached[:, -1:]
    first = np.argmax(mass < reached, axis=1)[:, None]
    position: Ints = np.arange(int(probability.shape[1]))
    later: Flags = (position > first) & (rng.random(probability.shape) < probability)
    return (position == first) | later


def _draw_seconds(count: int, rng: np.random.Generator) -> Ints:
    hour = rng.choice(len(_HOURLY_TRAFFIC), size=count, p=normalised(_HOURLY_TRAFFIC))
    return hour * 3_600 + rng.integers(3_600, size=count)


def _traffic(config: SimulationConfig, day: int) -> float:
    is_weekend = (config.start + timedelta(days=day)).weekday() >= 5
    return _WEEKEND_TRAFFIC if is_weekend else 1.0


def _since(days: Floats, day: int) -> Flags:
    return (days >= day)[:, None]

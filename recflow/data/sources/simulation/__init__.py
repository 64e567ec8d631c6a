"""A deterministic generator of MIND-format logs of any size, with the truth beside them.

What is simulated
    Items belong to a subtopic of a topic, say so in their text, and have a latent *appeal* that
    the wording shows in part. They are published all day long and leave the slates after a few
    days. Users have three favourite topics and a favourite subtopic in each. A slate holds items
    that are live at its time, prominent ones more often.

    A candidate is clicked with probability
    ``sigmoid(click_bias + interest + appeal - position_bias * position)``, independently. Only
    slates with at least one click are logged, as in MIND; the *utility* written to
    ``truth.parquet`` is the probability given that: ``p / (1 - prod(1 - p))``.

Everything is drawn in chunks of array operations, so memory depends on the number of users and
items but not on the number of impressions.
"""

from __future__ import annotations

from recflow.data.sources.simulation.config import (
    ClickRateShift,
    ColdUsers,
    SimulationConfig,
    TopicSurge,
    VocabularyShift,
)
from recflow.data.sources.simulation.writing import CONFIG_FILE, TRUTH_FILE, UTILITY, simulate

__all__ = [
    "CONFIG_FILE",
    "TRUTH_FILE",
    "UTILITY",
    "ClickRateShift",
    "ColdUsers",
    "SimulationConfig",
    "TopicSurge",
    "VocabularyShift",
    "simulate",
]

"""Texts of simulated news: short English headlines that carry their topic in words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Final, cast

import numpy as np

_APPEAL_NOISE: Final = 0.6
_APPEAL_LIMIT: Final = 0.8


@dataclass(frozen=True, slots=True)
class Subtopic:
    """The words of one subtopic; the later ones are unseen before a vocabulary shift."""

    topic: str
    name: str
    subjects: Sequence[str]
    actions: Sequence[str]
    later_subjects: Sequence[str]
    later_actions: Sequence[str]


@dataclass(frozen=True, slots=True)
class Newsroom:
    """All words and templates the simulation writes with."""

    subtopics: Sequence[Subtopic]
    places: Sequence[str]
    headlines: dict[str, list[str]]
    abstracts: Sequence[str]
    endings: Sequence[str]

    @property
    def topics(self) -> list[str]:
        """Names of the topics, each once, in the order of their subtopics."""
        return list(dict.fromkeys(subtopic.topic for subtopic in self.subtopics))


@dataclass(frozen=True, slots=True)
class NewsText:
    """Text of one simulated item; ``place`` is its index when the title names it, else None."""

    title: str
    abstract: str
    place: int | None


@cache
def load_newsroom() -> Newsroom:
    """Load the built-in vocabulary."""
    file = resources.files("recflow.data.sources.simulation") / "newsroom.json"
    raw = json.loads(file.read_text("utf-8"))
    topics = cast("dict[str, dict[str, dict[str, list[str]]]]", raw.pop("topics"))
    subtopics = [
        Subtopic(topic, name, **words)
        for topic, named in topics.items()
        for name, words in named.items()
    ]
    return Newsroom(subtopics=subtopics, **raw)


def write_text(
    newsroom: Newsroom,
    subtopic: Subtopic,
    appeal: float,
    *,
    later_words: bool,
    rng: np.random.Generator,
) -> NewsText:
    """Write one item.

    Args:
        newsroom: The vocabulary.
        subtopic: What it is about.
        appeal: Standardised appeal; the opening of the headline shows it, with noise.
        later_words: Write with the words of a vocabulary shift.
        rng: Source of randomness.
    """
    subjects = subtopic.later_subjects if later_words else subtopic.subjects
    actions = subtopic.later_actions if later_words else subtopic.actions
    place = int(rng.integers(len(newsroom.places)))
    shown = appeal + _APPEAL_NOISE * rng.standard_normal()
    tone = "strong" if shown > _APPEAL_LIMIT else "dull" if shown < -_APPEAL_LIMIT else "plain"
    subject, other = _two(subjects, rng)
    action, other_action = _two(actions, rng)
    template = _one(newsroom.headlines[tone], rng)
    words = {
        "subject": subject,
        "action": action,
        "subject2": other,
        "action2": other_action,
        "place": newsroom.places[place],
    }
    abstract = _capitalised(_one(newsroom.abstracts, rng).format(**words))
    return NewsText(
        title=_capitalised(template.format(**words)),
        abstract=f"{abstract} {_one(newsroom.endings, rng)}".rstrip(),
        place=place if "{place}" in template else None,
    )


def _one(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def _two(choices: Sequence[str], rng: np.random.Generator) -> tuple[str, str]:
    first = int(rng.integers(len(choices)))
    second = (first + 1 + int(rng.integers(len(choices) - 1))) % len(choices)
    return choices[first], choices[second]


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]

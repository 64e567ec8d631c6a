from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recflow.data.text import compose_text, count_words, normalise_text


def composed(title: str | None, body: str | None, **options: int) -> str:
    frame = pl.DataFrame({"t": [title], "b": [body]}, schema={"t": pl.String, "b": pl.String})
    return frame.select(compose_text(pl.col("t"), pl.col("b"), **options)).item()


def normalised(text: str | None) -> str:
    return (
        pl.DataFrame({"t": [text]}, schema={"t": pl.String})
        .select(normalise_text(pl.col("t")))
        .item()
    )


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("  two \t\n words\r\n", "two words"),
        ("no\u00a0break\u3000space", "no break space"),
        ("nul\x00byte", "nul byte"),
        ("\ufeffmark", "mark"),
        ("co\u00adop", "coop"),
        ("Cafe\u0301", "Caf\u00e9"),
        ("\u200b \x7f", ""),
        (None, ""),
        # joiners carry meaning in emoji and in scripts: they stay
        ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),
    ],
)
def test_text_is_normalised(raw: str | None, expected: str) -> None:
    assert normalised(raw) == expected


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalised(text)
    assert normalised(once) == once
    assert once == once.strip()
    assert "\x00" not in once
    assert "  " not in once


@pytest.mark.parametrize(
    ("title", "body", "expected"),
    [
        ("Title", "Body", "Title. Body"),
        ("Really?", "Yes", "Really? Yes"),
        ("Title", "", "Title"),
        ("Title", None, "Title"),
        ("", "Body", "Body"),
        (None, None, ""),
    ],
)
def test_the_title_is_a_sentence_before_the_body(
    title: str | None, body: str | None, expected: str
) -> None:
    assert composed(title, body) == expected


@given(st.text(), st.text(), st.integers(1, 40))
def test_the_text_is_bounded(title: str, body: str, bound: int) -> None:
    text = composed(title, body, max_characters=bound)
    assert len(text) <= bound
    assert composed(title, body).startswith(text)


def test_words_are_counted() -> None:
    frame = pl.DataFrame({"t": ["", "one", "one two  three"]})
    assert frame.select(count_words(pl.col("t"))).to_series().to_list() == [0, 1, 3]

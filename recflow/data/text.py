"""The text an encoder reads: one definition, for training and for serving alike."""

from __future__ import annotations

import polars as pl

# Longer than the encoder's window in every alphabetic language we feed it; a bound on memory, not
# a modelling choice.
MAX_TEXT_CHARACTERS = 1_000

# Soft hyphen, zero-width space, word joiner, byte-order mark: they print nothing and only split
# tokens. The zero-width joiners stay, because scripts and emoji need them.
_INVISIBLE = r"[\u{AD}\u{200B}\u{2060}\u{FEFF}]+"
_WHITESPACE_OR_CONTROL = r"[\p{Cc}\p{Z}]+"
_SENTENCE_END = r"[.!?:;…]$"


def normalise_text(text: pl.Expr) -> pl.Expr:
    """Normalise a string: NFC, no control or invisible characters, single spaces, none at the ends.

    Applying it twice changes nothing. Nulls become the empty string.
    """
    return (
        text.fill_null("")
        .str.replace_all(_INVISIBLE, "")
        .str.normalize("NFC")
        .str.replace_all(_WHITESPACE_OR_CONTROL, " ")
        .str.strip_chars(" ")
    )


def count_words(text: pl.Expr) -> pl.Expr:
    """Count the space-separated words of a normalised string (Int32)."""
    return text.str.count_matches(r"\S+").cast(pl.Int32)


def compose_text(
    title: pl.Expr, body: pl.Expr, *, max_characters: int = MAX_TEXT_CHARACTERS
) -> pl.Expr:
    """Compose the text an encoder reads: the title as a sentence, then the body.

    Args:
        title: String expression; nulls count as empty.
        body: String expression; nulls count as empty.
        max_characters: The text is cut to this many characters (code points).

    Returns:
        String expression without nulls; empty where both parts are.
    """
    head, tail = normalise_text(title), normalise_text(body)
    sentence = pl.when(head.str.contains(_SENTENCE_END)).then(head).otherwise(head + ".")
    return (
        pl.when(tail == "")
        .then(head)
        .when(head == "")
        .then(tail)
        .otherwise(sentence + " " + tail)
        .str.slice(0, max_characters)
        .str.strip_chars(" ")
    )

"""The items and users a ranker knows by name: their numbers, and the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from recflow.core.errors import ArtifactError
from recflow.modeling.texts import Rows

VOCABULARY_NAME = "vocabulary.json"
UNKNOWN = 0


def number_ids(ids: pl.Series, known: Sequence[str]) -> Rows:
    """Number of each id: 1 + its place in ``known``, 0 where it is not there."""
    if not known:
        return np.zeros(len(ids), dtype=np.int64)
    numbers = pl.int_range(1, len(known) + 1, dtype=pl.Int64, eager=True)
    return (
        ids.cast(pl.String)
        .replace_strict(list(known), numbers, default=UNKNOWN, return_dtype=pl.Int64)
        .to_numpy(writable=True)
    )


def save_vocabulary(directory: Path, *, item_ids: Sequence[str], user_ids: Sequence[str]) -> None:
    """Write the known ids, in the order of their numbers."""
    text = json.dumps(
        {"item_ids": list(item_ids), "user_ids": list(user_ids)},
        ensure_ascii=False,
        separators=(",", ":"),
    )
    (directory / VOCABULARY_NAME).write_text(text + "\n", encoding="utf-8")


def load_vocabulary(directory: Path, *, items: int, users: int) -> tuple[list[str], list[str]]:
    """Read the known ids of items and users.

    Args:
        directory: Where they were saved.
        items: How many items are expected.
        users: How many users.

    Raises:
        ArtifactError: The file is missing, damaged, or holds another number of ids.
    """
    file = directory / VOCABULARY_NAME
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        item_ids, user_ids = content["item_ids"], content["user_ids"]
    except FileNotFoundError:
        raise ArtifactError(f"{file} is missing; rebuild the model") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file} is not a vocabulary: {error!r}") from error
    for key, ids, expected in (("item_ids", item_ids, items), ("user_ids", user_ids, users)):
        if not isinstance(ids, list) or not all(isinstance(value, str) for value in ids):
            raise ArtifactError(f"{file}: {key} is not a list of strings; rebuild the model")
        if len(set(ids)) != len(ids) or len(ids) != expected:
            raise ArtifactError(
                f"{file}: {key} holds {len(ids)} ids, {len(set(ids))} of them distinct; the user "
                f"model has weights for {expected}. Rebuild the model"
            )
    return item_ids, user_ids

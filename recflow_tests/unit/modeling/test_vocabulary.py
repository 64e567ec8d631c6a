import json
from pathlib import Path

import polars as pl
import pytest

from recflow.core.errors import ArtifactError
from recflow.modeling.vocabulary import (
    VOCABULARY_NAME,
    load_vocabulary,
    number_ids,
    save_vocabulary,
)


def test_numbers_count_from_one_and_zero_is_unknown() -> None:
    ids = pl.Series(["b", "x", "a", "b"])
    assert number_ids(ids, ["a", "b"]).tolist() == [2, 0, 1, 2]
    assert number_ids(ids, []).tolist() == [0, 0, 0, 0]
    assert number_ids(ids.clear(), ["a"]).tolist() == []


def test_a_vocabulary_survives_the_disk(tmp_path: Path) -> None:
    save_vocabulary(tmp_path, item_ids=["ø", "b"], user_ids=["7"])
    assert load_vocabulary(tmp_path, items=2, users=1) == (["ø", "b"], ["7"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a vocabulary"),
        ("[]", "is not a vocabulary"),
        ('{"item_ids": []}', "user_ids"),
        ('{"item_ids": "ab", "user_ids": []}', "item_ids is not a list of strings"),
        ('{"item_ids": [1, 2], "user_ids": []}', "item_ids is not a list of strings"),
        ('{"item_ids": ["a", "a"], "user_ids": []}', "2 ids, 1 of them distinct"),
        ('{"item_ids": ["a"], "user_ids": []}', "weights for 2"),
        ('{"item_ids": ["a", "b"], "user_ids": ["u"]}', "weights for 0"),
    ],
)
def test_another_vocabulary_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / VOCABULARY_NAME).write_text(content)
    with pytest.raises(ArtifactError, match=message):
        load_vocabulary(tmp_path, items=2, users=0)


def test_a_missing_vocabulary_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=VOCABULARY_NAME):
        load_vocabulary(tmp_path, items=1, users=0)


def test_the_file_is_small_and_reads_as_json(tmp_path: Path) -> None:
    save_vocabulary(tmp_path, item_ids=["a", "b"], user_ids=[])
    text = (tmp_path / VOCABULARY_NAME).read_text()
    assert json.loads(text) == {"item_ids": ["a", "b"], "user_ids": []}
    assert " " not in text

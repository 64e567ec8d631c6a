from __future__ import annotations

import math
from datetime import datetime
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recflow.core.columns import IMPRESSION_FEATURES, SPLIT_IMPRESSIONS
from recflow.core.errors import ConfigError, ContractError
from recflow.data.history import extend_histories
from recflow_tests.unit.data.tables import at, raw_impressions, window


def seen(*rows: dict[str, Any], max_history: int = 50) -> dict[str, list[str]]:
    """History of each impression by its id."""
    extended = extend_histories(window(*rows), max_history=max_history)
    return dict(extended.select("impression_id", "history").iter_rows())


def test_earlier_clicks_follow_the_logged_history() -> None:
    extended = extend_histories(
        window(
            {"time": at(1), "history": ["x"], "candidates": ["a", "b"], "clicked": ["b"]},
            {"time": at(2), "history": ["x"], "candidates": ["c", "d"], "clicked": ["c"]},
            {"time": at(3), "history": ["x"], "candidates": ["e", "f"], "clicked": ["e"]},
        ),
        max_history=50,
    )
    columns = ["history", "history_length", "logged_history_length", "history_until"]
    assert extended.select(columns).rows() == [
        (["x"], 1, 1, None),
        (["x", "b"], 2, 1, at(1)),
        (["x", "b", "c"], 3, 1, at(2)),
    ]


def test_impressions_of_the_same_moment_do_not_see_each_other() -> None:
    histories = seen(
        {"time": at(1), "candidates": ["a"], "clicked": ["a"]},
        {"time": at(1), "candidates": ["b"], "clicked": ["b"]},
        {"time": at(2), "candidates": ["c"], "clicked": ["c"]},
    )
    assert histories == {"i1": [], "i2": [], "i3": ["a", "b"]}


def test_users_do_not_see_each_other() -> None:
    histories = seen(
        {"time": at(1), "user_id": "u1", "clicked": ["a"]},
        {"time": at(2), "user_id": "u2", "clicked": ["b"]},
        {"time": at(3), "user_id": "u1", "clicked": []},
    )
    assert histories == {"i1": [], "i2": [], "i3": ["a"]}


def test_cold_users_without_clicks_stay_cold() -> None:
    assert seen({"clicked": []}, {"clicked": []}) == {"i1": [], "i2": []}


def test_an_item_enters_at_its_first_click_and_stays_there() -> None:
    histories = seen(
        {"time": at(1), "clicked": ["a"]},
        {"time": at(2), "clicked": ["b"]},
        {"time": at(3), "clicked": ["a"]},
        {"time": at(4), "clicked": []},
    )
    assert histories["i4"] == ["a", "b"]


def test_the_log_is_not_repeated() -> None:
    live = seen(
        {"time": at(1), "history": ["x"], "clicked": ["a"]},
        {"time": at(2), "history": ["x", "a"], "clicked": ["b"]},
        {"time": at(3), "history": ["x", "a", "b"], "clicked": []},
    )
    frozen = seen(
        {"time": at(1), "history": ["x"], "clicked": ["a"]},
        {"time": at(2), "history": ["x"], "clicked": ["b"]},
        {"time": at(3), "history": ["x"], "clicked": []},
    )
    assert live == frozen == {"i1": ["x"], "i2": ["x", "a"], "i3": ["x", "a", "b"]}


def test_clicks_of_one_slate_are_in_its_order() -> None:
    histories = seen(
        {"time": at(1), "candidates": ["c", "a", "b"], "clicked": ["a", "b", "c"]},
        {"time": at(2)},
    )
    assert histories["i2"] == ["c", "a", "b"]


def test_the_newest_are_kept_and_the_logged_ones_go_first() -> None:
    rows = window(
        {"time": at(1), "history": ["x", "y", "z"], "clicked": ["a"]},
        {"time": at(2), "history": ["x", "y", "z"], "clicked": ["b"]},
        {"time": at(3), "history": ["x", "y", "z"], "clicked": []},
    )
    columns = ["history", "logged_history_length", "history_until"]
    assert extend_histories(rows, max_history=3).select(columns).rows() == [
        (["x", "y", "z"], 3, None),
        (["y", "z", "a"], 2, at(1)),
        (["z", "a", "b"], 1, at(2)),
    ]
    assert extend_histories(rows, max_history=1).select(columns).rows() == [
        (["z"], 1, None),
        (["a"], 0, at(1)),
        (["b"], 0, at(2)),
    ]


def test_clicks_that_a_cut_log_lost_are_not_added_as_new() -> None:
    # A live log cut to the newest four: a and b were clicked, then pushed out of it.
    slate = list("abcdefg")
    clicks = [
        {"time": at(i), "candidates": slate, "clicked": [item], "history": slate[:i][-4:]}
        for i, item in enumerate("abcdef")
    ]
    histories = seen(*clicks, {"time": at(9), "history": list("cdef")}, max_history=4)
    assert histories["i7"] == ["c", "d", "e", "f"]


def test_a_cut_log_is_followed_by_what_came_after_it() -> None:
    # Brought up to date once, after e: it lost a and b, and does not know f and g yet.
    slate = list("abcdefg")
    clicks = [
        {"time": at(i), "candidates": slate, "clicked": [item]} for i, item in enumerate(slate)
    ]
    later = {"time": at(9), "history": ["x", "c", "d", "e"]}
    assert seen(*clicks, later, max_history=4)["i8"] == ["d", "e", "f", "g"]


def test_a_log_cut_within_one_slate_is_complete() -> None:
    slate = list("abcde")
    session = {"time": at(1), "candidates": slate, "clicked": slate}
    assert seen(session, {"time": at(2), "history": list("cde")}, max_history=3)["i2"] == [*"cde"]


def test_returning_to_an_old_item_hides_nothing() -> None:
    histories = seen(
        {"time": at(1), "history": ["x", "y", "z"], "candidates": ["a"], "clicked": ["a"]},
        {"time": at(2), "history": ["x", "y", "z"], "candidates": ["z"], "clicked": ["z"]},
        {"time": at(3), "history": ["x", "y", "z"], "candidates": ["y"], "clicked": ["y"]},
        {"time": at(4), "history": ["x", "y", "z"], "clicked": []},
        max_history=3,
    )
    assert histories["i4"] == ["y", "z", "a"]


def test_the_result_is_in_order_of_time_and_id() -> None:
    rows = window(
        {"impression_id": "9", "time": at(2), "user_id": "u1"},
        {"impression_id": "2", "time": at(2), "user_id": "u2"},
        {"impression_id": "5", "time": at(1)},
    )
    assert extend_histories(rows, max_history=5)["impression_id"].to_list() == ["5", "2", "9"]


def test_impossible_input_is_an_error() -> None:
    with pytest.raises(ConfigError, match="max_history = 0"):
        extend_histories(window({}), max_history=0)
    with pytest.raises(ContractError, match="impression_features"):
        extend_histories(raw_impressions({}), max_history=5)


def test_an_empty_window_stays_a_table() -> None:
    extended = extend_histories(IMPRESSION_FEATURES.empty(), max_history=5)
    SPLIT_IMPRESSIONS.check_schema(extended.schema)
    assert extended.is_empty()


# --- against the definition, written down a second time ------------------------------------------


def defined_history(
    row: dict[str, Any], rows: list[dict[str, Any]], max_history: int
) -> tuple[list[str], int, datetime | None]:
    """The module's definition for one impression: history, logged part, time of the last added."""
    first_clicks: dict[str, datetime] = {}
    for other in sorted(rows, key=lambda other: (other["time"], other["impression_id"])):
        if other["user_id"] == row["user_id"] and other["time"] < row["time"]:
            for item, label in zip(other["candidates"], other["labels"], strict=True):
                if label:
                    first_clicks.setdefault(item, other["time"])
    logged = row["history"]
    in_log = sorted((first_clicks[item] for item in set(logged) & set(first_clicks)), reverse=True)
    needed = max(3, math.ceil(max_history / 10))
    covered = None
    if len(logged) >= max_history and len(in_log) >= needed:
        covered = in_log[needed - 1]
    added = [
        item
        for item, time in first_clicks.items()
        if item not in logged and (covered is None or time > covered)
    ][-max_history:]
    kept = logged[len(logged) - min(len(logged), max_history - len(added)) :]
    return kept + added, len(kept), first_clicks[added[-1]] if added else None


@st.composite
def any_window(draw: st.DrawFn) -> pl.DataFrame:
    items = st.sampled_from("abcdefgh")
    slate = st.lists(items, min_size=1, max_size=5, unique=True)
    row = st.fixed_dictionaries(
        {
            "user_id": st.sampled_from(["u1", "u1", "u2", "u3"]),
            "time": st.integers(0, 9).map(at),
            "history": st.lists(items | st.sampled_from("xyz"), max_size=6),
            "candidates": slate,
        }
    )
    rows = draw(st.lists(row, max_size=14))
    for impression in rows:
        impression["clicked"] = draw(
            st.lists(st.sampled_from(impression["candidates"]), unique=True, max_size=2)
        )
    return window(*rows)


@settings(deadline=None)
@given(any_window(), st.integers(1, 7), st.randoms())
def test_histories_are_as_defined(rows: pl.DataFrame, max_history: int, random: Any) -> None:
    before = rows.clone()
    extended = extend_histories(rows, max_history=max_history)
    assert rows.equals(before)
    SPLIT_IMPRESSIONS.check_schema(extended.schema)

    everything = rows.to_dicts()
    by_id = {row["impression_id"]: row for row in everything}
    assert sorted(extended["impression_id"]) == sorted(by_id)
    for row in extended.to_dicts():
        logged = by_id[row["impression_id"]]
        expected = defined_history(logged, everything, max_history)
        assert (row["history"], row["logged_history_length"], row["history_until"]) == expected
        assert row["history_length"] == len(row["history"])
        changed = {"history", "history_length", "logged_history_length", "history_until"}
        assert {k: v for k, v in row.items() if k not in changed} == {
            k: v for k, v in logged.items() if k not in changed
        }

    order = list(range(rows.height))
    random.shuffle(order)
    assert extend_histories(rows[order], max_history=max_history).equals(extended)


@settings(deadline=None, max_examples=30)
@given(any_window(), st.integers(1, 7))
def test_many_chunks_give_what_one_gives(rows: pl.DataFrame, max_history: int) -> None:
    whole = extend_histories(rows, max_history=max_history)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recflow.data.history._CHUNK_ROWS", 3)
        assert extend_histories(rows, max_history=max_history).equals(whole)

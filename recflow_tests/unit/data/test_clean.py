from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import Any

import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recflow.core.columns import IMPRESSIONS, ITEMS, QUARANTINE, UTC_TIME, Reason
from recflow.core.errors import ConfigError, ContractError
from recflow.data.clean import Cleaned, clean_impressions, clean_items
from recflow_tests.unit.data.tables import at, raw_impressions, raw_items

KNOWN = pl.Series("item_id", ["a", "b", "c", "d", None, "a"])


def clean(*rows: dict[str, Any], max_history: int = 50) -> Cleaned:
    return clean_impressions(raw_impressions(*rows), KNOWN, max_history=max_history)


def reasons(cleaned: Cleaned) -> list[str]:
    return cleaned.quarantine["reason"].to_list()


# --- items ---------------------------------------------------------------------------------------


def test_item_texts_are_normalised() -> None:
    [row] = clean_items(
        raw_items({"title": " A\ttitle ", "body": None, "category": "  ", "entities": None})
    ).rows.to_dicts()
    assert (row["title"], row["body"], row["category"], row["entities"]) == (
        "A title",
        "",
        None,
        [],
    )


def test_an_item_without_title_is_named_by_its_body() -> None:
    words = [f"w{i}" for i in range(35)]
    cleaned = clean_items(raw_items({"title": " ", "body": " ".join(words)}))
    [row] = cleaned.rows.to_dicts()
    assert row["title"].split() == words[:30]
    assert row["body"].split() == words[30:]
    assert cleaned.counts["titles_from_body"] == 1


def test_items_that_cannot_be_used_say_why() -> None:
    cleaned = clean_items(
        raw_items(
            {"item_id": "n"},
            {"item_id": None},
            {"item_id": " "},
            {"title": "\u200b", "body": None},
            {"item_id": "n", "title": "Another"},
        )
    )
    assert cleaned.rows["item_id"].to_list() == ["n"]
    assert reasons(cleaned) == ["missing_id", "missing_id", "empty_text", "duplicate_item"]
    assert cleaned.quarantine["source_row"].to_list() == [2, 3, 4, 5]
    last = cleaned.quarantine.row(-1, named=True)
    assert last["detail"] == "same item_id as items.tsv row 1"
    assert '"title":"Another"' in last["raw"]


def test_an_unusable_item_does_not_make_a_sound_one_a_duplicate() -> None:
    cleaned = clean_items(raw_items({"item_id": "n", "title": ""}, {"item_id": "n"}))
    assert cleaned.rows["source_row"].to_list() == [2]
    assert reasons(cleaned) == ["empty_text"]


def test_an_impossible_publication_time_is_unknown() -> None:
    cleaned = clean_items(
        raw_items({"published_at": datetime(1970, 1, 1, tzinfo=UTC)}, {"published_at": at(0)})
    )
    assert cleaned.rows["published_at"].to_list() == [None, at(0)]
    assert cleaned.counts["impossible_published_at"] == 1


# --- impressions ---------------------------------------------------------------------------------


def test_order_is_kept_and_the_newest_history_used() -> None:
    cleaned = clean(
        {"history": ["d", "gone", "c", "b", "a"], "candidates": ["c", "gone", "a", "b"]},
        max_history=3,
    )
    [row] = cleaned.rows.to_dicts()
    assert row["history"] == ["c", "b", "a"]
    assert row["candidates"] == ["c", "a", "b"]
    assert cleaned.counts == {
        "rows_in": 1,
        "rows_kept": 1,
        "rows_quarantined": 0,
        "dangling_history_ids": 1,
        "dangling_candidate_ids": 1,
        "dangling_clicked_ids": 0,
        "duplicate_candidates": 0,
        "duplicate_clicks": 0,
        "truncated_history_ids": 1,
    }


def test_a_history_is_cut_after_unknown_items_have_left_it() -> None:
    cleaned = clean({"history": ["a", "b", "gone", None, "gone"]}, max_history=2)
    assert cleaned.rows["history"].to_list() == [["a", "b"]]
    assert cleaned.counts["dangling_history_ids"] == 3


def test_a_history_may_hold_an_item_twice() -> None:
    assert clean({"history": ["a", "b", "a"]}).rows["history"].to_list() == [["a", "b", "a"]]


def test_ratings_stay_with_their_candidates() -> None:
    cleaned = clean(
        {
            "candidates": ["gone", "b", "a", "b", "c"],
            "clicked": ["b", "b", "gone"],
            "rating": [1.0, 5.0, 2.0, 4.0, 3.0],
        },
        {"candidates": ["a", "b"], "clicked": ["a"], "rating": [4.5, None]},
    )
    first, second = cleaned.rows.to_dicts()
    assert first["candidates"] == ["b", "a", "c"]
    assert first["rating"] == [5.0, 2.0, 3.0]
    assert first["clicked"] == ["b"]
    assert second["rating"] == [4.5, None]
    assert cleaned.counts["duplicate_candidates"] == 1
    assert cleaned.counts["duplicate_clicks"] == 1
    assert cleaned.counts["dangling_clicked_ids"] == 1


def test_a_slate_without_a_click_is_valid() -> None:
    cleaned = clean({"clicked": []}, {"history": None})
    assert cleaned.rows["clicked"].to_list() == [[], ["a"]]
    assert cleaned.rows["history"].to_list() == [[], []]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"impression_id": None}, Reason.MISSING_ID),
        ({"user_id": " "}, Reason.MISSING_ID),
        ({"time": None}, Reason.UNREADABLE_TIME),
        ({"time": datetime(1970, 1, 1, tzinfo=UTC)}, Reason.IMPOSSIBLE_TIME),
        ({"time": datetime(2100, 1, 1, tzinfo=UTC)}, Reason.IMPOSSIBLE_TIME),
        ({"candidates": None}, Reason.NO_CANDIDATE_LEFT),
        ({"candidates": [], "clicked": []}, Reason.NO_CANDIDATE_LEFT),
        ({"candidates": ["gone"], "clicked": []}, Reason.NO_CANDIDATE_LEFT),
        ({"candidates": [None], "clicked": []}, Reason.NO_CANDIDATE_LEFT),
        ({"candidates": ["gone", "a"], "clicked": ["gone"]}, Reason.NO_CLICK_LEFT),
        ({"clicked": [None]}, Reason.NO_CLICK_LEFT),
        ({"clicked": ["c"]}, Reason.CLICK_NOT_SHOWN),
        ({"clicked": ["a", "c"]}, Reason.CLICK_NOT_SHOWN),
        ({"clicked": None}, Reason.MALFORMED_FIELD),
        ({"rating": [1.0]}, Reason.MALFORMED_FIELD),
        ({"rating": [1.0, float("nan")]}, Reason.MALFORMED_FIELD),
    ],
)
def test_impressions_that_cannot_be_used_say_why(row: dict[str, Any], reason: Reason) -> None:
    cleaned = clean(row, {})
    assert cleaned.rows["impression_id"].to_list() == ["i2"]
    [quarantined] = cleaned.quarantine.to_dicts()
    assert quarantined["reason"] == reason.value
    assert quarantined["detail"]
    assert (quarantined["source_file"], quarantined["source_row"]) == ("behaviors.tsv", 1)
    assert quarantined["table"] == "impressions"


def test_the_detail_names_the_value() -> None:
    cleaned = clean({"clicked": ["c"]}, {"time": datetime(1970, 1, 1, tzinfo=UTC)})
    assert cleaned.quarantine["detail"].to_list() == [
        "clicked c, which the slate does not show",
        "time is 1970-01-01 00:00:00, outside 1990-01-01 to 2100-01-01",
    ]


def test_duplicates_are_told_by_id_and_by_slate() -> None:
    cleaned = clean(
        {"time": at(1)},
        {"time": at(2), "impression_id": "i1"},
        {"time": at(1)},  # same user, time and slate under another id
        {"time": at(1), "candidates": ["b", "a"]},  # another order is another slate
        {"time": at(1), "user_id": "u2"},
        {"time": at(1), "candidates": ["a", "gone", "b"]},  # the same slate once cleaned
    )
    assert cleaned.rows["impression_id"].to_list() == ["i1", "i4", "i5"]
    assert reasons(cleaned) == ["duplicate_impression"] * 3
    assert cleaned.quarantine["detail"].to_list() == [
        "same impression_id as behaviors.tsv row 1",
        "same user, time and candidates as behaviors.tsv row 1",
        "same user, time and candidates as behaviors.tsv row 1",
    ]


def test_a_duplicate_is_quarantined_once_and_hides_nothing() -> None:
    cleaned = clean(
        {"time": at(1), "impression_id": "i1"},
        {"time": at(1), "impression_id": "i1"},  # both id and slate of the first
        {"time": at(2), "impression_id": "i1"},
        {"time": at(2), "impression_id": "i4"},  # the slate of a row that is gone
    )
    assert cleaned.rows["source_row"].to_list() == [1, 4]
    assert cleaned.quarantine["source_row"].to_list() == [2, 3]


def test_an_unusable_impression_does_not_make_a_sound_one_a_duplicate() -> None:
    cleaned = clean({"impression_id": "i", "clicked": ["c"]}, {"impression_id": "i"})
    assert cleaned.rows["source_row"].to_list() == [2]


def test_long_rows_are_cut_in_quarantine() -> None:
    cleaned = clean({"candidates": ["gone" * 20] * 500, "clicked": []})
    assert cleaned.quarantine["raw"].str.len_chars().to_list() == [500]


def test_what_is_not_the_logs_fault_is_an_error() -> None:
    with pytest.raises(ConfigError, match="max_history = 0"):
        clean({}, max_history=0)
    with pytest.raises(ContractError, match="impressions"):
        clean_impressions(ITEMS.empty(), KNOWN, max_history=5)
    with pytest.raises(ContractError, match="without source_file"):
        clean({"source_file": None})


def test_many_slices_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {
            "history": ["a", "gone"] * i,
            "candidates": ["a", "gone", "b"],
            "impression_id": f"{i % 5}",
        }
        for i in range(9)
    ]
    whole = clean(*rows)
    monkeypatch.setattr("recflow.data.clean._SLICE_ROWS", 2)
    sliced = clean(*rows)
    assert sliced.rows.equals(whole.rows)
    assert sliced.quarantine.equals(whole.quarantine)
    assert sliced.counts == whole.counts


# --- whatever the input --------------------------------------------------------------------------

IDS = st.sampled_from(["a", "b", "c", "d", "gone", "", " ", "\x00", None])
ID_LISTS = st.none() | st.lists(IDS, max_size=6)
TIMES = st.none() | st.sampled_from([at(1), at(1), at(2)]) | st.datetimes(timezones=st.just(UTC))
NUMBERS = st.none() | st.floats(width=32)
ANY_TEXT = st.none() | st.text(max_size=8)


@st.composite
def any_impressions(draw: st.DrawFn) -> pl.DataFrame:
    row = st.fixed_dictionaries(
        {
            "impression_id": st.none()
            | st.sampled_from(["i1", "i2", "i3", " "])
            | st.text(max_size=3),
            "user_id": st.sampled_from(["u1", "u2", "", None]),
            "time": TIMES,
            "history": ID_LISTS,
            "candidates": ID_LISTS | st.just(["a", "b", "c"]),
            "clicked": ID_LISTS | st.just([]) | st.just(["a"]),
            "rating": st.none() | st.lists(NUMBERS, max_size=4),
        }
    )
    rows = draw(st.lists(row, max_size=12))
    return raw_impressions(*rows) if rows else IMPRESSIONS.empty()


@st.composite
def any_items(draw: st.DrawFn) -> pl.DataFrame:
    row = st.fixed_dictionaries(
        {
            "item_id": IDS,
            "title": ANY_TEXT,
            "body": ANY_TEXT,
            "category": ANY_TEXT,
            "entities": ID_LISTS,
            "published_at": TIMES,
        }
    )
    rows = draw(st.lists(row, max_size=12))
    return raw_items(*rows) if rows else ITEMS.empty()


def assert_sound(raw: pl.DataFrame, cleaned: Cleaned) -> None:
    """Nothing lost, nothing twice, everything accounted for, order kept."""
    QUARANTINE.check_schema(cleaned.quarantine.schema)
    kept = cleaned.rows["source_row"].to_list()
    quarantined = cleaned.quarantine["source_row"].to_list()
    assert Counter(kept + quarantined) == Counter(raw["source_row"].to_list())
    assert [n for n in raw["source_row"] if n in set(kept)] == kept
    assert cleaned.counts["rows_in"] == len(kept) + len(quarantined)
    assert cleaned.counts["rows_kept"] == len(kept)
    assert cleaned.counts["rows_quarantined"] == len(quarantined)
    assert set(cleaned.quarantine["reason"]) <= {reason.value for reason in Reason}
    assert cleaned.quarantine.null_count().sum_horizontal().item() == 0


@settings(deadline=None)
@given(any_impressions(), st.integers(1, 4), st.randoms())
def test_any_impressions_are_kept_or_quarantined(
    raw: pl.DataFrame, max_history: int, random: Any
) -> None:
    before = raw.clone()
    cleaned = clean_impressions(raw, KNOWN, max_history=max_history)
    assert raw.equals(before)
    IMPRESSIONS.check_schema(cleaned.rows.schema)
    assert_sound(raw, cleaned)

    known = set(KNOWN.drop_nulls())
    given_rows = {row["source_row"]: row for row in raw.to_dicts()}
    for row in cleaned.rows.to_dicts():
        source = given_rows[row["source_row"]]
        history = [item for item in source["history"] or [] if item in known]
        assert row["history"] == history[-max_history:]
        candidates = list(dict.fromkeys(item for item in source["candidates"] if item in known))
        assert row["candidates"] == candidates != []
        assert set(row["clicked"]) == set(source["clicked"]) & known
        assert len(row["clicked"]) == len(set(row["clicked"]))
        assert set(row["clicked"]) <= set(candidates)
        assert bool(row["clicked"]) == bool(source["clicked"])
        if row["rating"] is not None:
            where = [source["candidates"].index(item) for item in candidates]
            assert row["rating"] == [source["rating"][place] for place in where]

    again = clean_impressions(cleaned.rows, KNOWN, max_history=max_history)
    assert again.rows.equals(cleaned.rows)
    assert again.quarantine.is_empty()

    order = list(range(raw.height))
    random.shuffle(order)
    shuffled = clean_impressions(raw[order], KNOWN, max_history=max_history)
    assert shuffled.rows.sort("source_row").equals(cleaned.rows)
    assert shuffled.quarantine.sort("source_row").equals(cleaned.quarantine)
    assert shuffled.counts == cleaned.counts


@settings(deadline=None)
@given(any_items(), st.randoms())
def test_any_items_are_kept_or_quarantined(raw: pl.DataFrame, random: Any) -> None:
    before = raw.clone()
    cleaned = clean_items(raw)
    assert raw.equals(before)
    ITEMS.check_schema(cleaned.rows.schema)
    assert_sound(raw, cleaned)
    assert cleaned.rows["item_id"].is_unique().all()
    assert (cleaned.rows["title"].str.len_chars() > 0).all()

    again = clean_items(cleaned.rows)
    assert again.rows.equals(cleaned.rows)
    assert again.quarantine.is_empty()

    order = list(range(raw.height))
    random.shuffle(order)
    shuffled = clean_items(raw[order])
    assert shuffled.rows.sort("source_row").equals(cleaned.rows)
    assert shuffled.quarantine.sort("source_row").equals(cleaned.quarantine)


@given(st.integers(-(2**63) + 1, 2**63 - 1))
@example(2**63 - 1)
@example(-(2**63) + 1)
def test_any_number_read_as_a_time_is_judged(microseconds: int) -> None:
    time = pl.lit(microseconds).cast(UTC_TIME)
    impressions = raw_impressions({}).with_columns(time.alias("time"))
    assert_sound(impressions, clean_impressions(impressions, KNOWN, max_history=5))
    items = raw_items({}, {"item_id": ""}).with_columns(time.alias("published_at"))
    assert_sound(items, clean_items(items))

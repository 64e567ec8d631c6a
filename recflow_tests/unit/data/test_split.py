from __future__ import annotations

from dataclasses import replace
from datetime import date, timedelta
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recflow.core.errors import ConfigError, ContractError, SourceError
from recflow.data.split import (
    SplitConfig,
    Splits,
    features_are_point_in_time,
    missing_days,
    no_impression_in_two_splits,
    split_by_time,
    train_precedes_validation,
)
from recflow_tests.unit.data.tables import MONDAY, at, raw_impressions, window

CONFIG = SplitConfig(window_days=4, validation_days=1, test_days=1, max_history=10)
FIRST = MONDAY.date()
LAST = FIRST + timedelta(days=3)


def day(n: float) -> dict[str, Any]:
    return {"time": at(24 * n)}


def splits_of(*rows: dict[str, Any], config: SplitConfig = CONFIG) -> Splits:
    return split_by_time(window(*rows), last_day=LAST, config=config)


def ids(frame: pl.DataFrame) -> list[str]:
    return frame["impression_id"].to_list()


def test_days_are_cut_at_midnight() -> None:
    splits = splits_of(day(0), day(1.999), day(2), day(2.999), day(3), day(3.999))
    assert [ids(s) for s in (splits.train, splits.validation, splits.test)] == [
        ["i1", "i2"],
        ["i3", "i4"],
        ["i5", "i6"],
    ]


def test_other_days_take_no_part() -> None:
    splits = splits_of(day(-0.001), day(0), day(2), day(3), day(4))
    assert ids(splits.train) == ["i2"]
    assert ids(splits.test) == ["i4"]
    # the click of the day before the window is in nobody's history
    assert splits.train["history"].to_list() == [[]]


def test_missing_days_are_allowed() -> None:
    splits = splits_of(day(1), day(2), day(3))
    assert (splits.train.height, splits.validation.height, splits.test.height) == (1, 1, 1)


def test_missing_days_are_listed() -> None:
    present = {FIRST, LAST}
    assert missing_days(present, last_day=LAST, window_days=4) == [
        date(2024, 3, 5),
        date(2024, 3, 6),
    ]
    assert missing_days(present, last_day=FIRST, window_days=1) == []


def test_clicks_of_training_days_are_in_later_histories() -> None:
    splits = splits_of(day(0) | {"clicked": ["b"]}, day(2), day(3) | {"history": ["x"]})
    assert splits.validation["history"].to_list() == [["b"]]
    assert splits.test["history"].to_list() == [["x", "b", "a"]]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"window_days": -1}, "window_days"),
        ({"window_days": 2}, "window_days"),
        ({"validation_days": 0}, "validation_days"),
        ({"test_days": 0}, "test_days"),
        ({"max_history": 0}, "max_history"),
        ({"validation_days": 3}, "window_days"),
    ],
)
def test_impossible_values_are_refused(change: dict[str, int], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} = "):
        replace(CONFIG, **change)


def test_a_window_longer_than_the_data_names_the_days() -> None:
    with pytest.raises(ConfigError) as caught:
        splits_of(day(2), day(3))
    assert str(caught.value) == (
        "the train split, 2024-03-04 to 2024-03-05, has no impressions (days of the window "
        "2024-03-04 to 2024-03-07 present: 2024-03-06..2024-03-07; missing: "
        "2024-03-04..2024-03-05); choose another last day, a shorter window_days, or ingest the "
        "missing days"
    )


def test_no_data_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"present: none; missing: 2024-03-04\.\.2024-03-07"):
        splits_of()


@pytest.mark.parametrize(("quiet", "name"), [(0, "train"), (2, "validation"), (3, "test")])
def test_a_split_without_clicks_is_refused(quiet: int, name: str) -> None:
    rows = [day(n) | ({"clicked": []} if n == quiet else {}) for n in (0, 2, 3)]
    with pytest.raises(SourceError, match=f"the {name} split, .* no click"):
        splits_of(*rows)


def test_a_table_of_another_contract_is_refused() -> None:
    with pytest.raises(ContractError, match="impression_features"):
        split_by_time(raw_impressions({}), last_day=LAST, config=CONFIG)


# --- claims --------------------------------------------------------------------------------------


@pytest.fixture
def splits() -> Splits:
    """One user, a click a day; the histories grow by one."""
    return splits_of(
        *(day(n) | {"candidates": [f"n{n}", "other"], "clicked": [f"n{n}"]} for n in range(4))
    )


def test_claims_hold_for_splits_by_time(splits: Splits) -> None:
    assert train_precedes_validation(splits).holds
    assert no_impression_in_two_splits(splits).holds
    claim = features_are_point_in_time(splits)
    assert claim.holds
    assert claim.facts["impressions"] == 4
    assert claim.facts["items_added"] == 1 + 2 + 3
    assert claim.facts["histories_extended"] == 3
    assert claim.examples == []


def test_logs_that_hold_their_own_click_are_counted() -> None:
    splits = splits_of(
        day(0) | {"history": ["a"], "candidates": ["a", "b"], "clicked": ["a"]},
        day(1) | {"history": ["a"], "candidates": ["a", "b"], "clicked": ["b"]},
        day(2),
        day(3),
    )
    claim = features_are_point_in_time(splits)
    assert claim.holds
    assert claim.facts["logs_holding_own_click"] == 1


def test_a_late_training_impression_is_found(splits: Splits) -> None:
    late = splits.train.with_columns(pl.lit(at(49)).cast(splits.train["time"].dtype).alias("time"))
    claim = train_precedes_validation(replace(splits, train=late))
    assert not claim.holds
    assert claim.facts["impressions_too_late"] == 2
    assert claim.examples[0]["split"] == "train"
    assert (claim.examples[0]["source_file"], claim.examples[0]["source_row"]) == (
        "behaviors.tsv",
        1,
    )


def test_a_validation_impression_at_the_start_of_test_is_too_late(splits: Splits) -> None:
    start = splits.validation.with_columns(splits.test["time"])
    claim = train_precedes_validation(replace(splits, validation=start))
    assert not claim.holds
    assert [row["split"] for row in claim.examples] == ["validation"]


@pytest.mark.parametrize(
    "disguise",
    [
        [],
        [pl.lit("another").alias("impression_id"), pl.col("time") + pl.duration(days=1)],
        [pl.lit("another.tsv").alias("source_file")],
    ],
)
def test_an_impression_in_two_splits_is_found(splits: Splits, disguise: list[pl.Expr]) -> None:
    copied = pl.concat([splits.test, splits.train.head(1).with_columns(disguise)])
    claim = no_impression_in_two_splits(replace(splits, test=copied))
    assert not claim.holds
    assert claim.facts["impressions_in_two_splits"] == 2
    assert {row["split"] for row in claim.examples} == {"train", "test"}


def with_test(splits: Splits, **columns: Any) -> Splits:
    """Alter the test split, a single impression with the history n0, n1, n2."""
    schema = splits.test.schema
    return replace(
        splits,
        test=splits.test.with_columns(
            pl.Series(name, [value], dtype=schema[name]) for name, value in columns.items()
        ),
    )


@pytest.mark.parametrize(
    ("columns", "fact"),
    [
        # its own click, which is known only afterwards
        ({"history": ["n1", "n2", "n3"], "history_until": at(72)}, "history_holds_unclicked_items"),
        # shown before, but not clicked
        ({"history": ["other", "n1", "n2"]}, "history_holds_unclicked_items"),
        ({"history": ["n1", "n0", "n2"]}, "history_out_of_order"),
        ({"history_until": at(72)}, "history_until_wrong"),
        ({"history_until": at(47)}, "history_until_wrong"),
        ({"history_until": None}, "history_until_wrong"),
        ({"history_length": 4}, "history_length_wrong"),
    ],
)
def test_a_history_from_the_future_is_found(
    splits: Splits, columns: dict[str, Any], fact: str
) -> None:
    claim = features_are_point_in_time(with_test(splits, **columns))
    assert not claim.holds
    assert claim.facts[fact] == 1
    [example] = claim.examples
    assert (example["split"], example["impression_id"]) == ("test", "i4")
    assert example["time"] == "2024-03-07T00:00:00.000000+00:00"


def test_examples_are_few() -> None:
    splits = splits_of(*(day(n / 10) for n in range(40)))
    claim = no_impression_in_two_splits(replace(splits, test=splits.train))
    assert claim.facts["impressions_in_two_splits"] == 40
    assert len(claim.examples) == 5


@settings(deadline=None)
@given(
    st.lists(st.floats(-0.5, 6.5), max_size=30),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 2),
    st.randoms(),
)
def test_splits_by_time_keep_their_promises(
    days: list[float], train_days: int, validation_days: int, test_days: int, random: Any
) -> None:
    window_days = train_days + validation_days + test_days
    config = SplitConfig(window_days, validation_days, test_days, max_history=3)
    last_day = FIRST + timedelta(days=5)
    one_each = [5, 5 - test_days, 5 - test_days - validation_days]
    rows = window(*(day(n) for n in days + one_each))
    before = rows.clone()
    splits = split_by_time(rows, last_day=last_day, config=config)
    assert rows.equals(before)

    start = last_day - timedelta(days=window_days - 1)
    inside = rows.filter(pl.col("time").dt.date().is_between(start, last_day))
    everything = ids(splits.train) + ids(splits.validation) + ids(splits.test)
    assert sorted(everything) == sorted(ids(inside))
    assert splits.train["time"].max() < splits.validation["time"].min()
    assert splits.validation["time"].max() < splits.test["time"].min()
    assert splits.test["time"].dt.date().unique().len() <= test_days
    for claim in (
        train_precedes_validation(splits),
        no_impression_in_two_splits(splits),
        features_are_point_in_time(splits),
    ):
        assert claim.holds, claim

    order = list(range(rows.height))
    random.shuffle(order)
    shuffled = split_by_time(rows[order], last_day=last_day, config=config)
    assert shuffled.train.equals(splits.train)
    assert shuffled.validation.equals(splits.validation)
    assert shuffled.test.equals(splits.test)

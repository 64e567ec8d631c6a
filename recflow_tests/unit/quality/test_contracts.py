import json
from datetime import UTC, datetime

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recflow.core.columns import IMPRESSION_FEATURES, ITEM_FEATURES, Column, TableContract
from recflow.core.errors import ConfigError
from recflow.quality.contracts import Expectation, Validation, build_suite, validate_table

# Great Expectations imports modules that Python deprecated; nothing of ours can avoid it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:module 'sre_(constants|parse)' is deprecated:DeprecationWarning"
)

NOT_NULL = "expect_column_values_to_not_be_null"
UNIQUE = "expect_column_values_to_be_unique"
BETWEEN = "expect_column_values_to_be_between"
LENGTH = "expect_column_value_lengths_to_be_between"
PAIR = "expect_column_pair_values_to_be_equal"
COLUMNS = "expect_table_columns_to_match_ordered_list"
ROWS = "expect_table_row_count_to_be_between"
SCHEMA = "expect_table_schema_to_match_contract"

SMALL = TableContract(
    "small",
    "A table for tests.",
    (
        Column("id", pl.String, "", unique=True, minimum=1),
        Column("n", pl.Int8, "", nullable=True, minimum=0, maximum=9),
        Column("f", pl.Float32, "", minimum=0, maximum=1),
        Column("a", pl.List(pl.String), "", minimum=1, maximum=3),
        Column("b", pl.List(pl.Int8), "", nullable=True),
        Column("c", pl.List(pl.Int8), "", nullable=True),
        Column("note", pl.String, "", nullable=True),
        Column("source_file", pl.String, ""),
        Column("source_row", pl.Int64, "", minimum=1),
    ),
    equal_lengths=(("a", "b", "c"),),
)


def small(rows: int = 4, **columns: object) -> pl.DataFrame:
    """A valid table; ``columns`` replaces whole columns."""
    data: dict[str, object] = {
        "id": [f"i{k}" for k in range(rows)],
        "n": [k % 10 for k in range(rows)],
        "f": [0.5] * rows,
        "a": [["x", "y"]] * rows,
        "b": [[1, 2]] * rows,
        "c": [None] * rows,
        "note": [None] * rows,
        "source_file": ["log.tsv"] * rows,
        "source_row": list(range(1, rows + 1)),
    }
    return pl.DataFrame(data | columns, schema=SMALL.schema)


def only_failure(validation: Validation) -> Expectation:
    assert not validation.success
    failed = validation.failed()
    assert len(failed) == 1, failed
    return failed[0]


def test_valid_table_passes_every_expectation() -> None:
    validation = validate_table(small(), SMALL)
    assert validation.success, validation.failed()
    assert validation.rows == 4
    assert validation.failed() == []
    assert {outcome.unexpected_count for outcome in validation.expectations} == {0}


def test_suite_says_what_the_contract_says() -> None:
    asked = [
        (
            item.expectation_type,
            {k: v for k, v in item.configuration.kwargs.items() if v is not None},
        )
        for item in build_suite(SMALL).expectations
    ]
    either = {"ignore_row_if": "either_value_is_missing"}
    assert asked == [
        (
            COLUMNS,
            {
                "column_list": [
                    "id",
                    "n",
                    "f",
                    "len(a)",
                    "len(b)",
                    "len(c)",
                    "note",
                    "source_file",
                    "source_row",
                ]
            },
        ),
        (ROWS, {"min_value": 1}),
        (NOT_NULL, {"column": "id"}),
        (UNIQUE, {"column": "id"}),
        (LENGTH, {"column": "id", "min_value": 1}),
        (BETWEEN, {"column": "n", "min_value": 0, "max_value": 9}),
        (NOT_NULL, {"column": "f"}),
        (BETWEEN, {"column": "f", "min_value": 0, "max_value": 1}),
        (NOT_NULL, {"column": "len(a)"}),
        (BETWEEN, {"column": "len(a)", "min_value": 1, "max_value": 3}),
        (NOT_NULL, {"column": "source_file"}),
        (NOT_NULL, {"column": "source_row"}),
        (BETWEEN, {"column": "source_row", "min_value": 1}),
        (PAIR, {"column_A": "len(a)", "column_B": "len(b)", **either}),
        (PAIR, {"column_A": "len(a)", "column_B": "len(c)", **either}),
        (PAIR, {"column_A": "len(b)", "column_B": "len(c)", **either}),
    ]


@pytest.mark.parametrize(
    ("broken", "name", "column", "rows_and_values"),
    [
        ({"id": ["i0", None, "i2", "i3"]}, NOT_NULL, "id", [(2, None)]),
        ({"id": ["i0", "twice", "i2", "twice"]}, UNIQUE, "id", [(2, "twice"), (4, "twice")]),
        ({"id": ["i0", "", "i2", "i3"]}, LENGTH, "id", [(2, "")]),
        ({"n": [0, -1, 10, None]}, BETWEEN, "n", [(2, -1), (3, 10)]),
        ({"n": [0, -1, 10, 9]}, BETWEEN, "n", [(2, -1), (3, 10)]),
        ({"f": [0.0, 1.0, 1.5, float("nan")]}, BETWEEN, "f", [(3, 1.5), (4, "nan")]),
        ({"f": [0.0, 1.0, None, 0.5]}, NOT_NULL, "f", [(3, None)]),
        ({"b": [[1, 2], [1], None, [1, 2]]}, PAIR, "len(a) = len(b)", [(2, (2, 1))]),
        (
            {"a": [["x", "y"], ["x"] * 4, ["x", "y"], []], "b": [None] * 4},
            BETWEEN,
            "len(a)",
            [(2, 4), (4, 0)],
        ),
    ],
)
def test_broken_rows_are_counted_and_shown(
    broken: dict[str, object],
    name: str,
    column: str,
    rows_and_values: list[tuple[int, object]],
) -> None:
    outcome = only_failure(validate_table(small(**broken), SMALL))
    assert (outcome.name, outcome.column) == (name, column)
    assert outcome.unexpected_count == len(rows_and_values)
    assert outcome.unexpected_percent == 100 * len(rows_and_values) / 4
    expected = [
        {
            "source_file": "log.tsv",
            "source_row": row,
            "value": dict(zip(column.split(" = "), value, strict=True))
            if isinstance(value, tuple)
            else value,
        }
        for row, value in rows_and_values
    ]
    assert outcome.examples == expected


def test_unequal_lists_are_found_where_the_first_of_the_group_is_null() -> None:
    table = small(a=[None, ["x"], ["x"], ["x"]], b=[[1], [1], [1], [1]], c=[[1, 2], [1], [1], [1]])
    failed = validate_table(table, SMALL).failed()
    assert [(outcome.name, outcome.column) for outcome in failed] == [
        (NOT_NULL, "len(a)"),
        (PAIR, "len(b) = len(c)"),
    ]


def test_wrong_provenance_is_shown_too() -> None:
    outcome = only_failure(validate_table(small(source_row=[1, 2, 0, 4]), SMALL))
    assert outcome.examples == [{"source_file": "log.tsv", "source_row": 0, "value": 0}]


def test_empty_table_fails() -> None:
    outcome = only_failure(validate_table(SMALL.empty(), SMALL))
    assert outcome.name == ROWS
    assert outcome.message == "found 0"
    assert outcome.unexpected_percent == 0


@pytest.mark.parametrize("chunk_rows", [2, 100])
def test_missing_column_fails_everything_said_about_it(chunk_rows: int) -> None:
    validation = validate_table(small().drop("f"), SMALL, chunk_rows=chunk_rows)
    failed = validation.failed()
    assert [outcome.name for outcome in failed] == [SCHEMA, COLUMNS, NOT_NULL, BETWEEN]
    assert all("f" in (outcome.column or outcome.message) for outcome in failed)
    for outcome in failed[2:]:
        assert outcome.message.startswith("could not be evaluated: ")
        assert "\n" not in outcome.message


@pytest.mark.parametrize("chunk_rows", [2, 100])
def test_missing_provenance_and_everything_else_unique_still_counts_rows(chunk_rows: int) -> None:
    table = small(f=[0.5, 2, 0.5, 3]).drop("id", "source_file", "source_row")
    validation = validate_table(table, SMALL, chunk_rows=chunk_rows)
    by_key = {(outcome.name, outcome.column): outcome for outcome in validation.expectations}
    assert by_key[ROWS, None].success
    assert by_key[BETWEEN, "f"].examples == [{"value": 2.0}, {"value": 3.0}]
    assert not by_key[UNIQUE, "id"].success


@pytest.mark.parametrize(
    "table",
    [
        small().with_columns(extra=pl.lit(1)),
        small().select(reversed(SMALL.names)),
    ],
    ids=["extra column", "another order"],
)
def test_column_set_and_order_are_exact(table: pl.DataFrame) -> None:
    failed = validate_table(table, SMALL).failed()
    assert [outcome.name for outcome in failed] == [SCHEMA, COLUMNS]
    assert all(outcome.message for outcome in failed)


def test_types_are_exact() -> None:
    outcome = only_failure(validate_table(small().cast({"n": pl.Int16}), SMALL))
    assert outcome.name == SCHEMA
    assert outcome.message == "column small.n is Int16, expected Int8"


def test_text_where_numbers_are_promised_is_a_failure_not_a_crash() -> None:
    table = small().with_columns(f=pl.lit("many"), a=pl.lit("x,y"))
    failed = validate_table(table, SMALL).failed()
    assert {(outcome.name, outcome.column) for outcome in failed} >= {
        (SCHEMA, None),
        (COLUMNS, None),
        (BETWEEN, "f"),
        (NOT_NULL, "len(a)"),
        (BETWEEN, "len(a)"),
    }


def test_examples_are_few_short_and_plain() -> None:
    long = small(20, id=["x" * 1000] * 20)
    outcome = only_failure(validate_table(long, SMALL))
    assert outcome.unexpected_count == 20
    assert [example["source_row"] for example in outcome.examples] == [1, 2, 3, 4, 5]
    assert outcome.examples[0]["value"] == "x" * 200
    assert {type(example["source_row"]) for example in outcome.examples} == {int}


def test_json_is_valid_and_complete() -> None:
    validation = validate_table(small(f=[0.5, float("inf"), 0.5, float("nan")]), SMALL)
    raw = json.loads(json.dumps(validation.to_json(), allow_nan=False))
    assert raw == validation.to_json()
    assert raw["table"] == "small"
    assert raw["rows"] == 4
    assert raw["success"] is False
    failed = [outcome for outcome in raw["expectations"] if not outcome["success"]]
    assert [example["value"] for example in failed[0]["examples"]] == ["inf", "nan"]


def test_duplicate_across_chunks_is_found() -> None:
    ids = [f"i{k}" for k in range(10)]
    ids[9] = ids[0]
    outcome = only_failure(validate_table(small(10, id=ids), SMALL, chunk_rows=3))
    assert outcome.name == UNIQUE
    assert outcome.unexpected_count == 2
    assert [example["source_row"] for example in outcome.examples] == [1, 10]


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    ids=st.lists(st.sampled_from(["", "a", "b", "c", None]), min_size=1, max_size=9),
    chunk_rows=st.integers(1, 9),
    data=st.data(),
)
def test_outcome_does_not_depend_on_chunks(
    ids: list[str | None], chunk_rows: int, data: st.DataObject
) -> None:
    values = st.lists(st.sampled_from([0.0, 1.0, 2.0, None]), min_size=len(ids), max_size=len(ids))
    table = small(len(ids), id=ids, f=data.draw(values))
    whole = validate_table(table, SMALL)
    assert validate_table(table.lazy(), SMALL, chunk_rows=chunk_rows) == whole


def test_chunk_of_no_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="chunk_rows = 0"):
        validate_table(small(), SMALL, chunk_rows=0)


def test_real_contracts_can_be_met() -> None:
    now = datetime(2023, 5, 20, 12, tzinfo=UTC)
    items = pl.DataFrame(
        {
            "item_id": ["a"],
            "text": ["Title. Body."],
            "category": [""],
            "subcategory": [""],
            "published_at": [None],
            "title_words": [1],
            "text_characters": [12],
            "source_file": ["news.tsv"],
            "source_row": [1],
        },
        schema=ITEM_FEATURES.schema,
    )
    impressions = pl.DataFrame(
        {
            "impression_id": ["1"],
            "user_id": ["u"],
            "time": [now],
            "history": [[]],
            "candidates": [["a", "b"]],
            "labels": [[1, 0]],
            "rating": [None],
            "hour": [12],
            "weekday": [6],
            "candidate_count": [2],
            "click_count": [1],
            "history_length": [0],
            "click_rate": [0.5],
            "source_file": ["behaviors.tsv"],
            "source_row": [1],
        },
        schema=IMPRESSION_FEATURES.schema,
    )
    assert validate_table(items, ITEM_FEATURES).failed() == []
    assert validate_table(impressions, IMPRESSION_FEATURES).failed() == []
    # two candidates, three labels
    broken = impressions.with_columns(labels=pl.lit([1, 0, 0], dtype=pl.List(pl.Int8)))
    outcome = only_failure(validate_table(broken, IMPRESSION_FEATURES))
    assert outcome.column == "len(candidates) = len(labels)"

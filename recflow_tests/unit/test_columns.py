import polars as pl
import pytest

from recflow.core import columns
from recflow.core.columns import (
    IMPRESSION_FEATURES,
    IMPRESSIONS,
    ITEMS,
    QUARANTINE,
    SPLIT_IMPRESSIONS,
    Column,
    Reason,
    TableContract,
    reasons_of,
)
from recflow.core.errors import ContractError

CONTRACTS = [value for value in vars(columns).values() if isinstance(value, TableContract)]

SMALL = TableContract(
    "small",
    "A table for tests.",
    (Column("id", pl.String, "Identifier"), Column("n", pl.Int8, "A number", nullable=True)),
)


def test_contract_gives_names_schema_and_columns() -> None:
    assert SMALL.names == ["id", "n"]
    assert SMALL.schema == pl.Schema({"id": pl.String, "n": pl.Int8})
    assert SMALL["n"].nullable
    with pytest.raises(KeyError, match="missing"):
        SMALL["missing"]


def test_empty_table_keeps_its_contract() -> None:
    assert SMALL.empty().shape == (0, 2)
    SMALL.check_schema(SMALL.empty().schema)


def test_conform_selects_orders_and_casts() -> None:
    frame = pl.LazyFrame({"extra": [True], "n": [7], "id": ["a"]})
    conformed = SMALL.conform(frame)
    SMALL.check_schema(conformed.collect_schema())
    assert conformed.collect().rows() == [("a", 7)]


def test_conform_names_every_missing_column() -> None:
    with pytest.raises(ContractError, match=r"table 'small' lacks the columns \['id', 'n'\]"):
        SMALL.conform(pl.LazyFrame({"x": [1]}))


def test_conform_does_not_wrap_numbers_round() -> None:
    # 300 does not fit Int8: an error, not 44
    frame = SMALL.conform(pl.LazyFrame({"id": ["a"], "n": [300]}))
    with pytest.raises(pl.exceptions.InvalidOperationError):
        frame.collect()


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"n": pl.Int8, "id": pl.String}, r"has the columns \['n', 'id'\], expected \['id', 'n'\]"),
        ({"id": pl.String}, r"has the columns \['id'\]"),
        ({"id": pl.String, "n": pl.Int8, "x": pl.Int8}, r"has the columns \['id', 'n', 'x'\]"),
        ({"id": pl.String, "n": pl.Int64}, r"column small\.n is Int64, expected Int8"),
    ],
    ids=["order", "missing", "extra", "type"],
)
def test_check_schema_names_the_first_difference(
    schema: dict[str, type[pl.DataType]], message: str
) -> None:
    with pytest.raises(ContractError, match=message):
        SMALL.check_schema(pl.Schema(schema))


def test_check_schema_looks_inside_lists_and_times() -> None:
    schema = dict(IMPRESSIONS.schema)
    with pytest.raises(ContractError, match=r"impressions\.history"):
        IMPRESSIONS.check_schema(pl.Schema(schema | {"history": pl.List(pl.Int64)}))
    with pytest.raises(ContractError, match=r"impressions\.time"):
        IMPRESSIONS.check_schema(pl.Schema(schema | {"time": pl.Datetime("us")}))


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)
def test_every_contract_is_sound(contract: TableContract) -> None:
    assert contract.description
    assert len(set(contract.names)) == len(contract.names)
    assert all(column.description for column in contract.columns)
    # where a row came from is always known
    assert {"source_file", "source_row"} <= set(contract.names)
    for group in contract.equal_lengths:
        assert len(group) > 1
        assert all(contract[name].dtype == pl.List for name in group)
    for column in contract.columns:
        if column.minimum is not None and column.maximum is not None:
            assert column.minimum <= column.maximum
    assert contract.empty().schema == contract.schema


def test_contract_names_differ() -> None:
    assert len({contract.name for contract in CONTRACTS}) == len(CONTRACTS)


def test_splits_are_features_with_evidence() -> None:
    features = IMPRESSION_FEATURES.names
    assert SPLIT_IMPRESSIONS.names[: len(features)] == features
    assert SPLIT_IMPRESSIONS.equal_lengths == IMPRESSION_FEATURES.equal_lengths


def test_items_are_identified() -> None:
    assert [column.name for column in ITEMS.columns if column.unique] == ["item_id"]


def quarantine(*reasons: str) -> pl.DataFrame:
    rows = [
        {
            "table": "items",
            "reason": reason,
            "detail": "",
            "source_file": "news.tsv",
            "source_row": row,
            "raw": "",
        }
        for row, reason in enumerate(reasons, start=1)
    ]
    return pl.DataFrame(rows, schema=QUARANTINE.schema)


def test_reasons_are_counted_most_frequent_first_then_by_name() -> None:
    table = quarantine(
        Reason.NUL_BYTE,
        Reason.EMPTY_TEXT,
        Reason.MISSING_ID,
        Reason.MISSING_ID,
        Reason.DUPLICATE_ITEM,
    )
    assert list(reasons_of(table).items()) == [
        ("missing_id", 2),
        ("duplicate_item", 1),
        ("empty_text", 1),
        ("nul_byte", 1),
    ]


def test_no_rows_have_no_reasons() -> None:
    assert reasons_of(quarantine()) == {}

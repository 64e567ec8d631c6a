"""Table contracts as Great Expectations suites, run on Polars frames.

Great Expectations has no Polars engine. The shortest way that holds at millions of rows is to hand
it only the columns its expectations look at, as Arrow-backed pandas; a list column is represented
by the length of its lists, in a column named ``len(<column>)``. What Arrow hides – the exact Polars
types – is compared with the contract directly and reported as one more expectation.

Whatever keeps an expectation from being evaluated is a failure of that expectation, never a pass.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

import polars as pl

from recflow.core.artifacts import JsonValue
from recflow.core.columns import Column, Columns, TableContract
from recflow.core.errors import ConfigError, ContractError

if TYPE_CHECKING:
    import great_expectations as gx
    import pandas as pd
    from great_expectations.core import ExpectationValidationResult
    from great_expectations.core.batch_definition import BatchDefinition
    from great_expectations.expectations.expectation import Expectation as GxExpectation
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

MAX_EXAMPLES = 5
MAX_EXAMPLE_CHARACTERS = 200
SCHEMA_EXPECTATION = "expect_table_schema_to_match_contract"

_PROVENANCE = (Columns.SOURCE_FILE, Columns.SOURCE_ROW)
_FITS_INT64 = frozenset({pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32})
# These need every row at once; all others look at one row at a time and can be run in chunks.
_WHOLE_TABLE = frozenset(
    {
        "expect_column_values_to_be_unique",
        "expect_table_columns_to_match_ordered_list",
        "expect_table_row_count_to_be_between",
    }
)


@dataclass(frozen=True, slots=True)
class Expectation:
    """The outcome of one expectation.

    Attributes:
        name: Great Expectations' name of it, e.g. ``expect_column_values_to_not_be_null``.
        column: The column looked at, ``len(<column>)`` where it is the length of lists, two of them
            joined by `` = `` where they are compared; ``None`` for the table as a whole.
        kwargs: The limits that were asked for.
        success: Whether every row met it.
        unexpected_count: Rows that did not.
        unexpected_percent: The same as a share of all rows of the table, 0 to 100.
        examples: Up to five offending rows: ``source_file`` and ``source_row`` where the table has
            them, and ``value``.
        message: What was seen instead, or why it could not be evaluated; empty on success and where
            the examples say it.
    """

    name: str
    column: str | None
    kwargs: dict[str, JsonValue]
    success: bool
    unexpected_count: int = 0
    unexpected_percent: float = 0.0
    examples: list[dict[str, JsonValue]] = field(default_factory=lambda: [])
    message: str = ""


@dataclass(frozen=True, slots=True)
class Validation:
    """The outcome of all expectations on one table.

    Attributes:
        table: Name of the contract.
        rows: Rows of the table.
        success: Whether every expectation was met.
        expectations: One outcome for each expectation, in the order of the contract.
    """

    table: str
    rows: int
    success: bool
    expectations: tuple[Expectation, ...]

    def failed(self) -> list[Expectation]:
        """The expectations that were not met."""
        return [outcome for outcome in self.expectations if not outcome.success]

    def to_json(self) -> dict[str, JsonValue]:
        """The outcome as plain JSON values; NaN and infinity are text."""
        raw: dict[str, JsonValue] = asdict(self)
        raw["expectations"] = [asdict(outcome) for outcome in self.expectations]
        return raw


def build_suite(contract: TableContract) -> gx.ExpectationSuite:
    """Translate a contract into a Great Expectations suite.

    The suite is written for the frame :func:`validate_table` makes of a table, in which a list
    column appears as ``len(<column>)``.
    """
    gx = _great_expectations()
    expectations = [
        *_table_expectations(contract),
        *(item for column in contract.columns for item in _column_expectations(column)),
        *_length_expectations(contract),
    ]
    for position, expectation in enumerate(expectations):
        # Results come back in another order; the position puts them back.
        expectation.meta = {"position": position}
    return gx.ExpectationSuite(name=contract.name, expectations=expectations)


def validate_table(
    frame: pl.DataFrame | pl.LazyFrame, contract: TableContract, *, chunk_rows: int = 1_000_000
) -> Validation:
    """Hold a table against its contract.

    A table of more than ``chunk_rows`` rows is validated in slices, so that no more than one slice
    is in memory as pandas; what needs all rows (uniqueness, the row count) is then validated once
    on the columns that it needs. The outcome does not depend on ``chunk_rows``.

    Args:
        frame: The table. A lazy frame is read once for each slice: pass a scan, not a computation.
        contract: What the table promises.
        chunk_rows: Rows in a slice, at least 1.

    Raises:
        ConfigError: ``chunk_rows`` is not positive.
    """
    if chunk_rows < 1:
        raise ConfigError.of("chunk_rows", chunk_rows, "an integer of at least 1")
    lazy = frame.lazy()
    schema = lazy.collect_schema()
    rows = int(lazy.select(pl.len()).collect().item())
    suite = build_suite(contract).expectations
    definition = _batch_definition()
    merged = {_position(item): _Merged(item) for item in suite}
    for part, batch in _batches(lazy, schema, suite, rows, chunk_rows):
        for result in _run(definition, batch, part):
            merged[_position(result.expectation_config)].add(result)
    outcomes = (
        _schema_outcome(schema, contract),
        *(merged[position].outcome(rows) for position in sorted(merged)),
    )
    return Validation(
        table=contract.name,
        rows=rows,
        success=all(outcome.success for outcome in outcomes),
        expectations=outcomes,
    )


def _great_expectations() -> Any:
    # Read when the package is imported; validation must not report to anyone.
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import great_expectations  # 7 s: not before it is needed

    return great_expectations


def _table_expectations(contract: TableContract) -> Iterator[GxExpectation]:
    gxe = _great_expectations().expectations
    yield gxe.ExpectTableColumnsToMatchOrderedList(
        column_list=[_seen_as(column.name, column.dtype) for column in contract.columns]
    )
    yield gxe.ExpectTableRowCountToBeBetween(min_value=1)


def _column_expectations(column: Column) -> Iterator[GxExpectation]:
    gxe = _great_expectations().expectations
    seen = _seen_as(column.name, column.dtype)
    if not column.nullable:
        yield gxe.ExpectColumnValuesToNotBeNull(column=seen)
    if column.unique:
        yield gxe.ExpectColumnValuesToBeUnique(column=seen)
    if column.minimum is not None or column.maximum is not None:
        between = (
            gxe.ExpectColumnValueLengthsToBeBetween
            if column.dtype == pl.String
            else gxe.ExpectColumnValuesToBeBetween
        )
        yield between(column=seen, min_value=column.minimum, max_value=column.maximum)


def _length_expectations(contract: TableContract) -> Iterator[GxExpectation]:
    gxe = _great_expectations().expectations
    for group in contract.equal_lengths:
        # All pairs: through a null list, two others could differ unseen.
        for a, b in combinations(group, 2):
            yield gxe.ExpectColumnPairValuesToBeEqual(
                column_A=_length_of(a),
                column_B=_length_of(b),
                ignore_row_if="either_value_is_missing",
            )


def _length_of(name: str) -> str:
    return f"len({name})"


def _seen_as(name: str, dtype: pl.DataType | type[pl.DataType]) -> str:
    """Name under which Great Expectations sees a column."""
    return _length_of(name) if dtype == pl.List else name


def _position(described: GxExpectation | ExpectationConfiguration | None) -> int:
    assert described is not None
    assert described.meta is not None
    return int(described.meta["position"])


def _columns_of(expectation: GxExpectation) -> list[str]:
    kwargs = expectation.configuration.kwargs
    return [str(kwargs[key]) for key in ("column", "column_A", "column_B") if key in kwargs]


def _batches(
    lazy: pl.LazyFrame,
    schema: pl.Schema,
    suite: Sequence[GxExpectation],
    rows: int,
    chunk_rows: int,
) -> Iterator[tuple[Sequence[GxExpectation], pl.DataFrame]]:
    """Yield frames, each with the expectations to run on it."""
    if rows <= chunk_rows:
        yield suite, _seen(lazy, schema, suite)
        return
    whole = [item for item in suite if item.expectation_type in _WHOLE_TABLE]
    by_row = [item for item in suite if item.expectation_type not in _WHOLE_TABLE]
    yield whole, _seen(lazy, schema, whole)
    for offset in range(0, rows, chunk_rows):
        yield by_row, _seen(lazy.slice(offset, chunk_rows), schema, by_row)


def _seen(
    lazy: pl.LazyFrame, schema: pl.Schema, expectations: Iterable[GxExpectation]
) -> pl.DataFrame:
    """Collect every column under its seen name; those nobody looks at as nulls, which are free."""
    needed = {name for item in expectations for name in _columns_of(item)} | set(_PROVENANCE)
    columns: list[pl.Expr] = []
    for name, dtype in schema.items():
        seen = _seen_as(name, dtype)
        if seen not in needed:
            columns.append(pl.repeat(None, pl.len(), dtype=pl.Null).alias(seen))
        elif dtype == pl.List:
            columns.append(pl.col(name).list.len().alias(seen))
        else:
            columns.append(pl.col(name))
    return lazy.select(columns).collect()


def _batch_definition() -> BatchDefinition[Any]:
    """Where frames are handed over, in a context that keeps no file and draws no bar."""
    context = _great_expectations().get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    asset = context.data_sources.add_pandas("memory").add_dataframe_asset("table")
    return asset.add_batch_definition_whole_dataframe("whole")


def _run(
    definition: BatchDefinition[Any], batch: pl.DataFrame, expectations: Sequence[GxExpectation]
) -> list[ExpectationValidationResult]:
    gx = _great_expectations()
    outcome = definition.get_batch({"dataframe": _to_pandas(batch)}).validate(
        gx.ExpectationSuite(name="part", expectations=list(expectations)),
        result_format={
            "result_format": "SUMMARY",
            "partial_unexpected_count": MAX_EXAMPLES,
            "unexpected_index_column_names": [c for c in _PROVENANCE if c in batch.columns],
        },
    )
    return list(outcome.results)


def _to_pandas(batch: pl.DataFrame) -> pd.DataFrame:
    """Convert to Arrow-backed pandas; complete number columns to NumPy.

    Great Expectations compares int64 and float64 of NumPy in one operation, anything else in a
    Python loop. A column with nulls or NaN stays Arrow: NumPy cannot tell them apart.
    """
    pandas = batch.to_pandas(use_pyarrow_extension_array=True)
    for series in batch:
        if series.null_count():
            continue
        if series.dtype in _FITS_INT64:
            pandas[series.name] = series.cast(pl.Int64).to_numpy()
        elif series.dtype.is_float() and not series.is_nan().any():
            pandas[series.name] = series.cast(pl.Float64).to_numpy()
    return pandas


class _Merged:
    """Outcome of one expectation, collected over the parts of a table."""

    def __init__(self, expectation: GxExpectation) -> None:
        self._expectation = expectation
        self._evaluated = False
        self._success = True
        self._unexpected = 0
        self._examples: list[dict[str, JsonValue]] = []
        self._message = ""

    def add(self, result: ExpectationValidationResult) -> None:
        self._evaluated = True
        self._success &= bool(result.success)
        self._unexpected += int(result.result.get("unexpected_count") or 0)
        self._examples += _examples(result.result, _columns_of(self._expectation))
        self._message = self._message or _message(result)

    def outcome(self, rows: int) -> Expectation:
        kwargs = self._expectation.configuration.kwargs
        return Expectation(
            name=self._expectation.expectation_type,
            column=" = ".join(_columns_of(self._expectation)) or None,
            kwargs={key: _plain(value) for key, value in sorted(kwargs.items())},
            success=self._success and self._evaluated,
            unexpected_count=self._unexpected,
            unexpected_percent=100 * self._unexpected / rows if rows else 0.0,
            examples=self._examples[:MAX_EXAMPLES],
            message=self._message if self._evaluated else "was not evaluated",
        )


def _examples(result: Mapping[str, Any], columns: Sequence[str]) -> list[dict[str, JsonValue]]:
    # Without provenance columns there is no index list, only the values.
    index = result.get("partial_unexpected_index_list")
    if not result.get("unexpected_index_column_names") or index is None:
        return [{"value": _plain(v)} for v in result.get("partial_unexpected_list", [])]
    examples: list[dict[str, JsonValue]] = []
    for row in index:
        provenance = {name: _plain(row[name]) for name in _PROVENANCE if name in row}
        values = {name: _plain(row[name]) for name in columns}
        value = values[columns[0]] if len(columns) == 1 else dict(values)
        examples.append({**provenance, "value": value})
    return examples


def _message(result: ExpectationValidationResult) -> str:
    """What went wrong, for a failure that has no offending rows to show."""
    if result.success:
        return ""
    raised = _exception_message(result.exception_info or {})
    if raised:
        return f"could not be evaluated: {raised}"
    if "observed_value" in result.result:
        return f"found {json.dumps(_plain(result.result['observed_value']))}"
    return ""


def _exception_message(info: Mapping[str, Any]) -> str:
    """Great Expectations nests exceptions by metric, or gives one flat mapping."""
    flat = [info] if "raised_exception" in info else [v for v in info.values() if v]
    messages = [str(item["exception_message"]) for item in flat if item.get("raised_exception")]
    return messages[0].splitlines()[0][:MAX_EXAMPLE_CHARACTERS] if messages else ""


def _schema_outcome(schema: pl.Schema, contract: TableContract) -> Expectation:
    message = ""
    try:
        contract.check_schema(schema)
    except ContractError as error:
        message = str(error)
    return Expectation(SCHEMA_EXPECTATION, None, {}, success=not message, message=message)


def _plain(value: object) -> JsonValue:
    """Reduce a value of pandas, NumPy or Great Expectations to what JSON can hold."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return value[:MAX_EXAMPLE_CHARACTERS]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    item = getattr(value, "item", None)
    if callable(item):  # NumPy scalar
        return _plain(item())
    text = str(value)
    return None if text in {"<NA>", "NaT"} else text[:MAX_EXAMPLE_CHARACTERS]

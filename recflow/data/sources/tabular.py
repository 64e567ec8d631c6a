"""Fields of tab-separated lines and the problems any such line can have."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from recflow.core.columns import Reason
from recflow.data.sources.base import Problem
from recflow.data.sources.lines import LINE, NOT_UTF8


def fields(names: Sequence[str]) -> list[pl.Expr]:
    """Split a line at its tabs; missing fields are null, surplus ones are cut off."""
    parts = pl.col(LINE).str.split_exact("\t", len(names) - 1)
    return [parts.struct.field(f"field_{n}").alias(name) for n, name in enumerate(names)]


def line_problems(columns: int) -> tuple[Problem, Problem, Problem]:
    """What can be wrong with a line before its fields are looked at.

    Args:
        columns: Tab-separated columns a line must have.
    """
    line = pl.col(LINE)
    tabs = line.str.count_matches("\t", literal=True)
    return (
        Problem(Reason.NOT_UTF8, pl.col(NOT_UTF8), pl.lit("the line has bytes that are not UTF-8")),
        Problem(
            Reason.NUL_BYTE,
            line.str.contains("\0", literal=True),
            pl.lit("the line has a NUL byte"),
        ),
        Problem(
            Reason.WRONG_COLUMN_COUNT,
            tabs != columns - 1,
            pl.format(
                "the line has {} tab-separated columns instead of {}", tabs + 1, pl.lit(columns)
            ),
        ),
    )


def missing(field: str) -> Problem:
    """The identifier in ``field`` is empty or blank."""
    return Problem(
        Reason.MISSING_ID, pl.col(field).str.strip_chars() == "", pl.lit(f"the {field} is empty")
    )

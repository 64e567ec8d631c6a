"""Simulated logs: the MIND format plus the true click probabilities beside it."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import polars as pl

from recflow.core.columns import Columns
from recflow.core.errors import SourceError
from recflow.data.sources.mind import MindSource
from recflow.data.sources.simulation import TRUTH_FILE, UTILITY, SimulationConfig, simulate

__all__ = ["SimulatedSource", "SimulationConfig", "simulate"]


class SimulatedSource(MindSource):
    """Reader of a folder that :func:`simulate` wrote.

    Args:
        directory: The folder.

    Raises:
        SourceError: A file is missing or unreadable.
    """

    def __init__(self, directory: Path) -> None:
        self._truth = directory / TRUTH_FILE
        super().__init__(directory, "simulated", [self._truth])
        if not self._truth.is_file():
            raise SourceError(f"{self._truth} is missing; simulate the log again")
        try:
            pl.read_parquet_schema(self._truth)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise SourceError(
                f"{self._truth} was cut short ({error}); simulate the log again"
            ) from error

    def truth(self, start: date, end: date) -> pl.LazyFrame:
        """True click probability of each candidate, for the days from ``start`` up to ``end``."""
        in_range = pl.col(Columns.DAY).is_between(start, end, closed="left")
        return (
            pl.scan_parquet(self._truth, glob=False)
            .filter(in_range)
            .select(Columns.IMPRESSION_ID, UTILITY)
        )

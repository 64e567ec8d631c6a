"""What training tells the outside: metrics to a tracker, progress to the log.

The trainer knows neither MLflow nor Dagster; whoever starts it passes a :class:`Tracker`.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from recflow.core.artifacts import JsonValue

logger = logging.getLogger("recflow.training")

_SECONDS_BETWEEN_LINES = 5.0


class Tracker(Protocol):
    """Where parameters, metrics and files of a run are recorded."""

    def log_params(self, params: Mapping[str, JsonValue]) -> None:
        """Record the configuration of the run."""
        ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers as of optimiser step ``step``."""
        ...

    def log_file(self, path: Path) -> None:
        """Record a file."""
        ...


class NullTracker:
    """Records nothing."""

    def log_params(self, params: Mapping[str, JsonValue]) -> None:
        """Ignore the parameters."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Ignore the metrics."""

    def log_file(self, path: Path) -> None:
        """Ignore the file."""


class Progress:
    """Shows how far a loop is: a bar on a terminal, a log line every few seconds elsewhere."""

    def __init__(
        self, label: str, total: int, unit: str, *, done: int = 0, visible: bool = True
    ) -> None:
        """Start the clock.

        Args:
            label: What is being done.
            total: Units of work to do.
            unit: Name of a unit, e.g. ``impressions``.
            done: Units that were done before.
            visible: Whether anything is shown; of several processes one is enough.
        """
        self._label, self._total, self._unit, self._visible = label, total, unit, visible
        self._done = self._done_before = done
        self._started = self._shown = time.monotonic()
        self._bar = None
        if visible and sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=label, unit=f" {unit}", initial=done)

    def advance(self, amount: int, note: str = "") -> None:
        """Report ``amount`` more units done, with a short note such as the loss."""
        self._done += amount
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(amount)
        elif self._visible and time.monotonic() - self._shown >= _SECONDS_BETWEEN_LINES:
            self._log_line(note)

    def close(self) -> float:
        """End the display and return the seconds it took."""
        if self._bar is not None:
            self._bar.close()
        return time.monotonic() - self._started

    def _log_line(self, note: str) -> None:
        self._shown = time.monotonic()
        rate = (self._done - self._done_before) / (self._shown - self._started)
        left = max(self._total - self._done, 0) / max(rate, 1e-9)
        logger.info(
            "%s: %d/%d %s, %.0f/s, %.0f s left%s",
            self._label,
            self._done,
            self._total,
            self._unit,
            rate,
            left,
            f", {note}" if note else "",
        )

"""The console log: one line an event, and no traceback for mistakes the user can mend.

The full event log with every stack trace stays in Dagster; this is what a terminal shows.
"""

import logging
import os
import weakref
from datetime import datetime
from typing import Any

import dagster as dg

from recflow.core import errors

_EXPECTED = {
    *(name for name, value in vars(errors).items() if isinstance(value, type)),
    # What failed is said by the check; where Dagster noticed helps nobody.
    "DagsterAssetCheckFailedError",
}
_SHOWN_EVENTS = {
    dg.DagsterEventType.STEP_START: "started",
    dg.DagsterEventType.STEP_SUCCESS: "finished",
    dg.DagsterEventType.STEP_FAILURE: "FAILED",
    dg.DagsterEventType.STEP_SKIPPED: "skipped",
    dg.DagsterEventType.ASSET_CHECK_EVALUATION: "check",
    dg.DagsterEventType.RUN_FAILURE: "run failed",
    dg.DagsterEventType.RUN_SUCCESS: "run succeeded",
}


class ConsoleFormatter(logging.Formatter):
    """Formats Dagster events and log messages as short lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Return ``HH:MM:SS what subject message`` and, for failures, the cause."""
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        event = getattr(record, "dagster_event", None)
        if event is None:
            step = getattr(record, "dagster_meta", {}).get("step_key") or ""
            message = getattr(record, "dagster_meta", {}).get("orig_message") or record.msg
            return f"{time}   {_subject(step)}{message}"
        return f"{time} {self._line(event)}"

    def _line(self, event: Any) -> str:
        kind = event.event_type
        label = _SHOWN_EVENTS[kind]
        if kind == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
            evaluation = event.asset_check_evaluation_data
            verdict = "holds" if evaluation.passed else f"FAILED ({evaluation.severity.value})"
            name = f"{evaluation.asset_key.to_user_string()}: {evaluation.check_name}"
            reason = "" if evaluation.passed else f" – {evaluation.description or ''}"
            return f"check    {name} {verdict}{reason}"
        if kind == dg.DagsterEventType.STEP_FAILURE:
            return f"{label} {_subject(event.step_key)}{cause_of(event.event_specific_data.error)}"
        if kind == dg.DagsterEventType.STEP_SUCCESS:
            seconds = event.event_specific_data.duration_ms / 1000
            return f"{label} {_subject(event.step_key)}in {seconds:.1f} s"
        if kind in (dg.DagsterEventType.RUN_FAILURE, dg.DagsterEventType.RUN_SUCCESS):
            return label
        return f"{label:8} {_subject(event.step_key or '')}".rstrip()


class _TerminalHandler(logging.Handler):
    """Writes to a copy of standard error from before Dagster captures it.

    Captured output reaches the terminal through a second process, which a run that ends quickly can
    outpace, losing its last lines.
    """

    def __init__(self) -> None:
        super().__init__()
        self._descriptor = os.dup(2)
        weakref.finalize(self, os.close, self._descriptor)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            os.write(self._descriptor, f"{self.format(record)}\n".encode())
        except OSError:
            self.handleError(record)


class _ShownOnly(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        event = getattr(record, "dagster_event", None)
        return event is None or event.event_type in _SHOWN_EVENTS


class _Threshold(logging.Filter):
    """Passes events, and messages of at least a level."""

    def __init__(self, level: str) -> None:
        super().__init__()
        self._least: int = logging.getLevelNamesMapping()[level.upper()]

    def filter(self, record: logging.LogRecord) -> bool:
        return getattr(record, "dagster_event", None) is not None or record.levelno >= self._least


def cause_of(error: Any) -> str:
    """Say what went wrong: the message of an expected error, the whole stack of any other."""
    if error is None:
        return "no error was recorded"
    root = error
    while root.cause is not None:
        root = root.cause
    if root.cls_name in _EXPECTED:
        # Recorded as "module.Class: sentence"; the sentence is what helps.
        return str(root.message).split(": ", 1)[-1].strip()
    return str(error.to_string())


def sentence_of(error: Any) -> str:
    """Kind and message of what was raised, without what Dagster wraps it in, and without stack."""
    if error is None:
        return "no error was recorded"
    while error.cause is not None and str(error.cls_name).startswith("Dagster"):
        error = error.cause
    return str(error.message).strip().removeprefix(f"{errors.__name__}.")


def _subject(step_key: str) -> str:
    return step_key.replace("__", "/") + " " if step_key else ""


@dg.logger(
    {"log_level": dg.Field(str, default_value="INFO", description="Least level of messages shown")},
    description="One line an event; no traceback for mistakes the user can mend.",
)
def console_logger(context: dg.InitLoggerContext) -> logging.Logger:
    """Return the logger that writes to standard error."""
    handler = _TerminalHandler()
    handler.setFormatter(ConsoleFormatter())
    handler.addFilter(_ShownOnly())
    # Named apart from the loggers Dagster manages, which would send each line back to Dagster.
    logger = logging.Logger("recflow-console", level=logging.DEBUG)
    handler.addFilter(_Threshold(context.logger_config["log_level"]))
    logger.addHandler(handler)
    return logger

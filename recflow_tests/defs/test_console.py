"""What a terminal shows: one line an event, the sentence of a mistake, the stack of a bug."""

import os
from collections.abc import Callable

import dagster as dg
import pytest

from recflow.core.errors import SourceError
from recflow.defs.console import console_logger


def run(body: Callable[[dg.AssetExecutionContext], None]) -> bool:
    @dg.asset(key=["stage", "thing"])
    def thing(context: dg.AssetExecutionContext) -> None:
        body(context)

    @dg.asset_check(asset=["stage", "thing"])
    def is_good() -> dg.AssetCheckResult:
        return dg.AssetCheckResult(passed=False, description="3 rows are bad")

    job = dg.Definitions(
        assets=[thing],
        asset_checks=[is_good],
        jobs=[dg.define_asset_job("everything")],
        loggers={"console": console_logger},
    ).resolve_job_def("everything")
    config = {"loggers": {"console": {}}}
    return job.execute_in_process(run_config=config, raise_on_error=False).success


def fail_as_expected(_: dg.AssetExecutionContext) -> None:
    raise SourceError("logs/behaviors.tsv: line 3 is broken; mend it")


def fail_by_a_bug(_: dg.AssetExecutionContext) -> None:
    raise ZeroDivisionError("bug")


def speak(context: dg.AssetExecutionContext) -> None:
    context.log.info("half of it is done")
    context.log.debug("nobody wants to know")


def test_events_and_messages_are_one_line_each(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(speak)
    lines = [line[9:] for line in capfd.readouterr().err.splitlines()]
    assert lines[0] == "started  stage/thing"
    assert lines[1] == "  stage/thing half of it is done"
    assert lines[2].startswith("finished stage/thing in ")
    assert "check    stage/thing: is_good FAILED (ERROR) – 3 rows are bad" in lines
    assert lines[-1] == "run succeeded"
    assert not any("nobody" in line for line in lines)


def test_a_mistake_is_its_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    assert not run(fail_as_expected)
    shown = capfd.readouterr().err
    assert "FAILED stage/thing logs/behaviors.tsv: line 3 is broken; mend it\n" in shown
    assert "Stack Trace" not in shown


def test_a_bug_shows_its_stack(capfd: pytest.CaptureFixture[str]) -> None:
    assert not run(fail_by_a_bug)
    shown = capfd.readouterr().err
    assert "ZeroDivisionError: bug" in shown
    assert "fail_by_a_bug" in shown


def test_the_log_does_not_depend_on_what_dagster_does_with_standard_error(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def close_standard_error(_: dg.AssetExecutionContext) -> None:
        saved = os.dup(2)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        try:
            raise_in_the_dark()
        finally:
            os.dup2(saved, 2)

    def raise_in_the_dark() -> None:
        raise SourceError("seen all the same")

    assert not run(close_standard_error)
    assert "seen all the same" in capfd.readouterr().err

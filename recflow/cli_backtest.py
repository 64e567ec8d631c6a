"""The verb ``recflow backtest``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer


def backtest(
    data: Annotated[
        str, typer.Option("--data", help="Format of the logs: simulated, mind, ebnerd, movielens.")
    ] = "simulated",
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Folder of the logs; simulated ones need none.")
    ] = None,
    scenario: Annotated[
        list[str] | None, typer.Option(help="A simulated scenario, drift or calm; repeatable.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Simulate with another seed: to choose values on.")
    ] = None,
    window_days: Annotated[int, typer.Option(min=3, help="Days of a snapshot.")] = 7,
    validation_days: Annotated[int, typer.Option(min=1, help="Of these, for validation.")] = 1,
    test_days: Annotated[int, typer.Option(min=1, help="Of these, for the gate.")] = 1,
    max_history: Annotated[int, typer.Option(min=1, help="Clicks of a history kept.")] = 50,
    days: Annotated[int | None, typer.Option(min=3, help="Use the log's first days only.")] = None,
    days_needed: Annotated[
        int | None, typer.Option(help="Days beyond a limit that are reason to retrain.")
    ] = None,
    days_looked_at: Annotated[int | None, typer.Option(help="Of so many.")] = None,
    cooldown_days: Annotated[
        int | None, typer.Option(help="Days between the snapshots of two retrainings.")
    ] = None,
    settle_days: Annotated[
        int | None, typer.Option(help="Days after a drift's first until a snapshot has settled.")
    ] = None,
    base_model: Annotated[
        Path | None, typer.Option(help="Folder of the pretrained encoder; MiniLM is fetched.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Train as a deployment does: minutes a training.")
    ] = False,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="A key of TrainingConfig, as key=value; repeatable."),
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder for everything that is made, which is reused.")
    ] = None,
) -> None:
    """Walk the days of a log: never retraining, nightly, on drift, and as often by the calendar."""
    from recflow.backtesting import options_of, run_backtests

    page, table = run_backtests(
        data,
        directory,
        scenarios=scenario,
        seed=seed,
        options=options_of(
            window_days=window_days,
            validation_days=validation_days,
            test_days=test_days,
            max_history=max_history,
            days=days,
            base_model=base_model,
            trigger={
                key: value
                for key, value in (
                    ("days_needed", days_needed),
                    ("days_looked_at", days_looked_at),
                    ("cooldown_days", cooldown_days),
                    ("settle_days", settle_days),
                )
                if value is not None
            },
            full=full,
            changes=changes or (),
        ),
        work=work,
        command=shlex.join(["recflow", *sys.argv[1:]]),
        say=lambda line: print(line, flush=True),
    )
    print(f"\n{table}")
    print(f"Report: {page}")

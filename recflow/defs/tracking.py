"""One Dagster run is one MLflow run: resource, executor and sensors that keep it so.

``tracked_executor`` starts the MLflow run before the first step and ends it after the last, in the
process that orchestrates the run. That is the only place which exists once for a Dagster run: step
processes start side by side, so they would each start an MLflow run of their own, and none of them
knows how the others ended. The MLflow run's id is kept as a tag of the Dagster run, by which the
steps find it. Where another executor is in charge (``dg.materialize`` in tests), the resource does
the same around the steps of its process.

A process that was killed ends nothing; ``tracking_sensors`` then do, from what Dagster found out.

Assets take ``mlflow: dg.ResourceParam[Any]``, which is dagster_mlflow's resource, attached to that
run. Importing dagster_mlflow takes 6 s, so it happens where a step needs it.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import dagster as dg

from recflow.adapters.mlflow_tracking import (
    MlflowStore,
    MlflowTracker,
    RunStatus,
    disable_telemetry,
    how_to_open,
    run_url,
)

RESOURCE_KEY = "mlflow"
MLFLOW_RUN_TAG = "recflow/mlflow_run_id"
# The tag by which dagster_mlflow knows its runs.
DAGSTER_RUN_TAG = "dagster_run_id"
MAX_TAG_CHARACTERS = 5000


@dg.resource(
    config_schema={
        "tracking_uri": dg.Field(
            dg.StringSource, description="MLflow server (http://…) or database (sqlite:////…)"
        ),
        "experiment_name": dg.Field(dg.StringSource, description="MLflow experiment"),
    },
    description="The MLflow run of the Dagster run; outside a run, the store the runs are in.",
)
def mlflow_resource(context: dg.InitResourceContext) -> Iterator[Any]:
    """Attach dagster_mlflow to the MLflow run of this Dagster run, starting it if nobody has.

    Yields:
        ``dagster_mlflow``'s resource in a run; a :class:`MlflowStore` in a sensor.
    """
    store = MlflowStore(**context.resource_config)
    if context.run is None:
        yield store
        return
    assert context.instance is not None
    with (
        _mlflow_run(store, context.run, context.instance) as run_id,
        _attached(context, store, run_id) as mlflow,
    ):
        yield mlflow


def tracked(executor: dg.ExecutorDefinition) -> dg.ExecutorDefinition:
    """Let an executor keep an MLflow run around the steps, where one of them uses MLflow."""
    create = executor.executor_creation_fn
    assert create is not None
    return dg.ExecutorDefinition(
        name=executor.name,
        config_schema=executor.config_schema,  # type: ignore[arg-type]
        requirements=executor.get_requirements,
        executor_creation_fn=lambda init_context: _TrackedExecutor(create(init_context)),
        description=executor.description,
    )


class _TrackedExecutor(dg.Executor):
    def __init__(self, inner: dg.Executor) -> None:
        self._inner = inner

    @property
    def retries(self) -> Any:
        return self._inner.retries

    @property
    def step_dependency_config(self) -> Any:
        return self._inner.step_dependency_config

    def execute(self, plan_context: Any, execution_plan: Any) -> Iterator[Any]:
        if not _uses_mlflow(plan_context, execution_plan):
            yield from self._inner.execute(plan_context, execution_plan)
            return
        store = _configured_store(plan_context)
        with _mlflow_run(store, plan_context.dagster_run, plan_context.instance):
            yield from self._inner.execute(plan_context, execution_plan)


tracked_executor = tracked(dg.multi_or_in_process_executor)


def tracker_of(mlflow: Any, *, prefix: str = "") -> MlflowTracker:
    """Tracker of the run that the resource is attached to; use it as a context manager.

    Args:
        mlflow: The ``mlflow`` resource, inside a run.
        prefix: Goes before every name, so that two models do not share a metric; e.g. ``pruned.``.
    """
    return MlflowTracker(mlflow.tracking_client, mlflow.mlflow_run_id, prefix=prefix)


def run_metadata(mlflow: Any) -> dict[str, dg.MetadataValue]:
    """Metadata that leads from an asset to the MLflow run: its page, or how to see it."""
    run_id = mlflow.mlflow_run_id
    url = run_url(mlflow.tracking_uri, mlflow.experiment.experiment_id, run_id)
    if url is not None:
        link = dg.MetadataValue.url(url)
    else:
        link = dg.MetadataValue.md(f"`{how_to_open(mlflow.tracking_uri)}`")
    return {"mlflow_run_id": dg.MetadataValue.text(run_id), "mlflow_run": link}


@contextmanager
def _mlflow_run(
    store: MlflowStore, dagster_run: dg.DagsterRun, instance: dg.DagsterInstance
) -> Iterator[str]:
    """Start the MLflow run of a Dagster run and end it; or join the one that is started already."""
    run_id = _joined_run(store, dagster_run, instance)
    if run_id is not None:
        yield run_id
        return
    run_id = store.create_run(_run_name(dagster_run), _run_tags(dagster_run))
    instance.add_run_tags(dagster_run.run_id, {MLFLOW_RUN_TAG: run_id})
    status: RunStatus = "FAILED"
    try:
        yield run_id
        status = "FAILED" if _has_failed_step(dagster_run, instance) else "FINISHED"
    except (KeyboardInterrupt, dg.DagsterExecutionInterruptedError):
        status = "KILLED"
        raise
    finally:
        store.set_status(run_id, status)


def _joined_run(
    store: MlflowStore, dagster_run: dg.DagsterRun, instance: dg.DagsterInstance
) -> str | None:
    # The run object may be older than the tag.
    current = instance.get_run_by_id(dagster_run.run_id)
    run_id = (current or dagster_run).tags.get(MLFLOW_RUN_TAG)
    return run_id if run_id and _belongs(store, run_id, dagster_run.run_id) else None


def _belongs(store: MlflowStore, run_id: str, dagster_run_id: str) -> bool:
    """Whether an MLflow run is this Dagster run's: a re-execution inherits its parent's tags."""
    tags = store.client().get_run(run_id).data.tags
    return tags.get(DAGSTER_RUN_TAG) == dagster_run_id


def _has_failed_step(dagster_run: dg.DagsterRun, instance: dg.DagsterInstance) -> bool:
    failures = instance.get_records_for_run(
        dagster_run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE, limit=1
    )
    return bool(failures.records)


@contextmanager
def _attached(context: dg.InitResourceContext, store: MlflowStore, run_id: str) -> Iterator[Any]:
    """Make the run MLflow's active one in this process, through dagster_mlflow."""
    assert context.run is not None
    config = {
        "experiment_name": store.experiment_name,
        "mlflow_tracking_uri": store.tracking_uri,
        "mlflow_run_id": run_id,
    }
    with _open_dagster_mlflow(context, config) as mlflow:
        # dagster_mlflow renames the run after the job, which is __ASSET_JOB more often than not.
        mlflow.tracking_client.update_run(run_id, name=_run_name(context.run))
        try:
            yield mlflow
        finally:
            # Only whoever started the run ends it. This makes it inactive in this process, so that
            # neither MLflow's exit handler nor a following run in the process touches it.
            mlflow.end_run(status="RUNNING")


@contextmanager
def _open_dagster_mlflow(
    context: dg.InitResourceContext, config: Mapping[str, str]
) -> Iterator[Any]:
    disable_telemetry()
    with ExitStack() as stack:
        with warnings.catch_warnings():
            # dagster_mlflow is marked beta as a whole and reads a deprecated property of Dagster;
            # its pin in pyproject.toml is the answer to both.
            warnings.simplefilter("ignore", dg.BetaWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            from dagster_mlflow import mlflow_tracking

            open_resource: Any = contextmanager(mlflow_tracking.resource_fn)
            mlflow = stack.enter_context(open_resource(context.replace_config(config)))
        yield mlflow


def _uses_mlflow(plan_context: Any, execution_plan: Any) -> bool:
    job = plan_context.job.get_definition()
    steps = execution_plan.get_steps_to_execute_in_topo_order()
    return any(
        RESOURCE_KEY in job.get_node(step.node_handle).definition.required_resource_keys
        for step in steps
    )


def _configured_store(plan_context: Any) -> MlflowStore:
    job = plan_context.job.get_definition()
    configs = plan_context.run_config.get("resources", {})
    with dg.build_resources(
        {RESOURCE_KEY: job.resource_defs[RESOURCE_KEY]},
        instance=plan_context.instance,
        resource_config={key: value for key, value in configs.items() if key == RESOURCE_KEY},
        log_manager=plan_context.log,
    ) as resources:
        return resources.mlflow  # type: ignore[attr-defined]


def _run_name(run: dg.DagsterRun) -> str:
    job = "assets" if run.job_name.startswith("__ASSET_JOB") else run.job_name
    return f"{job} {partition}" if (partition := _partition_of(run)) else job


def _partition_of(run: dg.DagsterRun) -> str:
    start = run.tags.get("dagster/asset_partition_range_start", "")
    end = run.tags.get("dagster/asset_partition_range_end", "")
    days = start if start == end else f"{start}...{end}"
    return run.tags.get("dagster/partition", days)


def _run_tags(run: dg.DagsterRun) -> dict[str, str]:
    """Tags that lead from the MLflow run to the Dagster run."""
    assets = sorted(key.to_user_string() for key in run.asset_selection or ())
    tags = {
        DAGSTER_RUN_TAG: run.run_id,
        "dagster.job": run.job_name,
        "dagster.partition": _partition_of(run),
        "dagster.assets": ", ".join(assets)[:MAX_TAG_CHARACTERS],
        "dagster.parent_run_id": run.parent_run_id or "",
        "dagster.root_run_id": run.root_run_id or "",
    }
    return {name: value for name, value in tags.items() if value}


def _closing_sensor(
    name: str, dagster_status: dg.DagsterRunStatus, mlflow_status: RunStatus
) -> dg.SensorDefinition:
    @dg.run_status_sensor(
        name=name,
        run_status=dagster_status,
        # Without it, a run whose process was killed would stay RUNNING in MLflow.
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=f"Ends MLflow runs of {dagster_status.value} Dagster runs as {mlflow_status}.",
    )
    def close(context: dg.RunStatusSensorContext, mlflow: dg.ResourceParam[Any]) -> None:
        run = context.dagster_run
        run_id = run.tags.get(MLFLOW_RUN_TAG)
        if run_id and _belongs(mlflow, run_id, run.run_id):
            mlflow.set_status(run_id, mlflow_status)

    return close


tracking_sensors = [
    _closing_sensor("mlflow_close_failed_runs", dg.DagsterRunStatus.FAILURE, "FAILED"),
    _closing_sensor("mlflow_close_canceled_runs", dg.DagsterRunStatus.CANCELED, "KILLED"),
    _closing_sensor("mlflow_close_finished_runs", dg.DagsterRunStatus.SUCCESS, "FINISHED"),
]

"""Failures speak: runs that failed and checks that did not hold, in the log and at the webhook.

A failed check that does not block ends no run, so nothing else would tell of it. Checks are told of
when their run has ended, all of a run in one message.
"""

from collections.abc import Sequence

import dagster as dg

from recflow.adapters.webhook import Alert, Webhook
from recflow.defs.console import sentence_of
from recflow.defs.monitoring.training_runs import partition_of
from recflow.defs.resources import settings

_ALERTED_STEPS = 3


def alert_sensors(
    webhook: Webhook | None, web_url: str, every: int = 30
) -> list[dg.SensorDefinition]:
    """Make the sensors that tell of failures.

    Args:
        webhook: Where failures are posted; ``None`` where they are only logged.
        web_url: Address of the web UI, for links to runs; empty where it is not known.
        every: Seconds between two looks, at least.
    """

    def tell(context: dg.RunStatusSensorContext, kind: str, what: str, reason: str) -> None:
        alert = _alert(context.dagster_run, kind, what, reason, web_url)
        context.log.error(f"{alert.headline}: {alert.reason}")
        problem = webhook.post(alert.to_json()) if webhook else None
        if problem:
            context.log.warning(f"nobody was told at the webhook: {problem}")

    @dg.run_failure_sensor(
        name="tell_of_failed_runs",
        minimum_interval_seconds=every,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Logs why a run failed, and posts it to RECFLOW_ALERT_WEBHOOK if there is one.",
    )
    def failed_runs(context: dg.RunFailureSensorContext) -> None:
        tell(context, "run_failed", "failed", _cause(context))

    def check_sensor(name: str, status: dg.DagsterRunStatus) -> dg.SensorDefinition:
        @dg.run_status_sensor(
            name=name,
            run_status=status,
            minimum_interval_seconds=every,
            default_status=dg.DefaultSensorStatus.RUNNING,
            description="Logs the checks that did not hold, errors and warnings, of runs that "
            f"ended as {status.value}, and posts them to RECFLOW_ALERT_WEBHOOK if there is one.",
        )
        def failed_checks(context: dg.RunStatusSensorContext) -> None:
            if failed := _failed_checks(context.instance, context.dagster_run.run_id):
                number = "a check" if len(failed) == 1 else f"{len(failed)} checks"
                tell(context, "checks_failed", f"has {number} that failed", "\n".join(failed))

        return failed_checks

    return [
        failed_runs,
        check_sensor("tell_of_failed_checks", dg.DagsterRunStatus.SUCCESS),
        check_sensor("tell_of_failed_checks_of_failed_runs", dg.DagsterRunStatus.FAILURE),
        check_sensor("tell_of_failed_checks_of_canceled_runs", dg.DagsterRunStatus.CANCELED),
    ]


def _alert(run: dg.DagsterRun, kind: str, what: str, reason: str, web_url: str) -> Alert:
    # Runs of chosen assets have a job that Dagster names.
    job = "assets" if run.job_name.startswith("__") else run.job_name
    partition = partition_of(run)
    day = f" of {partition}" if partition else ""
    return Alert(
        kind=kind,
        headline=f"{job}{day} {what}",
        reason=reason,
        run_id=run.run_id,
        job=job,
        partition=partition,
        link=f"{web_url.rstrip('/')}/runs/{run.run_id}" if web_url else "",
    )


def _cause(context: dg.RunFailureSensorContext) -> str:
    """What the steps failed of; where none did, what Dagster says of the run."""
    steps = [
        f"{(event.step_key or '').replace('__', '/')}: {sentence_of(event.step_failure_data.error)}"
        for event in context.get_step_failure_events()
    ]
    return "\n".join(steps[:_ALERTED_STEPS]) or context.failure_event.message or "unknown"


def _failed_checks(instance: dg.DagsterInstance, run_id: str) -> Sequence[str]:
    """Every evaluation of a check in a run that did not hold, as a line."""
    records = instance.get_records_for_run(
        run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION
    ).records
    lines: list[str] = []
    for record in records:
        assert record.event_log_entry.dagster_event is not None
        evaluation = record.event_log_entry.dagster_event.asset_check_evaluation_data
        if not evaluation.passed:
            name = f"{evaluation.asset_key.to_user_string()}: {evaluation.check_name}"
            reason = f" – {evaluation.description}" if evaluation.description else ""
            lines.append(f"{evaluation.severity.value} {name}{reason}")
    return lines


def configured_webhook() -> Webhook | None:
    """The webhook of the settings, if there is one."""
    return Webhook(settings.alert_webhook) if settings.alert_webhook else None

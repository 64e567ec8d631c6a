"""The sensor that retrains on drift: looks at what was found of the newest days, and decides."""

from datetime import date

import dagster as dg

from recflow.defs.jobs import TRAIN_TAGS, retrain_job
from recflow.defs.monitoring.evidence import read_evidence
from recflow.defs.monitoring.training_runs import (
    REASON_TAG,
    SNAPSHOT_TAG,
    TRIGGER_TAG,
    find_launched,
    find_training,
    newest_snapshot,
)
from recflow.defs.resources import settings
from recflow.quality.trigger import TriggerPolicy, decide

# Days that were compared with an earlier champion are passed over; a month reaches far enough back.
_DAYS_READ = 30
# PostgreSQL indexes the values of tags, up to some 2,700 bytes.
_LONGEST_TAG = 500


def drift_sensor(every: int = 60) -> dg.SensorDefinition:
    """Make the sensor that retrains on drift.

    Args:
        every: Seconds between two looks, at least.
    """

    @dg.sensor(
        name="retrain_on_drift",
        job=retrain_job,
        minimum_interval_seconds=every,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="Retrains when enough of the newest days drifted, or the champion ranks worse "
        "than it did. Off until switched on: here, or by `recflow loop on`, together with the "
        "schedule monitor_daily that looks at each day. Each tick says what it waits for.",
    )
    def retrain_on_drift(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        return retraining(context.instance, settings.trigger_policy)

    return retrain_on_drift


def retraining(
    instance: dg.DagsterInstance, policy: TriggerPolicy
) -> dg.RunRequest | dg.SkipReason:
    """Request a retraining of the newest day's snapshot, or say why not.

    Raises:
        ArtifactError: A day's drift was materialised without a verdict.
    """
    evidence = read_evidence(instance, _DAYS_READ)
    if evidence and (training := find_training(instance, evidence[-1].day)):
        return dg.SkipReason(str(training))
    decision = decide(evidence, policy, last_retrained=newest_snapshot(instance))
    if decision.snapshot is None or decision.run_key is None:
        return dg.SkipReason(decision.reason)
    if launched := find_launched(instance, decision.run_key):
        return dg.SkipReason(
            f"{decision.reason}; but run {launched.run_id[:8]} was launched for that already and "
            f"ended as {launched.status.value}: launch the job retrain for {decision.snapshot} to "
            "try again"
        )
    return _request(decision.snapshot, decision.run_key, decision.reason)


def _request(snapshot: date, run_key: str, reason: str) -> dg.RunRequest:
    return dg.RunRequest(
        run_key=run_key,
        partition_key=str(snapshot),
        tags={
            **TRAIN_TAGS,
            TRIGGER_TAG: "drift",
            SNAPSHOT_TAG: str(snapshot),
            REASON_TAG: reason[:_LONGEST_TAG],
        },
    )

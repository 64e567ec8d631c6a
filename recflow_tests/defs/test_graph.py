"""The contract of the asset graph: what every asset carries, and how the lineage hangs together."""

import os
import subprocess
import sys
from datetime import UTC, date, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import dagster as dg
import pytest

from recflow.data.split import window_keys
from recflow.definitions import defs
from recflow.defs.partitions import (
    daily_partitions,
    newest_complete_day,
    window_mapping,
)

SNAPSHOT = Path(__file__).with_name("lineage.txt")
HEAVY = {
    *("torch", "transformers", "peft", "optuna", "mlflow", "dagster_mlflow"),
    *("great_expectations", "evidently"),
}
GRAPH = defs.resolve_asset_graph()
NODES = [GRAPH.get(key) for key in sorted(GRAPH.get_all_asset_keys())]
MADE = [node for node in NODES if node.is_materializable]


def describe() -> str:
    """The graph as text: one block an asset, sorted, so that a diff reads like a review."""
    lines: list[str] = []
    for node in NODES:
        kinds = ", ".join(
            sorted(k.split("/")[-1] for k in node.tags if k.startswith("dagster/kind/"))
        )
        lines.append(f"{node.key.to_user_string()}  [{node.group_name}; {kinds}]")
        lines += [f"  from {parent.to_user_string()}" for parent in sorted(node.parent_keys)]
        for check in sorted(node.check_keys):
            blocking = GRAPH.get_check_spec(check).blocking
            lines.append(f"  check {check.name}{' (blocking)' if blocking else ''}")
    return "\n".join(lines) + "\n"


def test_lineage_is_as_reviewed() -> None:
    if os.environ.get("UPDATE_LINEAGE"):
        SNAPSHOT.write_text(describe())
    assert describe() == SNAPSHOT.read_text(), (
        "the asset graph changed; if that is meant, run the test with UPDATE_LINEAGE=1 and review "
        "the difference of lineage.txt"
    )


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.key.to_user_string())
def test_every_asset_says_what_it_is(node) -> None:
    assert node.description
    assert node.owners
    assert node.group_name != "default"
    assert any(tag.startswith("dagster/kind/") for tag in node.tags)


@pytest.mark.parametrize("node", MADE, ids=lambda node: node.key.to_user_string())
def test_every_made_asset_is_daily_and_versioned(node) -> None:
    assert isinstance(node.partitions_def, dg.DailyPartitionsDefinition)
    assert node.code_version


@pytest.mark.parametrize(
    "key", [n.key for n in MADE if n.group_name in {"ingest", "prepare", "features", "splits"}]
)
def test_tables_show_their_columns(key: dg.AssetKey) -> None:
    schema = GRAPH.get(key).metadata["dagster/column_schema"]
    assert schema.columns
    assert all(column.description for column in schema.columns)


def test_external_inputs_are_where_the_lineage_ends() -> None:
    ends = {node.key.to_user_string() for node in NODES if not node.parent_keys}
    assert ends == {"source/logs", "source/catalogue", "source/pretrained_encoder"}


def test_days_can_be_ingested_in_one_run() -> None:
    for node in MADE:
        single = node.group_name in {"ingest", "prepare", "features"}
        assert (node.backfill_policy == dg.BackfillPolicy.single_run()) == single


def test_model_steps_share_a_pool_by_their_gpu() -> None:
    for node in MADE:
        if node.group_name in {"models", "search", "studies", "compression"}:
            gpu = node.tags["recflow/gpu_type"]
            assert GRAPH.get(node.key).pools == {"compute" if gpu == "none" else f"gpu_{gpu}"}


def test_loading_imports_nothing_heavy() -> None:
    script = (
        "import sys, recflow.definitions; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True
    )
    assert HEAVY & set(done.stdout.split()) == set()
    assert done.stderr == ""


@pytest.mark.filterwarnings("ignore:Asset job .* materializes assets with varying")
def test_jobs_cover_the_lineage() -> None:
    def assets_of(job: str) -> set[dg.AssetKey]:
        return set(defs.resolve_job_def(job).asset_layer.executable_asset_keys)

    assert assets_of("ingest") | assets_of("train") == assets_of("full")
    assert assets_of("ingest") & assets_of("train") == set()
    assert assets_of("retrain") == assets_of("train")
    assert assets_of("ingest") <= assets_of("monitor")
    assert assets_of("monitor") & assets_of("train") == set()
    beside = assets_of("search") | assets_of("studies") | assets_of("compress")
    watched = {dg.AssetKey(["monitoring", "drift"])}
    assert assets_of("monitor") == assets_of("ingest") | watched
    beside |= watched
    assert assets_of("full") & beside == set()
    assert assets_of("full") | beside == {node.key for node in MADE}
    assert assets_of("compress") == {dg.AssetKey(["models", "compressed"])}
    assert assets_of("search") == {dg.AssetKey(["models", "configuration"])}


def test_window_keys_end_with_the_day_and_cross_months() -> None:
    assert window_keys("2026-03-02", 4) == ["2026-02-27", "2026-02-28", "2026-03-01", "2026-03-02"]


@pytest.mark.filterwarnings("ignore:Parameter `allow_nonexistent_upstream_partitions`")
def test_window_mapping_reads_exactly_the_window() -> None:
    days = daily_partitions(date(2026, 1, 1), date(2026, 1, 20))
    upstream = window_mapping(3).get_upstream_mapped_partitions_result_for_partitions(
        days.subset_with_partition_keys(["2026-01-02", "2026-01-10"]), days, days
    )
    assert sorted(upstream.partitions_subset.get_partition_keys()) == [
        "2026-01-01",  # the window of the 2nd begins before the first day: allowed, and missing
        "2026-01-02",
        "2026-01-08",
        "2026-01-09",
        "2026-01-10",
    ]


def test_logs_that_ended_have_a_last_partition() -> None:
    days = daily_partitions(date(2026, 1, 1), date(2026, 1, 3))
    assert days.get_partition_keys() == ["2026-01-01", "2026-01-02", "2026-01-03"]


@pytest.mark.parametrize(
    ("now", "day"),
    [
        (datetime(2026, 1, 10, 3, 0, tzinfo=UTC), "2026-01-09"),
        # 00:30 in Copenhagen is 23:30 UTC of the day before, which has not ended in UTC.
        (datetime(2026, 1, 10, 0, 30, tzinfo=ZoneInfo("Europe/Copenhagen")), "2026-01-08"),
        (datetime(2026, 1, 1, 12, 0, tzinfo=UTC), None),
    ],
)
def test_newest_complete_day_is_a_day_that_ended(now: datetime, day: str | None) -> None:
    assert newest_complete_day(daily_partitions(date(2026, 1, 1), None), now) == day


@pytest.mark.filterwarnings("ignore:Asset job .* materializes assets with varying")
def test_nightly_schedule_requests_one_run_for_the_newest_complete_day(tmp_path: Path) -> None:
    repository = defs.get_repository_def()
    schedule = repository.get_schedule_def("nightly")
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    with (
        dg.DagsterInstance.local_temp(str(tmp_path)) as instance,
        # Left open, it would leave its instance to whatever loads definitions next.
        dg.build_schedule_context(
            instance=instance,
            repository_def=repository,
            scheduled_execution_time=datetime(2026, 2, 10, 3, 0, tzinfo=UTC),
        ) as context,
    ):
        (request,) = schedule.evaluate_tick(context).run_requests
    assert request.partition_key == "2026-02-09"
    assert request.run_key == "2026-02-09"

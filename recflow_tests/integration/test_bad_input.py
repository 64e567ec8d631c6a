"""Mistakes end in one sentence and a non-zero exit, and leave nothing half-written."""

import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from recflow_tests.integration.deployment import FIRST_DAY, SAMPLE, Deployment

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

DAY = str(FIRST_DAY)
UPSTREAM = "group:ingest or group:prepare or group:features or group:splits"


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SAMPLE, tmp_path / "logs"))


def deployment(tmp_path: Path, logs: Path, **settings: str) -> Deployment:
    return Deployment(tmp_path / "home", tmp_path / "no_model", logs, settings)


def test_failed_contract_stops_everything_downstream(tmp_path: Path, logs: Path) -> None:
    news = logs / "news.tsv"
    lines = news.read_text().splitlines(keepends=True)
    fields = lines[4].split("\t")
    fields[3] = "word " * 1_200
    lines[4] = "\t".join(fields)
    news.write_text("".join(lines))

    place = deployment(tmp_path, logs)
    done = place.materialise(UPSTREAM, DAY)
    assert done.returncode != 0
    assert "features/items: meets_contract FAILED (ERROR)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not place.store.path("splits/train", DAY).exists()
    validation = place.store.get("validations/features/items", DAY)
    assert validation.facts["success"] is False
    summary = validation.file("summary.html").read_text()
    assert "title_words" in summary
    assert "news.tsv" in summary
    (expectation,) = failed_expectations(place)[DAY]
    assert expectation["name"] == "expect_column_values_to_be_between"
    assert expectation["column"] == "title_words"
    assert expectation["unexpected_count"] == 1
    (example,) = expectation["examples"]
    assert (example["source_file"], example["source_row"]) == ("news.tsv", 5)


def test_a_family_that_cannot_be_ends_the_command_with_a_sentence(
    tmp_path: Path, logs: Path
) -> None:
    family = tmp_path / "family.toml"
    family.write_text(
        '[int8]\nparent = "fine_tuned"\nstep = "quantize"\n'
        '[student]\nparent = "int8"\nstep = "distill"\n'
    )
    done = deployment(tmp_path, logs, FAMILY=str(family)).materialise(UPSTREAM, DAY)
    assert done.returncode != 0
    assert "student: chain = 'quantize → distill' is not allowed" in done.stderr
    assert "Traceback" not in done.stderr


def failed_expectations(place: Deployment) -> dict[str, list[dict[str, Any]]]:
    """What the check's metadata shows in Dagster."""
    key = dg.AssetCheckKey(dg.AssetKey(["features", "items"]), "meets_contract")
    with dg.DagsterInstance.from_config(str(place.dagster_home)) as instance:
        (record,) = instance.event_log_storage.get_asset_check_execution_history(key, limit=1)
    evaluation = record.event.dagster_event.asset_check_evaluation_data
    return evaluation.metadata["failed_expectations"].data


def break_nothing(logs: Path) -> None:
    pass


def remove_behaviors(logs: Path) -> None:
    (logs / "behaviors.tsv").unlink()


def empty_behaviors(logs: Path) -> None:
    (logs / "behaviors.tsv").write_text("")


def commas_for_tabs(logs: Path) -> None:
    file = logs / "behaviors.tsv"
    file.write_text(file.read_text().replace("\t", ","))


@pytest.mark.parametrize(
    ("damage", "day", "settings", "says"),
    [
        (remove_behaviors, DAY, {}, ["behaviors", "logs"]),
        (empty_behaviors, DAY, {}, ["behaviors.tsv", "empty"]),
        (commas_for_tabs, DAY, {}, ["behaviors.tsv", "tab"]),
        (
            break_nothing,
            "2024-02-01",
            {"LAST_DAY": "2024-02-01"},
            ["no impressions from 2024-02-01", "2024-01-01 to 2024-01-14"],
        ),
    ],
)
def test_unusable_logs_end_in_one_sentence(
    tmp_path: Path, logs: Path, damage, day: str, settings: dict[str, str], says: list[str]
) -> None:
    damage(logs)
    place = deployment(tmp_path, logs, **settings)
    done = place.materialise('key:"raw/impressions"', day)
    assert done.returncode != 0
    failures = [line for line in done.stderr.splitlines() if " FAILED " in line]
    assert len(failures) == 1, done.stderr
    assert all(word in failures[0] for word in says), failures
    assert "Stack Trace" not in done.stderr
    assert not list(place.store.root.rglob("*.parquet"))
    assert not list(place.store.root.rglob(".*"))


def test_window_that_was_never_ingested_says_what_to_do(tmp_path: Path, logs: Path) -> None:
    place = deployment(tmp_path, logs)
    done = place.materialise("group:splits", "2024-01-14")
    assert done.returncode != 0
    assert "materialise features/impressions and features/items" in done.stderr


def test_unknown_run_config_key_is_refused_before_any_work(tmp_path: Path, logs: Path) -> None:
    place = deployment(tmp_path, logs)
    done = place.materialise(
        'key:"raw/impressions"', DAY, {"raw__impressions": {"config": {"rebuid": True}}}
    )
    assert done.returncode != 0
    assert "rebuid" in done.stderr
    assert not place.store.root.exists()


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("WINDOW_DAYS", "-1", "RECFLOW_WINDOW_DAYS = '-1' is not allowed"),
        ("WINDOWDAYS", "9", "unknown setting RECFLOW_WINDOWDAYS in the environment"),
    ],
)
def test_bad_settings_end_in_one_sentence(
    tmp_path: Path, logs: Path, setting: str, value: str, says: str
) -> None:
    place = deployment(tmp_path, logs, **{setting: value})
    done = place.materialise('key:"raw/impressions"', DAY)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(f"recflow: {says}")
    assert "Traceback" not in done.stderr
    assert not place.store.root.exists()

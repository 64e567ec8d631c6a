"""How a demonstration is configured; `make demo` and the integration tests run one."""

from datetime import date
from pathlib import Path

import pytest

from recflow import demo
from recflow.core.errors import ConfigError, SourceError
from recflow.data.sources import open_source
from recflow.hardware.catalogue import load_catalogue
from recflow.settings import ENV_FILE_VARIABLE, load_settings
from recflow_tests.unit.sources.helpers import write_mind


def log_of(counts: dict[int, int], folder: Path) -> Path:
    """A log with so many impressions on each day of January 2026."""
    lines = [
        f"{day}-{n}\tU{n}\t1/{day}/2026 8:00:00 AM\tN1\tN2-0 N3-1\n"
        for day, count in counts.items()
        for n in range(count)
    ]
    return write_mind(folder, "".join(lines))


@pytest.fixture(autouse=True)
def _own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(ENV_FILE_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "home_of", lambda data: tmp_path / "home" / data)


@pytest.mark.parametrize(
    ("counts", "newest"),
    [
        ({5: 10, 6: 10, 7: 10}, date(2026, 1, 7)),
        ({5: 10, 6: 10, 7: 2}, date(2026, 1, 6)),  # the 7th was cut in mid-day
        ({5: 10, 6: 10, 7: 5}, date(2026, 1, 7)),  # half of the median is enough
        ({5: 1}, date(2026, 1, 5)),
    ],
)
def test_newest_complete_day(tmp_path: Path, counts: dict[int, int], newest: date) -> None:
    source = open_source("mind", log_of(counts, tmp_path / "logs"))
    assert demo.newest_complete_day(source, source.days()) == newest


def test_configuration_covers_the_log_and_can_be_found_again(tmp_path: Path) -> None:
    source = open_source("mind", log_of({5: 10, 6: 10, 9: 10, 10: 1}, tmp_path / "logs"))
    made = demo.configure("mind", source, tmp_path / "model", None)
    assert (made.settings.first_day, made.settings.last_day) == (
        date(2026, 1, 5),
        date(2026, 1, 9),
    )
    assert made.settings.window_days == 5  # the missing days count
    assert (made.dagster_home / "dagster.yaml").is_file()
    found = demo.find_deployment("mind")
    assert found == made
    assert found.environment()[ENV_FILE_VARIABLE] == str(made.env_file)


@pytest.mark.parametrize("has_gpu", [False, True])
def test_a_machine_without_gpu_asks_for_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_gpu: bool
) -> None:
    monkeypatch.setattr(demo.shutil, "which", lambda name: f"/usr/bin/{name}" if has_gpu else None)
    source = open_source("mind", log_of({5: 1, 6: 1, 7: 1}, tmp_path / "logs"))
    made = demo.configure("mind", source, tmp_path / "model", None)
    catalogue = load_catalogue()
    processors = tuple(name for name, device in catalogue.items() if not device.is_gpu)
    assert made.settings.device_names == (() if has_gpu else processors)
    assert load_settings(made.env_file).device_names == made.settings.device_names

    monkeypatch.setenv("RECFLOW_DEVICES", "cpu-8,l4")
    asked = demo.configure("mind", source, tmp_path / "model", None)
    assert asked.settings.device_names == ("cpu-8", "l4")


def test_settings_of_the_caller_do_not_leak_into_a_deployment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = open_source("mind", log_of({5: 1, 6: 1, 7: 1}, tmp_path / "logs"))
    made = demo.configure("mind", source, tmp_path / "model", None)
    monkeypatch.setenv("RECFLOW_SEED", "5")
    assert "RECFLOW_SEED" not in made.environment()


def test_a_day_the_log_lacks_is_refused(tmp_path: Path) -> None:
    source = open_source("mind", log_of({5: 1, 6: 1, 7: 1}, tmp_path / "logs"))
    with pytest.raises(ConfigError, match=r"DATE = '2026-02-01'.*2026-01-05 to 2026-01-07"):
        demo.configure("mind", source, tmp_path / "model", date(2026, 2, 1))


def test_too_short_a_log_is_refused(tmp_path: Path) -> None:
    source = open_source("mind", log_of({5: 1, 6: 1}, tmp_path / "logs"))
    with pytest.raises(ConfigError, match="RECFLOW_WINDOW_DAYS = 2"):
        demo.configure("mind", source, tmp_path / "model", None)


def test_nothing_materialised_yet_says_how(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make demo DATA=mind"):
        demo.find_deployment("mind")


@pytest.mark.parametrize("data", ["mind", "ebnerd"])
def test_formats_that_cannot_be_fetched_need_a_folder(data: str) -> None:
    with pytest.raises(ConfigError, match=f"make demo DATA={data} DIR=folder"):
        demo.run_demo(data, None, None, print)


def test_unknown_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="DATA = 'csv' is not allowed; allowed: simulated, mind"):
        demo.run_demo("csv", None, None, print)


def test_missing_folder_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere"):
        demo.run_demo("mind", tmp_path / "nowhere", None, print)


def test_defaults_are_not_changed_by_a_demonstration(tmp_path: Path) -> None:
    before = load_settings()
    source = open_source("mind", log_of({5: 1, 6: 1, 7: 1}, tmp_path / "logs"))
    demo.configure("mind", source, tmp_path / "model", None)
    assert load_settings() == before

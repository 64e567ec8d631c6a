import json
import subprocess
import sys
from pathlib import Path

import pytest

from recflow import demo
from recflow.cli import main


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["recflow", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_mistakes_are_one_sentence_and_exit_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "demo", "--data", "csv") == 2
    assert capsys.readouterr().err == (
        "recflow: DATA = 'csv' is not allowed; allowed: simulated, mind, ebnerd, movielens\n"
    )


def test_simulate_writes_a_log_by_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"impressions": 20, "users": 5, "days": 2, "items_per_day": 20}))
    folder = tmp_path / "logs"
    assert run(monkeypatch, "data", "simulate", str(folder), "--config", str(config)) == 0
    assert len((folder / "behaviors.tsv").read_text().splitlines()) == 20
    assert run(monkeypatch, "data", "simulate", str(folder), "--config", str(config)) == 2


def test_simulate_refuses_unknown_keys_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"impresions": 20}')
    assert run(monkeypatch, "data", "simulate", str(tmp_path / "x"), "--config", str(config)) == 2
    assert "impresions" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_dev_before_any_demonstration_says_what_to_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "home_of", lambda data: tmp_path / data)
    assert run(monkeypatch, "dev", "--data", "mind") == 2
    assert "make demo DATA=mind" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["on", "off", "status"])
def test_the_loop_of_no_deployment_says_what_to_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    monkeypatch.setattr(demo, "home_of", lambda data: tmp_path / data)
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    assert run(monkeypatch, "loop", verb) == 2
    assert "make demo DATA=movielens" in capsys.readouterr().err
    assert run(monkeypatch, "loop", verb, "--data", "mind") == 2
    assert "make demo DATA=mind" in capsys.readouterr().err


def test_help_needs_no_heavy_import() -> None:
    script = (
        "import sys; from recflow.cli import app; "
        "print(sorted({'torch', 'dagster', 'mlflow', 'polars'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"

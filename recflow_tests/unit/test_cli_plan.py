import io
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from recflow.cli import main
from recflow.hardware.calibration import default_calibration, save_calibration
from recflow.hardware.catalogue import find_device, load_catalogue
from recflow.hardware.inference import ServedModel, plan_inference
from recflow.hardware.plan_table import PlanRequest, PlanTable, duration
from recflow.hardware.planner import plan_training
from recflow.hardware.presets import PRESETS, find_shape, preset_config
from recflow.hardware.workload import InferenceWorkload, TrainingWorkload
from recflow.modeling.config import TrainingConfig, config_from, with_values

EXAMPLE = ("--model", "bert-base-uncased", "--strategy", "lora", "--batch", "64")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RECFLOW_CATALOGUE", "RECFLOW_CALIBRATION", "RECFLOW_TRAINING_HOURS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


def _run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["recflow", "plan", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def _json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> dict[str, Any]:
    status, out, err = _run(monkeypatch, capsys, *arguments, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


def test_the_table_is_readable_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = _run(monkeypatch, capsys, *EXAMPLE)
    assert (status, err) == (0, "")
    assert max(len(line) for line in out.splitlines()) <= 80
    assert "\x1b" not in out
    assert "bert-base-uncased: 108.9 M parameters" in out
    for name in load_catalogue():
        assert re.search(rf"^ {name} +yes +\d+\.\d of \d+ ", out, re.MULTILINE)
    for part in ("weights", "gradients", "optimiser states", "activations", "context"):
        assert re.search(rf"^ {part} .*\d\.\d\d", out, re.MULTILINE)
    assert "Choice: " in out
    assert "Training factors measured on such devices: cpu-2-zen4, cpu-8-zen4." in out
    assert "Training factors assumed: cpu-2, cpu-8, cpu-16, cpu-8-amx, t4" in out


def test_what_does_not_fit_says_why_and_what_would_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--strategy", "full", "--device", "l4", "--model")
    status, out, _ = _run(monkeypatch, capsys, *arguments, "Qwen3-0.6B")
    assert status == 0
    words = " ".join(out.split())
    assert "No choice: the training fits no device; l4 comes nearest but needs" in words
    assert "Too large for l4; most of it: " in words
    assert "It would fit l4 with one of:" in words
    assert "tuning.strategy: lora" in words
    _, out, _ = _run(monkeypatch, capsys, *arguments, "Qwen3-8B")
    assert "take a smaller base model" in " ".join(out.split())


def test_json_says_everything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _json(monkeypatch, capsys, *EXAMPLE, "--hours", "2")
    assert list(found) == [
        "layout", "model", "shape", "config", "workload", "served", "max_hours", "choice",
        "reason", "advice", "devices",
    ]  # fmt: skip
    assert (found["layout"], found["model"], found["max_hours"]) == (1, EXAMPLE[1], 2)
    assert found["shape"]["parameters"] == find_shape(EXAMPLE[1]).parameters
    config = config_from(TrainingConfig, found["config"])
    expected = {"tuning.strategy": "lora", "schedule.encoder_batch_size": 64}
    assert config == with_values(TrainingConfig(), expected)
    assert [each["name"] for each in found["devices"]] == list(load_catalogue())
    chosen = next(each for each in found["devices"] if each["name"] == found["choice"])
    for each in found["devices"]:
        device = find_device(each["name"])
        plan = plan_training(find_shape(EXAMPLE[1]), config, TrainingWorkload.typical(), device)
        assert each["training"] == json.loads(json.dumps(plan.as_dict()))
        assert sum(each["training"]["memory_parts"].values()) == plan.memory.total
        assert each["fits"] == plan.fits
        assert each["price"]["usd_per_hour"] == device.price.usd_per_hour
        assert each["factors"]["measured"] == each["name"].endswith("-zen4")
        assert each["training"]["usd"] >= chosen["training"]["usd"]
        assert (each["shortage"], each["refused"]) == (None, None)
        served = plan_inference(
            ServedModel.of(find_shape(EXAMPLE[1])),
            InferenceWorkload(lengths=TrainingWorkload.typical().lengths),
            device,
        )
        assert each["serving"] == json.loads(json.dumps(served.as_dict()))
    assert (found["reason"], found["advice"]) == (None, [])


def test_json_of_what_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", "Qwen3-0.6B", "--strategy", "full", "--device", "t4", "--device", "L4")
    found = _json(monkeypatch, capsys, *arguments, "--precision", "bf16")
    refused, short = found["devices"]
    assert refused["training"] is None
    assert refused["refused"].startswith("precision = 'bf16' is not allowed")
    assert re.match(r"needs \d+\.\d GiB of 22\.0 GiB, most of it ", short["shortage"])
    assert found["choice"] is None
    assert "comes nearest" in found["reason"]
    config = config_from(TrainingConfig, found["config"])
    for advice in found["advice"]:
        plan = plan_training(
            find_shape("Qwen3-0.6B"),
            with_values(config, advice["values"]),
            TrainingWorkload.typical(),
            find_device(advice["device"]),
        )
        assert plan.fits
        assert plan.memory.total == advice["memory_bytes"]


def test_every_option_reaches_the_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _json(
        monkeypatch, capsys, "--model", "MiniLM-L6", "--strategy", "adalora", "--batch", "32",
        "--tuned-layers", "3", "--rank", "4", "--precision", "fp32", "--history", "30",
        "--negatives", "40", "--tokens", "20", "--max-tokens", "48", "--items", "5000",
        "--clicks", "7000", "--texts-per-step", "99", "--micro-batches", "2", "--checkpointing",
        "--no-cache", "--processes", "2", "--set", "user_model.kind=mean", "--set",
        "schedule.head_epochs=3",
    )  # fmt: skip
    assert config_from(TrainingConfig, found["config"]) == with_values(
        TrainingConfig(),
        {
            "tuning.strategy": "adalora", "tuning.tuned_layers": 3, "tuning.rank": 4,
            "schedule.encoder_batch_size": 32, "speed.precision": "fp32",
            "user_model.history_length": 30, "objective.negatives": 40, "max_tokens": 48,
            "speed.max_texts_per_step": 99, "speed.micro_batches": 2,
            "speed.gradient_checkpointing": True, "speed.cache_hidden_states": False,
            "distribution.processes": 2, "user_model.kind": "mean", "schedule.head_epochs": 3,
        },
    )  # fmt: skip
    workload = found["workload"]
    assert (workload["clicks"], workload["items"], workload["history"]) == (7000, 5000, 30)
    assert workload["slate"] == 41
    assert workload["mean_tokens"] == pytest.approx(20, rel=0.05)
    other = _json(
        monkeypatch, capsys, "--model", "MiniLM-L6", "--no-distinct", "--shard", "--processes", "2"
    )["config"]
    assert (other["speed"]["distinct_items"], other["speed"]["max_texts_per_step"]) == (False, 0)
    assert other["distribution"]["shard_encoder"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nope"], "model = 'nope' is not allowed; allowed: a folder"),
        ([*EXAMPLE, "--strategy", "loro"], "strategy = 'loro' is not allowed"),
        ([*EXAMPLE, "--batch", "0"], "encoder_batch_size = 0 is not allowed"),
        ([*EXAMPLE, "--tuned-layers", "13"], "tuned_layers = 13 is not allowed; allowed: 1 to 12"),
        ([*EXAMPLE, "--precision", "fp8"], "precision = 'fp8' is not allowed"),
        ([*EXAMPLE, "--precision", "bf16", "--device", "t4"], "allowed: auto or fp32 on t4"),
        ([*EXAMPLE, "--history", "0"], "history_length = 0 is not allowed; allowed: at least 1"),
        ([*EXAMPLE, "--clicks", "-1"], "clicks = -1 is not allowed; allowed: above 0"),
        ([*EXAMPLE, "--items", "0"], "items = 0 is not allowed; allowed: above 0"),
        (
            [*EXAMPLE, "--tokens", "65"],
            "tokens = 65.0 is not allowed; allowed: 1 to max_tokens, 64",
        ),
        ([*EXAMPLE, "--tokens", "nan"], "tokens = nan is not allowed"),
        ([*EXAMPLE, "--hours", "0"], "hours = 0.0 is not allowed; allowed: above 0"),
        ([*EXAMPLE, "--candidates", "-1"], "candidates = -1 is not allowed"),
        ([*EXAMPLE, "--texts-per-recommendation", "-1"], "texts = -1.0 is not allowed"),
        ([*EXAMPLE, "--serve-precision", "fp8"], "precision = 'fp8' is not allowed"),
        ([*EXAMPLE, "--device", "v100"], "device = 'v100' is not allowed; allowed: cpu-2, "),
        ([*EXAMPLE, "--set", "rank"], "set = 'rank' is not allowed; allowed: key=value"),
        ([*EXAMPLE, "--set", "tuning.rang=3"], "configuration key = 'tuning.rang' is not allowed"),
        ([*EXAMPLE, "--set", "tuning.rank=big"], "rank = 'big' is not allowed"),
        ([*EXAMPLE, "--catalogue", "none.yaml"], "none.yaml cannot be read as a catalogue"),
        ([*EXAMPLE, "--calibration", "none.json"], "none.json holds no calibration"),
    ],
)
def test_impossible_options_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    status, out, err = _run(monkeypatch, capsys, *arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert err.startswith("recflow: ")
    assert err.count("\n") == 1


def test_serving_options_reach_the_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = _json(monkeypatch, capsys, *EXAMPLE, "--device", "cpu-8")
    found = _json(
        monkeypatch, capsys, *EXAMPLE, "--device", "cpu-8", "--candidates", "300",
        "--texts-per-recommendation", "0.5", "--serve-precision", "int8_dynamic",
        "--items", "9000", "--history", "10",
    )  # fmt: skip
    assert found["served"] == {
        "runtime": "onnxruntime", "precision": "int8_dynamic", "items": 9000, "history": 10,
        "candidates": 300, "texts": 0.5,
    }  # fmt: skip
    cheaper, dearer = (each["devices"][0]["serving"]["usd_per_million"] for each in (found, usual))
    assert cheaper < dearer


def test_own_prices_change_the_choice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert _json(monkeypatch, capsys, *EXAMPLE)["choice"] != "h200"
    own = tmp_path / "own.yaml"
    own.write_text("devices: {h200: {price: {usd_per_hour: 0.001, source: '[bold]ours'}}}")
    found = _json(monkeypatch, capsys, *EXAMPLE, "--catalogue", str(own))
    assert found["choice"] == "h200"
    monkeypatch.setenv("RECFLOW_CATALOGUE", str(own))
    assert _json(monkeypatch, capsys, *EXAMPLE)["choice"] == "h200"


def test_a_time_budget_of_the_deployment_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RECFLOW_TRAINING_HOURS", "0.0001")
    found = _json(monkeypatch, capsys, *EXAMPLE)
    assert found["choice"] is None
    assert "the quickest, h200, takes" in found["reason"]


@pytest.mark.parametrize(
    ("measured", "counts_for"),
    [("this-machine", {"cpu-2", "cpu-8"}), ("cpu-8", {"cpu-8"}), ("h100", {"h100"})],
)
def test_measured_factors_count_for_the_devices_they_are_of(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    measured: str,
    counts_for: set[str],
) -> None:
    base = default_calibration(find_device("cpu-2" if measured == "this-machine" else measured))
    file = tmp_path / "machine.json"
    save_calibration(
        replace(base, device=measured, is_measured=True, start_seconds=9e4, source="here"), file
    )
    monkeypatch.setenv("RECFLOW_CALIBRATION", str(file))
    names = ["cpu-2", "cpu-8", "t4", "h100"]
    found = _json(
        monkeypatch, capsys, *EXAMPLE, *(word for name in names for word in ("--device", name))
    )
    said = {each["name"] for each in found["devices"] if each["factors"]["source"] == "here"}
    slow = {each["name"] for each in found["devices"] if each["training"]["seconds"] > 9e4}
    assert said == slow == counts_for


def test_a_model_of_ones_own_is_planned_from_its_configuration_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 100,
                "max_position_embeddings": 32,
            }
        )
    )  # fmt: skip
    status, _, err = _run(monkeypatch, capsys, "--model", str(tmp_path))
    assert (status, err) == (
        2,
        "recflow: max_tokens = 64 is not allowed; allowed: at most 32, the encoder's longest\n",
    )
    found = _json(monkeypatch, capsys, "--model", str(tmp_path), "--max-tokens", "32")
    assert found["shape"]["layers"] == 2


def test_what_the_user_names_is_not_markup(tmp_path: Path) -> None:
    folder = tmp_path / "[red]model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(preset_config("bert-base-uncased")))
    written = io.StringIO()
    PlanTable.of(PlanRequest.of(str(folder), devices=["l4"])).print(
        Console(file=written, width=300, force_terminal=True)
    )
    assert "[red]model: " in written.getvalue()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"),
        (89, "89 s"),
        (90, "1.5 min"),
        (5_399, "90.0 min"),
        (5_400, "1.5 h"),
        (1e6, "11.6 d"),
    ],
)
def test_durations_for_people(seconds: float, said: str) -> None:
    assert duration(seconds) == said


HEAVY = {"torch", "polars", "dagster", "mlflow", "transformers", "numpy", "huggingface_hub"}


@pytest.mark.parametrize("preset", [*PRESETS])
def test_every_preset_is_answered_without_heavy_imports(preset: str) -> None:
    script = (
        "import sys; from recflow.cli import main; sys.argv[0] = 'recflow'\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script, "plan", "--model", preset, "--strategy", "full"],
        capture_output=True,
        text=True,
        check=True,
    )
    # Printed, not asserted: the clock of a busy machine says little.
    print(f"{preset}: {time.perf_counter() - started:.2f} s")
    assert done.stderr.strip() == "[]"
    assert "hoice: " in done.stdout

"""Factors of a machine: kept as a file, and fitted to what was measured."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recflow.core.errors import ConfigError
from recflow.hardware import probe
from recflow.hardware.calibration import (
    Calibration,
    default_calibration,
    load_calibration,
    save_calibration,
)
from recflow.hardware.catalogue import load_catalogue
from recflow.hardware.planner import plan_training

CPU = load_catalogue()["cpu-2"]


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = default_calibration(CPU)
    save_calibration(written, tmp_path / "machine.json")
    assert load_calibration(tmp_path / "machine.json") == written


@pytest.mark.parametrize("content", ["", "[]", '{"layout": 0}', '{"layout": 2, "speed": 3}'])
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "machine.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"holds no calibration .*`recflow probe`"):
        load_calibration(file)


def test_the_share_of_another_family_is_that_of_bert() -> None:
    factors = default_calibration(CPU)
    assert factors.heap_share("decoder", "bf16", "adapters") == factors.heap["bert bf16 adapters"]


def test_the_share_is_halved_at_the_half_width() -> None:
    factors = replace(default_calibration(CPU), matrix_share={"bf16": 0.9}, half_width=384.0)
    # The widest share over one plus the half width a width.
    assert factors.share("bf16", 384) == pytest.approx(0.45)
    assert factors.share("bf16", 1_152) == pytest.approx(0.675)
    assert factors.share("bf16", 128) == pytest.approx(0.225)
    even = replace(factors, half_width=0.0)
    assert even.share("bf16", 128) == even.share("bf16", 4_096) == 0.9


def made_up_runs(
    factors: Calibration, threads: int
) -> list[tuple[dict[str, Any], str, dict[str, Any]]]:
    """Reports of a machine that reaches exactly these factors."""
    runs = []
    for encoder, values in probe._TRAININGS:
        shape, config, workload = probe._plan_parts(encoder, values, threads)
        plan = plan_training(shape, config, workload, CPU, factors)
        stages = {stage.name: stage.seconds for stage in plan.stages}
        epochs = [
            {"phase": phase, "steps": 5, "seconds": 5 * stages[phase] + 1, "validation_seconds": 1}
            for phase in ("head", "encoder")
        ]
        report = {
            "cache_seconds": stages.get("hidden states", 0.0),
            "epochs": epochs,
            "peak_rss_bytes": plan.memory.total,
        }
        runs.append((report, encoder, values))
    return runs


def test_the_fit_finds_the_factors_of_a_machine() -> None:
    truth = replace(default_calibration(CPU), half_width=260.0)
    runs = made_up_runs(truth, 2)
    wrong = {"fp32": 0.1, "bf16": 0.1}
    start = replace(truth, matrix_share=wrong, half_width=0.0, bandwidth_share=0.9, context_bytes=1)
    fitted = probe._fit_context(runs, CPU, probe._fit_seconds(runs, CPU, start, 2), 2)
    assert fitted.matrix_share == pytest.approx(truth.matrix_share, rel=1e-3)
    assert fitted.half_width == truth.half_width
    assert fitted.bandwidth_share == pytest.approx(truth.bandwidth_share, rel=1e-3)
    assert fitted.operator_seconds == pytest.approx(truth.operator_seconds, rel=1e-3)
    assert fitted.context_bytes == pytest.approx(truth.context_bytes, rel=1e-3)


def test_the_invented_texts_are_as_long_as_they_are_said_to_be() -> None:
    items, train, validation = probe._tables()
    assert [len(text.split()) + 2 for text in items["text"]] == probe._lengths()
    assert (len(train), len(validation)) == (1_280, 300)


def test_a_process_that_fails_ends_the_probe(tmp_path: Path) -> None:
    job = {"do": "heap", "encoder": "4 × 256", "strategy": "magic", "precision": "fp32"}
    with pytest.raises(probe.HardwareError, match=r"the probe .* failed at .*magic"):
        probe._in_own_process(job, tmp_path)


def test_what_the_allocator_holds_is_at_least_what_is_needed(tmp_path: Path) -> None:
    job = {"do": "heap", "encoder": "4 × 256", "strategy": "top_k_layers", "precision": "fp32"}
    answer = probe._in_own_process({**job, "threads": 1}, tmp_path)
    assert answer["held"] >= 0.9 * answer["saved"] > 0

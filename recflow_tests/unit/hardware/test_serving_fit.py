"""Fitting the times of serving finds the factors that times were made with."""

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from recflow.hardware.catalogue import find_device
from recflow.hardware.inference import ServedModel
from recflow.hardware.presets import find_shape
from recflow.hardware.serving_factors import Speed, default_factors
from recflow.hardware.workload import TextLengths
from recflow_tests.benchmarks.serving_plan import Contender, Planner, Seen, fit

PRESETS = ("all-MiniLM-L6-v2", "all-MiniLM-L12-v2", "bert-base-uncased")
CALLS = (1, 8, 256)


def test_known_factors_are_found() -> None:
    planner = Planner(find_device("cpu-2"), TextLengths((6, 9, 12, 15)))
    usual = default_factors(planner.device)
    known = Speed(0.7, 0.9, 0.3, layer_seconds=3e-4, call_seconds=5e-4)
    true = MappingProxyType({**usual.speeds, "torch/autocast": known})
    factors = replace(usual, speeds=true)
    models = [
        Contender(name, "torch fp32", Path(name), ServedModel(find_shape(name))) for name in PRESETS
    ]
    seen = {
        each.key: Seen(0.0, {count: planner.call_seconds(each, count, factors) for count in CALLS})
        for each in models
    }
    found = fit(planner, models, seen)
    for name in ("matrix_share", "bandwidth_share", "activation_share", "layer_seconds"):
        assert getattr(found.speeds["torch/autocast"], name) == pytest.approx(
            getattr(known, name), rel=1e-3
        )
    # What no model speaks of stays as it was.
    assert found.speeds["onnxruntime/fp32"] == usual.speeds["onnxruntime/fp32"]
    rows = planner.compared(models[0], seen[models[0].key], found)
    assert max(abs(row.error) for row in rows) < 1e-3

"""The report's section on money, energy and limits, in each of its three forms."""

import dataclasses
import json
import math
import re
from typing import Any

import pytest

from recflow.core.cost import (
    CostSection,
    ModelCost,
    PlannedAndMeasured,
    PricedDevice,
    ServingCost,
    TrainingCost,
    cheapest,
)
from recflow.core.errors import ConfigError
from recflow.evaluation.evaluator import Evaluation
from recflow.evaluation.report import report_html, report_json, result_table, schema
from recflow.evaluation.report.charts import CostPoint, Point, prices
from recflow_tests.unit.evaluation.test_report import (
    CONTEXT,
    HOSTILE,
    MEASUREMENTS,
    Page,
    evaluation,
)

__all__ = ["evaluation"]  # the fixture


def device(name: str, label: str, kind: str, usd: float = 0.5) -> PricedDevice:
    return PricedDevice(
        name=name,
        label=label,
        kind=kind,
        memory_bytes=16_000_000_000,
        watts=72.0,
        usd_per_hour=usd,
        price_date="2026-11-25",
        price_source=f"price list of {label}",
        data_source=f"data sheet of {label}",
    )


def serving(name: str, usd: float, *, fits: bool = True, measured: bool = False) -> ServingCost:
    return ServingCost(
        device=name,
        fits=fits,
        memory_bytes=812_000_000,
        texts_per_second=1_234.0,
        limit_texts_per_second=9_870.0,
        recommendations_per_second=1_200.0,
        usd=usd,
        watt_hours=25.0,
        is_calibrated=measured,
    )


def training(name: str, usd: float, *, fits: bool = True) -> TrainingCost:
    return TrainingCost(
        device=name,
        fits=fits,
        memory_bytes=3_000_000_000,
        seconds=5_400.0,
        limit_seconds=240.0,
        usd=usd,
        watt_hours=1_500.0,
        is_calibrated=False,
    )


DEVICES = (
    device("cpu-8", "8 cores", "cpu"),
    device("t4", "Tesla T4", "gpu"),
    device("l4", "L4", "gpu"),
)
COSTS = CostSection(
    devices=DEVICES,
    models=(
        ModelCost(
            "fine_tuned",
            serving=(serving("cpu-8", 2.5, measured=True), serving("t4", 0.0431), serving("l4", 9)),
            training=(training("cpu-8", 1.25), training("t4", 0.01, fits=False)),
            measured_seconds=71.5,
            energy_source="RAPL: package-0",
            measured_watt_hours=0.031,
        ),
        ModelCost(
            "quantized",
            serving=(serving("cpu-8", 0.0107), serving("t4", 0.002, fits=False)),
            note="making it was not planned",
            energy_source="RAPL: package-0",
        ),
    ),
    compared=(
        PlannedAndMeasured("fine_tuned", "training", "peak memory", "bytes", 9.9e8, 1.1e9),
        PlannedAndMeasured("fine_tuned", "training", "training", "seconds", None, 71.5, 9.25),
        PlannedAndMeasured("fine_tuned", "inference", "peak memory", "bytes", 4.2e8, 4e8),
        PlannedAndMeasured("quantized", "inference", "throughput", "texts/s", None, 450.0, 2_000.0),
    ),
    recommendation="A recommendation ranks 100 candidates.",
    training_run="A training run goes over the clicks once.",
    machine="Measured on two cores.",
    notes=("Prices change.",),
)
WITH_COSTS = dataclasses.replace(CONTEXT, costs=COSTS)


def section_of(html: str) -> str:
    (section,) = re.findall(r'<section id="money">.*?</section>', html, re.DOTALL)
    return section


@pytest.fixture(scope="module")
def section(evaluation: Evaluation) -> str:
    return section_of(report_html(evaluation, MEASUREMENTS, WITH_COSTS))


def test_the_cheapest_fits_and_has_a_price() -> None:
    dear, free = serving("l4", 2.0), serving("t4", 0.0, fits=False)
    assert cheapest([free, serving("x", math.inf), dear, serving("y", 2.0)]) is dear
    assert cheapest([free]) is None
    assert cheapest([training("t4", 3.0), training("l4", 1.0)]) == training("l4", 1.0)


def test_json_holds_costs_that_follow_the_schema(evaluation: Evaluation) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    document = json.loads(report_json(evaluation, MEASUREMENTS, WITH_COSTS))
    jsonschema.validate(document, schema())
    costs = document["costs"]
    first, second = costs["models"]
    # On the T4, quantized would be cheaper than anywhere, but does not fit.
    assert (first["cheapest_serving"], second["cheapest_serving"]) == ("t4", "cpu-8")
    assert (first["cheapest_training"], second["cheapest_training"]) == ("cpu-8", None)
    assert [cost["usd"] for cost in first["serving"]] == [2.5, 0.0431, 9]
    assert costs["compared"][0]["error"] == pytest.approx(-0.1)
    assert costs["compared"][3]["predicted"] is None
    assert costs["compared"][3]["error"] is None
    assert [entry["price_date"] for entry in costs["devices"]] == ["2026-11-25"] * 3
    document["costs"]["models"][0]["serving"][0]["surprise"] = 1
    with pytest.raises(jsonschema.ValidationError, match="surprise"):
        jsonschema.validate(document, schema())


def test_small_prices_keep_their_digits_and_infinite_ones_are_null(evaluation: Evaluation) -> None:
    models = (ModelCost("quantized", (serving("t4", 1.23456789e-7), serving("l4", math.inf))),)
    context = dataclasses.replace(CONTEXT, costs=dataclasses.replace(COSTS, models=models))
    text = report_json(evaluation, MEASUREMENTS, context)
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))
    (model,) = document["costs"]["models"]
    assert [cost["usd"] for cost in model["serving"]] == [1.23457e-7, None]
    assert "$0.000000123" in report_html(evaluation, MEASUREMENTS, context)


def test_page_shows_prices_limits_and_what_was_measured(section: str) -> None:
    parsed = Page(section)
    served, trained, compared, *_ = parsed.tables
    text = " ".join(parsed.text.split())
    for shown in ("$0.0431", "Tesla T4", "≤ 25.0 Wh", "limit 9,870", "does not fit", "0.0310 Wh"):
        assert shown in served
    for shown in ("$1.25", "90.0 min", "limit 4.00 min", "≤ 1.50 kWh", "71.5 s", "not recorded"):
        assert shown in trained
    for shown in (
        "990 MB",
        "1.10 GB",
        "−10%",
        "+5%",
        "450 texts/s",
        "2,000 texts/s",
        "whole run",
        "9.25 s",
    ):
        assert shown in compared
    for shown in (COSTS.recommendation, COSTS.training_run, COSTS.machine, *COSTS.notes):
        assert shown in text
    assert "quantized: making it was not planned" in text
    # Serving was calibrated on the 8 cores, training on none.
    assert (
        "Efficiencies are assumed, not measured, for serving on every GPU and for training on "
        "every device." in text
    )
    assert "meter: RAPL: package-0" in text
    assert "price list of L4, 2026-11-25" in text


def test_page_names_the_devices_that_were_assumed(evaluation: Evaluation) -> None:
    served = (serving("cpu-8", 1.0), serving("t4", 1.0, measured=True), serving("l4", 1.0))
    models = (ModelCost("fine_tuned", served, energy_source="no meter"),)
    context = dataclasses.replace(CONTEXT, costs=dataclasses.replace(COSTS, models=models))
    text = Page(section_of(report_html(evaluation, MEASUREMENTS, context))).text
    assert "not measured, for serving on 8 cores; L4." in text
    assert "No energy could be measured: no meter." in text
    assert "energy as" not in text


def test_page_marks_the_cheapest_device_of_each_model(section: str) -> None:
    served = section.split("<h3>")[1]
    assert re.findall(r'class="kept">([^<]*)<', served) == ["$0.0431"] * 2 + ["$0.0107"] * 2


def test_page_has_the_cheapest_price_among_its_headlines(evaluation: Evaluation) -> None:
    html = report_html(evaluation, MEASUREMENTS, WITH_COSTS)
    text = re.sub(r"\s+", " ", Page(html).text)
    headline = (
        "a million recommendations, planned$0.0431fine_tuned on Tesla T4; $0.0107 for quantized"
    )
    assert headline in text
    assert '<a href="#money">' in html


def test_the_chart_has_each_model_on_its_cheapest_device(section: str) -> None:
    (chart,) = re.findall(r"<svg.*?</svg>", section, re.DOTALL)
    assert 'aria-label="AUC over USD per million recommendations of each model"' in chart
    written = re.findall(r"<text[^>]*>([^<]*)</text>", chart)
    assert {"Tesla T4", "8 cores", "1", "2"} <= set(written)
    assert "L4" not in written


@pytest.mark.parametrize("count", [1, 9])
def test_the_chart_takes_one_device_and_more_than_it_has_colours(count: int) -> None:
    series = {
        f"device {n}": [CostPoint(n, Point("m", 0.5, 0.5, 0.5), 0.1 * (n + 1))]
        for n in range(count)
    }
    drawn = prices("salt", "AUC", "USD", series)
    assert all(f">{name}<" in drawn for name in series)
    assert prices("salt", "AUC", "USD", series) == drawn


def test_models_without_a_price_are_left_out_of_the_chart(evaluation: Evaluation) -> None:
    for costs in (
        (serving("t4", 0.0),),
        (serving("t4", math.inf),),
        (serving("t4", 1, fits=False),),
    ):
        models = (ModelCost("quantized", costs),)
        context = dataclasses.replace(CONTEXT, costs=dataclasses.replace(COSTS, models=models))
        section = section_of(report_html(evaluation, MEASUREMENTS, context))
        assert "<svg" not in section
        assert "quantized" in section


def test_a_catalogue_of_one_device_is_a_report(evaluation: Evaluation) -> None:
    models = (ModelCost("fine_tuned", (serving("t4", 0.25),), (training("t4", 0.75),)),)
    costs = dataclasses.replace(COSTS, devices=DEVICES[1:2], models=models, compared=())
    context = dataclasses.replace(CONTEXT, costs=costs)
    parsed = Page(section_of(report_html(evaluation, MEASUREMENTS, context)))
    assert len(parsed.tables) == 3  # serving, training, the device's own
    assert "Predicted beside measured" not in parsed.text


def test_a_report_without_plans_has_no_section(evaluation: Evaluation) -> None:
    html = report_html(evaluation, MEASUREMENTS, CONTEXT)
    assert 'id="money"' not in html
    assert "million recommendations" not in html
    assert json.loads(report_json(evaluation, MEASUREMENTS, CONTEXT))["costs"] is None
    assert "USD" not in result_table(evaluation, MEASUREMENTS, CONTEXT)


def test_a_section_without_models_says_what_it_knows(evaluation: Evaluation) -> None:
    costs = dataclasses.replace(COSTS, models=(), compared=())
    context = dataclasses.replace(CONTEXT, costs=costs)
    text = Page(section_of(report_html(evaluation, MEASUREMENTS, context))).text
    assert COSTS.recommendation in text
    assert "A training run" in text
    assert "USD" not in result_table(evaluation, MEASUREMENTS, context)


def test_text_of_costs_is_escaped(evaluation: Evaluation) -> None:
    def hostile(value: Any) -> Any:
        texts = [
            f.name for f in dataclasses.fields(value) if isinstance(getattr(value, f.name), str)
        ]
        kept = {"name", "device", "model", "run", "kind"}
        return dataclasses.replace(value, **{name: HOSTILE for name in texts if name not in kept})

    costs = dataclasses.replace(
        hostile(COSTS),
        devices=tuple(map(hostile, DEVICES)),
        models=tuple(map(hostile, COSTS.models)),
        compared=tuple(dataclasses.replace(hostile(row), name=HOSTILE) for row in COSTS.compared),
        notes=(HOSTILE,),
    )
    context = dataclasses.replace(CONTEXT, costs=costs)
    html = report_html(evaluation, MEASUREMENTS, context)
    assert "<script" not in html
    assert HOSTILE in Page(html).text
    assert section_of(html).count("alert(") >= 15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": (ModelCost("unknown"),)}, "costs of = 'unknown'"),
        ({"models": (ModelCost("random"), ModelCost("random"))}, "the same name"),
        ({"models": (ModelCost("random", (serving("z9", 1.0),)),)}, "device of random = 'z9'"),
        (
            {"compared": (PlannedAndMeasured("unknown", "training", "x", "bytes", 1.0, 1.0),)},
            "costs of = 'unknown'",
        ),
    ],
)
def test_costs_must_belong_to_scorers_and_devices(
    evaluation: Evaluation, change: dict[str, Any], message: str
) -> None:
    context = dataclasses.replace(CONTEXT, costs=dataclasses.replace(COSTS, **change))
    with pytest.raises(ConfigError, match=message):
        report_json(evaluation, [], context)


def test_terminal_has_a_row_a_model(evaluation: Evaluation) -> None:
    *_, table = result_table(evaluation, MEASUREMENTS, WITH_COSTS).split("\n\n")
    header, _, first, second = table.splitlines()
    assert header.split()[:3] == ["planned", "cheapest", "serving"]
    assert first.split() == ["fine_tuned", "t4", "0.0431", "25", "1.25", "420", "MB", "400", "MB"]
    assert second.split() == ["quantized", "cpu-8", "0.0107", "25", "–", "–", "–"]

import dataclasses
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import polars as pl
import pytest

from recflow.core.errors import ConfigError
from recflow.core.measurement import Energy, Latency, Measurement
from recflow.evaluation.evaluator import (
    Estimate,
    Evaluation,
    EvaluationConfig,
    ScorerResult,
    evaluate,
    predict,
)
from recflow.evaluation.label_efficiency import LabelShare
from recflow.evaluation.report import (
    SCHEMA_VERSION,
    FamilyMember,
    ItemVectors,
    ReportContext,
    report_html,
    report_json,
    result_table,
    schema,
)
from recflow_tests.unit.evaluation.support import FixedScorer
from recflow_tests.unit.evaluation.test_evaluator import SNAPSHOT, predictions_of

HOSTILE = "<script>alert('x')</script> $a_b$ & \"c\""


def measurement(name: str, *, size: int = 90_000_000, speed: float = 100.0) -> Measurement:
    return Measurement(
        name=name,
        runtime="torch",
        threads=1,
        size_bytes=size,
        serving_bytes=size + 1_000_000,
        parameters=22_000_000,
        load_seconds=0.5,
        texts_per_second=speed,
        throughput_spread=0.03,
        latencies=(Latency(32, 90.0, 95.0, 99.0, 50, 0.01), Latency(1, 6.0, 7.0, 8.0, 300, -0.02)),
        peak_rss_bytes=400_000_000,
        energy=Energy(None, "no counter"),
    )


MEASUREMENTS = [
    measurement("fine_tuned"),
    measurement("quantized", size=22_500_000, speed=450.0),
]
CONTEXT = ReportContext(
    title="Models as of 2026-03-03",
    data_name="Simulated logs",
    snapshot_date="2026-03-03",
    command="dagster asset materialize --select '*'",
    days=["2026-03-01", "2026-03-03"],
    missing_days=["2026-03-02"],
    row_counts={"items": 60, "train": 12_300},
    quarantine={"malformed_field": 12},
    training={"models/fine_tuned": [{"epoch": 1, "loss": 1.5}, {"epoch": 2, "loss": 1.25}]},
    label_efficiency=[
        LabelShare(
            share=0.01,
            impressions=123,
            pretrained={"auc": Estimate(0.52, 0.5, 0.54), "ndcg@10": Estimate(0.41, 0.4, 0.42)},
            adapted={"auc": Estimate(0.55, 0.53, 0.57), "ndcg@10": Estimate(0.4, 0.39, 0.41)},
            difference={"auc": Estimate(0.03, 0.01, 0.05), "ndcg@10": Estimate(-0.01, -0.02, 0.0)},
        )
    ],
    links={"MLflow run": "http://localhost:5000/#/runs/1", "odd": "javascript:alert(1)"},
    versions={"polars": "2.1.0"},
    parents={"models/fine_tuned": "a" * 64},
)


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    made = predictions_of(SNAPSHOT)
    for name, shift in (("fine_tuned", 0), ("quantized", 7)):
        values = {item: (hash_free(item) + shift) % 17 for item in SNAPSHOT.items["item_id"]}
        made.append(predict(FixedScorer(values, name), SNAPSHOT, catalogue_sample=20, seed=0))
    config = EvaluationConfig(bootstrap_samples=50, parents={"quantized": "fine_tuned"})
    return evaluate(made, SNAPSHOT, config)


def hash_free(item: str) -> int:
    return int(item[1:])


@pytest.fixture(scope="module")
def page(evaluation: Evaluation) -> str:
    return report_html(evaluation, MEASUREMENTS, CONTEXT)


class Page(HTMLParser):
    """Collects elements, and the text of each table."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[str] = []
        self.text = ""
        self._in_table = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self._in_table = True
            self.tables.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._in_table = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_table:
            self.tables[-1] += data


# JSON


def test_json_follows_its_schema(evaluation: Evaluation) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    document = json.loads(report_json(evaluation, MEASUREMENTS, CONTEXT))
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(document, schema())
    bare = ReportContext(title="", data_name="", snapshot_date="", command="")
    jsonschema.validate(json.loads(report_json(evaluation, [], bare)), schema())
    document["scorers"][0]["surprise"] = 1
    with pytest.raises(jsonschema.ValidationError, match="surprise"):
        jsonschema.validate(document, schema())


def test_json_holds_the_measured_numbers(evaluation: Evaluation) -> None:
    document = json.loads(report_json(evaluation, MEASUREMENTS, CONTEXT))
    assert document["schema_version"] == SCHEMA_VERSION == schema()["properties"][
        "schema_version"
    ]["const"]  # fmt: skip
    scorers = {scorer["name"]: scorer for scorer in document["scorers"]}
    assert list(scorers) == [result.name for result in evaluation.scorers]
    auc = evaluation["quantized"].metrics["auc"]
    assert scorers["quantized"]["metrics"]["auc"]["value"] == round(auc.value, 6)
    relative = scorers["quantized"]["relative_to_parent"]
    parent = evaluation["fine_tuned"].metrics["auc"].value
    assert relative["primary_change"] == round((auc.value - parent) / parent, 6)
    assert relative["size_ratio"] == 0.25
    assert relative["throughput_ratio"] == 4.5
    assert scorers["random"]["cost"] is None
    batches = [entry["batch_size"] for entry in scorers["quantized"]["cost"]["latencies"]]
    assert batches == [1, 32]


def test_json_never_holds_nan(evaluation: Evaluation) -> None:
    undefined = Estimate(float("nan"), float("-inf"), float("inf"))
    first = evaluation.scorers[0]
    broken = dataclasses.replace(first, metrics=first.metrics | {"novelty@10": undefined})
    other = dataclasses.replace(evaluation, scorers=(broken, *evaluation.scorers[1:]))
    context = dataclasses.replace(CONTEXT, training={"m": [{"epoch": 1, "loss": float("nan")}]})
    text = report_json(other, [], context)
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))
    estimate = document["scorers"][0]["metrics"]["novelty@10"]
    assert estimate == {"value": None, "low": None, "high": None}
    assert document["training"]["m"] == [{"epoch": 1.0, "loss": None}]
    assert "<h1>" in report_html(other, [], context)


def test_same_input_same_bytes(evaluation: Evaluation, page: str) -> None:
    assert report_html(evaluation, MEASUREMENTS, CONTEXT) == page
    first = report_json(evaluation, MEASUREMENTS, CONTEXT)
    assert report_json(evaluation, MEASUREMENTS, CONTEXT) == first


@pytest.mark.parametrize(
    ("names", "message"),
    [(["unknown"], "measurement of = 'unknown'"), (["random", "random"], "the same name")],
)
def test_measurements_must_belong_to_scorers(
    evaluation: Evaluation, names: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        report_json(evaluation, [measurement(name) for name in names], CONTEXT)


# HTML


def test_page_needs_nothing_but_itself(page: str) -> None:
    parsed = Page(page)
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base"}
    for tag, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name) or "#"
            assert target.startswith("#") or (tag, target) == ("a", CONTEXT.links["MLflow run"])
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "javascript:alert(1)" in parsed.text  # shown as text, never as a link


def test_page_has_a_chart_of_each_kind(page: str) -> None:
    charts = [a.get("aria-label") or "" for tag, a in Page(page).elements if tag == "svg"]
    assert charts == [
        "AUC of each scorer with its interval",
        "Calibration: share clicked over predicted probability",
        "AUC of each scorer with its interval",
        "Calibration: share clicked over predicted probability",
        "AUC over median latency of one text, ms of each model",
        "AUC over size on disk, MB of each model",
        "loss over the epochs",
    ]
    identifiers = [a["id"] for _, a in Page(page).elements if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    assert "#0102" not in page  # every marker colour became a variable of the page
    assert "#0202" not in page


def test_boards_never_share_a_table(page: str) -> None:
    for table in Page(page).tables:
        content_only = "category_share" in table or "fine_tuned" in table
        assert not (content_only and re.search(r"popularity(?! bias)", table))


def test_page_shows_every_scorer_and_the_data(page: str, evaluation: Evaluation) -> None:
    text = Page(page).text
    for result in evaluation.scorers:
        assert result.name in text
        assert f"{result.metrics['auc'].value:.4f}" in text
    for shown in ("12,300", "malformed field", "2026-03-02", CONTEXT.command, "a" * 64):
        assert shown in text


@pytest.mark.parametrize(
    "field", ["title", "data_name", "snapshot_date", "command", "quarantine", "training", "links"]
)
def test_text_from_data_is_escaped(evaluation: Evaluation, field: str) -> None:
    values: dict[str, Any] = {
        "quarantine": {HOSTILE: 1},
        "training": {HOSTILE: [{"epoch": 1, HOSTILE: 0.5}]},
        "links": {HOSTILE: "https://host/" + HOSTILE},
    }
    context = dataclasses.replace(CONTEXT, **{field: values.get(field, HOSTILE)})
    html = report_html(evaluation, MEASUREMENTS, context)
    assert "<script" not in html
    assert html.count("alert(") >= 2  # it is there, as text


def test_names_of_scorers_and_segments_are_escaped(evaluation: Evaluation) -> None:
    def renamed(result: ScorerResult) -> ScorerResult:
        segments = tuple(dataclasses.replace(s, label=HOSTILE) for s in result.segments)
        name = HOSTILE if result.name == "fine_tuned" else result.name
        return dataclasses.replace(result, name=name, segments=segments, parent=None)

    other = dataclasses.replace(evaluation, scorers=tuple(map(renamed, evaluation.scorers)))
    costs = [measurement(HOSTILE), measurement("quantized", size=1, speed=101.0)]
    hostile = dataclasses.replace(
        CONTEXT,
        family=[
            FamilyMember(HOSTILE, None, HOSTILE, HOSTILE),
            FamilyMember("quantized", HOSTILE, HOSTILE, HOSTILE),
        ],
        item_vectors=[ItemVectors(HOSTILE, 4.0)],
    )
    source = Energy(None, HOSTILE)
    costs[0] = dataclasses.replace(costs[0], runtime=HOSTILE, energy=source)
    html = report_html(other, costs, hostile)
    assert "<script" not in html
    assert HOSTILE in Page(html).text
    assert html.count("alert(") >= 12
    assert "dominated by" in Page(html).text


def test_page_without_extras_is_still_a_page(evaluation: Evaluation) -> None:
    bare = ReportContext(title="t", data_name="d", snapshot_date="s", command="c")
    text = Page(report_html(evaluation, [], bare)).text
    assert "not measured" in text  # the family is known, its costs are not
    assert "Item vectors" not in text
    assert "nothing was quarantined" in text


# Terminal


def test_table_has_a_row_a_scorer_on_its_board(evaluation: Evaluation) -> None:
    heading, content, counters, _ = result_table(evaluation, MEASUREMENTS, CONTEXT).split("\n\n")
    assert heading.startswith("Models as of 2026-03-03 – Simulated logs\n")
    names = [line.split()[0] for line in content.splitlines()[2:]]
    assert names == [result.name for result in evaluation.board("content-only")]
    assert [line.split()[0] for line in counters.splitlines()[2:]] == ["popularity"]
    quantized = next(line for line in content.splitlines() if line.startswith("quantized"))
    assert f"{evaluation['quantized'].metrics['auc'].value:.4f} [" in quantized
    assert "23.5 MB" in quantized
    assert "6.00 ms" in quantized


def test_importing_the_evaluation_stays_cheap() -> None:
    code = (
        "import sys, recflow.evaluation.evaluator, recflow.evaluation.report\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'scipy', 'sklearn', 'pandas', 'mlflow'}\n"
        "sys.exit(str(sorted(heavy & sys.modules.keys())) if heavy & sys.modules.keys() else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# learning with few labels


def test_every_form_shows_what_adapting_gained(evaluation: Evaluation, page: str) -> None:
    (row,) = json.loads(report_json(evaluation, MEASUREMENTS, CONTEXT))["label_efficiency"]
    assert (row["share"], row["impressions"]) == (0.01, 123)
    assert row["difference"]["auc"] == {"value": 0.03, "low": 0.01, "high": 0.05}
    (table,) = [table for table in Page(page).tables if "adapted" in table]
    for text in ("1%", "123 impressions", "0.5200", "0.5500", "+0.0300", "−0.0100"):
        assert text in table
    # The AUC's interval excludes zero, that of nDCG touches it.
    assert '<span class="better">+0.0300</span>' in page
    assert '<span class="unclear">−0.0100</span>' in page
    last = result_table(evaluation, MEASUREMENTS, CONTEXT).splitlines()[-1]
    assert last.split()[:3] == ["1", "%", "123"]
    assert "+0.0300 [+0.0100, +0.0500]" in last


def test_a_report_without_the_study_does_not_mention_it(evaluation: Evaluation) -> None:
    bare = dataclasses.replace(CONTEXT, label_efficiency=())
    assert "few labels" not in report_html(evaluation, MEASUREMENTS, bare).lower()
    assert "adapted" not in result_table(evaluation, MEASUREMENTS, bare)
    assert json.loads(report_json(evaluation, MEASUREMENTS, bare))["label_efficiency"] == []


# the family of smaller models

FAMILY = [
    FamilyMember("fine_tuned"),
    FamilyMember("tiny", "pruned", "quantize", "int8, <every> channel"),
    FamilyMember("quantized", "fine_tuned", "quantize"),
    FamilyMember("pruned", "fine_tuned", "prune", "half of the channels"),
]
COSTS = [
    measurement("fine_tuned"),
    measurement("pruned", size=90_000_000, speed=99.0),
    measurement("tiny", size=9_000_000, speed=300.0),
]
IN_ORDER = ["fine_tuned", "quantized", "pruned", "tiny"]


@pytest.fixture(scope="module")
def related() -> Evaluation:
    """A family in which ``tiny`` is as accurate as ``fine_tuned``, and ``pruned`` is worse."""
    made = predictions_of(SNAPSHOT)
    clicks = SNAPSHOT.test.explode("candidates", "labels").group_by("candidates")
    rates = dict(clicks.agg(pl.col("labels").mean()).iter_rows())
    liking = {item: rates.get(item, 0.0) for item in SNAPSHOT.items["item_id"]}
    values = {
        "fine_tuned": liking,
        "tiny": {item: 2 * value for item, value in liking.items()},
        "pruned": {item: -value for item, value in liking.items()},
        "quantized": {item: float(hash_free(item)) for item in liking},
    }
    made += [
        predict(FixedScorer(scores, name), SNAPSHOT, catalogue_sample=20, seed=0)
        for name, scores in values.items()
    ]
    parents = {member.name: member.parent for member in FAMILY if member.parent}
    return evaluate(made, SNAPSHOT, EvaluationConfig(bootstrap_samples=50, parents=parents))


@pytest.fixture(scope="module")
def of_family() -> ReportContext:
    vectors = [ItemVectors("float32", 1536.0, 1.0, 1.0, 1.0, 0.71), ItemVectors("pq", 48.0)]
    return dataclasses.replace(CONTEXT, family=FAMILY, item_vectors=vectors)


@pytest.fixture(scope="module")
def family_page(related: Evaluation, of_family: ReportContext) -> str:
    return report_html(related, COSTS, of_family)


def test_json_holds_the_family_in_the_order_of_the_tree(
    related: Evaluation, of_family: ReportContext
) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    document = json.loads(report_json(related, COSTS, of_family))
    jsonschema.validate(document, schema())
    (group,) = document["compression"]
    members = {member["name"]: member for member in group["members"]}
    assert list(members) == IN_ORDER
    assert [member["depth"] for member in members.values()] == [0, 1, 1, 2]
    assert {member["root"] for member in members.values()} == {"fine_tuned"}
    verdicts = [member["verdict"] for member in members.values()]
    assert verdicts == ["dominated", "unjudged", "dominated", "frontier"]
    tiny, pruned = members["tiny"], members["pruned"]
    # Twice the scores rank the same: nothing is lost, and every resample agrees.
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0}
    assert tiny["against_root"] == {"difference": nothing, "relative": nothing}
    auc = {name: related[name].metrics["auc"].value for name in IN_ORDER}
    difference = auc["tiny"] - auc["pruned"]
    assert tiny["against_parent"]["difference"]["value"] == pytest.approx(difference, abs=1e-6)
    relative = pruned["against_root"]["relative"]
    assert relative["value"] == pytest.approx(auc["pruned"] / auc["fine_tuned"] - 1, abs=1e-6)
    assert relative["low"] <= relative["value"] <= relative["high"] < 0
    (replacement,) = pruned["replaced_by"]
    assert replacement["name"] == "tiny"
    assert replacement["more_accurate"]
    assert replacement["cost_ratios"]["size on disk"] == pytest.approx(10 / 91, abs=1e-6)
    assert members["fine_tuned"]["against_root"] is None
    assert document["item_vectors"][1] == {
        "codec": "pq",
        "bytes_per_item": 48.0,
        "mean_cosine": None,
        "recall_at_10": None,
        "recall_at_100": None,
        "validation_auc": None,
    }


def test_page_shows_the_family_and_names_the_dominated(
    family_page: str, related: Evaluation
) -> None:
    parsed = Page(family_page)
    assert "Compression: what a smaller model loses" in parsed.text
    (table,) = [table for table in parsed.tables if "relative to" in table]
    places = [table.index(f"{number} {name}") for number, name in enumerate(IN_ORDER, start=1)]
    assert places == sorted(places)
    assert table.count("○ dominated") == 2
    assert table.count("● frontier") == 1
    assert table.count("not measured") == 2  # the mark, and the cell of the costs
    assert "not exposed" in table
    for shown in ("quantize from pruned", "91.0", "0.11×", "6.00 / 7.00 / 8.00", "300 batches"):
        assert shown in table
    sentences = re.sub(r"\s+", " ", parsed.text)
    better = related["tiny"].metrics["auc"].value - related["pruned"].metrics["auc"].value
    assert (
        f"pruned is dominated by tiny: its AUC is distinguishably better (+{better:.4f}"
        in sentences
    )
    assert "fine_tuned is dominated by tiny: its AUC is no worse (+0.0000" in sentences
    assert "Energy: no counter." in sentences
    assert "int8, <every> channel" in sentences
    (codecs,) = [table for table in parsed.tables if "recall@10" in table and "codec" in table]
    assert "1,536" in codecs
    assert "pq" in codecs


def test_smallest_model_of_the_frontier_is_a_headline(family_page: str) -> None:
    text = re.sub(r"\s+", " ", Page(family_page).text)
    assert "size of tiny11%of fine_tuned, at 3.0× its speed and +0.00% AUC" in text


def test_terminal_marks_the_dominated(related: Evaluation, of_family: ReportContext) -> None:
    content = result_table(related, COSTS, of_family).split("\n\n")[1]
    endings = {line.split()[0]: line for line in content.splitlines()}
    assert endings["pruned"].endswith("dominated by tiny")
    assert endings["tiny"].endswith("on the frontier")
    assert endings["quantized"].endswith("–")


def test_the_parents_that_the_evaluation_knows_are_a_family(related: Evaluation) -> None:
    (group,) = json.loads(report_json(related, COSTS, CONTEXT))["compression"]
    members = {member["name"]: (member["parent"], member["depth"]) for member in group["members"]}
    assert members == {
        "fine_tuned": (None, 0),
        "pruned": ("fine_tuned", 1),
        "quantized": ("fine_tuned", 1),
        "tiny": ("pruned", 2),
    }


def test_models_without_a_family_are_compared_too(related: Evaluation) -> None:
    alone = dataclasses.replace(
        related, scorers=tuple(dataclasses.replace(r, parent=None) for r in related.scorers)
    )
    costs = [measurement("random"), measurement("popularity")]
    html = report_html(alone, costs, dataclasses.replace(CONTEXT, family=()))
    assert "Compression" not in html
    groups = json.loads(report_json(alone, costs, CONTEXT))["compression"]
    assert [group["board"] for group in groups] == ["content-only", "counter-aware"]
    identifiers = [a["id"] for _, a in Page(html).elements if "id" in a]
    assert len(identifiers) == len(set(identifiers))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ([FamilyMember("unknown")], "family member = 'unknown'"),
        ([FamilyMember("tiny"), FamilyMember("tiny")], "every model once"),
        ([FamilyMember("tiny", "pruned")], "parent of 'tiny' = 'pruned'"),
        (
            [FamilyMember("tiny", "pruned"), FamilyMember("pruned", "tiny")],
            "parent of 'tiny' = 'pruned'.*no descendant",
        ),
        (
            [FamilyMember("popularity"), FamilyMember("tiny", "popularity")],
            "on the same board",
        ),
    ],
)
def test_a_family_that_cannot_be_is_refused(
    related: Evaluation, family: list[FamilyMember], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        report_json(related, [], dataclasses.replace(CONTEXT, family=family))


def test_a_large_family_still_has_one_line_a_model_in_the_charts_it_fits(
    related: Evaluation,
) -> None:
    """Names of up to 60 letters, and more models than a chart has colours."""
    names = [f"distilled_pruned_low_rank_trimmed_quantized_variant_{n:02d}" for n in range(14)]
    made = [
        dataclasses.replace(related["tiny"], name=name, parent=None, reference=None)
        for name in names
    ]
    large = dataclasses.replace(related, scorers=(*related.scorers, *made))
    costs = [measurement(name, size=90_000_000 - n) for n, name in enumerate(names)]
    family = [FamilyMember("fine_tuned"), *(FamilyMember(name, "fine_tuned") for name in names)]
    html = report_html(large, costs, dataclasses.replace(CONTEXT, family=family))
    (latency,) = re.findall(r'<svg[^>]*aria-label="AUC over median latency.*?</svg>', html, re.S)
    labels = re.findall(r"<text[^>]*>(\d+)</text>", latency)
    assert {str(number) for number in range(2, 16)} <= set(labels)
    # Of 14 models and the reference, six curves of calibration are drawn.
    assert "9 more models are in the JSON file" in html

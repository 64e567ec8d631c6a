import json
import re
from datetime import timedelta
from html.parser import HTMLParser

import pytest

from recflow.evaluation.backtest import (
    Judging,
    NeverRetrain,
    RetrainNightly,
    RetrainOn,
    compare,
    walk,
)
from recflow.evaluation.report.backtest import (
    BacktestContext,
    backtest_html,
    backtest_json,
    backtest_picture,
    backtest_table,
)
from recflow_tests.unit.evaluation.test_backtest import DAYS, FIRST, FakeWorld, trained

NASTY = '<script>alert("x")</script> & $y$'


@pytest.fixture
def result():
    """Never 0.70 AUC, nightly 0.88 (its second model is rejected), by the calendar 0.82."""

    def walked(policy, **world):
        return walk(DAYS, first=trained(FIRST), policy=policy, world=FakeWorld(**world))

    walks = [
        walked(NeverRetrain()),
        walked(RetrainNightly(), rejects={DAYS[1]}),
        walked(RetrainOn("calendar", frozenset({DAYS[1]}))),
    ]
    return compare(
        NASTY,
        walks,
        Judging(bootstrap_samples=50, usd_per_hour=36.0),
        description="Described as " + NASTY,
        events={DAYS[2]: NASTY, FIRST - timedelta(days=9): "long before"},
    )


CONTEXT = BacktestContext(
    title="Title " + NASTY,
    command="recflow backtest " + NASTY,
    machine="A machine.",
    protocol=("Protocol " + NASTY,),
    versions={"polars": "2"},
)


def test_the_json_says_what_was_measured(result):
    document = json.loads(backtest_json([result], CONTEXT))
    (log,) = document["logs"]
    assert log["first_snapshot"] == "2024-01-07"
    assert log["days"] == ["2024-01-08", "2024-01-09", "2024-01-10", "2024-01-11", "2024-01-12"]
    assert log["impressions"] == 10
    never, nightly, calendar = log["policies"]
    assert never["gain_over_never"] == {}
    # Models 1, 1, 2, 1, 1 days old: 1 - 0.1 * 6 / 5.
    assert nightly["metrics"]["auc"]["value"] == 0.88
    assert (nightly["runs"], nightly["rejected"]) == (4, 1)
    assert nightly["trainings"][1] == {
        "day": "2024-01-09",
        "reason": "every night",
        "admitted": False,
        "verdict": "worse",
        "seconds": 9.0,
        "cpu_seconds": 18.0,
    }
    assert calendar["share_of_nightly_gain"]["auc"]["value"] == round(0.12 / 0.18, 6)
    assert calendar["share_of_nightly_runs"] == 0.25
    assert calendar["training_usd"] == 0.09
    assert calendar["days"][2]["snapshot"] == "2024-01-09"


def test_the_table_has_a_row_a_policy(result):
    lines = backtest_table(result).splitlines()
    assert lines[0].startswith(f"{NASTY}: 5 days, 2024-01-08 to 2024-01-12, 10 impressions")
    assert [line.split()[0] for line in lines[1:]] == ["policy", "never", "nightly", "calendar"]
    assert "+0.1200 [+0.1200, +0.1200]" in lines[4]
    assert "67% [67%, 67%]" in lines[4]


class _Page(HTMLParser):
    """Counts tags; keeps what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.fetched += [v or "" for k, v in attrs if k in ("src", "srcset", "data")]
        self.fetched += [v or "" for k, v in attrs if k == "href" and not (v or "").startswith("#")]


def test_the_page_is_self_contained_and_escapes_what_comes_from_data(result):
    html = backtest_html([result], CONTEXT)
    page = _Page(html)
    assert "script" not in page.tags
    assert page.fetched == []
    assert page.tags["svg"] == 2  # one a metric
    # Title twice, name, command, protocol, description, and the event in the text at least.
    assert html.count("&lt;script&gt;") >= 7
    assert "rejected" in html


def test_the_same_results_make_the_same_page(result):
    assert backtest_html([result], CONTEXT) == backtest_html([result], CONTEXT)


def test_lines_are_told_apart_by_the_page_and_the_events_are_written(result):
    html = backtest_html([result], CONTEXT)
    assert {"var(--series-1)", "var(--series-2)", "var(--series-3)"} <= set(
        re.findall(r"var\(--series-\d\)", html)
    )
    assert "long before" not in re.sub(r"<p.*?</p>", "", html)  # no day of the chart


def test_the_picture_is_a_png_without_the_time_it_was_made(result):
    picture = backtest_picture(result, "auc")
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture == backtest_picture(result, "auc")
    assert picture != backtest_picture(result, "ndcg@10")
    assert b"tIME" not in picture

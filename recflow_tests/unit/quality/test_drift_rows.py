"""One row an impression: which candidate, how old, and whether anybody saw it before."""

from datetime import timedelta

import polars as pl

from recflow.data.history import extend_histories
from recflow.quality.drift_rows import Rows, describe_impressions, first_shown
from recflow_tests.unit.data.tables import MONDAY, at, window
from recflow_tests.unit.evaluation.support import items_of

ITEMS = items_of(
    {"a": "sea", "b": "war", "c": "", "d": "tax"}, published={"d": MONDAY - timedelta(hours=10)}
)


def log(*rows: dict[str, object]) -> pl.DataFrame:
    return extend_histories(window(*rows), max_history=10)


def describe(impressions: pl.DataFrame, **options: object) -> dict[str, dict[str, object]]:
    rows = describe_impressions(
        impressions,
        ITEMS,
        impressions,
        **{"held_out": True, "seed": 0, **options},  # type: ignore[arg-type]
    )
    assert rows.schema == Rows.SCHEMA
    return {str(row[Rows.IMPRESSION]): row for row in rows.to_dicts()}


def test_age_and_novelty_look_two_days_back() -> None:
    rows = describe(
        log(
            {"impression_id": "0", "time": at(1), "candidates": ["a"], "clicked": []},
            {"impression_id": "1", "time": at(24 + 5), "candidates": ["a"], "clicked": ["a"]},
            {"impression_id": "2", "time": at(48 + 7), "candidates": ["a"], "clicked": ["a"]},
            {"impression_id": "2b", "time": at(48 + 8), "candidates": ["b"], "clicked": []},
            {"impression_id": "2c", "time": at(48 + 9), "candidates": ["b"], "clicked": ["b"]},
            {"impression_id": "3", "time": at(72 + 2), "candidates": ["a"], "clicked": ["a"]},
        )
    )
    # Nothing is known of the days before the first two.
    assert rows["0"][Rows.NEW] is rows["1"][Rows.NEW] is rows["1"][Rows.CANDIDATE_AGE] is None
    assert (rows["2"][Rows.NEW], rows["2"][Rows.CANDIDATE_AGE]) == (0, 48.0)  # shown 54 h before
    assert (rows["2b"][Rows.NEW], rows["2b"][Rows.CANDIDATE_AGE]) == (1, 0.0)
    assert (rows["2c"][Rows.NEW], rows["2c"][Rows.CANDIDATE_AGE]) == (1, 1.0)
    # The first day is out of sight by now: first shown at 29 h, seen at 74 h.
    assert (rows["3"][Rows.NEW], rows["3"][Rows.CANDIDATE_AGE]) == (0, 45.0)


def test_age_is_since_publication_where_that_is_known() -> None:
    (row,) = describe(log({"time": at(2), "candidates": ["d"], "clicked": ["d"]})).values()
    assert row[Rows.CANDIDATE_AGE] == 12.0
    assert row[Rows.NEW] is None


def test_one_candidate_and_one_click_are_drawn() -> None:
    shown = {"candidates": ["a", "b", "d"], "clicked": ["b", "d"]}
    many = log(*({"impression_id": f"{n:03}", "time": at(n / 10), **shown} for n in range(200)))
    rows = describe(many).values()
    drawn = [row[Rows.CATEGORY_SHOWN] for row in rows]
    clicked = [row[Rows.CATEGORY_CLICKED] for row in rows]
    assert {*drawn} == {"sea", "war", "tax"}
    assert {*clicked} == {"war", "tax"}
    assert all(50 <= drawn.count(category) <= 85 for category in ("sea", "war", "tax"))
    assert all((row[Rows.CANDIDATES], row[Rows.CLICKS]) == (3, 2) for row in rows)
    shuffled = many.sample(fraction=1, shuffle=True, seed=1)
    assert describe(shuffled) == describe(many)


def test_without_a_click_nothing_is_clicked() -> None:
    (row,) = describe(log({"candidates": ["a", "c"], "clicked": []})).values()
    assert (row[Rows.CATEGORY_CLICKED], row[Rows.CLICKS]) == (None, 0)


def test_scores_are_those_of_the_drawn_candidate_and_probabilities_add_up() -> None:
    many = log(
        *(
            {"impression_id": str(n), "candidates": ["a", "b"], "clicked": ["a"], "time": at(n)}
            for n in range(20)
        )
    )
    scores = pl.Series([[1.0, 2.0]] * 20)
    rows = describe(many, scores=scores, probabilities=pl.Series([[0.25, 0.5]] * 20)).values()
    assert {(row[Rows.CATEGORY_SHOWN], row[Rows.SCORE]) for row in rows} == {
        ("sea", 1.0),
        ("war", 2.0),
    }
    assert {row[Rows.PREDICTED] for row in rows} == {0.75}
    assert {row[Rows.PREDICTED] for row in describe(many).values()} == {None}


def test_first_shown_is_the_earliest_time() -> None:
    shown = first_shown(
        log(
            {"time": at(3), "candidates": ["b", "a"], "clicked": []},
            {"time": at(1), "candidates": ["a"], "clicked": []},
        )
    )
    assert shown.rows() == [("a", at(1)), ("b", at(3))]

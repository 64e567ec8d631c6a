"""Drift is found where it is, and not where days differ by chance or as days do."""

import math
from dataclasses import replace
from datetime import date, timedelta

import numpy as np
import polars as pl
import pytest

from recflow.core.errors import ConfigError, ContractError
from recflow.core.seeding import make_rng
from recflow.quality.drift import (
    Decay,
    DriftReport,
    ItemSample,
    code_column,
    jensen_shannon,
    judge_decay,
    measure_drift,
    measure_embeddings,
    measure_unseen_tokens,
    words_of,
)
from recflow.quality.drift_config import MEASURES, DriftConfig
from recflow.quality.drift_page import drift_html, run_evidently
from recflow.quality.drift_rows import Rows

pytestmark = [
    # Evidently and what it imports; nothing of ours can avoid it.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

DAY = date(2024, 3, 14)
CATEGORIES = [f"c{number:02}" for number in range(12)]
CONFIG = DriftConfig()


def rows_of(
    count: int,
    *,
    day: date = DAY,
    seed: int = 0,
    surge: float = 1.0,
    odds: float = 1.0,
    held_out: bool = True,
    users: int | None = None,
) -> pl.DataFrame:
    """Impressions of users with a taste of their own: rows of a user depend on each other."""
    rng = make_rng(seed, "rows", str(day))
    population = users or max(count // 4, 1)
    user = rng.integers(population, size=count)
    taste = make_rng(7, "taste").integers(len(CATEGORIES), size=population)
    weights = np.ones(len(CATEGORIES))
    weights[3] = surge
    shown = rng.choice(len(CATEGORIES), size=count, p=weights / weights.sum())
    clicked = np.where(rng.random(count) < 0.5, taste[user], shown)
    candidates = rng.integers(5, 15, size=count)
    chance = 0.1 * odds / (1 - 0.1 + 0.1 * odds)
    return pl.DataFrame(
        {
            Rows.IMPRESSION: [f"{day}-{number:06}" for number in range(count)],
            Rows.USER: [f"u{number}" for number in user],
            Rows.DAY: [day] * count,
            Rows.HELD_OUT: [held_out] * count,
            Rows.CATEGORY_SHOWN: [CATEGORIES[c] for c in shown],
            Rows.CATEGORY_CLICKED: [CATEGORIES[c] for c in clicked],
            Rows.TEXT_LENGTH: 40 + 5 * shown + rng.integers(30, size=count),
            Rows.HOUR: rng.integers(24, size=count),
            Rows.HISTORY_LENGTH: taste[user] * rng.integers(2, size=count),
            Rows.CANDIDATE_AGE: 48 * rng.random(count),
            Rows.CANDIDATES: candidates,
            Rows.CLICKS: rng.binomial(candidates, chance),
            Rows.NEW: (rng.random(count) < 0.3).astype(int),
            Rows.DATED: [1] * count,
            Rows.SCORE: rng.standard_normal(count) + 0.1 * taste[user],
            Rows.PREDICTED: 0.1 * candidates,
        },
        schema_overrides=dict(Rows.SCHEMA),
    )


def days_before(count: int, days: int = 6, **options: float) -> pl.DataFrame:
    """Reference days; the last two were kept out of training."""
    parts = [
        rows_of(count, day=DAY - timedelta(days=back), held_out=back <= 2, **options)
        for back in range(days, 0, -1)
    ]
    return pl.concat(parts)


def measured(
    current: pl.DataFrame, reference: pl.DataFrame, config: DriftConfig = CONFIG
) -> DriftReport:
    return measure_drift(current, reference, day=DAY, compared_with="the days", config=config)


def values(report: DriftReport) -> dict[str, float | None]:
    return {measure.name: measure.value for measure in report.measures}


def test_jensen_shannon_by_hand() -> None:
    # p = (1, 0), q = (1/2, 1/2), mixture (3/4, 1/4):
    # KL(p, m) = ln 4/3, KL(q, m) = (ln 2/3 + ln 2) / 2 = ln(4/3) / 2.
    expected = math.sqrt(0.75 * math.log(4 / 3))
    assert jensen_shannon(np.array([3.0, 0.0]), np.array([2.0, 2.0])) == pytest.approx(expected)
    # Nothing in common: the greatest distance there is.
    apart = jensen_shannon(np.array([[1.0, 0.0]]), np.array([0.0, 9.0]))
    assert apart == pytest.approx([math.sqrt(math.log(2))])
    assert jensen_shannon(np.zeros(2), np.array([1.0, 1.0])) == 0.0


def test_evidently_shows_the_numbers_that_were_judged() -> None:
    current, reference = rows_of(900, surge=3.0), days_before(900)
    report = measured(current, reference)
    snapshot = run_evidently(report, current, reference, CONFIG)
    assert snapshot is not None
    shown = {m["config"]["column"]: m for m in snapshot.dict()["metrics"]}
    for measure in report.measures:
        if measure.name in shown:
            assert shown[measure.name]["value"] == pytest.approx(measure.value, abs=1e-12)
            assert shown[measure.name]["config"]["threshold"] == measure.limit
    assert len(shown) == 7


@pytest.mark.parametrize("count", [1_000, 4_000])
def test_two_halves_of_a_day_do_not_alarm(count: int) -> None:
    day = rows_of(2 * count, users=count // 2)
    quick = replace(CONFIG, permutations=60, least_distance=0.0, least_rate_factor=1.0)
    alarms = dict.fromkeys(("defaults", "by chance alone"), 0)
    pairs = 25
    for number in range(pairs):
        left = make_rng(number, "half").random(day[Rows.USER].n_unique()) < 0.5
        users = day[Rows.USER].unique().sort().filter(pl.Series(left)).to_list()
        one = day.filter(pl.col(Rows.USER).is_in(users))
        other = day.filter(~pl.col(Rows.USER).is_in(users))
        alarms["defaults"] += bool(measured(one, other, replace(CONFIG, permutations=60)).drifted)
        # Without a least effect, ten measures at one in a thousand: 1 % of the pairs.
        alarms["by chance alone"] += bool(measured(one, other, quick).drifted)
    assert alarms["defaults"] == 0
    assert alarms["by chance alone"] <= 0.05 * pairs


@pytest.mark.parametrize("count", [1_000, 10_000])
def test_large_shifts_are_found_every_time(count: int) -> None:
    reference = days_before(count)
    for seed in range(3):
        surged = measured(rows_of(count, seed=seed, surge=4.0), reference)
        assert Rows.CATEGORY_SHOWN in surged.drifted
        clicked = measured(rows_of(count, seed=seed, odds=2.0), reference)
        assert {"click_rate", "calibration"} <= set(clicked.drifted)
        assert not measured(rows_of(count, seed=seed), reference).drifted


def test_a_day_that_differs_as_days_do_has_not_drifted() -> None:
    factors = [0.2, 3.0, 0.5, 2.0, 0.3, 4.0]
    restless = pl.concat(
        rows_of(3_000, day=DAY - timedelta(days=back), surge=factor)
        for back, factor in enumerate(factors, start=1)
    )
    day = rows_of(3_000, surge=4.0)
    name = Rows.CATEGORY_SHOWN
    assert name in measured(day, days_before(3_000)).drifted
    report = measured(day, restless)
    assert name not in report.drifted
    (measure,) = [m for m in report.measures if m.name == name]
    assert measure.usual is not None
    assert measure.value is not None
    assert measure.usual > measure.value > CONFIG.least_distance


def test_rates_are_compared_by_their_odds() -> None:
    # 20 % of the candidates clicked against 10 %: odds 1/4 against 1/9, a factor of 9/4.
    day = rows_of(4_000).with_columns(pl.lit(10).alias(Rows.CANDIDATES), clicks=2)
    before = days_before(4_000).with_columns(pl.lit(10).alias(Rows.CANDIDATES), clicks=1)
    report = measured(day.select(Rows.SCHEMA.names()), before.select(Rows.SCHEMA.names()))
    (rate,) = [m for m in report.measures if m.name == "click_rate"]
    assert (rate.current, rate.reference) == (pytest.approx(0.2), pytest.approx(0.1))
    assert rate.value == pytest.approx(math.log(9 / 4), abs=1e-3)
    assert rate.drifted


def test_the_order_of_rows_does_not_matter() -> None:
    current, reference = rows_of(1_500), days_before(1_500)
    shuffled = [side.sample(fraction=1, shuffle=True, seed=3) for side in (current, reference)]
    assert measured(*shuffled) == measured(current, reference)


def test_few_impressions_are_measured_and_not_judged() -> None:
    report = measured(rows_of(150, surge=50.0, odds=4.0), days_before(1_000))
    assert not report.judged
    assert report.drifted == ()
    assert "150 impressions are too few rows to judge; 200 are needed" in report.sentence()
    assert values(report)[Rows.CATEGORY_SHOWN] > 0.3  # type: ignore[operator]


def test_many_impressions_are_drawn_from() -> None:
    config = replace(CONFIG, most_impressions=500)
    report = measured(rows_of(2_000), days_before(2_000), config)
    assert (report.impressions, report.reference_impressions) == (500, 6 * 500)


def test_ignored_measures_are_shown_and_do_not_alarm() -> None:
    config = replace(CONFIG, ignored=("click_rate", "calibration"))
    report = measured(rows_of(2_000, odds=2.0), days_before(2_000), config)
    assert report.drifted == ()
    (rate,) = [m for m in report.measures if m.name == "click_rate"]
    assert (rate.drifted, rate.note) == (False, "does not count")
    assert rate.value > rate.limit  # type: ignore[operator]


def test_what_cannot_be_measured_says_why() -> None:
    without = [
        side.with_columns(
            pl.lit(None, pl.Float64).alias(Rows.SCORE),
            pl.lit(None, pl.Float64).alias(Rows.PREDICTED),
        )
        for side in (rows_of(500), days_before(500).with_columns(held_out=False))
    ]
    report = measured(*without)
    notes = {m.name: m.note for m in report.measures if m.value is None}
    assert set(notes) == {"history_length", "score", "calibration", "unseen_tokens", "embeddings"}
    assert notes["score"] == "the reference has no day that was kept out of training"
    assert report.to_facts()["not_measured"] == notes


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ContractError, match="the reference side of 2024-03-14 has no impressions"):
        measured(rows_of(10), days_before(10).clear())


def cohorts(words: list[list[str]], vectors: np.ndarray | None = None) -> ItemSample:
    """One cohort of items a day; the first is what was there before."""
    first = [
        np.datetime64(DAY - timedelta(days=len(words) - place))
        for place, texts in enumerate(words)
        for _ in texts
    ]
    texts = [text for day in words for text in day]
    return ItemSample(texts, np.array(first), vectors)


def news(day: int, *, strange: int = 1, items: int = 25) -> list[str]:
    """Ten words a text; ``strange`` of them were never used before."""
    return [
        " ".join(
            [f"strange{day}x{item}x{n}" for n in range(strange)]
            + [f"word{(item + n) % 40}" for n in range(10 - strange)]
        )
        for item in range(items)
    ]


def test_new_words_every_day_are_no_drift_more_than_usual_are() -> None:
    known = cohorts([news(day) for day in range(6)])
    usual = measure_unseen_tokens(_of_day(news(7)), known, CONFIG, words_of)
    # One word in ten is new, as on every day before.
    assert (usual.current, usual.reference) == (pytest.approx(0.1), pytest.approx(0.1))
    assert usual.value == pytest.approx(0.0)
    assert not usual.drifted
    shifted = measure_unseen_tokens(_of_day(news(7, strange=4)), known, CONFIG, words_of)
    assert shifted.value == pytest.approx(0.3)
    assert shifted.drifted


def test_novelty_alone_is_never_judged() -> None:
    known = cohorts([news(day) for day in range(3)])
    measure = measure_unseen_tokens(_of_day(news(7, strange=9)), known, CONFIG, words_of)
    assert (measure.current, measure.drifted) == (pytest.approx(0.9), False)
    assert measure.note == "2 reference days with new items do not say what is usual"
    few = measure_unseen_tokens(_of_day(news(7, items=3)), known, CONFIG, words_of)
    assert few.note == "3 new items are too few to judge; 20 are needed"


def _of_day(texts: list[str], vectors: np.ndarray | None = None) -> ItemSample:
    return ItemSample(texts, np.full(len(texts), np.datetime64(DAY)), vectors)


def test_items_of_another_kind_are_told_apart() -> None:
    rng = make_rng(0, "vectors")
    per_day = [news(day, items=80) for day in range(6)]
    vectors = rng.standard_normal((6 * 80, 8)).astype(np.float32)
    known = cohorts(per_day, vectors)
    same = rng.standard_normal((80, 8)).astype(np.float32)
    alike = measure_embeddings(_of_day(news(9, items=80), same), known, CONFIG)
    assert not alike.drifted
    apart = measure_embeddings(_of_day(news(9, items=80), same + 2.0), known, CONFIG)
    assert apart.drifted
    assert apart.current == pytest.approx(1.0, abs=0.01)
    lenient = replace(CONFIG, least_items=1)
    few = measure_embeddings(_of_day(news(9, items=5), same[:5]), known, lenient)
    assert (few.value, few.note) == (None, "5 items are too few to tell apart")


def test_words_are_runs_of_letters_and_digits() -> None:
    assert words_of(["Rødgrød, med 2 fløder!", ""]) == [["rødgrød", "med", "2", "fløder"], []]


def test_decay_needs_the_margin_and_more_than_a_usual_day() -> None:
    steady = np.linspace(-0.001, 0.001, 101)

    def decay(difference: float, day_values: list[float], test_days: int = 3) -> Decay:
        return judge_decay(
            "auc",
            current=0.6 + difference,
            reference=0.6,
            replicates=difference + steady,
            day_values=day_values,
            test_days=test_days,
            config=CONFIG,
        )

    assert decay(-0.02, []).decayed
    assert not decay(-0.0105, []).decayed  # the upper end, -0.0096, is within the margin of 0.01
    assert not decay(0.02, []).decayed
    assert decay(-0.02, [0.6, 0.601, 0.599, 0.6]).decayed
    assert not decay(-0.02, [0.6, 0.63, 0.58, 0.61]).decayed
    # Gaps to the other days of 0, 0 and ±0.004/3: their root mean square over 3 is 0.001089, and
    # Student's 99.75 % point with 3 degrees of freedom is 7.4533.
    gentle = [0.6, 0.6, 0.601, 0.599]
    assert decay(0.0, gentle, 3).usual == pytest.approx(0.008114, abs=1e-5)
    # One test day instead of three: variances 1 + 1 against 1 + 1/3.
    assert decay(0.0, gentle, 1).usual == pytest.approx(0.008114 * math.sqrt(1.5), abs=1e-5)


def test_bins_are_quantiles_and_an_empty_history_is_its_own() -> None:
    reference = pl.Series([0] * 5 + list(range(1, 96)))
    coded = code_column(
        Rows.HISTORY_LENGTH, pl.Series([0, 1, 10, 95, 500, None]), reference, bins=5
    )
    assert coded is not None
    # Quantiles of the 100 values at 20, 40, 60 and 80 %: 15, 35, 55, 75; and zero.
    assert coded.labels[:2] == ("00: to 0", "01: to 15")
    assert coded.current.tolist() == [0, 1, 1, 5, 5, -1]
    assert np.bincount(coded.reference).tolist() == [5, 15, 20, 20, 20, 20]


def test_rare_categories_share_a_label() -> None:
    many = pl.Series([f"category {n}" for n in range(60)] + ["often"] * 5)
    coded = code_column(Rows.CATEGORY_SHOWN, pl.Series(["often", "never seen", None]), many, bins=5)
    assert coded is not None
    assert len(coded.labels) == 51
    assert coded.labels[-1] == "(other)"
    assert [coded.labels[c] for c in coded.current[:2]] == ["often", "(other)"]
    assert coded.current[2] == -1


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("least_distance", -0.1, "0 to less than 1"),
        ("least_rate_factor", 0.5, "1 or more"),
        ("chance", 0.0, "between 0 and 1"),
        ("permutations", 3, "20 or more"),
        ("bins", 1, "2 or more"),
        ("least_impressions", 0, "1 or more"),
        ("ignored", ("weather",), "category_shown"),
    ],
)
def test_impossible_limits_are_refused(key: str, value: object, allowed: str) -> None:
    shown = value[0] if isinstance(value, tuple) else value
    with pytest.raises(ConfigError, match=f"{key} = {shown!r} is not allowed; allowed: {allowed}"):
        DriftConfig(**{key: value})  # type: ignore[arg-type]


def test_the_page_is_one_harmless_file_and_the_same_again() -> None:
    hostile = "</script><script>alert(1)</script>\\`"
    sides = [
        side.with_columns(pl.col(Rows.CATEGORY_SHOWN).replace("c03", hostile))
        for side in (rows_of(400), days_before(400, days=3))
    ]
    report = measured(*sides)
    page = drift_html(report, sides[0], sides[1], CONFIG)
    assert "<script>alert" not in page
    assert "&amp;lt;/script" in page or "&lt;/script" in page
    assert 'src="http' not in page
    assert all(name in page for name in MEASURES)
    assert page == drift_html(report, sides[0], sides[1], CONFIG)

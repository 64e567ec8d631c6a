"""Simulated logs: the same bytes, the same format, and a truth that can be recovered."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recflow.core.columns import Columns
from recflow.core.errors import ConfigError, SourceError
from recflow.data.sources import open_source
from recflow.data.sources.simulated import SimulationConfig, simulate
from recflow.data.sources.simulation import ClickRateShift, ColdUsers, TopicSurge, VocabularyShift
from recflow.data.sources.simulation.clicks import _draw_clicks
from recflow.data.sources.simulation.headlines import load_newsroom
from recflow_tests.unit.sources.helpers import END, read_all

SAMPLE = Path(__file__).parents[3] / "data" / "sample"
SMALL = SimulationConfig(impressions=3_000, users=300, days=6, items_per_day=40)
START = SMALL.start
LATE = 3


def simulated(folder: Path, config: SimulationConfig) -> pl.DataFrame:
    """All impressions of a simulated log with their true utilities."""
    simulate(config, folder)
    source = open_source("simulated", folder)
    rows, quarantine = read_all(source)
    assert quarantine.is_empty()
    assert source.items().quarantine.collect().is_empty()
    truth = source.truth(config.start, END)
    assert truth is not None
    return rows.join(truth.collect(), on="impression_id", how="left", maintain_order="left")


def exploded(rows: pl.DataFrame) -> pl.DataFrame:
    """One row a candidate: impression_id, item, clicked, utility, position, day."""
    flat = rows.select(
        "impression_id", "day", "clicked", "utility", item=Columns.CANDIDATES
    ).explode("item", "utility")
    return flat.with_columns(
        clicked=pl.col("item").is_in(pl.col("clicked")),
        position=pl.int_range(pl.len()).over("impression_id"),
    )


def mean_auc(candidates: pl.DataFrame, score: str) -> float:
    """Mean AUC of the impressions with both labels: the Mann-Whitney form, ties half."""
    positives, rank = pl.col("clicked").sum(), pl.col(score).rank("average")
    negatives = pl.len().cast(pl.Int64) - positives
    rank_sum = rank.filter(pl.col("clicked")).sum()
    area = (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)
    by_impression = candidates.group_by("impression_id").agg(area.alias("auc"))
    return by_impression.filter(pl.col("auc").is_finite())["auc"].mean()  # type: ignore[return-value]


def test_the_sample_is_what_its_configuration_simulates(tmp_path: Path):
    config = SimulationConfig.from_json((SAMPLE / "simulation.json").read_text())
    simulate(config, tmp_path)
    for file in sorted(SAMPLE.iterdir()):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name
    assert sum(file.stat().st_size for file in SAMPLE.iterdir()) < 1_000_000
    assert len(open_source("simulated", SAMPLE).days()) == 14


def test_chunks_of_one_log_and_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Several chunks a day: histories go on where the chunk before ended."""
    monkeypatch.setattr("recflow.data.sources.simulation.clicks.CHUNK", 70)
    rows = simulated(tmp_path / "a", SMALL)
    assert_histories_are_live(rows)
    again = simulated(tmp_path / "b", SMALL)
    assert again.equals(rows)
    other = simulated(tmp_path / "c", replace(SMALL, seed=8))
    assert not other["candidates"].equals(rows["candidates"])


def assert_histories_are_live(rows: pl.DataFrame) -> None:
    """Replay the clicks of every user in plain Python."""
    seen: dict[str, list[str]] = {}
    for user, history, clicked in rows.select("user_id", "history", "clicked").iter_rows():
        expected = seen.setdefault(user, list(history))
        assert history == expected[-SMALL.history_max :]
        expected.extend(clicked)


def test_histories_grow_or_stay_frozen(tmp_path: Path):
    assert_histories_are_live(simulated(tmp_path / "live", SMALL))
    frozen = simulated(tmp_path / "frozen", replace(SMALL, freeze_history=True))
    histories = frozen.group_by("user_id").agg(pl.col("history").n_unique())
    assert histories["history"].to_list() == [1] * histories.height


def test_slates_and_truth(tmp_path: Path):
    rows = simulated(tmp_path, SMALL)
    assert rows.height == SMALL.impressions
    assert rows["time"].is_sorted()
    assert rows["day"].n_unique() == SMALL.days
    size = rows["candidates"].list.len()
    assert (size >= SMALL.slate_min).all()
    assert size.max() == SMALL.slate_max
    assert (size == rows["candidates"].list.n_unique()).all()
    assert (size == rows["utility"].list.len()).all()
    assert (rows["clicked"].list.len() >= 1).all()
    # given that there is one, a slate has at least one click expected
    expected = rows["utility"].list.sum()
    assert (expected >= 1 - 1e-4).all()
    observed = rows["clicked"].list.len()
    error = np.sqrt(((observed - expected) ** 2).sum())
    assert abs((observed - expected).sum()) < 4 * error


def test_clicks_given_that_there_is_one_have_their_exact_probabilities():
    """Against enumeration: P(click on i | some click) = p_i / (1 - prod(1 - p))."""
    probability = np.array([0.1, 0.3, 0.05, 0.0])
    draws = 40_000
    rng = np.random.default_rng(1)
    clicked = _draw_clicks(np.tile(probability, (draws, 1)), rng)
    assert clicked.any(axis=1).all()
    assert not clicked[:, 3].any()
    some = 1 - 0.9 * 0.7 * 0.95
    np.testing.assert_allclose(clicked.mean(axis=0), probability / some, atol=4 * 0.5 / draws**0.5)
    both = (clicked[:, 0] & clicked[:, 1]).mean()
    assert abs(both - 0.1 * 0.3 / some) < 4 * 0.5 / draws**0.5


def test_interest_dominates_popularity(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = simulated(tmp_path, SMALL)
    candidates = exploded(rows)
    clicks = candidates.group_by("item", "day").agg(pl.col("clicked").sum().alias("clicks"))
    before = (
        clicks.sort("day")
        .with_columns((pl.col("clicks").cum_sum() - pl.col("clicks")).over("item").alias("before"))
        .drop("clicks")
    )
    candidates = candidates.join(before, on=["item", "day"])
    oracle, popularity = mean_auc(candidates, "utility"), mean_auc(candidates, "before")
    with capsys.disabled():
        print(f"\nsimulated log: oracle AUC {oracle:.3f}, clicks before the day {popularity:.3f}")
    assert 0.74 < oracle < 0.82
    assert 0.51 < popularity < 0.61
    by_position = candidates.group_by("position").agg(pl.col("clicked").mean()).sort("position")
    assert by_position["clicked"][0] > 1.5 * by_position["clicked"][-1]


def test_texts_carry_their_topic(tmp_path: Path):
    simulate(SMALL, tmp_path)
    items = open_source("simulated", tmp_path).items().rows.collect()
    words = {s.name: [*s.subjects, *s.actions] for s in load_newsroom().subtopics}
    for subtopic, title in items.select("subcategory", "title").iter_rows():
        assert any(phrase.lower() in title.lower() for phrase in words[subtopic]), title
    assert items["title"].n_unique() > 0.97 * items.height
    assert items["title"].str.len_chars().max() < 120
    assert items["entities"].list.len().sum() > 0


def test_new_items_displace_old_ones(tmp_path: Path):
    candidates = exploded(simulated(tmp_path, SMALL)).with_columns(
        number=pl.col("item").str.slice(1).cast(pl.Int64) - 1
    )
    published = pl.col("number") // SMALL.items_per_day - SMALL.archive_days
    age = (pl.col("day") - START).dt.total_days() - published
    ages = candidates.select(age.alias("age"))["age"]
    assert ages.min() == 0
    assert ages.max() == SMALL.item_lifetime_days


def early_and_late(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    is_late = (pl.col("day") - START).dt.total_days() >= LATE
    return rows.filter(~is_late), rows.filter(is_late)


def test_click_rate_shift(tmp_path: Path):
    config = replace(SMALL, click_rate_shift=ClickRateShift(LATE, factor=3.0))
    early, late = early_and_late(simulated(tmp_path, config))
    rates = [part["clicked"].list.len().mean() for part in (early, late)]
    assert rates[1] > 1.5 * rates[0]


def test_cold_users(tmp_path: Path):
    config = replace(SMALL, cold_user_share=0.0, cold_users=ColdUsers(LATE, share=0.4))
    early, late = early_and_late(simulated(tmp_path, config))
    is_new = late["user_id"].str.slice(1).cast(pl.Int64) > SMALL.users
    assert abs(is_new.mean() - 0.4) < 0.05
    assert (early["history"].list.len() > 0).all()
    first = late.filter(is_new).unique("user_id", keep="first", maintain_order=True)
    assert (first["history"].list.len() == 0).all()


def test_topic_surge(tmp_path: Path):
    surge = TopicSurge(LATE, "weather", factor=6.0)
    config = replace(SMALL, items_per_day=200, topic_surge=surge)
    rows = simulated(tmp_path, config)
    items = open_source("simulated", tmp_path).items().rows.collect()
    topic = items.select(item=Columns.ITEM_ID, topic=Columns.CATEGORY)
    early, late = early_and_late(exploded(rows).join(topic, on="item"))
    is_weather = pl.col("topic") == "weather"
    supply = [part.select(is_weather.mean()).item() for part in (early, late)]
    demand = [part.filter("clicked").select(is_weather.mean()).item() for part in (early, late)]
    assert supply[1] > 2 * supply[0]
    assert demand[1] / supply[1] > 1.3 * demand[0] / supply[0]


def test_vocabulary_shift(tmp_path: Path):
    config = replace(SMALL, vocabulary_shift=VocabularyShift(LATE))
    simulate(config, tmp_path)
    items = open_source("simulated", tmp_path).items().rows.collect()
    later = [word for s in load_newsroom().subtopics for word in s.later_subjects]
    shown = items.select(
        pl.any_horizontal(
            pl.col("title").str.to_lowercase().str.contains(word, literal=True) for word in later
        )
    ).to_series()
    first_late = (SMALL.archive_days + LATE) * SMALL.items_per_day
    assert shown[:first_late].mean() < 0.02
    assert shown[first_late:].all()


def test_interest_drift_and_large_shares(tmp_path: Path):
    drifted = simulated(tmp_path / "drift", replace(SMALL, interest_drift=0.5))
    still = simulated(tmp_path / "still", SMALL)
    first_day = pl.col("day") == START
    assert not drifted.filter(~first_day).equals(still.filter(~first_day))
    cold = simulated(tmp_path / "cold", replace(SMALL, cold_user_share=1.0))
    assert (
        cold.unique("user_id", keep="first", maintain_order=True)["history"].list.len().sum() == 0
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("days", 0),
        ("impressions", 0),
        ("cold_user_share", 1.5),
        ("slate_max", 4),
        ("item_lifetime_days", 9),
        ("items_per_day", 5),
        ("topic_surge", TopicSurge(1, "weather", factor=0.0)),
        ("topic_surge", TopicSurge(1, "knitting")),
        ("vocabulary_shift", VocabularyShift(1, share=2.0)),
    ],
)
def test_impossible_configurations(key: str, value: object):
    with pytest.raises(ConfigError, match="is not allowed; allowed:"):
        replace(SMALL, **{key: value})


def test_configurations_survive_json():
    config = replace(SMALL, cold_users=ColdUsers(2), topic_surge=TopicSurge(1, "food"))
    assert SimulationConfig.from_json(config.to_json()) == config
    assert SimulationConfig.from_json('{"start": "2020-02-02"}').start == date(2020, 2, 2)
    for wrong in ('{"sede": 1}', "[]", "{", '{"cold_users": {"dya": 1}}'):
        with pytest.raises(ConfigError, match="configuration is not usable"):
            SimulationConfig.from_json(wrong)


def test_truth_of_a_range_and_damaged_truth(tmp_path: Path):
    simulate(SMALL, tmp_path)
    source = open_source("simulated", tmp_path)
    truth = source.truth(START, date(2024, 1, 2))
    assert truth is not None
    first_day = source.impressions(START, date(2024, 1, 2)).rows.collect()
    assert truth.collect()["impression_id"].to_list() == first_day["impression_id"].to_list()
    file = tmp_path / "truth.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(SourceError, match=r"truth\.parquet was cut short"):
        open_source("simulated", tmp_path)
    file.unlink()
    with pytest.raises(SourceError, match=r"truth\.parquet is missing"):
        open_source("simulated", tmp_path)


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("recflow.data.sources.simulation.writing._write_behaviors", fail)
    with pytest.raises(KeyboardInterrupt):
        simulate(SMALL, tmp_path)
    assert list(tmp_path.iterdir()) == []

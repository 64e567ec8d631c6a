"""How often drift alarms where there is none, and which shifts it finds: ``make bench-drift``.

Run ``python -m recflow_tests.benchmarks.drift [--rows 1000 10000 50000] [--ebnerd DIR]``. Logs are
simulated in a temporary folder; nothing of them is kept. Three tables:

*False alarms, halves.* The users of one simulated day are cut into two halves; no measure should
tell them apart. Beside it the usual ways: Evidently's ``DataDriftPreset`` on one row a candidate,
with its defaults, and with Kolmogorov-Smirnov and chi-square tests.

*False alarms, days.* A log without any shift: each day against the days before it.

*Power.* The same with a shift of a stated size from the last day on: how often its measure, or any,
finds it. The champion of these tables is the simulation's own click probability; it is made worse
by noise where that is the shift.

With ``--ebnerd`` (a folder of EB-NeRD) each day of the second week is compared with those before
it; nobody knows what should be found there.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recflow.adapters.drift import DECAY_METRICS, decays_of
from recflow.core.columns import ITEM_FEATURES, Columns
from recflow.core.seeding import make_rng
from recflow.data.clean import clean_impressions, clean_items
from recflow.data.features import impression_features, item_features
from recflow.data.history import extend_histories
from recflow.data.sources import open_source
from recflow.data.sources.simulated import SimulationConfig, simulate
from recflow.data.sources.simulation import (
    UTILITY,
    ClickRateShift,
    ColdUsers,
    TopicSurge,
    VocabularyShift,
)
from recflow.evaluation.calibration import fit_platt
from recflow.evaluation.metrics import ranking_metrics
from recflow.evaluation.slates import as_lists, flatten, offsets_of
from recflow.quality.drift import ItemSample, measure_drift
from recflow.quality.drift_config import EMBEDDINGS, MEASURES, DriftConfig
from recflow.quality.drift_rows import Rows, describe_impressions, first_shown

DEFAULT_ROWS = (1_000, 10_000, 50_000)
ANY = "any"
DECAY = "decay"
_REPEATS = {1_000: 100, 10_000: 50}
_FEW_REPEATS = 10
_MOST_SHIFTED = 10_000
# As a deployment is configured unless it says otherwise.
_REFERENCE_DAYS = 14
_TEST_DAYS = 1
_MAX_HISTORY = 50
# Nothing encodes the items here.
_COUNTED = [*(name for name in MEASURES if name != EMBEDDINGS), DECAY, ANY]
_ITEMS_PER_DAY = 120
_TOPIC = "sports"
# The limits were chosen on logs of smaller seeds.
_FIRST_SEED = 1_000

_USUAL_WAYS: Mapping[str, Mapping[str, str]] = {
    "Evidently's DataDriftPreset": {},
    "Evidently's DataDriftPreset, KS and chi-square": {
        "num_method": "ks",
        "cat_method": "chisquare",
    },
}

Shift = Mapping[str, Any]
SHIFTS: Mapping[str, tuple[Shift, str]] = {
    **{
        f"topic ×{factor:g}": ({"topic_surge": ("topic", factor)}, "category_clicked")
        for factor in (1.25, 1.5, 2.0, 3.0)
    },
    **{
        f"click odds ×{factor:g}": ({"click_rate_shift": factor}, "click_rate")
        for factor in (1.1, 1.25, 1.5, 2.0)
    },
    **{
        f"new users {share:.0%}": ({"cold_users": share}, "history_length")
        for share in (0.1, 0.25, 0.5)
    },
    **{
        f"new words in {share:.0%} of new items": ({"vocabulary_shift": share}, "unseen_tokens")
        for share in (0.1, 0.3, 1.0)
    },
}
# Log-odds noise added to the champion's scores on the day: (standard deviation, factor).
SCORES: Mapping[str, tuple[float, float, str]] = {
    "scores ×1.25": (0.0, 1.25, "score"),
    "scores ×2": (0.0, 2.0, "score"),
    "score noise 0.5": (0.5, 1.0, DECAY),
    "score noise 1": (1.0, 1.0, DECAY),
    "score noise 2": (2.0, 1.0, DECAY),
}


@dataclass(frozen=True)
class Log:
    """A log with what the champion says of it.

    Attributes:
        rows: One row an impression; ``auc`` and ``ndcg@10`` beside its columns.
        exploded: One row a candidate of the last day, for the usual way; no row unless asked for.
        items: ``item_id``, ``text`` and ``time``, when it was first shown.
    """

    rows: pl.DataFrame
    exploded: pl.DataFrame
    items: pl.DataFrame

    @property
    def days(self) -> list[date]:
        """Its days, in order."""
        return self.rows[Rows.DAY].unique().sort().to_list()


def simulated(config: SimulationConfig, *, exploded: bool = False) -> Log:
    """Simulate a log and describe it; the champion's score is the true log-odds of a click."""
    with tempfile.TemporaryDirectory() as folder:
        simulate(config, Path(folder))
        source = open_source("simulated", Path(folder))
        truth = source.truth(config.start, config.start + timedelta(days=config.days))
        assert truth is not None
        return described(source, truth.collect(), exploded=exploded)


def described(source: Any, truth: pl.DataFrame | None, *, exploded: bool = False) -> Log:
    """Read a log as the lineage does, and describe its impressions."""
    days = source.days()
    raw = source.impressions(days[0], days[-1] + timedelta(days=1)).rows
    cleaned = clean_items(source.items().rows.collect()).rows
    impressions = clean_impressions(
        raw.drop(Columns.DAY, strict=False).collect(),
        cleaned[Columns.ITEM_ID],
        max_history=_MAX_HISTORY,
    ).rows
    items = ITEM_FEATURES.conform(item_features(cleaned).lazy()).collect()
    extended = extend_histories(impression_features(impressions), max_history=_MAX_HISTORY)
    scores = probabilities = None
    extra: list[pl.Series] = []
    if truth is not None:
        chance = flatten(
            extended.join(truth, on=Columns.IMPRESSION_ID, how="left", maintain_order="left")[
                UTILITY
            ]
        ).to_numpy()
        chance = np.clip(chance, 1e-6, 1 - 1e-6)
        offsets = offsets_of(extended[Columns.CANDIDATES])
        flat = np.log(chance / (1 - chance))
        scores, extra, probabilities = _scored(extended, flat, offsets)
    rows = describe_impressions(
        extended,
        items,
        extended,
        held_out=True,
        seed=0,
        scores=scores,
        probabilities=probabilities,
    )
    keys = extended.select(
        pl.col(Columns.IMPRESSION_ID).alias(Rows.IMPRESSION),
        pl.col(Columns.TIME).dt.date().alias(Rows.DAY),
        *extra,
        "labels",
    )
    if scores is not None:
        keys = keys.with_columns(scores.alias("scores"))
    rows = rows.join(keys, on=[Rows.IMPRESSION, Rows.DAY], maintain_order="left")
    texts = items.select(Columns.ITEM_ID, Columns.TEXT)
    shown = first_shown(extended).join(texts, on=Columns.ITEM_ID, maintain_order="left")
    last = extended.filter(pl.col(Columns.TIME).dt.date() == days[-1])
    return Log(rows, _exploded(last, items) if exploded else rows.clear(), shown)


def _scored(
    impressions: pl.DataFrame, flat: np.ndarray, offsets: np.ndarray
) -> tuple[pl.Series, list[pl.Series], pl.Series]:
    """Scores, ranking metrics and calibrated probabilities from one score a candidate."""
    labels = flatten(impressions[Columns.LABELS]).to_numpy()
    metrics = ranking_metrics(flat, labels, offsets)
    platt = fit_platt(flat, labels)
    return (
        as_lists("scores", flat, offsets),
        [pl.Series(name, metrics[name]) for name in DECAY_METRICS],
        as_lists("probabilities", platt.probabilities(flat), offsets),
    )


def _exploded(impressions: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    """One row a candidate, as drift is usually measured on such logs."""
    about = items.select(Columns.ITEM_ID, Columns.CATEGORY, Columns.TEXT_CHARACTERS)
    return (
        impressions.select(
            pl.col(Columns.IMPRESSION_ID).alias(Rows.IMPRESSION),
            pl.col(Columns.HOUR).cast(pl.Int64),
            pl.col(Columns.HISTORY_LENGTH).cast(pl.Int64),
            pl.col(Columns.CANDIDATE_COUNT).cast(pl.Int64),
            pl.col(Columns.CANDIDATES).alias(Columns.ITEM_ID),
            pl.col(Columns.LABELS).alias("clicked"),
        )
        .explode(Columns.ITEM_ID, "clicked")
        .join(about, on=Columns.ITEM_ID)
        .with_columns(
            pl.col("clicked").cast(pl.Int64), pl.col(Columns.TEXT_CHARACTERS).cast(pl.Int64)
        )
    )


def halves(day: pl.DataFrame, rows: int, number: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Two samples of so many rows whose users are different."""
    rng = make_rng(number, "halves", rows)
    users = day[Rows.USER].unique().sort()
    left = users.filter(pl.Series(rng.random(len(users)) < 0.5))
    one, other = (
        day.filter(pl.col(Rows.USER).is_in(left.to_list()) == side) for side in (True, False)
    )
    return tuple(  # type: ignore[return-value]
        side[np.sort(rng.choice(side.height, min(rows, side.height), replace=False))]
        for side in (one, other)
    )


def compare(
    current: pl.DataFrame,
    reference: pl.DataFrame,
    config: DriftConfig,
    *,
    items: pl.DataFrame | None = None,
) -> set[str]:
    """Names of what alarms, ``decay`` and ``any`` among them."""
    day = current[Rows.DAY].max()
    assert isinstance(day, date)
    samples: dict[str, ItemSample] = {}
    if items is not None:
        first = pl.col(Columns.TIME).dt.date()
        since = reference[Rows.DAY].min()
        known = items.filter(first < day).with_columns(
            # What was there before the reference began is one cohort.
            first.clip(since - timedelta(days=1), None).alias("first")
        )
        new = items.filter(first == day).with_columns(first.alias("first"))
        samples = {
            "new_items": _item_sample(new),
            "known_items": _item_sample(known),
        }
    columns = [Rows.USER, Rows.DAY, Rows.HELD_OUT, *DECAY_METRICS]
    decays = []
    if DECAY_METRICS[0] in current.columns:
        sides = [side.select(columns).drop_nans() for side in (current, reference)]
        decays = decays_of(sides[0], sides[1], config)
    names = list(Rows.SCHEMA)
    report = measure_drift(
        current.select(names),
        reference.select(names),
        day=day,
        compared_with="the reference",
        config=config,
        decays=decays,
        **samples,
    )
    found = set(report.drifted) | ({DECAY} if report.decayed else set())
    return found | ({ANY} if found else set())


def _item_sample(items: pl.DataFrame) -> ItemSample:
    return ItemSample(items[Columns.TEXT].to_list(), items["first"].to_numpy())


def naive(current: pl.DataFrame, reference: pl.DataFrame, methods: Mapping[str, str]) -> set[str]:
    """Names of the columns that alarm in Evidently's preset, with its defaults or other methods."""
    os.environ["DO_NOT_TRACK"] = "1"
    from evidently import DataDefinition, Dataset, Report
    from evidently.presets import DataDriftPreset

    columns = [c for c in current.columns if c not in (Rows.IMPRESSION, Columns.ITEM_ID)]
    categorical = [Columns.CATEGORY]
    numeric = [c for c in columns if c not in categorical]
    definition = DataDefinition(numerical_columns=numeric, categorical_columns=categorical)
    sides = [
        Dataset.from_pandas(side.select(columns).to_pandas(), data_definition=definition)
        for side in (current, reference)
    ]
    result = Report([DataDriftPreset(**methods)], include_tests=True).run(sides[0], sides[1])
    found = {
        test["name"].removeprefix("Value Drift for column ")
        for test in result.dict()["tests"]
        if test["name"].startswith("Value Drift") and test["status"].value == "FAIL"
    }
    return found | ({ANY} if found else set())


def halves_table(rows: Sequence[int], repeats: Mapping[int, int]) -> list[str]:
    """False alarms of two halves of a day, ours beside the usual way."""
    log = simulated(_config(3, 3 * 2 * max(rows), seed=_FIRST_SEED), exploded=True)
    day = log.rows.filter(pl.col(Rows.DAY) == log.days[-1])
    columns = {f"{size:,} rows": size for size in rows}
    counts = {column: repeats.get(size, _FEW_REPEATS) for column, size in columns.items()}
    few = dict.fromkeys(columns, _FEW_REPEATS)
    ours: dict[str, Counter[str]] = {column: Counter() for column in columns}
    theirs = {name: {column: Counter[str]() for column in columns} for name in _USUAL_WAYS}
    for column, size in columns.items():
        for number in range(counts[column]):
            sides = halves(day, size, number)
            ours[column].update(compare(*sides, _limits(size)))
            if number >= _FEW_REPEATS:
                continue
            exploded = [
                log.exploded.join(side.select(Rows.IMPRESSION), on=Rows.IMPRESSION, how="semi")
                for side in sides
            ]
            for name, methods in _USUAL_WAYS.items():
                theirs[name][column].update(naive(exploded[0], exploded[1], methods))
    lines = [
        f"Two halves of a simulated day ({_listed(counts, 'pairs')}): share that alarms",
        "",
        *_table(_COUNTED, ours, counts),
    ]
    for name, found in theirs.items():
        alarming = sorted({measure for column in found.values() for measure in column} - {ANY})
        title = f"{name}, one row a candidate ({_FEW_REPEATS} pairs): share that alarms"
        lines += ["", title, "", *_table([*alarming, ANY], found, few)]
    return lines


def days_table(rows: Sequence[int], worlds: int) -> list[str]:
    """False alarms of days of a log that does not shift."""
    found: dict[str, Counter[str]] = {f"{size:,} rows": Counter() for size in rows}
    counts: Counter[str] = Counter()
    largest = max(rows)
    for world in range(worlds):
        days = _REFERENCE_DAYS + (16 if largest <= 10_000 else 6)
        log = simulated(_config(days, days * largest, seed=_FIRST_SEED + 100 + world))
        for last in range(_REFERENCE_DAYS, days):
            for size in rows:
                column = f"{size:,} rows"
                found[column].update(_against_days_before(log, last, size, _limits(size)))
                counts[column] += 1
    return [
        f"Days of a simulated log without shift, each against the {_REFERENCE_DAYS} before it "
        f"({_listed(counts, 'days')}): share that alarms",
        "",
        *_table(_COUNTED, found, counts),
    ]


def power_table(rows: Sequence[int], draws: Mapping[int, int]) -> list[str]:
    """How often shifts of stated sizes are found."""
    largest, days = max(rows), _REFERENCE_DAYS + 1
    lines = [
        f"Shifts on the last day of a simulated log, {_REFERENCE_DAYS} reference days: share of "
        "days whose measure / any measure finds it",
        "",
        _row(["shift", "its measure", *(f"{size:,} rows" for size in rows)]),
        _row(["---", "---", *("---:" for _ in rows)]),
    ]
    for number, (name, (shift, measure)) in enumerate(SHIFTS.items()):
        config = _shifted(
            _config(days, days * largest, seed=_FIRST_SEED + 200 + number), shift, days - 1
        )
        log = simulated(config)
        lines.append(_power_row(name, measure, log, rows, draws, days - 1))
        print(".", end="", flush=True)
    log = simulated(_config(days, days * largest, seed=_FIRST_SEED + 300))
    for name, (noise, factor, measure) in SCORES.items():
        changed = _with_scores(log, noise, factor)
        lines.append(_power_row(name, measure, changed, rows, draws, days - 1))
    print(flush=True)
    return lines


def _power_row(
    name: str,
    measure: str,
    log: Log,
    rows: Sequence[int],
    draws: Mapping[int, int],
    last: int,
) -> str:
    cells: list[str] = []
    for size in rows:
        found: Counter[str] = Counter()
        count = draws.get(size, 1)
        for draw in range(count):
            found.update(_against_days_before(log, last, size, _limits(size), draw))
        cells.append(f"{found[measure] / count:.0%} / {found[ANY] / count:.0%}")
    return _row([name, measure, *cells])


def _against_days_before(
    log: Log, last: int, size: int, config: DriftConfig, draw: int = 0
) -> set[str]:
    days = log.days
    wanted = days[last - _REFERENCE_DAYS : last + 1]
    parts = []
    for day in wanted:
        rows = log.rows.filter(pl.col(Rows.DAY) == day)
        rng = make_rng(draw, "draw", str(day), size)
        kept = rng.choice(rows.height, min(size, rows.height), replace=False)
        parts.append(rows[np.sort(kept)])
    test = pl.col(Rows.DAY).is_in(wanted[-1 - _TEST_DAYS : -1])
    reference = pl.concat(parts[:-1]).with_columns(test.alias(Rows.HELD_OUT))
    return compare(parts[-1], reference, config, items=log.items)


def _with_scores(log: Log, noise: float, factor: float) -> Log:
    """The log with worse scores on its last day."""
    last = log.days[-1]
    before = log.rows.filter(pl.col(Rows.DAY) < last)
    day = log.rows.filter(pl.col(Rows.DAY) == last)
    offsets = offsets_of(day["scores"])
    flat = flatten(day["scores"]).to_numpy()
    rng = make_rng(0, "noise", str(noise))
    worse = factor * flat + noise * rng.standard_normal(len(flat))
    metrics = ranking_metrics(worse, flatten(day["labels"]).to_numpy(), offsets)
    place = offsets[:-1] + np.floor(rng.random(day.height) * np.diff(offsets)).astype(np.int64)
    day = day.with_columns(
        pl.Series(Rows.SCORE, worse[place]),
        *(pl.Series(name, metrics[name]) for name in DECAY_METRICS),
    )
    return replace(log, rows=pl.concat([before, day]))


def ebnerd_table(directory: Path) -> list[str]:
    """Each day of EB-NeRD against the days before it, without a champion."""
    log = described(open_source("ebnerd", directory), None)
    config = DriftConfig()
    lines = [
        "EB-NeRD, each day against the 7 before it:",
        "",
        _row(["day", "weekday", "impressions", "beyond its limit"]),
        _row(["---", "---", "---:", "---"]),
    ]
    days = log.days
    for last in range(7, len(days)):
        day = log.rows.filter(pl.col(Rows.DAY) == days[last])
        reference = log.rows.filter(pl.col(Rows.DAY).is_in(days[last - 7 : last]))
        found = compare(day, reference, config, items=log.items) - {ANY}
        words = ", ".join(sorted(found)) or "nothing"
        lines.append(_row([str(days[last]), f"{days[last]:%a}", f"{day.height:,}", words]))
    return lines


def _config(days: int, impressions: int, *, seed: int) -> SimulationConfig:
    return SimulationConfig(
        seed=seed,
        days=days,
        impressions=impressions,
        users=max(1_000, impressions // days // 3),
        items_per_day=_ITEMS_PER_DAY,
    )


def _shifted(config: SimulationConfig, shift: Shift, day: int) -> SimulationConfig:
    ((kind, size),) = shift.items()
    made: Any = {
        "topic_surge": lambda: TopicSurge(day, _TOPIC, size[1]),
        "click_rate_shift": lambda: ClickRateShift(day, size),
        "cold_users": lambda: ColdUsers(day, size),
        "vocabulary_shift": lambda: VocabularyShift(day, size),
    }[kind]()
    return replace(config, **{kind: made})


def _limits(rows: int) -> DriftConfig:
    return DriftConfig(most_impressions=max(rows, DriftConfig().most_impressions))


def _table(
    names: Iterable[str], found: Mapping[str, Counter[str]], counts: Mapping[str, int]
) -> Iterator[str]:
    yield _row(["measure", *found])
    yield _row(["---", *("---:" for _ in found)])
    for name in names:
        yield _row([name, *(f"{c[name] / counts[column]:.0%}" for column, c in found.items())])


def _listed(counts: Mapping[str, int], what: str) -> str:
    return ", ".join(f"{count} {what} at {column}" for column, count in counts.items())


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=DEFAULT_ROWS)
    parser.add_argument("--ebnerd", type=Path, help="folder of EB-NeRD")
    parser.add_argument("--worlds", type=int, default=1, help="logs without shift")
    parser.add_argument("--only", nargs="+", choices=("halves", "days", "power", "ebnerd"))
    options = parser.parse_args(arguments)
    chosen = options.only or ["halves", "days", "power", *(["ebnerd"] if options.ebnerd else [])]
    # Fifteen days of many rows for each shift would take hours, and find what fewer rows find.
    few = [size for size in options.rows if size <= _MOST_SHIFTED] or options.rows
    tables = {
        "halves": lambda: halves_table(options.rows, _REPEATS),
        "days": lambda: days_table(few, options.worlds),
        "power": lambda: power_table(few, {1_000: 20, 10_000: 5}),
        "ebnerd": lambda: ebnerd_table(options.ebnerd),
    }
    for name in chosen:
        started = time.perf_counter()
        print(*tables[name](), sep="\n")
        print(f"\n({time.perf_counter() - started:,.0f} s)\n", flush=True)


if __name__ == "__main__":
    main()

"""MovieLens-100K by the field's protocols: ``python -m recflow_tests.benchmarks.movielens``.

*Leave-last-out* (He et al. 2017, *Neural collaborative filtering*): of each user the last film
rated is to be found among 99 that the user never rated, drawn uniformly; the film before it chooses
the epoch and every setting. *Ratings*: root mean squared error on a random tenth, and on the last
tenth by time; a twentieth of the rest is the validation split that chooses.

recflow's own trainer does both, with embeddings of films and users beside the text of title, year
and genres. It never sees which film is tested: films drawn against a click in training are those
without a rating of the user *in train*, so the tested one may be among them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recflow.core.columns import UTC_TIME, Columns
from recflow.core.seeding import make_rng
from recflow.data.clean import clean_items
from recflow.data.features import item_features
from recflow.data.sources import open_source
from recflow.evaluation.metrics import ranking_metrics
from recflow.evaluation.significance import bootstrap_ratios, codes_of, percentile_interval
from recflow.modeling.config import TrainingConfig, config_from
from recflow.modeling.ranker import load_ranker
from recflow.modeling.tracking import NullTracker
from recflow.modeling.trainer import train_ranker
from recflow.settings import PROJECT_ROOT

_DATA: Final = PROJECT_ROOT / "data"
_SPLITS: Final = ("train", "validation", "test")
_TEST_NEGATIVES, _TRAIN_NEGATIVES = 99, 20
_RESAMPLES: Final = 1_000
_DAMPING: Final = 5.0  # ratings that pull a bias towards 0

# Validation chooses the epoch. Settings are the best of a few trials by validation; those of
# RATINGS were tried on another random split, and none was tried on the split by time.
RANKING: Final[dict[str, Any]] = {
    "tuning": {"strategy": "frozen"},
    "user_model": {"item_ids": True, "user_ids": True},
    "optimiser": {"head_learning_rate": 3e-3},
    "schedule": {
        "head_epochs": 3,
        "encoder_epochs": 0,
        "head_batch_size": 512,
        "max_impressions_per_epoch": 100_000,
        "primary_metric": "ndcg@10",
    },
}
RATINGS: Final[dict[str, Any]] = {
    "tuning": {"strategy": "frozen"},
    "user_model": {
        "kind": "mean",
        "history_length": 300,
        "item_ids": True,
        "user_ids": True,
        "id_dimension": 16,
        "dropout": 0.1,
    },
    "objective": {"loss": "mean_squared_error"},
    "optimiser": {"head_learning_rate": 5e-3, "weight_decay": 0.3},
    "schedule": {
        "head_epochs": 7,
        "encoder_epochs": 0,
        "head_batch_size": 1_024,
        "max_impressions_per_epoch": 100_000,
        "max_validation_impressions": 10_000,
        "primary_metric": "rating_rmse",
    },
}

Splits = dict[str, pl.DataFrame]
Floats = NDArray[np.float64]

_SCHEMA: Final = {
    Columns.IMPRESSION_ID: pl.String,
    Columns.USER_ID: pl.String,
    Columns.TIME: UTC_TIME,
    Columns.HISTORY: pl.List(pl.String),
    Columns.CANDIDATES: pl.List(pl.String),
    Columns.LABELS: pl.List(pl.Int8),
    Columns.RATING: pl.List(pl.Float32),
}


def read_films(directory: Path) -> pl.DataFrame:
    """The films as the encoder reads them."""
    raw = open_source("movielens", directory).items().rows.collect()
    return item_features(clean_items(raw).rows)


def read_ratings(directory: Path) -> pl.DataFrame:
    """All ratings in order of time; those of one second in the order of the file."""
    columns = {"user": pl.String, "item": pl.String, "stars": pl.Float32, "seconds": pl.Float64}
    ratings = pl.read_csv(
        directory / "ml-100k.inter",
        separator="\t",
        has_header=False,
        skip_rows=1,
        schema=columns,
    )
    moment = pl.from_epoch(pl.col("seconds").cast(pl.Int64)).cast(pl.Datetime("us"))
    return ratings.with_columns(moment.dt.replace_time_zone("UTC").alias("time")).sort(
        "time", maintain_order=True
    )


def leave_last_out(
    ratings: pl.DataFrame, film_ids: list[str], *, history_length: int, seed: int
) -> Splits:
    """One impression for every rating but a user's first: that film among films not rated.

    Histories are the films rated before. Ratings themselves are not looked at.
    """
    films = np.array(film_ids, dtype=object)
    number = {film: row for row, film in enumerate(film_ids)}
    train_rng, test_rng = make_rng(seed, "train negatives"), make_rng(seed, "test negatives")
    rows: dict[str, list[tuple[Any, ...]]] = {split: [] for split in _SPLITS}
    for user, items, times in _by_user(ratings, "item", "time"):
        rated = np.array([number[item] for item in items])
        not_rated = np.setdiff1d(np.arange(len(films)), rated)
        not_in_train = np.setdiff1d(np.arange(len(films)), rated[:-2])
        for place in range(1, len(rated)):
            left = len(rated) - place
            if left > 2:
                split, others = "train", train_rng.choice(not_in_train, _TRAIN_NEGATIVES)
            else:
                split = "validation" if left == 2 else "test"
                others = test_rng.choice(not_rated, _TEST_NEGATIVES, replace=False)
            history = films[rated[max(0, place - history_length) : place]].tolist()
            candidates = [items[place], *films[others]]
            labels = [1] + [0] * len(others)
            rows[split].append(
                (f"{user}-{place}", user, times[place], history, candidates, labels, None)
            )
    return {split: _impressions(rows[split]) for split in _SPLITS}


def assign_splits(ratings: pl.DataFrame, *, by_time: bool, seed: int) -> pl.DataFrame:
    """Say of each rating which split it is in: a tenth is test, a twentieth of the rest validation.

    The last ones by time, or random ones.
    """
    count = len(ratings)
    rank = np.arange(count)
    if not by_time:
        rank = make_rng(seed, "rating split").permutation(count)
    test = count - count // 10
    validation = test - test // 20
    split = np.select([rank >= test, rank >= validation], ["test", "validation"], "train")
    return ratings.with_columns(pl.Series("split", split))


def rating_impressions(ratings: pl.DataFrame, *, history_length: int) -> Splits:
    """One impression for every rating; its history is the user's other films of train.

    These are the ``N(u)`` of SVD++: that a film was rated is known, how it was rated is not.
    """
    rows: dict[str, list[tuple[Any, ...]]] = {split: [] for split in _SPLITS}
    for user, items, times, stars, splits in _by_user(ratings, "item", "time", "stars", "split"):
        known = [item for item, split in zip(items, splits, strict=True) if split == "train"]
        newest = known[-history_length - 1 :]
        for place, item in enumerate(items):
            history = [other for other in newest if other != item][-history_length:]
            rows[splits[place]].append(
                (f"{user}-{place}", user, times[place], history, [item], [1], [stars[place]])
            )
    return {split: _impressions(rows[split]) for split in _SPLITS}


def popularity(splits: Splits) -> Callable[[pl.DataFrame], Floats]:
    """Scores candidates by their ratings in train."""
    clicked = splits["train"][Columns.CANDIDATES].list.first()
    counts = dict(clicked.value_counts().iter_rows())
    return lambda impressions: np.array(
        [counts.get(item, 0) for item in impressions[Columns.CANDIDATES].explode()],
        dtype=np.float64,
    )


def biases(splits: Splits, *, users: bool) -> Callable[[pl.DataFrame], Floats]:
    """Predicts the mean of train plus the film's bias, and the user's where asked for.

    Biases are means of what is left, pulled towards 0 where there are few ratings.
    """
    train = _flat_ratings(splits["train"])
    mean = float(train["stars"].to_numpy().mean())
    item_bias = _damped_means(train.with_columns(pl.col("stars") - mean), "item")
    user_bias: dict[str, float] = {}
    if users:
        known = pl.Series([item_bias[item] for item in train["item"]])
        user_bias = _damped_means(train.with_columns(pl.col("stars") - mean - known), "user")

    def predict(impressions: pl.DataFrame) -> Floats:
        pairs = _flat_ratings(impressions).select("user", "item").iter_rows()
        return np.array([mean + item_bias.get(i, 0) + user_bias.get(u, 0) for u, i in pairs])

    return predict


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained ranker's scores, and what training took.

    Attributes:
        scores: Of all candidates of each split, end to end.
        seconds: Wall time of training.
    """

    scores: dict[str, Floats]
    seconds: float


def train(films: pl.DataFrame, splits: Splits, values: dict[str, Any], threads: int) -> Trained:
    """Train by a configuration, load what was stored, and score validation and test."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        train_ranker(
            items=films,
            train=splits["train"],
            validation=splits["validation"],
            base_model=_DATA / "base_models" / "all-MiniLM-L6-v2",
            output=Path(folder),
            config=config_from(TrainingConfig, values | {"threads": threads}),
            tracker=NullTracker(),
        )
        seconds = time.monotonic() - started
        scorer = load_ranker(Path(folder), threads=threads).scorer("recflow", films)
        scores = {
            split: scorer.score(splits[split]).explode().to_numpy()
            for split in ("validation", "test")
        }
    return Trained(scores, seconds)


def ranking_row(name: str, splits: Splits, scores: dict[str, Floats], seconds: float) -> str:
    """A row of the ranking table."""
    cells: list[str] = []
    for split in ("validation", "test"):
        impressions = splits[split]
        labels = impressions[Columns.LABELS].explode().to_numpy()
        offsets = np.arange(len(impressions) + 1) * (1 + _TEST_NEGATIVES)
        values = ranking_metrics(scores[split], labels, offsets)
        for metric in ("auc", "ndcg@10"):
            cells.append(_with_interval(values[metric], impressions[Columns.USER_ID], np.asarray))
    return f"| {name} | {' | '.join(cells)} | {seconds:.0f} |"


def rating_row(
    protocol: str, name: str, splits: Splits, predicted: dict[str, Floats], seconds: float
) -> str:
    """A row of the rating table; predictions are cut to 1 to 5 stars."""
    cells: list[str] = []
    for split in ("validation", "test"):
        stars = _flat_ratings(splits[split])["stars"].to_numpy()
        errors = (np.clip(predicted[split], 1, 5) - stars).astype(np.float64) ** 2
        cells.append(_with_interval(errors, splits[split][Columns.USER_ID], np.sqrt))
    return f"| {protocol} | {name} | {' | '.join(cells)} | {seconds:.0f} |"


def compare_rankings(films: pl.DataFrame, ratings: pl.DataFrame, threads: int, seed: int) -> None:
    """Print the table of leave-last-out."""
    print("| leave-last-out, 99 negatives | validation AUC | nDCG@10 | test AUC | nDCG@10 | s |")
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    length = config_from(TrainingConfig, RANKING).user_model.history_length
    splits = leave_last_out(
        ratings, films[Columns.ITEM_ID].to_list(), history_length=length, seed=seed
    )
    score = popularity(splits)
    print(ranking_row("popularity", splits, _on_both(score, splits), 0), flush=True)
    trained = train(films, splits, RANKING, threads)
    print(ranking_row("recflow", splits, trained.scores, trained.seconds), flush=True)


def compare_ratings(films: pl.DataFrame, ratings: pl.DataFrame, threads: int, seed: int) -> None:
    """Print the table of both rating protocols."""
    print("| ratings | | validation RMSE | test RMSE | s |")
    print("|---|---|---:|---:|---:|", flush=True)
    length = config_from(TrainingConfig, RATINGS).user_model.history_length
    for protocol in ("random 90/10", "last 10 % by time"):
        assigned = assign_splits(ratings, by_time="time" in protocol, seed=seed)
        splits = rating_impressions(assigned, history_length=length)
        for name, users in (("film mean", False), ("film and user bias", True)):
            predicted = _on_both(biases(splits, users=users), splits)
            print(rating_row(protocol, name, splits, predicted, 0), flush=True)
        trained = train(films, splits, RATINGS, threads)
        mean = float(_flat_ratings(splits["train"])["stars"].to_numpy().mean())
        predicted = {split: scores + mean for split, scores in trained.scores.items()}
        print(rating_row(protocol, "recflow", splits, predicted, trained.seconds), flush=True)


def _by_user(ratings: pl.DataFrame, *columns: str) -> Iterator[tuple[Any, ...]]:
    return ratings.group_by("user", maintain_order=True).agg(*columns).iter_rows()


def _impressions(rows: list[tuple[Any, ...]]) -> pl.DataFrame:
    frame = pl.DataFrame(rows, schema=_SCHEMA, orient="row")
    return frame.sort(Columns.TIME, Columns.IMPRESSION_ID)


def _flat_ratings(impressions: pl.DataFrame) -> pl.DataFrame:
    return impressions.select(
        pl.col(Columns.USER_ID).alias("user"),
        pl.col(Columns.CANDIDATES).list.first().alias("item"),
        pl.col(Columns.RATING).list.first().alias("stars"),
    )


def _damped_means(rest: pl.DataFrame, key: str) -> dict[str, float]:
    damped = pl.col("stars").sum() / (pl.len() + _DAMPING)
    return dict(rest.group_by(key).agg(damped).iter_rows())


def _on_both(score: Callable[[pl.DataFrame], Floats], splits: Splits) -> dict[str, Floats]:
    return {split: score(splits[split]) for split in ("validation", "test")}


def _with_interval(values: Floats, users: pl.Series, finish: Callable[[Floats], Floats]) -> str:
    """Mean of one value a row, finished, with its 95 % bootstrap interval over users."""
    codes, clusters = codes_of(users.to_list())
    sums = np.bincount(codes, weights=values, minlength=clusters)[:, None].astype(np.float64)
    counts = np.bincount(codes, minlength=clusters)[:, None].astype(np.float64)
    replicates = finish(bootstrap_ratios(sums, counts, _RESAMPLES, make_rng(0, "bootstrap"))[:, 0])
    interval = percentile_interval(replicates, 0.95)
    assert interval is not None
    centre = float(finish(np.asarray(values.mean())))
    return f"{centre:.4f} ({interval[0]:.4f} to {interval[1]:.4f})"


def main(arguments: list[str] | None = None) -> None:
    """Print both comparisons as Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=_DATA / "movielens-100k")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("ranking", "ratings"))
    options: Any = parser.parse_args(arguments)
    films, ratings = read_films(options.directory), read_ratings(options.directory)
    if options.only != "ratings":
        compare_rankings(films, ratings, options.threads, options.seed)
        print()
    if options.only != "ranking":
        compare_ratings(films, ratings, options.threads, options.seed)


if __name__ == "__main__":
    main()

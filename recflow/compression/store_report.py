"""What storing item vectors in fewer bytes costs: closeness, neighbours, accuracy, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from recflow.compression.config import VectorStoreConfig
from recflow.compression.recovery import validation_auc
from recflow.compression.vector_store import (
    ItemVectors,
    Neighbours,
    build_item_vectors,
    fit_codec,
)
from recflow.core.columns import Columns
from recflow.core.errors import ConfigError
from recflow.core.seeding import make_rng
from recflow.modeling.batching import items_in_use
from recflow.modeling.ranker import Ranker
from recflow.modeling.texts import Rows, Vectors

_FEW, _MANY = 10, 100  # neighbours of the recall


@dataclass(frozen=True, slots=True)
class StoreMeasurementConfig:
    """How carefully to measure.

    Attributes:
        queries: Items of validation whose neighbours are searched.
        lookup_items: Items looked up at a time, about as many as one impression needs.
        catalogue: Items of the catalogue that is searched for the time; the real one is repeated.
        rounds: Timed repetitions; the median counts.
        seed: Seed of the items drawn.
    """

    queries: int = 300
    lookup_items: int = 50
    catalogue: int = 50_000
    rounds: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError at the first impossible value."""
        for key in ("queries", "lookup_items", "catalogue", "rounds"):
            if getattr(self, key) < 1:
                raise ConfigError.of(key, getattr(self, key), "a whole number of at least 1")


@dataclass(frozen=True, slots=True)
class StoreReport:
    """What one store costs, and what it loses.

    Attributes:
        codec: Its codec.
        bytes_per_item: Bytes of one vector.
        shared_bytes: Bytes that all vectors need together.
        fit_seconds: Wall time of learning the codec.
        mean_cosine: Mean cosine between decoded and float32 vectors of the catalogue.
        lowest_cosine: Lowest of them.
        new_mean_cosine: The mean over items that train does not have; 1 where there are none.
        recall_at_10: Share of the 10 nearest items by float32 that are among the 10 found.
        recall_at_100: The same for 100, or as many as there are.
        validation_auc: Mean AUC on validation, scored from decoded vectors.
        lookup_microseconds: Median time to decode ``lookup_items`` vectors.
        search_milliseconds: Median time to find the 10 nearest of one query in the catalogue of
            ``catalogue`` items.
    """

    codec: str
    bytes_per_item: int
    shared_bytes: int
    fit_seconds: float
    mean_cosine: float
    lowest_cosine: float
    new_mean_cosine: float
    recall_at_10: float
    recall_at_100: float
    validation_auc: float
    lookup_microseconds: float
    search_milliseconds: float


def item_vectors_report(
    *,
    ranker: Ranker,
    vectors: Vectors,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    stores: Mapping[str, VectorStoreConfig],
    config: StoreMeasurementConfig,
    on_store: Callable[[str, ItemVectors], None] = lambda _, __: None,
) -> dict[str, StoreReport]:
    """Compare ways of storing the vectors of a catalogue.

    The queries are item vectors in float32; an item is not its own neighbour. Times of all stores
    are taken in turn.

    Args:
        ranker: Scores from the vectors.
        vectors: Its unit vectors of ``items``, ``[items, dimension]`` float32.
        items: Item features.
        train: Training impressions; codecs learn from the vectors of their items.
        validation: Validation impressions, for the queries and the accuracy.
        stores: Configurations to compare, by name.
        config: How carefully to measure.
        on_store: Given each store by its name, once it is built, to keep it.

    Returns:
        One report a store, by its name.

    Raises:
        ConfigError: A codec does not fit the vectors.
        ContractError: An impression names an unknown item, or validation has nothing to compare.
    """
    history_length = ranker.parts.user_model.shape.history_length
    ids = items[Columns.ITEM_ID]
    of_train = ids.is_in(items_in_use(items, [train], history_length).ids).to_numpy()
    of_validation = ids.is_in(items_in_use(items, [validation], history_length).ids).to_numpy()
    rng = make_rng(config.seed, "item vectors")
    shown = np.flatnonzero(of_validation)
    queries = np.sort(rng.choice(shown, size=min(config.queries, len(shown)), replace=False))

    built: dict[str, ItemVectors] = {}
    seconds: dict[str, float] = {}
    for name, store in stores.items():
        started = time.perf_counter()
        codec = fit_codec(vectors[of_train], store)
        seconds[name] = time.perf_counter() - started
        built[name] = build_item_vectors(ids.to_list(), vectors, codec)
        on_store(name, built[name])
    exact = build_item_vectors(
        ids.to_list(), vectors, fit_codec(vectors, VectorStoreConfig(codec="float32"))
    )
    nearest = _neighbours(exact, vectors, queries)
    lookups, searches = _times(built, vectors[queries], config, rng)

    reports: dict[str, StoreReport] = {}
    for name, store in built.items():
        cosines = np.einsum("ij,ij->i", store.take(np.arange(len(store))), vectors)
        new = cosines[~of_train]
        found = _neighbours(store, vectors, queries)
        reports[name] = StoreReport(
            codec=store.codec.name,
            bytes_per_item=store.bytes_per_item,
            shared_bytes=store.shared_bytes,
            fit_seconds=seconds[name],
            mean_cosine=float(cosines.mean()),
            lowest_cosine=float(cosines.min()),
            new_mean_cosine=float(new.mean()) if len(new) else 1.0,
            recall_at_10=_recall(found[:, :_FEW], nearest[:, :_FEW]),
            recall_at_100=_recall(found, nearest),
            validation_auc=validation_auc(ranker, items, validation, store.source(items)),
            lookup_microseconds=lookups[name] * 1e6,
            search_milliseconds=searches[name] * 1e3,
        )
    return reports


def _neighbours(store: ItemVectors, vectors: Vectors, queries: Rows) -> Rows:
    """Rows of the nearest other items of some items, ``[queries, at most 100]``."""
    found: Neighbours = store.search(vectors[queries], _MANY + 1)
    # A coarse codec may not find the item itself; then the last neighbour makes room.
    order = np.argsort(found.rows == queries[:, None], axis=1, kind="stable")
    return np.take_along_axis(found.rows, order, axis=1)[:, :-1]


def _recall(found: Rows, wanted: Rows) -> float:
    """Share of the wanted rows that are found, over all queries."""
    hits = [len(np.intersect1d(f, w)) for f, w in zip(found, wanted, strict=True)]
    return sum(hits) / wanted.size if wanted.size else 1.0


def _times(
    built: Mapping[str, ItemVectors],
    queries: Vectors,
    config: StoreMeasurementConfig,
    rng: np.random.Generator,
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of a look-up and of a search of each store."""
    enlarged = {name: _enlarged(store, config.catalogue) for name, store in built.items()}
    lookups: dict[str, list[float]] = {name: [] for name in built}
    searches: dict[str, list[float]] = {name: [] for name in built}
    for store in enlarged.values():
        store.search(queries[:1], _FEW)  # builds the index
    for number in range(config.rounds):
        query = queries[number % len(queries)][None, :]
        rows = rng.integers(config.catalogue, size=config.lookup_items)
        for name, store in enlarged.items():
            lookups[name].append(_seconds(lambda s=store, r=rows: s.take(r)))
            searches[name].append(_seconds(lambda s=store, q=query: s.search(q, _FEW)))
    return (
        {name: float(np.median(taken)) for name, taken in lookups.items()},
        {name: float(np.median(taken)) for name, taken in searches.items()},
    )


def _enlarged(store: ItemVectors, items: int) -> ItemVectors:
    """The catalogue repeated, or cut, to a number of items."""
    codes = store.codes[np.arange(items) % len(store)]
    return ItemVectors([str(item) for item in range(items)], store.codec, codes)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started

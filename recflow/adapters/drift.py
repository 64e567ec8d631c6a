"""The drift of a day as an artifact: its features, texts, scores and what the champion still ranks.

A day is compared with the champion's snapshot: features with all of its days; scores, calibration
and ranking with its test days, which the champion was not trained on. What these days look like to
the champion is measured once and kept, so that a day costs the scoring of a day. Without a champion
– or where the day is one of the champion's own – the reference are the days of the window before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Final, cast

import numpy as np
import polars as pl
from safetensors.numpy import load_file, save_file

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.champion import Champion
from recflow.adapters.keys import DRIFT, DRIFT_REFERENCE, FEATURES_IMPRESSIONS, FEATURES_ITEMS
from recflow.adapters.parquet_io import read_frame, read_frames, write_frame
from recflow.adapters.snapshots import load_snapshot, newest_of_each_item
from recflow.adapters.validations import require_valid
from recflow.core.artifacts import Artifact, Draft, JsonValue
from recflow.core.columns import IMPRESSION_FEATURES, Columns
from recflow.core.errors import SourceError
from recflow.core.seeding import make_rng
from recflow.data.history import extend_histories
from recflow.data.split import Claim
from recflow.evaluation.calibration import (
    PlattScaling,
    calibration_error,
    fit_platt,
    reliability,
)
from recflow.evaluation.metrics import ranking_metrics
from recflow.evaluation.significance import bootstrap_ratios, codes_of
from recflow.evaluation.slates import FloatArray, as_lists, flatten, offsets_of
from recflow.modeling.ranker import Ranker, load_ranker
from recflow.modeling.texts import Rows as RowNumbers
from recflow.modeling.texts import Vectors
from recflow.quality.drift import (
    Decay,
    DriftReport,
    ItemSample,
    at_most,
    judge_decay,
    measure_drift,
)
from recflow.quality.drift_config import DriftConfig
from recflow.quality.drift_page import drift_html
from recflow.quality.drift_rows import Rows, describe_impressions, first_shown
from recflow.quality.evidence import DriftEvidence

PAGE: Final = "drift.html"
RESULT: Final = "drift.json"
NO_DRIFT: Final = "no_drift"
DECAY_METRICS: Final = ("auc", "ndcg@10")
# Without a champion, days as near to the day as its test days would be stand for them.
_NEAREST_DAYS: Final = 3
_RELIABILITY_BINS: Final = 15
_REFERENCE_VERSION: Final = "1"
_ROWS, _RANKED, _ITEMS, _VECTORS = "rows", "ranked", "items", "vectors"
_VECTORS_FILE: Final = f"{_VECTORS}.safetensors"
_RANKED_SCHEMA: Final = pl.Schema(
    {
        Rows.USER: pl.String,
        Rows.DAY: pl.Date,
        Rows.HELD_OUT: pl.Boolean,
        **dict.fromkeys(DECAY_METRICS, pl.Float64()),
    }
)

Score = Callable[[pl.DataFrame], pl.Series]


@dataclass(frozen=True, slots=True)
class _Described:
    """Impressions as they are compared.

    Attributes:
        rows: One row an impression (schema ``Rows.SCHEMA``).
        ranked: ``user``, ``day``, ``held_out`` and the ranking metrics of each impression that has
            a click and a non-click; no row without a champion.
        calibration_error: Of the champion's click probabilities; ``None`` without one.
    """

    rows: pl.DataFrame
    ranked: pl.DataFrame
    calibration_error: float | None


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of the comparison: its impressions, and the items that matter.

    Attributes:
        described: The impressions.
        items: ``item_id``, ``text`` and ``time``, when it was first shown.
        vectors: The champion's vector of each, float32 [items, width]; ``None`` without one.
    """

    described: _Described
    items: pl.DataFrame
    vectors: Vectors | None

    def sample(self) -> ItemSample:
        """The items as texts are compared."""
        days = self.items[Columns.TIME].dt.date().to_numpy().astype("datetime64[D]")
        return ItemSample(self.items[Columns.TEXT].to_list(), days, self.vectors)


def build_drift(
    store: ArtifactStore,
    day: str,
    *,
    champion: Champion | None,
    window: Sequence[str],
    max_history: int,
    config: DriftConfig,
    threads: int,
    code_version: str,
    rebuild: bool = False,
) -> Artifact:
    """Measure the drift of a day; write ``drift.html`` and ``drift.json``.

    Args:
        store: Where the days and the champion's snapshot are.
        day: Partition key of the day.
        champion: The model that users get, if any.
        window: Partition keys of the days that end with ``day``, oldest first: histories are as of
            each impression within them, as in a snapshot.
        max_history: The newest so many items of a history are kept.
        config: Limits.
        threads: Threads the champion may use.
        code_version: Version of the measuring code.
        rebuild: Measure again what was measured.

    Returns:
        The artifact; its facts are those of :class:`~recflow.quality.evidence.DriftEvidence` and
        one number for each value and limit.

    Raises:
        SourceError: The day, or without a champion every day before it, is not stored.
        ContractError: A day of the window is not validated, or failed its validation.
        ArtifactError: The champion's snapshot or files are missing or altered.
    """
    impressions = store.existing(FEATURES_IMPRESSIONS, window)
    items = store.existing(FEATURES_ITEMS, window)
    if day not in impressions or not items:
        raise SourceError(
            f"{day} has no impressions or no items to compare; materialise "
            f"{FEATURES_IMPRESSIONS} and {FEATURES_ITEMS} for it first"
        )
    require_valid(store, FEATURES_IMPRESSIONS, impressions)
    require_valid(store, FEATURES_ITEMS, items)
    judge = champion if champion is not None and day > champion.snapshot else None
    if judge is None and len(impressions) == 1:
        raise SourceError(
            f"{day} has nothing to be compared with: there is no champion of an earlier day, and "
            f"no day from {window[0]} on is stored; promote a model or materialise earlier days"
        )
    parents = {
        **{f"{FEATURES_IMPRESSIONS}/{key}": artifact for key, artifact in impressions.items()},
        **{f"{FEATURES_ITEMS}/{key}": artifact for key, artifact in items.items()},
    }
    kept = build_reference(store, judge, config=config, threads=threads) if judge else None
    if kept is not None:
        parents[DRIFT_REFERENCE] = kept

    def build(draft: Draft) -> None:
        frame = read_frames(impressions.values(), IMPRESSION_FEATURES)
        extended = extend_histories(frame, max_history=max_history)
        catalogue = newest_of_each_item(items)
        the_day = date.fromisoformat(day)
        if judge is None or kept is None:
            reference, current = _without_champion(extended, catalogue, the_day, config)
            compared_with = f"the {reference.described.rows[Rows.DAY].n_unique()} days before it"
        else:
            reference = _stored_side(kept)
            current = _with_champion(
                extended, catalogue, the_day, kept, reference, judge, threads, config
            )
            compared_with = (
                f"the snapshot {judge.snapshot} of champion {judge.version} ({judge.name})"
            )
        report = _compare(current, reference, the_day, compared_with, config)
        _write(draft, report, current.described.rows, reference.described.rows, config)
        draft.facts |= DriftEvidence(
            day=the_day,
            digest="",
            champion=judge.version if judge else "",
            champion_snapshot=judge.snapshot if judge else "",
            drifted=report.drifted,
            decayed=report.decayed,
        ).to_facts()

    return store.build(
        DRIFT,
        day,
        build,
        code_version=code_version,
        parents=parents,
        config={
            **_as_json(config),
            "max_history": max_history,
            "window_days": len(window),
            "champion": _identity(judge) if judge else None,
        },
        rebuild=rebuild,
    )


def build_reference(
    store: ArtifactStore, champion: Champion, *, config: DriftConfig, threads: int
) -> Artifact:
    """Measure once what the days of its own snapshot look like to a champion.

    Raises:
        ArtifactError: The snapshot or the champion's files are missing or altered.
        ContractError: The validation split has no click, or nothing but clicks.
    """
    stored = load_snapshot(store, champion.snapshot)

    def build(draft: Draft) -> None:
        splits, items = stored.splits, stored.items
        window = pl.concat([splits.train, splits.validation, splits.test])
        ranker = load_ranker(champion.path, threads=threads)
        shown = _shown_items(window, items)
        vectors = ranker.encode(shown[Columns.TEXT].to_list())
        look_up = _known_vectors(ranker, items, shown, vectors)
        score = ranker.scorer(champion.name, items, look_up).score
        validation = _at_most(splits.validation, config)
        platt = fit_platt(
            flatten(score(validation)).to_numpy(), flatten(validation[Columns.LABELS]).to_numpy()
        )
        parts = [
            _describe(
                _at_most(frame, config),
                window,
                items,
                config,
                held_out=held_out,
                score=score,
                platt=platt,
            )
            for frame, held_out in (
                (splits.train, False),
                (splits.validation, False),
                (splits.test, True),
            )
        ]
        write_frame(draft, _ROWS, pl.concat([part.rows for part in parts]))
        write_frame(draft, _RANKED, pl.concat([part.ranked for part in parts]))
        write_frame(draft, _ITEMS, shown)
        save_file({_VECTORS: vectors}, draft.path / _VECTORS_FILE)
        draft.facts |= {
            "slope": platt.slope,
            "intercept": platt.intercept,
            "calibration_error": parts[-1].calibration_error,
        }

    return store.build(
        DRIFT_REFERENCE,
        f"{champion.snapshot}-{champion.digest[:16]}",
        build,
        code_version=_REFERENCE_VERSION,
        parents=stored.artifacts,
        config={
            "champion": _identity(champion),
            "most_impressions": config.most_impressions,
            "seed": config.seed,
        },
    )


def evidence_of(artifact: Artifact) -> DriftEvidence:
    """What the drift of a day says, from its artifact.

    Raises:
        ArtifactError: It was written by another recflow.
    """
    day = date.fromisoformat(artifact.manifest.partition)
    return DriftEvidence.from_facts(day, artifact.digest, artifact.facts)


def no_drift(artifact: Artifact) -> Claim:
    """Claim that nothing is beyond its limit."""
    evidence = evidence_of(artifact)
    return Claim(
        name=NO_DRIFT,
        holds=not evidence.alarming,
        description=str(artifact.facts["state"]),
        facts={
            "drifted": ", ".join(evidence.drifted),
            "decayed": evidence.decayed,
            "champion": evidence.champion,
            "judged": bool(artifact.facts["judged"]),
        },
        examples=[],
    )


def _without_champion(
    extended: pl.DataFrame, catalogue: pl.DataFrame, day: date, config: DriftConfig
) -> tuple[_Side, _Side]:
    """The days before, and the day, by what needs no model."""
    when = pl.col(Columns.TIME).dt.date()
    before = extended.filter(when < day)
    days = before.select(when.unique().sort()).to_series()
    nearest = when >= days[-min(_NEAREST_DAYS, len(days))]
    parts = [
        _describe(_at_most(frame, config), extended, catalogue, config, held_out=held_out)
        for frame, held_out in ((before.filter(~nearest), False), (before.filter(nearest), True))
        if frame.height
    ]
    reference = _Side(
        _Described(pl.concat([part.rows for part in parts]), _RANKED_SCHEMA.to_frame(), None),
        _shown_items(before, catalogue),
        None,
    )
    the_day = extended.filter(when == day)
    current = _Side(
        _describe(_at_most(the_day, config), extended, catalogue, config, held_out=True),
        _not_in(_shown_items(the_day, catalogue), reference.items),
        None,
    )
    return reference, current


def _with_champion(
    extended: pl.DataFrame,
    catalogue: pl.DataFrame,
    day: date,
    kept: Artifact,
    reference: _Side,
    champion: Champion,
    threads: int,
    config: DriftConfig,
) -> _Side:
    """The day, scored by the champion."""
    assert reference.vectors is not None
    ranker = load_ranker(champion.path, threads=threads)
    look_up = _known_vectors(ranker, catalogue, reference.items, reference.vectors)
    the_day = extended.filter(pl.col(Columns.TIME).dt.date() == day)
    facts = cast("Mapping[str, float]", kept.facts)
    described = _describe(
        _at_most(the_day, config),
        extended,
        catalogue,
        config,
        held_out=True,
        score=ranker.scorer(champion.name, catalogue, look_up).score,
        platt=PlattScaling(facts["slope"], facts["intercept"]),
    )
    new = _not_in(_shown_items(the_day, catalogue), reference.items)
    return _Side(described, new, ranker.encode(new[Columns.TEXT].to_list()))


def _stored_side(kept: Artifact) -> _Side:
    return _Side(
        _Described(
            read_frame(kept, _ROWS),
            read_frame(kept, _RANKED),
            cast("float", kept.facts["calibration_error"]),
        ),
        read_frame(kept, _ITEMS),
        load_file(kept.file(_VECTORS_FILE))[_VECTORS],
    )


def _describe(
    impressions: pl.DataFrame,
    window: pl.DataFrame,
    items: pl.DataFrame,
    config: DriftConfig,
    *,
    held_out: bool,
    score: Score | None = None,
    platt: PlattScaling | None = None,
) -> _Described:
    """Describe impressions, scored where there is something to score with."""
    if score is None or platt is None:
        rows = describe_impressions(impressions, items, window, held_out=held_out, seed=config.seed)
        return _Described(rows, _RANKED_SCHEMA.to_frame(), None)
    scores = score(impressions)
    offsets = offsets_of(scores)
    flat, labels = flatten(scores).to_numpy(), flatten(impressions[Columns.LABELS]).to_numpy()
    probabilities = platt.probabilities(flat)
    rows = describe_impressions(
        impressions,
        items,
        window,
        held_out=held_out,
        seed=config.seed,
        scores=scores,
        probabilities=as_lists("probabilities", probabilities, offsets),
    )
    metrics = ranking_metrics(flat, labels, offsets)
    ranked = impressions.select(
        pl.col(Columns.USER_ID).alias(Rows.USER),
        pl.col(Columns.TIME).dt.date().alias(Rows.DAY),
        pl.lit(held_out).alias(Rows.HELD_OUT),
        *(pl.Series(name, metrics[name]) for name in DECAY_METRICS),
    ).filter(pl.col(DECAY_METRICS[0]).is_not_nan())
    curve = reliability(probabilities, labels, _RELIABILITY_BINS)
    return _Described(rows, ranked, calibration_error(curve))


def _compare(
    current: _Side, reference: _Side, day: date, compared_with: str, config: DriftConfig
) -> DriftReport:
    errors = {
        "calibration_error_current": current.described.calibration_error,
        "calibration_error_reference": reference.described.calibration_error,
    }
    return measure_drift(
        current.described.rows,
        reference.described.rows,
        day=day,
        compared_with=compared_with,
        config=config,
        new_items=current.sample(),
        known_items=reference.sample(),
        decays=decays_of(current.described.ranked, reference.described.ranked, config),
        facts={name: error for name, error in errors.items() if error is not None},
    )


def decays_of(current: pl.DataFrame, reference: pl.DataFrame, config: DriftConfig) -> list[Decay]:
    """Judge the ranking metrics of a day against those of the test days.

    Args:
        current: ``user``, ``day``, ``held_out`` and the metrics of each ranked impression.
        reference: The same of the reference; the days that were not held out say how much a day
            differs anyway.
        config: Margin, resamples and seed.

    Returns:
        One for each metric; none where a side has nothing that can be ranked.
    """
    test = reference.filter(Rows.HELD_OUT)
    if current.is_empty() or test.is_empty():
        return []
    rng = make_rng(config.seed, "decay")
    replicates = [_resampled(side, config.bootstrap_samples, rng) for side in (current, test)]
    differences = replicates[0] - replicates[1]
    by_day = (
        reference.filter(~pl.col(Rows.HELD_OUT))
        .group_by(Rows.DAY)
        .agg(pl.len().alias("_rows"), pl.col(DECAY_METRICS).mean())
        .filter(pl.col("_rows") >= min(config.least_impressions, current.height))
        .sort(Rows.DAY)
    )
    return [
        judge_decay(
            name,
            current=_mean(current, name),
            reference=_mean(test, name),
            replicates=differences[:, column],
            day_values=by_day[name].to_list(),
            test_days=test[Rows.DAY].n_unique(),
            config=config,
        )
        for column, name in enumerate(DECAY_METRICS)
    ]


def _resampled(ranked: pl.DataFrame, samples: int, rng: np.random.Generator) -> FloatArray:
    """Means of the metrics over resampled users, float64 [samples, metrics]."""
    codes, users = codes_of(ranked[Rows.USER].to_list())
    sums = np.zeros((users, len(DECAY_METRICS)))
    np.add.at(sums, codes, ranked.select(DECAY_METRICS).to_numpy())
    counts = np.bincount(codes, minlength=users).astype(np.float64)
    return bootstrap_ratios(sums, np.repeat(counts[:, None], len(DECAY_METRICS), 1), samples, rng)


def _mean(ranked: pl.DataFrame, name: str) -> float:
    return float(ranked[name].to_numpy().mean())


def _shown_items(impressions: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    """The items that were shown: ``item_id``, ``text`` and ``time``, the first, in that order."""
    texts = items.select(Columns.ITEM_ID, Columns.TEXT)
    found = first_shown(impressions).join(texts, on=Columns.ITEM_ID, maintain_order="left")
    return found.select(Columns.ITEM_ID, Columns.TEXT, Columns.TIME)


def _not_in(items: pl.DataFrame, known: pl.DataFrame) -> pl.DataFrame:
    return items.join(known, on=Columns.ITEM_ID, how="anti", maintain_order="left")


def _known_vectors(
    ranker: Ranker, items: pl.DataFrame, known: pl.DataFrame, vectors: Vectors
) -> Callable[[RowNumbers], Vectors]:
    """Look up the vectors of items whose text is known; encode those of the others."""
    places = (
        items.select(Columns.ITEM_ID, Columns.TEXT)
        .join(
            known.select(Columns.ITEM_ID, Columns.TEXT).with_row_index("place"),
            on=[Columns.ITEM_ID, Columns.TEXT],
            how="left",
            maintain_order="left",
        )["place"]
        .cast(pl.Int64)
        .fill_null(-1)
        .to_numpy()
    )
    texts = items[Columns.TEXT]

    def look_up(rows: RowNumbers) -> Vectors:
        place = places[rows]
        found = np.empty((len(rows), ranker.dimension), dtype=np.float32)
        found[place >= 0] = vectors[place[place >= 0]]
        unknown = np.flatnonzero(place < 0)
        if len(unknown):
            found[unknown] = ranker.encode(texts.gather(rows[unknown]).to_list())
        return found

    return look_up


def _at_most(impressions: pl.DataFrame, config: DriftConfig) -> pl.DataFrame:
    """The impressions of each day that are looked at, before they are scored."""
    return at_most(
        impressions,
        config,
        order=(Columns.TIME, Columns.IMPRESSION_ID),
        day=pl.col(Columns.TIME).dt.date(),
        draw="impressions of a day",
    )


def _write(
    draft: Draft,
    report: DriftReport,
    current: pl.DataFrame,
    reference: pl.DataFrame,
    config: DriftConfig,
) -> None:
    (draft.path / PAGE).write_text(drift_html(report, current, reference, config), encoding="utf-8")
    text = json.dumps(report.to_json(), indent=2, sort_keys=True)
    (draft.path / RESULT).write_text(text + "\n", encoding="utf-8")
    draft.facts |= report.to_facts()


def _identity(champion: Champion) -> dict[str, JsonValue]:
    return {
        "version": champion.version,
        "snapshot": champion.snapshot,
        "name": champion.name,
        "digest": champion.digest,
    }


def _as_json(config: DriftConfig) -> dict[str, JsonValue]:
    return {**asdict(config), "ignored": list(config.ignored)}

"""Backtests on stored days: snapshots, models and scores are artifacts, so a killed one goes on.

A log is prepared by the same functions as in production, its snapshots are cut, its models trained
and its drift measured by the same. A snapshot has one model whichever policy asks for it; each
policy that does is charged for it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import polars as pl

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.champion import Champion
from recflow.adapters.keys import (
    CLEANED_IMPRESSIONS,
    CLEANED_ITEMS,
    FEATURES_IMPRESSIONS,
    FEATURES_ITEMS,
    FINE_TUNED,
    ITEMS,
    RAW_IMPRESSIONS,
    RAW_ITEMS,
    TEST,
)
from recflow.adapters.models import weights_hash, without_test
from recflow.adapters.parquet_io import (
    Table,
    build_days,
    ingest_impressions,
    ingest_items,
    read_frame,
    write_frame,
)
from recflow.adapters.snapshots import Snapshot, build_snapshot, load_snapshot
from recflow.adapters.validations import validate_days
from recflow.core.artifacts import Artifact, Draft, JsonValue, sha256_of
from recflow.core.columns import IMPRESSION_FEATURES, ITEM_FEATURES, Columns
from recflow.core.errors import ConfigError
from recflow.data.clean import clean_impressions, clean_items
from recflow.data.features import impression_features, item_features
from recflow.data.sources.base import Source
from recflow.data.split import SplitConfig, window_keys
from recflow.evaluation.backtest import (
    METRICS,
    Backtest,
    Choice,
    Judging,
    NeverRetrain,
    Policy,
    RetrainNightly,
    RetrainOn,
    Trained,
    Verdict,
    Walk,
    compare,
    evenly_spaced,
    walk,
)
from recflow.evaluation.evaluator import evaluate
from recflow.evaluation.gate import (
    CHAMPION,
    Costs,
    Evidence,
    GateConfig,
    Incumbent,
    Parity,
    judge,
)
from recflow.evaluation.metrics import ranking_metrics
from recflow.evaluation.scoring import Predictions
from recflow.evaluation.scoring import Snapshot as Evaluated
from recflow.evaluation.slates import flatten, offsets_of
from recflow.modeling.config import TrainingConfig
from recflow.modeling.encoder import WEIGHTS_NAME
from recflow.modeling.ranker import Ranker, load_ranker
from recflow.modeling.texts import TOKENIZER_NAME, Rows, Vectors
from recflow.modeling.tracking import NullTracker
from recflow.modeling.trainer import train_ranker
from recflow.quality.drift_config import DriftConfig
from recflow.quality.evidence import DriftEvidence
from recflow.quality.trigger import TriggerPolicy, decide

MODELS, SCORES, LOOKS = "backtest/models", "backtest/scores", "backtest/looks"
_CODE_VERSION = "1"
_SCORES = "scores"
_SCORED = pl.List(pl.Float64)
_CANDIDATE = "candidate"
# Requirements of the gate, by name.
_SERVED_AS_JUDGED, _NOT_WORSE = "served_as_judged", "not_worse_than_champion"
_ENCODERS = "backtest/encoders"


@dataclass(frozen=True, slots=True)
class Contest:
    """A candidate and the champion on the same impressions, the test days of a snapshot.

    Attributes:
        snapshot: The candidate's snapshot.
        candidate: Its scores of the test days, ``List(Float64)``, in the order of the split.
        candidate_digest: Digest of its artifact.
        champion: The champion's scores of the same.
        champion_digest: Digest of the champion's artifact.
        champion_of: What the champion learned from.
    """

    snapshot: Snapshot
    candidate: pl.Series
    candidate_digest: str
    champion: pl.Series
    champion_digest: str
    champion_of: Trained


@dataclass(frozen=True, slots=True)
class Look:
    """What was found out about a day.

    Attributes:
        evidence: Its drift.
        seconds: Wall time of measuring that.
        cpu_seconds: Processor time of measuring that.
    """

    evidence: DriftEvidence
    seconds: float
    cpu_seconds: float


class Gate(Protocol):
    """Decides whether a candidate may take the champion's place."""

    def __call__(self, contest: Contest) -> Verdict:
        """Judge."""
        ...


class MeasureDrift(Protocol):
    """Measures the drift of a day against a champion."""

    @property
    def identity(self) -> Mapping[str, JsonValue]:
        """What the result depends on beside the day and the champion."""
        ...

    def __call__(self, day: date, champion: Champion) -> DriftEvidence:
        """Measure; the day's features and the champion's snapshot are in the store."""
        ...


def prepare_days(store: ArtifactStore, source: Source, *, max_history: int) -> list[date]:
    """Read a log into the daily tables that snapshots are cut from, as the assets do.

    Args:
        store: Where the tables are written.
        source: The log.
        max_history: The newest so many items of a logged history are kept.

    Returns:
        The days, ascending.

    Raises:
        ContractError: A day does not meet the contract.
        SourceError: The log cannot be read.
    """
    days = source.days()
    keys = [str(day) for day in days]
    ingest_items(store, RAW_ITEMS, source, keys, code_version=_CODE_VERSION)
    ingest_impressions(store, RAW_IMPRESSIONS, source, keys, code_version=_CODE_VERSION)

    def daily(
        key: str,
        parents: Sequence[str],
        build: Callable[[Mapping[str, Artifact]], pl.DataFrame],
        config: Mapping[str, JsonValue] | None = None,
    ) -> None:
        build_days(
            store,
            key,
            keys,
            lambda inputs: Table(build(inputs)),
            parents=parents,
            code_version=_CODE_VERSION,
            config=config or {},
        )

    def cleaned(inputs: Mapping[str, Artifact]) -> pl.DataFrame:
        known = read_frame(inputs[CLEANED_ITEMS])[Columns.ITEM_ID]
        raw = read_frame(inputs[RAW_IMPRESSIONS])
        return clean_impressions(raw, known, max_history=max_history).rows

    daily(CLEANED_ITEMS, [RAW_ITEMS], lambda i: clean_items(read_frame(i[RAW_ITEMS])).rows)
    daily(
        CLEANED_IMPRESSIONS,
        [RAW_IMPRESSIONS, CLEANED_ITEMS],
        cleaned,
        {"max_history": max_history},
    )
    daily(FEATURES_ITEMS, [CLEANED_ITEMS], lambda i: item_features(read_frame(i[CLEANED_ITEMS])))
    daily(
        FEATURES_IMPRESSIONS,
        [CLEANED_IMPRESSIONS],
        lambda i: impression_features(read_frame(i[CLEANED_IMPRESSIONS])),
    )
    validate_days(store, FEATURES_ITEMS, ITEM_FEATURES, keys)
    validate_days(store, FEATURES_IMPRESSIONS, IMPRESSION_FEATURES, keys)
    return days


@dataclass(frozen=True, slots=True)
class MeasureDriftOfDays:
    """Measures drift as the asset ``monitoring/drift`` does.

    Attributes:
        store: Where the days and the champions' snapshots are.
        window_days: Days whose clicks extend the histories of a day.
        max_history: The newest so many items of a history are kept.
        config: Limits.
        threads: Threads a champion may use.
    """

    store: ArtifactStore
    window_days: int
    max_history: int
    config: DriftConfig
    threads: int

    @property
    def identity(self) -> Mapping[str, JsonValue]:
        """What the result depends on beside the day and the champion."""
        return {
            **cast("dict[str, JsonValue]", asdict(self.config)),
            "ignored": list(self.config.ignored),
            "window_days": self.window_days,
            "max_history": self.max_history,
        }

    def __call__(self, day: date, champion: Champion) -> DriftEvidence:
        """Measure."""
        # Comes with libraries that take seconds to load, which only this policy needs.
        from recflow.adapters.drift import build_drift

        artifact = build_drift(
            self.store,
            str(day),
            champion=champion,
            window=window_keys(str(day), self.window_days),
            max_history=self.max_history,
            config=self.config,
            threads=self.threads,
            code_version=_CODE_VERSION,
        )
        return DriftEvidence.from_facts(day, artifact.digest, artifact.facts)


@dataclass(frozen=True, slots=True)
class JudgeAsPromoted:
    """Judges as the asset ``promotion/gate`` does, as far as nothing has to be served.

    Attributes:
        config: What is required of a candidate.
    """

    config: GateConfig

    def __call__(self, contest: Contest) -> Verdict:
        """Judge."""
        splits, test = contest.snapshot.splits, contest.snapshot.splits.test
        # Validation fits the calibration, which no requirement looks at.
        data = Evaluated(
            items=contest.snapshot.items,
            train=splits.train,
            validation=splits.validation.clear(),
            test=test,
        )
        nothing = pl.DataFrame(schema={Columns.IMPRESSION_ID: pl.String, Columns.SCORES: _SCORED})

        def said(name: str, scores: pl.Series) -> Predictions:
            table = test.select(Columns.IMPRESSION_ID, Columns.TIME)
            ordered = table.with_columns(scores.alias(Columns.SCORES)).sort(
                Columns.TIME, Columns.IMPRESSION_ID, maintain_order=True
            )
            return Predictions(
                scorer=name,
                board="content-only",
                validation=nothing,
                test=ordered.select(Columns.IMPRESSION_ID, Columns.SCORES),
                catalogue=None,
            )

        evaluation = evaluate(
            [said(_CANDIDATE, contest.candidate), said(CHAMPION, contest.champion)],
            data,
            self.config.evaluation({_CANDIDATE: CHAMPION}),
        )
        champion, first = contest.champion_of, cast("datetime", test[Columns.TIME].min())
        decision = judge(
            Evidence(
                candidate=_CANDIDATE,
                digest=contest.candidate_digest,
                first_test_day=first.date(),
                evaluation=evaluation,
                baselines=(),
                incumbent=Incumbent(
                    version=str(champion.snapshot),
                    snapshot=str(champion.snapshot),
                    digest=contest.champion_digest,
                    seen_until=champion.learned_until.date(),
                ),
                costs=Costs(),
                parity=Parity(impressions=0, scores=0, different=0, largest_difference=0.0),
            ),
            self.config,
        )
        judged = [item for item in decision.requirements if item.name != _SERVED_AS_JUDGED]
        failed = [item.reason for item in judged if item.verdict == "failed"]
        compared = [item.reason for item in judged if item.name == _NOT_WORSE]
        return Verdict(not failed, "; ".join(failed or compared))


class StoredWorld:
    """A prepared log with models that are trained when they are first asked for.

    Args:
        store: Where the days are, and everything made of them goes.
        split: How snapshots are cut.
        config: How models are trained.
        base_model: Hugging Face directory of the pretrained encoder.
        cache_directory: Where hidden states are kept between trainings.
        gate: Decides whether a candidate is deployed.
        tell: Receives a line for each piece of work.
    """

    def __init__(
        self,
        store: ArtifactStore,
        *,
        split: SplitConfig,
        config: TrainingConfig,
        base_model: Path,
        cache_directory: Path,
        gate: Gate,
        tell: Callable[[str], None],
    ) -> None:
        self._store, self._split, self._config = store, split, config
        self._base_model, self._cache, self._gate, self._tell = (
            base_model,
            cache_directory,
            gate,
            tell,
        )
        self._base_hash = weights_hash(base_model)
        self._snapshots: dict[date, Snapshot] = {}
        self._models: dict[date, Artifact] = {}
        self._vectors: dict[str, dict[str, Vectors]] = {}

    def snapshot(self, day: date) -> Snapshot:
        """The snapshot that ends with a day, cut when it is first asked for."""
        if day not in self._snapshots:
            build_snapshot(
                self._store,
                str(day),
                window=window_keys(str(day), self._split.window_days),
                config=self._split,
                code_version=_CODE_VERSION,
            )
            self._snapshots[day] = load_snapshot(self._store, str(day))
        return self._snapshots[day]

    def train(self, snapshot: date) -> Trained:
        """The model of a snapshot, trained unless it is stored."""
        facts = self.model(snapshot).facts
        return Trained(
            snapshot=snapshot,
            learned_until=datetime.fromisoformat(str(facts["learned_until"])),
            seconds=_number(facts["seconds"]),
            cpu_seconds=_number(facts["cpu_seconds"]),
        )

    def model(self, snapshot: date) -> Artifact:
        """The artifact of a snapshot's model."""
        if snapshot not in self._models:
            self._models[snapshot] = self._build_model(snapshot)
        return self._models[snapshot]

    def champion(self, model: Trained) -> Champion:
        """A model as drift measures compare with it."""
        artifact = self.model(model.snapshot)
        return Champion(
            version=str(model.snapshot),
            snapshot=str(model.snapshot),
            name=FINE_TUNED.rpartition("/")[2],
            digest=artifact.digest,
            path=artifact.path,
        )

    def quality(self, model: Trained, day: date) -> pl.DataFrame:
        """Metrics of each impression of a day, histories as of each impression."""
        impressions = self.snapshot(day).splits.test
        table = impressions.select(
            Columns.USER_ID,
            (pl.col(Columns.TIME).dt.date() == day).alias("today"),
        ).with_columns(_metrics(impressions, self._scores(model.snapshot, day)))
        return table.filter("today").select(Columns.USER_ID, *METRICS)

    def look(self, model: Trained, day: date, measure: MeasureDrift) -> Look:
        """The drift of a day against a model, measured unless it is stored."""

        def build(draft: Draft) -> None:
            self._tell(f"measuring the drift of {day} against the model of {model.snapshot}")
            began, cpu_began = time.monotonic(), time.process_time()
            found = measure(day, self.champion(model))
            draft.facts |= {
                **found.to_facts(),
                "report": found.digest,
                "seconds": time.monotonic() - began,
                "cpu_seconds": time.process_time() - cpu_began,
            }

        artifact = self._store.build(
            LOOKS,
            f"{day}.{model.snapshot}",
            build,
            code_version=_CODE_VERSION,
            parents={
                MODELS: self.model(model.snapshot),
                **self._store.existing(FEATURES_IMPRESSIONS, [str(day)]),
            },
            config=measure.identity,
        )
        facts = artifact.facts
        return Look(
            evidence=DriftEvidence.from_facts(day, str(facts["report"]), facts),
            seconds=_number(facts["seconds"]),
            cpu_seconds=_number(facts["cpu_seconds"]),
        )

    def admit(self, candidate: Trained, champion: Trained, day: date) -> Verdict:
        """Let the gate compare a candidate with the champion on the snapshot's test days."""
        return self._gate(
            Contest(
                snapshot=self.snapshot(day),
                candidate=self._scores(candidate.snapshot, day),
                candidate_digest=self.model(candidate.snapshot).digest,
                champion=self._scores(champion.snapshot, day),
                champion_digest=self.model(champion.snapshot).digest,
                champion_of=champion,
            )
        )

    def _build_model(self, snapshot: date) -> Artifact:
        data = self.snapshot(snapshot)

        def train(draft: Draft) -> None:
            self._tell(f"training on snapshot {snapshot}")
            splits = data.splits
            learned_until = max(
                cast("datetime", frame[Columns.TIME].max())
                for frame in (splits.train, splits.validation)
            )
            # A training that was killed starts again: what it cost is then measured as a whole.
            began = time.process_time()
            report = train_ranker(
                items=data.items,
                train=splits.train,
                validation=splits.validation,
                base_model=self._base_model,
                output=draft.path,
                config=self._config,
                tracker=NullTracker(),
                cache_directory=self._cache,
            )
            draft.facts |= {
                "learned_until": learned_until.isoformat(),
                "seconds": report.seconds,
                "cpu_seconds": time.process_time() - began,
                "best_validation": report.best_validation,
            }
            self._share(draft.path / WEIGHTS_NAME)

        return self._store.build(
            MODELS,
            str(snapshot),
            train,
            code_version=_CODE_VERSION,
            parents=without_test(data),
            config=cast(
                "dict[str, JsonValue]",
                {**asdict(self._config), "base_model_sha256": self._base_hash},
            ),
        )

    def _share(self, weights: Path) -> None:
        """Keep equal encoders once on disk: a frozen one is the same in every model."""
        shared = self._store.root / _ENCODERS / f"{sha256_of(weights)}.safetensors"
        # Not every file system has hard links; where it has not, each model keeps its copy.
        with contextlib.suppress(OSError):
            if not shared.exists():
                shared.parent.mkdir(parents=True, exist_ok=True)
                shared.hardlink_to(weights)
            else:
                link = weights.with_name(f".{weights.name}")
                link.hardlink_to(shared)
                link.replace(weights)

    def _scores(self, snapshot: date, day: date) -> pl.Series:
        """Scores of the model of one snapshot on the test days of another."""
        data, model = self.snapshot(day), self.model(snapshot)

        def score(draft: Draft) -> None:
            ranker = load_ranker(model.path, threads=self._config.threads)
            scorer = ranker.scorer(
                str(snapshot), data.items, self._lookup(ranker, model, data.items)
            )
            scores = scorer.score(data.splits.test).alias(Columns.SCORES)
            write_frame(draft, _SCORES, scores.to_frame())

        artifact = self._store.build(
            SCORES,
            f"{day}.{snapshot}",
            score,
            code_version=_CODE_VERSION,
            parents={MODELS: model, **{key: data.artifacts[key] for key in (TEST, ITEMS)}},
            config={},
        )
        return read_frame(artifact, _SCORES)[Columns.SCORES]

    def _lookup(
        self, ranker: Ranker, model: Artifact, items: pl.DataFrame
    ) -> Callable[[Rows], Vectors]:
        """Vectors of rows of ``items``; texts are encoded once for all models with one encoder."""
        texts = items[Columns.TEXT]
        encoder = _encoder_of(model)
        if encoder not in self._vectors and self._config.tuning.strategy != "frozen":
            # Each model has an encoder of its own; the walks come back to few of them.
            self._vectors.clear()
        self._vectors.setdefault(encoder, {})
        known = self._vectors[encoder]

        def look_up(rows: Rows) -> Vectors:
            wanted: list[str] = texts.gather(rows).to_list()
            missing = [text for text in dict.fromkeys(wanted) if text not in known]
            if missing:
                known.update(zip(missing, ranker.encode(missing), strict=True))
            return np.stack([known[text] for text in wanted])

        return look_up


@dataclass(frozen=True, slots=True)
class Log:
    """A prepared log and what is to be said of it.

    Attributes:
        name: Its name.
        days: Its days, ascending.
        description: What it is, a sentence.
        events: What happens in it on which day.
    """

    name: str
    days: Sequence[date]
    description: str = ""
    events: Mapping[date, str] = field(default_factory=lambda: {})


def run_backtest(
    log: Log,
    world: StoredWorld,
    *,
    window_days: int,
    measure: MeasureDrift,
    trigger: TriggerPolicy,
    judging: Judging,
    tell: Callable[[str], None],
) -> Backtest:
    """Walk a log never retraining, nightly, on drift, and as often as on drift by the calendar.

    The first window of days makes the model that everybody starts with; the days after it are
    walked.

    Args:
        log: The log.
        world: The same log, with all that can be done with it.
        window_days: Days of a snapshot's window.
        measure: Measures the drift of a day.
        trigger: When drift is reason enough.
        judging: How policies are compared.
        tell: Receives a line for each piece of work.

    Raises:
        ConfigError: The log has no two days behind its first window.
        LeakageError: A model would score a day it has seen.
    """
    start = log.days[0] + timedelta(days=window_days - 1)
    days = [day for day in log.days if day > start]
    if start not in log.days or len(days) < 2:
        raise ConfigError.of(
            "window_days",
            window_days,
            f"so few that a window ends on a day of the log and two days follow it; the log has "
            f"{log.days[0]} to {log.days[-1]}",
        )
    first = world.train(start)

    def walked(policy: Policy) -> Walk:
        tell(f"{log.name}: walking {len(days)} days, policy {policy.name}")
        return walk(days, first=first, policy=policy, world=world, tell=tell)

    walks = [walked(NeverRetrain()), walked(RetrainNightly())]
    on_drift = walked(RetrainOnDrift(world, measure, trigger))
    walks.append(on_drift)
    if on_drift.trainings:
        calendar = evenly_spaced(days[:-1], len(on_drift.trainings))
        walks.append(walked(RetrainOn("evenly_spaced", calendar)))
    return compare(log.name, walks, judging, description=log.description, events=log.events)


class RetrainOnDrift:
    """Retrain when the production's own trigger says so. One instance serves one walk.

    Attributes:
        name: Name of the policy.
        evidence: What was measured so far.
    """

    def __init__(
        self, world: StoredWorld, measure: MeasureDrift, trigger: TriggerPolicy, name: str = "drift"
    ) -> None:
        """Start a walk.

        Args:
            world: Where the champions are.
            measure: Measures the drift of a day.
            trigger: When to retrain.
            name: Name of the policy.
        """
        self.name = name
        self.evidence: list[DriftEvidence] = []
        self._world, self._measure, self._trigger = world, measure, trigger

    def decide(self, day: date, champion: Trained, last_trained: date) -> Choice:
        """Measure the drift of the day against the champion, and ask the trigger."""
        look = self._world.look(champion, day, self._measure)
        self.evidence.append(look.evidence)
        decision = decide(self.evidence, self._trigger, last_retrained=last_trained)
        return Choice(decision.retrain, decision.reason, look.seconds, look.cpu_seconds)


def _metrics(impressions: pl.DataFrame, scores: pl.Series) -> list[pl.Series]:
    values = ranking_metrics(
        flatten(scores).to_numpy(),
        flatten(impressions[Columns.LABELS]).to_numpy(),
        offsets_of(impressions[Columns.LABELS]),
    )
    return [pl.Series(metric, values[metric]) for metric in METRICS]


def _encoder_of(model: Artifact) -> str:
    """Identity of a ranker's encoder; all else that encoding depends on is the configuration's."""
    parts = (WEIGHTS_NAME, TOKENIZER_NAME)
    return " ".join(model.manifest.files[name].sha256 for name in parts)


def _number(value: JsonValue) -> float:
    assert isinstance(value, int | float)
    return float(value)

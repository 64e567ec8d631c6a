"""Evaluations as artifacts: every scorer's predictions, the measured costs, and the report."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import cast

import polars as pl

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.costs import PriceList, cost_section
from recflow.adapters.item_vectors import reported_codecs, stored_codecs
from recflow.adapters.keys import (
    CLEANED_IMPRESSIONS,
    CLEANED_ITEMS,
    COMPRESSED,
    ITEM_VECTORS,
    LABEL_EFFICIENCY_STUDY,
    MEASUREMENTS,
    PREDICTIONS,
    REPORT,
    TEST,
)
from recflow.adapters.label_efficiency import label_shares
from recflow.adapters.models import open_models, require_made_from, weights_hash
from recflow.adapters.parquet_io import total_counts
from recflow.adapters.planning import PlanningConfig
from recflow.adapters.serving_plans import encoding_facts, plan_encoding
from recflow.adapters.snapshots import Snapshot as StoredSnapshot
from recflow.adapters.snapshots import load_snapshot
from recflow.compression.family import ROOT, Family
from recflow.compression.measure import MeasurementConfig, measure
from recflow.compression.vector_store import ItemVectors
from recflow.core.artifacts import Artifact, Draft, JsonValue, library_versions
from recflow.core.columns import Columns
from recflow.core.errors import ArtifactError
from recflow.core.measurement import Energy, Latency, Measurement
from recflow.core.seeding import make_rng
from recflow.data.sources.base import Source
from recflow.data.split import Claim
from recflow.evaluation.baselines import (
    CategoryShareScorer,
    DecayedPopularityScorer,
    PopularityScorer,
    RandomScorer,
    TextSimilarityScorer,
)
from recflow.evaluation.evaluator import Evaluation, EvaluationConfig, evaluate
from recflow.evaluation.report import ReportContext, report_html, report_json, result_table
from recflow.evaluation.report.context import FamilyMember
from recflow.evaluation.scoring import Predictions, Scorer, Snapshot, predict
from recflow.modeling.memory import release_memory
from recflow.modeling.ranker import frozen_item_vectors, load_ranker

# Counters that a nightly job and a stream processor would have: a day old, and ten minutes old.
COUNTER_DELAYS_MINUTES = (24 * 60, 10)
COUNTER_HALF_LIFE_HOURS = 4
CONTENT_BASELINES = (RandomScorer.name, CategoryShareScorer.name, "text_similarity")
HEADLINE_METRICS = ("auc", "mrr", "ndcg@5", "ndcg@10", "log_loss")

logger = logging.getLogger("recflow.evaluation")


@dataclass(frozen=True, slots=True)
class ScoringConfig:
    """How a snapshot is scored.

    Attributes:
        catalogue_sample: Test impressions for which the whole catalogue is ranked.
        seed: Seed of the random baseline and of the sample.
        threads: Threads a model may use.
    """

    catalogue_sample: int
    seed: int
    threads: int


def build_predictions(
    store: ArtifactStore,
    snapshot: str,
    *,
    family: Family,
    base_model: Path,
    config: ScoringConfig,
    code_version: str,
    rebuild: bool = False,
) -> Artifact:
    """Score validation and test with every baseline and every model of the snapshot.

    Raises:
        ArtifactError: A model is missing or altered, or the models do not belong together.
    """
    stored = load_snapshot(store, snapshot)
    models = _models(store, snapshot, stored, family)
    vectors = _item_vectors(store, snapshot, models)

    def build(draft: Draft) -> None:
        data = evaluated(stored)
        for scorer in _scorers(data, models, vectors, base_model, config):
            logger.info("scoring with %s", scorer.name)
            predictions = predict(
                scorer, data, catalogue_sample=config.catalogue_sample, seed=config.seed
            )
            predictions.save(draft.path / scorer.name)
            release_memory()
        draft.facts["scorers"] = [*sorted(path.name for path in draft.path.iterdir())]

    return store.build(
        PREDICTIONS,
        snapshot,
        build,
        code_version=code_version,
        parents={**stored.artifacts, **_by_key(models), ITEM_VECTORS: vectors},
        config={
            **asdict(config),
            "base_model_sha256": weights_hash(base_model),
            "counter_delays_minutes": list(COUNTER_DELAYS_MINUTES),
            "counter_half_life_hours": COUNTER_HALF_LIFE_HOURS,
        },
        rebuild=rebuild,
    )


def build_measurements(
    store: ArtifactStore,
    snapshot: str,
    *,
    family: Family,
    texts: int,
    config: MeasurementConfig,
    code_version: str,
    planning: PlanningConfig | None = None,
    rebuild: bool = False,
) -> Artifact:
    """Measure size, latency, throughput and memory of every model of the snapshot.

    Args:
        store: Where the models are.
        snapshot: Partition of the snapshot.
        family: The models.
        texts: Catalogue texts that are drawn to measure with.
        config: How to measure.
        code_version: Version of the measuring code.
        planning: What is predicted with; the fact ``plan`` holds the predictions beside the
            measurements, by model.
        rebuild: Measure again what was measured.
    """
    stored = load_snapshot(store, snapshot)
    models, items = _models(store, snapshot, stored, family), stored.items

    def build(draft: Draft) -> None:
        sample = items[Columns.TEXT].sample(
            min(texts, items.height), seed=int(make_rng(0, "measured texts").integers(2**31))
        )
        paths = {name: model.path for name, model in models.items()}
        drawn = sample.to_list()
        planned = plan_encoding(family, models, drawn, config, planning or PlanningConfig())
        measurements = measure(paths, drawn, config)
        content = [asdict(measurement) for measurement in measurements]
        text = json.dumps(content, indent=2, sort_keys=True)
        (draft.path / "measurements.json").write_text(text + "\n", encoding="utf-8")
        for measurement in measurements:
            draft.facts[measurement.name] = cast("JsonValue", asdict(measurement))
        draft.facts |= encoding_facts(planned, measurements)

    return store.build(
        MEASUREMENTS,
        snapshot,
        build,
        code_version=code_version,
        parents=_by_key(models),
        config={**asdict(config), "texts": texts},
        rebuild=rebuild,
    )


def build_report(
    store: ArtifactStore,
    snapshot: str,
    *,
    family: Family,
    source: Source,
    window: Sequence[str],
    context: ReportContext,
    config: EvaluationConfig,
    code_version: str,
    catalogue: Path | None = None,
    calibration: Path | None = None,
    rebuild: bool = False,
) -> Artifact:
    """Evaluate the predictions; write ``report.html``, ``report.json`` and ``table.txt``.

    The study of learning with few labels is shown where the snapshot has one.

    Args:
        store: Where predictions, measurements and models are.
        snapshot: Partition of the snapshot.
        family: The models.
        source: The logs; simulated ones know the truth.
        window: Partition keys of the snapshot's days, oldest first.
        context: Title, command and links; what the store knows is filled in here.
        config: How predictions are judged.
        code_version: Version of the reporting code.
        catalogue: The user's own catalogue of devices that costs are planned for, beside recflow's.
        calibration: What a machine was measured to reach, a file of ``recflow probe``.
        rebuild: Write again what is written.

    Raises:
        ArtifactError: Predictions, measurements or a model are missing, altered, or not of this
            snapshot.
        ConfigError: The catalogue or the calibration is wrong.
    """
    prices = PriceList.read(catalogue, calibration)
    predictions = store.get(PREDICTIONS, snapshot)
    measurements = store.get(MEASUREMENTS, snapshot)
    stored = load_snapshot(store, snapshot)
    models = _models(store, snapshot, stored, family)
    vectors = _item_vectors(store, snapshot, models)
    for judged in (predictions, measurements):
        require_made_from(judged, _by_key(models))
    parents = {
        PREDICTIONS: predictions,
        MEASUREMENTS: measurements,
        ITEM_VECTORS: vectors,
        **stored.artifacts,
    }
    study = _label_efficiency_study(store, stored, snapshot)
    if study is not None:
        parents[LABEL_EFFICIENCY_STUDY] = study

    def build(draft: Draft) -> None:
        data = _with_truth(stored, source, window)
        evaluation = evaluate(
            load_predictions(predictions),
            data,
            replace(config, parents=_parents(family, models, vectors)),
        )
        costs = load_measurements(measurements)
        full = replace(
            context,
            days=[day for day in window if day not in _missing_days(stored)],
            missing_days=_missing_days(stored),
            row_counts={key: artifact.facts["rows"] for key, artifact in stored.artifacts.items()},
            quarantine=_quarantine(store, window),
            training={name: _epochs(model) for name, model in models.items() if _epochs(model)},
            label_efficiency=label_shares(study) if study else (),
            family=_family_tree(family, models),
            item_vectors=reported_codecs(vectors),
            costs=cost_section(
                family=family,
                models=models,
                data=stored,
                measurements=costs,
                measured_plans=cast("dict[str, JsonValue]", measurements.facts.get("plan", {})),
                prices=prices,
            ),
            versions=library_versions(),
            parents={key: artifact.digest for key, artifact in parents.items()},
        )
        pages = {
            "report.html": report_html(evaluation, costs, full),
            "report.json": report_json(evaluation, costs, full),
            "table.txt": result_table(evaluation, costs, full) + "\n",
        }
        for name, text in pages.items():
            (draft.path / name).write_text(text, encoding="utf-8")
        draft.facts |= _headline(evaluation)

    return store.build(
        REPORT,
        snapshot,
        build,
        code_version=code_version,
        parents=parents,
        config={**asdict(config), **prices.digests()},
        rebuild=rebuild,
    )


def report_context(data_name: str, snapshot: str) -> ReportContext:
    """What is known of a report before anything is read."""
    return ReportContext(
        title="recflow evaluation",
        data_name=data_name,
        snapshot_date=snapshot,
        command=(
            "dagster asset materialize -m recflow.definitions "
            f"--select 'key:\"{REPORT}\"' --partition {snapshot}"
        ),
    )


def headline(report: Artifact, metric: str | None = None) -> dict[str, float]:
    """Headline numbers of a report: ``scorer.metric``, or by scorer for one ``metric``."""
    numbers = {k: v for k, v in report.facts.items() if isinstance(v, float)}
    if metric is None:
        return numbers
    ending = f".{metric}"
    return {k.removesuffix(ending): v for k, v in numbers.items() if k.endswith(ending)}


def beats_content_baselines(report: Artifact) -> Claim:
    """Claim that the fine-tuned model has a better AUC than each content-only baseline."""
    auc = headline(report, "auc")
    lead = {name: auc["fine_tuned"] - auc[name] for name in CONTENT_BASELINES}
    return Claim(
        name="fine_tuned_beats_content_baselines",
        holds=min(lead.values()) > 0,
        description="AUC of the fine-tuned model less that of each content-only baseline: "
        + ", ".join(f"{name} {difference:+.4f}" for name, difference in lead.items()),
        facts={f"lead_over_{name}": difference for name, difference in lead.items()},
        examples=[],
    )


def evaluated(stored: StoredSnapshot, truth: pl.DataFrame | None = None) -> Snapshot:
    """A stored snapshot as evaluation sees it.

    Args:
        stored: The snapshot.
        truth: What its clicks were drawn from, where the logs know.
    """
    splits = stored.splits
    return Snapshot(
        items=stored.items,
        train=splits.train,
        validation=splits.validation,
        test=splits.test,
        truth=truth,
    )


def load_predictions(artifact: Artifact) -> list[Predictions]:
    """Load the predictions of every scorer."""
    names = cast("list[str]", artifact.facts["scorers"])
    return [Predictions.load(artifact.path / name) for name in names]


def load_measurements(artifact: Artifact) -> list[Measurement]:
    """Load the measured costs of every model.

    Raises:
        ArtifactError: They were measured by another recflow, which measured other things.
    """
    file = artifact.file("measurements.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    try:
        return [
            Measurement(
                **{
                    **entry,
                    "latencies": tuple(Latency(**latency) for latency in entry["latencies"]),
                    "energy": Energy(**entry["energy"]),
                }
            )
            for entry in content
        ]
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"{file} is of another recflow ({error}); materialise {MEASUREMENTS} again"
        ) from error


def _models(
    store: ArtifactStore, snapshot: str, stored: StoredSnapshot, family: Family
) -> dict[str, Artifact]:
    """All models of the family, and the one found for a budget if it descends from their root."""
    models = open_models(store, snapshot, stored, family)
    found = store.existing(COMPRESSED, [snapshot]).get(snapshot)
    if found is not None:
        try:
            models[_name_of(COMPRESSED)] = require_made_from(found, _by_key({ROOT: models[ROOT]}))
        except ArtifactError as error:
            logger.warning("%s; it is left out", error)
    return models


def _by_key(models: Mapping[str, Artifact]) -> dict[str, Artifact]:
    return {model.manifest.key: model for model in models.values()}


def _parents(family: Family, models: Mapping[str, Artifact], vectors: Artifact) -> dict[str, str]:
    """Each model's parent; the root of one found by search, and of stored vectors."""
    from_root = [_vectors_scorer(codec) for codec in stored_codecs(vectors)]
    return {
        **{name: family.parents.get(name, ROOT) for name in models if name != ROOT},
        **dict.fromkeys(from_root, ROOT),
    }


def _item_vectors(store: ArtifactStore, snapshot: str, models: Mapping[str, Artifact]) -> Artifact:
    """The stored item vectors of the root.

    Raises:
        ArtifactError: They are missing or altered, or another model's.
    """
    return require_made_from(store.get(ITEM_VECTORS, snapshot), _by_key({ROOT: models[ROOT]}))


def _vectors_scorer(codec: str) -> str:
    """Name of the root's scores from vectors that were stored with a codec."""
    return f"{ROOT}_vectors_{codec}"


def _family_tree(family: Family, models: Mapping[str, Artifact]) -> list[FamilyMember]:
    """The models in the order of the tree, each with its step and what that changed."""
    members = [FamilyMember(ROOT)]
    for name, variant in family.variants.items():
        members.append(
            FamilyMember(
                name,
                parent=variant.parent,
                step=variant.step.name,
                description=variant.summary,
            )
        )
    found = models.get(_name_of(COMPRESSED))
    if found is not None:
        chain = cast("list[str]", found.facts["chain"])
        members.append(
            FamilyMember(
                _name_of(COMPRESSED),
                parent=ROOT,
                step="search",
                description=" → ".join(chain),
            )
        )
    return members


def _name_of(key: str) -> str:
    return key.rpartition("/")[2]


def _scorers(
    data: Snapshot,
    models: Mapping[str, Artifact],
    stored: Artifact,
    base_model: Path,
    config: ScoringConfig,
) -> Iterator[Scorer]:
    """Every scorer in turn, so that no more than one model is in memory."""
    yield RandomScorer(config.seed)
    yield PopularityScorer(data.train)
    for minutes in COUNTER_DELAYS_MINUTES:
        yield DecayedPopularityScorer(
            [data.train, data.validation, data.test],
            half_life_hours=COUNTER_HALF_LIFE_HOURS,
            delay_minutes=minutes,
        )
    yield CategoryShareScorer(data.items)
    ids, vectors = frozen_item_vectors(base_model, data.items, threads=config.threads)
    yield TextSimilarityScorer(ids, vectors, data.train)
    for name, artifact in models.items():
        yield load_ranker(artifact.path, threads=config.threads).scorer(name, data.items)
    root = load_ranker(models[ROOT].path, threads=config.threads)
    for codec, folder in stored_codecs(stored).items():
        source = ItemVectors.load(folder).source(data.items)
        yield root.scorer(_vectors_scorer(codec), data.items, vectors=source)


def _with_truth(stored: StoredSnapshot, source: Source, window: Sequence[str]) -> Snapshot:
    """The snapshot as evaluation sees it, with the ground truth where the logs have one."""
    end = date.fromisoformat(window[-1]) + timedelta(days=1)
    truth = source.truth(date.fromisoformat(window[0]), end)
    return evaluated(stored, None if truth is None else truth.collect())


def _label_efficiency_study(
    store: ArtifactStore, stored: StoredSnapshot, snapshot: str
) -> Artifact | None:
    """The study of few labels, unless there is none or it saw other splits than these."""
    study = store.existing(LABEL_EFFICIENCY_STUDY, [snapshot]).get(snapshot)
    if study is None:
        return None
    if any(study.manifest.parents[key] != part.digest for key, part in stored.artifacts.items()):
        logger.warning(
            "%s was made from other splits and is left out of the report; materialise it again",
            study.path,
        )
        return None
    return study


def _missing_days(stored: StoredSnapshot) -> list[str]:
    return cast("list[str]", stored.artifacts[TEST].facts["missing_days"])


def _quarantine(store: ArtifactStore, window: Sequence[str]) -> dict[str, int]:
    """Quarantined rows by reason: every day's impressions, and the newest catalogue."""
    impressions = store.existing(CLEANED_IMPRESSIONS, window).values()
    catalogues = list(store.existing(CLEANED_ITEMS, window).values())
    return total_counts([*impressions, *catalogues[-1:]], "quarantined_by_reason")


def _epochs(model: Artifact) -> list[dict[str, float]]:
    """The learning curve of a model that was trained."""
    epochs = cast("list[dict[str, float]]", model.facts.get("epochs", []))
    return [
        {"epoch": number, "loss": e["loss"], "validation": e["validation"]}
        for number, e in enumerate(epochs, start=1)
    ]


def _headline(evaluation: Evaluation) -> dict[str, JsonValue]:
    """The numbers worth following from one report to the next, by scorer and metric."""
    return {
        f"{result.name}.{metric}": estimate.value
        for result in evaluation.scorers
        for metric, estimate in result.metrics.items()
        if metric in HEADLINE_METRICS
    }

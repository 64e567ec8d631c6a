"""The gate as an artifact: what the candidate is held against, and the model that would be served.

The artifact holds the MLflow model itself (``model/``), so that what is promoted is, file by file,
what was judged.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import polars as pl

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.champion import Champion
from recflow.adapters.evaluations import CONTENT_BASELINES, evaluated, load_measurements
from recflow.adapters.keys import GATE, MEASUREMENTS, PREDICTIONS, REPORT
from recflow.adapters.mlflow_registry import (
    Audit,
    Candidate,
    GateRecord,
    ModelRegistry,
    Promotion,
)
from recflow.adapters.models import open_models, require_made_from
from recflow.adapters.pyfunc import NEW_ITEMS, SCORES, load_pyfunc, save_pyfunc
from recflow.adapters.snapshots import load_snapshot
from recflow.compression.family import Family
from recflow.core.artifacts import Artifact, Draft, JsonValue, build_artifact
from recflow.core.columns import Columns
from recflow.core.errors import ArtifactError, PromotionError
from recflow.core.seeding import make_rng
from recflow.data.split import Claim
from recflow.evaluation.calibration import PlattScaling
from recflow.evaluation.evaluator import Evaluation, evaluate
from recflow.evaluation.gate import (
    CHAMPION,
    Costs,
    Evidence,
    GateConfig,
    GateDecision,
    Incumbent,
    Parity,
    judge,
)
from recflow.evaluation.report.gate_page import GatePage, gate_html
from recflow.evaluation.scoring import Predictions, Snapshot, predict
from recflow.modeling.ranker import load_ranker
from recflow.serving.bundle import (
    BundleInfo,
    NewItem,
    catalogue_vectors,
    described_items,
    read_info,
    write_bundle,
)

DECISION_NAME: Final = "gate.json"
PAGE_NAME: Final = "gate.html"
MODEL_FOLDER: Final = "model"

_BUNDLE_KEY: Final = "promotion/bundle"


@dataclass(frozen=True, slots=True)
class GateScoring:
    """How the gate scores.

    Attributes:
        parity_impressions: Test impressions that the served model is asked about.
        seed: Seed of that choice.
        threads: Threads a model may use; the same number repeats the same scores.
    """

    parity_impressions: int = 50
    seed: int = 0
    threads: int | None = None


def build_gate(
    store: ArtifactStore,
    snapshot: str,
    *,
    family: Family,
    candidate: str,
    registry: ModelRegistry,
    cache: Path,
    config: GateConfig,
    scoring: GateScoring,
    code_version: str,
    rebuild: bool = False,
) -> Artifact:
    """Hold a model of a snapshot against the champion; write ``gate.json`` and ``gate.html``.

    A candidate that its gate let through and that has become the champion since is not judged
    again: it would be held against itself.

    Args:
        store: Where models, predictions, measurements and the report are.
        snapshot: Partition of the snapshot.
        family: The models.
        candidate: The one that is put forward.
        registry: Knows the champion.
        cache: Where the champion's files are kept.
        config: What is required.
        scoring: How it is scored.
        code_version: Version of the gate's code.
        rebuild: Judge again what was judged.

    Raises:
        ArtifactError: Something is missing, altered, or made from another model; or the champion's
            files are.
    """
    stored = load_snapshot(store, snapshot)
    model = open_models(store, snapshot, stored, family, [candidate])[candidate]
    of_model = {model.manifest.key: model}
    predictions = require_made_from(store.get(PREDICTIONS, snapshot), of_model)
    measurements = require_made_from(store.get(MEASUREMENTS, snapshot), of_model)
    judged = {PREDICTIONS: predictions, MEASUREMENTS: measurements}
    report = require_made_from(store.get(REPORT, snapshot), judged)
    champion = registry.champion(cache)
    if champion is not None and champion.digest == model.digest and not rebuild:
        earlier = _decided_before(store, snapshot, registry.version(champion.version).gate.digest)
        if earlier is not None:
            return earlier

    def build(draft: Draft) -> None:
        data = evaluated(stored)
        evaluation = _evaluate(predictions, candidate, champion, data, config, scoring)
        _write_model(
            draft.path, model, candidate, snapshot, data, evaluation[candidate].calibration, scoring
        )
        decision = judge(
            Evidence(
                candidate=candidate,
                digest=model.digest,
                first_test_day=_day(data.test, first=True),
                evaluation=evaluation,
                baselines=CONTENT_BASELINES,
                incumbent=None if champion is None else incumbent_of(champion),
                costs=costs_of(candidate, measurements, report),
                parity=check_parity(
                    draft.path / MODEL_FOLDER,
                    model,
                    data,
                    Predictions.load(predictions.path / candidate),
                    scoring,
                ),
            ),
            config,
        )
        text = json.dumps(decision.to_json(), indent=2, sort_keys=True, ensure_ascii=False)
        (draft.path / DECISION_NAME).write_text(text + "\n", encoding="utf-8")
        page = GatePage(
            snapshot=snapshot,
            first_test_day=str(_day(data.test, first=True)),
            impressions=evaluation.counts.evaluated,
            users=evaluation.counts.users,
            parents={key: artifact.digest for key, artifact in parents.items()},
        )
        (draft.path / PAGE_NAME).write_text(gate_html(decision, page), encoding="utf-8")
        draft.facts |= _facts(decision)

    parents = {**of_model, **judged, REPORT: report, **stored.artifacts}
    return store.build(
        GATE,
        snapshot,
        build,
        code_version=code_version,
        parents=parents,
        config={
            **cast("dict[str, JsonValue]", asdict(config)),
            **asdict(scoring),
            "candidate": candidate,
            "champion": "" if champion is None else champion.version,
            "champion_digest": "" if champion is None else champion.digest,
        },
        rebuild=rebuild,
    )


def read_decision(gate: Artifact) -> GateDecision:
    """What a stored gate says.

    Raises:
        ArtifactError: It was written by another recflow.
    """
    file = gate.file(DECISION_NAME)
    try:
        return GateDecision.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{file} is of another recflow ({error}); materialise {GATE} again"
        ) from error


def gate_claim(gate: Artifact) -> Claim:
    """Claim that the candidate may become the champion; every reason is in the description."""
    decision = read_decision(gate)
    verdicts = [item.verdict for item in decision.requirements]
    return Claim(
        name="candidate_may_become_champion",
        holds=decision.passed,
        description="\n".join([f"{decision.candidate}: {decision.outcome}", *decision.reasons]),
        facts={
            "failed": verdicts.count("failed"),
            "passed": verdicts.count("passed"),
            "not_judged": verdicts.count("not_judged"),
        },
        examples=[asdict(item) for item in decision.requirements],
    )


@dataclass(frozen=True, slots=True)
class PromotionOutcome:
    """What came of a candidate that the gate let through.

    Attributes:
        version: Its version in the registry.
        waits: Why it waits for an approval; empty where it is the champion.
        promotion: The promotion, where there was one.
    """

    version: str
    waits: str
    promotion: Promotion | None


def promote_candidate(
    gate: Artifact, registry: ModelRegistry, *, needs_approval: bool, audit: Audit, mlflow_run: str
) -> PromotionOutcome:
    """Register what the gate let through, and make it the champion unless somebody must approve.

    A version that was rolled back always waits for somebody to approve it.

    Args:
        gate: The stored gate.
        registry: Where to register.
        needs_approval: Whether a person decides.
        audit: Who promotes, and why.
        mlflow_run: MLflow run whose artifacts the files become.

    Raises:
        PromotionError: The gate did not let it through, or the champion changed since.
        ArtifactError: The stored model is altered.
    """
    gate.verify()
    decision = read_decision(gate)
    if not decision.passed:
        failed = "; ".join(item.reason for item in decision.failed)
        raise PromotionError(f"the gate of {gate.manifest.partition} is shut: {failed}")
    version = registry.register(candidate_of(gate, decision), audit, mlflow_run=mlflow_run)
    if registry.is_champion(version.version):
        needs_approval = False
    elif version.withdrawn:
        waits = f"it was rolled back: {version.withdrawn}"
        registry.wait_for_approval(version.version, replace(audit, reason=waits))
        return PromotionOutcome(version.version, waits, None)
    if needs_approval:
        waits = "an approval is required"
        registry.wait_for_approval(version.version, replace(audit, reason=waits))
        return PromotionOutcome(version.version, waits, None)
    return PromotionOutcome(version.version, "", registry.promote(version.version, audit))


def candidate_of(gate: Artifact, decision: GateDecision) -> Candidate:
    """What a gate puts forward."""
    return Candidate(
        directory=gate.path / MODEL_FOLDER,
        name=decision.candidate,
        snapshot=gate.manifest.partition,
        digest=decision.digest,
        gate=GateRecord(
            digest=gate.digest,
            champion=decision.champion,
            reasons=decision.reasons,
            metrics=decision.metrics,
        ),
    )


def incumbent_of(champion: Champion) -> Incumbent:
    """The champion as the gate needs it.

    Raises:
        ArtifactError: Its bundle does not say what it has seen.
    """
    return Incumbent(
        version=champion.version,
        snapshot=champion.snapshot,
        digest=champion.digest,
        seen_until=read_info(champion.path.parent).seen_until,
    )


def costs_of(candidate: str, measurements: Artifact, report: Artifact) -> Costs:
    """What was measured and planned of a model; what nobody knows is ``None``."""
    found = next((m for m in load_measurements(measurements) if m.name == candidate), None)
    content = json.loads(report.file("report.json").read_text(encoding="utf-8"))
    models = (content["costs"] or {}).get("models", [])
    price = next((model for model in models if model["name"] == candidate), None)
    usd = None
    if price is not None:
        usd = next(
            (x["usd"] for x in price["serving"] if x["device"] == price["cheapest_serving"]), None
        )
    if found is None:
        return Costs(usd_per_million=usd)
    return Costs(
        p99_ms=next((x.p99 for x in found.latencies if x.batch_size == 1), None),
        memory_mib=found.peak_rss_bytes / 2**20,
        megabytes=found.serving_bytes / 1e6,
        usd_per_million=usd,
    )


def check_parity(
    served: Path, model: Artifact, data: Snapshot, judged: Predictions, scoring: GateScoring
) -> Parity:
    """Ask the served model about test impressions, the way its server is asked, and compare.

    The served model is loaded from its files; requests and answers go through JSON. The other side
    is the model's artifact with a scorer as in training and evaluation, over the snapshot's own
    tables. One more request describes its candidates by their texts.

    Args:
        served: The MLflow model.
        model: Artifact of the model that was judged.
        data: Its snapshot.
        judged: The scores that were judged.
        scoring: Which impressions, and with how many threads.
    """
    loaded = load_pyfunc(served)
    from mlflow.pyfunc.scoring_server import invocations

    schema = loaded.metadata.get_input_schema()
    drawn = _sample(data.test, scoring)
    ranker = load_ranker(model.path, threads=scoring.threads)
    vectors = catalogue_vectors(ranker, data.items)
    scorer = ranker.scorer(CHAMPION, data.items, vectors=vectors.__getitem__)
    compared: list[tuple[str, Any, Any]] = []
    distance = 0.0

    def ask(row: Mapping[str, Any]) -> Any:
        body = json.dumps({"dataframe_records": [row]})
        response = invocations(body, "application/json", loaded, schema)
        answer = json.loads(response.response)["predictions"][0]
        return np.array(answer[SCORES], dtype=np.float64)

    for number in range(drawn.height):
        impression = drawn[number]
        row = impression.row(0, named=True)
        own = _scores(scorer.score(impression))
        compared.append((str(row[Columns.IMPRESSION_ID]), own, ask(_request(row))))
        of_judged = judged.test.filter(pl.col(Columns.IMPRESSION_ID) == row[Columns.IMPRESSION_ID])
        distance = max(distance, _distance(own, _scores(of_judged[Columns.SCORES])))
    if drawn.height:
        row = drawn.row(0, named=True)
        new = _as_new_items(row[Columns.CANDIDATES], data.items)
        renamed = [item.item_id for item in new]
        described = described_items(new)
        table = pl.concat([data.items.select(described.columns), described])
        both = np.concatenate([vectors, ranker.encode(described[Columns.TEXT].to_list())])
        impression = drawn[0].with_columns(pl.Series(Columns.CANDIDATES, [renamed]))
        own = ranker.scorer(CHAMPION, table, vectors=both.__getitem__).score(impression)
        request = {
            **_request(row),
            Columns.CANDIDATES: renamed,
            NEW_ITEMS: [asdict(item) for item in new],
        }
        compared.append(("described by text", _scores(own), ask(request)))
    return _parity(compared, distance)


def _parity(compared: Sequence[tuple[str, Any, Any]], distance: float) -> Parity:
    scores = different = 0
    largest, example = 0.0, ""
    for name, own, served in compared:
        scores += len(own)
        if np.array_equal(own, served):
            continue
        if own.shape != served.shape:
            different += len(own)
            largest = float("inf")
            example = example or f"impression {name}: {len(served)} scores instead of {len(own)}"
            continue
        unlike = own != served
        different += int(unlike.sum())
        largest = max(largest, _distance(own, served))
        at = int(np.flatnonzero(unlike)[0])
        example = example or (
            f"impression {name}, candidate {at}: {served[at]!s} instead of {own[at]!s}"
        )
    return Parity(len(compared), scores, different, largest, example, distance)


def _distance(own: Any, other: Any) -> float:
    same_shape = own.shape == other.shape
    return float(np.abs(own - other).max(initial=0.0)) if same_shape else float("inf")


def _scores(lists: pl.Series) -> Any:
    return np.array(lists[0].to_list(), dtype=np.float64)


def _sample(test: pl.DataFrame, scoring: GateScoring) -> pl.DataFrame:
    size = min(scoring.parity_impressions, test.height)
    drawn = make_rng(scoring.seed, "served impressions").choice(
        test.height, size=size, replace=False
    )
    return test[np.sort(drawn)]


def _request(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in (Columns.HISTORY, Columns.CANDIDATES, Columns.USER_ID)}


def _as_new_items(candidates: Sequence[str], items: pl.DataFrame) -> list[NewItem]:
    """The items under names that no catalogue has, described by their texts."""
    found = items.filter(pl.col(Columns.ITEM_ID).is_in(list(candidates)))
    taken = set(items[Columns.ITEM_ID].to_list())
    new: list[NewItem] = []
    for row in found.iter_rows(named=True):
        name = f"new {row[Columns.ITEM_ID]}"
        while name in taken:
            name = f"new {name}"
        new.append(
            NewItem(
                item_id=name,
                title=row[Columns.TEXT],
                category=row[Columns.CATEGORY],
                subcategory=row[Columns.SUBCATEGORY],
            )
        )
    return new


def _evaluate(
    predictions: Artifact,
    candidate: str,
    champion: Champion | None,
    data: Snapshot,
    config: GateConfig,
    scoring: GateScoring,
) -> Evaluation:
    """The candidate beside the champion or, where there is none, beside the baselines."""
    own = _compared(Predictions.load(predictions.path / candidate))
    if champion is None:
        others = [_compared(Predictions.load(predictions.path / b)) for b in CONTENT_BASELINES]
        parents = dict.fromkeys(CONTENT_BASELINES, candidate)
    else:
        scorer = load_ranker(champion.path, threads=scoring.threads).scorer(CHAMPION, data.items)
        others = [_compared(predict(scorer, data, catalogue_sample=0, seed=scoring.seed))]
        parents = {candidate: CHAMPION}
    return evaluate([own, *others], data, config.evaluation(parents))


def _compared(predictions: Predictions) -> Predictions:
    # Boards are for learning from a comparison; here it is asked which one users should get, and
    # each of them ranks with what it would have then.
    return replace(predictions, board="content-only", catalogue=None)


def _write_model(
    folder: Path,
    model: Artifact,
    candidate: str,
    snapshot: str,
    data: Snapshot,
    calibration: PlattScaling | None,
    scoring: GateScoring,
) -> None:
    info = BundleInfo(
        name=candidate,
        snapshot=snapshot,
        digest=model.digest,
        seen_until=_seen_until(data),
        calibration=calibration,
    )

    def write(draft: Draft) -> None:
        write_bundle(
            draft.path, ranker=model.path, items=data.items, info=info, threads=scoring.threads
        )

    temporary = folder / "bundle"
    bundle = build_artifact(
        temporary,
        write,
        key=_BUNDLE_KEY,
        partition=snapshot,
        code_version="1",
        parents={model.manifest.key: model.digest},
        config={},
    )
    example = _request(data.test.row(0, named=True))
    save_pyfunc(folder / MODEL_FOLDER, bundle.path, example=example, threads=scoring.threads)
    shutil.rmtree(temporary)


def _decided_before(store: ArtifactStore, snapshot: str, digest: str) -> Artifact | None:
    """The stored gate with this digest, if it is whole."""
    try:
        stored = store.get(GATE, snapshot)
    except ArtifactError:
        return None
    return Artifact(stored.path, stored.manifest, reused=True) if stored.digest == digest else None


def _seen_until(data: Snapshot) -> date:
    """Last day that a model of the snapshot is trained or chosen on."""
    parts = [part for part in (data.train, data.validation) if not part.is_empty()]
    return max(_day(part, first=False) for part in parts)


def _day(impressions: pl.DataFrame, *, first: bool) -> date:
    times = impressions[Columns.TIME]
    found = cast("Any", times.min() if first else times.max())
    return found.date()


def _facts(decision: GateDecision) -> dict[str, JsonValue]:
    return {
        "candidate": decision.candidate,
        "outcome": decision.outcome,
        "passed": decision.passed,
        "champion": decision.champion,
        "failed": [item.name for item in decision.failed],
        "reasons": [*decision.reasons],
        **{f"{name}.{decision.config.primary_metric}": v for name, v in decision.metrics.items()},
    }

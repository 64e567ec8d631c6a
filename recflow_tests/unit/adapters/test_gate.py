"""The gate on a stored snapshot: what it writes, and what it does when the served model differs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.evaluations import CONTENT_BASELINES
from recflow.adapters.gate import (
    MODEL_FOLDER,
    GateScoring,
    build_gate,
    check_parity,
    gate_claim,
    promote_candidate,
    read_decision,
)
from recflow.adapters.keys import FINE_TUNED, GATE, MEASUREMENTS, PREDICTIONS, REPORT
from recflow.adapters.mlflow_registry import BUNDLE_PATH, Audit, ModelRegistry
from recflow.adapters.mlflow_tracking import MlflowStore
from recflow.adapters.models import build_fine_tuned
from recflow.adapters.pyfunc import load_pyfunc
from recflow.adapters.snapshots import load_snapshot
from recflow.compression.family import family_from
from recflow.core.artifacts import Artifact, Draft
from recflow.core.errors import ArtifactError, ContractError, PromotionError
from recflow.evaluation.baselines import CategoryShareScorer, RandomScorer
from recflow.evaluation.gate import GateConfig
from recflow.evaluation.scoring import Predictions, Snapshot, predict
from recflow.modeling.ranker import load_ranker
from recflow.modeling.tracking import NullTracker
from recflow.serving.bundle import NewItem, Request, ServedRanker
from recflow_tests.unit.adapters.tiny_snapshot import store_snapshot
from recflow_tests.unit.modeling.tiny import quick, write_base_model

# MLflow 3.17 with SQLAlchemy 2.1; nothing of ours can avoid it.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

DAY = "2026-03-01"
FAMILY = family_from({})
LENIENT = GateConfig(bootstrap_samples=50, min_baseline_lead=-1.0)
SCORING = GateScoring(parity_impressions=8, threads=1)


class World:
    """A store with a snapshot, a model, and everything that the gate reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base_model = write_base_model(folder / "base")
        self.store = ArtifactStore(folder / "store")
        mlflow = MlflowStore(f"sqlite:///{folder}/mlflow/mlflow.db", "tests")
        self.registry = ModelRegistry(mlflow, "tiny")
        self.mlflow_run = mlflow.create_run("run", {})
        store_snapshot(self.store, DAY)
        self.train()

    def train(self, **values: Any) -> None:
        """Train the model, and store what evaluation makes of it."""
        once = {"schedule.head_epochs": 1, "schedule.encoder_epochs": 1}
        model = build_fine_tuned(
            self.store,
            DAY,
            base_model=self.base_model,
            config=quick({**once, **values}),
            tracker=NullTracker(),
            code_version="1",
        )
        self.judge_by(model)

    def judge_by(self, model: Artifact) -> None:
        of_model = {FINE_TUNED: model}
        data = self.data
        scorers = [
            load_ranker(model.path, threads=1).scorer("fine_tuned", data.items),
            RandomScorer(0),
            CategoryShareScorer(data.items),
        ]

        def predictions(draft: Draft) -> None:
            found = [predict(scorer, data, catalogue_sample=0, seed=0) for scorer in scorers]
            # The pretrained encoder's similarity is not what is tested here.
            found.append(replace(found[1], scorer="text_similarity"))
            for one in found:
                one.save(draft.path / one.scorer)

        self._store(PREDICTIONS, predictions, of_model)
        self._store(MEASUREMENTS, _measurements, of_model)
        judged = {key: self.store.get(key, DAY) for key in (PREDICTIONS, MEASUREMENTS)}
        self._store(REPORT, _report, judged)

    def _store(self, key: str, write: Any, parents: dict[str, Artifact]) -> None:
        self.store.build(key, DAY, write, code_version="1", parents=parents, config={})

    @property
    def data(self) -> Snapshot:
        stored = load_snapshot(self.store, DAY)
        splits = stored.splits
        return Snapshot(stored.items, splits.train, splits.validation, splits.test)

    def gate(self, config: GateConfig = LENIENT, **options: Any) -> Artifact:
        return build_gate(
            self.store,
            DAY,
            family=FAMILY,
            candidate="fine_tuned",
            registry=self.registry,
            cache=self.folder / "cache",
            config=config,
            scoring=SCORING,
            code_version="1",
            **options,
        )

    def promote(self, *, needs_approval: bool = False) -> Any:
        return promote_candidate(
            self.store.get(GATE, DAY),
            self.registry,
            needs_approval=needs_approval,
            audit=Audit("a test"),
            mlflow_run=self.mlflow_run,
        )


def _measurements(draft: Draft) -> None:
    content = {
        "name": "fine_tuned",
        "runtime": "torch",
        "threads": 1,
        "size_bytes": 1_000_000,
        "serving_bytes": 2_000_000,
        "parameters": 10,
        "load_seconds": 0.1,
        "texts_per_second": 100.0,
        "throughput_spread": 0.0,
        "latencies": [
            {"batch_size": 1, "p50": 1.0, "p95": 2.0, "p99": 3.0, "samples": 9, "drift": 0.0},
            {"batch_size": 8, "p50": 4.0, "p95": 5.0, "p99": 6.0, "samples": 9, "drift": 0.0},
        ],
        "peak_rss_bytes": 512 * 2**20,
        "energy": {"joules_per_1000_texts": None, "source": "none"},
    }
    (draft.path / "measurements.json").write_text(json.dumps([content]))


def _report(draft: Draft) -> None:
    serving = [{"device": "dear", "usd": 9.0}, {"device": "cheap", "usd": 0.25}]
    models = [{"name": "fine_tuned", "serving": serving, "cheapest_serving": "cheap"}]
    (draft.path / "report.json").write_text(json.dumps({"costs": {"models": models}}))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("gate"))


@pytest.fixture(scope="module")
def gate(world: World) -> Artifact:
    return world.gate()


@pytest.fixture
def served(gate: Artifact, tmp_path: Path) -> Path:
    """A copy of the MLflow model of the gate, to be altered."""
    target = tmp_path / "model"
    shutil.copytree(gate.path / MODEL_FOLDER, target)
    return target


def parity_of(world: World, served: Path) -> Any:
    predictions = world.store.get(PREDICTIONS, DAY)
    judged = Predictions.load(predictions.path / "fine_tuned")
    return check_parity(served, world.store.get(FINE_TUNED, DAY), world.data, judged, SCORING)


def test_the_first_gate_compares_with_every_baseline(gate: Artifact) -> None:
    decision = read_decision(gate)
    assert decision.passed
    assert set(decision.metrics) == {"fine_tuned", *CONTENT_BASELINES}
    assert {f"beats:{name}" for name in CONTENT_BASELINES} <= {
        item.name for item in decision.requirements
    }
    page = gate.file("gate.html").read_text()
    assert all(item.name in page for item in decision.requirements)
    assert gate.facts["outcome"] == "may_become_champion"


def test_what_was_measured_is_held_against_the_budgets(gate: Artifact) -> None:
    seen = {item.name: item.value for item in read_decision(gate).requirements}
    assert seen["max_p99_ms"] == 3.0
    assert seen["max_memory_mib"] == 512.0
    assert seen["max_megabytes"] == 2.0
    assert seen["max_usd_per_million"] == 0.25


def test_the_served_model_says_exactly_what_the_judged_one_says(
    world: World, gate: Artifact
) -> None:
    parity = parity_of(world, gate.path / MODEL_FOLDER)
    # 8 impressions, and one whose candidates are described by their texts.
    assert (parity.impressions, parity.different, parity.largest_difference) == (9, 0, 0.0)
    assert parity.scores > 9
    assert parity.distance_to_judged < 1e-5


def test_other_vectors_are_noticed(world: World, served: Path) -> None:
    file = served / BUNDLE_PATH / "vectors.safetensors"
    vectors = load_file(file)["vectors"]
    # The smallest change that a float32 knows.
    save_file({"vectors": np.nextafter(vectors, np.float32(2.0))}, file)
    parity = parity_of(world, served)
    assert parity.different > 0
    assert 0 < parity.largest_difference < 1e-4
    assert parity.example.startswith("impression ")


def test_other_weights_are_noticed(world: World, served: Path) -> None:
    file = served / BUNDLE_PATH / "ranker" / "user_model.safetensors"
    weights = load_file(file)
    save_file({name: value * np.float32(1.0001) for name, value in weights.items()}, file)
    assert parity_of(world, served).different > 0


def test_other_texts_of_new_items_are_noticed(world: World, served: Path) -> None:
    # A text that is normalised in another way in serving than in training: only the request that
    # describes its items shows it.
    file = served / "served_model.py"
    code = file.read_text()
    altered = code.replace("request_of(row)", "request_of({**row, **lowered(row)})") + (
        "\n\ndef lowered(row):\n"
        "    new = row.get('new_items')\n"
        "    if not isinstance(new, list):\n"
        "        return {}\n"
        "    return {'new_items': [{**item, 'title': 'other ' + item['title']} for item in new]}\n"
    )
    assert altered != code
    file.write_text(altered)
    parity = parity_of(world, served)
    assert parity.different > 0
    assert "described by text" in parity.example


def test_a_shut_gate_lists_its_reasons_and_promotes_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    shut = world.gate(replace(LENIENT, max_megabytes=1.0, max_p99_ms=1.0))
    claim = gate_claim(shut)
    assert not claim.holds
    assert "size: 2 MB on disk; the limit is 1 MB on disk" in claim.description
    assert "latency: 3 ms" in claim.description
    assert claim.facts["failed"] == 2
    with pytest.raises(PromotionError, match="is shut"):
        world.promote()
    assert world.registry.aliases() == {}


def test_a_promoted_candidate_is_not_judged_again_and_the_next_is_compared_with_it(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    first = world.gate()
    judged = read_decision(first).metrics["fine_tuned"]
    assert world.promote().promotion.changed
    champion = world.registry.champion(tmp_path / "cache")
    assert champion is not None
    assert champion.digest == world.store.get(FINE_TUNED, DAY).digest

    again = world.gate()
    assert again.reused
    assert again.digest == first.digest
    assert not world.promote().promotion.changed

    # Judged all the same if that is asked for.
    rebuilt = read_decision(world.gate(rebuild=True))
    assert rebuilt.outcome == "already_champion"
    assert rebuilt.passed

    world.train(seed=5)
    second = read_decision(world.gate(replace(LENIENT, epsilon=0.9, max_segment_loss=0.9)))
    assert second.champion == champion.version
    # The champion scores the snapshot as it did when it was the candidate.
    assert second.metrics["champion"] == pytest.approx(judged, abs=1e-9)
    outcome = world.promote(needs_approval=True)
    assert outcome.promotion is None
    assert "approval" in outcome.waits
    assert world.registry.aliases() == {"champion": "1", "candidate": "2"}
    world.registry.approve(Audit("looks good"))
    assert world.registry.aliases() == {"champion": "2", "previous_champion": "1"}

    # What was rolled back is not promoted again by the next run.
    world.registry.rollback(Audit("clicks fell"))
    world.gate(replace(LENIENT, epsilon=0.9, max_segment_loss=0.9))
    outcome = world.promote()
    assert outcome.promotion is None
    assert "clicks fell" in outcome.waits
    assert world.registry.aliases()["champion"] == "1"


def test_an_altered_gate_is_not_promoted(tmp_path: Path) -> None:
    world = World(tmp_path)
    gate = world.gate()
    file = gate.path / MODEL_FOLDER / "served_model.py"
    file.write_text(file.read_text() + "\n# more\n")
    with pytest.raises(ArtifactError, match="altered"):
        world.promote()


def test_a_bundle_names_items_it_does_not_know(gate: Artifact, world: World) -> None:
    ranker = ServedRanker.load(gate.path / MODEL_FOLDER / BUNDLE_PATH, threads=1)
    known = world.data.items["item_id"][0]
    for request, message in (
        (Request(candidates=[known, "nowhere"]), "item 'nowhere' of candidates"),
        (Request(candidates=[known], history=["gone"]), "item 'gone' of history"),
        (Request(candidates=[]), "at least one item"),
        (Request([known], new_items=[NewItem(known, "a title")]), "in the catalogue already"),
        (Request(["x"], new_items=[NewItem("x", " ")]), "neither a title nor a body"),
        (Request(["x"], new_items=[NewItem("x", "t"), NewItem("x", "t")]), "twice"),
    ):
        with pytest.raises(ContractError, match=message):
            ranker.recommend(request)


def test_rankings_and_probabilities_follow_the_scores(gate: Artifact, world: World) -> None:
    ranker = ServedRanker.load(gate.path / MODEL_FOLDER / BUNDLE_PATH, threads=1)
    row = world.data.test.row(0, named=True)
    found = ranker.recommend(Request(row["candidates"], row["history"], row["user_id"]))
    by_score = sorted(zip(found.scores, row["candidates"], strict=True), key=lambda x: -x[0])
    assert list(found.ranking) == [item for _, item in by_score]
    assert found.probabilities is not None
    order = np.argsort(found.scores)
    assert (np.diff(found.probabilities[order]) >= 0).all()
    assert ((found.probabilities > 0) & (found.probabilities < 1)).all()


def test_the_stored_model_has_a_signature_an_example_and_no_pickle(gate: Artifact) -> None:
    folder = gate.path / MODEL_FOLDER
    model = load_pyfunc(folder)
    inputs = {column.name: column.required for column in model.metadata.get_input_schema().inputs}
    assert inputs == {"history": True, "candidates": True, "user_id": False, "new_items": False}
    example = model.metadata.load_input_example(str(folder))
    answer = model.predict(example)
    assert isinstance(answer["ranking"][0], list)
    pins = (folder / "requirements.txt").read_text().split()
    assert all("==" in pin for pin in pins)
    assert not [p for p in folder.rglob("*") if p.suffix in {".pkl", ".pickle", ".pt"}]

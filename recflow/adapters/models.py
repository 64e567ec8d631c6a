"""Models as artifacts: each is made from a stored snapshot and its parent, once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.keys import FINE_TUNED, TEST
from recflow.adapters.planning import PlanningConfig, require_training
from recflow.adapters.snapshots import Snapshot, load_snapshot
from recflow.adapters.step_plans import require_variant
from recflow.compression.family import ROOT, Family
from recflow.core.artifacts import (
    MANIFEST_NAME,
    Artifact,
    Draft,
    JsonValue,
    fingerprint_of,
    sha256_of,
)
from recflow.core.errors import ArtifactError
from recflow.modeling.config import TrainingConfig
from recflow.modeling.memory import release_memory
from recflow.modeling.reports import TrainingReport
from recflow.modeling.tracking import Tracker
from recflow.modeling.trainer import train_ranker


def build_fine_tuned(
    store: ArtifactStore,
    snapshot: str,
    *,
    base_model: Path,
    config: TrainingConfig,
    tracker: Tracker,
    code_version: str,
    parents: Mapping[str, Artifact] | None = None,
    cache_directory: Path | None = None,
    checkpoints: Path | None = None,
    planning: PlanningConfig | None = None,
    rebuild: bool = False,
) -> Artifact:
    """Fine-tune the pretrained encoder on a snapshot and store the ranker.

    Args:
        store: Where the snapshot is.
        snapshot: Partition of the snapshot.
        base_model: Hugging Face directory of the encoder to start from.
        config: How to train.
        tracker: Told the configuration and the course of the training.
        code_version: Version of the training code.
        parents: What the encoder or the configuration was taken from, beside the snapshot.
        cache_directory: Where hidden states are kept between trainings.
        checkpoints: Folder below which the state of a training is kept until it is done; the same
            training, started again, resumes there.
        planning: What the training is planned with, and what follows where memory is short.
        rebuild: Train again what was trained.

    Raises:
        ArtifactError: The pretrained encoder or the snapshot is missing or not whole.
        HardwareError: The training needs more memory than there is; nothing was begun.
    """
    data = load_snapshot(store, snapshot)

    def train(draft: Draft) -> TrainingReport:
        planned = require_training(
            data, base_model=base_model, config=config, planning=planning or PlanningConfig()
        )
        report = train_ranker(
            items=data.items,
            train=data.splits.train,
            validation=data.splits.validation,
            base_model=base_model,
            output=draft.path,
            config=config,
            tracker=tracker,
            cache_directory=cache_directory,
            checkpoints=checkpoints / FINE_TUNED / draft.fingerprint if checkpoints else None,
        )
        draft.facts |= planned.facts(report)
        return report

    return _build(
        store,
        FINE_TUNED,
        snapshot,
        train,
        parents={**without_test(data), **(parents or {})},
        config={**asdict(config), "base_model_sha256": weights_hash(base_model)},
        tracker=tracker,
        code_version=code_version,
        rebuild=rebuild,
    )


def build_variant(
    store: ArtifactStore,
    snapshot: str,
    family: Family,
    name: str,
    *,
    config: Any,
    tracker: Tracker,
    code_version: str,
    planning: PlanningConfig | None = None,
    rebuild: bool = False,
) -> Artifact:
    """Make one model of the family from its parent, and store it.

    Args:
        store: Where the snapshot and the parent are.
        snapshot: Partition of the snapshot.
        family: The family.
        name: The model.
        config: Configuration of its step.
        tracker: Told the configuration and the course of the step.
        code_version: Version of the step's code.
        planning: What the step is planned with, and what follows where memory is short.
        rebuild: Make again what was made.

    Raises:
        ArtifactError: The parent is missing, altered, or was itself made from other splits or
            another parent than the stored ones.
        ConfigError: The step cannot be taken from this parent.
        HardwareError: The step needs more memory than there is; it was not begun.
        ParityError: An exported model does not reproduce its parent; nothing is stored.
    """
    variant = family.variants[name]
    data = load_snapshot(store, snapshot)
    parent = open_models(store, snapshot, data, family, [variant.parent])[variant.parent]

    def take_step(draft: Draft) -> Any:
        planned = require_variant(
            data,
            kind=variant.step.name,
            parent=parent,
            config=config,
            planning=planning or PlanningConfig(),
        )
        report = variant.step.function()(
            parent=parent.path,
            output=draft.path,
            items=data.items,
            train=data.splits.train,
            validation=data.splits.validation,
            config=config,
            tracker=tracker,
        )
        if planned is not None:
            draft.facts |= planned.facts()
        return report

    return _build(
        store,
        family.key(name),
        snapshot,
        take_step,
        parents={**without_test(data), family.key(variant.parent): parent},
        config={"step": variant.step.name, **asdict(config)},
        tracker=tracker,
        code_version=code_version,
        rebuild=rebuild,
    )


def open_models(
    store: ArtifactStore,
    snapshot: str,
    data: Snapshot,
    family: Family,
    names: Sequence[str] | None = None,
) -> dict[str, Artifact]:
    """Open models of the family that are whole and belong together.

    Args:
        store: Where they are.
        snapshot: Partition of the snapshot.
        data: The snapshot.
        family: The family.
        names: The models wanted; their ancestors are checked too. ``None`` takes all.

    Returns:
        The wanted models by name.

    Raises:
        ArtifactError: One is missing or altered, or was made from other splits or another parent
            than the stored ones.
    """
    splits = without_test(data)
    opened: dict[str, Artifact] = {}

    def opened_model(name: str) -> Artifact:
        if name not in opened:
            sources = dict(splits)
            if name != ROOT:
                parent = family.variants[name].parent
                sources[family.key(parent)] = opened_model(parent)
            opened[name] = require_made_from(store.get(family.key(name), snapshot), sources)
        return opened[name]

    return {name: opened_model(name) for name in (family.names if names is None else names)}


def require_made_from(artifact: Artifact, sources: Mapping[str, Artifact]) -> Artifact:
    """Return the artifact if it was made from exactly these.

    Raises:
        ArtifactError: Names the first that is another one now.
    """
    for key, source in sources.items():
        if artifact.manifest.parents.get(key) != source.digest:
            raise ArtifactError(
                f"{artifact.path} was made from another {key} than the stored one; "
                f"materialise {artifact.manifest.key} again"
            )
    return artifact


def _build(
    store: ArtifactStore,
    key: str,
    snapshot: str,
    make: Callable[[Draft], Any],
    *,
    parents: Mapping[str, Artifact],
    config: Mapping[str, JsonValue],
    tracker: Tracker,
    code_version: str,
    rebuild: bool,
) -> Artifact:
    def build(draft: Draft) -> None:
        # The report holds timings; as facts they stay out of the digest, so that the same inputs
        # give the same digest however fast the machine was.
        draft.facts |= cast("dict[str, JsonValue]", asdict(make(draft)))
        # Where one process makes the whole family, each step would find the holes of all before it.
        release_memory()

    artifact = store.build(
        key,
        snapshot,
        build,
        code_version=code_version,
        parents=parents,
        config=config,
        rebuild=rebuild,
    )
    # Also of a model that was reused: its MLflow run should say what it is.
    tracker.log_params(config)
    results = {k: float(v) for k, v in artifact.facts.items() if isinstance(v, int | float)}
    tracker.log_metrics({f"result.{name}": value for name, value in results.items()}, step=0)
    tracker.log_file(artifact.path / MANIFEST_NAME)
    return artifact


def without_test(data: Snapshot) -> dict[str, Artifact]:
    """What a model may be made from: a model never depends on the test split."""
    return {key: artifact for key, artifact in data.artifacts.items() if key != TEST}


def weights_hash(base_model: Path) -> str:
    """SHA-256 of the weights of a pretrained encoder, of all parts where there are several.

    Raises:
        ArtifactError: It has no weights.
    """
    parts = sorted(base_model.glob("*.safetensors"))
    if not parts:
        raise ArtifactError(
            f"the pretrained encoder {base_model} has no model.safetensors; fetch it with "
            "`recflow data fetch minilm` or set RECFLOW_BASE_MODEL to a folder that has one"
        )
    if len(parts) == 1:
        return sha256_of(parts[0])
    return fingerprint_of("weights", "", "", {part.name: sha256_of(part) for part in parts}, {})

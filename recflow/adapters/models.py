"""Models as artifacts: each is made from a stored snapshot and its parent, once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import cast

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.keys import FINE_TUNED, PRUNED, QUANTIZED, TEST
from recflow.adapters.snapshots import Snapshot, load_snapshot
from recflow.compression.config import PruningConfig
from recflow.compression.prune import PruningReport, prune_ranker
from recflow.compression.quantize import QuantizationConfig, QuantizationReport, quantize_ranker
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
        rebuild: Train again what was trained.

    Raises:
        ArtifactError: The pretrained encoder or the snapshot is missing or not whole.
    """
    data = load_snapshot(store, snapshot)

    def train(draft: Draft) -> TrainingReport:
        return train_ranker(
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

    return _build(
        store,
        FINE_TUNED,
        snapshot,
        train,
        parents={**_without_test(data), **(parents or {})},
        config={**asdict(config), "base_model_sha256": weights_hash(base_model)},
        tracker=tracker,
        code_version=code_version,
        rebuild=rebuild,
    )


def build_pruned(
    store: ArtifactStore,
    snapshot: str,
    *,
    config: PruningConfig,
    tracker: Tracker,
    code_version: str,
    rebuild: bool = False,
) -> Artifact:
    """Prune the fine-tuned ranker of a snapshot and store the smaller one."""
    data = load_snapshot(store, snapshot)
    parent = store.get(FINE_TUNED, snapshot)

    def prune(draft: Draft) -> PruningReport:
        return prune_ranker(
            parent=parent.path,
            output=draft.path,
            items=data.items,
            train=data.splits.train,
            validation=data.splits.validation,
            config=config,
            tracker=tracker,
        )

    return _build(
        store,
        PRUNED,
        snapshot,
        prune,
        parents={**_without_test(data), FINE_TUNED: parent},
        config={**asdict(config)},
        tracker=tracker,
        code_version=code_version,
        rebuild=rebuild,
    )


def build_quantized(
    store: ArtifactStore,
    snapshot: str,
    *,
    config: QuantizationConfig,
    tracker: Tracker,
    code_version: str,
    rebuild: bool = False,
) -> Artifact:
    """Quantize the fine-tuned ranker of a snapshot to int8 and store the ONNX model."""
    data = load_snapshot(store, snapshot)
    parent = store.get(FINE_TUNED, snapshot)

    def quantize(draft: Draft) -> QuantizationReport:
        return quantize_ranker(
            parent=parent.path, output=draft.path, items=data.items, config=config
        )

    return _build(
        store,
        QUANTIZED,
        snapshot,
        quantize,
        parents={**_without_test(data), FINE_TUNED: parent},
        config={**asdict(config)},
        tracker=tracker,
        code_version=code_version,
        rebuild=rebuild,
    )


def _build(
    store: ArtifactStore,
    key: str,
    snapshot: str,
    make: Callable[[Draft], TrainingReport | PruningReport | QuantizationReport],
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


def _without_test(data: Snapshot) -> dict[str, Artifact]:
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

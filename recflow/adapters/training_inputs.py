"""What a training starts from: the encoder and the configuration, and where both came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.keys import ADAPTED_ENCODER, CONFIGURATION
from recflow.adapters.models import weights_hash
from recflow.adapters.search import found_values
from recflow.core.artifacts import Artifact
from recflow.core.errors import ArtifactError
from recflow.modeling.config import TrainingConfig, with_values

Configuration: TypeAlias = Literal["found", "ignore"]
Start: TypeAlias = Literal["pretrained", "adapted"]


@dataclass(frozen=True, slots=True)
class TrainingInputs:
    """What a training starts from beside the snapshot.

    Attributes:
        base_model: Directory of the encoder.
        config: The configuration in force.
        parents: Artifacts that either was taken from, by key.
        found_in: Partition of the found configuration that was read; empty where none was.
        changed: What differs from the defaults, by dotted key.
    """

    base_model: Path
    config: TrainingConfig
    parents: Mapping[str, Artifact]
    found_in: str
    changed: Mapping[str, object]


def training_inputs(
    store: ArtifactStore,
    snapshot: str,
    *,
    base_model: Path,
    defaults: TrainingConfig,
    explicit: Mapping[str, object],
    configuration: Configuration = "found",
    start_from: Start = "pretrained",
) -> TrainingInputs:
    """Decide what to train from.

    A value that was set explicitly wins over a found one, a found one over the default. Found is
    the newest configuration that was searched on this snapshot or an earlier one, never a later
    one: it has seen days that this model is judged on.

    Args:
        store: Where configurations and adapted encoders are.
        snapshot: Partition of the snapshot.
        base_model: Directory of the pretrained encoder.
        defaults: What is used where nothing else is said.
        explicit: Values of the run config, by dotted key.
        configuration: ``found`` or ``ignore``.
        start_from: ``pretrained`` or ``adapted``: the encoder adapted to the snapshot's texts.

    Raises:
        ArtifactError: The adapted encoder is not there or not whole, or was adapted from another
            encoder.
        ConfigError: The values together are impossible.
    """
    parents: dict[str, Artifact] = {}
    found = _newest_configuration(store, snapshot) if configuration == "found" else None
    if found is not None:
        parents[CONFIGURATION] = found
    if start_from == "adapted":
        parents[ADAPTED_ENCODER] = adapted_encoder(store, snapshot, base_model)
        base_model = parents[ADAPTED_ENCODER].path
    changed = {**(found_values(found) if found else {}), **explicit}
    return TrainingInputs(
        base_model=base_model,
        config=with_values(defaults, changed),
        parents=parents,
        found_in=found.manifest.partition if found else "",
        changed=changed,
    )


def adapted_encoder(store: ArtifactStore, snapshot: str, base_model: Path) -> Artifact:
    """The encoder that was adapted from ``base_model`` to the texts of a snapshot.

    Raises:
        ArtifactError: It is not there or not whole, or was adapted from another encoder.
    """
    adapted = store.get(ADAPTED_ENCODER, snapshot)
    if adapted.manifest.config.get("base_model_sha256") != weights_hash(base_model):
        raise ArtifactError(
            f"{adapted.path} was adapted from another encoder than {base_model}; materialise "
            f"{ADAPTED_ENCODER} again"
        )
    return adapted


def _newest_configuration(store: ArtifactStore, snapshot: str) -> Artifact | None:
    # Partition keys are ISO dates: their order is that of time.
    past = [day for day in store.partitions(CONFIGURATION) if day <= snapshot]
    return store.get(CONFIGURATION, past[-1]) if past else None

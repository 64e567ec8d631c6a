"""The state of a training on disk: written whole or not at all, read by any number of processes."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recflow.core.artifacts import (
    JsonValue,
    draft_artifact,
    fingerprint_of,
    read_artifact,
    write_text_atomically,
)
from recflow.core.errors import ArtifactError, ConfigError, TransientError
from recflow.modeling.distribution import spread_like, whole
from recflow.modeling.optimiser import Optimiser
from recflow.modeling.reports import EpochReport

_KEY = "training/checkpoint"
_TENSORS_NAME, _PROGRESS_NAME = "state.safetensors", "progress.json"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@dataclass(slots=True)
class TrainingProgress:
    """How far a training is.

    Attributes:
        phase: Number of the phase, from 0.
        epoch: Epoch within the phase, from 1.
        step: Steps of the epoch that are done.
        steps: Steps of the whole training that are done.
        loss: Sum of the losses of the clicks of the epoch so far.
        clicks: Clicks of the epoch so far.
        texts: Texts encoded with gradient in the epoch so far.
        seconds: Seconds spent on the epoch so far.
        epochs_without_gain: Epochs of the phase since the last better validation.
        epochs: Reports of the epochs that are done.
        best_epoch: Number of the best epoch, from 1 over both phases; 0 where none is done.
        best_validation: Its validation metric.
    """

    phase: int = 0
    epoch: int = 1
    step: int = 0
    steps: int = 0
    loss: float = 0.0
    clicks: int = 0
    texts: int = 0
    seconds: float = 0.0
    epochs_without_gain: int = 0
    epochs: list[EpochReport] = field(default_factory=lambda: [])
    best_epoch: int = 0
    best_validation: float = 0.0

    def next_epoch(self) -> None:
        """Begin the next epoch of the phase."""
        self.epoch += 1
        self.step, self.loss, self.clicks, self.texts, self.seconds = 0, 0.0, 0, 0, 0.0

    def next_phase(self) -> None:
        """Begin the next phase."""
        self.phase += 1
        self.next_epoch()
        self.epoch, self.epochs_without_gain = 1, 0


class Checkpoints:
    """The newest checkpoint of one training, in a folder of its own."""

    def __init__(
        self, directory: Path, *, config: Mapping[str, JsonValue], parents: Mapping[str, str]
    ) -> None:
        """Name what the training is made from.

        Args:
            directory: Folder of the checkpoint.
            config: What decides the trajectory of the training.
            parents: Digests of what it reads.

        Raises:
            ConfigError: Nothing can be written there.
        """
        self._path = directory / "newest"
        self._config, self._parents = dict(config), dict(parents)
        self._fingerprint = fingerprint_of(_KEY, "", "1", self._parents, self._config)
        try:
            write_text_atomically(directory / "README.txt", _README)
        except OSError as error:
            raise ConfigError(f"checkpoints cannot be written to {directory}: {error}") from error

    def load(self) -> tuple[TrainingProgress, dict[str, Tensor]] | None:
        """The newest checkpoint, or ``None`` where there is none.

        Raises:
            ArtifactError: It is damaged, or of a training of other data or configuration.
        """
        if not self._path.exists():
            return None
        stored = read_artifact(self._path)
        if stored.manifest.fingerprint != self._fingerprint:
            raise ArtifactError(
                f"the checkpoint {self._path} belongs to another training: "
                f"{self._first_difference(stored.manifest.config, stored.manifest.parents)}. "
                "Train with what it was made from, or delete the folder to start anew"
            )
        raw = json.loads(stored.file(_PROGRESS_NAME).read_text(encoding="utf-8"))
        raw["epochs"] = [EpochReport(**epoch) for epoch in raw["epochs"]]
        try:
            tensors = load_file(stored.file(_TENSORS_NAME))
        except SafetensorError as error:
            raise ArtifactError(f"{self._path} cannot be read: {error}; delete it") from error
        return TrainingProgress(**raw), tensors

    def save(self, progress: TrainingProgress, tensors: Mapping[str, Tensor]) -> None:
        """Replace the checkpoint.

        Raises:
            TransientError: The disk is full; the checkpoint before is untouched.
        """
        try:
            with draft_artifact(
                self._path,
                key=_KEY,
                partition="",
                fingerprint=self._fingerprint,
                parents=self._parents,
                config=self._config,
            ) as draft:
                save_file(dict(tensors), draft.path / _TENSORS_NAME)
                text = json.dumps(asdict(progress), indent=2)
                (draft.path / _PROGRESS_NAME).write_text(text + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            full = isinstance(error, SafetensorError) or error.errno in _NO_SPACE
            if not full:
                raise
            raise TransientError(
                f"the checkpoint of step {progress.steps} does not fit on the disk of "
                f"{self._path.parent}: {error}. The one before it is whole: make room and run "
                "again to go on from there"
            ) from error

    def remove(self) -> None:
        """Forget the training, which is done."""
        shutil.rmtree(self._path.parent, ignore_errors=True)

    def _first_difference(self, config: Mapping[str, Any], parents: Mapping[str, str]) -> str:
        for name, seen, wanted in (
            ("configuration", _flat(config), _flat(self._config)),
            ("input", dict(parents), self._parents),
        ):
            for key in sorted(seen.keys() | wanted.keys()):
                if seen.get(key) != wanted.get(key):
                    return f"{name} {key} is {wanted.get(key)!r}, there it was {seen.get(key)!r}"
        return "it was written by another version of recflow"


_README = """\
State of a training that has not finished. Run it again to go on from here; delete the folder to
start anew. It is removed when the training is done.
"""


def optimiser_tensors(model: nn.Module, optimiser: Optimiser) -> dict[str, Tensor]:
    """State of AdamW by the names of the weights, whole and on the CPU."""
    state = optimiser.adamw.state
    return {
        f"{name}::{key}": whole(value)
        for name, parameter in model.named_parameters()
        if parameter in state
        for key, value in cast("dict[str, Tensor]", state[parameter]).items()
    }


def load_optimiser(model: nn.Module, optimiser: Optimiser, tensors: Mapping[str, Tensor]) -> None:
    """Put a state of :func:`optimiser_tensors` back."""
    parameters = dict(model.named_parameters())
    for place, value in tensors.items():
        name, key = place.split("::")
        parameter = parameters[name]
        # AdamW counts steps on the CPU, one number a weight.
        kept = value if key == "step" else spread_like(parameter, value)
        optimiser.adamw.state[parameter][key] = kept


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under longer names."""
    return {f"{prefix}{name}": value.contiguous() for name, value in tensors.items()}


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = value
    return found

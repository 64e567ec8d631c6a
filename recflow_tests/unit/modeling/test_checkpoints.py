import errno
import json
from pathlib import Path

import pytest

from recflow.core.artifacts import MANIFEST_NAME
from recflow.core.errors import ArtifactError, ConfigError, TransientError
from recflow.modeling.tracking import NullTracker
from recflow_tests.unit.modeling.conftest import TrainTiny
from recflow_tests.unit.modeling.test_trainer import hashes

HEAD_STEPS = 13  # 400 clicks in batches of 32
EVERY_STEP = {
    "schedule.head_epochs": 1,
    "schedule.encoder_epochs": 2,
    "schedule.checkpoint_seconds": 0.0,
    "user_model.dropout": 0.3,
}


class KilledError(Exception):
    pass


class KillsAt(NullTracker):
    """Ends the training right after a step, as a kill would: nothing gets the chance to tidy up."""

    def __init__(self, step: int) -> None:
        self._step = step

    def log_metrics(self, metrics, step) -> None:
        if step == self._step:
            raise KilledError


@pytest.mark.parametrize(
    ("strategy", "killed_at"),
    [
        ("top_k_layers", (5,)),
        ("top_k_layers", (HEAD_STEPS, HEAD_STEPS + 1)),
        ("top_k_layers", (3, HEAD_STEPS + 7, 2 * HEAD_STEPS + 6)),
        ("adalora", (HEAD_STEPS + 9, 2 * HEAD_STEPS + 6)),
        ("full", (HEAD_STEPS + 4,)),
    ],
)
def test_a_killed_training_goes_on_along_the_same_trajectory(
    strategy: str, killed_at: tuple[int, ...], train_tiny: TrainTiny, tmp_path: Path
) -> None:
    values = {
        **EVERY_STEP,
        "tuning.strategy": strategy,
        "tuning.rank": 2,
        "tuning.initial_rank": 4,
        "optimiser.encoder_learning_rate": 1e-2,
    }
    whole = train_tiny(tmp_path / "whole", values)
    for number, step in enumerate(killed_at):
        with pytest.raises(KilledError):
            train_tiny(
                tmp_path / str(number), values, checkpoints=tmp_path / "c", tracker=KillsAt(step)
            )
    resumed = train_tiny(tmp_path / "resumed", values, checkpoints=tmp_path / "c")
    # The tracker hears of a step before its checkpoint is written.
    assert resumed.resumed_at_step == killed_at[-1] - 1
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "whole")
    for seen, expected in zip(resumed.epochs, whole.epochs, strict=True):
        assert (seen.loss, seen.validation) == (expected.loss, expected.validation)
        assert (seen.clicks, seen.steps, seen.texts) == (
            expected.clicks, expected.steps, expected.texts,
        )  # fmt: skip
    assert not (tmp_path / "c").exists()


@pytest.fixture
def interrupted(train_tiny: TrainTiny, tmp_path: Path) -> Path:
    """Folder of the checkpoint of step 6."""
    with pytest.raises(KilledError):
        train_tiny(tmp_path / "first", EVERY_STEP, checkpoints=tmp_path / "c", tracker=KillsAt(7))
    return tmp_path / "c"


def test_a_checkpoint_of_another_configuration_is_refused(
    interrupted: Path, train_tiny: TrainTiny, tmp_path: Path
) -> None:
    values = {**EVERY_STEP, "objective.negatives": 2}
    with pytest.raises(ArtifactError, match=r"objective\.negatives is 2, there it was 3"):
        train_tiny(tmp_path / "second", values, checkpoints=interrupted)
    assert (interrupted / "newest").exists()


def test_a_checkpoint_of_other_data_is_refused(
    interrupted: Path, train_tiny: TrainTiny, train, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="belongs to another training: input data"):
        train_tiny(tmp_path / "second", EVERY_STEP, checkpoints=interrupted, train=train.head(300))


def test_what_has_no_effect_may_change(
    interrupted: Path, train_tiny: TrainTiny, tmp_path: Path
) -> None:
    values = {**EVERY_STEP, "speed.prefetch_batches": 0, "schedule.checkpoint_seconds": 30.0}
    report = train_tiny(tmp_path / "second", values, checkpoints=interrupted)
    assert report.resumed_at_step == 6


def test_a_damaged_checkpoint_is_refused(
    interrupted: Path, train_tiny: TrainTiny, tmp_path: Path
) -> None:
    state = interrupted / "newest" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"state\.safetensors was altered"):
        train_tiny(tmp_path / "second", EVERY_STEP, checkpoints=interrupted)


def test_a_full_disk_leaves_the_checkpoint_before(
    interrupted: Path, train_tiny: TrainTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (interrupted / "newest" / MANIFEST_NAME).read_text()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("recflow.modeling.checkpoints.save_file", full)
        with pytest.raises(TransientError, match="The one before it is whole"):
            train_tiny(tmp_path / "second", EVERY_STEP, checkpoints=interrupted)
    assert (interrupted / "newest" / MANIFEST_NAME).read_text() == before
    assert [p.name for p in interrupted.iterdir() if p.name.startswith(".")] == []
    assert train_tiny(tmp_path / "third", EVERY_STEP, checkpoints=interrupted).resumed_at_step == 6


def test_an_unwritable_folder_is_named(train_tiny: TrainTiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"checkpoints cannot be written to .*file"):
        train_tiny(tmp_path / "out", EVERY_STEP, checkpoints=tmp_path / "file" / "below")


def test_progress_is_readable(interrupted: Path) -> None:
    progress = json.loads((interrupted / "newest" / "progress.json").read_text())
    assert (progress["phase"], progress["epoch"], progress["step"]) == (0, 1, 6)

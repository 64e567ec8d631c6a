"""What makes training cheap must not change what is learnt."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AttentionInterface

from recflow.core.errors import ConfigError
from recflow.modeling import attention
from recflow_tests.unit.modeling.conftest import TrainTiny
from recflow_tests.unit.modeling.test_distribution import Losses

EXACT = {
    "schedule.head_epochs": 0,
    "schedule.encoder_epochs": 1,
    "speed.precision": "fp32",
    "speed.max_texts_per_step": 0,  # a kept vector would be a stale one
    "objective.negatives": 4,  # all there are: parts of a batch draw theirs apart
}


@pytest.fixture(scope="module")
def losses(
    train_tiny: TrainTiny, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[float]]:
    """Losses of every step with everything on, by strategy."""
    found = {}
    for strategy in ("top_k_layers", "full"):
        heard = Losses()
        output = tmp_path_factory.mktemp(strategy)
        train_tiny(output, EXACT | {"tuning.strategy": strategy}, tracker=heard)
        found[strategy] = list(heard.by_step.values())
    return found


@pytest.mark.parametrize("strategy", ["top_k_layers", "full"])
@pytest.mark.parametrize(
    "switch",
    [
        {"speed.distinct_items": False},
        {"speed.dynamic_padding": False},
        {"speed.length_buckets": False},
        {"speed.cache_hidden_states": False},
        {"speed.open_attention": False},
        {"speed.micro_batches": 3},
        {"speed.gradient_checkpointing": True},
        {"speed.prefetch_batches": 0},
        {
            "speed.distinct_items": False,
            "speed.dynamic_padding": False,
            "speed.length_buckets": False,
            "speed.cache_hidden_states": False,
        },
    ],
    ids=lambda switch: " and ".join(key.removeprefix("speed.") for key in switch),
)
def test_a_switch_changes_no_loss(
    switch: dict[str, object],
    strategy: str,
    losses: dict[str, list[float]],
    train_tiny: TrainTiny,
    tmp_path: Path,
) -> None:
    heard = Losses()
    report = train_tiny(tmp_path, EXACT | {"tuning.strategy": strategy} | switch, tracker=heard)
    np.testing.assert_allclose(list(heard.by_step.values()), losses[strategy], atol=2e-4)
    assert report.precision == "fp32"


@pytest.mark.parametrize("on", [True, False])
def test_attention_is_the_one_that_was_asked_for(
    on: bool, train_tiny: TrainTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    opened = attention.attend
    monkeypatch.setitem(
        AttentionInterface._global_mapping,
        attention.NAME,
        lambda *given, **others: (calls.append(1), opened(*given, **others))[1],
    )
    train_tiny(tmp_path, EXACT | {"speed.open_attention": on})
    assert bool(calls) is on


def test_fewer_texts_a_step_are_encoded(train_tiny: TrainTiny, tmp_path: Path) -> None:
    texts = {}
    for most in (4, 16, 0):
        report = train_tiny(tmp_path / str(most), EXACT | {"speed.max_texts_per_step": most})
        (epoch,) = report.epochs
        texts[most] = epoch.texts / epoch.steps
    assert texts[4] == 4
    assert texts[16] == 16
    assert 16 < texts[0] <= 40  # the toy world has 40 items


def test_overlapping_batches_learn_as_well(train_tiny: TrainTiny, tmp_path: Path) -> None:
    assert train_tiny(tmp_path, {"speed.batching": "overlapping"}).best_validation > 0.85


def test_bf16_is_refused_where_the_processor_has_none(
    train_tiny: TrainTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(ConfigError, match="precision = 'bf16'"):
        train_tiny(tmp_path, {"speed.precision": "bf16"})

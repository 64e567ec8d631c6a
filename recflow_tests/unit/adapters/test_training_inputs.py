"""What a training starts from: explicit values, the found configuration, the defaults."""

import json
from pathlib import Path

import pytest

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.keys import ADAPTED_ENCODER, CONFIGURATION
from recflow.adapters.models import weights_hash
from recflow.adapters.search import CONFIGURATION_NAME
from recflow.adapters.training_inputs import training_inputs
from recflow.core.artifacts import Draft
from recflow.core.errors import ArtifactError, ConfigError
from recflow.modeling.config import TrainingConfig, with_values

DAY = "2024-01-10"
DEFAULTS = TrainingConfig()


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


@pytest.fixture
def base_model(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "base"


def put_configuration(store: ArtifactStore, day: str, **values: object) -> str:
    def write(draft: Draft) -> None:
        text = json.dumps({"values": {key.replace("__", "."): v for key, v in values.items()}})
        (draft.path / CONFIGURATION_NAME).write_text(text)

    return store.build(CONFIGURATION, day, write, code_version="1", parents={}, config={}).digest


def put_adapted(store: ArtifactStore, base_hash: str) -> str:
    def write(draft: Draft) -> None:
        (draft.path / "model.safetensors").write_bytes(b"adapted weights")

    config = {"base_model_sha256": base_hash}
    return store.build(
        ADAPTED_ENCODER, DAY, write, code_version="1", parents={}, config=config
    ).digest


def test_nothing_found_and_nothing_set_are_the_defaults(
    store: ArtifactStore, base_model: Path
) -> None:
    inputs = training_inputs(store, DAY, base_model=base_model, defaults=DEFAULTS, explicit={})
    assert inputs.config == DEFAULTS
    assert inputs.base_model == base_model
    assert inputs.parents == {}
    assert (inputs.found_in, inputs.changed) == ("", {})


def test_explicit_values_win_over_found_ones(store: ArtifactStore, base_model: Path) -> None:
    digest = put_configuration(store, DAY, tuning__rank=4, user_model__dropout=0.1)
    explicit = {"tuning.rank": 8, "tuning.strategy": "lora"}
    inputs = training_inputs(
        store, DAY, base_model=base_model, defaults=DEFAULTS, explicit=explicit
    )
    expected = {"tuning.rank": 8, "tuning.strategy": "lora", "user_model.dropout": 0.1}
    assert inputs.config == with_values(DEFAULTS, expected)
    assert inputs.changed == expected
    assert {key: parent.digest for key, parent in inputs.parents.items()} == {CONFIGURATION: digest}


@pytest.mark.parametrize(
    ("searched", "read"),
    [
        (["2024-01-03", "2024-01-09", "2024-01-11"], "2024-01-09"),
        (["2024-01-09", "2024-01-10"], "2024-01-10"),
        (["2024-01-11"], ""),  # it has seen the day this model is judged on
    ],
)
def test_the_newest_configuration_that_is_not_of_the_future_is_read(
    store: ArtifactStore, base_model: Path, searched: list[str], read: str
) -> None:
    for number, day in enumerate(searched, start=1):
        put_configuration(store, day, tuning__rank=number)
    inputs = training_inputs(store, DAY, base_model=base_model, defaults=DEFAULTS, explicit={})
    assert inputs.found_in == read
    expected = searched.index(read) + 1 if read else DEFAULTS.tuning.rank
    assert inputs.config.tuning.rank == expected


def test_what_is_being_written_is_not_read(store: ArtifactStore, base_model: Path) -> None:
    put_configuration(store, "2024-01-08", tuning__rank=4)
    (store.root / CONFIGURATION / ".2024-01-09.0123.draft").mkdir()
    assert store.partitions(CONFIGURATION) == ["2024-01-08"]


def test_a_found_configuration_can_be_ignored(store: ArtifactStore, base_model: Path) -> None:
    put_configuration(store, DAY, tuning__rank=4)
    inputs = training_inputs(
        store,
        DAY,
        base_model=base_model,
        defaults=DEFAULTS,
        explicit={},
        configuration="ignore",
    )
    assert inputs.config == DEFAULTS
    assert inputs.parents == {}


def test_a_damaged_configuration_is_not_passed_over(store: ArtifactStore, base_model: Path) -> None:
    put_configuration(store, DAY, tuning__rank=4)
    (store.path(CONFIGURATION, DAY) / CONFIGURATION_NAME).write_text("{}")
    with pytest.raises(ArtifactError, match="was altered"):
        training_inputs(store, DAY, base_model=base_model, defaults=DEFAULTS, explicit={})


def test_values_that_do_not_go_together_are_refused(store: ArtifactStore, base_model: Path) -> None:
    put_configuration(store, DAY, tuning__rank=32)
    with pytest.raises(ConfigError, match="initial_rank = 24"):
        training_inputs(
            store,
            DAY,
            base_model=base_model,
            defaults=DEFAULTS,
            explicit={"tuning.strategy": "adalora"},
        )


def test_training_can_start_from_the_adapted_encoder(
    store: ArtifactStore, base_model: Path
) -> None:
    digest = put_adapted(store, weights_hash(base_model))
    inputs = training_inputs(
        store, DAY, base_model=base_model, defaults=DEFAULTS, explicit={}, start_from="adapted"
    )
    assert inputs.base_model == store.path(ADAPTED_ENCODER, DAY)
    assert inputs.parents[ADAPTED_ENCODER].digest == digest


def test_an_adapted_encoder_that_is_missing_or_of_another_origin_is_refused(
    store: ArtifactStore, base_model: Path
) -> None:
    def start() -> None:
        training_inputs(
            store, DAY, base_model=base_model, defaults=DEFAULTS, explicit={}, start_from="adapted"
        )

    with pytest.raises(ArtifactError, match="no complete artifact; materialise it first"):
        start()
    put_adapted(store, "of other weights")
    with pytest.raises(ArtifactError, match="adapted from another encoder than"):
        start()

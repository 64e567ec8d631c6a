"""Run configs made from the library's dataclasses: what may be set, and what is refused when."""

import dataclasses
import re
from typing import Any

import dagster as dg
import pytest

from recflow.compression.family import STEPS
from recflow.core.errors import ConfigError
from recflow.definitions import defs
from recflow.defs.models.assets import FineTuningConfig
from recflow.defs.models.run_config import (
    CHOICES,
    DEFAULTS,
    OF_THE_DEPLOYMENT,
    TrainingKeys,
    own_values,
    run_config,
    training_config,
    training_values,
)
from recflow.defs.resources import settings
from recflow.defs.search.assets import SearchRunConfig
from recflow.defs.studies.assets import (
    ADAPTATION_DEFAULTS,
    AdaptationKeys,
    AdaptationRunConfig,
    StrategiesRunConfig,
)
from recflow.modeling.adaptation_config import AdaptationConfig
from recflow.modeling.config import TrainingConfig, with_values
from recflow.modeling.search_space import check_space, default_space, space_from

pytestmark = pytest.mark.filterwarnings("ignore:Asset job .* materializes assets with varying")


def leaves(defaults: Any, prefix: str = "") -> dict[str, Any]:
    """Every key of a nested dataclass, dotted, with its value."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(defaults):
        value = getattr(defaults, field.name)
        if dataclasses.is_dataclass(value):
            found |= leaves(value, f"{prefix}{field.name}.")
        else:
            found[f"{prefix}{field.name}"] = value
    return found


def field_of(keys: type[dg.Config], dotted: str) -> Any:
    *groups, name = dotted.split(".")
    for group in groups:
        keys = keys.model_fields[group].annotation  # type: ignore[assignment]
    return keys.model_fields[name]


def nested(dotted: str, value: object) -> dict[str, Any]:
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value  # type: ignore[return-value]


def check_launch(job: str, op: str, config: dict[str, Any]) -> None:
    """What Dagster does before it launches a run."""
    dg.validate_run_config(defs.resolve_job_def(job), {"ops": {op: {"config": config}}})


STEP_CONFIGS = [step.config() for step in STEPS.values()]


@pytest.mark.parametrize(
    ("keys", "defaults"),
    [
        (TrainingKeys, DEFAULTS),
        (AdaptationKeys, ADAPTATION_DEFAULTS),
        *((run_config(config, without=OF_THE_DEPLOYMENT), config) for config in STEP_CONFIGS),
    ],
    ids=["training", "adaptation", *STEPS],
)
def test_every_key_of_the_library_can_be_set_and_is_described(
    keys: type[dg.Config], defaults: Any
) -> None:
    for dotted, value in leaves(defaults).items():
        if dotted in OF_THE_DEPLOYMENT:
            assert dotted not in keys.model_fields
            continue
        description = field_of(keys, dotted).description
        assert description.endswith(f" Default: {value}.")
        assert len(description) > len(f" Default: {value}.") + 10
        assert "``" not in description


def test_every_key_with_few_values_is_checked_at_launch() -> None:
    texts = {
        dotted.split(".")[-1]
        for dotted, value in leaves(TrainingConfig()).items() | leaves(AdaptationConfig()).items()
        if isinstance(value, str)
    }
    texts |= {
        f"{type(config).__name__}.{key}"
        for config in STEP_CONFIGS
        for key, value in leaves(config).items()
        if isinstance(value, str)
    }
    assert texts - {"device"} == set(CHOICES)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tuning": {"strategy": "lora", "rank": 8}, "max_tokens": 32, "rebuild": True},
        {"schedule": {"primary_metric": "ndcg@10"}, "speed": {"max_texts_per_step": 0}},
        {"configuration": "ignore", "start_from": "adapted"},
    ],
)
def test_possible_values_are_launched(config: dict[str, Any]) -> None:
    check_launch("train", "models__fine_tuned", config)


@pytest.mark.parametrize(
    ("job", "op", "config", "sentence"),
    [
        ("train", "models__fine_tuned", {"tuning": {"strategy": "magic"}}, "magic"),
        ("train", "models__fine_tuned", {"tuning": {"ranks": 8}}, '"ranks"'),
        ("train", "models__fine_tuned", {"tuning": {"rank": "8"}}, '"8"'),
        ("train", "models__fine_tuned", {"strategy": "lora"}, '"strategy"'),
        ("train", "models__fine_tuned", {"schedule": {"primary_metric": "accuracy"}}, "ndcg@10"),
        ("train", "models__fine_tuned", {"configuration": "newest"}, "'found', 'ignore'"),
        ("train", "models__fine_tuned", {"start_from": "scratch"}, "'pretrained', 'adapted'"),
        ("train", "models__fine_tuned", {"seed": 3}, '"seed"'),
        ("search", "models__configuration", {"minutes": "many"}, '"many"'),
        ("search", "models__configuration", {"pooling": "max"}, "last_token"),
        ("studies", "studies__strategies", {"strategies": ["frozen", "magic"]}, "adalora"),
        ("studies", "models__adapted_encoder", {"method": "magic"}, "masked_language"),
        ("studies", "studies__label_efficiency", {"shares": ["all"]}, '"all"'),
    ],
)
def test_an_impossible_choice_is_refused_when_the_run_is_launched(
    job: str, op: str, config: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(dg.DagsterInvalidConfigError, match=re.escape(sentence)):
        check_launch(job, op, config)


def test_what_is_not_set_stays_unset() -> None:
    assert training_values(FineTuningConfig()) == {}
    assert training_config(FineTuningConfig()) == DEFAULTS
    assert DEFAULTS.user_model.history_length == settings.max_history
    assert (DEFAULTS.seed, DEFAULTS.threads) == (settings.seed, settings.threads)


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("tuning.strategy", "adapters"),
        ("max_tokens", 32),
        ("optimiser.layer_decay", 0.9),
        ("speed.cache_hidden_states", False),
        ("distribution.processes", 2),
    ],
)
def test_what_is_set_reaches_the_library(dotted: str, value: object) -> None:
    """Through Dagster's own parsing, as in a run."""
    seen: list[TrainingConfig] = []

    @dg.op
    def train(config: FineTuningConfig) -> None:
        assert training_values(config) == {dotted: value}
        seen.append(training_config(config))

    @dg.job
    def job() -> None:
        train()

    run_config = {"ops": {"train": {"config": nested(dotted, value)}}}
    assert job.execute_in_process(run_config=run_config).success
    assert seen == [with_values(DEFAULTS, {dotted: value})]


def test_numbers_that_cannot_be_are_refused_by_the_library_before_any_work() -> None:
    config = FineTuningConfig(tuning={"rank": 0})  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="rank = 0 is not allowed; allowed: at least 1"):
        training_config(config)


def test_keys_of_the_asset_are_not_taken_for_the_librarys() -> None:
    config = SearchRunConfig(max_trials=3, space={"a": 1}, rebuild=True)
    assert training_values(config) == {}
    assert own_values(AdaptationRunConfig(), AdaptationKeys) == {}
    assert training_values(StrategiesRunConfig()) == {}


def test_the_default_space_is_the_librarys_and_fits_the_defaults() -> None:
    space = space_from(SearchRunConfig().space)
    assert space == default_space()
    check_space(space, DEFAULTS)

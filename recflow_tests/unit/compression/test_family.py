from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recflow.compression.config import DistillationConfig
from recflow.compression.family import (
    DEFAULT_FAMILY,
    ROOT,
    STEPS,
    check_chain,
    family_from,
    load_family,
    with_deployment,
)
from recflow.core.errors import ConfigError


def distilled(**values: Any) -> dict[str, Any]:
    return {"distilled": {"parent": ROOT, "step": "distill", **values}}


def test_the_default_family_has_every_kind_of_step_and_a_chain_of_three() -> None:
    family = load_family()
    assert {variant.step.name for variant in family.variants.values()} == set(STEPS)
    assert max(len(family.chain(name)) for name in family.variants) >= 3
    assert family.names[0] == ROOT


def test_every_step_has_a_function_that_can_be_imported() -> None:
    for step in STEPS.values():
        assert callable(step.function())
        step.config()  # its defaults are possible


def test_models_come_after_their_parents_wherever_they_stand_in_the_file() -> None:
    family = family_from(
        {
            "small": {"parent": "trimmed", "step": "quantize"},
            "trimmed": {"parent": "distilled", "step": "trim"},
            **distilled(layers=2),
        }
    )
    assert list(family.variants) == ["distilled", "trimmed", "small"]
    assert family.steps("small") == ["distill", "trim", "quantize"]
    assert family.parents == {"distilled": ROOT, "trimmed": "distilled", "small": "trimmed"}
    assert family.variants["distilled"].config == DistillationConfig(layers=2)


def test_keys_name_the_folder_but_the_root_stays_where_it_is() -> None:
    family = family_from(distilled(), folder="searched")
    assert family.key("distilled") == "searched/distilled"
    assert family.key(ROOT) == "models/fine_tuned"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": {"parent": ROOT, "step": "shrink"}}, "a.step = 'shrink' is not allowed"),
        ({"a": {"parent": ROOT}}, "a.step = None is not allowed"),
        ({"a": {"parent": "b", "step": "trim"}}, "a.parent = 'b' is not allowed"),
        ({"a": "trim"}, "a = 'trim' is not allowed"),
        ({"A b": {"parent": ROOT, "step": "trim"}}, "lower-case letters"),
        ({"compressed": {"parent": ROOT, "step": "trim"}}, "a name other than"),
        (distilled(depth=3), "distilled: depth = 3 is not allowed; allowed: one of the keys"),
        (distilled(layers="three"), "a value of type int"),
        (distilled(layers=0), "layers = 0 is not allowed; allowed: at least 1"),
        (distilled(seed=1), "the setting RECFLOW_SEED"),
        ({"a": {"parent": ROOT, "step": "low_rank", "ratio": 1.5}}, "ratio = 1.5 is not allowed"),
        ({"a": {"parent": ROOT, "step": "low_rank", "ratio": 0.0}}, "above 0 and below 1"),
        (
            {"a": {"parent": "b", "step": "trim"}, "b": {"parent": "a", "step": "prune"}},
            "a, b descend from each other in a circle",
        ),
        ({"a": {"parent": "a", "step": "trim"}}, "in a circle"),
        (
            {
                "int8": {"parent": ROOT, "step": "quantize"},
                "student": {"parent": "int8", "step": "distill"},
            },
            "student: chain = 'quantize → distill' is not allowed; allowed: distill after",
        ),
    ],
)
def test_a_family_that_cannot_be_is_refused_with_a_sentence(
    content: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        family_from(content)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    "chain", [["trim", "trim"], ["low_rank", "prune"], ["sparsify", "distill"], ["quantize"] * 2]
)
def test_chains_that_make_no_sense(chain: list[str]) -> None:
    with pytest.raises(ConfigError, match="is not allowed"):
        check_chain(chain)


@given(st.lists(st.sampled_from([*STEPS]), max_size=5))
def test_an_allowed_chain_quantizes_last_or_not_at_all(chain: list[str]) -> None:
    try:
        check_chain(chain)
    except ConfigError:
        return
    assert "quantize" not in chain[:-1]
    check_chain(chain[:-1])  # whatever leads to an allowed chain is allowed


@pytest.mark.parametrize("content", [None, b"\xff", b"[distilled\n", b'[a]\nparent = "b"'])
def test_a_file_that_is_no_family_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "mine.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"mine\.toml"):
        load_family(file)


def test_the_deployment_decides_what_a_step_knows() -> None:
    steps = load_family(DEFAULT_FAMILY).variants
    config = with_deployment(steps["distilled"].config, seed=7, threads=3)
    assert (config.seed, config.threads) == (7, 3)
    for variant in steps.values():
        with_deployment(variant.config, seed=7, threads=3)

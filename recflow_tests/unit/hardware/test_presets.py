import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from recflow.core.errors import ArtifactError, ConfigError
from recflow.hardware.presets import PRESETS, find_shape, preset_config
from recflow.hardware.shape import EncoderShape
from recflow.modeling.architectures import ARCHITECTURES

# Parameters without pooler and language-model head, as the model cards round them.
MILLIONS = {
    "all-MiniLM-L6-v2": 22.6,
    "all-MiniLM-L12-v2": 33.2,
    "bert-base-uncased": 108.9,
    "bert-large-uncased": 334.1,
    "roberta-base": 124.1,
    "xlm-roberta-base": 277.5,
    "distilbert-base-uncased": 66.4,
    "mpnet-base": 108.9,
    "electra-small-discriminator": 13.5,
    "ModernBERT-base": 149.0,
    "ModernBERT-large": 394.8,
    "Qwen3-0.6B": 596.0,
    "Qwen3-8B": 7568.4,
    "Meta-Llama-3-8B": 7504.9,
}


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


def test_every_file_is_a_preset() -> None:
    folder = files("recflow.hardware").joinpath("presets")
    names = {Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".json")}
    assert names == set(PRESETS) == set(MILLIONS)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets_have_the_published_size(preset: str) -> None:
    shape = find_shape(preset)
    assert shape.parameters / 1e6 == pytest.approx(MILLIONS[preset], abs=0.06)
    assert shape.model_type in ARCHITECTURES


@pytest.mark.parametrize("preset", list(PRESETS))
def test_names_count_with_or_without_the_owner_in_any_case(preset: str) -> None:
    expected = preset_config(preset)
    for name in PRESETS[preset]:
        for written in (name, name.rpartition("/")[2], name.upper()):
            assert preset_config(written) == expected


def test_no_name_stands_for_two_presets() -> None:
    names = [
        spelling
        for preset, others in PRESETS.items()
        for spelling in {n.lower().rpartition("/")[2] for n in (preset, *others)}
    ]
    assert len(names) == len(set(names))


def test_a_folder_comes_before_a_preset(tmp_path: Path) -> None:
    config = preset_config("bert-base-uncased")
    assert config is not None
    folder = tmp_path / "roberta-base"
    folder.mkdir()
    assert find_shape("roberta-base").model_type == "roberta"  # an empty folder is no model
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert find_shape("roberta-base").layers == 3
    assert find_shape(str(folder / "config.json")).layers == 3


def _cache(hub: Path, name: str, config: str, revision: str = "a1b2") -> None:
    folder = hub / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    (folder / "snapshots" / revision).mkdir(parents=True)
    (folder / "snapshots" / revision / "config.json").write_text(config)


def test_a_downloaded_model_is_found_without_the_network(tmp_path: Path) -> None:
    config = preset_config("Qwen3-0.6B")
    assert config is not None
    _cache(tmp_path / "hub", "someone/tiny", json.dumps({**config, "num_hidden_layers": 2}))
    assert find_shape("someone/tiny").layers == 2
    # The cached configuration is newer than the preset of the same name.
    _cache(tmp_path / "hub", "Qwen/Qwen3-8B", json.dumps({**config, "num_hidden_layers": 5}))
    assert find_shape("Qwen/Qwen3-8B").layers == 5
    _cache(tmp_path / "hub", "someone/broken", "{")
    with pytest.raises(ArtifactError, match="broken"):
        find_shape("someone/broken")


@pytest.mark.parametrize(
    "variables",
    [{"HF_HOME": "{0}"}, {"HUGGINGFACE_HUB_CACHE": "{0}/hub"}, {"XDG_CACHE_HOME": "{1}"}],
)
def test_the_cache_is_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str]
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "huggingface"
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(home, tmp_path))
    _cache(home / "hub", "someone/tiny", json.dumps(preset_config("mpnet-base")))
    assert find_shape("someone/tiny").model_type == "mpnet"


@pytest.mark.parametrize(
    "name", ["../../etc", "no-such-model", "a/b/c", "", "someone/..%2f", "t5-base"]
)
def test_an_unknown_model_is_refused_with_the_presets(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_shape(name)
    assert str(error.value).startswith(f"model = {name!r} is not allowed; allowed: a folder")
    assert str(error.value).endswith(", ".join(PRESETS))


def test_an_unsupported_family_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ConfigError, match="model_type = 't5'"):
        find_shape(str(tmp_path))


def test_reading_sizes_imports_nothing_heavy() -> None:
    script = (
        "import sys; from recflow.hardware.presets import find_shape; find_shape('Qwen3-8B'); "
        "print(sorted({'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_shapes_are_equal_where_names_share_a_preset() -> None:
    assert find_shape("intfloat/e5-base-v2") == find_shape("bert-base-uncased")
    assert isinstance(find_shape("MiniLM-L6"), EncoderShape)

"""Sizes of well-known encoders, so that one can be planned for before it is downloaded.

Each preset holds the keys of the model's public ``config.json`` that decide sizes, as published on
the Hugging Face hub under the first of its names.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from recflow.core.errors import ConfigError
from recflow.hardware.shape import CONFIG_NAME, EncoderShape

# Other models of exactly the same sizes share a preset.
PRESETS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "all-MiniLM-L6-v2": (
            "sentence-transformers/all-MiniLM-L6-v2",
            "nreimers/MiniLM-L6-H384-uncased",
            "MiniLM-L6",
        ),
        "all-MiniLM-L12-v2": (
            "sentence-transformers/all-MiniLM-L12-v2",
            "microsoft/MiniLM-L12-H384-uncased",
            "intfloat/e5-small-v2",
            "BAAI/bge-small-en-v1.5",
            "MiniLM-L12",
        ),
        "bert-base-uncased": (
            "google-bert/bert-base-uncased",
            "intfloat/e5-base-v2",
            "BAAI/bge-base-en-v1.5",
        ),
        "bert-large-uncased": ("google-bert/bert-large-uncased",),
        "roberta-base": ("FacebookAI/roberta-base",),
        "xlm-roberta-base": ("FacebookAI/xlm-roberta-base",),
        "distilbert-base-uncased": ("distilbert/distilbert-base-uncased",),
        "mpnet-base": ("microsoft/mpnet-base", "sentence-transformers/all-mpnet-base-v2"),
        "electra-small-discriminator": ("google/electra-small-discriminator",),
        "ModernBERT-base": ("answerdotai/ModernBERT-base",),
        "ModernBERT-large": ("answerdotai/ModernBERT-large",),
        "Qwen3-0.6B": ("Qwen/Qwen3-0.6B",),
        "Qwen3-8B": ("Qwen/Qwen3-8B",),
        "Meta-Llama-3-8B": (
            "meta-llama/Meta-Llama-3-8B",
            "meta-llama/Meta-Llama-3-8B-Instruct",
            "Llama-3-8B",
        ),
    }
)
_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def preset_config(name: str) -> dict[str, Any] | None:
    """The configuration of a well-known encoder; ``None`` where there is no preset.

    Args:
        name: Name on the hub, with or without its owner, in any case.
    """
    preset = _by_name().get(name.lower())
    if preset is None:
        return None
    folder = files("recflow.hardware").joinpath("presets")
    return json.loads(folder.joinpath(f"{preset}.json").read_text(encoding="utf-8"))


def find_shape(model: str) -> EncoderShape:
    """Sizes of an encoder, without the network.

    Args:
        model: A folder with a ``config.json``, such a file, the name of a model in the local cache
            of the Hugging Face hub, or a preset; the first that is there.

    Raises:
        ArtifactError: The file that was found is not JSON.
        ConfigError: Nothing was found, or its family is not supported.
    """
    place = Path(model).expanduser()
    if (place / CONFIG_NAME).is_file() or place.is_file():
        return EncoderShape.read(place)
    cached = _cached_config(model)
    if cached is not None:
        return EncoderShape.read(cached)
    config = preset_config(model)
    if config is not None:
        return EncoderShape.from_config(config)
    allowed = f"a folder with a {CONFIG_NAME}, such a file, a model in the local Hugging Face cache"
    raise ConfigError.of("model", model, f"{allowed}, or one of {', '.join(PRESETS)}")


@cache
def _by_name() -> Mapping[str, str]:
    """Presets by full name and by last path component, in lower case."""
    found: dict[str, str] = {}
    for preset, names in PRESETS.items():
        for name in (preset, *names):
            found[name.lower()] = preset
            found[name.lower().rpartition("/")[2]] = preset
    return MappingProxyType(found)


def _cached_config(model: str) -> Path | None:
    """The configuration of a downloaded model, where the hub's library keeps it.

    Layout and environment variables are those of
    https://huggingface.co/docs/huggingface_hub/guides/manage-cache; the library itself takes longer
    to import than the whole plan.
    """
    if not _HUB_NAME.fullmatch(model):
        return None
    folder = _hub_cache() / f"models--{model.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    config = folder / "snapshots" / revision / CONFIG_NAME
    return config if re.fullmatch(r"[0-9a-f]+", revision) and config.is_file() else None


def _hub_cache() -> Path:
    for name, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if value := os.environ.get(name):
            return Path(value).expanduser() / below
    cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache_home).expanduser() / "huggingface" / "hub"

"""Where a pretrained model comes from: a folder, or the Hugging Face hub. Loads no PyTorch."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from recflow.core.errors import ArtifactError, TransientError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# Never .bin: those files are pickles.
_FILES = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "model*.safetensors",
    "model.safetensors.index.json",
]


def resolve_base_model(name: str | Path) -> Path:
    """The directory of a pretrained model; one of the hub is downloaded once and kept.

    Args:
        name: An existing directory, or a hub id ``organisation/model``.

    Raises:
        ArtifactError: It is neither, or the hub has no such model for this user.
        TransientError: The hub cannot be reached and the model was not downloaded before.
    """
    if Path(name).is_dir():
        return Path(name)
    hub_id = str(name)
    if not _HUB_ID.fullmatch(hub_id):
        raise ArtifactError(
            f"base model {hub_id!r} is neither a directory nor a hub id like organisation/model; "
            "`recflow data fetch minilm` fetches the default one"
        )
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=_FILES))
    except RepositoryNotFoundError as error:
        raise ArtifactError(
            f"base model {hub_id!r} is neither a directory nor a model of the Hugging Face hub "
            "that you may read; check the name, or log in where access is restricted"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise TransientError(
            f"base model {hub_id!r} is not a directory and cannot be downloaded: {error}; "
            "try again with a connection, or give the directory of a downloaded model"
        ) from error

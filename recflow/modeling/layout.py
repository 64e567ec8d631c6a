"""The files of a stored ranker and its ``config.json``. Loads no PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recflow.core.errors import ArtifactError

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
ONNX_NAME = "model.onnx"
LAYOUT = 2
TORCH, ONNXRUNTIME = "torch", "onnxruntime"

BF16 = "bf16"
"""The ``precision`` of a ranker whose encoder PyTorch executes in bfloat16."""


def read_ranker_config(path: Path) -> dict[str, Any]:
    """Read and check a ranker's ``config.json``.

    Raises:
        ArtifactError: It is missing, not JSON, or of an unknown layout or runtime.
    """
    file = path / CONFIG_NAME
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{file} is missing; {path} is not a ranker") from None
    except ValueError as error:
        raise ArtifactError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("layout") != LAYOUT:
        raise ArtifactError(f"{file} is not of layout {LAYOUT}, the one this recflow reads")
    if config.get("runtime") not in (TORCH, ONNXRUNTIME):
        raise ArtifactError(
            f"{file} has runtime {config.get('runtime')!r}; known: {TORCH}, {ONNXRUNTIME}"
        )
    return config

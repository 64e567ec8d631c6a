"""Readers of log formats; each yields the same two tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from recflow.core.errors import ConfigError
from recflow.data.sources.base import RawTable, Source
from recflow.data.sources.ebnerd import EbnerdSource
from recflow.data.sources.mind import MindSource
from recflow.data.sources.movielens import MovielensSource
from recflow.data.sources.simulated import SimulatedSource

__all__ = ["SOURCE_NAMES", "RawTable", "Source", "open_source"]

_SOURCES: Final[Mapping[str, Callable[[Path], Source]]] = {
    "simulated": SimulatedSource,
    "mind": MindSource,
    "ebnerd": EbnerdSource,
    "movielens": MovielensSource,
}
SOURCE_NAMES: Final = tuple(_SOURCES)


def open_source(name: str, directory: Path) -> Source:
    """Open the logs in a folder.

    Args:
        name: Their format, one of ``SOURCE_NAMES``.
        directory: Folder of the files.

    Raises:
        ConfigError: There is no such format.
        SourceError: The folder or a file in it is missing, empty, or of another format.
    """
    if name not in _SOURCES:
        raise ConfigError.of("source", name, ", ".join(SOURCE_NAMES))
    return _SOURCES[name](directory)

"""Names of the files of a bundle; importing them loads nothing."""

from __future__ import annotations

from typing import Final

RANKER_FOLDER: Final = "ranker"
ITEMS_NAME: Final = "items.parquet"
VECTORS_NAME: Final = "vectors.safetensors"
INFO_NAME: Final = "bundle.json"
LAYOUT: Final = 1

"""Names of everything that is stored; an artifact's key is the key of the asset that makes it."""

from __future__ import annotations

RAW_IMPRESSIONS = "raw/impressions"
RAW_ITEMS = "raw/items"
CLEANED_IMPRESSIONS = "cleaned/impressions"
CLEANED_ITEMS = "cleaned/items"
FEATURES_IMPRESSIONS = "features/impressions"
FEATURES_ITEMS = "features/items"

TRAIN = "splits/train"
VALIDATION = "splits/validation"
TEST = "splits/test"
ITEMS = "splits/items"

CONFIGURATION = "models/configuration"
ADAPTED_ENCODER = "models/adapted_encoder"
FINE_TUNED = "models/fine_tuned"
COMPRESSED = "models/compressed"
ITEM_VECTORS = "models/item_vectors"

PREDICTIONS = "evaluation/predictions"
MEASUREMENTS = "evaluation/measurements"
REPORT = "evaluation/report"

DRIFT = "monitoring/drift"
DRIFT_REFERENCE = "monitoring/reference"
GATE = "promotion/gate"
CHAMPION = "promotion/champion"

STRATEGIES_STUDY = "studies/strategies"
LABEL_EFFICIENCY_STUDY = "studies/label_efficiency"


def validation_of(table: str) -> str:
    """Key of the validations of a table."""
    return f"validations/{table}"

# pyright: reportUnusedImport=false
from recflow_tests.unit.modeling.conftest import (  # noqa: F401
    base_model,
    items,
    train,
    train_tiny,
    trained,
    validation,
)

from pathlib import Path

import pytest

from recflow_tests.integration.deployment import FIRST_DAY, INGEST, LAST_DAY, Deployment
from recflow_tests.unit.modeling.tiny import write_base_model


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("tiny_encoder"))


@pytest.fixture(scope="session")
def ingested(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Deployment:
    """The sample, ingested once: raw logs to validated features of every day."""
    deployment = Deployment(tmp_path_factory.mktemp("ingested"), base_model)
    done = deployment.materialise(INGEST, f"{FIRST_DAY}...{LAST_DAY}")
    assert done.returncode == 0, done.stderr
    return deployment

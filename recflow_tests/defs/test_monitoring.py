"""The drift of a day as Dagster shows it: numbers to plot, a page, and a check that only warns."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.drift import evidence_of
from recflow.adapters.keys import DRIFT
from recflow.defs.monitoring import assets as monitoring
from recflow.defs.resources import RegistryResource, StoreResource
from recflow.settings import load_settings
from recflow_tests.unit.adapters.tiny_days import DAYS, store_days

pytestmark = [
    # Great Expectations, Evidently and what they import; nothing of ours can avoid it.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
    pytest.mark.filterwarnings("ignore:Parameter `allow_nonexistent_upstream_partitions`"),
]

DAY = DAYS[3]


class Deployment:
    """A store with four days, a registry in which nothing was promoted, and Dagster on both."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.store = ArtifactStore(home / "store")
        store_days(self.store, 4, impressions=60)

    def run(self, *, fails: bool = False, **config: Any) -> dg.ExecuteInProcessResult:
        result = dg.materialize(
            [monitoring.drift, monitoring.nothing_drifted],
            partition_key=DAY,
            run_config={"ops": {"monitoring__drift": {"config": config}}},
            resources={
                "store": StoreResource(root=str(self.store.root)),
                "registry": RegistryResource(
                    tracking_uri=f"sqlite:///{self.home / 'mlflow.db'}",
                    experiment_name="tests",
                    name="recflow",
                ),
            },
            raise_on_error=not fails,
        )
        assert result.success != fails
        return result


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitoring, "settings", load_settings(home=home, threads=1, window_days=4))
        yield Deployment(home)


def test_numbers_page_and_evidence_are_shown(deployment: Deployment) -> None:
    result = deployment.run(least_impressions=50)
    (event,) = result.get_asset_materialization_events()
    metadata = event.materialization.metadata
    for name in ("category_shown", "category_shown_limit", "click_rate", "click_rate_limit"):
        assert isinstance(metadata[name], dg.FloatMetadataValue)
    assert metadata["page"].value.endswith("/drift.html")
    artifact = deployment.store.get(DRIFT, DAY)
    assert metadata["digest"].value == artifact.digest
    assert metadata["drifted"].value == list(evidence_of(artifact).drifted) == []
    (check,) = result.get_asset_check_evaluations()
    assert check.passed
    assert "nothing is beyond its limit (compared with the 3 days before it)" in check.description


def test_drift_warns_and_does_not_fail(deployment: Deployment) -> None:
    # Everything differs a little: with no least effect and a day that may be unusual every other
    # time, something is beyond its limit.
    result = deployment.run(
        least_impressions=50,
        least_distance=0.0,
        least_rate_factor=1.0,
        chance=0.99,
        unusual=0.9,
    )
    (check,) = result.get_asset_check_evaluations()
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert not check.blocking
    assert " differs by " in (check.description or "")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"bins": 1}, "bins = 1 is not allowed; allowed: 2 or more"),
        ({"ignored": ["weather"]}, "ignored = 'weather' is not allowed; allowed: category_shown"),
    ],
)
def test_impossible_limits_end_the_step_with_a_sentence(
    deployment: Deployment, config: dict[str, Any], sentence: str
) -> None:
    result = deployment.run(fails=True, **config)
    (failure,) = result.get_step_failure_events()
    assert sentence in str(failure.step_failure_data.error)

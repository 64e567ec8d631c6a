"""What assets work with: the store and the logs, configured from the settings."""

import sys
from pathlib import Path
from types import TracebackType

import dagster as dg

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.mlflow_registry import ModelRegistry
from recflow.adapters.mlflow_tracking import MlflowStore
from recflow.compression.family import load_family
from recflow.core.errors import RecflowError
from recflow.data.sources import open_source
from recflow.data.sources.base import Source
from recflow.hardware.calibration import load_calibration
from recflow.hardware.catalogue import load_catalogue
from recflow.settings import load_settings


def _show_sentence(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if isinstance(error, RecflowError):
        print(f"recflow: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


try:
    settings = load_settings()
    family = load_family(settings.family)
    _catalogue = load_catalogue(settings.catalogue)
    devices = [_catalogue[name] for name in settings.device_names or _catalogue]
    calibration = load_calibration(settings.calibration_file) if settings.calibration_file else None
except RecflowError:
    # This ends the Dagster command that is loading recflow, whose user can mend the setting or the
    # file it names: the sentence helps, the stack does not.
    sys.excepthook = _show_sentence
    raise


class StoreResource(dg.ConfigurableResource):
    """Where tables, models and reports are stored."""

    root: str

    def open(self) -> ArtifactStore:
        """Return the store."""
        return ArtifactStore(Path(self.root))


class LogsResource(dg.ConfigurableResource):
    """The raw logs that are read."""

    source: str
    directory: str

    def open(self) -> Source:
        """Return the reader of the logs.

        Raises:
            SourceError: The folder is missing or not of the announced format.
        """
        return open_source(self.source, Path(self.directory))


class BaseModelResource(dg.ConfigurableResource):
    """The pretrained text encoder that fine-tuning starts from."""

    name: str

    @property
    def path(self) -> Path:
        """Folder of the pretrained encoder, downloaded if its name is that of a model of the hub.

        Raises:
            ArtifactError: There is no such folder or model.
            TransientError: The hub cannot be reached.
        """
        from recflow.modeling.base_models import resolve_base_model

        return resolve_base_model(self.name)


class RegistryResource(dg.ConfigurableResource):
    """The registry of models: which one users get."""

    tracking_uri: str
    experiment_name: str
    name: str

    def open(self) -> ModelRegistry:
        """Return the registry; nothing is read or made yet."""
        return ModelRegistry(MlflowStore(self.tracking_uri, self.experiment_name), self.name)


def make_resources() -> dict[str, object]:
    """Build the resources of the deployment described by the settings."""
    from recflow.defs.tracking import mlflow_resource

    return {
        "store": StoreResource(root=str(settings.store_dir.absolute())),
        "logs": LogsResource(source=settings.source, directory=str(settings.source_dir.absolute())),
        "base_model": BaseModelResource(name=settings.base_model),
        "registry": RegistryResource(
            tracking_uri=settings.mlflow_uri,
            experiment_name=settings.mlflow_experiment,
            name=settings.registered_model,
        ),
        "mlflow": mlflow_resource.configured(
            {
                "tracking_uri": settings.mlflow_uri,
                "experiment_name": settings.mlflow_experiment,
            }
        ),
    }

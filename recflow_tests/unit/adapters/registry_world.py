"""A registry of its own, and candidates made of a few bytes."""

from pathlib import Path

from recflow.adapters.mlflow_registry import (
    BUNDLE_PATH,
    Audit,
    Candidate,
    GateRecord,
    ModelRegistry,
)
from recflow.adapters.mlflow_tracking import MlflowStore
from recflow.core.artifacts import Draft, build_artifact

WHY = Audit("a test", who="somebody", run="dagster-run")


class RegistryWorld:
    """A registry of its own, and candidates made of a few bytes."""

    def __init__(self, folder: Path, store: MlflowStore, name: str) -> None:
        self.folder = folder
        self.registry = ModelRegistry(store, name)
        self.mlflow_run = store.create_run(name, {})
        self.cache = folder / "cache"

    def candidate(self, weights: str, champion: str = "", name: str = "fine_tuned") -> Candidate:
        """An MLflow model whose ranker has these weights, judged against this version."""
        directory = self.folder / "models" / weights
        ranker = build_artifact(
            self.folder / "rankers" / weights,
            lambda draft: _write(draft, "config.json", weights),
            key=f"models/{name}",
            code_version="1",
            parents={},
            config={},
        )

        def bundle(draft: Draft) -> None:
            (draft.path / "ranker").mkdir()
            for file in ("config.json", "manifest.json"):
                text = (ranker.path / file).read_text()
                (draft.path / "ranker" / file).write_text(text)

        build_artifact(
            directory / BUNDLE_PATH, bundle, key="bundle", code_version="1", parents={}, config={}
        )
        (directory / "MLmodel").write_text("flavors: {}\n")
        gate = GateRecord(f"gate of {weights}", champion, ["passed: everything"], {"model": 0.7})
        return Candidate(directory, name, "2024-01-10", ranker.digest, gate)

    def register(self, candidate: Candidate) -> str:
        return self.registry.register(candidate, WHY, mlflow_run=self.mlflow_run).version

    def promoted(self, weights: str) -> str:
        """The version of a candidate that passed the gate and was promoted."""
        champion = self.registry.aliases().get("champion", "")
        version = self.register(self.candidate(weights, champion))
        self.registry.promote(version, WHY)
        return version

    def served(self) -> str:
        """The weights users get."""
        champion = self.registry.champion(self.cache)
        assert champion is not None
        return (champion.path / "config.json").read_text()

    def events(self) -> list[tuple[str, str, str]]:
        return [(e.action, e.version, e.former) for e in self.registry.history()]


def _write(draft: Draft, name: str, text: str) -> None:
    (draft.path / name).write_text(text)

"""The model registry: which model users get, which one they got before, and who decided it.

Three aliases say all of it. ``champion`` is what is served; ``previous_champion`` is what a
rollback returns to; ``candidate`` is what was put forward and has not been promoted. Moving
``champion`` is one call of MLflow and the only moment in which anything changes for users: a
process that is killed before or after it leaves them with one whole model, and doing the same again
completes the rest.

Everything that happens is appended to the registered model as a tag of its own that is never
written again, so that the history can be read in MLflow's page too.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import shutil
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, cast

from recflow.adapters.champion import Champion
from recflow.adapters.mlflow_tracking import MlflowStore
from recflow.core.artifacts import Artifact, JsonValue, read_artifact
from recflow.core.errors import ArtifactError, PromotionError
from recflow.serving.layout import RANKER_FOLDER

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

CANDIDATE: Final = "candidate"
CHAMPION: Final = "champion"
PREVIOUS: Final = "previous_champion"
# Where the served model keeps the ranker and what belongs to it, inside the MLflow model.
BUNDLE_PATH: Final = "artifacts/bundle"

_EVENT: Final = "recflow.event."
_ROLLBACK: Final = "recflow.rollback"
_TAG: Final = "recflow."
_MISSING: Final = "RESOURCE_DOES_NOT_EXIST"
_EXISTS: Final = "RESOURCE_ALREADY_EXISTS"
_MAX_TAG_CHARACTERS: Final = 4_000

Action: TypeAlias = Literal["registered", "promoted", "waiting", "rolled_back"]


@dataclass(frozen=True, slots=True)
class Audit:
    """Who does something to the registry, and why.

    Attributes:
        reason: Why, in words.
        who: The user; the one this process runs as unless said otherwise.
        run: The Dagster run, where one does it.
    """

    reason: str
    who: str = field(default_factory=lambda: _user())
    run: str = ""


@dataclass(frozen=True, slots=True)
class GateRecord:
    """What the gate decided, as it is kept with a version.

    Attributes:
        digest: Digest of the gate's artifact.
        champion: Version of the champion that the candidate was compared with; empty without one.
        reasons: Every requirement in words.
        metrics: Numbers of the decision.
    """

    digest: str
    champion: str
    reasons: Sequence[str] = ()
    metrics: Mapping[str, float] = field(default_factory=lambda: {})


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that is put forward.

    Attributes:
        directory: MLflow model that serves it (``MLmodel`` and what belongs to it).
        name: Model of the family, e.g. ``fine_tuned``.
        snapshot: Partition of its snapshot.
        digest: Digest of the model's artifact.
        gate: What the gate decided.
    """

    directory: Path
    name: str
    snapshot: str
    digest: str
    gate: GateRecord


@dataclass(frozen=True, slots=True)
class Version:
    """A version of the registered model.

    Attributes:
        version: Its number.
        name: Model of the family.
        snapshot: Partition of its snapshot.
        digest: Digest of the model's artifact.
        gate: What the gate decided of it last.
        withdrawn: Why it was rolled back, if it was and nobody has approved it since.
        waits: Whether it waits for an approval.
    """

    version: str
    name: str
    snapshot: str
    digest: str
    gate: GateRecord
    withdrawn: str = ""
    waits: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to the registered model.

    Attributes:
        at: When (UTC, ISO 8601).
        action: What.
        version: The version that it happened to.
        former: The champion before, where that changed; empty otherwise.
        who: Who did it.
        run: The Dagster run, where one did it.
        reason: Why.
        gate: Digest of the gate's artifact that it rests on.
    """

    at: str
    action: Action
    version: str
    former: str
    who: str
    run: str
    reason: str
    gate: str


@dataclass(frozen=True, slots=True)
class Promotion:
    """The outcome of moving the champion.

    Attributes:
        champion: Version that users get now.
        former: Version they got before; empty where there was none.
        changed: Whether this call moved it; ``False`` where an earlier call had.
    """

    champion: str
    former: str
    changed: bool

    @property
    def sentence(self) -> str:
        """The same in words."""
        before = f"; before, it was version {self.former}" if self.former else ""
        already = "" if self.changed else " already"
        return f"The champion is version {self.champion}{already}{before}"


@dataclass(frozen=True, slots=True)
class ModelRegistry:
    """A registered model of MLflow.

    Attributes:
        store: Where MLflow is.
        name: Name of the registered model.
    """

    store: MlflowStore
    name: str

    def champion(self, cache: Path) -> Champion | None:
        """The champion, with its files on this machine; ``None`` where nothing was promoted.

        Args:
            cache: Folder below which the files are kept, by version; safe to delete.

        Raises:
            ArtifactError: The registered files are missing or not those that were registered.
        """
        version = self.aliases().get(CHAMPION)
        return None if version is None else self.fetch(version, cache)

    def fetch(self, version: str, cache: Path) -> Champion:
        """Like :meth:`champion`, of any version.

        Raises:
            ArtifactError: The registered files are missing or not those that were registered.
        """
        raw = self._client().get_model_version(self.name, version)
        target = cache / self.name / version
        try:
            _verified(target, raw)
        except ArtifactError:
            # Nothing there, half of it, or another registry's version of the same number.
            self._download(raw, target)
            _verified(target, raw)
        described = _version_of(raw)
        return Champion(
            version=version,
            snapshot=described.snapshot,
            name=described.name,
            digest=described.digest,
            path=target / RANKER_FOLDER,
        )

    def aliases(self) -> dict[str, str]:
        """Version by alias; empty where nothing was registered."""
        model = self._model()
        aliases = {} if model is None else model.aliases
        return {str(alias): str(version) for alias, version in aliases.items()}

    def is_champion(self, version: str) -> bool:
        """Whether users get this version."""
        return self.aliases().get(CHAMPION) == version

    def version(self, version: str) -> Version:
        """What is known of a version.

        Raises:
            PromotionError: There is no such version, or recflow did not register it.
        """
        from mlflow.exceptions import MlflowException

        try:
            return _version_of(self._client().get_model_version(self.name, version))
        except MlflowException as error:
            if error.error_code != _MISSING:
                raise
            raise PromotionError(f"{self.name} has no version {version}") from None

    def history(self) -> list[Event]:
        """Everything that happened, oldest first."""
        model = self._model()
        tags = {} if model is None else model.tags
        events = sorted((key, text) for key, text in tags.items() if key.startswith(_EVENT))
        return [Event(**json.loads(text)) for _, text in events]

    def find(self, digest: str) -> Version | None:
        """The version that is a copy of the artifact with this digest, if there is one."""
        found = self._client().search_model_versions(
            f"name = '{self.name}' and tags.`{_TAG}digest` = '{digest}'"
        )
        same = [version for version in found if version.status == "READY"]
        return _version_of(min(same, key=lambda v: int(v.version))) if same else None

    def register(self, candidate: Candidate, audit: Audit, *, mlflow_run: str) -> Version:
        """Register a candidate and give it the alias; one that is registered is not copied again.

        The gate's newest decision replaces an earlier one of the same candidate.

        Args:
            candidate: What is put forward.
            audit: Who and why.
            mlflow_run: MLflow run whose artifacts the files become.

        Raises:
            ArtifactError: The files are not whole, or not those of the announced digest.
        """
        with self._alone():
            return self._register(candidate, audit, mlflow_run)

    def _register(self, candidate: Candidate, audit: Audit, mlflow_run: str) -> Version:
        client = self._client()
        bundle = read_artifact(candidate.directory / BUNDLE_PATH)
        require_ranker(bundle, candidate.digest)
        self._create_registered_model(client)
        tags = _tags_of(candidate, bundle, audit)
        found = self.find(candidate.digest)
        if found is None:
            folder = f"models/{candidate.name}-{candidate.digest[:12]}"
            client.log_artifacts(mlflow_run, str(candidate.directory), folder)
            run = client.get_run(mlflow_run)
            created = client.create_model_version(
                self.name,
                source=f"{run.info.artifact_uri}/{folder}",
                run_id=mlflow_run,
                # With the version, so that none is ever without them.
                tags={**tags, f"{_TAG}artifact_path": folder},
                description=f"{candidate.name} of snapshot {candidate.snapshot}",
            )
            version = str(created.version)
        else:
            version = found.version
            for key in ("gate", "gate_champion", "gate_reasons", "metrics"):
                client.set_model_version_tag(
                    self.name, version, f"{_TAG}{key}", tags[f"{_TAG}{key}"]
                )
        if ("registered", version) not in {(e.action, e.version) for e in self.history()}:
            self._append("registered", version, "", audit, candidate.gate.digest)
        if not self.is_champion(version):
            client.set_registered_model_alias(self.name, CANDIDATE, version)
        return self.version(version)

    def wait_for_approval(self, version: str, audit: Audit) -> None:
        """Note that a version is promoted only when somebody approves it; said once."""
        if self.version(version).waits:
            return
        self._append("waiting", version, "", audit, self.version(version).gate.digest)
        self._client().set_model_version_tag(self.name, version, f"{_TAG}waits", audit.reason)

    def promote(self, version: str, audit: Audit) -> Promotion:
        """Make a version the champion; one that is it already stays it.

        Raises:
            PromotionError: The champion is not the one that the gate compared the version with.
        """
        with self._alone():
            return self._promote(version, audit)

    def _promote(self, version: str, audit: Audit) -> Promotion:
        client, aliases = self._client(), self.aliases()
        current, described = aliases.get(CHAMPION, ""), self.version(version)
        if current == version:
            self._finish_promotion(described, aliases, audit)
            return Promotion(version, aliases.get(PREVIOUS, ""), changed=False)
        self._require_judged_against(described, current)
        # While a version has this alias, a rerun knows that its promotion is not complete.
        client.set_registered_model_alias(self.name, CANDIDATE, version)
        if current:
            client.set_registered_model_alias(self.name, PREVIOUS, current)
        # MLflow has no compare-and-set; what another process did meanwhile is seen here at least.
        self._require_judged_against(described, self.aliases().get(CHAMPION, ""))
        client.set_registered_model_alias(self.name, CHAMPION, version)
        self._finish_promotion(described, self.aliases(), audit)
        return Promotion(version, current, changed=True)

    def approve(self, audit: Audit, version: str | None = None) -> Promotion:
        """Promote what waits.

        Args:
            audit: Who approves, and why.
            version: The version meant; ``None`` takes the candidate.

        Raises:
            PromotionError: Nothing waits, another version does, or the champion is not the one
                that the gate compared the candidate with.
        """
        with self._alone():
            waiting = self.aliases().get(CANDIDATE)
            if waiting is None:
                raise PromotionError(
                    f"no candidate of {self.name} waits for an approval; materialise "
                    "promotion/champion"
                )
            if version is not None and version != waiting:
                raise PromotionError(
                    f"version {version} of {self.name} is not the candidate; version {waiting} is"
                )
            return self._promote(waiting, audit)

    def rollback(self, audit: Audit) -> Promotion:
        """Make the previous champion the champion again, and the champion the previous one.

        The version that is left is promoted again only by an approval.

        Raises:
            PromotionError: There is nothing to return to.
        """
        with self._alone():
            return self._rollback(audit)

    def _rollback(self, audit: Audit) -> Promotion:
        client, aliases = self._client(), self.aliases()
        champion, previous = aliases.get(CHAMPION, ""), aliases.get(PREVIOUS, "")
        begun = self._begun_rollback()
        if champion and champion in begun:
            # An earlier call was killed in the middle: the same again, not a second one.
            leaving, to = begun
        elif not champion or not previous or champion == previous:
            raise PromotionError(
                f"{self.name} has no previous champion to return to; "
                f"the champion is {f'version {champion}' if champion else 'not set'}"
            )
        else:
            leaving, to = champion, previous
        client.set_registered_model_tag(self.name, _ROLLBACK, json.dumps([leaving, to]))
        client.set_registered_model_alias(self.name, CHAMPION, to)
        client.set_registered_model_alias(self.name, PREVIOUS, leaving)
        client.set_model_version_tag(self.name, leaving, f"{_TAG}withdrawn", audit.reason)
        client.set_model_version_tag(self.name, to, f"{_TAG}withdrawn", "")
        self._append("rolled_back", to, leaving, audit, self.version(to).gate.digest)
        client.delete_registered_model_tag(self.name, _ROLLBACK)
        return Promotion(to, leaving, changed=champion != to)

    @contextmanager
    def _alone(self) -> Generator[None]:
        """Let no other process of this machine change the registry meanwhile.

        A lock of a file goes with the process that held it, however that ends. There is none for a
        server: what it was asked is compared with what it says, before each change.
        """
        database = self.store.database
        if database is None:
            yield
            return
        database.parent.mkdir(parents=True, exist_ok=True)
        with (database.parent / "promotion.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _client(self) -> MlflowClient:
        return self.store.client()

    def _create_registered_model(self, client: MlflowClient) -> None:
        from mlflow.exceptions import MlflowException

        try:
            client.create_registered_model(
                self.name, description="recflow's recommender; `recflow champion` shows its state"
            )
        except MlflowException as error:
            if error.error_code != _EXISTS:
                raise

    def _require_judged_against(self, version: Version, champion: str) -> None:
        judged = version.gate.champion
        if judged != champion:
            seen = f"version {judged}" if judged else "no champion"
            now = f"version {champion}" if champion else "no champion"
            raise PromotionError(
                f"the gate compared version {version.version} of {self.name} with {seen}, and now "
                f"there is {now}; materialise promotion/gate of {version.snapshot} again"
            )

    def _finish_promotion(self, version: Version, aliases: Mapping[str, str], audit: Audit) -> None:
        """What follows the switch; each part is done where it is missing."""
        client, number = self._client(), version.version
        if aliases.get(CANDIDATE) != number:
            return
        for key, value in {
            "promoted_by": audit.who,
            "promoted_at": _now(),
            "promoted_because": audit.reason[:_MAX_TAG_CHARACTERS],
            "promoted_in_run": audit.run,
            "withdrawn": "",
            "waits": "",
        }.items():
            client.set_model_version_tag(self.name, number, f"{_TAG}{key}", value)
        self._append("promoted", number, aliases.get(PREVIOUS, ""), audit, version.gate.digest)
        client.delete_registered_model_alias(self.name, CANDIDATE)

    def _begun_rollback(self) -> tuple[str, ...]:
        """From which version to which a rollback was begun and not completed; empty if none was."""
        model = self._model()
        text = "" if model is None else model.tags.get(_ROLLBACK, "")
        return tuple(json.loads(text)) if text else ()

    def _model(self) -> RegisteredModel | None:
        from mlflow.exceptions import MlflowException

        try:
            return self._client().get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != _MISSING:
                raise
            return None

    def _append(self, action: Action, version: str, former: str, audit: Audit, gate: str) -> None:
        """Add to the history, unless a call that was killed did so already."""
        events = self.history()
        if events and (events[-1].action, events[-1].version, events[-1].former) == (
            action,
            version,
            former,
        ):
            return
        at = _now()
        event = Event(
            at=at,
            action=action,
            version=version,
            former=former,
            who=audit.who,
            run=audit.run,
            reason=audit.reason[:_MAX_TAG_CHARACTERS],
            gate=gate,
        )
        key = f"{_EVENT}{at}.{uuid.uuid4().hex[:8]}"
        text = json.dumps(asdict(event), ensure_ascii=False)
        self._client().set_registered_model_tag(self.name, key, text)

    def _download(self, version: ModelVersion, target: Path) -> None:
        """Copy the bundle of a version to ``target``; readers see all of it or nothing."""
        from mlflow.exceptions import MlflowException

        folder = version.tags.get(f"{_TAG}artifact_path")
        if folder is None or version.run_id is None:
            raise ArtifactError(
                f"version {version.version} of {self.name} was not registered by recflow"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}.draft")
        draft.mkdir()
        try:
            fetched = self._client().download_artifacts(
                version.run_id, f"{folder}/{BUNDLE_PATH}", str(draft)
            )
            shutil.rmtree(target, ignore_errors=True)
            _move(Path(fetched), target)
        except (OSError, MlflowException) as error:
            raise ArtifactError(
                f"the files of version {version.version} of {self.name} cannot be read from "
                f"{version.source}: {error}"
            ) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def require_ranker(bundle: Artifact, digest: str) -> Artifact:
    """The verified ranker of a bundle.

    Raises:
        ArtifactError: It is altered, or not the one with this digest.
    """
    ranker = read_artifact(bundle.path / RANKER_FOLDER)
    if ranker.digest != digest:
        raise ArtifactError(
            f"{ranker.path} has the digest {ranker.digest[:12]}, not {digest[:12]}: it is another "
            "model than the one that was put forward"
        )
    return ranker


def _move(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:
        # Another process was quicker; what it brought is verified as well.
        if not target.is_dir():
            raise


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, a user may have no name
        return f"user {os.getuid()}"


def _verified(target: Path, version: ModelVersion) -> None:
    bundle = read_artifact(target)
    if bundle.digest != version.tags.get(f"{_TAG}bundle"):
        raise ArtifactError(
            f"the files of version {version.version} of {version.name} are not those that were "
            f"registered ({target}); promote another version or `recflow rollback`"
        )
    require_ranker(bundle, str(version.tags.get(f"{_TAG}digest")))


def _version_of(raw: Any) -> Version:
    tags = cast("Mapping[str, str]", raw.tags)
    try:
        return Version(
            version=str(raw.version),
            name=tags[f"{_TAG}model"],
            snapshot=tags[f"{_TAG}snapshot"],
            digest=tags[f"{_TAG}digest"],
            gate=GateRecord(
                digest=tags[f"{_TAG}gate"],
                champion=tags[f"{_TAG}gate_champion"],
                reasons=tuple(json.loads(tags[f"{_TAG}gate_reasons"])),
                metrics=json.loads(tags[f"{_TAG}metrics"]),
            ),
            withdrawn=tags.get(f"{_TAG}withdrawn", ""),
            waits=bool(tags.get(f"{_TAG}waits", "")),
        )
    except (KeyError, ValueError) as error:
        raise PromotionError(
            f"version {raw.version} of {raw.name} was not registered by recflow: it has no {error}"
        ) from None


def _tags_of(candidate: Candidate, bundle: Artifact, audit: Audit) -> dict[str, str]:
    gate = candidate.gate
    reasons: list[JsonValue] = [reason[:_MAX_TAG_CHARACTERS] for reason in gate.reasons]
    tags = {
        "model": candidate.name,
        "snapshot": candidate.snapshot,
        "digest": candidate.digest,
        "bundle": bundle.digest,
        "gate": gate.digest,
        "gate_champion": gate.champion,
        "gate_reasons": json.dumps(reasons, ensure_ascii=False),
        "metrics": json.dumps(dict(gate.metrics), sort_keys=True),
        "registered_by": audit.who,
        "registered_at": _now(),
        "registered_because": audit.reason[:_MAX_TAG_CHARACTERS],
        "registered_in_run": audit.run,
    }
    return {f"{_TAG}{key}": value for key, value in tags.items()}


def _now() -> str:
    # MLflow allows no plus in the name of a tag.
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")

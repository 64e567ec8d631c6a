"""The registry, on a real SQLite store: what users get after every order of calls and kills."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from recflow.adapters.mlflow_registry import BUNDLE_PATH, Audit, Candidate, GateRecord
from recflow.adapters.mlflow_tracking import MlflowStore
from recflow.core.artifacts import read_artifact
from recflow.core.errors import ArtifactError, PromotionError
from recflow_tests.unit.adapters.registry_world import WHY, RegistryWorld

# MLflow 3.17 with SQLAlchemy 2.1; nothing of ours can avoid it.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> MlflowStore:
    return MlflowStore(f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db", "tests")


@pytest.fixture
def world(tmp_path: Path, store: MlflowStore, request: pytest.FixtureRequest) -> RegistryWorld:
    return RegistryWorld(tmp_path, store, request.node.name.replace("[", " ").replace("]", ""))


def test_nothing_was_promoted_yet(world: RegistryWorld) -> None:
    assert world.registry.champion(world.cache) is None
    assert world.registry.aliases() == {}
    assert world.registry.history() == []
    with pytest.raises(PromotionError, match="no candidate"):
        world.registry.approve(WHY)
    with pytest.raises(PromotionError, match="no previous champion"):
        world.registry.rollback(WHY)


def test_a_registered_candidate_is_not_yet_what_users_get(world: RegistryWorld) -> None:
    version = world.register(world.candidate("a"))
    assert world.registry.aliases() == {"candidate": version}
    assert world.registry.champion(world.cache) is None


def test_a_promoted_version_is_served_with_its_files(world: RegistryWorld) -> None:
    candidate = world.candidate("a")
    version = world.register(candidate)
    promotion = world.registry.promote(version, WHY)
    assert (promotion.champion, promotion.former, promotion.changed) == (version, "", True)
    assert world.registry.aliases() == {"champion": version}
    champion = world.registry.champion(world.cache)
    assert champion is not None
    assert (champion.version, champion.snapshot) == (version, "2024-01-10")
    assert (champion.name, champion.digest) == ("fine_tuned", candidate.digest)
    assert read_artifact(champion.path).digest == candidate.digest
    assert world.served() == "a"


def test_a_version_says_who_what_why_and_on_what_evidence(
    world: RegistryWorld, store: MlflowStore
) -> None:
    version = world.promoted("a")
    tags = store.client().get_model_version(world.registry.name, version).tags
    assert tags["recflow.promoted_by"] == tags["recflow.registered_by"] == "somebody"
    assert tags["recflow.promoted_in_run"] == "dagster-run"
    assert tags["recflow.promoted_because"] == "a test"
    assert tags["recflow.gate"] == "gate of a"
    assert json.loads(tags["recflow.gate_reasons"]) == ["passed: everything"]
    assert json.loads(tags["recflow.metrics"]) == {"model": 0.7}
    described = world.registry.version(version)
    assert described.gate == GateRecord("gate of a", "", ("passed: everything",), {"model": 0.7})


def test_the_second_champion_keeps_the_first_for_a_rollback(world: RegistryWorld) -> None:
    first, second = world.promoted("a"), world.promoted("b")
    assert world.registry.aliases() == {"champion": second, "previous_champion": first}
    assert world.events() == [
        ("registered", first, ""),
        ("promoted", first, ""),
        ("registered", second, ""),
        ("promoted", second, first),
    ]


def test_the_same_candidate_is_registered_once(world: RegistryWorld, store: MlflowStore) -> None:
    candidate = world.candidate("a")
    first = world.register(candidate)
    newer = replace(candidate, gate=GateRecord("a newer gate", "7"))
    assert world.register(newer) == first
    found = store.client().search_model_versions(f"name = '{world.registry.name}'")
    assert [str(version.version) for version in found] == [first]
    # The newest decision counts.
    assert world.registry.version(first).gate.champion == "7"
    assert world.events() == [("registered", first, "")]


def test_promoting_the_champion_changes_nothing(world: RegistryWorld) -> None:
    first, second = world.promoted("a"), world.promoted("b")
    before = world.events()
    promotion = world.registry.promote(second, WHY)
    assert (promotion.champion, promotion.former, promotion.changed) == (second, first, False)
    assert world.registry.aliases() == {"champion": second, "previous_champion": first}
    assert world.events() == before
    assert world.register(world.candidate("b", first)) == second
    assert "candidate" not in world.registry.aliases()


def test_a_champion_that_changed_since_the_gate_decided_is_not_replaced(
    world: RegistryWorld,
) -> None:
    first = world.promoted("a")
    late = world.register(world.candidate("b", first))
    second = world.promoted("c")
    with pytest.raises(PromotionError, match=f"with version {first}, and now there is version"):
        world.registry.promote(late, WHY)
    assert world.registry.aliases()["champion"] == second
    assert world.served() == "c"


def test_a_candidate_judged_without_champion_does_not_replace_one(world: RegistryWorld) -> None:
    late = world.register(world.candidate("b"))
    world.promoted("a")
    with pytest.raises(PromotionError, match="no champion"):
        world.registry.promote(late, WHY)
    assert world.served() == "a"


def test_an_approval_promotes_what_waits(world: RegistryWorld) -> None:
    first = world.promoted("a")
    waiting = world.register(world.candidate("b", first))
    world.registry.wait_for_approval(waiting, WHY)
    world.registry.wait_for_approval(waiting, WHY)
    assert world.registry.version(waiting).waits
    assert world.served() == "a"
    with pytest.raises(PromotionError, match="is not the candidate"):
        world.registry.approve(WHY, version=first)
    assert world.registry.approve(Audit("looks good", who="a person")).champion == waiting
    assert world.served() == "b"
    assert not world.registry.version(waiting).waits
    assert world.events()[-2:] == [("waiting", waiting, ""), ("promoted", waiting, first)]
    assert world.registry.history()[-1].who == "a person"


def test_a_rollback_and_another_return_to_where_it_began(world: RegistryWorld) -> None:
    first, second = world.promoted("a"), world.promoted("b")
    back = world.registry.rollback(Audit("clicks fell", who="a person"))
    assert (back.champion, back.former, back.changed) == (first, second, True)
    assert world.registry.aliases() == {"champion": first, "previous_champion": second}
    assert world.served() == "a"
    assert world.registry.version(second).withdrawn == "clicks fell"
    again = world.registry.rollback(WHY)
    assert (again.champion, again.former) == (second, first)
    assert world.served() == "b"
    assert world.registry.version(second).withdrawn == ""
    assert world.events()[-2:] == [("rolled_back", first, second), ("rolled_back", second, first)]


def test_there_is_nothing_to_roll_back_to_after_one_promotion(world: RegistryWorld) -> None:
    world.promoted("a")
    with pytest.raises(PromotionError, match="no previous champion"):
        world.registry.rollback(WHY)
    assert world.served() == "a"


class KilledError(Exception):
    """Stands for the end of a process."""


def _kill_at(monkeypatch: pytest.MonkeyPatch, call: int) -> Callable[[], bool]:
    """Let the call with this number, of those that write, be the last; say whether it came to it.

    The call itself is not made.
    """
    count = 0

    def counted(method: Any) -> Any:
        def write(*arguments: Any, **keywords: Any) -> Any:
            nonlocal count
            count += 1
            if count >= call:
                raise KilledError
            return method(*arguments, **keywords)

        return write

    for name in (
        "create_registered_model",
        "log_artifacts",
        "create_model_version",
        "set_registered_model_alias",
        "delete_registered_model_alias",
        "set_registered_model_tag",
        "delete_registered_model_tag",
        "set_model_version_tag",
    ):
        monkeypatch.setattr(MlflowClient, name, counted(getattr(MlflowClient, name)))
    return lambda: count >= call


def test_a_promotion_killed_anywhere_leaves_a_whole_model_and_a_rerun_completes_it(
    world: RegistryWorld,
) -> None:
    first = world.promoted("a")
    former, moments, served = first, 0, set[str]()
    for call in range(1, 40):
        weights = f"b{call}"
        before = world.served()
        candidate = world.candidate(weights, former)

        def promote(candidate: Candidate = candidate) -> str:
            version = world.register(candidate)
            world.registry.promote(version, WHY)
            return version

        with pytest.MonkeyPatch.context() as patch:
            killed = _kill_at(patch, call)
            with contextlib.suppress(KilledError):
                promote()
            reached = killed()
        if not reached:
            break
        moments += 1
        served.add("new" if world.served() == weights else "old")
        assert world.served() in (before, weights)
        version = promote()
        assert world.served() == weights
        assert world.registry.aliases() == {"champion": version, "previous_champion": former}
        mine = [event for event in world.events() if event[1] == version]
        assert mine == [("registered", version, ""), ("promoted", version, former)]
        former = version
    # register: model, files, version, event, alias; promote: 3 aliases, 6 tags, event, alias.
    assert moments == 16
    assert served == {"old", "new"}


def test_a_rollback_killed_anywhere_is_completed_by_the_next_and_not_done_twice(
    world: RegistryWorld,
) -> None:
    world.promoted("a")
    world.promoted("b")
    moments = 0
    for call in range(1, 20):
        aliases = world.registry.aliases()
        champion, previous = aliases["champion"], aliases["previous_champion"]
        count = len(world.events())
        with pytest.MonkeyPatch.context() as patch:
            killed = _kill_at(patch, call)
            with contextlib.suppress(KilledError):
                world.registry.rollback(WHY)
            reached = killed()
        if not reached:
            break
        moments += 1
        assert world.registry.aliases()["champion"] in (champion, previous)
        world.registry.rollback(WHY)
        assert world.registry.aliases() == {"champion": previous, "previous_champion": champion}
        assert world.events()[count:] == [("rolled_back", previous, champion)]
    # Intention, 2 aliases, 2 tags, event, intention away.
    assert moments == 7


def test_altered_files_are_refused(world: RegistryWorld, store: MlflowStore) -> None:
    version = world.promoted("a")
    place = store.client().get_model_version(world.registry.name, version).source
    assert place is not None
    stored = Path(place.removeprefix("file://")) / BUNDLE_PATH / "ranker" / "config.json"
    assert stored.read_text() == "a"
    stored.write_text("x")
    with pytest.raises(ArtifactError, match="altered"):
        world.registry.champion(world.cache)


def test_a_whole_model_of_another_promotion_is_refused(
    world: RegistryWorld, store: MlflowStore
) -> None:
    # Everything fits together, but it is not what was registered under this version.
    version = world.promoted("a")
    place = store.client().get_model_version(world.registry.name, version).source
    assert place is not None
    other = world.candidate("other").directory / BUNDLE_PATH
    for file in other.rglob("*"):
        if file.is_file():
            target = Path(place.removeprefix("file://")) / BUNDLE_PATH / file.relative_to(other)
            target.write_text(file.read_text())
    with pytest.raises(ArtifactError, match="not those that were registered"):
        world.registry.champion(world.cache)


def test_a_damaged_cache_is_fetched_anew(world: RegistryWorld) -> None:
    world.promoted("a")
    champion = world.registry.champion(world.cache)
    assert champion is not None
    (champion.path / "config.json").write_text("x")
    assert world.served() == "a"
    (champion.path / "config.json").unlink()
    assert world.served() == "a"


def test_missing_files_are_named(world: RegistryWorld, store: MlflowStore) -> None:
    version = world.promoted("a")
    place = store.client().get_model_version(world.registry.name, version).source
    assert place is not None
    Path(place.removeprefix("file://")).rename(world.folder / "elsewhere")
    with pytest.raises(ArtifactError, match=f"version {version}"):
        world.registry.champion(world.cache)


def test_a_candidate_that_is_not_what_it_says_is_not_registered(world: RegistryWorld) -> None:
    wrong = replace(world.candidate("a"), digest="0" * 64)
    with pytest.raises(ArtifactError, match="another model"):
        world.register(wrong)
    assert world.registry.aliases() == {}


def test_a_version_that_somebody_else_registered_is_not_taken_for_one(
    world: RegistryWorld, store: MlflowStore
) -> None:
    world.promoted("a")
    client = store.client()
    artifacts = client.get_run(world.mlflow_run).info.artifact_uri
    created = client.create_model_version(
        world.registry.name, source=f"{artifacts}/x", run_id=world.mlflow_run
    )
    with pytest.raises(PromotionError, match="not registered by recflow"):
        world.registry.version(str(created.version))
    with pytest.raises(PromotionError, match="no version 99"):
        world.registry.version("99")

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from recflow.core.errors import ArtifactError, TransientError
from recflow.modeling.base_models import resolve_base_model


def _fetch(monkeypatch: pytest.MonkeyPatch, answer: object) -> list[tuple[str, list[str]]]:
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_directory_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _fetch(monkeypatch, "/nowhere")
    assert resolve_base_model(tmp_path) == resolve_base_model(str(tmp_path)) == tmp_path
    assert asked == []


def test_a_hub_id_is_fetched_without_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _fetch(monkeypatch, tmp_path)
    assert resolve_base_model("organisation/model-v1.5") == tmp_path
    ((hub_id, patterns),) = asked
    assert hub_id == "organisation/model-v1.5"
    assert "config.json" in patterns
    assert "model*.safetensors" in patterns
    assert not any(pattern.endswith((".bin", "*")) for pattern in patterns)


@pytest.mark.parametrize("name", ["./not/there", "/not/there", "model", "a/b/c", ""])
def test_what_is_neither_directory_nor_hub_id_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _fetch(monkeypatch, "/nowhere")
    if name:
        with pytest.raises(ArtifactError, match="neither a directory nor a hub id"):
            resolve_base_model(name)
    assert asked == []


def test_an_unknown_model_is_an_artifact_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _fetch(monkeypatch, RepositoryNotFoundError("404", response=_response()))
    with pytest.raises(ArtifactError, match="'no/model' is neither"):
        resolve_base_model("no/model")


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("offline"), ConnectionError("no route"), OSError("disk")]
)
def test_an_unreachable_hub_may_be_tried_again(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fetch(monkeypatch, error)
    with pytest.raises(TransientError, match="'some/model' is not a directory"):
        resolve_base_model("some/model")


def _response() -> object:
    import httpx2

    return httpx2.Response(404, request=httpx2.Request("GET", "https://hub.invalid/no/model"))

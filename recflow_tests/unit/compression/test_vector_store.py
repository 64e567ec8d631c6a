import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file, save_file

from recflow.compression.config import CODECS, VectorStoreConfig
from recflow.compression.vector_store import (
    DESCRIPTION_NAME,
    VECTORS_NAME,
    ItemVectors,
    balanced_rotation,
    build_item_vectors,
    fit_codec,
)
from recflow.core.artifacts import sha256_of
from recflow.core.columns import Columns
from recflow.core.errors import ArtifactError, ConfigError, ContractError
from recflow.core.seeding import make_rng
from recflow.modeling.texts import Vectors

DIMENSION = 16
COARSE = {"float32": 1.0, "float16": 0.999999, "int8": 0.9998, "pq": 0.93}


def _unit(vectors: np.ndarray) -> Vectors:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def _vectors(items: int, seed: int = 0) -> Vectors:
    """Around twenty topics, wider along some axes than along others, as item vectors are."""
    rng = make_rng(0, "topics")
    topics = rng.normal(size=(20, DIMENSION)) * np.linspace(2, 0.1, DIMENSION)
    rng = make_rng(seed, "vectors")
    return _unit(topics[rng.integers(20, size=items)] + rng.normal(0, 0.3, (items, DIMENSION)))


TRAIN, LATER = _vectors(600), _vectors(200, seed=1)


def _config(codec: str, **values: int) -> VectorStoreConfig:
    return VectorStoreConfig(**{"codec": codec, "subvectors": 8, "threads": 1, **values})


def _store(codec: str) -> ItemVectors:
    ids = [f"item {number}" for number in range(len(TRAIN))]
    return build_item_vectors(ids, TRAIN, fit_codec(TRAIN, _config(codec)))


@pytest.fixture(scope="module")
def stores() -> dict[str, ItemVectors]:
    return {codec: _store(codec) for codec in CODECS}


@pytest.mark.parametrize("codec", CODECS)
def test_decoded_vectors_have_unit_length_and_are_close(
    stores: dict[str, ItemVectors], codec: str
) -> None:
    store = stores[codec].extended([f"later {n}" for n in range(len(LATER))], LATER)
    everything = np.concatenate([TRAIN, LATER])
    decoded = store.take(np.arange(len(store)))
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(decoded, axis=1), 1, atol=1e-6)
    cosines = (decoded * everything).sum(1)
    assert cosines.mean() >= COARSE[codec] - 1e-6
    rows = np.array([700, 3, 3])
    np.testing.assert_allclose(store.take(rows), decoded[rows], atol=1e-6)
    if codec == "float32":
        np.testing.assert_array_equal(decoded, everything)


@given(arrays(np.float64, (3, DIMENSION), elements=st.floats(-1, 1)))
@settings(deadline=None)
def test_int8_is_as_close_as_its_step(values: np.ndarray) -> None:
    values = values + 1e-3 * np.eye(3, DIMENSION)
    vectors = _unit(values)
    store = build_item_vectors(["a", "b", "c"], vectors, fit_codec(vectors, _config("int8")))
    # Each number is off by half a step of the largest one at most; so is the sine of the angle.
    steps = np.abs(vectors).max(axis=1) / 127
    limit = steps / 2 * np.sqrt(DIMENSION)
    cosines = (store.take(np.arange(3)) * vectors).sum(1)
    assert (np.sqrt(np.maximum(1 - cosines**2, 0)) <= limit + 1e-3).all()


def test_bytes_of_each_codec(stores: dict[str, ItemVectors]) -> None:
    found = {codec: (store.bytes_per_item, store.shared_bytes) for codec, store in stores.items()}
    shared = 4 * (256 * DIMENSION + DIMENSION**2)  # centroids and rotation
    assert found == {"float32": (64, 0), "float16": (32, 0), "int8": (16, 0), "pq": (8, shared)}
    assert all(s.codes.nbytes == s.bytes_per_item * len(s) for s in stores.values())


@pytest.mark.parametrize("codec", CODECS)
def test_search_finds_the_nearest_decoded_vectors(
    stores: dict[str, ItemVectors], codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recflow.compression.vector_store._BLOCK", 256)
    store = ItemVectors(stores[codec].ids, stores[codec].codec, stores[codec].codes)
    queries = LATER[:20]
    cosines = queries @ store.take(np.arange(len(store))).T
    found = store.search(queries, 5)
    assert found.rows.shape == found.cosines.shape == (20, 5)
    np.testing.assert_allclose(
        np.take_along_axis(cosines, found.rows, axis=1), found.cosines, atol=1e-5
    )
    best = -np.sort(-cosines, axis=1)[:, :5]
    # The index of pq shortlists by products that know nothing of the length.
    shortfall = np.abs(best - found.cosines).max()
    assert shortfall < (0.02 if codec == "pq" else 1e-5)
    assert (np.diff(found.cosines, axis=1) <= 0).all()


@pytest.mark.parametrize("codec", CODECS)
def test_no_more_neighbours_than_items(stores: dict[str, ItemVectors], codec: str) -> None:
    found = stores[codec].search(LATER[:2], 10_000)
    assert found.rows.shape == (2, 600)
    assert (np.sort(found.rows, axis=1) == np.arange(600)).all()
    with pytest.raises(ConfigError, match="k = 0"):
        stores[codec].search(LATER[:2], 0)


@pytest.mark.parametrize("codec", CODECS)
def test_a_store_is_read_as_it_was_written(
    stores: dict[str, ItemVectors], codec: str, tmp_path: Path
) -> None:
    stores[codec].save(tmp_path)
    again = ItemVectors.load(tmp_path)
    assert again.ids == stores[codec].ids
    rows = np.arange(600)
    np.testing.assert_array_equal(again.take(rows), stores[codec].take(rows))
    np.testing.assert_array_equal(
        again.extended(["new"], LATER[:1]).codes[-1], stores[codec].codec.encode(LATER[:1])[0]
    )


def test_fitting_twice_gives_the_same_bytes(stores: dict[str, ItemVectors], tmp_path: Path) -> None:
    stores["pq"].save(tmp_path)
    first = (tmp_path / VECTORS_NAME).read_bytes()
    _store("pq").save(tmp_path)
    assert (tmp_path / VECTORS_NAME).read_bytes() == first


def _damage(folder: Path, what: str) -> None:
    """Damage a stored ``pq``; the SHA-256 is made to fit where the damage is behind it."""
    vectors, description = folder / VECTORS_NAME, folder / DESCRIPTION_NAME
    described, tensors = json.loads(description.read_text()), load_file(vectors)
    changes = {
        "layout": {"layout": 9},
        "codec": {"codec": "zip"},
        "other codec": {"codec": "int8"},
        "ids": {"ids": ["only one"]},
        "dimension": {"dimension": 20},
    }
    if what == "altered":
        vectors.write_bytes(vectors.read_bytes()[:-1] + b"x")
    elif what == "no vectors":
        vectors.unlink()
    elif what == "no description":
        description.unlink()
    elif what == "not json":
        description.write_text("{")
    elif what in ("rotation", "codes"):
        del tensors[what]
        save_file(tensors, vectors)
        described["sha256"] = sha256_of(vectors)
    elif what == "not safetensors":
        vectors.write_bytes(b"nothing")
        described["sha256"] = sha256_of(vectors)
    elif what == "key":
        del described["sha256"]
    if what not in ("no description", "not json"):
        description.write_text(json.dumps(described | changes.get(what, {})))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("altered", "was altered"),
        ("no vectors", "is missing"),
        ("no description", "is missing"),
        ("not json", "is not JSON"),
        ("layout", "is not of layout 1"),
        ("codec", "codec 'zip'; known: float32, float16, int8, pq"),
        ("other codec", "int8 knows no tensors"),
        ("ids", "disagree"),
        ("dimension", "not those of vectors 20 wide"),
        ("rotation", "lacks its centroids"),
        ("codes", "disagree"),
        ("not safetensors", "disagree"),
        ("key", "lacks sha256"),
    ],
)
def test_damaged_stores_are_refused(
    stores: dict[str, ItemVectors], tmp_path: Path, what: str, message: str
) -> None:
    stores["pq"].save(tmp_path)
    _damage(tmp_path, what)
    with pytest.raises(ArtifactError, match=message):
        ItemVectors.load(tmp_path)


def test_codes_of_another_type_are_refused(stores: dict[str, ItemVectors], tmp_path: Path) -> None:
    stores["int8"].save(tmp_path)
    description = tmp_path / DESCRIPTION_NAME
    described = json.loads(description.read_text()) | {"codec": "float16"}
    description.write_text(json.dumps(described))
    with pytest.raises(ArtifactError, match="of another codec"):
        ItemVectors.load(tmp_path)


def test_vectors_are_looked_up_by_the_rows_of_an_item_table(
    stores: dict[str, ItemVectors],
) -> None:
    items = pl.DataFrame({Columns.ITEM_ID: ["item 5", "unknown", "item 0"]})
    look_up = stores["float32"].source(items)
    np.testing.assert_array_equal(look_up(np.array([2, 0])), TRAIN[[0, 5]])
    with pytest.raises(ContractError, match="item 'unknown' has no stored vector"):
        look_up(np.array([0, 1]))


def test_the_rotation_makes_pq_closer(monkeypatch: pytest.MonkeyPatch) -> None:
    wide_first = make_rng(0, "spectrum").normal(size=(900, DIMENSION)) * 0.6 ** np.arange(DIMENSION)
    learnt_from, later = np.split(_unit(wide_first), [700])

    def error() -> float:
        codec = fit_codec(learnt_from, _config("pq", subvectors=4))
        return 1 - float((codec.decode(codec.encode(later)) * later).sum(1).mean())

    rotated = error()
    monkeypatch.setattr(
        "recflow.compression.vector_store.balanced_rotation",
        lambda *_: np.eye(DIMENSION, dtype=np.float32),
    )
    assert rotated < 0.5 * error()


def test_the_rotation_is_orthogonal_and_spreads_the_parts_alike() -> None:
    rotation = balanced_rotation(TRAIN, 4)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(DIMENSION), atol=1e-5)

    def spread(vectors: Vectors) -> float:
        parts = np.log(vectors.var(axis=0)).reshape(4, -1).sum(axis=1)
        return float(np.ptp(parts))

    assert spread(TRAIN @ rotation) < 0.2 * spread(TRAIN)


@pytest.mark.parametrize(
    ("vectors", "values", "message"),
    [
        (TRAIN, {"subvectors": 5}, "subvectors = 5 is not allowed; allowed: a divisor of 16"),
        (TRAIN[:255], {}, "pq needs 256"),
    ],
)
def test_what_pq_cannot_do_is_refused(
    vectors: Vectors, values: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_codec(vectors, _config("pq", **values))


def test_bad_vectors_are_refused(stores: dict[str, ItemVectors]) -> None:
    store = stores["int8"]
    with pytest.raises(ContractError, match="unit length"):
        fit_codec(2 * TRAIN, _config("int8"))
    with pytest.raises(ContractError, match="unit length"):
        store.extended(["new"], np.full((1, DIMENSION), np.nan, dtype=np.float32))
    with pytest.raises(ContractError, match=r"not \[items, 16\]"):
        store.extended(["new"], LATER[:1, :8])
    with pytest.raises(ContractError, match="occurs twice"):
        store.extended(["item 3"], LATER[:1])
    with pytest.raises(ContractError, match="1 item ids for 2 item vectors"):
        build_item_vectors(["a"], LATER[:2], store.codec)


@pytest.mark.parametrize(("key", "value"), [("codec", "zip"), ("subvectors", 0), ("threads", 0)])
def test_impossible_configuration_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        VectorStoreConfig(**{key: value})  # type: ignore[arg-type]


def test_serving_loads_neither_torch_nor_faiss_for_int8() -> None:
    code = (
        "import sys, recflow.compression.vector_store\n"
        "sys.exit('torch' in sys.modules or 'faiss' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

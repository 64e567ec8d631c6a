"""The item vectors that serving keeps, in fewer bytes. Loads no PyTorch.

``int8`` needs no stored scale: item vectors have unit length, so that the whole numbers alone give
the direction. Product quantization cuts a vector into parts and stores for each the number of the
nearest of 256 centroids (Jégou et al. 2011, https://doi.org/10.1109/TPAMI.2010.57). Before that,
vectors are rotated to their principal axes, dealt out to the parts so that all have about the same
spread: the closed form of optimized product quantization (Ge et al. 2013,
https://doi.org/10.1109/CVPR.2013.379). On the vectors of a fine-tuned encoder it kept more than ten
rounds of the iterative form, and takes no time.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from recflow.compression.config import VectorStoreConfig
from recflow.core.artifacts import sha256_of
from recflow.core.columns import Columns
from recflow.core.errors import ArtifactError, ConfigError, ContractError
from recflow.core.seeding import derive_seed
from recflow.modeling.texts import Rows, Vectors

VECTORS_NAME = "item_vectors.safetensors"
DESCRIPTION_NAME = "item_vectors.json"
LAYOUT = 1

Codes = NDArray[Any]
VectorSource = Callable[[Rows], Vectors]
"""Unit vectors ``[rows, dimension]`` of rows of an item table."""

_CENTROIDS = 256  # what one byte can number
_LARGEST_INT8 = 127
_BLOCK = 16_384  # items whose vectors are held as float32 at a time
_RESCORED = 4  # times as many neighbours are rescored as are wanted
_UNIT_TOLERANCE = 1e-3


class Codec(ABC):
    """Turns vectors into codes of one row an item, and back.

    Attributes:
        name: One of ``recflow.compression.config.CODECS``.
    """

    name: ClassVar[str]
    code_type: ClassVar[type[np.generic]]

    def __init__(self, dimension: int, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        """Take what was learnt from the vectors of train.

        Raises:
            ArtifactError: The tensors are not those of this codec.
        """
        self.dimension, self.tensors = dimension, dict(tensors)
        if tensors:
            raise ArtifactError(f"{self.name} knows no tensors {sorted(tensors)}")

    @property
    def width(self) -> int:
        """Numbers of an item's code."""
        return self.dimension

    @abstractmethod
    def encode(self, vectors: Vectors) -> Codes:
        """Codes ``[items, width]`` of unit vectors ``[items, dimension]``."""

    @abstractmethod
    def values(self, codes: Codes) -> Vectors:
        """Vectors ``[items, dimension]`` of any length."""

    def decode(self, codes: Codes) -> Vectors:
        """Unit vectors ``[items, dimension]``."""
        return _unit(self.values(codes))


class Float32(Codec):
    """As they are."""

    name = "float32"
    code_type = np.float32

    def encode(self, vectors: Vectors) -> Codes:
        """The vectors."""
        return vectors.astype(np.float32)

    def values(self, codes: Codes) -> Vectors:
        """The vectors."""
        return codes

    def decode(self, codes: Codes) -> Vectors:
        """The vectors, to the bit."""
        return codes


class Float16(Codec):
    """Half precision."""

    name = "float16"
    code_type = np.float16

    def encode(self, vectors: Vectors) -> Codes:
        """Rounded to half precision."""
        return vectors.astype(np.float16)

    def values(self, codes: Codes) -> Vectors:
        """As float32."""
        return codes.astype(np.float32)


class Int8(Codec):
    """Whole numbers, the largest of each vector ±127."""

    name = "int8"
    code_type = np.int8

    def encode(self, vectors: Vectors) -> Codes:
        """Rounded at one scale a vector."""
        largest = np.abs(vectors).max(axis=1, keepdims=True)
        return np.round(vectors * (_LARGEST_INT8 / largest)).astype(np.int8)

    def values(self, codes: Codes) -> Vectors:
        """As float32; :meth:`decode` gives them back their length."""
        return codes.astype(np.float32)


class Pq(Codec):
    """Product quantization: one byte for each part of the vector."""

    name = "pq"
    code_type = np.uint8

    def __init__(self, dimension: int, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        """Take the centroids ``[parts, 256, dimension / parts]`` and the rotation.

        Raises:
            ArtifactError: They are missing or of other sizes.
        """
        super().__init__(dimension, {})
        self.tensors = dict(tensors)
        try:
            self._centroids, self._rotation = tensors["centroids"], tensors["rotation"]
            parts, centroids, size = self._centroids.shape
        except (KeyError, ValueError) as error:
            raise ArtifactError(f"product quantization lacks its centroids: {error!r}") from error
        fits = parts * size == dimension and self._rotation.shape == (dimension, dimension)
        if centroids != _CENTROIDS or not fits:
            raise ArtifactError(
                f"centroids {self._centroids.shape} and a rotation {self._rotation.shape} are not "
                f"those of vectors {dimension} wide"
            )

    @classmethod
    def fit(cls, vectors: Vectors, config: VectorStoreConfig) -> Pq:
        """Learn the rotation and the centroids.

        Raises:
            ConfigError: The vectors cannot be cut into that many parts, or are too few.
        """
        items, dimension = vectors.shape
        parts = config.subvectors or _largest_divisor(dimension, dimension // 3)
        if dimension % parts:
            allowed = f"a divisor of {dimension}, the width of the vectors"
            raise ConfigError.of("subvectors", parts, allowed)
        if items < _CENTROIDS:
            raise ConfigError.of(
                "codec", "pq", f"another codec for {items} items; pq needs {_CENTROIDS}"
            )
        rotation = balanced_rotation(vectors, parts)
        quantizer = _faiss().ProductQuantizer(dimension, parts, 8)
        quantizer.cp.seed = derive_seed(config.seed, "product quantization") % 2**31
        quantizer.cp.min_points_per_centroid = 1  # else it warns of small catalogues
        with _faiss_threads(config.threads):
            quantizer.train(vectors @ rotation)
        centroids = _faiss().vector_to_array(quantizer.centroids)
        shape = (parts, _CENTROIDS, dimension // parts)
        return cls(dimension, {"centroids": centroids.reshape(shape), "rotation": rotation})

    @property
    def width(self) -> int:
        """Parts of a vector."""
        return len(self._centroids)

    def encode(self, vectors: Vectors) -> Codes:
        """Number of the nearest centroid of each part."""
        rotated = np.ascontiguousarray(vectors @ self._rotation)
        quantizer = _faiss().ProductQuantizer(self.dimension, self.width, 8)
        _faiss().copy_array_to_vector(self._centroids.ravel(), quantizer.centroids)
        return quantizer.compute_codes(rotated)

    def values(self, codes: Codes) -> Vectors:
        """The centroids, end to end, rotated back."""
        parts = self._centroids[np.arange(self.width), codes]
        return parts.reshape(len(codes), self.dimension) @ self._rotation.T

    def index(self, codes: Codes) -> Any:
        """A faiss index over codes: products of a query with all centroids, added up by code."""
        faiss = _faiss()
        index = faiss.IndexPQ(self.dimension, self.width, 8, faiss.METRIC_INNER_PRODUCT)
        faiss.copy_array_to_vector(self._centroids.ravel(), index.pq.centroids)
        faiss.copy_array_to_vector(codes.ravel(), index.codes)
        index.ntotal, index.is_trained = len(codes), True
        return index

    def rotate(self, queries: Vectors) -> Vectors:
        """Queries as :meth:`index` wants them."""
        return np.ascontiguousarray(queries @ self._rotation)


_CODECS: Mapping[str, type[Codec]] = {codec.name: codec for codec in (Float32, Float16, Int8, Pq)}


def fit_codec(vectors: Vectors, config: VectorStoreConfig) -> Codec:
    """Learn how to encode.

    Args:
        vectors: Unit vectors ``[items, dimension]`` of the items of train.
        config: Which codec, and how fine.

    Raises:
        ConfigError: The vectors are too few or too narrow for it.
        ContractError: A vector does not have unit length.
    """
    _require_unit(vectors)
    if config.codec == Pq.name:
        return Pq.fit(vectors, config)
    return _CODECS[config.codec](vectors.shape[1], {})


def balanced_rotation(vectors: Vectors, parts: int) -> NDArray[np.float32]:
    """Principal axes, dealt out so that the parts of a rotated vector spread about equally.

    Axes are taken from the widest on; each goes to the part with the smallest product of variances
    that still has room (Ge et al. 2013, section 4, eigenvalue allocation).

    Args:
        vectors: ``[items, dimension]``.
        parts: How many parts of equal width a vector is cut into.

    Returns:
        Orthogonal ``[dimension, dimension]``; ``vectors @ rotation`` is cut into parts.
    """
    variances, axes = np.linalg.eigh(np.cov(vectors.T.astype(np.float64)))
    least = max(float(variances.max()) * 1e-9, np.finfo(np.float64).tiny)
    spread = np.log(np.maximum(variances, least) / least)
    dealt: list[list[int]] = [[] for _ in range(parts)]
    size = len(variances) // parts
    for axis in np.argsort(-spread, kind="stable"):
        open_parts = [part for part in dealt if len(part) < size]
        min(open_parts, key=lambda part: spread[part].sum()).append(int(axis))
    order = [axis for part in dealt for axis in part]
    return np.ascontiguousarray(axes[:, order], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The nearest items of each query, nearest first.

    Attributes:
        rows: Their rows, int64 ``[queries, k]``.
        cosines: Cosine of the query and the stored vector, float32 ``[queries, k]``.
    """

    rows: Rows
    cosines: Vectors


class ItemVectors:
    """Item ids and encoded vectors.

    Attributes:
        ids: Item ids in row order.
        codec: How the vectors are encoded.
        codes: The encoded vectors, one row an item.
    """

    def __init__(self, ids: Sequence[str], codec: Codec, codes: Codes) -> None:
        """Put the parts together.

        Raises:
            ContractError: An item occurs twice, or ids and vectors differ in number.
        """
        if len(ids) != len(codes):
            raise ContractError(f"{len(ids)} item ids for {len(codes)} item vectors")
        self.ids, self.codec, self.codes = list(ids), codec, codes
        self._rows = {item: row for row, item in enumerate(self.ids)}
        if len(self._rows) != len(self.ids):
            raise ContractError("an item occurs twice in the item vectors")
        self._index: Any = None
        self._lengths: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dimension(self) -> int:
        """Width of the decoded vectors."""
        return self.codec.dimension

    @property
    def bytes_per_item(self) -> int:
        """Bytes of one code."""
        return self.codec.width * np.dtype(self.codec.code_type).itemsize

    @property
    def shared_bytes(self) -> int:
        """Bytes that all items need together, e.g. the centroids."""
        return sum(tensor.nbytes for tensor in self.codec.tensors.values())

    def take(self, rows: Rows) -> Vectors:
        """Decoded unit vectors ``[rows, dimension]`` float32 of some items."""
        return self.codec.decode(self.codes[rows])

    def extended(self, ids: Sequence[str], vectors: Vectors) -> ItemVectors:
        """A store that has these items too, encoded by the same codec.

        Raises:
            ContractError: An item is there already, or a vector does not have unit length.
        """
        _require_unit(vectors, self.dimension)
        codes = np.concatenate([self.codes, self.codec.encode(vectors)])
        return ItemVectors([*self.ids, *ids], self.codec, codes)

    def source(self, items: pl.DataFrame) -> VectorSource:
        """What looks up vectors by the row of an item table, e.g. for ``Ranker.scorer``.

        The lookup raises ContractError for an item that is not stored.
        """
        ids = items[Columns.ITEM_ID].to_list()
        stored = np.array([self._rows.get(item, -1) for item in ids], dtype=np.int64)

        def look_up(rows: Rows) -> Vectors:
            wanted = stored[rows]
            if (wanted < 0).any():
                unknown = ids[int(rows[np.argmin(wanted)])]
                raise ContractError(f"item {unknown!r} has no stored vector; encode it first")
            return self.take(wanted)

        return look_up

    def search(self, queries: Vectors, k: int) -> Neighbours:
        """The items of the highest cosine.

        Args:
            queries: Unit vectors ``[queries, dimension]``.
            k: Neighbours of each, at most all items.

        Raises:
            ConfigError: ``k`` is below 1.
        """
        if k < 1:
            raise ConfigError.of("k", k, "at least 1")
        k = min(k, len(self))
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if isinstance(self.codec, Pq):
            return self._search_index(self.codec, queries, k)
        return self._search_all(queries, k)

    def _search_index(self, codec: Pq, queries: Vectors, k: int) -> Neighbours:
        # Centroids shorten vectors by different amounts; the index does not know by how much.
        if self._index is None:
            self._index = codec.index(self.codes)
        found = self._index.search(codec.rotate(queries), min(_RESCORED * k, len(self)))[1]
        cosines = np.stack(
            [self.take(rows) @ query for rows, query in zip(found, queries, strict=True)]
        )
        return _nearest(found, cosines, k)

    def _search_all(self, queries: Vectors, k: int) -> Neighbours:
        if self._lengths is None:
            blocks = [self._block(start) for start in range(0, len(self), _BLOCK)]
            self._lengths = np.concatenate([np.linalg.norm(block, axis=1) for block in blocks])
        best: Neighbours | None = None
        for start in range(0, len(self), _BLOCK):
            block = self._block(start)
            cosines = queries @ block.T / self._lengths[start : start + len(block)]
            rows = np.broadcast_to(np.arange(start, start + len(block)), cosines.shape)
            if best is not None:
                rows = np.concatenate([best.rows, rows], axis=1)
                cosines = np.concatenate([best.cosines, cosines], axis=1)
            best = _nearest(rows, cosines, k)
        assert best is not None, "an empty store has no neighbours"
        return best

    def _block(self, start: int) -> Vectors:
        return self.codec.values(self.codes[start : start + _BLOCK])

    def save(self, folder: Path) -> None:
        """Write the vectors, and what is needed to read them, into an existing folder."""
        file = folder / VECTORS_NAME
        save_file({"codes": self.codes, **self.codec.tensors}, file)
        described = {
            "layout": LAYOUT,
            "codec": self.codec.name,
            "dimension": self.dimension,
            "sha256": sha256_of(file),
            "ids": self.ids,
        }
        text = json.dumps(described, ensure_ascii=False)
        (folder / DESCRIPTION_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> ItemVectors:
        """Read what :meth:`save` wrote.

        Raises:
            ArtifactError: A file is missing, damaged or altered, or the codec is unknown.
        """
        file = folder / VECTORS_NAME
        described = _read_description(folder / DESCRIPTION_NAME)
        if not file.is_file():
            raise ArtifactError(f"{file} is missing; rebuild the item vectors")
        content = file.read_bytes()
        if sha256_of(file) != described["sha256"]:
            raise ArtifactError(f"{file} was altered since it was written; rebuild it")
        try:
            tensors = load(content)
            codes = tensors.pop("codes")
            codec = _CODECS[described["codec"]](int(described["dimension"]), tensors)
            if codes.shape[1:] != (codec.width,) or codes.dtype != codec.code_type:
                raise ArtifactError(
                    f"{file} has codes {codes.shape} {codes.dtype} of another codec"
                )
            return cls([str(item) for item in described["ids"]], codec, codes)
        except (KeyError, TypeError, ValueError, SafetensorError, ContractError) as error:
            raise ArtifactError(f"{file} and its description disagree: {error!r}") from error


def build_item_vectors(ids: Sequence[str], vectors: Vectors, codec: Codec) -> ItemVectors:
    """Encode a catalogue.

    Args:
        ids: Item ids.
        vectors: Their unit vectors ``[items, dimension]``.
        codec: Of :func:`fit_codec`, which saw the items of train only.

    Raises:
        ContractError: An item occurs twice, or a vector does not have unit length.
    """
    _require_unit(vectors, codec.dimension)
    return ItemVectors(ids, codec, codec.encode(vectors))


def _read_description(file: Path) -> dict[str, Any]:
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{file} is missing; rebuild the item vectors") from None
    except ValueError as error:
        raise ArtifactError(f"{file} is not JSON: {error}") from error
    if not isinstance(described, dict) or described.get("layout") != LAYOUT:
        raise ArtifactError(f"{file} is not of layout {LAYOUT}, the one this recflow reads")
    missing = {"codec", "dimension", "sha256", "ids"} - described.keys()
    if missing:
        raise ArtifactError(f"{file} lacks {', '.join(sorted(missing))}")
    if described["codec"] not in _CODECS:
        raise ArtifactError(f"{file} has codec {described['codec']!r}; known: {', '.join(_CODECS)}")
    return described


def _largest_divisor(number: int, most: int) -> int:
    return max((part for part in range(1, most + 1) if number % part == 0), default=1)


def _nearest(rows: Rows, cosines: Vectors, k: int) -> Neighbours:
    """The ``k`` largest of each row, largest first."""
    if k < cosines.shape[1]:
        largest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        rows = np.take_along_axis(rows, largest, axis=1)
        cosines = np.take_along_axis(cosines, largest, axis=1)
    order = np.argsort(-cosines, axis=1, kind="stable")
    return Neighbours(
        np.take_along_axis(rows, order, axis=1), np.take_along_axis(cosines, order, axis=1)
    )


def _unit(vectors: Vectors) -> Vectors:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _require_unit(vectors: Vectors, dimension: int | None = None) -> None:
    if vectors.ndim != 2 or (dimension is not None and vectors.shape[1] != dimension):
        raise ContractError(f"item vectors {vectors.shape} are not [items, {dimension or 'width'}]")
    lengths = np.linalg.norm(vectors, axis=1)
    # Written so that a vector that is not a number fails.
    if not (np.abs(lengths - 1) <= _UNIT_TOLERANCE).all():
        raise ContractError("an item vector does not have unit length, so it cannot be stored")


def _faiss() -> Any:
    import faiss  # only product quantization needs it

    return faiss


@contextmanager
def _faiss_threads(threads: int) -> Generator[None]:
    before = _faiss().omp_get_max_threads()
    _faiss().omp_set_num_threads(threads)
    try:
        yield
    finally:
        _faiss().omp_set_num_threads(before)

"""What is served: a ranker, the catalogue it may rank with its vectors, and its calibration.

A bundle is a directory: ``ranker/`` is a copy of the model's artifact, ``items.parquet`` the
catalogue of its snapshot, ``vectors.safetensors`` what the model says of these items, and
``bundle.json`` where all of it comes from. The vectors are computed once, when the bundle is made:
an answer then depends on nothing but the request, not on what was asked before it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from recflow.core.columns import ITEM_FEATURES, Columns
from recflow.core.errors import ArtifactError, ContractError
from recflow.data.text import compose_text
from recflow.evaluation.calibration import PlattScaling
from recflow.modeling.ranker import ContentScorer, Ranker, load_ranker
from recflow.modeling.texts import Rows, Vectors
from recflow.serving.layout import INFO_NAME, ITEMS_NAME, LAYOUT, RANKER_FOLDER, VECTORS_NAME

_CATALOGUE: Final = (Columns.ITEM_ID, Columns.TEXT, Columns.CATEGORY, Columns.SUBCATEGORY)
_REQUEST_SCHEMA: Final = pl.Schema(
    {
        Columns.USER_ID: pl.String,
        Columns.HISTORY: pl.List(pl.String),
        Columns.CANDIDATES: pl.List(pl.String),
    }
)


@dataclass(frozen=True, slots=True)
class BundleInfo:
    """Where a bundle comes from.

    Attributes:
        name: Model of the family, e.g. ``fine_tuned``.
        snapshot: Partition of its snapshot.
        digest: Digest of the model's artifact.
        seen_until: Last day (UTC) that the model was trained or chosen on.
        calibration: From scores to click probabilities; ``None`` where nothing could be fitted.
    """

    name: str
    snapshot: str
    digest: str
    seen_until: date
    calibration: PlattScaling | None


@dataclass(frozen=True, slots=True)
class NewItem:
    """An item that is not in the catalogue, by its text.

    Attributes:
        item_id: Its identifier.
        title: Its title.
        body: Abstract, subtitle or body.
        category: Its category; empty where unknown.
        subcategory: Its subcategory; empty where unknown.
    """

    item_id: str
    title: str
    body: str = ""
    category: str = ""
    subcategory: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be ranked, for whom.

    Attributes:
        candidates: Items to rank, by id.
        history: Items the user clicked, oldest first.
        user_id: The user; only models that learned users by name look at it.
        new_items: Items named above that the catalogue does not have.
    """

    candidates: Sequence[str]
    history: Sequence[str] = ()
    user_id: str = ""
    new_items: Sequence[NewItem] = ()


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The answer to a request.

    Attributes:
        scores: One a candidate, in their order; higher is better. float64 [candidates].
        probabilities: Calibrated click probabilities, float64 [candidates]; ``None`` where the
            bundle has no calibration.
        ranking: The candidates, best first; equal scores stay in the order of the request.
    """

    scores: NDArray[np.float64]
    probabilities: NDArray[np.float64] | None
    ranking: tuple[str, ...]


def write_bundle(
    output: Path, *, ranker: Path, items: pl.DataFrame, info: BundleInfo, threads: int | None = None
) -> None:
    """Write the files of a bundle into an existing directory.

    Args:
        output: The directory.
        ranker: Artifact of the model.
        items: The catalogue, table ``ITEM_FEATURES``.
        info: Where it comes from.
        threads: Threads the model may use for the vectors.

    Raises:
        ArtifactError: The model is damaged.
    """
    ITEM_FEATURES.check_schema(items.schema)
    shutil.copytree(ranker, output / RANKER_FOLDER)
    catalogue = items.select(_CATALOGUE)
    catalogue.write_parquet(output / ITEMS_NAME, compression="zstd", compression_level=3)
    model = load_ranker(output / RANKER_FOLDER, threads=threads)
    save_file({"vectors": catalogue_vectors(model, catalogue)}, output / VECTORS_NAME)
    content = {**asdict(info), "layout": LAYOUT, "seen_until": info.seen_until.isoformat()}
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    (output / INFO_NAME).write_text(text + "\n", encoding="utf-8")


def catalogue_vectors(model: Ranker, items: pl.DataFrame) -> Vectors:
    """Unit vectors of a whole catalogue, float32 [items, dimension], in the order of its rows."""
    return model.encode(items[Columns.TEXT].to_list())


def read_info(bundle: Path) -> BundleInfo:
    """Read where a bundle comes from.

    Raises:
        ArtifactError: It is no bundle that this recflow reads.
    """
    file = bundle / INFO_NAME
    try:
        raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        calibration = raw["calibration"]
        if raw["layout"] != LAYOUT:
            raise ValueError(f"layout {raw['layout']}, and this recflow reads {LAYOUT}")
        return BundleInfo(
            name=raw["name"],
            snapshot=raw["snapshot"],
            digest=raw["digest"],
            seen_until=date.fromisoformat(raw["seen_until"]),
            calibration=None if calibration is None else PlattScaling(**calibration),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file} does not describe a bundle: {error}") from error


@dataclass(frozen=True)
class ServedRanker:
    """A bundle, loaded.

    Attributes:
        info: Where it comes from.
        ranker: The model.
        items: Its catalogue.
        vectors: Unit vectors of the catalogue, float32 [items, dimension].
    """

    info: BundleInfo
    ranker: Ranker
    items: pl.DataFrame
    vectors: Vectors
    _scorer: ContentScorer = field(init=False, repr=False)
    _known: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        scorer = self.ranker.scorer(self.info.name, self.items, vectors=self.vectors.__getitem__)
        # The two writes to a frozen instance: what every request needs, made once.
        object.__setattr__(self, "_scorer", scorer)
        object.__setattr__(self, "_known", frozenset(self.items[Columns.ITEM_ID].to_list()))

    @classmethod
    def load(cls, bundle: Path, *, threads: int | None = None) -> ServedRanker:
        """Load a bundle.

        Args:
            bundle: Its directory.
            threads: Threads the encoder may use; ``None`` leaves that to the runtime.

        Raises:
            ArtifactError: A file is missing or does not fit the others.
        """
        info = read_info(bundle)
        ranker = load_ranker(bundle / RANKER_FOLDER, threads=threads)
        try:
            items = pl.read_parquet(bundle / ITEMS_NAME)
            vectors = load_file(bundle / VECTORS_NAME)["vectors"]
        except (OSError, SafetensorError, KeyError, pl.exceptions.PolarsError) as error:
            raise ArtifactError(f"{bundle} is not a complete bundle: {error}") from error
        if vectors.shape != (items.height, ranker.dimension):
            raise ArtifactError(
                f"{bundle / VECTORS_NAME} has the shape {vectors.shape}; the catalogue and the "
                f"model need {(items.height, ranker.dimension)}"
            )
        return cls(info, ranker, items, vectors)

    def recommend(self, request: Request) -> Recommendation:
        """Rank the candidates of a request.

        Raises:
            ContractError: There is no candidate, an item is not known and not described, or one is
                described that is known already; the message names it.
        """
        self._check(request)
        scorer = self._scorer_with(request.new_items) if request.new_items else self._scorer
        impression = pl.DataFrame(
            {
                Columns.USER_ID: [request.user_id],
                Columns.HISTORY: [list(request.history)],
                Columns.CANDIDATES: [list(request.candidates)],
            },
            schema=_REQUEST_SCHEMA,
        )
        scores = np.array(scorer.score(impression)[0].to_list(), dtype=np.float64)
        platt = self.info.calibration
        order = np.argsort(-scores, kind="stable")
        return Recommendation(
            scores=scores,
            probabilities=None if platt is None else platt.probabilities(scores),
            ranking=tuple(request.candidates[int(at)] for at in order),
        )

    def _check(self, request: Request) -> None:
        if not request.candidates:
            raise ContractError("candidates is empty; name at least one item to rank")
        described = [item.item_id for item in request.new_items]
        for item in request.new_items:
            if item.item_id in self._known:
                raise ContractError(
                    f"new item {item.item_id!r} is in the catalogue already; leave it out of "
                    "new_items, or give it another id"
                )
            if described.count(item.item_id) > 1:
                raise ContractError(f"new item {item.item_id!r} is described twice")
            if not f"{item.title}{item.body}".strip():
                raise ContractError(f"new item {item.item_id!r} has neither a title nor a body")
        known = self._known.union(described)
        for where, ids in (("candidates", request.candidates), ("history", request.history)):
            for item_id in ids:
                if item_id not in known:
                    raise ContractError(
                        f"item {item_id!r} of {where} is not in the catalogue of snapshot "
                        f"{self.info.snapshot} ({self.items.height} items); describe it in "
                        "new_items"
                    )

    def _scorer_with(self, new: Sequence[NewItem]) -> ContentScorer:
        """A scorer of the catalogue and of items that a request describes."""
        items = pl.concat([self.items, described_items(new)])
        vectors = self.ranker.encode(items[Columns.TEXT][self.items.height :].to_list())
        return self.ranker.scorer(
            self.info.name,
            items,
            vectors=lambda rows: _stacked(self.vectors, vectors, rows),
        )


def described_items(new: Sequence[NewItem]) -> pl.DataFrame:
    """Described items as rows of a bundle's catalogue; texts as the encoder reads them."""
    rows: list[Mapping[str, str]] = [asdict(item) for item in new]
    names = list(NewItem.__dataclass_fields__)
    frame = pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String))
    text = compose_text(pl.col(Columns.TITLE), pl.col(Columns.BODY)).alias(Columns.TEXT)
    return frame.with_columns(text).select(_CATALOGUE)


def _stacked(known: Vectors, new: Vectors, rows: Rows) -> Vectors:
    """Rows of two tables of vectors, numbered one after the other, without joining the tables."""
    found = np.empty((len(rows), known.shape[1]), dtype=np.float32)
    of_known = rows < len(known)
    found[of_known] = known[rows[of_known]]
    found[~of_known] = new[rows[~of_known] - len(known)]
    return found

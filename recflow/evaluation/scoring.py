"""What is scored, by what, and the scores: everything before the first metric."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

import numpy as np
import polars as pl

from recflow.core.artifacts import write_text_atomically
from recflow.core.columns import ITEM_FEATURES, SPLIT_IMPRESSIONS, Columns
from recflow.core.errors import ArtifactError, ConfigError, ContractError
from recflow.core.seeding import make_rng
from recflow.evaluation.retrieval import ROW, Catalogue
from recflow.evaluation.slates import (
    Float32Array,
    as_lists,
    clicked_lists,
    flatten,
    offsets_of,
    row_chunks,
    rows_of,
)

Board = Literal["content-only", "counter-aware"]
"""What a scorer may look at: texts, categories and histories – or click counters as well. Scores
of the two boards are never compared in one table: fresh counters beat any text."""

BOARDS: tuple[Board, ...] = get_args(Board)

_SCORES_SCHEMA = pl.Schema({Columns.IMPRESSION_ID: pl.String, Columns.SCORES: pl.List(pl.Float64)})
_META_NAME = "predictions.json"


class Scorer(Protocol):
    """Anything that can rank: a model, a compressed model, a baseline."""

    @property
    def name(self) -> str:
        """Unique name, the row's name in every table."""
        ...

    @property
    def board(self) -> Board:
        """The board it competes on."""
        ...

    def score(self, impressions: pl.DataFrame) -> pl.Series:
        """Score the candidates of impressions (table ``SPLIT_IMPRESSIONS``).

        Returns:
            ``List(Float64)``, one list a row, aligned with ``candidates``; finite, higher is
            better.
        """
        ...

    def score_catalogue(self, impressions: pl.DataFrame, item_ids: Sequence[str]) -> Float32Array:
        """Score every item of ``item_ids`` for every impression.

        Returns:
            float32 [impressions, items]; finite, higher is better.
        """
        ...


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A training snapshot as evaluation sees it.

    The splits are put in a fixed order (time, then impression id) on construction, so that no
    result can depend on the order of rows in the input.

    Attributes:
        items: Table ``ITEM_FEATURES``.
        train: Table ``SPLIT_IMPRESSIONS``; what baselines and popularity are fitted on.
        validation: Table ``SPLIT_IMPRESSIONS``; what calibration is fitted on.
        test: Table ``SPLIT_IMPRESSIONS``; what every number in the report is measured on.
        truth: ``impression_id`` and ``utility`` (``List(Float64)`` aligned with the candidates),
            what the clicks were drawn from: simulated logs only.
    """

    items: pl.DataFrame
    train: pl.DataFrame
    validation: pl.DataFrame
    test: pl.DataFrame
    truth: pl.DataFrame | None = None

    def __post_init__(self) -> None:
        ITEM_FEATURES.check_schema(self.items.schema)
        for split in ("train", "validation", "test"):
            frame = cast("pl.DataFrame", getattr(self, split))
            SPLIT_IMPRESSIONS.check_schema(frame.schema)
            ordered = frame.sort(Columns.TIME, Columns.IMPRESSION_ID, maintain_order=True)
            object.__setattr__(self, split, ordered)  # the one write to a frozen instance


@dataclass(frozen=True, slots=True)
class Predictions:
    """All a scorer said about a snapshot.

    Attributes:
        scorer: Name of the scorer.
        board: Its board.
        validation: ``impression_id`` and ``scores`` (``List(Float64)``), in the snapshot's order.
        test: The same of the test split.
        catalogue: Ranks of a sample of test impressions (see
            :data:`recflow.evaluation.retrieval.RANKS_SCHEMA`); ``None`` where not asked for.
    """

    scorer: str
    board: Board
    validation: pl.DataFrame
    test: pl.DataFrame
    catalogue: pl.DataFrame | None

    def save(self, directory: Path) -> None:
        """Write Parquet files and a small JSON file into ``directory``, creating it."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, frame in self._frames().items():
            frame.write_parquet(directory / f"{name}.parquet")
        meta = {"scorer": self.scorer, "board": self.board, "tables": sorted(self._frames())}
        write_text_atomically(directory / _META_NAME, json.dumps(meta, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Predictions:
        """Read what :meth:`save` wrote.

        Raises:
            ArtifactError: The directory holds no predictions, or a file is missing.
        """
        try:
            text = (directory / _META_NAME).read_text(encoding="utf-8")
            meta = cast("dict[str, Any]", json.loads(text))
            frames = {
                name: pl.read_parquet(directory / f"{name}.parquet") for name in meta["tables"]
            }
            return cls(
                scorer=meta["scorer"],
                board=meta["board"],
                validation=frames["validation"],
                test=frames["test"],
                catalogue=frames.get("catalogue"),
            )
        except (OSError, ValueError, KeyError, pl.exceptions.PolarsError) as error:
            raise ArtifactError(
                f"{directory} holds no readable predictions ({error}); score the snapshot again"
            ) from error

    def _frames(self) -> dict[str, pl.DataFrame]:
        frames = {"validation": self.validation, "test": self.test}
        return frames if self.catalogue is None else frames | {"catalogue": self.catalogue}


def predict(scorer: Scorer, snapshot: Snapshot, *, catalogue_sample: int, seed: int) -> Predictions:
    """Let a scorer score the validation and the test split.

    Args:
        scorer: What to ask.
        snapshot: What to ask about.
        catalogue_sample: Test impressions for which the whole catalogue is ranked, drawn from those
            with a click on a known item; the same for every scorer. 0 leaves retrieval out.
        seed: Decides the sample and the order of ties in the first ten.

    Raises:
        ConfigError: ``catalogue_sample`` is negative.
        ContractError: The scores have another shape than the candidates, or one is not finite; the
            message names the scorer and the impression.
    """
    if catalogue_sample < 0:
        raise ConfigError.of("catalogue_sample", catalogue_sample, "0 (no retrieval) or more")
    return Predictions(
        scorer=scorer.name,
        board=scorer.board,
        validation=_score_split(scorer, snapshot.validation),
        test=_score_split(scorer, snapshot.test),
        catalogue=_rank_catalogue(scorer, snapshot, catalogue_sample, seed)
        if catalogue_sample
        else None,
    )


def _score_split(scorer: Scorer, impressions: pl.DataFrame) -> pl.DataFrame:
    if impressions.is_empty():
        return pl.DataFrame(schema=_SCORES_SCHEMA)
    scores = scorer.score(impressions)
    _check_scores(scorer.name, scores, impressions)
    return pl.DataFrame(
        {
            Columns.IMPRESSION_ID: impressions[Columns.IMPRESSION_ID],
            Columns.SCORES: scores.cast(pl.List(pl.Float64)),
        }
    )


def _check_scores(name: str, scores: pl.Series, impressions: pl.DataFrame) -> None:
    """Raise unless there is one finite score for each candidate."""
    if not isinstance(scores.dtype, pl.List) or len(scores) != impressions.height:
        raise ContractError(
            f"scorer {name!r} returned {len(scores)} values of type {scores.dtype} for "
            f"{impressions.height} impressions; expected one List(Float64) each"
        )
    lengths = pl.DataFrame(
        {
            Columns.IMPRESSION_ID: impressions[Columns.IMPRESSION_ID],
            "expected": impressions[Columns.CANDIDATES].list.len(),
            "got": scores.list.len(),
        }
    )
    wrong = lengths.filter(pl.col("expected").ne_missing(pl.col("got")))
    if wrong.height:
        identifier, expected, got = wrong.row(0)
        raise ContractError(
            f"scorer {name!r} returned {got} scores for the {expected} candidates of impression "
            f"{identifier!r} ({wrong.height} impressions differ)"
        )
    values = flatten(scores.cast(pl.List(pl.Float64))).fill_null(np.nan).to_numpy()
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        row = int(rows_of(offsets_of(scores))[bad[0]])
        raise ContractError(
            f"scorer {name!r} gave {values[bad[0]]} to a candidate of impression "
            f"{impressions[Columns.IMPRESSION_ID][row]!r} ({len(bad)} scores are not finite); "
            "a scorer must give every candidate a finite number"
        )


def _rank_catalogue(
    scorer: Scorer, snapshot: Snapshot, sample: int, seed: int
) -> pl.DataFrame | None:
    catalogue = Catalogue(snapshot.items)
    impressions = _sample_with_known_click(snapshot.test, catalogue, sample, seed)
    parts: list[pl.DataFrame] = []
    for chunk in row_chunks(impressions.height, len(catalogue.index)):
        rows = impressions[chunk]
        scores = scorer.score_catalogue(rows.drop(ROW), catalogue.item_ids)
        _check_catalogue_scores(scorer.name, scores, rows, len(catalogue.index))
        parts.append(catalogue.rank(scores, rows, seed))
    return pl.concat(parts) if parts else None


def _sample_with_known_click(
    impressions: pl.DataFrame, catalogue: Catalogue, sample: int, seed: int
) -> pl.DataFrame:
    """Draw impressions with a click on an item of the catalogue, keeping their order."""
    clicked = clicked_lists(impressions)
    known = as_lists("known", catalogue.index.codes(flatten(clicked)) >= 0, offsets_of(clicked))
    usable = np.flatnonzero(known.list.any().to_numpy())
    size = min(sample, len(usable))
    drawn = make_rng(seed, "catalogue sample").choice(usable, size=size, replace=False)
    return impressions.with_row_index(ROW)[np.sort(drawn)]


def _check_catalogue_scores(
    name: str, scores: Float32Array, impressions: pl.DataFrame, items: int
) -> None:
    if scores.shape != (impressions.height, items):
        raise ContractError(
            f"scorer {name!r} returned catalogue scores of shape {scores.shape}; "
            f"expected {(impressions.height, items)}"
        )
    bad = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    if len(bad):
        raise ContractError(
            f"scorer {name!r} gave a catalogue score that is not finite for impression "
            f"{impressions[Columns.IMPRESSION_ID][int(bad[0])]!r} ({len(bad)} impressions affected)"
        )

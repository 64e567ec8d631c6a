"""What a step learns from: clicks against sampled non-clicks, and who encodes which item.

A step's batch is drawn alike by all processes from the seed and the number of the step; each then
takes its share of the clicks and of the texts. So one process and several take the same steps, and
nothing about randomness has to be remembered to resume.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recflow.modeling.batching import IndexedImpressions, local_rows
from recflow.modeling.config import ObjectiveConfig, SpeedConfig
from recflow.modeling.texts import Rows

# An overlapping batch is made of this many stretches of the log: each shares its items, and
# together they still show the step more than one hour.
_STRETCHES = 4

Work = TypeVar("Work")


def draw_clicks(
    data: IndexedImpressions,
    samples: NDArray[np.bool_],
    *,
    clicks_per_impression: int,
    max_impressions: int,
    rng: np.random.Generator,
) -> Rows:
    """Draw the clicks of one epoch, in random order.

    Args:
        data: Impressions.
        samples: For each candidate, whether there is something to learn from it.
        clicks_per_impression: Most clicks of one impression, so that long slates do not outweigh
            the others.
        max_impressions: Most impressions, drawn without replacement.
        rng: Source of the draws.

    Returns:
        Impression and position in ``data.slates.values`` of each click, ``[clicks, 2]``.
    """
    owners = np.repeat(np.arange(len(data)), data.slates.lengths)
    usable = np.unique(owners[samples])
    wanted = np.zeros(len(data), dtype=np.bool_)
    wanted[rng.permutation(usable)[:max_impressions]] = True
    positions = np.flatnonzero(samples & wanted[owners])
    positions = positions[np.lexsort((rng.random(len(positions)), owners[positions]))]
    owners = owners[positions]
    rank_in_impression = np.arange(len(owners)) - np.searchsorted(owners, owners)
    kept = rank_in_impression < clicks_per_impression
    return rng.permutation(np.stack([owners[kept], positions[kept]], axis=1))


def count_clicks(
    data: IndexedImpressions,
    samples: NDArray[np.bool_],
    *,
    clicks_per_impression: int,
    max_impressions: int,
) -> int:
    """Expected number of clicks that :func:`draw_clicks` draws; exact where none is left out."""
    owners = np.repeat(np.arange(len(data)), data.slates.lengths)
    samples_each = np.bincount(owners[samples], minlength=len(data))
    clicks = np.minimum(samples_each[samples_each > 0], clicks_per_impression)
    share = min(1.0, max_impressions / max(len(clicks), 1))
    return round(float(clicks.sum()) * share)


def overlapping(clicks: Rows, batch_size: int, rng: np.random.Generator) -> Rows:
    """Order clicks so that those of one batch are close in time and share their items.

    The log is cut into stretches of a part of a batch, which are shuffled as wholes. Impressions
    are numbered in order of time.

    Args:
        clicks: Rows of :func:`draw_clicks`.
        batch_size: Clicks of a batch.
        rng: Source of the shuffle.
    """
    in_time = clicks[np.lexsort((clicks[:, 1], clicks[:, 0]))]
    stretch = max(1, batch_size // _STRETCHES)
    # A random beginning, or the same clicks would meet in every epoch.
    first = int(rng.integers(stretch)) + 1
    stretches = np.split(in_time, np.arange(first, len(in_time), stretch))
    return np.concatenate([stretches[place] for place in rng.permutation(len(stretches))])


@dataclass(frozen=True, slots=True)
class ClickBatch:
    """Clicks with sampled non-clicks of the same slate.

    Attributes:
        impressions: Number of each click's impression, to name a bad batch.
        history: Item rows, newest last, -1 before the oldest, ``[clicks, history]``.
        candidates: The clicked item first, then non-clicked ones, -1 where the slate had no more,
            ``[clicks, 1 + negatives]``.
        ratings: Rating of each clicked item, NaN where there is none.
    """

    impressions: Rows
    history: Rows
    candidates: Rows
    ratings: NDArray[np.float32]

    @property
    def distinct_items(self) -> Rows:
        """Rows of all items that occur, sorted."""
        rows = np.unique(np.concatenate([self.history.ravel(), self.candidates.ravel()]))
        return rows[rows >= 0]

    def take(self, clicks: Rows) -> ClickBatch:
        """Some of the clicks, in that order."""
        return ClickBatch(
            self.impressions[clicks],
            self.history[clicks],
            self.candidates[clicks],
            self.ratings[clicks],
        )


def click_batch(
    data: IndexedImpressions, clicks: Rows, negatives: int, rng: np.random.Generator
) -> ClickBatch:
    """Set clicks against non-clicked candidates of their slates.

    Args:
        data: Impressions.
        clicks: Some rows of :func:`draw_clicks`.
        negatives: Most non-clicked candidates a click, drawn without replacement; 0 for none.
        rng: Source of the draws.
    """
    slates = data.take(clicks[:, 0])
    candidates = data.slates.values[clicks[:, 1:]]
    if negatives:
        drawn = _draw_negatives(slates, negatives, rng)
        candidates = np.concatenate([candidates, drawn], axis=1)
    return ClickBatch(
        impressions=clicks[:, 0],
        history=slates.histories.pad(right_aligned=True),
        candidates=candidates,
        ratings=data.ratings[clicks[:, 1]],
    )


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One batch, or a part of it, as one process sees it; tensors are on the CPU.

    Attributes:
        impressions: Numbers of all processes' impressions, to name a bad batch.
        rows: Item row of everything the tensors index, ``[items]``.
        encoded: Places in ``rows`` that are encoded with gradient, grouped by the process that
            does it, with the same number for each: the last may repeat, ``[processes × texts]``.
        own: Item rows that this process encodes, ``[texts]``.
        history: Places in ``rows`` of this process' clicks' histories, -1 for none.
        candidates: Places in ``rows``, ``[clicks, candidates]``, or ``[1, candidates]`` shared.
        present: Which candidates count, ``[clicks, candidates]``.
        target: Column of the clicked item, ``[clicks]``.
        users: Number of each click's user, 0 where unknown.
        ratings: Rating of each click less the mean of train, or ``None``.
        log_frequency: Logarithm of each shared candidate's share of the clicks, or ``None``.
        weight: What a click's loss counts in the loss of the step.
    """

    impressions: Rows
    rows: Rows
    encoded: Rows
    own: Rows
    history: Tensor
    candidates: Tensor
    present: Tensor
    target: Tensor
    users: Tensor
    ratings: Tensor | None
    log_frequency: Tensor | None
    weight: float

    def to(self, device: torch.device) -> StepBatch:
        """The same with the tensors on ``device``."""
        if device.type == "cpu":
            return self
        return replace(
            self,
            history=self.history.to(device),
            candidates=self.candidates.to(device),
            present=self.present.to(device),
            target=self.target.to(device),
            users=self.users.to(device),
            ratings=None if self.ratings is None else self.ratings.to(device),
            log_frequency=None if self.log_frequency is None else self.log_frequency.to(device),
        )


@dataclass(frozen=True, slots=True)
class BatchMaker:
    """Makes the batches of training impressions.

    Attributes:
        data: Training impressions.
        samples: For each candidate, whether there is something to learn from it.
        users: Number of each impression's user.
        mean_rating: Mean rating of train.
        click_shares: Each item row's share of the clicks of train.
        text_lengths: Tokens of each item row's text.
        objective: What is minimised.
        speed: Which items are encoded.
        rank: Number of this process.
        processes: How many share a batch.
    """

    data: IndexedImpressions
    samples: NDArray[np.bool_]
    users: Rows
    mean_rating: float
    click_shares: NDArray[np.float64]
    text_lengths: Rows
    objective: ObjectiveConfig
    speed: SpeedConfig
    rank: int = 0
    processes: int = 1

    def step(
        self, clicks: Rows, *, encoder_learns: bool, rng: np.random.Generator
    ) -> list[StepBatch]:
        """The parts of one step's batch, alike for all processes but for their shares.

        Args:
            clicks: Rows of :func:`draw_clicks`, of all processes.
            encoder_learns: Whether items are encoded with gradient.
            rng: Source of the draws; the same for all processes.
        """
        parts = np.array_split(clicks, min(self.speed.micro_batches, len(clicks)))
        return [self._part(part, len(clicks), encoder_learns, rng) for part in parts]

    def _part(
        self, clicks: Rows, clicks_of_step: int, encoder_learns: bool, rng: np.random.Generator
    ) -> StepBatch:
        loss = self.objective.loss
        sampled = loss in ("cross_entropy", "binary_cross_entropy")
        batch = click_batch(self.data, clicks, self.objective.negatives if sampled else 0, rng)
        if self.speed.distinct_items:
            rows = batch.distinct_items
            history, candidates = (local_rows(r, rows) for r in (batch.history, batch.candidates))
        else:
            rows, history, candidates = _occurrences(batch)
        encoded = self._choose_encoded(batch, rows, rng) if encoder_learns else np.empty(0, int)
        encoded = deal(encoded, self.text_lengths[rows[encoded]], self.processes)

        own = np.arange(len(clicks))[self.rank :: self.processes]
        weight = 1 / clicks_of_step
        if not len(own):
            # Every process takes part in every step, or the others would wait for it.
            own, weight = np.zeros(1, dtype=np.int64), 0.0
        present = torch.from_numpy(batch.candidates[own] >= 0)
        target = torch.zeros(len(own), dtype=torch.long)
        log_frequency = None
        if loss == "contrastive":
            candidates, present, target, shares = self._shared_slate(batch, candidates, own)
            log_frequency = torch.from_numpy(np.log(shares).astype(np.float32))
        else:
            candidates = candidates[own]
        rated = loss == "mean_squared_error"
        return StepBatch(
            impressions=batch.impressions,
            rows=rows,
            encoded=encoded,
            own=rows[np.split(encoded, self.processes)[self.rank]],
            history=history[own],
            candidates=candidates,
            present=present,
            target=target,
            users=torch.from_numpy(self.users[batch.impressions[own]]),
            ratings=torch.from_numpy(batch.ratings[own] - self.mean_rating) if rated else None,
            log_frequency=log_frequency,
            weight=weight,
        )

    def _choose_encoded(self, batch: ClickBatch, rows: Rows, rng: np.random.Generator) -> Rows:
        """Places of the items to encode with gradient: candidates first, then clicks."""
        limit = -(-self.speed.max_texts_per_step // self.speed.micro_batches) or len(rows)
        if limit >= len(rows):
            return np.arange(len(rows))
        in_history_only = ~np.isin(rows, batch.candidates)
        return np.sort(np.lexsort((rng.random(len(rows)), in_history_only))[:limit])

    def _shared_slate(
        self, batch: ClickBatch, places: Tensor, own: Rows
    ) -> tuple[Tensor, Tensor, Tensor, NDArray[np.float64]]:
        """Every distinct clicked item of the batch as the slate of all its clicks.

        An item that the same impression also clicked is no negative of it.
        """
        clicked = batch.candidates[:, 0]
        slate, first, column = np.unique(clicked, return_index=True, return_inverse=True)
        also_clicked = np.zeros((len(clicked), len(slate)), dtype=np.bool_)
        pairs = self.data.take(batch.impressions)
        owners = np.repeat(np.arange(len(clicked)), pairs.slates.lengths)[pairs.clicked]
        items = pairs.slates.values[pairs.clicked]
        among = np.isin(items, slate)
        also_clicked[owners[among], np.searchsorted(slate, items[among])] = True
        also_clicked[np.arange(len(clicked)), column] = False
        return (
            places[:, 0][torch.from_numpy(first)][None, :],
            torch.from_numpy(~also_clicked[own]),
            torch.from_numpy(column[own]),
            self.click_shares[slate],
        )


def deal(places: Rows, lengths: Rows, processes: int) -> Rows:
    """Deal texts to processes so that each gets as many, and about as many tokens.

    Returns:
        The places, process after process; the last text fills up what is uneven.
    """
    by_length = places[np.argsort(lengths, kind="stable")]
    missing = -len(by_length) % processes
    filled = np.concatenate([by_length, by_length[-1:].repeat(missing)])
    return np.concatenate([filled[process::processes] for process in range(processes)])


def prefetched(make: Callable[[int], Work], numbers: range, ahead: int) -> Iterator[Work]:
    """Results of ``make`` for each number in order, made in the background up to ``ahead`` early.

    An exception of ``make`` is raised where its result would have come.
    """
    if not ahead:
        yield from map(make, numbers)
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
    try:
        waiting = deque(pool.submit(make, number) for number in numbers[:ahead])
        for number in numbers[ahead:]:
            waiting.append(pool.submit(make, number))
            yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _occurrences(batch: ClickBatch) -> tuple[Rows, Tensor, Tensor]:
    """Every occurrence of an item as an item of its own."""
    everything = np.concatenate([batch.history, batch.candidates], axis=1)
    there = everything >= 0
    places = np.full(everything.shape, -1, dtype=np.int64)
    places[there] = np.arange(int(there.sum()))
    split = batch.history.shape[1]
    return (
        everything[there],
        torch.from_numpy(places[:, :split]),
        torch.from_numpy(places[:, split:]),
    )


def _draw_negatives(slates: IndexedImpressions, limit: int, rng: np.random.Generator) -> Rows:
    """Item rows of at most ``limit`` non-clicked candidates of each slate, -1 where none is left.

    Every candidate draws a key, clicked ones the largest; the smallest keys win.
    """
    padded = slates.slates.pad()
    keys = np.full(padded.shape, 2.0)
    keys[padded >= 0] = np.where(slates.clicked, 2.0, rng.random(len(slates.clicked)))
    width = min(limit, padded.shape[1])
    order = np.argsort(keys, axis=1, kind="stable")[:, :width]
    drawn = np.take_along_axis(padded, order, axis=1)
    return np.where(np.take_along_axis(keys, order, axis=1) < 1.0, drawn, -1)

"""Click histories as they grow in the course of a simulated log."""

from __future__ import annotations

import numpy as np

from recflow.data.sources.simulation.arrays import Ints
from recflow.data.sources.simulation.clicks import Slates
from recflow.data.sources.simulation.world import Users


def extend_histories(users: Users, slates: Slates, *, freeze: bool) -> Ints:
    """History of each impression (impressions, history), and the users' clicks brought up to date.

    All clicks of a user are laid out in one row of numbers, those before the chunk first; the
    history of an impression is then a window that ends where its own clicks begin.
    """
    if freeze:
        history = users.clicks[slates.user].astype(np.int64)
        return np.where(history < 0, -1, history)
    width = users.clicks.shape[1]
    order = np.argsort(slates.user, kind="stable")
    user = slates.user[order]
    new = slates.clicked[order].sum(axis=1)
    present, begin, count = np.unique(user, return_index=True, return_counts=True)
    known = users.clicks[present]
    old = (known >= 0).sum(axis=1)
    total = old + np.add.reduceat(new, begin)
    offset = np.cumsum(total) - total
    before = np.cumsum(new) - new  # clicks of the chunk in front of each impression
    end = np.repeat(offset + old - before[begin], count) + before

    row = np.empty(int(total.sum()), dtype=np.int64)
    row[_ranges(offset, old)] = known[known >= 0]
    row[_ranges(end, new)] = slates.shown[order][slates.clicked[order]]

    history = np.empty((len(user), width), dtype=np.int64)
    history[order] = _windows(row, np.repeat(offset, count), end, width)
    users.clicks[present] = _windows(row, offset, offset + total, width)
    return history


def _ranges(start: Ints, length: Ints) -> Ints:
    """Concatenate ``arange(start, start + length)`` of every pair."""
    shift = np.repeat(start - (np.cumsum(length) - length), length)
    return np.arange(int(length.sum())) + shift


def _windows(row: Ints, start: Ints, end: Ints, width: int) -> Ints:
    """The last ``width`` numbers of each ``row[start:end]``, right-aligned, -1 in front."""
    position = end[:, None] - width + np.arange(width)
    inside = position >= start[:, None]
    return np.where(inside, row[np.where(inside, position, 0)], -1)

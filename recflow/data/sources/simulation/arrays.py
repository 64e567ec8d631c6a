"""Array types and helpers the simulation shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Flags: TypeAlias = npt.NDArray[np.bool_]

# Libraries differ in the last bit of exp() between processors; rounding keeps the bytes the same.
DECIMALS: Final = 6


def repeats(values: Ints) -> Flags:
    """Whether a value occurred before in its row."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    repeated = np.zeros(values.shape, dtype=np.bool_)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    result = np.empty_like(repeated)
    np.put_along_axis(result, order, repeated, axis=1)
    return result


def normalised(weights: Sequence[float]) -> Floats:
    """Scale weights to sum to 1."""
    return np.array(weights) / sum(weights)

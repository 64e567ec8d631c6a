"""One policy for randomness: functions take an ``rng`` or a ``seed``; nothing reads global state.

Seeds for parts of a run are derived from one run seed and a purpose, so that adding a consumer of
randomness does not shift the numbers another one draws.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Derive a 63-bit seed for ``purpose`` from ``seed``.

    Args:
        seed: The run's seed.
        purpose: What the numbers are for, e.g. ``("negatives", epoch)``.

    Returns:
        A non-negative integer below 2**63, stable across processes and platforms.
    """
    text = "\x1f".join([str(seed), *map(str, purpose)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def make_rng(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return a generator for ``purpose``, independent of the generators of other purposes."""
    return np.random.default_rng(derive_seed(seed, *purpose))

"""Samples of planted changes, whose ranks are known to the last element."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

from unmerge.checkpoint.dtypes import FloatArray
from unmerge.recipe.sample import Sample

CELL = 2e-6
"""Half a spacing of the grid that changes are stored on; the changes are 1e-3 large."""


def changes(seed: int, count: int, elements: int) -> FloatArray:
    """Changes of fine-tunes, shape (count, elements), with heavy tails and no two of one magnitude."""
    return 1e-3 * np.random.default_rng(seed).standard_t(5, (count, elements))


def sample_of(deltas: FloatArray, change: FloatArray, columns: int = 100) -> Sample:
    """Every element of a tensor of so many columns, where the target is known to `CELL`."""
    size = deltas.shape[1]
    ranks = np.stack([1.0 - (rankdata(np.abs(delta)) - 0.5) / size for delta in deltas])
    rows = np.abs(deltas).reshape(len(deltas), -1, columns)
    row_ranks = ((rankdata(rows, axis=2) - 1.0) / (columns - 1.0)).reshape(deltas.shape)
    heavy = (np.abs(deltas) * row_ranks).sum(axis=1, keepdims=True) / np.abs(deltas).sum(axis=1, keepdims=True)
    spread = 1.0 - (rankdata(deltas.var(axis=0)) - 0.5) / size
    whole = np.zeros(size, dtype=np.int64)
    return Sample(change, deltas, ranks, row_ranks, spread, np.full(size, CELL), whole, ("a.weight",), heavy)


def stored(change: FloatArray) -> FloatArray:
    """Round a change to the grid."""
    return np.round(change / (2.0 * CELL)) * (2.0 * CELL)

"""Norms, sums and dots along an axis in torch's order, so that their last bit is torch's.

torch adds squares of contiguous elements in eight lanes of float32 (four of float64) on every x86 processor, straight
on and in one thread: of 10^7 elements that loses up to 1e-3 of the norm. Squares of float16 it adds in one lane, which
is split among threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.summation import sum_of_models, whole_sum

GRAIN = 32_768
"""Elements that one of torch's threads reads at least."""


def full_precision(arithmetic: Arithmetic) -> Arithmetic:
    """Return float32, or float64 where that is the working type."""
    return arithmetic if arithmetic.name == "F64" else Arithmetic("F32", arithmetic.threads)


def norm(values: Array, arithmetic: Arithmetic, axis: int = -1) -> Array:
    """Return ``torch.norm`` along an axis, which is kept with one element.

    Parameters
    ----------
    values : array, shape (..., n) or (n, ...)
        On the working type's grid.
    arithmetic : Arithmetic
        The type to round the norms to.
    axis : int
        The last axis, or the first one, whose elements are added in order.

    Returns
    -------
    array, shape (..., 1) or (1, ...)
    """
    if not _is_last(axis, values):
        return arithmetic.round(np.sqrt(np.add.reduce(values * values, axis=0, keepdims=True)))
    rows = values.reshape(-1, values.shape[-1])
    sums = _squares_in_order(rows, arithmetic) if arithmetic.name == "F16" else _squares_in_lanes(rows)
    return arithmetic.round(np.sqrt(sums)).reshape(*values.shape[:-1], 1)


def total(values: Array, arithmetic: Arithmetic, axis: int = -1) -> Array:
    """Return ``torch.sum`` along an axis, which is kept with one element.

    Parameters
    ----------
    values : array, shape (..., n) or (n, ...)
    arithmetic : Arithmetic
        The type to round the sums to.
    axis : int
        The last axis, or the first one.

    Returns
    -------
    array, shape (..., 1) or (1, ...)
    """
    if not _is_last(axis, values):
        return sum_of_models(values, arithmetic)[None]
    rows = values.reshape(-1, values.shape[-1])
    # Rows are not split among threads, unless there is one.
    own = arithmetic if len(rows) == 1 else Arithmetic(arithmetic.name)
    return np.stack([whole_sum(row, own) for row in rows]).reshape(*values.shape[:-1], 1)


def dot(first: Array, second: Array, arithmetic: Arithmetic) -> Array:
    """Return ``torch.dot`` of two flat tensors, shape (1,): products are not rounded, and the sum is float64's."""
    return arithmetic.round([np.dot(first.astype(np.float64, copy=False), second.astype(np.float64, copy=False))])


def apply(function: Callable[[Array], Array], values: Array, arithmetic: Arithmetic) -> Array:
    """Return a transcendental function of values, rounded once: torch's float32 is within one unit of it."""
    return arithmetic.round(function(values.astype(np.float64)))


def fused(first: Array, second: Any, third: Any) -> Array:
    """Return ``first second + third`` rounded once for float32, whose products are exact in float64."""
    summed: Array = first.astype(np.float64) * second + third
    return summed.astype(first.dtype)


def _is_last(axis: int, values: Array) -> bool:
    return axis % values.ndim == values.ndim - 1


def _squares_in_order(rows: Array, arithmetic: Arithmetic) -> Array:
    size = rows.shape[1]
    parts = min(arithmetic.threads, -(-size // GRAIN)) if len(rows) == 1 else 1
    step = max(1, -(-size // max(1, parts)))
    sums = np.zeros(len(rows), rows.dtype)
    for start in range(0, size, step):
        sums += _in_order(rows[:, start : start + step] ** 2)
    return sums


def _squares_in_lanes(rows: Array) -> Array:
    lanes = 32 // rows.dtype.itemsize
    whole = rows.shape[1] // lanes * lanes
    fours = whole + (rows.shape[1] - whole) // 4 * 4
    steps = rows[:, :whole].reshape(len(rows), whole // lanes, lanes)
    sums = _in_order(np.add.reduce(steps * steps, axis=1), rows[:, whole:fours] ** 2)
    # The compiler fuses the last one to three products with their sums.
    for column in rows[:, fours:].T:
        sums = fused(column, column, sums)
    return sums


def _in_order(*parts: Array) -> Array:
    """Add the columns of parts (R, .) one after the other; numpy's own sum goes pairwise along the last axis."""
    zero = np.zeros((len(parts[0]), 1), parts[0].dtype)
    sums: Array = np.add.accumulate(np.concatenate((zero, *parts), axis=1), axis=1)[:, -1]
    return sums

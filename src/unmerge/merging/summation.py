"""Sums in torch's order, so that their last bit is torch's.

torch adds float32 in vectors of eight, bfloat16 and float16 in float32 after adding pairs of such vectors, float64
in vectors of four. Vectors (or, across models, whole tensors) are added in levels: 16 or more at a time are added
up, then the sums of those. Sums of 32,768 elements or more are split among threads, and each part is rounded. The
same on every x86 processor with AVX2; see ATen/native/cpu/SumKernel.cpp of torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from unmerge.merging.arithmetic import Arithmetic, Array

_PARALLEL = 32_768
_PARTIAL = 4
_LEVELS = 4
_COLUMNS = 1 << 14


def whole_sum(values: Array, arithmetic: Arithmetic) -> Array:
    """Return ``tensor.sum()``, of no dimensions.

    Parameters
    ----------
    values : array
        Read in row-major order.
    arithmetic : Arithmetic
        The type of the tensor and of the sum.
    """
    flat = values.reshape(-1)
    if arithmetic.threads == 1 or flat.size < _PARALLEL:
        return arithmetic.round(_contiguous(flat, arithmetic))
    used = min(arithmetic.threads, -(-flat.size // _PARALLEL))
    size = -(-flat.size // used)
    parts = np.zeros(arithmetic.threads, flat.dtype)
    for index in range(used):
        parts[index] = _contiguous(flat[index * size : (index + 1) * size], arithmetic)
    return arithmetic.round(_contiguous(arithmetic.round(parts), arithmetic))


def row_means(rows: Array, arithmetic: Arithmetic) -> Array:
    """Return ``tensor.mean(dim=1)``, which is made in float32 and rounded once (in float64 where that is the type).

    Parameters
    ----------
    rows : array, shape (k, n)
    arithmetic : Arithmetic

    Returns
    -------
    array, shape (k,)
    """
    # Rows are not split among threads, unless there is one.
    threads = arithmetic.threads if len(rows) == 1 else 1
    full = Arithmetic("F64" if arithmetic.name == "F64" else "F32", threads)
    sums = full.round([whole_sum(row, full) for row in rows])
    return arithmetic.round(sums / full.scalar(rows.shape[1]))


def column_blocks(count: int) -> Iterator[slice]:
    """Split a tensor's elements so that sums of models over a part, which fits into the cache, are the whole's."""
    for start in range(0, max(1, count - _COLUMNS + 1), _COLUMNS):
        # The order of adding differs for the last few elements and for small tensors: no small part at the end.
        yield slice(start, start + _COLUMNS if start + 2 * _COLUMNS <= count else count)


def sum_of_models(tensors: Array, arithmetic: Arithmetic) -> Array:
    """Return ``tensors.sum(dim=0)``.

    Up to four models are added in order. Of more, the last few elements of a tensor are added in another order.

    Parameters
    ----------
    tensors : array, shape (k, ...)
    arithmetic : Arithmetic

    Returns
    -------
    array, shape (...)
    """
    flat = tensors.reshape(len(tensors), -1)
    count = flat.shape[1]
    if count == 1:
        return arithmetic.round(_contiguous(flat[:, 0], arithmetic)).reshape(tensors.shape[1:])
    width = _stored_in_a_vector(arithmetic)
    group = _PARTIAL * (width if count >= width else 1)
    whole = count - count % group
    summed = np.empty(count, flat.dtype)
    summed[:whole] = _in_levels(flat[:, :whole])
    summed[whole:] = _by_fours(flat[:, whole:])
    return arithmetic.round(summed).reshape(tensors.shape[1:])


def _stored_in_a_vector(arithmetic: Arithmetic) -> int:
    """Return how many elements of the type 32 bytes hold."""
    return {"F64": 4, "F32": 8}.get(arithmetic.name, 16)


def _contiguous(flat: Array, arithmetic: Arithmetic) -> Array:
    """Add up neighbours in memory, in the holder's precision."""
    width = _stored_in_a_vector(arithmetic)
    vectors = flat[: flat.size // width * width].reshape(-1, width)
    if len(vectors) == 0:
        return _by_fours(flat)
    lanes = width
    if width == 16:
        lanes = 8
        vectors = vectors[:, :lanes] + vectors[:, lanes:]
    of_lanes = _by_fours(vectors)
    return _in_order(np.concatenate((flat[flat.size // width * width :], of_lanes)))


def _by_fours(rows: Array) -> Array:
    """Add up rows as four sums of every fourth row, the odd ones to the first of them."""
    whole = len(rows) // _PARTIAL * _PARTIAL
    sums = _in_levels(rows[:whole].reshape(whole // _PARTIAL, _PARTIAL, *rows.shape[1:]))
    sums[0] = _in_order(np.concatenate((sums[:1], rows[whole:])))
    return _in_order(sums)


def _in_levels(rows: Array) -> Array:
    """Add up rows in order, some at a time, then the sums of those, and so on."""
    step = 1 << max(4, (len(rows) - 1).bit_length() // _LEVELS)
    left = []
    for _ in range(_LEVELS - 1):
        whole = len(rows) // step
        left.append(_in_order(rows[whole * step :]))
        rows = _steps(rows[: whole * step].reshape(whole, step, *rows.shape[1:]))
    return _in_order(np.stack((*left, _in_order(rows))))


def _steps(blocks: Array) -> Array:
    """Add up each block's rows in order; shape (blocks, rows, ...)."""
    summed = np.zeros_like(blocks[:, 0])
    for index in range(blocks.shape[1]):
        summed += blocks[:, index]
    return summed


def _in_order(rows: Array) -> Array:
    """Add up rows one after the other; numpy's own sum is pairwise along the last axis."""
    summed = np.zeros(rows.shape[1:], rows.dtype)
    for row in rows:
        summed += row
    return summed

"""Which elements a sort puts first, equal ones included.

torch sorts on a CPU with C++'s ``std::sort``, which leaves equal elements in an order of its own. That order depends
on comparisons only, so another caller of ``std::sort`` finds it: scipy's sort of the indices of a sparse row. It is
the same wherever both are built with the same standard library (torch's and scipy's wheels for Linux are). torch's
sort on a GPU is another one; what it is free to choose is what `tied` finds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unmerge.merging.arithmetic import Array

_INSERTION = 3
_FEW = 64
_CHUNK = 1 << 14


def sorted_order(rows: Array, *, descending: bool = False) -> Array:
    """Return ``torch.argsort(rows, dim=1)``, unstable as it is.

    Parameters
    ----------
    rows : array of float32 or float64, shape (m, n)
        Zero or positive.
    descending : bool
        From the largest.

    Returns
    -------
    array of int, shape (m, n)
    """
    from scipy.sparse import csr_array

    whole = np.dtype(f"i{rows.dtype.itemsize}")
    most = np.iinfo(whole).max
    # Bits of numbers that are not negative are in the order of the numbers.
    keys = np.ascontiguousarray(rows).view(whole)
    keys = most - keys if descending else keys.copy()
    order = np.tile(np.arange(rows.shape[1], dtype=np.int32 if rows.size < 1 << 31 else np.int64), len(rows))
    starts = np.arange(len(rows) + 1) * rows.shape[1]
    sparse = csr_array((order, keys.reshape(-1), starts), shape=(len(rows), int(most)))
    sparse.has_sorted_indices = False  # also where they are sorted: equal ones change places
    sparse.sort_indices()
    found: Array = sparse.data.reshape(rows.shape)
    return found


def at_positions(values: Array, first: int, last: int, *, descending: bool = False) -> Array:
    """Return which elements ``torch.sort`` puts at positions `first` up to `last`.

    Parameters
    ----------
    values : array of float32 or float64, shape (n,)
        Zero or positive.
    first, last : int
        ``0 <= first <= last <= n``.
    descending : bool
        Positions count from the largest.

    Returns
    -------
    array of bool, shape (n,)
    """
    low, high = (len(values) - last, len(values) - first) if descending else (first, last)
    borders = _borders(values, low, high)
    found = np.full(len(values), fill_value=first < last)
    if any(border.parts_equals for border in borders):
        found[:] = False
        found[sorted_order(values[None, :], descending=descending)[0, first:last]] = True
        return found
    for border in borders:
        found &= values >= border.value if border.position == low else values < border.value
    return found


def tied(values: Array, first: int, last: int) -> Array:
    """Return the elements that a sort is free to put inside or outside of positions `first` up to `last`.

    Parameters
    ----------
    values : array, shape (n,)
    first, last : int
        Positions from the smallest, ``0 <= first <= last <= n``.

    Returns
    -------
    array of bool, shape (n,)
        Equal elements of which some are on one side of a border and some on the other.
    """
    found = np.zeros(len(values), dtype=bool)
    for border in _borders(values, first, last):
        if border.parts_equals:
            found |= values == border.value
    return found


@dataclass(frozen=True, slots=True)
class _Border:
    """A position with elements on both sides, the value there, and whether some before it are equal to it."""

    position: int
    value: float
    parts_equals: bool


def _borders(values: Array, first: int, last: int) -> list[_Border]:
    positions = [position for position in (first, last) if 0 < position < len(values) and first < last]
    if not positions:
        return []
    at = np.partition(values, positions)[positions]
    return [
        _Border(position, value, bool(np.count_nonzero(values < value) < position))
        for position, value in zip(positions, at, strict=True)
    ]


def smallest(values: Array, count: int) -> Array:
    """Return which elements ``torch.topk(values, count, largest=False)`` keeps.

    Follows GNU's libstdc++, as torch has it: a heap where at most one of 64 elements is kept, otherwise halves around
    the median of three until three elements are left. The way out of halving that does not get on is not followed; no
    tensor was seen to need it.

    Parameters
    ----------
    values : array, shape (n,)
        No NaN.
    count : int
        ``0 <= count <= n``.

    Returns
    -------
    array of bool, shape (n,)
    """
    found = np.zeros(len(values), dtype=bool)
    if count:
        found[_by_heap(values, count) if count * _FEW <= len(values) else _by_halving(values, count)] = True
    return found


def _by_halving(values: Array, count: int) -> Array:
    """Return which elements ``std::nth_element`` puts first, as indices."""
    values, order = values.copy(), np.arange(len(values))
    first, last = 0, len(values)
    while last - first > _INSERTION:
        cut = first + _partition(values[first:last], order[first:last])
        first, last = (cut, last) if cut < count else (first, cut)
    inside = np.argsort(values[first:last], kind="stable")
    order[first:last] = order[first:last][inside]
    return order[:count]


def _partition(values: Array, order: Array) -> int:
    """Exchange elements in place so that none before the returned position is larger than any after it."""
    middle = _median(values, 1, len(values) // 2, len(values) - 1)
    for array in (values, order):
        array[[0, middle]] = array[[middle, 0]]
    pivot, rest, places = values[0], values[1:], order[1:]
    # Two pointers meet: from the left they stop at elements not below the pivot, from the right at those not above.
    left, right = np.flatnonzero(rest >= pivot), np.flatnonzero(rest <= pivot)[::-1]
    pairs = _crossing(left, right)
    stops = [*left[pairs : pairs + 1], *right[max(0, pairs - 1) : pairs]]
    left, right = left[:pairs], right[:pairs]
    for array in (rest, places):
        array[left], array[right] = array[right], array[left]
    return 1 + int(min(stops))


def _median(values: Array, *at: int) -> int:
    """Return where the median of three elements is, the choice between equal ones as libstdc++'s."""
    first, second, third = at
    a, b, c = values[list(at)]
    if a < b:
        return second if b < c else third if a < c else first
    return first if a < c else third if b < c else second


def _crossing(left: Array, right: Array) -> int:
    """Return how many pairs the pointers exchange before they meet."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if left[middle] < right[middle] else (low, middle)
    return low


def _by_heap(values: Array, count: int) -> list[int]:
    """Return which elements ``std::partial_sort`` puts first, as indices."""
    heap = list(zip(values[:count].tolist(), range(count), strict=True))
    for hole in range(count // 2 - 1, -1, -1):
        _sift(heap, hole, heap[hole])
    for start in range(count, len(values), _CHUNK):
        # The largest one that is kept gets smaller all the time, so most of the rest need not be looked at.
        below = start + np.flatnonzero(values[start : start + _CHUNK] < heap[0][0])
        for value, index in zip(values[below].tolist(), below.tolist(), strict=True):
            if value < heap[0][0]:
                _sift(heap, 0, (value, index))
    return [index for _, index in heap]


def _sift(heap: list[tuple[float, int]], top: int, item: tuple[float, int]) -> None:
    """Put an item into the heap below `top`: down to the end, then up to its place, as libstdc++ does."""
    hole = top
    while (child := 2 * hole + 2) < len(heap):
        child -= heap[child][0] < heap[child - 1][0]
        heap[hole] = heap[child]
        hole = child
    if child == len(heap):
        heap[hole] = heap[child - 1]
        hole = child - 1
    while hole > top and heap[parent := (hole - 1) // 2][0] < item[0]:
        heap[hole] = heap[parent]
        hole = parent
    heap[hole] = item

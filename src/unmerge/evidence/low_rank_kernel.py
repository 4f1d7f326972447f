"""Many small systems of normal equations at once, compiled: one for each row of a matrix.

All are solved together, number by number, so that every inner loop runs over the rows. A system of order r is a column
of an array, shape (r (r + 1) / 2, rows), that holds the lower triangle row by row. Compiled code is kept beside this
file. Reference: Golub and Van Loan, Matrix computations, 4th edition 2013, section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar, cast

import numba

from unmerge.statistics import FloatArray

Function = TypeVar("Function", bound=Callable[..., object])


def _compiled(function: Function) -> Function:
    return cast("Function", numba.njit(nogil=True, cache=True, error_model="numpy")(function))


@_compiled
def _at(row: int, column: int) -> int:
    return row * (row + 1) // 2 + column


@_compiled
def _more(target: FloatArray, one: FloatArray, other: FloatArray) -> None:
    for place in range(len(target)):
        target[place] += one[place] * other[place]


@_compiled
def _less(target: FloatArray, one: FloatArray, other: FloatArray) -> None:
    for place in range(len(target)):
        target[place] -= one[place] * other[place]


@_compiled
def _times(target: FloatArray, factor: FloatArray) -> None:
    for place in range(len(target)):
        target[place] *= factor[place]


@_compiled
def _over(target: FloatArray, divisor: FloatArray) -> None:
    for place in range(len(target)):
        target[place] /= divisor[place]


@_compiled
def decompose(grams: FloatArray, order: int, ridge: float) -> None:
    """Replace positive definite matrices A by L with L L' = A + ridge trace(A) I."""
    rows = grams.shape[1]
    for row in range(rows):
        trace = 0.0
        for one in range(order):
            trace += grams[_at(one, one), row]
        for one in range(order):
            grams[_at(one, one), row] += ridge * trace + 1e-30
    for one in range(order):
        for other in range(one + 1):
            target = grams[_at(one, other)]
            for before in range(other):
                _less(target, grams[_at(one, before)], grams[_at(other, before)])
            if other < one:
                _over(target, grams[_at(other, other)])
            else:
                for row in range(rows):
                    target[row] = math.sqrt(target[row])


@_compiled
def solve(lower: FloatArray, forces: FloatArray) -> None:
    """Replace right sides, shape (r, rows), by the solutions, given what `decompose` makes."""
    order = len(forces)
    for one in range(order):
        for before in range(one):
            _less(forces[one], lower[_at(one, before)], forces[before])
        _over(forces[one], lower[_at(one, one)])
    for one in range(order - 1, -1, -1):
        for after in range(one + 1, order):
            _less(forces[one], lower[_at(after, one)], forces[after])
        _over(forces[one], lower[_at(one, one)])


@_compiled
def invert(lower: FloatArray, order: int) -> None:
    """Replace what `decompose` makes by the lower triangles of the inverses."""
    _invert_lower(lower, order)
    # A row of the square needs only the rows below, which are still those of the inverse of L.
    for one in range(order):
        for other in range(one + 1):
            target = lower[_at(one, other)]
            _times(target, lower[_at(one, one)])
            for after in range(one + 1, order):
                _more(target, lower[_at(after, one)], lower[_at(after, other)])


@_compiled
def _invert_lower(lower: FloatArray, order: int) -> None:
    for one in range(order):
        diagonal = lower[_at(one, one)]
        for row in range(len(diagonal)):
            diagonal[row] = 1.0 / diagonal[row]
        for other in range(one):
            target = lower[_at(one, other)]
            for row in range(len(target)):
                target[row] *= -lower[_at(other, other), row]
            for between in range(other + 1, one):
                _less(target, lower[_at(one, between)], lower[_at(between, other)])
            _times(target, diagonal)

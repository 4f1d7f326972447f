"""Changes of low rank, fitted to elements that say unequally much: L R' with weights, its tangents and its errors.

Weighted least squares by turns for the rows of L and of R: given one, each row of the other is a small problem of its
own. Reference: Gabriel and Zamir, Lower rank approximation of matrices by least squares with any choice of weights,
1979.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unmerge.statistics import FloatArray

MOST_DIRECTIONS = 40
"""Directions that are looked for at most."""
TURNS = 2
"""Turns of a fit that starts near its end."""
TANGENT_TURNS = 4
"""Turns of a projection that starts at zero."""
_RIDGE = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """A matrix left @ right.T of rank r: shapes (n, r) and (m, r)."""

    left: FloatArray
    right: FloatArray

    @property
    def product(self) -> FloatArray:
        """The matrix, shape (n, m)."""
        return np.asarray(self.left @ self.right.T)

    @property
    def rank(self) -> int:
        """The number of directions."""
        return int(self.left.shape[1])


def leading(matrix: FloatArray, rank: int | None = None) -> Factors:
    """Return so many leading directions, or those that noise of one level would not make.

    The cut is that of Gavish and Donoho, The optimal hard threshold for singular values, 2014, for a level that is
    not known: 2.86 times the median singular value of a square matrix.
    """
    if matrix.shape[0] > matrix.shape[1]:
        turned = leading(matrix.T, rank)
        return Factors(turned.right, turned.left)
    # Of the leading ones the squares are as good, and far quicker than a singular value decomposition.
    squares, directions = np.linalg.eigh(matrix @ matrix.T)
    singular, directions = np.sqrt(squares[::-1].clip(0.0)), directions[:, ::-1]
    if rank is None:
        ratio = matrix.shape[0] / matrix.shape[1]
        cut = (0.56 * ratio**3 - 0.95 * ratio**2 + 1.82 * ratio + 1.43) * float(np.median(singular))
        rank = min(int(np.count_nonzero(singular > cut)), MOST_DIRECTIONS)
    left, roots = directions[:, :rank], np.sqrt(np.maximum(singular[:rank], 1e-30))
    return Factors(left * roots, matrix.T @ left / roots)


def refitted(values: FloatArray, precision: FloatArray, factors: Factors) -> Factors:
    """Return factors nearer to values, shape (n, m), by weighted least squares; `precision` is an inverse variance."""
    left, right = factors.left, factors.right
    for _ in range(TURNS):
        left = _rows(precision * values, precision, right)
        right = _rows((precision * values).T, precision.T, left)
    return Factors(left, right)


def tangents(forces: Sequence[FloatArray], precision: FloatArray, at: Factors) -> list[tuple[FloatArray, FloatArray]]:
    """Return how the factors move, shapes (n, r) and (m, r), if every element is pulled; for each of some pulls.

    The moves minimise sum(precision * move**2) / 2 - sum(force * move) with move = left' R' + L right'.
    """
    inverses = _inverses(precision, at.right), _inverses(precision.T, at.left)
    return [_tangent(force, precision, at, inverses) for force in forces]


def _tangent(
    force: FloatArray, precision: FloatArray, at: Factors, inverses: tuple[FloatArray, FloatArray]
) -> tuple[FloatArray, FloatArray]:
    left, right = np.zeros_like(at.left), np.zeros_like(at.right)
    for _ in range(TANGENT_TURNS):
        rest = force - precision * (at.left @ right.T)
        left = _solved(inverses[0], rest @ at.right)
        rest = force - precision * (left @ at.right.T)
        right = _solved(inverses[1], rest.T @ at.left)
    return left, right


def variance(precision: FloatArray, at: Factors) -> FloatArray:
    """Return the variance of each element of the product, shape (n, m); rows of L and of R counted apart."""
    of_left, of_right = _inverses(precision, at.right), _inverses(precision.T, at.left)
    return np.asarray(_flat(of_left) @ _squares(at.right).T + _squares(at.left) @ _flat(of_right).T)


def _rows(force: FloatArray, precision: FloatArray, other: FloatArray) -> FloatArray:
    return _solved(_inverses(precision, other), force @ other)


def _solved(inverses: FloatArray, forces: FloatArray) -> FloatArray:
    return np.asarray(np.matmul(inverses, forces[:, :, None])[:, :, 0])


def _inverses(precision: FloatArray, other: FloatArray) -> FloatArray:
    """Return for each row the inverse of sum_j precision_j other_j other_j', shape (n, r, r)."""
    rank = other.shape[1]
    grams = (precision @ _squares(other)).reshape(-1, rank, rank)
    ridge = _RIDGE * np.trace(grams, axis1=1, axis2=2) + 1e-30
    return np.asarray(np.linalg.inv(grams + ridge[:, None, None] * np.eye(rank)))


def _squares(rows: FloatArray) -> FloatArray:
    return np.asarray((rows[:, :, None] * rows[:, None, :]).reshape(len(rows), -1))


def _flat(matrices: FloatArray) -> FloatArray:
    return np.asarray(matrices.reshape(len(matrices), -1))

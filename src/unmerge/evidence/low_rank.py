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


def refitted(values: FloatArray, precision: FloatArray, factors: Factors) -> tuple[Factors, FloatArray]:
    """Return factors nearer to values, shape (n, m), by weighted least squares; `precision` is an inverse variance.

    Also return the variance of each element of their product, shape (n, m); rows of L and of R are counted apart.
    """
    force, turned, left, right = precision * values, precision.T, factors.left, factors.right
    for _ in range(TURNS):
        left = _solved(_systems(precision, right), force @ right)
        beside = _systems(turned, left)
        right = _solved(beside, force.T @ left)
    of_left, of_right = _inverses(_systems(precision, right), right.shape[1]), _inverses(beside, right.shape[1])
    return Factors(left, right), np.asarray(of_left.T @ _squares(right) + _squares(left).T @ of_right)


def tangents(forces: Sequence[FloatArray], precision: FloatArray, at: Factors) -> list[tuple[FloatArray, FloatArray]]:
    """Return how the factors move, shapes (n, r) and (m, r), if every element is pulled; for each of some pulls.

    The moves minimise sum(precision * move**2) / 2 - sum(force * move) with move = left' R' + L right'.
    """
    systems = _systems(precision, at.right), _systems(precision.T, at.left)
    return [_tangent(force, precision, at, systems) for force in forces]


def _tangent(
    force: FloatArray, precision: FloatArray, at: Factors, systems: tuple[FloatArray, FloatArray]
) -> tuple[FloatArray, FloatArray]:
    left, right = np.zeros_like(at.left), np.zeros_like(at.right)
    for _ in range(TANGENT_TURNS):
        rest = force - precision * (at.left @ right.T)
        left = _solved(systems[0], rest @ at.right)
        rest = force - precision * (left @ at.right.T)
        right = _solved(systems[1], rest.T @ at.left)
    return left, right


def _systems(precision: FloatArray, other: FloatArray) -> FloatArray:
    """Return for each row sum_j precision_j other_j other_j', decomposed, shape (r (r + 1) / 2, n)."""
    from unmerge.evidence.low_rank_kernel import decompose

    grams = np.ascontiguousarray(_squares(other) @ precision.T)
    decompose(grams, other.shape[1], _RIDGE)
    return grams


def _solved(systems: FloatArray, forces: FloatArray) -> FloatArray:
    from unmerge.evidence.low_rank_kernel import solve

    solutions = np.array(forces.T, order="C")
    solve(systems, solutions)
    return np.ascontiguousarray(solutions.T)


def _inverses(systems: FloatArray, rank: int) -> FloatArray:
    """Return what the products of `_squares` are weighed with, shape (r (r + 1) / 2, n)."""
    from unmerge.evidence.low_rank_kernel import invert

    inverses = systems.copy()
    invert(inverses, rank)
    rows, columns = np.tril_indices(rank)
    return inverses * np.where(rows == columns, 1.0, 2.0)[:, None]


def _squares(rows: FloatArray) -> FloatArray:
    """Return the products of each row's elements with each other, shape (r (r + 1) / 2, n)."""
    one, other = np.tril_indices(rows.shape[1])
    columns = np.ascontiguousarray(rows.T)
    return np.asarray(columns[one] * columns[other])

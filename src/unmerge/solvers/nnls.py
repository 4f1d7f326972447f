"""Non-negative and ordinary least squares: the paper's first choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from unmerge.solvers.active_set import Minimum, minimise
from unmerge.solvers.base import Solution, check_not_negative
from unmerge.solvers.problem import Problem, Spectrum
from unmerge.solvers.threshold import cut
from unmerge.statistics import FloatArray, Statistics

# Eigenvectors of a gap of 1e-9 are exact to about this much.
ROUNDING_OF_NULL = 1e-7
# A gradient in unit vectors below this is zero.
ZERO_GRADIENT = 1e-9
# What is left of a coefficient that ends at the bound is rounding below this.
NEGLIGIBLE = 1e-12


@dataclass(frozen=True, slots=True)
class Nnls:
    """Least squares, by default with coefficients that are not negative (paper, Equation 3).

    Minimises ||v - D a||^2 subject to a >= 0. Equivalent to ``scipy.optimize.nnls(D, v)``, and with `signed`
    to ``numpy.linalg.lstsq(D, v)``. Where atoms are collinear the minimiser is not unique: the answer is then
    the one of least norm in unit atoms, so that copies share evenly.

    Parameters
    ----------
    signed : bool
        Whether coefficients may be negative: ordinary least squares.
    threshold : float
        Coefficients at or below it (with `signed`: in absolute value) are set to zero after solving, without
        solving again. The paper's code uses 0.01.

    References
    ----------
    Lawson and Hanson, Solving Least Squares Problems, 1974, chapters 23.3 (NNLS) and 23.4 (LDP).
    """

    name: ClassVar[str] = "nnls"

    signed: bool = False
    threshold: float = 0.0

    def __post_init__(self) -> None:
        check_not_negative("threshold", self.threshold)

    def solve(self, statistics: Statistics) -> Solution:
        """Return the least-squares coefficients."""
        problem = Problem.of(statistics)
        if self.signed:
            solution = problem.solution(problem.spectrum.least_norm(problem.correlation))
        else:
            minimum = _non_negative(problem)
            solution = problem.solution(minimum.unit, iterations=minimum.iterations, converged=minimum.converged)
        return cut(solution, self.threshold, signed=self.signed)


def _non_negative(problem: Problem) -> Minimum:
    none = np.zeros(problem.size)
    if not problem.singular:
        found = minimise(problem, none, none, signed=False)
        if found.converged:
            return found
    spectrum = problem.spectrum
    # Pseudo-data of r <= k rows with the same normal equations: A'A = C and A'y = c.
    roots = np.sqrt(spectrum.values)
    A = roots[:, None] * spectrum.vectors.T
    y = (spectrum.vectors.T @ problem.correlation) / roots
    unit = _scipy(A, y)
    gradient = A.T @ (y - A @ unit)
    if np.where(unit > 0.0, np.abs(gradient), gradient).max(initial=0.0) > ZERO_GRADIENT:
        # SciPy gave up, or stopped early, as it does on some problems of deficient rank.
        return minimise(problem, none, none, signed=False)
    return Minimum(_shortest(A, gradient, unit) if problem.singular else unit, 0, converged=True)


def _scipy(A: FloatArray, y: FloatArray) -> FloatArray:
    """Return SciPy's answer, or zeros if it has none."""
    from scipy.optimize import nnls

    if not A.size:
        return np.zeros(A.shape[1])
    try:
        return np.asarray(nnls(A, y)[0], dtype=np.float64)
    except RuntimeError:  # its way to say that it ran out of iterations
        return np.zeros(A.shape[1])


def _shortest(A: FloatArray, gradient: FloatArray, unit: FloatArray) -> FloatArray:
    """Return the shortest minimiser of ||y - A z|| over z >= 0, given one, `unit`, and A'(y - A unit)."""
    # All minimisers have one gradient, and where it is not zero they are: only the others may share.
    free = (unit > 0.0) | (gradient > -ZERO_GRADIENT)
    null = Spectrum.of(A[:, free].T @ A[:, free]).null
    shortest = unit.copy()
    shortest[free] = _least_distance(unit[free], null)
    return shortest


def _least_distance(unit: FloatArray, null: FloatArray) -> FloatArray:
    """Return the shortest z >= 0 that differs from `unit`, which is one, by a null direction.

    With z = p + N t, p orthogonal to N, this is Lawson and Hanson's least-distance problem in t: minimise
    ||t|| subject to N t >= -p. Its dual is one more NNLS.
    """
    shortest = unit - null @ (null.T @ unit)
    # An atom outside the null space has only rounding there, which must not act as a constraint.
    tied = np.abs(null).max(axis=1, initial=0.0) > ROUNDING_OF_NULL
    size = float(np.abs(unit[tied]).max(initial=0.0))
    if size == 0.0:
        return unit
    E = np.vstack([null[tied].T, -shortest[tied] / size])
    f = np.zeros(len(E))
    f[-1] = 1.0
    residual = E @ _scipy(E, f) - f
    moved = shortest - null @ (residual[:-1] / residual[-1] * size)
    if moved.min() < -ZERO_GRADIENT * size:  # the minimisers leave no room to move in: `unit` is as good
        return unit
    return np.asarray(np.where(moved > NEGLIGIBLE * size, moved, 0.0))

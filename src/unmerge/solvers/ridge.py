"""L2-penalised least squares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from unmerge.solvers.active_set import minimise
from unmerge.solvers.base import Solution, check_not_negative
from unmerge.solvers.problem import Problem, Spectrum
from unmerge.statistics import FloatArray, Statistics


@dataclass(frozen=True, slots=True)
class Ridge:
    """Least squares with an L2 penalty (paper, Equation 5), in scikit-learn's convention.

    Minimises ||v - D a||^2 + alpha ||a||^2: unlike Lasso's, the data term is not divided by 2 n. Equivalent
    to ``sklearn.linear_model.Ridge(alpha, fit_intercept=False, positive=not signed)``.

    Parameters
    ----------
    penalty : float
        By default alpha is this fraction of the mean energy ||d_i||^2 of the atoms that are not zero, so that
        one setting fits any energy. (No alpha_max exists: a ridge never reaches zero.)
    relative : bool
        If false, `penalty` is scikit-learn's alpha itself, in squared weight units, as in the paper's grid.
    signed : bool
        Whether coefficients may be negative.

    References
    ----------
    Hoerl and Kennard, Ridge regression: biased estimation for nonorthogonal problems, 1970.
    """

    name: ClassVar[str] = "ridge"

    penalty: float = 1e-3
    relative: bool = True
    signed: bool = True

    def __post_init__(self) -> None:
        check_not_negative("penalty", self.penalty)

    def solve(self, statistics: Statistics) -> Solution:
        """Return the penalised least-squares coefficients."""
        problem = Problem.of(statistics)
        energies = problem.norms**2
        alpha = self.penalty * float(energies.mean()) if self.relative and problem.size else self.penalty
        l2 = alpha / energies
        if self.signed:
            return problem.solution(_damped(problem, l2))
        minimum = minimise(problem, np.zeros(problem.size), l2, signed=False)
        return problem.solution(minimum.unit, iterations=minimum.iterations, converged=minimum.converged)


def _damped(problem: Problem, l2: FloatArray) -> FloatArray:
    """Solve (C + diag(l2)) z = c; where that is still singular, for the shortest z."""
    # Rescaled to unit diagonal once more, because atoms of unequal energy are damped unequally.
    scale = 1.0 / np.sqrt(1.0 + l2)
    H = scale[:, None] * (problem.cosines + np.diag(l2)) * scale
    if problem.singular:
        return scale * Spectrum.of(H).least_norm(scale * problem.correlation)
    return np.asarray(scale * np.linalg.solve(H, scale * problem.correlation))

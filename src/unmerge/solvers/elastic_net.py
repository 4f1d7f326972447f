"""L1 and L2 penalties together; the Lasso is its L1 end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from unmerge.solvers.active_set import minimise
from unmerge.solvers.base import Solution, check_not_negative
from unmerge.solvers.problem import Problem
from unmerge.statistics import Statistics


@dataclass(frozen=True, slots=True)
class ElasticNet:
    """Least squares with an L1 and an L2 penalty (paper, Section 3.5), in scikit-learn's convention.

    Minimises ||v - D a||^2 / (2 n) + alpha l1_ratio ||a||_1 + alpha (1 - l1_ratio) ||a||^2 / 2. Equivalent to
    ``sklearn.linear_model.ElasticNet(alpha, l1_ratio=l1_ratio, fit_intercept=False, positive=not signed)``,
    solved exactly.

    Parameters
    ----------
    penalty : float
        By default alpha is this fraction of alpha_max = max |D'v| / (n l1_ratio), at which all coefficients
        become zero (unsigned: of max D'v), so that one setting fits any energy.
    l1_ratio : float
        Share of the L1 penalty, above 0 and up to 1.
    relative : bool
        If false, `penalty` is scikit-learn's alpha itself, in squared weight units, as in the paper's grid.
    signed : bool
        Whether coefficients may be negative.

    References
    ----------
    Zou and Hastie, Regularization and variable selection via the elastic net, 2005.
    """

    name: ClassVar[str] = "elastic_net"

    penalty: float = 0.01
    l1_ratio: float = 0.5
    relative: bool = True
    signed: bool = True

    def __post_init__(self) -> None:
        check_not_negative("penalty", self.penalty)
        if not 0.0 < self.l1_ratio <= 1.0:
            raise ValueError(f"l1_ratio is {self.l1_ratio}, expected above 0 and up to 1; for 0 use Ridge")

    def solve(self, statistics: Statistics) -> Solution:
        """Return the penalised least-squares coefficients."""
        problem = Problem.of(statistics)
        n_alpha = self._n_alpha(problem, statistics.count)
        l1 = n_alpha * self.l1_ratio / (problem.length * problem.norms)
        l2 = n_alpha * (1.0 - self.l1_ratio) / problem.norms**2
        minimum = minimise(problem, l1, l2, signed=self.signed)
        return problem.solution(minimum.unit, iterations=minimum.iterations, converged=minimum.converged)

    def _n_alpha(self, problem: Problem, count: int) -> float:
        """Return n times scikit-learn's alpha, in squared weight units."""
        if not self.relative:
            return self.penalty * count
        inner = problem.correlation * problem.norms * problem.length
        largest = np.abs(inner) if self.signed else inner
        return self.penalty * float(largest.max(initial=0.0)) / self.l1_ratio

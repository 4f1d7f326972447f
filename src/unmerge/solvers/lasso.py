"""L1-penalised least squares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unmerge.solvers.base import Solution, check_not_negative
from unmerge.solvers.elastic_net import ElasticNet
from unmerge.statistics import Statistics


@dataclass(frozen=True, slots=True)
class Lasso:
    """Least squares with an L1 penalty (paper, Equation 4), in scikit-learn's convention.

    Minimises ||v - D a||^2 / (2 n) + alpha ||a||_1. Equivalent to
    ``sklearn.linear_model.Lasso(alpha, fit_intercept=False, positive=not signed)``, solved exactly. The
    paper's Equation 4 has no 1 / (2 n), its code does.

    Parameters
    ----------
    penalty : float
        By default alpha is this fraction of alpha_max = max |D'v| / n, at which all coefficients become zero
        (unsigned: of max D'v), so that one setting fits any energy.
    relative : bool
        If false, `penalty` is scikit-learn's alpha itself, in squared weight units, as in the paper's grid.
    signed : bool
        Whether coefficients may be negative.

    References
    ----------
    Tibshirani, Regression shrinkage and selection via the lasso, 1996.
    """

    name: ClassVar[str] = "lasso"

    penalty: float = 0.01
    relative: bool = True
    signed: bool = True

    def __post_init__(self) -> None:
        check_not_negative("penalty", self.penalty)

    def solve(self, statistics: Statistics) -> Solution:
        """Return the penalised least-squares coefficients."""
        return ElasticNet(self.penalty, l1_ratio=1.0, relative=self.relative, signed=self.signed).solve(statistics)

"""One atom at a time, as if the others were not there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unmerge.solvers.base import Solution, check_not_negative
from unmerge.solvers.problem import Problem
from unmerge.solvers.threshold import cut
from unmerge.statistics import Statistics


@dataclass(frozen=True, slots=True)
class DotProduct:
    """Projection of the target on each atom alone (paper, Section 3.5).

    By default a_i = <d_i, v> / ||d_i||^2, the least-squares coefficient if d_i were the only atom:
    dimensionless, and right if the atoms are orthogonal. The paper's code divides by the length once,
    a_i = <d_i, v> / ||d_i||: a length in weight units, neither a cosine nor a projection.

    Parameters
    ----------
    threshold : float
        Values at or below it are set to zero; with `signed`, in absolute value. It is applied to whatever
        `normalized` asks for: a coefficient by default, a length in weight units in the paper's form.
    normalized : bool
        Whether to divide by the squared length. ``DotProduct(normalized=False)`` is the paper's.
    signed : bool
        Whether coefficients may be negative.
    """

    name: ClassVar[str] = "dot_product"

    threshold: float = 0.01
    normalized: bool = True
    signed: bool = False

    def __post_init__(self) -> None:
        check_not_negative("threshold", self.threshold)

    def solve(self, statistics: Statistics) -> Solution:
        """Return one projection per atom."""
        problem = Problem.of(statistics)
        unit = problem.correlation if self.normalized else problem.correlation * problem.norms
        return cut(problem.solution(unit), self.threshold, signed=self.signed)

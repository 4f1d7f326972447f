"""Orthogonal matching pursuit: atoms one at a time, the best first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from unmerge.solvers.active_set import ROUNDING, active_set
from unmerge.solvers.base import Solution
from unmerge.solvers.problem import COLLINEARITY, IntArray, Problem
from unmerge.statistics import FloatArray, Statistics

# Scores this close are a tie, which the first atom wins: rounding must not choose.
TIE = 1e-12


@dataclass(frozen=True, slots=True)
class Omp:
    """Greedy selection: add the atom closest in angle to the residual, fit again (paper, Section 3.5).

    Equivalent to ``sklearn.linear_model.orthogonal_mp_gram(D'D, D'v, n_nonzero_coefs=n_atoms)`` for atoms of
    unit length, which scikit-learn assumes. Unlike there, both limits hold at once, and `tolerance` is
    relative. An atom that is a combination of those already chosen is never added: of two copies the first
    is taken, because sharing would not be sparse.

    Parameters
    ----------
    n_atoms : int or None
        The most atoms to use; None for no limit.
    tolerance : float
        Stop once ||v - D a||^2 <= tolerance ||v||^2.
    signed : bool
        Whether coefficients may be negative. If not, only atoms at an acute angle enter, each fit is
        non-negative, and an atom whose coefficient falls to zero leaves.

    References
    ----------
    Pati, Rezaiifar and Krishnaprasad, Orthogonal matching pursuit, 1993.
    Bruckstein, Elad and Zibulevsky, On the uniqueness of nonnegative sparse solutions to underdetermined
    systems of equations, 2008 (the non-negative variant).
    """

    name: ClassVar[str] = "omp"

    n_atoms: int | None = None
    tolerance: float = 1e-6
    signed: bool = True

    def __post_init__(self) -> None:
        if self.n_atoms is not None and self.n_atoms < 1:
            raise ValueError(f"n_atoms is {self.n_atoms}, expected at least 1, or None for no limit")
        if not 0.0 <= self.tolerance < 1.0:
            raise ValueError(f"tolerance is {self.tolerance}, expected a share of the energy in [0, 1)")

    def solve(self, statistics: Statistics) -> Solution:
        """Return the coefficients of the chosen atoms, zero for the others."""
        problem = Problem.of(statistics)
        c, C = problem.correlation, problem.cosines
        most = problem.size if self.n_atoms is None else min(self.n_atoms, problem.size)
        z = np.zeros(problem.size)
        open_to = np.ones(problem.size, dtype=bool)
        steps = 0
        # In unit vectors the residual energy of a least-squares fit, free or non-negative, is 1 - c'z.
        while np.count_nonzero(z) < most and 1.0 - float(c @ z) > self.tolerance:
            entering = self._best(C @ z, c, np.abs(z).sum(), open_to & (z == 0.0))
            if entering is None:
                break
            support = np.flatnonzero(z)
            if problem.singular and _dependent(C, support, entering):
                open_to[entering] = False
                continue
            wider = np.append(support, entering)
            z[wider] = self._fit(C[np.ix_(wider, wider)], c[wider], z[wider])
            steps += 1
            if steps > 30 * (problem.size + 1):
                return problem.solution(z, iterations=steps, converged=False)
        return problem.solution(z, iterations=steps)

    def _best(self, fitted: FloatArray, c: FloatArray, size: float, allowed: NDArray[np.bool_]) -> int | None:
        """Return the allowed atom at the smallest angle with the residual, if any is not orthogonal to it."""
        residual = c - fitted
        score = np.where(allowed, np.abs(residual) if self.signed else residual, 0.0)
        best = float(score.max(initial=0.0))
        if best <= ROUNDING * (1.0 + size):
            return None
        return int(np.flatnonzero(score >= best * (1.0 - TIE))[0])

    def _fit(self, C: FloatArray, c: FloatArray, start: FloatArray) -> FloatArray:
        free = np.linalg.solve(C, c)
        if self.signed or free.min() > 0.0:
            return np.asarray(free)
        return active_set(C, c, np.zeros(len(c)), signed=False, start=start).unit


def _dependent(C: FloatArray, support: IntArray, entering: int) -> bool:
    """Tell whether the part of an atom that is orthogonal to the support is numerically nothing."""
    across = C[support, entering]
    inside = float(across @ np.linalg.solve(C[np.ix_(support, support)], across))
    return bool(1.0 - inside <= COLLINEARITY)

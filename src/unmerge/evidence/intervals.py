"""Confidence intervals for coefficients, from how the tensors of a checkpoint disagree."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import add

import numpy as np
from numpy.typing import NDArray

from unmerge.solvers.base import Solution, Solver, Status
from unmerge.solvers.problem import COLLINEARITY
from unmerge.statistics import FloatArray, Statistics

MOST_GROUPS = 40
"""More groups change a Student quantile by less than 2 % and cost one solve each."""


def jackknife_intervals(parts: Sequence[Statistics], solver: Solver, level: float = 0.95) -> FloatArray:
    """Return a confidence interval for each coefficient, by leaving out one group of tensors at a time.

    The variance of coefficient k is the sum over groups j of (1 - w_jk) (a_k(-j) - a_k)^2, where a(-j) is the
    solution without group j and w_jk the group's share of the energy of atom k: the delete-group jackknife
    for groups of unequal size, in the form that stays valid if the noise differs between tensors. The
    quantile is Student's with 1 / sum_j w_jk^2 - 1 degrees of freedom, the effective number of groups less
    one.

    Parameters
    ----------
    parts : sequence of Statistics
        Disjoint sets of parameters, one per tensor; at least one. More than 40 are joined into 40 groups of
        about equal energy, always in the same way.
    solver : Solver
        The interval is around its solution over all parts.
    level : float
        Coverage, between 0 and 1.

    Returns
    -------
    array, shape (K, 2)
        Low and high ends, dimensionless. -inf and inf where nothing is known: the atom is zero or collinear,
        a solve failed, or its energy sits in fewer than 2 effective groups. Low ends are at least 0 for a
        solver that is not signed. JSON has no infinity: write null.

    Notes
    -----
    A coefficient of zero sits at a bound (non-negativity, a penalty, a threshold), where leaving out tensors
    changes nothing. Its interval comes from the least-squares coefficient that it would have beside the
    support, and always includes 0.

    Assumes that tensors err independently and share one true coefficient per atom; if the coefficients differ
    between layers, the interval is for their mean and the difference counts as noise. It says nothing about
    what all tensors have in common: an ingredient outside the dictionary that resembles an atom shifts its
    coefficient, and a penalty shrinks it, without widening the interval. Coefficients of ``DotProduct`` are
    not least-squares coefficients, so the rule for zeros does not describe them.

    References
    ----------
    Hinkley, Jackknifing in unbalanced situations, 1977. Busing, Meijer and van der Leeden, Delete-m jackknife
    for unequal m, 1999: the same for groups that differ in size only. Their weights trust each group's own
    energy as its precision, and cover 84 % instead of 95 % where the noise grows with the energy.
    """
    if not parts:
        raise ValueError("parts is empty, expected the statistics of at least one tensor")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level}, expected a number between 0 and 1")
    total = reduce(add, parts)
    solution = solver.solve(total)
    if not _usable(solution):
        return _unknown(total.atoms, solver)
    groups = _balanced_groups(parts, total)
    left_out = [reduce(add, _others(groups, j), Statistics.zero(total.atoms)) for j in range(len(groups))]
    support = solution.coefficients != 0.0
    center = _estimate(total, support, solution)
    replicates = np.array([_estimate(rest, support, solver.solve(rest)) for rest in left_out])
    half = _half_widths(replicates - center, _shares(groups, total), level)
    return _around(center, half, support, solver)


def _usable(solution: Solution) -> bool:
    return solution.status not in (Status.NOT_FINITE, Status.NOT_CONVERGED, Status.ZERO_TARGET)


def _estimate(statistics: Statistics, support: NDArray[np.bool_], solution: Solution) -> FloatArray:
    """Return the solver's coefficients on the support and free ones beside it; NaN where undetermined."""
    estimate = np.where(support, solution.coefficients, _free(statistics, support))
    estimate[[atom for group in solution.groups for atom in group]] = np.nan
    return estimate if _usable(solution) else np.full_like(estimate, np.nan)


def _free(statistics: Statistics, support: NDArray[np.bool_]) -> FloatArray:
    """Return the least-squares coefficient of each atom if it alone joined the support.

    With P the part of an atom orthogonal to the support: <P d_k, v> / ||P d_k||^2. Meaningless for atoms of
    the support itself and for those that are collinear with it.
    """
    norms = np.sqrt(np.diagonal(statistics.gram))
    norms = np.where(norms > 0.0, norms, 1.0)
    C = statistics.gram / norms / norms[:, None]
    c = statistics.correlation / norms
    inside, across = C[np.ix_(support, support)], C[support]
    explained = across.T @ np.linalg.lstsq(inside, np.column_stack([across, c[support]]), rcond=COLLINEARITY)[0]
    energy = np.diagonal(C) - np.diagonal(explained)
    with np.errstate(divide="ignore", invalid="ignore"):
        free: FloatArray = (c - explained[:, -1]) / energy / norms
    return free


def _half_widths(deviations: FloatArray, shares: FloatArray, level: float) -> FloatArray:
    """Return half the width of each interval; NaN where the energy sits in fewer than 2 effective groups."""
    from scipy.special import stdtrit

    concentration = (shares**2).sum(axis=0)
    freedom: FloatArray = (
        np.divide(1.0, concentration, out=np.zeros_like(concentration), where=concentration > 0.0) - 1.0
    )
    variance = ((1.0 - shares) * deviations**2).sum(axis=0)
    quantile = stdtrit(np.maximum(freedom, 1.0), 0.5 + 0.5 * level)
    # Rounding makes two equal halves a little less than 2 effective groups.
    return np.asarray(np.where(freedom > 1.0 - 1e-9, quantile * np.sqrt(variance), np.nan))


def _around(center: FloatArray, half: FloatArray, support: NDArray[np.bool_], solver: Solver) -> FloatArray:
    low, high = center - half, center + half
    low = np.where(support, low, np.minimum(low, 0.0))
    high = np.where(support, high, np.maximum(high, 0.0))
    if not solver.signed:
        low = np.maximum(low, 0.0)
    unknown = _unknown(len(center), solver)
    unclear = np.isnan(low + high)[:, None]
    return np.asarray(np.where(unclear, unknown, np.column_stack([low, high])))


def _unknown(atoms: int, solver: Solver) -> FloatArray:
    return np.tile([-np.inf if solver.signed else 0.0, np.inf], (atoms, 1))


def _shares(parts: Sequence[Statistics], total: Statistics) -> FloatArray:
    """Return which share of the energy of each atom lies in each part, shape (parts, K); 0 for zero atoms."""
    energies = np.array([np.diagonal(part.gram) for part in parts])
    whole = np.diagonal(total.gram)
    shares: FloatArray = np.divide(energies, whole, out=np.zeros_like(energies), where=whole > 0.0)
    return shares


def _balanced_groups(parts: Sequence[Statistics], total: Statistics) -> list[Statistics]:
    """Join parts into at most `MOST_GROUPS` groups of about equal energy, each atom counting the same.

    The heaviest part goes first, always to the lightest group; ties go to the first of them.
    """
    weights = _shares(parts, total).sum(axis=1)
    count = max(1, min(MOST_GROUPS, int(np.count_nonzero(weights))))
    groups = [Statistics.zero(total.atoms) for _ in range(count)]
    lightest = [(0.0, group) for group in range(count)]
    for index in np.argsort(-weights, kind="stable"):
        load, group = lightest[0]
        groups[group] = groups[group] + parts[index]
        heapq.heapreplace(lightest, (load + float(weights[index]), group))
    return groups


def _others(groups: Sequence[Statistics], left_out: int) -> Iterable[Statistics]:
    return (group for index, group in enumerate(groups) if index != left_out)

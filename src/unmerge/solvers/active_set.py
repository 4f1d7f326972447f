"""Exact minimisation of a quadratic plus a weighted L1 norm, over k coefficients or their non-negative part.

Coordinate descent needs thousands of sweeps on a dictionary of siblings; k is small, so an active-set method
that ends at the exact minimum is both simpler to trust and faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unmerge.solvers.problem import Problem
from unmerge.statistics import FloatArray

# Weight of the proximal term that makes a singular problem strictly convex, in unit atoms.
PROXIMAL = 1e-6
PROXIMAL_STEPS = 300
PROXIMAL_TOLERANCE = 1e-8
ROUNDING = 64.0 * float(np.finfo(np.float64).eps)


@dataclass(frozen=True, slots=True, eq=False)
class Minimum:
    """Where a minimisation ended: `unit` are the coefficients of unit atoms, shape (k,)."""

    unit: FloatArray
    iterations: int
    converged: bool


def minimise(problem: Problem, l1: FloatArray, l2: FloatArray, *, signed: bool) -> Minimum:
    """Minimise z'C z / 2 - c'z + sum(l1 |z|) + sum(l2 z^2) / 2, subject to z >= 0 unless `signed`.

    Parameters
    ----------
    problem : Problem
        Gives the cosines C, shape (k, k), and the correlation c, shape (k,).
    l1, l2 : array, shape (k,)
        Penalty per unit atom; not negative, dimensionless.
    signed : bool
        Whether coefficients may be negative.

    Notes
    -----
    If C has a null space and `l2` does not fill it, the minimum is approached by proximal-point steps from
    zero. Each step has one minimum, so copies of one atom share evenly and the order of atoms does not
    matter.
    """
    if not problem.singular or (problem.size and l2.min() > PROXIMAL):
        return active_set(problem.cosines + np.diag(l2), problem.correlation, l1, signed=signed)
    spectrum = problem.spectrum
    # Rounding errors in the null space would be amplified by 1 / PROXIMAL.
    H = (spectrum.vectors * spectrum.values) @ spectrum.vectors.T + np.diag(l2)
    c = spectrum.vectors @ (spectrum.vectors.T @ problem.correlation)
    regular = H + PROXIMAL * np.eye(problem.size)
    unit = np.zeros(problem.size)
    iterations = 0
    for _ in range(PROXIMAL_STEPS):
        step = active_set(regular, c + PROXIMAL * unit, l1, signed=signed)
        iterations += step.iterations
        moved = float(np.abs(step.unit - unit).max())
        unit = step.unit
        # The gradient of the singular problem at `unit` is off by PROXIMAL * moved.
        if not step.converged or moved * PROXIMAL <= PROXIMAL_TOLERANCE * float(np.abs(c).max()):
            return Minimum(unit, iterations, step.converged)
    return Minimum(unit, iterations, converged=False)


def active_set(
    H: FloatArray, c: FloatArray, l1: FloatArray, *, signed: bool, start: FloatArray | None = None
) -> Minimum:
    """Minimise z'H z / 2 - c'z + sum(l1 |z|) for a positive definite H, from `start` or from zero.

    All atoms that break the optimality condition enter at once, and leave again if they would cross zero, as in
    Lawson and Hanson's NNLS and the feature-sign search of Lee, Battle, Raina and Ng, Efficient sparse coding
    algorithms, 2007. Along a descent direction at least one of them moves the right way, so the objective falls
    with each pattern of signs, none comes back, and the end is the exact minimum.
    """
    z = np.zeros(len(c)) if start is None else start
    H_size = np.abs(H)
    limit = 30 * (len(c) + 1)
    for iteration in range(limit):
        gradient = H @ z - c
        excess = (np.abs(gradient) if signed else -gradient) - l1
        rounding = ROUNDING * (1.0 + H_size @ np.abs(z))  # c is a cosine
        entering = (z == 0.0) & (excess > rounding)
        moved = _settle(H, c, l1, z, np.sign(z) - entering * np.sign(gradient)) if entering.any() else z
        if np.array_equal(moved, z):
            return Minimum(z, iteration, converged=True)
        z = moved
    return Minimum(z, limit, converged=False)


def _settle(H: FloatArray, c: FloatArray, l1: FloatArray, start: FloatArray, sign: FloatArray) -> FloatArray:
    """Walk from `start` to the minimum for fixed signs; drop the atoms that would cross zero on the way."""
    z = start.copy()
    active = np.flatnonzero(sign)
    while active.size:
        signs = sign[active]
        goal = np.linalg.solve(H[np.ix_(active, active)], c[active] - l1[active] * signs)
        crossing = goal * signs <= 0.0
        if not crossing.any():
            z[active] = goal
            break
        # Where the walk stands, coefficients have the sign of `signs` or are zero: fractions lie in [0, 1].
        here = z[active]
        fraction = np.ones(len(active))
        np.divide(here, here - goal, out=fraction, where=crossing & (here != goal))
        step = float(fraction[crossing].min())
        leaving = crossing & (fraction <= step)
        z[active] = np.where(leaving, 0.0, here + step * (goal - here))
        active = active[~leaving]
    return z

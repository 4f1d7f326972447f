"""The one list of solvers that parametrises every test of this folder, and the problems they are tried on.

A new solver is one row: itself, how far coefficients are from optimal, and an independent way to get them from
the dense problem.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.optimize
from sklearn import linear_model

from unmerge.solvers import DotProduct, ElasticNet, Lasso, Nnls, Omp, Ridge, Solver
from unmerge.statistics import FloatArray, Statistics


@dataclass(frozen=True)
class Case:
    solver: Solver
    violation: Callable[[Solver, Statistics, FloatArray], float]
    oracle: Callable[[Solver, FloatArray, FloatArray], FloatArray]
    # Copies of one atom share evenly; OMP takes the first instead.
    shares: bool = True

    @property
    def id(self) -> str:
        return f"{self.solver.name}-{'signed' if self.solver.signed else 'unsigned'}-{id_of(self.solver)}"


def id_of(solver: Solver) -> str:
    fields = {name: getattr(solver, name) for name in solver.__dataclass_fields__ if name not in ("name", "signed")}
    return "-".join(f"{name}={value}" for name, value in fields.items())


def unit_gradient(statistics: Statistics, coefficients: FloatArray) -> FloatArray:
    """Cosines-like inner products of the atoms with the residual, over the length of the target."""
    lengths = np.sqrt(np.diagonal(statistics.gram) * statistics.energy)
    return (statistics.correlation - statistics.gram @ coefficients) / lengths


def penalised_violation(statistics: Statistics, a: FloatArray, l1: float, l2: float, *, signed: bool) -> float:
    """Distance of zero from the subdifferential of ||v - D a||^2 / 2 + l1 ||a||_1 + l2 ||a||^2 / 2."""
    lengths = np.sqrt(np.diagonal(statistics.gram) * statistics.energy)
    pull = unit_gradient(statistics, a) - l2 * a / lengths
    slack = l1 / lengths
    if not signed and a.min(initial=0.0) < 0.0:
        return np.inf
    at_zero = np.maximum((np.abs(pull) if signed else pull) - slack, 0.0)
    return float(np.where(a == 0.0, at_zero, np.abs(pull - slack * np.sign(a))).max(initial=0.0))


def elastic_net_penalties(solver: Lasso | ElasticNet, statistics: Statistics) -> tuple[float, float]:
    l1_ratio = getattr(solver, "l1_ratio", 1.0)
    b = statistics.correlation
    at_zero = (np.abs(b) if solver.signed else np.maximum(b, 0.0)).max(initial=0.0) / l1_ratio
    n_alpha = solver.penalty * (at_zero if solver.relative else statistics.count)
    return n_alpha * l1_ratio, n_alpha * (1.0 - l1_ratio)


def elastic_net_violation(solver: Solver, statistics: Statistics, a: FloatArray) -> float:
    l1, l2 = elastic_net_penalties(solver, statistics)
    return penalised_violation(statistics, a, l1, l2, signed=solver.signed)


def elastic_net_oracle(solver: Solver, D: FloatArray, v: FloatArray) -> FloatArray:
    l1, l2 = elastic_net_penalties(solver, Statistics.of(D, v))
    if l1 == 0.0:
        return np.zeros(D.shape[1])
    alpha = (l1 + l2) / len(v)
    model = linear_model.ElasticNet(
        alpha, l1_ratio=l1 / (l1 + l2), fit_intercept=False, positive=not solver.signed, tol=1e-14, max_iter=10**6
    )
    return model.fit(D, v).coef_


def ridge_alpha(solver: Ridge, statistics: Statistics) -> float:
    return solver.penalty * (np.diagonal(statistics.gram).mean() if solver.relative else 1.0)


def ridge_violation(solver: Solver, statistics: Statistics, a: FloatArray) -> float:
    return penalised_violation(statistics, a, 0.0, ridge_alpha(solver, statistics), signed=solver.signed)


def ridge_oracle(solver: Solver, D: FloatArray, v: FloatArray) -> FloatArray:
    alpha = ridge_alpha(solver, Statistics.of(D, v))
    if solver.signed:
        return linear_model.Ridge(alpha, fit_intercept=False, solver="svd").fit(D, v).coef_
    longer = np.vstack([D, np.sqrt(alpha) * np.eye(D.shape[1])])
    return scipy.optimize.nnls(longer, np.append(v, np.zeros(D.shape[1])))[0]


def least_squares_violation(solver: Solver, statistics: Statistics, a: FloatArray) -> float:
    return penalised_violation(statistics, a, 0.0, 0.0, signed=solver.signed)


def least_squares_oracle(solver: Solver, D: FloatArray, v: FloatArray) -> FloatArray:
    if not solver.signed:
        return scipy.optimize.nnls(D, v)[0]
    # numpy's cut-off is relative to the longest column, so the columns are given one length.
    norms = np.linalg.norm(D, axis=0)
    return np.linalg.lstsq(D / norms, v)[0] / norms


def omp_violation(solver: Solver, statistics: Statistics, a: FloatArray) -> float:
    """The residual is orthogonal to the support, and each atom was the best one when it entered."""
    pull = unit_gradient(statistics, a)
    support = set(np.flatnonzero(a).tolist())
    if len(support) > (solver.n_atoms or np.inf) or (not solver.signed and a.min(initial=0.0) < 0.0):
        return np.inf
    violation = float(np.abs(pull[list(support)]).max(initial=0.0))
    swapped = solver.solve(statistics).iterations > len(support)  # then no shorter run leads here
    if len(support) < 2 or solver.n_atoms is None or swapped:
        return violation
    before = type(solver)(n_atoms=len(support) - 1, tolerance=solver.tolerance, signed=solver.signed)
    earlier = before.solve(statistics).coefficients
    score = unit_gradient(statistics, earlier)
    score = np.where(earlier == 0.0, np.abs(score) if solver.signed else score, 0.0)
    entered = support - set(np.flatnonzero(earlier).tolist())
    return max(violation, float(score.max()) - max((float(score[atom]) for atom in entered), default=-np.inf))


def omp_oracle(solver: Solver, D: FloatArray, v: FloatArray) -> FloatArray:
    """scikit-learn on unit columns; for non-negative fits, the algorithm in its plainest dense form."""
    norms = np.linalg.norm(D, axis=0)
    unit = D / norms
    most = min(solver.n_atoms or D.shape[1], *D.shape)
    if solver.signed:
        model = linear_model.OrthogonalMatchingPursuit(n_nonzero_coefs=most, fit_intercept=False, precompute=False)
        with warnings.catch_warnings():
            # It stops early, and says so, where the residual is already zero.
            warnings.filterwarnings("ignore", "Orthogonal matching pursuit ended prematurely", RuntimeWarning)
            return model.fit(unit, v).coef_ / norms
    z = np.zeros(D.shape[1])
    while np.count_nonzero(z) < most:
        score = np.where(z == 0.0, unit.T @ (v - unit @ z), 0.0)
        if score.max() <= 1e-12 * np.linalg.norm(v):
            break
        support = np.append(np.flatnonzero(z), np.argmax(score))
        z = np.zeros(D.shape[1])
        z[support] = scipy.optimize.nnls(unit[:, support], v)[0]
    return z / norms


def dot_product_oracle(solver: Solver, D: FloatArray, v: FloatArray) -> FloatArray:
    norms = np.linalg.norm(D, axis=0)
    a = D.T @ v / (norms**2 if solver.normalized else norms)
    return np.where((np.abs(a) if solver.signed else a) > solver.threshold, a, 0.0)


def dot_product_violation(solver: Solver, statistics: Statistics, a: FloatArray) -> float:
    norms = np.sqrt(np.diagonal(statistics.gram))
    expected = statistics.correlation / (norms**2 if solver.normalized else norms)
    expected = np.where((np.abs(expected) if solver.signed else expected) > solver.threshold, expected, 0.0)
    return float(np.abs((a - expected) / np.abs(expected).max(initial=1e-300)).max(initial=0.0))


CASES = [
    Case(Nnls(), least_squares_violation, least_squares_oracle),
    Case(Nnls(signed=True), least_squares_violation, least_squares_oracle),
    Case(Omp(n_atoms=3, tolerance=0.0), omp_violation, omp_oracle, shares=False),
    Case(Omp(n_atoms=3, tolerance=0.0, signed=False), omp_violation, omp_oracle, shares=False),
    Case(Omp(tolerance=0.0), omp_violation, omp_oracle, shares=False),
    Case(Lasso(0.05), elastic_net_violation, elastic_net_oracle),
    Case(Lasso(0.05, signed=False), elastic_net_violation, elastic_net_oracle),
    Case(ElasticNet(0.02, l1_ratio=0.3), elastic_net_violation, elastic_net_oracle),
    Case(ElasticNet(0.02, l1_ratio=0.3, signed=False), elastic_net_violation, elastic_net_oracle),
    Case(Ridge(0.01), ridge_violation, ridge_oracle),
    Case(Ridge(0.01, signed=False), ridge_violation, ridge_oracle),
    Case(DotProduct(threshold=0.0), dot_product_violation, dot_product_oracle),
    Case(DotProduct(threshold=0.0, signed=True), dot_product_violation, dot_product_oracle),
]


def planted(
    seed: int, n: int = 60, atoms: int = 8, rho: float = 0.0, noise: float = 0.3
) -> tuple[FloatArray, FloatArray]:
    """Equally correlated atoms, and a target that mixes about half of them, both signs."""
    rng = np.random.default_rng(seed)
    D = np.sqrt(1.0 - rho) * rng.standard_normal((n, atoms)) + np.sqrt(rho) * rng.standard_normal((n, 1))
    a = np.where(rng.random(atoms) < 0.6, rng.uniform(-0.5, 1.0, atoms), 0.0)
    return D, D @ a + noise * rng.standard_normal(n)


DENSE = {
    "plain": planted(0),
    "siblings": planted(109, rho=0.99),
    "one atom": planted(2, atoms=1),
    "opposed": (planted(2, atoms=1)[0], -planted(2, atoms=1)[1]),
    "wide": planted(4, n=10, atoms=15),
    "exact mixture": planted(5, noise=0.0),
    "unrelated": (planted(6)[0], np.random.default_rng(7).standard_normal(60)),
    "tall": planted(8, n=500, atoms=30, rho=0.5),
}

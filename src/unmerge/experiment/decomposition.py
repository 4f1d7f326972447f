"""Decompose a target's statistics by every algorithm and setting of the paper (its fourth phase)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmerge import metrics
from unmerge.errors import UnmergeError
from unmerge.experiment.layout import Target
from unmerge.experiment.paper import Setting, facts
from unmerge.experiment.reduction import COORDINATES, Reduced
from unmerge.solvers import DotProduct, ElasticNet, Lasso, Nnls, Omp, Ridge, Solution, Solver, Status
from unmerge.statistics import FloatArray, Statistics

Row = dict[str, Any]

NUMBERS = (
    "error",
    "heldout_error",
    "precision",
    "recall",
    "perfect_match",
    "sparsity",
    "coefficient_mae",
    "unexplained",
    "rounding_floor",
    "coefficients",
)
"""The columns that a failed cell leaves empty."""


def solver(setting: Setting) -> Solver:
    """Return the solver of a setting, as the paper's code called its own.

    Penalties are scikit-learn's, in squared weight units; only NNLS is non-negative; OMP ignores its tolerance.

    Raises
    ------
    UnmergeError
        The algorithm is none of the paper's.
    """
    values = dict(setting.values)
    cut = facts()["conventions"]["nnls_threshold"]
    if setting.algorithm == "nnls":
        return Nnls(threshold=cut)
    if setting.algorithm == "dot_product":
        return DotProduct(threshold=cut, normalized=False)
    if setting.algorithm == "lasso":
        return Lasso(values["lambda"], relative=False)
    if setting.algorithm == "ridge":
        return Ridge(values["lambda"], relative=False)
    if setting.algorithm == "elastic_net":
        return ElasticNet(values["lambda"], l1_ratio=values["l1_ratio"], relative=False)
    if setting.algorithm == "omp":
        return Omp(int(values["n_atoms"]), tolerance=0.0)
    raise UnmergeError(f"no algorithm is named {setting.algorithm!r}")


def split(tensors: int, seed: int) -> NDArray[np.bool_]:
    """Choose the tensors that the held-out error is fitted on, half of them; it is measured on the others.

    Tensors rather than coordinates: the noise of neighbouring parameters is shared through the factors.

    Parameters
    ----------
    tensors : int
        How many there are.
    seed : int
        Of the generator; one choice for all targets of a world.

    Returns
    -------
    array of bool, shape (tensors,)
    """
    chosen = np.zeros(tensors, dtype=bool)
    chosen[np.random.default_rng(seed).permutation(tensors)[: tensors // 2]] = True
    return chosen


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """One target in one choice of coordinates: all of it, and the two halves of its tensors."""

    whole: Statistics
    fitted: Statistics
    held_out: Statistics

    @classmethod
    def of(cls, parts: Sequence[Statistics], chosen: NDArray[np.bool_]) -> Problem:
        """Add up the statistics of tensors, by halves."""
        halves = [Statistics.zero(parts[0].atoms), Statistics.zero(parts[0].atoms)]
        for part, inside in zip(parts, chosen.tolist(), strict=True):
            halves[inside] = halves[inside] + part
        return cls(halves[0] + halves[1], halves[1], halves[0])


def decompose(target: Target, reduced: Reduced, settings: Sequence[Setting], split_seed: int) -> list[Row]:
    """Return the rows of one target: every setting in both choices of coordinates.

    Parameters
    ----------
    target : Target
        What was merged.
    reduced : Reduced
        Its statistics.
    settings : sequence of Setting
        What to run.
    split_seed : int
        See `split`.
    """
    from threadpoolctl import threadpool_limits

    chosen = split(len(reduced.tensors), split_seed)
    rows = []
    # Matrices are 8 x 8: threads would cost more than they give, and might change the last bit.
    with threadpool_limits(limits=1, user_api="blas"):
        for coordinates in COORDINATES:
            problem = Problem.of(reduced.over(coordinates), chosen)
            rows += [_row(target, reduced.atoms, coordinates, one, problem) for one in settings]
    return rows


def failed(target: Target, atoms: Sequence[str], settings: Sequence[Setting], reason: str) -> list[Row]:
    """Return the rows of a target that could not be made: as many as it would have, without numbers."""
    return [
        _failure(_labels(target, atoms, coordinates, one), reason) for coordinates in COORDINATES for one in settings
    ]


def _labels(target: Target, atoms: Sequence[str], coordinates: str, setting: Setting) -> Row:
    return {
        "seed": target.seed,
        "target": target.name,
        "composition": target.composition,
        "group": target.group,
        "method": target.method,
        "coordinates": coordinates,
        "algorithm": setting.algorithm,
        "setting": setting.text,
        "names": list(atoms),
        "truth": target.truth(tuple(atoms)),
    }


def _failure(labels: Row, reason: str) -> Row:
    return {**labels, **dict.fromkeys(NUMBERS), "status": "failed", "failure": reason}


def _row(target: Target, atoms: Sequence[str], coordinates: str, setting: Setting, problem: Problem) -> Row:
    labels = _labels(target, atoms, coordinates, setting)
    try:
        chosen = solver(setting)
        solution = _usable(chosen.solve(problem.whole))
        half = _usable(chosen.solve(problem.fitted))
    except Exception as error:  # noqa: BLE001 - whatever went wrong is the result of this cell
        return _failure(labels, f"{type(error).__name__}: {error}")
    return {
        **labels,
        **_scores(solution.coefficients, np.array(labels["truth"]), problem.whole),
        "heldout_error": metrics.reconstruction_error(problem.held_out, half.coefficients),
        "status": solution.status.name.lower(),
        "failure": None,
    }


def _usable(solution: Solution) -> Solution:
    if solution.status in {Status.NOT_FINITE, Status.ZERO_TARGET}:
        raise UnmergeError(solution.message)
    return solution


def _scores(coefficients: FloatArray, truth: FloatArray, statistics: Statistics) -> Row:
    found = set(np.flatnonzero(np.abs(coefficients) > metrics.ACTIVE).tolist())
    true = set(np.flatnonzero(truth).tolist())
    precision, recall = metrics.precision_recall(found, true)
    return {
        "coefficients": coefficients.tolist(),
        "error": metrics.reconstruction_error(statistics, coefficients),
        "precision": precision,
        "recall": recall,
        "perfect_match": metrics.perfect_match(found, true),
        "sparsity": metrics.sparsity(coefficients),
        "coefficient_mae": metrics.mean_absolute_error(coefficients, truth),
        "unexplained": metrics.unexplained_share(statistics, coefficients),
        "rounding_floor": statistics.rounding / statistics.energy,
    }

"""The paper's metrics (Section 3.6), computed from statistics and coefficients."""

from __future__ import annotations

from collections.abc import Hashable, Set

import numpy as np

from unmerge.statistics import FloatArray, Statistics

ACTIVE = 1e-6
"""The paper's code counts a coefficient as non-zero above this."""


def cosine(statistics: Statistics, coefficients: FloatArray) -> float:
    """Return the cosine between the target and its reconstruction.

    cos(v, D a) = <v, D a> / (||v|| ||D a||). Zero if either is zero.

    Parameters
    ----------
    statistics : Statistics
        Of K atoms and a target.
    coefficients : array, shape (K,)
        Dimensionless.

    Returns
    -------
    float
        In [-1, 1].
    """
    # Scaled first: the product of two energies may leave the range of float64.
    scale = float(np.abs(coefficients).max(initial=0.0))
    if scale == 0.0:
        return 0.0
    a = coefficients / scale
    lengths = float(np.sqrt(statistics.energy) * np.sqrt(max(0.0, float(a @ statistics.gram @ a))))
    if lengths == 0.0:
        return 0.0
    return float(np.clip(a @ statistics.correlation / lengths, -1.0, 1.0))


def reconstruction_error(statistics: Statistics, coefficients: FloatArray) -> float:
    """Return the paper's reconstruction error (Equation 6).

    1 - max(0, cos(v, D a))^2: blind to the length of the reconstruction, and 1 if it points away.

    Parameters
    ----------
    statistics : Statistics
        Of K atoms and a target.
    coefficients : array, shape (K,)
        Dimensionless.

    Returns
    -------
    float
        In [0, 1]; 0 is perfect.
    """
    return 1.0 - max(0.0, cosine(statistics, coefficients)) ** 2


def unexplained_share(statistics: Statistics, coefficients: FloatArray) -> float:
    """Return the share of the target's energy that the reconstruction leaves.

    ||v - D a||^2 / ||v||^2: unlike `reconstruction_error` it sees the length too, and exceeds 1 for
    coefficients that are worse than none. For least squares the two are equal. Zero for a zero target.

    Parameters
    ----------
    statistics : Statistics
        Of K atoms and a target.
    coefficients : array, shape (K,)
        Dimensionless.
    """
    if statistics.energy == 0.0:
        return 0.0
    return statistics.residual_energy(coefficients) / statistics.energy


def precision_recall(found: Set[Hashable], true: Set[Hashable]) -> tuple[float, float]:
    """Return precision and recall of the components found (Equations 7 and 8).

    TP / (TP + FP) and TP / (TP + FN). As in the paper's code, 0 / 0 counts as 0: nothing found is precision
    0, and a target without a known component has recall 0.

    Parameters
    ----------
    found, true : set
        Names or numbers of atoms.
    """
    hits = len(found & true)
    precision = hits / len(found) if found else 0.0
    recall = hits / len(true) if true else 0.0
    return precision, recall


def perfect_match(found: Set[Hashable], true: Set[Hashable]) -> bool:
    """Tell whether exactly the true components were found (Section 3.6); nothing of nothing is a match."""
    return set(found) == set(true)


def sparsity(coefficients: FloatArray, threshold: float = ACTIVE) -> int:
    """Count the non-zero components (Section 3.6): coefficients above `threshold` in absolute value."""
    return int(np.count_nonzero(np.abs(coefficients) > threshold))


def mean_absolute_error(coefficients: FloatArray, true: FloatArray) -> float:
    """Return the mean of |a_i - true_i| over K atoms; zero for no atoms. Not in the paper.

    Parameters
    ----------
    coefficients, true : array, shape (K,)
        Dimensionless.
    """
    return float(np.abs(coefficients - true).mean()) if len(coefficients) else 0.0

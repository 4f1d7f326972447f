"""Whether a dictionary can tell its atoms apart at all, before any target is seen."""

from __future__ import annotations

import numpy as np

from unmerge.solvers.problem import collinear_groups, unit_gram
from unmerge.statistics import FloatArray

__all__ = ["coherence", "collinear_groups"]


def coherence(gram: FloatArray) -> float:
    """Return the largest absolute cosine between two different atoms.

    Parameters
    ----------
    gram : array, shape (K, K)
        Inner products of K atoms, in squared weight units. Atoms that are zero are left out.

    Returns
    -------
    float
        In [0, 1]; 0 for fewer than two atoms, 1 for copies.
    """
    _, _, cosines = unit_gram(gram)
    between = np.abs(cosines) - np.eye(len(cosines))
    return float(np.clip(between.max(initial=0.0), 0.0, 1.0))

"""Whether a dictionary can tell its atoms apart at all, before any target is seen."""

from __future__ import annotations

import numpy as np

from unmerge.solvers.problem import collinear_groups, connected, unit_gram
from unmerge.statistics import FloatArray

__all__ = ["ALIKE", "alike_groups", "coherence", "collinear_groups"]

ALIKE = 0.95
"""Cosine from which two atoms are taken for versions of one fine-tune.

Checkpoints of one run that are an epoch apart have 0.98 and more; the same task trained from another seed has less
than 0.3.
"""


def alike_groups(gram: FloatArray, cosine: float = ALIKE) -> tuple[tuple[int, ...], ...]:
    """Find the atoms that are versions of one fine-tune: checkpoints of a run, near-copies, requantised copies.

    Parameters
    ----------
    gram : array, shape (K, K)
        Inner products of K atoms, in squared weight units.
    cosine : float
        Two atoms are alike if the absolute value of their cosine is at least this.

    Returns
    -------
    tuple of tuples of int
        The groups of two and more, each ascending, ordered by their first atom: chains of alike atoms.
    """
    kept, _, cosines = unit_gram(gram)
    groups = connected(np.abs(cosines) >= cosine)
    return tuple(tuple(int(kept[place]) for place in group) for group in groups if len(group) > 1)


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

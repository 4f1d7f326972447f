"""Statistics of full checkpoints that were seen through their leading directions alone.

A full checkpoint's change is x = y + r: y its leading directions, and r, orthogonal to y, the rest. A pass over the
target gives the products of the y with one another and with the target. Those of the x with one another and with the y
are known from before. So the target's products with the y determine in which proportions it holds the x: as in
instrumental variables, with the y as instruments. What it holds of the r is taken to be there in the same proportions,
as far as the target's energy has room for it.

In each tensor that proportion is the whole model's, moved towards the tensor's own by as much as the two differ beyond
noise. Reference: James and Stein, Estimation with quadratic loss, 1961.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from unmerge.solvers.problem import COLLINEARITY, IntArray, Spectrum, unit_gram
from unmerge.statistics import FloatArray, Statistics

INDEFINITE = -1e-10
"""Eigenvalue of a matrix of cosines below which it is no Gram matrix: more than rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class _Whitened:
    """Coordinates of correlations c in which c' G^+ d is a plain inner product, G a Gram matrix of rank r.

    Attributes
    ----------
    kept : array of int, shape (k,)
        The atoms that are not zero.
    norms : array, shape (k,)
        Their lengths, in weight units.
    spectrum : Spectrum
        Of their cosines.
    """

    kept: IntArray
    norms: FloatArray
    spectrum: Spectrum

    @classmethod
    def of(cls, gram: FloatArray) -> _Whitened:
        kept, norms, cosines = unit_gram(gram)
        return cls(kept, norms, Spectrum.of(cosines))

    def coordinates(self, correlation: FloatArray) -> FloatArray:
        """Return the coordinates of correlations, shape (K, ...), in weight units, shape (r, ...)."""
        own = (self.spectrum.vectors / self.norms[:, np.newaxis] / np.sqrt(self.spectrum.values)).T
        return np.asarray(own @ correlation[self.kept])

    def correlation(self, coordinates: FloatArray, atoms: int) -> FloatArray:
        """Return the correlations of coordinates, shape (atoms,); in the range of the Gram matrix."""
        found = np.zeros(atoms)
        found[self.kept] = self.norms * (self.spectrum.vectors @ (np.sqrt(self.spectrum.values) * coordinates))
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Gap:
    """What is known of one tensor beyond the directions that were seen.

    Attributes
    ----------
    missing : array, shape (K, K)
        What is to be added to the Gram matrix of what was seen; see `possible`. In squared weight units.
    shown : array, shape (K, K)
        Products of what was seen of each atom (rows) with all atoms as they are.
    """

    missing: FloatArray
    shown: FloatArray


def proportions(seen: Statistics, products: FloatArray) -> FloatArray:
    """Return the coefficients of any sign that what was seen of the atoms determines, shape (K,).

    Parameters
    ----------
    seen : Statistics
        Over the whole model.
    products : array, shape (K, K)
        `Gap.shown`, over the whole model.
    """
    whitened = _Whitened.of(seen.gram)
    return _least_squares(whitened.coordinates(products), whitened.coordinates(seen.correlation))


def _least_squares(columns: FloatArray, wanted: FloatArray) -> FloatArray:
    """Return the shortest solution, in units of the columns' lengths."""
    lengths = np.sqrt(np.einsum("rk,rk->k", columns, columns))
    lengths[lengths == 0.0] = np.inf
    return np.asarray(np.linalg.lstsq(columns / lengths, wanted, rcond=COLLINEARITY**0.5)[0] / lengths)


def alone(seen: Statistics, gap: Gap, weights: FloatArray) -> Statistics:
    """Return what was seen of one tensor without what the atoms' rests show in the directions of others.

    Its least-squares coefficients are those of `proportions`, and differ between tensors as much as is known of them;
    those of what was completed differ less.

    Parameters
    ----------
    weights : array, shape (K,)
        The whole model's proportions.
    """
    return replace(seen, correlation=seen.correlation - (gap.shown - seen.gram) @ weights)


def possible(gram: FloatArray, gap: FloatArray) -> FloatArray:
    """Return a gap whose sum with the Gram matrix of what was seen is a Gram matrix.

    That is `gap` itself, but where products between some atoms are exact and others are of directions alone, and the
    two contradict each other (fine-tunes that are all but equal): then the nearest gap without negative curvature.

    Parameters
    ----------
    gram, gap : arrays, shape (K, K)
        Of one tensor, in squared weight units.
    """
    if np.linalg.eigvalsh(unit_gram(gram + gap)[2]).min(initial=0.0) >= INDEFINITE:
        return gap
    values, vectors = np.linalg.eigh(gap)
    found: FloatArray = (vectors * np.maximum(values, 0.0)) @ vectors.T
    return found


def complete(seen: Statistics, gap: Gap, weights: FloatArray) -> Statistics:
    """Return the statistics of one tensor with what the directions lack.

    Parameters
    ----------
    seen : Statistics
        Of the directions, and of other atoms as they are.
    weights : array, shape (K,)
        The whole model's proportions.

    Returns
    -------
    Statistics
        No coefficients leave less than nothing of the target's energy.
    """
    gram = seen.gram + gap.missing
    whitened = _Whitened.of(seen.gram)
    found = whitened.coordinates(seen.correlation)
    atoms = whitened.coordinates(gap.shown)
    left = max(0.0, seen.energy - float(found @ found))
    moved = found - atoms @ weights
    shown = float(moved @ moved)
    noise = len(moved) * left / max(1, seen.count)
    if shown > noise:
        weights = weights + (1.0 - noise / shown) * _least_squares(atoms, moved)
    # Outside of all directions: the atoms' energy there, and what the target's energy has room for of them.
    outside = gram @ weights - atoms.T @ (atoms @ weights)
    energy = float(weights @ outside)
    part = np.sqrt(left / energy) if energy > left else 1.0
    correlation = _within(seen.energy, gram, atoms.T @ found + part * outside, weights)
    return replace(seen, gram=gram, correlation=correlation)


def _within(energy: float, gram: FloatArray, correlation: FloatArray, weights: FloatArray) -> FloatArray:
    """Return correlations that a target of this energy can have: moved towards those of the weights, if need be."""
    whitened = _Whitened.of(gram)
    wanted = whitened.coordinates(correlation)
    if float(wanted @ wanted) > energy:
        own = whitened.coordinates(gram @ weights)
        size = float(own @ own)
        own = own * np.sqrt(min(1.0, energy / size)) if size > 0.0 else own
        step = wanted - own
        # The longest part of the step that stays in the ball: a root of |own + part * step|^2 = energy.
        square, along = float(step @ step), float(own @ step)
        room = max(0.0, energy - float(own @ own))
        part = (np.sqrt(along**2 + square * room) - along) / square if square > 0.0 else 0.0
        wanted = own + min(1.0, part) * step
    return whitened.correlation(wanted, len(correlation))

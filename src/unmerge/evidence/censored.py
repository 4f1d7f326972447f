"""Weights from a merge that was rounded, by maximum likelihood.

A stored element does not tell its value but the cell of the grid that the value lay in. With the changes of the
present atoms x_p as they went into the merge, element e says ``low_e <= sum_p w_p x_pe + noise < high_e``. Its
likelihood is the probability of that cell; the noise is Gaussian, a tenth of the grid's spacing, for what arithmetic
adds: nothing else may be in the target. Least squares takes the middle of the cell for the
value instead, which is biased where the grid is coarse against the changes.

The log-likelihood is concave in the weights: Newton's method. What is left of a bias, because noise is not Gaussian,
is measured on a merge made again (`rounding.simulated`). Errors are those of the delete-one-tensor jackknife, each in
one Newton step. Reference: Stewart, On least squares estimation when the dependent variable is grouped, 1983.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unmerge.statistics import FloatArray

ARITHMETIC = 0.1
"""Standard deviation of what arithmetic adds before the last rounding, in spacings of the grid."""
PRODUCTS = 2.0**-10
"""The same for changes that were rounded on the way, in root mean squares of the target's change."""
STEPS = 25
"""Newton steps at most."""
PRECISE = 1e-7
"""A smaller step ends the search."""
_FAR = 35.0


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """What one tensor says.

    Attributes
    ----------
    changes : array, shape (P, n)
        The atoms' changes as they went into the merge, in weight units.
    low, high : array, shape (n,)
        The cell of the target's change.
    spacing : array, shape (n,)
        Distance between neighbours on the grid around the base's or the target's weight, the larger one.
    """

    changes: FloatArray
    low: FloatArray
    high: FloatArray
    spacing: FloatArray

    @property
    def arithmetic(self) -> FloatArray:
        """Variance of what arithmetic adds to each element, in squared weight units."""
        middle = 0.5 * (self.low + self.high)
        of_changes = PRODUCTS**2 * float(np.mean(middle**2))
        return np.asarray((ARITHMETIC * self.spacing) ** 2 + max(of_changes, 1e-30))


@dataclass(frozen=True, slots=True, eq=False)
class CensoredFit:
    """Weights by maximum likelihood.

    Attributes
    ----------
    weights : array, shape (P,)
    deviations : array, shape (T, P)
        How the weights move without each of the T tensors.
    shares : array, shape (T, P)
        Each tensor's share of what is known of each weight.
    likelihood : float
        Natural logarithm, per element.
    """

    weights: FloatArray
    deviations: FloatArray
    shares: FloatArray
    likelihood: float

    def unbiased(self, again: CensoredFit, truth: FloatArray) -> CensoredFit:
        """Take out the bias that another fit has, of a merge that was made again on other elements of the tensors.

        Parameters
        ----------
        again : CensoredFit
            Of that merge.
        truth : array, shape (P,)
            The weights that it was made with.
        """
        return CensoredFit(
            self.weights - (again.weights - truth),
            self.deviations - again.deviations,
            0.5 * (self.shares + again.shares),
            self.likelihood,
        )

    def intervals(self, level: float, *, signed: bool) -> FloatArray:
        """Return Student's intervals of the weights, shape (P, 2); infinite where there are too few tensors."""
        from scipy.special import stdtrit

        concentration = (self.shares**2).sum(axis=0)
        freedom = np.divide(1.0, concentration, out=np.zeros_like(concentration), where=concentration > 0.0) - 1.0
        errors = np.sqrt(((1.0 - self.shares) * self.deviations**2).sum(axis=0))
        known = freedom > 1.0 - 1e-9
        half = np.where(known, stdtrit(np.maximum(freedom, 1.0), 0.5 + 0.5 * level) * errors, np.inf)
        least = -np.inf if signed else 0.0
        return np.stack([np.maximum(self.weights - half, least), np.maximum(self.weights + half, least)], axis=1)


def censored_fit(tensors: Sequence[Cells], start: FloatArray) -> CensoredFit:
    """Fit the weights of the atoms that are present.

    Parameters
    ----------
    tensors : sequence of Cells
        At least one.
    start : array, shape (P,)
        A first estimate, by least squares.
    """
    weights = start.astype(np.float64)
    parts = [_part(cells, weights) for cells in tensors]
    for _ in range(STEPS):
        step = _solve(parts)
        weights = weights + step
        parts = [_part(cells, weights) for cells in tensors]
        if np.abs(step).max(initial=0.0) < PRECISE:
            break
    deviations = np.array([_without(parts, index) for index in range(len(parts))])
    count = sum(part.count for part in parts)
    return CensoredFit(weights, deviations, _shares(parts), sum(part.likelihood for part in parts) / count)


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Derivatives of one tensor's log-likelihood at some weights."""

    gradient: FloatArray
    curvature: FloatArray
    likelihood: float
    count: int


def _part(cells: Cells, weights: FloatArray) -> _Part:
    from scipy.special import ndtr

    expected = weights @ cells.changes
    sd = np.sqrt(cells.arithmetic)
    low = np.clip((cells.low - expected) / sd, -_FAR, _FAR)
    high = np.clip((cells.high - expected) / sd, -_FAR, _FAR)
    # The lower tail is the one that is computed without cancellation.
    flip = low > 0.0
    low, high = np.where(flip, -high, low), np.where(flip, -low, high)
    probability = np.maximum(ndtr(high) - ndtr(low), 1e-300)
    at_low, at_high = density(low), density(high)
    score = np.where(flip, -1.0, 1.0) * (at_low - at_high) / (sd * probability)
    curvature = score**2 + (high * at_high - low * at_low) / (sd**2 * probability)
    weighted = cells.changes * np.maximum(curvature, 0.0)
    return _Part(cells.changes @ score, weighted @ cells.changes.T, float(np.log(probability).sum()), expected.size)


def density(at: FloatArray) -> FloatArray:
    """Return the standard normal distribution's density."""
    return np.asarray(np.exp(-0.5 * at**2) / np.sqrt(2.0 * np.pi))


def _solve(parts: Sequence[_Part]) -> FloatArray:
    curvature = sum((part.curvature for part in parts), np.zeros_like(parts[0].curvature))
    gradient = sum((part.gradient for part in parts), np.zeros_like(parts[0].gradient))
    return np.asarray(np.linalg.lstsq(curvature, gradient, rcond=1e-12)[0])


def _without(parts: Sequence[_Part], left_out: int) -> FloatArray:
    """Return how the weights move without one tensor, in one Newton step."""
    rest = [part for index, part in enumerate(parts) if index != left_out]
    return _solve(rest) if rest else np.zeros(len(parts[0].gradient))


def _shares(parts: Sequence[_Part]) -> FloatArray:
    """Return each tensor's share of what is known of each weight, shape (tensors, P)."""
    curvatures = np.array([np.diagonal(part.curvature) for part in parts])
    whole = curvatures.sum(axis=0)
    return np.asarray(np.divide(curvatures, whole, out=np.zeros_like(curvatures), where=whole > 0.0))

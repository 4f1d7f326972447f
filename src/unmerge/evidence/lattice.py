"""What a stored element says of a merge beside a fine-tune that nobody knows and that was stored before it was merged.

The stranger's change s of an element is known to be near some value, with a normal error. It was rounded to k steps u
of the base's grid, the merge adds w k u to what the known fine-tunes give, and the sum fell into the cell of the
stored element. So the likelihood is the sum over k of the probability that s rounds to k, times that of the cell given
k. Where the error spans many steps, the sum over k is an integral and s is taken as rounded by noise instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unmerge.evidence.low_rank import Factors
from unmerge.statistics import FloatArray

CONTINUOUS = 1.5
"""Errors in steps from which rounding of the stranger is noise."""
OFFSETS = ((0.0, 0.2, 1), (0.2, 0.5, 2), (0.5, 1.0, 4), (1.0, CONTINUOUS, 6))
"""Errors in steps, from and to, and how many steps to each side are summed: four standard deviations."""
STRAY = 1e-6
"""Probability of an element that nothing accounts for."""
_FAR, _OUT = 35.0, 8.0


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Some rows and columns of one tensor.

    Attributes
    ----------
    changes : array, shape (P, n, m)
        Of the known atoms, as they went into the merge, in weight units.
    low, high : array, shape (n, m)
        The cell of the target's change.
    spacing : array, shape (n, m)
        Steps of the base's grid.
    coarser : array, shape (n, m)
        Steps of the base's or the target's grid, the larger one.
    """

    changes: FloatArray
    low: FloatArray
    high: FloatArray
    spacing: FloatArray
    coarser: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class Stranger:
    """What is known of the stranger's own change of one tensor, before it was stored.

    Attributes
    ----------
    factors : Factors
        The estimate.
    error : array, shape (n, m)
        Its standard deviation, in weight units.
    """

    factors: Factors
    error: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What the elements of a block say.

    Attributes
    ----------
    likelihood : float
        Natural logarithm of all of them together.
    score : array, shape (n, m)
        Its derivative by what the known atoms give each element.
    mean, variance : array, shape (n, m)
        Of the stranger's change, given the element.
    """

    likelihood: float
    score: FloatArray
    mean: FloatArray
    variance: FloatArray


def seen(block: Block, stranger: Stranger, weights: FloatArray, share: float, noise: float) -> Seen:
    """Look at every element of a block.

    Parameters
    ----------
    weights : array, shape (P,)
        Of the known atoms.
    share : float
        The stranger's weight.
    noise : float
        Standard deviation of what arithmetic adds, in spacings.
    """
    sums = np.tensordot(weights, block.changes, 1)
    ratio = stranger.error / block.spacing
    elements = _Elements(
        block.low - sums,
        block.high - sums,
        block.spacing,
        noise * block.coarser,
        stranger.factors.product,
        stranger.error,
    )
    probability, score, mean, variance = (np.empty(ratio.shape) for _ in range(4))
    for chosen, found in _parts(elements, ratio, share):
        probability[chosen], score[chosen], mean[chosen], variance[chosen] = found
    return Seen(float(np.log(probability + STRAY).sum()), score, mean, variance)


@dataclass(frozen=True, slots=True, eq=False)
class _Elements:
    """The cell less what the known atoms give, and what is known of the stranger, one element to a place."""

    low: FloatArray
    high: FloatArray
    spacing: FloatArray
    noise: FloatArray
    middle: FloatArray
    error: FloatArray

    def of(self, chosen: NDArray[np.bool_]) -> _Elements:
        return _Elements(
            self.low[chosen],
            self.high[chosen],
            self.spacing[chosen],
            self.noise[chosen],
            self.middle[chosen],
            self.error[chosen],
        )


_Found = tuple[FloatArray, FloatArray, FloatArray, FloatArray]


def _parts(elements: _Elements, ratio: FloatArray, share: float) -> list[tuple[NDArray[np.bool_], _Found]]:
    fine = ratio > CONTINUOUS
    parts = [(fine, _continuous(elements.of(fine), share))]
    for least, most, offsets in OFFSETS:
        chosen = (ratio > least) & (ratio <= most)
        parts.append((chosen, _stepwise(elements.of(chosen), share, offsets)))
    return parts


def _continuous(elements: _Elements, share: float) -> _Found:
    from scipy.special import ndtr

    rounding = (share * elements.spacing) ** 2 / 12.0
    spread = np.sqrt((share * elements.error) ** 2 + rounding + elements.noise**2)
    low, high = ((end - share * elements.middle) / spread for end in (elements.low, elements.high))
    # The lower tail is the one that is computed without cancellation.
    flip = low > 0.0
    low, high = np.where(flip, -high, low), np.where(flip, -low, high)
    low, high = np.clip(low, -_FAR, _FAR), np.clip(high, -_FAR, _FAR)
    probability = np.maximum(ndtr(high) - ndtr(low), 1e-300)
    at_low, at_high = _density(low), _density(high)
    pull = np.where(flip, -1.0, 1.0) * (at_low - at_high) / probability
    left = np.clip(1.0 + (low * at_low - high * at_high) / probability - pull**2, 0.0, 1.0)
    gain = share * elements.error**2 / spread
    return probability, pull / spread, elements.middle + gain * pull, elements.error**2 - gain**2 * (1.0 - left)


def _stepwise(elements: _Elements, share: float, offsets: int) -> _Found:
    nearest = np.rint(elements.middle / elements.spacing)
    step, unit = share * elements.spacing / elements.noise, elements.spacing / elements.error
    edge = (nearest - offsets - 0.5) * unit - elements.middle / elements.error
    below, at_edge = _normal(edge)
    low, high = (end / elements.noise - (nearest - offsets) * step for end in (elements.low, elements.high))
    total, score, first, second = (np.zeros(len(nearest)) for _ in range(4))
    for _ in range(2 * offsets + 1):
        upper = edge + unit
        above, at_upper = _normal(upper)
        (to_low, at_low), (to_high, at_high) = _normal(low), _normal(high)
        inside, chance = to_high - to_low, above - below
        total += chance * inside
        score += chance * (at_low - at_high)
        first += (at_edge - at_upper) * inside
        second += (chance + edge * at_edge - upper * at_upper) * inside
        edge, below, at_edge = upper, above, at_upper
        low, high = low - step, high - step
    whole = total + STRAY
    mean = first / whole
    # An element that nothing accounts for says nothing: its share of the answer is what was known before.
    spread = (second + STRAY) / whole - mean**2
    return (
        total,
        score / (whole * elements.noise),
        elements.middle + elements.error * mean,
        elements.error**2 * np.maximum(spread, 0.0),
    )


def _normal(at: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the normal distribution and its density; most arguments are far out, where both are known."""
    from scipy.special import ndtr

    below, density = (at > 0.0).astype(np.float64), np.zeros(len(at))
    near = np.flatnonzero(np.abs(at) < _OUT)
    below[near], density[near] = ndtr(at[near]), _density(at[near])
    return below, density


def _density(at: FloatArray) -> FloatArray:
    return np.asarray(np.exp(-0.5 * at**2) / np.sqrt(2.0 * np.pi))

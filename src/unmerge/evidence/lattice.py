"""What a stored element says of a merge beside a fine-tune that nobody knows and that was stored before it was merged.

The stranger's value v of an element is known to be near some value, with a normal error. It was rounded to a value of
the grid, g, the merge adds w g to what the base and the known fine-tunes give, and the sum fell into the cell of the
stored element. So the likelihood is the sum over g of the probability that v rounds to g, times that of the cell given
g. Where the error spans many steps, the sum over g is an integral and v is taken as rounded by noise instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unmerge.evidence.low_rank import Factors
from unmerge.statistics import FloatArray

CONTINUOUS = 1.5
"""Errors in steps from which rounding of the stranger is noise."""
OFFSETS = ((0.2, 1), (0.5, 2), (1.0, 4), (CONTINUOUS, 6))
"""Errors in steps up to which so many steps to each side are summed: four standard deviations."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Some rows and columns of one tensor.

    Attributes
    ----------
    changes : array, shape (P, n, m)
        Of the known atoms, as they went into the merge, in weight units.
    low, high : array, shape (n, m)
        The cell of the target's change.
    weights : array, shape (n, m)
        The base's.
    coarser : array, shape (n, m)
        Steps of the base's or the target's grid, the larger one.
    fine, smallest : float
        Steps of the base's grid, which the stranger was stored on too, are `fine` times the power of two below a value,
        or below `smallest`.
    """

    changes: FloatArray
    low: FloatArray
    high: FloatArray
    weights: FloatArray
    coarser: FloatArray
    fine: float
    smallest: float


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
    # Importing the compiler takes longer than everything else that most merges need.
    from unmerge.evidence.lattice_kernel import see

    sums = np.tensordot(weights, block.changes, 1)
    found = np.empty((3, *sums.shape))
    likelihood = see(
        (block.low - sums).ravel(),
        (block.high - sums).ravel(),
        block.weights.ravel(),
        (noise * block.coarser).ravel(),
        stranger.factors.product.ravel(),
        stranger.error.ravel(),
        share,
        block.fine,
        block.smallest,
        np.array([most for most, _ in OFFSETS]),
        np.array([count for _, count in OFFSETS]),
        found.reshape(3, -1),
    )
    return Seen(likelihood, *found)

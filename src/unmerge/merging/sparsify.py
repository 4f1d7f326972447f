"""Sparsified task vectors: which elements are kept, and what they are scaled by.

Every step is that of mergekit 0.1.5 (``sparsify.py``). A mask and its application are apart, so that masks that were
read from a merge can stand for masks that are drawn.
"""

from __future__ import annotations

import numpy as np

from unmerge.errors import RecipeError
from unmerge.merging.arithmetic import Arithmetic, Array, as_torch
from unmerge.merging.draws import bernoulli as bernoulli_mask
from unmerge.merging.method import Draws
from unmerge.merging.sorting import at_positions, sorted_order, tied
from unmerge.merging.summation import whole_sum

SMALLEST_SUM = 1e-7
"""Where the absolute values sum up to less, before or after masking, nothing is rescaled; in weight units."""


def magnitude(delta: Array, density: float, arithmetic: Arithmetic, *, rescale: bool) -> Array:
    """Keep the largest elements (TIES).

    Parameters
    ----------
    delta : array
        On the working type's grid.
    density : float
        The share that is kept.
    arithmetic : Arithmetic
        The working type.
    rescale : bool
        Whether to restore the sum of absolute values.

    Returns
    -------
    array, shape of `delta`
    """
    if density >= 1:
        return delta
    if density <= 0:
        return np.zeros_like(delta)
    return masked(delta, magnitude_mask(delta, density), arithmetic, rescale=rescale)


def magnitude_outliers(delta: Array, density: float, gamma: float, arithmetic: Arithmetic, *, rescale: bool) -> Array:
    """Keep large elements but the very largest ones (Model Breadcrumbs).

    Parameters
    ----------
    delta : array
        On the working type's grid.
    density : float
        The share that is kept.
    gamma : float
        The share of the largest ones that are not kept.
    arithmetic : Arithmetic
        The working type.
    rescale : bool
        Whether to restore the sum of absolute values.

    Returns
    -------
    array, shape of `delta`
    """
    if density >= 1:
        return delta
    return masked(delta, outlier_mask(delta, density, gamma), arithmetic, rescale=rescale)


def bernoulli(delta: Array, density: float, arithmetic: Arithmetic, draws: Draws, *, rescale: bool) -> Array:
    """Keep elements at random (DARE).

    Parameters
    ----------
    delta : array
        On the working type's grid.
    density : float
        The probability of being kept; of 1 or more nothing is drawn.
    arithmetic : Arithmetic
        The working type.
    draws : Draws
    rescale : bool
        Whether to restore the sum of absolute values.

    Returns
    -------
    array, shape of `delta`

    Raises
    ------
    RecipeError
        A density below 0.
    """
    if density >= 1:
        return delta
    mask = random_mask(delta.shape, density, arithmetic, draws)
    return masked_at_random(delta, mask, arithmetic, rescale=rescale)


def della_magprune(
    delta: Array, density: float, epsilon: float, arithmetic: Arithmetic, draws: Draws, *, rescale: bool
) -> Array:
    """Keep elements at random, larger ones of a row more likely (DELLA).

    Parameters
    ----------
    delta : array
        On the working type's grid.
    density : float
        The mean probability of being kept; of 1 or more, or 0 or less, nothing is drawn.
    epsilon : float
        How much a row's smallest and largest elements' probabilities differ from that.
    arithmetic : Arithmetic
        The working type.
    draws : Draws
    rescale : bool
        Whether to restore the sum of absolute values.

    Returns
    -------
    array, shape of `delta`

    Raises
    ------
    RecipeError
        A probability that is not between 0 and 1, or rows of one element.
    """
    if density >= 1:
        return delta
    if density <= 0:
        return np.zeros_like(delta)
    probabilities = della_probabilities(delta, density, epsilon, arithmetic)
    mask = bernoulli_mask(draws, probabilities, delta.shape, mask_type(arithmetic))
    return masked_at_random(delta, mask, arithmetic, rescale=rescale)


@as_torch
def masked(delta: Array, mask: Array, arithmetic: Arithmetic, *, rescale: bool) -> Array:
    """Return the elements that a mask keeps, scaled to the sum of absolute values of all if asked.

    mergekit's ``rescaled_masked_tensor`` with the norm l1, as all its methods have it.

    Parameters
    ----------
    delta : array
        On the working type's grid.
    mask : array of bool, shape of `delta`
    arithmetic : Arithmetic
        The working type.
    rescale : bool

    Returns
    -------
    array, shape of `delta`
    """
    kept = delta * mask
    scale = rescaling(delta, kept, arithmetic) if rescale else None
    return kept if scale is None else arithmetic.round(kept * scale)


@as_torch
def masked_at_random(delta: Array, mask: Array, arithmetic: Arithmetic, *, rescale: bool) -> Array:
    """Do the same for a mask that was drawn, whose method computes in the type of its draws."""
    working = mask_type(arithmetic)
    return arithmetic.round(masked(working.round(delta), mask, working, rescale=rescale))


@as_torch
def rescaling(delta: Array, kept: Array, arithmetic: Arithmetic) -> Array | None:
    """Return the number that restores the sum of absolute values, of no dimensions; None where it is not used.

    Parameters
    ----------
    delta, kept : array
        Before and after masking.
    arithmetic : Arithmetic
        The working type, to which both sums and their quotient are rounded.
    """
    before, after = whole_sum(np.abs(delta), arithmetic), whole_sum(np.abs(kept), arithmetic)
    smallest = arithmetic.round(SMALLEST_SUM)
    if before < smallest or after < smallest:
        return None
    return arithmetic.round(before / after)


def magnitude_mask(delta: Array, density: float) -> Array:
    """Return which elements are among the largest: ``int(density * n)`` of them, one at least.

    Parameters
    ----------
    delta : array
    density : float

    Returns
    -------
    array of bool, shape of `delta`
        Of equal elements at the threshold those that ``torch.argsort`` of mergekit's keeps; see `magnitude_ties`.
    """
    kept = _largest(delta.size, density)
    return at_positions(_magnitudes(delta), 0, kept, descending=True).reshape(delta.shape)


def magnitude_ties(delta: Array, density: float) -> Array:
    """Return the elements at the threshold, of which some are kept and some not: which, is the sort's choice.

    Parameters
    ----------
    delta : array
    density : float

    Returns
    -------
    array of bool, shape of `delta`
    """
    kept = _largest(delta.size, density)
    return tied(_magnitudes(delta), delta.size - kept, delta.size).reshape(delta.shape)


def _largest(size: int, density: float) -> int:
    if density >= 1:
        return size
    return max(1, int(density * size)) if density > 0 and size else 0


def outlier_mask(delta: Array, density: float, gamma: float) -> Array:
    """Return which elements are among the largest but not outliers.

    ``int(density * n)`` elements are kept; the ``int(gamma * n)`` largest ones are not, as far as others suffice.

    Parameters
    ----------
    delta : array
    density, gamma : float

    Returns
    -------
    array of bool, shape of `delta`
        Of equal elements at either threshold those that ``torch.sort`` of mergekit's keeps; see `outlier_ties`.
    """
    return at_positions(_magnitudes(delta), *_between(delta.size, density, gamma)).reshape(delta.shape)


def outlier_ties(delta: Array, density: float, gamma: float) -> Array:
    """Return the elements at a threshold, of which some are kept and some not: which, is the sort's choice.

    Parameters
    ----------
    delta : array
    density, gamma : float

    Returns
    -------
    array of bool, shape of `delta`
    """
    return tied(_magnitudes(delta), *_between(delta.size, density, gamma)).reshape(delta.shape)


def _between(size: int, density: float, gamma: float) -> tuple[int, int]:
    """Return the positions that are kept, from the smallest."""
    if density >= 1:
        return 0, size
    kept = int(density * size)
    first = max(0, size - kept - int(gamma * size))
    return first, min(size, first + kept)


def _magnitudes(delta: Array) -> Array:
    # mergekit compares in float32, also where the working type is float64.
    return np.abs(delta).astype(np.float32, copy=False).reshape(-1)


def random_mask(shape: tuple[int, ...], density: float, arithmetic: Arithmetic, draws: Draws) -> Array:
    """Return a mask that keeps every element with the same probability; of a density of 1 or more nothing is drawn.

    Parameters
    ----------
    shape : tuple of int
    density : float
    arithmetic : Arithmetic
        The working type of the merge; in bfloat16 the density is rounded.
    draws : Draws

    Returns
    -------
    array of bool, `shape`

    Raises
    ------
    RecipeError
        A density below 0.
    """
    if density >= 1:
        return np.ones(shape, dtype=bool)
    return bernoulli_mask(draws, density, shape, mask_type(arithmetic))


def mask_type(arithmetic: Arithmetic) -> Arithmetic:
    """Return the type that mergekit draws masks in, and applies them in: float32, unless bfloat16 is worked in."""
    return arithmetic if arithmetic.name == "BF16" else Arithmetic("F32", arithmetic.threads)


def della_probabilities(delta: Array, density: float, epsilon: float, arithmetic: Arithmetic) -> Array:
    """Return the probability of each element to be kept, by the rank of its magnitude in its row.

    Parameters
    ----------
    delta : array
        Ranks are along the second axis; a tensor of fewer axes is one row.
    density, epsilon : float
        Probabilities go from ``density - epsilon`` to ``density + epsilon``.
    arithmetic : Arithmetic
        The working type of the merge; in bfloat16 ranks are rounded, and so are all steps.

    Returns
    -------
    array, shape of `delta`

    Raises
    ------
    RecipeError
        A probability that is not between 0 and 1, or rows of one element.
    """
    if density + epsilon >= 1 or density - epsilon <= 0:
        raise RecipeError(
            f"density {density:g} and epsilon {epsilon:g} give probabilities from {density - epsilon:g} to"
            f" {density + epsilon:g}: choose them so that both are between 0 and 1"
        )
    fl = mask_type(arithmetic).round
    ranks = fl(fl(_ranks(delta)) + 1)
    smallest, largest = ranks.min(), ranks.max()
    if smallest == largest:
        raise RecipeError(
            "DELLA ranks the elements of a row, and a row of one element has no ranks: use another method"
        )
    relative = fl(fl(ranks - smallest) / fl(largest - smallest)).clip(0, 1)
    spread = fl(fl(relative * 2) * mask_type(arithmetic).scalar(epsilon))
    return fl(fl(density - epsilon) + spread)


def _ranks(delta: Array) -> Array:
    """Return each element's position among the magnitudes of its row, from 0 for the smallest."""
    rows = np.moveaxis(np.abs(delta), 1, -1) if delta.ndim > 1 else np.abs(delta)
    of_rows = rows.reshape(-1, rows.shape[-1]) if delta.ndim else rows.reshape(1, 1)
    order = sorted_order(of_rows)
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(order.shape[1], dtype=order.dtype)[None, :], axis=1)
    found = ranks.reshape(rows.shape)
    return np.moveaxis(found, -1, 1) if delta.ndim > 1 else found

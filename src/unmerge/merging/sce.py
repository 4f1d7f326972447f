"""SCE: elements where models vary most, signs by election, weights by the size of task vectors."""

from __future__ import annotations

import numpy as np

from unmerge.merging.arithmetic import Arithmetic, Array, as_torch
from unmerge.merging.contract import base_of, number
from unmerge.merging.method import Group, MergeMethod, Parameter
from unmerge.merging.sorting import smallest, tied
from unmerge.merging.summation import row_means, sum_of_models, whole_sum
from unmerge.merging.task_arithmetic import elected

SMALLEST_ENERGY = 1e-6
"""Where the mean squares of task vectors sum up to less, all models weigh the same; in squared weight units."""
SMALLEST_DIVISOR = 1e-6
"""Of the weights of models that count."""


@as_torch
def merge_sce(group: Group, arithmetic: Arithmetic) -> Array:
    """Return the base plus the weighted mean of those task vectors that agree with the elected sign.

    mergekit 0.1.5's ``sce``: every step is rounded to the working type. Signs are elected before weights are known.
    Task vectors of fine-tunes are mostly so small that all weigh the same: see `SMALLEST_ENERGY`.

    Parameters
    ----------
    group : Group
        The base and models; shared ``select_topk``.
    arithmetic : Arithmetic
        The working type.

    Returns
    -------
    array, shape of the base

    Raises
    ------
    RecipeError
        No base.
    """
    base = base_of(group, "sce")
    if not group.models:
        return base.copy()
    fl, share = arithmetic.round, number(group, "sce", "select_topk")
    deltas = np.stack([fl(model - base) for model in group.models])
    if share < 1:
        deltas = deltas * variance_mask(deltas, share, arithmetic)
    agreeing = elected(deltas, arithmetic)
    weights = energy_weights(deltas, arithmetic).reshape(-1, *[1] * base.ndim) * agreeing
    mixed = sum_of_models(fl(deltas * weights), arithmetic)
    divisor = np.maximum(sum_of_models(weights, arithmetic), fl(SMALLEST_DIVISOR))
    return fl(base + fl(mixed / divisor))


@as_torch
def energy_weights(deltas: Array, arithmetic: Arithmetic) -> Array:
    """Return each model's share of the mean squares of task vectors, shape (k,).

    Parameters
    ----------
    deltas : array, shape (k, ...)
    arithmetic : Arithmetic
        The type that every step is rounded to.
    """
    squares = arithmetic.round(deltas * deltas)
    energies = row_means(squares.reshape(len(deltas), -1), arithmetic)
    total = whole_sum(energies, arithmetic)
    if np.abs(np.float64(total)) < SMALLEST_ENERGY:
        return arithmetic.round(np.full(len(deltas), 1 / arithmetic.scalar(len(deltas))))
    return arithmetic.round(energies / total)


@as_torch
def variance_mask(deltas: Array, share: float, arithmetic: Arithmetic) -> Array:
    """Return where task vectors vary most: a share of the elements at which they vary at all.

    Parameters
    ----------
    deltas : array, shape (k, ...)
    share : float
        Below 1.
    arithmetic : Arithmetic
        The type that variances are rounded to.

    Returns
    -------
    array of bool, shape (...)
        Of equal elements at the threshold those that ``torch.topk`` keeps; see `variance_ties`.
    """
    variances = _variances(deltas, arithmetic)
    falling = -np.where(np.isnan(variances), np.inf, variances)  # torch counts NaN as the largest
    return smallest(falling.reshape(-1), _varying_most(variances, share)).reshape(variances.shape)


@as_torch
def variance_ties(deltas: Array, share: float, arithmetic: Arithmetic) -> Array:
    """Return the elements at the threshold, of which some are kept and some not: which, is the sort's choice.

    Parameters
    ----------
    deltas : array, shape (k, ...)
    share : float
    arithmetic : Arithmetic

    Returns
    -------
    array of bool, shape (...)
    """
    variances = _variances(deltas, arithmetic)
    first = variances.size - _varying_most(variances, share)
    return tied(variances.reshape(-1), first, variances.size).reshape(variances.shape)


def _varying_most(variances: Array, share: float) -> int:
    if share <= 0:
        return 0
    # A count is a tensor, so torch multiplies in float32.
    return int(np.float32(np.count_nonzero(variances)) * np.float32(share))


def _variances(deltas: Array, arithmetic: Arithmetic) -> Array:
    """Return ``torch.var(deltas, dim=0, unbiased=False)``: Welford's in float64, model by model."""
    mean, squares = np.zeros(deltas.shape[1:]), np.zeros(deltas.shape[1:])
    for count, delta in enumerate(deltas, start=1):
        away = delta - mean
        mean = mean + away / count
        squares = squares + away * (delta - mean)
    return arithmetic.round(squares / len(deltas))


SCE = MergeMethod(
    name="sce",
    parameters=(
        Parameter("select_topk", "shared", default=1.0),
        Parameter("int8_mask", "shared", default=False),  # a type of masks that changes no number
    ),
    base="required",
    merge=merge_sce,
)
"""mergekit 0.1.5."""

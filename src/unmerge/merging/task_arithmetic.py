"""Task arithmetic and its descendants: sparsified task vectors, weighted, with or without an election of signs.

mergekit 0.1.5's ``generalized_task_arithmetic.py``, step by step: every intermediate is rounded to the working type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from unmerge.errors import RecipeError
from unmerge.merging import sparsify
from unmerge.merging.arithmetic import Arithmetic, Array, as_torch
from unmerge.merging.contract import base_of, number, numbers
from unmerge.merging.method import Group, MergeMethod, Parameter
from unmerge.merging.summation import column_blocks, sum_of_models, whole_sum

SMALLEST_DIVISOR = 1e-8
"""A sum of weights closer to zero than this does not divide."""


@as_torch
def merge_task_vectors(
    group: Group,
    arithmetic: Arithmetic,
    *,
    method: str,
    sparsifier: Callable[..., Array] | None,
    told: tuple[str, ...],
    draws: bool,
    consensus: bool,
) -> Array:
    """Return the base plus the combination of sparsified and weighted task vectors.

    Parameters
    ----------
    group : Group
        The base and models; ``weight`` and those of `told` of each; shared ``normalize``, ``rescale``, ``lambda``.
    arithmetic : Arithmetic
        The working type.
    method : str
        Its name, for messages.
    sparsifier : callable or None
        One of `unmerge.merging.sparsify`; None keeps all elements.
    told : tuple of str
        The parameters of a model that the sparsifier takes.
    draws : bool
        Whether it draws masks.
    consensus : bool
        Whether signs are elected.

    Returns
    -------
    array, shape of the base

    Raises
    ------
    RecipeError
        No base, a parameter without a value or of no use, or random masks without draws.
    """
    base = base_of(group, method)
    if not group.models:
        return base.copy()
    if draws and group.draws is None:
        raise RecipeError(f"{group.name}: {method} draws random masks, and there are no draws: give a seed")
    deltas = [arithmetic.round(model - base) for model in group.models]
    if sparsifier is not None:
        shared = {"rescale": bool(number(group, method, "rescale"))} | ({"draws": group.draws} if draws else {})
        columns = [numbers(group, method, name) for name in told]
        of_models = [dict(zip(told, values, strict=True)) for values in zip(*columns, strict=True)]
        deltas = [
            sparsifier(d, arithmetic=arithmetic, **own, **shared) for d, own in zip(deltas, of_models, strict=True)
        ]
    weights = numbers(group, method, "weight")
    return combined(
        base,
        weighted(deltas, weights, arithmetic),
        weights,
        arithmetic,
        consensus=consensus,
        normalize=bool(number(group, method, "normalize")),
        lambda_=number(group, method, "lambda"),
    )


@as_torch
def weighted(deltas: Sequence[Array], weights: Sequence[float], arithmetic: Arithmetic) -> Array:
    """Return task vectors times weights, which are rounded to the working type.

    Parameters
    ----------
    deltas : sequence of array
    weights : sequence of float
    arithmetic : Arithmetic

    Returns
    -------
    array, shape (k, ...)
    """
    return np.stack(
        [arithmetic.round(delta * weight) for delta, weight in zip(deltas, arithmetic.round(weights), strict=True)]
    )


@as_torch
def combined(
    base: Array,
    weighted_deltas: Array,
    weights: Sequence[float],
    arithmetic: Arithmetic,
    *,
    consensus: bool,
    normalize: bool,
    lambda_: float,
) -> Array:
    """Return the base plus the sum of weighted task vectors.

    Parameters
    ----------
    base : array
        On the working type's grid.
    weighted_deltas : array, shape (k, ...)
        On the working type's grid.
    weights : sequence of float
        Their weights, to divide by.
    arithmetic : Arithmetic
        The working type.
    consensus : bool
        Whether an element counts only where its sign is the sum's (TIES). A sum of zero is positive.
    normalize : bool
        Whether to divide by the sum of weights, with consensus by those of the models that count.
    lambda_ : float
        A factor of the sum.

    Returns
    -------
    array, shape of `base`
    """
    divisors = arithmetic.round(weights)
    total = _total(divisors, arithmetic)
    deltas, merged = weighted_deltas.reshape(len(divisors), -1), base.flatten()
    for block in column_blocks(base.size):
        agreeing = elected(deltas[:, block], arithmetic) if consensus else None
        mixed = sum_of_models(deltas[:, block] if agreeing is None else deltas[:, block] * agreeing, arithmetic)
        if normalize:
            divisor = total if agreeing is None else _shared(divisors, agreeing, arithmetic)
            mixed = arithmetic.round(mixed / divisor)
        if lambda_ != 1:
            mixed = arithmetic.round(mixed * arithmetic.scalar(lambda_))
        merged[block] = arithmetic.round(merged[block] + mixed)
    return merged.reshape(base.shape)


def elected(weighted_deltas: Array, arithmetic: Arithmetic) -> Array:
    """Return where a model's sign is that of the sum of all, shape (k, ...); zeros never agree.

    Parameters
    ----------
    weighted_deltas : array, shape (k, ...)
    arithmetic : Arithmetic
        The type that the sum is rounded to.
    """
    positive = sum_of_models(weighted_deltas, arithmetic) >= 0
    agreeing: Array = np.where(positive, weighted_deltas > 0, weighted_deltas < 0)
    return agreeing


def _shared(weights: Array, agreeing: Array, arithmetic: Arithmetic) -> Array:
    divisor = sum_of_models(weights[:, None] * agreeing, arithmetic)
    divisor[divisor == 0] = 1
    return divisor


def _total(weights: Array, arithmetic: Arithmetic) -> Array:
    total = whole_sum(weights, arithmetic)
    return arithmetic.round(1) if np.abs(total) < arithmetic.round(SMALLEST_DIVISOR) else total


def _method(
    name: str,
    sparsifier: Callable[..., Array] | None,
    *more: Parameter,
    consensus: bool,
    normalize: bool = False,
    rescale: bool = False,
    draws: bool = False,
) -> MergeMethod:
    of_models = (Parameter("density", "model", default=1.0), *more)
    told = tuple(parameter.name for parameter in of_models)
    parameters = (
        Parameter("weight", "model"),
        *of_models,
        Parameter("normalize", "shared", default=normalize),
        Parameter("rescale", "shared", default=rescale),
        Parameter("lambda", "shared", default=1.0),
        Parameter("int8_mask", "shared", default=False),  # a type of masks that changes no number
    )
    merge = partial(merge_task_vectors, method=name, sparsifier=sparsifier, told=told, draws=draws, consensus=consensus)
    return MergeMethod(name=name, parameters=parameters, base="required", merge=merge, draws=draws)


_GAMMA = Parameter("gamma", "model", default=0.01)
_EPSILON = Parameter("epsilon", "model", default=0.15)
_METHODS = (
    _method("task_arithmetic", None, consensus=False),
    _method("ties", sparsify.magnitude, consensus=True, normalize=True),
    _method("dare_linear", sparsify.bernoulli, consensus=False, rescale=True, draws=True),
    _method("dare_ties", sparsify.bernoulli, consensus=True, rescale=True, draws=True),
    _method("breadcrumbs", sparsify.magnitude_outliers, _GAMMA, consensus=False),
    _method("breadcrumbs_ties", sparsify.magnitude_outliers, _GAMMA, consensus=True),
    _method("della_linear", sparsify.della_magprune, _EPSILON, consensus=False, rescale=True, draws=True),
    _method("della", sparsify.della_magprune, _EPSILON, consensus=True, normalize=True, rescale=True, draws=True),
)
TASK_ARITHMETIC_METHODS = {method.name: method for method in _METHODS}
"""mergekit 0.1.5's methods by name."""

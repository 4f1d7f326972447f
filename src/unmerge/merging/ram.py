"""Reinforced Agent Merging: changes of one model are kept whole, changes that models share are averaged."""

from __future__ import annotations

import numpy as np

from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.contract import base_of, number
from unmerge.merging.method import Group, MergeMethod, Parameter
from unmerge.merging.reductions import full_precision
from unmerge.merging.summation import sum_of_models

_SINGLE = Arithmetic("F32")
EPSILON = Parameter("epsilon", "shared", default=1e-5)
"""A change counts where it is larger than this, rounded to the working type; in weight units."""


def merge_ram(group: Group, arithmetic: Arithmetic) -> Array:
    """Return the base plus, element by element, the mean of the changes larger than ``epsilon``.

    mergekit's ``ram``: every step is rounded to the working type.

    Parameters
    ----------
    group : Group
        The base and models; shared ``epsilon``.
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
    base = base_of(group, "ram")
    if not group.models:
        return base.copy()
    own, shared, _ = _changes(base, group, "ram", arithmetic)
    change = sum_of_models(arithmetic.round(own + shared), arithmetic)
    return arithmetic.round(base + change)


def merge_ramplus_tl(group: Group, arithmetic: Arithmetic) -> Array:
    """Return the same with what only one model changed made larger, by a factor for each model and tensor.

    mergekit's ``ramplus_tl``: the factor is ``1 + r min(s / u, alpha)`` of a model that shares s of its changes and
    has u alone. Factors are float32, so the merge is float32 for half-precision inputs: not on the working type's
    grid.

    Parameters
    ----------
    group : Group
        The base and models; shared ``r``, ``alpha`` and ``epsilon``.
    arithmetic : Arithmetic
        The working type of the changes.

    Returns
    -------
    array, shape of the base
        Float32, or float64 where that is the working type.

    Raises
    ------
    RecipeError
        No base.
    """
    base = base_of(group, "ramplus_tl")
    if not group.models:
        return base.copy()
    own, shared, active = _changes(base, group, "ramplus_tl", arithmetic)
    r, alpha, epsilon = (number(group, "ramplus_tl", name) for name in ("r", "alpha", "epsilon"))
    factors = rescaling(active, r, alpha, epsilon)
    of_models = factors.reshape(-1, *[1] * base.ndim)
    return np.asarray(base + sum_of_models(own * of_models + shared, full_precision(arithmetic)))


def rescaling(active: Array, r: float, alpha: float, epsilon: float) -> Array:
    """Return each model's factor for the changes that it makes alone.

    Parameters
    ----------
    active : array of bool, shape (k, ...)
        Where each model's change counts.
    r, alpha : float
    epsilon : float
        Stands for the number of changes of a model that makes none alone.

    Returns
    -------
    array of float32, shape (k,)
    """
    flat = active.reshape(len(active), -1)
    alone = (flat & (flat.sum(axis=0) == 1)).sum(axis=1)
    ratio = _SINGLE.round(flat.sum(axis=1) - alone) / np.maximum(_SINGLE.round(alone), _SINGLE.round(epsilon))
    return 1 + _SINGLE.round(r) * np.clip(ratio, 0, _SINGLE.round(alpha))


def _changes(base: Array, group: Group, method: str, arithmetic: Arithmetic) -> tuple[Array, Array, Array]:
    """Return changes made by one model, each one's part of the shared ones, and where changes count: (k, ...)."""
    fl = arithmetic.round
    changes = np.stack([fl(model - base) for model in group.models])
    active = np.abs(changes) > fl(number(group, method, "epsilon"))
    count = active.sum(axis=0)
    counted = np.where(active, changes, 0)
    parts = fl(np.where(count > 1, counted, 0) / np.maximum(count, 1).astype(changes.dtype))
    return np.where(count == 1, counted, 0), parts, active


RAM = MergeMethod(name="ram", parameters=(EPSILON,), base="required", merge=merge_ram)
"""mergekit 0.1.5."""
RAMPLUS_TL = MergeMethod(
    name="ramplus_tl",
    parameters=(Parameter("r", "shared", default=0.1), Parameter("alpha", "shared", default=0.2), EPSILON),
    base="required",
    merge=merge_ramplus_tl,
)
"""mergekit 0.1.5."""

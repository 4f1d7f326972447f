"""Model Stock: from the base towards the mean of models, as far as the angles between their task vectors say."""

from __future__ import annotations

from functools import reduce
from itertools import combinations

import numpy as np

from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.contract import base_of, models_of, number
from unmerge.merging.method import Group, MergeMethod, Parameter
from unmerge.merging.reductions import full_precision, norm, total
from unmerge.merging.summation import sum_of_models

_SHORTEST = 1e-6
_SINGULAR = 1e-6


def merge_model_stock(group: Group, arithmetic: Arithmetic) -> Array:
    """Return ``t mean(models) + (1 - t) base`` with ``t = k c / (1 + (k - 1) c)``, c the mean cosine of k models.

    mergekit's ``model_stock`` (Jang et al., 2024, equation 5): every step is rounded to the working type.

    Parameters
    ----------
    group : Group
        The base, two models or more; shared ``filter_wise``: a ``t`` for every row (the last axis), not one for the
        tensor.
    arithmetic : Arithmetic
        The working type.

    Returns
    -------
    array, shape of the base

    Raises
    ------
    RecipeError
        No base, or fewer than two models.
    """
    base = base_of(group, "model_stock")
    models = models_of(group, "model_stock", 2)
    shape = base.shape
    if not number(group, "model_stock", "filter_wise") or base.ndim == 1:
        base, models = base.reshape(1, -1), tuple(model.reshape(1, -1) for model in models)
    fl = arithmetic.round
    cosine = _mean_cosine([fl(model - base) for model in models], arithmetic)
    t = interpolation(cosine, len(models), arithmetic)
    mean = fl(reduce(lambda one, other: fl(one + other), models) / len(models))
    return fl(fl(t * mean) + fl(fl(1 - t) * base)).reshape(shape)


def interpolation(cosine: Array, count: int, arithmetic: Arithmetic) -> Array:
    """Return t for the mean cosines of `count` task vectors; 0 where the formula has no value."""
    fl = arithmetic.round
    denominator = fl(1 + fl((count - 1) * cosine))
    singular = np.abs(denominator) < fl(_SINGULAR)
    return np.where(singular, 0, fl(fl(count * cosine) / np.where(singular, 1, denominator)))


def _mean_cosine(changes: list[Array], arithmetic: Arithmetic) -> Array:
    """Return the mean over pairs of the cosines along the last axis, shape (..., 1)."""
    fl, shortest = arithmetic.round, arithmetic.round(_SHORTEST)
    lengths = [norm(change, arithmetic) for change in changes]
    cosines = [
        fl(total(fl(one * other), arithmetic) / np.maximum(fl(lengths[i] * lengths[j]), shortest))
        for (i, one), (j, other) in combinations(enumerate(changes), 2)
    ]
    stacked = np.clip(np.stack(cosines), -1, 1)
    return fl(sum_of_models(stacked, full_precision(arithmetic)) / len(cosines))


MODEL_STOCK = MergeMethod(
    name="model_stock",
    parameters=(Parameter("filter_wise", "shared", default=False),),
    base="required",
    merge=merge_model_stock,
)
"""mergekit 0.1.5."""

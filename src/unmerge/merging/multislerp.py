"""Spherical interpolation between any number of models, in the tangent space at their mean direction."""

from __future__ import annotations

import numpy as np

from unmerge.errors import RecipeError
from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.contract import models_of, number, numbers
from unmerge.merging.method import Group, MergeMethod, Parameter
from unmerge.merging.reductions import apply, norm, total
from unmerge.merging.summation import sum_of_models


def merge_multislerp(group: Group, arithmetic: Arithmetic) -> Array:
    """Return the barycentre of models, or of task vectors where there is a base, on the sphere of mean radius.

    mergekit's ``multislerp``: every step is rounded to the working type. One model alone is returned as it is.

    Parameters
    ----------
    group : Group
        Models, ``weight`` of each; shared ``normalize_weights`` and ``eps``.
    arithmetic : Arithmetic
        The working type.

    Returns
    -------
    array, shape of the models

    Raises
    ------
    RecipeError
        A model without a weight; or three or more task vectors that are all zero, or whose weighted directions
        cancel: mergekit refuses them, too.
    """
    models = models_of(group, "multislerp", 1)
    if len(models) == 1:
        return models[0].copy()
    fl, base = arithmetic.round, group.base
    vectors = np.stack(models if base is None else [fl(model - base) for model in models])
    weights = fl(numbers(group, "multislerp", "weight"))
    if number(group, "multislerp", "normalize_weights"):
        weights = fl(weights / total(weights, arithmetic))
    flat = vectors.reshape(len(vectors), -1)
    merged = _barycentre(flat, weights, number(group, "multislerp", "eps"), group.name, arithmetic)
    merged = merged.reshape(models[0].shape)
    return merged if base is None else fl(merged + base)


def _barycentre(vectors: Array, weights: Array, eps: float, name: str, arithmetic: Arithmetic) -> Array:
    """Return the interpolated vector, shape (n,), of vectors (k, n) with weights (k,)."""
    fl = arithmetic.round
    of_rows = weights[:, None]
    lengths = norm(vectors, arithmetic)
    # In float16 eps is 0, so unchanged tensors are no numbers: in mergekit, too.
    with np.errstate(invalid="ignore"):
        units = fl(vectors / fl(lengths + eps))
    mean = sum_of_models(fl(units * of_rows), arithmetic)
    mean_length = norm(mean, arithmetic)
    if mean_length[0] < eps:
        return _line(vectors, weights, name, arithmetic)
    mean = fl(mean / mean_length)
    tangents = fl(units - fl(total(fl(units * mean), arithmetic) * mean))
    tangent = sum_of_models(fl(tangents * of_rows), arithmetic)
    angle = fl(norm(tangent, arithmetic) + eps)
    of_tangent = fl(apply(np.sin, angle, arithmetic) / angle)
    direction = fl(fl(mean * apply(np.cos, angle, arithmetic)) + fl(tangent * of_tangent))
    return fl(direction * total(fl(lengths[:, 0] * weights), arithmetic))


def _line(vectors: Array, weights: Array, name: str, arithmetic: Arithmetic) -> Array:
    """Interpolate two opposite vectors linearly; mergekit refuses more."""
    if len(vectors) != 2:
        raise RecipeError(f"{name}: task vectors are zero or cancel, so multislerp has no direction: leave it out")
    fl = arithmetic.round
    return fl(fl(vectors[0] * weights[0]) + fl(vectors[1] * weights[1]))


MULTISLERP = MergeMethod(
    name="multislerp",
    parameters=(
        Parameter("weight", "model"),
        Parameter("normalize_weights", "shared", default=True),
        Parameter("eps", "shared", default=1e-8),
    ),
    base="optional",
    merge=merge_multislerp,
)
"""mergekit 0.1.5."""

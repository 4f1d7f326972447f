"""Spherical interpolation between two models or two task vectors, with weights: NuSLERP."""

from __future__ import annotations

import numpy as np

from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.contract import models_of, number, numbers
from unmerge.merging.method import Group, MergeMethod, Parameter
from unmerge.merging.reductions import apply, norm, total

_COLLINEAR = 1e-16
_SHORTEST = 1e-7
_NO_WEIGHT = 1e-6


def merge_nuslerp(group: Group, arithmetic: Arithmetic) -> Array:
    """Return the interpolation between two models, at the second's share of the weights.

    mergekit's ``nuslerp``: every step is rounded to the working type. With a base, task vectors are interpolated and
    the result is added to it.

    Parameters
    ----------
    group : Group
        Two models, ``weight`` of each; shared ``nuslerp_flatten`` (the tensor is one vector) or else
        ``nuslerp_row_wise`` (vectors along the first axis, not the last one).
    arithmetic : Arithmetic
        The working type.

    Returns
    -------
    array, shape of the models

    Raises
    ------
    RecipeError
        Not two models with a weight each.
    """
    models = models_of(group, "nuslerp", 2, 2)
    flatten = bool(number(group, "nuslerp", "nuslerp_flatten"))
    axis = 0 if number(group, "nuslerp", "nuslerp_row_wise") else -1
    base, fl = group.base, arithmetic.round
    pair = np.stack(models if base is None else [fl(model - base) for model in models])
    first, second = pair.reshape(2, -1) if flatten else pair
    cosine = _cosine(first, second, -1 if flatten else axis, arithmetic)
    change = _interpolate(_share(*numbers(group, "nuslerp", "weight")), first, second, cosine, arithmetic)
    merged = change.reshape(models[0].shape)
    return merged if base is None else fl(base + merged)


def _share(first: float, second: float) -> float:
    together = first + second
    return 0.5 if abs(together) < _NO_WEIGHT else second / together


def _cosine(first: Array, second: Array, axis: int, arithmetic: Arithmetic) -> Array:
    shortest, fl = arithmetic.round(_SHORTEST), arithmetic.round
    units = [fl(values / np.maximum(norm(values, arithmetic, axis), shortest)) for values in (first, second)]
    return np.clip(total(fl(units[0] * units[1]), arithmetic, axis), -1, 1)


def _interpolate(t: float, first: Array, second: Array, cosine: Array, arithmetic: Arithmetic) -> Array:
    fl = arithmetic.round
    collinear = fl(1 - fl(cosine * cosine)) <= _COLLINEAR
    angle = apply(np.arccos, np.where(collinear, 0, cosine), arithmetic)
    sine = apply(np.sin, angle, arithmetic)
    of_first, of_second = (apply(np.sin, fl(part * angle), arithmetic) for part in (1 - t, t))
    spherical = fl(fl(fl(of_first * first) + fl(of_second * second)) / sine)
    return np.where(collinear, fl(fl((1 - t) * first) + fl(t * second)), spherical)


NUSLERP = MergeMethod(
    name="nuslerp",
    parameters=(
        Parameter("weight", "model"),
        Parameter("nuslerp_row_wise", "shared", default=False),
        Parameter("nuslerp_flatten", "shared", default=True),
    ),
    base="optional",
    merge=merge_nuslerp,
)
"""mergekit 0.1.5."""

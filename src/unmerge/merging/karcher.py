"""The Karcher mean of models on the unit sphere: the point whose distances to them have the smallest sum of squares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.contract import models_of, number
from unmerge.merging.method import Group, MergeMethod, Parameter
from unmerge.merging.reductions import apply, dot, full_precision, norm


def merge_karcher(group: Group, arithmetic: Arithmetic) -> Array:
    """Return the Karcher mean of the models' directions times the mean of their norms.

    mergekit's ``karcher``: models count alike, the base among them. Vectors are rounded to the working type at every
    step, norms to float32; in bfloat16 angles below 3.6 degrees are zero, so that the mean of the directions is taken.

    Parameters
    ----------
    group : Group
        Models; shared ``max_iter`` and ``tol``.
    arithmetic : Arithmetic
        The working type.

    Returns
    -------
    array, shape of the models

    Raises
    ------
    RecipeError
        No model, or a parameter without a value.
    """
    models = models_of(group, "karcher", 1)
    if len(models) == 1:
        return models[0].copy()
    fl, working, share = arithmetic.round, full_precision(arithmetic), 1 / len(models)
    tolerance = number(group, "karcher", "tol")
    vectors = [model.ravel() for model in models]
    lengths = [norm(vector, working) for vector in vectors]
    units = [fl(vector / length) for vector, length in zip(vectors, lengths, strict=True) if length[0] > tolerance]
    if not units:
        return np.zeros_like(models[0])
    mean = _mean_direction(units, tolerance, int(number(group, "karcher", "max_iter")), arithmetic)
    scale = sum((working.round(share * length) for length in lengths), working.round([0.0]))
    # torch rounds a number to the tensor's type where it stands to the left of it, and not to the right.
    return fl(fl(scale) * mean).reshape(models[0].shape)


def _mean_direction(units: Sequence[Array], tolerance: float, rounds: int, arithmetic: Arithmetic) -> Array:
    fl, working, shares = arithmetic.round, full_precision(arithmetic), _equal_shares(len(units))
    mean = np.zeros_like(units[0])
    for share, unit in zip(shares, units, strict=True):
        mean = fl(mean + fl(share * unit))
    length = norm(mean, working)
    mean = units[0] if length[0] < tolerance else fl(mean / length)
    for _ in range(rounds):
        tangent = _tangent(mean, units, shares, tolerance, arithmetic)
        step = norm(tangent, working)
        if step[0] < tolerance:
            break
        cosine, sine = fl(apply(np.cos, step, working)), fl(apply(np.sin, step, working))
        mean = fl(fl(cosine * mean) + fl(sine * fl(tangent / step)))
        length = norm(mean, working)
        if length[0] > tolerance:
            mean = fl(mean / length)
    return mean


def _equal_shares(count: int) -> list[float]:
    # Divided by their own sum, as mergekit does: ten tenths are not one.
    equal = [1 / count] * count
    return [share / sum(equal) for share in equal]


def _tangent(
    mean: Array, units: Sequence[Array], shares: Sequence[float], tolerance: float, arithmetic: Arithmetic
) -> Array:
    """Return the mean of the directions from `mean` to each unit vector, as long as the angles between them."""
    fl = arithmetic.round
    tangent = np.zeros_like(mean)
    for share, unit in zip(shares, units, strict=True):
        cosine = np.clip(dot(mean, unit, arithmetic), -1, 1)
        angle = apply(np.arccos, cosine, arithmetic)
        if angle[0] >= tolerance:
            scale = fl(share * fl(angle / apply(np.sin, angle, arithmetic)))
            tangent = fl(tangent + fl(scale * fl(unit - fl(cosine * mean))))
    return tangent


KARCHER = MergeMethod(
    name="karcher",
    parameters=(Parameter("max_iter", "shared", default=10), Parameter("tol", "shared", default=1e-5)),
    base="ignored",
    merge=merge_karcher,
)
"""mergekit 0.1.5."""

"""Spherical interpolation from the base to one model; the whole tensor is one vector."""

from __future__ import annotations

import numpy as np

from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.contract import base_of, models_of, number
from unmerge.merging.method import Group, MergeMethod, Parameter
from unmerge.merging.reductions import apply, full_precision, norm, total

COLLINEAR = 0.9995
"""Interpolation is linear where the cosine is larger than this: nearly always for fine-tunes of one base."""
CHUNK = 1 << 20
"""mergekit takes norms and dots of pieces of this many elements, then of the pieces' results."""
_TINY = 1e-8


def merge_slerp(group: Group, arithmetic: Arithmetic) -> Array:
    """Return ``sin((1 - t) omega) / sin(omega) base + sin(t omega) / sin(omega) model``.

    mergekit's ``slerp``: computed in float32 whatever the working type, and rounded once. Equal to the bit where
    interpolation is linear; elsewhere the two coefficients are within one or two units of float32 of mergekit's.

    Parameters
    ----------
    group : Group
        The base, one model, and shared parameter ``t``.
    arithmetic : Arithmetic
        The working type.

    Returns
    -------
    array, shape of the base

    Raises
    ------
    RecipeError
        No base, not one model, or no ``t``.
    """
    base = base_of(group, "slerp")
    (model,) = models_of(group, "slerp", 1, 1)
    working = full_precision(arithmetic)
    if not base.size:
        return base.copy()
    of_base, of_model = coefficients(base, model, number(group, "slerp", "t"), working)
    return arithmetic.round(of_base * base + of_model * model)


def coefficients(base: Array, model: Array, t: float, working: Arithmetic) -> tuple[Array, Array]:
    """Return what base and model are multiplied by, each of shape (1,).

    Parameters
    ----------
    base, model : array
        Of one shape.
    t : float
        0 for the base, 1 for the model.
    working : Arithmetic
        Float32 or float64.

    Returns
    -------
    of_base, of_model : array, shape (1,)
    """
    share = working.round([t])
    cosine = _cosine(base.ravel(), model.ravel(), working)
    if abs(float(cosine[0])) > COLLINEAR:
        return 1 - share, share
    angle = apply(np.arccos, cosine, working)
    sine = apply(np.sin, angle, working)
    return apply(np.sin, (1 - share) * angle, working) / sine, apply(np.sin, share * angle, working) / sine


def _cosine(base: Array, model: Array, working: Arithmetic) -> Array:
    products = _unit(base, working) * _unit(model, working)
    dots = np.concatenate([total(chunk, working) for chunk in _chunks(products)])
    return np.clip(total(dots, working), -1, 1)


def _unit(values: Array, working: Arithmetic) -> Array:
    length = norm(np.concatenate([norm(chunk, working) for chunk in _chunks(values)]), working)
    return values / length if length[0] > _TINY else values


def _chunks(values: Array) -> list[Array]:
    return [values[start : start + CHUNK] for start in range(0, len(values), CHUNK)]


SLERP = MergeMethod(name="slerp", parameters=(Parameter("t", "shared"),), base="required", merge=merge_slerp)
"""mergekit 0.1.5."""

"""NearSwap: the base, moved to a model by a given step at most."""

from __future__ import annotations

import numpy as np

from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.contract import base_of, models_of, number
from unmerge.merging.method import Group, MergeMethod, Parameter

_CLOSEST = 1e-6


def merge_nearswap(group: Group, arithmetic: Arithmetic) -> Array:
    """Return ``w model + (1 - w) base`` with ``w = min(t / |model - base|, 1)``, element by element.

    mergekit's ``nearswap``: every step is rounded to the working type, and the quotient is a reciprocal times ``t``.

    Parameters
    ----------
    group : Group
        The base, one model; shared ``t``, in weight units.
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
    base = base_of(group, "nearswap")
    (model,) = models_of(group, "nearswap", 1, 1)
    fl = arithmetic.round
    distance = np.maximum(np.abs(fl(base - model)), fl(_CLOSEST))
    # A reciprocal of float16 may overflow, and times t = 0 it is no number: in mergekit, too.
    with np.errstate(invalid="ignore"):
        share = np.clip(fl(number(group, "nearswap", "t") * fl(1 / distance)), 0, 1)
    return fl(fl(share * model) + fl(fl(1 - share) * base))


NEARSWAP = MergeMethod(name="nearswap", parameters=(Parameter("t", "shared"),), base="required", merge=merge_nearswap)
"""mergekit 0.1.5."""

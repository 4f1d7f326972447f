"""One model's tensor, as it is or scaled: how layers are stacked."""

from __future__ import annotations

from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.contract import models_of
from unmerge.merging.method import Group, MergeMethod, Parameter


def merge_passthrough(group: Group, arithmetic: Arithmetic) -> Array:
    """Return ``scale model``, or the model where it has no ``scale``.

    Parameters
    ----------
    group : Group
        One model; ``scale`` of it, or None.
    arithmetic : Arithmetic
        The working type.

    Returns
    -------
    array, shape of the model

    Raises
    ------
    RecipeError
        Not one model.
    """
    (model,) = models_of(group, "passthrough", 1, 1)
    (scale,) = group.of_models.get("scale") or (None,)
    return model.copy() if scale is None else arithmetic.round(model * float(scale))


PASSTHROUGH = MergeMethod(
    name="passthrough",
    parameters=(Parameter("scale", "model", optional=True),),
    base="ignored",
    merge=merge_passthrough,
)
"""mergekit 0.1.5."""

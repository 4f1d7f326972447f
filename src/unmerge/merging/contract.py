"""What a merge method asks of its inputs, and the messages for those that it cannot use."""

from __future__ import annotations

from unmerge.errors import RecipeError
from unmerge.merging.arithmetic import Array
from unmerge.merging.method import Group


def base_of(group: Group, method: str) -> Array:
    """Return the base's tensor.

    Raises
    ------
    RecipeError
        There is none.
    """
    if group.base is None:
        raise RecipeError(f"{group.name}: {method} needs a base model, and there is none: give base_model")
    return group.base


def models_of(group: Group, method: str, least: int, most: int | None = None) -> tuple[Array, ...]:
    """Return the models' tensors.

    Raises
    ------
    RecipeError
        There are fewer than `least`, or more than `most`.
    """
    found = len(group.models)
    if found < least or (most is not None and found > most):
        expected = f"{least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
        beside = "" if group.base is None else " beside the base"
        raise RecipeError(f"{group.name}: {method} takes {expected} models{beside}, and {found} were given")
    return group.models


def number(group: Group, method: str, parameter: str) -> float:
    """Return a parameter that holds for the whole tensor.

    Raises
    ------
    RecipeError
        It has no value.
    """
    value = group.shared.get(parameter)
    if value is None:
        raise RecipeError(f"{group.name}: {method} needs {parameter}, and none was given")
    return float(value)


def numbers(group: Group, method: str, parameter: str) -> list[float]:
    """Return a parameter's value for each model.

    Raises
    ------
    RecipeError
        A model has none.
    """
    values = [value for value in group.of_models.get(parameter, ()) if value is not None]
    if len(values) != len(group.models):
        found = f"{len(values)} values were given for {len(group.models)} models"
        raise RecipeError(f"{group.name}: {method} needs {parameter} for every model, and {found}")
    return [float(value) for value in values]

"""What a parameter is for one tensor: filters, gradients, precedence and defaults, as mergekit 0.1.5 resolves them.

Sources: ``mergekit.config.evaluate_setting``, ``mergekit.parameter_resolver`` and ``ConfigReader.parameter_sources``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from unmerge.errors import RecipeError
from unmerge.merging.method import Parameter, Value
from unmerge.recipe.document import Conditional, Scalar, Setting, Settings

_TRUTH = TypeAdapter(bool)
_WHOLE = TypeAdapter(int)
_NUMBER = TypeAdapter(float)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value is asked for.

    Attributes
    ----------
    tensor : str
        The tensor's name: in the input for parameters of a model, in the output for shared ones.
    depth : float
        Of the layer in its slice, from 0 (the first) to 1 (the last); 0 for tensors outside the layers.
    """

    tensor: str
    depth: float = 0.0


def resolve(parameter: Parameter, scopes: Iterable[Settings], place: Place) -> Value | None:
    """Return what a parameter is for one tensor.

    Parameters
    ----------
    parameter : Parameter
        What the method calls it, its type (that of its default; a number where it has none) and its default.
    scopes : iterable of mapping
        What the recipe sets, from the innermost scope to the outermost; the first that says something counts.
    place : Place
        The tensor.

    Raises
    ------
    RecipeError
        If nothing is said of a parameter without a default, or what is said is not of its type.
    """
    convert = _converter(parameter)
    for settings in scopes:
        if parameter.name in settings:
            found = _evaluate(settings[parameter.name], place, convert)
            if found is not None:
                return found
    if parameter.default is None and not parameter.optional:
        raise RecipeError(f"parameter {parameter.name} is missing for {place.tensor}; the recipe must give it")
    return parameter.default


def _converter(parameter: Parameter) -> Callable[[Scalar], Value]:
    """Return what checks a value: pydantic's rules, as in mergekit."""
    adapter = _adapter(parameter.default)

    def convert(value: Scalar) -> Value:
        try:
            found: Value = adapter.validate_python(value)
        except ValidationError as error:
            expected = "true or false" if adapter is _TRUTH else "a number"
            raise RecipeError(f"parameter {parameter.name} is {value!r}; expected {expected}") from error
        return found

    return convert


def _adapter(default: object) -> TypeAdapter[Any]:
    if isinstance(default, bool):
        return _TRUTH
    return _WHOLE if isinstance(default, int) else _NUMBER


def _evaluate(setting: Setting, place: Place, convert: Callable[[Scalar], Value]) -> Value | None:
    """Return the value of a setting for a tensor, None where it says nothing of it."""
    if not isinstance(setting, tuple):
        return convert(setting)
    conditions = [item for item in setting if isinstance(item, Conditional)]
    if not conditions:
        return _interpolated([convert(item) for item in setting if not isinstance(item, Conditional)], place, convert)
    chosen = next((item for item in conditions if _applies(item, place.tensor)), None)
    return None if chosen is None else _evaluate(chosen.value, place, convert)


def _applies(item: Conditional, tensor: str) -> bool:
    return item.filter in (None, "*") or str(item.filter) in tensor


def _interpolated(values: list[Value], place: Place, convert: Callable[[Scalar], Value]) -> Value | None:
    """Return the value at a depth: between neighbours for numbers, the one before it for truth values."""
    if not values:
        return None
    position = place.depth * (len(values) - 1)
    lower = int(position)
    if any(isinstance(value, bool) for value in values):
        return values[lower]
    upper = min(len(values) - 1, lower + 1)
    fraction = position - lower
    return convert((1 - fraction) * values[lower] + fraction * values[upper])

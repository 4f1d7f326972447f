"""What a merge method is: a plain function of one tensor of every model, and what it is told beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from unmerge.merging.arithmetic import Arithmetic, Array

Value = float | bool
"""A parameter's value: mergekit resolves gradients and filters to one of these for every tensor."""


class Draws(Protocol):
    """A stream of random integers, shared by all tensors of a merge in the order in which they are made."""

    def take(self, count: int) -> Array:
        """Return the next `count` draws as uint32: the low 24 bits of outputs of torch's CPU generator."""
        ...


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a merge method.

    Attributes
    ----------
    name : str
        As in the YAML.
    scope : str
        ``"model"``: a value for each model but the base; ``"shared"``: one value for the tensor.
    default : float, bool or None
        None where there is no default: it must be given.
    optional : bool
        Whether it may be absent although it has no default (mergekit's ``Optional`` parameters).
    """

    name: str
    scope: Literal["model", "shared"]
    default: Value | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """One tensor of all models, with the parameters that hold for it.

    Attributes
    ----------
    name : str
        The tensor's name in the merge.
    base : array or None
        The base's tensor, in the working type; None where a method has none, or counts it among the models.
    models : tuple of array
        The same tensor of each other model, in the order of the YAML (mergekit appends a base that is not
        listed at the end, for methods that count it among the models).
    of_models : mapping of str to tuple
        Values of parameters of scope ``"model"``, in the order of `models`.
    shared : mapping of str to value
        Values of parameters of scope ``"shared"``.
    draws : Draws or None
        For methods that draw random masks.
    """

    name: str
    base: Array | None
    models: tuple[Array, ...]
    of_models: Mapping[str, tuple[Value | None, ...]] = field(default_factory=dict)
    shared: Mapping[str, Value | None] = field(default_factory=dict)
    draws: Draws | None = None


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """A merge method, as one version of one tool makes it.

    Attributes
    ----------
    name : str
        As in the YAML.
    parameters : tuple of Parameter
        What it may be told.
    base : str
        ``"required"`` or ``"optional"``: `Group.base` is set apart; ``"ignored"``: the base counts among the models.
    merge : callable
        Makes one tensor: values on the working type's grid (or of another type where the tool's are).
    draws : bool
        Whether it draws random masks.
    """

    name: str
    parameters: tuple[Parameter, ...]
    base: Literal["required", "optional", "ignored"]
    merge: Callable[[Group, Arithmetic], Array]
    draws: bool = False

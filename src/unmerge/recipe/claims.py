"""What a recipe claims, one claim at a time, and the same recipe with that claim changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

from unmerge.merging.method import MergeMethod, Parameter, Value
from unmerge.recipe.document import (
    Conditional,
    ModelInput,
    ModelReference,
    Recipe,
    Scalar,
    Setting,
    Settings,
)

Put = Callable[[Scalar], Recipe]
"""Returns the recipe with another value."""


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """A number, or true or false, that a recipe states or leaves to its default.

    Attributes
    ----------
    parameter : Parameter
    subject : str
        What it is, in words: ``"weight of math"``.
    owner : ModelReference or None
        The model that it is of; None if it is of the merge, or of several models.
    value : float or bool
    default : bool
        Whether the recipe leaves it to its default.
    joint : bool
        Whether it stands for the claims of several models, which are alike.
    put : callable
    """

    parameter: Parameter
    subject: str
    owner: ModelReference | None
    value: Value
    default: bool
    joint: bool
    put: Put

    @property
    def is_number(self) -> bool:
        """Whether it is a number rather than true or false."""
        return not isinstance(self.parameter.default, bool)


@dataclass(frozen=True, slots=True, eq=False)
class _Scope:
    """Some parameters of a recipe, and how to write them back."""

    owner: ModelReference | None
    where: str
    settings: Settings
    put: Callable[[Settings], Recipe]


def labels(recipe: Recipe) -> dict[ModelReference, str]:
    """Return short names of a recipe's models: the last part of the path, where that tells them apart."""
    short = {reference: _short(reference) for reference in recipe.references}
    names = list(short.values())
    return {reference: name if names.count(name) == 1 else str(reference) for reference, name in short.items()}


def _short(reference: ModelReference) -> str:
    parts = [part.rstrip("/").rsplit("/", 1)[-1] for part in (reference.path, reference.adapter) if part]
    return "+".join(parts)


def list_claims(recipe: Recipe, method: MergeMethod) -> list[Claim]:
    """List the values that a recipe claims: those it states, and the defaults of those it does not mention.

    A value that several models share comes once for each of them, and once for all together.
    """
    known = {parameter.name: parameter for parameter in method.parameters}
    names = labels(recipe)
    stated = [claim for scope in _scopes(recipe) for claim in _of_scope(scope, known, names)]
    return [*stated, *_together(recipe, stated), *_defaults(recipe, method, stated)]


def put_all(recipe: Recipe, method: MergeMethod, values: Mapping[str, Value]) -> Recipe:
    """Return a recipe with several values changed; they go by the subjects of its claims."""
    for subject, value in values.items():
        claim = next(claim for claim in list_claims(recipe, method) if claim.subject == subject)
        recipe = claim.put(value)
    return recipe


def _scopes(recipe: Recipe) -> Iterator[_Scope]:
    yield _Scope(None, "", recipe.parameters, lambda new: replace(recipe, parameters=new))
    for index, item in enumerate(recipe.models):
        yield _Scope(item.model, "", item.parameters, _put_model(recipe, index))
    for number, part in enumerate(recipe.slices):
        where = f" in slice {number + 1}" if len(recipe.slices) > 1 else ""
        yield _Scope(None, where, part.parameters, _put_slice(recipe, number))
        for index, source in enumerate(part.sources):
            yield _Scope(source.model, where, source.parameters, _put_source(recipe, number, index))


def _put_model(recipe: Recipe, index: int) -> Callable[[Settings], Recipe]:
    def put(new: Settings) -> Recipe:
        changed = replace(recipe.models[index], parameters=new)
        return replace(recipe, models=(*recipe.models[:index], changed, *recipe.models[index + 1 :]))

    return put


def _put_slice(recipe: Recipe, number: int) -> Callable[[Settings], Recipe]:
    def put(new: Settings) -> Recipe:
        changed = replace(recipe.slices[number], parameters=new)
        return replace(recipe, slices=(*recipe.slices[:number], changed, *recipe.slices[number + 1 :]))

    return put


def _put_source(recipe: Recipe, number: int, index: int) -> Callable[[Settings], Recipe]:
    def put(new: Settings) -> Recipe:
        part = recipe.slices[number]
        changed = replace(part.sources[index], parameters=new)
        sources = (*part.sources[:index], changed, *part.sources[index + 1 :])
        return replace(
            recipe, slices=(*recipe.slices[:number], replace(part, sources=sources), *recipe.slices[number + 1 :])
        )

    return put


def _of_scope(scope: _Scope, known: Mapping[str, Parameter], names: Mapping[ModelReference, str]) -> Iterator[Claim]:
    for name, setting in scope.settings.items():
        if name not in known:
            continue
        of_model = "" if scope.owner is None else f" of {names[scope.owner]}"
        for place, value, change in _leaves(setting):
            number = _number(value)
            if number is None:
                continue
            yield Claim(
                known[name], f"{name}{of_model}{place}{scope.where}", scope.owner, number, False, False,
                _put_leaf(scope, name, change),
            )  # fmt: skip


def _put_leaf(scope: _Scope, name: str, change: Callable[[Scalar], Setting]) -> Put:
    return lambda value: scope.put({**scope.settings, name: change(value)})


def _number(value: Scalar) -> Value | None:
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return None


def _leaves(setting: Setting) -> Iterator[tuple[str, Scalar, Callable[[Scalar], Setting]]]:
    """Yield the values in a setting: where each stands, what it is, and how to change it."""
    if not isinstance(setting, tuple):
        yield "", setting, lambda value: value
        return
    conditions = [item for item in setting if isinstance(item, Conditional)]
    if not conditions:
        yield from _gradient_leaves(tuple(item for item in setting if not isinstance(item, Conditional)), "")
        return
    for index, item in enumerate(conditions):
        where = "" if item.filter in (None, "*") else f" for {item.filter}"
        inner = item.value if isinstance(item.value, tuple) else (item.value,)
        for place, value, change in _gradient_leaves(inner, where):
            yield place, value, _in_condition(tuple(conditions), index, change)


def _gradient_leaves(
    gradient: tuple[Scalar, ...], where: str
) -> Iterator[tuple[str, Scalar, Callable[[Scalar], tuple[Scalar, ...]]]]:
    for index, value in enumerate(gradient):
        place = f"{where}, value {index + 1} of {len(gradient)}" if len(gradient) > 1 else where
        yield place, value, _in_gradient(gradient, index)


def _in_gradient(gradient: tuple[Scalar, ...], index: int) -> Callable[[Scalar], tuple[Scalar, ...]]:
    return lambda value: (*gradient[:index], value, *gradient[index + 1 :])


def _in_condition(
    conditions: tuple[Conditional, ...], index: int, change: Callable[[Scalar], tuple[Scalar, ...]]
) -> Callable[[Scalar], Setting]:
    return lambda value: (
        *conditions[:index],
        replace(conditions[index], value=change(value)),
        *conditions[index + 1 :],
    )


def _together(recipe: Recipe, stated: list[Claim]) -> Iterator[Claim]:
    """Yield what several models are said to have alike: a change of all at once."""
    groups: dict[tuple[str, Value], list[Claim]] = {}
    for claim in stated:
        if claim.owner is not None:
            groups.setdefault((claim.parameter.name, claim.value), []).append(claim)
    for (name, value), group in groups.items():
        if len({claim.owner for claim in group}) > 1 and not recipe.slices and len(group) == len(recipe.models):
            yield Claim(
                group[0].parameter, f"{name} of all models", None, value, False, True, _put_in_models(recipe, name)
            )


def _put_in_models(recipe: Recipe, name: str) -> Put:
    return lambda value: replace(
        recipe, models=tuple(replace(item, parameters={**item.parameters, name: value}) for item in recipe.models)
    )


def _defaults(recipe: Recipe, method: MergeMethod, stated: list[Claim]) -> Iterator[Claim]:
    """Yield parameters that the recipe does not mention, which then have their default."""
    mentioned = {claim.parameter.name for claim in stated}
    for parameter in method.parameters:
        if parameter.name not in mentioned and parameter.default is not None:
            yield Claim(
                parameter, parameter.name, None, parameter.default, True, False, _put_global(recipe, parameter.name)
            )


def _put_global(recipe: Recipe, name: str) -> Put:
    return lambda value: replace(recipe, parameters={**recipe.parameters, name: value})


def without(recipe: Recipe, model: ModelReference) -> Recipe | None:
    """Return a recipe without a model; None where it is the base, or the only one."""
    if model == recipe.base_model or any(part.base_model == model for part in recipe.slices):
        return None
    models = tuple(item for item in recipe.models if item.model != model)
    slices = tuple(
        replace(part, sources=tuple(source for source in part.sources if source.model != model))
        for part in recipe.slices
    )
    if (recipe.models and not models) or any(not part.sources for part in slices):
        return None
    return replace(recipe, models=models, slices=slices)


def with_model(recipe: Recipe, model: ModelReference) -> Recipe | None:
    """Return a recipe of whole models with one model more, which has the parameters of the last one."""
    if not recipe.models:
        return None
    return replace(recipe, models=(*recipe.models, ModelInput(model, recipe.models[-1].parameters)))


def exchanges(recipe: Recipe) -> Iterator[tuple[ModelReference, ModelReference]]:
    """Yield the pairs of models that a recipe may have mistaken for each other."""
    yield from combinations(recipe.references, 2)

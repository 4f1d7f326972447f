"""Recipes tried on some tensors: how many stored values each makes to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

import numpy as np

from unmerge.checkpoint.tensor import Tensor
from unmerge.errors import RecipeError
from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.method import Draws, MergeMethod
from unmerge.merging.registry import MERGEKIT, MERGEKIT_TO_0_1_4
from unmerge.recipe.document import Conditional, ModelReference, Recipe, Setting, Settings, storage_type
from unmerge.recipe.making import Inputs, draws_of, make, promoted
from unmerge.recipe.plan import InputTensor, PlannedTensor, plan
from unmerge.recipe.replay import compare
from unmerge.recipe.sources import Model, load

FAIR = 0.9995
"""A recipe that makes this share of the values needs no polishing."""
NUMBER_STEPS = (0.05, 0.01, 0.005)
"""By how much the numbers of a recipe are moved, to see if more bits come out equal."""
SMALL = 0.05
"""Numbers below it are moved by shares of themselves."""
NOTHING, LEAST = 1e-5, 1e-6
"""A share of values that is not counted as lost, and one that is not counted as won."""
SCREENING, SEMIFINAL = 2, 6
"""Recipes are tried on so many tensors first; so many of them go on to all."""
BEHIND = 0.1
"""By how much less than the best a recipe may make of the first tensors to go on."""
HOPELESS = 0.5
"""Where the best makes less of the first tensors, nothing goes on."""
POLISHED = {"weight", "density", "gamma", "epsilon", "lambda", "t", "select_topk"}
"""The parameters whose numbers are."""


CURRENT, OLDER = "mergekit 0.1.5", "mergekit up to 0.1.4"
CONVENTIONS: dict[str, Mapping[str, MergeMethod]] = {CURRENT: MERGEKIT, OLDER: MERGEKIT_TO_0_1_4}
"""Merge methods by version."""


@dataclass(frozen=True, slots=True, order=True)
class Tried:
    """A recipe and what came of it.

    Attributes
    ----------
    share : float
        Of the values that a model changes, how many are equal to the target's, to the bit, or at a trim threshold
        and one of what a sort may make of them.
    exact : float
        The same where nothing but the bit counts: ties fall as this machine sorts them.
    recipe : Recipe
    convention : str
        A key of `CONVENTIONS`.
    """

    share: float
    exact: float
    recipe: Recipe = field(compare=False)
    convention: str = field(default=CURRENT, compare=False)

    @property
    def rank(self) -> float:
        """How good it is; where much is free, many recipes explain all of it, and only the right one makes it."""
        return self.share + self.exact


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """Whole tensors of a target, to try recipes on.

    Attributes
    ----------
    names : tuple of str
        The tensors.
    models : mapping of ModelReference to Model
        All that a recipe may name.
    target : mapping of str to Tensor
        The target's, in memory.
    threads : int
        torch's, in the merge.
    convention : str
        A key of `CONVENTIONS`.
    """

    names: tuple[str, ...]
    models: Mapping[ModelReference, Model]
    target: Mapping[str, Tensor]
    threads: int = 1
    convention: str = CURRENT
    _loaded: dict[tuple[ModelReference, str, str], Array] = field(default_factory=dict)

    def of(self, names: Sequence[str]) -> Trial:
        """Return a trial on some of the tensors; what was loaded is shared."""
        return replace(self, names=tuple(names))

    def attempt(self, recipe: Recipe, draws: Callable[[int], Draws] | None = None) -> Tried:
        """Make the tensors by a recipe and count the values that are equal to the last bit.

        Parameters
        ----------
        recipe : Recipe
        draws : callable, optional
            Returns the stream of random numbers after so many draws, for recipes that draw masks.
        """
        method = CONVENTIONS[self.convention][recipe.merge_method]
        matches = []
        for planned, drawn in self.planned(recipe):
            inputs = self.inputs(planned, recipe)
            made, kind = make(method, inputs, recipe.out_dtype, draws(drawn) if draws else None)
            matches.append(compare(method.name, inputs, made, kind, self.target[planned.name]))
        active = max(1, sum(match.active for match in matches))
        unequal = sum(match.unequal for match in matches)
        different = sum(match.elements - match.equal for match in matches)
        return Tried(1.0 - unequal / active, 1.0 - different / active, recipe, self.convention)

    def planned(self, recipe: Recipe) -> Iterator[tuple[PlannedTensor, int]]:
        """Yield the tensors of the trial as the recipe plans them, and how many draws come before each."""
        method = CONVENTIONS[self.convention][recipe.merge_method]
        names = {reference: self.models[reference].tensors for reference in recipe.references}
        wanted, drawn = set(self.names), 0
        for planned in plan(recipe, method, names, None if method.draws else wanted).tensors:
            if planned.name in wanted:
                yield planned, drawn
            drawn += draws_of(planned, self.models) if method.draws else 0

    def inputs(self, planned: PlannedTensor, recipe: Recipe) -> Inputs:
        """Return what a tensor is made of."""
        stored = [self.models[item.model].tensors[item.stored] for item in planned.inputs]
        arithmetic = Arithmetic(storage_type(recipe.dtype) or promoted(stored), self.threads)
        return Inputs(planned, arithmetic, {item.model: self._load(item, arithmetic) for item in planned.inputs})

    def _load(self, tensor: InputTensor, arithmetic: Arithmetic) -> Array:
        key = (tensor.model, tensor.stored, arithmetic.name)
        if key not in self._loaded:
            self._loaded[key] = load(self.models[tensor.model].tensors[tensor.stored], arithmetic)
        return self._loaded[key]

    @property
    def screening(self) -> Trial:
        """The same on a few tensors, the first and the last: parameters may change with depth."""
        return self.of([*self.names[: SCREENING - 1], *self.names[SCREENING - 1 :][-1:]])

    def best(self, recipes: Iterable[Recipe]) -> list[Tried]:
        """Try recipes, the best first; those that are written alike are tried once.

        What makes little of a few tensors is not tried on the others, and its share is of those few.
        """
        different = list({repr(recipe): recipe for recipe in recipes}.values())
        screening = self.screening
        screened = sorted((screening.attempt(recipe) for recipe in different), key=lambda tried: -tried.rank)
        if not screened or screened[0].share < HOPELESS or screening.names == self.names:
            return screened
        leading = screened[0].share
        going_on = [
            one
            for place, one in enumerate(screened)
            if one.share == leading or (place < SEMIFINAL and one.share >= leading - BEHIND)
        ]
        whole = [self.attempt(one.recipe) for one in going_on]
        behind = [one for one in screened[len(going_on) :] if one.share < min(found.share for found in whole)]
        return [*sorted(whole, key=lambda tried: -tried.rank), *behind]


def is_as_good(one: Tried, leading: Tried) -> bool:
    """Tell whether a recipe makes as much as another: all values, if that one makes all."""
    spare = 0.0 if leading.share == 1.0 else NOTHING
    return leading.share - one.share <= spare and leading.exact - one.exact <= NOTHING


def polish(trial: Trial, tried: Tried, draws: Callable[[int], Draws] | None = None) -> Tried:
    """Move the numbers of a recipe, one at a time, as long as more values come out equal."""
    for step in NUMBER_STEPS:
        improved = True
        while improved and tried.share < FAIR:
            before = tried
            tried = _moved_once(trial, tried, step, draws)
            improved = tried is not before
    return tried


def _moved_once(trial: Trial, tried: Tried, step: float, draws: Callable[[int], Draws] | None) -> Tried:
    """Try to move every number of a recipe by a step."""
    few = trial.screening
    on_few = few.attempt(tried.recipe, draws)
    for number in range(-1, len(tried.recipe.models)):
        for name, value in _settings(tried.recipe, number).items():
            for moved in _moved(name, value, step):
                recipe = with_setting(tried.recipe, number, name, moved)
                looked_at = _attempt_moved(few, recipe, draws)
                if looked_at is None or looked_at.share < on_few.share:
                    continue
                candidate = trial.attempt(recipe, draws)
                if candidate.share > tried.share + LEAST:
                    tried, on_few = candidate, looked_at
    return tried


def _settings(recipe: Recipe, number: int) -> Settings:
    """Return the settings of one model, or of the whole recipe (-1)."""
    return recipe.parameters if number < 0 else recipe.models[number].parameters


def _attempt_moved(trial: Trial, recipe: Recipe, draws: Callable[[int], Draws] | None) -> Tried | None:
    """Try a recipe with a moved number; None where the number is not possible, such as a density above 1."""
    try:
        return trial.attempt(recipe, draws)
    except RecipeError:
        return None


def _moved(name: str, value: Setting, step: float) -> Iterator[Setting]:
    if name not in POLISHED:
        return
    if isinstance(value, tuple):
        for number, item in enumerate(value):
            inner = item.value if isinstance(item, Conditional) else item
            for moved in _moved(name, inner, step):
                new = Conditional(moved, item.filter) if isinstance(item, Conditional) else moved  # type: ignore[arg-type]
                yield (*value[:number], new, *value[number + 1 :])
        return
    if abs(float(value)) < SMALL:
        yield from (float(f"{float(value):.{count}g}") for count in (1, 2))
    # Small numbers, such as nearswap's t, are moved by shares of themselves.
    size = step if abs(float(value)) >= SMALL else 2.0 * step * abs(float(value))
    for sign in (1.0, -1.0):
        yield round(float(value) + sign * size, 8)


def simplify(trial: Trial, tried: Tried, draws: Callable[[int], Draws] | None = None) -> Tried:
    """Replace gradients by shorter ones, and numbers by rounder ones, as long as no fewer values come out equal."""
    for moved in chain.from_iterable(_simpler(tried.recipe, number) for number in range(-1, len(tried.recipe.models))):
        candidate = _attempt_moved(trial, moved(tried.recipe), draws)
        if candidate is not None and is_as_good(candidate, tried):
            tried = candidate
    return tried


def _simpler(recipe: Recipe, number: int) -> Iterator[Callable[[Recipe], Recipe]]:
    """Yield changes of the settings of one model, or of the whole recipe (-1), the most radical last."""
    for name, value in _settings(recipe, number).items():
        for simpler in _rounder(name, value):
            yield partial(with_setting, number=number, name=name, value=simpler)


def _rounder(name: str, value: Setting) -> Iterator[Setting]:
    if name not in POLISHED or isinstance(value, bool):
        return
    if not isinstance(value, tuple):
        shorter = ".{}g" if abs(float(value)) < SMALL else ".{}f"
        shorter_ones = (float(format(float(value), shorter.format(count))) for count in (2, 1))
        yield from (number for number in shorter_ones if number != value)
        return
    if any(isinstance(item, Conditional) for item in value):
        return
    anchors = np.array([float(item) for item in value if not isinstance(item, Conditional)])
    depths = np.linspace(0.0, 1.0, len(anchors))
    for count in range(len(anchors), 0, -1):
        fewer = np.interp(np.linspace(0.0, 1.0, count), depths, anchors) if count > 1 else np.array([anchors.mean()])
        for digits in (2, 1):
            rounded = tuple(round(float(anchor), digits) for anchor in fewer)
            yield rounded if count > 1 else rounded[0]


def with_setting(recipe: Recipe, number: int, name: str, value: Setting) -> Recipe:
    """Return a recipe with a parameter changed, of a model by its number, or of the whole recipe (-1)."""
    if number < 0:
        return replace(recipe, parameters={**recipe.parameters, name: value})
    changed = replace(recipe.models[number], parameters={**recipe.models[number].parameters, name: value})
    return replace(recipe, models=(*recipe.models[:number], changed, *recipe.models[number + 1 :]))

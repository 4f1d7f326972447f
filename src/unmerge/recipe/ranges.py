"""The interval of each number of a recipe in which it makes the same bits: how exactly a merge tells its parameters.

A weight of bfloat16 has a cell of a few thousandths of itself, a density the share of one element of the largest
tensor: numbers in the cell cannot be told apart, and any of them may have been written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from unmerge.errors import RecipeError
from unmerge.merging.draws import KeptDraws
from unmerge.merging.method import Draws
from unmerge.recipe.document import ModelReference, Recipe
from unmerge.recipe.proof import Range
from unmerge.recipe.trial import POLISHED, Trial, Tried, with_setting

STEP = 2.0**-9
"""The first step outward, as a share of the number: half a cell of bfloat16."""
GROWTH, LONGEST = 4.0, 2.0
"""What steps that change nothing are multiplied by, and the share of the number at which no end is looked for."""
SHRINKAGE, SHORTEST = 8.0, 2.0**-27
"""What steps that change a bit are divided by, and the share of the number below which no end is looked for: within the
cell of float32."""
HALVINGS = 6
"""How often the interval between a step that changes nothing and one that does is halved."""
CORRECTION, CORRECTIONS, REFINEMENTS = 4.0, 5, 2
"""What a step that changes nothing in few tensors is divided by until it changes nothing in all, how often at most,
and how often what is left between two of these is halved."""
FEW, ENOUGH = 2, 4096
"""Ends are looked for in so many tensors, the smallest of at least so many elements."""


def ranges_of(
    trial: Trial,
    recipe: Recipe,
    names: Mapping[ModelReference, str],
    draws: Callable[[int], Draws] | None = None,
) -> tuple[Range, ...]:
    """Find in which intervals the numbers of a recipe, one at a time, make the same bits.

    Parameters
    ----------
    trial : Trial
        Tensors that the recipe makes, in the arithmetic that makes them.
    recipe : Recipe
        One whose random masks, if any, have a seed.
    names : mapping of ModelReference to str
        What people call its models.
    draws : callable, optional
        As `Trial.attempt` takes it.

    Returns
    -------
    tuple of Range
        Of weights, densities and the like that are single numbers: gradients and filters have none. Both ends make as
        many values of every tensor of the trial as the recipe does. Few numbers are tried in between.
    """
    kept = None if draws is None else _kept(draws)
    smallest = sorted(trial.names, key=lambda name: _size(trial, name))[:FEW]
    few, whole = (_Same.of(one, recipe, kept) for one in (trial.of(smallest), trial))
    return tuple(
        Range(
            model=None if place < 0 else names[recipe.models[place].model],
            parameter=parameter,
            value=value,
            low=_Side(few, whole, place, parameter, value, -1.0).end(),
            high=_Side(few, whole, place, parameter, value, 1.0).end(),
        )
        for place, parameter, value in _numbers(recipe)
    )


def _size(trial: Trial, name: str) -> tuple[bool, int, str]:
    """Return what sorts tensors, the ones first that are quickly made and tell something."""
    size = math.prod(trial.target[name].shape)
    return size < ENOUGH, size if size >= ENOUGH else -size, name


def _numbers(recipe: Recipe) -> Iterator[tuple[int, str, float]]:
    for place in range(-1, len(recipe.models)):
        settings = recipe.parameters if place < 0 else recipe.models[place].parameters
        for name, value in settings.items():
            if name in POLISHED and isinstance(value, int | float) and not isinstance(value, bool):
                yield place, name, float(value)


@dataclass(frozen=True, slots=True, eq=False)
class _Same:
    """Tells whether a recipe with another number makes as many values of some tensors."""

    trial: Trial
    recipe: Recipe
    draws: Callable[[int], Draws] | None
    made: Tried

    @classmethod
    def of(cls, trial: Trial, recipe: Recipe, draws: Callable[[int], Draws] | None) -> _Same:
        return cls(trial, recipe, draws, trial.attempt(recipe, draws))

    def holds(self, place: int, name: str, value: float) -> bool:
        if name == "density" and self.draws is not None and value >= 1:
            return False  # a model that is kept whole draws no mask, and all later masks are others
        try:
            tried = self.trial.attempt(with_setting(self.recipe, place, name, value), self.draws)
        except RecipeError:
            return False
        # Elements that a sort decides are not made: a trim that moves among equal ones changes bits.
        return tried.share >= self.made.share and tried.exact >= self.made.exact


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """One side of a number: below it (sign -1) or above."""

    few: _Same
    whole: _Same
    place: int
    name: str
    value: float
    sign: float

    def end(self) -> float | None:
        """Return where the range ends, None where no end was found."""
        scale = abs(self.value) or 1.0
        found = self._outward(scale)
        step = scale * LONGEST if math.isinf(found) else _short(found)
        if step and not self._same(self.whole, step):
            step = _short(self._inward(step))
        elif math.isinf(found):
            return None
        return self._at(step) if step else self.value

    def _at(self, step: float) -> float:
        return round(self.value + self.sign * step, 2 - math.floor(math.log10(step)))

    def _same(self, where: _Same, step: float) -> bool:
        return where.holds(self.place, self.name, self._at(step))

    def _outward(self, scale: float) -> float:
        """Return how far the range goes in few tensors; 0 where not far enough, infinity where no end was found."""
        inner = scale * STEP
        if self._same(self.few, inner):
            while self._same(self.few, outer := inner * GROWTH):
                inner = outer
                if inner >= scale * LONGEST:
                    return math.inf
        else:
            outer, inner = inner, inner / SHRINKAGE
            while not self._same(self.few, inner):
                outer, inner = inner, inner / SHRINKAGE
                if inner < scale * SHORTEST:
                    return 0.0
        return self._between(self.few, inner, outer, HALVINGS)

    def _inward(self, outer: float) -> float:
        """Return how far the range goes in all tensors, where a step changes some of them."""
        for _ in range(CORRECTIONS):
            inner = outer / CORRECTION
            if self._same(self.whole, inner):
                return self._between(self.whole, inner, outer, REFINEMENTS)
            outer = inner
        return 0.0

    def _between(self, where: _Same, inner: float, outer: float, halvings: int) -> float:
        for _ in range(halvings):
            middle = (inner + outer) / 2.0
            inner, outer = (middle, outer) if self._same(where, middle) else (inner, middle)
        return inner


def _short(step: float) -> float:
    """Return a step with two digits, no larger: people read ranges, and the last digits of an end say nothing."""
    if not step:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(step)) - 1)
    return math.floor(step / unit) * unit


def _kept(draws: Callable[[int], Draws]) -> Callable[[int], Draws]:
    """Return the same streams, drawn once: many numbers are passed over before a tensor's."""
    begun = cache(lambda drawn: KeptDraws(draws(drawn)))
    return lambda drawn: begun(drawn).again()

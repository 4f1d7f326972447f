"""A few tensors of a target, kept in memory, on which many recipes are tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from unmerge.checkpoint.tensor import Tensor
from unmerge.errors import RecipeError
from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.method import MergeMethod
from unmerge.recipe.document import ModelReference, Recipe
from unmerge.recipe.making import Inputs, load_inputs, make
from unmerge.recipe.plan import plan
from unmerge.recipe.replay import TensorMatch, active, common_rows, compare, same
from unmerge.recipe.sources import Model, load


@dataclass(frozen=True, slots=True, eq=False)
class Hypothesis:
    """What may have made a target.

    Attributes
    ----------
    recipe : Recipe
    models : mapping of ModelReference to Model
        What stands behind the recipe's names.
    method : MergeMethod
        The forward model.
    threads : int
        torch's threads in the merge.
    """

    recipe: Recipe
    models: Mapping[ModelReference, Model]
    method: MergeMethod
    threads: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """One probe, as a hypothesis makes it.

    Attributes
    ----------
    stored : Tensor
        The target's.
    inputs : Inputs
    found, ours : array, shape (n,)
        The target's values, and the hypothesis', on the grid of the target's type.
    kind : str
        The type that the hypothesis makes.
    """

    stored: Tensor
    inputs: Inputs
    found: Array
    ours: Array
    kind: str

    @property
    def grid(self) -> Arithmetic:
        """The target's type."""
        return Arithmetic(self.stored.dtype.name)


@dataclass(frozen=True, slots=True, eq=False)
class Probes:
    """Tensors of a target that recipes are tried on; what was read once is kept.

    Attributes
    ----------
    stored : mapping of str to Tensor
        The target's tensors.
    """

    stored: Mapping[str, Tensor]
    _kept: dict[tuple[int, str, int | None], Array] = field(default_factory=dict)

    def first(self, count: int) -> Probes:
        """Return the first of them, with what was read."""
        return Probes(dict(list(self.stored.items())[:count]), self._kept)

    def inputs(self, hypothesis: Hypothesis) -> Iterator[tuple[Tensor, Inputs]]:
        """Yield the target's tensors and what a hypothesis makes them of.

        Raises
        ------
        RecipeError
            If nothing can be made of the hypothesis.
        """
        names = {model: found.tensors.keys() for model, found in hypothesis.models.items()}
        planned = plan(hypothesis.recipe, hypothesis.method, names, self.stored.keys())
        for tensor in planned.tensors:
            stored = self.stored[tensor.name]
            dtype, rows = hypothesis.recipe.dtype, common_rows(stored)
            yield stored, load_inputs(tensor, hypothesis.models, dtype, rows, hypothesis.threads, self._read)

    def made(self, hypothesis: Hypothesis) -> Iterator[Made]:
        """Yield the probes as a hypothesis without random masks makes them.

        Raises
        ------
        RecipeError
            If nothing can be made of the hypothesis.
        """
        for stored, inputs in self.inputs(hypothesis):
            made, kind = make(hypothesis.method, inputs, hypothesis.recipe.out_dtype)
            grid = Arithmetic(stored.dtype.name)
            yield Made(stored, inputs, self.values(stored), grid.round(made).reshape(-1), kind)

    def share(self, hypothesis: Hypothesis) -> float:
        """Return the share of elements that a hypothesis makes, of those where there is something to make.

        That is where its models differ, or where it is wrong; 0 if it makes nothing. Elements that a recipe leaves open
        count as they come; `matches` looks at them.
        """
        looked_at = wrong = 0
        try:
            for made in self.made(hypothesis):
                unequal = ~same(made.ours, made.found)
                looked_at += int(np.count_nonzero(active(made.inputs) | unequal))
                wrong += int(np.count_nonzero(unequal))
        except RecipeError:
            return 0.0
        return 1.0 - wrong / max(1, looked_at)

    def matches(self, hypothesis: Hypothesis) -> list[TensorMatch]:
        """Return how the probes compare with what a hypothesis makes; empty if it makes nothing."""
        name = hypothesis.method.name
        try:
            return [compare(name, made.inputs, made.ours, made.kind, made.stored) for made in self.made(hypothesis)]
        except RecipeError:
            return []

    def values(self, stored: Tensor) -> Array:
        """Return a target's tensor, flat, on its own grid."""
        return self._read(stored, Arithmetic(stored.dtype.name), None).reshape(-1)

    def _read(self, tensor: Tensor, arithmetic: Arithmetic, rows: int | None) -> Array:
        key = (id(tensor), arithmetic.name, rows)
        if key not in self._kept:
            self._kept[key] = load(tensor, arithmetic, rows)
        return self._kept[key]


@dataclass(frozen=True, slots=True)
class Telling:
    """How much a tensor says of what is wrong.

    Attributes
    ----------
    name : str
    elements : int
    wrong : int
        Elements that the recipe does not make; where it makes all, those in which masks change something.
    """

    name: str
    elements: int
    wrong: int


def choose_probes(
    tensors: Sequence[Telling], target: Mapping[str, Tensor], count: int = 4, elements: int = 1 << 21
) -> Probes:
    """Choose the tensors to try recipes on: those that say most, of a size that is quick to make again.

    Parameters
    ----------
    tensors : sequence of Telling
    target : mapping of str to Tensor
    count : int
        How many at most.
    elements : int
        What they hold together at most, unless one alone holds more.
    """
    telling = sorted((item for item in tensors if item.wrong), key=lambda item: -item.wrong)
    small = [item for item in telling if item.elements <= elements // count]
    chosen = _spread(small, count) or sorted(telling, key=lambda item: item.elements)[:1]
    return Probes({item.name: target[item.name] for item in chosen})


def _spread(tensors: Sequence[Telling], count: int) -> list[Telling]:
    """Return tensors that say most, at most half of them of one kind of module."""
    chosen: list[Telling] = []
    for item in tensors:
        kind = item.name.split(".")[-2:]
        alike = sum(other.name.split(".")[-2:] == kind for other in chosen)
        if len(chosen) < count and alike < max(1, count // 2):
            chosen.append(item)
    return chosen

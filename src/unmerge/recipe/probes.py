"""A few tensors of a target, kept in memory, on which many recipes are tried."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from unmerge.checkpoint.tensor import Tensor
from unmerge.errors import RecipeError
from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.draws import KeptDraws, TorchDraws
from unmerge.merging.method import Draws, MergeMethod
from unmerge.recipe.document import ModelReference, Recipe
from unmerge.recipe.making import Inputs, draws_of, load_inputs, make
from unmerge.recipe.plan import PlannedTensor, plan
from unmerge.recipe.replay import TensorMatch, active, common_rows, compare, same
from unmerge.recipe.sources import Model, load

ENOUGH = 256
"""A tensor with so many wrong elements says as much as a larger one, and is made again sooner."""


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
    seed : int or None
        mergekit's ``--random-seed``; None where it is not known, so that random masks are open.
    """

    recipe: Recipe
    models: Mapping[ModelReference, Model]
    method: MergeMethod
    threads: int = 1
    seed: int | None = None

    @property
    def open_masks(self) -> bool:
        """Whether it draws masks, and which is not known: it then speaks of a distribution, not of bits."""
        return self.method.draws and self.seed is None


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
    _drawn: dict[tuple[int, int], KeptDraws] = field(default_factory=dict)

    def first(self, count: int) -> Probes:
        """Return the first of them, with what was read and drawn."""
        return Probes(dict(list(self.stored.items())[:count]), self._kept, self._drawn)

    def inputs(self, hypothesis: Hypothesis) -> Iterator[tuple[Tensor, Inputs]]:
        """Yield the target's tensors and what a hypothesis makes them of.

        Raises
        ------
        RecipeError
            If nothing can be made of the hypothesis.
        """
        for tensor in _plan(hypothesis, self.stored.keys()):
            yield self._loaded(hypothesis, tensor)

    def _loaded(self, hypothesis: Hypothesis, tensor: PlannedTensor) -> tuple[Tensor, Inputs]:
        stored = self.stored[tensor.name]
        dtype, rows = hypothesis.recipe.dtype, common_rows(stored)
        return stored, load_inputs(tensor, hypothesis.models, dtype, rows, hypothesis.threads, self._read)

    def _with_draws(self, hypothesis: Hypothesis) -> Iterator[tuple[PlannedTensor, Draws | None]]:
        """Yield the probes' tensors, and the draws that each gets where masks are random."""
        if not hypothesis.method.draws or hypothesis.seed is None:
            yield from ((tensor, None) for tensor in _plan(hypothesis, self.stored.keys()))
            return
        before = 0
        for tensor in _plan(hypothesis, None):
            if tensor.name in self.stored:
                yield tensor, self._draws(hypothesis.seed, before)
            before += draws_of(tensor, hypothesis.models)

    def _draws(self, seed: int, before: int) -> Draws:
        """Return the stream after some draws."""
        if (seed, before) not in self._drawn:
            stream = TorchDraws(seed)
            stream.skip(before)
            self._drawn[seed, before] = KeptDraws(stream)
        return self._drawn[seed, before].again()

    def made(self, hypothesis: Hypothesis) -> Iterator[Made]:
        """Yield the probes as a hypothesis makes them whose masks are not open.

        Raises
        ------
        RecipeError
            If nothing can be made of the hypothesis.
        """
        for tensor, draws in self._with_draws(hypothesis):
            stored, inputs = self._loaded(hypothesis, tensor)
            made, kind = make(hypothesis.method, inputs, hypothesis.recipe.out_dtype, draws)
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


def _plan(hypothesis: Hypothesis, only: Collection[str] | None) -> tuple[PlannedTensor, ...]:
    names = {model: found.tensors.keys() for model, found in hypothesis.models.items()}
    return plan(hypothesis.recipe, hypothesis.method, names, only).tensors


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
    """Choose the tensors to try recipes on: the smallest that say enough, then those that say most.

    Parameters
    ----------
    tensors : sequence of Telling
    target : mapping of str to Tensor
    count : int
        How many at most.
    elements : int
        What they hold together at most, unless one alone holds more.
    """
    telling = sorted((item for item in tensors if item.wrong), key=_worth)
    small = [item for item in telling if item.elements <= elements // count]
    chosen = _spread(small, count) or sorted(telling, key=lambda item: item.elements)[:1]
    return Probes({item.name: target[item.name] for item in chosen})


def _worth(item: Telling) -> tuple[int, int]:
    return (0, item.elements) if item.wrong >= ENOUGH else (1, -item.wrong)


def _spread(tensors: Sequence[Telling], count: int) -> list[Telling]:
    """Return tensors that say most, at most half of them of one kind of module."""
    chosen: list[Telling] = []
    for item in tensors:
        kind = item.name.split(".")[-2:]
        alike = sum(other.name.split(".")[-2:] == kind for other in chosen)
        if len(chosen) < count and alike < max(1, count // 2):
            chosen.append(item)
    return chosen

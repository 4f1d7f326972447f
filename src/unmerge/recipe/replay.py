"""A recipe's tensors, made again and compared with a target's, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from unmerge.alignment import has_vocabulary_rows
from unmerge.checkpoint.dtypes import DTYPES
from unmerge.checkpoint.tensor import Tensor
from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.method import Draws
from unmerge.recipe.document import ModelReference, Recipe
from unmerge.recipe.making import Inputs, load_inputs, make
from unmerge.recipe.outcomes import Bits, undecided
from unmerge.recipe.plan import Plan
from unmerge.recipe.sources import Model, load


@dataclass(frozen=True, slots=True)
class TensorMatch:
    """How a tensor that a recipe makes compares with the target's.

    Attributes
    ----------
    name : str
    elements : int
    active : int
        Elements in which the models differ, so that the recipe has something to decide, or in which it is wrong.
    telling : int
        Elements that are not equal and in which the models differ.
    equal : int
        Elements that are equal, once both are of the target's stored type.
    free : int
        Elements that the recipe does not decide: whether a change at a trim's threshold is kept depends on how the
        tool's machine sorts.
    free_equal : int
        Of these, the equal ones.
    free_explained : int
        Of these, the ones that keeping or dropping what is at the threshold explains; the equal ones among them.
    largest : float
        The largest difference, in spacings of the target's grid around the larger value.
    made, stored : str
        The type that the recipe makes, and the type that the target stores.
    """

    name: str
    elements: int
    active: int
    telling: int
    equal: int
    free: int
    free_equal: int
    free_explained: int
    largest: float
    made: str
    stored: str

    @property
    def unequal(self) -> int:
        """Elements that differ and that the recipe decides, or that no choice of the sort explains."""
        return self.elements - self.equal - (self.free_explained - self.free_equal)


def replay(
    recipe: Recipe,
    plan: Plan,
    models: Mapping[ModelReference, Model],
    target: Mapping[str, Tensor],
    draws: Draws | None = None,
    threads: int = 1,
) -> Iterator[TensorMatch]:
    """Make a recipe's tensors again, in mergekit's order, and compare each with the target's.

    At any time one tensor of every model is in memory.

    Parameters
    ----------
    recipe : Recipe
    plan : Plan
        Of the recipe.
    models : mapping of ModelReference to Model
    target : mapping of str to Tensor
        What the target stores. Tensors of the plan that it lacks are not compared.
    draws : Draws, optional
        For methods that draw random masks; all of the plan's tensors are then made, so that each gets its own.
    threads : int
        torch's threads in the merge.

    Yields
    ------
    TensorMatch
    """
    for tensor in plan.tensors:
        stored = target.get(tensor.name)
        if stored is None and draws is None:
            continue
        rows = None if stored is None else common_rows(stored)
        inputs = load_inputs(tensor, models, recipe.dtype, rows, threads)
        made, kind = make(plan.method, inputs, recipe.out_dtype, draws)
        if stored is not None:
            yield compare(plan.method.name, inputs, made, kind, stored)


def common_rows(stored: Tensor) -> int | None:
    """Return how many rows of embeddings to merge: those that the target has."""
    return stored.shape[0] if has_vocabulary_rows(stored.name) and stored.shape else None


def compare(method: str, inputs: Inputs, made: Array, kind: str, stored: Tensor) -> TensorMatch:
    """Compare one tensor.

    Parameters
    ----------
    method : str
        The merge method's name.
    inputs : Inputs
    made : array
        What the recipe makes, of storage type `kind`.
    kind : str
    stored : Tensor
        The target's, of the same shape.
    """
    grid = Arithmetic(stored.dtype.name)
    found = load(stored, grid).reshape(-1)
    ours = grid.round(made).reshape(-1)
    equal = same(ours, found)
    free, free_equal, free_explained = _free(method, inputs, grid, found, equal)
    differs = active(inputs)
    return TensorMatch(
        name=inputs.tensor.name,
        elements=found.size,
        active=int(np.count_nonzero(differs | ~equal)),
        telling=int(np.count_nonzero(differs & ~equal)),
        equal=int(np.count_nonzero(equal)),
        free=free,
        free_equal=free_equal,
        free_explained=free_explained,
        largest=_largest(ours, found, equal, stored.dtype.name),
        made=kind,
        stored=stored.dtype.name,
    )


def same(ours: Array, found: Array) -> Bits:
    """Return where values are equal; NaN equals NaN."""
    equal: Bits = (ours == found) | (np.isnan(ours) & np.isnan(found))
    return equal


def active(inputs: Inputs) -> Bits:
    """Return the elements in which the models differ, flat; all of them, where only one model goes in."""
    first, *others = (array.reshape(-1) for array in inputs.arrays.values())
    differs = np.full(first.shape, not others)
    for other in others:
        differs |= other != first
    return differs


def _free(method: str, inputs: Inputs, grid: Arithmetic, found: Array, equal: Bits) -> tuple[int, int, int]:
    """Return how many elements the recipe does not decide, how many of them are equal, and how many explained."""
    if equal.all():
        return 0, 0, 0
    open_ = undecided(method, inputs, ~equal)
    if open_ is None:
        return 0, 0, 0
    explained = np.zeros(len(open_.places), dtype=np.bool_)
    for outcome in open_.outcomes:
        explained |= same(grid.round(outcome), found[open_.places])
    free_equal = open_.count - len(open_.places)
    return open_.count, free_equal, free_equal + int(np.count_nonzero(explained))


def _largest(ours: Array, found: Array, equal: Bits, dtype: str) -> float:
    """Return the largest difference in spacings of the target's grid."""
    if equal.all():
        return 0.0
    differs = ~equal
    mine, theirs = ours[differs].astype(np.float64), found[differs].astype(np.float64)
    spacing = DTYPES[dtype].spacing(np.maximum(np.abs(mine), np.abs(theirs)))
    return float(np.max(np.abs(mine - theirs) / spacing))

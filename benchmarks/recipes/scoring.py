"""How far a recovered recipe is from the true one, and a merge made again from the merge."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from unmerge.checkpoint.dtypes import DTYPES, FloatArray
from unmerge.checkpoint.reader import Checkpoint
from unmerge.checkpoint.tensor import values
from unmerge.merging.registry import MERGEKIT
from unmerge.recipe.document import ModelReference, Recipe
from unmerge.recipe.plan import PlannedTensor, plan

Name = Callable[[ModelReference], str]
"""What a model is called, whether a recipe names its checkpoint or its adapter."""
ALWAYS_DIVIDED = {"nuslerp"}
"""Methods in which only ratios of weights matter, whatever the recipe says."""
COMPARED = ("density", "gamma", "epsilon", "t", "select_topk", "scale")
"""Numbers beside weights; a lambda is counted as a factor of the weights."""


@dataclass(frozen=True, slots=True)
class Errors:
    """How far numbers are from the true ones, at the tensor where they are farthest.

    Attributes
    ----------
    weight_cells : float or None
        Of effective weights, in spacings of bfloat16; None where the recipes do not weigh the same models.
    other : float or None
        Of other numbers; None where the methods differ, or have none.
    """

    weight_cells: float | None
    other: float | None


def errors(true: Recipe, found: Recipe, stored: Collection[str], changed: Collection[str], name: Name) -> Errors:
    """Compare two recipes by the numbers that they give each tensor.

    Parameters
    ----------
    true, found : Recipe
    stored : collection of str
        The tensors of the models.
    changed : collection of str
        Those in which models differ: of the others a merge says nothing.
    name : callable
    """
    pairs = list(_pairs(true, found, stored, changed))
    methods = (true.merge_method, found.merge_method)
    weights = [(effective(one, methods[0], name), effective(two, methods[1], name)) for one, two in pairs]
    comparable = bool(weights) and all(one and one.keys() == two.keys() for one, two in weights)
    cells = [in_cells(one[model], two[model]) for one, two in weights for model in one] if comparable else []
    other = [away for one, two in pairs for away in _apart(one, two, name)] if _same_method(true, found) else []
    return Errors(max(cells, default=None), max(other, default=None))


def _same_method(true: Recipe, found: Recipe) -> bool:
    return true.merge_method == found.merge_method


def _pairs(
    true: Recipe, found: Recipe, stored: Collection[str], changed: Collection[str]
) -> Iterator[tuple[PlannedTensor, PlannedTensor]]:
    one, two = (_planned(recipe, stored) for recipe in (true, found))
    return ((one[tensor], two[tensor]) for tensor in changed if tensor in one and tensor in two)


def _planned(recipe: Recipe, stored: Collection[str]) -> dict[str, PlannedTensor]:
    names = dict.fromkeys(recipe.references, stored)
    return {tensor.name: tensor for tensor in plan(recipe, MERGEKIT[recipe.merge_method], names).tensors}


def effective(tensor: PlannedTensor, method: str, name: Name) -> dict[str, float]:
    """Return what each model is weighed with in a tensor, empty where a method leaves nothing to choose.

    Divided by their sum where the merge is, and times lambda; a slerp's are the shares of its two ends.
    """
    if method == "slerp" and tensor.base is not None:
        other = float(tensor.shared["t"] or 0.0)
        return {name(tensor.base.model): 1.0 - other, name(tensor.models[0].model): other}
    weights = [float(weight or 0.0) for weight in tensor.of_models.get("weight", ())]
    shared = {key: tensor.shared.get(key) for key in ("normalize", "normalize_weights", "lambda")}
    divided = method in ALWAYS_DIVIDED or bool(shared["normalize"] or shared["normalize_weights"])
    factor = float(1.0 if shared["lambda"] is None else shared["lambda"]) / (sum(weights) if divided else 1.0)
    return {name(item.model): factor * weight for item, weight in zip(tensor.models, weights, strict=False)}


def in_cells(true: float, found: float) -> float:
    """Return the distance of two numbers in spacings of bfloat16 at the first."""
    return float(abs(found - true) / DTYPES["BF16"].spacing(np.array(true)))


def _apart(one: PlannedTensor, two: PlannedTensor, name: Name) -> Iterator[float]:
    first, second = _numbers(one, name), _numbers(two, name)
    return (abs(first[key] - second[key]) for key in first.keys() & second.keys())


def _numbers(tensor: PlannedTensor, name: Name) -> dict[tuple[str, str], float]:
    own = {
        (parameter, name(item.model)): value
        for parameter, listed in tensor.of_models.items()
        for item, value in zip(tensor.models, listed, strict=True)
    }
    every = {**own, **{(parameter, ""): value for parameter, value in tensor.shared.items()}}
    return {key: float(value) for key, value in every.items() if key[0] in COMPARED and value is not None}


@dataclass(frozen=True, slots=True)
class Likeness:
    """A merge made again, against the merge.

    Attributes
    ----------
    looked_at : int
        Values in which either differs from the base.
    unequal : int
        Of these, those whose bits differ.
    paper_error : float
        ``1 - max(0, cos)^2`` between the changes of all tensors.
    """

    looked_at: int
    unequal: int
    paper_error: float

    @property
    def equal(self) -> float:
        """The share of equal values."""
        return 1.0 - self.unequal / self.looked_at if self.looked_at else 1.0


def likeness(target: Checkpoint, again: Checkpoint, base: Checkpoint) -> Likeness:
    """Compare a merge made again with the merge: all tensors, and bit for bit."""
    looked_at, unequal, products = 0, 0, np.zeros(3)
    for name in sorted(target.tensors.keys() | again.tensors.keys()):
        if name not in target.tensors or name not in again.tensors:
            one = target.tensors.get(name) or again.tensors[name]
            looked_at, unequal = looked_at + int(np.prod(one.shape)), unequal + int(np.prod(one.shape))
            continue
        made, wanted, start = (values(model.tensors[name]) for model in (again, target, base))
        either = (made != start) | (wanted != start)
        different = (made != wanted) | (np.signbit(made) != np.signbit(wanted))
        if target.tensors[name].dtype.name != again.tensors[name].dtype.name:
            different = either
        looked_at, unequal = looked_at + int(either.sum()), unequal + int((either & different).sum())
        products += _products(wanted - start, made - start)
    return Likeness(looked_at, unequal, _paper_error(*products.tolist()))


def _products(one: FloatArray, two: FloatArray) -> FloatArray:
    return np.array([np.vdot(one, two), np.vdot(one, one), np.vdot(two, two)])


def _paper_error(product: float, first: float, second: float) -> float:
    if not first or not second:
        return 0.0 if first == second else 1.0
    cosine = max(0.0, product / np.sqrt(first * second))
    return float(max(0.0, 1.0 - cosine**2))


def changed_tensors(base: Checkpoint, models: Iterable[Checkpoint]) -> frozenset[str]:
    """Return the tensors in which any model differs from the base."""
    return frozenset(
        name
        for model in models
        for name, tensor in base.tensors.items()
        if not np.array_equal(values(tensor), values(model.tensors[name]))
    )


def naming(paths: Mapping[str, str]) -> Name:
    """Return what recipes' models are called, by their paths."""
    return lambda reference: paths[str(reference)]

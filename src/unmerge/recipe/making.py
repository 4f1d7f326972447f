"""One tensor of a recipe, made: what goes in is loaded and rounded, and the method's forward model is run.

mergekit rounds every input to ``dtype`` when it loads it (or to the type that all of a tensor's inputs promote to),
computes in that type, and casts the result to ``out_dtype`` when it saves it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from unmerge.checkpoint.tensor import Tensor
from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.method import Draws, Group, MergeMethod
from unmerge.recipe.document import ModelReference, storage_type
from unmerge.recipe.plan import PlannedTensor
from unmerge.recipe.sources import Model, load

Reader = Callable[[Tensor, Arithmetic, int | None], Array]
"""Reads some rows of a tensor, rounded to a working type."""
_HALVES = {"BF16", "F16"}


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What one tensor is made of, loaded.

    Attributes
    ----------
    tensor : PlannedTensor
    arithmetic : Arithmetic
        The working type.
    arrays : mapping of ModelReference to array
        Each model's tensor, on the working type's grid.
    """

    tensor: PlannedTensor
    arithmetic: Arithmetic
    arrays: Mapping[ModelReference, Array]

    def group(self, draws: Draws | None = None) -> Group:
        """Return them as a merge method takes them."""
        tensor = self.tensor
        base = None if tensor.base is None else self.arrays[tensor.base.model]
        models = tuple(self.arrays[item.model] for item in tensor.models)
        return Group(tensor.name, base, models, tensor.of_models, tensor.shared, draws)


def draws_of(tensor: PlannedTensor, models: Mapping[ModelReference, Model]) -> int:
    """Return how many random numbers a tensor takes: one for each element of each model, of which not all are kept."""
    densities = zip(tensor.models, tensor.of_models["density"], strict=True)
    masked = [item for item, density in densities if not float(density or 0.0) >= 1.0]
    return sum(math.prod(models[item.model].tensors[item.stored].shape) for item in masked)


def load_inputs(
    tensor: PlannedTensor,
    models: Mapping[ModelReference, Model],
    dtype: str | None,
    rows: int | None = None,
    threads: int = 1,
    read: Reader = load,
) -> Inputs:
    """Load what a tensor is made of.

    Parameters
    ----------
    tensor : PlannedTensor
    models : mapping of ModelReference to Model
    dtype : str or None
        The recipe's ``dtype``.
    rows : int, optional
        How many rows to load, for embeddings that were cut to the shortest vocabulary.
    threads : int
        torch's threads in the merge, which sums depend on in their last bits.
    read : callable
        Reads a tensor, as `unmerge.recipe.sources.load`.
    """
    stored = {item.model: models[item.model].tensors[item.stored] for item in tensor.inputs}
    arithmetic = Arithmetic(storage_type(dtype) or promoted(stored.values()), threads)
    return Inputs(tensor, arithmetic, {model: read(found, arithmetic, rows) for model, found in stored.items()})


def promoted(tensors: Iterable[Tensor]) -> str:
    """Return the type that torch promotes tensors to: bfloat16 and float16 meet in float32."""
    names = {tensor.dtype.name for tensor in tensors}
    if len(names) == 1:
        return names.pop()
    return "F64" if "F64" in names else "F32"


def make(method: MergeMethod, inputs: Inputs, out_dtype: str | None, draws: Draws | None = None) -> tuple[Array, str]:
    """Make one tensor.

    Returns
    -------
    array
        Its values.
    str
        The storage type that they are of.
    """
    made = method.merge(inputs.group(draws), inputs.arithmetic)
    kind = storage_type(out_dtype)
    if kind is not None:
        return Arithmetic(kind).round(made), kind
    return made, _result_type(made, inputs.arithmetic)


def _result_type(made: Array, arithmetic: Arithmetic) -> str:
    """Return the type of a result: float32 where a method's masks or factors took it off a half-precision grid."""
    if arithmetic.name in _HALVES and not np.array_equal(arithmetic.round(made), made, equal_nan=True):
        return "F32"
    return arithmetic.name

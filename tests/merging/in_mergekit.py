"""A merge by our method and by mergekit's, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tests.merging.in_torch import TensorGroup as TheirGroup
from tests.merging.in_torch import array, registry, tensor
from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.method import Group, MergeMethod

SHAPES = ((96,), (40, 72), (3, 20, 33))
"""One for each way in which a method may see a tensor: a vector, a matrix, a stack of matrices."""


def checkpoints(count: int, shape: tuple[int, ...], arithmetic: Arithmetic, away: float = 2e-3) -> list[Array]:
    """A base and models, on the grid of a type; `away` is how far the models are from it, the base is 0.02 large."""
    rng = np.random.default_rng(len(shape))
    base = 0.02 * rng.standard_normal(shape)
    return [arithmetic.round(base + scale * rng.standard_normal(shape)) for scale in (0.0, *[away] * count)]


def both(
    method: MergeMethod,
    base: Array | None,
    models: Sequence[Array],
    arithmetic: Arithmetic,
    of_models: Mapping[str, Sequence[float]] | None = None,
    **shared: float,
) -> tuple[Array, Array]:
    """Ours and mergekit's; parameters that are not told are at their defaults in both."""
    told = of_models or {}
    defaults = {parameter.name: parameter.default for parameter in method.parameters if parameter.scope == "shared"}
    columns = {name: tuple(values) for name, values in told.items()}
    group = Group("a.weight", base, tuple(models), columns, {**defaults, **shared})
    return method.merge(group, arithmetic), mergekit(method, base, models, arithmetic, told, shared)


def mergekit(
    method: MergeMethod,
    base: Array | None,
    models: Sequence[Array],
    arithmetic: Arithmetic,
    of_models: Mapping[str, Sequence[float]],
    shared: Mapping[str, float],
) -> Array:
    tensors = [tensor(values, arithmetic) for values in (*models, *([] if base is None else [base]))]
    group = TheirGroup.from_tensors(tensors, base_index=None if base is None else len(models), name="a.weight")
    parameters: dict[str, Any] = {**{name: list(values) for name, values in of_models.items()}, **shared}
    threads = torch.get_num_threads()
    torch.set_num_threads(arithmetic.threads)
    try:
        (merged,) = registry.get(method.name)([group], parameters=parameters)
    finally:
        torch.set_num_threads(threads)
    return array(merged)


def stored_alike(ours: Array, theirs: Array) -> float:
    """Share of elements that are equal once both are stored in bfloat16."""
    stored = Arithmetic("BF16")
    return float(np.mean(stored.round(ours) == stored.round(theirs)))

"""The other side of these tests: torch, and mergekit's methods called on tensors in this process."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.method import Draws, Group, MergeMethod

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorGroup

TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
HALVES_AND_SINGLE = ("BF16", "F16", "F32")


def tensor(values: Array, arithmetic: Arithmetic) -> torch.Tensor:
    """As the working type's own tensor; exact for values of its grid."""
    return torch.from_numpy(np.array(values, order="C")).to(TYPES[arithmetic.name])


def array(values: torch.Tensor) -> Array:
    return values.numpy() if values.dtype == torch.float64 else values.float().numpy()


def same_bits(ours: Array, theirs: Array) -> Array:
    """Where two arrays hold the same bits, or are both no numbers."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    as_integers = f"i{ours.dtype.itemsize}"
    bits = np.ascontiguousarray(ours).view(as_integers) == np.ascontiguousarray(theirs).view(as_integers)
    return (bits | (np.isnan(ours) & np.isnan(theirs))).reshape(ours.shape)


def checkpoints(rng: np.random.Generator, count: int, shape: tuple[int, ...], stored: str = "BF16") -> list[Array]:
    """A base and fine-tunes of it, rounded as stored: many of their changes are equal, some are none."""
    grid = Arithmetic(stored)
    base = 0.02 * rng.standard_normal(shape)
    changes = [2e-3 * rng.standard_normal(shape) * rng.uniform(0.2, 2.0) for _ in range(count)]
    return [grid.round(base)] + [grid.round(base + change) for change in changes]


def group(
    method: MergeMethod,
    tensors: Sequence[Array],
    of_models: Mapping[str, Sequence[float]],
    shared: Mapping[str, float],
    draws: Draws | None = None,
) -> Group:
    """The first tensor is the base's, where the method sets one apart; parameters that are not told are defaults."""
    base, models = (None, tensors) if method.base == "ignored" else (tensors[0], tensors[1:])
    defaults = {parameter.name: parameter.default for parameter in method.parameters if parameter.scope == "shared"}
    columns = {
        parameter.name: tuple(of_models.get(parameter.name, [parameter.default] * len(models)))
        for parameter in method.parameters
        if parameter.scope == "model"
    }
    return Group("a.weight", base, tuple(models), columns, {**defaults, **shared}, draws)


def mergekit(
    method: MergeMethod,
    tensors: Sequence[Array],
    of_models: Mapping[str, Sequence[float]],
    shared: Mapping[str, float],
    arithmetic: Arithmetic,
) -> Array:
    """The same by mergekit's method of that name, in the working type."""
    theirs = TensorGroup.from_tensors(
        [tensor(values, arithmetic) for values in tensors], base_index=None if method.base == "ignored" else 0
    )
    parameters: dict[str, Any] = {**{name: list(values) for name, values in of_models.items()}, **shared}
    (merged,) = registry.get(method.name)([theirs], parameters=parameters)
    assert merged.dtype == TYPES[arithmetic.name]
    return array(merged)

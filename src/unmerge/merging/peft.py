"""Weighted combinations of LoRA adapters, module by module: PEFT's ``add_weighted_adapter``, version 0.21.

A combination makes one module's new factors; their product is the new change, for the new adapter's scaling is 1 (its
square root of the rank where the first adapter has ``use_rslora``: PEFT copies that adapter's configuration). Modules
that an adapter does not hold are combined without it. PEFT combines one adapter alone as ``linear``, whatever it is
told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import copysign, sqrt
from typing import Literal

import numpy as np

from unmerge.errors import RecipeError
from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.draws import bernoulli
from unmerge.merging.method import Draws
from unmerge.merging.reductions import full_precision
from unmerge.merging.sorting import smallest
from unmerge.merging.summation import sum_of_models


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """One module's change in one adapter: ``scaling B A``.

    Attributes
    ----------
    A : array, shape (r, columns)
    B : array, shape (rows, r)
        Both on the working type's grid.
    scaling : float
        PEFT's: ``lora_alpha / r``, or over the square root of r with ``use_rslora``.
    """

    A: Array
    B: Array
    scaling: float


@dataclass(frozen=True, slots=True, eq=False)
class Module:
    """One module of all adapters that hold it, with what PEFT is told.

    Attributes
    ----------
    name : str
        The module's, for messages.
    adapters : tuple of Factors
        In the order of the call.
    weights : tuple of float
        Of those adapters.
    density : float or None
        The share of elements that is kept, by combinations that prune.
    majority : str
        ``"total"``: the elected sign is that of the sum; ``"frequency"``: that of most elements.
    rank : int or None
        Of the new factors, for combinations that end in ``svd``; None for the largest of the adapters' ranks.
    clamp : float or None
        Quantile of all elements of the new factors that those are cut at (``svd_clamp``).
    draws : Draws or None
        For random masks: `draws_of_new_layers` have been passed over before the first module.
    transposed : bool
        Whether the module stores its change as (columns, rows): embeddings, ``fan_in_fan_out``. Masks are drawn in
        that order by combinations that end in ``svd``.
    """

    name: str
    adapters: tuple[Factors, ...]
    weights: tuple[float, ...]
    density: float | None = None
    majority: Literal["total", "frequency"] = "total"
    rank: int | None = None
    clamp: float | None = None
    draws: Draws | None = None
    transposed: bool = False


Combination = Callable[[Module, Arithmetic], tuple[Array, Array]]
"""Makes a module's new A, shape (r, columns), and B, shape (rows, r), from factors in a working type."""
_Mix = Callable[[Module, Sequence[Array], Sequence[float], Arithmetic], Array]


def combine_cat(module: Module, arithmetic: Arithmetic) -> tuple[Array, Array]:
    """Return the factors side by side, A times weight and scaling: the product is the weighted sum of changes.

    PEFT stores them in the base's type, whatever that of the adapters.
    """
    fl = arithmetic.round
    scaled = [
        fl(fl(factors.A * arithmetic.scalar(weight)) * arithmetic.scalar(factors.scaling))
        for factors, weight in zip(module.adapters, module.weights, strict=True)
    ]
    return np.concatenate(scaled), np.concatenate([factors.B for factors in module.adapters], axis=1)


def combine_factors(module: Module, arithmetic: Arithmetic, *, mix: _Mix) -> tuple[Array, Array]:
    """Return mixed A and mixed B, each weighted by the square root of weight times scaling, A with its sign.

    The product holds every adapter's B times every other one's A, too.

    Raises
    ------
    RecipeError
        Ranks differ, or what the mix needs was not given.
    """
    _check_shapes(module)
    wholes = [weight * factors.scaling for weight, factors in zip(module.weights, module.adapters, strict=True)]
    roots = [sqrt(abs(whole)) for whole in wholes]
    signed = [copysign(root, whole) if whole else 0.0 for root, whole in zip(roots, wholes, strict=True)]
    A = mix(module, [factors.A for factors in module.adapters], signed, arithmetic)
    B = mix(module, [factors.B for factors in module.adapters], roots, arithmetic)
    return arithmetic.round(A), arithmetic.round(B)


def combine_svd(module: Module, arithmetic: Arithmetic, *, mix: _Mix) -> tuple[Array, Array]:
    """Return the truncated singular value decomposition of the mixed changes: orthonormal rows A, scaled columns B.

    Both are float32 (float64 of float64 factors), and their signs are the decomposition's own.

    Raises
    ------
    RecipeError
        What the mix needs was not given.
    """
    working = full_precision(arithmetic)
    left, values, right = np.linalg.svd(mixed_change(module, arithmetic, mix=mix), full_matrices=False)
    rank = module.rank or max(len(factors.A) for factors in module.adapters)
    A, B = right[:rank], working.round(left[:, :rank] * values[:rank])
    if module.clamp is None:
        return A, B
    limit = working.round(np.quantile(np.concatenate((B.ravel(), A.ravel())).astype(np.float64), module.clamp))
    return np.clip(A, -limit, limit), np.clip(B, -limit, limit)


def mixed_change(module: Module, arithmetic: Arithmetic, *, mix: _Mix) -> Array:
    """Return what `combine_svd` decomposes, shape (rows, columns), float32 or float64.

    Products of factors are exact sums rounded once; torch's are within some units in the last place of float32.
    """
    working = full_precision(arithmetic)
    products = [
        arithmetic.round(working.round(factors.B.astype(np.float64) @ factors.A) * working.scalar(factors.scaling))
        for factors in module.adapters
    ]
    changes = [np.ascontiguousarray(product.T) if module.transposed else product for product in products]
    mixed = mix(module, changes, module.weights, arithmetic)
    return mixed.T if module.transposed else mixed


def draws_of_new_layers(shapes: Sequence[tuple[int, int]], rank: int) -> int:
    """Return how many draws PEFT takes to make the new adapter, before the first mask is drawn.

    Parameters
    ----------
    shapes : sequence of (int, int)
        (rows, columns) of every linear module that any of the adapters targets.
    rank : int
        The new adapter's.

    Returns
    -------
    int
        Each layer's own initial values, and those of A once more; for ``init_lora_weights=True``.
    """
    return sum(rank * (2 * columns + rows) for rows, columns in shapes)


def mix_linear(module: Module, tensors: Sequence[Array], weights: Sequence[float], arithmetic: Arithmetic) -> Array:
    """Return the weighted sum; weights are float32, and so is the sum of half-precision tensors."""
    del module
    working = full_precision(arithmetic)
    return sum_of_models(_weighted(tensors, weights, working), working)


def mix_pruned(
    module: Module,
    tensors: Sequence[Array],
    weights: Sequence[float],
    arithmetic: Arithmetic,
    *,
    prune: Callable[[Module, Array, Arithmetic], Array],
) -> Array:
    """Return the weighted sum of pruned tensors."""
    return mix_linear(module, [prune(module, tensor, arithmetic) for tensor in tensors], weights, arithmetic)


def mix_elected(
    module: Module,
    tensors: Sequence[Array],
    weights: Sequence[float],
    arithmetic: Arithmetic,
    *,
    prune: Callable[[Module, Array, Arithmetic], Array],
) -> Array:
    """Return the weighted sum of pruned tensors where they have the elected sign, over how many have it (TIES).

    Signs are elected without weights, and a tie is positive.
    """
    working = full_precision(arithmetic)
    pruned = np.stack([prune(module, tensor, arithmetic) for tensor in tensors])
    votes = pruned if module.majority == "total" else np.sign(pruned)
    elected = np.where(sum_of_models(votes, arithmetic) >= 0, 1, -1)
    agreeing = np.sign(pruned) == elected
    mixed = sum_of_models(_weighted(pruned, weights, working) * agreeing, working)
    return working.round(mixed / np.maximum(agreeing.sum(axis=0), 1).astype(working.holder))


def prune_small(module: Module, tensor: Array, arithmetic: Arithmetic) -> Array:
    """Keep the largest elements; of equal ones at the threshold those that ``torch.topk`` keeps.

    Raises
    ------
    RecipeError
        No density, or a negative one.
    """
    del arithmetic
    density = _density(module)
    if density >= 1:
        return tensor
    mask = smallest(-np.abs(tensor).ravel(), int(density * tensor.size))
    return tensor * mask.reshape(tensor.shape)


def prune_at_random(module: Module, tensor: Array, arithmetic: Arithmetic) -> Array:
    """Keep elements at random, over the density (DARE). Nothing is drawn where all are kept.

    Raises
    ------
    RecipeError
        No density, a negative one or 0, or no draws.
    """
    density = _density(module)
    if density >= 1:
        return tensor
    if density == 0:
        raise RecipeError(
            f"{module.name}: a density of 0 keeps nothing at random, and divides by it: give a larger one"
        )
    if module.draws is None:
        raise RecipeError(f"{module.name}: random masks need draws, and there are none: give a seed")
    mask = bernoulli(module.draws, density, tensor.shape, arithmetic)
    return arithmetic.round(tensor * mask / arithmetic.scalar(density))


def _weighted(tensors: Iterable[Array], weights: Sequence[float], working: Arithmetic) -> Array:
    # torch holds weights in float32, also beside tensors of float64.
    return np.stack(
        [
            working.round(tensor * working.scalar(float(np.float32(weight))))
            for tensor, weight in zip(tensors, weights, strict=True)
        ]
    )


def _density(module: Module) -> float:
    if module.density is None or module.density < 0:
        raise RecipeError(f"{module.name}: this combination prunes, and its density is {module.density}: give 0 to 1")
    return module.density


def _check_shapes(module: Module) -> None:
    shapes = {(factors.A.shape, factors.B.shape) for factors in module.adapters}
    if len(shapes) > 1:
        ranks = ", ".join(str(len(factors.A)) for factors in module.adapters)
        raise RecipeError(
            f"{module.name}: adapters of ranks {ranks} cannot be added up factor by factor: use cat or svd"
        )


_MIXES: dict[str, _Mix] = {
    "linear": mix_linear,
    "magnitude_prune": partial(mix_pruned, prune=prune_small),
    "ties": partial(mix_elected, prune=prune_small),
    "dare_linear": partial(mix_pruned, prune=prune_at_random),
    "dare_ties": partial(mix_elected, prune=prune_at_random),
}
COMBINATIONS: dict[str, Combination] = {
    "cat": combine_cat,
    **{name: partial(combine_factors, mix=mix) for name, mix in _MIXES.items()},
    "svd": partial(combine_svd, mix=mix_linear),
    **{f"{name}_svd": partial(combine_svd, mix=mix) for name, mix in _MIXES.items() if name != "linear"},
}
"""By PEFT's ``combination_type``."""
CHANGES: dict[str, Callable[[Module, Arithmetic], Array]] = {
    "svd": partial(mixed_change, mix=mix_linear),
    **{f"{name}_svd": partial(mixed_change, mix=mix) for name, mix in _MIXES.items() if name != "linear"},
}
"""What combinations that end in ``svd`` decompose."""

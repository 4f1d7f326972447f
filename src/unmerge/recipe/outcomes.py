"""What elements may be that a recipe does not decide: trims with equal elements at their threshold, random masks.

The formula is the method's own (`unmerge.merging.task_arithmetic.combined`), applied to some elements and to any mask.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from unmerge.merging.arcee_fusion import scores, threshold
from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.contract import base_of
from unmerge.merging.method import Value
from unmerge.merging.sce import merge_sce, variance_ties
from unmerge.merging.sparsify import (
    magnitude_mask,
    magnitude_ties,
    mask_type,
    outlier_mask,
    outlier_ties,
    rescaling,
)
from unmerge.merging.task_arithmetic import combined, weighted
from unmerge.recipe.making import Inputs

Bits = NDArray[np.bool_]

MAX_FREE = 10
"""Beyond so many models whose masks are open there are too many outcomes to try."""
_TRIMS = {"ties", "breadcrumbs", "breadcrumbs_ties"}
_CONSENSUS = {"ties", "dare_ties", "breadcrumbs_ties", "della"}
_SAMPLED_QUANTILES = 1_000_000
_SLACK, _SAMPLED_SLACK = 2e-3, 5e-2


@dataclass(frozen=True, slots=True, eq=False)
class Masked:
    """Some elements of a merge of sparsified task vectors, whose masks are open.

    Attributes
    ----------
    base : array, shape (m,)
    deltas : array, shape (k, m)
        Task vectors, on the working type's grid.
    weights : tuple of float
    scales : array, shape (k,)
        What kept elements are multiplied by.
    arithmetic : Arithmetic
        The working type.
    random : bool
        Whether masks are drawn, and so applied in the type of the draws.
    consensus, normalize : bool
        As in `unmerge.merging.task_arithmetic.combined`.
    lambda_ : float
    """

    base: Array
    deltas: Array
    weights: tuple[float, ...]
    scales: NDArray[np.float64]
    arithmetic: Arithmetic
    random: bool
    consensus: bool
    normalize: bool
    lambda_: float

    def outcome(self, mask: Bits) -> Array:
        """Return what a mask makes of the elements.

        Parameters
        ----------
        mask : array of bool, shape (k, m), or (k, s, 1) for s masks of all elements

        Returns
        -------
        array, shape (m,) or (s, m)
        """
        working = mask_type(self.arithmetic) if self.random and self.arithmetic.name != "F64" else self.arithmetic
        deltas = self.deltas if mask.ndim == 2 else self.deltas[:, np.newaxis, :]
        kept = deltas * mask
        scaled = [
            self.arithmetic.round(working.round(delta * working.scalar(scale))) if scale != 1.0 else delta
            for delta, scale in zip(kept, self.scales.tolist(), strict=True)
        ]
        return combined(
            np.broadcast_to(self.base, kept.shape[1:]),
            weighted(scaled, self.weights, self.arithmetic),
            self.weights,
            self.arithmetic,
            consensus=self.consensus,
            normalize=self.normalize,
            lambda_=self.lambda_,
        )


def masked_elements(
    method: str, inputs: Inputs, places: NDArray[np.int64], deltas: Array, scales: NDArray[np.float64]
) -> Masked:
    """Return some elements of a tensor with their masks open.

    Parameters
    ----------
    method : str
        Of task arithmetic's descendants.
    inputs : Inputs
    places : array of int, shape (m,)
        Positions in the flat tensor.
    deltas : array, shape (k, n)
        All changes of the tensor, flat.
    scales : array, shape (k,)
    """
    group = inputs.group()
    shared = group.shared
    return Masked(
        base=base_of(group, method).reshape(-1)[places],
        deltas=deltas[:, places],
        weights=tuple(as_number(value) for value in group.of_models["weight"]),
        scales=scales,
        arithmetic=inputs.arithmetic,
        random=method not in _TRIMS,
        consensus=method in _CONSENSUS,
        normalize=bool(shared["normalize"]),
        lambda_=as_number(shared["lambda"]),
    )


def as_number(value: Value | None) -> float:
    """Return a parameter's value as a number; one that is absent counts as 0."""
    return 0.0 if value is None else float(value)


def flat_deltas(inputs: Inputs) -> Array:
    """Return every model's change of a tensor, on the working type's grid; shape (k, n)."""
    group = inputs.group()
    base = base_of(group, "a merge of task vectors").reshape(-1)
    return np.stack([inputs.arithmetic.round(model.reshape(-1) - base) for model in group.models])


def all_masks(count: int) -> Bits:
    """Return the 2^count masks of `count` models, shape (count, 2^count)."""
    return np.array(list(product((False, True), repeat=count)), dtype=np.bool_).T


@dataclass(frozen=True, slots=True, eq=False)
class Undecided:
    """Elements of a tensor that a recipe does not decide, and what they may be.

    Attributes
    ----------
    count : int
        How many there are.
    places : array of int, shape (m,)
        Positions in the flat tensor of those that were asked for.
    outcomes : tuple of array, each of shape (m,)
        Their values before they are cast to be stored.
    """

    count: int
    places: NDArray[np.int64]
    outcomes: tuple[Array, ...]


def undecided(method: str, inputs: Inputs, wanted: Bits | None = None) -> Undecided | None:
    """Return the elements that a deterministic method leaves to the machine's sort, None where there are none.

    Parameters
    ----------
    method : str
    inputs : Inputs
    wanted : array of bool, shape (n,), optional
        The elements of the flat tensor whose outcomes are asked for; all by default.
    """
    if method in _TRIMS:
        return _of_trims(method, inputs, wanted)
    if method == "sce":
        return _of_sce(inputs, wanted)
    return _of_fusion(inputs, wanted) if method == "arcee_fusion" else None


def _asked_for(free: Bits, wanted: Bits | None) -> NDArray[np.int64]:
    return np.flatnonzero(free if wanted is None else free & wanted)


def _of_trims(method: str, inputs: Inputs, wanted: Bits | None) -> Undecided | None:
    """Every model's elements at a threshold may be kept or dropped."""
    deltas = flat_deltas(inputs)
    told = _told(inputs)
    ties = np.stack([_ties(delta, **own) for delta, own in zip(deltas, told, strict=True)])
    free_at_all: Bits = np.any(ties, axis=0)
    places, count = _asked_for(free_at_all, wanted), int(np.count_nonzero(free_at_all))
    if not count or len(deltas) > MAX_FREE:
        return None
    if not len(places):
        return Undecided(count, places, ())
    masks = np.stack([_mask(delta, **own) for delta, own in zip(deltas, told, strict=True)])
    scales = np.ones(len(deltas))
    if inputs.tensor.shared["rescale"]:
        found = [rescaling(delta, delta * mask, inputs.arithmetic) for delta, mask in zip(deltas, masks, strict=True)]
        scales = np.array([1.0 if scale is None else float(scale) for scale in found])
    open_ = masked_elements(method, inputs, places, deltas, scales)
    own, free = masks[:, places], ties[:, places]
    outcomes = (open_.outcome(np.where(free, mask[:, np.newaxis], own)) for mask in all_masks(len(deltas)).T)
    return Undecided(count, places, tuple(outcomes))


def _told(inputs: Inputs) -> list[dict[str, float]]:
    of_models = inputs.tensor.of_models
    names = [name for name in ("density", "gamma") if name in of_models]
    return [
        dict(zip(names, map(as_number, values), strict=True))
        for values in zip(*(of_models[name] for name in names), strict=True)
    ]


def _ties(delta: Array, density: float, gamma: float | None = None) -> Bits:
    found: Bits = magnitude_ties(delta, density) if gamma is None else outlier_ties(delta, density, gamma)
    return found


def _mask(delta: Array, density: float, gamma: float | None = None) -> Bits:
    found: Bits = magnitude_mask(delta, density) if gamma is None else outlier_mask(delta, density, gamma)
    return found


def _of_sce(inputs: Inputs, wanted: Bits | None) -> Undecided | None:
    """Take an element at the threshold for the base's, or for what all models make of it."""
    share = as_number(inputs.tensor.shared["select_topk"])
    group = inputs.group()
    if share >= 1.0 or not group.models or group.base is None:
        return None
    deltas = np.stack([inputs.arithmetic.round(model - group.base) for model in group.models])
    free = variance_ties(deltas, share, inputs.arithmetic).reshape(-1)
    places, count = _asked_for(free, wanted), int(np.count_nonzero(free))
    if not count:
        return None
    if not len(places):
        return Undecided(count, places, ())
    # Exact where models weigh the same, as they nearly always do; else weights hang on the whole selection.
    whole = merge_sce(replace(group, shared={**group.shared, "select_topk": 1.0}), inputs.arithmetic)
    return Undecided(count, places, (group.base.reshape(-1)[places], whole.reshape(-1)[places]))


def _of_fusion(inputs: Inputs, wanted: Bits | None) -> Undecided | None:
    """Take an element whose score is near the threshold for the base's or the model's.

    Scores are small differences of large terms, and of large tensors mergekit takes quantiles of a random sample.
    """
    group = inputs.group()
    if group.base is None or len(group.models) != 1:
        return None
    importance = scores(group.base, group.models[0], inputs.arithmetic)
    limit = threshold(importance, inputs.arithmetic)
    slack = _SLACK if importance.size <= _SAMPLED_QUANTILES else _SAMPLED_SLACK
    free = (np.abs(importance - limit) <= slack * abs(limit)).reshape(-1)
    places, count = _asked_for(free, wanted), int(np.count_nonzero(free))
    base, model = group.base.reshape(-1)[places], group.models[0].reshape(-1)[places]
    return Undecided(count, places, (base, base + inputs.arithmetic.round(model - base))) if count else None

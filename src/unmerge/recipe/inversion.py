"""How far a merge is from the model that its recovered recipe makes: the paper's reconstruction error, inverted.

The recipe is run again by the forward models, so a proven one leaves nothing. Without the seed of random masks each
element is taken for what the nearest masks make of it: such masks are read off the target, and come near to anything
a little; what they leave of a decoy (`unmerge.recipe.proof.Decoded`) says how near.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unmerge.alignment import layer_count
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.checkpoint.reader import Checkpoint, open_checkpoint
from unmerge.checkpoint.source import resolve
from unmerge.checkpoint.tensor import Tensor
from unmerge.errors import RecipeError
from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.contract import base_of
from unmerge.merging.draws import TorchDraws
from unmerge.recipe.comparison import Layout, lay_out
from unmerge.recipe.document import parse_recipe, storage_type
from unmerge.recipe.making import Inputs, load_inputs, make
from unmerge.recipe.outcomes import MAX_FREE, Bits, Masked, all_masks, flat_deltas, masked_elements
from unmerge.recipe.probes import Hypothesis
from unmerge.recipe.proof import Recovery
from unmerge.recipe.replay import common_rows
from unmerge.recipe.sources import load, open_model
from unmerge.recipe.trial import CONVENTIONS, CURRENT

# What a recipe multiplies kept changes by is worked out in one place.
from unmerge.recipe.unseeded import Explanation, _nominal, _probabilities, explain

_BLOCK = 1 << 18


@dataclass(slots=True)
class _Sums:
    """Energies of the target's change and of the inverted model's, and their product; in squared weight units."""

    target: float = 0.0
    made: float = 0.0
    product: float = 0.0

    def add(self, found: Array, ours: Array | None, base: Array) -> None:
        """Add one tensor; `ours` is None where the inverted model has nothing to say."""
        for start in range(0, found.size, _BLOCK):
            part = slice(start, start + _BLOCK)
            origin = base[part].astype(np.float64)
            change = found[part] - origin
            self.target += float((change**2).sum())
            if ours is not None:
                own = ours[part] - origin
                self.made += float((own**2).sum())
                self.product += float((change * own).sum())

    @property
    def error(self) -> float:
        """1 - max(0, cos)^2; 1 if either change is zero, as in `unmerge.metrics`."""
        if self.product <= 0.0:
            return 1.0
        return max(0.0, 1.0 - self.product**2 / (self.target * self.made))


def inversion_error(recovery: Recovery) -> float:
    """Return the paper's reconstruction error between a target and the model that its recovered recipe makes.

    1 - max(0, cos(v, u))^2 (Equation 6), where v and u are the task vectors of the target and of the inverted model,
    over all elements that target and base share. Those that no member changes count too: in a merge with something
    unknown inside, they are not as the recipe makes them.

    Parameters
    ----------
    recovery : Recovery
        Names target, base and recipe; their files are read a tensor at a time. If masks are random and no seed was
        found, they are decoded. Without a recipe, or with one that changes nothing, the error is 1.

    Returns
    -------
    float
        In [0, 1]; 0 is perfect.

    Raises
    ------
    RecipeError
        If the target is not built like the base (so it has no task vector), the recipe is not one of a merge method,
        or too many models have random masks and no seed.
    UnmergeError
        If a model cannot be found or read.
    """
    goal = open_checkpoint(resolve(recovery.target).path)
    base = open_checkpoint(resolve(recovery.base).path)
    if layer_count(goal.tensors.keys()) != layer_count(base.tensors.keys()):
        raise RecipeError(f"{recovery.target} has other layers than {recovery.base}: it has no task vector to compare")
    shared = {name: stored for name, stored in goal.tensors.items() if _is_shared(stored, base)}
    sums, seen = _Sums(), set()
    for name, ours in _made(recovery, goal):
        if name in shared:
            sums.add(_values(shared[name]), ours, _base_values(base, shared[name]))
            seen.add(name)
    for name in sorted(shared.keys() - seen):
        sums.add(_values(shared[name]), None, _base_values(base, shared[name]))
    return sums.error


def _is_shared(stored: Tensor, base: Checkpoint) -> bool:
    own = base.tensors.get(stored.name)
    if own is None or len(own.shape) != len(stored.shape):
        return False
    rows = common_rows(stored)
    return own.shape == stored.shape or (
        rows is not None and rows <= own.shape[0] and own.shape[1:] == stored.shape[1:]
    )


def _values(stored: Tensor) -> Array:
    return load(stored, Arithmetic(stored.dtype.name)).reshape(-1)


def _base_values(base: Checkpoint, stored: Tensor) -> Array:
    own = base.tensors[stored.name]
    return load(own, Arithmetic(own.dtype.name), common_rows(stored)).reshape(-1)


def _made(recovery: Recovery, goal: Checkpoint) -> Iterator[tuple[str, Array]]:
    """Yield what the recipe makes of the target's tensors, flat, on the grid of the target's type."""
    if recovery.recipe is None:
        return
    recipe = parse_recipe(recovery.recipe, "the recovered recipe")
    method = CONVENTIONS[recovery.tool or CURRENT].get(recipe.merge_method)
    if method is None:
        raise RecipeError(f"a {recipe.merge_method} merge cannot be made again: expected one of mergekit's methods")
    models = {reference: open_model(reference, Path()) for reference in recipe.references}
    hypothesis = Hypothesis(recipe, models, method, recovery.threads or 1)
    layout = lay_out(hypothesis, goal)
    if method.draws and recovery.seed is None:
        yield from _decoded(hypothesis, layout)
    else:
        yield from _replayed(hypothesis, layout, recovery.seed)


def _replayed(hypothesis: Hypothesis, layout: Layout, seed: int | None) -> Iterator[tuple[str, Array]]:
    draws = None if seed is None else TorchDraws(seed)
    for tensor in layout.plan.tensors:
        stored = layout.stored.get(tensor.name)
        if stored is None and draws is None:
            continue
        rows = None if stored is None else common_rows(stored)
        inputs = load_inputs(tensor, hypothesis.models, hypothesis.recipe.dtype, rows, hypothesis.threads)
        made, _ = make(hypothesis.method, inputs, hypothesis.recipe.out_dtype, draws)
        if stored is not None:
            yield tensor.name, Arithmetic(stored.dtype.name).round(made).reshape(-1)


def _decoded(hypothesis: Hypothesis, layout: Layout) -> Iterator[tuple[str, Array]]:
    for tensor in layout.plan.tensors:
        stored = layout.stored.get(tensor.name)
        if stored is None:
            continue
        inputs = load_inputs(tensor, hypothesis.models, hypothesis.recipe.dtype, common_rows(stored))
        yield tensor.name, _nearest(hypothesis.method.name, inputs, hypothesis.recipe.out_dtype, stored)


def _nearest(method: str, inputs: Inputs, out_dtype: str | None, stored: Tensor) -> Array:
    """Return, for every element of a tensor, the outcome of some masks that is nearest to the target's value."""
    found = _values(stored)
    explanation = explain(method, inputs, out_dtype, stored, found)
    if explanation is None:
        message = f"{len(inputs.tensor.models)} models with random masks and no seed: expected 1 to {MAX_FREE}"
        raise RecipeError(message)
    deltas = flat_deltas(inputs)
    masks = _possible(explanation)
    scales = _scales(method, inputs, deltas, explanation)
    out, grid = Arithmetic(storage_type(out_dtype) or inputs.arithmetic.name), Arithmetic(stored.dtype.name)
    made = grid.round(out.round(base_of(inputs.group(), method).reshape(-1)))
    changed = np.flatnonzero(deltas.any(axis=0))
    for start in range(0, len(changed), _BLOCK):
        places = changed[start : start + _BLOCK]
        open_ = masked_elements(method, inputs, places, deltas, scales)
        made[places] = _nearest_of(open_, masks, out, grid, found[places])
    return made


def _nearest_of(open_: Masked, masks: Bits, out: Arithmetic, grid: Arithmetic, found: Array) -> Array:
    best = np.full(found.shape, np.inf)
    chosen = np.empty_like(found)
    for mask in masks:
        outcome = grid.round(out.round(open_.outcome(mask)))
        away = np.abs(outcome - found.astype(np.float64))
        closer = away < best
        best[closer] = away[closer]
        chosen[closer] = outcome[closer]
    return chosen


def _possible(explanation: Explanation) -> Bits:
    """Return the masks of models that are neither always nor never kept, shape (masks, k, 1)."""
    certain, never = explanation.claimed >= 1.0, explanation.claimed <= 0.0
    every = all_masks(len(certain)).T
    possible = every[~(certain & ~every).any(axis=1) & ~(never & every).any(axis=1)]
    return np.asarray(possible[:, :, np.newaxis])


def _scales(method: str, inputs: Inputs, deltas: Array, explanation: Explanation) -> NDArray[np.float64]:
    """Return what kept changes are multiplied by, as the target shows it."""
    nominal: FloatArray = _nominal(inputs, deltas, _probabilities(method, inputs, deltas))
    return np.asarray(np.where(np.isfinite(explanation.ratios), explanation.ratios * nominal, nominal))

"""The seed of a merge's random masks, found from masks that were read off one of its tensors.

mergekit draws one number for each element of each model, in the order in which it makes the tensors, so the place of
an element in the stream of numbers is known, but for the order of the models in the recipe: each place is tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unmerge.checkpoint.dtypes import DTYPES, FloatArray
from unmerge.checkpoint.tensor import values
from unmerge.merging.arithmetic import Array
from unmerge.merging.draws import TorchDraws
from unmerge.merging.sparsify import della_probabilities, mask_type
from unmerge.recipe.document import Recipe, storage_type
from unmerge.recipe.making import Inputs
from unmerge.recipe.masks import Masking, decode, unique
from unmerge.recipe.sample import SHARP, Sample
from unmerge.recipe.seed_search import MOST_BY_CHANCE, by_chance, search
from unmerge.recipe.trial import Trial

OBSERVED = 192
"""Elements whose masks are compared with the generator: far more than the 32 bits of a seed, for some may be wrong."""
FEWEST = 48
"""With fewer, a seed could be found by chance."""
CLEAN = 0.02
"""The share of observations that may contradict a seed at first: most masks are read without an error."""
WRONG = 0.05
"""The share that may, where no seed agrees with so few: wrongly decoded ones, and a density that is slightly off."""
AGREES = 0.9
"""The share of a model's observations that its place in the order of the recipe must agree with."""
HUMAN = 1 << 20
"""Seeds that people type are smaller."""


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What was read of a model's mask in one tensor.

    Attributes
    ----------
    elements : array of int
        Positions in the flattened tensor.
    kept : array of bool
    thresholds : array of int
        An element is kept if its draw, of 24 bits, is below.
    """

    elements: NDArray[np.int64]
    kept: NDArray[np.bool_]
    thresholds: NDArray[np.uint32]


@dataclass(frozen=True, slots=True, eq=False)
class FoundSeed:
    """A seed, and the recipe with its models in the order in which masks were drawn."""

    seed: int
    recipe: Recipe
    tested: int
    expected_by_chance: float


def find_seed(
    trial: Trial,
    recipe: Recipe,
    masking: Masking,
    *,
    first: int = 0,
    count: int = HUMAN,
    state: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FoundSeed | None:
    """Search the seed of a recipe's masks.

    Parameters
    ----------
    trial : Trial
        Its tensors may be decoded; the first of them is.
    recipe : Recipe
        With weights and densities; its models may be in any order.
    masking : Masking
        What the masks were decoded as.
    first, count : int
        The seeds to test.
    state : Path, optional
        A file that keeps what was searched, so that a search that was stopped goes on.
    progress : callable, optional
        Told how many seeds were tested, for each place in the order of the models anew.

    Returns
    -------
    FoundSeed or None
        None where no seed agrees, or too little of the masks can be read.
    """
    for planned, drawn in trial.planned(recipe):
        inputs = trial.inputs(planned, recipe)
        target = values(trial.target[planned.name]).reshape(trial.target[planned.name].shape)
        seen = _observe(inputs, target, recipe, masking)
        clearest = max(range(len(seen)), key=lambda model: len(seen[model].elements))
        few = _few(seen[clearest])
        if len(few.elements) < FEWEST or by_chance(few.thresholds, few.kept, count, WRONG) > MOST_BY_CHANCE:
            continue
        return _search(seen, clearest, drawn, inputs, recipe, (first, count, state, progress))
    return None


def _search(
    seen: list[Seen],
    clearest: int,
    drawn: int,
    inputs: Inputs,
    recipe: Recipe,
    how: tuple[int, int, Path | None, Callable[[int, int], None] | None],
) -> FoundSeed | None:
    first, count, state, progress = how
    size = next(iter(inputs.arrays.values())).size
    one = _few(seen[clearest])
    for tolerated, place in product((CLEAN, WRONG), range(len(seen))):
        found = search(
            drawn + place * size + one.elements,
            one.thresholds,
            one.kept,
            first=first,
            count=count,
            tolerated=tolerated,
            state=None if state is None else state.with_name(f"{state.name}.{place}.{tolerated:g}"),
            progress=progress,
        )
        for seed in found.seeds:
            order = _order(seen, seed, drawn, size)
            if order is not None:
                models = tuple(recipe.models[number] for number in order)
                return FoundSeed(seed, replace(recipe, models=models), found.tested, found.expected_by_chance)
    return None


def _few(seen: Seen) -> Seen:
    """Choose as many kept elements as dropped ones: the rarer kind says more about the generator."""
    half = OBSERVED // 2
    kinds = (np.flatnonzero(seen.kept), np.flatnonzero(~seen.kept))
    chosen = np.sort(np.concatenate([kind[:: max(1, len(kind) // half)][:half] for kind in kinds]))
    return Seen(seen.elements[chosen], seen.kept[chosen], seen.thresholds[chosen])


def _order(seen: list[Seen], seed: int, drawn: int, size: int) -> list[int] | None:
    """Return the order of models under which a seed gives the masks that were read; None where there is none."""
    draws = TorchDraws(seed)
    draws.skip(drawn)
    streams = [draws.take(size) for _ in seen]
    agreement = np.array([[_agreement(one, stream) for stream in streams] for one in seen])
    order = [int(agreement[:, place].argmax()) for place in range(len(seen))]
    good = all(agreement[model, place] >= AGREES for place, model in enumerate(order))
    return order if good and len(set(order)) == len(order) else None


def _agreement(seen: Seen, stream: Array) -> float:
    if not len(seen.elements):
        return 0.0
    return float(np.mean((stream[seen.elements] < seen.thresholds) == seen.kept))


def _observe(inputs: Inputs, target: Array, recipe: Recipe, masking: Masking) -> list[Seen]:
    """Decode the masks of one tensor, model by model."""
    tensor = inputs.tensor
    base = inputs.arrays[tensor.base.model] if tensor.base else np.zeros(1)
    deltas = [inputs.arithmetic.round(inputs.arrays[item.model] - base) for item in tensor.models]
    sample, positions = _sharp(np.stack(deltas).astype(np.float64), base, target, _grid(inputs, recipe))
    if not len(positions):
        nothing = np.zeros(0, dtype=np.int64)
        return [Seen(nothing, nothing.astype(np.bool_), nothing.astype(np.uint32)) for _ in deltas]
    weights = np.array([float(weight or 0.0) for weight in tensor.of_models["weight"]])
    decoding = decode(sample, weights, masking)
    return [
        _seen(unique(sample, decoding, model), positions, _thresholds(model, delta, inputs))
        for model, delta in enumerate(deltas)
    ]


def _seen(
    found: tuple[NDArray[np.int64], NDArray[np.bool_]], positions: NDArray[np.int64], thresholds: NDArray[np.uint32]
) -> Seen:
    elements = positions[found[0]]
    # Of a density of 1 nothing is drawn.
    drawn = (thresholds[elements] > 0) & (thresholds[elements] < 1 << 24)
    return Seen(elements[drawn], found[1][drawn], thresholds[elements][drawn])


def _grid(inputs: Inputs, recipe: Recipe) -> str:
    return storage_type(recipe.out_dtype) or inputs.arithmetic.name


def _sharp(deltas: FloatArray, base: Array, target: Array, grid: str) -> tuple[Sample, NDArray[np.int64]]:
    flat = deltas.reshape(len(deltas), -1)
    half_cell = 0.5 * DTYPES[grid].spacing(target.astype(np.float64)).ravel()
    sharp = np.flatnonzero(half_cell < SHARP * np.abs(flat).max(axis=0))
    nothing = np.zeros((len(deltas), len(sharp)))
    change = (target.astype(np.float64) - base).ravel()[sharp]
    numbers = np.zeros(len(sharp), dtype=np.int64)
    unused = nothing[:, :0]
    sample = Sample(change, flat[:, sharp], nothing, nothing, nothing[0], half_cell[sharp], numbers, ("",), unused)
    return sample, sharp


def _thresholds(model: int, delta: Array, inputs: Inputs) -> NDArray[np.uint32]:
    """Return below which draw each element is kept, as mergekit's methods have it."""
    told = {name: values[model] for name, values in inputs.tensor.of_models.items()}
    density = float(told["density"] or 0.0)
    if "epsilon" in told:
        chances = della_probabilities(delta, density, float(told["epsilon"] or 0.0), inputs.arithmetic)
    else:
        chances = np.full(delta.shape, mask_type(inputs.arithmetic).round(density))
    return np.ceil(np.ldexp(chances.ravel(), 24)).astype(np.uint32)

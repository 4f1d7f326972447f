"""From sharp elements to recipes that make the target: families with few free choices first.

A family that leaves much free (random masks) explains anything a little, so it is asked last, when what decides for
itself did not make the target's bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from unmerge.checkpoint.dtypes import FloatArray
from unmerge.recipe.candidates import (
    Members,
    arc_candidates,
    dense_candidates,
    masked_candidates,
    parameterless_candidates,
    reordered,
    trimmed_candidates,
    usual_candidates,
    with_lambdas,
)
from unmerge.recipe.depth import FINE_LEVELS, FLOORS, Part, PartFit, Parts, fit_parts
from unmerge.recipe.document import Recipe
from unmerge.recipe.masks import MASKINGS, MAX_MODELS, Decoding, Masking, decode, kept_shares
from unmerge.recipe.sample import Sample
from unmerge.recipe.structures import STRUCTURES, Parameters, Structure, fit, fit_dense, refine
from unmerge.recipe.trial import FAIR, OLDER, Trial, Tried, polish

Types = Sequence[tuple[str | None, str | None]]
"""Pairs of working and storage types that recipes may name, by torch's names."""
CERTAIN = 0.99
"""A recipe that makes this share of the values ends the search for another family."""
NEARLY = 0.8
"""Below it, a recipe is not only written in another way."""
PROMISING = 0.7
"""Below it, polishing is not worth while."""
REWRITTEN, ALIKE, POLISHED = 6, 2, 2
"""How many recipes of a family are written in other ways, how many of one method, and how many are polished."""
RIVAL = 0.03
"""By how much less than the best a recipe may make for that."""
WEIGHED, NOISE = 0.05, 30.0
"""Where weights of whole changes leave more than this share of the energy and so many floors, nothing is weighed."""
LOOK, GLANCE = 12000, 4500
"""Elements that random masks are decoded in, and elements by which trims are compared and first fitted."""
REFINED = 24000
"""Elements that the trim which is chosen is fitted to."""
PARTS_LOOKED_AT = 6
"""Tensors by which families are compared where parameters may change from one to the next."""
ROUGHLY = 150
"""Evaluations by which trims are compared."""
COUNTED = 40000
"""Elements in which it is counted how many were kept."""
ROLLED = 101
"""By how many elements decoys are moved."""
EXACT = 0.003
"""A decoding that leaves this share of the energy holds for the whole model."""
TRIMMED = 0.1
"""A structure that leaves more than this share of the energy explains nothing."""
FEWER = 2.0
"""How many times smaller the error must be for a structure with one parameter more."""
KEPT = 0.98
"""Where more than this share of every change was kept, nothing was masked."""
DECODED = 0.02
"""A decoding that leaves more than this share of the energy explains nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class Masked:
    """A family with random masks that explains the target.

    Attributes
    ----------
    masking : Masking
    parts : Parts
        Weights with the rescaling taken out, densities, and epsilons (as gammas).
    recipes : tuple of Recipe
        Written from it.
    """

    masking: Masking
    parts: Parts
    recipes: tuple[Recipe, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Identified:
    """What a target may have been made by.

    Attributes
    ----------
    tried : tuple of Tried
        Recipes without random masks, the best first.
    masked : Masked or None
        Set where none of them makes the target, and random masks explain it.
    """

    tried: tuple[Tried, ...]
    masked: Masked | None = None


def identify(sample: Sample, trial: Trial, members: Members, types: Types, depth: int) -> Identified:
    """Find recipes.

    Parameters
    ----------
    sample : Sample
        Sharp elements; its models are the members', in their order.
    trial : Trial
        Tensors to try recipes on.
    members : Members
    types : sequence of (dtype, out_dtype)
        Pairs of working and storage types that recipes may name.
    depth : int
        How many layers the model has.
    """
    tried: list[Tried] = []
    families = (family(sample, trial, members, types, depth) for family in (_weighed, _trimmed))
    for enough, found in chain.from_iterable(families):
        tried = sorted([*tried, *found], key=lambda one: -one.rank)
        if tried[0].exact >= enough:
            return Identified(tuple(tried))
    if tried and tried[0].share >= CERTAIN:
        return Identified(tuple(tried))  # the machine that merged sorts otherwise than this one
    return Identified(tuple(tried), _masked(sample, fit_dense(sample).parameters.weights, members, depth))


Attempts = Iterator[tuple[float, list[Tried]]]
"""What was tried, and what share of the values ends the search."""


def _weighed(sample: Sample, trial: Trial, members: Members, types: Types, depth: int) -> Attempts:
    """Try recipes in which whole changes are weighed, the commonest first, and those that leave nothing to choose."""
    levels = list(fit_parts(sample, _dense_part, depth, levels=FINE_LEVELS))
    for parts in levels:
        # Only what makes every value needs no other to be compared with.
        yield 1.0, trial.best(_typed(usual_candidates(parts, members), types))
    few = chain(parameterless_candidates(sample, members), arc_candidates(sample, members))
    yield 1.0, _attempt(trial, few, types)
    for parts in levels if levels[-1].error <= WEIGHED + NOISE * sample.floor else ():
        yield CERTAIN, _attempt(trial, dense_candidates(parts, members), types)
        yield CERTAIN, _by_older_version(trial, dense_candidates(parts, members), types)
    yield CERTAIN, []


def _trimmed(sample: Sample, trial: Trial, members: Members, types: Types, depth: int) -> Attempts:
    """Try recipes in which changes are trimmed."""
    start = fit_dense(sample).parameters.weights
    for structure in _likely(sample, start):
        for parts in fit_parts(sample, _trimmed_part(structure, start), depth, whole_first=True):
            yield CERTAIN, _attempt(trial, trimmed_candidates(parts, structure, members), types)


def _by_older_version(trial: Trial, recipes: Iterable[Recipe], types: Types) -> list[Tried]:
    """Try linear merges as mergekit made them before 0.1.5, with weights that do not quite sum to 1."""
    return _attempt(replace(trial, convention=OLDER), (one for one in recipes if one.merge_method == "linear"), types)


def _typed(recipes: Iterable[Recipe], types: Types) -> Iterator[Recipe]:
    return (replace(recipe, dtype=dtype, out_dtype=out) for recipe in recipes for dtype, out in types)


def _attempt(trial: Trial, recipes: Iterable[Recipe], types: Types) -> list[Tried]:
    tried = trial.best(_typed(recipes, types))
    if not tried or tried[0].exact == 1.0:
        return tried
    near = _rivals(tried)
    head = [_rewritten(trial, one) if one.share >= NEARLY else one for one in near]
    head.sort(key=lambda one: -one.rank)
    if head[0].share < FAIR:
        head = [polish(trial, one) if one.share >= PROMISING else one for one in head[:POLISHED]] + head[POLISHED:]
    taken = {id(one) for one in near}
    rest = [one for one in tried if id(one) not in taken]
    return sorted([*head, *rest], key=lambda one: -one.rank)


def _rivals(tried: Sequence[Tried]) -> list[Tried]:
    """Return the best recipes, of no method more than `ALIKE`: another order of models may be what is wrong."""
    near: list[Tried] = []
    for one in tried:
        of_method = sum(other.recipe.merge_method == one.recipe.merge_method for other in near)
        if one.share >= tried[0].share - RIVAL and of_method < ALIKE:
            near.append(one)
    return near[:REWRITTEN]


def _rewritten(trial: Trial, tried: Tried) -> Tried:
    """Look for the same weights written otherwise: as products with a lambda, or in another order."""
    if tried.share < FAIR:
        tried = max([tried, *trial.best(with_lambdas(tried.recipe))], key=lambda one: one.rank)
    if tried.share < 1.0:
        tried = max([tried, *trial.best(reordered(tried.recipe))], key=lambda one: one.rank)
    return tried


def _dense_part(part: Sample) -> tuple[Parameters, float]:
    found = fit_dense(part)
    return found.parameters, found.error


def _likely(sample: Sample, start: FloatArray) -> list[Structure]:
    """Return the two structures that explain a look at the sample best, if they do."""
    few = _look(sample, GLANCE)[::2]
    errors = {
        structure: sum(fit(one, structure, start, evaluations=ROUGHLY).error * one.energy for one in few)
        for structure in STRUCTURES
    }
    # Outliers hold much of the energy: where dropping them leaves hardly less, none were dropped.
    ordered = sorted(STRUCTURES, key=lambda structure: errors[structure] * (FEWER if structure.drops_outliers else 1.0))
    energy = sum(one.energy for one in few)
    return [structure for structure in ordered[:2] if errors[structure] < TRIMMED * energy]


def _look(sample: Sample, count: int) -> list[Sample]:
    """Return so many elements of some tensors, each on its own."""
    numbers = np.unique(np.linspace(0, len(sample.names) - 1, PARTS_LOOKED_AT).astype(int))
    samples = [sample.of([int(number)]) for number in numbers]
    return [one.thinned(count // PARTS_LOOKED_AT) for one in samples if one.energy > 0.0]


def _trimmed_part(structure: Structure, start: FloatArray) -> PartFit:
    def fit_part(part: Sample) -> tuple[Parameters, float]:
        found = fit(part.thinned(GLANCE), structure, start)
        found = refine(part.thinned(REFINED), found, shrunk=20.0)
        return found.parameters, found.error

    return fit_part


def _masked(sample: Sample, start: FloatArray, members: Members, depth: int) -> Masked | None:
    if len(start) > MAX_MODELS:
        return None
    few = _look(sample, LOOK)[::2]
    errors = {masking: sum(decode(one, start, masking).error * one.energy for one in few) for masking in MASKINGS}
    # A linear decode can imitate an election, not the other way round.
    chosen = min(MASKINGS, key=lambda masking: errors[masking] * (2.0 if not masking.consensus else 1.0))
    if errors[chosen] > DECODED * sum(one.energy for one in few):
        return None
    fit_part = _masked_part(chosen, start)
    parameters, error = fit_part(sample)
    parts = Parts("whole", {Part(): parameters}, error, depth)
    if error > EXACT + FLOORS * sample.floor:
        parts = next(fit_parts(sample, fit_part, depth))
    if all((one.densities > KEPT).all() for one in parts.parameters.values()):
        return None
    return Masked(chosen, parts, tuple(masked_candidates(parts, chosen, members)))


def _masked_part(masking: Masking, start: FloatArray) -> PartFit:
    def fit_part(part: Sample) -> tuple[Parameters, float]:
        found = decode(part.thinned(LOOK), start, masking)
        densities, slopes = kept_shares(part.thinned(COUNTED), found)
        return parameters_of(replace(found, densities=densities, slopes=slopes), part), found.error

    return fit_part


def parameters_of(decoding: Decoding, sample: Sample) -> Parameters:
    """Take the rescaling out of a decoding's weights; half a slope is DELLA's epsilon.

    A method rescales by what masks keep of the sum of magnitudes, which is more than of the elements where large ones
    are kept more often.
    """
    # Chances beyond 0 and 1 are none.
    widest = np.minimum(decoding.densities, 1.0 - decoding.densities) - 1e-3
    epsilons = np.clip(0.5 * decoding.slopes, 0.0, np.maximum(widest, 0.0))
    heavy = sample.heavy_ranks[:, np.unique(sample.tensor)].mean(axis=1)
    shares = decoding.densities + 2.0 * epsilons * (heavy - 0.5)
    if not decoding.masking.normalize:
        return Parameters(decoding.weights * shares, decoding.densities, epsilons)
    scale = float(np.mean(decoding.rescale * shares))
    return Parameters(decoding.weights, decoding.densities, epsilons, scale)


def decoy_error(sample: Sample, masked: Masked) -> float:
    """Return what the same decode leaves if the fine-tunes' changes are exchanged for ones of the same size.

    Each change keeps its elements, at other places of the same tensor: masks over such decoys explain nothing.
    """
    few = sample.thinned(LOOK)
    order = np.concatenate([np.roll(np.flatnonzero(few.tensor == number), ROLLED) for number in np.unique(few.tensor)])
    decoys = replace(few, deltas=few.deltas[:, order])
    return decode(decoys, fit_dense(decoys).parameters.weights, masked.masking).error

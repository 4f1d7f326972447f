"""The seed of a merge's random masks, from what the weights show of them.

mergekit draws the masks of DARE and DELLA with ``torch.bernoulli`` (`mergekit.sparsify`): on a CPU, one output of
MT19937 for each element, of which the low 24 bits decide, and of the seed only the low 32 bits are used. So there are
2^32 sequences, and some tens of elements whose masks can be read from the weights tell which one it was. Where they are
read wrongly now and then, a few may disagree; how many seeds would agree by chance is said with the result.

Every seed of the range is tested: first on what is cheapest and rejects most, then, if it is left, on everything.
Observations among the first 227 draws are compared directly; a seed is rejected as soon as it has more contradictions
than are allowed in all. Farther draws are parities of the seeded state (`unmerge.recipe.mersenne`), and the first tests
ask for the highest bits alone, as many as an observation tells: a draw under one half has a 0, one under one eighth
three. Waiting for all
contradictions that are allowed in hundreds of observations would take long, so there a seed is rejected as soon as so
many so early are improbable (`MISSED`) of one that agrees.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmerge.errors import RecipeError
from unmerge.parallel import finished

Words = NDArray[np.uint32]
Screen = Callable[[Words], Words]
"""Given seeds, returns those that are left."""

SEEDS = 2**32
"""As many as there are."""
SCALE = 2**24
"""Steps of a draw: an element is kept where its draw's low 24 bits are under ``SCALE * density``."""
MOST_BY_CHANCE = 1000.0
"""More seeds than these, expected by chance, would be an answer to nothing."""
BLOCK = 2**20
"""Seeds that a thread tests at a time."""
MISSED = 3e-3
"""How probably a stage of the test may reject a seed with all the contradictions that are allowed, placed at random.
With half as many it is far less, and where few are allowed it is none."""
EVEN = 0.2
"""Kept and dropped elements are as many as each other if their numbers differ by less than this share."""
MOST_BITS = 4
"""Bits of one observation that are asked for before the whole of it is."""
_SEEDING, _VERIFYING = 4.0, 130.0
"""Time to seed a state, and to test a seed on whole observations, as multiples of a parity's."""
_SELDOM = 2.0**-12
"""A screen that fewer seeds than this pass takes nearly all of the time."""


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Seeds that agree with the observations.

    Attributes
    ----------
    seeds : tuple of int
        Ascending.
    tested : int
        Seeds in the range.
    expected_by_chance : float
        How many of them would agree if the observations came from none of them.
    """

    seeds: tuple[int, ...]
    tested: int
    expected_by_chance: float


@dataclass(frozen=True, slots=True, eq=False)
class _Observations:
    """Ascending in `indices`; a seed agrees that contradicts no more than `allowed` of them."""

    indices: NDArray[np.int64]
    thresholds: Words
    kept: Words
    allowed: int

    @property
    def contradicted(self) -> NDArray[np.float64]:
        """The probability that a draw at random contradicts each."""
        under = self.thresholds / SCALE
        return np.where(self.kept == 1, 1.0 - under, under)

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for part, dtype in ((self.indices, "<i8"), (self.thresholds, "<u4"), (self.kept, "<u4")):
            digest.update(part.astype(dtype).tobytes())
        return digest.hexdigest()


def search(
    indices: NDArray[np.integer[Any]],
    thresholds: NDArray[np.integer[Any]],
    kept: NDArray[np.bool_],
    *,
    first: int = 0,
    count: int = SEEDS,
    tolerated: float = 0.02,
    workers: int | None = None,
    state: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """Find the seeds of torch's CPU generator that agree with observed elements of its masks.

    Fifty to two hundred observations are enough for all seeds: more of them, and more that may be wrong, cost time.

    Parameters
    ----------
    indices : array of int, shape (N,)
        Which draw decided each element, from 0, counted over the whole merge. No two are equal.
    thresholds : array of int, shape (N,)
        The element is kept where its draw's low 24 bits are under this one: ``ceil(2**24 * density)``, with the
        density as it was rounded to the working type.
    kept : array of bool, shape (N,)
        What the weights show.
    first, count : int
        The seeds to test; by default all. ``count=2**20`` covers those that people choose.
    tolerated : float
        Fraction of the observations that may disagree, from 0; rounded down to whole observations. Where about as many
        are kept as dropped, a seed may be missed that disagrees with a larger fraction of either kind.
    workers : int, optional
        Threads; all cores by default. Changes no result.
    state : Path, optional
        A JSON file that says how far the search is. A search that was stopped goes on from it.
    progress : callable, optional
        Told how many seeds are tested so far, and `count`.

    Returns
    -------
    SearchResult
        Of the whole range, also where a part of it was tested before.

    Raises
    ------
    RecipeError
        If an observation or the range is impossible, the observations would not tell seeds apart, or `state` holds
        another search.
    """
    seen = _checked(indices, thresholds, kept, tolerated)
    if first < 0 or count < 1 or first + count > SEEDS:
        raise RecipeError(f"{count} seeds from {first}: expected at least one, within 0 to 2**32 - 1")
    chance = _by_chance(seen, count)
    if chance > MOST_BY_CHANCE:
        raise RecipeError(
            f"{len(seen.kept)} observations of which {seen.allowed} may be wrong: {chance:.3g} of {count} seeds would"
            f" agree by chance, expected at most {MOST_BY_CHANCE:g}; give more observations or fewer seeds"
        )
    key = {"observations": seen.digest, "allowed": seen.allowed, "first": first, "count": count}
    tested, seeds = _resume(state, key) if state and state.exists() else (0, [])
    report = progress or (lambda _, __: None)
    report(tested, count)
    for size, found in _test(seen, first + tested, count - tested, workers or os.cpu_count() or 1):
        tested += size
        seeds += found
        if state:
            _save(state, {**key, "tested": tested, "seeds": seeds})
        report(tested, count)
    return SearchResult(tuple(seeds), tested, chance)


def by_chance(thresholds: NDArray[np.uint32], kept: NDArray[np.bool_], count: int, tolerated: float) -> float:
    """Return how many of `count` wrong seeds would agree with such observations; see `search`.

    Raises
    ------
    RecipeError
        If an observation is impossible.
    """
    return _by_chance(_checked(np.arange(len(kept)), thresholds, kept, tolerated), count)


def _by_chance(seen: _Observations, count: int) -> float:
    return count * float(_at_most(seen.contradicted, [seen.allowed] * (len(seen.kept) + 1))[-1])


def _checked(
    indices: NDArray[np.integer[Any]], thresholds: NDArray[np.integer[Any]], kept: NDArray[np.bool_], tolerated: float
) -> _Observations:
    shapes = {np.shape(indices), np.shape(thresholds), np.shape(kept)}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1 or np.size(kept) == 0:
        raise RecipeError(f"observations of shapes {sorted(shapes)}: expected three arrays of one length, at least 1")
    if np.min(indices) < 0 or len(np.unique(indices)) < len(indices):
        raise RecipeError("indices of draws: expected each from 0, and none twice")
    if np.min(thresholds) <= 0 or np.max(thresholds) >= SCALE:
        raise RecipeError(
            f"thresholds from {np.min(thresholds)} to {np.max(thresholds)}: expected 1 to 2**24 - 1; leave out elements"
            " that are always or never kept"
        )
    if not 0.0 <= tolerated < 1.0:
        raise RecipeError(f"a tolerated fraction of {tolerated}: expected at least 0 and less than 1")
    order = np.argsort(indices)
    return _Observations(
        np.asarray(indices, dtype=np.int64)[order],
        np.asarray(thresholds, dtype=np.uint32)[order],
        np.asarray(kept, dtype=bool)[order].astype(np.uint32),
        math.floor(tolerated * len(order) + 1e-9),
    )


def _at_most(probabilities: NDArray[np.float64], limits: Sequence[int]) -> NDArray[np.float64]:
    """Return how probable at most `limits` of the first 0, 1, ..., N independent events are."""
    of_counts = np.zeros(max(limits) + 1)
    of_counts[0] = 1.0
    sums = [1.0]
    for probability, limit in zip(probabilities, limits[1:], strict=True):
        of_counts[1:] = of_counts[1:] * (1.0 - probability) + of_counts[:-1] * probability
        of_counts[0] *= 1.0 - probability
        sums.append(float(of_counts[: limit + 1].sum()))
    return np.array(sums)


def _test(seen: _Observations, first: int, count: int, workers: int) -> Iterator[tuple[int, list[int]]]:
    """Yield the sizes of blocks of seeds, in their order, and the seeds among them that agree."""
    if count == 0:
        return
    from joblib import Parallel, delayed

    agreeing = _agreeing(seen)

    def test(start: int, size: int) -> tuple[int, list[int]]:
        return size, agreeing(np.uint32(start) + np.arange(size, dtype=np.uint32)).tolist()

    block = min(BLOCK, -(-count // workers))
    starts = range(first, first + count, block)
    parallel = Parallel(n_jobs=workers, prefer="threads", return_as="generator")
    yield from finished(parallel(delayed(test)(start, min(block, first + count - start)) for start in starts))


def _agreeing(seen: _Observations) -> Screen:
    """Return the whole test of seeds."""
    masks, starts = _masks(seen)
    early = _word_screen(seen) or _parity_screen(seen, masks, starts)
    last = _verification(seen, masks, starts)
    return lambda seeds: last(early(seeds))


def _masks(seen: _Observations) -> tuple[Words, NDArray[np.int64]]:
    """Return the parity masks of each draw's bits that its threshold is compared with, and where each draw's begin."""
    from unmerge.recipe.mersenne import parity_masks

    # Bits under the threshold's lowest 1 do not matter.
    lowest = [(threshold & -threshold).bit_length() - 1 for threshold in seen.thresholds.tolist()]
    masks = [
        parity_masks(index, range(23, low - 1, -1)) for index, low in zip(seen.indices.tolist(), lowest, strict=True)
    ]
    return np.concatenate(masks), np.cumsum([0, *(len(part) for part in masks)])


def _verification(seen: _Observations, masks: Words, starts: NDArray[np.int64]) -> Screen:
    """Return the test on all observations."""
    from unmerge.recipe.mersenne import verify

    def screen(seeds: Words) -> Words:
        passed = np.empty_like(seeds)
        count = verify(seeds, masks, starts, seen.thresholds, seen.kept, seen.allowed, passed)
        return passed[:count]

    return screen


def _word_screen(seen: _Observations) -> Screen | None:
    """Return the test on the first draws, None where it would leave too many seeds."""
    from unmerge.recipe.mersenne import NEAR, screen_words

    near = int(np.searchsorted(seen.indices, NEAR))
    if _at_most(seen.contradicted[:near], [seen.allowed] * (near + 1))[-1] > _SELDOM:
        return None
    indices, thresholds, kept = seen.indices[:near], seen.thresholds[:near], seen.kept[:near]

    def screen(seeds: Words) -> Words:
        passed = np.empty_like(seeds)
        count = screen_words(seeds, indices, thresholds, kept, seen.allowed, passed)
        return passed[:count]

    return screen


@dataclass(frozen=True, slots=True, eq=False)
class _Stage:
    """Parities that are tested together, as `mersenne.screen_parities` takes them."""

    masks: Words
    wanted: Words
    ends: NDArray[np.int64]
    allowed: int


def _parity_screen(seen: _Observations, masks: Words, starts: NDArray[np.int64]) -> Screen:
    """Return the test on highest bits; seeds that fail it are not seeded again."""
    from unmerge.recipe.mersenne import screen_parities

    stages = _stages(seen, masks, starts)

    def screen(seeds: Words) -> Words:
        missed = np.zeros_like(seeds)
        for stage in stages:
            passed = np.empty_like(seeds)
            count = screen_parities(seeds, missed, stage.masks, stage.wanted, stage.ends, stage.allowed, passed)
            seeds, missed = passed[:count], missed[:count]
        return seeds

    return screen


def _stages(seen: _Observations, masks: Words, starts: NDArray[np.int64]) -> list[_Stage]:
    leading = _leading_bits(seen)
    telling = np.flatnonzero(leading)
    order = np.random.default_rng(0).permutation(telling)  # neighbours may be wrong together
    population = _population(seen, len(order))
    limits = [_limit(population, seen.allowed, drawn) for drawn in range(len(order) + 1)]
    plans = [(bits, *_cuts(limits, np.minimum(leading[order], bits))) for bits in range(1, MOST_BITS + 1)]
    bits, cuts, _ = min(plans, key=lambda plan: plan[2])
    stages = []
    for begin, end in pairwise(cuts):
        chosen = order[begin:end]
        counts = np.minimum(leading[chosen], bits)
        places = zip(starts[chosen].tolist(), counts.tolist(), strict=True)
        rows = np.concatenate([np.arange(start, start + count) for start, count in places])
        wanted = np.repeat(np.uint32(1) - seen.kept[chosen], counts)
        stages.append(_Stage(_grouped(masks[rows]), wanted, np.cumsum(counts), limits[end]))
    return stages


def _population(seen: _Observations, telling: int) -> int:
    """Return among how many observations the wrong ones are thought to be at random.

    Of as many kept elements as dropped ones, among all: either kind has its share. Else all may be among the telling
    ones: they are the rarer kind, which holds most of what was misread.
    """
    kept = int(seen.kept.sum())
    return len(seen.kept) if abs(2 * kept - len(seen.kept)) <= EVEN * len(seen.kept) else telling


def _leading_bits(seen: _Observations) -> NDArray[np.int64]:
    """Return how many of the highest bits of each draw are told: zeros under a threshold, ones from it on."""
    under = [24 - (threshold - 1).bit_length() for threshold in seen.thresholds.tolist()]
    from_it_on = [24 - (SCALE - 1 - threshold).bit_length() for threshold in seen.thresholds.tolist()]
    return np.where(seen.kept == 1, under, from_it_on)


def _limit(population: int, allowed: int, drawn: int) -> int:
    """Return how many contradictions may be among observations drawn from a population that has those allowed."""
    wrong, cases = min(allowed, population), 0
    for limit in range(min(wrong, drawn), 0, -1):
        cases += math.comb(wrong, limit) * math.comb(population - wrong, drawn - limit)
        if cases > MISSED * math.comb(population, drawn):
            return limit
    return 0


def _cuts(limits: Sequence[int], bits: NDArray[np.int64]) -> tuple[list[int], float]:
    """Return where to cut observations into stages, and where to stop, so that a seed takes the least time; and it.

    A stage seeds what is left again, all lanes at least, and adds its parities; the shortest path over all cuts.

    Parameters
    ----------
    limits : sequence of int, length N + 1
        How many contradictions each number of observations may have.
    bits : array of int, shape (N,)
        Parities that each observation takes.
    """
    from unmerge.recipe.mersenne import LANES

    left = np.minimum.accumulate(_at_most(1.0 - np.ldexp(1.0, -bits), limits))
    parities = np.cumsum([0, *bits.tolist()])
    time = np.zeros(len(left))
    before = np.zeros(len(left), dtype=np.int64)
    for end in range(1, len(left)):
        paths = time[:end] + np.maximum(left[:end], LANES / BLOCK) * (_SEEDING + parities[end] - parities[:end])
        before[end] = np.argmin(paths)
        time[end] = paths[before[end]]
    whole = time + left * _VERIFYING
    cuts = [int(np.argmin(whole))]
    while cuts[0] > 0:
        cuts.insert(0, int(before[cuts[0]]))
    return cuts, float(whole.min())


def _grouped(masks: Words) -> Words:
    """Return masks, shape (K, 624), as `mersenne.screen_parities` reads them, shape (624 / ROWS, K, ROWS)."""
    from unmerge.recipe.mersenne import ROWS

    return np.ascontiguousarray(masks.reshape(len(masks), -1, ROWS).transpose(1, 0, 2))


def _resume(path: Path, key: dict[str, Any]) -> tuple[int, list[int]]:
    """Return how many seeds a search has tested, and those that it found."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        search, tested, seeds = {name: state[name] for name in key}, int(state["tested"]), list(state["seeds"])
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{path}: not the state of a seed search; delete it or name another file") from error
    if search != key:
        raise RecipeError(
            f"{path}: the state of a search with other observations or seeds; delete it or name another file"
        )
    return tested, seeds


def _save(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(state) + "\n", encoding="utf-8")
    temporary.replace(path)

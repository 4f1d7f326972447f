"""Which merges are made: drawn by explicit generators, so that a number always names the same merge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from benchmarks.evidence.material import (
    PRESET,
    SEEDS,
    dictionary_of,
    strangers_of,
    task_of,
    twin_of,
)
from unmerge.experiment.layout import Target, targets
from unmerge.experiment.mergekit import METHODS
from unmerge.experiment.world import part_seed

Kind = Literal["present", "twin", "sibling", "other"]
OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.5},
}
NORMALISED = ("linear", "ties")
"""The methods that divide by the sum of the weights, as mergekit does by default."""
HARD = {8: 160, 64: 100, 256: 60}
"""Mixes by the size of the dictionary."""
CHANGES = (0.003, 0.01, 0.03)
COVERED = {"known": 120, "mixed": 120}
"""Merges for each size of change."""
EDITED = 4
SEED = 20
"""Of the draws that the page is about."""
FRESH = 3
"""Added to the seed of coverage's mixes. The width of intervals beside a stranger was chosen on mixed merges of seed
41, the first 12, 11 and 11; these are others."""


@dataclass(frozen=True, slots=True)
class Mix:
    """One merge and the dictionary that it is compared with.

    Attributes
    ----------
    name : str
        Unique within a part of the benchmark.
    group : str
        ``known``, ``mixed`` or ``unknown``.
    method : str
        mergekit's name of the method.
    weights : mapping of str to float
        The ingredients in order, with the weights of the recipe.
    dictionary : tuple of str
        The atoms.
    seed : int
        mergekit's, for the masks of a dare merge.
    options : mapping
        Further parameters of the recipe.
    change : float or None
        Norm of every adapter's change over that of the weights; None leaves them as they were trained.
    edit : str or None
        What is done to the merged model before it is taken apart.
    """

    name: str
    group: str
    method: str
    weights: Mapping[str, float]
    dictionary: tuple[str, ...]
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)
    change: float | None = None
    edit: str | None = None

    @property
    def effective(self) -> dict[str, float]:
        """The weights that the ingredients have in the merge."""
        total = sum(self.weights.values()) if self.method in NORMALISED else 1.0
        return {name: weight / total for name, weight in self.weights.items()}

    @property
    def strangers(self) -> tuple[str, ...]:
        """The ingredients that the dictionary does not have."""
        return tuple(name for name in self.weights if name not in self.dictionary)

    def kind(self, atom: str) -> Kind:
        """Tell whether an atom is inside, and otherwise how it is related to what is inside."""
        if atom in self.weights:
            return "present"
        if twin_of(atom) in self.weights:
            return "twin"
        return "sibling" if task_of(atom) in {task_of(name) for name in self.weights} else "other"

    def has_twin(self, atom: str) -> bool:
        """Tell whether another checkpoint of the atom's run is in the dictionary or in the merge."""
        return twin_of(atom) in self.dictionary or twin_of(atom) in self.weights


def group_of(weights: Iterable[str], dictionary: Sequence[str]) -> str:
    """Return ``known`` if all ingredients are in the dictionary, ``unknown`` if none is, else ``mixed``."""
    inside = [name in dictionary for name in weights]
    return "known" if all(inside) else "mixed" if any(inside) else "unknown"


def design_mixes() -> list[Mix]:
    """Return the targets of the paper's design: 18 compositions by 4 methods in the worlds of 3 seeds."""
    return [_design_mix(target) for seed in SEEDS for target in targets(PRESET, seed)]


def _design_mix(target: Target) -> Mix:
    return Mix(
        name=f"{target.seed}-{target.name}",
        group=target.group,
        method=target.method,
        weights={f"{task}-{target.seed}": 1.0 / len(target.tasks) for task in target.tasks},
        dictionary=dictionary_of(target.seed),
        seed=part_seed(target.seed, target.name),  # the experiment's own: the same masks
        options=PRESET.methods[target.method],
    )


def hard_mixes(pool: Sequence[str], seed: int = SEED) -> list[Mix]:
    """Draw all hard mixes; any first ones of the list have dictionaries of every size."""
    every = [((number + 0.5) / count, size, number) for size, count in HARD.items() for number in range(count)]
    return [draw_hard(pool, size, number, seed) for _, size, number in sorted(every)]


def draw_hard(pool: Sequence[str], size: int, number: int, seed: int = SEED) -> Mix:
    """Draw a mix of up to three atoms and up to two strangers, siblings of atoms among them.

    Parameters
    ----------
    pool : sequence of str
        All adapters.
    size : int
        Atoms in the dictionary.
    number : int
        The mix; the method follows from it.
    seed : int
        Of all draws.
    """
    generator = np.random.default_rng([seed, size, number])
    method = METHODS[number % len(METHODS)]
    present, strangers = _draw_counts(generator, least=2 if method == "ties" else 1)
    inside: list[str] = []
    for _ in range(present):
        inside.append(_pick(generator, pool, inside))
    outside, apart = _draw_strangers(generator, pool, inside, strangers, crowded=2 * size > len(pool))
    dictionary = _draw_dictionary(generator, pool, size, inside, outside, apart)
    weights = {name: float(np.exp(generator.uniform(np.log(0.02), np.log(0.9)))) for name in inside}
    weights |= {name: float(generator.uniform(0.2, 0.9)) for name in outside}
    order = [list(weights)[place] for place in generator.permutation(len(weights))]
    name = f"{size:03d}-{number:03d}-{method}"
    return Mix(
        name=name,
        group=group_of(order, dictionary),
        method=method,
        weights={one: round(weights[one], 4) for one in order},
        dictionary=dictionary,
        seed=part_seed(seed, name),
        options=OPTIONS[method],
    )


def _draw_counts(generator: np.random.Generator, least: int) -> tuple[int, int]:
    while True:
        present, strangers = int(generator.integers(0, 4)), int(generator.integers(0, 3))
        if present + strangers >= least:
            return present, strangers


def _pick(generator: np.random.Generator, pool: Sequence[str], taken: Sequence[str]) -> str:
    """Pick an adapter that is not taken; every fifth time one of a run that left two checkpoints."""
    names = set(pool)
    free = [name for name in pool if name not in taken]
    paired = [name for name in free if twin_of(name) in names]
    from_pairs = generator.random() < 0.2 and paired
    choice = paired if from_pairs else free
    return choice[int(generator.integers(len(choice)))]


def _draw_strangers(
    generator: np.random.Generator, pool: Sequence[str], inside: Sequence[str], count: int, *, crowded: bool
) -> tuple[list[str], list[str]]:
    """Draw the strangers; return also those whose whole task the dictionary shall lack.

    Three in five have siblings in the dictionary; all of them where it holds most of the pool.
    """
    related = sum(generator.random() < 0.6 or crowded for _ in range(count))
    outside: list[str] = []
    for place in range(count):
        taken = [*inside, *outside]
        tasks = {task_of(name) for name in taken} if place >= related else set()
        outside.append(_pick(generator, [name for name in pool if task_of(name) not in tasks], taken))
    return outside, outside[related:]


def _draw_dictionary(
    generator: np.random.Generator,
    pool: Sequence[str],
    size: int,
    inside: Sequence[str],
    outside: Sequence[str],
    apart: Sequence[str],
) -> tuple[str, ...]:
    """Draw a dictionary around the ingredients: siblings of them first, then half of their twins, then anything."""
    lacking = {task_of(name) for name in apart}
    ingredients = [*inside, *outside]
    twins = [twin_of(name) for name in ingredients if generator.random() < 0.5]
    barred = {*outside, *(twin_of(name) for name in ingredients)} - set(inside)
    free = [name for name in pool if name not in barred and task_of(name) not in lacking and name not in inside]
    wanted = [name for name in outside if name not in apart]
    wanted += [name for name in inside if generator.random() < 0.5]
    siblings = [_sibling(generator, name, free) for name in wanted]
    kept = [name for name in twins if name in pool and name not in ingredients and task_of(name) not in lacking]
    rest = [free[place] for place in generator.permutation(len(free))]
    # A dictionary of names, because it keeps the order and drops what comes twice.
    ordered = dict.fromkeys([*inside, *(name for name in siblings if name), *kept, *rest])
    return tuple(sorted(list(ordered)[:size]))


def _sibling(generator: np.random.Generator, name: str, free: Sequence[str]) -> str | None:
    found = [other for other in free if task_of(other) == task_of(name)]
    return found[int(generator.integers(len(found)))] if found else None


def coverage_mixes(seed: int = SEED) -> list[Mix]:
    """Draw linear merges of adapters whose changes are rescaled, interleaved over sizes and groups."""
    every = [
        ((number + 0.5) / count, change, group, number)
        for change in CHANGES
        for group, count in COVERED.items()
        for number in range(count)
    ]
    return [draw_coverage(change, group, number, seed) for _, change, group, number in sorted(every)]


def draw_coverage(change: float, group: str, number: int, seed: int = SEED) -> Mix:
    """Draw a linear merge of two to four components, one of them unknown if `group` is ``mixed``."""
    generator = np.random.default_rng([seed + FRESH, round(change * 1e4), list(COVERED).index(group), number])
    world = number % len(SEEDS)
    count = int(generator.integers(2, 5))
    known = count - (group == "mixed")
    names = [str(name) for name in generator.choice(dictionary_of(world), known, replace=False)]
    names += [str(name) for name in generator.choice(strangers_of(world), count - known, replace=False)]
    weights = {name: round(float(generator.uniform(0.1, 1.0)), 4) for name in names}
    name = f"{change:.1%}-{group}-{number:03d}"
    return Mix(name, group, "linear", weights, dictionary_of(world), part_seed(seed, name), change=change)


def edited_mixes(edits: Sequence[str], seed: int = SEED) -> list[Mix]:
    """Draw mixed merges of moderate weights, each as it is and after every edit."""
    every = [draw_edited(number, edit, seed) for number in range(EDITED) for edit in (None, *edits)]
    return sorted(every, key=lambda mix: mix.edit is not None)


def draw_edited(number: int, edit: str | None, seed: int = SEED) -> Mix:
    """Draw a merge of two atoms and a stranger."""
    generator = np.random.default_rng([seed + 2, number])
    method, world = METHODS[number % len(METHODS)], number // len(METHODS) % len(SEEDS)
    names = [*generator.choice(dictionary_of(world), 2, replace=False), generator.choice(strangers_of(world))]
    weights = {str(name): round(float(generator.uniform(0.2, 0.5)), 4) for name in names}
    stem = f"{number:02d}-{method}"
    return Mix(
        name=f"{stem}-{edit or 'unedited'}",
        group="mixed",
        method=method,
        weights=weights,
        dictionary=dictionary_of(world),
        seed=part_seed(seed, stem),
        options=OPTIONS[method],
        edit=edit,
    )

"""The whole way from a merge's weights to the recipe that makes them, and to the proof that it does.

Attribution says who is inside; sharp elements say what was done to them; recipes written from that are tried on some
tensors until one makes their bits; then all tensors are made again and compared.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from unmerge.alignment import layer_count
from unmerge.attribution import Target, explain, open_target
from unmerge.checkpoint.reader import Checkpoint, open_checkpoint
from unmerge.checkpoint.source import Source, resolve
from unmerge.checkpoint.tensor import Tensor, in_memory, matrix_shape, values
from unmerge.dictionary import Atom, Base, open_base
from unmerge.errors import AlignmentError, RecipeError
from unmerge.merging.draws import TorchDraws
from unmerge.merging.method import Draws
from unmerge.recipe.candidates import Members, with_lambdas
from unmerge.recipe.comparison import Advance, Compared, compare_all, lay_out
from unmerge.recipe.copied import BASE, copied_whole, from_experts, from_layers, reference_of_atom, reference_of_base
from unmerge.recipe.document import ModelInput, ModelReference, Recipe, to_yaml, torch_type
from unmerge.recipe.experts import has_experts
from unmerge.recipe.freedom import freedom
from unmerge.recipe.identify import Identified, Masked, Types, decoy_error, identify
from unmerge.recipe.judging import judge
from unmerge.recipe.mask_seed import HUMAN, find_seed
from unmerge.recipe.probes import Hypothesis, Probes
from unmerge.recipe.proof import Alternative, Decoded, Member, Range, Recovery, proof_of
from unmerge.recipe.ranges import ranges_of
from unmerge.recipe.sample import ReadRows, Sample, draw_sample
from unmerge.recipe.seed_search import SEEDS
from unmerge.recipe.sources import Model, open_model
from unmerge.recipe.trial import CONVENTIONS, CURRENT, FAIR, Trial, Tried, is_as_good, polish, simplify
from unmerge.result import Attribution
from unmerge.shortlist import Chosen, Shelf
from unmerge.solvers import SOLVERS
from unmerge.summary import summarise

MAYBE = 0.02
"""Atoms with at least this weight, of which the evidence cannot tell, are tried as members."""
TRIAL_TENSORS = 6
"""Tensors that recipes are tried on."""
TRIAL_ELEMENTS = 1 << 21
"""Larger tensors are not tried on if there are enough smaller ones."""
ALIKE = 0.0005
"""Recipes whose shares of equal values differ by less are said to be alike."""
MADE, WORTH = 0.999, 0.95
"""The share of values that a recipe must make to be more than a likeness, and of some tensors to be compared whole."""
THREADS = (1, 2, 4, 8, 16, 32)
"""Of torch, in the merge: sums of large tensors are split among them, and a rescaled change shows it."""
USUAL = ("linear", "task_arithmetic", "slerp", "ties", "dare_ties", "dare_linear")
"""Of recipes that make the same bits, that of the more usual method is given."""

Start = Callable[[str, int], Advance]
"""Begins to report progress: what is done, and of how many steps."""


@dataclass(frozen=True, slots=True)
class Search:
    """Which seeds of random masks are looked for.

    Attributes
    ----------
    count : int
        Seeds from 0 on; 0 looks for none.
    state : Path or None
        A file that keeps how far the search is.
    """

    count: int = HUMAN
    state: Path | None = None


def seed_count(text: str) -> int:
    """Read how many seeds are to be tested: a number, or ``all``.

    Raises
    ------
    RecipeError
        If it is neither.
    """
    if text == "all":
        return SEEDS
    if not text.isdecimal() or int(text) > SEEDS:
        raise RecipeError(f"--seeds {text}: expected a number from 0 to {SEEDS}, or all")
    return int(text)


def recover(
    target: str, atoms: Sequence[str], *, base: str, search: Search | None = None, start: Start | None = None
) -> Recovery:
    """Find the recipe of a merge, and prove it.

    Parameters
    ----------
    target : str
        The merged model: a folder, a file, or a Hub id.
    atoms : sequence of str
        Known fine-tunes: full checkpoints, PEFT adapters, dictionaries; ``NAME=PATH`` names one.
    base : str
        The model that they were fine-tuned from.
    search : Search, optional
        Seeds to look for, where masks are random.
    start : callable, optional
        Begins to report progress.

    Raises
    ------
    UnmergeError
        If anything given cannot be used.
    """
    origin = open_base(base)
    source = resolve(target)
    goal = open_checkpoint(source.path)
    shelf = Shelf.of(list(atoms), origin, elements=True)
    known = {atom.name: atom for atom in shelf.open_all().atoms}
    begin = start or _silent
    if has_experts(goal) and not has_experts(origin.checkpoint):
        return from_experts(source, goal, origin, known)
    if layer_count(goal.tensors.keys()) != layer_count(origin.checkpoint.tensors.keys()):
        return from_layers(source, goal, origin, known)
    copied = copied_whole(source, goal, origin, known)
    if copied is not None:
        return copied
    try:
        opened = open_target(target, origin)
    except AlignmentError:
        # What is put together of other layers than the base has there is not like the base.
        stack = from_layers(source, goal, origin, known)
        if stack.exit_code != 0:
            raise
        return stack
    advance = begin("attributing", 1)
    attributed = _Attributed.of(opened, shelf.choose(opened.vector, opened.rows), origin)
    advance(1)
    return _Recoverer(source, goal, origin, known, attributed, search or Search(), begin).run()


def _increments(advance: Advance) -> Callable[[int, int], None]:
    """Turn reports of what is done into reports of what was done since the last one."""
    done = 0

    def report(tested: int, _: int) -> None:
        nonlocal done
        advance(max(0, tested - done))
        done = tested

    return report


def _silent(what: str, steps: int) -> Advance:
    del what, steps
    return lambda count: None  # noqa: ARG005 - nobody listens


@dataclass(frozen=True, slots=True, eq=False)
class _Attributed:
    """What a target is attributed to: who is in it at once, and the exact weights where they are asked for."""

    found: Attribution
    refined: Callable[[], Attribution]

    @classmethod
    def of(cls, goal: Target, known: Chosen, base: Base) -> _Attributed:
        solver = SOLVERS["nnls"](signed=False)
        workers = os.cpu_count() or 1
        found, vector, regression = explain(
            goal, known.dictionary, known.extra, base, solver, unopened=known.unopened, refined=False,
            notices=known.notices, workers=workers,
        )  # fmt: skip

        def refined() -> Attribution:
            return summarise(
                regression, solver, vector, goal.reference, base, set(goal.rows),
                base_coefficient=found.base_coefficient, notices=known.notices,
            )  # fmt: skip

        return cls(found, refined)


@dataclass(frozen=True, slots=True, eq=False)
class _Best:
    """The recipe to prove, and the share of some tensors' values that it makes; 1 where that was not looked at."""

    recipe: Recipe
    alike: tuple[Tried, ...] = ()
    seed: int | None = None
    threads: int = 1
    masked: Masked | None = None
    convention: str = CURRENT
    share: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class _Recoverer:
    source: Source
    goal: Checkpoint
    base: Base
    known: Mapping[str, Atom]
    attributed: _Attributed
    search: Search
    start: Start

    def run(self) -> Recovery:
        names = member_names(self.attributed.found)
        if not names:
            return self._without_members()
        sure = [item.name for item in self.attributed.found.components if item.present]
        found = self._of_members(sure) if sure else None
        if found is not None and (found.exit_code == 0 or sure == names):
            return found
        # One that is not in the merge keeps a recipe from being found, so doubtful ones are tried last.
        other = self._of_members(names)
        return other if found is None or other.exit_code == 0 else found

    def _of_members(self, names: Sequence[str]) -> Recovery:
        members = Members(
            reference_of_base(self.base), tuple(reference_of_atom(self.known[name], self.base) for name in names)
        )
        models = {reference: open_model(reference, Path()) for reference in (members.base, *members.models)}
        sample = draw_changes(self.goal, models, members, _base_share(self.attributed.found))
        if not len(sample.change):
            message = f"{self.source.reference}: no element differs enough from the base to tell how it was merged"
            raise RecipeError(message)
        trial = _trial(self.goal, models, sample)
        types = _types(self.goal, self.base)
        advance = self.start("trying recipes", 1)
        found = identify(sample, trial, members, types, layer_count(self.goal.tensors.keys()))
        best = self._best(trial, found, types)
        advance(1)
        return self._proved(best, trial, members, names, sample)

    def _best(self, trial: Trial, found: Identified, types: Types) -> _Best:
        if found.masked is not None:
            return self._with_seed(trial, found.masked, types)
        leading = found.tried[0]
        equal = [
            tried for tried in found.tried if is_as_good(tried, leading) and tried.convention == leading.convention
        ]
        trial = replace(trial, convention=leading.convention)
        chosen = simplify(trial, min(equal, key=lambda tried: _unusual(tried.recipe)))
        chosen, threads = _threaded(trial, chosen, None)
        others = [tried for tried in found.tried if _kind(tried.recipe) != _kind(chosen.recipe)]
        alike = best_of_each(one for one in others if chosen.share - one.share < ALIKE)
        return _Best(chosen.recipe, alike, None, threads, convention=chosen.convention, share=chosen.share)

    def _with_seed(self, trial: Trial, masked: Masked, types: Types) -> _Best:
        """Look for the seed of random masks, and settle the recipe's numbers by the bits that it gives."""
        for dtype, out in types if self.search.count else ():
            advance = self.start("searching the seed", self.search.count)
            found = find_seed(
                trial, replace(masked.recipes[0], dtype=dtype, out_dtype=out), masked.masking,
                count=self.search.count, state=self.search.state, progress=_increments(advance),
            )  # fmt: skip
            if found is None:
                continue
            draws = _after(found.seed)
            order = [item.model for item in found.recipe.models]
            recipes = [
                replace(_ordered(recipe, order), dtype=dtype, out_dtype=out)
                for recipe in masked.recipes
                for dtype, out in types
            ]
            tried = max((trial.attempt(recipe, draws) for recipe in recipes), key=lambda one: one.rank)
            if tried.share < FAIR:
                written = (trial.attempt(recipe, draws) for recipe in with_lambdas(tried.recipe))
                tried = max([tried, *written], key=lambda one: one.rank)
            tried, threads = _threaded(trial, tried, draws)
            threaded = replace(trial, threads=threads)
            tried = polish(threaded, tried, draws) if tried.share < FAIR else tried
            return _Best(simplify(threaded, tried, draws).recipe, (), found.seed, threads, masked)
        dtype, out = types[0]
        recipes = [replace(recipe, dtype=dtype, out_dtype=out) for recipe in masked.recipes]
        probes = Probes({name: trial.target[name] for name in trial.names})
        made_by = CONVENTIONS[trial.convention]
        return _Best(
            max(recipes, key=lambda one: judge(probes, Hypothesis(one, trial.models, made_by[one.merge_method])).share),
            masked=masked,
        )

    def _proved(
        self,
        best: _Best,
        trial: Trial,
        members: Members,
        names: Sequence[str],
        sample: Sample,
    ) -> Recovery:
        models = trial.models
        attribution, decoded = self.attributed.found, None
        proof = proof_of(self._compared(best, models)) if best.share >= WORTH else None
        if best.masked is not None:
            decoded = Decoded(error=best.masked.parts.error, decoy_error=decoy_error(sample, best.masked))
        elif proof is None or proof.share < MADE:
            stack = from_layers(self.source, self.goal, self.base, self.known)
            if stack.proof is not None and stack.proof.share >= MADE:
                return stack
            attribution = self.attributed.refined()
            best, proof = _Best(_likeness(attribution, members, names, best.recipe)), None
        proof = proof or proof_of(self._compared(best, models))
        named = dict(zip(members.models, names, strict=True))
        made = proof.looked_at > 0 and proof.share >= MADE
        proven = made and (best.masked is None or best.seed is not None)
        known_masks = made and best.masked is not None and best.seed is None
        called = {members.base: BASE, **named}
        return Recovery(
            target=self.source.reference,
            base=self.base.source.reference,
            status="proven" if proven else "decoded" if known_masks else "partial",
            method=best.recipe.merge_method if proven or known_masks else None,
            members=_members(best.recipe, named, attribution, members),
            recipe=to_yaml(best.recipe),
            tool=best.convention,
            seed=best.seed,
            threads=best.threads,
            proof=proof,
            decoded=decoded,
            alike=tuple(Alternative(recipe=to_yaml(one.recipe), share=one.share) for one in best.alike),
            free=self._free(best, called) if proven or known_masks else (),
            ranges=self._ranges(trial, best, called) if proven else (),
            unexplained=attribution.unexplained.share,
            notices=tuple(attribution.notices),
        )

    def _free(self, best: _Best, called: Mapping[ModelReference, str]) -> tuple[str, ...]:
        return freedom(best.recipe, names=called, convention=best.convention, seed=best.seed)

    def _ranges(self, trial: Trial, best: _Best, called: Mapping[ModelReference, str]) -> tuple[Range, ...]:
        advance = self.start("finding ranges of numbers", 1)
        arithmetic = replace(trial, threads=best.threads, convention=best.convention)
        found = ranges_of(arithmetic, best.recipe, called, None if best.seed is None else _after(best.seed))
        advance(1)
        return found

    def _compared(self, best: _Best, models: Mapping[ModelReference, Model]) -> Compared:
        hypothesis = Hypothesis(
            best.recipe, models, CONVENTIONS[best.convention][best.recipe.merge_method], best.threads
        )
        layout = lay_out(hypothesis, self.goal)
        advance = self.start("making the merge again", len(layout.stored))
        return compare_all(hypothesis, layout, best.seed, advance)

    def _without_members(self) -> Recovery:
        return Recovery(
            target=self.source.reference,
            base=self.base.source.reference,
            status="nothing known",
            method=None,
            members=(),
            recipe=None,
            tool=None,
            seed=None,
            threads=None,
            proof=None,
            decoded=None,
            alike=(),
            unexplained=self.attributed.found.unexplained.share,
            notices=tuple(self.attributed.found.notices),
        )


def _likeness(attribution: Attribution, members: Members, names: Sequence[str], near: Recipe) -> Recipe:
    """Return the known part of a merge: what attribution says of each model, whatever the rest is."""
    found = {item.name: item for item in attribution.components}
    weights = [round(found[name].weight or found[name].coefficient, 3) for name in names]
    inputs = members.inputs(*({"weight": weight} for weight in weights))
    return Recipe("task_arithmetic", members.base, inputs, dtype=near.dtype, out_dtype=near.out_dtype)


def _kind(recipe: Recipe) -> tuple[object, ...]:
    """Return what tells recipes apart for people: another type or order of the same is not another recipe."""
    return recipe.merge_method, recipe.base_model, dict(recipe.parameters) == {}


def best_of_each(tried: Iterable[Tried]) -> tuple[Tried, ...]:
    """Return the best recipe of each method, the best first."""
    found: dict[str, Tried] = {}
    for one in sorted(tried, key=lambda one: -one.share):
        found.setdefault(one.recipe.merge_method, one)
    return tuple(found.values())


def _unusual(recipe: Recipe) -> tuple[int, bool]:
    rank = USUAL.index(recipe.merge_method) if recipe.merge_method in USUAL else len(USUAL)
    return rank, recipe.dtype == "float32"


def _threaded(trial: Trial, tried: Tried, draws: Callable[[int], Draws] | None) -> tuple[Tried, int]:
    """Find how many threads torch had in the merge, where its bits show it."""
    if tried.share >= FAIR:
        return tried, 1
    attempts = [(replace(trial, threads=threads).attempt(tried.recipe, draws), threads) for threads in THREADS]
    return max(attempts, key=lambda attempt: (attempt[0].rank, -attempt[1]))


def _after(seed: int) -> Callable[[int], Draws]:
    def after(drawn: int) -> Draws:
        draws = TorchDraws(seed)
        draws.skip(drawn)
        return draws

    return after


def _ordered(recipe: Recipe, order: Sequence[ModelReference]) -> Recipe:
    own = {item.model: item for item in recipe.models}
    return replace(recipe, models=tuple(own[model] for model in order))


def _members(
    recipe: Recipe, named: Mapping[ModelReference, str], attribution: Attribution, members: Members
) -> tuple[Member, ...]:
    coefficients = {item.name: item for item in attribution.components}
    bases = [] if recipe.base_model is None else [recipe.base_model]
    listed = dict.fromkeys([*(item.model for item in recipe.models), *bases, *members.models])
    settings: dict[ModelReference, ModelInput] = {item.model: item for item in recipe.models}
    return tuple(
        Member(
            name=named[model],
            reference=str(model),
            parameters={
                name: repr(value) for name, value in (settings[model].parameters if model in settings else {}).items()
            },
            coefficient=coefficients[named[model]].coefficient,
        )
        for model in listed
        if model in named
    )


def member_names(attribution: Attribution) -> list[str]:
    """Return the atoms to look for in a recipe: those that are present, and those of which nobody can tell."""
    return [
        item.name
        for item in attribution.components
        if item.present or (item.present is None and (item.weight or 0.0) > MAYBE)
    ]


def _types(goal: Checkpoint, base: Base) -> Types:
    """Return the working and storage types that a recipe may name, the likeliest first."""
    stored = next(iter(goal.tensors.values())).dtype.name
    source = next(iter(base.checkpoint.tensors.values())).dtype.name
    found: list[tuple[str | None, str | None]] = [(torch_type(stored), None)]
    if stored != source:
        # Some methods leave half precision on their own.
        found.append((torch_type(source), None))
    if stored != "F32":
        found.append(("float32", torch_type(stored)))
    return found


def _base_share(attribution: Attribution) -> float:
    """Return the coefficient of the base beyond 1, where merging scaled the base itself."""
    found = attribution.base_coefficient
    return found.coefficient - 1.0 if found is not None and found.removed else 0.0


def draw_changes(
    goal: Checkpoint, models: Mapping[ModelReference, Model], members: Members, base_share: float = 0.0
) -> Sample:
    """Draw the sharp elements of a target.

    Parameters
    ----------
    base_share : float
        What the target holds of the base beyond the base itself; taken out.
    """
    stored = goal.tensors
    names = [
        name
        for name, tensor in stored.items()
        if all(name in model.tensors and model.tensors[name].shape == tensor.shape for model in models.values())
    ]
    base = _rows(models[members.base].tensors)
    target = _rows(stored)
    return draw_sample(
        {name: matrix_shape(stored[name].shape) for name in names},
        {name: stored[name].dtype for name in names},
        base,
        lambda name, start, stop: target(name, start, stop) - base_share * base(name, start, stop),
        [_rows(models[model].tensors) for model in members.models],
    )


def _rows(tensors: Mapping[str, Tensor]) -> ReadRows:
    return lambda name, start, stop: values(tensors[name], start, stop)


def _trial(goal: Checkpoint, models: Mapping[ModelReference, Model], sample: Sample) -> Trial:
    sizes = {name: math.prod(goal.tensors[name].shape) for name in sample.names}
    smallest = sorted(sample.names, key=lambda name: (sizes[name], name))[:TRIAL_TENSORS]
    small = [name for name in sample.names if sizes[name] <= TRIAL_ELEMENTS] or sorted(smallest)
    chosen = [small[int(number)] for number in np.unique(np.linspace(0, len(small) - 1, TRIAL_TENSORS).astype(int))]
    return Trial(tuple(chosen), models, {name: in_memory(goal.tensors[name]) for name in chosen})

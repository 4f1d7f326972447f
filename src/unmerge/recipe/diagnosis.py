"""Which claim of a recipe is wrong: the one whose change makes the recipe make the target's tensors.

Claims are changed one at a time, on a few tensors: numbers, members, truth values, types; then all numbers together,
the method, the base. Only a change that restores the tensors is reported. With the seed of random masks the draws are
known, so bits are compared there too; if nothing restores them, the seed is wrong, and masks are left open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmerge.checkpoint.dtypes import FloatArray
from unmerge.merging.method import MergeMethod
from unmerge.merging.registry import MERGEKIT, MERGEKIT_TO_0_1_4
from unmerge.recipe.claims import Claim, exchanges, labels, list_claims, put_all, with_model, without
from unmerge.recipe.document import ModelReference, storage_type, torch_type
from unmerge.recipe.judging import KEPT, RATIO, SURPRISING, Judgement, explained, glance, judge
from unmerge.recipe.plan import PlannedTensor
from unmerge.recipe.probes import Hypothesis, Probes
from unmerge.recipe.refit import LOOKED_AT, Fitted, Trial, fit_smooth, fit_together, is_smooth, search, shortest
from unmerge.recipe.sources import Model
from unmerge.recipe.unseeded import Pooled

FIRST_LOOK = 0.99
"""A changed claim that makes less than this share of one tensor is not tried on the others."""
CLOSE = 0.005
"""Round decimals so near to an estimate are likelier than others."""
SIDEWAYS = (0.1, 0.05, 0.2, 0.15, 0.3)
"""How far from a claimed density others are tried, where the estimate is not what does it."""
AGREE = 0.02
"""Densities that the number kept and the size of what is kept say agree within this."""
ALIKE = 0.02
"""Changes that are off by factors so near to each other are off by one factor."""
SMALL = 1e-9
EXPLAINED = 0.9
"""Of what a wrong number made, masks of the claimed recipe explain more than this."""
THREADS = (*range(2, 17), 20, 24, 28, 32, 40, 48, 56, 64, 96, 128)
"""Numbers of torch's threads that are tried."""


@dataclass(frozen=True, slots=True, eq=False)
class Finding:
    """A claim that is wrong.

    Attributes
    ----------
    claim : str
        What kind: a parameter's name, ``"member"``, ``"method"``, ``"dtype"``, ``"base"``; or what is no claim of the
        recipe: ``"version"`` of mergekit, ``"threads"`` of the machine.
    text : str
        In words: what it is of, a colon, and what is wrong.
    says, found : str
        What the recipe says, and what the weights say.
    hypothesis : Hypothesis
        The recipe with that changed.
    """

    claim: str
    text: str
    says: str
    found: str
    hypothesis: Hypothesis

    @property
    def subject(self) -> str:
        """What it is of: ``"weight of math"``."""
        return self.text.partition(":")[0]

    @property
    def excuses(self) -> bool:
        """Whether it is nothing that the recipe claims."""
        return self.claim in {"version", "threads"}


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """What a diagnosis looks at.

    Attributes
    ----------
    probes : Probes
    hypothesis : Hypothesis
        The recipe as it stands.
    candidates : mapping of str to Model
        Other known fine-tunes, by name.
    whole : Pooled or None
        How all tensors look with open masks, where that is known.
    """

    probes: Probes
    hypothesis: Hypothesis
    candidates: Mapping[str, Model]
    whole: Pooled | None = None

    def pooled(self) -> Pooled | None:
        """Return how the recipe as it stands looks with open masks; weights are fitted where they divide."""
        if self.whole is not None and not self.whole.divides:
            return self.whole
        return explained(self.probes, self.hypothesis, fit_weights=True)

    @property
    def numbers(self) -> list[Claim]:
        """The recipe's numbers."""
        claims = list_claims(self.hypothesis.recipe, self.hypothesis.method)
        return [claim for claim in claims if claim.is_number]

    @property
    def names(self) -> dict[ModelReference, str]:
        """What messages call the recipe's models."""
        return labels(self.hypothesis.recipe)


def diagnose(case: Case) -> Iterator[tuple[Finding, ...]]:
    """Look for the claim that is wrong.

    Yields
    ------
    tuple of Finding
        What restores the probes, the likeliest first: one claim, or several that are wrong together. Whether it
        restores the whole target is for the caller to see.
    """
    before = judge(case.probes, case.hypothesis)
    for stage in _stages(case):
        restoring = _restoring(case, stage, before)
        if restoring:
            yield (_with_others(restoring),)
            yield from ((other,) for other in restoring[1:])
        together = _together(case, before) if stage is _types else ()
        if together:
            yield together
    if case.hypothesis.method.draws and case.hypothesis.seed is not None:
        yield from _without_seed(case)


def _stages(case: Case) -> tuple[Callable[[Case], Iterator[Finding]], ...]:
    """Return what is tried, the likeliest first."""
    first: tuple[Callable[[Case], Iterator[Finding]], ...] = (_machines, _smooth_numbers, _members, _thresholds, _seeds)
    if case.hypothesis.open_masks:
        # Masks and sizes explain what wrong numbers made, and not what another member made.
        by_masks = judge(case.probes.first(1), case.hypothesis).share >= EXPLAINED
        first = (_machines, *((_random_numbers, _members) if by_masks else (_members, _random_numbers)))
    return (*first, _one_more, _truths, _types, _methods, _bases, _exchanges)


def _restoring(case: Case, stage: Callable[[Case], Iterator[Finding]], before: Judgement) -> list[Finding]:
    """Return the changes of a stage that restore the probes, those first that leave least unequal."""
    found = []
    for finding in stage(case):
        judgement = _restored(case.probes, finding.hypothesis, before)
        if judgement is not None:
            found.append((judgement.unequal, finding))
            if finding.hypothesis.open_masks and finding.claim != "member":
                break
    return [finding for _, finding in sorted(found, key=lambda pair: pair[0])]


def _without_seed(case: Case) -> Iterator[tuple[Finding, ...]]:
    """Look for what else is wrong where the seed is."""
    seed = next(_seeds(case))
    for findings in diagnose(replace(case, hypothesis=seed.hypothesis, whole=None)):
        yield (*findings, replace(seed, hypothesis=findings[0].hypothesis))


def _with_others(restoring: Sequence[Finding]) -> Finding:
    """Return the first of several changes that each restore the tensors; its text names the others."""
    first, *others = restoring
    seen = dict.fromkeys(other.text for other in others if other.subject != first.subject)
    return replace(first, text=f"{first.text} (as well: {'; '.join(seen)})") if seen else first


def _restored(probes: Probes, hypothesis: Hypothesis, before: Judgement) -> Judgement | None:
    """Return the judgement of a hypothesis that restores the probes; None where it does not."""
    first = probes.first(1)
    look = glance(first, hypothesis) if hypothesis.open_masks else first.share(hypothesis)
    if look < FIRST_LOOK:
        return None
    judgement = judge(probes, hypothesis)
    return judgement if judgement.restores(before) else None


def _machines(case: Case) -> Iterator[Finding]:
    """Try what a recipe does not say: mergekit's version, and the machine's threads."""
    stands = case.hypothesis
    older = MERGEKIT_TO_0_1_4.get(stands.method.name)
    if older is not None and older is not stands.method:
        text = f"version: the merge was made by mergekit 0.1.4 or older, which computes {older.name} in another way"
        yield Finding("version", text, "", "0.1.4 or older", replace(stands, method=older))
    if stands.open_masks or not hangs_on_threads(
        stands.method, [inputs.tensor for _, inputs in case.probes.inputs(stands)]
    ):
        return
    for threads in THREADS:
        yield Finding("threads", on_threads(threads), "", str(threads), replace(stands, threads=threads))


def on_threads(threads: int) -> str:
    """Return what is to say of a merge that another number of threads made."""
    return f"threads: the merge was made with {threads} threads of torch, which changes the last bits of sums"


def hangs_on_threads(method: MergeMethod, tensors: Iterable[PlannedTensor]) -> bool:
    """Tell whether a merge adds up whole tensors, which torch splits among threads."""
    return method.name == "sce" or any(tensor.shared.get("rescale") for tensor in tensors)


def _seeds(case: Case) -> Iterator[Finding]:
    """Try other masks than those of the seed."""
    stands = case.hypothesis
    if stands.method.draws and stands.seed is not None:
        text = (
            f"seed: the masks are not those that torch draws on a CPU with seed {stands.seed}; other masks of the "
            "claimed densities make the weights"
        )
        yield Finding("seed", text, str(stands.seed), "another", replace(stands, seed=None))


def _smooth_numbers(case: Case) -> Iterator[Finding]:
    """Try other numbers that results follow smoothly."""
    trials = [Trial(case.probes.first(1), case.hypothesis, claim) for claim in case.numbers if is_smooth(claim)]
    yield from _fitted(fit_smooth(trials))


def _thresholds(case: Case) -> Iterator[Finding]:
    """Try other numbers that move a threshold, and the smooth ones where signs are elected."""
    trials = [Trial(case.probes.first(1), case.hypothesis, claim) for claim in case.numbers]
    yield from _fitted(search(sorted(trials, key=lambda trial: is_smooth(trial.claim))))


def _fitted(fits: Sequence[tuple[Trial, Fitted]]) -> Iterator[Finding]:
    # Of numbers that do the same, the one whose decimal is shortest is likelier to be what was meant.
    best = sorted(fits, key=lambda pair: (-round(pair[1].share, 4), len(f"{pair[1].value:.6g}")))
    for trial, fit in best[:LOOKED_AT]:
        if not np.isclose(fit.value, float(trial.claim.value), rtol=1e-6):
            yield _number(trial.hypothesis, trial.claim, fit.value)


def _number(stands: Hypothesis, claim: Claim, value: float) -> Finding:
    says, found = f"{float(claim.value):g}", f"{value:g}"
    stated = f"says nothing, which means {says}" if claim.default else f"says {says}"
    changed = replace(stands, recipe=claim.put(value))
    if claim.parameter.name == "weight" and claim.owner is not None and value == 0.0:
        return _idle(labels(stands.recipe)[claim.owner], changed)
    text = f"{claim.subject}: the recipe {stated}, the weights say {found}"
    return Finding(claim.parameter.name, text, says, found, changed)


def _idle(name: str, changed: Hypothesis) -> Finding:
    return Finding("member", f"member {name}: it contributes nothing to the weights", name, "nothing", changed)


def _random_numbers(case: Case) -> Iterator[Finding]:
    """Try the numbers that masks and sizes of kept changes ask for."""
    found = case.pooled()
    if found is None:
        return
    estimates = Estimates.of(case.hypothesis, found)
    for claim in case.numbers:
        for near in estimates.of_claim(claim):
            for value in _decimals(near):
                if value != float(claim.value):
                    yield _number(case.hypothesis, claim, value)
    for claim in case.numbers:
        for value in _beside(claim, estimates):
            yield _number(case.hypothesis, claim, value)


def _beside(claim: Claim, estimates: Estimates) -> list[float]:
    """Return densities beside a claimed one; with many masks an estimate is drawn to what the recipe says.

    They are on the side where the estimate is; on both where there is none, and the sizes of kept changes are off.
    """
    if claim.parameter.name != "density":
        return []
    stands, nears = float(claim.value), estimates.of_claim(claim)
    if not nears and claim.owner not in estimates.weights:
        return []
    sides = (1.0 if nears[-1] > stands else -1.0,) if nears else (1.0, -1.0)
    values = (round(stands + side * step, 2) for step in SIDEWAYS for side in sides)
    return [value for value in values if 0.0 < value < 1.0]


def _decimals(near: float) -> list[float]:
    """Return short decimals near an estimate, the likeliest first."""
    round_ones = [value for value in (round(near, 1), round(20.0 * near) / 20.0) if abs(value - near) <= CLOSE]
    others = sorted((round(near + step / 100.0, 2) for step in (0, -1, 1)), key=lambda value: abs(value - near))
    return list(dict.fromkeys([*round_ones, *others]))


@dataclass(frozen=True, slots=True, eq=False)
class Estimates:
    """What the numbers of a recipe with open masks would have to be, where they are not what it says.

    Attributes
    ----------
    densities : mapping of ModelReference to tuple of float
        As the size of kept changes says, where the number kept bears it out, and as the number kept says.
    weights : mapping of ModelReference to tuple of float
    lambda_ : float or None
        A factor of lambda, where all changes are off by it.
    """

    densities: Mapping[ModelReference, tuple[float, ...]]
    weights: Mapping[ModelReference, tuple[float, ...]]
    lambda_: float | None

    @classmethod
    def of(cls, hypothesis: Hypothesis, found: Pooled) -> Estimates:
        """Read them from an explanation of some tensors."""
        recipe, base = hypothesis.recipe, hypothesis.recipe.base_model
        references = [item.model for item in recipe.models if item.model != base]
        if recipe.slices:
            references = [source.model for source in recipe.slices[0].sources if source.model != base]
        surprising = (np.abs(found.surprise) > SURPRISING) & (np.abs(found.kept - found.claimed) > KEPT)
        by_size = _density_by_size(found)
        agree = surprising & (np.abs(by_size - found.kept) <= np.maximum(AGREE, _error_kept(found)))
        rescaled = found.nominal > 1.0
        of_kept = np.where(surprising & rescaled, _size_at(found, found.kept), found.nominal)
        factors = np.where(agree, 1.0, found.ratios * found.nominal / of_kept)
        off = np.abs(factors - 1.0) > SURPRISING * found.ratio_errors + RATIO
        weights = _by_the_others(found) if found.divides else found.weights * factors
        off |= found.divides & (np.abs(weights - found.stated) > RATIO)
        common = len(factors) > 1 and bool(off.all()) and float(np.ptp(factors)) < ALIKE and not found.divides
        return cls(
            {
                reference: (size, kept) if both else (kept,)
                for reference, size, kept, both, is_off in _rows(references, by_size, found.kept, agree, surprising)
                if is_off
            },
            {reference: (weight,) for reference, weight, is_off in _rows(references, weights, off) if is_off},
            float(np.mean(factors)) if common else None,
        )

    def of_claim(self, claim: Claim) -> tuple[float, ...]:
        """Return what a claimed number may have to be; empty where it is what it should be, or nothing is known."""
        name = claim.parameter.name
        if name == "lambda":
            return () if self.lambda_ is None else (float(claim.value) * self.lambda_,)
        known = {"weight": self.weights, "density": self.densities}.get(name, {})
        if claim.owner is not None:
            return known.get(claim.owner, ())
        return tuple(np.mean([values[0] for values in known.values()], keepdims=True).tolist()) if known else ()


def _rows(references: Sequence[ModelReference], *columns: NDArray[Any]) -> Iterator[tuple[Any, ...]]:
    return zip(references, *(column.tolist() for column in columns), strict=False)


def _density_by_size(found: Pooled) -> FloatArray:
    """Return the densities that the size of kept changes says; NaN where nothing is rescaled.

    DELLA keeps large elements more often, so the size is one over a little more than the density.
    """
    more = 1.0 / found.nominal - found.claimed
    return np.where(found.nominal > 1.0, 1.0 / (found.nominal * found.ratios) - more, np.nan)


def _size_at(found: Pooled, density: FloatArray) -> FloatArray:
    """Return what kept changes are multiplied by at other densities."""
    return np.asarray(1.0 / np.maximum(density + 1.0 / found.nominal - found.claimed, SMALL))


def _error_kept(found: Pooled) -> FloatArray:
    """Return some standard deviations of the number kept."""
    return np.asarray(SURPRISING * np.abs(found.kept - found.claimed) / np.maximum(np.abs(found.surprise), SMALL))


def _by_the_others(found: Pooled) -> FloatArray:
    """Return each weight as the others say it, where weights divide and only their ratios matter."""
    ratios = found.weights / np.where(found.stated == 0.0, 1.0, found.stated)
    others = [np.delete(ratios, index) for index in range(len(ratios))]
    return np.asarray(found.weights / [float(np.median(rest)) if len(rest) else 1.0 for rest in others])


def _members(case: Case) -> Iterator[Finding]:
    """Try another fine-tune in a member's place, and a member less."""
    stands, names = case.hypothesis, case.names
    for model in stands.recipe.references:
        if model == stands.recipe.base_model:
            continue
        for name, candidate in case.candidates.items():
            text = f"member {names[model]}: the weights hold {name} in its place"
            yield Finding("member", text, names[model], name, _standing_for(stands, {model: candidate}))
        fewer = without(stands.recipe, model)
        if fewer is not None:
            yield _idle(names[model], replace(stands, recipe=fewer))


def _standing_for(stands: Hypothesis, models: Mapping[ModelReference, Model]) -> Hypothesis:
    return replace(stands, models={**stands.models, **models})


def _one_more(case: Case) -> Iterator[Finding]:
    """Try one member more, with the weight that it would need."""
    trials: dict[str, Trial] = {}
    for name, candidate in case.candidates.items():
        model = ModelReference(name)
        more = with_model(case.hypothesis.recipe, model)
        if more is None:
            return
        added = replace(_standing_for(case.hypothesis, {model: candidate}), recipe=more)
        claims = list_claims(more, added.method)
        weight = next((c for c in claims if c.owner == model and c.parameter.name == "weight"), None)
        if weight is None or added.open_masks:
            yield _added(name, added)
        else:
            trials[name] = Trial(case.probes.first(1), added, weight)
    names = {trial: name for name, trial in trials.items()}
    for trial, fit in fit_smooth(list(trials.values())):
        yield _added(names[trial], trial.put(fit.value))


def _added(name: str, hypothesis: Hypothesis) -> Finding:
    text = f"member {name}: the weights hold it, and the recipe does not name it"
    return Finding("member", text, "nothing", name, hypothesis)


def _truths(case: Case) -> Iterator[Finding]:
    """Try the other truth values."""
    for claim in list_claims(case.hypothesis.recipe, case.hypothesis.method):
        if not claim.is_number:
            says, found = (str(value).lower() for value in (bool(claim.value), not claim.value))
            stated = f"says nothing, which means {says}" if claim.default else f"says {says}"
            text = f"{claim.subject}: the recipe {stated}, the weights say {found}"
            changed = replace(case.hypothesis, recipe=claim.put(not claim.value))
            yield Finding(claim.parameter.name, text, says, found, changed)


def _types(case: Case) -> Iterator[Finding]:
    """Try other working types, with results in the type that the target stores."""
    stands = case.hypothesis
    stored = next(iter(case.probes.stored.values())).dtype.name
    says = _type_text(stands.recipe.dtype, stands.recipe.out_dtype)
    for dtype in ("bfloat16", "float16", "float32", None):
        out_dtype = None if storage_type(dtype) == stored else torch_type(stored)
        found = _type_text(dtype, out_dtype)
        if found != says:
            recipe = replace(stands.recipe, dtype=dtype, out_dtype=out_dtype)
            text = f"types: the recipe says {says}, the weights say {found}"
            yield Finding("dtype", text, says, found, replace(stands, recipe=recipe))


def _type_text(dtype: str | None, out_dtype: str | None) -> str:
    plain = [
        f"{name} {value.removeprefix('torch.')}"
        for name, value in (("dtype", dtype), ("out_dtype", out_dtype))
        if value
    ]
    return " and ".join(plain) or "no dtype"


def _methods(case: Case) -> Iterator[Finding]:
    """Try the other methods, with the same parameters."""
    stands = case.hypothesis
    for name, method in MERGEKIT.items():
        if name == stands.method.name:
            continue
        recipe = replace(stands.recipe, merge_method=name)
        text = f"method: the recipe says {stands.method.name}, the weights say {name}"
        yield Finding("method", text, stands.method.name, name, replace(stands, recipe=recipe, method=method))


def _bases(case: Case) -> Iterator[Finding]:
    """Try candidates for the base."""
    base = case.hypothesis.recipe.base_model
    if base is None:
        return
    for name, candidate in case.candidates.items():
        text = f"base: the recipe says {case.names[base]}, the weights say {name}"
        yield Finding("base", text, case.names[base], name, _standing_for(case.hypothesis, {base: candidate}))


def _exchanges(case: Case) -> Iterator[Finding]:
    """Try two models of the recipe in each other's place."""
    stands, names = case.hypothesis, case.names
    for first, second in exchanges(stands.recipe):
        swapped = {first: stands.models[second], second: stands.models[first]}
        text = f"{names[first]} and {names[second]}: the weights hold each in the other's place"
        says, found = f"{names[first]}, {names[second]}", f"{names[second]}, {names[first]}"
        yield Finding("member", text, says, found, _standing_for(stands, swapped))


def _together(case: Case, before: Judgement) -> tuple[Finding, ...]:
    """Fit several numbers at once; report those that had to change if that restores the tensors."""
    stands = case.hypothesis
    every = list_claims(stands.recipe, stands.method)
    claims = [claim for claim in every if claim.is_number and not claim.default and not claim.joint]
    values = _random_together(case, claims) if stands.open_masks else _smooth_together(case, claims)
    if not values:
        return ()
    changed = replace(stands, recipe=put_all(stands.recipe, stands.method, values))
    if _restored(case.probes, changed, before) is None:
        return ()
    by_subject = {claim.subject: claim for claim in claims}
    return tuple(
        replace(_number(stands, by_subject[subject], value), hypothesis=changed) for subject, value in values.items()
    )


def _random_together(case: Case, claims: Sequence[Claim]) -> dict[str, float]:
    found = case.pooled()
    if found is None:
        return {}
    estimates = Estimates.of(case.hypothesis, found)
    near = {claim.subject: (claim, estimates.of_claim(claim)) for claim in claims if claim.owner is not None}
    values = {subject: (claim, _decimals(known[0])[0]) for subject, (claim, known) in near.items() if known}
    return {subject: value for subject, (claim, value) in values.items() if value != float(claim.value)}


def _smooth_together(case: Case, claims: Sequence[Claim]) -> dict[str, float]:
    """Fit weights and the like together, then shorten one after the other."""
    smooth = [claim for claim in claims if is_smooth(claim)]
    found = fit_together(case.probes, case.hypothesis, smooth) if smooth else None
    if found is None:
        return {}
    stands = case.hypothesis
    values = {claim.subject: round(float(value), 3) for claim, value in zip(smooth, found, strict=True)}
    for claim, near in zip(smooth, found, strict=True):

        def share(value: float, subject: str = claim.subject) -> float:
            recipe = put_all(stands.recipe, stands.method, {**values, subject: value})
            return case.probes.first(2).share(replace(stands, recipe=recipe))

        fitted: Fitted = shortest(share, float(near))
        values[claim.subject] = fitted.value
    stated = {claim.subject: float(claim.value) for claim in smooth}
    return {subject: value for subject, value in values.items() if not np.isclose(value, stated[subject], rtol=1e-6)}

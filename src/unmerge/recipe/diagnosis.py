"""Which claim of a recipe is wrong: the one whose change makes the recipe make the target's tensors.

Claims are changed one at a time, on a few tensors: numbers, members, truth values, the method, types, the base. Only a
change that restores the tensors is reported. If none does, all numbers are fitted together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from unmerge.checkpoint.dtypes import FloatArray
from unmerge.merging.method import MergeMethod
from unmerge.merging.registry import MERGEKIT, MERGEKIT_TO_0_1_4
from unmerge.recipe.claims import Claim, exchanges, labels, list_claims, put_all, with_model, without
from unmerge.recipe.document import ModelReference, storage_type, torch_type
from unmerge.recipe.judging import SURPRISING, Judgement, explained, judge
from unmerge.recipe.plan import PlannedTensor
from unmerge.recipe.probes import Hypothesis, Probes
from unmerge.recipe.refit import Fitted, fit_number, fit_together, is_smooth, shortest
from unmerge.recipe.sources import Model
from unmerge.recipe.unseeded import Pooled

FIRST_LOOK = 0.99
"""A changed claim that makes less than this share of one tensor is not tried on the others."""
LOOKED_AT = 3
"""Numbers that are looked at closer: those whose best values make most elements."""
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
    """

    probes: Probes
    hypothesis: Hypothesis
    candidates: Mapping[str, Model]

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
    stages: tuple[Callable[[Case], Iterator[Finding]], ...] = (
        _machines, _numbers, _members, _truths, _types, _methods, _bases, _exchanges,
    )  # fmt: skip
    for stage in stages:
        restoring = [finding for finding in stage(case) if _restores(case.probes, finding.hypothesis, before)]
        if restoring:
            yield (_with_others(restoring),)
            yield from ((other,) for other in restoring[1:])
    together = _together(case, before)
    if together:
        yield together


def _with_others(restoring: Sequence[Finding]) -> Finding:
    """Return the first of several changes that each restore the tensors; its text names the others."""
    first, *others = restoring
    seen = dict.fromkeys(other.text for other in others if other.subject != first.subject)
    return replace(first, text=f"{first.text} (as well: {'; '.join(seen)})") if seen else first


def _restores(probes: Probes, hypothesis: Hypothesis, before: Judgement) -> bool:
    if judge(probes.first(1), hypothesis).share < FIRST_LOOK:
        return False
    return judge(probes, hypothesis).restores(before)


def _machines(case: Case) -> Iterator[Finding]:
    """Try what a recipe does not say: mergekit's version, and the machine's threads."""
    stands = case.hypothesis
    older = MERGEKIT_TO_0_1_4.get(stands.method.name)
    if older is not None and older is not stands.method:
        text = f"version: the merge was made by mergekit 0.1.4 or older, which computes {older.name} in another way"
        yield Finding("version", text, "", "0.1.4 or older", replace(stands, method=older))
    if stands.method.draws or not hangs_on_threads(
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


def _numbers(case: Case) -> Iterator[Finding]:
    """Try other numbers."""
    claims = [claim for claim in list_claims(case.hypothesis.recipe, case.hypothesis.method) if claim.is_number]
    if case.hypothesis.method.draws:
        yield from _random_numbers(case, claims)
        return
    fits = [(claim, fit_number(case.probes.first(2), case.hypothesis, claim)) for claim in claims]
    # Of numbers that do the same, the one whose decimal is shortest is likelier to be what was meant.
    best = sorted(
        ((claim, fit) for claim, fit in fits if fit is not None),
        key=lambda pair: (-round(pair[1].share, 4), len(f"{pair[1].value:.6g}")),
    )
    for claim, fit in best[:LOOKED_AT]:
        if not np.isclose(fit.value, float(claim.value), rtol=1e-6):
            yield _number(case.hypothesis, claim, fit.value)


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


def _random_numbers(case: Case, claims: Sequence[Claim]) -> Iterator[Finding]:
    """Try the numbers that masks and sizes of kept changes ask for."""
    found = explained(case.probes, case.hypothesis, fit_weights=True)
    if found is None:
        return
    estimates = Estimates.of(case.hypothesis, found)
    for claim in claims:
        near = estimates.of_claim(claim)
        if near is not None and abs(near - float(claim.value)) > 1e-3:
            yield from _nearest_numbers(case, claim, near)


def _nearest_numbers(case: Case, claim: Claim, near: float) -> Iterator[Finding]:
    """Yield the short decimals near an estimate, those first that leave less wrong of one tensor."""
    values = dict.fromkeys([round(near, 1), *(round(near + step / 100, 2) for step in (0, -1, 1))])
    tried = [_number(case.hypothesis, claim, value) for value in values if value != float(claim.value)]
    yield from sorted(tried, key=lambda finding: judge(case.probes.first(1), finding.hypothesis).wrong)[:2]


@dataclass(frozen=True, slots=True, eq=False)
class Estimates:
    """What the numbers of a recipe with random masks would have to be.

    Attributes
    ----------
    weights, densities : mapping of ModelReference to float
    lambda_ : float or None
        Where all changes are off by one factor.
    """

    weights: Mapping[ModelReference, float]
    densities: Mapping[ModelReference, float]
    lambda_: float | None

    @classmethod
    def of(cls, hypothesis: Hypothesis, found: Pooled) -> Estimates:
        """Read them from an explanation of some tensors."""
        recipe, base = hypothesis.recipe, hypothesis.recipe.base_model
        references = [item.model for item in recipe.models if item.model != base]
        if recipe.slices:
            references = [source.model for source in recipe.slices[0].sources if source.model != base]
        surprising = np.abs(found.surprise) > SURPRISING
        kept = np.where(surprising, found.kept, found.claimed)
        factors = found.ratios * np.where(surprising, kept / np.maximum(found.claimed, 1e-9), 1.0)
        spread = float(np.ptp(factors)) if len(factors) else 0.0
        common = float(np.mean(factors)) if len(factors) > 1 and spread < 0.02 else None
        weights = _by_the_others(found) if found.divides else found.weights * factors
        return cls(
            dict(zip(references, weights.tolist(), strict=False)),
            dict(zip(references, kept.tolist(), strict=False)),
            common,
        )

    def of_claim(self, claim: Claim) -> float | None:
        """Return what a claimed number would have to be; None where that is not known."""
        name = claim.parameter.name
        known = {"weight": self.weights, "density": self.densities}.get(name)
        if known is not None:
            values = list(known.values()) if claim.owner is None else [known.get(claim.owner)]
            numbers = [value for value in values if value is not None]
            return float(np.mean(numbers)) if numbers else None
        return None if name != "lambda" or self.lambda_ is None else float(claim.value) * self.lambda_


def _by_the_others(found: Pooled) -> FloatArray:
    """Return each weight as the others say it, where weights divide and only their ratios matter."""
    ratios = found.weights / np.where(found.stated == 0.0, 1.0, found.stated)
    others = [np.delete(ratios, index) for index in range(len(ratios))]
    return np.asarray(found.weights / [float(np.median(rest)) if len(rest) else 1.0 for rest in others])


def _members(case: Case) -> Iterator[Finding]:
    """Try another fine-tune in a member's place, a member less, and one more."""
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
    yield from _one_more(case)


def _standing_for(stands: Hypothesis, models: Mapping[ModelReference, Model]) -> Hypothesis:
    return replace(stands, models={**stands.models, **models})


def _one_more(case: Case) -> Iterator[Finding]:
    for name, candidate in case.candidates.items():
        model = ModelReference(name)
        more = with_model(case.hypothesis.recipe, model)
        if more is None:
            return
        added = replace(_standing_for(case.hypothesis, {model: candidate}), recipe=more)
        text = f"member {name}: the weights hold it, and the recipe does not name it"
        weight = next(
            (c for c in list_claims(more, added.method) if c.owner == model and c.parameter.name == "weight"), None
        )
        if weight is None or added.method.draws:
            yield Finding("member", text, "nothing", name, added)
            continue
        fit = fit_number(case.probes.first(1), added, weight)
        if fit is not None:
            yield Finding("member", text, "nothing", name, replace(added, recipe=weight.put(fit.value)))


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
    values = _random_together(case, claims) if stands.method.draws else _smooth_together(case, claims)
    if not values:
        return ()
    changed = replace(stands, recipe=put_all(stands.recipe, stands.method, values))
    if not _restores(case.probes, changed, before):
        return ()
    by_subject = {claim.subject: claim for claim in claims}
    return tuple(
        replace(_number(stands, by_subject[subject], value), hypothesis=changed) for subject, value in values.items()
    )


def _random_together(case: Case, claims: Sequence[Claim]) -> dict[str, float]:
    found = explained(case.probes, case.hypothesis, fit_weights=True)
    if found is None:
        return {}
    estimates = Estimates.of(case.hypothesis, found)
    near = {claim.subject: (claim, estimates.of_claim(claim)) for claim in claims if claim.owner is not None}
    return {
        subject: round(value, 2)
        for subject, (claim, value) in near.items()
        if value is not None and abs(round(value, 2) - float(claim.value)) > 1e-6
    }


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

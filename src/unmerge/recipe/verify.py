"""Does a published recipe make these weights: its merge is made again and compared, and if it differs, why.

A merge without chance is compared bit by bit. One with random masks and no seed is compared with all masks that its
densities allow (`unmerge.recipe.unseeded`). Where tensors differ, claims are changed one at a time until one change
restores them (`unmerge.recipe.diagnosis`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from unmerge.alignment import Skipped, has_vocabulary_rows
from unmerge.checkpoint.reader import Checkpoint, open_checkpoint
from unmerge.checkpoint.source import Source, resolve
from unmerge.errors import CheckpointError, RecipeError, UnmergeError
from unmerge.merging.registry import MERGEKIT
from unmerge.recipe.claims import labels, list_claims
from unmerge.recipe.comparison import MOVED, Advance, Compared, Layout, compare_all, lay_out, with_plan
from unmerge.recipe.diagnosis import Case, Finding, diagnose
from unmerge.recipe.document import CARD, CONFIG, ModelReference, Recipe, read_recipe
from unmerge.recipe.judging import wrong_type
from unmerge.recipe.probes import Hypothesis, Probes, choose_probes
from unmerge.recipe.refit import fit_together, is_smooth
from unmerge.recipe.sources import Model, claimed_recipe, open_candidate, open_model
from unmerge.recipe.verification import (
    Counts,
    Masks,
    NotCompared,
    TensorDifference,
    Verdict,
    Verification,
    WrongClaim,
)

EVERY_TENSOR = 0.99
"""The share of its elements that every tensor must have right, if it has `MANY` or more to get right."""
MANY = 1000
LISTED = 10
"""Tensors that differ are listed up to this many, in the order in which mergekit makes them."""
NEAR = 0.004
"""Numbers that are fitted within this of what the recipe says agree with it."""
SMALL = 2.0
"""Differences of so many spacings may be rounding."""

Start = Callable[[str, int], Advance]
"""Begins to report progress: what is done, and of how many steps."""


def verify(
    target: str,
    recipe: str | Path | None = None,
    *,
    seed: int | None = None,
    candidates: Sequence[str] = (),
    start: Start | None = None,
) -> Verification:
    """Say whether a mergekit recipe makes these weights.

    Parameters
    ----------
    target : str
        The merged model: a folder, a file, or a Hub id.
    recipe : str or path, optional
        A recipe, or a folder or model card with one; by default the one beside the weights.
    seed : int, optional
        mergekit's ``--random-seed``, for methods that draw random masks. Without it masks are not compared; whether
        some masks make the weights is.
    candidates : sequence of str
        Other known fine-tunes, which a member may have been mistaken for: full models, or PEFT adapters on the
        recipe's base; ``NAME=PATH`` names one.
    start : callable, optional
        Begins to report progress.

    Raises
    ------
    SourceError, CheckpointError
        If the target or a candidate cannot be read.
    RecipeError
        If there is no recipe, or it cannot be read.
    """
    source = resolve(target)
    checkpoint = open_checkpoint(source.path)
    file = _recipe_file(source, recipe)
    found = read_recipe(file)
    return _Verifier(source, checkpoint, file, found, seed, tuple(candidates), start or _silent).run()


def _silent(what: str, steps: int) -> Advance:  # noqa: ARG001 - nobody listens
    return _unheard


def _unheard(count: int) -> None:
    """Take no notice of progress."""


def _recipe_file(source: Source, recipe: str | Path | None) -> Path:
    if recipe is not None:
        return Path(recipe).expanduser()
    found = claimed_recipe(source)
    if found is None:
        message = (
            f"{source.reference}: no recipe beside the weights ({CONFIG}, or a {CARD} with one); give it with --recipe"
        )
        raise RecipeError(message)
    return found


@dataclass(frozen=True, slots=True)
class _Answer:
    """A verdict, its reasons, and the comparison that it rests on if that is not the first one."""

    verdict: Verdict
    reason: str
    wrong: tuple[WrongClaim, ...] = ()
    notices: tuple[str, ...] = ()
    compared: Compared | None = None


class _CannotTellError(Exception):
    """Ends a verification; its message is the reason."""


@dataclass(frozen=True, slots=True, eq=False)
class _Verifier:
    """One verification; the steps are its methods, from the top down."""

    source: Source
    target: Checkpoint
    file: Path
    recipe: Recipe
    seed: int | None
    candidates: tuple[str, ...]
    start: Start

    def run(self) -> Verification:
        """Verify; what keeps from it becomes the verdict."""
        try:
            hypothesis = self._hypothesis()
            layout = self._layout(hypothesis)
            compared, layout = self._compared(hypothesis, layout)
        except _CannotTellError as reason:
            return self._document(_Answer("cannot tell", str(reason)), None, None)
        answer = self._answer(hypothesis, layout, compared)
        return self._document(answer, layout, answer.compared or compared)

    def _hypothesis(self) -> Hypothesis:
        method = MERGEKIT.get(self.recipe.merge_method)
        if method is None:
            known = ", ".join(sorted(MERGEKIT))
            raise _CannotTellError(f"merge method {self.recipe.merge_method!r} is not known; known are {known}")
        opened: dict[ModelReference, Model] = {}
        for reference in self.recipe.references:
            try:
                opened[reference] = open_model(reference, self.file.parent)
            except UnmergeError as error:
                raise _CannotTellError(f"member {reference} cannot be read: {error}") from error
        return Hypothesis(self.recipe, opened, method, seed=self.seed if method.draws else None)

    def _layout(self, hypothesis: Hypothesis) -> Layout:
        try:
            return lay_out(hypothesis, self.target)
        except RecipeError as error:
            raise _CannotTellError(f"mergekit 0.1.5 makes nothing of this recipe: {error}") from error

    def _compared(self, hypothesis: Hypothesis, layout: Layout) -> tuple[Compared, Layout]:
        """Compare all tensors; set those aside whose rows a tokenizer moved."""
        try:
            compared = compare_all(hypothesis, layout, hypothesis.seed, self.start("comparing", len(layout.stored)))
        except RecipeError as error:
            raise _CannotTellError(str(error)) from error
        if not self.recipe.aligns_vocabularies:
            return compared, layout
        moved = {name for name in compared.wrong if has_vocabulary_rows(name)}
        return compared.without(moved), _set_aside(layout, moved)

    def _answer(self, hypothesis: Hypothesis, layout: Layout, compared: Compared) -> _Answer:
        if layout.faults:
            text = "; ".join(layout.faults)
            return _Answer("fail", text, (_claim("tensors", text),))
        if not layout.stored:
            return _Answer("cannot tell", "no tensor could be compared")
        judgement = compared.judgement
        if not judgement.looked_at and not judgement.unlikely:
            return _Answer("cannot tell", "the recipe's models are all equal, so it decides nothing")
        # Masks explain to some digits only, so a few elements say nothing; a bit that differs may have a reason.
        if judgement.holds and (compared.explanations or judgement.unequal == 0):
            return _passed(layout, compared)
        return self._diagnosed(hypothesis, layout, compared)

    def _diagnosed(self, hypothesis: Hypothesis, layout: Layout, compared: Compared) -> _Answer:
        """Look for the claim that is wrong, and answer."""
        probes = choose_probes(compared.telling, layout.stored)
        advance = self.start("looking for the wrong claim", 1)
        case = Case(probes, hypothesis, self._opened_candidates(hypothesis), compared.pooled)
        for findings in diagnose(case) if probes.stored else ():
            answer = self._judged_again(findings, layout, compared)
            if answer is not None:
                return answer
        advance(1)
        return _undiagnosed(probes, hypothesis, layout, compared)

    def _opened_candidates(self, hypothesis: Hypothesis) -> dict[str, Model]:
        base = None if self.recipe.base_model is None else hypothesis.models[self.recipe.base_model]
        opened = [open_candidate(text, base) for text in self.candidates]
        member = next(iter(hypothesis.models.values()))
        for model in opened:
            other = _unlike(member, model)
            if other:
                message = f"candidate {model.name}: its tensor {other!r} is not like the recipe's: another architecture"
                raise CheckpointError(message)
        return {model.name: model for model in opened}

    def _judged_again(self, findings: tuple[Finding, ...], layout: Layout, before: Compared) -> _Answer | None:
        """Compare everything with the changed recipe, and answer if that restores the target."""
        changed = findings[0].hypothesis
        advance = self.start("comparing with the changed recipe", len(layout.stored))
        again = compare_all(changed, with_plan(layout, changed), changed.seed, advance)
        if not again.judgement.restores(before.judgement):
            return None
        if findings[0].excuses:
            return _passed(layout, again, (findings[0].text,))
        share = again.judgement.share
        wrong = tuple(_claim(item.claim, item.text, item.says, item.found, share) for item in findings)
        return _Answer("fail", "; ".join(item.text for item in findings), wrong)

    def _document(self, answer: _Answer, layout: Layout | None, compared: Compared | None) -> Verification:
        skipped = () if layout is None else layout.not_compared
        return Verification(
            target=self.source.reference,
            recipe=str(self.file),
            method=self.recipe.merge_method,
            verdict=answer.verdict,
            reason=answer.reason,
            wrong_claims=answer.wrong,
            counts=None if compared is None else _counts(compared),
            differences=() if compared is None else _differences(compared),
            masks=() if compared is None else _masks(compared, self.recipe),
            not_compared=tuple(NotCompared(name=item.name, reason=item.reason) for item in skipped),
            notices=(*answer.notices, *self._notices(layout)),
        )

    def _notices(self, layout: Layout | None) -> tuple[str, ...]:
        method = MERGEKIT.get(self.recipe.merge_method)
        found = list(self.target.notices)
        if method is not None:
            known = {parameter.name for parameter in method.parameters}
            stated = {name for settings in _all_settings(self.recipe) for name in settings}
            found += [f"mergekit ignores parameter {name} of {method.name}" for name in sorted(stated - known)]
        if layout is not None and self.seed is not None and layout.plan.method.draws and not layout.plan.ordered:
            found.append("the recipe uses layers twice, so the order in which masks are drawn is not known")
        return tuple(found)


def _set_aside(layout: Layout, moved: set[str]) -> Layout:
    skipped = tuple(Skipped(name, "target", MOVED) for name in sorted(moved))
    stored = {name: tensor for name, tensor in layout.stored.items() if name not in moved}
    return replace(layout, stored=stored, not_compared=(*layout.not_compared, *skipped))


def _unlike(member: Model, candidate: Model) -> str:
    """Return the first tensor that a candidate does not have in a member's shape; empty if it has all."""
    shapes = {name: tensor.shape for name, tensor in candidate.tensors.items()}
    return next((name for name, tensor in member.tensors.items() if shapes.get(name) != tensor.shape), "")


def _passed(layout: Layout, compared: Compared, notices: tuple[str, ...] = ()) -> _Answer:
    moved = next((item.name for item in layout.not_compared if item.reason == MOVED), None)
    if moved is not None:
        reason = f"all else is as the recipe makes it, but the tokenizer moved the rows of {moved}"
        return _Answer("cannot tell", reason, notices=notices, compared=compared)
    return _Answer("pass", _success(compared), notices=notices, compared=compared)


def _success(compared: Compared) -> str:
    judgement = compared.judgement
    if compared.explanations:
        return (
            f"{100.0 * judgement.share:.2f} % of {judgement.looked_at:,} elements looked at are what masks of the "
            "claimed densities make, and as many are kept as claimed"
        )
    if judgement.wrong:
        return f"{100.0 * judgement.share:.3f} % of the {judgement.looked_at:,} elements that it decides are equal"
    free = sum(match.free for match in compared.matches)
    ties = f" ({free:,} elements are left to how equal ones are sorted)" if free else ""
    return f"every element is as the recipe makes it{ties}"


def _undiagnosed(probes: Probes, hypothesis: Hypothesis, layout: Layout, compared: Compared) -> _Answer:
    """Answer where no changed claim restores the tensors."""
    judgement = compared.judgement
    if judgement.holds and _every_tensor(compared):
        return _passed(layout, compared)
    wrong = wrong_type(compared.matches)
    if wrong is not None:
        text = f"types: the recipe makes {wrong.made}, the weights are stored as {wrong.stored} (first: {wrong.name})"
        return _Answer("fail", text, (_claim("dtype", text, wrong.made, wrong.stored),))
    share = f"{100.0 * judgement.share:.2f} % of the elements that it decides are as the recipe makes them"
    if compared.matches and probes.stored and _is_rounding(probes, hypothesis, compared):
        reason = (
            f"its numbers fit, but not its bits: {share}, the rest is off by {SMALL:g} spacings at most, as in a "
            "merge by another version of mergekit or on another machine"
        )
        return _Answer("cannot tell", reason)
    return _Answer("fail", f"{share}, and no single claim that was changed restores the rest")


def _every_tensor(compared: Compared) -> bool:
    matches = [match for match in compared.matches if match.active >= MANY]
    return all(match.unequal <= (1.0 - EVERY_TENSOR) * match.active for match in matches)


def _is_rounding(probes: Probes, hypothesis: Hypothesis, compared: Compared) -> bool:
    """Tell whether numbers fitted to the weights are those of the recipe, and all differences are small."""
    if any(match.largest > SMALL for match in compared.matches):
        return False
    claims = [claim for claim in list_claims(hypothesis.recipe, hypothesis.method) if is_smooth(claim) and claim.owner]
    if not claims:
        return True
    found = fit_together(probes, hypothesis, claims)
    return found is not None and bool(np.all(np.abs(found - [float(claim.value) for claim in claims]) <= NEAR))


def _claim(claim: str, text: str, says: str = "", found: str = "", restored: float | None = None) -> WrongClaim:
    return WrongClaim(claim=claim, text=text, says=says, found=found, restored=restored)


def _all_settings(recipe: Recipe) -> list[Mapping[str, object]]:
    parts = [part.parameters for part in recipe.slices]
    sources = [source.parameters for part in recipe.slices for source in part.sources]
    return [recipe.parameters, *(item.parameters for item in recipe.models), *parts, *sources]


def _counts(compared: Compared) -> Counts:
    judgement = compared.judgement
    sizes = [match.elements for match in compared.matches] + [item.elements for item in compared.explanations]
    return Counts(
        tensors=len(sizes),
        elements=sum(sizes),
        looked_at=judgement.looked_at,
        wrong=judgement.wrong,
        free=sum(match.free for match in compared.matches),
    )


def _differences(compared: Compared) -> tuple[TensorDifference, ...]:
    bits = [
        TensorDifference(
            name=match.name,
            elements=match.elements,
            looked_at=match.active,
            wrong=match.unequal,
            largest=match.largest if np.isfinite(match.largest) else None,
        )
        for match in compared.matches
        if match.unequal
    ]
    masks = [
        TensorDifference(
            name=item.name,
            elements=item.elements,
            looked_at=item.contested + item.beyond,
            wrong=item.wrong,
            largest=None,
        )
        for item in compared.explanations
        if item.wrong
    ]
    return tuple((*bits, *masks)[:LISTED])


def _masks(compared: Compared, recipe: Recipe) -> tuple[Masks, ...]:
    found = compared.pooled
    if found is None:
        return ()
    names = labels(recipe)
    members = [names[reference] for reference in recipe.references if reference != recipe.base_model]
    errors = np.where(np.isfinite(found.ratio_errors), found.ratio_errors, 0.0)
    columns = (found.claimed, found.kept, found.surprise, found.ratios, errors)
    return tuple(
        Masks(model=name, claimed=claimed, kept=kept, surprise=surprise, size=size, size_error=error)
        for name, claimed, kept, surprise, size, error in zip(
            members, *(column.tolist() for column in columns), strict=False
        )
    )

"""Whether a hypothesis makes a target: bit for bit, or as one draw of the random masks that it speaks of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unmerge.errors import RecipeError
from unmerge.recipe.probes import Hypothesis, Probes
from unmerge.recipe.replay import TensorMatch
from unmerge.recipe.unseeded import SAMPLE, Explanation, Pooled, explain, pooled

ENOUGH = 0.999
"""The share of elements that must be as the recipe makes them."""
BETTER = 0.1
"""A changed recipe must leave less than this share of the elements unequal that the recipe as it stands leaves."""
SURPRISING = 5.0
"""Standard deviations from which on chance is no longer taken for an excuse."""
GLANCE = SAMPLE // 8
"""Outcomes that a first look takes of a tensor."""
TYPE = "the stored type"
KEPT = 0.01
RATIO = 0.004
"""Differences that are smaller than these are let pass, however sure they are: probabilities, relative sizes."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """How well a hypothesis makes some tensors of a target.

    Attributes
    ----------
    looked_at : int
        Elements in which there is something to make.
    wrong : int
        Of these, those that the hypothesis does not make.
    unequal : int
        Those that differ, also where equal elements at a threshold may be kept or dropped.
    unlikely : tuple of str
        What does not go with the distribution that the hypothesis speaks of, or with the type that it makes.
    """

    looked_at: int
    wrong: int
    unequal: int
    unlikely: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """The share of elements that are made; all, where there is nothing to make."""
        return 1.0 - self.wrong / max(1, self.looked_at)

    @property
    def holds(self) -> bool:
        """Whether the hypothesis made them, as far as these tensors tell."""
        return self.share >= ENOUGH and not self.unlikely

    def restores(self, before: Judgement) -> bool:
        """Tell whether this is the judgement of what made the tensors, and another one's not."""
        return self.holds and (bool(before.unlikely) or self.unequal <= BETTER * before.unequal)


_NOTHING = Judgement(1, 1, 1)


def judge(probes: Probes, hypothesis: Hypothesis) -> Judgement:
    """Judge a hypothesis; one that makes nothing makes everything wrong."""
    if hypothesis.open_masks:
        found = explained(probes, hypothesis)
        return _NOTHING if found is None else of_explanation(found)
    matches = probes.matches(hypothesis)
    return of_matches(matches) if matches else _NOTHING


def of_matches(matches: Sequence[TensorMatch]) -> Judgement:
    """Judge tensors that were compared bit by bit."""
    return Judgement(
        sum(match.active for match in matches),
        sum(match.unequal for match in matches),
        sum(match.elements - match.equal for match in matches),
        (TYPE,) if wrong_type(matches) is not None else (),
    )


def wrong_type(matches: Sequence[TensorMatch]) -> TensorMatch | None:
    """Return a tensor that is stored in a type which the hypothesis does not make; None if there is none."""
    # Some methods make float32 of half-precision tensors, and leave tensors that they do not change on the old grid.
    made = {match.made for match in matches}
    return next((match for match in matches if match.stored not in made), None)


def of_explanation(found: Pooled) -> Judgement:
    """Judge tensors that were explained by random masks."""
    wrong = found.contested - found.explained + found.beyond
    return Judgement(found.contested + found.beyond, wrong, wrong, tuple(_unlikely(found)))


def _unlikely(found: Pooled) -> list[str]:
    away = np.abs(found.kept - found.claimed)
    density = (np.abs(found.surprise) > SURPRISING) & (away > KEPT)
    size = np.abs(found.ratios - 1.0) > SURPRISING * found.ratio_errors + RATIO
    slope = np.abs(found.slope_surprise) > SURPRISING
    named = (("the share of elements kept", density), ("the size of kept changes", size), ("epsilon", slope))
    return [name for name, off in named if off.any()]


def glance(probes: Probes, hypothesis: Hypothesis) -> float:
    """Return the share of a few elements that masks explain; 0 where nothing can be made of the hypothesis."""
    found = explained(probes, hypothesis, sample=GLANCE)
    return 0.0 if found is None else of_explanation(found).share


def explained(
    probes: Probes, hypothesis: Hypothesis, *, fit_weights: bool = False, sample: int = SAMPLE
) -> Pooled | None:
    """Explain probes by random masks; None where that cannot be done."""
    try:
        found = [
            explain(
                hypothesis.method.name, inputs, hypothesis.recipe.out_dtype, stored, probes.values(stored),
                fit_weights=fit_weights, sample=sample,
            )
            for stored, inputs in probes.inputs(hypothesis)
        ]  # fmt: skip
    except RecipeError:
        return None
    useful = [item for item in found if isinstance(item, Explanation)]
    return pooled(useful) if useful else None

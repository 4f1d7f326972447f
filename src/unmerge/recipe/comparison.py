"""A whole target compared with what a recipe makes, one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from unmerge.alignment import HEAD, Skipped, has_vocabulary_rows
from unmerge.checkpoint.reader import Checkpoint
from unmerge.checkpoint.tensor import Tensor
from unmerge.errors import RecipeError
from unmerge.merging.arithmetic import Arithmetic
from unmerge.merging.draws import TorchDraws
from unmerge.recipe.judging import ENOUGH, Judgement, of_explanation, of_matches
from unmerge.recipe.making import load_inputs
from unmerge.recipe.outcomes import MAX_FREE
from unmerge.recipe.plan import Plan, PlannedTensor, plan
from unmerge.recipe.probes import Hypothesis, Telling
from unmerge.recipe.replay import TensorMatch, common_rows, replay
from unmerge.recipe.sources import load
from unmerge.recipe.unseeded import Explanation, Pooled, explain, pooled

_BUFFER = re.compile(r"(?:inv_freq|masked_bias|attn\.bias|position_ids)$")
_TIED = "tied to the input embedding, and not stored by the target"
MOVED = "the tokenizer moved its rows"
"""Why a tensor of token rows is not compared."""
Advance = Callable[[int], None]
"""Told how many tensors are done."""


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Which tensors of a recipe can be compared with the target's.

    Attributes
    ----------
    plan : Plan
        Of all tensors that the recipe makes.
    stored : mapping of str to Tensor
        The target's tensors that can be compared.
    not_compared : tuple of Skipped
        What cannot, for a reason that is nobody's fault.
    faults : tuple of str
        What the target has and the recipe does not make, or the other way round.
    """

    plan: Plan
    stored: dict[str, Tensor]
    not_compared: tuple[Skipped, ...]
    faults: tuple[str, ...]


def lay_out(hypothesis: Hypothesis, target: Checkpoint) -> Layout:
    """Put the tensors that a recipe makes and those of a target side by side.

    Raises
    ------
    RecipeError
        If nothing can be made of the recipe.
    """
    names = {model: found.tensors.keys() for model, found in hypothesis.models.items()}
    planned = plan(hypothesis.recipe, hypothesis.method, names)
    not_compared = [Skipped(item.name, "target", f"stored as {item.dtype}") for item in target.unread]
    lacking: list[str] = []
    misshapen: list[str] = []
    stored: dict[str, Tensor] = {}
    for tensor in planned.tensors:
        found = target.tensors.get(tensor.name)
        if found is None:
            excuse = _excuse(tensor.name, target)
            (not_compared.append(Skipped(tensor.name, "target", excuse)) if excuse else lacking.append(tensor.name))
        elif _fits(hypothesis, tensor, found):
            stored[tensor.name] = found
        elif has_vocabulary_rows(tensor.name) and hypothesis.recipe.aligns_vocabularies:
            not_compared.append(Skipped(tensor.name, "target", MOVED))
        else:
            misshapen.append(tensor.name)
    made = {tensor.name for tensor in planned.tensors}
    extra = sorted(name for name in target.tensors if name not in made and not _BUFFER.search(name))
    faults = [*_said(lacking, "lacks", "the recipe makes"), *_said(extra, "holds", "the recipe does not make")]
    faults += _said(misshapen, "has another shape of", "the recipe makes")
    return Layout(planned, stored, tuple(not_compared), tuple(faults))


def _excuse(name: str, target: Checkpoint) -> str:
    if name == HEAD and target.ties_embeddings:
        return _TIED
    return "a buffer, which mergekit does not write" if _BUFFER.search(name) else ""


def _fits(hypothesis: Hypothesis, tensor: PlannedTensor, found: Tensor) -> bool:
    """Tell whether all inputs have the target's shape, or more rows of tokens than it has."""
    rows = common_rows(found)
    shapes = [hypothesis.models[item.model].tensors[item.stored].shape for item in tensor.inputs]
    cut = [shape if rows is None or not shape else (min(rows, shape[0]), *shape[1:]) for shape in shapes]
    return all(shape == found.shape for shape in cut)


def _said(names: list[str], verb: str, of_which: str) -> list[str]:
    if not names:
        return []
    count = f"{len(names)} tensors" if len(names) > 1 else "a tensor"
    return [f"the target {verb} {count} that {of_which} (first: {names[0]})"]


@dataclass(frozen=True, slots=True, eq=False)
class Compared:
    """A target compared with what a hypothesis makes.

    Attributes
    ----------
    matches : tuple of TensorMatch
        Bit by bit; empty for random masks without a seed.
    explanations : tuple of Explanation
        By random masks; empty where bits are compared.
    """

    matches: tuple[TensorMatch, ...] = ()
    explanations: tuple[Explanation, ...] = ()

    @property
    def pooled(self) -> Pooled | None:
        """All explanations together."""
        return pooled(self.explanations) if self.explanations else None

    @property
    def judgement(self) -> Judgement:
        """The judgement over all tensors."""
        found = self.pooled
        return of_matches(self.matches) if found is None else of_explanation(found)

    @property
    def wrong(self) -> set[str]:
        """The tensors with elements that the hypothesis does not make."""
        bits = {match.name for match in self.matches if match.unequal}
        return bits | {item.name for item in self.explanations if item.wrong}

    @property
    def telling(self) -> list[Telling]:
        """What each tensor says of what is wrong."""
        if self.matches:
            # Where the models are equal, a last bit may be wrong, but does not say why.
            counts = [[getattr(match, name) for match in self.matches] for name in ("telling", "unequal", "active")]
            chosen = next((count for count in counts if any(count)), counts[0])
            return [
                Telling(match.name, match.elements, wrong) for match, wrong in zip(self.matches, chosen, strict=True)
            ]
        if self.judgement.share < ENOUGH:
            return [Telling(item.name, item.elements, item.wrong) for item in self.explanations]
        # Where all elements are explained, the distribution is wrong, and all tensors with masks say so.
        return [Telling(item.name, item.elements, item.contested) for item in self.explanations]

    def without(self, names: set[str]) -> Compared:
        """Return the same without some tensors."""
        return Compared(
            tuple(match for match in self.matches if match.name not in names),
            tuple(item for item in self.explanations if item.name not in names),
        )


def compare_all(hypothesis: Hypothesis, layout: Layout, seed: int | None, advance: Advance) -> Compared:
    """Compare all tensors.

    Parameters
    ----------
    hypothesis : Hypothesis
    layout : Layout
        Of the hypothesis.
    seed : int or None
        Of the random masks; None compares with all masks.
    advance : callable
        Told of progress.

    Raises
    ------
    RecipeError
        If the method makes nothing of its inputs, or there are too many models with random masks and no seed.
    """
    if hypothesis.method.draws and seed is None:
        return Compared(explanations=tuple(_explained(hypothesis, layout, advance)))
    draws = TorchDraws(seed) if hypothesis.method.draws and seed is not None else None
    made = replay(hypothesis.recipe, layout.plan, hypothesis.models, layout.stored, draws, hypothesis.threads)
    return Compared(matches=tuple(_counted(made, advance)))


def _counted(matches: Iterator[TensorMatch], advance: Advance) -> Iterator[TensorMatch]:
    for match in matches:
        advance(1)
        yield match


def _explained(hypothesis: Hypothesis, layout: Layout, advance: Advance) -> Iterator[Explanation]:
    for tensor in layout.plan.tensors:
        stored = layout.stored.get(tensor.name)
        if stored is None:
            continue
        inputs = load_inputs(tensor, hypothesis.models, hypothesis.recipe.dtype, common_rows(stored))
        found = load(stored, Arithmetic(stored.dtype.name)).reshape(-1)
        explanation = explain(hypothesis.method.name, inputs, hypothesis.recipe.out_dtype, stored, found)
        if explanation is None:
            count = len(tensor.models)
            message = f"{count} models with random masks and no seed: expected 1 to {MAX_FREE}; give the seed"
            raise RecipeError(message)
        advance(1)
        yield explanation


def with_plan(layout: Layout, hypothesis: Hypothesis) -> Layout:
    """Return a layout with the plan of another hypothesis for the same target.

    Raises
    ------
    RecipeError
        If nothing can be made of it.
    """
    names = {model: found.tensors.keys() for model, found in hypothesis.models.items()}
    return replace(layout, plan=plan(hypothesis.recipe, hypothesis.method, names))

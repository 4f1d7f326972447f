"""Merges that copy: stacks of layers and mixtures of experts, recovered from where their tensors are found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from unmerge.alignment import layer_count
from unmerge.checkpoint.reader import Checkpoint, open_checkpoint
from unmerge.checkpoint.source import Source
from unmerge.dictionary import Atom, Base
from unmerge.recipe.adapted import merged_adapter
from unmerge.recipe.copies import may_be_copied
from unmerge.recipe.document import ModelReference, parse_recipe, to_yaml
from unmerge.recipe.experts import find_experts
from unmerge.recipe.layer_stack import LayerStack, find_layer_stack
from unmerge.recipe.proof import Member, Proof, Recovery

BASE = "base"
"""What the base is called among the known models."""


def reference_of_base(base: Base) -> ModelReference:
    """Return what a recipe calls the base."""
    return _of_source(base.source)


def _of_source(source: Source) -> ModelReference:
    if source.commit is None:
        return ModelReference(str(source.path))
    return ModelReference(source.reference.removeprefix("hf://").partition("@")[0], source.commit)


def reference_of_atom(atom: Atom, base: Base) -> ModelReference:
    """Return what a recipe calls an atom: an adapter is named after the base that it is on."""
    own = _of_source(atom.source)
    if atom.kind == "checkpoint":
        return own
    return replace(reference_of_base(base), adapter=own.path, adapter_revision=own.revision)


def checkpoints(base: Base, known: Mapping[str, Atom]) -> tuple[dict[str, Checkpoint], dict[str, str]]:
    """Return the base and all atoms as checkpoints, and what a recipe calls each."""
    models = {BASE: base.checkpoint}
    references = {BASE: str(reference_of_base(base))}
    for name, atom in known.items():
        adapted = atom.kind == "adapter"
        models[name] = merged_adapter(base.checkpoint, atom.vector) if adapted else open_checkpoint(atom.source.path)
        references[name] = str(reference_of_atom(atom, base))
    return models, references


def copied_whole(source: Source, goal: Checkpoint, base: Base, known: Mapping[str, Atom]) -> Recovery | None:
    """Return the recipe of a target whose every tensor is a copy; None where it is not, or is the base itself.

    Raises
    ------
    UnmergeError
        If the models cannot be read.
    """
    models, _ = checkpoints(base, known)
    if not may_be_copied(goal, models):
        return None
    found = from_layers(source, goal, base, known)
    alone = [member.name for member in found.members] == [BASE] and found.recipe is not None
    is_base = alone and not parse_recipe(str(found.recipe)).slices
    return None if is_base or found.exit_code != 0 else found


def from_layers(source: Source, goal: Checkpoint, base: Base, known: Mapping[str, Atom]) -> Recovery:
    """Take a target for a stack of known models' layers.

    Raises
    ------
    UnmergeError
        If the models cannot be compared with it.
    """
    models, references = checkpoints(base, known)
    stack = find_layer_stack(goal, models)
    runnable = all(part.model is not None for part in stack.slices)
    document = _document(stack, models, references) if runnable else None
    return Recovery(
        target=source.reference,
        base=base.source.reference,
        status="proven" if stack.exact else "partial",
        method="passthrough",
        members=tuple(
            Member(name=name, reference=references[name], parameters={}, coefficient=None) for name in stack.models
        ),
        recipe=None if document is None else to_yaml(parse_recipe(_dumped(document))),
        tool=None,
        seed=None,
        threads=None,
        proof=_proof(goal, stack.share),
        decoded=None,
        alike=(),
        unexplained=None,
        notices=stack.notices,
    )


def _document(stack: LayerStack, models: Mapping[str, Checkpoint], references: Mapping[str, str]) -> dict[str, object]:
    """Return the stack as a recipe: of one whole model where it is one, else of slices."""
    document = stack.to_recipe_document(references)
    (only, *others) = stack.models
    (first, *rest) = stack.slices
    depth = layer_count(models[only].tensors.keys())
    if others or rest or (first.first, first.stop) != (0, depth) or first.factors or _factors_of_ends(stack):
        return document
    whole = {key: value for key, value in document.items() if key not in {"slices", "base_model"}}
    return {**whole, "models": [{"model": references[only]}]}


def _factors_of_ends(stack: LayerStack) -> bool:
    return bool(stack.embeddings.factors or stack.output.factors)


def from_experts(source: Source, goal: Checkpoint, base: Base, known: Mapping[str, Atom]) -> Recovery:
    """Take a target for a mixture of experts.

    Raises
    ------
    UnmergeError
        If the models cannot be compared with it.
    """
    models, references = checkpoints(base, known)
    mixture = find_experts(goal, models)
    document = mixture.to_recipe_document(references)
    names = dict.fromkeys([mixture.base_model, *(expert.model for expert in mixture.experts)])
    return Recovery(
        target=source.reference,
        base=base.source.reference,
        status="partial" if mixture.unexplained else "proven",
        method="mergekit-moe",
        members=tuple(
            Member(name=name, reference=references[name], parameters={}, coefficient=None)
            for name in names
            if name is not None
        ),
        recipe=_dumped(document),
        tool=None,
        seed=None,
        threads=None,
        proof=_proof(goal, mixture.share),
        decoded=None,
        alike=(),
        unexplained=None,
        notices=mixture.notices,
    )


def _dumped(document: Mapping[str, object]) -> str:
    import yaml

    text: str = yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True)
    return text


def _proof(goal: Checkpoint, share: float) -> Proof:
    total = sum(math.prod(tensor.shape) for tensor in goal.tensors.values())
    return Proof(
        kind="bits",
        tensors=len(goal.tensors),
        elements=total,
        looked_at=total,
        wrong=total - math.floor(share * total),
        free=0,
        share=share,
        unlikely=(),
    )

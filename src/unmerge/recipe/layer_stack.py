"""A model that is a stack of other models' layers (a frankenmerge, mergekit's ``passthrough``), taken apart.

Each layer of the target goes to the layer of a known model that makes most of its parameters in every bit. Where
several do equally well, the stack with the fewest slices is chosen, and of those the one of the models that serve
most layers; the others are named. Depths need not agree.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unmerge.alignment import HEAD, LAYER, has_vocabulary_rows
from unmerge.checkpoint.reader import Checkpoint
from unmerge.errors import RecipeError
from unmerge.recipe.copies import Copy, Origin, find_copies

TORCH_TYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""What mergekit calls storage types."""
_POSITIONS = re.compile(r"(?:^|\.)(?:wpe|embed_positions|position_embeddings)\.")

Factors = Mapping[str, float]
"""What modules of a layer are multiplied with, by their names in it; the others are left as they are."""

_Place = tuple[str | None, int, tuple[tuple[str, float], ...]]


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive layers of the target, made of consecutive layers of one model.

    Attributes
    ----------
    model : str or None
        The model; None where no known model has anything like these layers.
    first, stop : int
        Its layers: from `first`, up to and without `stop`. Of the target where there is no model.
    start : int
        The first of these layers in the target.
    factors : mapping of str to float
        What modules are multiplied with.
    share : float
        Share of the parameters that this makes in every bit.
    distance : float
        Relative distance of the tensor that is farthest from what this makes; infinite where nothing is near.
    alternatives : tuple of (str, int)
        Other models, and the first of their layers, that would do equally well.
    """

    model: str | None
    first: int
    stop: int
    start: int
    factors: Factors
    share: float
    distance: float
    alternatives: tuple[tuple[str, int], ...] = ()

    @property
    def exact(self) -> bool:
        """Whether every bit is made."""
        return self.share == 1.0

    @property
    def layers(self) -> int:
        """How many layers these are."""
        return self.stop - self.first


@dataclass(frozen=True, slots=True)
class End:
    """Where the tensors before the layers, or those after them, are from.

    Attributes
    ----------
    model : str or None
        None where no known model has anything like them.
    factors : mapping of str to float
        What tensors are multiplied with, by name.
    share : float
        Share of the parameters that this makes in every bit; 1 where there are none.
    alternatives : tuple of str
        Other models that would do equally well.
    """

    model: str | None
    factors: Factors
    share: float
    alternatives: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerStack:
    """A model as a stack of layers of known models.

    Attributes
    ----------
    slices : tuple of Slice
        They cover the target's layers in order.
    embeddings : End
        What is before the layers.
    output : End
        What is after them: the last norm and the output layer.
    share : float
        Share of the target's parameters that the stack makes in every bit.
    unexplained : tuple of str
        The target's tensors that it does not make in every bit.
    dtype : str or None
        The torch name of the target's type, None where it has several.
    notices : tuple of str
        What a user should know.
    """

    slices: tuple[Slice, ...]
    embeddings: End
    output: End
    share: float
    unexplained: tuple[str, ...]
    dtype: str | None
    notices: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether the stack makes the target in every bit."""
        return not self.unexplained

    @property
    def models(self) -> tuple[str, ...]:
        """The models that it is made of, in the order of their first layers."""
        named = (self.embeddings.model, *(part.model for part in self.slices), self.output.model)
        return tuple(dict.fromkeys(name for name in named if name is not None))

    def to_recipe_document(self, references: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return the stack as a document of mergekit's YAML, which mergekit runs as it is.

        mergekit takes what is before the layers from the first slice's model, and what is after them from the last
        one's. A slice of no layers names another model for them.

        Parameters
        ----------
        references : mapping of str to str, optional
            What mergekit is to call each model: a folder, a Hub id, or ``MODEL+ADAPTER``. By default its name.

        Raises
        ------
        RecipeError
            If no known model has anything like some of the layers, or there are none.
        """
        self._check_known()
        parts = [(part.model, part.first, part.stop, _filters(part.factors, ".")) for part in self.slices]
        first, last = parts[0][0], parts[-1][0]
        if self.embeddings.model not in {None, first}:
            parts.insert(0, (self.embeddings.model, 0, 0, []))
        if self.output.model not in {None, last}:
            parts.append((self.output.model, 0, 0, []))
        parts[0][3].extend(_filters(self.embeddings.factors))
        parts[-1][3].extend(_filters(self.output.factors))
        named = {model: (references or {}).get(str(model), str(model)) for model, *_ in parts}
        document: dict[str, Any] = {
            "merge_method": "passthrough",
            # Its configuration and tokenizer are taken; without one, mergekit takes those of any of the models.
            "base_model": named[parts[0][0]],
            "slices": [
                {"sources": [_source(named[model], start, stop, filters)]} for model, start, stop, filters in parts
            ],
        }
        return document if self.dtype is None else {**document, "dtype": self.dtype}

    def _check_known(self) -> None:
        unknown = next((part.start for part in self.slices if part.model is None), None)
        if self.slices and unknown is None:
            return
        why = (
            f"no known model has anything like its layer {unknown}; give more models" if self.slices else "it has none"
        )
        raise RecipeError(f"this model cannot be written as a stack of layers: {why}")


def _filters(factors: Factors, before: str = "") -> list[dict[str, Any]]:
    # mergekit's filters are texts within names: in full, and for a module with the dot before it, they match one name.
    return [{"filter": before + name, "value": factor} for name, factor in factors.items()]


def _source(model: str, start: int, stop: int, filters: list[dict[str, Any]]) -> dict[str, Any]:
    source: dict[str, Any] = {"model": model, "layer_range": [start, stop]}
    return {**source, "parameters": {"scale": filters}} if filters else source


def find_layer_stack(target: Checkpoint, models: Mapping[str, Checkpoint]) -> LayerStack:
    """Find the stack of known models' layers that a model is nearest to.

    Parameters
    ----------
    target : Checkpoint
        Of any number of layers.
    models : mapping of str to Checkpoint
        The known models by name; see `find_copies`.

    Raises
    ------
    RecipeError, AlignmentError
        As `find_copies` and `layer_stack`.
    """
    return layer_stack(find_copies(target, models))


def layer_stack(origins: Mapping[str, Origin]) -> LayerStack:
    """Put a stack of layers together from what every tensor of a model is a copy of.

    Parameters
    ----------
    origins : mapping of str to Origin
        As `find_copies` returns them.

    Raises
    ------
    RecipeError
        If the model has several stacks of layers (an encoder and a decoder, say), or its layers are not numbered
        from 0 without gaps.
    """
    before, layers, after = _split(origins)
    types = {origin.dtype for origin in origins.values()}
    starts, ends = _choices(before, types), _choices(after, types)
    allowed = [_choices(layer, types) or [replace(_NOTHING, layer=number)] for number, layer in enumerate(layers)]
    path = _fewest_slices(allowed, starts, ends)
    slices = tuple(_slices(path, allowed, layers))
    embeddings = _preferred(starts, slices[0].model if slices else None)
    output = _preferred(ends, slices[-1].model if slices else None)
    made = {name for choice in (embeddings, *path, output) for name in choice.made}
    unexplained = tuple(name for name in origins if name not in made)
    missed = sum(origins[name].elements for name in unexplained)
    return LayerStack(
        slices=slices,
        embeddings=_end(embeddings, starts, before),
        output=_end(output, ends, after),
        share=1.0 - missed / max(1, sum(origin.elements for origin in origins.values())),
        unexplained=unexplained,
        dtype=TORCH_TYPES[next(iter(types))] if len(types) == 1 else None,
        notices=tuple(_notices(origins, unexplained, types)),
    )


@dataclass(frozen=True, slots=True)
class _Choice:
    """A source of the tensors of a layer, or of those of an end, and what it makes of them."""

    model: str | None
    layer: int
    factors: tuple[tuple[str, float], ...]
    made: frozenset[str]
    score: tuple[int, float]
    distance: float

    @property
    def place(self) -> _Place:
        """What two choices must have in common to be the same."""
        return self.model, self.layer, self.factors

    @property
    def place_before(self) -> _Place:
        """The place of the layer that comes before it in its model."""
        return self.model, self.layer - 1, self.factors


_NOTHING = _Choice(None, 0, (), frozenset(), (0, 0.0), math.inf)


def _split(origins: Mapping[str, Origin]) -> tuple[list[Origin], list[list[Origin]], list[Origin]]:
    """Split tensors into those before the layers, those of each layer, and those after them."""
    before: list[Origin] = []
    after: list[Origin] = []
    layers: dict[int, list[Origin]] = {}
    stacks: set[str] = set()
    for name, origin in origins.items():
        match = LAYER.search(name)
        if match is None:
            is_before = has_vocabulary_rows(name) and name != HEAD and "embed_out" not in name
            (before if is_before or _POSITIONS.search(name) else after).append(origin)
            continue
        stacks.add(name[: match.start("layer")])
        layers.setdefault(int(match["layer"]), []).append(origin)
    if len(stacks) > 1:
        message = (
            f"the model has layers under several names ({', '.join(sorted(stacks))}); expected one stack of layers"
        )
        raise RecipeError(message)
    missing = next((number for number in range(len(layers)) if number not in layers), None)
    if missing is not None:
        raise RecipeError(f"the model has {len(layers)} layers, but none with the number {missing}; expected no gaps")
    return before, [layers[number] for number in range(len(layers))], after


def _choices(origins: Sequence[Origin], types: Collection[str]) -> list[_Choice]:
    """Return the sources that make most of some tensors; several if they do equally well, none if nothing is near."""
    copies = [{(copy.model, copy.layer): copy for copy in (*origin.others, *origin.copies)} for origin in origins]
    places = dict.fromkeys(place for known in copies for place in known)
    found = [_choice(origins, [known.get(place) for known in copies], place, types) for place in places]
    best = max((choice.score for choice in found), default=None)
    return [choice for choice in found if choice.score == best]


def _choice(
    origins: Sequence[Origin],
    copies: Sequence[Copy | None],
    place: tuple[str, int | None],
    types: Collection[str],
) -> _Choice:
    factors: dict[str, float] = {}
    made: list[Origin] = []
    near = farthest = 0.0
    for origin, copy in zip(origins, copies, strict=True):
        distance = math.inf if copy is None else copy.distance
        if copy is None and origin.zero:
            factors[origin.role.module] = distance = 0.0
        elif copy is not None and copy.makes_every_bit:
            if copy.factor != 1.0:
                factors[origin.role.module] = copy.factor
            if _written(origin, copy, types):
                made.append(origin)
        near += origin.elements * max(0.0, 1.0 - distance**2)
        farthest = max(farthest, distance)
    score = sum(origin.elements for origin in made), near
    names = frozenset(origin.tensor for origin in made)
    return _Choice(place[0], place[1] or 0, tuple(sorted(factors.items())), names, score, farthest)


def _written(origin: Origin, copy: Copy, types: Collection[str]) -> bool:
    """Tell whether mergekit writes this copy: one type for all, and no output layer where it is tied."""
    return (len(types) == 1 or copy.dtype == origin.dtype) and (origin.tensor != HEAD or copy.tensor == HEAD)


@dataclass(frozen=True, slots=True)
class _Path:
    """The cheapest way to make the layers up to one: how many slices, and the ranks of their models added up."""

    cost: tuple[int, int]
    choice: _Choice
    earlier: _Path | None


def _fewest_slices(
    allowed: Sequence[Sequence[_Choice]], before: Sequence[_Choice], after: Sequence[_Choice]
) -> list[_Choice]:
    """Choose a source for each layer: as few slices as possible, and of models that serve many layers.

    A slice of no layers, for an end that is from another model than the layers beside it, counts like any other.
    """
    ranks = _ranks(allowed)
    paths: dict[_Place, _Path] = {}
    for choices in allowed:
        cheapest = min(paths.values(), key=lambda path: path.cost) if paths else None
        extended = {}
        for choice in choices:
            slices, added = cheapest.cost if cheapest else (_extra(choice, before), 0)
            options = [_Path((slices + 1, added + ranks[choice.model]), choice, cheapest)]
            if choice.place_before in paths:
                same = paths[choice.place_before]
                options.append(_Path(same.cost, choice, same))
            extended[choice.place] = min(options, key=lambda path: path.cost)
        paths = extended
    ends = ((path.cost[0] + _extra(path.choice, after), path.cost[1], path) for path in paths.values())
    best = min(ends, key=lambda end: end[:2], default=None)
    return [] if best is None else _walked(best[2])


def _ranks(allowed: Sequence[Sequence[_Choice]]) -> dict[str | None, int]:
    """Rank models by the number of layers that they may serve."""
    layers = Counter(name for choices in allowed for name in dict.fromkeys(choice.model for choice in choices))
    return {model: rank for rank, (model, _) in enumerate(layers.most_common())}


def _extra(choice: _Choice, ends: Sequence[_Choice]) -> int:
    """Return the number of slices of no layers that an end beside a layer takes."""
    return int(bool(ends) and choice.model not in {end.model for end in ends})


def _walked(path: _Path | None) -> list[_Choice]:
    choices: list[_Choice] = []
    while path is not None:
        choices.append(path.choice)
        path = path.earlier
    return choices[::-1]


def _slices(
    path: Sequence[_Choice], allowed: Sequence[Sequence[_Choice]], layers: Sequence[Sequence[Origin]]
) -> Iterator[Slice]:
    start = 0
    while start < len(path):
        stop = start + 1
        while stop < len(path) and path[stop].place_before == path[stop - 1].place:
            stop += 1
        first, run = path[start], path[start:stop]
        tensors = [origin for layer in layers[start:stop] for origin in layer]
        made = frozenset[str]().union(*(choice.made for choice in run))
        others = [choice for choice in allowed[start] if choice.place != first.place]
        yield Slice(
            model=first.model,
            first=first.layer,
            stop=first.layer + len(run),
            start=start,
            factors=dict(first.factors),
            share=_share(tensors, made),
            distance=max(choice.distance for choice in run),
            alternatives=tuple(
                (str(other.model), other.layer) for other in others if _serves(other, allowed[start:stop])
            ),
        )
        start = stop


def _serves(first: _Choice, allowed: Sequence[Sequence[_Choice]]) -> bool:
    """Tell whether the layers of a model from `first` on do for all of these layers."""
    places = ((first.model, first.layer + number, first.factors) for number in range(len(allowed)))
    return all(any(choice.place == place for choice in choices) for place, choices in zip(places, allowed, strict=True))


def _share(origins: Iterable[Origin], made: Collection[str]) -> float:
    sizes = [(origin.elements, origin.tensor in made) for origin in origins]
    return sum(size for size, is_made in sizes if is_made) / max(1, sum(size for size, _ in sizes))


def _preferred(choices: Sequence[_Choice], model: str | None) -> _Choice:
    return next((choice for choice in choices if choice.model == model), next(iter(choices), _NOTHING))


def _end(chosen: _Choice, choices: Sequence[_Choice], origins: Sequence[Origin]) -> End:
    others = tuple(str(choice.model) for choice in choices if choice.model != chosen.model)
    share = _share(origins, chosen.made) if origins else 1.0
    return End(chosen.model, dict(chosen.factors), share, others)


def _notices(origins: Mapping[str, Origin], unexplained: Sequence[str], types: Collection[str]) -> Iterator[str]:
    if len(types) > 1 and unexplained:
        yield f"tensors have several types ({', '.join(sorted(types))}); a recipe casts all to one, or none"
    if HEAD in unexplained and any(copy.tensor != HEAD for copy in origins[HEAD].copies):
        yield f"{HEAD} is a copy of an embedding that its model ties it to; mergekit leaves such an output layer out"
    zeros = [name for name in unexplained if origins[name].zero]
    if zeros:
        yield (
            f"{len(zeros)} tensors are all zero, without the signs that a factor of 0 would leave (first: {zeros[0]}); "
            "the recipe makes equal numbers there, not equal bits"
        )

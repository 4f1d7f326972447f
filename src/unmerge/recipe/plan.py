"""Which tensors a recipe makes, of which, with what parameters, and in what order.

Follows mergekit 0.1.5: ``mergekit.plan.MergePlanner`` and ``mergekit.graph.build_schedule``. Names of tensors decide
what a layer is, as in ``mergekit.architecture.auto``: the first number between two dots.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from unmerge.alignment import HEAD, Skipped, has_vocabulary_rows
from unmerge.errors import RecipeError
from unmerge.merging.method import MergeMethod, Value
from unmerge.recipe.document import ModelReference, Recipe, Settings, Slice, SliceInput
from unmerge.recipe.parameters import Place, resolve

_LAYER = re.compile(r"\.(\d+)\.")
_AFTER_LAYERS = re.compile(
    r"(?:^|\.)(?:(?:lm_head|output|output_layer|embed_out|score|classifier)\.|"
    r"(?:norm|norm_f|ln_f|final_layer_?norm|layer_norm)\.(?:weight|bias)$)"
)


@dataclass(frozen=True, slots=True)
class InputTensor:
    """A tensor that goes into a merge.

    Attributes
    ----------
    model : ModelReference
    name : str
        As the recipe's filters see it.
    stored : str
        As the model stores it: the embedding's name, where an output layer is tied to it.
    """

    model: ModelReference
    name: str
    stored: str


@dataclass(frozen=True, slots=True, eq=False)
class PlannedTensor:
    """A tensor that a recipe makes.

    Attributes
    ----------
    name : str
        Of the output.
    base : InputTensor or None
        The base's, for methods that set it apart.
    models : tuple of InputTensor
        The others, in the order of the recipe.
    of_models : mapping of str to tuple
        Parameters of each of `models`.
    shared : mapping of str to value
        Parameters of the tensor.
    """

    name: str
    base: InputTensor | None
    models: tuple[InputTensor, ...]
    of_models: Mapping[str, tuple[Value | None, ...]] = field(default_factory=dict)
    shared: Mapping[str, Value | None] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[InputTensor, ...]:
        """All that go in."""
        return self.models if self.base is None else (*self.models, self.base)

    @property
    def label(self) -> str:
        """What mergekit sorts its work by."""
        return max(item.stored for item in self.inputs)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What a recipe makes.

    Attributes
    ----------
    method : MergeMethod
    tensors : tuple of PlannedTensor
        In the order in which mergekit makes them, which decides what random masks they get.
    left_out : tuple of Skipped
        Tensors that some models have and that nothing can be made of, and why.
    """

    method: MergeMethod
    tensors: tuple[PlannedTensor, ...]
    left_out: tuple[Skipped, ...] = ()

    @property
    def ordered(self) -> bool:
        """Whether the order is known: mergekit makes tensors of one label in an order of its own."""
        return len({tensor.label for tensor in self.tensors}) == len(self.tensors)


def plan(
    recipe: Recipe,
    method: MergeMethod,
    names: Mapping[ModelReference, Collection[str]],
    only: Collection[str] | None = None,
) -> Plan:
    """Plan a merge.

    Parameters
    ----------
    recipe : Recipe
    method : MergeMethod
        The one that the recipe names.
    names : mapping of ModelReference to collection of str
        The tensors that each of the recipe's models stores.
    only : collection of str, optional
        Plan these tensors of the output and no others.

    Raises
    ------
    RecipeError
        If the recipe asks for layers that a model does not have, names one model twice, lacks the base that the method
        needs, or lacks a parameter.
    """
    stores = {model: _Store.of(stored) for model, stored in names.items()}
    planner = _Planner(recipe, method, stores, only)
    made = sorted(planner.tensors(), key=lambda tensor: tensor.label)
    return Plan(method, tuple(made), tuple(planner.left_out))


@dataclass(frozen=True, slots=True, eq=False)
class _Store:
    """The tensor names of one model: `layers` by (prefix, number), and those outside layers."""

    stored: frozenset[str]
    layers: Mapping[tuple[str, int], frozenset[str]]
    loose: frozenset[str]

    @classmethod
    def of(cls, stored: Collection[str]) -> _Store:
        layers: dict[tuple[str, int], set[str]] = {}
        loose: set[str] = set()
        for name in stored:
            match = _LAYER.search(name)
            if match:
                layers.setdefault((name[: match.start()], int(match[1])), set()).add(name[match.end() :])
            else:
                loose.add(name)
        return cls(frozenset(stored), {key: frozenset(rest) for key, rest in layers.items()}, frozenset(loose))

    @property
    def depths(self) -> dict[str, int]:
        """The number of layers of each stack."""
        depths: dict[str, int] = {}
        for prefix, number in self.layers:
            depths[prefix] = max(depths.get(prefix, 0), number + 1)
        return depths

    def find(self, name: str) -> str | None:
        """Return the name that a tensor is stored under; an output layer may be the embedding."""
        if name in self.stored:
            return name
        tied = (stored for stored in sorted(self.stored) if has_vocabulary_rows(stored))
        return next(tied, None) if name == HEAD else None


@dataclass(frozen=True, slots=True, eq=False)
class _Planner:
    recipe: Recipe
    method: MergeMethod
    stores: Mapping[ModelReference, _Store]
    only: Collection[str] | None = None
    left_out: list[Skipped] = field(default_factory=list)

    def tensors(self) -> Iterator[PlannedTensor]:
        stacks = self._stacks()
        slices = next(iter(stacks.values()), ()) or (self._whole(0),)
        yield from self._outside(slices)
        for prefix, parts in stacks.items():
            yield from self._stack(prefix, parts)

    def _stacks(self) -> dict[str, tuple[Slice, ...]]:
        """Return the slices of each stack of layers (most models have one), by the prefix of its names."""
        depths = {model: store.depths for model, store in self.stores.items()}
        prefixes = sorted({prefix for found in depths.values() for prefix in found})
        if not self.recipe.slices:
            return {prefix: (self._whole(self._depth(prefix, depths)),) for prefix in prefixes}
        if len(prefixes) != 1:
            message = f"the models have {len(prefixes)} stacks of layers; a recipe by slices needs models with one"
            raise RecipeError(message)
        return {prefixes[0]: self.recipe.slices}

    def _depth(self, prefix: str, depths: Mapping[ModelReference, Mapping[str, int]]) -> int:
        found = {str(model): depths[model].get(prefix, 0) for model in self.recipe.references}
        if len(set(found.values())) > 1:
            counts = ", ".join(f"{model} {count}" for model, count in found.items())
            raise RecipeError(f"the models have different numbers of layers {prefix}.*: {counts}")
        return next(iter(found.values()))

    def _whole(self, depth: int) -> Slice:
        """Return the one slice that a merge of whole models is; the base comes last, where it is not listed."""
        base = self.recipe.base_model
        sources = [SliceInput(item.model, 0, depth, item.parameters) for item in self.recipe.models]
        if base is not None and base not in {source.model for source in sources}:
            sources.append(SliceInput(base, 0, depth))
        return Slice(tuple(sources))

    def _outside(self, slices: tuple[Slice, ...]) -> Iterator[PlannedTensor]:
        """Plan the tensors outside layers: those before the layers as the first slice, those after as the last."""
        names = {name for part in slices for source in part.sources for name in self.stores[source.model].loose}
        for name in sorted(names):
            part = slices[-1] if _AFTER_LAYERS.search(name) else slices[0]
            # mergekit takes as many sources of the last slice as the first one has.
            sources = part.sources[: len(slices[0].sources)]
            yield from self._tensor(name, part, [(source, name) for source in sources], 0.0)

    def _stack(self, prefix: str, slices: tuple[Slice, ...]) -> Iterator[PlannedTensor]:
        layer = 0
        for part in slices:
            count = part.sources[0].layers
            for index in range(count):
                depth = index / (count - 1) if count > 1 else 1.0
                yield from self._layer(prefix, layer, part, index, depth)
                layer += 1

    def _layer(self, prefix: str, layer: int, part: Slice, index: int, depth: float) -> Iterator[PlannedTensor]:
        rests: set[str] = set()
        for source in part.sources:
            found = self.stores[source.model].layers.get((prefix, source.first + index))
            if found is None:
                depths = self.stores[source.model].depths
                message = f"the recipe takes layers {source.first} to {source.stop - 1} of {source.model}, "
                raise RecipeError(f"{message}which has {depths.get(prefix, 0)}")
            rests |= found
        for rest in sorted(rests):
            named = [(source, f"{prefix}.{source.first + index}.{rest}") for source in part.sources]
            yield from self._tensor(f"{prefix}.{layer}.{rest}", part, named, depth)

    def _tensor(
        self, name: str, part: Slice, named: list[tuple[SliceInput, str]], depth: float
    ) -> Iterator[PlannedTensor]:
        """Plan one tensor, or say why it is left out."""
        if self.only is not None and name not in self.only:
            return
        base_model = part.base_model or self.recipe.base_model
        self._check_models(part, base_model)
        apart = None if self.method.base == "ignored" else base_model
        base: InputTensor | None = None
        models: list[tuple[InputTensor, SliceInput]] = []
        for source, own in named:
            stored = self.stores[source.model].find(own)
            if stored is None:
                self.left_out.append(Skipped(name, str(source.model), "this model has no such tensor"))
            elif source.model == apart:
                base = InputTensor(source.model, own, stored)
            else:
                models.append((InputTensor(source.model, own, stored), source))
        # An optional tensor is merged from the models that have it; without the base there is nothing to build on.
        if (models or base) and (base is not None or self.method.base != "required"):
            yield self._with_parameters(name, part, base, models, depth)

    def _check_models(self, part: Slice, base: ModelReference | None) -> None:
        models = [source.model for source in part.sources]
        twice = next((model for model in models if models.count(model) > 1), None)
        if twice is not None:
            raise RecipeError(f"the recipe names {twice} twice among the models of one merge; mergekit refuses that")
        if self.method.base == "required" and base is None:
            raise RecipeError(f"merge method {self.method.name} needs a base_model; the recipe has none")
        if self.method.base != "ignored" and base is not None and base not in models:
            raise RecipeError(f"base_model {base} is not among the sources of a slice; mergekit refuses that")

    def _with_parameters(
        self,
        name: str,
        part: Slice,
        base: InputTensor | None,
        models: list[tuple[InputTensor, SliceInput]],
        depth: float,
    ) -> PlannedTensor:
        outer: tuple[Settings, ...] = (part.parameters, self.recipe.parameters)
        of_models = {
            parameter.name: tuple(
                resolve(parameter, (source.parameters, *outer), Place(tensor.name, depth)) for tensor, source in models
            )
            for parameter in self.method.parameters
            if parameter.scope == "model"
        }
        shared = {
            parameter.name: resolve(parameter, outer, Place(name, depth))
            for parameter in self.method.parameters
            if parameter.scope == "shared"
        }
        return PlannedTensor(name, base, tuple(tensor for tensor, _ in models), of_models, shared)

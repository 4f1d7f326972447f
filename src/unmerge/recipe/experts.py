"""A mixture of experts that mergekit-moe made of dense models, taken apart: which expert is whose MLP.

mergekit-moe copies the MLPs of each source into the experts, layer by layer (with noise and a factor where it is told
so), takes everything else from one base model, and makes the routers from prompts or at random: routers are from no
source. Layouts are those of ``mergekit.moe`` 0.1.5 and of its versions before fused experts.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from unmerge.checkpoint.dtypes import FloatArray
from unmerge.checkpoint.reader import Checkpoint
from unmerge.checkpoint.tensor import ArrayTensor, FileTensor, Tensor, values
from unmerge.errors import CheckpointError, RecipeError
from unmerge.recipe.copies import Copy, Origin, Role, find_copies, role_of
from unmerge.recipe.factor import simplest
from unmerge.recipe.layer_stack import TORCH_TYPES

GateMode = Literal["hidden", "cheap_embed", "random", "uniform_random"]
"""mergekit-moe's ways of making routers that their weights tell apart."""
SAME_NOISE = 0.1
"""Relative differences between tensors up to which noise is taken to be of one size."""

_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_EXPERT = re.compile(
    r"\.(?:mlp|block_sparse_moe)\.experts\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w[123])\.weight$"
)
_SHARED = re.compile(r"\.mlp\.shared_experts?\.(?P<part>gate_proj|up_proj|down_proj)\.weight$")
_ROUTER = re.compile(r"\.(?:mlp|block_sparse_moe)\.(?:gate|shared_expert_gate)\.weight$")
_FUSED = re.compile(r"\.experts\.(?P<parts>gate_up_proj|down_proj)$")
_SHARED_GATE = "shared_expert_gate.weight"
_SHARED_ONE, _AROUND = -1, -2
_STORED = 2.0**-6
_ERRORS = 3.0
_LOOKS = {
    "hidden": "they look like gate_mode hidden, made from prompts, which are not known; copy the target's",
    "cheap_embed": "they look like gate_mode cheap_embed, made from prompts, which are not known; copy the target's",
    "random": "they look random (gate_mode random); copy the target's, or find its seed",
    "uniform_random": "they look random (gate_mode uniform_random); copy the target's, or find its seed",
    None: "they are none that mergekit-moe makes, so they were trained; copy the target's",
}
_ARCHITECTURES = {"mixtral": "mixtral", "deepseek": "deepseek", "qwen2_moe": "qwen moe", "qwen3_moe": "qwen3"}


@dataclass(frozen=True, slots=True)
class Expert:
    """An expert, and the model whose MLPs it is.

    Attributes
    ----------
    number : int or None
        Its number; None for the shared expert.
    model : str or None
        The model that makes most of it, each layer from the same layer; None where nothing is near.
    share : float
        Share of its parameters that this makes in every bit.
    distance : float
        Relative distance of the tensor that is farthest from what this makes; infinite where nothing is near.
    residual_scale : float or None
        What the down projections are multiplied with.
    noise_scale : float or None
        Standard deviation, in weight units, of what was added to every tensor alike; estimated. None where nothing
        was, or something else than noise of one size.
    layers : tuple of ((str, int) or None)
        For each layer the model and the layer that make most of it; those of `model` where it does as well.
    alternatives : tuple of str
        Other models that would do equally well.
    """

    number: int | None
    model: str | None
    share: float
    distance: float
    residual_scale: float | None
    noise_scale: float | None
    layers: tuple[tuple[str, int] | None, ...]
    alternatives: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether every bit is made."""
        return self.share == 1.0


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """A mixture of experts as mergekit-moe would make it of known models.

    Attributes
    ----------
    architecture : str or None
        mergekit-moe's name of the layout; None where the configuration does not say.
    base_model : str or None
        The model that most of everything but experts and routers is from.
    base_share : float
        Share of those parameters that it makes in every bit.
    base_alternatives : tuple of str
        Other models that would do equally well.
    experts, shared_experts : tuple of Expert
    routers : tuple of str
        The routers' tensors: made by mergekit-moe, from no source.
    gate_mode : str or None
        How the routers look as if they were made; None for what no mode makes (routers that were trained).
    experts_per_token : int
    share : float
        Share of the target's parameters, without routers, that this makes in every bit.
    unexplained : tuple of str
        The target's tensors, without routers, that it does not make in every bit. An expert's are named as if it
        were stored by itself.
    dtype : str or None
        The torch name of the target's type, None where it has several.
    notices : tuple of str
        What a user should know.
    """

    architecture: str | None
    base_model: str | None
    base_share: float
    base_alternatives: tuple[str, ...]
    experts: tuple[Expert, ...]
    shared_experts: tuple[Expert, ...]
    routers: tuple[str, ...]
    gate_mode: GateMode | None
    experts_per_token: int
    share: float
    unexplained: tuple[str, ...]
    dtype: str | None
    notices: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether every bit but the routers' is made."""
        return not self.unexplained

    def to_recipe_document(self, references: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return the mixture as a document of mergekit-moe's YAML, which it runs as it is.

        The routers are asked for at random, because prompts cannot be read off weights: they are to be copied from
        the target afterwards (`routers`).

        Parameters
        ----------
        references : mapping of str to str, optional
            What mergekit is to call each model: a folder or a Hub id. By default its name.

        Raises
        ------
        RecipeError
            If an expert, or what is around the experts, is near no known model.
        """
        if self.base_model is None:
            raise RecipeError("no known model is near what is around the experts; give the base model")
        named = references or {}
        document: dict[str, Any] = {
            "base_model": named.get(self.base_model, self.base_model),
            "gate_mode": "random",
            "experts_per_token": self.experts_per_token,
            "experts": [_entry(expert, named) for expert in self.experts],
        }
        if self.shared_experts:
            document["shared_experts"] = [_entry(expert, named) for expert in self.shared_experts]
        more = {"dtype": self.dtype, "architecture": self.architecture}
        return document | {key: value for key, value in more.items() if value is not None}


def _entry(expert: Expert, named: Mapping[str, str]) -> dict[str, Any]:
    if expert.model is None:
        which = "the shared expert" if expert.number is None else f"expert {expert.number}"
        raise RecipeError(f"no known model is near {which}; give more models")
    entry = {"source_model": named.get(expert.model, expert.model)}
    more = {"noise_scale": expert.noise_scale, "residual_scale": expert.residual_scale}
    return entry | {key: value for key, value in more.items() if value is not None}


def has_experts(checkpoint: Checkpoint) -> bool:
    """Tell whether a model is a mixture of experts."""
    return any(_EXPERT.search(name) or ".mlp.experts." in name for name in checkpoint.tensors)


def find_experts(target: Checkpoint, models: Mapping[str, Checkpoint]) -> MixtureOfExperts:
    """Find the dense models that a mixture of experts was made of.

    Parameters
    ----------
    target : Checkpoint
        In one of mergekit-moe's layouts: experts one by one (``block_sparse_moe.experts.0.w1.weight``,
        ``mlp.experts.0.gate_proj.weight``) or fused (``mlp.experts.gate_up_proj``).
    models : mapping of str to Checkpoint
        The known dense models by name; see `find_copies`.

    Raises
    ------
    RecipeError
        If the target has no experts, or no model is given.
    AlignmentError
        If no model has tensors of the shapes of the target's.
    """
    whole = split_experts(target)
    routers = {name: tensor for name, tensor in whole.tensors.items() if _ROUTER.search(name)}
    others = {name: tensor for name, tensor in whole.tensors.items() if name not in routers}
    if not any(_EXPERT.search(name) for name in others):
        message = (
            f"{target.path}: no experts: expected tensors such as mlp.experts.0.gate_proj.weight, "
            "block_sparse_moe.experts.0.w1.weight or mlp.experts.gate_up_proj in its layers"
        )
        raise RecipeError(message)
    origins = find_copies(Checkpoint(target.path, others, target.config), models, role=dense_role)
    return _mixture(origins, routers, target.config)


def dense_role(name: str) -> Role:
    """Return the role that a tensor of a mixture of experts has in a dense model."""
    role = role_of(name)
    match = _EXPERT.search(name) or _SHARED.search(name)
    return Role(role.layer, f"mlp.{_PARTS.get(match['part'], match['part'])}.weight") if match else role


def split_experts(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint with fused experts as one tensor per expert and projection, as views: nothing is read.

    Fused tensors are (experts, outputs, inputs), the gate projections before the up projections, as transformers 5
    keeps them for Mixtral and Qwen.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        match = _FUSED.search(name)
        if match is None or len(tensor.shape) != 3:
            tensors[name] = tensor
            continue
        parts = ("gate_proj", "up_proj") if match["parts"] == "gate_up_proj" else ("down_proj",)
        count, rows = tensor.shape[0], tensor.shape[1] // len(parts)
        for expert in range(count):
            for place, part in enumerate(parts):
                own = f"{name[: match.start('parts')]}{expert}.{part}.weight"
                tensors[own] = _view(tensor, own, expert, (place * rows, (place + 1) * rows))
    return Checkpoint(checkpoint.path, tensors, checkpoint.config, checkpoint.unread, checkpoint.notices)


def _view(tensor: Tensor, name: str, expert: int, rows: tuple[int, int]) -> Tensor:
    """Return some rows of one matrix of a tensor of three dimensions."""
    _, height, width = tensor.shape
    shape = (rows[1] - rows[0], width)
    if isinstance(tensor, FileTensor):
        offset = tensor.offset + (expert * height + rows[0]) * width * tensor.dtype.itemsize
        return FileTensor(name, tensor.dtype, shape, tensor.origin, offset)
    if isinstance(tensor, ArrayTensor):
        return ArrayTensor(name, tensor.dtype, shape, tensor.origin, tensor.raw[expert, rows[0] : rows[1]])
    raise CheckpointError(f"{tensor.origin}: tensor {tensor.name!r} holds fused experts and cannot be split")


def _mixture(
    origins: Mapping[str, Origin], routers: Mapping[str, Tensor], config: Mapping[str, Any]
) -> MixtureOfExperts:
    groups: dict[int, list[Origin]] = {_AROUND: []}
    for origin in origins.values():
        groups.setdefault(_owner(origin.tensor), []).append(origin)
    around = groups.pop(_AROUND)
    architecture = _ARCHITECTURES.get(str(config.get("model_type")))
    base, *other_bases = _best_models(around, fills_biases=architecture == "qwen moe")
    found = {owner: _best_models(group) for owner, group in sorted(groups.items())}
    # Of models that do equally well: the base, then the one that may be most of the experts.
    served = Counter(fit.model for fits in found.values() for fit in fits)
    order = [base.model, *(model for model, _ in served.most_common())]
    experts = {owner: _expert(owner, groups[owner], fits, order) for owner, fits in found.items()}
    made = base.made.union(*(_preferred(fits, order).made for fits in found.values()))
    unexplained = tuple(name for name in origins if name not in made)
    missed = sum(origins[name].elements for name in unexplained)
    types = {origin.dtype for origin in origins.values()}
    mode = gate_mode([values(tensor) for name, tensor in routers.items() if not name.endswith(_SHARED_GATE)])
    return MixtureOfExperts(
        architecture=architecture,
        base_model=base.model,
        base_share=_share(around, base.made),
        base_alternatives=tuple(str(fit.model) for fit in other_bases),
        experts=tuple(expert for owner, expert in experts.items() if owner != _SHARED_ONE),
        shared_experts=tuple(expert for owner, expert in experts.items() if owner == _SHARED_ONE),
        routers=tuple(routers),
        gate_mode=mode,
        experts_per_token=int(config.get("num_experts_per_tok") or 2),
        share=1.0 - missed / sum(origin.elements for origin in origins.values()),
        unexplained=unexplained,
        dtype=TORCH_TYPES[next(iter(types))] if len(types) == 1 else None,
        notices=(f"{len(routers)} tensors of routers are from no source: {_LOOKS[mode]}",),
    )


def _owner(name: str) -> int:
    """Return the number of the expert that a tensor belongs to, or what stands for the shared one and for neither."""
    match = _EXPERT.search(name)
    if match:
        return int(match["expert"])
    return _SHARED_ONE if _SHARED.search(name) else _AROUND


@dataclass(frozen=True, slots=True)
class _Fit:
    """A model as the source of some tensors, each from the same layer."""

    model: str | None
    made: frozenset[str]
    score: tuple[int, float]
    residual_scale: float
    pairs: tuple[tuple[Origin, Copy | None], ...]


def _best_models(origins: Sequence[Origin], *, fills_biases: bool = False) -> list[_Fit]:
    """Return the models that make most of some tensors; several if they do equally well, one of none if none is near.

    Parameters
    ----------
    fills_biases : bool
        Whether biases of zeros, which a source has not, are written as well.
    """
    models = dict.fromkeys(copy.model for origin in origins for copy in (*origin.copies, *origin.others))
    fits = [_fit(origins, model, fills_biases=fills_biases) for model in models] or [_fit(origins, None)]
    best = max(fit.score for fit in fits)
    return [fit for fit in fits if fit.score == best]


def _fit(origins: Sequence[Origin], model: str | None, *, fills_biases: bool = False) -> _Fit:
    pairs = tuple((origin, _same_layer(origin, model)) for origin in origins)
    scale = _residual_scale(pairs)
    made: list[Origin] = []
    near = 0.0
    for origin, copy in pairs:
        if copy is None:
            made += [origin] if fills_biases and origin.zero and origin.tensor.endswith("_proj.bias") else []
            continue
        near += origin.elements * (1.0 - copy.distance**2)
        if copy.makes_every_bit and copy.factor == (scale if _is_residual(origin) else 1.0):
            made.append(origin)
    names = frozenset(origin.tensor for origin in made)
    return _Fit(model, names, (sum(origin.elements for origin in made), near), scale, pairs)


def _same_layer(origin: Origin, model: str | None) -> Copy | None:
    copies = (*origin.copies, *origin.others)
    return next((copy for copy in copies if copy.model == model and copy.layer == origin.role.layer), None)


def _is_residual(origin: Origin) -> bool:
    return _owner(origin.tensor) != _AROUND and origin.role.module == "mlp.down_proj.weight"


def _residual_scale(pairs: Sequence[tuple[Origin, Copy | None]]) -> float:
    """Return what the down projections are multiplied with: what most of them say, or what noise leaves of it."""
    found = [(origin, copy) for origin, copy in pairs if copy is not None and _is_residual(origin)]
    exact = Counter(copy.factor for _, copy in found if copy.makes_every_bit)
    if exact:
        return exact.most_common(1)[0][0]
    if not found or any(copy.factor == 1.0 for _, copy in found):
        return 1.0
    weights = [origin.elements for origin, _ in found]
    factor = float(np.average([copy.factor for _, copy in found], weights=weights))
    error = abs(factor) * max(copy.distance for _, copy in found) / math.sqrt(sum(weights))
    return simplest((factor - _ERRORS * error, factor + _ERRORS * error))


def _preferred(fits: Sequence[_Fit], order: Sequence[str | None]) -> _Fit:
    return min(fits, key=lambda fit: order.index(fit.model))


def _expert(owner: int, origins: Sequence[Origin], fits: Sequence[_Fit], order: Sequence[str | None]) -> Expert:
    fit = _preferred(fits, order)
    distances = [math.inf if copy is None else copy.distance for _, copy in fit.pairs]
    return Expert(
        number=None if owner == _SHARED_ONE else owner,
        model=fit.model,
        share=_share(origins, fit.made),
        distance=max(distances),
        residual_scale=None if fit.residual_scale == 1.0 else fit.residual_scale,
        noise_scale=_noise_scale(fit.pairs),
        layers=tuple(_sources_of_layers(origins, fit.model)),
        alternatives=tuple(str(other.model) for other in fits if other.model != fit.model),
    )


def _noise_scale(pairs: Sequence[tuple[Origin, Copy | None]]) -> float | None:
    """Return the standard deviation of what was added to every tensor alike; None if it differs between them."""
    sizes: list[float] = []
    for origin, copy in pairs:
        if copy is None or copy.makes_every_bit:
            return None
        added = math.sqrt(max(copy.distance**2 - origin.floor**2, 0.0))
        sizes.append(added * origin.magnitude / abs(copy.factor))
    if not sizes or max(sizes) > (1.0 + SAME_NOISE) * min(sizes):
        return None
    return float(f"{np.mean(sizes):.3g}")


def _sources_of_layers(origins: Sequence[Origin], model: str | None) -> Iterator[tuple[str, int] | None]:
    """Yield the model and the layer that make most of each layer."""
    layers: dict[int, dict[tuple[str, int], tuple[int, float]]] = {}
    for origin in origins:
        scores = layers.setdefault(origin.role.layer or 0, {})
        for copy in (*origin.copies, *origin.others):
            place = copy.model, copy.layer or 0
            made, near = scores.get(place, (0, 0.0))
            exact = origin.elements if copy.makes_every_bit else 0
            scores[place] = made + exact, near + origin.elements * (1.0 - copy.distance**2)
    for layer, scores in sorted(layers.items()):
        best = max(scores.values(), default=None)
        places = [place for place, score in scores.items() if score == best]
        same = [place for place in places if place == (model, layer)]
        yield next(iter(same or places), None)


def _share(origins: Sequence[Origin], made: Collection[str]) -> float:
    whole = sum(origin.elements for origin in origins)
    return sum(origin.elements for origin in origins if origin.tensor in made) / whole if whole else 1.0


def gate_mode(routers: Sequence[FloatArray]) -> GateMode | None:
    """Tell from routers how mergekit-moe may have made them; None if in no way that it knows, or if there are none.

    Prompts give rows of norm 1, the same ones in all layers if they are made of embeddings. Random rows are normal
    with a standard deviation of 1, or uniform between plus and minus the inverse square root of their length.

    Parameters
    ----------
    routers : sequence of array, shape (experts, width)
        One per layer.
    """
    if not routers:
        return None
    rows = np.concatenate(list(routers))
    width = rows.shape[1]
    norms = np.linalg.norm(rows, axis=1)
    if np.all(np.abs(norms - 1.0) <= _STORED):
        same = len(routers) > 1 and all(np.array_equal(router, routers[0]) for router in routers)
        return "cheap_embed" if same else "hidden"
    # Five standard errors, and what storing the weights may do.
    tolerance = 5.0 / math.sqrt(rows.size) + _STORED
    spread = float(np.sqrt(np.mean(rows**2)))
    if np.max(np.abs(rows)) <= (1.0 + _STORED) / math.sqrt(width):
        return "uniform_random" if abs(spread * math.sqrt(3.0 * width) - 1.0) <= tolerance else None
    return "random" if abs(spread - 1.0) <= tolerance else None

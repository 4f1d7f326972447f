"""What could be written otherwise in a recipe without changing what it makes: its equivalence class, in words.

Everything here follows from a method's algebra and its rounding; what only the weights themselves can tell, the
interval of values of a number that make the same bits, is in `unmerge.recipe.ranges`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, combinations

from unmerge.merging.method import MergeMethod
from unmerge.recipe.document import Conditional, ModelInput, ModelReference, Recipe, Setting, storage_type
from unmerge.recipe.trial import CONVENTIONS, CURRENT

_ELECTING = {"ties": "", "dare_ties": "dare_linear", "breadcrumbs_ties": "breadcrumbs", "della": "della_linear"}
"""Methods that elect signs, and those that do the same without an election."""
_ADDING = {"task_arithmetic", "dare_linear", "breadcrumbs", "della_linear"}
"""The methods of task vectors that elect none."""
_RANDOM = {"della": "dare_ties", "della_linear": "dare_linear"}
"""DELLA's methods, and what they are where all elements are kept alike."""
_EXACT = {"BF16", "F32", "F64"}
"""Types in which changes of weights do not come near the smallest numbers, so that a power of 2 is no rounding."""
_SUBSETS = 10
"""Of more models it is not tried whether some of their weights cancel."""
_IN_ORDER = 4
"""Up to so many models are added one by one."""
_SMALLEST = 1e-6
"""Weights that sum to less are not divided by, or are taken for equal."""
_BITS = 32
"""Of a seed, torch's CPU generator uses so many."""


def freedom(
    recipe: Recipe, *, names: Mapping[ModelReference, str], convention: str = CURRENT, seed: int | None = None
) -> tuple[str, ...]:
    """Say what may be different in a recipe that makes the same.

    Parameters
    ----------
    recipe : Recipe
        Of whole models.
    names : mapping of ModelReference to str
        What people call its models.
    convention : str
        A key of `unmerge.recipe.trial.CONVENTIONS`.
    seed : int or None
        Of its random masks.

    Returns
    -------
    tuple of str
        Sentences, only those that hold for this recipe. What does not say otherwise makes the same bits.
    """
    told = _Told(recipe, CONVENTIONS[convention][recipe.merge_method], names, convention)
    parts = (_weights, _products, _bystanders, _densities, _gammas, _epsilons, _elections, _idle, _slerp, _sce)
    found = chain.from_iterable(part(told) for part in (*parts, _order, _types))
    return (*found, *(_seeds(seed) if seed is not None else ()))


@dataclass(frozen=True, slots=True, eq=False)
class _Told:
    """A recipe, with what it says or leaves to defaults."""

    recipe: Recipe
    method: MergeMethod
    names: Mapping[ModelReference, str]
    convention: str

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def models(self) -> tuple[ModelInput, ...]:
        """The models whose weights count: the base is none of them where the method sets it apart."""
        apart = self.method.base != "ignored"
        return tuple(item for item in self.recipe.models if not (apart and item.model == self.recipe.base_model))

    @property
    def of_task_vectors(self) -> bool:
        return self.name in _ELECTING or self.name in _ADDING

    @property
    def exact(self) -> bool:
        """Whether a power of 2 of all weights changes no rounding."""
        in_single = self.name == "linear" and self.convention == CURRENT
        return in_single or storage_type(self.recipe.dtype) in _EXACT

    @property
    def nearly(self) -> str:
        """What another rounding of weights may change."""
        return "up to last bits" + (" and signs that are nearly balanced" if self.name in _ELECTING else "")

    def shared(self, name: str) -> Setting | None:
        default = next((one.default for one in self.method.parameters if one.name == name), None)
        return self.recipe.parameters.get(name, default)

    def of(self, item: ModelInput, name: str) -> Setting | None:
        return item.parameters.get(name, self.shared(name))

    def scalar(self, item: ModelInput, name: str) -> float | None:
        """Return a model's number, None where it is a gradient or has filters."""
        found = self.of(item, name)
        return None if found is None or isinstance(found, tuple) else float(found)

    def whole(self, item: ModelInput) -> bool:
        """Whether nothing of a model's change is dropped."""
        density = self.scalar(item, "density")
        return density is not None and density >= 1

    @property
    def normalizes(self) -> bool | None:
        """Whether weights are divided by their sum; None where the recipe says both."""
        if self.name == "nuslerp":
            return True
        found = self.shared("normalize_weights" if self.name == "multislerp" else "normalize")
        return None if isinstance(found, tuple) else bool(found)

    @property
    def told_normalize(self) -> str:
        return f"normalize: {str(self.normalizes).lower()}"

    @property
    def cancel(self) -> bool:
        """Whether weights that are divided by may sum to zero, and then are not."""
        weights = [_numbers(self.of(item, "weight")) for item in self.models]
        values = list(chain.from_iterable(weights))
        if min(values) > 0 or max(values) < 0:
            return False
        if any(len(own) != 1 for own in weights) or len(values) > _SUBSETS:
            return True
        used = [value for value in values if value]
        sizes = range(1, len(used) + 1) if self.name in _ELECTING else (len(used),)
        subsets = chain.from_iterable(combinations(used, size) for size in sizes)
        return not used or any(abs(math.fsum(subset)) < _SMALLEST for subset in subsets)


def _numbers(setting: Setting | None) -> list[float]:
    if not isinstance(setting, tuple):
        return [] if setting is None else [float(setting)]
    inner = (item.value if isinstance(item, Conditional) else item for item in setting)
    return list(chain.from_iterable(_numbers(value) for value in inner))


def _weights(told: _Told) -> Iterator[str]:
    """Say which factors of the weights cancel."""
    if not any(one.name == "weight" for one in told.method.parameters):
        return
    values = [_numbers(told.of(item, "weight")) for item in told.models]
    if told.name == "multislerp" and len(values) == 1:
        yield "The weight of the only model does not matter."
    elif told.normalizes and all(values) and not told.cancel:
        if len(values) == 1:
            yield "The weight of the only model does not matter: any but 0 makes the same up to last bits."
            return
        power = "a power of 2" if told.name in _ELECTING else "a power of 2 of either sign"
        exactly = f"times {power} they make the same bits, times another number the same"
        other = "times any number they make the same"
        yield f"Only the ratios of the weights matter: {exactly if told.exact else other} {told.nearly}."
        if told.name in _ELECTING:
            yield (
                "With the signs of all weights turned it makes the same, but where the weighted changes of an element "
                "cancel exactly."
            )
        elif told.name == "linear" or told.of_task_vectors:
            yield "With normalize: false and the weights over their sum it makes the same up to last bits."


def _products(told: _Told) -> Iterator[str]:
    """Say that lambda and weights stand for each other."""
    if told.of_task_vectors and told.normalizes is False:
        exactly = "over it, for a power of 2 the same bits, for another positive number the same"
        other = "over it, for any positive number the same"
        yield (
            "Lambda times the weights is what matters: the weights times a number and lambda "
            f"{exactly if told.exact else other} {told.nearly}."
        )


def _bystanders(told: _Told) -> Iterator[str]:
    if told.name != "linear" and not told.of_task_vectors:
        return
    drawing = " and density 1" if told.method.draws else ""
    few = "" if len(told.models) < _IN_ORDER else ", up to last bits"
    yield f"Any other model may be listed last with weight 0{drawing}{few}."


def _densities(told: _Told) -> Iterator[str]:
    """Say what does not matter of models that are kept whole."""
    if not told.of_task_vectors or told.name == "task_arithmetic":
        return
    whole = [item for item in told.models if told.whole(item)]
    idle = [one.name for one in told.method.parameters if one.name in {"gamma", "epsilon"}]
    if whole and len(whole) < len(told.models):
        names = ", ".join(told.names[item.model] for item in whole)
        beside = f", with any {idle[0]}" if idle else ""
        yield f"Density of {names}: any number from 1 on{beside} makes the same."
    elif whole:
        effect = " and ".join([*idle, "rescale"]) + (" have" if idle else " has")
        yield f"Nothing is dropped: any density from 1 on makes the same, and {effect} no effect."
        if told.normalizes is not None:
            family = _ELECTING if told.name in _ELECTING else sorted(_ADDING)
            twins = ", ".join(name for name in family if name != told.name)
            yield f"As nothing is dropped, {twins} with {told.told_normalize} make the same."


def _gammas(told: _Told) -> Iterator[str]:
    if not told.name.startswith("breadcrumbs"):
        return
    for item in told.models:
        density, gamma = told.scalar(item, "density"), told.scalar(item, "gamma")
        if density is None or gamma is None or density >= 1:
            continue
        most = round(1.0 - density, 12)
        if gamma >= most:
            yield (
                f"Gamma of {told.names[item.model]}: any number from 1 - density ({most:g}) on makes the same, but for "
                "an element of a tensor."
            )


def _epsilons(told: _Told) -> Iterator[str]:
    if told.name not in _RANDOM or told.normalizes is None:
        return
    drawn = [item for item in told.models if not told.whole(item)]
    if drawn and all(told.scalar(item, "epsilon") == 0 and (told.scalar(item, "density") or 0) > 0 for item in drawn):
        twin = _RANDOM[told.name]
        yield (
            f"With epsilon 0, {twin} with {told.told_normalize} makes the same; mergekit 0.1.0 to 0.1.2 takes epsilon "
            "for 0 whatever is written."
        )


def _elections(told: _Told) -> Iterator[str]:
    twin = _ELECTING.get(told.name)
    if twin and len(told.models) == 1 and told.normalizes is not None:
        yield f"Of one model no signs are elected: {twin} with {told.told_normalize} makes the same."


def _idle(told: _Told) -> Iterator[str]:
    if told.name == "task_arithmetic":
        yield "density, rescale and int8_mask have no effect."
    elif any(one.name == "int8_mask" for one in told.method.parameters):
        yield "int8_mask has no effect."


def _slerp(told: _Told) -> Iterator[str]:
    if told.name != "slerp" or len(told.models) != 1:
        return
    t = told.shared("t")
    rest = "1 - t" if t is None or isinstance(t, tuple) else f"{1.0 - float(t):.10g}"
    yield f"With {told.names[told.models[0].model]} as the base and t {rest} it makes the same up to last bits."
    yield (
        "In tensors whose cosine is above 0.9995, as of most fine-tunes of one base, linear with weights 1 - t and t "
        "makes the same up to last bits."
    )


def _sce(told: _Told) -> Iterator[str]:
    share = told.shared("select_topk") if told.name == "sce" else None
    if share is not None and not isinstance(share, tuple) and float(share) >= 1:
        yield (
            "In tensors whose mean squared changes sum to less than 1e-6, as of most fine-tunes, ties with density 1 "
            "and equal weights makes the same up to last bits and signs that are nearly balanced."
        )


def _order(told: _Told) -> Iterator[str]:
    summing = told.of_task_vectors or told.name in {"linear", "sce", "multislerp", "nuslerp"}
    drawn = told.method.draws and not all(told.whole(item) for item in told.models)
    if not summing or drawn or len(told.models) < 2:
        return
    exact = told.of_task_vectors and len(told.models) == 2
    yield "The models may stand in any order" + ("." if exact else f", {told.nearly}.")


def _types(told: _Told) -> Iterator[str]:
    """Say which types make the same where everything is computed in float32."""
    if not (told.name == "slerp" or (told.name == "linear" and told.convention == CURRENT)):
        return
    dtype, out = told.recipe.dtype, told.recipe.out_dtype
    if dtype in {"bfloat16", "float16"} and out in {None, dtype}:
        yield f"With dtype: float32 and out_dtype: {dtype} it makes the same, where the models are stored in {dtype}."
    elif dtype == "float32" and out in {"bfloat16", "float16"}:
        yield f"With dtype: {out} it makes the same, where the models are stored in {out}."


def _seeds(seed: int) -> Iterator[str]:
    yield (
        f"Of a seed the lower {_BITS} bits count: {seed} and any multiple of 2^{_BITS} more draw the same masks "
        f"(mergekit's --random-seed takes {_BITS} bits)."
    )

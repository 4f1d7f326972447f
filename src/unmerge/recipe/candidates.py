"""Recipes that a merge may have been made by, from what its sharp elements say; each is to be tried.

Many methods come to nearly the same weights (a slerp of two fine-tunes of one base is nearly their mean), so what
fits one family gives a recipe for every member of the family, and the last bits decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, permutations

import numpy as np

from unmerge.checkpoint.dtypes import FloatArray
from unmerge.merging.registry import MERGEKIT
from unmerge.recipe.decimals import digits, ratio_decimals, simplest
from unmerge.recipe.depth import TOLERANCE, Part, Parts, columns, ratios, setting
from unmerge.recipe.document import Conditional, ModelInput, ModelReference, Recipe, Setting, Settings
from unmerge.recipe.masks import Masking
from unmerge.recipe.sample import Sample
from unmerge.recipe.structures import Structure, fit_dense

SUMS_TO_ONE = 0.02
"""How near to 1 the sum of weights is where a method divides by it."""
CLOSELY = 0.25
"""The share of the usual tolerance within which a gradient follows what was found, where a shorter one does not do."""
FINER = 0.1
"""The same for weights that are merged with random masks: the first decimals may not be what was merged."""
CORRECTED, SMALLEST = 0.2, 1e-3
"""By what share a density may be corrected to the one that a recipe names, and the smallest that is."""
SAME = 0.02
"""Densities, or epsilons, that differ by less are given one value."""
STRAIGHT = 1e-3
"""Angles below it, in radians, are none."""
SPHERICAL_RATIOS = 6
"""As many for methods that follow spheres."""
MAX_ORDERS = 24
"""Orders of models that are tried."""
LAMBDAS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.1, 1.2, 1.25, 1.5, 2.0)
"""Factors of a whole change that recipes have; they are seen only in the last bits."""
MAX_RATIOS = 5
"""How many sets of decimals are tried where only ratios of weights matter."""


@dataclass(frozen=True, slots=True)
class Members:
    """The models of a merge.

    Attributes
    ----------
    base : ModelReference
    models : tuple of ModelReference
        The fine-tunes, in the order of the arrays that speak of them.
    """

    base: ModelReference
    models: tuple[ModelReference, ...]

    def inputs(self, *settings: Mapping[str, Setting]) -> tuple[ModelInput, ...]:
        """Return the models with the parameters of each; none where nothing is given."""
        each = settings or ({},) * len(self.models)
        return tuple(ModelInput(model, dict(own)) for model, own in zip(self.models, each, strict=True))


def arc_candidates(sample: Sample, members: Members) -> Iterator[Recipe]:
    """Yield nuslerp between two changes: their coefficients are sines, so weights are not in their ratio."""
    if len(members.models) != 2:
        return
    first, second = fit_dense(sample).parameters.weights.tolist()
    one, other = sample.deltas
    cosine = float(one @ other / np.sqrt((one @ one) * (other @ other)))
    angle = float(np.arccos(np.clip(cosine, -1.0, 1.0)))
    if min(first, second) <= 0.0 or angle < STRAIGHT:
        return
    share = float(np.arctan2(second * np.sin(angle), first + second * np.cos(angle))) / angle
    for weights in ratio_decimals(np.array([1.0 - share, share]), 2.0 * TOLERANCE["weights"], SPHERICAL_RATIOS):
        yield Recipe("nuslerp", members.base, members.inputs(*({"weight": float(weight)} for weight in weights)))


def usual_candidates(parts: Parts, members: Members) -> Iterator[Recipe]:
    """Yield the commonest recipes in which whole changes are weighed, with the weights as they were found.

    Where numbers change with depth, both as short gradients and as ones that follow them closely.

    Parameters
    ----------
    parts : Parts
        Weights by least squares.
    members : Members
    """
    for share in (1.0,) if parts.level == "whole" else (1.0, CLOSELY):
        inputs = _weighed_inputs(parts, members, share)
        yield Recipe("task_arithmetic", members.base, inputs)
        if _sum_to_one(parts):
            yield Recipe("linear", None, inputs)
            if len(inputs) == 2:
                yield from _slerps(parts, members, share)
        else:
            yield Recipe("linear", None, inputs, parameters={"normalize": False})


def _weighed_inputs(parts: Parts, members: Members, share: float = 1.0) -> tuple[ModelInput, ...]:
    """Return the models with weights within a share of the usual tolerance."""
    tolerance = share * TOLERANCE["weights"] * _largest(parts)
    weights = [setting(values, parts.depth, tolerance) for values in _weights(parts, len(members.models))]
    return members.inputs(*({"weight": weight} for weight in weights))


def _sum_to_one(parts: Parts) -> bool:
    sums = np.array([float(one.weights.sum()) for one in parts.parameters.values()])
    return bool(np.abs(sums - 1.0).max() < SUMS_TO_ONE)


def dense_candidates(parts: Parts, members: Members) -> Iterator[Recipe]:
    """Yield recipes in which whole changes are weighed, or spheres are followed.

    Parameters
    ----------
    parts : Parts
        Weights by least squares.
    members : Members
    """
    inputs = _weighed_inputs(parts, members)
    yield from usual_candidates(parts, members)
    if _sum_to_one(parts):
        for divided in _ratio_inputs(parts, members, limit=MAX_RATIOS):
            yield Recipe("linear", None, divided)
            yield Recipe("task_arithmetic", members.base, divided, parameters={"normalize": True})
    else:
        yield from _with_base_counted(parts, members, inputs)
    yield from _spherical(parts, members)


def _slerps(parts: Parts, members: Members, share: float) -> Iterator[Recipe]:
    for first, second in ((0, 1), (1, 0)):
        shares = {part: float(one.weights[second] / one.weights.sum()) for part, one in parts.parameters.items()}
        fraction = setting(dict(sorted(shares.items())), parts.depth, share * TOLERANCE["weights"])
        models = (ModelInput(members.models[first]), ModelInput(members.models[second]))
        yield Recipe("slerp", members.models[first], models, parameters={"t": fraction})


def _with_base_counted(parts: Parts, members: Members, inputs: tuple[ModelInput, ...]) -> Iterator[Recipe]:
    """Yield the mean of the models and the base, where the base may be one of them."""
    rest = [1.0 - float(one.weights.sum()) for one in parts.parameters.values()]
    if parts.level == "whole" and rest[0] > 0.0:
        weight = simplest(rest[0], TOLERANCE["weights"])
        yield Recipe("linear", None, (*inputs, ModelInput(members.base, {"weight": weight})))


def _spherical(parts: Parts, members: Members) -> Iterator[Recipe]:
    """Yield methods that follow spheres: only the ratios of their weights matter."""
    if len(members.models) < 2 or any((one.weights <= 0.0).any() for one in parts.parameters.values()):
        return
    # Their own arithmetic in half precision moves weights by a per cent or two.
    for inputs in _ratio_inputs(parts, members, limit=SPHERICAL_RATIOS, loose=3.0):
        for base in (None, members.base):
            yield Recipe("multislerp", base, inputs)
            if len(inputs) == 2:
                yield Recipe("nuslerp", base, inputs)
                yield Recipe("nuslerp", base, inputs, parameters={"nuslerp_flatten": False})


def parameterless_candidates(sample: Sample, members: Members) -> Iterator[Recipe]:
    """Yield recipes of methods that leave nothing, or one number, to choose."""
    plain = members.inputs()
    if len(plain) == 1:
        yield Recipe("passthrough", None, plain)
        yield Recipe("arcee_fusion", members.base, plain)
        yield Recipe("nearswap", members.base, plain, parameters={"t": _largest_move(sample.change, sample.deltas[0])})
        return
    yield Recipe("karcher", None, plain)
    yield Recipe("model_stock", members.base, plain)
    yield Recipe("model_stock", members.base, plain, parameters={"filter_wise": True})
    yield Recipe("sce", members.base, plain)
    topmost = _changed_share(sample)
    if topmost < 1.0:
        yield Recipe("sce", members.base, plain, parameters={"select_topk": topmost})
    yield Recipe("ram", members.base, plain)
    yield Recipe("ramplus_tl", members.base, plain)
    if len(plain) == 2:
        for first, second in permutations(range(2)):
            models = (plain[second],)
            yield Recipe("arcee_fusion", plain[first].model, models)
            distances = sample.deltas[second] - sample.deltas[first]
            moved = _largest_move(sample.change - sample.deltas[first], distances)
            yield Recipe("nearswap", plain[first].model, models, parameters={"t": moved})


def _largest_move(moves: FloatArray, distances: FloatArray) -> float:
    """Return where the magnitudes of moves end, of those that had farther to go: nearswap's t."""
    sizes = np.abs(moves)
    far = np.abs(distances) > 2.0 * float(np.quantile(sizes, 0.9))
    typical = float(np.median(sizes[far])) if far.any() else float(sizes.max(initial=0.0))
    return float(f"{typical:.2g}")


def _changed_share(sample: Sample) -> float:
    """Return the rank by spread up to which elements were changed: sce's select_topk."""
    changed = np.abs(sample.change) > sample.half_cell
    order = np.argsort(sample.spread_ranks, kind="stable")
    # The cut that leaves the fewest unchanged elements before it and changed ones after it.
    wrong = np.cumsum(~changed[order]) + (changed.sum() - np.cumsum(changed[order]))
    best = int(wrong.argmin())
    return simplest(float(sample.spread_ranks[order[best]]), 0.02)


def trimmed_candidates(parts: Parts, structure: Structure, members: Members) -> Iterator[Recipe]:
    """Yield recipes in which each change is trimmed to its largest elements.

    Parameters
    ----------
    parts : Parts
        What `structure` was fitted to.
    """
    method = {(False, True): "ties", (True, False): "breadcrumbs", (True, True): "breadcrumbs_ties"}[
        structure.drops_outliers, structure.consensus
    ]
    densities = _shared_where_alike(columns(parts, "densities", range(len(members.models))), parts.depth, "densities")
    more: list[Settings] = [{"density": density} for density in densities]
    if structure.drops_outliers:
        gammas = _shared_where_alike(columns(parts, "gammas", range(len(members.models))), parts.depth, "gammas")
        more = [{**own, "gamma": gamma} for own, gamma in zip(more, gammas, strict=True)]
    yield from _weighed(method, parts, members, more, normalize=structure.normalize)


def masked_candidates(parts: Parts, masking: Masking, members: Members) -> Iterator[Recipe]:
    """Yield recipes in which random elements of each change are dropped; gammas hold DELLA's epsilons.

    Parameters
    ----------
    parts : Parts
        What `masking` was decoded to: weights after rescaling was taken out.
    """
    count = len(members.models)
    densities = _shared_where_alike(columns(parts, "densities", range(count)), parts.depth, "densities")
    epsilons = [float(np.mean(list(values.values()))) for values in columns(parts, "gammas", range(count))]
    by_rank = float(np.mean(epsilons)) > SAME and _possible(parts)
    more: list[Settings] = [{"density": density} for density in densities]
    if by_rank:
        shared = _shared_where_alike(columns(parts, "gammas", range(count)), parts.depth, "densities")
        more = [{**own, "epsilon": epsilon} for own, epsilon in zip(more, shared, strict=True)]
    else:
        parts = _rescaled(parts, densities, normalize=masking.normalize)
    method = {(False, False): "dare_linear", (False, True): "dare_ties", (True, False): "della_linear"}.get(
        (by_rank, masking.consensus), "della"
    )
    yield from _weighed(method, parts, members, more, normalize=masking.normalize)
    if by_rank:
        # Slopes are known less exactly than other numbers, and most recipes have one for all.
        alike = [{**own, "epsilon": simplest(float(np.mean(epsilons)), SAME)} for own in more]
        yield from _weighed(method, parts, members, alike, normalize=masking.normalize)
    if not masking.normalize:
        # Weights are read more exactly than to two digits: a third is not 0.33.
        yield from _weighed(method, parts, members, more, normalize=False, share=FINER)
    if not (masking.normalize or masking.consensus) and _sum_to_one(parts):
        # Without an election, dividing by the weights makes other weights of them, and nothing else.
        yield from _weighed(method, parts, members, more, normalize=True)


def _rescaled(parts: Parts, densities: Sequence[Setting], *, normalize: bool) -> Parts:
    """Return weights as they are with the densities that a recipe names: w / density is better known than either."""
    if parts.level != "whole":
        return parts
    (only,) = parts.parameters.values()
    told = np.array([float(density) for density in densities if not isinstance(density, tuple)])
    shares = told / np.maximum(only.densities, SMALLEST)
    if told.max() > 1.0 or np.abs(shares - 1.0).max() > CORRECTED:
        return parts
    if normalize:
        return replace(parts, parameters={Part(): replace(only, scale=only.scale * float(shares.mean()))})
    return replace(parts, parameters={Part(): replace(only, weights=only.weights * shares)})


def _possible(parts: Parts) -> bool:
    """Tell whether chances that differ by rank stay away from 0 and 1, as DELLA asks."""
    low = min(float((one.densities - one.gammas).min()) for one in parts.parameters.values())
    high = max(float((one.densities + one.gammas).max()) for one in parts.parameters.values())
    return low > SAME and high < 1.0 - SAME


def with_lambdas(recipe: Recipe) -> Iterator[Recipe]:
    """Yield the same weights as products with a lambda, where all are short decimals: one more rounding."""
    known = {parameter.name for parameter in MERGEKIT[recipe.merge_method].parameters}
    if "lambda" not in known or "lambda" in recipe.parameters:
        return
    weights = [item.parameters["weight"] for item in recipe.models]
    for factor in LAMBDAS:
        divided = [_divided(weight, factor) for weight in weights]
        if None not in divided:
            models = tuple(
                replace(item, parameters={**item.parameters, "weight": weight})
                for item, weight in zip(recipe.models, divided, strict=True)
                if weight is not None
            )
            yield replace(recipe, models=models, parameters={**recipe.parameters, "lambda": factor})


def _divided(weight: Setting, factor: float) -> float | None:
    """Return a weight over a factor, if it is a short decimal."""
    if isinstance(weight, tuple):
        return None
    exact = float(weight) / factor
    short = simplest(exact, TOLERANCE["weights"] * abs(exact))
    return short if digits(short) <= 2 else None


def reordered(recipe: Recipe) -> Iterator[Recipe]:
    """Yield the models in other orders: sums in float32 depend on it."""
    for models in islice(permutations(recipe.models), 1, MAX_ORDERS):
        yield replace(recipe, models=models)


DIVIDES = {"ties": True, "della": True}
"""Whether a method divides by the weights unless it is told otherwise; the others do not."""


def _weighed(
    method: str, parts: Parts, members: Members, more: Sequence[Settings], *, normalize: bool, share: float = 1.0
) -> Iterator[Recipe]:
    """Yield recipes with weights: as they are, or in ratios and with a lambda where the merge is normalized."""
    told: dict[str, Setting] = {} if DIVIDES.get(method, False) == normalize else {"normalize": normalize}
    if not normalize:
        weighed = zip(_weighed_inputs(parts, members, share), more, strict=True)
        inputs = tuple(replace(item, parameters={**item.parameters, **own}) for item, own in weighed)
        yield Recipe(method, members.base, inputs, parameters=told)
        return
    scale = setting(parts.values(lambda one: one.scale), parts.depth, TOLERANCE["scale"])
    scaled = told if scale == 1.0 else {**told, "lambda": scale}
    for inputs in _ratio_inputs(parts, members, limit=MAX_RATIOS):
        joined = tuple(
            replace(item, parameters={**item.parameters, **own}) for item, own in zip(inputs, more, strict=True)
        )
        yield Recipe(method, members.base, joined, parameters=scaled)


def _ratio_inputs(parts: Parts, members: Members, limit: int, loose: float = 1.0) -> Iterator[tuple[ModelInput, ...]]:
    """Yield the models with decimals whose ratios are as found."""
    if parts.level == "whole":
        (only,) = parts.parameters.values()
        for weights in ratio_decimals(only.weights, loose * TOLERANCE["weights"], limit):
            yield members.inputs(*({"weight": float(weight)} for weight in weights))
        return
    found = sorted((_by_reference(parts, reference) for reference in range(len(members.models))), key=_length)
    for settings in found[:1]:
        for factor in (1.0, 0.5, 0.4, 0.3, 0.6, 0.2)[:limit]:
            yield members.inputs(*({"weight": _times(setting_, factor)} for setting_ in settings))


def _by_reference(parts: Parts, reference: int) -> list[Setting]:
    """Return settings of the weights over that of one model, which is constant if the recipe gave it one number."""
    found = ratios(parts, reference)
    count = len(next(iter(found.values())))
    tolerance = 2.0 * TOLERANCE["weights"]

    def of(model: int) -> dict[Part, float]:
        return {part: float(values[model]) for part, values in found.items()}

    return [setting(of(model), parts.depth, tolerance * max(1.0, *of(model).values())) for model in range(count)]


def _length(settings: Sequence[Setting]) -> int:
    return sum(len(item) if isinstance(item, tuple) else 1 for item in settings)


def _times(given: Setting, factor: float) -> Setting:
    """Return a setting with all its numbers multiplied."""
    if not isinstance(given, tuple):
        return simplest(float(given) * factor, 0.005)
    conditional = [item for item in given if isinstance(item, Conditional)]
    if conditional:
        return tuple(Conditional(_times(item.value, factor), item.filter) for item in conditional)  # type: ignore[arg-type]
    return tuple(simplest(float(item) * factor, 0.005) for item in given)  # type: ignore[arg-type]


def _weights(parts: Parts, count: int) -> list[dict[Part, float]]:
    return columns(parts, "weights", range(count))


def _largest(parts: Parts) -> float:
    return max(float(np.abs(one.weights).max()) for one in parts.parameters.values())


def _shared_where_alike(found: Sequence[Mapping[Part, float]], depth: int, kind: str) -> list[Setting]:
    """Return a setting for each model; one for all where all are alike, as most recipes have it."""
    everything = [value for values in found for value in values.values()]
    if max(everything) - min(everything) < SAME:
        return [simplest(float(np.median(everything)), TOLERANCE[kind])] * len(found)
    return [setting(values, depth, TOLERANCE[kind]) for values in found]

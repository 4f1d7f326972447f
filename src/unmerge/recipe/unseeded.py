"""Merges with random masks and no seed: is every element what some mask makes, and are there as many kept as claimed.

A recipe without a seed speaks of a distribution. Of k models with masks there are 2^k outcomes for an element; the
target's must be one of them. What kept elements are multiplied by (``rescale``) hangs on the whole mask, so it is
fitted, and must be near one over the density. Whether a model was kept in an element is known as far as outcomes
differ; the score test of the density uses exactly that.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from unmerge.checkpoint.dtypes import DTYPES, FloatArray
from unmerge.checkpoint.tensor import Tensor
from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.contract import base_of
from unmerge.merging.sparsify import della_probabilities, mask_type
from unmerge.recipe.document import storage_type
from unmerge.recipe.making import Inputs
from unmerge.recipe.outcomes import MAX_FREE, Bits, Masked, all_masks, as_number, flat_deltas, masked_elements

SAMPLE = 1 << 15
"""Outcomes that are looked at in a tensor: elements times masks."""
MOST, LEAST = 4000, 256
"""Elements of a tensor that are looked at, for few models and for many."""
STEPS = 8
"""Turns of the fit at most."""
_PRECISION = {"F16": 2.0**-9, "F32": 2.0**-21, "F64": 2.0**-49}
_HALF_STEP = 2.0**-8
_BUMP = 2.0**-10
_CONVERGED = 1e-7
_ERRORS = 4.0
_LOOSE = 0.01
_HOPELESS = 0.7
_TURNS = 60
_SETTLED = 1e-5
_TINY, _UNLIKELY = 1e-300, 1e-6
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """How a tensor looks as a merge with random masks.

    Attributes
    ----------
    name : str
    elements : int
    beyond : int
        Elements that no masks could make, because they are farther from the base than all changes together.
    contested : int
        Elements looked at in which masks change something.
    explained : int
        Of these, the ones that a mask makes.
    ratios : array, shape (k,)
        What kept changes are multiplied by, over what the density says; NaN where nothing is masked or seen.
    ratio_errors : array, shape (k,)
        Standard deviations that chance gives the ratios.
    nominal : array, shape (k,)
        What the density says that kept changes are multiplied by.
    weights, stated : array, shape (k,)
        Weights that fit best, where weights divide and were fitted; and those of the recipe.
    divides : bool
        Whether weights divide (``normalize``).
    scores, informations : array, shape (k,)
        Sums over elements of the derivative of the log-likelihood by the probability of being kept, and of its square.
    kept : array, shape (k,)
        Estimated mean probability of being kept.
    claimed : array, shape (k,)
        The mean probability that the recipe says.
    slope_scores, slope_informations : array, shape (k,)
        As `scores`, by how much more likely the larger elements of a row are kept: DELLA's epsilon.
    """

    name: str
    elements: int
    beyond: int
    contested: int
    explained: int
    ratios: FloatArray
    ratio_errors: FloatArray
    nominal: FloatArray
    weights: FloatArray
    stated: FloatArray
    divides: bool
    scores: FloatArray
    informations: FloatArray
    kept: FloatArray
    claimed: FloatArray
    slope_scores: FloatArray
    slope_informations: FloatArray

    @property
    def wrong(self) -> int:
        """Elements that no mask makes."""
        return self.contested - self.explained + self.beyond


@dataclass(frozen=True, slots=True, eq=False)
class _Elements:
    """The elements of a tensor that are looked at."""

    open_: Masked
    values: Array
    spacing: FloatArray
    probabilities: FloatArray
    masks: Bits
    out: Arithmetic
    grid: Arithmetic
    precision: FloatArray


def explain(
    method: str,
    inputs: Inputs,
    out_dtype: str | None,
    stored: Tensor,
    found: Array,
    *,
    fit_weights: bool = False,
    sample: int = SAMPLE,
) -> Explanation | None:
    """Explain a tensor by random masks.

    Parameters
    ----------
    method : str
        One of mergekit's that draw masks.
    inputs : Inputs
    out_dtype : str or None
        The recipe's.
    stored : Tensor
        The target's tensor.
    found : array, shape (n,)
        Its values.
    fit_weights : bool
        With ``normalize``, fit weights too instead of taking the recipe's. Without it a weight and what its changes
        are multiplied by cannot be told apart.
    sample : int
        Outcomes to look at, elements times masks.

    Returns
    -------
    Explanation or None
        None where there are no models, or too many to try all their masks.
    """
    if not 0 < len(inputs.tensor.models) <= MAX_FREE:
        return None
    deltas = flat_deltas(inputs)
    probabilities = _probabilities(method, inputs, deltas)
    nominal = _nominal(inputs, deltas, probabilities)
    chosen = _choose(inputs, deltas, nominal, stored, sample)
    out = Arithmetic(storage_type(out_dtype) or inputs.arithmetic.name)
    elements = _Elements(
        open_=masked_elements(method, inputs, chosen, deltas, nominal),
        values=found[chosen],
        spacing=DTYPES[stored.dtype.name].spacing(found[chosen].astype(np.float64)),
        probabilities=probabilities[:, chosen],
        masks=_possible(probabilities),
        out=out,
        grid=Arithmetic(stored.dtype.name),
        precision=np.zeros(len(deltas)),
    )
    errors = _ratio_errors(inputs, deltas, probabilities)
    fitted = _best_fit(elements, errors, fit_weights=fit_weights) if len(chosen) else elements
    beyond = _beyond(inputs, deltas, fitted, found)
    found_all = _summary(inputs.tensor.name, beyond, fitted, nominal, errors, probabilities)
    return replace(found_all, stated=np.array(elements.open_.weights))


def _possible(probabilities: FloatArray) -> Bits:
    """Return the masks of models that are neither always nor never kept, shape (k, masks, 1)."""
    certain, never = probabilities.min(axis=1) >= 1.0, probabilities.max(axis=1) <= 0.0
    every = all_masks(len(certain))
    possible = ~(certain[:, np.newaxis] & ~every).any(axis=0) & ~(never[:, np.newaxis] & every).any(axis=0)
    return every[:, possible, np.newaxis]


def _beyond(inputs: Inputs, deltas: Array, fitted: _Elements, found: Array) -> int:
    """Return how many elements of the whole tensor are out of reach of all masks."""
    base = base_of(inputs.group(), "a random mask").reshape(-1)
    parts = (slice(start, start + _BLOCK) for start in range(0, len(found), _BLOCK))
    return sum(_beyond_in(base[part], deltas[:, part], fitted, found[part]) for part in parts)


def _beyond_in(base: Array, deltas: Array, fitted: _Elements, found: Array) -> int:
    open_ = fitted.open_
    scaled = np.abs(deltas * open_.scales[:, np.newaxis])
    weighed = scaled * np.abs(np.array(open_.weights))[:, np.newaxis]
    reach = abs(open_.lambda_) * (scaled.max(axis=0) if open_.normalize else weighed.sum(axis=0))
    spacing = DTYPES[fitted.grid.name].spacing(np.maximum(np.abs(base), np.abs(found)).astype(np.float64))
    unchanged = ~deltas.any(axis=0)
    off = np.abs(found - base.astype(np.float64)) > 1.05 * reach + spacing
    stored = fitted.grid.round(fitted.out.round(base))
    return int(np.count_nonzero(np.where(unchanged, stored != found, off)))


def _probabilities(method: str, inputs: Inputs, deltas: Array) -> FloatArray:
    """Return every element's probability of being kept, shape (k, n); a view of one number each for DARE."""
    densities = [as_number(value) for value in inputs.tensor.of_models["density"]]
    if not method.startswith("della"):
        rounded = [
            1.0 if density >= 1.0 else float(mask_type(inputs.arithmetic).round(density)) for density in densities
        ]
        return np.broadcast_to(np.array(rounded)[:, np.newaxis], deltas.shape)
    shape = next(iter(inputs.arrays.values())).shape
    epsilons = [as_number(value) for value in inputs.tensor.of_models["epsilon"]]
    found = np.empty(deltas.shape)
    for row, (density, epsilon) in enumerate(zip(densities, epsilons, strict=True)):
        open_ = 0.0 < density < 1.0
        delta = deltas[row].reshape(shape)
        found[row] = (
            della_probabilities(delta, density, epsilon, inputs.arithmetic).reshape(-1) if open_ else density >= 1.0
        )
    return found


def _nominal(inputs: Inputs, deltas: Array, probabilities: FloatArray) -> FloatArray:
    """Return what kept changes are multiplied by on average, shape (k,)."""
    if not inputs.tensor.shared["rescale"]:
        return np.ones(len(deltas))
    return np.array([_restoring(delta, kept) for delta, kept in zip(deltas, probabilities, strict=True)])


def _restoring(delta: Array, probability: FloatArray) -> float:
    sizes = np.abs(delta).astype(np.float64)
    whole, kept = float(sizes.sum()), float(np.dot(sizes, probability))
    return whole / kept if 0.0 < kept < whole else 1.0


def _choose(inputs: Inputs, deltas: Array, nominal: FloatArray, stored: Tensor, sample: int) -> NDArray[np.int64]:
    """Choose elements in which masks matter, at random; the same ones in every run."""
    weights = np.array([as_number(value) for value in inputs.tensor.of_models["weight"]])
    base = base_of(inputs.group(), "a random mask").reshape(-1)
    largest = np.abs(deltas * (weights * nominal)[:, np.newaxis]).max(axis=0)
    telling = np.flatnonzero(largest >= DTYPES[stored.dtype.name].spacing(base.astype(np.float64)))
    count = int(np.clip(sample >> len(weights), LEAST, MOST))
    if len(telling) <= count:
        return telling
    generator = np.random.default_rng(zlib.crc32(inputs.tensor.name.encode()))
    return np.sort(generator.choice(telling, count, replace=False))


def _best_fit(elements: _Elements, errors: FloatArray, *, fit_weights: bool) -> _Elements:
    """Fit, from other starts too where chance may have moved scales far: a few large changes decide them there."""
    best = _fitted(elements, fit_weights=fit_weights)
    made = _made(best)
    for index in np.flatnonzero(errors > _LOOSE):
        for away in (-2.0, 2.0) if _HOPELESS * len(best.values) <= made < len(best.values) else ():
            scales = elements.open_.scales.copy()
            scales[index] *= max(0.2, 1.0 + away * errors[index])
            start = replace(elements, open_=replace(elements.open_, scales=scales))
            other = _fitted(start, fit_weights=fit_weights)
            if _made(other) > made:
                best, made = other, _made(other)
    return _settled(best)


def _made(elements: _Elements) -> int:
    """Return how many elements some mask makes."""
    return int(_hits(elements).any(axis=0).sum())


def _fitted(elements: _Elements, *, fit_weights: bool) -> _Elements:
    """Fit what kept changes are multiplied by, and weights where they divide; by turns with the masks."""
    for _ in range(STEPS):
        real = _real(elements.open_)
        step, errors = _step(elements, real, _nearest(elements, real), with_weights=fit_weights and real.normalize)
        factors = np.clip(1.0 + step, 0.2, 5.0)
        count = len(real.scales)
        scales = real.scales * factors[:count]
        weights = np.array(real.weights)
        if len(factors) > count:
            moved = weights * factors[count:]
            # Only ratios matter where weights divide: their sum stays.
            weights = moved * (np.abs(weights).sum() / np.abs(moved).sum())
        moved_to = replace(elements.open_, scales=scales, weights=tuple(weights.tolist()))
        elements = replace(elements, open_=moved_to, precision=errors[:count])
        if np.abs(step).max(initial=0.0) < _CONVERGED:
            break
    return elements


def _real(open_: Masked) -> Masked:
    """Return elements as exact arithmetic makes them."""
    return replace(
        open_, base=open_.base.astype(np.float64), deltas=open_.deltas.astype(np.float64), arithmetic=Arithmetic("F64")
    )


def _nearest(elements: _Elements, real: Masked) -> Bits:
    """Return the mask of each element whose outcome is nearest, shape (k, m)."""
    away = np.abs(real.outcome(elements.masks) - elements.values)
    return np.asarray(elements.masks[:, away.argmin(axis=0), 0])


def _step(elements: _Elements, real: Masked, masks: Bits, *, with_weights: bool) -> tuple[FloatArray, FloatArray]:
    """Return the relative change of scales (and weights) that least squares in spacings asks for, and its errors."""
    at = real.outcome(masks)
    residual = (elements.values - at) / elements.spacing
    moved = [replace(real, scales=_bumped(real.scales, index)) for index in range(len(real.scales))]
    if with_weights:
        weights = np.array(real.weights)
        moved += [replace(real, weights=tuple(_bumped(weights, index))) for index in range(len(weights))]
    slopes = np.stack([(other.outcome(masks) - at) / (_BUMP * elements.spacing) for other in moved])
    trusted = np.abs(residual) <= _trust(np.abs(residual), masks)
    used, left = slopes[:, trusted], residual[trusted]
    found = np.linalg.lstsq(used.T, left, rcond=1e-6)[0]
    spread = np.linalg.pinv(used @ used.T, rcond=1e-10).diagonal() * float(np.mean(left**2) if len(left) else 0.0)
    return np.where(np.isfinite(found), found, 0.0), np.sqrt(np.maximum(spread, 0.0))


def _trust(residual: FloatArray, masks: Bits) -> FloatArray:
    """Return how far each element may be off; a model whose scale is far off yet is off in all that it is kept in."""
    typical = np.array([float(np.median(residual[kept])) if kept.any() else 0.0 for kept in masks])
    return np.asarray(np.maximum(2.0, 4.0 * (masks * typical[:, np.newaxis]).max(axis=0)))


def _bumped(values: FloatArray, index: int) -> FloatArray:
    moved = values.copy()
    moved[index] *= 1.0 + _BUMP
    return moved


def _settled(elements: _Elements) -> _Elements:
    """Bring scales to bfloat16's grid, where that is worked in: to the values that explain most elements."""
    if elements.open_.arithmetic.name != "BF16":
        return elements
    best = replace(elements, open_=replace(elements.open_, scales=_on_grid(elements.open_.scales)))
    count = _made(best)
    if count < _HOPELESS * len(best.values):
        return best
    for index in (*range(len(best.open_.scales)), *range(len(best.open_.scales))):
        for scales in _neighbours(best.open_.scales, index) if count < len(best.values) else ():
            other = replace(best, open_=replace(best.open_, scales=scales))
            if _made(other) > count:
                best, count = other, _made(other)
    return best


def _on_grid(scales: FloatArray) -> FloatArray:
    return np.where(scales == 1.0, 1.0, Arithmetic("BF16").round(scales).astype(np.float64))


def _neighbours(scales: FloatArray, index: int) -> Iterator[FloatArray]:
    if scales[index] == 1.0:
        return
    spacing = float(DTYPES["BF16"].spacing(scales)[index])
    for steps in (-3, -2, -1, 1, 2, 3):
        moved = scales.copy()
        moved[index] += steps * spacing
        yield moved


def _hits(elements: _Elements) -> Bits:
    """Return which masks make which elements, shape (masks, m)."""
    if elements.open_.arithmetic.name == "BF16":
        exact: Bits = _stored(elements, elements.open_.outcome(elements.masks)) == elements.values
        return exact
    away, doubt = _away(elements)
    near: Bits = away <= 0.5 * elements.spacing + doubt
    return near


def _away(elements: _Elements) -> tuple[FloatArray, FloatArray]:
    """Return how far outcomes are from the target's values, shape (masks, m), and how exactly they are known.

    The scale is known to some digits only: an outcome counts if it may lie in the cell of the target's value.
    """
    real = _real(elements.open_)
    effects = np.abs(real.deltas * (np.array(real.weights) * real.scales)[:, np.newaxis])
    precision = _PRECISION[elements.open_.arithmetic.name]
    relative = precision + _ERRORS * elements.precision[:, np.newaxis]
    of_masks = np.einsum("ks,km->sm", elements.masks[:, :, 0].astype(np.float64), relative * effects)
    return np.abs(real.outcome(elements.masks) - elements.values), of_masks + 0.25 * precision * np.abs(real.base)


def _likelihoods(elements: _Elements, hits: Bits) -> FloatArray:
    """Return how probably each mask makes each element, shape (masks, m).

    Near the edge of a cell it is by halves: what nothing is kept of is known exactly, and would else be seldom taken
    for what is kept, which is taken for it more often.
    """
    if elements.open_.arithmetic.name == "BF16":
        return hits.astype(np.float64)
    away, doubt = _away(elements)
    inside = 0.5 + (0.5 * elements.spacing - away) / np.maximum(2.0 * doubt, _TINY)
    return np.where(hits, np.clip(inside, _UNLIKELY, 1.0), 0.0)


def _stored(elements: _Elements, outcome: Array) -> Array:
    return elements.grid.round(elements.out.round(outcome))


def _contested(elements: _Elements) -> Bits:
    """Return the elements that masks change."""
    made = _stored(elements, elements.open_.outcome(elements.masks))
    changed: Bits = made.max(axis=0) != made.min(axis=0)
    return changed


def _ratio_errors(inputs: Inputs, deltas: Array, probabilities: FloatArray) -> FloatArray:
    """Return the relative standard deviations that drawing a mask gives to what kept changes are multiplied by."""
    chance = [_relative_error(delta, kept) for delta, kept in zip(deltas, probabilities, strict=True)]
    coarse = _HALF_STEP if inputs.arithmetic.name == "BF16" else 0.0
    return np.hypot(chance, coarse)


def _relative_error(delta: Array, probability: FloatArray) -> float:
    sizes = np.abs(delta).astype(np.float64)
    mean = float(np.dot(sizes, probability))
    variance = float(np.dot(sizes**2, probability * (1.0 - probability)))
    return variance**0.5 / mean if mean > 0.0 else 0.0


def _summary(
    name: str, beyond: int, elements: _Elements, nominal: FloatArray, errors: FloatArray, probabilities: FloatArray
) -> Explanation:
    hits = _hits(elements)
    contested = _contested(elements)
    explained = hits.any(axis=0) & contested
    bits = elements.masks[:, :, 0].T
    looked_at = elements.probabilities[:, explained]
    score, shift = _kept(_likelihoods(elements, hits)[:, explained], bits, looked_at)
    slope = score * (looked_at - probabilities.mean(axis=1)[:, np.newaxis])
    seen = (elements.open_.deltas[:, explained] != 0).any(axis=1)
    masked = (probabilities.mean(axis=1) > 0.0) & (probabilities.mean(axis=1) < 1.0)
    return Explanation(
        name=name,
        elements=probabilities.shape[1],
        beyond=beyond,
        contested=int(contested.sum()),
        explained=int(explained.sum()),
        ratios=np.where(masked & seen, elements.open_.scales / nominal, np.nan),
        ratio_errors=errors,
        nominal=nominal,
        weights=np.array(elements.open_.weights),
        stated=np.array(elements.open_.weights),
        divides=elements.open_.normalize,
        scores=score.sum(axis=1),
        informations=(score**2).sum(axis=1),
        slope_scores=slope.sum(axis=1),
        slope_informations=(slope**2).sum(axis=1),
        kept=probabilities.mean(axis=1) + shift,
        claimed=probabilities.mean(axis=1),
    )


def _kept(likelihoods: FloatArray, bits: Bits, probabilities: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Estimate how far the probability of being kept is from the claim.

    Parameters
    ----------
    likelihoods : array, shape (masks, m)
    bits : array of bool, shape (masks, k)
    probabilities : array, shape (k, m)

    Returns
    -------
    scores : array, shape (k, m)
        Derivative of each element's log-likelihood by the probability, at the claim.
    shift : array, shape (k,)
        By maximum likelihood (expectation and maximisation in turns).
    """
    claimed = np.clip(probabilities, 1e-3, 1.0 - 1e-3)
    scores = (_posterior(likelihoods, bits, claimed) - claimed) / (claimed * (1.0 - claimed))
    shift = np.zeros(len(claimed))
    for _ in range(_TURNS if likelihoods.shape[1] else 0):
        shifted = np.clip(claimed + shift[:, np.newaxis], 1e-3, 1.0 - 1e-3)
        step = (_posterior(likelihoods, bits, shifted) - shifted).mean(axis=1)
        shift = shift + step
        if np.abs(step).max() < _SETTLED:
            break
    return scores, shift


def _posterior(likelihoods: FloatArray, bits: Bits, probabilities: FloatArray) -> FloatArray:
    """Return each model's probability of having been kept, given what each element is; shape (k, m)."""
    weights = likelihoods.copy()
    for row, mask in enumerate(bits):
        weights[row] *= np.where(mask[:, np.newaxis], probabilities, 1.0 - probabilities).prod(axis=0)
    weights /= np.maximum(weights.sum(axis=0), 1e-300)
    return np.asarray(bits.T.astype(np.float64) @ weights)


@dataclass(frozen=True, slots=True, eq=False)
class Pooled:
    """How a merge with random masks looks over several tensors.

    Attributes
    ----------
    elements, beyond, contested, explained : int
        As in `Explanation`, of all tensors.
    ratios, ratio_errors, nominal : array, shape (k,)
        What kept changes are multiplied by, over what the density says, its standard deviation by chance, and what the
        density says.
    weights, stated : array, shape (k,)
    divides : bool
        As in `Explanation`, on average.
    surprise : array, shape (k,)
        How many standard deviations the number kept is away from the claim.
    slope_surprise : array, shape (k,)
        The same for how much likelier large elements are kept.
    kept, claimed : array, shape (k,)
        Estimated and claimed probability of being kept.
    """

    elements: int
    beyond: int
    contested: int
    explained: int
    ratios: FloatArray
    ratio_errors: FloatArray
    nominal: FloatArray
    weights: FloatArray
    stated: FloatArray
    divides: bool
    surprise: FloatArray
    slope_surprise: FloatArray
    kept: FloatArray
    claimed: FloatArray


def pooled(explanations: Sequence[Explanation]) -> Pooled:
    """Put the explanations of several tensors together."""
    ratios = np.stack([item.ratios for item in explanations])
    errors = np.stack([item.ratio_errors for item in explanations])
    precision = np.where(np.isfinite(ratios) & (errors > 0.0), 1.0 / np.maximum(errors, 1e-9) ** 2, 0.0)
    total = precision.sum(axis=0)
    contested = np.array([item.contested for item in explanations], dtype=np.float64)

    def average(values: Sequence[FloatArray]) -> FloatArray:
        return np.asarray(np.average(np.stack(values), axis=0, weights=contested + 1e-9))

    return Pooled(
        elements=sum(item.elements for item in explanations),
        beyond=sum(item.beyond for item in explanations),
        contested=int(contested.sum()),
        explained=sum(item.explained for item in explanations),
        ratios=np.where(total > 0.0, (np.nan_to_num(ratios) * precision).sum(axis=0) / np.maximum(total, 1e-300), 1.0),
        ratio_errors=np.where(total > 0.0, 1.0 / np.sqrt(np.maximum(total, 1e-300)), np.inf),
        nominal=average([item.nominal for item in explanations]),
        weights=average([item.weights for item in explanations]),
        stated=average([item.stated for item in explanations]),
        divides=explanations[0].divides,
        surprise=_surprise([item.scores for item in explanations], [item.informations for item in explanations]),
        slope_surprise=_surprise(
            [item.slope_scores for item in explanations], [item.slope_informations for item in explanations]
        ),
        kept=average([item.kept for item in explanations]),
        claimed=average([item.claimed for item in explanations]),
    )


def _surprise(scores: Sequence[FloatArray], informations: Sequence[FloatArray]) -> FloatArray:
    information = np.sum(informations, axis=0)
    return np.asarray(np.sum(scores, axis=0) / np.sqrt(np.maximum(information, 1e-300)))

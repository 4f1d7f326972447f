"""Random masks, decoded: which fine-tunes were kept in each element of a DARE or DELLA merge.

Every element is one of the 2^k outcomes that masks over k models can give, and in a sharp element one of them fits
far better than the others. Outcomes are enumerated with the merge's own formula, so what a sign election hides is
not taken for a dropped element. DARE: arXiv:2311.03099; DELLA: arXiv:2406.11617.

So many outcomes can fit anything a little: the same decode with fine-tunes that are not in the merge tells how well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from unmerge.checkpoint.dtypes import FloatArray
from unmerge.recipe.sample import Sample
from unmerge.recipe.structures import Masks, combine, least_squares

MAX_MODELS = 8
"""Beyond it there are too many outcomes to enumerate."""
STARTS = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
"""Densities from which the search begins."""
ROUNDS = 15
ARITHMETIC = 0.004
"""Relative error of what bfloat16 arithmetic makes of an outcome."""


@dataclass(frozen=True, slots=True)
class Masking:
    """A family of methods that draw masks.

    Attributes
    ----------
    consensus, normalize : bool
        As in `structures.Structure`.
    """

    name: str
    consensus: bool
    normalize: bool


MASKINGS = (
    Masking("linear", consensus=False, normalize=False),
    Masking("ties", consensus=True, normalize=False),
    Masking("ties, normalized", consensus=True, normalize=True),
)


@dataclass(frozen=True, slots=True, eq=False)
class Decoding:
    """Masks that were read off a sample.

    Attributes
    ----------
    masking : Masking
    weights : array, shape (k,)
        Of the changes after rescaling, so w_i / density_i where a method rescales; with `normalize` they are the
        divisor's weights, which sum to 1.
    rescale : array, shape (k,)
        With `normalize`: what each kept change is multiplied by; ones otherwise.
    densities : array, shape (k,)
        Shares of elements kept.
    slopes : array, shape (k,)
        By how much the share kept grows from the smallest to the largest element of a row: DELLA's 2 epsilon.
    error : float
        Energy of what is left over the energy of the change.
    """

    masking: Masking
    weights: FloatArray
    rescale: FloatArray
    densities: FloatArray
    slopes: FloatArray
    error: float


def all_masks(count: int) -> Masks:
    """Return the 2^k possible masks of k models, shape (2^k, k)."""
    return np.array(list(product((False, True), repeat=count)), dtype=np.bool_)


def outcomes(sample: Sample, masking: Masking, weights: FloatArray, rescale: FloatArray) -> FloatArray:
    """Return what each possible mask makes of each element, shape (2^k, m)."""
    deltas = sample.deltas * rescale[:, np.newaxis]
    return np.stack(
        [
            combine(
                deltas,
                np.broadcast_to(mask[:, np.newaxis], deltas.shape),
                weights,
                consensus=masking.consensus,
                normalize=masking.normalize,
            )[0]
            for mask in all_masks(len(weights))
        ]
    )


def decode(sample: Sample, start: FloatArray, masking: Masking) -> Decoding:
    """Find weights and masks.

    Parameters
    ----------
    start : array, shape (k,)
        Coefficients by least squares: what each fine-tune is in on average.
    """
    if masking.normalize:
        found = _search_normalized(sample, start, masking)
    else:
        found = min(
            (_alternate(sample, start / density, masking) for density in STARTS), key=lambda result: result.error
        )
    densities, slopes = kept_shares(sample, found)
    return replace(found, densities=densities, slopes=slopes)


def _alternate(sample: Sample, weights: FloatArray, masking: Masking) -> Decoding:
    """Choose the best outcome of each element and fit the weights to it, in turn."""
    ones = np.ones_like(weights)
    for _ in range(ROUNDS):
        chosen, _ = _nearest(sample, masking, weights, ones)
        _, used = combine(sample.deltas, chosen, weights, consensus=masking.consensus, normalize=False)
        fitted = least_squares(sample.deltas * used, sample.change)
        settled = np.allclose(fitted, weights, rtol=1e-5)
        weights = np.where(np.isfinite(fitted) & (fitted != 0.0), fitted, weights)
        if settled:
            break
    return _decoded(sample, masking, weights, ones)


def _search_normalized(sample: Sample, start: FloatArray, masking: Masking) -> Decoding:
    """Search weights and rescaling; a normalized mean is not linear in either."""
    few = sample.thinned(4000)
    shares = np.abs(start) / np.abs(start).sum()
    starts = [_decoded(few, masking, shares, np.full(len(start), 1.0 / density)) for density in STARTS]
    best = min(starts, key=lambda result: result.error)
    for part, turn in ((few, 0), (few, 1), (few, 2), (sample, 3), (sample, 4), (sample, 5)):
        best = _decoded(part, masking, best.weights, best.rescale)
        for _ in range(4):
            before = best.error
            best = _polished(part, best, 0.3 / 2.5**turn)
            if best.error > before * (1.0 - 1e-3):
                break
    return best


def _polished(sample: Sample, best: Decoding, step: float) -> Decoding:
    for model in range(len(best.weights)):
        for name in ("weights", "rescale"):
            for factor in (1.0 + step, 1.0 / (1.0 + step)):
                values = getattr(best, name).copy()
                values[model] *= factor
                moved = replace(best, **{name: values})
                tried = _decoded(sample, best.masking, moved.weights / np.abs(moved.weights).sum(), moved.rescale)
                if tried.error < best.error:
                    best = tried
                    break
    return best


def _nearest(sample: Sample, masking: Masking, weights: FloatArray, rescale: FloatArray) -> tuple[Masks, FloatArray]:
    """Return the mask whose outcome is nearest to each element, shape (k, m), and what it leaves."""
    distance = np.abs(outcomes(sample, masking, weights, rescale) - sample.change)
    best = distance.argmin(axis=0)
    return all_masks(len(weights))[best].T, np.take_along_axis(distance, best[np.newaxis], axis=0)[0]


def _decoded(sample: Sample, masking: Masking, weights: FloatArray, rescale: FloatArray) -> Decoding:
    _, left = _nearest(sample, masking, weights, rescale)
    nothing = np.zeros_like(weights)
    return Decoding(masking, weights, rescale, nothing, nothing, float(left @ left) / sample.energy)


def kept_shares(sample: Sample, decoding: Decoding) -> tuple[FloatArray, FloatArray]:
    """Estimate the shares of elements kept, and how they grow with an element's rank in its row.

    Where several outcomes fit, each counts by its likelihood and by how probable its mask is, which is what is being
    estimated: expectation maximisation.

    Returns
    -------
    densities, slopes : array, shape (k,)
    """
    likelihood = _likelihood(sample, decoding)
    masks = all_masks(len(decoding.weights))
    middle, slopes = np.full(masks.shape[1], 0.5), np.zeros(masks.shape[1])
    for _ in range(ROUNDS):
        chance = np.clip(middle[:, np.newaxis] + slopes[:, np.newaxis] * (sample.row_ranks - 0.5), 1e-3, 1.0 - 1e-3)
        prior = np.ones_like(likelihood)
        for number, mask in enumerate(masks):
            prior[number] = np.prod(np.where(mask[:, np.newaxis], chance, 1.0 - chance), axis=0)
        posterior = likelihood * prior
        posterior /= np.maximum(posterior.sum(axis=0), 1e-300)
        kept = masks.T.astype(np.float64) @ posterior
        middle, slopes = _lines(sample.row_ranks, kept)
    return middle, slopes


def _lines(ranks: FloatArray, kept: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Fit the share kept at the middle rank, and its slope, for each model."""
    centred = ranks - 0.5
    mean = centred.mean(axis=1)
    deviation = centred - mean[:, np.newaxis]
    slopes = (deviation * kept).sum(axis=1) / np.maximum((deviation**2).sum(axis=1), 1e-12)
    return np.clip(kept.mean(axis=1) - slopes * mean, 0.0, 1.0), slopes


def _likelihood(sample: Sample, decoding: Decoding) -> FloatArray:
    """Return how well each outcome fits each element, shape (2^k, m), up to a factor per element."""
    made = outcomes(sample, decoding.masking, decoding.weights, decoding.rescale)
    noise = sample.half_cell**2 / 3.0 + (ARITHMETIC * np.abs(made).max(axis=0)) ** 2
    exponent = -0.5 * (made - sample.change) ** 2 / noise
    return np.asarray(np.exp(exponent - exponent.max(axis=0)))


def unique(sample: Sample, decoding: Decoding, model: int) -> tuple[NDArray[np.int64], Masks]:
    """Return the elements in which it is certain whether a model was kept, and whether it was.

    Returns
    -------
    elements : array of int
        Positions in the sample.
    kept : array of bool
    """
    made = outcomes(sample, decoding.masking, decoding.weights, decoding.rescale)
    distance = np.abs(made - sample.change)
    masks = all_masks(len(decoding.weights))[:, model]
    inside, outside = distance[masks].min(axis=0), distance[~masks].min(axis=0)
    tolerance = 3.0 * sample.half_cell + 3.0 * ARITHMETIC * np.abs(made).max(axis=0)
    certain = (np.minimum(inside, outside) < tolerance) & (np.maximum(inside, outside) > 3.0 * tolerance)
    elements = np.flatnonzero(certain)
    return elements, np.asarray(inside[elements] < outside[elements])

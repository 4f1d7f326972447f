"""Weights of a merge whose arithmetic left next to no trace: they are pinned by the elements that nearly rounded on.

mergekit's ``linear`` multiplies and adds in single precision and rounds once, to 16 bits. What it stored is then a
wall: the weighted sum of the stored fine-tunes lay inside of the element's cell. Half a million such walls leave a set
of weights that is a millionth wide, and that stays so beside simple fractions, where a likelihood with a tenth of a
step of noise (`censored`) smooths the steps away and is biased by more than its width.

The likelihood of an element is that of its cell under Gaussian noise, plus a small constant, since a few elements
err (tensors that were computed in another order, sums on a tie). The noise is lowered step by step from that of
`censored`, the weights following, and the largest noise is taken beyond which lowering it gains nothing. Few walls
touch the set, so its shape need not be that of a Gaussian: draws from the likelihood (Metropolis's, with a fixed seed)
give the weights and their intervals. Where the shape is nearly Gaussian, as of merges that are stored in 32 bits, the
draws that are proposed are independent, and a sixth of them is enough. The likelihood of an element whose sum moves by
a small part of the noise is a parabola, and all such parabolas are one. References: Haario, Saksman and Tamminen, An
adaptive Metropolis algorithm, 2001; Tierney, Markov chains for exploring posterior distributions, 1994 (independence
chains).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unmerge.evidence.censored import ARITHMETIC, Cells, density
from unmerge.statistics import FloatArray

HALVINGS = 13
"""The smallest noise is that of `censored` halved so often: 1e-5 of a step of a 16-bit grid, what single precision is
good for."""
ROUGH, SOME = 4, 1 << 16
"""Halvings before which so many elements are enough: their noise is above `EXACT`, so they only lead the weights on."""
EXACT = 0.01
"""Noise up to which arithmetic counts as exact, in spacings."""
STRAY = 1e-6
"""Probability with which noise does not account for an element."""
STRAYS = 1e-3
"""Share of such elements from which the walls are not believed."""
SAME = 0.5
"""Natural logarithm of a likelihood that is no gain."""
STEPS = 30
"""Steps of a search at most."""
PRECISE, NO_GAIN = 1e-10, 1e-3
"""Steps and gains that end it."""
BLURRED = 3
"""Halvings fewer, at which more walls are met."""
PROVISIONAL, DRAWS = 1000, 4000
"""Draws for each of the two estimates of the set's shape, and of the set."""
INDEPENDENT, TRIED, WORTH = 1000, 100, 0.6
"""Independent draws, how many of them show whether they do, and what part of those must be left after weighting."""
WIDER = 1.1
"""Standard deviations of independent draws over the Gaussian's, as its tails may be too short."""
REACH = 12.0
"""Standard deviations that draws may stray."""
WIDEST = 1e-3
"""Standard deviation of a weight that no wall limits."""
ROUNDING = 4.0 * float(np.finfo(np.float64).eps)
"""Share of a covariance's trace that rounding may take from its eigenvalues."""
PARABOLIC = 6.0
"""Standard deviations over which an element's likelihood is to be a parabola."""
CUBIC = 0.05
"""The third derivative of the logarithm of a cell's probability, by its place over the noise, over 3! at most; of
elements that are not far outside of their cells, where `STRAY` counts."""
NO_MATTER = 0.1
"""What parabolas may err by, all together: natural logarithm of the likelihood."""
OUTSIDE = 3.0
"""Noises that an element may be outside of its cell by there."""
_DEEP = 8.0


@dataclass(frozen=True, slots=True, eq=False)
class Pinned:
    """Draws of the weights that the stored elements allow.

    Attributes
    ----------
    draws : array, shape (D, P)
        In the order in which they were drawn.
    noise : float
        Of the arithmetic, in spacings.
    """

    draws: FloatArray
    noise: float

    @property
    def weights(self) -> FloatArray:
        """Medians, shape (P,)."""
        return np.asarray(np.median(self.draws, axis=0))

    def intervals(self, level: float, *, signed: bool) -> FloatArray:
        """Return intervals between quantiles, shape (P, 2)."""
        outside = 0.5 * (1.0 - level)
        bounds = np.quantile(self.draws, [outside, 1.0 - outside], axis=0).T
        return np.asarray(bounds if signed else np.maximum(bounds, 0.0))


def pinned(tensors: Sequence[Cells], start: FloatArray) -> Pinned | None:
    """Return the weights that the elements allow; None if arithmetic was not precise enough for that.

    Parameters
    ----------
    tensors : sequence of Cells
        At least one.
    start : array, shape (P,)
        Weights by `censored_fit`, or by least squares.
    """
    walls = _Walls.of(tensors)
    # So much is lost if more elements err than are believed: arithmetic was not as precise, and lower noise loses more.
    worst = -STRAYS * np.log(STRAY) * len(walls.low)
    found = []
    weights = start.astype(np.float64)
    some, every = (_Nearby.all_of(looked_at, weights) for looked_at in (walls.some(SOME), walls))
    for halving in range(HALVINGS + 1):
        noise = ARITHMETIC * 0.5**halving
        if halving < ROUGH:
            weights, point = _climb(some, weights, noise)
            found.append((noise, weights, point.times(len(walls.low) / len(some.close.low))))
        else:
            every = every.closer(weights, 2.0 * _DEEP * noise)
            weights, point = _climb(every, weights, noise)
            found.append((noise, weights, point))
        if found[-1][2].likelihood < max(point.likelihood for *_, point in found) - worst:
            break
    best = max(point.likelihood for _, _, point in found)
    place = next(place for place, (_, _, point) in enumerate(found) if point.likelihood >= best - SAME)
    noise, weights, sharp = found[place]
    if noise > EXACT or walls.outside(weights, noise) > STRAYS * len(walls.low):
        return None
    generator = np.random.default_rng(0)
    draws = _independent(walls, weights, sharp.curvature, noise, generator)
    if draws is None:
        # So few walls may be met at the smallest noise that they do not limit every direction.
        _, _, blurred = found[max(0, place - BLURRED)]
        draws = _adapted(walls, weights, blurred.curvature, noise, generator)
    return Pinned(draws, noise)


@dataclass(frozen=True, slots=True, eq=False)
class _Point:
    """The likelihood at some weights."""

    likelihood: float
    gradient: FloatArray
    curvature: FloatArray

    def __add__(self, other: _Point) -> _Point:
        return _Point(
            self.likelihood + other.likelihood, self.gradient + other.gradient, self.curvature + other.curvature
        )

    def times(self, more: float) -> _Point:
        """Return that of so many times the elements."""
        return _Point(more * self.likelihood, more * self.gradient, more * self.curvature)


@dataclass(frozen=True, slots=True, eq=False)
class _Walls:
    """All elements, in spacings: changes (P, n) and the bounds of their sums (n,)."""

    changes: FloatArray
    low: FloatArray
    high: FloatArray

    @classmethod
    def of(cls, tensors: Sequence[Cells]) -> _Walls:
        return cls(
            np.concatenate([cells.changes / cells.spacing for cells in tensors], axis=1),
            np.concatenate([cells.low / cells.spacing for cells in tensors]),
            np.concatenate([cells.high / cells.spacing for cells in tensors]),
        )

    def some(self, most: int) -> _Walls:
        """Return about so many of them at most, evenly spread."""
        step = max(1, len(self.low) // most)
        return self.of_these(slice(None, None, step))

    def of_these(self, chosen: slice | NDArray[np.intp] | NDArray[np.bool_]) -> _Walls:
        """Return the chosen elements."""
        return _Walls(self.changes[:, chosen], self.low[chosen], self.high[chosen])

    def depth(self, weights: FloatArray) -> FloatArray:
        """Return how far inside of its cell each sum is; negative outside."""
        sums = weights @ self.changes
        return np.asarray(np.minimum(sums - self.low, self.high - sums))

    def outside(self, weights: FloatArray, noise: float) -> int:
        """Count the elements that noise does not account for."""
        return int(np.count_nonzero(self.depth(weights) < -_DEEP * noise))

    def near(self, weights: FloatArray, reach: FloatArray | float) -> _Walls:
        """Return the elements whose walls are not deeper than `reach`, in spacings."""
        return self.of_these(np.flatnonzero(self.depth(weights) < reach))

    def by_width(self, noise: float) -> tuple[_Walls, _Walls]:
        """Return the elements that at most one wall can touch with this noise, and those between two."""
        wide = self.high - self.low > 2.0 * _DEEP * noise
        return (self, self.of_these(slice(0))) if wide.all() else (self.of_these(wide), self.of_these(~wide))

    def likelihood_of_nearer(self, weights: FloatArray, noise: float) -> float:
        """Return its natural logarithm for elements that at most one wall touches."""
        from scipy.special import ndtr

        # In place: this is asked a thousand times, and new memory takes a third of the time.
        inside = weights @ self.changes
        other = np.subtract(self.high, inside)
        inside -= self.low
        np.minimum(inside, other, out=inside)
        inside /= noise
        ndtr(inside, out=inside)
        return _likelihood_of(inside)

    def likelihood(self, weights: FloatArray, noise: float) -> float:
        """Return its natural logarithm."""
        from scipy.special import ndtr

        sums = weights @ self.changes
        inside = np.subtract(self.high, sums)
        np.subtract(self.low, sums, out=sums)
        for bound in (inside, sums):
            bound /= noise
            ndtr(bound, out=bound)
        inside -= sums
        return _likelihood_of(inside)

    def point(self, weights: FloatArray, noise: float) -> _Point:
        """Return the likelihood and its derivatives."""
        wide, narrow = self.by_width(noise)
        return _by_nearer_wall(wide, weights, noise) + _by_both_walls(narrow, weights, noise)


@dataclass(frozen=True, slots=True, eq=False)
class _Nearby:
    """The elements whose sums can come close to a wall at weights that are not far from these.

    Attributes
    ----------
    close : _Walls
        Those whose walls are not deeper than `reach` at the weights `at`.
    at : array, shape (P,)
    reach : float
        In spacings.
    largest : array, shape (P,)
        Largest change of each atom, of all elements.
    wider : _Nearby or None
        More of them, for weights that are further away; None if these are all.
    """

    close: _Walls
    at: FloatArray
    reach: float
    largest: FloatArray
    wider: _Nearby | None

    @classmethod
    def all_of(cls, walls: _Walls, weights: FloatArray) -> _Nearby:
        return cls(walls, weights, np.inf, np.abs(walls.changes).max(axis=1, initial=0.0), None)

    def holding(self, weights: FloatArray, reach: float) -> _Walls:
        """Return the elements whose walls are not deeper than `reach` at other weights, or some more."""
        if self.wider is None:
            return self.close.near(weights, reach)
        moved = float(np.abs(weights - self.at) @ self.largest)  # no sum moves further
        return self.close if moved + reach <= self.reach else self.wider.holding(weights, reach)

    def closer(self, weights: FloatArray, reach: float) -> _Nearby:
        """Return the same around other weights."""
        return _Nearby(self.holding(weights, reach).near(weights, reach), weights, reach, self.largest, self)


def _by_nearer_wall(walls: _Walls, weights: FloatArray, noise: float) -> _Point:
    """Return the likelihood of elements that at most one wall touches."""
    from scipy.special import ndtr

    sums = weights @ walls.changes
    above, below = sums - walls.low, walls.high - sums
    at = np.minimum(above, below) / noise
    inside = ndtr(at)
    score = (1.0 - STRAY) * density(at) / _of_mixture(inside)
    curvature = score * (score + at) / noise**2
    return _summed(walls, inside, np.where(above < below, score, -score) / noise, curvature)


def _by_both_walls(walls: _Walls, weights: FloatArray, noise: float) -> _Point:
    from scipy.special import ndtr

    sums = weights @ walls.changes
    low, high = (walls.low - sums) / noise, (walls.high - sums) / noise
    inside = ndtr(high) - ndtr(low)
    share = (1.0 - STRAY) / _of_mixture(inside)
    at_low, at_high = share * density(low), share * density(high)
    score = (at_low - at_high) / noise
    curvature = score**2 + (high * at_high - low * at_low) / noise**2
    return _summed(walls, inside, score, curvature)


def _summed(walls: _Walls, inside: FloatArray, score: FloatArray, curvature: FloatArray) -> _Point:
    weighted = walls.changes * np.maximum(curvature, 0.0)
    return _Point(_likelihood_of(inside), walls.changes @ score, weighted @ walls.changes.T)


def _of_mixture(inside: FloatArray) -> FloatArray:
    """Return the probability of elements that noise keeps in their cells with these ones, or that are strays."""
    return np.asarray((1.0 - STRAY) * inside + STRAY)


def _likelihood_of(inside: FloatArray) -> float:
    """Return the natural logarithm of the same, summed; what is deep inside of its cell adds nothing. Written over."""
    inside *= 1.0 - STRAY
    inside += STRAY
    return float(np.log(inside, out=inside).sum())


def _climb(nearby: _Nearby, weights: FloatArray, noise: float) -> tuple[FloatArray, _Point]:
    """Search for the likeliest weights by Newton's method, halving steps that lead down."""

    def point(at: FloatArray) -> _Point:
        return nearby.holding(at, _DEEP * noise).point(at, noise)

    here = point(weights)
    for _ in range(STEPS):
        step = np.linalg.lstsq(here.curvature, here.gradient, rcond=1e-12)[0]
        if 0.5 * float(step @ here.gradient) < NO_GAIN:
            break
        there = point(weights + step)
        while there.likelihood < here.likelihood and np.abs(step).max() > PRECISE:
            step = 0.5 * step
            there = point(weights + step)
        gain = there.likelihood - here.likelihood
        if gain > 0.0:
            weights, here = weights + step, there
        if gain < NO_GAIN:
            break
    return weights, here


def _covariance(curvature: FloatArray) -> FloatArray:
    return np.asarray(np.linalg.inv(curvature + np.eye(len(curvature)) / WIDEST**2), dtype=np.float64)


def _independent(
    walls: _Walls, weights: FloatArray, curvature: FloatArray, noise: float, generator: np.random.Generator
) -> FloatArray | None:
    """Draw from the likelihood by way of the Gaussian that is like it at its top; None if it is another elsewhere."""
    likelihood, root = _likelihood(walls, weights, WIDER**2 * _covariance(curvature), noise)
    normal = generator.standard_normal((INDEPENDENT, len(weights)))
    proposed = weights + normal @ root.T

    def log_ratios(start: int, stop: int) -> list[float]:
        return [
            likelihood(at) + 0.5 * float(own @ own)
            for at, own in zip(proposed[start:stop], normal[start:stop], strict=True)
        ]

    ratios = log_ratios(0, TRIED)
    shares = np.exp(np.array(ratios) - max(ratios))
    if shares.sum() ** 2 < WORTH * TRIED * (shares @ shares):
        return None
    ratios += log_ratios(TRIED, INDEPENDENT)
    levels, here, draws = np.log(generator.random(INDEPENDENT)), 0, np.empty_like(proposed)
    for number in range(INDEPENDENT):
        if levels[number] < ratios[number] - ratios[here]:
            here = number
        draws[number] = proposed[here]
    return draws


def _adapted(
    walls: _Walls, weights: FloatArray, curvature: FloatArray, noise: float, generator: np.random.Generator
) -> FloatArray:
    """Draw from the likelihood; the steps' covariance is that of earlier draws."""
    covariance = _covariance(curvature)
    for count in (PROVISIONAL, PROVISIONAL):
        draws = _metropolis(walls, weights, covariance, noise, count, generator)
        # A set of draws that never moved says nothing of the shape.
        seen = np.cov(draws[count // 3 :].T).reshape(covariance.shape)
        covariance = np.asarray(seen + 1e-3 * covariance, dtype=np.float64)
        weights = draws[-1]
    return _metropolis(walls, weights, covariance, noise, DRAWS, generator)


def _metropolis(
    walls: _Walls, weights: FloatArray, covariance: FloatArray, noise: float, count: int, generator: np.random.Generator
) -> FloatArray:
    likelihood, root = _likelihood(walls, weights, covariance, noise)
    steps = (2.4 / np.sqrt(len(weights))) * generator.standard_normal((count, len(weights))) @ root.T
    levels = np.log(generator.random(count))
    draws = np.empty((count, len(weights)))
    here = likelihood(weights)
    for number in range(count):
        proposed = weights + steps[number]
        there = likelihood(proposed)
        if levels[number] < there - here:
            weights, here = proposed, there
        draws[number] = weights
    return draws


def _likelihood(
    walls: _Walls, weights: FloatArray, covariance: FloatArray, noise: float
) -> tuple[Callable[[FloatArray], float], FloatArray]:
    """Return the logarithm of the likelihood of weights not far from these, and the covariance's root."""
    # Of copies of one atom only the sum is known: the covariance may be singular but for rounding.
    rounding = ROUNDING * float(np.trace(covariance)) * np.eye(len(covariance))
    root = np.asarray(np.linalg.cholesky(covariance + rounding), dtype=np.float64)
    spread = np.linalg.norm(root.T @ walls.changes, axis=0)
    near = np.flatnonzero(walls.depth(weights) < REACH * spread + _DEEP * noise)
    close = walls.of_these(near)
    flat = _flat(close, weights, spread[near], noise)
    parabolas = close.of_these(flat).point(weights, noise)
    wide, narrow = close.of_these(~flat).by_width(noise)

    def likelihood(at: FloatArray) -> float:
        moved = at - weights
        slope = parabolas.gradient - 0.5 * (parabolas.curvature @ moved)
        others = wide.likelihood_of_nearer(at, noise) + narrow.likelihood(at, noise)
        return parabolas.likelihood + float(moved @ slope) + others

    return likelihood, root


def _flat(walls: _Walls, weights: FloatArray, spread: FloatArray, noise: float) -> NDArray[np.bool_]:
    """Tell which elements' likelihoods may be replaced by parabolas: those that move least, as long as it matters not.

    Parameters
    ----------
    spread : array, shape (n,)
        Standard deviation of each sum, in spacings.
    """
    errors = CUBIC * (PARABOLIC * spread / noise) ** 3
    errors[walls.depth(weights) < -OUTSIDE * noise] = np.inf
    order = np.argsort(errors, kind="stable")
    flat = np.zeros(len(errors), dtype=np.bool_)
    flat[order] = np.cumsum(errors[order]) < NO_MATTER
    return flat

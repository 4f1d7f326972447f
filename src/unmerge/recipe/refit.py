"""What a number of a recipe would have to be for the recipe to make a target.

Numbers that results follow smoothly (weights, t, lambda) by Gauss-Newton on the made tensors themselves, in spacings of
the target's grid, where rounding is the same everywhere; numbers that move a threshold by trying values. People write
short decimals, so the answer is the shortest one that makes the most elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from unmerge.checkpoint.dtypes import DTYPES, FloatArray
from unmerge.errors import RecipeError
from unmerge.recipe.claims import Claim, put_all
from unmerge.recipe.probes import Hypothesis, Probes

TRIED = {
    "density": tuple(step / 10 for step in range(1, 11)),
    "select_topk": tuple(step / 10 for step in range(1, 11)),
    "gamma": (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2),
    "epsilon": tuple(10.0**power * step for power in range(-7, -1) for step in (1, 2, 5)),
    "max_iter": (1, 2, 5, 20, 50, 100),
}
"""Values that are tried of numbers that move a threshold."""
FINER = {"density": (0.05, 0.01, 0.001), "select_topk": (0.05, 0.01), "gamma": (0.005, 0.001)}
"""Steps by which the best of them is then refined."""
OFFSETS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
"""How far from a claimed number others are tried, where least squares finds none that does it."""
STEPS = 3
"""Gauss-Newton steps."""
DIGITS = 4
"""Digits after the point that are looked for."""
_FRACTIONS = (1 / 3, 2 / 3, 1 / 6)
LOOKED_AT = 3
"""Smooth numbers that are looked at closer: those for which least squares leaves least."""
AS_LITTLE, NOISE = 2.0, 0.01
"""A number does what another does that least squares leaves so many times as much for, and this many spacings^2."""
PERFECT = 1.0 - 1e-6
"""A share that ends a search."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """The best value of a number.

    Attributes
    ----------
    value : float
    share : float
        Of the probes' elements that the recipe then makes.
    """

    value: float
    share: float


def fit_smooth(trials: Sequence[Trial]) -> list[tuple[Trial, Fitted]]:
    """Find the values of numbers that results follow smoothly, one changed at a time, with which most are made.

    Looked at are those for which least squares leaves least, and once one of them makes all elements, only those that
    may do the same.

    Returns
    -------
    list of (Trial, Fitted)
        Those that were looked at.
    """
    fits: list[tuple[Trial, Fitted]] = []
    enough = np.inf
    for trial, near in _smooth_fits(trials):
        if near.left > enough or len(fits) >= LOOKED_AT:
            break
        fits.append((trial, shortest(trial.share, near.value)))
        if fits[-1][1].share >= PERFECT:
            enough = AS_LITTLE * near.left + NOISE
    return fits


def search(trials: Sequence[Trial]) -> list[tuple[Trial, Fitted]]:
    """Find the values of numbers by trying, one changed at a time; the first that makes all elements ends it.

    Thresholds by a grid that is refined; numbers that results follow smoothly around the claim, for where signs are
    elected, least squares sees little but the flips.
    """
    fits: list[tuple[Trial, Fitted]] = []
    for trial in trials:
        look = _around if is_smooth(trial.claim) else _search
        fits.append((trial, look(trial.share, trial.claim)))
        if fits[-1][1].share >= PERFECT:
            break
    return fits


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """A number of a recipe that is changed, and the tensors that it is tried on."""

    probes: Probes
    hypothesis: Hypothesis
    claim: Claim

    def share(self, value: float) -> float:
        """Return the share of elements that are made with another value."""
        return self.probes.share(self.put(value))

    def put(self, value: float) -> Hypothesis:
        """Return the hypothesis with another value."""
        return replace(self.hypothesis, recipe=self.claim.put(value))


@dataclass(frozen=True, slots=True)
class _Near:
    """What least squares makes of a number, and the mean square that it leaves, in spacings."""

    value: float
    left: float


def _smooth_fits(trials: Sequence[Trial]) -> list[tuple[Trial, _Near]]:
    """Fit each by least squares; those first that leave least."""
    fits = [(trial, _newton(trial.probes, trial.hypothesis, [trial.claim])) for trial in trials]
    found = [(trial, _Near(float(fit[0][0]), fit[1])) for trial, fit in fits if fit is not None]
    return sorted(found, key=lambda pair: pair[1].left)


def _around(share: Callable[[float], float], claim: Claim) -> Fitted:
    stands = float(claim.value)
    tried = [stands + sign * offset for offset in OFFSETS for sign in (-1.0, 1.0)]
    best = max((Fitted(value, share(value)) for value in tried), key=lambda found: found.share)
    return best if best.share >= PERFECT or best.share <= share(stands) else shortest(share, best.value)


def fit_together(probes: Probes, hypothesis: Hypothesis, claims: Sequence[Claim]) -> FloatArray | None:
    """Return values of several numbers that results follow smoothly, shape (claims,); None if they change nothing."""
    found = _newton(probes, hypothesis, claims)
    return None if found is None else found[0]


def is_smooth(claim: Claim) -> bool:
    """Tell whether results follow a number smoothly."""
    return claim.is_number and claim.parameter.name not in TRIED


def _search(share: Callable[[float], float], claim: Claim) -> Fitted:
    tried: dict[float, float] = {}

    def look(values: Iterable[float]) -> float:
        for value in values:
            if value not in tried and value != float(claim.value):
                tried[value] = share(value)
            if tried.get(value, 0.0) >= PERFECT:
                break
        return max(tried, key=lambda value: tried[value])

    best = look(TRIED[claim.parameter.name])
    for step in FINER.get(claim.parameter.name, ()):
        if tried[best] >= PERFECT:
            break
        best = look(round(best + count * step, 6) for count in range(-5, 6) if best + count * step >= 0.0)
    return Fitted(best, tried[best])


def shortest(share: Callable[[float], float], near: float) -> Fitted:
    """Return the shortest decimal near a value with which most elements are made."""
    best = Fitted(near, -1.0)
    for candidate in _decimals(near):
        found = share(candidate)
        if found > best.share:
            best = Fitted(candidate, found)
        if found >= PERFECT:
            break
    return best


def _decimals(near: float) -> Iterable[float]:
    """Yield decimals around a value, those with few digits first, then fractions."""
    seen: set[float] = set()
    for digits in range(1, DIGITS + 1):
        unit = 10.0**-digits
        for steps in (0, -1, 1, -2, 2):
            value = round(round(near, digits) + steps * unit, digits)
            if abs(value - near) <= max(unit, 0.02 * abs(near)) and value not in seen:
                seen.add(value)
                yield value
        if digits == 2:
            yield from (value for value in _FRACTIONS if abs(value - near) < unit)


def _newton(probes: Probes, hypothesis: Hypothesis, claims: Sequence[Claim]) -> tuple[FloatArray, float] | None:
    """Fit numbers by least squares in spacings of the target's grid; with the mean square that is left."""
    values, left = np.array([float(claim.value) for claim in claims]), 0.0
    for _ in range(STEPS):
        made = _stacked(probes, _with(hypothesis, claims, values))
        if made is None:
            return None
        ours, found, spacing = made
        slopes = []
        for index in range(len(claims)):
            moved = values.copy()
            moved[index] += (width := max(0.02, 0.1 * abs(values[index])))
            other = _stacked(probes, _with(hypothesis, claims, moved))
            if other is None:
                return None
            slopes.append((other[0] - ours) / (width * spacing))
        fitted = _least_squares(np.array(slopes), (found - ours) / spacing)
        if fitted is None:
            return None
        step, left = fitted
        values = values + step
        if np.abs(step).max() < 1e-5:
            break
    return values, left


def _with(hypothesis: Hypothesis, claims: Sequence[Claim], values: FloatArray) -> Hypothesis:
    if len(claims) == 1:
        return replace(hypothesis, recipe=claims[0].put(float(values[0])))
    named = {claim.subject: float(value) for claim, value in zip(claims, values, strict=True)}
    return replace(hypothesis, recipe=put_all(hypothesis.recipe, hypothesis.method, named))


def _stacked(probes: Probes, hypothesis: Hypothesis) -> tuple[FloatArray, FloatArray, FloatArray] | None:
    """Return what a hypothesis makes, what the target holds, and the target's spacing, of all probes."""
    try:
        made = list(probes.made(hypothesis))
    except RecipeError:
        return None
    ours = np.concatenate([item.ours for item in made]).astype(np.float64)
    found = np.concatenate([item.found for item in made]).astype(np.float64)
    spacing = np.concatenate([DTYPES[item.stored.dtype.name].spacing(item.found.astype(np.float64)) for item in made])
    return ours, found, spacing


def _least_squares(slopes: FloatArray, residual: FloatArray) -> tuple[FloatArray, float] | None:
    """Return the step, and the mean square that it leaves; None where nothing hangs on the numbers."""
    usable = np.isfinite(residual) & np.isfinite(slopes).all(axis=0)
    slopes, residual = slopes[:, usable], residual[usable]
    gram = slopes @ slopes.T
    if not np.diagonal(gram).any():
        return None
    step = np.asarray(np.linalg.lstsq(gram, slopes @ residual, rcond=1e-10)[0])
    return step, float(np.mean((residual - step @ slopes) ** 2))

"""The arithmetic of `lattice`, one element after the other, compiled.

Of the steps that a stranger may have been rounded to, only those are summed whose cell can hold the element: a few,
where array arithmetic would have to take all of them for all elements. Steps are those around the stranger's value, not
around the base's: a change may cross a power of two. Compiled code is kept beside this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar, cast

import numba
import numpy as np

from unmerge.statistics import FloatArray

Function = TypeVar("Function", bound=Callable[..., object])

STRAY = 1e-6
"""Probability of an element that nothing accounts for."""
_FAR, _OUT = 35.0, 8.0
_EXPONENT = 0x7FF0000000000000
_TOGETHER = 1e-250
"""Probabilities are multiplied down to here: one logarithm for many elements."""
_DENSITY = 1.0 / math.sqrt(2.0 * math.pi)


def _compiled(function: Function) -> Function:
    return cast("Function", numba.njit(nogil=True, cache=True, error_model="numpy")(function))


@_compiled
def _normal(at: float) -> tuple[float, float]:
    """Return the normal distribution, exact to 1e-15 also where it is small, and its density; one exponential for both.

    Hart's rational approximation, in: West, Better approximations to cumulative normal functions, 2005.
    """
    size = abs(at)
    bell = math.exp(-0.5 * size * size)
    if size < 7.07106781186547:
        upper = 3.52624965998911e-2 * size + 0.700383064443688
        upper = upper * size + 6.37396220353165
        upper = upper * size + 33.912866078383
        upper = upper * size + 112.079291497871
        upper = upper * size + 221.213596169931
        upper = upper * size + 220.206867912376
        lower = 8.83883476483184e-2 * size + 1.75566716318264
        lower = lower * size + 16.064177579207
        lower = lower * size + 86.7807322029461
        lower = lower * size + 296.564248779674
        lower = lower * size + 637.333633378831
        lower = lower * size + 793.826512519948
        lower = lower * size + 440.413735824752
        tail = bell * upper / lower
    else:
        fraction = size + 1.0 / (size + 2.0 / (size + 3.0 / (size + 4.0 / (size + 0.65))))
        tail = bell * _DENSITY / fraction
    return (1.0 - tail if at > 0.0 else tail), _DENSITY * bell


@_compiled
def _step(at: float) -> tuple[float, float]:
    """Return the same; far out, where the rest is nothing, 0 and 1."""
    if abs(at) < _OUT:
        return _normal(at)
    return (1.0 if at > 0.0 else 0.0), 0.0


@_compiled
def see_continuous(
    low: float, high: float, spacing: float, noise: float, middle: float, error: float, share: float
) -> tuple[float, float, float, float]:
    """Return probability, score, mean and variance of an element in which rounding of the stranger is noise."""
    spread = math.sqrt((share * error) ** 2 + (share * spacing) ** 2 / 12.0 + noise**2)
    below, above = (low - share * middle) / spread, (high - share * middle) / spread
    sign = 1.0
    if below > 0.0:
        # The lower tail is the one that is computed without cancellation.
        below, above, sign = -above, -below, -1.0
    below, above = min(max(below, -_FAR), _FAR), min(max(above, -_FAR), _FAR)
    (to_low, at_low), (to_high, at_high) = _normal(below), _normal(above)
    probability = max(to_high - to_low, 1e-300)
    pull = sign * (at_low - at_high) / probability
    left = min(max(1.0 + (below * at_low - above * at_high) / probability - pull**2, 0.0), 1.0)
    gain = share * error**2 / spread
    mean, squares = gain * pull, error**2 - gain**2 * (1.0 - left) + (gain * pull) ** 2
    # An element that nothing accounts for says nothing.
    told = probability / (probability + STRAY)
    return (
        probability,
        told * pull / spread,
        middle + told * mean,
        error**2 + told * (squares - error**2) - (told * mean) ** 2,
    )


@_compiled
def _told(
    total: float, score: float, first: float, second: float, noise: float, middle: float, error: float
) -> tuple[float, float, float, float]:
    """Return probability, score, mean and variance of an element from sums over steps, in standard deviations."""
    per_whole = 1.0 / (total + STRAY)
    mean = first * per_whole
    # An element that nothing accounts for says nothing: its share of the answer is what was known before.
    spread = (second + STRAY) * per_whole - mean**2
    return total, score * per_whole / noise, middle + error * mean, error**2 * max(spread, 0.0)


@_compiled
def see_stepwise(
    low: float, high: float, spacing: float, noise: float, middle: float, error: float, share: float, offsets: int
) -> tuple[float, float, float, float]:
    """Return the same of an element in which the stranger's steps, `offsets` to each side, are told apart."""
    nearest = round(middle / spacing)
    center, unit = middle / error, spacing / error
    # The cell and its blurred walls in steps.
    per_step = 1.0 / (share * spacing)
    bottom, top, blur = low * per_step, high * per_step, _OUT * noise * per_step
    # Of other steps the cell is out of reach, and of those between the inner ones it is hit for sure.
    first_step = max(nearest - offsets, math.ceil(bottom - blur))
    last_step = min(nearest + offsets, math.floor(top + blur))
    first_inner, last_inner = math.ceil(bottom + blur), min(last_step, math.floor(top - blur))
    total = score = first = second = 0.0
    edge = (first_step - 0.5) * unit - center
    below, at_edge = _step(edge)
    number = first_step
    while number <= last_step:
        taken = max(last_inner - number + 1, 1) if number >= first_inner else 1
        upper = edge + taken * unit
        above, at_upper = _step(upper)
        chance, moment = above - below, at_edge - at_upper
        bent = chance + edge * at_edge - upper * at_upper
        if taken == 1:
            at = number * share * spacing
            (to_low, at_low), (to_high, at_high) = _step((low - at) / noise), _step((high - at) / noise)
            inside = to_high - to_low
            score += chance * (at_low - at_high)
            chance, moment, bent = chance * inside, moment * inside, bent * inside
        total, first, second = total + chance, first + moment, second + bent
        edge, below, at_edge = upper, above, at_upper
        number += taken
    return _told(total, score, first, second, noise, middle, error)


@_compiled
def _power(size: float, smallest: float) -> float:
    """Return the power of two below a magnitude, or the smallest one that the grid follows."""
    if size < smallest:
        return smallest
    # Without the fraction's bits: a call of frexp takes as long as everything else of an element.
    return float(np.int64(np.float64(size).view(np.int64) & _EXPONENT).view(np.float64))


@_compiled
def _above(value: float, fine: float, smallest: float) -> float:
    """Return the next value of a grid, whose steps are `fine` times the power of two below."""
    if value >= 0.0:
        return value + fine * _power(value, smallest)
    power = _power(-value, smallest)
    # Below a power of two the grid is twice as fine.
    return value + fine * (0.5 * power if -value == power and power > smallest else power)


@_compiled
def see_across(
    low: float,
    high: float,
    first: float,
    count: int,
    noise: float,
    middle: float,
    error: float,
    share: float,
    fine: float,
    smallest: float,
) -> tuple[float, float, float, float]:
    """Return the same where steps are not all of one size: `count` of them from the value `first`."""
    value, following = first, _above(first, fine, smallest)
    total = score = one = two = 0.0
    edge, known = 0.5 * (first - _above(-first, fine, smallest)), False
    below = at_edge = lower = 0.0
    margin = _OUT * noise
    for number in range(count):
        at, end = share * value, 0.5 * (value + following)
        reached = low - margin < at < high + margin
        if reached:
            if not known:
                lower = (edge - middle) / error
                below, at_edge = _step(lower)
            upper = (end - middle) / error
            sure = low + margin < at < high - margin
            # What follows is summed together as long as the cell is hit for sure.
            if not (sure and number + 1 < count and low + margin < share * following < high - margin):
                above, at_upper = _step(upper)
                chance, moment = above - below, at_edge - at_upper
                bent = chance + lower * at_edge - upper * at_upper
                if not sure:
                    to_low, at_low = _step((low - at) / noise)
                    to_high, at_high = _step((high - at) / noise)
                    inside = to_high - to_low
                    score += chance * (at_low - at_high)
                    chance, moment, bent = chance * inside, moment * inside, bent * inside
                total, one, two = total + chance, one + moment, two + bent
                lower, below, at_edge = upper, above, at_upper
        elif at > high:
            break
        known = reached
        edge, value, following = end, following, _above(following, fine, smallest)
    return _told(total, score, one, two, noise, middle, error)


@_compiled
def see(
    low: FloatArray,
    high: FloatArray,
    weights: FloatArray,
    noise: FloatArray,
    middle: FloatArray,
    error: FloatArray,
    share: float,
    fine: float,
    smallest: float,
    limits: FloatArray,
    offsets: FloatArray,
    found: FloatArray,
) -> float:
    """Look at m elements.

    Parameters
    ----------
    low, high, weights, noise, middle, error : array, shape (m,)
        The cell less what the known atoms give, the base, the noise, and what is known of the stranger's change.
    share : float
        The stranger's weight.
    fine, smallest : float
        Steps of the stranger's grid are `fine` times the power of two below a value, or below `smallest`.
    limits : array, shape (O,)
        Errors in steps, ascending, up to each of which so many `offsets` are summed; beyond the last, none.
    offsets : array, shape (O,)
        Steps to each side.
    found : array, shape (3, m)
        Filled with score, mean and variance.

    Returns
    -------
    float
        The likelihood's natural logarithm.
    """
    likelihood, together = 0.0, 1.0
    for place in range(len(low)):
        # The stranger's own value is what was rounded; the cell holds the merge less the known changes and the base.
        tuned = weights[place] + middle[place]
        bottom, top = low[place] + share * weights[place], high[place] + share * weights[place]
        power = _power(abs(tuned), smallest)
        spacing = fine * power
        ratio = error[place] / spacing
        reach = 0
        for number in range(len(limits)):
            if ratio <= limits[number]:
                reach = int(offsets[number])
                break
        room = (reach + 1) * spacing
        if not reach:
            seen = see_continuous(bottom, top, spacing, noise[place], tuned, error[place], share)
        elif abs(tuned) + room < 2.0 * power and (abs(tuned) - room > power or power == smallest):
            seen = see_stepwise(bottom, top, spacing, noise[place], tuned, error[place], share, reach)
        else:
            least = tuned - reach * spacing
            step = fine * _power(abs(least), smallest)
            # Below a power of two there are twice as many steps.
            seen = see_across(
                bottom,
                top,
                round(least / step) * step,
                4 * reach + 1,
                noise[place],
                tuned,
                error[place],
                share,
                fine,
                smallest,
            )
        together *= seen[0] + STRAY
        if together < _TOGETHER:
            likelihood, together = likelihood + math.log(together), 1.0
        found[0, place], found[1, place], found[2, place] = seen[1], seen[2] - weights[place], seen[3]
    return likelihood + math.log(together)

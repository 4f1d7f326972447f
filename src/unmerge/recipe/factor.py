"""The number that one stored tensor is another times: its bounds, and the shortest decimal between them.

A stored value is known to lie in a cell of its type's grid, so every element bounds the number from below and above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from unmerge.checkpoint.dtypes import DType, FloatArray

Bounds = tuple[float, float]
"""The lowest and the highest number; none fits where the first is above the second."""
NOTHING: Bounds = (math.inf, -math.inf)
_DIFFERENT = 16
# Products are rounded to float32 before they are stored in 16 bits, which moves a bound by half a step.
_SLACK = {"BF16": 2.0**-24, "F16": 2.0**-24, "F32": 2.0**-50, "F64": 2.0**-50}
_MOST_DECIMALS = 40
_INFINITE = np.float32(math.inf)


def factor_bounds(target: FloatArray, source: FloatArray, dtype: DType) -> Bounds:
    """Return the bounds of the numbers that `source` may have been multiplied with to be stored as `target`.

    Parameters
    ----------
    target, source : array
        Values of the same shape; the target's are on the grid of `dtype`, and not all zero.

    Returns
    -------
    tuple of float
        Necessary, and up to the rounding of products sufficient. Values that are zero in the source must be
        zero in the target.
    """
    held = source != 0.0
    if np.any(target[~held] != 0.0):
        return NOTHING
    divisor = source[held]
    low, high = dtype.cell(target[held])
    first, second = low / divisor, high / divisor
    lowest = float(np.max(np.minimum(first, second), initial=-math.inf))
    highest = float(np.min(np.maximum(first, second), initial=math.inf))
    slack = _SLACK[dtype.name]
    return lowest - abs(lowest) * slack, highest + abs(highest) * slack


def tells_factors(source: FloatArray) -> bool:
    """Tell whether a tensor has enough different magnitudes to say that another is it times a number."""
    return len(np.unique(np.abs(source))) >= _DIFFERENT


def simplest(bounds: Bounds) -> float:
    """Return the number with the fewest decimals between finite bounds; of those, the one nearest to the middle."""
    low, high = bounds
    middle = 0.5 * (low + high)
    for decimals in range(_MOST_DECIMALS):
        number = round(middle, decimals)
        if low <= number <= high:
            return number
    return middle


def common_numbers(all_bounds: Sequence[Bounds]) -> list[float]:
    """Choose a number within each of several bounds: as few different ones as possible, each as short as possible.

    One factor in a recipe holds for many tensors, and what one tensor leaves open another may tell.
    """
    groups: list[list[int]] = []
    # By their upper end: the first one's end is a number that as many as possible have in common.
    for index in sorted(range(len(all_bounds)), key=lambda item: all_bounds[item][1]):
        if not groups or all_bounds[index][0] > all_bounds[groups[-1][0]][1]:
            groups.append([])
        groups[-1].append(index)
    chosen = [math.nan] * len(all_bounds)
    for group in groups:
        number = simplest((max(all_bounds[item][0] for item in group), all_bounds[group[0]][1]))
        for item in group:
            chosen[item] = number
    return chosen


def decimals_of(number: float) -> Bounds:
    """Return bounds of what is read as the same float32 number as this one."""
    single = np.float32(number)
    # A hair inside half way, so that a tie cannot go to a neighbour.
    part = 0.5 - 2.0**-20
    down, up = (part * (float(np.nextafter(single, end)) - float(single)) for end in (-_INFINITE, _INFINITE))
    return float(single) + down, float(single) + up

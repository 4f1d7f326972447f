"""The simplest decimals that measured numbers may stand for: people write 0.3, not 0.30078."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from unmerge.checkpoint.dtypes import FloatArray

DIGITS = 4
"""Decimals with more digits are not looked for."""
REFERENCES = (1.0, 0.5, 0.4, 0.3, 0.6, 0.2, 0.7, 0.8, 0.9, 0.1, 0.25, 0.75, 0.35, 0.45, 0.55, 0.65, 0.15, 0.85, 0.95)
"""What the largest weight is likely to have been, where only ratios are known, likeliest first."""


def digits(value: float) -> int:
    """Return how many digits a decimal has after the point, up to `DIGITS`; beyond, one more."""
    enough = (count for count in range(DIGITS + 1) if math.isclose(value, round(value, count), abs_tol=1e-9))
    return next(enough, DIGITS + 1)


def simplest(value: float, tolerance: float) -> float:
    """Return the decimal with the fewest digits, one at least, within `tolerance` of a value, the nearest of those.

    The value itself where none has at most `DIGITS`.
    """
    for count in range(1, DIGITS + 1):
        # Halves of the last digit are as usual as whole ones: 0.25, 0.125.
        for rounded in (round(value, count), round(2.0 * value, count) / 2.0):
            if abs(rounded - value) <= tolerance:
                return rounded + 0.0  # never a negative zero
    return value


def ratio_decimals(ratios: FloatArray, tolerance: float, limit: int = 12) -> list[FloatArray]:
    """Return decimals in given ratios, the simplest first.

    Parameters
    ----------
    ratios : array, shape (k,)
        Known up to a common positive factor.
    tolerance : float
        Relative error of each.
    limit : int
        How many to return.
    """
    largest = float(np.abs(ratios).max())
    found: list[tuple[int, int, FloatArray]] = []
    sums_to_one = _summing_to_one(ratios, tolerance)
    references = [*REFERENCES, *(number / 100.0 for number in range(5, 100))]
    for order, reference in enumerate(references):
        snapped = _snapped(ratios * (reference / largest), tolerance)
        found.append((_cost(snapped), order, snapped))
    # Weights that sum to 1 are the commonest of all, and 1 / k is as simple as a decimal of one digit.
    equal = np.ptp(sums_to_one) == 0.0
    cost = min(_cost(sums_to_one), len(ratios)) if equal else _cost(sums_to_one)
    found.append((cost - 1, -1, sums_to_one))
    found.sort(key=lambda item: item[:2])
    return list(itertools.islice(_distinct(item[2] for item in found), limit))


def _summing_to_one(ratios: FloatArray, tolerance: float) -> FloatArray:
    """Return decimals that sum to 1; equal ones as people compute them, 1 / k: a third is no short decimal."""
    shares = ratios / float(np.abs(ratios).sum())
    if np.abs(shares * len(shares) - 1.0).max() <= tolerance:
        return np.full(len(shares), round(1.0 / len(shares), DIGITS))
    return _snapped(shares, tolerance)


def _snapped(values: FloatArray, tolerance: float) -> FloatArray:
    return np.array([simplest(float(value), tolerance * abs(float(value))) for value in values])


def _cost(values: FloatArray) -> int:
    return sum(digits(float(value)) for value in values)


def _distinct(candidates: Iterable[FloatArray]) -> Iterable[FloatArray]:
    seen: set[tuple[float, ...]] = set()
    for candidate in candidates:
        key = tuple(np.round(candidate, 6).tolist())
        if key not in seen:
            seen.add(key)
            yield candidate


def gradient(depths: FloatArray, values: FloatArray, tolerance: float) -> tuple[float, ...]:
    """Return the shortest list of anchors whose interpolation goes through values, as mergekit interpolates.

    Parameters
    ----------
    depths : array, shape (L,)
        In [0, 1], of each layer.
    values : array, shape (L,)
        What was measured there.
    tolerance : float
        Absolute error of each value.

    Returns
    -------
    tuple of float
        One anchor for a constant; decimals where they are within the tolerance.
    """
    for count in range(1, len(values) + 1):
        anchors = _anchors(depths, values, count)
        if anchors is None:
            continue
        rounded = np.array([simplest(float(anchor), tolerance) for anchor in anchors])
        if np.abs(interpolated(rounded, depths) - values).max() <= 2.0 * tolerance:
            return tuple(float(anchor) for anchor in rounded)
    return _through(depths, values, tolerance)


def _through(depths: FloatArray, values: FloatArray, tolerance: float) -> tuple[float, ...]:
    """Return so many anchors that the values lie between them, where layers are missing that would say more."""
    order = np.argsort(depths)
    for count in itertools.count(len(values)):
        anchors = np.interp(np.linspace(0.0, 1.0, count), depths[order], values[order])
        if np.abs(interpolated(anchors, depths) - values).max() <= 2.0 * tolerance:
            break
    return tuple(float(anchor) for anchor in anchors)


def interpolated(anchors: Sequence[float] | FloatArray, depths: FloatArray) -> FloatArray:
    """Return a gradient's values at depths: piecewise linear between evenly spaced anchors."""
    if len(anchors) == 1:
        return np.full(len(depths), float(anchors[0]))
    return np.asarray(np.interp(depths, np.linspace(0.0, 1.0, len(anchors)), anchors))


def _anchors(depths: FloatArray, values: FloatArray, count: int) -> FloatArray | None:
    """Fit anchors by least squares; None where the depths do not determine them."""
    basis = np.stack([interpolated(row, depths) for row in np.eye(count)], axis=1)
    if np.linalg.matrix_rank(basis) < count:
        return None
    found, *_ = np.linalg.lstsq(basis, values, rcond=None)
    return np.asarray(found)

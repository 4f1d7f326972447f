"""Arcee Fusion: a model's elements that stand out, in the base."""

from __future__ import annotations

import numpy as np

from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.contract import base_of, models_of
from unmerge.merging.method import Group, MergeMethod
from unmerge.merging.reductions import apply, full_precision, fused, total

SAMPLE = 1_000_000
"""Tensors of more elements than this have their quantiles taken from this many random ones, by mergekit."""
LANES = 16
"""Elements of one vector register of float32 where mergekit ran: 8 on processors without AVX-512."""
_EPSILON = 1e-8
_QUANTILES = np.array([0.25, 0.5, 0.75], dtype=np.float32)
_PER_LN_2 = np.float32(1 / np.log(2))
_LN_2 = (0.693145751953125, 1.428606765330187e-06)
_SERIES = (1.9852762e-04, 1.3930436e-03, 8.3333608e-03, 4.1666485e-02, 1.6666667e-01, 0.5)


def merge_arcee_fusion(group: Group, arithmetic: Arithmetic, lanes: int = LANES) -> Array:
    """Return the base with the model's change added where its score reaches the threshold.

    mergekit's ``arcee_fusion``. Its mask is float32, so the merge is float32 for half-precision inputs: not on the
    working type's grid. Of tensors of more than `SAMPLE` elements mergekit draws that many to take the quantiles from;
    here all are taken. Theirs are off by up to a thousandth of all ranks, and so are the elements next to the
    threshold: up to 0.05 % of a tensor, in half precision (where scores are equal in steps) up to 0.3 %.

    Parameters
    ----------
    group : Group
        The base and one model.
    arithmetic : Arithmetic
        The working type of the scores.
    lanes : int
        Elements of a vector register.

    Returns
    -------
    array, shape of the base
        Float32, or float64 where that is the working type.

    Raises
    ------
    RecipeError
        No base, or not one model.
    """
    base = base_of(group, "arcee_fusion")
    (model,) = models_of(group, "arcee_fusion", 1, 1)
    importance = scores(base, model, arithmetic, lanes)
    return with_changes(base, model, importance >= threshold(importance, arithmetic), arithmetic)


def with_changes(base: Array, model: Array, kept: Array, arithmetic: Arithmetic) -> Array:
    """Return the base with the model's change added where `kept`, a mask of their shape, says so."""
    return np.asarray(base + arithmetic.round(model - base) * kept)


def scores(base: Array, model: Array, arithmetic: Arithmetic, lanes: int = LANES) -> Array:
    """Return each element's importance: the size of its change times the divergence of its row.

    The divergence is that of softmax(base) from softmax(model) along the last axis. It is a small difference of large
    terms, so that rounding makes much of it, and is followed to the register. In float32 a score is within 1e-4 of
    itself of mergekit's, in half precision it is the same.

    Parameters
    ----------
    base, model : array, shape (..., n)
    arithmetic : Arithmetic
    lanes : int
        Elements of a vector register.

    Returns
    -------
    array, shape (..., n)
    """
    fl = arithmetic.round
    tuned, original = (fl(_softmax(values, arithmetic, lanes) + fl(_EPSILON)) for values in (model, base))
    terms = fl(tuned * apply(np.log, fl(tuned / original), arithmetic))
    return fl(np.abs(fl(model - base)) * total(terms, arithmetic))


def threshold(importance: Array, arithmetic: Arithmetic) -> float:
    """Return the smallest score that is kept: the median plus 1.5 interquartile ranges of all scores.

    Quantiles are elements, at rank ``q (n - 1)`` rounded down. Where a merge's mask is known, the threshold that was
    used lies above the largest score that was dropped and not above the smallest one that was kept.
    """
    fl = arithmetic.round
    ranks = (_QUANTILES * np.float32(importance.size - 1)).astype(np.int64)
    lower, median, upper = np.partition(importance.ravel(), ranks)[ranks]
    return float(fl(median + fl(1.5 * fl(upper - lower))))


def _softmax(values: Array, arithmetic: Arithmetic, lanes: int) -> Array:
    """Return ``torch.softmax`` along the last axis: float32's exponentials times the reciprocal of their sum."""
    working = full_precision(arithmetic)
    rows = values.reshape(-1, values.shape[-1])
    below = rows - rows.max(axis=1, keepdims=True)
    raised = np.exp(below) if working.name == "F64" else _exponential(below)
    sums = _sum_in_lanes(raised, lanes * 4 // raised.itemsize, rest_in_lanes=arithmetic == working)
    return arithmetic.round(raised * (1 / sums)).reshape(values.shape)


def _exponential(values: Array) -> Array:
    """Return float32's exponential as torch's softmax computes it: SLEEF's, which is one unit off now and then."""
    halvings = np.rint(values * _PER_LN_2)
    rest = values
    for part in _LN_2:
        rest = fused(halvings, np.float32(-part), rest)
    series = np.full_like(rest, _SERIES[0])
    for coefficient in _SERIES[1:]:
        series = fused(series, rest, np.float32(coefficient))
    raised: Array = np.ldexp(1 + fused(rest * rest, series, rest), halvings.astype(np.int32))
    return raised


def _sum_in_lanes(rows: Array, lanes: int, *, rest_in_lanes: bool) -> Array:
    """Add up rows (R, n) as one register does: lanes first, then their halves; half-precision adds the rest last."""
    whole = rows.shape[1] // lanes * lanes
    if not whole:
        return np.add.accumulate(rows, axis=1)[:, -1:]
    sums = np.add.reduce(rows[:, :whole].reshape(len(rows), -1, lanes), axis=1)
    rest = rows[:, whole:]
    if rest_in_lanes:
        sums[:, : rest.shape[1]] += rest
    while sums.shape[1] > 1:
        sums = sums[:, : sums.shape[1] // 2] + sums[:, sums.shape[1] // 2 :]
    return sums if rest_in_lanes else np.add.accumulate(np.concatenate((sums, rest), axis=1), axis=1)[:, -1:]


ARCEE_FUSION = MergeMethod(name="arcee_fusion", parameters=(), base="required", merge=merge_arcee_fusion)
"""mergekit 0.1.5."""

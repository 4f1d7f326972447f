"""Linear combinations of whole models.

mergekit counts a base that is given among the models. Up to version 0.1.4 every step was rounded to the working
type, so that weights that sum to 1 may not do so once rounded; 0.1.5 accumulates in float32 and rounds once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from unmerge.merging.arithmetic import Arithmetic, Array, as_torch
from unmerge.merging.contract import models_of, number, numbers
from unmerge.merging.method import Group, MergeMethod, Parameter
from unmerge.merging.summation import sum_of_models, whole_sum

_BLOCK = 1 << 14
_SMALLEST = float(np.finfo(np.float32).smallest_normal)


@as_torch
def merge_linear(group: Group, arithmetic: Arithmetic) -> Array:
    """Return the weighted sum of models, divided by the sum of weights if ``normalize`` says so.

    mergekit 0.1.5's ``linear``: float32 throughout (float64 where that is the working type), rounded once. Products
    are not rounded before they are added; in float64 they are, here, and the last bit may differ.

    Parameters
    ----------
    group : Group
        Models, ``weight`` of each; shared ``normalize``.
    arithmetic : Arithmetic
        The working type.

    Returns
    -------
    array, shape of the models

    Raises
    ------
    RecipeError
        No model, or one without a weight.
    """
    models = models_of(group, "linear", 1)
    full = Arithmetic("F64" if arithmetic.name == "F64" else "F32")
    weights = full.round(numbers(group, "linear", "weight"))
    total = whole_sum(weights, full) if number(group, "linear", "normalize") else full.scalar(1)
    flat = [model.reshape(-1) for model in models]
    merged = np.empty(models[0].size, full.holder)
    for start in range(0, merged.size, _BLOCK):  # what fits into the cache
        block = slice(start, start + _BLOCK)
        summed = np.zeros_like(merged[block])
        for model, weight in zip(flat, weights, strict=True):
            summed = _multiplied_and_added(model[block], weight, summed)
        merged[block] = summed / total
    return arithmetic.round(merged).reshape(models[0].shape)


@as_torch
def merge_linear_to_0_1_4(group: Group, arithmetic: Arithmetic) -> Array:
    """Return the same with weights, products, sums and quotients rounded to the working type.

    mergekit's ``linear`` up to version 0.1.4.

    Parameters
    ----------
    group : Group
        Models, ``weight`` of each; shared ``normalize``.
    arithmetic : Arithmetic
        The working type.

    Returns
    -------
    array, shape of the models

    Raises
    ------
    RecipeError
        No model, or one without a weight.
    """
    models = models_of(group, "linear", 1)
    weights = arithmetic.round(numbers(group, "linear", "weight"))
    products = [arithmetic.round(model * weight) for model, weight in zip(models, weights, strict=True)]
    merged = sum_of_models(np.stack(products), arithmetic)
    if number(group, "linear", "normalize"):
        merged = arithmetic.round(merged / whole_sum(weights, arithmetic))
    return merged


def _multiplied_and_added(model: Array, weight: Any, added: Array) -> Array:
    """Return ``model * weight + added``; of float32 it is rounded once, as torch's ``addcmul`` does."""
    if added.dtype == np.float64:
        return np.asarray(added + model * weight)
    product = model.astype(np.float64) * np.float64(weight)  # exact
    summed = product + added
    # To round to float64 first goes wrong only where that is half way between two float32.
    rest = summed.view(np.uint64) & np.uint64(0x1FFF_FFFF)
    doubtful = np.flatnonzero((rest == 0x1000_0000) | (np.abs(summed) < _SMALLEST))
    if len(doubtful):
        summed[doubtful] = _moved(summed[doubtful], product[doubtful], added[doubtful].astype(np.float64))
    return summed.astype(np.float32)


def _moved(summed: Array, first: Array, second: Array) -> Array:
    """Return float64 sums moved by one unit in the last place to where the exact sums are."""
    of_second = summed - first
    lost = (first - (summed - of_second)) + (second - of_second)
    return np.where(lost == 0, summed, np.nextafter(summed, np.copysign(np.inf, lost)))


_PARAMETERS = (Parameter("weight", "model"), Parameter("normalize", "shared", default=True))
LINEAR = MergeMethod(name="linear", parameters=_PARAMETERS, base="ignored", merge=merge_linear)
"""mergekit 0.1.5."""
LINEAR_TO_0_1_4 = MergeMethod(name="linear", parameters=_PARAMETERS, base="ignored", merge=merge_linear_to_0_1_4)
"""mergekit 0.0.1 to 0.1.4."""

"""Norms and sums are torch's to the bit, whatever the type, the shape and the number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.merging.in_torch import HALVES_AND_SINGLE, array, same_bits, tensor
from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.reductions import dot, fused, norm, total

TYPES = (*HALVES_AND_SINGLE, "F64")
# Whole registers, less than one, and every number of elements that may be left.
LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 63, 320, 1003)


def values(shape: tuple[int, ...], arithmetic: Arithmetic) -> Array:
    return arithmetic.round(0.05 * np.random.default_rng(sum(shape)).standard_normal(shape))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_norms_and_sums_of_rows_are_torchs(name: str, length: int) -> None:
    arithmetic = Arithmetic(name)
    rows = values((50, length), arithmetic)
    theirs = tensor(rows, arithmetic)
    if name != "F64":  # its last products are fused in a precision that numpy has not
        assert same_bits(norm(rows, arithmetic), array(torch.norm(theirs, dim=-1, keepdim=True))).all()
    assert same_bits(total(rows, arithmetic), array(theirs.sum(dim=-1, keepdim=True))).all()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("shape", [(3, 5), (40, 33), (100, 64), (3, 20, 33)])
def test_norms_and_sums_along_the_first_axis_are_torchs(name: str, shape: tuple[int, ...]) -> None:
    arithmetic = Arithmetic(name)
    ours = values(shape, arithmetic)
    turned = tensor(ours, arithmetic).transpose(0, -1)
    theirs = torch.norm(turned, dim=-1, keepdim=True).transpose(0, -1)
    assert same_bits(norm(ours, arithmetic, axis=0), array(theirs)).all()
    assert same_bits(total(ours, arithmetic, axis=0), array(tensor(ours, arithmetic).sum(dim=0, keepdim=True))).all()


@pytest.mark.parametrize("name", HALVES_AND_SINGLE)
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("length", [32_767, 70_001, 1_000_003])
def test_large_vectors_are_split_among_threads_as_by_torch(name: str, threads: int, length: int) -> None:
    arithmetic = Arithmetic(name, threads)
    vector = values((length,), arithmetic)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        theirs = tensor(vector, arithmetic)
        lengths, sums = array(torch.norm(theirs)[None]), array(theirs.sum()[None])
    finally:
        torch.set_num_threads(before)
    assert same_bits(norm(vector, arithmetic), lengths).all()
    assert same_bits(total(vector, arithmetic), sums).all()


@pytest.mark.parametrize(("name", "units"), [("BF16", 0), ("F16", 0), ("F32", 4)])
def test_dots_are_torchs_within_some_units_of_float32(name: str, units: int) -> None:
    arithmetic = Arithmetic(name)
    first, second = values((4096,), arithmetic), values((4096,), arithmetic)[::-1].copy()
    theirs = array(torch.dot(tensor(first, arithmetic), tensor(second, arithmetic))[None])
    allowed = units * 2.0**-24 * float(np.abs(first * second).sum())
    assert np.abs(dot(first, second, arithmetic) - theirs) <= allowed


def test_a_fused_product_is_rounded_once() -> None:
    rng = np.random.default_rng(0)
    first, second, third = rng.standard_normal((3, 10_000)).astype(np.float32)
    third = (-first * second).astype(np.float32)  # what is left is what rounding took
    exact = first.astype(np.longdouble) * second.astype(np.longdouble) + third
    assert np.array_equal(fused(first, second, third), exact.astype(np.float32))
    assert not np.array_equal(fused(first, second, third), first * second + third)

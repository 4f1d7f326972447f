"""Numbers that one tensor is another times: against torch's products and brute force."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unmerge.checkpoint.dtypes import DTYPES
from unmerge.recipe.factor import (
    NOTHING,
    common_numbers,
    decimals_of,
    factor_bounds,
    simplest,
    tells_factors,
)

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
ends = st.floats(-3.0, 3.0).filter(lambda value: value == 0.0 or abs(value) > 1e-6)
bounds = st.tuples(ends, ends).map(lambda pair: (min(pair), max(pair)))


def decimals(number):
    return max(0, -Decimal(repr(number)).normalize().as_tuple().exponent)


@pytest.mark.parametrize("dtype", TORCH)
@given(factor=ends.filter(bool), seed=st.integers(0, 99))
def test_a_product_bounds_its_factor(dtype, factor, seed):
    source = torch.randn(50, generator=torch.Generator().manual_seed(seed)).to(TORCH[dtype])
    target = source * factor
    low, high = factor_bounds(target.double().numpy(), source.double().numpy(), DTYPES[dtype])
    # What the product is computed with: float32 up to 32 bits.
    used = factor if dtype == "F64" else float(np.float32(factor))
    assert low <= used <= high


@given(seed=st.integers(0, 99))
def test_bounds_are_tight(seed):
    source = torch.randn(50, generator=torch.Generator().manual_seed(seed)).bfloat16()
    target = source * 0.7
    low, high = factor_bounds(target.double().numpy(), source.double().numpy(), DTYPES["BF16"])
    for outside in (low - 1e-6, high + 1e-6):
        assert not torch.equal(source * outside, target)


def test_a_value_from_zero_is_no_product():
    target, source = np.array([1.0, 2.0]), np.array([0.0, 2.0])
    assert factor_bounds(target, source, DTYPES["BF16"]) == NOTHING


def test_few_magnitudes_tell_no_factor():
    assert not tells_factors(np.tile([1.0, -1.0, 2.0], 100))
    assert tells_factors(np.arange(16.0))


@given(bounds)
def test_no_shorter_decimal_is_between_the_bounds(pair):
    low, high = pair
    number = simplest(pair)
    assert low <= number <= high
    places = decimals(number)
    if 0 < places < 12:
        step = Decimal(1).scaleb(1 - places)
        assert math.floor(Decimal(high) / step) < math.ceil(Decimal(low) / step)


@given(st.lists(bounds, min_size=1, max_size=7))
def test_as_few_numbers_as_possible_are_in_all_bounds(many):
    numbers = common_numbers(many)
    assert all(low <= number <= high for (low, high), number in zip(many, numbers, strict=True))
    # No number is in two bounds that do not meet: as many are needed as there are bounds of which no two meet.
    needed = max(
        len(chosen)
        for size in range(1, len(many) + 1)
        for chosen in itertools.combinations(many, size)
        if all(max(a, c) > min(b, d) for (a, b), (c, d) in itertools.combinations(chosen, 2))
    )
    assert len(set(numbers)) == needed


@given(st.floats(-4.0, 4.0, width=32).filter(lambda value: abs(value) > 1e-6))
def test_decimals_between_their_bounds_are_read_as_the_number(number):
    low, high = decimals_of(number)
    for value in (low, high, simplest((low, high))):
        assert float(np.float32(value)) == number

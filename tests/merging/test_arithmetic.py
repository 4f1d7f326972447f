from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.merging.in_torch import HALVES_AND_SINGLE, TYPES, array, same_bits, tensor
from unmerge.merging.arithmetic import Arithmetic

every_type = pytest.mark.parametrize("name", TYPES)


def bit_patterns() -> np.ndarray:
    """Float32 of every sign, exponent and leading fraction, with rests around each tie of the 16-bit grids."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    rests = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    return (upper[:, None] + rests).view(np.float32)


@every_type
def test_rounds_as_torch(name: str) -> None:
    values = bit_patterns()
    theirs = torch.from_numpy(values).to(TYPES[name])
    assert same_bits(Arithmetic(name).round(values), array(theirs)).all()


@every_type
def test_what_is_rounded_stays_and_is_a_new_array(name: str) -> None:
    arithmetic = Arithmetic(name)
    values = arithmetic.round(np.random.default_rng(0).standard_normal((40, 1000)))
    again = arithmetic.round(values)
    assert same_bits(again, values).all()
    assert not np.shares_memory(again, values)
    assert again.dtype == arithmetic.holder


@pytest.mark.parametrize("shape", [(), (1,), (3, 0), (5, 7), (40000,)])
def test_keeps_shapes_and_orders(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32).T
    rounded = Arithmetic("BF16").round(values)
    assert same_bits(rounded, array(tensor(values, Arithmetic("BF16")))).all()


@every_type
@pytest.mark.parametrize("factor", [0.3, -0.7, 1.1, 1e-3])
def test_numbers_multiply_and_divide_as_in_torch(name: str, factor: float) -> None:
    arithmetic = Arithmetic(name)
    values = arithmetic.round(np.random.default_rng(0).standard_normal(5000))
    theirs = tensor(values, arithmetic)
    assert same_bits(arithmetic.round(values * arithmetic.scalar(factor)), array(theirs * factor)).all()
    assert same_bits(arithmetic.round(values / arithmetic.scalar(factor)), array(theirs / factor)).all()


@pytest.mark.parametrize("name", HALVES_AND_SINGLE)
def test_numbers_are_rounded_before_they_are_added_or_compared(name: str) -> None:
    arithmetic = Arithmetic(name)
    values = arithmetic.round(np.random.default_rng(0).standard_normal(5000))
    theirs = tensor(values, arithmetic)
    assert same_bits(arithmetic.round(values + arithmetic.round(0.3)), array(theirs + 0.3)).all()
    near = arithmetic.round(0.3 * (1 + np.linspace(-1e-2, 1e-2, 999)))
    assert ((near < arithmetic.round(0.3)) == (tensor(near, arithmetic) < 0.3).numpy()).all()

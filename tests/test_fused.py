"""Compiled loops against numpy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from unmerge import fused
from unmerge.checkpoint.dtypes import DTYPES
from unmerge.fused import inner_products, subtract_bf16
from unmerge.testing import encode

BF16 = DTYPES["BF16"]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (1, 7), (7, 1024), (3, 1025), (1, 70_001), (70, 257)])
def test_equals_numpy(shape: tuple[int, int]) -> None:
    count = shape[0] * shape[1]
    generator = np.random.default_rng(count)
    base = encode(0.02 * generator.standard_normal(count), "BF16")
    tuned = encode(BF16.widen(base) + 1e-3 * generator.standard_normal(count), "BF16")
    out = np.full(shape, np.nan, np.float32)
    columns = np.sort(generator.permutation(shape[1])[:5])
    taken = np.full((shape[0], len(columns)), np.nan, np.float32)
    energy, grid = subtract_bf16(tuned, base, out, columns, taken)
    exact = BF16.widen(tuned) - BF16.widen(base)
    np.testing.assert_array_equal(out, exact.astype(np.float32).reshape(shape))
    np.testing.assert_array_equal(taken, out[:, columns])
    assert energy == pytest.approx(float(np.sum(out.astype(np.float64) ** 2)), rel=1e-13)
    assert BF16.rounding_of_grid(grid) == pytest.approx(BF16.rounding_energy(tuned), rel=1e-5)


def test_every_bit_pattern_is_widened_as_elsewhere() -> None:
    bits = np.arange(2**16, dtype="<u2")
    out = np.empty((1, 2**16), np.float32)
    energy, _ = subtract_bf16(bits, np.zeros_like(bits), out)
    np.testing.assert_array_equal(out[0], BF16.widen(bits).astype(np.float32))
    assert np.isnan(energy)


def test_arrays_that_do_not_fit_are_refused() -> None:
    bits = np.zeros(8, "<u2")
    with pytest.raises(ValueError, match=r"arrays of \[7, 8\] elements: expected contiguous ones of one size"):
        subtract_bf16(bits, bits, np.empty((1, 7), np.float32))
    with pytest.raises(ValueError, match="expected contiguous ones"):
        subtract_bf16(bits, np.zeros(16, "<u2")[::2], np.empty((2, 4), np.float32))
    out, taken = np.empty((2, 4), np.float32), np.empty((2, 1), np.float32)
    with pytest.raises(ValueError, match=r"columns 4 to 4 to take: expected some of 4"):
        subtract_bf16(bits, bits, out, np.array([4]), taken)
    with pytest.raises(ValueError, match=r"\(2, 1\) for columns to take: expected a contiguous array of \(2, 2\)"):
        subtract_bf16(bits, bits, out, np.array([0, 1]), taken)


@pytest.mark.parametrize("count", [0, 1, 7, 4096, 4097, 70_001])
def test_inner_products_are_those_in_float64(count: int) -> None:
    generator = np.random.default_rng(count)
    arrays = [generator.standard_normal(count).astype(np.float32) for _ in range(4)]
    pairs = [(0, 0), (2, 1), (1, 3), (3, 3)]
    wide = [array.astype(np.float64) for array in arrays]
    found = inner_products(arrays, pairs)
    for (i, j), product in zip(pairs, found, strict=True):
        bound = 1e-14 * float(np.linalg.norm(wide[i]) * np.linalg.norm(wide[j]))
        assert product == pytest.approx(float(wide[i] @ wide[j]), rel=0, abs=bound)


def test_inner_products_show_what_is_not_finite() -> None:
    array, other = np.ones(5000, np.float32), np.zeros(5000, np.float32)
    array[4999] = np.inf
    assert inner_products([array, other], [(0, 0), (1, 1)]) == [np.inf, 0.0]
    assert np.isnan(inner_products([array, other], [(0, 1)])[0])


def test_no_products_and_arrays_that_do_not_fit() -> None:
    array = np.ones(8, np.float32)
    assert inner_products([array], []) == []
    with pytest.raises(ValueError, match=r"arrays of \[4, 8\] elements: expected contiguous ones of float32"):
        inner_products([array, array[:4]], [(0, 1)])
    with pytest.raises(ValueError, match="expected contiguous ones of float32 and one size"):
        inner_products([array.astype(np.float64)], [(0, 0)])
    with pytest.raises(ValueError, match="expected contiguous ones"):
        inner_products([np.ones(16, np.float32)[::2]], [(0, 0)])
    with pytest.raises(ValueError, match=r"places 0 to 1: expected those of 1 arrays"):
        inner_products([array], [(0, 1)])


def test_threads_that_need_a_loop_first_compile_it_once() -> None:
    fused._compile.cache_clear()
    array = np.ones(1000, np.float32)
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda _: inner_products([array], [(0, 0)]), range(64))
    assert list(found) == [[1000.0]] * 64
    assert fused._compile.cache_info().misses == 1

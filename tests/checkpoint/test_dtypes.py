"""Widening and rounding against torch and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unmerge.checkpoint.dtypes import DTYPES, FloatArray
from unmerge.testing import encode, quantise


def test_every_bfloat16_and_half_pattern_widens_as_in_torch() -> None:
    bits = np.arange(2**16, dtype="<u2")
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        theirs = torch.from_numpy(bits.view(np.int16)).view(dtype).double().numpy()
        np.testing.assert_array_equal(DTYPES[name].widen(bits), theirs)


@pytest.mark.parametrize(("name", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)])
def test_encode_rounds_as_torch(name: str, dtype: torch.dtype) -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32).astype(np.float64)
    np.testing.assert_array_equal(quantise(values, name), torch.from_numpy(values).to(dtype).double().numpy())


@pytest.mark.parametrize("name", ["BF16", "F16", "F32"])
def test_rounding_energy_is_what_rounding_does(name: str) -> None:
    """The floor predicts the energy of the error that storing real numbers makes."""
    values = 0.02 * np.random.default_rng(1).standard_normal(200_000)
    error = float(np.sum((quantise(values, name) - values) ** 2))
    assert DTYPES[name].rounding_energy(encode(values, name)) == pytest.approx(error, rel=0.02)


def test_rounding_energy_of_half_precision_subnormals() -> None:
    values = np.random.default_rng(2).uniform(-6e-5, 6e-5, 200_000)  # below 2^-14 the grid stays at 2^-24
    error = float(np.sum((quantise(values, "F16") - values) ** 2))
    assert DTYPES["F16"].rounding_energy(encode(values, "F16")) == pytest.approx(error, rel=0.02)


def finite(name: str) -> FloatArray:
    """Every finite value of a 16-bit type that is not negative, ascending."""
    values = DTYPES[name].widen(np.arange(2**15, dtype="<u2"))
    return values[np.isfinite(values)]


def in_torch(values: FloatArray, dtype: torch.dtype) -> FloatArray:
    # From single precision: torch goes through it, and would round twice.
    assert (values == values.astype(np.float32)).all()
    found: FloatArray = torch.from_numpy(values.astype(np.float32)).to(dtype).double().numpy()
    return found


class TestNearest:
    @pytest.mark.parametrize(("name", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_of_every_value_and_every_tie_as_in_torch(self, name: str, dtype: torch.dtype, sign: float) -> None:
        grid = sign * finite(name)
        middles = (grid[1:] + grid[:-1]) / 2.0
        for values in (grid, middles, np.nextafter(middles.astype(np.float32), np.float32(0.0)).astype(np.float64)):
            np.testing.assert_array_equal(DTYPES[name].nearest(values), in_torch(values, dtype))

    @pytest.mark.parametrize("name", ["F16", "F32"])
    def test_of_random_values_of_any_size_as_in_numpy(self, name: str) -> None:
        rng = np.random.default_rng(0)
        type_ = {"F16": np.float16, "F32": np.float32}[name]
        low, high = {"F16": (-26, 15), "F32": (-151, 127)}[name]
        values = rng.choice([-1.0, 1.0], 20_000) * np.exp2(rng.uniform(low, high, 20_000))
        np.testing.assert_array_equal(DTYPES[name].nearest(values), values.astype(type_).astype(np.float64))

    @pytest.mark.parametrize("name", DTYPES)
    def test_of_powers_of_two_and_zero_is_themselves(self, name: str) -> None:
        smallest = round(np.log2(DTYPES[name].smallest_normal)) - DTYPES[name].mantissa_bits
        powers = np.exp2(np.arange(smallest, 15))
        values = np.concatenate([powers, -powers, [0.0]])
        np.testing.assert_array_equal(DTYPES[name].nearest(values), values)

    @pytest.mark.parametrize("name", DTYPES)
    def test_is_encoding_and_widening(self, name: str) -> None:
        values = np.random.default_rng(3).standard_normal(10_000).astype(np.float32).astype(np.float64)
        np.testing.assert_array_equal(DTYPES[name].nearest(values), quantise(values, name))


class TestSpacing:
    @pytest.mark.parametrize("name", ["BF16", "F16"])
    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_is_the_distance_to_the_next_value(self, name: str, sign: float) -> None:
        grid = finite(name)[1:]
        np.testing.assert_array_equal(DTYPES[name].spacing(sign * grid[:-1]), np.diff(grid))

    @pytest.mark.parametrize(("name", "type_"), [("F32", np.float32), ("F64", np.float64)])
    def test_is_numpys(self, name: str, type_: type[np.float32] | type[np.float64]) -> None:
        rng = np.random.default_rng(1)
        low, high = {"F32": (-149, 127), "F64": (-1074, 1023)}[name]
        values = rng.choice([-1.0, 1.0], 20_000) * np.exp2(rng.uniform(low, high, 20_000))
        values = np.concatenate([values, np.exp2(np.arange(low, high))]).astype(type_)
        spacing = np.abs(np.spacing(values)).astype(np.float64)
        np.testing.assert_array_equal(DTYPES[name].spacing(values.astype(np.float64)), spacing)

    @pytest.mark.parametrize("name", DTYPES)
    def test_at_zero_is_the_smallest_number(self, name: str) -> None:
        dtype = DTYPES[name]
        assert dtype.spacing(np.zeros(2)).tolist() == [dtype.smallest_normal * 2.0**-dtype.mantissa_bits] * 2


class TestCell:
    @pytest.mark.parametrize(("name", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_is_what_torch_rounds_to_a_value(self, name: str, dtype: torch.dtype, sign: float) -> None:
        grid = finite(name)
        grid = sign * grid[grid > DTYPES[name].smallest_normal][:-1]
        low, high = DTYPES[name].cell(grid)
        assert ((low < grid) & (grid < high)).all()
        for bound, outside in ((low, -np.inf), (high, np.inf)):
            within = np.nextafter(bound.astype(np.float32), grid.astype(np.float32)).astype(np.float64)
            np.testing.assert_array_equal(in_torch(within, dtype), grid)
            beyond = np.nextafter(bound.astype(np.float32), np.float32(outside)).astype(np.float64)
            assert (in_torch(beyond, dtype) != grid).all()

    @pytest.mark.parametrize("name", ["BF16", "F16", "F32"])
    def test_of_neighbours_meet(self, name: str) -> None:
        rng = np.random.default_rng(5)
        values = quantise(rng.choice([-1.0, 1.0], 5000) * np.exp2(rng.uniform(-13, 10, 5000)), name)
        low, high = DTYPES[name].cell(values)
        above = DTYPES[name].nearest(high + (high - values) * 0.5)
        np.testing.assert_array_equal(DTYPES[name].cell(above)[0], high)
        below = DTYPES[name].nearest(low - (values - low) * 0.5)
        np.testing.assert_array_equal(DTYPES[name].cell(below)[1], low)

    def test_of_small_numbers_is_that_of_one_spacing(self) -> None:
        dtype = DTYPES["F16"]
        values = finite("F16")
        values = values[(values > 0.0) & (values <= dtype.smallest_normal)]
        low, high = dtype.cell(values)
        np.testing.assert_array_equal(values - low, 2.0**-25)
        np.testing.assert_array_equal(high - values, 2.0**-25)

    @pytest.mark.parametrize("name", ["BF16", "F16"])
    def test_of_zero_reaches_half_way_to_the_smallest_number(self, name: str) -> None:
        low, high = DTYPES[name].cell(np.zeros(1))
        smallest = float(finite(name)[1])
        assert (low[0], high[0]) == (-smallest / 2.0, smallest / 2.0)

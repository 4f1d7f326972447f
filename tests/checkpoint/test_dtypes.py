"""Widening and rounding against torch and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unmerge.checkpoint.dtypes import DTYPES
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

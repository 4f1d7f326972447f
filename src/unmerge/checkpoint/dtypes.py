"""Storage types of floating-point weights: how to widen their bits and how coarse their grids are.

numpy has no bfloat16, so bits are kept as unsigned integers until they are widened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
RawArray = NDArray[Any]


@dataclass(frozen=True, slots=True)
class DType:
    """A floating-point storage type.

    Attributes
    ----------
    name : str
        The safetensors name: ``"BF16"``, ``"F16"``, ``"F32"`` or ``"F64"``.
    raw : numpy dtype
        What the bits are read as: little-endian, unsigned for the 16-bit types.
    mantissa_bits : int
        Stored bits of the significand; an ulp is ``2 ** -mantissa_bits`` of the power of two below a value.
    smallest_normal : float
        Below it the grid stops getting finer.
    """

    name: str
    raw: np.dtype[Any]
    mantissa_bits: int
    smallest_normal: float
    _exponent_mask: int
    _bits: np.dtype[Any]
    _widen: Callable[[RawArray], NDArray[Any]]

    @property
    def itemsize(self) -> int:
        """Bytes per value."""
        return self.raw.itemsize

    def widen(self, raw: RawArray) -> FloatArray:
        """Return the exact float64 values of stored bits, in the same shape."""
        with np.errstate(invalid="ignore"):  # a signalling NaN stays NaN; who reads it says where it is
            return self._widen(raw).astype(np.float64)

    @property
    def fits_float32(self) -> bool:
        """Whether every value of this type is a float32."""
        return self.itemsize <= 4

    def widen_into(self, raw: RawArray, out: NDArray[np.float32]) -> None:
        """Write the exact values of stored bits of a type that `fits_float32` into an array of the same shape."""
        if self.name == "BF16":
            bits = out.view(np.uint32)
            np.copyto(bits, raw)
            np.left_shift(bits, 16, out=bits)
        else:
            with np.errstate(invalid="ignore"):  # as in `widen`
                np.copyto(out, raw.view(np.float16) if self.name == "F16" else raw)

    def rounding_energy(self, raw: RawArray) -> float:
        """Return the expected energy of rounding to this grid: the sum of ``ulp^2 / 12`` over the values.

        In squared weight units. Assumes that what was rounded away is uniform within half an ulp, which
        fails (and overstates) where a change is far smaller than an ulp.
        """
        power_of_two = self._power_of_two(raw).ravel()
        return self.rounding_of_grid(float(np.dot(power_of_two, power_of_two)))

    def rounding_of_grid(self, squares: float) -> float:
        """Return `rounding_energy` from the sum of the squares of the powers of two below the values."""
        return squares * 2.0 ** (-2 * self.mantissa_bits) / 12.0

    def _power_of_two(self, raw: RawArray) -> NDArray[Any]:
        bits = raw.view(self._bits) & self._bits.type(self._exponent_mask)
        return np.asarray(np.maximum(self._widen(bits.view(raw.dtype)), self.smallest_normal))

    def spacing(self, values: FloatArray) -> FloatArray:
        """Return the distance between neighbours on this grid around values, in weight units, in their shape."""
        return np.asarray(self._below(values) * 2.0**-self.mantissa_bits)

    def _below(self, values: FloatArray) -> FloatArray:
        """Return the power of two below each magnitude, or the smallest one that the grid follows."""
        power_of_two = (np.asarray(values, np.float64).view(np.uint64) & _EXPONENT).view(np.float64)
        return np.asarray(power_of_two.clip(self.smallest_normal, _LARGEST_POWER))

    def cell(self, values: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the bounds of what is rounded to each value of this grid: half way to its neighbours."""
        outward = 0.5 * self.spacing(values)
        # Below a power of two the grid is twice as fine.
        finer = (np.abs(values) == self._below(values)) & (np.abs(values) > self.smallest_normal)
        inward = np.where(finer, 0.5 * outward, outward)
        positive = values >= 0.0
        return values - np.where(positive, inward, outward), values + np.where(positive, outward, inward)

    def nearest(self, values: FloatArray) -> FloatArray:
        """Return the value of this grid that is nearest to each; ties go to the even one, as in every framework."""
        spacing = self.spacing(values)
        # Exact: a spacing is a power of two, and rint breaks ties to even. Above 1.11..1 it reaches the next power.
        return np.asarray(np.rint(values / spacing) * spacing)


def _widen_bfloat16(raw: RawArray) -> NDArray[np.float32]:
    wide = raw.astype(np.uint32)
    np.left_shift(wide, 16, out=wide)
    return wide.view(np.float32)


def _widen_half(raw: RawArray) -> NDArray[np.float32]:
    return raw.view(np.float16).astype(np.float32)


def _as_stored(raw: RawArray) -> NDArray[Any]:
    return raw


_EXPONENT, _LARGEST_POWER = np.uint64(0x7FF0000000000000), 2.0**1023
_U16, _U32, _U64 = np.dtype("<u2"), np.dtype("<u4"), np.dtype("<u8")

DTYPES: dict[str, DType] = {
    "BF16": DType("BF16", _U16, 7, 2.0**-126, 0x7F80, _U16, _widen_bfloat16),
    "F16": DType("F16", _U16, 10, 2.0**-14, 0x7C00, _U16, _widen_half),
    "F32": DType("F32", np.dtype("<f4"), 23, 2.0**-126, 0x7F800000, _U32, _as_stored),
    "F64": DType("F64", np.dtype("<f8"), 52, 2.0**-1022, 0x7FF0000000000000, _U64, _as_stored),
}
"""The storage types that unmerge reads, by safetensors name."""

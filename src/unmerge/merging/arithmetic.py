"""Arithmetic in a working type that numpy may not have: every result is rounded to its grid.

torch computes elementwise operations on bfloat16 and float16 in float32 and rounds each result once, so float32
arrays that hold values of the grid, rounded after each step, give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
"""Values of a working type's grid, held as float32; as float64 where the working type is F64."""


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """A working type.

    Attributes
    ----------
    name : str
        The safetensors name: ``"BF16"``, ``"F16"``, ``"F32"`` or ``"F64"``.
    """

    name: str

    @property
    def holder(self) -> np.dtype[Any]:
        """The numpy type that its values are held in."""
        return np.dtype(np.float64 if self.name == "F64" else np.float32)

    def round(self, values: Any) -> Array:
        """Return values rounded to this type's grid, to nearest even, in a new array."""
        held = np.array(values, dtype=self.holder)
        if self.name == "BF16":
            return _to_bfloat16(held)
        if self.name == "F16":
            with np.errstate(over="ignore"):
                return held.astype(np.float16).astype(np.float32)
        return held


def _to_bfloat16(values: Array) -> Array:
    """Round float32 to bfloat16 in place, to nearest even; NaN stays NaN."""
    broken = np.isnan(values)
    bits = values.view(np.uint32)
    bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    bits &= np.uint32(0xFFFF0000)
    if broken.any():
        values[broken] = np.nan
    return values

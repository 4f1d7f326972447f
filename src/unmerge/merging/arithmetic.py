"""Arithmetic in a working type that numpy may not have: every result is rounded to its grid.

torch computes elementwise operations on bfloat16 and float16 in float32 and rounds each result once, so float32
arrays that hold values of the grid, rounded after each step, give the same bits. Of a number that multiplies or
divides a tensor it takes the float32 value, and rounds one that is added or compared to the tensor's type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
"""Values of a working type's grid, held as float32; as float64 where the working type is F64."""
as_torch = np.errstate(over="ignore", divide="ignore", invalid="ignore")
"""Decorates functions in which values may stop being finite, as they do in torch, without a warning."""
_BLOCK = 1 << 15


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """A working type, and the one habit of the machine that its results depend on.

    Attributes
    ----------
    name : str
        The safetensors name: ``"BF16"``, ``"F16"``, ``"F32"`` or ``"F64"``.
    threads : int
        torch's threads in the merge: it splits sums of 32,768 elements or more among them, and rounds each part.
    """

    name: str
    threads: int = 1

    @property
    def holder(self) -> np.dtype[Any]:
        """The numpy type that its values are held in."""
        return np.dtype(np.float64 if self.name == "F64" else np.float32)

    @as_torch
    def round(self, values: Any) -> Array:
        """Return values rounded to this type's grid, to nearest even, in a new array."""
        held = np.array(values, dtype=self.holder, order="C")
        if self.name == "BF16":
            _to_bfloat16(held.reshape(-1))
        elif self.name == "F16":
            held[...] = held.astype(np.float16)
        return held

    def scalar(self, value: float) -> Any:
        """Return a number as torch multiplies or divides a tensor by it: not rounded to a 16-bit grid."""
        return self.holder.type(value)


def _to_bfloat16(values: Array) -> None:
    """Round float32 to bfloat16 in place, to nearest even; NaN stays NaN."""
    for start in range(0, values.size, _BLOCK):  # what fits into the cache
        block = values[start : start + _BLOCK]
        broken = np.isnan(block)
        bits = block.view(np.uint32)
        last = bits >> np.uint32(16)
        last &= np.uint32(1)
        bits += last
        bits += np.uint32(0x7FFF)
        bits &= np.uint32(0xFFFF0000)
        if broken.any():
            block[broken] = np.nan

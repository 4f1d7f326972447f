"""What `float32` does, on a device of torch: blocks are read as ever, and subtracted and multiplied over there.

Stored bits go to the device as they are, so that half of the bytes of float32 are moved. There they are widened,
subtracted and multiplied in float32, never in TF32; energies and inner products are summed in float64 (by the host
where the device has none: ``mps``). What comes back are sums, products with the thin factors, and a few columns. The
result equals that of `float32` within 1e-8 of the norms that bound it; bits differ from device to device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unmerge.checkpoint.dtypes import DType, RawArray
from unmerge.errors import MissingExtraError, UnmergeError
from unmerge.float32 import NOTHING, Block, Kept, Meeting, Stack, read_blocks
from unmerge.task_vector import Difference

_DEVICE = re.compile(r"(cpu|mps|cuda(:\d+)?)$")
_EXPONENT = 0x7F800000
"""The bits of a float32 that are the power of two below its magnitude."""
_EMPTY = np.empty((0, 0), np.float32)
_STORED_AS = {"BF16": ("<i2", "bfloat16"), "F16": ("<i2", "float16"), "F32": ("<f4", "float32")}
"""What stored bits are given to torch as, and which of its types they are."""


def check_device(name: str) -> None:
    """Refuse a device that cannot be used, before anything is read.

    Raises
    ------
    MissingExtraError
        If torch is not installed.
    UnmergeError
        If the name is not one of ``cpu``, ``cuda``, ``cuda:N`` and ``mps``, torch sees no such device, or torch was
        told to multiply in less than float32.
    """
    if not _DEVICE.match(name):
        raise UnmergeError(f"device {name!r}: expected cpu, cuda, cuda:1 or mps; leave it out to compute without torch")
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(f"device {name!r} needs torch: pip install 'unmerge[torch]'") from error
    kind, _, number = name.partition(":")
    seen = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(number or 0) >= seen:
        raise UnmergeError(f"device {name!r}: torch {torch.__version__} sees {seen} of this kind; leave it out")
    precision = torch.get_float32_matmul_precision()
    if precision != "highest":
        raise UnmergeError(
            f"device {name!r}: torch is set to multiply float32 in {precision!r} precision (TF32); expected 'highest': "
            "call torch.set_float32_matmul_precision('highest')"
        )


@dataclass(frozen=True, slots=True, eq=False)
class TorchKernel:
    """The functions of `float32` for one unit of work, on a device.

    Attributes
    ----------
    device : str
        One that `check_device` lets pass.
    """

    device: str
    _rights: dict[int, Any] = field(default_factory=dict)

    def blocks(
        self,
        changes: Mapping[int, Difference],
        start: int,
        stop: int,
        columns: int,
        pairs: Sequence[tuple[int, int]],
        kept: Kept = NOTHING,
    ) -> Iterator[Block]:
        """Yield the changes in rows `start` to `stop`, a block at a time, with values on the device; see `float32`."""
        for first, last, stored in read_blocks(changes, start, stop, columns):
            values, rounding = {}, {}
            for i, delta in changes.items():
                values[i], rounding[i] = self._subtract(delta, stored, last - first, columns)
            products = {(i, j): self._product(values[i], values[j]) for i, j in pairs}
            held = values[kept.change][:, self._moved(kept.columns)].cpu().numpy() if kept is not NOTHING else _EMPTY
            yield Block(first, values, products, rounding, held)

    def meet(self, block: Block, change: int, stack: Stack, first: int) -> Meeting:
        """Project a block on the right factors of a stack, which stays on the device; see `float32`."""
        values: Any = block.values[change]
        if id(stack) not in self._rights:
            self._rights[id(stack)] = self._moved(stack.right).T
        left = stack.left[block.start - first : block.start - first + len(values)]
        projected = (values @ self._rights[id(stack)]).cpu().numpy()
        return Meeting(block.start, stack, left, projected)

    def _moved(self, array: np.ndarray[Any, Any]) -> Any:
        import torch

        return torch.from_numpy(np.require(array, requirements="W")).to(self.device)

    def _subtract(
        self, delta: Difference, stored: Mapping[int, RawArray], rows: int, columns: int
    ) -> tuple[Any, float]:
        """Return the change on the device, shape (rows, columns), and the energy that rounding accounts for."""
        import torch

        tuned, base = stored[id(delta.tuned)], stored[id(delta.base)]
        size = min(len(tuned), len(base))  # rows that only one of them has count as unchanged
        wide = self._widened(tuned[:size], delta.tuned.dtype)
        change = torch.zeros(rows * columns, dtype=torch.float32, device=self.device)
        torch.sub(wide, self._widened(base[:size], delta.base.dtype), out=change[:size])
        power = (wide.view(torch.int32) & _EXPONENT).view(torch.float32).clamp(min=delta.tuned.dtype.smallest_normal)
        return change.view(rows, columns), delta.tuned.dtype.rounding_of_grid(self._product(power, power))

    def _widened(self, raw: RawArray, dtype: DType) -> Any:
        """Return stored bits as float32 on the device; every value of these types is one."""
        import torch

        bits, name = _STORED_AS[dtype.name]
        return self._moved(raw.view(bits)).view(getattr(torch, name)).to(torch.float32)

    def _product(self, x: Any, y: Any) -> float:
        """Return an inner product, summed in float64."""
        if self.device == "mps":
            x, y = x.cpu(), y.cpu()
        return float((x.double() * y.double()).sum())

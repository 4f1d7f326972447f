"""Large tensors in float32: blocks of rows are read ahead of the work, subtracted in one pass, and multiplied.

BF16, F16 and F32 values are float32 values, and of the differences of two BF16 values only those are rounded whose
terms are 2^16 apart. In float32 is also the product with the stacked right factors, the one large GEMM: its rounding
is unbiased, and averages out over a tensor's rows. All sums after it are taken in float64. So inner products come out
equal to those in float64 within 1e-8 of the norms that bound them. Small tensors stay in float64.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from unmerge.checkpoint.dtypes import FloatArray, RawArray
from unmerge.checkpoint.tensor import Tensor, borrowed, matrix_shape
from unmerge.fused import inner_products, subtract_bf16
from unmerge.task_vector import Delta, Difference, LowRank

FloatArray32 = NDArray[np.float32]

LEAST_ELEMENTS = 1 << 20
"""Tensors of fewer elements are computed in float64."""
BLOCK_ELEMENTS = 1 << 22
"""Elements of one block of rows at most (16 MiB): so many rows that a GEMM spends its time on products, not on
packing; with half as many a pass takes some hundredths longer."""
CHUNK = 1 << 15
"""Elements that other types than BF16 are widened and subtracted by: a few such arrays fit a core's cache."""
MOST_KEPT = 1 << 24
"""Elements of memory that is kept for the next unit of work at most (64 MiB)."""
SLOTS = 2
"""Blocks of stored bits that are held: one being worked on, one being read."""


def applies(deltas: Collection[Delta], elements: int) -> bool:
    """Tell whether these changes of a tensor of so many elements are computed here."""
    return elements >= LEAST_ELEMENTS and all(_is_float32(delta) for delta in deltas)


def _is_float32(delta: Delta) -> bool:
    if isinstance(delta, LowRank):
        return delta.left_factor.dtype.fits_float32 and delta.right_factor.dtype.fits_float32
    return isinstance(delta, Difference) and delta.tuned.dtype.fits_float32 and delta.base.dtype.fits_float32


def memory(columns: int, tensors: int, changes: int) -> int:
    """Return the bytes that `blocks` holds of that many stored tensors and changes, at most."""
    elements = max(columns, BLOCK_ELEMENTS)
    return elements * (SLOTS * 4 * tensors + 4 * changes) + 2 * 4 * CHUNK


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Rows of dense changes, and their products with one another.

    Attributes
    ----------
    start : int
        Its first row.
    values : dict of int to array of float32, shape (rows, columns)
        The changes; written over when the next block is asked for.
    products : dict of (int, int) to float
        Inner products of two changes, the first not before the second.
    rounding : dict of int to float
        Energy that storage rounding of the tuned tensors accounts for.
    kept : array of float32, shape (rows, c)
        One change in the columns that were to be kept.
    """

    start: int
    values: Mapping[int, FloatArray32]
    products: Mapping[tuple[int, int], float]
    rounding: Mapping[int, float]
    kept: FloatArray32


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """The columns of one change that blocks keep."""

    change: int
    columns: NDArray[np.intp]


NOTHING = Kept(-1, np.empty(0, np.intp))


class Kernel(Protocol):
    """What subtracts and multiplies blocks: this module, or `torch_blocks.TorchKernel`."""

    def blocks(
        self,
        changes: Mapping[int, Difference],
        start: int,
        stop: int,
        columns: int,
        pairs: Sequence[tuple[int, int]],
        kept: Kept = NOTHING,
    ) -> Iterator[Block]:
        """Yield the changes in rows `start` to `stop`, a block at a time."""
        ...

    def meet(self, block: Block, change: int, stack: Stack, first: int) -> Meeting:
        """Project a block of one change on the right factors of a stack whose first row is `first`."""
        ...


def blocks(
    changes: Mapping[int, Difference],
    start: int,
    stop: int,
    columns: int,
    pairs: Sequence[tuple[int, int]],
    kept: Kept = NOTHING,
) -> Iterator[Block]:
    """Yield the changes in rows `start` to `stop`, a block at a time; the next one is read meanwhile.

    Parameters
    ----------
    changes : mapping of int to Difference
        By any numbers. Rows that one does not have are zero.
    pairs : sequence of (int, int)
        The changes whose inner products are wanted; the first is not before the second.
    kept : Kept
        The columns that are wanted apart.
    """
    most = step(stop - start, columns)
    scratch = np.empty((2, CHUNK), np.float32)
    with lent("blocks", len(changes) * most * columns) as memory:
        values = dict(zip(changes, memory.reshape(len(changes), most, columns), strict=True))
        for first, last, stored in read_blocks(changes, start, stop, columns):
            rows = {i: array[: last - first] for i, array in values.items()}
            yield _subtract(changes, first, stored, rows, pairs, scratch, kept)


_SPARE = threading.local()


@contextmanager
def lent(use: str, size: int) -> Iterator[FloatArray32]:
    """Lend so many float32 values of memory, which this thread keeps for the next of the same use.

    The system zeroes new memory and maps it page by page, in some hundredths of the time of a pass.
    """
    kept: dict[str, FloatArray32] = _SPARE.__dict__
    memory = kept.pop(use, None)  # who asks for the same meanwhile gets other memory
    if memory is None or len(memory) < size:
        memory = np.empty(size, np.float32)
    try:
        yield memory[:size]
    finally:
        if len(memory) <= MOST_KEPT:
            kept[use] = memory


def step(rows: int, columns: int) -> int:
    """Return the rows of a block: all of them about equal, as a small last one would waste its GEMM."""
    most = max(1, BLOCK_ELEMENTS // max(1, columns))
    return -(-rows // -(-rows // most))


def read_blocks(
    changes: Mapping[int, Difference], start: int, stop: int, columns: int
) -> Iterator[tuple[int, int, dict[int, RawArray]]]:
    """Yield ranges of rows, with the stored bits in them of each tensor, flat, by its id; reads one range ahead."""
    from concurrent.futures import ThreadPoolExecutor

    size = step(stop - start, columns)
    ranges = [(first, min(stop, first + size)) for first in range(start, stop, size)]
    tensors = {id(tensor): tensor for delta in changes.values() for tensor in (delta.tuned, delta.base)}

    def read(number: int) -> dict[int, RawArray]:
        return {key: _read(tensor, *ranges[number]) for key, tensor in tensors.items()}

    with ThreadPoolExecutor(1) as reader:  # its thread begins with the second range, if there is one
        stored = read(0)
        for number, rows in enumerate(ranges[:-1]):
            pending = reader.submit(read, number + 1)
            yield *rows, stored
            stored = pending.result()
        yield *ranges[-1], stored


def _read(tensor: Tensor, start: int, stop: int) -> RawArray:
    last = max(start, min(stop, matrix_shape(tensor.shape)[0]))
    return borrowed(tensor, start, last).reshape(-1)


def _subtract(
    changes: Mapping[int, Difference],
    start: int,
    stored: Mapping[int, RawArray],
    values: Mapping[int, FloatArray32],
    pairs: Sequence[tuple[int, int]],
    scratch: FloatArray32,
    kept: Kept,
) -> Block:
    products = dict.fromkeys(pairs, 0.0)
    rounding = {}
    taken = np.zeros((len(next(iter(values.values()))), len(kept.columns)), np.float32)
    for i, delta in changes.items():
        tuned, base = stored[id(delta.tuned)], stored[id(delta.base)]
        size = min(len(tuned), len(base))
        rows = size // values[i].shape[1]
        values[i][rows:] = 0.0  # rows that only one of them has count as unchanged
        columns, into = (kept.columns, taken) if i == kept.change else (NOTHING.columns, taken[:, :0])
        energy, rounding[i] = _difference(
            delta, tuned[:size], base[:size], values[i][:rows], scratch, columns, into[:rows]
        )
        if (i, i) in products:
            products[i, i] = energy
    flat = {i: array.reshape(-1) for i, array in values.items()}
    products |= _products(flat, [(i, j) for i, j in pairs if i != j])
    return Block(start, values, products, rounding, taken)


def _difference(
    delta: Difference,
    tuned: RawArray,
    base: RawArray,
    out: FloatArray32,
    scratch: FloatArray32,
    columns: NDArray[np.intp],
    taken: FloatArray32,
) -> tuple[float, float]:
    """Write the difference of stored bits, and its columns; return its energy and that of rounding."""
    kinds = delta.tuned.dtype, delta.base.dtype
    if all(kind.name == "BF16" for kind in kinds):
        energy, grid = subtract_bf16(np.ascontiguousarray(tuned), np.ascontiguousarray(base), out, columns, taken)
        return energy, kinds[0].rounding_of_grid(grid)
    rounding, flat = 0.0, out.reshape(-1)
    for low in range(0, len(flat), CHUNK):
        part = slice(low, low + CHUNK)
        wide, other = scratch[:, : len(flat[part])]
        kinds[0].widen_into(tuned[part], wide)
        kinds[1].widen_into(base[part], other)
        with np.errstate(invalid="ignore"):  # Inf minus Inf; who reads the products says where it is
            np.subtract(wide, other, out=flat[part])
        rounding += kinds[0].rounding_energy(tuned[part])
    np.take(out, columns, axis=1, out=taken, mode="clip")
    return _products({0: flat}, [(0, 0)])[0, 0], rounding


def _products(arrays: Mapping[int, FloatArray32], pairs: Sequence[tuple[int, int]]) -> dict[tuple[int, int], float]:
    """Return inner products of flat arrays, summed in float64."""
    places = {i: place for place, i in enumerate(arrays)}
    found = inner_products(list(arrays.values()), [(places[i], places[j]) for i, j in pairs])
    return dict(zip(pairs, found, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """The factors of low-rank changes in some rows of a tensor, stacked along their ranks; r the sum of ranks.

    Attributes
    ----------
    scales : array, shape (r,)
        What each rank counts; it is not multiplied into the factors.
    places : dict of int to slice
        Where each change is.
    left : array of float32, shape (rows, r)
    right : array of float32, shape (r, columns)
    """

    scales: FloatArray
    places: Mapping[int, slice]
    left: FloatArray32
    right: FloatArray32

    @classmethod
    def read(
        cls, changes: Mapping[int, LowRank], start: int, stop: int, columns: int, memory: FloatArray32 | None = None
    ) -> Stack:
        """Read the factors in the given order; rows that a change does not have are zero.

        Parameters
        ----------
        memory : array of float32, shape (at least the size of both factors,), optional
            Where to put them.
        """
        ends = np.cumsum([0, *(delta.rank for delta in changes.values())])
        places = {i: slice(int(ends[k]), int(ends[k + 1])) for k, i in enumerate(changes)}
        scales, total, rows = np.zeros(ends[-1]), int(ends[-1]), stop - start
        if memory is None:
            memory = np.empty(total * (rows + columns), np.float32)
        left = memory[: total * rows].reshape(rows, total)
        right = memory[total * rows : total * (rows + columns)].reshape(total, columns)
        for i, delta in changes.items():
            scales[places[i]] = delta.scale
            read_factors(delta, start, stop, left[:, places[i]], right[places[i]])
        return cls(scales, places, left, right)


def read_factors(delta: LowRank, start: int, stop: int, left: FloatArray32, right: FloatArray32) -> None:
    """Write the factors of a low-rank change without its scale; rows that it does not have are zero.

    Parameters
    ----------
    left : array of float32, shape (stop - start, r)
        For these rows of the left factor.
    right : array of float32, shape (r, columns)
    """
    last = max(start, min(stop, delta.shape[0]))
    held = left[: last - start]
    left[last - start :] = 0.0
    if delta.transposed:
        _widen_transposed(delta.left_factor, start, last, held)
        _widen_transposed(delta.right_factor, 0, delta.rank, right)
    else:
        _widen(delta.left_factor, start, last, held)
        _widen(delta.right_factor, 0, delta.rank, right)


@dataclass(frozen=True, slots=True, eq=False)
class Meeting:
    """How rows V of a dense change meet the low-rank changes of a stack.

    Attributes
    ----------
    start : int
        The first row.
    stack : Stack
    left : array of float32, shape (rows, r)
        Its left factors in these rows.
    projected : array of float32, shape (rows, r)
        V R'.
    """

    start: int
    stack: Stack
    left: FloatArray32
    projected: FloatArray32

    def products(self) -> dict[int, float]:
        """Return the inner product of V with each change: <L_j R_j, V> = <L_j, V R_j'>."""
        along = np.einsum("ij,ij->j", self.projected, self.left, dtype=np.float64) * self.stack.scales
        return {j: float(along[place].sum()) for j, place in self.stack.places.items()}

    def cores(self) -> FloatArray:
        """Return L_j' V R_j' of each change, one below the other, padded with zeros to the largest rank."""
        places = self.stack.places.values()
        cores = np.zeros((len(self.stack.scales), max(place.stop - place.start for place in places)))
        for place in places:
            cores[place, : place.stop - place.start] = self.left[:, place].T @ self.projected[:, place]
        cores *= self.stack.scales[:, np.newaxis]
        return cores


def meet(block: Block, change: int, stack: Stack, first: int) -> Meeting:
    """Project a block of one change on the right factors of a stack whose first row is `first`: the one large GEMM."""
    values = block.values[change]
    left = stack.left[block.start - first : block.start - first + len(values)]
    return Meeting(block.start, stack, left, values @ stack.right.T)


def _widen(tensor: Tensor, start: int, stop: int, out: FloatArray32) -> None:
    tensor.dtype.widen_into(borrowed(tensor, start, stop), out)


def _widen_transposed(tensor: Tensor, start: int, stop: int, out: FloatArray32) -> None:
    """Write columns `start` to `stop` of a stored tensor as rows."""
    raw = borrowed(tensor, 0, matrix_shape(tensor.shape)[0])
    wide = np.empty(raw.shape, np.float32)
    tensor.dtype.widen_into(raw, wide)
    np.copyto(out, wide[:, start:stop].T)

"""Leading singular directions of dense changes: a few factors in place of whole matrices.

A full fine-tune's change of one tensor has the size of the tensor. Its leading directions are small enough to keep,
and have the form of a LoRA adapter's change. They are found by passes over blocks of rows: what is held in memory is
one block, and sketches of a few vectors as long as the rows and the columns. Blocks of large tensors are multiplied in
float32 (see `float32`) and added up in float64: what that rounds away is far below what storage rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from unmerge import float32
from unmerge.checkpoint.dtypes import DTYPES, FloatArray
from unmerge.checkpoint.tensor import ArrayTensor
from unmerge.cholesky import orthonormal
from unmerge.errors import TargetError
from unmerge.parallel import on_threads
from unmerge.task_vector import Delta, Difference, LowRank, TaskVector, blocks

DIRECTIONS = 32
"""Leading directions that are kept of each tensor, at most."""
OVERSAMPLING = 8
"""Directions that the sketch holds beyond the wanted ones."""
POWER_ITERATIONS = 2
"""Applications of M'M to the sketch, which make leading directions stand out, at most."""
STANDING_OUT = 0.99
"""Share of a change's energy in the sketch's directions from which they stand out as they are: further applications
could find no more than the rest."""
SMALLEST = 1e-6
"""Directions with singular values below this fraction of the largest are dropped: F32 would not hold them."""


def directions(vector: TaskVector, rank: int = DIRECTIONS, *, workers: int = 1) -> TaskVector:
    """Return the leading directions of what a fine-tune changed.

    Parameters
    ----------
    vector : TaskVector
        Its low-rank changes pass through as they are.
    rank : int
        Directions to keep of each dense change, at most.
    workers : int
        Tensors that are worked on at once; the result does not depend on it.

    Returns
    -------
    TaskVector
        Of the same name and digest, with low-rank changes alone; what was found has factors in F32, as a dictionary
        stores them. Tensors of one row or column (biases, norms) and those that are equal to the base are absent.

    Raises
    ------
    TargetError
        If a change holds values that are not finite.
    """
    from threadpoolctl import threadpool_limits

    names = [name for name, delta in sorted(vector.deltas.items()) if isinstance(delta, LowRank) or _is_matrix(delta)]
    # One BLAS thread per worker: the sums of a threaded GEMM would depend on the number of cores.
    with threadpool_limits(limits=1, user_api="blas"):
        found = on_threads(lambda name: _tensor_directions(vector, name, rank), names, workers)
    kept = {name: delta for name, delta in zip(names, found, strict=True) if delta is not None}
    return TaskVector(vector.name, vector.digest, kept)


def told_apart(found: TaskVector) -> TaskVector:
    """Return directions with a digest that is not that of the change that they are of."""
    return replace(found, digest=f"{found.digest}/directions")


def is_low_rank(vector: TaskVector) -> bool:
    """Tell whether every matrix of a change is low-rank already, so that it needs no `directions`."""
    return all(isinstance(delta, LowRank) or not _is_matrix(delta) for delta in vector.deltas.values())


def _is_matrix(delta: Delta) -> bool:
    return min(delta.shape) >= 2


def _tensor_directions(vector: TaskVector, name: str, rank: int) -> LowRank | None:
    delta = vector.deltas[name]
    if isinstance(delta, LowRank):
        return delta
    try:
        # Seeded by the name, so a result can be repeated and does not depend on the other tensors.
        found = leading(delta, rank, np.random.default_rng(list(name.encode())))
    except ValueError as error:
        raise TargetError(f"{vector.name}: tensor {name!r}: {error}") from error
    # In the type of the stored ones, so that an atom from a dictionary and one given alone count the same.
    return None if found is None else computed_low_rank(found.left(0, found.shape[0]), found.right(), "F32")


def leading(delta: Delta, rank: int, generator: np.random.Generator) -> LowRank | None:
    """Find the leading singular directions of one change.

    The randomised range finder of Halko, Martinsson and Tropp (2011, algorithms 4.4 and 5.1): an approximation of
    ``numpy.linalg.svd``, exact up to rounding where the change has at most `rank` directions. It reads the change
    three times if a few directions hold nearly all of it, five times if not, and once if it is one block.

    Parameters
    ----------
    delta : Delta
        The change M, shape (m, n).
    rank : int
        Directions to return, at most.
    generator : numpy.random.Generator
        Draws the sketch.

    Returns
    -------
    LowRank or None
        Factors ``U S``, shape (m, k), in weight units, and ``W'``, shape (k, n), with orthonormal rows; k is at most
        `rank`. Singular values descend; the largest element of each row of ``W'`` is positive. None if the change is
        zero.

    Raises
    ------
    ValueError
        If `rank` is not positive, or the change holds values that are not finite.
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: expected at least one direction")
    change = _Change.of(delta)
    sketch = generator.standard_normal((change.shape[1], min(rank + OVERSAMPLING, *change.shape)))
    product, energy = _gram_times(change, sketch)
    if not np.isfinite(product).all():
        raise ValueError("it has NaN or Inf (in it or in the base), or its energy overflows: not a usable model")
    if not product.any():
        return None
    for _ in range(POWER_ITERATIONS):
        along = _times(change, orthonormal(product)[0])
        columns, _ = orthonormal(along)
        product = _transposed_times(change, columns)
        if float(np.vdot(along, along)) >= STANDING_OUT * energy:
            break
    # The singular values of a tall matrix are those of its small triangle, in a third of the time.
    rows, triangle = orthonormal(product)
    inner, singular, right = np.linalg.svd(triangle.T)
    right = right @ rows.T
    kept = int(np.count_nonzero(singular[:rank] > SMALLEST * singular[0]))
    if not kept:
        return None
    signs = _signs(right[:kept])
    left = columns @ inner[:, :kept] * (singular[:kept] * signs)
    return computed_low_rank(left, right[:kept] * signs[:, np.newaxis], "F64")


def _gram_times(change: _Change, basis: FloatArray) -> tuple[FloatArray, float]:
    """Return M'M times a basis, and the energy of M."""
    # M'M at once saves a pass. It squares singular values, but what SMALLEST keeps stays above float64's rounding.
    product, energy = np.zeros(basis.shape), 0.0
    with np.errstate(invalid="ignore", over="ignore"):  # who reads the product says what is wrong
        for _, block, own in change.blocks():
            if own != 0.0:  # most tensors of most fine-tunes are the base's
                product += block.T @ (block @ basis.astype(block.dtype))
                energy += own
    return product, energy


def _times(change: _Change, basis: FloatArray) -> FloatArray:
    product = np.empty((change.shape[0], basis.shape[1]))
    for start, block, _ in change.blocks():
        product[start : start + len(block)] = block @ basis.astype(block.dtype)
    return product


def _transposed_times(change: _Change, basis: FloatArray) -> FloatArray:
    product = np.zeros((change.shape[1], basis.shape[1]))
    for start, block, _ in change.blocks():
        product += block.T @ basis[start : start + len(block)].astype(block.dtype)
    return product


@dataclass(frozen=True, slots=True, eq=False)
class _Change:
    """A dense change that is looked at several times.

    Attributes
    ----------
    delta : Delta
    held : tuple of (int, array, float) or None
        Its only block, as `_blocks` yields it; None if there are several, which are read each time.
    """

    delta: Delta
    held: tuple[int, NDArray[Any], float] | None

    @classmethod
    def of(cls, delta: Delta) -> _Change:
        return cls(delta, next(_blocks(delta)) if _is_one_block(delta) else None)

    @property
    def shape(self) -> tuple[int, int]:
        return self.delta.shape

    def blocks(self) -> Iterator[tuple[int, NDArray[Any], float]]:
        return _blocks(self.delta) if self.held is None else iter([self.held])


def _is_one_block(delta: Delta) -> bool:
    rows, columns = delta.shape
    return float32.step(rows, columns) == rows if _is_large(delta) else next(blocks(0, rows, columns))[1] == rows


def _is_large(delta: Delta) -> TypeGuard[Difference]:
    rows, columns = delta.shape
    return isinstance(delta, Difference) and float32.applies([delta], rows * columns)


def _blocks(delta: Delta) -> Iterator[tuple[int, NDArray[Any], float]]:
    """Yield the first row, values and energy of each block, written over later; large stored changes in float32."""
    rows, columns = delta.shape
    if _is_large(delta):
        for block in float32.blocks({0: delta}, 0, rows, columns, [(0, 0)]):
            yield block.start, block.values[0], block.products[0, 0]
    else:
        for start, stop in blocks(0, rows, columns):
            values = delta.block(start, stop)[0]
            yield start, values, float(np.vdot(values, values))


def _signs(right: FloatArray) -> FloatArray:
    # A singular pair is defined up to its sign; without a rule the sign would be LAPACK's accident.
    largest = np.argmax(np.abs(right), axis=1)
    return np.where(right[np.arange(len(right)), largest] < 0.0, -1.0, 1.0)


def computed_low_rank(left: FloatArray, right: FloatArray, dtype: str) -> LowRank:
    """Return ``left @ right``, shapes (m, k) and (k, n), as a low-rank change held in memory in a storage type."""
    return LowRank(_in_memory("left", left, dtype), _in_memory("right", right, dtype), transposed=False, scale=1.0)


def _in_memory(name: str, values: FloatArray, dtype: str) -> ArrayTensor:
    stored = DTYPES[dtype]
    return ArrayTensor(name, stored, values.shape, Path("(computed)"), np.ascontiguousarray(values, dtype=stored.raw))

"""Sketches of changes: their values at a few fixed places of every matrix of a base.

A sketch is to tell a thousand fine-tunes apart without opening them. It holds a grid of rows and columns of each
matrix, chosen by the matrix's name and shape alone, so sketches of any two changes of one base can be compared. A value
counts for all the parameters that it stands for: inner products of sketches estimate those of the changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unmerge import float32
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.checkpoint.header import read_header
from unmerge.checkpoint.tensor import FileTensor, Tensor, values
from unmerge.errors import DictionaryError
from unmerge.parallel import on_threads
from unmerge.task_vector import Delta, LowRank, TaskVector, blocks

ROWS, COLUMNS = 16, 32
"""Rows and columns of the grid, at most."""
MOST_BYTES = 1 << 29
"""What the sketches of all atoms may take in memory; beyond it, only every second value is used, or every third."""
VALUES, ENERGIES = "values", "energies"

Places = NDArray[np.intp]
FloatArray32 = NDArray[np.float32]


def grid(name: str, shape: tuple[int, int]) -> tuple[Places, Places]:
    """Choose the rows and the columns of a matrix that its sketch holds: one in each of equal strata.

    They come from a hash of the name, not from a random generator: sketches on disk outlive versions of numpy.
    """
    return _strata(f"0\0{name}", shape[0], ROWS), _strata(f"1\0{name}", shape[1], COLUMNS)


def _strata(seed: str, extent: int, most: int) -> Places:
    starts, lengths = _edges(extent, most)
    drawn = np.frombuffer(hashlib.shake_256(seed.encode()).digest(8 * len(starts)), "<u8")
    return starts + (drawn % lengths).astype(np.intp)


@cache
def _edges(extent: int, most: int) -> tuple[Places, NDArray[np.uint64]]:
    """Return where strata start and how long they are; a model has few shapes and hundreds of matrices."""
    count = min(extent, most)
    edges = np.arange(count + 1) * extent // max(1, count)
    return edges[:-1].astype(np.intp), np.maximum(1, np.diff(edges)).astype(np.uint64)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """What sketches hold of each tensor of a base.

    Attributes
    ----------
    shapes : mapping of str to (int, int)
        The tensors by name, sorted.
    sizes : array of int, shape (T,)
        Values that a sketch holds of each tensor that is changed; 0 for those of one row or column.
    """

    shapes: Mapping[str, tuple[int, int]]
    sizes: Places

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, int]]) -> Layout:
        """Lay out the tensors of these (rows, columns)."""
        ordered = dict(sorted(shapes.items()))
        sizes = [_count(shape) if min(shape) > 1 else 0 for shape in ordered.values()]
        return cls(ordered, np.array(sizes, dtype=np.intp))

    def changed(self, energies: FloatArray) -> NDArray[np.bool_]:
        """Tell which tensors a sketch holds, from the energies in it, shape (..., T + 1)."""
        found: NDArray[np.bool_] = (energies[..., :-1] > 0.0) & (self.sizes > 0)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Sketch:
    """Of one change.

    Attributes
    ----------
    values : array of float32, shape (m,)
        Of the matrices that it changes, in the order of the layout, each row after row; every value is multiplied by
        the root of the number of parameters that it stands for. In weight units.
    energies : array, shape (T + 1,)
        Energy of the whole change in each tensor of the layout, and in all others; in squared weight units.
    """

    values: FloatArray32
    energies: FloatArray

    @property
    def tensors(self) -> dict[str, NDArray[np.generic]]:
        """What is stored, by name."""
        return {VALUES: self.values, ENERGIES: self.energies}


def sketch(vector: TaskVector, layout: Layout, known: Mapping[str, float] | None = None, *, workers: int = 1) -> Sketch:
    """Sketch a change; low-rank ones from their factors, others from the rows of the grid.

    Parameters
    ----------
    known : mapping of str to float, optional
        Energies by tensor; those that it lacks are computed.
    workers : int
        Tensors that are worked on at once; the result does not depend on it.
    """
    from threadpoolctl import threadpool_limits

    memory = _Memory()

    def look(name: str) -> tuple[float, FloatArray]:
        delta = vector.deltas[name]
        shape, energy = layout.shapes.get(name, delta.shape), (known or {}).get(name)
        if isinstance(delta, LowRank):
            return _low_rank(name, delta, shape, energy, memory)
        return _energy(delta, shape) if energy is None else energy, on_grid(name, delta, shape)

    names = sorted(vector.deltas)
    low_rank = [name for name in names if isinstance(vector.deltas[name], LowRank)]
    others = [name for name in names if not isinstance(vector.deltas[name], LowRank)]
    # One BLAS thread: sums of a threaded product would depend on the number of cores.
    with threadpool_limits(limits=1, user_api="blas"):
        seen = {name: look(name) for name in low_rank}  # too short for threads, which would wait for each other
        seen.update(zip(others, on_threads(look, others, workers), strict=True))
    energies = np.array([seen[name][0] if name in seen else 0.0 for name in layout.shapes] + [0.0])
    energies[-1] = sum(energy for name, (energy, _) in sorted(seen.items()) if name not in layout.shapes)
    held = [name for name, changed in zip(layout.shapes, layout.changed(energies), strict=True) if changed]
    parts = [seen[name][1].ravel() for name in held]
    return Sketch(np.concatenate([*parts, np.zeros(0)]).astype(np.float32), energies)


@dataclass(slots=True, eq=False)
class _Memory:
    """For the factors of one tensor after the other: fresh pages take longer than what is put there."""

    values: FloatArray32 = field(default_factory=lambda: np.empty(0, np.float32))

    def factors(self, delta: LowRank, shape: tuple[int, int]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """Return both factors without the scale; those of large tensors in float32, whose products are good to 1e-6."""
        if not float32.applies([delta], shape[0] * shape[1]):
            return delta.left(0, shape[0]), delta.right()
        rank, (rows, columns) = delta.rank, shape
        if len(self.values) < rank * (rows + columns):
            self.values = np.empty(rank * (rows + columns), np.float32)
        left = self.values[: rank * rows].reshape(rows, rank)
        right = self.values[rank * rows : rank * (rows + columns)].reshape(rank, columns)
        float32.read_factors(delta, 0, rows, left, right)
        return left, right


def _low_rank(
    name: str, delta: LowRank, shape: tuple[int, int], energy: float | None, memory: _Memory
) -> tuple[float, FloatArray]:
    """Return the energy of a change of a tensor of this shape, and its values on the grid, scaled."""
    left, right = memory.factors(delta, shape)
    if energy is None:
        inner, outer = (left.T @ left).astype(np.float64), (right @ right.T).astype(np.float64)
        energy = delta.scale**2 * float(np.sum(inner * outer))
    if min(shape) < 2:
        return energy, np.zeros((0, 0))
    rows, columns = grid(name, shape)
    found = left[rows].astype(np.float64) @ right[:, columns].astype(np.float64)
    return energy, found * (delta.scale * _scale(shape))


def _energy(delta: Delta, shape: tuple[int, int]) -> float:
    with np.errstate(over="ignore", invalid="ignore"):  # who reads it says what is wrong
        read = (delta.block(start, stop)[0] for start, stop in blocks(0, *shape))
        return sum(float(np.vdot(block, block)) for block in read)


def on_grid(name: str, delta: Delta, shape: tuple[int, int]) -> FloatArray:
    """Return the scaled values of a change on the grid of a tensor of this shape; none of a vector."""
    if min(shape) < 2:
        return np.zeros((0, 0))
    rows, columns = grid(name, shape)
    if isinstance(delta, LowRank):
        found = delta.left(0, shape[0])[rows] * delta.scale @ delta.right()[:, columns]
    else:
        found = np.concatenate([delta.block(row, row + 1)[0][:, columns] for row in rows.tolist()])
    return found * _scale(shape)


def _count(shape: tuple[int, int]) -> int:
    return min(ROWS, shape[0]) * min(COLUMNS, shape[1])


def _scale(shape: tuple[int, int]) -> float:
    return float(np.sqrt(shape[0] * shape[1] / _count(shape)))


@dataclass(frozen=True, slots=True, eq=False)
class Sketches:
    """Of many changes of one base, in the matrices that one of them changes.

    Attributes
    ----------
    layout : Layout
    held : array of int, shape (H,)
        Those matrices, as places in the layout; ascending.
    step : int
        One in so many values of a sketch is used.
    values : array of float32, shape (K, m)
        See `Sketch`; zero where a change has none.
    energies : array, shape (K, T + 1)
        See `Sketch`.
    """

    layout: Layout
    held: Places
    step: int
    values: FloatArray32
    energies: FloatArray

    @property
    def parts(self) -> list[slice]:
        """The used values of each matrix that has some."""
        own = np.repeat(self.held, self.layout.sizes[self.held])[:: self.step]
        edges = np.flatnonzero(np.diff(own, prepend=-1, append=-1))
        return [slice(int(start), int(stop)) for start, stop in pairwise(edges)]

    def target(self, changes: Mapping[str, Delta], rows: Mapping[str, int]) -> tuple[FloatArray, NDArray[np.bool_]]:
        """Return a target's change in the same places, shape (m,), and which of them can be compared.

        Parameters
        ----------
        changes : mapping of str to Delta
            By tensor; others are unchanged.
        rows : mapping of str to int
            Rows to compare of each tensor that can be compared.
        """
        found, seen = [], []
        for name, shape in self._matrices():
            delta = changes.get(name)
            found.append(np.zeros(_count(shape)) if delta is None else on_grid(name, delta, shape).ravel())
            seen.append(np.repeat(grid(name, shape)[0] < rows.get(name, 0), min(COLUMNS, shape[1])))
        return np.concatenate(found)[:: self.step], np.concatenate(seen)[:: self.step]

    def base(self, tensors: Mapping[str, Tensor]) -> FloatArray:
        """Return the base's own weights in the same places, shape (m,)."""
        found = []
        for name, shape in self._matrices():
            rows, columns = grid(name, shape)
            read = [values(tensors[name], row, row + 1)[:, columns] for row in rows.tolist()]
            found.append(np.concatenate(read).ravel() * _scale(shape))
        return np.concatenate(found)[:: self.step]

    def _matrices(self) -> list[tuple[str, tuple[int, int]]]:
        tensors = list(self.layout.shapes.items())
        return [tensors[place] for place in self.held.tolist()]


def stack(sketches: Sequence[Sketch | Path], layout: Layout) -> Sketches:
    """Stack sketches, given or in files.

    Raises
    ------
    DictionaryError
        If a file does not hold a sketch of this layout.
    CheckpointError
        If a file cannot be read.
    """
    opened = [item if isinstance(item, Sketch) else _Stored.open(item, layout) for item in sketches]
    energies = np.array([item.energies for item in opened]).reshape(len(opened), len(layout.sizes) + 1)
    changed = layout.changed(energies)
    held = np.flatnonzero(changed.any(axis=0)).astype(np.intp)
    sizes = layout.sizes[held]
    step = max(1, -(-len(opened) * int(sizes.sum()) * 4 // MOST_BYTES))
    found = np.zeros((len(opened), len(range(0, int(sizes.sum()), step))), np.float32)
    for row, item, own in zip(found, opened, changed[:, held], strict=True):
        row[:] = _spread(item.read() if isinstance(item, _Stored) else item.values, sizes, own)[::step]
    return Sketches(layout, held, step, found, energies)


def _spread(found: FloatArray32, sizes: Places, own: NDArray[np.bool_]) -> FloatArray32:
    """Return the values of a sketch in the places of all, zero where it has none."""
    if own.all():
        return found
    wide = np.zeros(int(sizes.sum()), np.float32)
    wide[np.repeat(own, sizes)] = found
    return wide


@dataclass(frozen=True, slots=True, eq=False)
class _Stored:
    """A sketch in a file, its values not yet read."""

    stored: FileTensor
    energies: FloatArray

    @classmethod
    def open(cls, file: Path, layout: Layout) -> _Stored:
        tensors, _ = read_header(file)
        stored, energies = tensors.get(VALUES), tensors.get(ENERGIES)
        if stored is None or energies is None or energies.shape != (len(layout.sizes) + 1,):
            raise DictionaryError(f"{file}: not a sketch of a change of this base; build the dictionary again")
        found = values(energies)[0]
        if stored.dtype.name != "F32" or stored.shape != (int(layout.sizes[layout.changed(found)].sum()),):
            raise DictionaryError(f"{file}: a sketch of another size than its energies say; build the dictionary again")
        return cls(stored, found)

    def read(self) -> FloatArray32:
        raw: FloatArray32 = self.stored.read(0, 1)[0]
        return raw

"""The paper's choice of coordinates: in each tensor, where the atoms changed most (section 3.4).

A choice of coordinates, not a necessity: the exact statistics over all parameters cost one pass too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unmerge.checkpoint.dtypes import FloatArray
from unmerge.statistics import Statistics
from unmerge.task_vector import Delta, Difference, TaskVector, blocks

IndexArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Chosen coordinates.

    Attributes
    ----------
    indices : mapping
        Tensor name to flat row-major indices, ascending.
    """

    indices: Mapping[str, IndexArray]

    @property
    def count(self) -> int:
        """The number of coordinates."""
        return sum(len(chosen) for chosen in self.indices.values())

    @property
    def digest(self) -> str:
        """Hex SHA-256 of names and indices."""
        digest = hashlib.sha256()
        for name, chosen in sorted(self.indices.items()):
            digest.update(f"{name}\0{len(chosen)}\0".encode())
            digest.update(chosen.astype("<i8").tobytes())
        return digest.hexdigest()


def select_top_k(vectors: Sequence[TaskVector], shapes: Mapping[str, tuple[int, int]], k: int) -> Selection:
    """Choose the coordinates of largest ``max_i |d_i|`` in each tensor that an atom changes.

    Parameters
    ----------
    vectors : sequence of TaskVector
        The atoms.
    shapes : mapping
        The (rows, columns) of each tensor to choose from.
    k : int
        Coordinates in all; every tensor (one layer's module) gets ``k // tensors`` of them, or all it has. Ties
        go to the lower index.

    Raises
    ------
    ValueError
        If k is smaller than the number of tensors.
    """
    touched = sorted({name for vector in vectors for name in vector.deltas} & shapes.keys())
    quota = k // max(1, len(touched))
    if quota < 1:
        raise ValueError(f"top-k is {k}, fewer than one coordinate for each of {len(touched)} tensors")
    indices = {
        name: _largest([v.deltas[name] for v in vectors if name in v.deltas], shapes[name], quota) for name in touched
    }
    return Selection(indices)


def _largest(deltas: Sequence[Delta], shape: tuple[int, int], quota: int) -> IndexArray:
    # Keeps the best so far and one block: memory does not grow with the tensor.
    rows, columns = shape
    best = np.zeros(0)
    where = np.zeros(0, dtype=np.int64)
    for start, stop in blocks(0, rows, columns):
        magnitude = np.max([np.abs(delta.block(start, stop)[0]) for delta in deltas], axis=0).ravel()
        candidates = np.concatenate([best, magnitude])
        places = np.concatenate([where, np.arange(start * columns, stop * columns, dtype=np.int64)])
        if len(candidates) > quota:
            threshold = np.partition(candidates, len(candidates) - quota)[len(candidates) - quota]
            above = np.flatnonzero(candidates > threshold)
            ties = np.flatnonzero(candidates == threshold)[: quota - len(above)]
            kept = np.sort(np.concatenate([above, ties]))
            candidates, places = candidates[kept], places[kept]
        best, where = candidates, places
    return np.sort(where)


def compressed_statistics(
    vectors: Sequence[TaskVector],
    target: TaskVector,
    selection: Selection,
    shapes: Mapping[str, tuple[int, int]],
) -> dict[str, Statistics]:
    """Compute the statistics of each tensor over the chosen coordinates alone."""
    return {
        name: _tensor_statistics(vectors, target.deltas.get(name), chosen, name, shapes[name])
        for name, chosen in selection.indices.items()
    }


def _tensor_statistics(
    vectors: Sequence[TaskVector], target: Delta | None, chosen: IndexArray, name: str, shape: tuple[int, int]
) -> Statistics:
    result = Statistics.zero(len(vectors))
    for (start, stop), local in _by_block(chosen, shape):
        atoms = np.zeros((len(local), len(vectors)))
        for column, vector in enumerate(vectors):
            if name in vector.deltas:
                atoms[:, column] = vector.deltas[name].block(start, stop)[0].ravel()[local]
        values = np.zeros(len(local)) if target is None else target.block(start, stop)[0].ravel()[local]
        part = Statistics.of(atoms, values)
        result = result + Statistics(
            part.gram, part.correlation, part.energy, _rounding(target, start, stop, local), part.count
        )
    return result


def _rounding(target: Delta | None, start: int, stop: int, local: IndexArray) -> float:
    if not isinstance(target, Difference):
        return 0.0
    return target.tuned.dtype.rounding_energy(target.tuned.read(start, stop).ravel()[local])


def _by_block(chosen: IndexArray, shape: tuple[int, int]) -> Iterator[tuple[tuple[int, int], IndexArray]]:
    rows, columns = shape
    for start, stop in blocks(0, rows, columns):
        low, high = np.searchsorted(chosen, [start * columns, stop * columns])
        if high > low:
            yield (start, stop), chosen[low:high] - start * columns


def materialise(vector: TaskVector, name: str) -> FloatArray:
    """Return the whole change of one tensor, shape (rows, columns): for small models and for checks."""
    delta = vector.deltas[name]
    return delta.block(0, delta.shape[0])[0]

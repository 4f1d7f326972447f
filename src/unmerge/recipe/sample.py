"""Elements that tell much about how a merge was made: those whose change is large against the target's grid.

A stored element is known to half a spacing of its grid. Where the weight happens to be near zero, that is far less
than what fine-tuning changed, and what the merge did to the changes can be read off. Which elements are so depends
on the base and on the fine-tunes, hardly on the merge.

Trimming goes by the magnitudes in a whole tensor, so each element comes with its rank, estimated from some rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unmerge.checkpoint.dtypes import DType, FloatArray

SHARP = 0.03
"""An element is sharp if half a spacing of the target's grid is less than this share of the largest change there."""
ELEMENTS = 6000
"""Sharp elements that are kept of each tensor."""
READ = 1 << 18
"""Elements of each tensor that are read to find sharp ones and to estimate ranks."""

ReadRows = Callable[[str, int, int], FloatArray]
"""Reads rows `start` to `stop` of a tensor, shape (stop - start, columns)."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Sharp elements of one or more tensors.

    Attributes
    ----------
    change : array, shape (m,)
        Target minus base, in weight units.
    deltas : array, shape (k, m)
        Fine-tune minus base, of each of the k models.
    ranks : array, shape (k, m)
        Share of the tensor's elements whose change by that model is larger in magnitude, in [0, 1].
    row_ranks : array, shape (k, m)
        Rank within the element's row by magnitude, 0 for the smallest and 1 for the largest.
    spread_ranks : array, shape (m,)
        Share of the tensor's elements whose changes vary more between the models.
    half_cell : array, shape (m,)
        How exactly the target is known: half a spacing of its grid.
    tensor : array of int, shape (m,)
        Which of `names` the element is from.
    names : tuple of str
        The T tensors.
    heavy_ranks : array, shape (k, T)
        Mean rank in its row of each model's change, weighted by magnitude: what a mask that prefers large elements
        keeps of the whole depends on it.
    """

    change: FloatArray
    deltas: FloatArray
    ranks: FloatArray
    row_ranks: FloatArray
    spread_ranks: FloatArray
    half_cell: FloatArray
    tensor: NDArray[np.int64]
    names: tuple[str, ...]
    heavy_ranks: FloatArray

    @property
    def energy(self) -> float:
        """The sum of squares of the change."""
        return float(self.change @ self.change)

    @property
    def floor(self) -> float:
        """The share of the energy that the target's rounding accounts for."""
        return float(np.sum(self.half_cell**2) / 3.0 / self.energy) if self.energy else 0.0

    def of(self, tensors: Sequence[int]) -> Sample:
        """Return the elements of some of the tensors."""
        return self.where(np.isin(self.tensor, tensors))

    def where(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Sample:
        """Return some of the elements."""
        return Sample(
            self.change[chosen],
            self.deltas[:, chosen],
            self.ranks[:, chosen],
            self.row_ranks[:, chosen],
            self.spread_ranks[chosen],
            self.half_cell[chosen],
            self.tensor[chosen],
            self.names,
            self.heavy_ranks,
        )

    def thinned(self, count: int) -> Sample:
        """Return about `count` elements, evenly spaced."""
        step = max(1, len(self.change) // count)
        return self.where(np.arange(0, len(self.change), step))

    @staticmethod
    def join(samples: Sequence[Sample]) -> Sample:
        """Return the samples of single tensors as one."""
        return Sample(
            np.concatenate([one.change for one in samples]),
            np.concatenate([one.deltas for one in samples], axis=1),
            np.concatenate([one.ranks for one in samples], axis=1),
            np.concatenate([one.row_ranks for one in samples], axis=1),
            np.concatenate([one.spread_ranks for one in samples]),
            np.concatenate([one.half_cell for one in samples]),
            np.concatenate([np.full(len(one.change), number) for number, one in enumerate(samples)]),
            tuple(name for one in samples for name in one.names),
            np.concatenate([one.heavy_ranks for one in samples], axis=1),
        )


def sample_tensor(
    name: str,
    shape: tuple[int, int],
    grid: DType,
    base: ReadRows,
    target: ReadRows,
    models: Sequence[ReadRows],
    generator: np.random.Generator,
) -> Sample | None:
    """Read some rows of one tensor and keep its sharp elements; None where no model changes it.

    Parameters
    ----------
    shape : (int, int)
        Rows and columns.
    grid : DType
        The target's storage type.
    models : sequence of callable
        The k fine-tunes.
    """
    rows = _rows(shape, generator)
    base_values = _read(base, name, rows)
    target_values = _read(target, name, rows)
    deltas = np.stack([_read(model, name, rows) - base_values for model in models])
    if not deltas.any():
        return None
    half_cell = 0.5 * grid.spacing(target_values)
    sharp = np.flatnonzero((half_cell < SHARP * np.abs(deltas).max(axis=0)).ravel())
    if len(sharp) > ELEMENTS:
        sharp = np.sort(generator.choice(sharp, ELEMENTS, replace=False))
    flat = deltas.reshape(len(models), -1)
    row_ranks = np.stack([_row_ranks(np.abs(delta)).ravel() for delta in deltas])
    return Sample(
        (target_values - base_values).ravel()[sharp],
        flat[:, sharp],
        np.stack([larger(np.abs(delta))[sharp] for delta in flat]),
        row_ranks[:, sharp],
        larger(flat.var(axis=0))[sharp],
        half_cell.ravel()[sharp],
        np.zeros(len(sharp), dtype=np.int64),
        (name,),
        _heavy_ranks(np.abs(flat), row_ranks),
    )


def _rows(shape: tuple[int, int], generator: np.random.Generator) -> list[int]:
    rows, columns = shape
    count = min(rows, max(1, READ // max(1, columns)))
    return sorted(generator.choice(rows, count, replace=False).tolist())


def _read(read: ReadRows, name: str, rows: Sequence[int]) -> FloatArray:
    """Read rows, neighbours at once."""
    parts: list[FloatArray] = []
    start = previous = rows[0]
    for row in [*rows[1:], -1]:
        if row != previous + 1:
            parts.append(read(name, start, previous + 1))
            start = row
        previous = row
    return np.concatenate(parts)


def larger(magnitudes: FloatArray) -> FloatArray:
    """Return for each value the share of values that are larger; equal ones count half."""
    ordered = np.sort(magnitudes)
    above = len(ordered) - np.searchsorted(ordered, magnitudes, side="right")
    not_below = len(ordered) - np.searchsorted(ordered, magnitudes, side="left")
    return np.asarray((above + not_below) / (2.0 * len(ordered)))


def _row_ranks(magnitudes: FloatArray) -> FloatArray:
    if magnitudes.shape[1] < 2:
        return np.zeros_like(magnitudes)
    ranks = magnitudes.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return np.asarray(ranks / (magnitudes.shape[1] - 1.0))


def _heavy_ranks(magnitudes: FloatArray, ranks: FloatArray) -> FloatArray:
    total = np.maximum(magnitudes.sum(axis=1), np.finfo(np.float64).tiny)
    return np.asarray((magnitudes * ranks).sum(axis=1) / total)[:, np.newaxis]


def draw_sample(
    shapes: Mapping[str, tuple[int, int]],
    grids: Mapping[str, DType],
    base: ReadRows,
    target: ReadRows,
    models: Sequence[ReadRows],
) -> Sample:
    """Keep the sharp elements of all tensors that a model changes, in the order of their names.

    Parameters
    ----------
    shapes : mapping of str to (int, int)
        Rows and columns of each tensor that all of them have.
    grids : mapping of str to DType
        The target's storage types.
    """
    generator = np.random.default_rng(0)
    found = [sample_tensor(name, shapes[name], grids[name], base, target, models, generator) for name in sorted(shapes)]
    kept = [one for one in found if one is not None and len(one.change)]
    if not kept:
        empty = np.zeros(0)
        none = np.zeros((len(models), 0))
        return Sample(empty, none, none, none, empty, empty, np.zeros(0, dtype=np.int64), (), none)
    return Sample.join(kept)

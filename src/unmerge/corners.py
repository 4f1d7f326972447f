"""Some rows and columns of each tensor, put together from the target's contacts, the atoms and the base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from unmerge.accumulate import CORNERS, Contact
from unmerge.checkpoint.dtypes import DType, FloatArray
from unmerge.checkpoint.tensor import Tensor, matrix_shape, values
from unmerge.dictionary import Base
from unmerge.evidence.lattice import Block
from unmerge.evidence.rounding import Corner
from unmerge.regression import Regression
from unmerge.task_vector import Delta, Difference, LowRank, Residual, TaskVector


def corners(regression: Regression, target: TaskVector, base: Base, atoms: Sequence[int]) -> dict[str, Corner]:
    """Return corners of tensors that the target was met in, with the changes of some atoms.

    Parameters
    ----------
    regression : Regression
        With contacts.
    target : TaskVector
        What the contacts are of, for its storage type.
    atoms : sequence of int
        Places of the P atoms in the regression.

    Returns
    -------
    dict
        At most `CORNERS`, spread over the model; each stands for its neighbours too.
    """
    chosen = _spread(regression)
    standing_for = len(regression.contacts) / max(1, len(chosen))
    return {name: _corner(regression, target, base, atoms, name, standing_for) for name in chosen}


def blocks(regression: Regression, target: TaskVector, base: Base, atoms: Sequence[int]) -> list[Block]:
    """Return all that was kept of the same tensors, with the atoms as checkpoints that were stored.

    Tensors that the target does not store as they are seen have none: adapters, and what the base was taken out of.

    Parameters
    ----------
    regression : Regression
        With contacts.
    target : TaskVector
        What the contacts are of, for its storage type.
    atoms : sequence of int
        Places of the P atoms in the regression.
    """
    kept = {name: _storage(target, name) for name in _spread(regression)}
    return [
        _block(regression, base, atoms, name, stored)
        for name, stored in kept.items()
        if stored is not None and isinstance(target.deltas[name], Difference)
    ]


def _spread(regression: Regression) -> list[str]:
    names = list(regression.contacts)
    return [names[place] for place in np.unique(np.linspace(0, len(names) - 1, CORNERS).astype(int))] if names else []


def _block(regression: Regression, base: Base, atoms: Sequence[int], name: str, stored: DType) -> Block:
    contact, tensor = regression.contacts[name], base.checkpoint.tensors[name]
    weights = read_corner(tensor, contact.rows, contact.columns)
    changes = []
    for atom in atoms:
        delta = regression.atoms[atom].vector.deltas.get(name)
        change = _lines(delta, contact.rows, contact.columns)
        changes.append(tensor.dtype.nearest(weights + change) - weights if isinstance(delta, LowRank) else change)
    low, high = stored.cell(weights + contact.corner)
    spacing = tensor.dtype.spacing(weights)
    return Block(np.array(changes), low - weights, high - weights, spacing, np.maximum(spacing, high - low))


def _corner(
    regression: Regression, target: TaskVector, base: Base, atoms: Sequence[int], name: str, standing_for: float
) -> Corner:
    contact, tensor = regression.contacts[name], base.checkpoint.tensors[name]
    deltas = [regression.atoms[atom].vector.deltas.get(name) for atom in atoms]
    stored, kept = tensor.dtype, _storage(target, name)
    halves = _halves(contact)
    lines = [(contact.rows[rows], contact.columns[columns]) for rows, columns in halves]
    weights = np.concatenate([read_corner(tensor, rows, columns) for rows, columns in lines])
    changes = [np.concatenate([_lines(delta, rows, columns) for rows, columns in lines]) for delta in deltas]
    return Corner(
        target=np.concatenate([contact.corner[rows, columns].astype(np.float64) for rows, columns in halves]),
        base=weights,
        atoms=np.array(changes).reshape(len(atoms), *weights.shape),
        stored=np.array([not isinstance(delta, LowRank) for delta in deltas], dtype=bool),
        spacing=np.maximum(stored.spacing(weights), (kept or stored).spacing(weights)),
        target_grid=kept.nearest if kept else _exact,
        target_cell=kept.cell if kept and isinstance(target.deltas[name], Difference) else None,
        base_grid=stored.nearest,
        size=round(standing_for * regression.rows[name] * matrix_shape(tensor.shape)[1]),
    )


def _halves(contact: Contact) -> list[tuple[slice, slice]]:
    """Return two parts of what a contact kept that share no row and no column, of one shape."""
    rows, columns = (max(1, extent // 2) for extent in contact.corner.shape)
    first = (slice(0, rows), slice(0, columns))
    second = (slice(rows, 2 * rows), slice(columns, 2 * columns))
    return [first, second] if min(contact.corner.shape) > 1 else [first]


def _lines(delta: Delta | None, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> FloatArray:
    """Return a change in some rows and columns."""
    if delta is None:
        return np.zeros((len(rows), len(columns)))
    if isinstance(delta, LowRank):
        left = np.concatenate([delta.left(start, stop) for start, stop in _runs(rows)])
        return np.asarray(left @ (delta.right()[:, columns] * delta.scale))
    return np.concatenate([delta.block(start, stop)[0][:, columns] for start, stop in _runs(rows)])


def _exact(weights: FloatArray) -> FloatArray:
    return weights


def _storage(target: TaskVector, name: str) -> DType | None:
    """Return how the target stores a tensor; None for an adapter, which adds to the base without rounding."""
    delta = target.deltas[name]
    if isinstance(delta, Residual):
        delta = delta.target if delta.target is not None else delta
    return delta.tuned.dtype if isinstance(delta, Difference) else None


def read_corner(tensor: Tensor, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> FloatArray:
    """Return some rows and columns of a stored tensor as float64, reading only the rows."""
    parts = [values(tensor, start, stop)[:, columns] for start, stop in _runs(rows)]
    return np.concatenate(parts)


def _runs(rows: NDArray[np.intp]) -> Iterator[tuple[int, int]]:
    """Split ascending row numbers into runs of neighbours."""
    breaks = np.flatnonzero(np.diff(rows) > 1) + 1
    for run in np.split(rows, breaks):
        yield int(run[0]), int(run[-1]) + 1

"""Some rows and columns of each tensor, put together from the target's contacts, the atoms and the base."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from unmerge.accumulate import CORNERS, Contact
from unmerge.checkpoint.dtypes import DType, FloatArray
from unmerge.checkpoint.tensor import Tensor, lines, matrix_shape
from unmerge.dictionary import Base
from unmerge.evidence.lattice import Block
from unmerge.evidence.rounding import Corner
from unmerge.parallel import on_threads
from unmerge.regression import Regression
from unmerge.task_vector import Delta, Difference, LowRank, Residual, TaskVector


def corners(
    regression: Regression, target: TaskVector, base: Base, atoms: Sequence[int], *, workers: int = 1
) -> dict[str, Corner]:
    """Return corners of tensors that the target was met in, with the changes of some atoms.

    Parameters
    ----------
    regression : Regression
        With contacts.
    target : TaskVector
        What the contacts are of, for its storage type.
    atoms : sequence of int
        Places of the P atoms in the regression.
    workers : int
        Tensors that are worked on at once; the result does not depend on it.

    Returns
    -------
    dict
        At most `CORNERS`, spread over the model; each stands for its neighbours too.
    """
    chosen = _spread(regression)
    standing_for = len(regression.contacts) / max(1, len(chosen))
    found = on_threads(lambda name: _corner(regression, target, base, atoms, name, standing_for), chosen, workers)
    return dict(zip(chosen, found, strict=True))


def leading_changes(regression: Regression, atoms: Sequence[int], names: Sequence[str]) -> list[FloatArray]:
    """Return what the directions of Q atoms change in the corners of some tensors: arrays of shape (Q, s, c)."""
    found = []
    for name in names:
        contact = regression.contacts[name]
        places = [(contact.rows[rows], contact.columns[columns]) for rows, columns in _halves(contact)]
        deltas = [regression.directions[atom].deltas.get(name) for atom in atoms]
        found.append(
            np.array([np.concatenate([_change(delta, rows, columns) for rows, columns in places]) for delta in deltas])
        )
    return found


def remainders(
    regression: Regression, coefficients: FloatArray, *, names: Collection[str]
) -> Iterator[tuple[str, FloatArray]]:
    """Yield what the atoms leave of the target in the rows and columns that the contacts of some tensors keep.

    Parameters
    ----------
    regression : Regression
        With contacts.
    coefficients : array, shape (K,)
        How much of each atom to subtract. Full checkpoints are subtracted in their leading directions.
    names : collection of str
        The tensors to look at.
    """
    subtracted = np.flatnonzero(coefficients).tolist()
    for name, contact in regression.contacts.items():
        if name not in names:
            continue
        corner = contact.corner.astype(np.float64)
        for atom in subtracted:
            delta = regression.directions[atom].deltas.get(name)
            if isinstance(delta, LowRank):
                corner -= coefficients[atom] * _change(delta, contact.rows, contact.columns)
        yield name, corner


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
    weights = lines(tensor, contact.rows, contact.columns)
    changes = []
    for atom in atoms:
        delta = regression.atoms[atom].vector.deltas.get(name)
        change = _from(delta, tensor, weights, contact.rows, contact.columns)
        changes.append(tensor.dtype.nearest(weights + change) - weights if isinstance(delta, LowRank) else change)
    low, high = stored.cell(weights + contact.corner)
    coarser = np.maximum(tensor.dtype.spacing(weights), high - low)
    return Block(
        changes=np.array(changes),
        low=low - weights,
        high=high - weights,
        weights=weights,
        coarser=coarser,
        fine=2.0**-tensor.dtype.mantissa_bits,
        smallest=tensor.dtype.smallest_normal,
    )


def _corner(
    regression: Regression, target: TaskVector, base: Base, atoms: Sequence[int], name: str, standing_for: float
) -> Corner:
    contact, tensor = regression.contacts[name], base.checkpoint.tensors[name]
    deltas = [regression.atoms[atom].vector.deltas.get(name) for atom in atoms]
    stored, kept = tensor.dtype, _storage(target, name)
    halves = _halves(contact)
    places = [(contact.rows[rows], contact.columns[columns]) for rows, columns in halves]
    parts = [lines(tensor, rows, columns) for rows, columns in places]
    weights = np.concatenate(parts)
    changes = [
        np.concatenate([_from(delta, tensor, part, *place) for place, part in zip(places, parts, strict=True)])
        for delta in deltas
    ]
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


def _change(delta: Delta | None, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> FloatArray:
    """Return a change in some rows and columns."""
    if delta is None:
        return np.zeros((len(rows), len(columns)))
    if isinstance(delta, LowRank):
        return np.asarray(delta.left(0, int(rows[-1]) + 1)[rows] @ (delta.right()[:, columns] * delta.scale))
    if isinstance(delta, Difference) and rows[-1] < delta.shape[0]:
        return lines(delta.tuned, rows, columns) - lines(delta.base, rows, columns)
    return np.concatenate([delta.block(row, row + 1)[0][:, columns] for row in rows.tolist()])


def _from(
    delta: Delta | None, tensor: Tensor, weights: FloatArray, rows: NDArray[np.intp], columns: NDArray[np.intp]
) -> FloatArray:
    """Return `_change` where a tensor's weights in these rows and columns were read already."""
    if isinstance(delta, Difference) and delta.base is tensor and rows[-1] < delta.shape[0]:
        return lines(delta.tuned, rows, columns) - weights
    return _change(delta, rows, columns)


def _exact(weights: FloatArray) -> FloatArray:
    return weights


def _storage(target: TaskVector, name: str) -> DType | None:
    """Return how the target stores a tensor; None for an adapter, which adds to the base without rounding."""
    delta = target.deltas[name]
    if isinstance(delta, Residual):
        delta = delta.target if delta.target is not None else delta
    return delta.tuned.dtype if isinstance(delta, Difference) else None

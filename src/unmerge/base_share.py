"""The base itself as a part of a merge: weights that do not sum to 1, and interpolation that rescales.

A linear merge of sum s holds the base s times, so its change holds it s - 1 times: far more than any fine-tune. It is
looked for on corners and, where it matters, measured on whole tensors and taken out before anything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from unmerge.checkpoint.dtypes import FloatArray
from unmerge.checkpoint.tensor import Tensor, lines, matrix_shape, values
from unmerge.dictionary import Base, open_base
from unmerge.errors import AlignmentError
from unmerge.parallel import on_threads
from unmerge.regression import Regression
from unmerge.task_vector import Residual, Scaled, TaskVector, blocks

CERTAIN = 6.0
"""Standard errors from which the base's coefficient is believed."""
MATERIAL = 0.005
"""Share of the change's energy from which it is taken out."""
ALIKE = 0.02
"""Relative spread of the tensors' coefficients up to which they are one number."""
MOST_TENSORS = 32
"""Tensors over which distances between models are measured."""
ROWS = 256
"""Rows of each."""


@dataclass(frozen=True, slots=True)
class BaseShare:
    """How much of the base itself the target's change holds.

    Attributes
    ----------
    coefficient : float
        Dimensionless; 0 for a merge whose weights leave the base as it is.
    error : float
        Its standard error.
    energy_share : float
        The energy of coefficient times base over that of the target's change.
    """

    coefficient: float
    error: float
    energy_share: float

    @property
    def matters(self) -> bool:
        """Whether it must be taken out before the fine-tunes are looked for."""
        return abs(self.coefficient) > CERTAIN * self.error and self.energy_share > MATERIAL


def base_share(regression: Regression, base: Base, *, workers: int = 1) -> BaseShare:
    """Estimate the base's coefficient in the target's change, from corners.

    Parameters
    ----------
    workers : int
        Corners that are read at once; the result does not depend on it.
    """

    def seen(name: str) -> FloatArray:
        contact = regression.contacts[name]
        weights = lines(base.checkpoint.tensors[name], contact.rows, contact.columns)
        own = contact.corner.astype(np.float64)
        # Each corner counts for its whole tensor.
        scale = regression.rows[name] * matrix_shape(base.checkpoint.tensors[name].shape)[1] / own.size
        return scale * np.array([np.vdot(weights, own), np.vdot(weights, weights), np.vdot(own, own)])

    products, energy, change = sum(on_threads(seen, regression.contacts, workers), np.zeros(3)).tolist()
    if energy == 0.0 or change == 0.0:
        return BaseShare(0.0, np.inf, 0.0)
    coefficient = products / energy
    elements = sum(contact.corner.size for contact in regression.contacts.values())
    left = max(0.0, change - coefficient**2 * energy)
    return BaseShare(coefficient, float(np.sqrt(left / energy / elements)), coefficient**2 * energy / change)


def without_base(target: TaskVector, base: Base) -> tuple[TaskVector, float]:
    """Take the base's part out of a target.

    One coefficient for the whole model if those of its tensors agree, and one for each tensor if not (slerp, or
    weights that differ between layers).

    Returns
    -------
    TaskVector
        The target without it.
    float
        The base's coefficient in the change, over the whole model.
    """
    found = {name: _coefficient(target, base, name) for name in target.deltas if name in base.checkpoint.tensors}
    energy = sum(energy for _, energy in found.values())
    overall = sum(coefficient * energy for coefficient, energy in found.values()) / energy
    spread = np.sqrt(sum(energy * (coefficient - overall) ** 2 for coefficient, energy in found.values()) / energy)
    one = spread <= ALIKE * abs(overall)
    chosen = {name: overall if one else coefficient for name, (coefficient, _) in found.items()}
    return _subtracted(target, base, chosen), overall


def _coefficient(target: TaskVector, base: Base, name: str) -> tuple[float, float]:
    """Return the base's coefficient in one tensor's change, and the energy of the base's weights."""
    delta, tensor = target.deltas[name], base.checkpoint.tensors[name]
    rows, columns = delta.shape
    product = energy = 0.0
    for start, stop in blocks(0, min(rows, matrix_shape(tensor.shape)[0]), columns):
        weights = values(tensor, start, stop)
        product += float(np.vdot(weights, delta.block(start, stop)[0]))
        energy += float(np.vdot(weights, weights))
    return (product / energy if energy else 0.0), energy


def _subtracted(target: TaskVector, base: Base, coefficients: Mapping[str, float]) -> TaskVector:
    tensors: Mapping[str, Tensor] = base.checkpoint.tensors
    deltas = {
        name: Residual(delta, ((Scaled(tensors[name], coefficients[name]), 1.0),)) if name in coefficients else delta
        for name, delta in target.deltas.items()
    }
    return replace(target, deltas=deltas)


def nearer_bases(
    target: TaskVector, base: Base, references: Sequence[str], *, allow_pickle: bool = False
) -> tuple[str, ...]:
    """Tell if another model is nearer to the target than the base is.

    Parameters
    ----------
    target : TaskVector
        Against the base.
    references : sequence of str
        The other models.

    Returns
    -------
    tuple of str
        One notice for each that is nearer; distances are over some rows of some matrices.

    Raises
    ------
    UnmergeError
        If a model cannot be read, or shares no matrix with the base.
    """
    found = []
    for reference in references:
        other = open_base(reference, allow_pickle=allow_pickle)
        distances = _distances(target, base, other)
        if distances is None:
            raise AlignmentError(f"{reference}: shares no matrix with the base; give a model of its architecture")
        given, rival = distances
        if rival < given:
            found.append(
                f"the target is nearer to {reference} ({100 * rival:.2g} % of the weights' norm) than to the base "
                f"given ({100 * given:.2g} %): likely it was made from {reference}"
            )
    return tuple(found)


def _distances(target: TaskVector, base: Base, other: Base) -> tuple[float, float] | None:
    """Return the target's distances from the base and from another model, over the norm of the base's weights."""
    shapes, others = base.shapes, other.shapes
    shared = [
        name
        for name, delta in sorted(target.deltas.items())
        if min(delta.shape) > 1 and shapes.get(name) == others.get(name) == delta.shape
    ]
    own = rival = norm = 0.0
    for place in np.unique(np.linspace(0, max(0, len(shared) - 1), MOST_TENSORS).astype(int)) if shared else ():
        name = shared[place]
        stop = min(ROWS, shapes[name][0])
        weights = values(base.checkpoint.tensors[name], 0, stop)
        change = target.deltas[name].block(0, stop)[0]
        apart = change + weights - values(other.checkpoint.tensors[name], 0, stop)
        own, rival = own + float(np.vdot(change, change)), rival + float(np.vdot(apart, apart))
        norm += float(np.vdot(weights, weights))
    return (float(np.sqrt(own / norm)), float(np.sqrt(rival / norm))) if norm else None

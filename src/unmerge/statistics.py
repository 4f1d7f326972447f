"""The sufficient statistics of a least-squares problem over task vectors.

Every solver of the paper minimises a quadratic in the coefficients, so four numbers per tensor are enough:
they are summed over blocks in one streaming pass, and the parameters are never needed again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Inner products of K atoms and one target over n parameters.

    For atoms D (n x K) and target v (n), all in float64. Adding two of them joins two disjoint sets of
    parameters.

    Attributes
    ----------
    gram : array, shape (K, K)
        D'D, in squared weight units. Symmetric.
    correlation : array, shape (K,)
        D'v, in squared weight units.
    energy : float
        v'v, in squared weight units.
    rounding : float
        Energy that rounding the target to its storage type accounts for: the sum of ulp^2 / 12.
    count : int
        n, the number of parameters.
    """

    gram: FloatArray
    correlation: FloatArray
    energy: float
    rounding: float
    count: int

    def __post_init__(self) -> None:
        atoms = len(self.correlation)
        if self.gram.shape != (atoms, atoms):
            message = f"gram has shape {self.gram.shape}, expected ({atoms}, {atoms}) for {atoms} atoms"
            raise ValueError(message)

    @classmethod
    def zero(cls, atoms: int) -> Statistics:
        """Return the statistics of no parameters at all, the neutral element of ``+``."""
        return cls(np.zeros((atoms, atoms)), np.zeros(atoms), 0.0, 0.0, 0)

    @classmethod
    def of(cls, atoms: FloatArray, target: FloatArray) -> Statistics:
        """Compute the statistics of a dense problem that fits in memory.

        Parameters
        ----------
        atoms : array, shape (n, K)
            One task vector per column, in weight units.
        target : array, shape (n,)
            The target task vector, in weight units.
        """
        D = np.asarray(atoms, dtype=np.float64)
        v = np.asarray(target, dtype=np.float64)
        return cls(D.T @ D, D.T @ v, float(v @ v), 0.0, v.size)

    @property
    def atoms(self) -> int:
        """K, the number of atoms."""
        return len(self.correlation)

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.gram + other.gram,
            self.correlation + other.correlation,
            self.energy + other.energy,
            self.rounding + other.rounding,
            self.count + other.count,
        )

    def select(self, indices: NDArray[np.intp]) -> Statistics:
        """Return the statistics of the atoms at `indices`, in that order."""
        return Statistics(
            self.gram[np.ix_(indices, indices)],
            self.correlation[indices],
            self.energy,
            self.rounding,
            self.count,
        )

    def residual_energy(self, coefficients: FloatArray) -> float:
        """Return ``||v - D a||^2``, in squared weight units; never below zero."""
        a = coefficients
        return max(0.0, self.energy - 2.0 * float(a @ self.correlation) + float(a @ self.gram @ a))

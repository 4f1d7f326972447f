"""The same least-squares problem with every atom and the target scaled to length 1.

Energies of task vectors span many orders of magnitude. On unit vectors the Gram matrix holds cosines, every
tolerance is a plain number, and rescaling an atom only rescales its coefficient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unmerge.solvers.base import Solution, Status
from unmerge.statistics import FloatArray, Statistics

IntArray = NDArray[np.intp]

# An eigenvalue of the matrix of cosines below this share of the largest is taken for zero. A Gram matrix
# summed in float64 over 1e9 parameters is known to about 1e-11; the margin costs atoms at an angle < 4e-5.
COLLINEARITY = 1e-9

# An atom takes part in a null direction if it moves by more than this share of it.
PARTICIPATION = 1e-4


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """Eigendecomposition of a matrix of cosines, split at its numerical rank r.

    Attributes
    ----------
    values : array, shape (r,)
        Eigenvalues above the cut, ascending.
    vectors : array, shape (k, r)
        Their eigenvectors, one per column.
    null : array, shape (k, k - r)
        An orthonormal basis of what is left: moves of the coefficients that change nothing.
    """

    values: FloatArray
    vectors: FloatArray
    null: FloatArray

    @classmethod
    def of(cls, cosines: FloatArray, tolerance: float = COLLINEARITY) -> Spectrum:
        """Decompose a symmetric matrix, shape (k, k)."""
        values, vectors = np.linalg.eigh(cosines)
        cut = tolerance * values[-1] if len(values) else 0.0
        rank = int(np.count_nonzero(values > cut))
        split = len(values) - rank
        return cls(values[split:], vectors[:, split:], vectors[:, :split])

    def least_norm(self, correlation: FloatArray) -> FloatArray:
        """Return the shortest z that solves C z = `correlation` in the least-squares sense."""
        return self.vectors @ ((self.vectors.T @ correlation) / self.values)

    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Return the sets of columns that a common null direction ties together."""
        if not self.null.shape[1]:
            return ()
        tied = np.abs(self.null @ self.null.T) > PARTICIPATION
        return tuple(group for group in connected(tied) if len(group) > 1)


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """A least-squares problem over k unit atoms and a unit target, made from statistics over K atoms.

    Attributes
    ----------
    cosines : array, shape (k, k)
        Cosines between the atoms that are not zero; the diagonal is exactly 1.
    correlation : array, shape (k,)
        Cosines between those atoms and the target.
    norms : array, shape (k,)
        Their lengths, in weight units.
    length : float
        Length of the target, in weight units.
    kept : array of int, shape (k,)
        Which of the K atoms they are. Empty if there is nothing to solve.
    spectrum : Spectrum
        Of `cosines`.
    groups : tuple of tuples of int
        As in `Solution`, in numbers of the K atoms.
    status : Status
        What is known before solving.
    atoms : int
        K.
    """

    cosines: FloatArray
    correlation: FloatArray
    norms: FloatArray
    length: float
    kept: IntArray
    spectrum: Spectrum
    groups: tuple[tuple[int, ...], ...]
    status: Status
    atoms: int

    @classmethod
    def of(cls, statistics: Statistics) -> Problem:
        """Scale `statistics`, look for what makes it degenerate."""
        gram, correlation, energy = statistics.gram, statistics.correlation, statistics.energy
        finite = bool(np.isfinite(gram).all() and np.isfinite(correlation).all() and np.isfinite(energy))
        if not finite:
            return cls._empty(statistics, Status.NOT_FINITE)
        if energy <= 0.0:
            return cls._empty(statistics, Status.ZERO_TARGET)
        kept, norms, cosines = unit_gram(gram)
        length = float(np.sqrt(energy))
        spectrum = Spectrum.of(cosines)
        collinear = _renumber(spectrum.groups(), kept)
        zero = tuple((int(atom),) for atom in np.setdiff1d(np.arange(len(gram)), kept))
        status = Status.COLLINEAR if spectrum.null.size else Status.ZERO_ATOM if zero else Status.CONVERGED
        return cls(
            cosines=cosines,
            correlation=correlation[kept] / (norms * length),
            norms=norms,
            length=length,
            kept=kept,
            spectrum=spectrum,
            groups=collinear + zero,
            status=status,
            atoms=len(gram),
        )

    @classmethod
    def _empty(cls, statistics: Statistics, status: Status) -> Problem:
        none = np.zeros(0)
        square = np.zeros((0, 0))
        kept = np.zeros(0, dtype=np.intp)
        return cls(square, none, none, 1.0, kept, Spectrum.of(square), (), status, statistics.atoms)

    @property
    def size(self) -> int:
        """The number k of atoms that are not zero."""
        return len(self.kept)

    @property
    def singular(self) -> bool:
        """Whether some move of the coefficients changes nothing."""
        return len(self.spectrum.values) < self.size

    def solution(self, unit: FloatArray, *, iterations: int = 0, converged: bool = True) -> Solution:
        """Return the coefficients of the unit atoms, shape (k,), as those of the K atoms."""
        coefficients = np.zeros(self.atoms)
        # Adding zero turns -0.0 into 0.0.
        coefficients[self.kept] = unit * self.length / self.norms + 0.0
        status = self.status if converged else Status.NOT_CONVERGED
        return Solution(coefficients, status, self.groups, iterations)


def unit_gram(gram: FloatArray) -> tuple[IntArray, FloatArray, FloatArray]:
    """Scale a Gram matrix to unit diagonal.

    Parameters
    ----------
    gram : array, shape (K, K)
        Inner products of K atoms, in squared weight units.

    Returns
    -------
    kept : array of int, shape (k,)
        The atoms that are not zero.
    norms : array, shape (k,)
        Their lengths, in weight units.
    cosines : array, shape (k, k)
        Cosines between them.
    """
    energies = np.diagonal(gram)
    kept = np.flatnonzero(energies >= np.finfo(np.float64).tiny)
    norms = np.sqrt(energies[kept])
    cosines = gram[np.ix_(kept, kept)] / norms / norms[:, None]
    cosines = 0.5 * (cosines + cosines.T)
    np.fill_diagonal(cosines, 1.0)
    return kept, norms, cosines


def collinear_groups(gram: FloatArray, tolerance: float = COLLINEARITY) -> tuple[tuple[int, ...], ...]:
    """Find the atoms whose coefficients no target can determine.

    Two atoms are in one group if a combination of atoms that holds both is zero: copies of one fine-tune, a
    merge beside its ingredients.

    Parameters
    ----------
    gram : array, shape (K, K)
        Inner products of K atoms, in squared weight units.
    tolerance : float
        A direction counts as zero if its eigenvalue, in the matrix of cosines, is below this share of the
        largest. Two unit atoms at an angle t have eigenvalues 1 +- cos(t), so 1e-9 is an angle of 4e-5.

    Returns
    -------
    tuple of tuples of int
        The groups, each ascending, ordered by their first atom. Atoms that are zero are in none.
    """
    kept, _, cosines = unit_gram(gram)
    return _renumber(Spectrum.of(cosines, tolerance).groups(), kept)


def _renumber(groups: tuple[tuple[int, ...], ...], kept: IntArray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(kept[column]) for column in group) for group in groups)


def connected(linked: NDArray[np.bool_]) -> list[tuple[int, ...]]:
    """Return the connected components of a symmetric adjacency matrix, ordered by their first member."""
    waiting = np.ones(len(linked), dtype=bool)
    components = []
    for first in range(len(linked)):
        if not waiting[first]:
            continue
        members = np.zeros(len(linked), dtype=bool)
        members[first] = True
        while True:
            wider = members | linked[members].any(axis=0)
            if (wider == members).all():
                break
            members = wider
        waiting &= ~members
        components.append(tuple(int(member) for member in np.flatnonzero(members)))
    return components

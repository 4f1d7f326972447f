"""Which few of many atoms can be in a target: sparse least squares on their sketches.

Atoms are chosen forward, the clearest first, and fitted together, until no other one shows beside them. What is kept
for a closer look is more than what was chosen: every atom with a sign of its own beside the chosen ones, and every one
that resembles an atom with a sign. The price of a doubtful atom is small, that of a lost one is a wrong answer.

The error of a coefficient is the larger of two: one as if all values were independent, and one from how the
matrices of the model disagree (the jackknife's, CR3). What fine-tunes of one base have in common is alike within
a matrix, and the first alone would be too small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unmerge.solvers import Nnls
from unmerge.statistics import FloatArray, Statistics

ENTER = 4.0
"""Standard errors from which an atom is fitted with the others: chance reaches it once in 30 dictionaries of 1,000."""
SIGN = 2.5
"""Standard errors from which an atom is looked at closely."""
STEP = 0.5
"""Atoms that enter together have at least this share of the best one's score."""
LEAST = 8
"""Atoms that are kept for a closer look, at least."""
MOST = 128
"""The same, at most."""
CLOSE = 4.0
"""Standard errors by which a cosine of sketches may miss that of the changes."""
DEPENDENT = 1e-5
"""An atom of which the chosen ones leave less than this share of its energy says nothing of its own."""
LEAST_REST = 1e-7
"""What is left of a target is at least this share of its norm: sketches are multiplied in float32."""
LEVERAGE = 1e-2
"""A matrix leaves at least this share of an atom's energy to the others."""
CHUNK = 128
"""Atoms whose values are squared at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Screen:
    """What sketches say of each atom.

    Attributes
    ----------
    kept : tuple of int
        The atoms to look at closely, ascending.
    coefficients : array, shape (K,)
        What least squares gives each atom beside those that were chosen; free of sign.
    errors : array, shape (K,)
        Their standard errors; infinite where nothing is known.
    freedom : array, shape (K,)
        Degrees of freedom: effective matrices less one.
    values : int
        Values that were compared.
    crowded : bool
        Whether more atoms showed signs than there was room for.
    """

    kept: tuple[int, ...]
    coefficients: FloatArray
    errors: FloatArray
    freedom: FloatArray
    values: int
    crowded: bool


@dataclass(frozen=True, slots=True, eq=False)
class Sketched:
    """A least-squares problem over sketches.

    Attributes
    ----------
    atoms : array of float32, shape (K, m)
    target : array, shape (m,)
    beside : array, shape (m,)
        A known vector whose coefficient is of no interest, may have any sign and be zero: the base's weights.
    parts : sequence of slice
        The matrices; they cover all values in order.
    """

    atoms: NDArray[np.float32]
    target: FloatArray
    beside: FloatArray
    parts: Sequence[slice]


@dataclass(frozen=True, slots=True, eq=False)
class _Fit:
    """The chosen atoms, and what they leave.

    Attributes
    ----------
    chosen : tuple of int
    columns : array, shape (S + 1, m)
        Their sketches, and what is beside.
    rest : array, shape (m,)
        What they leave of the target.
    """

    chosen: tuple[int, ...]
    columns: FloatArray
    rest: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    """Each atom beside the chosen ones: coefficient, error, freedom, score; shapes (K,)."""

    coefficients: FloatArray
    errors: FloatArray
    freedom: FloatArray
    scores: FloatArray


def screen(problem: Sketched, related: float, *, wanted: Sequence[int] = (), signed: bool = False) -> Screen:
    """Find the atoms that are worth a closer look.

    Parameters
    ----------
    related : float
        Cosine from which two atoms must be looked at together.
    wanted : sequence of int
        Atoms that are kept whatever they show.
    signed : bool
        Whether a negative coefficient counts.
    """
    energies = _part_energies(problem)
    fit, seen, scores = _choose(problem, energies, signed=signed)
    order = [int(atom) for atom in np.argsort(-scores, kind="stable")]
    shown = [*fit.chosen, *(atom for atom in order if scores[atom] > SIGN and atom not in fit.chosen)]
    relatives = _relatives(problem.atoms, energies.sum(axis=1), shown[:MOST], related)
    blind = np.flatnonzero(energies.sum(axis=1) == 0.0).tolist()
    ranked = list(dict.fromkeys([*wanted, *blind, *shown, *relatives]))
    kept = list(dict.fromkeys([*ranked, *order]))[: max(LEAST, min(len(ranked), max(MOST, len(wanted))))]
    return Screen(
        tuple(sorted(kept)),
        seen.coefficients,
        seen.errors,
        seen.freedom,
        len(problem.target),
        crowded=len(ranked) > len(kept) or len(fit.chosen) >= MOST // 2,
    )


def _choose(problem: Sketched, energies: FloatArray, *, signed: bool) -> tuple[_Fit, _Seen, FloatArray]:
    """Choose atoms until no other one clearly shows; return how the others look beside them, and their scores."""
    fit = _fit(problem, (), signed=signed)
    for _ in range(MOST):
        seen = _look(problem, energies, fit)
        scores = np.abs(seen.scores) if signed else seen.scores
        entering = _entering(scores, fit.chosen)
        grown = _fit(problem, (*fit.chosen, *entering), signed=signed) if entering else fit
        if set(grown.chosen) == set(fit.chosen):  # or the fit puts out again what enters
            break
        fit = grown
    return fit, seen, scores


def _fit(problem: Sketched, chosen: Sequence[int], *, signed: bool) -> _Fit:
    """Fit the target by least squares; atoms with a coefficient of zero are not chosen."""
    columns = np.concatenate([problem.atoms[list(chosen)].astype(np.float64), problem.beside[np.newaxis]])
    gram, products = columns @ columns.T, columns @ problem.target
    # What is beside is fitted with any sign: it is projected out of all others first.
    share = gram[:-1, -1] / (gram[-1, -1] or 1.0)
    own = Statistics(
        gram[:-1, :-1] - np.outer(share, gram[-1, :-1]),
        products[:-1] - share * products[-1],
        float(problem.target @ problem.target),
        0.0,
        len(problem.target),
    )
    found = Nnls(signed=signed).solve(own).coefficients if len(chosen) else np.zeros(0)
    beside = (products[-1] - gram[-1, :-1] @ found) / (gram[-1, -1] or 1.0)
    rest = problem.target - np.append(found, beside) @ columns
    kept = np.flatnonzero(found).tolist()
    return _Fit(tuple(chosen[place] for place in kept), columns[[*kept, -1]], rest)


def _look(problem: Sketched, energies: FloatArray, fit: _Fit) -> _Seen:
    """Look at each atom in what the chosen ones leave, less its own part along them."""
    columns, rest = fit.columns, fit.rest
    across = np.vstack([rest, columns]).astype(np.float32).T
    met = np.array([problem.atoms[:, part] @ across[part] for part in problem.parts], dtype=np.float64)
    grams = np.array([columns[:, part] @ columns[:, part].T for part in problem.parts])
    scale = np.sqrt(np.diag(grams.sum(axis=0))) + (np.diag(grams.sum(axis=0)) == 0.0)
    inverse = np.linalg.pinv(grams.sum(axis=0) / np.outer(scale, scale), hermitian=True) / np.outer(scale, scale)
    along = met[:, :, 1:].sum(axis=0) @ inverse
    # Of the part of each atom that is its own, by matrix: products with the rest, and energies; shapes (C, K).
    scores = met[:, :, 0] - np.array([columns[:, part] @ rest[part] for part in problem.parts]) @ along.T
    inside = np.array([np.einsum("ks,ks->k", along @ gram, along) for gram in grams])
    own = np.maximum(energies.T - 2.0 * np.einsum("ks,cks->ck", along, met[:, :, 1:]) + inside, 0.0)
    whole = own.sum(axis=0)
    free = whole > DEPENDENT * energies.sum(axis=1)
    free[list(fit.chosen)] = False
    whole = np.where(free, whole, 1.0)
    coefficients = np.where(free, scores.sum(axis=0) / whole, 0.0)
    influences = (scores - coefficients * own) / np.maximum(1.0 - own / whole, LEVERAGE)
    energy = np.maximum(rest @ rest - coefficients**2 * whole, LEAST_REST**2 * float(problem.target @ problem.target))
    each = energy / max(1, len(rest) - len(columns) - 1) / whole
    errors = np.where(free, np.sqrt(np.maximum(each, (influences**2).sum(axis=0) / whole**2)), np.inf)
    freedom = np.where(free, whole**2 / np.maximum((own**2).sum(axis=0), np.finfo(np.float64).tiny) - 1.0, 0.0)
    certain = np.maximum(errors, np.finfo(np.float64).tiny)
    return _Seen(coefficients, errors, freedom, coefficients / certain)


def _relatives(atoms: NDArray[np.float32], energies: FloatArray, shown: Sequence[int], related: float) -> list[int]:
    """Return the atoms that resemble those that show something, those of the clearest first."""
    least = related - CLOSE / np.sqrt(atoms.shape[1])
    lengths = np.sqrt(np.where(energies > 0.0, energies, np.inf))
    cosines = np.abs(atoms[list(shown)] @ atoms.T) / np.outer(lengths[list(shown)], lengths)
    return [int(other) for row in cosines for other in np.flatnonzero(row >= least)]


def _entering(scores: FloatArray, chosen: Sequence[int]) -> list[int]:
    """Return the atoms that clearly show beside the chosen ones, best first; none when there is no room."""
    free = scores.copy()
    free[list(chosen)] = 0.0
    least = max(ENTER, STEP * float(free.max(initial=0.0)))
    order = np.argsort(-free, kind="stable")
    return [int(atom) for atom in order[: max(0, MOST // 2 - len(chosen))] if free[atom] >= least]


def _part_energies(problem: Sketched) -> FloatArray:
    """Return the energy of each atom's sketch in each matrix, shape (K, C)."""
    found = np.zeros((len(problem.atoms), len(problem.parts)))
    for place, part in enumerate(problem.parts):
        for start in range(0, len(found), CHUNK):
            block = problem.atoms[start : start + CHUNK, part]
            found[start : start + CHUNK, place] = np.einsum("km,km->k", block, block, dtype=np.float64)
    return found

"""From a target's contacts with the atoms to what the test of presence looks at.

The contacts were taken from the target as it is. Here the atoms' parts are subtracted, which needs their factors
only: (L_j' d_i R_j') = (L_j' L_i)(R_i R_j') for low-rank changes d_i = L_i R_i.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import numpy as np
from numpy.typing import NDArray

from unmerge import float32
from unmerge.accumulate import Contact
from unmerge.alignment import LAYER
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.evidence.presence import Core
from unmerge.regression import Regression
from unmerge.task_vector import LowRank

Factors = NDArray[np.float32] | FloatArray

WEAKEST = 1e-3
"""Directions below this share of the strongest are left out: their factors are known too badly."""
LEVEL_LINES = 64
"""Rows and columns from which the level of the noise is taken."""


@dataclass(frozen=True, slots=True, eq=False)
class Remainder:
    """What the atoms leave of the target in one tensor, seen through the contact.

    Attributes
    ----------
    name : str
        The base's name of the tensor.
    contact : Contact
        Of the target itself.
    atoms : tuple of int
        The atoms that are seen in it, by their places in the regression.
    left, right : dict of int to array
        Their factors, shapes (m, r) and (r, n), the scale in the left one.
    coefficients : array, shape (K,)
        What of each atom was subtracted.
    corner : array, shape (s, c)
        What is left in the kept rows and columns.
    """

    name: str
    contact: Contact
    atoms: tuple[int, ...]
    left: Mapping[int, FloatArray]
    right: Mapping[int, FloatArray]
    coefficients: FloatArray
    corner: FloatArray


def remainders(
    regression: Regression,
    coefficients: FloatArray,
    *,
    names: Collection[str] | None = None,
    among: Collection[int] = (),
) -> Iterator[Remainder]:
    """Subtract the atoms from the target's contacts, a tensor at a time.

    Parameters
    ----------
    regression : Regression
        With contacts.
    coefficients : array, shape (K,)
        How much of each atom to subtract. Full checkpoints are subtracted in their leading directions.
    names : collection of str, optional
        The tensors to look at; all by default.
    among : collection of int
        Atoms that are looked at although their coefficient is zero.
    """
    wanted = {int(atom) for atom in np.flatnonzero(coefficients)} | set(among)
    for name, contact in regression.contacts.items():
        if names is not None and name not in names:
            continue
        factors = {
            atom: delta
            for atom, vector in enumerate(regression.directions)
            if atom in wanted and isinstance(delta := vector.deltas.get(name), LowRank)
        }
        rows = regression.rows[name]
        left = {atom: delta.left(0, rows) * delta.scale for atom, delta in factors.items()}
        right = {atom: delta.right() for atom, delta in factors.items()}
        corner = contact.corner.astype(np.float64)
        for atom in factors:
            corner -= coefficients[atom] * (left[atom][contact.rows] @ right[atom][:, contact.columns])
        yield Remainder(name, contact, tuple(factors), left, right, coefficients, corner)


def cores(
    regression: Regression,
    coefficients: FloatArray,
    relatives: Mapping[int, Sequence[int]],
    floor: Mapping[str, float],
    *,
    workers: int = 1,
) -> dict[int, list[Core]]:
    """Return what is seen of each atom that has relatives or a coefficient, tensor by tensor.

    Parameters
    ----------
    regression : Regression
        With contacts.
    coefficients : array, shape (K,)
        A solution.
    relatives : mapping of int to sequence of int
        The atoms so alike to each one that their weights must be estimated together; its keys are looked at
        whatever their coefficients.
    floor : mapping of str to float
        Mean square of the noise of each tensor that storage rounding alone makes, in squared weight units.
    workers : int
        Tensors that are worked on at once; the result does not depend on it.
    """
    from joblib import Parallel, delayed

    def look(name: str) -> list[tuple[int, Core]]:
        remainder = next(remainders(regression, coefficients, names=(name,), among=relatives))
        if not remainder.atoms:
            return []
        stack = _Stack.of(remainder, regression)
        seen = ((atom, stack.core(atom, relatives.get(atom, ()), floor)) for atom in remainder.atoms)
        return [(atom, core) for atom, core in seen if core is not None]

    found: dict[int, list[Core]] = {atom: [] for atom in sorted({*np.flatnonzero(coefficients).tolist(), *relatives})}
    for tensor in Parallel(n_jobs=workers, require="sharedmem")(delayed(look)(name) for name in regression.contacts):
        for atom, core in tensor:
            found[atom].append(core)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Stack:
    """The factors of the atoms in one tensor, stacked along their ranks, and their products; r the sum of ranks.

    Attributes
    ----------
    places : dict of int to slice
        Where each atom is in the stack.
    kept : dict of int to slice
        Where it is in the contact.
    left, right : array of float32 or float64, shapes (m, r) and (r, n)
        The stacked factors.
    left_products, right_products : array, shapes (r, q) and (q, r)
        L' L_q and R_q R', with the q columns and rows of the atoms that were subtracted, by their weights in the
        first one.
    along, across : arrays, shapes (s, r) and (r, c)
        Of what is left of the target.
    """

    remainder: Remainder
    places: Mapping[int, slice]
    kept: Mapping[int, slice]
    left: Factors
    right: Factors
    left_products: FloatArray
    right_products: FloatArray
    along: FloatArray
    across: FloatArray

    @classmethod
    def of(cls, remainder: Remainder, regression: Regression) -> _Stack:
        contact, width = remainder.contact, next(iter(remainder.right.values())).shape[1]
        offered = _slices([rank for _, rank in contact.ranks])
        by_digest = {digest: place for (digest, _), place in zip(contact.ranks, offered, strict=True)}
        kept = {atom: by_digest[regression.directions[atom].digest] for atom in remainder.atoms}
        places = dict(zip(remainder.atoms, _slices([len(remainder.right[a]) for a in remainder.atoms]), strict=True))
        # Products as precise as the contact's own: in float32 where the tensor is large.
        dtype = np.float32 if regression.rows[remainder.name] * width >= float32.LEAST_ELEMENTS else np.float64
        left = _stacked([remainder.left[atom] for atom in remainder.atoms], 1, dtype)
        right = _stacked([remainder.right[atom] for atom in remainder.atoms], 0, dtype)
        weights = np.concatenate(
            [np.full(len(remainder.right[atom]), remainder.coefficients[atom], dtype) for atom in remainder.atoms]
        )
        chosen = np.concatenate([np.arange(kept[atom].start, kept[atom].stop) for atom in remainder.atoms])
        used = np.flatnonzero(weights)
        subtracted, beside = left[:, used] * weights[used], right[used]
        left_products, right_products = (part.astype(np.float64) for part in (left.T @ subtracted, beside @ right.T))
        along = contact.along[:, chosen] - subtracted[contact.rows] @ right_products
        across = contact.across[chosen] - left_products @ beside[:, contact.columns]
        return cls(remainder, places, kept, left, right, left_products, right_products, along, across)

    def core(self, atom: int, relatives: Sequence[int], floor: Mapping[str, float]) -> Core | None:
        """Return what is seen of an atom; None where it has too few directions or lines to see anything."""
        contact, own = self.remainder.contact, self.places[atom]
        left, right = self.remainder.left[atom], self.remainder.right[atom]
        found = _directions(left.T @ left, right @ right.T)
        if found is None:
            return None
        before, singular, after = found
        most = min(len(contact.rows), len(contact.columns)) // 3
        before, singular, after = before[:, :most], singular[:most], after[:, :most]
        if not len(singular):
            return None
        rank = own.stop - own.start
        left_over = contact.cores[self.kept[atom], :rank] - self.left_products[own] @ self.right_products[:, own]
        matched = before.T @ left_over @ after
        U, W = left[contact.rows] @ before, after.T @ right[:, contact.columns]
        along, across = self.along[:, own] @ after, before.T @ self.across[own]
        beside, above = along - U @ matched, across - matched @ W
        least = max(floor.get(self.remainder.name, 0.0), 1e-14 * _mean_square(contact.corner), 1e-300)
        identity = np.eye(len(singular))
        return Core(
            layer=_layer(self.remainder.name),
            singular=singular,
            matched=matched + self.remainder.coefficients[atom] * np.diag(singular),
            left=above @ above.T / above.shape[1] + least * identity,
            right=beside.T @ beside / beside.shape[0] + least * identity,
            level=self._level(beside, above, U, matched, W) + least,
            relatives=np.array([self._relative(own, other, before, after) for other in relatives]).reshape(
                -1, len(singular), len(singular)
            ),
        )

    def _level(self, beside: FloatArray, above: FloatArray, U: FloatArray, matched: FloatArray, W: FloatArray) -> float:
        """Return the mean square of what is left outside of both the rows and the columns of an atom."""
        n = LEVEL_LINES
        corner = self.remainder.corner[:n, :n]
        return _mean_square(corner - beside[:n] @ W[:, :n] - U[:n] @ above[:, :n] - U[:n] @ matched @ W[:, :n])

    def _relative(self, own: slice, other: int, before: FloatArray, after: FloatArray) -> FloatArray:
        place = self.places.get(other)
        if place is None:  # it does not change this tensor
            return np.zeros((before.shape[1], after.shape[1]))
        seen: FloatArray = (before.T @ (self.left[:, own].T @ self.left[:, place])) @ (
            (self.right[place] @ self.right[own].T) @ after
        )
        return seen


def _stacked(factors: Sequence[FloatArray], axis: int, dtype: type[np.floating]) -> Factors:
    return cast("Factors", np.concatenate(factors, axis=axis, dtype=dtype))


def _slices(sizes: Sequence[int]) -> list[slice]:
    ends = np.cumsum([0, *sizes])
    return [slice(int(start), int(stop)) for start, stop in pairwise(ends)]


def _directions(
    left_products: FloatArray, right_products: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray] | None:
    """Return A, S, B so that L A and R' B are the singular vectors of L R, from L'L and RR', shapes (r, r)."""
    roots = [_root(products) for products in (left_products, right_products)]
    if any(root is None for root in roots):
        return None
    (left_root, left_inverse), (right_root, right_inverse) = (root for root in roots if root is not None)
    u, singular, w = np.linalg.svd(left_root @ right_root.T)
    kept = int(np.count_nonzero(singular > WEAKEST * singular[0]))
    return left_inverse @ u[:, :kept], singular[:kept], right_inverse @ w[:kept].T


def _root(products: FloatArray) -> tuple[FloatArray, FloatArray] | None:
    """Return H (q, r) with H'H = products, and its right inverse (r, q), without directions that are noise."""
    values, vectors = np.linalg.eigh(products)
    sound = values > 1e-12 * max(values[-1], 0.0)
    if not sound.any() or values[-1] <= 0.0:
        return None
    roots = np.sqrt(values[sound])
    return (vectors[:, sound] * roots).T, vectors[:, sound] / roots


def _mean_square(values: NDArray[np.floating]) -> float:
    flat = values.astype(np.float64).ravel()
    return float(flat @ flat) / max(1, flat.size)


def _layer(name: str) -> int | None:
    match = LAYER.search(name)
    return int(match["layer"]) if match else None

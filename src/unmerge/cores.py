"""From a target's contacts with the atoms to what the test of presence looks at.

The contacts were taken from the target as it is. Here the atoms' parts are subtracted, which needs their factors
only: (L_j' d_i R_j') = (L_j' L_i)(R_i R_j') for low-rank changes d_i = L_i R_i.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from unmerge import float32
from unmerge.accumulate import Contact
from unmerge.alignment import LAYER
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.cholesky import sound_root
from unmerge.evidence.presence import Core
from unmerge.parallel import on_threads
from unmerge.regression import Regression
from unmerge.task_vector import LowRank

Factors = NDArray[np.float32] | FloatArray

WEAKEST = 1e-3
"""Directions below this share of the strongest are left out: their factors are known too badly."""
LEVEL_LINES = 64
"""Rows and columns from which the level of the noise is taken."""


def _low_rank(regression: Regression, name: str, atoms: Collection[int]) -> dict[int, LowRank]:
    """Return the changes of some atoms in one tensor, of those that have any, in the atoms' order."""
    found = {atom: regression.directions[atom].deltas.get(name) for atom in atoms}
    return {atom: delta for atom, delta in found.items() if isinstance(delta, LowRank)}


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
    subtracted = np.flatnonzero(coefficients).tolist()
    wanted = [*subtracted, *sorted({*relatives} - {*subtracted})]

    def look(name: str) -> list[tuple[int, Core]]:
        deltas = _low_rank(regression, name, wanted)
        if not deltas:
            return []
        with _factors(deltas, regression.rows[name]) as (left, right):
            stack = _Stack.of(name, deltas, left, right, coefficients, regression)
            seen = ((atom, stack.core(atom, relatives.get(atom, ()), floor)) for atom in deltas)
            return [(atom, core) for atom, core in seen if core is not None]

    found: dict[int, list[Core]] = {atom: [] for atom in sorted(wanted)}
    for tensor in on_threads(look, regression.contacts, workers):
        for atom, core in tensor:
            found[atom].append(core)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Stack:
    """The factors of the atoms in one tensor, stacked along their ranks, and their products; r the sum of ranks.

    Those that were subtracted from the target come first.

    Attributes
    ----------
    name : str
        The base's name of the tensor.
    contact : Contact
        Of the target itself.
    coefficients : array, shape (K,)
        What of each atom was subtracted.
    places : dict of int to slice
        Where each atom is in the stack.
    kept : dict of int to slice
        Where it is in the contact.
    left, right : array of float32 or float64, shapes (m, r) and (r, n)
        The stacked factors, scales in the left ones.
    left_lines, right_lines : array, shapes (s, r) and (r, c)
        In the rows and columns that the contact keeps.
    left_products, right_products : array, shapes (r, q) and (q, r)
        L' L_q and R_q R', with the q columns and rows of the atoms that were subtracted, by their weights in the
        first one.
    along, across : arrays, shapes (s, r) and (r, c)
        Of what is left of the target.
    corner : array, shape (s, c)
        What is left in the kept rows and columns.
    """

    name: str
    contact: Contact
    coefficients: FloatArray
    places: Mapping[int, slice]
    kept: Mapping[int, slice]
    left: Factors
    right: Factors
    left_lines: FloatArray
    right_lines: FloatArray
    left_products: FloatArray
    right_products: FloatArray
    along: FloatArray
    across: FloatArray
    corner: FloatArray

    @classmethod
    def of(
        cls,
        name: str,
        deltas: Mapping[int, LowRank],
        left: Factors,
        right: Factors,
        coefficients: FloatArray,
        regression: Regression,
    ) -> _Stack:
        contact = regression.contacts[name]
        offered = _slices([rank for _, rank in contact.ranks])
        by_digest = {digest: place for (digest, _), place in zip(contact.ranks, offered, strict=True)}
        kept = {atom: by_digest[regression.directions[atom].digest] for atom in deltas}
        places = dict(zip(deltas, _slices([delta.rank for delta in deltas.values()]), strict=True))
        chosen = np.concatenate([np.arange(kept[atom].start, kept[atom].stop) for atom in deltas])
        weights = np.repeat(coefficients[list(deltas)], [delta.rank for delta in deltas.values()])
        weights = weights[: np.count_nonzero(weights)]
        used = slice(len(weights))  # those that were subtracted come first
        left_lines = left[contact.rows].astype(np.float64)
        right_lines = right[:, contact.columns].astype(np.float64)
        left_products = (left.T @ left[:, used]).astype(np.float64) * weights
        right_products = (right[used] @ right.T).astype(np.float64)
        subtracted, beside = left_lines[:, used] * weights, right_lines[used]
        return cls(
            name=name,
            contact=contact,
            coefficients=coefficients,
            places=places,
            kept=kept,
            left=left,
            right=right,
            left_lines=left_lines,
            right_lines=right_lines,
            left_products=left_products,
            right_products=right_products,
            along=contact.along[:, chosen] - subtracted @ right_products,
            across=contact.across[chosen] - left_products @ beside,
            corner=contact.corner - subtracted @ beside,
        )

    def core(self, atom: int, relatives: Sequence[int], floor: Mapping[str, float]) -> Core | None:
        """Return what is seen of an atom; None where it has too few directions or lines to see anything."""
        contact, own = self.contact, self.places[atom]
        left, right = self.left[:, own].astype(np.float64), self.right[own].astype(np.float64)
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
        U, W = self.left_lines[:, own] @ before, after.T @ self.right_lines[own]
        along, across = self.along[:, own] @ after, before.T @ self.across[own]
        beside, above = along - U @ matched, across - matched @ W
        least = max(floor.get(self.name, 0.0), 1e-14 * _mean_square(contact.corner), 1e-300)
        identity = np.eye(len(singular))
        return Core(
            layer=_layer(self.name),
            singular=singular,
            matched=matched + self.coefficients[atom] * np.diag(singular),
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
        corner = self.corner[:n, :n]
        return _mean_square(corner - beside[:n] @ W[:, :n] - U[:n] @ above[:, :n] - U[:n] @ matched @ W[:, :n])

    def _relative(self, own: slice, other: int, before: FloatArray, after: FloatArray) -> FloatArray:
        place = self.places.get(other)
        if place is None:  # it does not change this tensor
            return np.zeros((before.shape[1], after.shape[1]))
        seen: FloatArray = (before.T @ (self.left[:, own].T @ self.left[:, place])) @ (
            (self.right[place] @ self.right[own].T) @ after
        )
        return seen


@contextmanager
def _factors(deltas: Mapping[int, LowRank], rows: int) -> Iterator[tuple[Factors, Factors]]:
    """Read factors, stacked; as precise as the contact's products: in float32 where the tensor is large."""
    columns = next(iter(deltas.values())).shape[1]
    if not float32.applies(deltas.values(), rows * columns):
        left = [delta.left(0, rows) * delta.scale for delta in deltas.values()]
        yield np.concatenate(left, axis=1), np.concatenate([delta.right() for delta in deltas.values()])
        return
    size = sum(delta.rank for delta in deltas.values()) * (rows + columns)
    with float32.lent("factors", size) as memory:
        stack = float32.Stack.read(deltas, 0, rows, columns, memory)
        np.multiply(stack.left, stack.scales.astype(np.float32), out=stack.left)
        yield stack.left, stack.right


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
    return sound_root(products) or _root_of_noisy(products)


def _root_of_noisy(products: FloatArray) -> tuple[FloatArray, FloatArray] | None:
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

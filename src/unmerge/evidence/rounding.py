"""What storing weights with few bits does to a merge, and what can be known in spite of it.

A fine-tune that was stored holds whole steps of the grid, and so does its difference from the base. A merge
w_1 q_1 + w_2 q_2 of such steps is rounded to whole steps again. Where changes are a few steps large, that is no
dither: with w = 0.9 and 0.1 every element whose q differ by less than five steps takes q_1, so least squares finds
more than 0.9 and less than 0.1; changes below half a step vanish, and all coefficients shrink.

Weights near simple fractions lock to them even if changes are many steps large, for the same reason.

Two answers: the weights by maximum likelihood, which takes a stored element for the cell that it is (`censored`; and
`pinned`, where the merge was computed precisely before it was stored), and the share of a change that rounding alone
leaves unexplained, found by making the merge of the present atoms once more and rounding it.

All of it is done on corners: some rows and columns of each tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from unmerge.evidence.censored import Cells, CensoredFit, censored_fit
from unmerge.evidence.pinned import Pinned, pinned
from unmerge.statistics import FloatArray

SMALLEST_MISSING = 0.02
"""A weight that a stranger is believed to have."""
MANY_TIES, FEW_TIES = 0.02, 0.003
"""Standard deviation of what decides about sums half way between two stored values, in spacings: enough to outweigh
what weights may be wrong by where there are many such sums, and next to nothing where there are few."""
HALF_WAY = 0.005
"""How near to half way sums of round weights are found, in spacings, with weights that are only nearly right."""
BY_CHANCE = 0.03
"""Share of sums so near to half way from which there are many; by chance it is a third of that."""
Grid = Callable[[FloatArray], FloatArray]
"""Rounds values to a storage type."""


@dataclass(frozen=True, slots=True, eq=False)
class Corner:
    """Some rows and columns of one tensor, in two halves of rows that share no column either.

    Attributes
    ----------
    target : array, shape (s, c)
        The target's change, in weight units.
    base : array, shape (s, c)
        The base's weights.
    atoms : array, shape (P, s, c)
        The changes of the P atoms that are taken to be present.
    stored : array of bool, shape (P,)
        Whether an atom is known as stored: rounded already (a full checkpoint), or not (an adapter).
    spacing : array, shape (s, c)
        Distance between neighbours on the coarser of the base's and the target's grid.
    target_grid, base_grid : Grid
        The storage types of the target and of the base.
    target_cell : callable or None
        Returns the bounds of what the target's storage type rounds to each value; None if it was not rounded, or
        is not known as it was stored.
    size : int
        Parameters of the tensor that the corner stands for.
    """

    target: FloatArray
    base: FloatArray
    atoms: FloatArray
    stored: NDArray[np.bool_]
    spacing: FloatArray
    target_grid: Grid
    target_cell: Callable[[FloatArray], tuple[FloatArray, FloatArray]] | None
    base_grid: Grid
    size: int

    @property
    def stored_atoms(self) -> FloatArray:
        """The atoms' changes after they were stored as checkpoints, shape (P, s, c)."""
        rounded = self.base_grid(self.base + self.atoms) - self.base
        return np.where(self.stored[:, None, None], self.atoms, rounded)

    def half(self, number: int) -> Corner:
        """Return the first or the second half of its rows; the two share no row and no column of the tensor."""
        rows = slice(number * (len(self.base) // 2), (number + 1) * (len(self.base) // 2))
        return replace(
            self,
            target=self.target[rows],
            base=self.base[rows],
            atoms=self.atoms[:, rows],
            spacing=self.spacing[rows],
        )


def fitted_weights(corners: Sequence[Corner], start: FloatArray, *, way: str) -> CensoredFit:
    """Fit the weights of a merge in which there is nothing but the atoms and rounding, to one half of each corner.

    Parameters
    ----------
    corners : sequence of Corner
        At least one; their cells must be known.
    start : array, shape (P,)
        A first estimate, by least squares.
    way : str
        How the merge was made: a key of `WAYS`.
    """
    return censored_fit([_cells(corner, corner.target, way) for corner in _halves(corners, 0)], start)


def unbiased_weights(corners: Sequence[Corner], fit: CensoredFit, *, way: str) -> CensoredFit:
    """Take out the bias of fitted weights.

    In the other half of each corner the same merge is made again and fitted in the same way, which gives the bias.
    Rounding errors there are others, so the jackknife sees the noise of both.

    Parameters
    ----------
    corners : sequence of Corner
        At least one.
    fit : CensoredFit
        By `fitted_weights`.
    way : str
        How the merge was made: a key of `WAYS`.
    """
    far = _halves(corners, 1)
    ties = MANY_TIES if _has_ties(far, fit.weights, way) else FEW_TIES
    generator = np.random.default_rng(0)
    again = [_again(corner, fit.weights, ties, generator, way) for corner in far]
    return fit.unbiased(censored_fit(again, fit.weights), fit.weights)


def _halves(corners: Sequence[Corner], number: int) -> list[Corner]:
    return [corner.half(number) for corner in corners]


def pinned_weights(corners: Sequence[Corner], start: FloatArray, *, way: str) -> Pinned | None:
    """Find the weights of the same merge if it was computed precisely and rounded once; None if it was not.

    Parameters
    ----------
    corners : sequence of Corner
        At least one; their cells must be known.
    start : array, shape (P,)
        By `fitted_weights`.
    way : str
        How the merge was made: a key of `WAYS`.
    """
    return pinned([_cells(corner, corner.target, way) for corner in corners], start)


def _has_ties(corners: Sequence[Corner], weights: FloatArray, way: str) -> bool:
    """Tell whether far more sums than by chance lie half way between two stored values: weights are round."""
    close = count = 0
    for corner in corners:
        made = corner.base + np.tensordot(weights, _changes(corner, way), 1)
        low, high = _bounds(corner, corner.target_grid(made))
        close += int(np.count_nonzero(np.minimum(made - low, high - made) < HALF_WAY * corner.spacing))
        count += made.size
    return close > BY_CHANCE * count


def _again(corner: Corner, weights: FloatArray, ties: float, generator: np.random.Generator, way: str) -> Cells:
    # Where sums lie half way, chance decides in a real merge; weights a little beside the true ones would decide all
    # alike.
    dither = ties * corner.spacing * generator.standard_normal(corner.target.shape)
    return _cells(corner, WAYS[way](corner, weights, dither), way)


def _changes(corner: Corner, way: str) -> FloatArray:
    return corner.atoms if way == AT_ONCE else corner.stored_atoms


def _bounds(corner: Corner, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
    if corner.target_cell is None:
        raise ValueError("the target's cells are not known")
    return corner.target_cell(weights)


def _cells(corner: Corner, change: FloatArray, way: str) -> Cells:
    changes = _changes(corner, way)
    low, high = _bounds(corner, corner.base + change)
    return Cells(
        changes.reshape(len(changes), -1),
        (low - corner.base).ravel(),
        (high - corner.base).ravel(),
        np.maximum(corner.spacing, high - low).ravel(),
    )


def simulated_least_squares(
    corners: Sequence[Corner], weights: FloatArray, strangers: Sequence[float], generator: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Return the coefficients that least squares finds in a merge of checkpoints with these weights.

    Parameters
    ----------
    strangers : sequence of float
        Root mean square of what else is in each corner, in weight units; drawn as Gaussian.

    Returns
    -------
    two arrays, shape (P,)
        If the stranger was stored as one more checkpoint, with the weight that is missing from 1 (a half if none
        is); and if it is many, which dither the rounding.
    """
    missing = _missing(float(np.abs(weights).sum()))
    draws = [
        stranger * generator.standard_normal(corner.target.shape)
        for corner, stranger in zip(corners, strangers, strict=True)
    ]
    stored = [_stored(corner, draw, missing) for corner, draw in zip(corners, draws, strict=True)]
    return _found_beside(corners, weights, stored), _found_beside(corners, weights, draws)


def _missing(known: float) -> float:
    """Return the weight that a stranger is believed to have beside others."""
    return 1.0 - known if 1.0 - known > SMALLEST_MISSING else 0.5


def _stored(corner: Corner, change: FloatArray, weight: float) -> FloatArray:
    """Return what comes of a change that a merge was to hold, if it is that of a stored checkpoint with this weight."""
    return weight * (corner.base_grid(corner.base + change / weight) - corner.base)


def _found_beside(corners: Sequence[Corner], weights: FloatArray, strangers: Sequence[FloatArray]) -> FloatArray:
    """Return what least squares finds of the atoms in a merge of them and strangers, after taking those out."""
    gram = np.zeros((len(weights), len(weights)))
    correlation = np.zeros(len(weights))
    for corner, stranger in zip(corners, strangers, strict=True):
        scale = np.sqrt(corner.size / stranger.size)
        merge = scale * (_from_checkpoints(corner, weights, stranger) - stranger).ravel()
        atoms = scale * corner.atoms.reshape(len(weights), -1)
        gram += atoms @ atoms.T
        correlation += atoms @ merge
    return np.asarray(np.linalg.lstsq(gram, correlation, rcond=1e-9)[0])


def remaining_of_others(
    corners: Sequence[Corner],
    weights: FloatArray,
    strangers: Sequence[float],
    changes: Sequence[FloatArray],
    sizes: FloatArray,
    generator: np.random.Generator,
) -> FloatArray:
    """Return what rounding would leave of further atoms, each alone in the same merge, shape (2, Q); 1 at most.

    A change that is much smaller than the steps of the grid vanishes, but for what else is in the merge and dithers it:
    the least in the first row, the most in the second one.

    Parameters
    ----------
    strangers : sequence of float
        As of `simulated_least_squares`, which makes the same two merges.
    changes : sequence of array, shape (Q, s, c)
        What the further atoms change in each corner, in weight units.
    sizes : array, shape (Q,)
        Their weights, not 0.
    """
    left = np.zeros((2, len(sizes)))
    energy = np.zeros(len(sizes))
    for corner, stranger, others in zip(corners, strangers, changes, strict=True):
        draw = stranger * generator.standard_normal(corner.target.shape)
        known = corner.base + np.tensordot(weights, corner.stored_atoms, 1)
        scale = corner.size / draw.size
        dithered = known + draw, corner.target_grid(known + draw)
        for place, (size, change) in enumerate(zip(sizes, others, strict=True)):
            beside = known + _stored(corner, draw, _missing(float(np.abs(weights).sum() + abs(size))))
            own = size * (corner.base_grid(corner.base + change) - corner.base)
            for way, (rest, without) in enumerate(((beside, corner.target_grid(beside)), dithered)):
                moved = corner.target_grid(rest + own) - without
                left[way, place] += scale * float(np.vdot(moved, change)) / size
            energy[place] += scale * float(np.vdot(change, change))
    shares = np.divide(np.sort(left, axis=0), energy, out=np.ones_like(left), where=energy > 0.0)
    return np.asarray(np.minimum(shares, 1.0))


def rounding_shares(
    corners: Sequence[Corner], weights: FloatArray, strangers: Sequence[float], generator: np.random.Generator
) -> dict[str, float]:
    """Return the share of the change that rounding alone would leave unexplained, for each way to make the merge.

    Parameters
    ----------
    corners : sequence of Corner
        At least one.
    weights : array, shape (P,)
        Of the present atoms.
    strangers : sequence of float
        Root mean square of what else the target holds in each corner, which dithers the rounding; in weight units.
    generator : numpy Generator
        Draws the dither.

    Returns
    -------
    dict
        ``"applied at once"``: all changes are added to the base and rounded once (PEFT, or arithmetic in single
        precision on adapters). ``"from checkpoints"``: every fine-tune was stored before it was merged.
        ``"in storage arithmetic"``: in addition, every product and sum was rounded (mergekit's ``linear`` with
        ``dtype: bfloat16``).
    """
    dithers = [
        stranger * generator.standard_normal(corner.target.shape)
        for corner, stranger in zip(corners, strangers, strict=True)
    ]
    found = {}
    for words, way in WAYS.items():
        made = [way(corner, weights, dither) for corner, dither in zip(corners, dithers, strict=True)]
        found[words] = _left_over(corners, weights, made, dithers)
    return found


def _at_once(corner: Corner, weights: FloatArray, dither: FloatArray) -> FloatArray:
    moved = corner.base + np.tensordot(weights, corner.atoms, 1) + dither
    return corner.target_grid(moved) - corner.base


def _from_checkpoints(corner: Corner, weights: FloatArray, dither: FloatArray) -> FloatArray:
    moved = corner.base + np.tensordot(weights, corner.stored_atoms, 1) + dither
    return corner.target_grid(moved) - corner.base


def _in_storage_arithmetic(corner: Corner, weights: FloatArray, dither: FloatArray) -> FloatArray:
    models = corner.base + corner.stored_atoms
    products = [corner.target_grid(weight * model) for weight, model in zip(weights, models, strict=True)]
    rest = (1.0 - weights.sum()) * corner.base  # of what is not known
    return corner.target_grid(np.sum(products, axis=0) + rest + dither) - corner.base


AT_ONCE = "applied at once"
IN_STORAGE = "in storage arithmetic"
WAYS: Mapping[str, Callable[[Corner, FloatArray, FloatArray], FloatArray]] = {
    AT_ONCE: _at_once,
    "from checkpoints": _from_checkpoints,
    IN_STORAGE: _in_storage_arithmetic,
}
"""The ways in which a merge is made, and the change that each makes of a corner, weights and what else there is."""


def left_over(corners: Sequence[Corner], weights: FloatArray) -> float:
    """Return the share of the target's energy in its corners that the atoms do not explain."""
    nothing = [np.zeros_like(corner.target) for corner in corners]
    return _left_over(corners, weights, [corner.target for corner in corners], nothing)


def _left_over(
    corners: Sequence[Corner], weights: FloatArray, made: Sequence[FloatArray], dithers: Sequence[FloatArray]
) -> float:
    """Return the share of a merge's energy that is neither its atoms' nor its stranger's."""
    left = energy = 0.0
    for corner, merge, dither in zip(corners, made, dithers, strict=True):
        scale = corner.size / merge.size
        rest = merge - np.tensordot(weights, corner.atoms, 1) - dither
        left += scale * float(np.vdot(rest, rest))
        energy += scale * float(np.vdot(merge, merge))
    return left / energy if energy > 0.0 else 0.0

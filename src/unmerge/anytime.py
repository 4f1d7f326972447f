"""Coefficients from a random sample of row blocks, read until their intervals are narrow enough.

Every tensor that an atom changes is cut into blocks of rows. Blocks are drawn without replacement, each as likely as
any other, and least squares is solved on the drawn ones. The interval is for the coefficients that all blocks would
give: it comes from how the drawn blocks disagree (the delete-one jackknife, blocks as clusters), less what is known
already (the finite-population correction). It holds whatever differs between tensors; all blocks leave it no width.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np

from unmerge.accumulate import Unit, accumulate, plan_units
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.dictionary import Atom, Base, Start
from unmerge.errors import AlignmentError, UnmergeError
from unmerge.regression import Regression, TensorStatistics, check
from unmerge.solvers import Nnls, Solution
from unmerge.statistics import Statistics
from unmerge.task_vector import Delta, LowRank, TaskVector

BLOCK_ELEMENTS = 1 << 16
"""Elements of one block, about: a read of 128 KiB in BF16, small beside any tensor of a large model."""
FIRST = 48
"""Blocks that are read before the intervals are looked at; fewer do not tell their own spread."""
GROWTH = 1.5
"""How much larger a sample is before they are looked at again: each look is a chance to stop too early."""
PIECE = 16
"""Blocks between looks at the clock."""
MOST_ATOMS = 64
"""Inner products between atoms are computed anew in every block."""
LEVEL = 0.95
"""Coverage of the intervals."""
_BUDGET = re.compile(r"(?P<amount>\d+(\.\d+)?)\s*(?P<unit>[kMG]?B|s)$")
_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True, slots=True)
class Limits:
    """When to stop.

    Attributes
    ----------
    precision : float or None
        Half width of the widest interval that is narrow enough.
    size : int or None
        Bytes of weights to read, at most.
    seconds : float or None
        Time after which no more is read; results then depend on the machine.
    """

    precision: float | None = None
    size: int | None = None
    seconds: float | None = None


def limits(precision: float | None, budget: str | None) -> Limits:
    """Return limits from a half width and a budget such as ``200MB`` or ``5s``.

    Raises
    ------
    UnmergeError
        If one of them means nothing.
    """
    if precision is not None and not 0.0 < precision < 1.0:
        raise UnmergeError(f"precision {precision}: expected a half width between 0 and 1, as 0.01")
    if budget is None:
        return Limits(precision)
    match = _BUDGET.match(budget)
    if match is None or float(match["amount"]) == 0.0:
        raise UnmergeError(f"budget {budget!r}: expected bytes or seconds, as 200MB, 1.5GB or 5s")
    amount = float(match["amount"])
    if match["unit"] == "s":
        return Limits(precision, seconds=amount)
    return Limits(precision, size=round(amount * _BYTES[match["unit"]]))


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What was read, and what it says.

    Attributes
    ----------
    regression : Regression
        Of the drawn blocks, by tensor, scaled to all blocks; without contacts.
    intervals : array, shape (K, 2)
        Of the coefficients that all blocks would give; NaN where nothing is known.
    blocks, population : int
        Blocks that were read, and that there are.
    size : int
        Bytes of weights that were read.
    precise : bool
        Whether the wanted precision was reached, or none was wanted.
    """

    regression: Regression
    intervals: FloatArray
    blocks: int
    population: int
    size: int
    precise: bool


def sample(
    target: TaskVector,
    rows: Mapping[str, int],
    atoms: Sequence[Atom],
    base: Base,
    bounds: Limits,
    generator: np.random.Generator,
    *,
    signed: bool = False,
    workers: int = 1,
    start: Start | None = None,
) -> Sample:
    """Read blocks in random order until a limit is reached.

    Parameters
    ----------
    rows : mapping
        Rows to compare of every tensor that can be compared.
    bounds : Limits
        With none, everything is read.
    generator : numpy.random.Generator
        Draws the order; the same one gives the same blocks.
    signed : bool
        Whether coefficients may be negative.

    Raises
    ------
    UnmergeError
        If there are too many atoms, they share no tensor with the target, or what was read says nothing.
    """
    if len(atoms) > MOST_ATOMS:
        raise UnmergeError(
            f"{len(atoms)} atoms: a sample takes at most {MOST_ATOMS}; leave out --precision and --budget"
        )
    ordered = sorted(atoms, key=lambda atom: (atom.vector.digest, atom.name))
    vectors = [*(atom.vector for atom in ordered), target]
    units = _blocks(rows, ordered, base)
    if not units:
        raise AlignmentError(f"{target.name}: has none of the tensors that the atoms change; nothing to compare")
    order = [units[place] for place in generator.permutation(len(units))]
    advance = start(plan_units(order, vectors, workers=workers)) if start else None
    reader = _Reader(vectors, workers, advance, time.monotonic(), bounds)
    parts: list[tuple[str, Statistics]] = []
    enough = False
    for wanted in looks(len(order)):
        parts.extend(reader.read(order[len(parts) : wanted]))
        drawn = [part for _, part in parts]
        enough = bounds.precision is not None and is_precise(drawn, len(order), bounds.precision, signed=signed)
        if enough or not reader.goes_on:
            break
    if not parts:
        raise UnmergeError("the budget is too small for a single block of rows; give some MB")
    regression = _regression(parts, ordered, base, rows, len(order), reader.unit_memory)
    check(regression, target)
    found = [part for _, part in parts]
    return Sample(
        regression,
        intervals(found, len(order), signed=signed),
        len(parts),
        len(order),
        reader.size,
        enough or bounds.precision is None or len(parts) == len(order),
    )


def _blocks(rows: Mapping[str, int], atoms: Sequence[Atom], base: Base) -> list[Unit]:
    touched = {name for atom in atoms for name in atom.vector.deltas} & rows.keys()
    units: list[Unit] = []
    for name in sorted(touched):
        columns = base.shapes[name][1]
        step = max(1, BLOCK_ELEMENTS // max(1, columns))
        units.extend(Unit(name, first, min(rows[name], first + step), columns) for first in range(0, rows[name], step))
    return units


@dataclass(slots=True)
class _Reader:
    """Turns blocks into statistics, and knows when to stop."""

    vectors: Sequence[TaskVector]
    workers: int
    advance: Callable[[int], None] | None
    began: float
    bounds: Limits
    size: int = 0
    unit_memory: int = 0
    goes_on: bool = True

    def read(self, units: Sequence[Unit]) -> list[tuple[str, Statistics]]:
        """Return the statistics of as many of the blocks as the budget has room for, in order."""
        found: list[tuple[str, Statistics]] = []
        for first in range(0, len(units), PIECE):
            piece = self._within_budget(units[first : first + PIECE])
            work = plan_units(piece, self.vectors, workers=self.workers)
            self.unit_memory = max(self.unit_memory, work.unit_memory)
            products = accumulate(work, self.vectors, [], advance=self.advance)
            remaining = {name: iter(items) for name, items in products.items()}
            for unit in piece:
                item = next(remaining[unit.name])
                last = len(item.gram) - 1
                statistics = Statistics(
                    item.gram[:last, :last],
                    item.gram[:last, last].copy(),
                    float(item.gram[last, last]),
                    float(item.rounding[last]),
                    item.count,
                )
                found.append((unit.name, statistics))
            if not self.goes_on:
                break
        return found

    def _within_budget(self, units: Sequence[Unit]) -> list[Unit]:
        chosen = []
        for unit in units:
            more = sum(
                _stored_bytes(vector.deltas[unit.name], unit) for vector in self.vectors if unit.name in vector.deltas
            )
            if self.bounds.size is not None and self.size + more > self.bounds.size:
                self.goes_on = False
                break
            self.size += more
            chosen.append(unit)
        if self.bounds.seconds is not None and time.monotonic() - self.began > self.bounds.seconds:
            self.goes_on = False
        return chosen


def _stored_bytes(delta: Delta, unit: Unit) -> int:
    """Return what reading some rows of a change takes; all of a right factor is needed for any row."""
    rows, columns = delta.shape
    part = (unit.stop - unit.start) / max(1, rows)
    if isinstance(delta, LowRank):
        return round(delta.nbytes * (columns + (rows if delta.transposed else part * rows)) / (rows + columns))
    return round(delta.nbytes * part)


def looks(population: int) -> Iterator[int]:
    """Yield the sizes of the sample at which the intervals are looked at."""
    wanted = FIRST
    while wanted < population:
        yield wanted
        wanted = max(wanted + 1, round(wanted * GROWTH))
    yield population


def is_precise(parts: Sequence[Statistics], population: int, precision: float, *, signed: bool) -> bool:
    """Tell whether every interval that can be known is at most `precision` wide to either side; see `intervals`."""
    if not parts:
        return False
    half = _half_widths(parts, population, Nnls(signed=signed).solve(reduce(add, parts)), LEVEL)[1]
    return bool(np.all(half[~np.isnan(half)] <= precision)) and not np.isnan(half).all()


def intervals(parts: Sequence[Statistics], population: int, *, signed: bool, level: float = LEVEL) -> FloatArray:
    """Return an interval for each coefficient that all blocks together would give.

    Parameters
    ----------
    parts : sequence of Statistics
        Of the drawn blocks; at least one.
    population : int
        How many blocks there are.

    Returns
    -------
    array, shape (K, 2)
        NaN where nothing is known: a single block, or an atom that is zero or collinear.
    """
    solution = Nnls(signed=signed).solve(reduce(add, parts))
    center, half = _half_widths(parts, population, solution, level)
    low, high = center - half, center + half
    beside = solution.coefficients == 0.0  # at the bound: what it would be alone, and zero
    low, high = np.where(beside, np.minimum(low, 0.0), low), np.where(beside, np.maximum(high, 0.0), high)
    return np.column_stack([low if signed else np.maximum(low, 0.0), high])


def _half_widths(
    parts: Sequence[Statistics], population: int, solution: Solution, level: float
) -> tuple[FloatArray, FloatArray]:
    """Return each coefficient, free where the solver set it to zero, and half of its interval's width."""
    from scipy.special import stdtrit

    count, coefficients = len(parts), solution.coefficients
    grams = np.array([part.gram for part in parts])
    correlations = np.array([part.correlation for part in parts])
    energies = np.einsum("ckk->ck", grams)
    whole = energies.sum(axis=0)
    center, variance = np.full(len(whole), np.nan), np.full(len(whole), np.nan)
    support = np.flatnonzero(coefficients)
    for atom in np.flatnonzero(whole > 0.0):
        chosen = support if coefficients[atom] else np.append(support, atom)
        if coefficients[atom] and np.isfinite(center[atom]):
            continue  # found with the others of the support
        found, deviations = _left_out(grams[:, chosen[:, np.newaxis], chosen], correlations[:, chosen])
        own = slice(None) if coefficients[atom] else slice(-1, None)
        center[chosen[own]] = found[own]
        variance[chosen[own]] = (deviations[:, own] ** 2).sum(axis=0)
    shares = np.divide(energies, whole, out=np.zeros_like(energies), where=whole > 0.0)
    concentration = (shares**2).sum(axis=0)
    # As many blocks as those of equal energy that would say as much.
    freedom = np.divide(1.0, concentration, out=np.zeros_like(whole), where=concentration > 0.0) - 1.0
    unread = 1.0 - count / population
    half = stdtrit(np.maximum(freedom, 1.0), 0.5 + 0.5 * level) * np.sqrt(variance * unread * (count - 1) / count)
    half[freedom < 0.5] = np.nan if unread else 0.0
    half[[atom for group in solution.groups for atom in group]] = np.nan
    return center, half


def _left_out(grams: FloatArray, correlations: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the least-squares solution of all blocks, shape (S,), and what leaving each one out takes away."""
    gram, correlation = grams.sum(axis=0), correlations.sum(axis=0)
    scale = np.sqrt(np.maximum(np.diag(gram), 1e-300))
    solution = np.linalg.pinv(gram / np.outer(scale, scale), hermitian=True) @ (correlation / scale) / scale
    rest = (gram - grams) / np.outer(scale, scale)
    scores = (correlations - grams @ solution) / scale
    deviations = (np.linalg.pinv(rest, hermitian=True) @ scores[:, :, np.newaxis])[:, :, 0] / scale
    return solution, deviations


def _regression(
    parts: Sequence[tuple[str, Statistics]],
    atoms: Sequence[Atom],
    base: Base,
    rows: Mapping[str, int],
    population: int,
    unit_memory: int,
) -> Regression:
    by_name: dict[str, list[Statistics]] = {}
    for name, statistics in parts:
        by_name.setdefault(name, []).append(statistics)
    # One factor for all tensors: each counts as much as was drawn of it, so the whole is what was solved.
    factor = population / max(1, len(parts))
    tensors = []
    for name, found in sorted(by_name.items()):
        drawn = reduce(add, found)
        scaled = Statistics(
            factor * drawn.gram,
            factor * drawn.correlation,
            factor * drawn.energy,
            factor * drawn.rounding,
            rows[name] * base.shapes[name][1],
        )
        tensors.append(TensorStatistics(name, scaled, drawn.count, 0.0, touched=True))
    words = f"{len(parts):,} of {population:,} blocks of rows, at random, of the tensors that atoms change"
    return Regression(tuple(atoms), tuple(tensors), words, unit_memory, {}, (), rows)

"""Weights of the known fine-tunes in a linear merge beside one that nobody knows.

The stranger is estimated too. A fine-tune by LoRA is of low rank, so of what the known ones leave in some hundred rows
and columns its singular directions stand out, and nearly all of a known fine-tune lies outside of them. Weights and
stranger are fitted by maximum likelihood (`lattice`), by turns: the stranger's factors by weighted least squares; the
weights by a step that the stranger follows along its tangents, so that neither takes what is the other's. The
stranger's weight is what the others lack to 1, which fixes its scale.

Arithmetic is first taken to be noisy, which makes the likelihood smooth, then more and more precise while that is
likelier, as mergekit's ``linear`` is: noise that is not there biases the weights. Cells have walls that derivatives do
not see, so the slope of the score is measured by moving the weights by their errors; those are of the sandwich form,
from how the scores of the tensors differ. How far the weights moved with the last change of the noise is counted as one
more. Reference: White, Maximum likelihood estimation of misspecified models, 1982.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from unmerge.evidence.lattice import Block, Seen, Stranger, seen
from unmerge.evidence.low_rank import Factors, leading, refitted, tangents, variance
from unmerge.statistics import FloatArray

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

NOISES = (0.2, 0.1, 0.05, 0.025, 0.0125, 0.006, 0.003, 0.0015)
"""Noise of the arithmetic, in spacings, one after the other."""
TURNS = (3, 3, 2)
"""How many turns at each of them; the last number stands for all further ones."""
GAIN = 0.01
"""A smaller part of the likelihood's logarithm is not worth another level of the noise."""
SEARCHES = 2
"""Turns in which the stranger's directions are looked for; later they are refined."""
LEAST = 0.02
"""Weight from which a stranger can be estimated."""
LOW = 4
"""The rank of a stranger is at most that of the block by this."""
LARGEST = 0.05
"""Change of a weight in one turn at most."""
GIVEN_UP = 0.5
"""Part of a stranger's weight that one turn may give to the known atoms."""
LONGEST, SHORTEST = 8.0, 0.06
"""Multiples of a step that are tried."""
EVERY = 4
"""Of so many tensors one is looked at to find how long a step is best."""
INFORMED = 1e-3
"""Share of the stranger's variance that an element must explain to be taken at its word."""
WIDE = 4.0
"""Standard errors over which slopes are measured the second time."""
CAUTION, COARSE = 1.5, 0.5
"""What is added to a factor of 1 on the intervals if a step of the grid is half as large as the stranger's changes, or
larger; less where steps are finer. Tensors do not differ by what the errors of the stranger do to all of them alike,
and those come from rounding. Measured on merges of known weights."""
NEAR, CROWDED = 0.05, 0.2
"""Share of sums so near to a wall of their cell, in spacings, from which all drifts count; by chance it is 0.1.
Of two weights in nearly simple proportion, half of the sums lie at walls: the wrong ones may explain them as well."""


@dataclass(frozen=True, slots=True, eq=False)
class Beside:
    """Weights beside a stranger.

    Attributes
    ----------
    weights : array, shape (P,)
        Of the known atoms.
    errors : array, shape (P,)
        Standard errors.
    freedom : float
        Degrees of freedom of the errors.
    drift : array, shape (P,)
        How far the weights moved with the last changes of the noise.
    coarseness : float
        Steps of the grid over the stranger's changes, both in root mean square.
    """

    weights: FloatArray
    errors: FloatArray
    freedom: float
    drift: FloatArray
    coarseness: float

    def sampling(self, level: float) -> FloatArray:
        """Return half of each Student interval."""
        from scipy.special import stdtrit

        return np.asarray(stdtrit(self.freedom, 0.5 + 0.5 * level) * self.errors)

    def half_widths(self, level: float) -> FloatArray:
        """Return the same with the drift counted in, widened by up to `CAUTION`."""
        caution = 1.0 + CAUTION * min(1.0, self.coarseness / COARSE) ** 2
        return np.asarray(caution * np.hypot(self.sampling(level), self.drift))

    def intervals(self, level: float, *, signed: bool) -> FloatArray:
        """Return Student's intervals, shape (P, 2)."""
        half, least = self.half_widths(level), -np.inf if signed else 0.0
        return np.maximum(np.stack([self.weights - half, self.weights + half], axis=1), least)


def beside_stranger(blocks: Sequence[Block], start: FloatArray, *, workers: int = 1) -> Beside | None:
    """Fit the weights; None if what is beside the atoms is not one stored fine-tune of low rank.

    Parameters
    ----------
    blocks : sequence of Block
        At least two, of different tensors.
    start : array, shape (P,)
        First estimates, a few hundredths from the truth.
    workers : int
        Blocks that are looked at at once; the result does not depend on it.
    """
    from concurrent.futures import ThreadPoolExecutor

    from threadpoolctl import threadpool_limits

    if not len(start) or len(blocks) < 2 or 1.0 - start.sum() < LEAST:
        return None
    # One BLAS thread: sums of a threaded product would depend on the number of cores.
    with threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        levels = _levels(blocks, start.astype(np.float64), pool)
        if levels is None or len(levels) < 2:
            return None  # arithmetic was not precise, or nothing like this was merged
        last = levels[-1].state
        before = levels[0] if _is_crowded(blocks, last) else levels[-2]
        # Walls may leave no slope where the noise is smallest.
        found = (_errors_at(blocks, level, pool) for level in reversed(levels))
        errors = next((one for one in found if np.isfinite(one).all()), None)
    if errors is None:
        return None
    drift = np.abs(last.weights - before.state.weights)
    return Beside(last.weights, errors, len(blocks) - 1.0, drift, _coarseness(blocks, last))


def _coarseness(blocks: Sequence[Block], state: _State) -> float:
    steps = sum(float(np.mean(block.spacing**2)) for block in blocks)
    changes = sum(float(np.mean(stranger.factors.product**2)) for stranger in state.strangers)
    return float(np.sqrt(steps / changes)) if changes > 0.0 else np.inf


def _is_crowded(blocks: Sequence[Block], state: _State) -> bool:
    """Tell whether far more sums than by chance lie at the walls of their cells."""
    close = count = 0
    for block, stranger in zip(blocks, state.strangers, strict=True):
        stored = np.rint(stranger.factors.product / block.spacing) * block.spacing
        sums = np.tensordot(state.weights, block.changes, 1) + state.share * stored
        depth = np.minimum(np.abs(sums - block.low), np.abs(block.high - sums))
        close += int(np.count_nonzero(depth < NEAR * block.coarser))
        count += depth.size
    return close > CROWDED * count


def _levels(blocks: Sequence[Block], start: FloatArray, pool: ThreadPoolExecutor) -> list[_Level] | None:
    """Lower the noise while that is likelier; None if there is no stranger of low rank to be seen."""
    levels: list[_Level] = []
    state = _first(blocks, start)
    for number, noise in enumerate(NOISES):
        turns = TURNS[min(number, len(TURNS) - 1)]
        better = _turns(blocks, state, noise, turns, pool, searches=0 if levels else SEARCHES)
        if better is None:
            return None
        state = better
        level = _Level(noise, state, _likelihood(blocks, state, noise, pool))
        gain = level.likelihood - levels[-1].likelihood if levels else np.inf
        if gain < 0.0:
            break
        levels.append(level)
        if gain < GAIN * abs(level.likelihood):
            break
    return levels


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    """An estimate: the weights and, tensor by tensor, the stranger."""

    weights: FloatArray
    strangers: tuple[Stranger, ...]

    @property
    def share(self) -> float:
        """The stranger's weight."""
        return 1.0 - float(self.weights.sum())


@dataclass(frozen=True, slots=True, eq=False)
class _Level:
    """The estimate at one level of the noise, and its likelihood."""

    noise: float
    state: _State
    likelihood: float


_Moves = Sequence[tuple[FloatArray, FloatArray]]
"""How the stranger's factors in one tensor answer to each weight."""


def _first(blocks: Sequence[Block], weights: FloatArray) -> _State:
    share = 1.0 - float(weights.sum())
    strangers = []
    for block in blocks:
        rest = (0.5 * (block.low + block.high) - np.tensordot(weights, block.changes, 1)) / share
        factors = leading(rest)
        error = float(np.sqrt(np.mean((rest - factors.product) ** 2)))
        strangers.append(Stranger(factors, np.full(rest.shape, max(error, 1e-30))))
    return _State(weights, tuple(strangers))


def _turns(
    blocks: Sequence[Block], state: _State, noise: float, count: int, pool: ThreadPoolExecutor, *, searches: int
) -> _State | None:
    """Improve an estimate; None if there is no stranger of low rank to be seen."""
    found: _State | None = state
    for turn in range(count):
        found = None if found is None else _turn(blocks, found, noise, pool, search=turn < searches)
    return found


def _turn(
    blocks: Sequence[Block], state: _State, noise: float, pool: ThreadPoolExecutor, *, search: bool
) -> _State | None:
    """Improve the strangers, then the weights; None if there is no stranger of low rank to be seen."""

    def look(block: Block, stranger: Stranger) -> tuple[Stranger, _Moves, FloatArray] | None:
        found = seen(block, stranger, state.weights, state.share, noise)
        better, precision = _better(stranger, found, search=search)
        if not 0 < better.factors.rank <= min(better.error.shape) // LOW:
            return None
        own = _moves(block, better.factors, precision, state.share)
        return better, own, _beside(block, better.factors, own, state.share) * found.score.ravel()

    looked = list(pool.map(look, blocks, state.strangers))
    sound = [one for one in looked if one is not None]
    if len(sound) < len(looked):
        return None
    strangers, moves, scores = zip(*sound, strict=True)
    gradient = sum((score.sum(axis=1) for score in scores), np.zeros(len(state.weights)))
    curvature = sum((score @ score.T for score in scores), np.zeros((len(gradient), len(gradient))))
    step = np.linalg.lstsq(curvature, gradient, rcond=1e-12)[0].clip(-LARGEST, LARGEST)
    # First steps are rough: a small stranger must not be stepped over.
    step = step * min(1.0, GIVEN_UP * state.share / max(float(step.sum()), 1e-30))
    improved = _State(state.weights, strangers)
    moved = _moved(improved, moves, step if search else _length(blocks, improved, moves, step, noise, pool) * step)
    return moved if moved.share > LEAST else None


def _better(stranger: Stranger, found: Seen, *, search: bool) -> tuple[Stranger, FloatArray]:
    """Return a better estimate of the stranger, and each element's inverse variance."""
    before = stranger.error**2
    informed = 1.0 - found.variance / before
    clipped = np.maximum(informed, INFORMED)
    precision, product = clipped / before, stranger.factors.product
    pull = found.mean - product
    # How much larger or smaller the errors are than was thought, by one scoring step of the likelihood.
    excess = float(np.mean((pull**2 + found.variance) / before)) - 1.0
    growth = float(np.exp(np.clip(excess / np.mean(informed.clip(0.0, 1.0) ** 2), -1.2, 0.7)))
    if search:
        factors = leading(product + pull / max(float(clipped.mean()), 0.2))
        least = factors.rank * (sum(product.shape) - factors.rank) / precision.sum()
        return Stranger(factors, np.full(product.shape, np.sqrt(max(growth * before.mean(), least)))), precision
    factors = refitted(product + pull / clipped, precision, stranger.factors)
    own = variance(precision, factors)
    return Stranger(factors, np.sqrt(own * max(1.0, growth * float(before.mean() / own.mean())))), precision


def _moves(block: Block, factors: Factors, precision: FloatArray, share: float) -> _Moves:
    return tangents([precision * change / share for change in block.changes], precision, factors)


def _beside(block: Block, factors: Factors, moves: _Moves, share: float) -> FloatArray:
    """Return the part of each atom that the stranger cannot take over, shape (P, n m)."""
    taken = [left @ factors.right.T + factors.left @ right.T for left, right in moves]
    return np.asarray((block.changes - share * np.array(taken)).reshape(len(block.changes), -1))


def _moved(state: _State, moves: Sequence[_Moves], step: FloatArray, only: slice = slice(None)) -> _State:
    """Move the weights; the stranger gives way and keeps its size in the merge."""
    weights = state.weights + step
    scale = state.share / max(1.0 - float(weights.sum()), 0.5 * LEAST)
    strangers = []
    for stranger, own in zip(state.strangers[only], moves[only], strict=True):
        left = stranger.factors.left - sum(size * move for size, (move, _) in zip(step, own, strict=True))
        right = stranger.factors.right - sum(size * move for size, (_, move) in zip(step, own, strict=True))
        strangers.append(Stranger(Factors(scale * left, right), scale * stranger.error))
    return _State(weights, tuple(strangers))


def _length(
    blocks: Sequence[Block],
    state: _State,
    moves: Sequence[_Moves],
    step: FloatArray,
    noise: float,
    pool: ThreadPoolExecutor,
) -> float:
    """Return how many times a step should be made, by doubling or halving while that is likelier."""
    some = slice(1, None, EVERY) if len(blocks) > EVERY else slice(None)

    def likelihood(times: float) -> float:
        moved = _moved(state, moves, times * step, some)
        return _likelihood(blocks[some], moved, noise, pool) if moved.share > LEAST else -np.inf

    here, there, times = likelihood(0.0), likelihood(1.0), 1.0
    if there > here:
        while times < LONGEST and (further := likelihood(2.0 * times)) > there:
            times, there = 2.0 * times, further
        return times
    while there <= here and times > SHORTEST:
        times *= 0.5
        there = likelihood(times)
    return times


def _likelihood(blocks: Sequence[Block], state: _State, noise: float, pool: ThreadPoolExecutor) -> float:
    def look(block: Block, stranger: Stranger) -> float:
        return seen(block, stranger, state.weights, state.share, noise).likelihood

    return sum(pool.map(look, blocks, state.strangers))


def _errors_at(blocks: Sequence[Block], level: _Level, pool: ThreadPoolExecutor) -> FloatArray:
    """Return standard errors of the weights at one level of the noise; infinite where nothing is known."""
    state, noise = level.state, level.noise

    def answer(block: Block, stranger: Stranger) -> tuple[_Moves, FloatArray]:
        found = seen(block, stranger, state.weights, state.share, noise)
        precision = np.maximum(1.0 - found.variance / stranger.error**2, INFORMED) / stranger.error**2
        own = _moves(block, stranger.factors, precision, state.share)
        return own, _beside(block, stranger.factors, own, state.share)

    moves, others = zip(*pool.map(answer, blocks, state.strangers), strict=True)
    rough = _errors(*_slopes(blocks, state, moves, others, noise, None, pool))
    if not np.isfinite(rough).all():
        return rough
    # The slope is rough: of two errors the larger one.
    return np.maximum(rough, _errors(*_slopes(blocks, state, moves, others, noise, WIDE * rough, pool)))


def _slopes(
    blocks: Sequence[Block],
    state: _State,
    moves: Sequence[_Moves],
    others: Sequence[FloatArray],
    noise: float,
    reach: FloatArray | None,
    pool: ThreadPoolExecutor,
) -> tuple[FloatArray, FloatArray]:
    """Return minus the slope of each tensor's score, shape (T, P, P), over `reach`, and the scores, shape (T, P)."""

    def scores(step: FloatArray) -> FloatArray:
        moved = _moved(state, moves, step)

        def look(block: Block, stranger: Stranger, other: FloatArray) -> FloatArray:
            found: FloatArray = other @ seen(block, stranger, moved.weights, moved.share, noise).score.ravel()
            return found

        return np.array(list(pool.map(look, blocks, moved.strangers, others)))

    here = scores(np.zeros(len(state.weights)))
    if reach is None:
        spread = here - here.mean(axis=0)
        reach = _first_reach(blocks, others, state, noise, spread)
    slopes = []
    for place, size in enumerate(np.maximum(reach, 1e-6)):
        step = size * np.eye(len(reach))[place]
        slopes.append((scores(-step) - scores(step)) / (2.0 * size))
    return np.stack(slopes, axis=2), here


def _first_reach(
    blocks: Sequence[Block], others: Sequence[FloatArray], state: _State, noise: float, spread: FloatArray
) -> FloatArray:
    """Return rough errors of the weights, by the outer product of the scores."""
    curvature = np.zeros((len(state.weights), len(state.weights)))
    for block, stranger, other in zip(blocks, state.strangers, others, strict=True):
        score = other * seen(block, stranger, state.weights, state.share, noise).score.ravel()
        curvature += score @ score.T
    inverse = np.linalg.pinv(curvature)
    return np.asarray(2.0 * np.sqrt(np.diagonal(inverse @ (spread.T @ spread) @ inverse)))


def _errors(slopes: FloatArray, scores: FloatArray) -> FloatArray:
    """Return standard errors from how the scores of the T tensors differ, by the slope of them all."""
    slope, count = slopes.sum(axis=0), len(scores)
    if not (np.diagonal(slope) > 0.0).all() or np.linalg.matrix_rank(slope) < len(slope):
        return np.full(len(slope), np.inf)
    moves = np.linalg.solve(slope, (scores - scores.mean(axis=0)).T).T
    return np.asarray(np.sqrt(count / (count - 1.0) * (moves**2).sum(axis=0)))

"""Weights of the known fine-tunes in a linear merge beside one that nobody knows.

The stranger is estimated too. A fine-tune by LoRA is of low rank, so of what the known ones leave in some hundred rows
and columns its singular directions stand out, and nearly all of a known fine-tune lies outside of them. Weights and
stranger are fitted by maximum likelihood (`lattice`), by turns: the stranger's factors by weighted least squares; the
weights by a step that the stranger follows along its tangents, so that neither takes what is the other's. The
stranger's weight is what the others lack to 1, which fixes its scale.

Arithmetic is first taken to be noisy, which makes the likelihood smooth, then more and more precise while that is
likelier, as mergekit's ``linear`` is: noise that is not there biases the weights. Cells have walls that derivatives do
not see, so errors are measured where there still is some noise: the slope of the score by moving the weights by their
errors, the errors by the delete-one-tensor jackknife. How far the weights moved from there on is counted as one more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from unmerge.evidence.lattice import Block, Seen, Stranger, seen
from unmerge.evidence.low_rank import Factors, leading, refitted, tangents, variance
from unmerge.statistics import FloatArray

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

NOISES = (0.2, 0.1, 0.05, 0.025, 0.0125, 0.006, 0.003, 0.0015)
"""Noise of the arithmetic, in spacings, one after the other."""
SMOOTH = 0.0125
"""The smallest one at which errors are measured."""
TURNS = (3, 3, 2)
"""How many turns at each of them; the last number stands for all further ones."""
GAIN = 0.01
"""A smaller part of the likelihood's logarithm is not worth another level of the noise."""
SEARCHES = 2
"""Turns in which the stranger's directions are looked for; later they are refined."""
MEASURED = 2
"""How often slopes are measured, each time over the errors that the last ones gave."""
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
WIDE = 2.0
"""Half intervals over which slopes are measured."""
CAUTION, COARSE = 1.75, 0.5
"""What is added to a factor of 1 on the intervals if a step of the grid is half as large as the stranger's changes, or
larger; less where steps are finer. The jackknife does not see what errors of the stranger do to all tensors alike, and
those come from rounding. Measured on merges of known weights: without it, 53 of 65 intervals hold them where changes
are 0.3 or 1 % of the weights, and 27 of 29 at 3 %."""


@dataclass(frozen=True, slots=True, eq=False)
class Beside:
    """Weights beside a stranger.

    Attributes
    ----------
    weights : array, shape (P,)
        Of the known atoms.
    errors : array, shape (P,)
        Standard errors.
    freedom : array, shape (P,)
        Degrees of freedom of the errors.
    drift : array, shape (P,)
        How far the weights moved from where the errors were measured.
    coarseness : float
        Steps of the grid over the stranger's changes, both in root mean square.
    """

    weights: FloatArray
    errors: FloatArray
    freedom: FloatArray
    drift: FloatArray
    coarseness: float = 1.0

    def sampling(self, level: float) -> FloatArray:
        """Return half of each Student interval."""
        from scipy.special import stdtrit

        return np.asarray(stdtrit(np.maximum(self.freedom, 1.0), 0.5 + 0.5 * level) * self.errors)

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
        smooth = next(level for level in reversed(levels) if level.noise >= SMOOTH)
        found = _measured(blocks, smooth, pool)
        if found is None:
            return None
    last = levels[-1].state
    before = smooth if smooth is not levels[-1] else levels[-2]
    drift = np.abs(last.weights - before.state.weights)
    return replace(found, weights=last.weights, drift=drift, coarseness=_coarseness(blocks, last))


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
        if noise < SMOOTH and gain < GAIN * abs(level.likelihood):
            break
    return levels


def _coarseness(blocks: Sequence[Block], state: _State) -> float:
    steps = sum(float(np.mean(block.spacing**2)) for block in blocks)
    changes = sum(float(np.mean(stranger.factors.product**2)) for stranger in state.strangers)
    return float(np.sqrt(steps / changes)) if changes > 0.0 else np.inf


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


def _measured(blocks: Sequence[Block], level: _Level, pool: ThreadPoolExecutor) -> Beside | None:
    """Return the weights of a level with their errors; None if nothing is known of one of them."""
    state, noise = level.state, level.noise

    def answer(block: Block, stranger: Stranger) -> tuple[_Moves, FloatArray]:
        found = seen(block, stranger, state.weights, state.share, noise)
        precision = np.maximum(1.0 - found.variance / stranger.error**2, INFORMED) / stranger.error**2
        own = _moves(block, stranger.factors, precision, state.share)
        return own, _beside(block, stranger.factors, own, state.share)

    moves, others = zip(*pool.map(answer, blocks, state.strangers), strict=True)
    found: Beside | None = None
    for _ in range(MEASURED):
        reach = None if found is None else WIDE * found.sampling(0.95)
        found = _jackknifed(state.weights, *_slopes(blocks, state, moves, others, noise, reach, pool))
        if found is None:
            return None
    return found


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


def _jackknifed(weights: FloatArray, slopes: FloatArray, scores: FloatArray) -> Beside | None:
    """Return the weights with errors by leaving out a tensor at a time; None if nothing is known of one of them."""
    slope, score = slopes.sum(axis=0), scores.sum(axis=0)
    step = np.linalg.lstsq(slope, score, rcond=1e-12)[0]
    known = np.clip(np.diagonal(slopes, axis1=1, axis2=2), 0.0, None)
    if not (known.sum(axis=0) > 0.0).all():
        return None
    shares = known / known.sum(axis=0)
    without = [
        np.linalg.lstsq(slope - own, score - pull, rcond=1e-12)[0] for own, pull in zip(slopes, scores, strict=True)
    ]
    errors = np.sqrt(((1.0 - shares) * (np.array(without) - step) ** 2).sum(axis=0))
    return Beside(weights, errors, 1.0 / (shares**2).sum(axis=0) - 1.0, np.zeros(len(weights)))

"""Weights of the known fine-tunes in a linear merge beside one that nobody knows.

The stranger is estimated too. A fine-tune by LoRA is of low rank, so of what the known ones leave in some hundred rows
and columns its singular directions stand out, and nearly all of a known fine-tune lies outside of them. Weights and
stranger are fitted by maximum likelihood (`lattice`); the stranger's weight is what the others lack to 1, which fixes
its scale.

Where changes are some steps of the grid, the sums of whole steps lie at few places between the walls of their cells,
and the likelihood of weights has cliffs at simple fractions, and a cusp at the truth. Three looks, each beginning where
the one before ended:

1. Arithmetic is taken to be noisy, which makes the likelihood smooth, then less and less. Noise that is not there
   biases the weights, so this finds them to some hundredths.
2. The likelihood of weights beside the stranger that fits them best, without noise, is climbed without derivatives, in
   ever smaller steps; the stranger's rank, the same in all tensors, is the likeliest of a few.
3. On all tensors: the stranger's factors by weighted least squares, then a step of the weights that the stranger
   follows along its tangents, so that neither takes what is the other's.

A likelihood with a cusp has no curvature that tells how precise its top is. An interval holds the weights that are
about as likely, as far as the fit of the stranger lets likelihoods be compared, and reaches as far as the looks differ:
twice as far as the third, at all tensors, moved any weight from where the second, at a quarter of them, had found it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from unmerge.evidence.lattice import Block, Seen, Stranger, seen
from unmerge.evidence.low_rank import Factors, leading, refitted, tangents
from unmerge.statistics import FloatArray

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

NOISES = (0.2, 0.1, 0.05, 0.025, 0.0125, 0.006, 0.003)
"""Noise of the arithmetic, in spacings, one after the other, in the first look."""
TURNS = (3, 3, 2)
"""How many turns at each of them; the last number stands for all further ones."""
GAIN = 0.01
"""A smaller part of the likelihood's logarithm decides nothing."""
PRECISE = 1e-4
"""Noise of float32 arithmetic in a bfloat16 merge at most."""
LAST = (1e-3, PRECISE)
"""Noise of the last turns. Of two weights in nearly simple proportion many sums lie some 1e-3 from a wall."""
HELD, CLOSE = (4, 16), 0.08
"""The least and the most turns in which the stranger alone is fitted, and the part of the likelihood's logarithm that
one more turn must gain."""
PLAIN = 0.75
"""Without noise the likelihood's logarithm is smaller than so much of that with the most noise, where whole steps were
merged: 0.2 to 0.6 times; 0.9 and more where others were."""
IMPROVED, CLOSER = (2, 6), 0.02
"""The same where the stranger of other weights is improved; a search in small steps that gains more is repeated."""
PARTS, NEAR = (2, 3, 4, 5, 6, 7, 8, 10, 20), 0.03
"""Weights that are tried are multiples of these parts of 1, so far from a start at most."""
APART = 0.003
"""Distance from which weights are others."""
STEPS, NEARER, FINE = (0.02, 0.001), (0.005, 0.001), (0.001, 1e-5)
"""First and last steps of three searches for the weights."""
AS_LIKELY, MOVES = 0.02, 2.0
"""Part of the likelihood's logarithm that is lacking where weights are about as likely, and multiple of the last move
that an interval reaches. Of 100 true weights 95 are no farther, in 40 merges of each size, of another seed than the
benchmark's, and in the first 13 of the benchmark."""
LOOKS = 25
"""How many points each search looks at for each weight."""
RESOLVED = 8e-6
"""No top is known better: the last steps are about as large."""
AGAIN, SETTLED = 4, 2
"""How often the last search is begun at most, and how often the stranger is improved before."""
SEARCHES = 2
"""Turns in which the stranger's directions are looked for; later they are refined."""
KEPT = 0.02
"""Part of the likelihood's logarithm that a step by derivatives must lose not to be made."""
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
"""Of so many tensors one is looked at first, and to find how long a step is best."""
FASTEST, SLOWEST = 2.0, 0.7
"""Largest changes, down and up, of the logarithm of the stranger's variance in one turn."""
HASTE = 2.0
"""Multiple of the scoring step that such a change is."""
INFORMED = 1e-3
"""Share of the stranger's variance that an element must explain to be taken at its word."""


@dataclass(frozen=True, slots=True, eq=False)
class Beside:
    """Weights beside a stranger.

    Attributes
    ----------
    weights : array, shape (P,)
        Of the known atoms.
    reach : array, shape (P,)
        How far weights are that are about as likely: half of each interval, which holds 95 % of true weights.
    """

    weights: FloatArray
    reach: FloatArray

    def intervals(self, *, signed: bool) -> FloatArray:
        """Return 95 % intervals, shape (P, 2)."""
        ends = np.stack([self.weights - self.reach, self.weights + self.reach], axis=1)
        return ends if signed else np.maximum(ends, 0.0)


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
        top = _searched(_some(blocks), start.astype(np.float64), pool)
        if top is None:
            return None
        state = _polished(blocks, top, pool)
    if state is None:
        return None
    moved = float(np.abs(state.weights - top.weights).max())
    return Beside(state.weights, np.maximum(top.plateau, max(MOVES * moved, RESOLVED)))


def _some(blocks: Sequence[Block]) -> Sequence[Block]:
    return blocks[1::EVERY] if len(blocks) > EVERY else blocks


@dataclass(frozen=True, slots=True, eq=False)
class _Top:
    """The likeliest weights and stranger, and their likelihood.

    Others that are about as likely are as far as `plateau`, and none beyond `APART` is likelier than `beyond`.
    """

    state: _State
    likelihood: float
    plateau: FloatArray
    beyond: float

    @property
    def weights(self) -> FloatArray:
        return self.state.weights

    @property
    def rank(self) -> int:
        return self.state.strangers[0].factors.rank


def _searched(blocks: Sequence[Block], start: FloatArray, pool: ThreadPoolExecutor) -> _Top | None:
    """Find the likeliest weights and rank of the stranger; None if nothing like this was merged.

    Every weight has a likelihood: that beside the stranger which fits it best. It has no bias, as noise does not smooth
    it, but it is rough, and flat far from its top; so it is searched from the better one of two starts without
    derivatives. A wrong rank costs far more than what the weights can make good.
    """
    annealed = _annealed(blocks, start, pool)
    if annealed is None:
        return None

    def likeliest(choices: Sequence[FloatArray], ranks: Sequence[int]) -> tuple[float, FloatArray, int]:
        found = [(_fit(blocks, weights, rank, PRECISE, pool), weights, rank) for rank in ranks for weights in choices]
        return max(found, key=lambda one: one[0])

    ranks = _ranks(annealed)
    likelihood, weights, rank = likeliest((start, annealed.weights), ranks)
    simple = _simple((start, annealed.weights))
    if simple and (best := likeliest(simple, [rank]))[0] > likelihood:
        _, weights, rank = likeliest([best[1]], ranks)
    top = _climbed(blocks, weights, rank, pool)
    return top if _is_of_steps(top, _fit(blocks, top.weights, rank, NOISES[0], pool)) else None


def _simple(starts: Sequence[FloatArray]) -> list[FloatArray]:
    """Return weights near the starts that people choose: multiples of a twentieth, a sixth and so on.

    There sums of whole steps lie on walls, and the likelihood has a peak that no search finds.
    """
    rounded = [np.rint(parts * weights) / parts for weights in starts for parts in PARTS]
    near = [one for one in rounded if min(float(np.abs(one - weights).max()) for weights in starts) <= NEAR]
    return list({tuple(one): one for one in near if one.min() > 0.0 and 1.0 - one.sum() > LEAST}.values())


def _is_of_steps(top: _Top, noisy: float) -> bool:
    """Tell whether sums of whole steps are seen; not of arithmetic in few bits, or in another kind of merge.

    Either the likelihood without noise is much larger than with it, or, where sums lie on walls, which tells nothing,
    it is smaller at all other weights.
    """
    return top.likelihood > PLAIN * noisy or top.likelihood > noisy > top.beyond


def _ranks(state: _State) -> list[int]:
    """Return ranks that the stranger may have, in all tensors alike as by LoRA; most are powers of two."""
    middle = float(np.median([stranger.factors.rank for stranger in state.strangers]))
    power = np.log2(middle)
    most = min(min(stranger.error.shape) for stranger in state.strangers) // LOW
    found = {round(middle), 2 ** int(np.floor(power)), 2 ** int(np.ceil(power))}
    return sorted(rank for rank in found if rank <= most)


def _climbed(blocks: Sequence[Block], start: FloatArray, rank: int, pool: ThreadPoolExecutor) -> _Top:
    """Search for the likeliest weights, three times.

    The stranger beside each weight is found from afresh. Now and then that ends in poor optima, and other weights look
    likelier than the true ones. So the search is repeated nearer by, where the stranger of the likeliest weights so far
    is improved a little. That favours weights near those that it comes from; so the third search, in small steps, is
    begun at both tops.
    """
    first = _climb(blocks, start, rank, STEPS, pool)
    second = _climb(blocks, first.weights, rank, NEARER, pool, near=first.state)
    apart = np.abs(second.weights - first.weights).max() > FINE[1]
    found = [_refined(blocks, top, pool) for top in ((first, second) if apart else (second,))]
    return max(found, key=lambda top: top.likelihood)


def _refined(blocks: Sequence[Block], top: _Top, pool: ThreadPoolExecutor) -> _Top:
    """Search nearby in small steps: the larger the changes are in steps of the grid, the narrower is the peak.

    Where they are ten steps, it is a cusp of some 1e-3, and its top is known to some 1e-6. It has lesser ones beside
    it, from where the search is begun anew.
    """
    best = top
    for _ in range(AGAIN):
        near = best.state
        for _ in range(SETTLED):  # or further weights would look likelier, as the stranger gets better with every look
            near, before = _held(blocks, best.weights, top.rank, PRECISE, pool, near=near)
        best = _climb(blocks, best.weights, top.rank, FINE, pool, near=near)
        if best.likelihood - before < CLOSER * abs(before):
            break
    return replace(best, beyond=top.beyond)


def _climb(
    blocks: Sequence[Block],
    start: FloatArray,
    rank: int,
    steps: tuple[float, float],
    pool: ThreadPoolExecutor,
    *,
    near: _State | None = None,
) -> _Top:
    """Climb to the likeliest weights by quadratic models; the stranger is found from afresh or improved from `near`."""
    from scipy.optimize import minimize

    points: list[FloatArray] = []
    heights: list[float] = []
    tops = [near] if near else []

    def depth(weights: FloatArray) -> float:
        points.append(weights * min(1.0, (1.0 - LEAST) / max(float(weights.sum()), 1e-30)))
        found, likelihood = _held(blocks, points[-1], rank, PRECISE, pool, near=tops[-1] if near else None)
        if likelihood > max(heights, default=-np.inf):
            tops.append(found)
        heights.append(likelihood)
        return -likelihood / max(1.0, abs(heights[0]))

    options = {"initial_tr_radius": steps[0], "final_tr_radius": steps[1], "maxfev": LOOKS * len(start)}
    minimize(depth, start, method="COBYQA", options=options)
    top = int(np.argmax(heights))
    distances, found = np.abs(np.array(points) - points[top]), np.array(heights)
    plateau = distances[found >= found[top] - AS_LIKELY * abs(found[top])].max(axis=0)
    beyond = found[distances.max(axis=1) > APART].max(initial=-np.inf)
    return _Top(tops[-1], heights[top], plateau, float(beyond))


def _held(
    blocks: Sequence[Block],
    weights: FloatArray,
    rank: int,
    noise: float,
    pool: ThreadPoolExecutor,
    *,
    near: _State | None = None,
) -> tuple[_State, float]:
    """Fit a stranger of this rank beside given weights, or improve one of others; also return the likelihood."""
    state, before = _State(weights, near.strangers) if near else _first(blocks, weights, rank), -np.inf
    (least, most), close = (IMPROVED, CLOSER) if near else (HELD, CLOSE)
    for turn in range(most):
        found = _seen(blocks, state, noise, pool)
        likelihood = sum(one.likelihood for one in found)
        if turn >= least and likelihood - before < close * abs(likelihood):
            break
        if turn + 1 < most:
            state, before = _refitted(state, found, rank, pool, search=near is None and turn < SEARCHES), likelihood
    return state, likelihood


def _seen(blocks: Sequence[Block], state: _State, noise: float, pool: ThreadPoolExecutor) -> list[Seen]:
    def look(block: Block, stranger: Stranger) -> Seen:
        return seen(block, stranger, state.weights, state.share, noise)

    return list(pool.map(look, blocks, state.strangers))


def _refitted(state: _State, found: Sequence[Seen], rank: int, pool: ThreadPoolExecutor, *, search: bool) -> _State:
    """Improve the strangers alone."""

    def better(stranger: Stranger, one: Seen) -> Stranger:
        return _better(stranger, one, rank, search=search)[0]

    return _State(state.weights, tuple(pool.map(better, state.strangers, found)))


def _fit(blocks: Sequence[Block], weights: FloatArray, rank: int, noise: float, pool: ThreadPoolExecutor) -> float:
    return _held(blocks, weights, rank, noise, pool)[1]


def _polished(blocks: Sequence[Block], top: _Top, pool: ThreadPoolExecutor) -> _State | None:
    """Improve weights and strangers together, unless that makes the weights unlikelier; None if a stranger fades.

    Derivatives lead away from narrow peaks.
    """
    better: _State | None = _held(blocks, top.weights, top.rank, PRECISE, pool)[0]
    for noise in LAST:
        better = better and _turns(blocks, better, noise, TURNS[-1], pool, searches=0)
    if better is None:
        return None
    before, after = (_held(blocks, one, top.rank, PRECISE, pool, near=better) for one in (top.weights, better.weights))
    return before[0] if before[1] - after[1] > KEPT * abs(before[1]) else better


def _annealed(blocks: Sequence[Block], start: FloatArray, pool: ThreadPoolExecutor) -> _State | None:
    """Find rough weights by lowering the noise while that is likelier; None if no stranger of low rank is seen."""
    state, before = _first(blocks, start), -np.inf
    for number, noise in enumerate(NOISES):
        turns = TURNS[min(number, len(TURNS) - 1)]
        better = _turns(blocks, state, noise, turns, pool, searches=0 if number else SEARCHES)
        if better is None:
            return None
        likelihood = _likelihood(blocks, better, noise, pool)
        if likelihood < before:
            break
        state = better
        if likelihood - before < GAIN * abs(likelihood):
            break
        before = likelihood
    return state


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    """An estimate: the weights and, tensor by tensor, the stranger."""

    weights: FloatArray
    strangers: tuple[Stranger, ...]

    @property
    def share(self) -> float:
        """The stranger's weight."""
        return 1.0 - float(self.weights.sum())


_Moves = Sequence[tuple[FloatArray, FloatArray]]
"""How the stranger's factors in one tensor answer to each weight."""


def _first(blocks: Sequence[Block], weights: FloatArray, rank: int | None = None) -> _State:
    share = 1.0 - float(weights.sum())
    strangers = []
    for block in blocks:
        rest = (0.5 * (block.low + block.high) - np.tensordot(weights, block.changes, 1)) / share
        factors = leading(rest, rank)
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


def _better(stranger: Stranger, found: Seen, rank: int | None = None, *, search: bool) -> tuple[Stranger, FloatArray]:
    """Return a better estimate of the stranger, and each element's inverse variance."""
    before, product = stranger.error**2, stranger.factors.product
    informed, precision = 1.0 - found.variance / before, _precision(stranger, found)
    clipped = precision * before
    pull = found.mean - product
    # How much larger or smaller the errors are than was thought, by one scoring step of the likelihood.
    excess = float(np.mean((pull**2 + found.variance) / before)) - 1.0
    change = HASTE * excess / float(np.mean(informed.clip(0.0, 1.0) ** 2))
    growth = float(np.exp(np.clip(change, -FASTEST, SLOWEST)))
    if search:
        factors = leading(product + pull / max(float(clipped.mean()), 0.2), rank)
        least = factors.rank * (sum(product.shape) - factors.rank) / precision.sum()
        return Stranger(factors, np.full(product.shape, np.sqrt(max(growth * before.mean(), least)))), precision
    factors, own = refitted(product + pull / clipped, precision, stranger.factors)
    return Stranger(factors, np.sqrt(own * max(1.0, growth * float(before.mean() / own.mean())))), precision


def _precision(stranger: Stranger, found: Seen) -> FloatArray:
    """Return the inverse variance of what each element says of the stranger."""
    before = stranger.error**2
    return np.asarray(np.maximum(1.0 - found.variance / before, INFORMED) / before)


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
    return sum(one.likelihood for one in _seen(blocks, state, noise, pool))

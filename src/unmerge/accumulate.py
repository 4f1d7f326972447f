"""Streams task vectors into inner products, a block of rows at a time.

The unit of work is a range of rows of one tensor. Units are cut by shape alone, computed with one BLAS thread
each, and added in the order of their names, so neither shards, file layout, workers nor the order of atoms change
a bit of the result. Memory is bounded by `Plan.memory`, whatever the size of the model.

Notation: task vectors are split into `new` ones (P of them) and `known` ones (Q); only inner products that
involve a new one are computed. With no known ones this is a full Gram matrix; with one new one it is a row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from unmerge import float32
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.errors import TargetError
from unmerge.parallel import as_finished, finished
from unmerge.task_vector import BLOCK_ELEMENTS, Delta, Difference, LowRank, TaskVector, blocks
from unmerge.torch_blocks import TorchKernel

UNIT_BLOCKS = 32
"""Blocks that one unit of work holds at most."""
SAMPLE_RUNS = 16
"""Row runs that are read of a sampled tensor."""
SAMPLE_ELEMENTS = 1 << 16
"""Elements of one such run, about."""
LINES = 256
"""Rows and columns of a tensor that a contact keeps."""
CORNERS = 16
"""Tensors whose kept rows and columns are looked at element by element, with all atoms."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows `start` to `stop` of one tensor."""

    name: str
    start: int
    stop: int
    columns: int

    @property
    def count(self) -> int:
        """The number of parameters in it."""
        return (self.stop - self.start) * self.columns


@dataclass(frozen=True, slots=True, eq=False)
class Contact:
    """How a target V (m x n) meets the low-rank changes L_j R_j of one tensor, r_j the ranks and r their sum.

    Inner products tell how much of V points along a change; this tells in which directions of the change it
    does, and what else V holds in the rows and columns that the change lives in. Additive over ranges of rows.

    Attributes
    ----------
    ranks : tuple of (str, int)
        Digest and rank of each change, in the order of the stacked axes; scales are multiplied into L_j.
    rows, columns : array of int, shapes (s,) and (c,)
        The lines that were kept.
    cores : array, shape (r, k)
        L_j' V R_j' of each change, one below the other, padded with zeros to the largest rank k.
    along : array of float32, shape (s, r)
        V R' in the kept rows.
    across : array, shape (r, c)
        L' V in the kept columns.
    corner : array of float32, shape (s, c)
        V in the kept rows and columns.
    """

    ranks: tuple[tuple[str, int], ...]
    rows: NDArray[np.intp]
    columns: NDArray[np.intp]
    cores: FloatArray
    along: NDArray[np.float32]
    across: FloatArray
    corner: NDArray[np.float32]

    def __add__(self, other: Contact) -> Contact:
        return Contact(
            self.ranks,
            np.concatenate([self.rows, other.rows]),
            self.columns,
            self.cores + other.cores,
            np.concatenate([self.along, other.along]),
            self.across + other.across,
            np.concatenate([self.corner, other.corner]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Products:
    """Inner products of P new task vectors with all N = P + Q over some parameters; additive.

    Attributes
    ----------
    gram : array, shape (P, N)
        Inner products, new ones first, in squared weight units.
    rounding : array, shape (P,)
        Energy that storage rounding accounts for, in squared weight units.
    count : int
        The number of parameters.
    contact : Contact or None
        Of the last new task vector, if it was asked for and changes the tensor.
    """

    gram: FloatArray
    rounding: FloatArray
    count: int
    contact: Contact | None = None

    def __add__(self, other: Products) -> Products:
        contact = self.contact + other.contact if self.contact and other.contact else None
        return Products(self.gram + other.gram, self.rounding + other.rounding, self.count + other.count, contact)


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be read, before it is read.

    Attributes
    ----------
    units : tuple of Unit
        The work, sorted by tensor name.
    sizes : mapping
        Parameters of each planned tensor; more than its units hold where it is sampled.
    sampled : frozenset of str
        Tensors of which only some rows are read.
    unit_memory : int
        Bytes that one worker holds at once, at most.
    workers : int
        How many units run at once.
    kept_memory : int
        Bytes of the contacts, which stay.
    float64 : bool
        Whether large tensors are computed in float64 too.
    device : str or None
        The device of torch that large tensors are computed on; None is without torch.
    """

    units: tuple[Unit, ...]
    sizes: Mapping[str, int]
    sampled: frozenset[str]
    unit_memory: int
    workers: int
    kept_memory: int = 0
    float64: bool = False
    device: str | None = None

    @property
    def memory(self) -> int:
        """Bytes that all workers together hold at once, at most (files and interpreter not counted)."""
        return self.workers * self.unit_memory + self.kept_memory

    @property
    def count(self) -> int:
        """Parameters that will be read."""
        return sum(unit.count for unit in self.units)


def plan(
    shapes: Mapping[str, tuple[int, int]],
    vectors: Sequence[TaskVector],
    *,
    sample: Collection[str] = (),
    contacts: Collection[str] = (),
    workers: int = 1,
    float64: bool = False,
    device: str | None = None,
) -> Plan:
    """Cut tensors into units of work.

    Parameters
    ----------
    shapes : mapping
        The (rows, columns) to read of each tensor.
    vectors : sequence of TaskVector
        All task vectors that will be read, for the memory bound.
    sample : collection of str
        Tensors of which some runs of rows, chosen by the tensor's name, are enough; small ones are read whole.
    contacts : collection of str
        Tensors of which a `Contact` is kept, for the memory bound.
    workers : int
        How many units run at once, for the memory bound.
    float64 : bool
        Compute large tensors in float64 too, not in float32.
    device : str, optional
        Compute large tensors on this device of torch; see `torch_blocks.check_device`.
    """
    sampled: set[str] = set()
    units: list[Unit] = []
    for name, (rows, columns) in sorted(shapes.items()):
        runs = _sample_runs(name, rows, columns) if name in sample else None
        if runs is not None:
            sampled.add(name)
            units.extend(Unit(name, start, stop, columns) for start, stop in runs)
        else:
            step = UNIT_BLOCKS * max(1, BLOCK_ELEMENTS // max(1, columns))
            units.extend(Unit(name, start, min(rows, start + step), columns) for start in range(0, rows, step))
    sizes = {name: rows * columns for name, (rows, columns) in sorted(shapes.items())}
    unit_memory = max((_unit_memory(unit, 0 if float64 else sizes[unit.name], vectors) for unit in units), default=0)
    met = {name: shapes[name] for name in contacts if name in shapes}
    kept = sum(_contact_memory(name, shape, vectors) for name, shape in met.items()) + _evidence_memory(met, vectors)
    return Plan(tuple(units), sizes, frozenset(sampled), unit_memory, workers, kept, float64, device)


def plan_units(units: Sequence[Unit], vectors: Sequence[TaskVector], *, workers: int = 1) -> Plan:
    """Plan to read these units, in this order; `Plan.sizes` counts what they hold. See `plan`."""
    sizes: dict[str, int] = {}
    for unit in units:
        sizes[unit.name] = sizes.get(unit.name, 0) + unit.count
    unit_memory = max((_unit_memory(unit, 0, vectors) for unit in units), default=0)
    return Plan(tuple(units), sizes, frozenset(), unit_memory, workers, float64=True)


def lines(name: str, shape: tuple[int, int]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Choose the rows and the columns that a tensor's contact keeps; seeded by its name, so they can be repeated."""
    rows, columns = (
        np.sort(np.random.default_rng([axis, *name.encode()]).permutation(extent)[:LINES])
        for axis, extent in enumerate(shape)
    )
    return rows.astype(np.intp), columns.astype(np.intp)


def _contact_memory(name: str, shape: tuple[int, int], vectors: Sequence[TaskVector]) -> int:
    ranks = [delta.rank for vector in vectors if isinstance(delta := vector.deltas.get(name), LowRank)]
    rows, columns = (min(LINES, extent) for extent in shape)
    # What is kept, and the same once more while the units' parts are added.
    return 2 * sum(ranks) * (8 * max(ranks, default=0) + 4 * rows + 8 * columns) + 8 * rows * columns


def _sample_runs(name: str, rows: int, columns: int) -> list[tuple[int, int]] | None:
    length = max(1, SAMPLE_ELEMENTS // max(1, columns))
    if rows <= 4 * SAMPLE_RUNS * length:
        return None
    # One random run in each of SAMPLE_RUNS equal strata; seeded by the name, so a result can be repeated.
    generator = np.random.default_rng(list(name.encode()))
    edges = np.linspace(0, rows - length, SAMPLE_RUNS + 1).astype(int)
    starts = [int(generator.integers(low, max(low + 1, high - length))) for low, high in pairwise(edges)]
    return [(start, start + length) for start in starts]


def _unit_memory(unit: Unit, elements: int, vectors: Sequence[TaskVector]) -> int:
    deltas = [vector.deltas.get(unit.name) for vector in vectors]
    present = [delta for delta in deltas if delta is not None]
    if float32.applies(present, elements):
        return _float32_memory(unit, present)
    rank = sum(delta.rank for delta in deltas if isinstance(delta, LowRank))
    dense = sum(delta is not None and not isinstance(delta, LowRank) for delta in deltas)
    block_rows = max(1, BLOCK_ELEMENTS // max(1, unit.columns))
    block = 8 * block_rows * unit.columns
    factors = 8 * rank * (2 * unit.columns + (unit.stop - unit.start))
    # Each dense block, the temporaries of one more (bits, widened, products), and the factors.
    return (dense + 3) * block + factors + 8 * rank * block_rows


def _float32_memory(unit: Unit, deltas: Sequence[Delta]) -> int:
    rank = sum(delta.rank for delta in deltas if isinstance(delta, LowRank))
    dense = sum(isinstance(delta, Difference) for delta in deltas)
    rows = min(unit.stop - unit.start, max(1, float32.BLOCK_ELEMENTS // max(1, unit.columns)))
    # Blocks, the stacked factors, one of them as stored, a block's product with them in two types and two temporaries;
    # the factors once more in float64 where new low-rank changes meet others.
    factors = rank * (unit.columns + (unit.stop - unit.start))
    return float32.memory(unit.columns, dense + 1, dense) + 3 * 8 * factors + 4 * 8 * rank * rows


def _evidence_memory(shapes: Mapping[str, tuple[int, int]], vectors: Sequence[TaskVector]) -> int:
    """Return what looking at the contacts takes: all factors of one tensor, and corners with all atoms, twice."""
    ranks = {name: sum(_rank(vector, name) for vector in vectors) for name in shapes}
    stacked = max((3 * 8 * ranks[name] * (rows + columns) for name, (rows, columns) in shapes.items()), default=0)
    corner = 8 * (LINES * LINES // 2) * (len(vectors) + 8)
    return stacked + 2 * min(CORNERS, len(shapes)) * corner


def _rank(vector: TaskVector, name: str) -> int:
    delta = vector.deltas.get(name)
    return delta.rank if isinstance(delta, LowRank) else 0


class Journal(Protocol):
    """Where the finished units of one pass are kept, so that a run that was stopped goes on from them."""

    @property
    def finished(self) -> Mapping[int, Products]:
        """The products of units that were finished before, by their place in the plan."""
        ...

    def keep(self, place: int, products: Products) -> None:
        """Keep the products of one more unit."""
        ...


class State(Protocol):
    """Keeps a journal for each pass of a run."""

    def journal(
        self, work: Plan, new: Sequence[TaskVector], known: Sequence[TaskVector], contacts: Collection[str]
    ) -> Journal:
        """Return the journal of the pass that `accumulate` is asked for with these arguments."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """One unit with all that computing it takes, and no more: on a cluster, this is what travels."""

    place: int
    unit: Unit
    new: Sequence[TaskVector]
    known: Sequence[TaskVector]
    leading: Sequence[TaskVector]
    kept: tuple[NDArray[np.intp], NDArray[np.intp]] | None
    elements: int
    device: str | None

    def run(self) -> tuple[int, Products]:
        products = unit_products(
            self.unit, self.new, self.known, self.leading, self.kept, elements=self.elements, device=self.device
        )
        return self.place, products

    def run_elsewhere(self) -> tuple[int, Products]:
        from threadpoolctl import threadpool_limits

        # Not taken back: that would change it under the worker's other threads.
        threadpool_limits(limits=1, user_api="blas")
        return self.run()


def accumulate(
    work: Plan,
    new: Sequence[TaskVector],
    known: Sequence[TaskVector],
    *,
    leading: Sequence[TaskVector] = (),
    contacts: Mapping[str, tuple[int, int]] | None = None,
    advance: Callable[[int], None] | None = None,
    state: State | None = None,
) -> dict[str, list[Products]]:
    """Compute the inner products of every unit of a plan.

    The units run on threads of this machine, or wherever `joblib.parallel_config` (or `unmerge.on_cluster`) sends them.

    Parameters
    ----------
    work : Plan
        From `plan`, with the same task vectors; its number of workers does not change the result.
    new, known : sequences of TaskVector
        See the module's notation. Give them in a fixed order (by digest) for results that are equal to the
        bit.
    leading : sequence of TaskVector
        Low-rank ones that are met in contacts alone, whose inner products are not wanted.
    contacts : mapping, optional
        The (rows, columns) of the tensors in which the contact of the last new task vector with all low-rank
        ones is wanted.
    advance : callable, optional
        Called with the number of parameters of each finished unit.
    state : State, optional
        Where finished units are kept; those that it has already are not computed again.

    Returns
    -------
    dict
        For each tensor its units' products, in row order.

    Raises
    ------
    TargetError
        If a new task vector holds a value that is not finite; the message says where.
    ClusterError
        If a cluster was lost, or lost one unit too often.
    """
    journal = state.journal(work, new, [*known, *leading], contacts or {}) if state and work.units else None
    finished = dict(journal.finished) if journal else {}
    for place in finished:
        if advance is not None:
            advance(work.units[place].count)
    # The largest first: at the end one worker waits for another, but for a small one.
    missing = sorted(set(range(len(work.units))) - finished.keys(), key=lambda place: (-work.units[place].count, place))
    for place, products in _computed(work, missing, new, known, leading, contacts or {}):
        finished[place] = products
        if journal is not None:
            journal.keep(place, products)
        if advance is not None:
            advance(work.units[place].count)
    found: dict[str, list[Products]] = {name: [] for name in work.sizes}
    for place, unit in enumerate(work.units):
        found[unit.name].append(finished[place])
    return found


def _computed(
    work: Plan,
    places: Iterable[int],
    new: Sequence[TaskVector],
    known: Sequence[TaskVector],
    leading: Sequence[TaskVector],
    contacts: Mapping[str, tuple[int, int]],
) -> Iterator[tuple[int, Products]]:
    """Yield the products of units as they are finished."""
    from threadpoolctl import threadpool_limits

    def task(place: int) -> _Task:
        unit = work.units[place]
        elements = 0 if work.float64 else work.sizes[unit.name]
        here = _in_tensor(new, unit), _in_tensor(known, unit), _in_tensor(leading, unit)
        kept = lines(unit.name, contacts[unit.name]) if unit.name in contacts else None
        return _Task(place, unit, *here, kept, elements, work.device)

    # One BLAS thread per worker: the sums of a threaded GEMM would depend on the number of cores.
    with threadpool_limits(limits=1, user_api="blas"):
        if "joblib" in sys.modules:
            yield from _by_joblib(map(task, places), work.workers)
        else:  # nobody has chosen another backend, and loading it takes a tenth of a second
            yield from as_finished(_Task.run, map(task, places), work.workers)


def _by_joblib(tasks: Iterable[_Task], workers: int) -> Iterator[tuple[int, Products]]:
    from joblib import Parallel, delayed
    from joblib.parallel import get_active_backend

    here = getattr(get_active_backend(prefer="threads")[0], "supports_sharedmem", False)
    run = _Task.run if here else _Task.run_elsewhere
    # One unit at a time: batches would leave a thread waiting for the last one.
    parallel = Parallel(n_jobs=workers, prefer="threads", return_as="generator_unordered", batch_size=1)
    yield from finished(parallel(delayed(run)(task) for task in tasks))


def _in_tensor(vectors: Sequence[TaskVector], unit: Unit) -> list[TaskVector]:
    """Return task vectors with the unit's tensor alone."""
    return [
        TaskVector(
            vector.name, vector.digest, {unit.name: vector.deltas[unit.name]} if unit.name in vector.deltas else {}
        )
        for vector in vectors
    ]


def unit_products(
    unit: Unit,
    new: Sequence[TaskVector],
    known: Sequence[TaskVector],
    leading: Sequence[TaskVector] = (),
    kept: tuple[NDArray[np.intp], NDArray[np.intp]] | None = None,
    *,
    elements: int = 0,
    device: str | None = None,
) -> Products:
    """Compute the inner products of one unit, and the last new one's contact if `kept` names lines of it.

    See `accumulate` for the `leading` ones.

    Large tensors, of so many `elements`, are computed in float32 where their types allow it; see `float32`, and
    `torch_blocks` for a `device`.
    """
    vectors = (*new, *known, *leading)
    deltas = [vector.deltas.get(unit.name) for vector in vectors]
    present = [delta for delta in deltas if delta is not None]
    meets_low_rank = kept is not None and isinstance(deltas[len(new) - 1], LowRank)
    if float32.applies(present, elements) and not meets_low_rank:
        return _float32_products(unit, new, known, leading, kept, TorchKernel(device) if device else float32)
    # Low-rank operands in the order of digests: the same bits in whatever order they were given.
    low = {i: _Factors.read(delta, unit) for i, delta in enumerate(deltas) if isinstance(delta, LowRank)}
    low = dict(sorted(low.items(), key=lambda item: vectors[item[0]].digest))
    dense = {i: delta for i, delta in enumerate(deltas) if delta is not None and i not in low}
    sums = _Sums.of(len(new), len(known))
    sums.add_low_rank(low)
    target = len(new) - 1
    others = [(vectors[i].digest, factors) for i, factors in low.items() if i != target]
    contact: Contact | None = None
    if kept is not None and target in low and others:
        contact = _low_rank_contact(low[target], others, unit, kept)
    if dense and any(i < len(new) for i in (*dense, *low)):
        stacked = np.concatenate([factors.right for factors in low.values()]) if low else None
        meeting = sums.meeting(dense, low, target if kept is not None else None)
        for start, stop in blocks(unit.start, unit.stop, unit.columns):
            lefts = {i: factors.left[start - unit.start : stop - unit.start] for i, factors in low.items()}
            read = {i: delta.block(start, stop) for i, delta in dense.items()}
            projected = sums.add_dense(read, lefts, stacked, meeting)
            if kept is not None and target in projected and others:
                part = _contact(read[target][0], projected[target], list(lefts.values()), others, start, kept)
                contact = part if contact is None else contact + part
    _check_finite(sums.gram, unit, new)
    return Products(sums.gram[: len(new)], sums.rounding, unit.count, contact)


def _float32_products(
    unit: Unit,
    new: Sequence[TaskVector],
    known: Sequence[TaskVector],
    leading: Sequence[TaskVector],
    kept: tuple[NDArray[np.intp], NDArray[np.intp]] | None,
    kernel: float32.Kernel,
) -> Products:
    """Compute what `unit_products` does, the dense changes in float32."""
    vectors = (*new, *known, *leading)
    deltas = sorted(
        ((i, delta) for i, vector in enumerate(vectors) if (delta := vector.deltas.get(unit.name)) is not None),
        key=lambda item: vectors[item[0]].digest,
    )
    low = {i: delta for i, delta in deltas if isinstance(delta, LowRank)}
    dense = {i: delta for i, delta in deltas if isinstance(delta, Difference)}
    sums = _Sums.of(len(new), len(known))
    if any(i < len(new) for i in low):
        sums.add_low_rank({i: _Factors.read(delta, unit) for i, delta in low.items()})
    contact: Contact | None = None
    target = len(new) - 1
    if dense and any(i < len(new) for i in (*dense, *low)):
        ranks = tuple((vectors[i].digest, delta.rank) for i, delta in low.items())
        pairs = [(i, j) for i in dense for j in dense if j <= i and sums.wanted(i, j)]
        meeting = sums.meeting(dense, low, target if kept is not None else None)
        size = sum(rank for _, rank in ranks) * (unit.stop - unit.start + unit.columns)
        with float32.lent("factors", size) as memory:
            stack = float32.Stack.read(low, unit.start, unit.stop, unit.columns, memory)
            apart = float32.Kept(target, kept[1]) if kept is not None and target in meeting else float32.NOTHING
            for block in kernel.blocks(dense, unit.start, unit.stop, unit.columns, pairs, apart):
                sums.add_block(block)
                for i in meeting:
                    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is told below
                        met = kernel.meet(block, i, stack, unit.start)
                        sums.add_met(i, met)
                        if kept is not None and i == target:
                            part = _float32_contact(met, block.kept, ranks, kept)
                            contact = part if contact is None else contact + part
    _check_finite(sums.gram, unit, new)
    return Products(sums.gram[: len(new)], sums.rounding, unit.count, contact)


def _float32_contact(
    met: float32.Meeting,
    values: NDArray[np.float32],
    ranks: tuple[tuple[str, int], ...],
    kept: tuple[NDArray[np.intp], NDArray[np.intp]],
) -> Contact:
    """Return the contact of the rows of one block; `values` are its kept columns."""
    rows, columns = kept
    inside = rows[(rows >= met.start) & (rows < met.start + len(met.left))]
    taken = inside - met.start
    return Contact(
        ranks,
        inside,
        columns,
        met.cores(),
        met.projected[taken],
        (met.left.T @ values) * met.stack.scales[:, np.newaxis],
        values[taken],
    )


def _contact(
    block: FloatArray,
    projected: FloatArray,
    lefts: Sequence[FloatArray],
    others: Sequence[tuple[str, _Factors]],
    start: int,
    kept: tuple[NDArray[np.intp], NDArray[np.intp]],
) -> Contact:
    """Return the contact of the rows of one block; `projected` is its product with the stacked right factors."""
    rows, columns = kept
    inside = rows[(rows >= start) & (rows < start + len(block))]
    left = np.concatenate(list(lefts), axis=1)
    taken = block[inside - start]
    return Contact(
        _ranks(others),
        inside,
        columns,
        _cores(left, projected, others),
        projected[inside - start].astype(np.float32),
        left.T @ block[:, columns],
        taken[:, columns].astype(np.float32),
    )


def _low_rank_contact(
    target: _Factors,
    others: Sequence[tuple[str, _Factors]],
    unit: Unit,
    kept: tuple[NDArray[np.intp], NDArray[np.intp]],
) -> Contact:
    """Return the contact of a low-rank target, which needs no block."""
    rows, columns = kept
    inside = rows[(rows >= unit.start) & (rows < unit.stop)]
    left = np.concatenate([factors.left for _, factors in others], axis=1)
    right = np.concatenate([factors.right for _, factors in others])
    taken = target.left[inside - unit.start]
    projected = target.left @ (target.right @ right.T)
    return Contact(
        _ranks(others),
        inside,
        columns,
        _cores(left, projected, others),
        projected[inside - unit.start].astype(np.float32),
        (left.T @ target.left) @ target.right[:, columns],
        (taken @ target.right[:, columns]).astype(np.float32),
    )


def _ranks(others: Sequence[tuple[str, _Factors]]) -> tuple[tuple[str, int], ...]:
    return tuple((digest, len(factors.right)) for digest, factors in others)


def _cores(left: FloatArray, projected: FloatArray, others: Sequence[tuple[str, _Factors]]) -> FloatArray:
    """Return L_j' (V R_j') of every change, one below the other."""
    ranks = [len(factors.right) for _, factors in others]
    cores = np.zeros((sum(ranks), max(ranks)))
    start = 0
    for rank in ranks:
        stop = start + rank
        cores[start:stop, :rank] = left[:, start:stop].T @ projected[:, start:stop]
        start = stop
    return cores


@dataclass(frozen=True, slots=True, eq=False)
class _Factors:
    """The factors of one low-rank change in one unit, the scale multiplied into the left one."""

    left: FloatArray
    right: FloatArray

    @classmethod
    def read(cls, delta: LowRank, unit: Unit) -> _Factors:
        return cls(delta.left(unit.start, unit.stop) * delta.scale, delta.right())


@dataclass(frozen=True, slots=True, eq=False)
class _Sums:
    """Products of one unit while its blocks are read; the first `len(rounding)` vectors are new."""

    gram: FloatArray
    rounding: FloatArray

    @classmethod
    def of(cls, new: int, known: int) -> _Sums:
        return cls(np.zeros((new + known, new + known)), np.zeros(new))

    def wanted(self, i: int, j: int) -> bool:
        """Tell whether one of two task vectors is new, and both are more than met."""
        return min(i, j) < len(self.rounding) and max(i, j) < len(self.gram)

    def meeting(self, dense: Collection[int], low: Collection[int], target: int | None) -> list[int]:
        """Return the dense changes whose products with the low-rank ones are wanted, for sums or for a contact."""
        return [i for i in dense if (i == target and low) or any(self.wanted(i, j) for j in low)]

    def _add(self, i: int, j: int, value: float) -> None:
        self.gram[i, j] += value
        if i != j:
            self.gram[j, i] += value

    def add_low_rank(self, low: Mapping[int, _Factors]) -> None:
        """Add the products between low-rank changes, which need no block."""
        ordered = list(low.items())
        for position, (i, p) in enumerate(ordered):
            for j, q in ordered[position:]:
                if self.wanted(i, j):
                    # <L_p R_p, L_q R_q> = sum of (L_p' L_q) * (R_p R_q'): two thin products, r x r work.
                    self._add(i, j, float(np.sum((p.left.T @ q.left) * (p.right @ q.right.T))))

    def add_block(self, block: float32.Block) -> None:
        """Add a block's products between dense changes."""
        for i, energy in block.rounding.items():
            if i < len(self.rounding):
                self.rounding[i] += energy
        for (i, j), product in block.products.items():
            self._add(i, j, product)

    def add_met(self, i: int, met: float32.Meeting) -> None:
        """Add a block's products of a dense change with low-rank ones."""
        for j, product in met.products().items():
            if self.wanted(i, j):
                self._add(i, j, product)

    def add_dense(
        self,
        dense: Mapping[int, tuple[FloatArray, float]],
        lefts: Mapping[int, FloatArray],
        stacked: FloatArray | None,
        meeting: Collection[int],
    ) -> dict[int, FloatArray]:
        """Add one block's products between dense changes, and of dense with low-rank ones.

        Returns
        -------
        dict
            Of each dense change that meets a low-rank one, its product with the stacked right factors.
        """
        products: dict[int, FloatArray] = {}
        for i, (block, energy) in dense.items():
            if i < len(self.rounding):
                self.rounding[i] += energy
            for j, (other, _) in dense.items():
                if j <= i and self.wanted(i, j):
                    self._add(i, j, float(np.vdot(block, other)))
            if stacked is None or i not in meeting:
                continue
            # <L_j R_j, V> = <L_j, V R_j'>: one GEMM with all right factors stacked, then thin products.
            projected = products[i] = block @ stacked.T
            column = 0
            for j, left in lefts.items():
                end = column + left.shape[1]
                if self.wanted(i, j):
                    self._add(i, j, float(np.sum(left * projected[:, column:end])))
                column = end
        return products


def _check_finite(gram: FloatArray, unit: Unit, new: Sequence[TaskVector]) -> None:
    for i, vector in enumerate(new):
        if not np.isfinite(gram[i, i]):
            raise TargetError(_locate(vector, unit))


def _locate(vector: TaskVector, unit: Unit) -> str:
    for start, stop in blocks(unit.start, unit.stop, unit.columns):
        values, _ = vector.deltas[unit.name].block(start, stop)
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            row, column = (int(index) for index in bad[0])
            what = "NaN" if np.isnan(values[row, column]) else "Inf"
            return (
                f"{vector.name}: tensor {unit.name!r} has {what} at row {start + row}, column {column} "
                "(in it or in the base): not a usable model"
            )
    return f"{vector.name}: tensor {unit.name!r} is so large that its energy overflows: not a usable model"


def total(products: Sequence[Products]) -> Products:
    """Add products in the given order.

    Raises
    ------
    ValueError
        If there is nothing to add.
    """
    if not products:
        raise ValueError("nothing to add")
    result = products[0]
    for item in products[1:]:
        result = result + item
    return result

"""The regression of a target on a dictionary: one `Statistics` per tensor, from one pass over the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from unmerge.accumulate import Contact, Plan, Products, State, accumulate, plan, total
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.checkpoint.source import Source
from unmerge.completion import Gap, alone, complete, possible, proportions
from unmerge.compress import compressed_statistics, select_top_k
from unmerge.dictionary import Atom, Base, Dictionary, Start, join
from unmerge.directions import directions, is_low_rank, told_apart
from unmerge.errors import AlignmentError, DictionaryError, TargetError
from unmerge.statistics import Statistics
from unmerge.task_vector import LowRank, TaskVector


@dataclass(frozen=True, slots=True, eq=False)
class TensorStatistics:
    """The statistics of one tensor.

    Attributes
    ----------
    name : str
        The base's name of the tensor.
    statistics : Statistics
        Over the whole tensor; its energies are estimates if the tensor was sampled.
    read : int
        Parameters that were read; fewer than ``statistics.count`` if the tensor was sampled.
    energy_error : float
        Standard error of the energy from sampling, in squared weight units; 0 if read whole.
    touched : bool
        Whether an atom changes the tensor.
    """

    name: str
    statistics: Statistics
    read: int
    energy_error: float
    touched: bool


@dataclass(frozen=True, slots=True, eq=False)
class Unopened:
    """An atom that was compared by its sketch alone.

    Attributes
    ----------
    name, kind, digest, source
        As of `unmerge.dictionary.Record`.
    energy : float
        Of its change in the tensors that were compared, in squared weight units.
    coefficient : float
        What least squares gives it in the sketch, beside the atoms that show there; of any sign.
    error : float
        Its standard error; infinite if nothing is known.
    freedom : float
        Degrees of freedom of the error.
    values : int
        Values in the sketch.
    """

    name: str
    kind: Literal["adapter", "checkpoint"]
    digest: str
    source: Source
    energy: float
    coefficient: float
    error: float
    freedom: float
    values: int


@dataclass(frozen=True, slots=True, eq=False)
class Regression:
    """A target's statistics against all atoms.

    Attributes
    ----------
    atoms : tuple of Atom
        In the order of the statistics: by digest.
    tensors : tuple of TensorStatistics
        Sorted by name.
    coordinates : str
        Which parameters were compared, in words.
    unit_memory : int
        Bytes that one thread of the pass held at once, at most.
    contacts : mapping of str to Contact
        How the target meets the atoms in the tensors that low-rank changes touch; empty if not asked for.
    directions : tuple of TaskVector
        The low-rank changes of the contacts, in the order of the atoms: an adapter's own, and the leading
        singular directions of a full checkpoint.
    rows : mapping of str to int
        Rows that were compared of each tensor.
    unopened : tuple of Unopened
        Further atoms of the dictionary, of which a sketch was compared and nothing seen.
    seen : tuple of TensorStatistics
        Sorted by name; of full checkpoints as they were seen: of their leading directions. Empty where none was
        answered from those.
    gaps : mapping of str to Gap
        What is known beyond the directions of a tensor.
    """

    atoms: tuple[Atom, ...]
    tensors: tuple[TensorStatistics, ...]
    coordinates: str
    unit_memory: int
    contacts: Mapping[str, Contact]
    directions: tuple[TaskVector, ...]
    rows: Mapping[str, int]
    unopened: tuple[Unopened, ...] = ()
    seen: tuple[TensorStatistics, ...] = ()
    gaps: Mapping[str, Gap] = field(default_factory=dict)

    @property
    def candidates(self) -> int:
        """How many atoms may be accused: those of the statistics, and the unopened ones."""
        return len(self.atoms) + len(self.unopened)

    @property
    def total(self) -> Statistics:
        """Statistics over all compared tensors."""
        return add(self.tensors, len(self.atoms))

    @property
    def measured(self) -> tuple[TensorStatistics, ...]:
        """What tells how much tensors disagree: what was seen, not what was completed from it."""
        if not self.gaps:
            return self.tensors
        return self._from_seen(alone, _proportions(self))

    def completed_by(self, weights: FloatArray) -> Regression:
        """Return it with what directions lack taken to be there in these proportions, shape (K,).

        Weights that are known better than what was seen determines them make a better estimate of what is left.
        """
        if not self.gaps:
            return self
        return replace(self, tensors=self._from_seen(complete, weights))

    def _from_seen(
        self, change: Callable[[Statistics, Gap, FloatArray], Statistics], weights: FloatArray
    ) -> tuple[TensorStatistics, ...]:
        return tuple(
            replace(tensor, statistics=change(tensor.statistics, self.gaps[tensor.name], weights))
            if tensor.name in self.gaps
            else tensor
            for tensor in self.seen
        )


def add(tensors: Sequence[TensorStatistics], atoms: int) -> Statistics:
    """Add the statistics of tensors in the given order."""
    result = Statistics.zero(atoms)
    for tensor in tensors:
        result = result + tensor.statistics
    return result


def regress(
    target: TaskVector,
    rows: Mapping[str, int],
    dictionary: Dictionary,
    extra: Sequence[Atom],
    base: Base,
    *,
    exact: bool = False,
    top_k: int | None = None,
    contacts: bool = False,
    float64: bool = False,
    device: str | None = None,
    workers: int = 1,
    start: Start | None = None,
    state: State | None = None,
) -> Regression:
    """Compute the statistics of a target against known atoms and extra ones.

    Parameters
    ----------
    target : TaskVector
        What is to be explained.
    rows : mapping
        Rows to compare of every tensor that can be compared, whether the target changes it or not.
    dictionary : Dictionary
        Atoms whose inner products are known.
    extra : sequence of Atom
        Further atoms.
    exact : bool
        Read the tensors that no atom changes whole; otherwise the large ones are sampled. (Atoms with `energies` are
        read by their directions either way.)
    top_k : int, optional
        Use the paper's coordinates, this many, instead of all parameters.
    contacts : bool
        Keep what evidence of presence needs; not with `top_k`.
    float64 : bool
        Compute large tensors in float64 too, not in float32.
    device : str, optional
        Compute large tensors on this device of torch; see `torch_blocks.check_device`.
    state : State, optional
        Where finished units are kept; not with `top_k`.

    Raises
    ------
    TargetError, DictionaryError, AlignmentError
        If the target equals the base or holds values that are not finite, an atom changes nothing that
        can be compared, or the atoms and the target share no tensor.
    """
    atoms = tuple(sorted((*dictionary.atoms, *extra), key=lambda atom: (atom.vector.digest, atom.name)))
    touched = {name for atom in atoms for name in atom.changed} & rows.keys()
    if not touched:
        raise AlignmentError(f"{target.name}: has none of the tensors that the atoms change; nothing to compare")
    if top_k is not None:
        return _compressed(target, rows, atoms, base, top_k)
    shapes = {name: (count, base.shapes.get(name, (0, 0))[1]) for name, count in rows.items()}
    shapes = {name: shape if shape[1] else target.deltas[name].shape for name, shape in shapes.items()}
    read = {atom.name: _as_read(atom) for atom in atoms}
    low_rank = tuple(_low_rank(read[atom.name], workers) for atom in atoms) if contacts else ()
    known, others = _split_known(dictionary, read)
    new = (*others, *(read[atom.name] for atom in extra))
    pass_ = _Pass(
        target, known, new, tuple(read[atom.name] for atom in atoms), low_rank, workers, float64, device, state
    )
    grams, energies, met, work = pass_.run(shapes, touched, base, exact=exact, start=start)
    tensors = tuple(
        _tensor(name, grams[name], energies.get(name, []), shapes[name], work, name in touched)
        for name in sorted(grams)
    )
    gaps = _gaps(tensors, dictionary, atoms, base)
    result = Regression(atoms, tensors, "all parameters", work.unit_memory, met, low_rank, rows)
    if gaps:
        result = replace(result, seen=tensors, gaps=gaps)
        result = result.completed_by(_proportions(result))
    check(result, target)
    return result


def _as_read(atom: Atom) -> Atom:
    """Return an atom as the pass reads it: by its directions, if it is to be answered from those."""
    if atom.energies is None or atom.directions is None:
        return atom
    return replace(atom, vector=told_apart(atom.directions))


def _split_known(dictionary: Dictionary, read: Mapping[str, Atom]) -> tuple[Dictionary, tuple[Atom, ...]]:
    """Return the atoms whose inner products hold for what the pass reads of them, and the others."""
    places = [place for place, atom in enumerate(dictionary.atoms) if read[atom.name] is atom]
    if len(places) == len(dictionary.atoms):
        return dictionary, ()
    chosen = np.asarray(places, dtype=np.intp)
    gram = {name: matrix[np.ix_(chosen, chosen)] for name, matrix in dictionary.gram.items()}
    others = tuple(read[atom.name] for atom in dictionary.atoms if read[atom.name] is not atom)
    return Dictionary(tuple(dictionary.atoms[place] for place in places), gram), others


def _gaps(
    tensors: Sequence[TensorStatistics], dictionary: Dictionary, atoms: Sequence[Atom], base: Base
) -> dict[str, Gap]:
    """Return what is known of each tensor beyond what was read, where atoms were read by their directions.

    Where no product is known, what directions lack is taken to be orthogonal to all other atoms.
    """
    kept = [place for place, atom in enumerate(atoms) if atom.energies is not None]
    by_name = {atom.name: place for place, atom in enumerate(atoms)}
    places = np.array([by_name[atom.name] for atom in dictionary.atoms], dtype=np.intp)
    inside = np.ix_(places, places)
    involved = np.isin(places, kept)
    shapes, found = base.shapes if kept else {}, {}
    for tensor in tensors:
        name, seen = tensor.name, tensor.statistics
        energies = {place: (atoms[place].energies or {}).get(name, 0.0) for place in kept}
        if not any(energies.values()):
            continue
        rows, columns = shapes.get(name, (0, 0))
        missing, shown = np.zeros_like(seen.gram), seen.gram.copy()
        if rows * columns > seen.count:
            # The target has fewer rows than the products are of: a part of the energies, and no product.
            part = seen.count / (rows * columns)
            lacking = {place: part * (energy - _energy(atoms[place], name)) for place, energy in energies.items()}
        else:
            if name in dictionary.gram:
                either = involved[:, np.newaxis] | involved
                missing[inside] = np.where(either, dictionary.gram[name] - seen.gram[inside], 0.0)
                whole = np.where(either, dictionary.gram[name], seen.gram[inside])
                # Of adapters alone there are no others.
                of_directions = dictionary.shown.get(name, dictionary.gram[name])
                shown[inside] = np.where(involved[:, np.newaxis], of_directions, whole)
            lacking = {place: energy - seen.gram[place, place] for place, energy in energies.items()}
        for place, energy in lacking.items():
            missing[place, place] = max(0.0, energy)
        found[name] = Gap(possible(seen.gram, missing), shown)
    return found


def _energy(atom: Atom, name: str) -> float:
    """Return the energy of an atom's directions in one tensor, in squared weight units."""
    delta = atom.directions.deltas.get(name) if atom.directions else None
    if not isinstance(delta, LowRank):
        return 0.0
    left, right = delta.left(0, delta.shape[0]) * delta.scale, delta.right()
    return float(np.sum((left.T @ left) * (right @ right.T)))


def _proportions(regression: Regression) -> FloatArray:
    """Return what was seen of the atoms' coefficients over the whole model."""
    size = len(regression.atoms)
    seen = [tensor for tensor in regression.seen if tensor.touched]
    products = np.zeros((size, size))
    for tensor in seen:
        gap = regression.gaps.get(tensor.name)
        products += tensor.statistics.gram if gap is None else gap.shown
    return proportions(add(seen, size), products)


@dataclass(frozen=True, slots=True, eq=False)
class _Pass:
    """One pass over the files."""

    target: TaskVector
    dictionary: Dictionary
    extra: Sequence[Atom]
    atoms: Sequence[Atom]
    directions: Sequence[TaskVector]
    workers: int
    float64: bool
    device: str | None
    state: State | None

    def run(
        self,
        shapes: Mapping[str, tuple[int, int]],
        touched: set[str],
        base: Base,
        *,
        exact: bool,
        start: Start | None,
    ) -> tuple[dict[str, Statistics], dict[str, list[Products]], dict[str, Contact], Plan]:
        extra = sorted(self.extra, key=lambda atom: (atom.vector.digest, atom.name))
        new = [*(atom.vector for atom in extra), self.target]
        known = self.dictionary.vectors
        # Where the target has fewer rows than the base, the stored products cover too much.
        cut = {name for name in touched if shapes[name][0] < base.shapes.get(name, (0, 0))[0]} if known else set()
        changed = {name for vector in new for name in vector.deltas} & shapes.keys()
        # Leading directions of full checkpoints: the target's contact with them is wanted, no inner product.
        own = {atom.vector.digest for atom in self.atoms}
        leading = [vector for vector in self.directions if vector.digest not in own]
        wanted = self._contacts(changed, shapes)
        sample = set() if exact else changed - touched
        work = plan(
            {name: shapes[name] for name in changed - cut},
            (*new, *known, *leading),
            sample=sample,
            contacts=wanted,
            workers=self.workers,
            float64=self.float64,
            device=self.device,
        )
        redo = plan(
            {name: shapes[name] for name in cut},
            (*new, *known, *leading),
            contacts=wanted,
            workers=self.workers,
            float64=self.float64,
            device=self.device,
        )
        both = Plan(
            work.units + redo.units,
            work.sizes,
            work.sampled,
            max(work.unit_memory, redo.unit_memory),
            self.workers,
            work.kept_memory + redo.kept_memory,
            self.float64,
            self.device,
        )
        advance = start(both) if start else None
        everything = [*known, *new]
        found = accumulate(work, new, known, leading=leading, contacts=wanted, advance=advance, state=self.state)
        again = accumulate(redo, everything, [], leading=leading, contacts=wanted, advance=advance, state=self.state)
        met = {name: total(units).contact for name, units in (*found.items(), *again.items()) if name in wanted}
        found, again = (_without_contact(products) for products in (found, again))
        order = _order([*self.dictionary.atoms, *extra], self.atoms)
        grams = {name: _split(None, total(units), order) for name, units in again.items()}
        for name in sorted(touched - cut):
            units = found.get(name)
            products = total(units) if units else _nothing(len(new), len(everything))
            grams[name] = _split(self.dictionary.gram.get(name), products, order)
        for name in sorted(changed - touched):
            grams[name] = _split(None, total(found[name]), order)
        return grams, found, {name: contact for name, contact in sorted(met.items()) if contact}, both

    def _contacts(self, changed: set[str], shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        met = {
            name for vector in self.directions for name, delta in vector.deltas.items() if isinstance(delta, LowRank)
        }
        return {name: shapes[name] for name in sorted(met & changed & self.target.deltas.keys())}


def _low_rank(atom: Atom, workers: int) -> TaskVector:
    """Return the atom if it is low-rank in every matrix, or its leading directions."""
    vector = atom.vector
    if is_low_rank(vector):
        return vector
    found = atom.directions or directions(vector, workers=workers)
    return told_apart(found)


def _without_contact(found: Mapping[str, list[Products]]) -> dict[str, list[Products]]:
    return {name: [replace(unit, contact=None) for unit in units] for name, units in found.items()}


def _nothing(new: int, vectors: int) -> Products:
    return Products(np.zeros((new, vectors)), np.zeros(new), 0)


def _order(found: Sequence[Atom], wanted: Sequence[Atom]) -> list[int]:
    places = {atom.name: place for place, atom in enumerate(found)}
    return [places[atom.name] for atom in wanted]


def _split(known: FloatArray | None, products: Products, order: Sequence[int]) -> Statistics:
    """Split the Gram matrix of atoms and target, the target last, into statistics in the atoms' order."""
    gram = join(known, products.gram)
    places = np.asarray(order, dtype=np.intp)
    return Statistics(
        gram[np.ix_(places, places)],
        gram[places, -1].copy(),
        float(gram[-1, -1]),
        float(products.rounding[-1]),
        products.count,
    )


def _tensor(
    name: str,
    statistics: Statistics,
    units: Sequence[Products],
    shape: tuple[int, int],
    work: Plan,
    touched: bool,
) -> TensorStatistics:
    size = shape[0] * shape[1]
    read = statistics.count
    if statistics.energy == 0.0:  # equal to the base, which was not rounded again
        statistics = replace(statistics, rounding=0.0)
    if name not in work.sampled:
        return TensorStatistics(name, replace(statistics, count=size), read or size, 0.0, touched)
    scale = size / read
    means = np.array([float(unit.gram[-1, len(unit.gram) - 1]) / unit.count for unit in units])
    error = size * float(np.std(means, ddof=1)) / np.sqrt(len(means)) * np.sqrt(1.0 - read / size)
    scaled = replace(statistics, energy=statistics.energy * scale, rounding=statistics.rounding * scale, count=size)
    return TensorStatistics(name, scaled, read, float(error), touched)


def _compressed(
    target: TaskVector, rows: Mapping[str, int], atoms: Sequence[Atom], base: Base, top_k: int
) -> Regression:
    vectors = [atom.vector for atom in atoms]
    shapes = {name: (count, base.shapes[name][1]) for name, count in rows.items() if name in base.shapes}
    try:
        selection = select_top_k(vectors, shapes, top_k)
    except ValueError as error:
        raise DictionaryError(str(error)) from error
    found = compressed_statistics(vectors, target, selection, shapes)
    tensors = tuple(
        TensorStatistics(name, statistics, statistics.count, 0.0, touched=True)
        for name, statistics in sorted(found.items())
    )
    words = f"top {selection.count:,} by max |d_i|, digest {selection.digest[:16]}"
    result = Regression(tuple(atoms), tensors, words, 0, {}, (), rows)
    check(result, target)
    return result


def check(result: Regression, target: TaskVector) -> None:
    """Refuse a regression that says nothing.

    Raises
    ------
    TargetError, DictionaryError
        If the target equals the base, or an atom changes nothing, in all that was compared.
    """
    statistics = result.total
    if statistics.energy == 0.0:
        read = sum(tensor.read for tensor in result.tensors)
        message = (
            f"{target.name}: equal to the base in every one of the {read:,} parameters compared "
            f"({len(result.tensors)} tensors): the merge did nothing"
        )
        raise TargetError(message)
    for atom, energy in zip(result.atoms, np.diag(statistics.gram), strict=True):
        if energy == 0.0:
            message = (
                f"{atom.name}: changes nothing in the tensors compared: a zero adapter (was it trained?), or "
                "equal to the base; leave it out"
            )
            raise DictionaryError(message)

"""From large dictionaries to the few atoms that a target can hold: only those are opened."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from unmerge.checkpoint.source import split_name
from unmerge.dictionary import (
    Atom,
    Base,
    Dictionary,
    Record,
    check_names,
    is_dictionary,
    open_atom,
    open_dictionary,
    read_records,
)
from unmerge.errors import DictionaryError
from unmerge.findings import RELATED
from unmerge.regression import Unopened
from unmerge.screening import Screen, Sketched, screen
from unmerge.sketch import Layout, Sketches, sketch, stack
from unmerge.task_vector import TaskVector

LARGE = 64
"""Atoms in dictionaries up to which all are opened for every target."""


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """The atoms to compare a target with.

    Attributes
    ----------
    dictionary : Dictionary
        Opened atoms with inner products.
    extra : tuple of Atom
        Further opened atoms.
    unopened : tuple of Unopened
        Those in which the screen saw nothing that would need a closer look.
    notices : tuple of str
        What a user should know about the choice.
    """

    dictionary: Dictionary
    extra: tuple[Atom, ...]
    unopened: tuple[Unopened, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def atoms(self) -> tuple[Atom, ...]:
        """All opened atoms."""
        return (*self.dictionary.atoms, *self.extra)


@dataclass(frozen=True, slots=True, eq=False)
class Shelf:
    """What was named as atoms, before any target is seen.

    Attributes
    ----------
    base : Base
    paths : tuple of Path
        Dictionaries.
    records : tuple of Record
        Of all of their atoms.
    extra : tuple of Atom
        Atoms that were given alone.
    large : _Large or None
        What is known of all atoms without opening them; None if there are so few that all are opened.
    elements : bool
        Whether full checkpoints in dictionaries are opened to be read, not answered from what is kept of them.
    allow_pickle : bool
    """

    base: Base
    paths: tuple[Path, ...]
    records: tuple[Record, ...]
    extra: tuple[Atom, ...]
    large: _Large | None
    elements: bool
    allow_pickle: bool

    @classmethod
    def of(
        cls,
        references: Sequence[str],
        base: Base,
        *,
        whole: bool = False,
        elements: bool = False,
        sampled: bool = False,
        allow_pickle: bool = False,
    ) -> Shelf:
        """Look at what was named as atoms; atoms of large dictionaries are not opened.

        Parameters
        ----------
        whole : bool
            All atoms will be wanted, however many there are.
        elements : bool
            Full checkpoints in dictionaries will be read, so they must be there as they were added.
        sampled : bool
            Only parts of them will be read; see `open_atom`.

        Raises
        ------
        UnmergeError
            If there are none, two have one name, or one cannot be used.
        """
        if not references:
            raise DictionaryError("no atoms were given; name at least one adapter, checkpoint or dictionary")
        places = {reference: Path(split_name(reference)[1]) for reference in references}
        paths = tuple(path for path in places.values() if is_dictionary(path))
        extra = tuple(
            open_atom(reference, base, sampled=sampled, allow_pickle=allow_pickle)
            for reference in references
            if places[reference] not in paths
        )
        records = tuple(record for path in paths for record in read_records(path, base))
        check_names([*(record.name for record in records), *(atom.name for atom in extra)])
        large = None if whole or len(records) <= LARGE else _Large.of(records, extra, base)
        return cls(base, paths, records, extra, large, elements, allow_pickle)

    def choose(self, target: TaskVector, rows: Mapping[str, int], *, signed: bool = False) -> Chosen:
        """Open all atoms, or those of a large dictionary that the target can hold.

        Parameters
        ----------
        rows : mapping
            Rows to compare of every tensor that can be compared.
        signed : bool
            Whether a negative coefficient counts.
        """
        if self.large is None:
            return self.open_all()
        found = self.large.screen(target, rows, self.base, signed=signed)
        chosen = self._opened({self.large.known[place].name for place in found.kept})
        said = (*self.large.notices(found), *chosen.notices)
        return replace(chosen, unopened=self.large.unopened(found, rows), notices=said)

    def open_all(self) -> Chosen:
        """Open all atoms, however many there are."""
        return self._opened(None)

    def _opened(self, names: Collection[str] | None) -> Chosen:
        """Open the named atoms of all dictionaries; inner products are known in the first one."""
        opened = [
            open_dictionary(path, self.base, names, kept=not self.elements, allow_pickle=self.allow_pickle)
            for path in self.paths
        ]
        first = opened[0] if opened else Dictionary((), {})
        others = (atom for found in opened[1:] for atom in (*found.atoms, *found.beyond))
        extra = (*first.beyond, *others, *self.extra)
        return Chosen(replace(first, beyond=()), extra, notices=_kept_notices((*first.atoms, *extra)))


def _kept_notices(atoms: Sequence[Atom]) -> tuple[str, ...]:
    """Tell which full checkpoints were answered from what a dictionary keeps of them."""
    kept = sorted(atom.name for atom in atoms if atom.energies is not None)
    lost = sorted(atom.name for atom in atoms if atom.lost)
    found = []
    if kept:
        what = "1 full checkpoint was" if len(kept) == 1 else f"{len(kept):,} full checkpoints were"
        found.append(f"{what} compared in the leading directions that a dictionary keeps; --exact reads all")
    if lost:
        found.append(f"not there as added to the dictionary, which answered alone: {', '.join(lost)}")
    return tuple(found)


@dataclass(frozen=True, slots=True, eq=False)
class _Large:
    """Atoms of large dictionaries, and those beside them, by digest: records and sketches.

    Attributes
    ----------
    known : tuple of Record or Atom
        Atoms were given alone, and are always looked at closely.
    sketches : Sketches
    """

    known: tuple[Record | Atom, ...]
    sketches: Sketches

    @classmethod
    def of(cls, records: Sequence[Record], extra: Sequence[Atom], base: Base) -> _Large:
        layout = Layout.of(base.shapes)
        every: list[Record | Atom] = [*records, *extra]
        known = sorted(every, key=lambda item: (_digest(item), item.name))
        found = stack([sketch(it.vector, layout) if isinstance(it, Atom) else it.sketch for it in known], layout)
        return cls(tuple(known), found)

    def screen(self, target: TaskVector, rows: Mapping[str, int], base: Base, *, signed: bool) -> Screen:
        """Find the atoms that are worth a closer look."""
        from threadpoolctl import threadpool_limits

        if not len(self.sketches.held):
            raise DictionaryError("no atom changes a matrix, so they cannot be told apart; give --exact")
        change, seen = self.sketches.target(target.deltas, rows)
        atoms, beside = self.sketches.values, self.sketches.base(base.checkpoint.tensors)
        if not seen.all():
            atoms, change, beside = atoms * seen, change * seen, beside * seen
        wanted = [place for place, item in enumerate(self.known) if isinstance(item, Atom)]
        problem = Sketched(atoms, change, beside, self.sketches.parts)
        # Threaded sums would depend on the number of cores, and threads that wait for small products cost time.
        with threadpool_limits(limits=1, user_api="blas"):
            return screen(problem, RELATED, wanted=wanted, signed=signed)

    def unopened(self, found: Screen, rows: Mapping[str, int]) -> tuple[Unopened, ...]:
        """Return what is known of the atoms that are not looked at closely."""
        compared = [name in rows for name in self.sketches.layout.shapes]
        energies = self.sketches.energies[:, :-1][:, compared].sum(axis=1)
        return tuple(
            Unopened(
                name=item.name,
                kind=item.kind,
                digest=item.digest,
                source=item.source,
                energy=float(energies[place]),
                coefficient=float(found.coefficients[place]),
                error=float(found.errors[place]),
                freedom=float(found.freedom[place]),
                values=found.values,
            )
            for place, item in enumerate(self.known)
            if isinstance(item, Record) and place not in found.kept
        )

    def notices(self, found: Screen) -> tuple[str, ...]:
        """Tell what was looked at."""
        said = f"of {len(self.known):,} atoms, {len(found.kept):,} were compared on all parameters"
        if found.crowded:
            return (f"{said}; more showed signs in their sketches: look at those alone, or give --exact",)
        return (f"{said}; the others showed nothing in sketches of {found.values:,} values",)


def _digest(item: Record | Atom) -> str:
    return item.digest if isinstance(item, Record) else item.vector.digest

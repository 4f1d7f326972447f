"""Dictionaries of known task vectors, in memory and on disk.

A dictionary keeps what can be computed once: digests, the base's fingerprint, a sketch of each atom, the leading
directions of full checkpoints; and the inner products between its first atoms, tensor by tensor. Adding an atom
computes its row and touches no other; one that is added after `PRODUCTS` others has no row, and no other is read.

On disk it is a folder::

    manifest.json               schema, base, atoms in the order in which they were added
    atoms/NAME/                 a copy of each adapter; full checkpoints stay where they are
    directions/NAME.safetensors leading directions of each full checkpoint: two F32 factors per tensor
    sketch/NAME.safetensors     a few values of what each atom changes, and its energy in each tensor
    gram/NAME.safetensors       products of this atom with those before it and itself, one vector per tensor; of the
                                first atoms alone
    shown/NAME.safetensors      the same of its directions with those atoms, and of it with their directions: two
                                vectors; where one of them is a full checkpoint

The manifest is written last and by renaming, so a half-written dictionary is never seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from unmerge import fingerprint
from unmerge.accumulate import Plan, State, accumulate, plan, total
from unmerge.alignment import align
from unmerge.checkpoint.adapter import Adapter, is_adapter, open_adapter
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.checkpoint.header import read_header
from unmerge.checkpoint.reader import Checkpoint, open_checkpoint, read_json
from unmerge.checkpoint.source import Source, resolve, split_name
from unmerge.checkpoint.tensor import matrix_shape, values
from unmerge.directions import directions, is_low_rank, told_apart
from unmerge.errors import CheckpointError, DictionaryError, UnmergeError
from unmerge.journal import StateFolder, atom_digest
from unmerge.sketch import Layout, Sketch, Sketches, sketch, stack
from unmerge.task_vector import Delta, LowRank, TaskVector, adapter_deltas, checkpoint_deltas

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

SCHEMA = "unmerge/dictionary/4"
MANIFEST = "manifest.json"
PRODUCTS = 128
"""Atoms of a dictionary whose inner products are kept: the first ones. A row for each of a thousand would be read by
every answer and computed with every addition, and a target needs those of few."""
NEEDS_CHECKPOINTS = (
    "--exact, --top-k, --precision, --budget, --extract, recipes and additions need the checkpoints of a dictionary"
)
"""What a checkpoint's directions are not enough for."""
_LATER = ""
"""Digest of an adapter that is not yet known: it is computed while the adapter is sketched."""
_AT_ONCE = 1 << 26
"""Bytes that are hashed in one call."""
_NAME = re.compile(r"[\w+-][\w.+-]*$")

Start = Callable[[Plan], Callable[[int], None]]
"""Told the plan before work starts; returns what is called as units finish (progress bars)."""


@dataclass(frozen=True, eq=False)
class Base:
    """The base model: where it was found, its tensors and its fingerprint."""

    source: Source
    checkpoint: Checkpoint
    digest: str

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """The (rows, columns) of each tensor."""
        return {name: matrix_shape(tensor.shape) for name, tensor in self.checkpoint.tensors.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Atom:
    """A known fine-tune.

    Attributes
    ----------
    vector : TaskVector
        What it changed.
    source : Source
        Where it was found.
    kind : str
        ``"adapter"`` or ``"checkpoint"``.
    directions : TaskVector or None
        The leading directions of what it changed, as low-rank changes; None where they were not computed. Of an
        adapter in a dictionary, they are `vector` itself if it is low-rank in every matrix, else None.
    energies : mapping of str to float, or None
        Of a full checkpoint that is to be answered from what a dictionary keeps of it: the energy of its change in
        each tensor, in squared weight units. Its directions are then read in its place; None where it is read itself.
    lost : bool
        Whether its checkpoint is not there as it was added, so that `vector` holds the directions alone.
    """

    vector: TaskVector
    source: Source
    kind: Literal["adapter", "checkpoint"]
    directions: TaskVector | None = None
    energies: Mapping[str, float] | None = None
    lost: bool = False

    @property
    def name(self) -> str:
        """What users call it."""
        return self.vector.name

    @property
    def changed(self) -> Collection[str]:
        """The tensors that it changes, or may change."""
        return self.vector.deltas.keys() if self.energies is None else self.energies.keys()


@dataclass(frozen=True, slots=True, eq=False)
class Dictionary:
    """Atoms and the inner products between them.

    Attributes
    ----------
    atoms : tuple of Atom
        In the order of the Gram matrices.
    gram : mapping
        Tensor name to the (K, K) Gram matrix of the atoms in it, in squared weight units; tensors that no
        atom changes are absent.
    beyond : tuple of Atom
        Further atoms, whose inner products are not kept.
    shown : mapping
        Tensor name to the products, shape (K, K), of the directions of each full checkpoint, or an adapter as it is
        (rows), with all atoms as they are; empty if there are adapters alone, or it was not read from disk.
    """

    atoms: tuple[Atom, ...]
    gram: Mapping[str, FloatArray]
    beyond: tuple[Atom, ...] = ()
    shown: Mapping[str, FloatArray] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The atoms' names, in order."""
        return tuple(atom.name for atom in self.atoms)

    @property
    def vectors(self) -> tuple[TaskVector, ...]:
        """The atoms' task vectors, in order."""
        return tuple(atom.vector for atom in self.atoms)

    @property
    def total_gram(self) -> FloatArray:
        """The (K, K) Gram matrix over all tensors."""
        size = len(self.atoms)
        result = np.zeros((size, size))
        for name in sorted(self.gram):
            result += self.gram[name]
        return result


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """What a dictionary on disk knows of an atom without opening it.

    Attributes
    ----------
    name : str
        What users call it.
    kind : str
        ``"adapter"`` or ``"checkpoint"``.
    digest : str
        Of its contents, as of `TaskVector`.
    source : Source
        Where it was found.
    sketch : Path
        The file of its sketch.
    """

    name: str
    kind: Literal["adapter", "checkpoint"]
    digest: str
    source: Source
    sketch: Path


def is_dictionary(path: Path) -> bool:
    """Tell whether a folder is a dictionary."""
    return (path / MANIFEST).is_file() and not (path / "config.json").exists()


def open_base(reference: str, *, allow_pickle: bool = False) -> Base:
    """Find and open the base model.

    Raises
    ------
    UnmergeError
        If it cannot be found or read, or is itself an adapter.
    """
    source = resolve(reference, allow_pickle=allow_pickle)
    if source.path.is_dir() and is_adapter(source.path):
        raise CheckpointError(f"{reference}: an adapter, not a base model; give the model that it was trained on")
    checkpoint = open_checkpoint(source.path, allow_pickle=allow_pickle)
    return Base(source, checkpoint, fingerprint.checkpoint_digest(checkpoint))


def open_atom(
    reference: str,
    base: Base,
    *,
    name: str | None = None,
    digest: str | None = None,
    sampled: bool = False,
    cached: bool = False,
    allow_pickle: bool = False,
) -> Atom:
    """Find an adapter or a full checkpoint and read what it changed.

    Parameters
    ----------
    reference : str
        A path or Hub id, or ``NAME=PATH``.
    name : str, optional
        What to call it, over the reference's own name.
    digest, sampled
        See `read_task_vector`.
    cached : bool
        Download nothing.

    Raises
    ------
    UnmergeError
        If it cannot be found or read, or does not belong to the base.
    """
    given, rest = split_name(reference)
    source = resolve(rest, cached=cached, allow_pickle=allow_pickle)
    label = name or given or source.default_name
    if not _NAME.match(label):
        raise DictionaryError(
            f"{reference}: {label!r} cannot be an atom's name (letters, digits, _ . + -); use NAME=PATH"
        )
    vector, kind = read_task_vector(source.path, base, label, digest=digest, sampled=sampled, allow_pickle=allow_pickle)
    return Atom(vector, source, kind)


def read_task_vector(
    path: Path,
    base: Base,
    label: str,
    *,
    digest: str | None = None,
    sampled: bool = False,
    allow_pickle: bool = False,
) -> tuple[TaskVector, Literal["adapter", "checkpoint"]]:
    """Read what a fine-tune changed against the base: headers, samples of a checkpoint, and all of an adapter.

    Parameters
    ----------
    digest : str, optional
        Taken for that of an adapter, whose values are then not read. A checkpoint that has it is known to belong to the
        base, and not compared with it again.
    sampled : bool
        Give an adapter a digest of a few of its values, as checkpoints always have.

    Raises
    ------
    UnmergeError
        If it cannot be read, or does not belong to the base.
    """
    if path.is_dir() and is_adapter(path):
        adapter = open_adapter(path, allow_pickle=allow_pickle)
        deltas, skipped, notices = adapter_deltas(adapter, base.checkpoint, label)
        notices = (*notices, *_other_base(adapter.base_reference, base.source))
        if digest is None:
            digest = (fingerprint.sampled_adapter_digest if sampled else fingerprint.adapter_digest)(adapter)
        return TaskVector(label, digest, deltas, skipped, notices), "adapter"
    if path.is_dir():
        _refuse_nested_adapter(path)
    checkpoint = open_checkpoint(path, allow_pickle=allow_pickle)
    alignment = align(base.checkpoint, checkpoint, label)
    found = fingerprint.checkpoint_digest(checkpoint)
    if found != digest:
        fingerprint.check_same_base(alignment, label)
    notices = (*checkpoint.notices, *alignment.notices)
    return TaskVector(label, found, checkpoint_deltas(alignment), alignment.skipped, notices), "checkpoint"


def _other_base(said: str | None, given: Source) -> tuple[str, ...]:
    """Tell if an adapter names a base of another name; paths and owners differ for good reasons."""
    names = {said.rstrip("/").rsplit("/", 1)[-1].partition("@")[0].lower() if said else "", given.default_name.lower()}
    if not said or len(names) == 1:
        return ()
    return (f"its configuration says that it was trained on {said!r}; make sure that this is the base given",)


def _refuse_nested_adapter(path: Path) -> None:
    # PEFT saves adapters that are not called "default" in a folder of their own.
    nested = sorted(child.name for child in path.iterdir() if child.is_dir() and is_adapter(child))
    if nested and not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise CheckpointError(f"{path}: the adapter is in a folder below it; give {path / nested[0]}")


def combine(
    base: Base,
    atoms: Iterable[Atom],
    *,
    known: Dictionary | None = None,
    workers: int = 1,
    start: Start | None = None,
    state: State | None = None,
) -> Dictionary:
    """Make a dictionary, computing only the inner products that `known` does not hold.

    Parameters
    ----------
    atoms : iterable of Atom
        The new ones; they follow those of `known`.
    known : Dictionary, optional
        What was computed before.
    state : State, optional
        Where finished products are kept.

    Raises
    ------
    DictionaryError
        If two atoms have one name, or an atom changes nothing.
    TargetError
        If an atom holds a value that is not finite.
    """
    old = known or Dictionary((), {})
    new = tuple(atoms)
    check_names([*old.names, *(atom.name for atom in new)])
    vectors = tuple(atom.vector for atom in new)
    shapes = {name: base.shapes.get(name, delta.shape) for item in vectors for name, delta in item.deltas.items()}
    work = plan(shapes, (*vectors, *old.vectors), workers=workers)
    advance = start(work) if start else None
    found = accumulate(work, vectors, old.vectors, advance=advance, state=state)
    gram = {name: _pad(matrix, len(new)) for name, matrix in old.gram.items()}
    for name, units in found.items():
        gram[name] = join(old.gram.get(name), total(units).gram)
    result = Dictionary((*old.atoms, *new), dict(sorted(gram.items())))
    _refuse_zero(result)
    return result


def join(old: FloatArray | None, rows: FloatArray) -> FloatArray:
    """Join the Gram matrix of Q known atoms with the (P, P + Q) products of P new ones, known ones first."""
    new = len(rows)
    known = rows.shape[1] - new
    gram = np.zeros((known + new, known + new))
    if old is not None:
        gram[:known, :known] = old
    gram[known:, known:] = rows[:, :new]
    gram[known:, :known] = rows[:, new:]
    gram[:known, known:] = rows[:, new:].T
    return gram


def _pad(gram: FloatArray, more: int) -> FloatArray:
    return np.pad(gram, (0, more))


def check_names(names: Sequence[str]) -> None:
    """Refuse two atoms of one name.

    Raises
    ------
    DictionaryError
        If a name occurs twice.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DictionaryError(f"two atoms are called {name!r}; give one another name with NAME=PATH")
        seen.add(name)


def _refuse_zero(dictionary: Dictionary) -> None:
    for atom, energy in zip(dictionary.atoms, np.diag(dictionary.total_gram), strict=True):
        if energy == 0.0:
            raise DictionaryError(_changes_nothing(atom))


def _changes_nothing(atom: Atom) -> str:
    what = "a zero adapter (was it trained?)" if atom.kind == "adapter" else "bit-identical to the base"
    return f"{atom.name}: changes nothing: {what}; leave it out"


def build(
    path: Path,
    references: Sequence[str],
    base_reference: str,
    *,
    allow_pickle: bool = False,
    workers: int = 1,
    start: Start | None = None,
    state: Path | None = None,
) -> tuple[str, ...]:
    """Build a dictionary on disk.

    Parameters
    ----------
    state : Path, optional
        A folder that keeps what is finished; a run that was stopped goes on from it, to the same bits. What is in it
        is deleted at the end.

    Returns
    -------
    tuple of str
        The names of its atoms.

    Raises
    ------
    DictionaryError
        If the folder exists and is not empty, or the atoms do not make a dictionary.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DictionaryError(f"{path}: already exists; choose another folder, or add to it with `dictionary add`")
    base = open_base(base_reference, allow_pickle=allow_pickle)
    atoms = _open_new(references, base, PRODUCTS, allow_pickle=allow_pickle)
    kept = None if state is None else StateFolder(state)
    known = combine(base, atoms[:PRODUCTS], workers=workers, start=start, state=kept)
    check_names([atom.name for atom in atoms])
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path) as beside:
        folder = kept.dictionary() if kept else beside
        _write(folder, base, [], atoms, known, {}, workers=workers, state=kept)
        if kept:
            # The state may be on another disk.
            folder = Path(shutil.move(folder, beside / path.name))
        if path.exists():
            path.rmdir()
        folder.rename(path)
    if kept:
        kept.clear()
    return tuple(atom.name for atom in atoms)


def add(
    path: Path,
    references: Sequence[str],
    base_reference: str,
    *,
    allow_pickle: bool = False,
    workers: int = 1,
    start: Start | None = None,
    state: Path | None = None,
) -> tuple[str, ...]:
    """Add atoms to a dictionary on disk; the others are read only while there is room for inner products.

    `state` is that of `build`.

    Returns
    -------
    tuple of str
        The names of the new atoms.

    Raises
    ------
    DictionaryError
        If it is not a dictionary of this base, or a name is taken.
    """
    base = open_base(base_reference, allow_pickle=allow_pickle)
    entries = _entries_on(path, base)
    room = max(0, PRODUCTS - len(entries)) if all(entry["gram_sha256"] for entry in entries) else 0
    atoms = _open_new(references, base, room, allow_pickle=allow_pickle)
    check_names([*(entry["name"] for entry in entries), *(atom.name for atom in atoms)])
    opened = known = Dictionary((), {})
    kept = None if state is None else StateFolder(state)
    if room > 0:
        opened = open_dictionary(path, base, allow_pickle=allow_pickle)
        known = combine(base, atoms[:room], known=opened, workers=workers, start=start, state=kept)
    _write(path, base, entries, atoms, known, opened.shown, workers=workers, state=kept)
    if kept:
        kept.clear()
    return tuple(atom.name for atom in atoms)


def _open_new(references: Sequence[str], base: Base, room: int, *, allow_pickle: bool) -> list[Atom]:
    """Open atoms; adapters for whose inner products, which are ordered by digest, there is no room are hashed later."""
    return [
        open_atom(reference, base, digest=None if place < room else _LATER, allow_pickle=allow_pickle)
        for place, reference in enumerate(references)
    ]


def _write(
    path: Path,
    base: Base,
    entries: Sequence[Mapping[str, Any]],
    atoms: Sequence[Atom],
    known: Dictionary,
    shown: Mapping[str, FloatArray],
    *,
    workers: int,
    state: StateFolder | None,
) -> None:
    """Write atoms after those of the entries, then the manifest, which makes them count.

    `known` has the products of those that were before, and of the new ones for which there is room; `shown` those of
    directions, of the former.
    """
    written = [
        _written(path, base, atom, _row(known, len(entries) + position), workers=workers, state=state)
        for position, atom in enumerate(atoms)
    ]
    if len(known.atoms) > len(entries) and any(atom.kind == "checkpoint" for atom in known.atoms):
        new = [_with_directions(path, atom) for atom in known.atoms[len(entries) :]]
        found = _shown(base, new, known, shown, workers=workers, state=state)
        for position, entry in enumerate(written[: len(new)], start=len(entries)):
            file = _shown_file(path, entry["name"])
            _save(file, {name: _both_ways(matrix, position) for name, matrix in found.items()})
            entry["shown_sha256"] = _sha256(file)
    manifest = {
        "schema": SCHEMA,
        "base": {
            "reference": base.source.reference,
            "commit": base.source.commit,
            "digest": base.digest,
        },
        "atoms": [*entries, *written],
    }
    temporary = path / f"{MANIFEST}.tmp"
    # Not indented, but a line for each value: indented JSON takes ten times as long to write.
    temporary.write_text(json.dumps(manifest, separators=(",\n", ": ")) + "\n", encoding="utf-8")
    temporary.replace(path / MANIFEST)


def _row(known: Dictionary, position: int) -> dict[str, FloatArray] | None:
    """Return an atom's products with those before it and itself; None where there was no room for them."""
    if position >= len(known.atoms):
        return None
    return {name: gram[position, : position + 1].copy() for name, gram in known.gram.items()}


def _shown(
    base: Base,
    new: Sequence[Atom],
    known: Dictionary,
    before: Mapping[str, FloatArray],
    *,
    workers: int,
    state: State | None,
) -> dict[str, FloatArray]:
    """Return `Dictionary.shown` of all known atoms, the new ones last.

    Parameters
    ----------
    new : sequence of Atom
        With their directions.
    before : mapping
        The same of the others.
    """
    old = len(known.atoms) - len(new)
    atoms = (*known.atoms[:old], *new)
    # By place, and whether it is of the directions; the new ones first.
    vectors: dict[tuple[int, bool], TaskVector] = {}
    for places in (range(old, len(atoms)), range(old)):
        vectors |= {(place, False): atoms[place].vector for place in places}
        vectors |= {(place, True): _leading(atoms[place]) for place in places if atoms[place].kind == "checkpoint"}
    columns = {key: column for column, key in enumerate(vectors)}
    whole = [columns[place, False] for place in range(len(atoms))]
    leading = [columns.get((place, True), column) for place, column in enumerate(whole)]
    rows = sum(place >= old for place, _ in vectors)
    every = list(vectors.values())
    changed = {name for vector in every[:rows] for name in vector.deltas}
    shapes = {name: base.shapes[name] for name in changed & base.shapes.keys()}
    found = accumulate(plan(shapes, every, workers=workers), every[:rows], every[rows:], state=state)
    shown = {}
    for name, gram in known.gram.items():
        shown[name] = np.zeros_like(gram)
        shown[name][:old, :old] = before.get(name, gram[:old, :old])
        if name in found:
            products = total(found[name]).gram
            shown[name][old:] = products[np.ix_(leading[old:], whole)]
            shown[name][:old, old:] = products[np.ix_(whole[old:], leading[:old])].T
    return shown


def _leading(atom: Atom) -> TaskVector:
    if atom.directions is None:
        raise ValueError(f"{atom.name}: its directions are not known")
    return told_apart(atom.directions)


def _both_ways(shown: FloatArray, position: int) -> FloatArray:
    """Return the part of `Dictionary.shown` that an atom brings: its row and its column, shape (2, position + 1)."""
    return np.stack([shown[position, : position + 1], shown[: position + 1, position]])


def _written(
    path: Path,
    base: Base,
    atom: Atom,
    row: Mapping[str, FloatArray] | None,
    *,
    workers: int,
    state: StateFolder | None,
) -> dict[str, Any]:
    """Write what is kept of an atom, if an earlier run has not, and return its entry."""
    layout = Layout.of(base.shapes)
    if state is None:
        return _write_atom(path, atom, layout, row, workers=workers)
    files = _adapter_files(atom.source.path) if atom.kind == "adapter" else []
    digest = atom_digest(path, base.digest, atom.vector, row, files)
    entry = state.written(digest)
    if entry is None or any(_verify_entry(path, entry, base)):
        entry = _write_atom(path, atom, layout, row, workers=workers)
        state.keep(digest, entry)
    return entry


def _write_atom(
    path: Path, atom: Atom, layout: Layout, row: Mapping[str, FloatArray] | None, *, workers: int
) -> dict[str, Any]:
    """Write what is kept of an atom, and return its entry; an adapter is copied and hashed while it is sketched."""
    from concurrent.futures import ThreadPoolExecutor

    copy = path / "atoms" / atom.name
    with ThreadPoolExecutor(1) as pool:
        atom, digest = _copied(atom, copy, pool) if atom.kind == "adapter" else (atom, None)
        try:
            found = _sketch(atom, layout, row, workers=workers)
        except UnmergeError:
            if digest:
                digest.exception()
                shutil.rmtree(copy)
            raise
    _save(_sketch_file(path, atom.name), found.tensors)
    if row is not None:
        _save(_products_file(path, atom.name), row)
    if atom.kind == "checkpoint":
        _save(_directions_file(path, atom.name), _factors(directions(atom.vector, workers=workers)))
    return _entry(path, atom, digest.result() if digest else atom.vector.digest, has_row=row is not None)


def _sketch(atom: Atom, layout: Layout, row: Mapping[str, FloatArray] | None, *, workers: int) -> Sketch:
    known = None if row is None else {name: float(products[-1]) for name, products in row.items()}
    found = sketch(atom.vector, layout, known, workers=workers)
    if not np.isfinite(found.energies).all():
        raise DictionaryError(f"{atom.name}: has NaN or Inf, or its energy overflows: not a usable fine-tune")
    if not found.energies.any():
        raise DictionaryError(_changes_nothing(atom))
    return found


def _directions_file(path: Path, name: str) -> Path:
    return path / "directions" / f"{name}.safetensors"


def _sketch_file(path: Path, name: str) -> Path:
    return path / "sketch" / f"{name}.safetensors"


def _products_file(path: Path, name: str) -> Path:
    return path / "gram" / f"{name}.safetensors"


def _shown_file(path: Path, name: str) -> Path:
    return path / "shown" / f"{name}.safetensors"


def _save(file: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    from safetensors.numpy import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)


def _factors(vector: TaskVector) -> dict[str, NDArray[np.float32]]:
    """Return both factors of each low-rank change, by the names that a directions file gives them."""
    low_rank = {name: delta for name, delta in vector.deltas.items() if isinstance(delta, LowRank)}
    left = {f"{name}.left": delta.left(0, delta.shape[0]) * delta.scale for name, delta in low_rank.items()}
    right = {f"{name}.right": delta.right() for name, delta in low_rank.items()}
    return {name: factor.astype(np.float32) for name, factor in (left | right).items()}


def _copied(atom: Atom, copy: Path, pool: ThreadPoolExecutor) -> tuple[Atom, Future[str]]:
    """Copy an adapter in a pool of one thread; return it, in memory if it is small, and its digest to come.

    It is hashed there too, in few calls: a thread that often asks for the interpreter waits for it.
    """
    done = [pool.submit(_copy_adapter, atom.source.path, copy)]
    if atom.vector.digest != _LATER:

        def known() -> str:
            done[0].result()
            return atom.vector.digest

        return atom, pool.submit(known)
    adapter = open_adapter(atom.source.path, allow_pickle=True)  # it was opened before, so it may be opened
    if sum(delta.nbytes for delta in atom.vector.deltas.values() if isinstance(delta, LowRank)) < _AT_ONCE:
        adapter = adapter.in_memory()
        atom = replace(atom, vector=_with_factors(atom.vector, adapter))
    digest = hashlib.sha256()
    pieces: list[bytes | memoryview] = []
    size = 0
    for piece in fingerprint.adapter_pieces(adapter):
        pieces.append(piece)
        size += len(piece)
        if size > _AT_ONCE:
            done.pop().result()
            done.append(pool.submit(digest.update, b"".join(pieces)))
            pieces, size = [], 0

    def finished() -> str:
        done[0].result()
        digest.update(b"".join(pieces))
        return digest.hexdigest()

    return atom, pool.submit(finished)


def _with_factors(vector: TaskVector, adapter: Adapter) -> TaskVector:
    """Return a change with the low-rank factors of an adapter, by their names."""
    factors = {factor.name: factor for found in adapter.factors.values() for factor in (found.a, found.b)}

    def held(delta: Delta) -> Delta:
        if not isinstance(delta, LowRank):
            return delta
        left, right = (factors.get(factor.name, factor) for factor in (delta.left_factor, delta.right_factor))
        return replace(delta, left_factor=left, right_factor=right)

    return replace(vector, deltas={name: held(delta) for name, delta in vector.deltas.items()})


def _copy_adapter(source: Path, destination: Path) -> None:
    shutil.rmtree(destination, ignore_errors=True)  # left by a run that was stopped before its manifest
    destination.mkdir(parents=True)
    for file in _adapter_files(source):
        shutil.copyfile(file, destination / file.name)


def _adapter_files(source: Path) -> list[Path]:
    return [file for file in sorted(source.glob("adapter_*")) if file.suffix in {".json", ".safetensors", ".bin"}]


def _entry(path: Path, atom: Atom, digest: str, *, has_row: bool) -> dict[str, Any]:
    return {
        "name": atom.name,
        "kind": atom.kind,
        "digest": digest,
        "reference": atom.source.reference,
        "commit": atom.source.commit,
        "path": None if atom.kind == "adapter" or atom.source.commit else str(atom.source.path.resolve()),
        "sketch_sha256": _sha256(_sketch_file(path, atom.name)),
        "gram_sha256": _sha256(_products_file(path, atom.name)) if has_row else None,
        "directions_sha256": None if atom.kind == "adapter" else _sha256(_directions_file(path, atom.name)),
        "shown_sha256": None,
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Make a folder beside `path`, to be filled and renamed to it; what is not renamed is removed.

    What a run that was killed left there is removed too.
    """
    _remove_leftovers(path)
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(path: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.tmp")
    for folder in path.parent.iterdir():
        match = pattern.fullmatch(folder.name)
        if match and not _is_running(int(match[1])):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(process: int) -> bool:
    if os.name == "nt":  # where signal 0 is not a question
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check a dictionary's manifest.

    Raises
    ------
    DictionaryError
        If the folder is not a dictionary, or one of another schema.
    """
    if not (path / MANIFEST).is_file():
        raise DictionaryError(f"{path}: not a dictionary: no {MANIFEST}")
    manifest = read_json(path / MANIFEST)
    if manifest.get("schema") != SCHEMA:
        raise DictionaryError(f"{path}: schema {manifest.get('schema')!r}; this version reads {SCHEMA}; build it again")
    atoms, base = manifest.get("atoms"), manifest.get("base")
    if not isinstance(atoms, list) or not all(_is_entry(entry) for entry in atoms):
        raise DictionaryError(f"{path / MANIFEST}: damaged: one of its atoms is incomplete")
    if not isinstance(base, dict) or not isinstance(base.get("digest"), str):
        raise DictionaryError(f"{path / MANIFEST}: damaged: its base is incomplete")
    if any(later["gram_sha256"] and not entry["gram_sha256"] for entry, later in pairwise(atoms)):
        raise DictionaryError(f"{path / MANIFEST}: damaged: an atom without inner products is before one with them")
    check_names([entry["name"] for entry in atoms])
    return manifest


def manifest_base(manifest: Mapping[str, Any]) -> str:
    """Return the reference of the base that a manifest names, pinned to its commit if it has one."""
    reference, commit = str(manifest["base"].get("reference")), manifest["base"].get("commit")
    return f"{reference.partition('@')[0]}@{commit}" if commit else reference


_TEXTS = itemgetter("name", "digest", "reference", "sketch_sha256")
_PRODUCTS = itemgetter("gram_sha256", "shown_sha256")


def _is_entry(entry: Any) -> bool:
    # A thousand entries are checked with every answer.
    try:
        texts, products, leading = _TEXTS(entry), _PRODUCTS(entry), entry["directions_sha256"]
    except (KeyError, TypeError):
        return False
    if set(map(type, texts)) != {str} or not _NAME.match(texts[0]):
        return False
    if not all(digest is None or type(digest) is str for digest in products):
        return False
    kind = entry.get("kind")
    return type(leading) is str if kind == "checkpoint" else kind == "adapter" and leading is None


def _entries_on(path: Path, base: Base) -> list[dict[str, Any]]:
    """Return the atoms' entries of a dictionary's manifest.

    Raises
    ------
    DictionaryError
        If it is not a dictionary, or was built on another base.
    """
    manifest = read_manifest(path)
    if manifest["base"]["digest"] != base.digest:
        message = (
            f"{path}: built on another base ({manifest['base'].get('reference')}), not on "
            f"{base.source.reference}: their fingerprints differ; build a dictionary on this base"
        )
        raise DictionaryError(message)
    return list(manifest["atoms"])


def open_dictionary(
    path: Path, base: Base, names: Collection[str] | None = None, *, kept: bool = False, allow_pickle: bool = False
) -> Dictionary:
    """Open a dictionary for use with a base.

    Parameters
    ----------
    names : collection of str, optional
        The atoms to open; all by default. No file of another one is read.
    kept : bool
        Answer for full checkpoints from what is kept of them; see `Atom.energies`. That one is gone or has changed is
        then no error, and none is downloaded. (Those that change vectors alone have no directions, and are opened.)

    Raises
    ------
    DictionaryError
        If it was built on another base, or a part of it is missing or damaged.
    """
    entries = _entries_on(path, base)
    chosen = [place for place, entry in enumerate(entries) if names is None or entry["name"] in names]
    opening = _open_kept if kept else _open_whole
    atoms = [opening(path, entries[place], base, allow_pickle=allow_pickle) for place in chosen]
    places = [place for place in chosen if entries[place]["gram_sha256"]]
    known = tuple(atoms[: len(places)])
    gram = _read_gram(path, known, places)
    files = [_shown_file(path, entries[place]["name"]) if entries[place]["shown_sha256"] else None for place in places]
    shown = _read_shown(path, known, places, files, gram) if any(files) else {}
    opened = Dictionary(known, gram, tuple(atoms[len(places) :]), shown)
    return _with_energies(path, opened, base) if kept else opened


def _with_energies(path: Path, opened: Dictionary, base: Base) -> Dictionary:
    """Give full checkpoints that have directions their energies: from inner products, or else from sketches."""
    layout = Layout.of(base.shapes)

    def of_product(place: int, atom: Atom) -> Atom:
        return _answered(atom, {name: float(gram[place, place]) for name, gram in opened.gram.items()})

    def of_sketch(atom: Atom) -> Atom:
        energies = stack([_sketch_file(path, atom.name)], layout).energies[0]
        return _answered(atom, dict(zip(layout.shapes, energies[:-1].tolist(), strict=True)))

    known = tuple(of_product(place, atom) if _is_kept(atom) else atom for place, atom in enumerate(opened.atoms))
    beyond = tuple(of_sketch(atom) if _is_kept(atom) else atom for atom in opened.beyond)
    return Dictionary(known, opened.gram, beyond, opened.shown)


def _is_kept(atom: Atom) -> bool:
    return atom.kind == "checkpoint" and atom.directions is not None and bool(atom.directions.deltas)


def _answered(atom: Atom, energies: Mapping[str, float]) -> Atom:
    return replace(atom, energies={name: energy for name, energy in sorted(energies.items()) if energy > 0.0})


def read_records(path: Path, base: Base) -> tuple[Record, ...]:
    """Return what a dictionary knows of its atoms, in their order, without opening one.

    Raises
    ------
    DictionaryError
        If it was built on another base, or its manifest is damaged.
    """
    return tuple(
        Record(
            entry["name"],
            entry["kind"],
            entry["digest"],
            Source(entry["reference"], path / "atoms" / entry["name"], entry.get("commit")),
            _sketch_file(path, entry["name"]),
        )
        for entry in _entries_on(path, base)
    )


@dataclass(frozen=True, slots=True, eq=False)
class Likeness:
    """How alike some atoms of a dictionary are to all of them.

    Attributes
    ----------
    records : tuple of Record
        All atoms, in their order.
    norms : array, shape (K,)
        Of their changes, in weight units.
    shown : tuple of int
        The atoms that were asked for.
    cosines : array, shape (S, K)
        Between them and all atoms; 1 with themselves. Exact where inner products are kept, else from sketches.
    """

    records: tuple[Record, ...]
    norms: FloatArray
    shown: tuple[int, ...]
    cosines: FloatArray


def likeness(path: Path, base: Base, names: Collection[str] | None = None) -> Likeness:
    """Compare the named atoms of a dictionary, by default all, with all of them.

    Raises
    ------
    DictionaryError
        If it was built on another base, or a part of it is missing or damaged.
    """
    records = read_records(path, base)
    shown = [place for place, record in enumerate(records) if names is None or record.name in names]
    found = stack([record.sketch for record in records], Layout.of(base.shapes))
    norms = np.sqrt(found.energies.sum(axis=1))
    cosines = _sketched_cosines(found, shown)
    rows = {place: row for place in shown if (row := _exact_row(path, records[place].name)) is not None}
    for line, place in enumerate(shown):
        if place in rows:
            cosines[line, : place + 1] = rows[place] / (norms[place] * norms[: place + 1])
        for other, row in rows.items():
            if place < other:
                cosines[line, other] = row[place] / (norms[place] * norms[other])
        cosines[line, place] = 1.0
    return Likeness(records, norms, tuple(shown), cosines)


def _sketched_cosines(found: Sketches, rows: Sequence[int]) -> FloatArray:
    from threadpoolctl import threadpool_limits

    lengths = np.sqrt(np.einsum("km,km->k", found.values, found.values, dtype=np.float64))
    lengths[lengths == 0.0] = np.inf  # an atom of vectors alone
    with threadpool_limits(limits=1, user_api="blas"):  # sums of a threaded product depend on the number of cores
        products = (found.values[list(rows)] @ found.values.T).astype(np.float64)
    cosines: FloatArray = products / np.outer(lengths[list(rows)], lengths)
    return cosines


def _exact_row(path: Path, name: str) -> FloatArray | None:
    """Return an atom's products over all tensors with those before it and itself, if they are kept."""
    file = _products_file(path, name)
    if not file.is_file():
        return None
    tensors, _ = read_header(file)
    total: FloatArray = np.sum([values(tensor)[0] for _, tensor in sorted(tensors.items())], axis=0)
    return total


def _read_directions(path: Path, atom: str, fits: Callable[[str, tuple[int, int]], bool]) -> dict[str, Delta]:
    """Return a checkpoint's directions from their headers; `fits` tells if a tensor of it can have this shape."""
    tensors, _ = read_header(_directions_file(path, atom))
    found: dict[str, Delta] = {}
    for name in sorted({stored.rpartition(".")[0] for stored in tensors}):
        left, right = tensors.get(f"{name}.left"), tensors.get(f"{name}.right")
        product = _product(left.shape, right.shape) if left and right else None
        if not (left and right and product and fits(name, product)):
            message = f"{path}: the directions of {atom!r} in tensor {name!r} are incomplete; build again"
            raise DictionaryError(message)
        found[name] = LowRank(left, right, transposed=False, scale=1.0)
    return found


def _product(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, int] | None:
    """Return the shape of the product of two factors; None if they are not factors."""
    return (left[0], right[1]) if len(left) == len(right) == 2 and left[1] == right[0] else None


def _open_whole(path: Path, entry: Mapping[str, Any], base: Base, *, allow_pickle: bool) -> Atom:
    """Open an atom with its leading directions; a full checkpoint must be there as it was added."""
    try:
        atom = _open_entry(path, entry, base, allow_pickle=allow_pickle)
    except UnmergeError as error:
        if entry["kind"] == "adapter":
            raise
        raise DictionaryError(f"{error} ({NEEDS_CHECKPOINTS})") from error
    return _with_directions(path, atom)


def _open_kept(path: Path, entry: Mapping[str, Any], base: Base, *, allow_pickle: bool) -> Atom:
    """Open an atom with its leading directions; of a checkpoint that is gone or has changed, those alone."""
    try:
        atom = _open_entry(path, entry, base, cached=True, allow_pickle=allow_pickle)
    except UnmergeError:
        deltas = _kept_directions(path, entry, base)
        if not deltas:
            raise
        vector = TaskVector(entry["name"], entry["digest"], deltas)
        source = Source(entry["reference"], Path(entry.get("path") or entry["reference"]), entry.get("commit"))
        return Atom(vector, source, "checkpoint", vector, lost=True)
    return _with_directions(path, atom)


def _kept_directions(path: Path, entry: Mapping[str, Any], base: Base) -> dict[str, Delta]:
    """Return the directions of a checkpoint that is not looked at; none of an adapter, which has no other copy."""
    shapes = base.shapes

    def fits(name: str, shape: tuple[int, int]) -> bool:
        rows, columns = shapes.get(name, shape)
        return shape[0] <= rows and shape[1] == columns

    return _read_directions(path, entry["name"], fits) if entry["kind"] == "checkpoint" else {}


def _with_directions(path: Path, atom: Atom) -> Atom:
    if atom.kind == "adapter":
        return replace(atom, directions=atom.vector if is_low_rank(atom.vector) else None)
    shapes = {name: delta.shape for name, delta in atom.vector.deltas.items()}
    deltas = _read_directions(path, atom.name, lambda name, shape: shapes.get(name) == shape)
    return replace(atom, directions=TaskVector(atom.name, atom.vector.digest, deltas))


def _open_entry(
    path: Path, entry: Mapping[str, Any], base: Base, *, cached: bool = False, allow_pickle: bool = False
) -> Atom:
    """Open an atom of a dictionary; `cached` ones of the Hub are not downloaded."""
    name, commit = entry["name"], entry.get("commit")
    if entry["kind"] == "adapter":
        copy = path / "atoms" / name
        # The digest is trusted here (verify() checks it): hashing a thousand adapters would cost reading them.
        vector, _ = read_task_vector(copy, base, name, digest=entry["digest"], allow_pickle=allow_pickle)
        return Atom(vector, Source(entry["reference"], copy, commit), "adapter")
    reference = f"{entry['reference'].partition('@')[0]}@{commit}" if commit else entry.get("path")
    if not isinstance(reference, str):
        raise DictionaryError(f"{path / MANIFEST}: atom {name!r} has neither a path nor a commit")
    digest = entry["digest"]
    atom = open_atom(reference, base, name=name, digest=digest, cached=cached, allow_pickle=allow_pickle)
    if atom.kind != "checkpoint" or atom.vector.digest != digest:
        raise DictionaryError(f"{path}: atom {name!r} ({reference}) has changed since it was added; build again")
    return replace(atom, source=replace(atom.source, reference=entry["reference"]))


def _read_gram(path: Path, atoms: Sequence[Atom], places: Sequence[int]) -> dict[str, FloatArray]:
    """Read the Gram matrices of atoms at these places, ascending, of the order in which they were added."""
    size = len(atoms)
    gram: dict[str, FloatArray] = {}
    for position, (atom, place) in enumerate(zip(atoms, places, strict=True)):
        for name, row in _read_products(path, _products_file(path, atom.name), atom, (place + 1,)):
            own = row[list(places[: position + 1])]
            matrix = gram.setdefault(name, np.zeros((size, size)))
            matrix[position, : position + 1] = own
            matrix[: position + 1, position] = own
    return dict(sorted(gram.items()))


def _read_shown(
    path: Path,
    atoms: Sequence[Atom],
    places: Sequence[int],
    files: Sequence[Path | None],
    gram: Mapping[str, FloatArray],
) -> dict[str, FloatArray]:
    """Read `Dictionary.shown` of the same atoms; adapters before the first checkpoint have the Gram matrix alone."""
    shown = {name: matrix.copy() for name, matrix in gram.items()}
    for position, (atom, place, file) in enumerate(zip(atoms, places, files, strict=True)):
        if file is None:
            continue
        for name, both in _read_products(path, file, atom, (2, place + 1)):
            row, column = both[:, list(places[: position + 1])]
            if name in shown:
                shown[name][position, : position + 1] = row
                shown[name][: position + 1, position] = column
    return shown


def _read_products(path: Path, file: Path, atom: Atom, shape: tuple[int, ...]) -> Iterator[tuple[str, FloatArray]]:
    tensors, _ = read_header(file)
    for name, tensor in tensors.items():
        if tensor.shape != shape:
            raise DictionaryError(f"{path}: the products of {atom.name!r} have the wrong size; build again")
        yield name, values(tensor).reshape(shape)


def verify(path: Path, base_reference: str | None = None) -> list[str]:
    """Check every digest of a dictionary.

    Parameters
    ----------
    base_reference : str, optional
        The base to check the fingerprint of; by default the one that the manifest names, if it is found.

    Returns
    -------
    list of str
        One line for each fault; empty if all is as it was built.
    """
    manifest = read_manifest(path)
    faults: list[str] = []
    reference = base_reference or manifest_base(manifest)
    base = open_base(reference, allow_pickle=True)
    if base.digest != manifest["base"]["digest"]:
        faults.append(f"base {reference}: its fingerprint is not that of the base the dictionary was built on")
    for entry in manifest["atoms"]:
        faults.extend(_verify_entry(path, entry, base))
    return faults


def _verify_entry(path: Path, entry: Mapping[str, Any], base: Base) -> Iterator[str]:
    name = entry["name"]
    if not _is_as_written(_sketch_file(path, name), entry["sketch_sha256"]):
        yield f"atom {name}: its sketch is missing or changed"
    if entry["gram_sha256"] and not _is_as_written(_products_file(path, name), entry["gram_sha256"]):
        yield f"atom {name}: its inner products are missing or changed"
    if entry["kind"] == "checkpoint" and not _is_as_written(_directions_file(path, name), entry["directions_sha256"]):
        yield f"atom {name}: its leading directions are missing or changed"
    if entry["shown_sha256"] and not _is_as_written(_shown_file(path, name), entry["shown_sha256"]):
        yield f"atom {name}: the products of directions are missing or changed"
    try:
        if entry["kind"] == "adapter":
            digest = fingerprint.adapter_digest(open_adapter(path / "atoms" / name, allow_pickle=True))
            if digest != entry["digest"]:
                yield f"atom {name}: its copy is not what was added"
        else:
            _open_entry(path, entry, base, allow_pickle=True)
    except UnmergeError as error:
        yield f"atom {name}: {error}"


def _is_as_written(file: Path, sha256: str) -> bool:
    return file.is_file() and _sha256(file) == sha256

"""Dictionaries of known task vectors, in memory and on disk.

A dictionary keeps what can be computed once: digests, the base's fingerprint, and the inner products between
atoms, tensor by tensor; and the leading directions of full checkpoints. Adding an atom computes its row and
touches no other.

On disk it is a folder::

    manifest.json               schema, base, atoms in the order in which they were added
    atoms/NAME/                 a copy of each adapter; full checkpoints stay where they are
    directions/NAME.safetensors leading directions of each full checkpoint: two F32 factors per tensor
    gram/NAME.safetensors       products of this atom with those before it and itself, one vector per tensor

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from unmerge import fingerprint
from unmerge.accumulate import Plan, accumulate, plan, total
from unmerge.alignment import align
from unmerge.checkpoint.adapter import is_adapter, open_adapter
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.checkpoint.header import read_header
from unmerge.checkpoint.reader import Checkpoint, open_checkpoint, read_json
from unmerge.checkpoint.source import Source, resolve, split_name
from unmerge.checkpoint.tensor import matrix_shape, values
from unmerge.directions import directions, is_low_rank
from unmerge.errors import CheckpointError, DictionaryError, UnmergeError
from unmerge.task_vector import Delta, LowRank, TaskVector, adapter_deltas, checkpoint_deltas

SCHEMA = "unmerge/dictionary/2"
MANIFEST = "manifest.json"
_NAME = re.compile(r"[\w+-][\w.+-]*$")

Start = Callable[[Plan], Callable[[int], None]]
"""Told the plan before work starts; returns what is called as units finish (progress bars)."""


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """The base model: where it was found, its tensors and its fingerprint."""

    source: Source
    checkpoint: Checkpoint
    digest: str

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
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
    """

    vector: TaskVector
    source: Source
    kind: Literal["adapter", "checkpoint"]
    directions: TaskVector | None = None

    @property
    def name(self) -> str:
        """What users call it."""
        return self.vector.name


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
    """

    atoms: tuple[Atom, ...]
    gram: Mapping[str, FloatArray]

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

    @property
    def cosines(self) -> FloatArray:
        """Cosines between the atoms over all tensors, shape (K, K), with zeros on the diagonal."""
        gram = self.total_gram
        norms = np.sqrt(np.diag(gram))
        cosines: FloatArray = gram / np.outer(norms, norms)
        np.fill_diagonal(cosines, 0.0)
        return cosines


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


def open_atom(reference: str, base: Base, *, name: str | None = None, allow_pickle: bool = False) -> Atom:
    """Find an adapter or a full checkpoint and read what it changed (headers only).

    Parameters
    ----------
    reference : str
        A path or Hub id, or ``NAME=PATH``.
    name : str, optional
        What to call it, over the reference's own name.

    Raises
    ------
    UnmergeError
        If it cannot be found or read, or does not belong to the base.
    """
    given, rest = split_name(reference)
    source = resolve(rest, allow_pickle=allow_pickle)
    label = name or given or source.default_name
    if not _NAME.match(label):
        raise DictionaryError(
            f"{reference}: {label!r} cannot be an atom's name (letters, digits, _ . + -); use NAME=PATH"
        )
    vector, kind = read_task_vector(source.path, base, label, allow_pickle=allow_pickle)
    return Atom(vector, source, kind)


def read_task_vector(
    path: Path, base: Base, label: str, *, allow_pickle: bool = False
) -> tuple[TaskVector, Literal["adapter", "checkpoint"]]:
    """Read what a fine-tune changed against the base; headers and samples only.

    Raises
    ------
    UnmergeError
        If it cannot be read, or does not belong to the base.
    """
    if path.is_dir() and is_adapter(path):
        adapter = open_adapter(path, allow_pickle=allow_pickle)
        deltas, skipped, notices = adapter_deltas(adapter, base.checkpoint, label)
        notices = (*notices, *_other_base(adapter.base_reference, base.source))
        return TaskVector(label, fingerprint.adapter_digest(adapter), deltas, skipped, notices), "adapter"
    if path.is_dir():
        _refuse_nested_adapter(path)
    checkpoint = open_checkpoint(path, allow_pickle=allow_pickle)
    alignment = align(base.checkpoint, checkpoint, label)
    fingerprint.check_same_base(alignment, label)
    notices = (*checkpoint.notices, *alignment.notices)
    digest = fingerprint.checkpoint_digest(checkpoint)
    return TaskVector(label, digest, checkpoint_deltas(alignment), alignment.skipped, notices), "checkpoint"


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
) -> Dictionary:
    """Make a dictionary, computing only the inner products that `known` does not hold.

    Parameters
    ----------
    atoms : iterable of Atom
        The new ones; they follow those of `known`.
    known : Dictionary, optional
        What was computed before.

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
    found = accumulate(work, vectors, old.vectors, advance=advance)
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
    for name in names:
        if names.count(name) > 1:
            raise DictionaryError(f"two atoms are called {name!r}; give one another name with NAME=PATH")


def _refuse_zero(dictionary: Dictionary) -> None:
    for atom, energy in zip(dictionary.atoms, np.diag(dictionary.total_gram), strict=True):
        if energy == 0.0:
            what = "a zero adapter (was it trained?)" if atom.kind == "adapter" else "bit-identical to the base"
            raise DictionaryError(f"{atom.name}: changes nothing: {what}; leave it out")


def build(
    path: Path,
    references: Sequence[str],
    base_reference: str,
    *,
    allow_pickle: bool = False,
    workers: int = 1,
    start: Start | None = None,
) -> Dictionary:
    """Build a dictionary on disk.

    Raises
    ------
    DictionaryError
        If the folder exists and is not empty, or the atoms do not make a dictionary.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DictionaryError(f"{path}: already exists; choose another folder, or add to it with `dictionary add`")
    base = open_base(base_reference, allow_pickle=allow_pickle)
    atoms = [open_atom(reference, base, allow_pickle=allow_pickle) for reference in references]
    dictionary = combine(base, atoms, workers=workers, start=start)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path) as folder:
        _write(folder, dictionary, base, range(len(atoms)), workers=workers)
        if path.exists():
            path.rmdir()
        folder.rename(path)
    return _with_directions(path, dictionary)


def add(
    path: Path,
    references: Sequence[str],
    base_reference: str,
    *,
    allow_pickle: bool = False,
    workers: int = 1,
    start: Start | None = None,
) -> Dictionary:
    """Add atoms to a dictionary on disk, computing only their rows of the Gram matrix.

    Raises
    ------
    DictionaryError
        If it is not a dictionary of this base, or a name is taken.
    """
    base = open_base(base_reference, allow_pickle=allow_pickle)
    known = open_dictionary(path, base, allow_pickle=allow_pickle)
    atoms = [open_atom(reference, base, allow_pickle=allow_pickle) for reference in references]
    dictionary = combine(base, atoms, known=known, workers=workers, start=start)
    _write(path, dictionary, base, range(len(known.atoms), len(dictionary.atoms)), workers=workers)
    return _with_directions(path, dictionary)


def _write(path: Path, dictionary: Dictionary, base: Base, new: Collection[int], *, workers: int) -> None:
    """Write the atoms at the positions `new`, then the manifest, which makes them count."""
    old = read_manifest(path)["atoms"] if (path / MANIFEST).exists() else []
    entries = list(old)
    for position in new:
        atom = dictionary.atoms[position]
        if atom.kind == "adapter":
            _copy_adapter(atom.source.path, path / "atoms" / atom.name)
        else:
            _save(_directions_file(path, atom.name), _factors(directions(atom.vector, workers=workers)))
        row = {name: gram[position, : position + 1].copy() for name, gram in dictionary.gram.items()}
        _save(_products_file(path, atom.name), row)
        entries.append(_entry(path, atom))
    manifest = {
        "schema": SCHEMA,
        "base": {
            "reference": base.source.reference,
            "commit": base.source.commit,
            "digest": base.digest,
        },
        "atoms": entries,
    }
    temporary = path / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path / MANIFEST)


def _directions_file(path: Path, name: str) -> Path:
    return path / "directions" / f"{name}.safetensors"


def _products_file(path: Path, name: str) -> Path:
    return path / "gram" / f"{name}.safetensors"


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


def _copy_adapter(source: Path, destination: Path) -> None:
    shutil.rmtree(destination, ignore_errors=True)  # left by a run that was stopped before its manifest
    destination.mkdir(parents=True)
    for file in sorted(source.glob("adapter_*")):
        if file.suffix in {".json", ".safetensors", ".bin"}:
            shutil.copyfile(file, destination / file.name)


def _entry(path: Path, atom: Atom) -> dict[str, Any]:
    return {
        "name": atom.name,
        "kind": atom.kind,
        "digest": atom.vector.digest,
        "reference": atom.source.reference,
        "commit": atom.source.commit,
        "path": None if atom.kind == "adapter" or atom.source.commit else str(atom.source.path.resolve()),
        "gram_sha256": _sha256(_products_file(path, atom.name)),
        "directions_sha256": None if atom.kind == "adapter" else _sha256(_directions_file(path, atom.name)),
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
    check_names([entry["name"] for entry in atoms])
    return manifest


def manifest_base(manifest: Mapping[str, Any]) -> str:
    """Return the reference of the base that a manifest names, pinned to its commit if it has one."""
    reference, commit = str(manifest["base"].get("reference")), manifest["base"].get("commit")
    return f"{reference.partition('@')[0]}@{commit}" if commit else reference


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and bool(_NAME.match(entry["name"]))
        and entry.get("kind") in {"adapter", "checkpoint"}
        and all(isinstance(entry.get(key), str) for key in ("digest", "reference", "gram_sha256"))
        and isinstance(entry.get("directions_sha256"), str) == (entry["kind"] == "checkpoint")
    )


def open_dictionary(path: Path, base: Base, *, allow_pickle: bool = False) -> Dictionary:
    """Open a dictionary for use with a base.

    Raises
    ------
    DictionaryError
        If it was built on another base, or a part of it is missing or damaged.
    """
    manifest = read_manifest(path)
    if manifest["base"]["digest"] != base.digest:
        message = (
            f"{path}: built on another base ({manifest['base'].get('reference')}), not on "
            f"{base.source.reference}: their fingerprints differ; build a dictionary on this base"
        )
        raise DictionaryError(message)
    atoms = tuple(_open_entry(path, entry, base, allow_pickle=allow_pickle) for entry in manifest["atoms"])
    return _with_directions(path, Dictionary(atoms, _read_gram(path, atoms)))


def _with_directions(path: Path, dictionary: Dictionary) -> Dictionary:
    """Give every atom of a dictionary on disk its leading directions; headers only."""
    atoms = (replace(atom, directions=_read_directions(path, atom)) for atom in dictionary.atoms)
    return replace(dictionary, atoms=tuple(atoms))


def _read_directions(path: Path, atom: Atom) -> TaskVector | None:
    if atom.kind == "adapter":
        return atom.vector if is_low_rank(atom.vector) else None
    tensors, _ = read_header(_directions_file(path, atom.name))
    found: dict[str, Delta] = {}
    for name in sorted({stored.rpartition(".")[0] for stored in tensors}):
        left, right, change = tensors.get(f"{name}.left"), tensors.get(f"{name}.right"), atom.vector.deltas.get(name)
        if not (left and right and change) or not _are_factors(left.shape, right.shape, change.shape):
            message = f"{path}: the directions of {atom.name!r} in tensor {name!r} are incomplete; build again"
            raise DictionaryError(message)
        found[name] = LowRank(left, right, transposed=False, scale=1.0)
    return TaskVector(atom.name, atom.vector.digest, found)


def _are_factors(left: tuple[int, ...], right: tuple[int, ...], product: tuple[int, int]) -> bool:
    return len(left) == len(right) == 2 and left[1] == right[0] and (left[0], right[1]) == product


def _open_entry(path: Path, entry: Mapping[str, Any], base: Base, *, allow_pickle: bool) -> Atom:
    name, commit = entry["name"], entry.get("commit")
    if entry["kind"] == "adapter":
        copy = path / "atoms" / name
        vector, _ = read_task_vector(copy, base, name, allow_pickle=allow_pickle)
        # The digest is trusted here (verify() checks it): hashing a thousand adapters would cost reading them.
        return Atom(replace(vector, digest=entry["digest"]), Source(entry["reference"], copy, commit), "adapter")
    reference = f"{entry['reference'].partition('@')[0]}@{commit}" if commit else entry.get("path")
    if not isinstance(reference, str):
        raise DictionaryError(f"{path / MANIFEST}: atom {name!r} has neither a path nor a commit")
    atom = open_atom(reference, base, name=name, allow_pickle=allow_pickle)
    if atom.vector.digest != entry["digest"]:
        raise DictionaryError(f"{path}: atom {name!r} ({reference}) has changed since it was added; build again")
    return replace(atom, source=replace(atom.source, reference=entry["reference"]))


def _read_gram(path: Path, atoms: Sequence[Atom]) -> dict[str, FloatArray]:
    size = len(atoms)
    gram: dict[str, FloatArray] = {}
    for position, atom in enumerate(atoms):
        tensors, _ = read_header(_products_file(path, atom.name))
        for name, tensor in tensors.items():
            if tensor.shape != (position + 1,):
                raise DictionaryError(f"{path}: the products of {atom.name!r} have the wrong size; build again")
            row = values(tensor)[0]
            matrix = gram.setdefault(name, np.zeros((size, size)))
            matrix[position, : position + 1] = row
            matrix[: position + 1, position] = row
    return dict(sorted(gram.items()))


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
    if not _is_as_written(_products_file(path, name), entry["gram_sha256"]):
        yield f"atom {name}: its inner products are missing or changed"
    if entry["kind"] == "checkpoint" and not _is_as_written(_directions_file(path, name), entry["directions_sha256"]):
        yield f"atom {name}: its leading directions are missing or changed"
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

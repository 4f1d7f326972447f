"""What a run has accumulated, kept in a folder, so that a run that was stopped goes on from it, to the same bits.

Each pass over the files has a journal: a file that finished units are appended to, each with its length and a checksum.
What was being written when the run was stopped does not match its checksum; it is cut off and computed again. So
nothing is synchronised to the disk, and a power failure costs the last units at most. A journal is named by a digest of
all that its pass reads, so that it is never used for another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from unmerge._version import __version__
from unmerge.accumulate import Contact, Plan, Products
from unmerge.checkpoint.dtypes import DType, FloatArray
from unmerge.errors import StateError
from unmerge.task_vector import TaskVector

SUFFIX, WRITTEN = ".journal", ".written"
_HEAD = struct.Struct("<Q16s")
_CONTACT = ("rows", "columns", "cores", "along", "across", "corner")


@dataclass(slots=True)
class StateFolder:
    """The journals of one run; see `unmerge.accumulate.State`.

    Attributes
    ----------
    path : Path
        The folder; made when it is needed.
    """

    path: Path
    _known: bool = False

    def journal(
        self, work: Plan, new: Sequence[TaskVector], known: Sequence[TaskVector], contacts: Collection[str]
    ) -> UnitJournal:
        """Open the journal of a pass, with what an earlier run left in it.

        Raises
        ------
        StateError
            If the folder holds journals, and they are of another run.
        """
        file = self.path / f"{pass_digest(work, new, known, contacts)}{SUFFIX}"
        others = self._journals()
        if not self._known and others and file not in others:
            message = (
                f"{self.path}: holds what another run accumulated (of other models or options, of files that have "
                "changed since, or of another version); give another folder, or delete this one to start anew"
            )
            raise StateError(message)
        self._known = True
        with _told(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            return UnitJournal(file, _recover(file))

    def dictionary(self) -> Path:
        """Make the folder in which a dictionary is built until it is whole.

        Raises
        ------
        StateError
            If that is not possible.
        """
        folder = self.path / "dictionary"
        with _told(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def written(self, atom: str) -> dict[str, Any] | None:
        """Return the entry of an atom, by its digest, that an earlier run had written to its dictionary."""
        try:
            entry: dict[str, Any] = json.loads(self._entry(atom).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # it is written anew
            return None
        return entry

    def keep(self, atom: str, entry: Mapping[str, Any]) -> None:
        """Note that an atom, by its digest, is written to the dictionary.

        Raises
        ------
        StateError
            If it cannot be noted.
        """
        with _told(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            temporary = self.path / f"{atom}.tmp"
            temporary.write_text(json.dumps(entry), encoding="utf-8")
            temporary.replace(self._entry(atom))

    def _entry(self, atom: str) -> Path:
        return self.path / f"{atom}{WRITTEN}"

    def clear(self) -> None:
        """Delete what a run that is done does not need, and the folder if nothing else is in it."""
        with _told(self.path):
            for file in (*self._journals(), *self.path.glob(f"*{WRITTEN}"), *self.path.glob("*.tmp")):
                file.unlink()
            if self.path.is_dir() and not any(self.path.iterdir()):
                self.path.rmdir()

    def _journals(self) -> list[Path]:
        return sorted(self.path.glob(f"*{SUFFIX}"))


@dataclass(frozen=True, slots=True)
class UnitJournal:
    """The finished units of one pass; see `unmerge.accumulate.Journal`.

    Attributes
    ----------
    file : Path
        What they are appended to.
    finished : dict of int to Products
        What it held when it was opened, by the unit's place in the plan.
    """

    file: Path
    finished: Mapping[int, Products]

    def keep(self, place: int, products: Products) -> None:
        """Append the products of a unit.

        Raises
        ------
        StateError
            If they cannot be written.
        """
        payload = _pack(place, products)
        with _told(self.file), self.file.open("ab", buffering=0) as stream:
            stream.write(_HEAD.pack(len(payload), _checksum(payload)) + payload)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn what goes wrong with a file into one line."""
    try:
        yield
    except OSError as error:
        raise StateError(f"{path}: cannot be written: {error.strerror or error}") from error


def _recover(file: Path) -> dict[int, Products]:
    """Read the whole records of a journal, and cut off what follows them."""
    if not file.exists():
        return {}
    found: dict[int, Products] = {}
    good = 0
    with file.open("r+b") as stream:
        for payload in _records(stream, file.stat().st_size):
            place, products = _unpack(payload)
            found[place] = products
            good += _HEAD.size + len(payload)
        stream.truncate(good)
    return found


def _records(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield the contents of records up to the first that is not whole."""
    while True:
        head = stream.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return
        length, checksum = _HEAD.unpack(head)
        payload = stream.read(length) if length <= size - stream.tell() else b""
        if len(payload) < length or _checksum(payload) != checksum:
            return
        yield payload


def _checksum(payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=16).digest()


def _pack(place: int, products: Products) -> bytes:
    from safetensors.numpy import save

    arrays: dict[str, Any] = {
        "numbers": np.array([place, products.count]),
        "gram": products.gram,
        "rounding": products.rounding,
    }
    if products.contact is not None:
        arrays |= {name: getattr(products.contact, name) for name in _CONTACT}
        arrays["ranks"] = np.frombuffer(json.dumps(products.contact.ranks).encode(), np.uint8)
    packed: bytes = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return packed


def _unpack(payload: bytes) -> tuple[int, Products]:
    from safetensors.numpy import load

    arrays = {name: array.copy() for name, array in load(payload).items()}
    place, count = (int(number) for number in arrays["numbers"])
    contact = None
    if "ranks" in arrays:
        ranks = tuple((digest, rank) for digest, rank in json.loads(arrays["ranks"].tobytes()))
        contact = Contact(ranks, *(arrays[name] for name in _CONTACT))
    return place, Products(arrays["gram"], arrays["rounding"], count, contact)


def pass_digest(work: Plan, new: Sequence[TaskVector], known: Sequence[TaskVector], contacts: Collection[str]) -> str:
    """Return a hex digest of all that the sums of a pass depend on.

    That is the units, where each tensor is stored, and the size and the time of change of every file: fingerprints
    are taken of samples, and would not see a file of which a part was written anew.
    """
    digest = hashlib.sha256()
    digest.update(f"{__version__} {np.__version__} {work.float64} {work.device} {sorted(contacts)}\n".encode())
    for unit in work.units:
        digest.update(f"{unit.name} {unit.start} {unit.stop} {unit.columns} {work.sizes[unit.name]}\n".encode())
    names = {unit.name for unit in work.units}
    files: set[Path] = set()
    for vector in (*new, None, *known):
        _describe_vector(vector, names, digest, files)
    _describe_files(files, digest)
    return digest.hexdigest()


def atom_digest(
    folder: Path, base: str, vector: TaskVector, row: Mapping[str, FloatArray] | None, more: Collection[Path]
) -> str:
    """Return a hex digest of all that a dictionary's folder keeps of an atom: its row of products, and more files.

    `base` is the base's own digest.
    """
    digest = hashlib.sha256(f"{__version__} {np.__version__} {folder.absolute()} {base} {vector.name}\n".encode())
    files = {file.absolute() for file in more}
    _describe_vector(vector, vector.deltas, digest, files)
    _describe(tuple((row or {}).items()), digest, files)
    _describe_files(files, digest)
    return digest.hexdigest()


def _describe_vector(vector: TaskVector | None, names: Collection[str], digest: Any, files: set[Path]) -> None:
    digest.update(f"{vector and vector.digest}\n".encode())
    for name, delta in sorted(vector.deltas.items()) if vector else ():
        if name in names:
            digest.update(f"{name} ".encode())
            _describe(delta, digest, files)


def _describe_files(files: Collection[Path], digest: Any) -> None:
    for file in sorted(files):
        found = file.stat() if file.exists() else None  # weights on the Hub have no file; their commit is in the path
        digest.update(f"{file} {found and (found.st_size, found.st_mtime_ns)}\n".encode())


def _describe(value: Any, digest: Any, files: set[Path]) -> None:
    """Add what a change is made of: its numbers, arrays in memory, and places in files."""
    if isinstance(value, Path):
        files.add(value.absolute())
        digest.update(f"{value.absolute()} ".encode())
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype} {value.shape} ".encode())
        digest.update(np.ascontiguousarray(value).data)
    elif isinstance(value, DType):
        digest.update(f"{value.name} ".encode())
    elif dataclasses.is_dataclass(value):
        digest.update(f"{type(value).__name__} ".encode())
        for part in dataclasses.fields(value):
            if not part.name.startswith("_"):  # what is only remembered
                _describe(getattr(value, part.name), digest, files)
    elif isinstance(value, tuple):
        for item in value:
            _describe(item, digest, files)
    else:
        digest.update(f"{value!r} ".encode())

"""One stored tensor, read some rows at a time."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from unmerge.checkpoint.dtypes import DType, FloatArray, RawArray
from unmerge.errors import CheckpointError

_LINE = 64
"""Bytes of a cache line. The system copies to memory that begins within one five times as slowly on some processors."""
LEAST_MAPPED = 1 << 22
"""Bytes that are mapped at least: mapping and unmapping some hundred kilobytes takes longer than copying them."""
_CUT = "the file ended too early; it was changed or cut while it was being read"


class Tensor(Protocol):
    """A tensor that can be read by rows, without a framework and without loading its file.

    Every tensor is seen as a matrix: a vector is one row, and a tensor of more than two dimensions keeps its
    first dimension and flattens the rest.
    """

    @property
    def name(self) -> str:
        """The name under which the checkpoint stores it."""
        ...

    @property
    def dtype(self) -> DType:
        """How it is stored."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape as stored."""
        ...

    @property
    def origin(self) -> Path:
        """The file that it is in, for messages."""
        ...

    def read(self, start: int, stop: int) -> RawArray:
        """Return the stored bits of rows `start` to `stop`, shape (stop - start, columns)."""
        ...


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the (rows, columns) of the matrix that a tensor of this shape is seen as."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def values(tensor: Tensor, start: int = 0, stop: int | None = None) -> FloatArray:
    """Return rows `start` to `stop` (all by default) of a tensor as exact float64 values."""
    rows = matrix_shape(tensor.shape)[0] if stop is None else stop
    return tensor.dtype.widen(tensor.read(start, rows))


def lines(tensor: Tensor, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> FloatArray:
    """Return some rows and columns of a tensor as exact float64 values, reading the rows alone.

    Parameters
    ----------
    rows, columns : array of int, shapes (s,) and (c,)
        Rows ascend.

    Returns
    -------
    array, shape (s, c)
    """
    return tensor.dtype.widen(np.ascontiguousarray(read_runs(tensor, _runs(rows))[:, columns]))


def read_runs(tensor: Tensor, runs: Sequence[tuple[int, int]]) -> RawArray:
    """Return the stored bits of ranges of rows, one below the other; a file is opened once for all of them."""
    if isinstance(tensor, FileTensor):
        return tensor.read_runs(runs)
    return np.concatenate([tensor.read(start, stop) for start, stop in runs])


def _runs(rows: NDArray[np.intp]) -> list[tuple[int, int]]:
    """Split ascending row numbers into runs of neighbours."""
    first = np.concatenate([[True], np.diff(rows) > 1])
    last = np.concatenate([first[1:], [True]])
    return list(zip(rows[first].tolist(), (rows[last] + 1).tolist(), strict=True))


def borrowed(tensor: Tensor, start: int, stop: int) -> RawArray:
    """Return the stored bits of rows as `Tensor.read` does, but read-only, and to be let go soon.

    Many of a file are mapped: where the system has them already, no memory is taken, and nothing copied. But each
    mapping holds a descriptor, and if the file is cut meanwhile, the process dies. A few are copied sooner than mapped.
    """
    size = (stop - start) * matrix_shape(tensor.shape)[1] * tensor.dtype.itemsize
    if isinstance(tensor, FileTensor) and size >= LEAST_MAPPED:
        return tensor.mapped(start, stop)
    return tensor.read(start, stop)


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor at a known place of a file.

    Attributes
    ----------
    offset : int
        Where its bytes begin in the file.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    origin: Path
    offset: int

    def __reduce__(self) -> tuple[type[FileTensor], tuple[str, DType, tuple[int, ...], Path, int]]:
        # Who unpickles it may be in another folder.
        return FileTensor, (self.name, self.dtype, self.shape, self.origin.absolute(), self.offset)

    def read(self, start: int, stop: int) -> RawArray:
        """Read rows from the file; see `Tensor.read`.

        Raises
        ------
        CheckpointError
            If the file cannot be read, or has become shorter since its header was read.
        """
        raw = self._empty(stop - start)
        self._read([(start, stop)], raw)
        return raw

    def mapped(self, start: int, stop: int) -> RawArray:
        """Map rows of the file, and wait until they are there; see `borrowed`.

        Raises
        ------
        CheckpointError
            If the file cannot be read, or has become shorter since its header was read.
        """
        columns = matrix_shape(self.shape)[1]
        first, size = self.offset + start * columns * self.dtype.itemsize, (stop - start) * columns
        if not size or first % self.dtype.itemsize:
            return self.read(start, stop)
        before = first % mmap.ALLOCATIONGRANULARITY
        with _told(self), self.origin.open("rb", buffering=0) as file:
            length = before + size * self.dtype.itemsize
            if os.fstat(file.fileno()).st_size < first - before + length:
                raise OSError(_CUT)
            mapping = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=first - before)
        if hasattr(mapping, "madvise"):
            mapping.madvise(mmap.MADV_WILLNEED)
        np.frombuffer(mapping, np.uint8)[:: mmap.PAGESIZE].max()
        return np.frombuffer(mapping, self.dtype.raw, size, before).reshape(stop - start, columns)

    def read_runs(self, runs: Sequence[tuple[int, int]]) -> RawArray:
        """Return the stored bits of ranges of rows as one array; see `read`.

        Raises
        ------
        CheckpointError
            If the file cannot be read, or has become shorter since its header was read.
        """
        raw = self._empty(sum(stop - start for start, stop in runs))
        self._read(runs, raw)
        return raw

    @property
    def end(self) -> int:
        """Where its bytes end in the file."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    def _empty(self, rows: int) -> RawArray:
        columns = matrix_shape(self.shape)[1]
        return _at_line(rows * columns * self.dtype.itemsize).view(self.dtype.raw).reshape(rows, columns)

    def _read(self, runs: Iterable[tuple[int, int]], out: RawArray) -> None:
        row_bytes = matrix_shape(self.shape)[1] * self.dtype.itemsize
        view, done = out.reshape(-1).view(np.uint8).data, 0
        # Opened anew each time: no descriptors to keep or to share between threads; 20 us against
        # milliseconds for a block.
        with _told(self), self.origin.open("rb", buffering=0) as file:
            for start, stop in runs:
                size = (stop - start) * row_bytes
                file.seek(self.offset + start * row_bytes)
                _fill(file, view[done : done + size])
                done += size


@contextmanager
def _told(tensor: FileTensor) -> Iterator[None]:
    """Turn what goes wrong with a tensor's file into one line."""
    try:
        yield
    except OSError as error:
        message = f"{tensor.origin}: cannot read tensor {tensor.name!r}: {error.strerror or error}"
        raise CheckpointError(message) from error


def _at_line(size: int) -> NDArray[np.uint8]:
    """Return so many bytes, at a multiple of `_LINE`."""
    memory = np.empty(size + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + size]


def _fill(file: FileIO, view: memoryview) -> None:
    # One read may return less than it was asked for (2 GiB on Linux).
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])
        if not got:
            raise OSError(_CUT)
        done += got


@dataclass(frozen=True, slots=True, eq=False)
class ArrayTensor:
    """A tensor that is already in memory (or mapped by a framework).

    Attributes
    ----------
    raw : array
        Its stored bits, in `shape`.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    origin: Path
    raw: RawArray

    def read(self, start: int, stop: int) -> RawArray:
        """Return a view of the rows; see `Tensor.read`."""
        return self.raw.reshape(matrix_shape(self.shape))[start:stop]


def in_memory(tensor: Tensor) -> ArrayTensor:
    """Read a tensor whole.

    Raises
    ------
    CheckpointError
        If its file cannot be read.
    """
    raw = tensor.read(0, matrix_shape(tensor.shape)[0]).reshape(tensor.shape)
    return ArrayTensor(tensor.name, tensor.dtype, tensor.shape, tensor.origin, raw)


def read_together(tensors: Collection[Tensor]) -> dict[int, ArrayTensor]:
    """Read tensors whole, by their ids; those that lie side by side in a file are read at once.

    Raises
    ------
    CheckpointError
        If a file cannot be read.
    """
    found = {id(tensor): in_memory(tensor) for tensor in tensors if not isinstance(tensor, FileTensor)}
    stored = [tensor for tensor in tensors if isinstance(tensor, FileTensor)]
    for run in _side_by_side(sorted(stored, key=lambda tensor: (str(tensor.origin), tensor.offset))):
        start, stop = run[0].offset, run[-1].end
        memory = _at_line(stop - start)
        with _told(run[0]), run[0].origin.open("rb", buffering=0) as file:
            file.seek(start)
            _fill(file, memory.data)
        for tensor in run:
            raw = memory[tensor.offset - start : tensor.end - start].view(tensor.dtype.raw).reshape(tensor.shape)
            found[id(tensor)] = ArrayTensor(tensor.name, tensor.dtype, tensor.shape, tensor.origin, raw)
    return found


def _side_by_side(tensors: Sequence[FileTensor]) -> Iterator[list[FileTensor]]:
    """Split tensors, by file and offset, where one does not begin at the end of the one before."""
    run: list[FileTensor] = []
    for tensor in tensors:
        if run and (tensor.origin, tensor.offset) != (run[-1].origin, run[-1].end):
            yield run
            run = []
        run.append(tensor)
    if run:
        yield run

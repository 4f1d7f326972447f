"""The header of a safetensors file: read, checked and never trusted.

The format is an 8-byte little-endian length, a JSON object of that length, and the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from unmerge.checkpoint.dtypes import DTYPES
from unmerge.checkpoint.tensor import FileTensor
from unmerge.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

_FORMAT_DTYPES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "I32": 4,
    "U32": 4, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip


class UnreadTensor(NamedTuple):
    """A tensor that exists but is not of a floating-point type that unmerge reads."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> tuple[dict[str, FileTensor], list[UnreadTensor]]:
    """Read the header of one safetensors file.

    Returns
    -------
    tensors : dict
        The floating-point tensors by name; no weights are read.
    unread : list
        Tensors of types that unmerge does not read (integers, 8-bit floats), to be told.

    Raises
    ------
    CheckpointError
        If the file is missing, cut short, or not a safetensors file.
    """
    text, size = _load(path)
    return locate(parse(text, path), 8 + len(text), size, path)


def locate(
    header: dict[str, Any], data_start: int, size: int, path: Path
) -> tuple[dict[str, FileTensor], list[UnreadTensor]]:
    """Return the tensors of a parsed header, and those of types that are not read; see `read_header`.

    Parameters
    ----------
    data_start, size : int
        Bytes before the weights, and of the whole file.
    path : Path
        The file, for messages.
    """
    tensors: dict[str, FileTensor] = {}
    unread: list[UnreadTensor] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, begin, end = _entry(path, name, entry)
        if data_start + end > size:
            message = (
                f"{path}: cut short: tensor {name!r} ends at byte {data_start + end:,}, "
                f"the file has {size:,}; download it again"
            )
            raise CheckpointError(message)
        if dtype in DTYPES:
            tensors[name] = FileTensor(name, DTYPES[dtype], shape, path, data_start + begin)
        else:
            unread.append(UnreadTensor(name, dtype, shape))
    return tensors, unread


def _load(path: Path) -> tuple[bytes, int]:
    """Return the text of a file's header, and the file's size."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                message = (
                    f"{path}: not a safetensors file, or cut short: its header claims {length:,} bytes, "
                    f"the file has {size:,}"
                )
                raise CheckpointError(message)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return text, size


def parse(text: bytes, path: Path) -> dict[str, Any]:
    """Return the JSON object of a header.

    Raises
    ------
    CheckpointError
        If it is none.
    """
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: not a safetensors file: its header is not a JSON object")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        valid = all(type(number) is int and number >= 0 for number in numbers) and isinstance(dtype, str)
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise CheckpointError(f"{path}: damaged header: tensor {name!r} has no valid dtype, shape and offsets")
    width = DTYPES[dtype].itemsize if dtype in DTYPES else _FORMAT_DTYPES.get(dtype)
    if end < begin or (width is not None and end - begin != math.prod(shape) * width):
        message = (
            f"{path}: damaged header: tensor {name!r} of type {dtype} and shape {list(shape)} "
            f"cannot take {end - begin:,} bytes"
        )
        raise CheckpointError(message)
    return dtype, shape, begin, end

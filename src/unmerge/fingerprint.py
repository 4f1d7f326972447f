"""Fingerprints of weights from a few thousand bytes per tensor.

They do not depend on shards or file layout. A fingerprint tells two models apart; it does not prove that two
files are equal in every byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

import numpy as np

from unmerge.alignment import Alignment
from unmerge.checkpoint.adapter import Adapter
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.checkpoint.reader import Checkpoint
from unmerge.checkpoint.tensor import Tensor, matrix_shape, read_runs
from unmerge.errors import AlignmentError

SAMPLED_VALUES = 8192
"""Values read per tensor, in at most 8 runs of rows spread over it."""
MATRICES = 32
"""Matrices that tell whether two models have one base."""
_RUNS = 8
_LOWEST_COSINE = 0.5
_ADAPTER_KEYS = ("alpha_pattern", "fan_in_fan_out", "lora_alpha", "peft_type", "r", "rank_pattern", "use_dora",
                 "use_rslora")  # fmt: skip


def checkpoint_digest(checkpoint: Checkpoint) -> str:
    """Return a hex SHA-256 over names, types, shapes and sampled values of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"{name}\0{tensor.dtype.name}\0{tensor.shape}\0".encode())
        digest.update(np.ascontiguousarray(read_runs(tensor, sampled_rows(tensor))).data)
    return digest.hexdigest()


def remote_digest(checkpoint: Checkpoint, commit: str) -> str:
    """Return a hex SHA-256 over names, types and shapes of every tensor, and the Hub commit that pins their values."""
    digest = hashlib.sha256(f"{checkpoint.path}@{commit}\0".encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"{name}\0{tensor.dtype.name}\0{tensor.shape}\0".encode())
    return digest.hexdigest()


def adapter_digest(adapter: Adapter) -> str:
    """Return a hex SHA-256 over every stored value of an adapter and the options that give them meaning."""
    digest = hashlib.sha256()
    for piece in adapter_pieces(adapter):
        digest.update(piece)
    return digest.hexdigest()


def sampled_adapter_digest(adapter: Adapter) -> str:
    """Return a hex SHA-256 over the same with one run of values of every tensor."""
    digest = hashlib.sha256(b"sampled\0")
    for piece in adapter_pieces(adapter, SAMPLED_VALUES):
        digest.update(piece)
    return digest.hexdigest()


def adapter_pieces(adapter: Adapter, most: int | None = None) -> Iterator[bytes | memoryview]:
    """Yield what `adapter_digest` is computed of, in order; with `most`, about so many values of each tensor."""
    options = {key: adapter.config.get(key) for key in _ADAPTER_KEYS}
    yield json.dumps(options, sort_keys=True).encode()
    for name, tensor in _adapter_tensors(adapter):
        rows, columns = matrix_shape(tensor.shape)
        read = rows if most is None else min(rows, max(1, most // columns))
        yield f"{name}\0{tensor.dtype.name}\0{tensor.shape}\0".encode()
        yield np.ascontiguousarray(tensor.read(0, read)).data.cast("B")


def _adapter_tensors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    for module, factors in sorted(adapter.factors.items()):
        for part in (factors.a, factors.b, factors.bias, factors.magnitude):
            if part is not None:
                yield module, part
    yield from sorted(adapter.replaced.items())


def sampled_rows(tensor: Tensor) -> list[tuple[int, int]]:
    """Choose the rows of a tensor that its fingerprint reads: all, or evenly spread runs."""
    rows, columns = matrix_shape(tensor.shape)
    if rows * columns <= SAMPLED_VALUES:
        return [(0, rows)]
    length = max(1, SAMPLED_VALUES // (_RUNS * columns))
    count = min(_RUNS, rows // length)
    starts = np.linspace(0, rows - length, count).astype(int)
    return [(int(start), int(start) + length) for start in starts]


def weight_cosine(alignment: Alignment, most: int = MATRICES) -> float:
    """Return the cosine between the sampled matrices of a model and its base; 1.0 if there are none.

    Vectors (norms) are left out: they are close to one in every model.

    Parameters
    ----------
    most : int
        Look at this many matrices at most, spread over the model.
    """
    dot = ours = theirs = 0.0
    pairs = [pair for pair in alignment.pairs.values() if min(matrix_shape(pair.base.shape)) > 1]
    places = np.unique(np.linspace(0, len(pairs) - 1, most).astype(int))
    for pair in (pairs[place] for place in places if pairs):
        runs = [(start, min(stop, pair.rows)) for start, stop in sampled_rows(pair.base) if start < pair.rows]
        x, y = _both(pair.base, pair.other, runs)
        dot, ours, theirs = dot + float(x @ y), ours + float(x @ x), theirs + float(y @ y)
    return dot / float(np.sqrt(ours * theirs)) if ours > 0.0 and theirs > 0.0 else 1.0


def _both(first: Tensor, second: Tensor, runs: Sequence[tuple[int, int]]) -> tuple[FloatArray, FloatArray]:
    x, y = (tensor.dtype.widen(read_runs(tensor, runs)).ravel() for tensor in (first, second))
    finite = np.isfinite(x) & np.isfinite(y)  # a value that is not finite is reported, with its place, later
    return x[finite], y[finite]


def check_same_base(alignment: Alignment, label: str, most: int = MATRICES) -> None:
    """Refuse a model whose weights are unrelated to the base's.

    Fine-tunes and merges stay within a few percent of their base; independently trained models of one
    architecture have a cosine near zero.

    Parameters
    ----------
    most : int
        See `weight_cosine`.

    Raises
    ------
    AlignmentError
        If the sampled cosine is below 0.5.
    """
    cosine = weight_cosine(alignment, most)
    if cosine < _LOWEST_COSINE:
        message = (
            f"{label}: wrong base: the weights have a cosine of {cosine:.3f} with the base's (a fine-tune or a "
            "merge has over 0.9); give the base that it was made from"
        )
        raise AlignmentError(message)

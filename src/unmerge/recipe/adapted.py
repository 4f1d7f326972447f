"""A base with an adapter merged into it, as the checkpoint that PEFT would store; rows are made when they are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unmerge.alignment import has_vocabulary_rows
from unmerge.checkpoint.dtypes import DType, RawArray
from unmerge.checkpoint.reader import Checkpoint
from unmerge.checkpoint.tensor import Tensor, values
from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.task_vector import Delta, LowRank, TaskVector


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedTensor:
    """A stored tensor plus a change, rounded to the tensor's own type; see `Tensor`."""

    base: Tensor
    change: Delta
    rounds_change: bool

    @property
    def name(self) -> str:
        """The base's name of it."""
        return self.base.name

    @property
    def dtype(self) -> DType:
        """The base's."""
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The base's."""
        return self.base.shape

    @property
    def origin(self) -> Path:
        """The base's file."""
        return self.base.origin

    def read(self, start: int, stop: int) -> RawArray:
        """Return the bits of rows `start` to `stop`; see `Tensor.read`."""
        arithmetic = Arithmetic(self.dtype.name)
        change = self.change.block(start, stop)[0].astype(arithmetic.holder)
        if self.rounds_change:
            change = arithmetic.round(change)
        weights = values(self.base, start, stop).astype(arithmetic.holder)
        return _bits(arithmetic.round(weights + change), self.dtype)


def _bits(rounded: Array, dtype: DType) -> RawArray:
    if dtype.name == "BF16":
        return (rounded.view(np.uint32) >> np.uint32(16)).astype(dtype.raw)
    return rounded.astype("<f2").view(dtype.raw) if dtype.name == "F16" else rounded


def merged_adapter(base: Checkpoint, vector: TaskVector, *, safe_merge: bool = False) -> Checkpoint:
    """Return a base with the changes of an adapter merged into it.

    Equal bit for bit to what ``merge_and_unload`` stores, except where the order of additions inside a matrix product
    decides a rounding (a few elements of a million in 16 bits) and for DoRA.

    Parameters
    ----------
    base : Checkpoint
    vector : TaskVector
        What the adapter changes, against this base.
    safe_merge : bool
        PEFT's option of this name, which rounds the change to the weights' type before it is added. Otherwise it is
        added in float32 and the sum is rounded once; only changes of embeddings are always rounded before.
    """
    tensors = {name: _merged(tensor, vector.deltas.get(name), safe_merge) for name, tensor in base.tensors.items()}
    return Checkpoint(base.path, tensors, base.config, base.unread, (*base.notices, *vector.notices))


def _merged(tensor: Tensor, change: Delta | None, safe_merge: bool) -> Tensor:
    if change is None:
        return tensor
    of_embedding = isinstance(change, LowRank) and change.transposed and has_vocabulary_rows(tensor.name)
    return AdaptedTensor(tensor, change, rounds_change=safe_merge or of_embedding)

"""Task vectors: what a fine-tune changed, tensor by tensor, dense or low-rank.

A low-rank change keeps its two factors and is never multiplied out, except some rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from unmerge.alignment import Alignment, Skipped, extra_rows, has_vocabulary_rows, rename
from unmerge.checkpoint.adapter import Adapter, Factors
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.checkpoint.reader import Checkpoint
from unmerge.checkpoint.tensor import Tensor, matrix_shape, values
from unmerge.errors import AlignmentError

BLOCK_ELEMENTS = 1 << 19
"""Elements of one block of rows: what is held in memory at once, per dense task vector (4 MiB in float64)."""


class Delta(Protocol):
    """The change of one tensor, as a (rows, columns) matrix in weight units."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that reading the whole change takes from disk."""
        ...

    def block(self, start: int, stop: int) -> tuple[FloatArray, float]:
        """Return rows `start` to `stop` as float64, and the energy that storage rounding accounts for in them.

        Rows beyond the last are zero.
        """
        ...


def blocks(start: int, stop: int, columns: int) -> Iterator[tuple[int, int]]:
    """Split rows into blocks of at most `BLOCK_ELEMENTS`, the same for every file layout."""
    step = max(1, BLOCK_ELEMENTS // max(1, columns))
    for first in range(start, stop, step):
        yield first, min(stop, first + step)


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """``scale * left @ right``, read from the two stored factors.

    Attributes
    ----------
    left_factor, right_factor : Tensor
        Stored as (rows, r) and (r, columns), or both transposed.
    transposed : bool
        Whether they are stored transposed (embeddings, fan_in_fan_out).
    scale : float
        PEFT's scaling.
    """

    left_factor: Tensor
    right_factor: Tensor
    transposed: bool
    scale: float

    @property
    def rank(self) -> int:
        """The inner dimension r."""
        return self.left_factor.shape[0 if self.transposed else 1]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the product."""
        own, other = (1, 0) if self.transposed else (0, 1)
        return self.left_factor.shape[own], self.right_factor.shape[other]

    @property
    def nbytes(self) -> int:
        """Bytes of the two factors."""
        return sum(
            rank * extent * factor.dtype.itemsize
            for factor in (self.left_factor, self.right_factor)
            for rank, extent in (factor.shape,)
        )

    def left(self, start: int, stop: int) -> FloatArray:
        """Return rows of the left factor, shape (stop - start, r); rows beyond the last are zero."""
        last = max(start, min(stop, self.shape[0]))
        if self.transposed:
            found = np.ascontiguousarray(values(self.left_factor)[:, start:last].T)
        else:
            found = values(self.left_factor, start, last)
        return _padded(found, stop - start)

    def right(self) -> FloatArray:
        """Return the right factor, shape (r, columns)."""
        stored = values(self.right_factor)
        return np.ascontiguousarray(stored.T) if self.transposed else stored

    def block(self, start: int, stop: int) -> tuple[FloatArray, float]:
        """Return rows of the product, in PEFT's order: factors first, then the scale; nothing was rounded."""
        product: FloatArray = self.left(start, stop) @ self.right()
        product *= self.scale
        return product, 0.0


def _padded(found: FloatArray, rows: int) -> FloatArray:
    if len(found) == rows:
        return found
    padded = np.zeros((rows, found.shape[1]))
    padded[: len(found)] = found
    return padded


@dataclass(frozen=True, slots=True, eq=False)
class Difference:
    """A stored tensor minus the base's; rows that only one of them has are zero."""

    tuned: Tensor
    base: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) that both have."""
        rows, columns = matrix_shape(self.base.shape)
        return min(rows, matrix_shape(self.tuned.shape)[0]), columns

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        rows, columns = self.shape
        return rows * columns * (self.tuned.dtype.itemsize + self.base.dtype.itemsize)

    def block(self, start: int, stop: int) -> tuple[FloatArray, float]:
        """Return rows of the exact difference, and the energy of rounding the fine-tune to its storage type."""
        last = max(start, min(stop, self.shape[0]))
        raw = self.tuned.read(start, last)
        difference = self.tuned.dtype.widen(raw)
        difference -= values(self.base, start, last)
        return _padded(difference, stop - start), self.tuned.dtype.rounding_energy(raw)


@dataclass(frozen=True, slots=True, eq=False)
class Scaled:
    """A stored tensor times a number: the bias of ``lora_B``."""

    tensor: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the tensor."""
        return matrix_shape(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        rows, columns = self.shape
        return rows * columns * self.tensor.dtype.itemsize

    def block(self, start: int, stop: int) -> tuple[FloatArray, float]:
        """Return rows of the scaled tensor; nothing was rounded."""
        return values(self.tensor, start, stop) * self.scale, 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """A replaced tensor and a low-rank change on top of it (an adapted embedding that was also saved whole)."""

    first: Delta
    second: Delta

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the first."""
        return self.first.shape

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.first.nbytes + self.second.nbytes

    def block(self, start: int, stop: int) -> tuple[FloatArray, float]:
        """Return rows of the sum, and the rounding energy of both."""
        first, first_rounding = self.first.block(start, stop)
        second, second_rounding = self.second.block(start, stop)
        return first + second, first_rounding + second_rounding


@dataclass(frozen=True, slots=True, eq=False)
class Dora:
    """The change that DoRA makes, dense against the base.

    ``W' = m / ||W0 + s B A|| * (W0 + s B A)`` with one norm per output; see arXiv:2402.09353 and PEFT's
    ``DoraLinearVariant.merge_safe``. Outputs are rows, or columns where the weights are stored transposed.
    """

    low_rank: LowRank
    magnitude: Tensor
    base: Tensor
    _norms: list[FloatArray] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the weights."""
        return self.low_rank.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the factors and of the base's tensor."""
        rows, columns = self.shape
        return self.low_rank.nbytes + rows * columns * self.base.dtype.itemsize

    def block(self, start: int, stop: int) -> tuple[FloatArray, float]:
        """Return rows of the exact change; nothing was rounded."""
        weights = values(self.base, start, stop)
        moved = weights + self.low_rank.block(start, stop)[0]
        magnitude = values(self.magnitude).ravel()
        if self.low_rank.transposed:
            factor = (magnitude / self._column_norms())[np.newaxis, :]
        else:
            factor = (magnitude[start:stop] / np.linalg.norm(moved, axis=1))[:, np.newaxis]
        moved *= factor
        moved -= weights
        return moved, 0.0

    def _column_norms(self) -> FloatArray:
        # Column norms need all rows, so they cost one pass over the tensor, once.
        if not self._norms:
            rows, columns = self.shape
            energy = np.zeros(columns)
            for start, stop in blocks(0, rows, columns):
                moved = values(self.base, start, stop) + self.low_rank.block(start, stop)[0]
                energy += np.einsum("ij,ij->j", moved, moved)
            self._norms.append(np.sqrt(energy))
        return self._norms[0]


@dataclass(frozen=True, slots=True, eq=False)
class Residual:
    """What known changes leave of a target's: the target minus each of them times its coefficient.

    Attributes
    ----------
    target : Delta or None
        The change to explain; None is no change.
    atoms : tuple of (Delta, float)
        Known changes and their coefficients; at least one where there is no target.
    """

    target: Delta | None
    atoms: tuple[tuple[Delta, float], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the target, or of the first known change."""
        return self.atoms[0][0].shape if self.target is None else self.target.shape

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(delta.nbytes for delta, _ in self.atoms) + (0 if self.target is None else self.target.nbytes)

    def block(self, start: int, stop: int) -> tuple[FloatArray, float]:
        """Return rows of the residual, and the rounding energy of the target and of the scaled known changes."""
        if self.target is None:
            residual, rounding = np.zeros((stop - start, self.shape[1])), 0.0
        else:
            residual, rounding = self.target.block(start, stop)
        for delta, coefficient in self.atoms:
            known, known_rounding = delta.block(start, stop)
            residual = residual - coefficient * known
            rounding += coefficient**2 * known_rounding
        return residual, rounding


@dataclass(frozen=True, slots=True, eq=False)
class TaskVector:
    """What a fine-tune changed.

    Attributes
    ----------
    name : str
        What users call it.
    digest : str
        Hex digest of its contents; orders computations, so that the order of arguments changes no bit.
    deltas : mapping
        Changes by base tensor name; absent tensors are unchanged.
    skipped : tuple of Skipped
        What of it could not be compared with the base.
    notices : tuple of str
        What a user should know about its files.
    """

    name: str
    digest: str
    deltas: Mapping[str, Delta]
    skipped: tuple[Skipped, ...] = ()
    notices: tuple[str, ...] = ()


def checkpoint_deltas(alignment: Alignment) -> dict[str, Delta]:
    """Return the dense changes of a full model that was aligned with its base."""
    return {name: Difference(pair.other, pair.base) for name, pair in alignment.pairs.items()}


def adapter_deltas(
    adapter: Adapter, base: Checkpoint, label: str
) -> tuple[dict[str, Delta], tuple[Skipped, ...], tuple[str, ...]]:
    """Return the changes that a PEFT LoRA adapter makes to the base, what has no place there, and notices.

    Equal to what PEFT's ``merge_and_unload`` adds to each weight (``get_delta_weight`` and its variants).

    Raises
    ------
    AlignmentError
        If the adapter has a module that the base lacks, or of another shape.
    """
    stored = [f"{module}.weight" for module in adapter.factors] + list(adapter.replaced)
    renamed, notices = rename(base.tensors.keys(), stored)
    deltas: dict[str, Delta] = {}
    skipped: list[Skipped] = []
    for name, tensor in adapter.replaced.items():
        place = _base_tensor(base, renamed[name], label)
        _check_replaced(renamed[name], tensor, place, label)
        deltas[renamed[name]] = Difference(tensor, place)
        skipped.extend(extra_rows(renamed[name], label, place.shape, tensor.shape))
    for module, factors in adapter.factors.items():
        name = renamed[f"{module}.weight"]
        place = _base_tensor(base, name, label)
        weight = _module_delta(name, factors, place, adapter, label)
        if name not in deltas:
            skipped.extend(extra_rows(name, label, place.shape, weight.shape))
        deltas[name] = Sum(deltas[name], weight) if _replaces(deltas.get(name)) else weight
        if factors.bias is not None:
            bias = name.removesuffix("weight") + "bias"
            _base_tensor(base, bias, f"{label} (lora_bias)")
            deltas[bias] = Scaled(factors.bias, factors.scale)
    return dict(sorted(deltas.items())), tuple(skipped), notices


def _replaces(delta: Delta | None) -> bool:
    """Tell whether a saved tensor differs from the base's; PEFT saves an adapted embedding's base unchanged."""
    if delta is None:
        return False
    rows, columns = delta.shape
    return any(delta.block(start, stop)[0].any() for start, stop in blocks(0, rows, columns))


def _base_tensor(base: Checkpoint, name: str, label: str) -> Tensor:
    tensor = base.tensors.get(name)
    if tensor is None:
        message = f"{label}: adapts {name!r}, which the base does not have: an adapter of another model"
        raise AlignmentError(message)
    return tensor


def _check_replaced(name: str, tensor: Tensor, place: Tensor, label: str) -> None:
    resized = has_vocabulary_rows(name) and tensor.shape[1:] == place.shape[1:]
    if tensor.shape != place.shape and not resized:
        message = (
            f"{label}: tensor {name!r} has shape {list(tensor.shape)}, the base's has {list(place.shape)}: "
            "an adapter of another model"
        )
        raise AlignmentError(message)


def _module_delta(name: str, factors: Factors, place: Tensor, adapter: Adapter, label: str) -> Delta:
    product = (factors.b.shape[0], factors.a.shape[1])
    shape = matrix_shape(place.shape)
    transposed = factors.embedding or _is_transposed(product, shape, adapter.fan_in_fan_out)
    found = product[::-1] if transposed else product
    if found[1] != shape[1] or (found[0] != shape[0] and not has_vocabulary_rows(name)):
        message = (
            f"{label}: its change of {name!r} has shape {list(found)}, the base's tensor has {list(shape)}: "
            "an adapter of another model"
        )
        raise AlignmentError(message)
    left, right = (factors.a, factors.b) if transposed else (factors.b, factors.a)
    low_rank = LowRank(left, right, transposed, factors.scale)
    return low_rank if factors.magnitude is None else Dora(low_rank, factors.magnitude, place)


def _is_transposed(product: tuple[int, int], shape: tuple[int, int], fan_in_fan_out: bool) -> bool:
    # PEFT corrects a wrong fan_in_fan_out by the module's type; where the shape tells, it is believed.
    if product[0] != product[1] and product in {shape, shape[::-1]}:
        return product != shape
    return fan_in_fan_out

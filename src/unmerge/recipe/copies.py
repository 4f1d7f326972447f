"""Which tensor of which known model a tensor is: bit for bit, after a cast, times a number, or nearly.

A few thousand values of every tensor are compared with the same values of every tensor that plays the same role and
has its shape. That leaves few candidates. Tensors that belong together are then streamed side by side and compared
element by element: each file is read once, whatever it is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from unmerge.alignment import HEAD, LAYER, has_vocabulary_rows
from unmerge.checkpoint.dtypes import DType, FloatArray, RawArray
from unmerge.checkpoint.reader import Checkpoint
from unmerge.checkpoint.tensor import Tensor, matrix_shape, values
from unmerge.errors import AlignmentError, RecipeError
from unmerge.fingerprint import sampled_rows
from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.recipe.factor import (
    Bounds,
    common_numbers,
    decimals_of,
    factor_bounds,
    simplest,
    tells_factors,
)

SAMPLED = 4096
"""Values that are kept of each tensor to find candidates with."""
NEAR = 0.5
"""Relative distance up to which a tensor is near another, about the mean: unrelated weights have 1, fine-tunes of one
base less than 0.1."""
ABOUT_AS_NEAR = 4.0
"""How much more energy than to the nearest candidate a difference may have, in a sample, to be looked at whole."""
HELD_ELEMENTS = 1 << 21
"""Elements that are held at once, of all tensors that are compared side by side (20 MiB)."""
ROUNDING = 2.0
"""Distances up to this many times what storing the target accounts for may be rounding alone."""
_SCALED = 1e-3
_MOSTLY = 0.5

Kind = Literal["exact", "cast", "scaled", "near"]
"""How a tensor is made of another; all but the last give its every bit."""
_KINDS: tuple[Kind, ...] = ("exact", "cast", "scaled", "near")


class Role(NamedTuple):
    """What a tensor is for: its layer's number (None outside layers) and its name within the layer."""

    layer: int | None
    module: str


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor of a known model that a tensor of the target is a copy of.

    Attributes
    ----------
    model : str
        The model's name.
    tensor : str
        The tensor's name there.
    layer : int or None
        Its layer there.
    dtype : str
        The safetensors name of its type there.
    kind : str
        ``"exact"``: the same bits. ``"cast"``: after rounding to the target's type. ``"scaled"``: after that and
        multiplying with `factor`. ``"near"``: not in every bit.
    factor : float
        What it is multiplied with; of a near one, what removes most of the difference, where it does.
    equal : float
        Share of the elements that this makes bit for bit.
    distance : float
        Norm of the difference over that of the target's tensor.
    """

    model: str
    tensor: str
    layer: int | None
    dtype: str
    kind: Kind
    factor: float
    equal: float
    distance: float

    @property
    def makes_every_bit(self) -> bool:
        """Whether the target's tensor follows from it in every bit."""
        return self.kind != "near"


@dataclass(frozen=True, slots=True)
class Origin:
    """What a tensor of the target is a copy of.

    Attributes
    ----------
    tensor : str
        Its name.
    role : Role
    dtype : str
        The safetensors name of its type.
    elements : int
    magnitude : float
        Root mean square of its values, in weight units; estimated from some of them.
    zero : bool
        Whether all its values are zero. Zeros keep the signs of what was multiplied with 0, so they too may be copies.
    floor : float
        What storing it accounts for of its relative distance to anything; estimated from some of its values.
    copies : tuple of Copy
        The best, all equally good: models that share a tensor are all here. Empty if nothing is near.
    others : tuple of Copy
        Less good ones that were compared, nearest first.
    """

    tensor: str
    role: Role
    dtype: str
    elements: int
    magnitude: float
    zero: bool
    floor: float
    copies: tuple[Copy, ...]
    others: tuple[Copy, ...]

    @property
    def explained(self) -> bool:
        """Whether a known tensor makes it in every bit."""
        return bool(self.copies) and self.copies[0].makes_every_bit

    @property
    def within_rounding(self) -> bool:
        """Whether nothing but rounding need be between it and the best copies."""
        return bool(self.copies) and self.copies[0].distance <= ROUNDING * self.floor


def role_of(name: str) -> Role:
    """Return the role of a tensor of a dense model: names outside layers are roles of their own."""
    match = LAYER.search(name)
    return Role(int(match["layer"]), match["module"]) if match else Role(None, name)


def find_copies(
    target: Checkpoint,
    models: Mapping[str, Checkpoint],
    *,
    role: Callable[[str], Role] = role_of,
    advance: Callable[[int], None] | None = None,
) -> dict[str, Origin]:
    """Find what every tensor of a model is a copy of.

    Parameters
    ----------
    target : Checkpoint
        Of any number of layers.
    models : mapping of str to Checkpoint
        The known models by name; `merged_adapter` makes one of an adapter. A tensor is compared with those of the
        same module and shape in every layer; outside layers, with those of the same name.
    role : callable
        Tells the role of the target's tensors from their names; roles of the models' are those of dense models.
    advance : callable, optional
        Called with the number of tensors of the target that are done since the last call.

    Returns
    -------
    dict
        By tensor name, in the target's order; tensors without elements are left out.

    Raises
    ------
    RecipeError
        If no model is given.
    AlignmentError
        If no model has a tensor of the role and shape of any of the target's.
    """
    if not models:
        raise RecipeError("no known model was given to find copies of; give at least one")
    groups = list(_groups(target, models, role))
    if not any(group.sources for group in groups):
        name, tensor = next(iter(target.tensors.items()))
        message = (
            f"{target.path}: no known model has a tensor of the module and shape of one of its own (it has, for one, "
            f"{name!r} of shape {list(tensor.shape)}): another architecture or width"
        )
        raise AlignmentError(message)
    for group in groups:
        group.find_candidates()
    _agree_on_factors(groups)
    for group in groups:
        group.compare()
        if advance:
            advance(len(group.targets))
    found = {origin.tensor: origin for group in groups for origin in group.origins(role)}
    return {name: found[name] for name in target.tensors if name in found}


def may_be_copied(target: Checkpoint, models: Mapping[str, Checkpoint]) -> bool:
    """Tell whether some values of every tensor of a model are those of one tensor of a known model.

    Cheap where they are not: the first tensor that is like none ends it.

    Parameters
    ----------
    target : Checkpoint
    models : mapping of str to Checkpoint
        The known models by name.
    """
    return all(group.may_be_copied() for group in _groups(target, models, role_of))


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """A tensor of a known model."""

    model: str
    tensor: Tensor
    layer: int | None


@dataclass(slots=True, eq=False)
class _Pair:
    """A tensor of the target and a candidate, and what comparing them has shown so far.

    `bounds` are those of the factor, where the candidate seems to be multiplied with one. Sums are over elements, in
    squared weight units.
    """

    target: int
    source: int
    factor: float = 1.0
    bounds: Bounds | None = None
    equal: int = 0
    difference: float = 0.0
    product: float = 0.0
    energy: float = 0.0

    def add(self, target: FloatArray, source: FloatArray, dtype: DType) -> None:
        """Take in a block: values of the target, and those of the candidate rounded to the target's type."""
        arithmetic = Arithmetic(dtype.name)
        held, made = target.astype(arithmetic.holder), source.astype(arithmetic.holder)
        if self.factor != 1.0:
            made = arithmetic.round(made * arithmetic.holder.type(self.factor))
        self.equal += int(np.count_nonzero(_bits(held) == _bits(made)))
        gap = (target - source).ravel()
        self.difference += float(gap @ gap)
        self.product += float(target.ravel() @ source.ravel())
        self.energy += float(source.ravel() @ source.ravel())


def _bits(held: Array) -> NDArray[np.unsignedinteger]:
    bits: NDArray[np.unsignedinteger] = held.view(np.uint64 if held.dtype.itemsize == 8 else np.uint32)
    return bits


@dataclass(slots=True, eq=False)
class _Group:
    """Tensors of one module, shape and type in the target, and all of that module and shape in the models."""

    dtype: DType
    targets: list[Tensor]
    sources: list[_Source]
    pairs: list[_Pair] = field(default_factory=list)
    magnitudes: FloatArray = field(default_factory=lambda: np.zeros(0))
    floors: FloatArray = field(default_factory=lambda: np.zeros(0))
    energies: dict[int, float] = field(default_factory=dict)

    def find_candidates(self) -> None:
        """Choose, from samples, which pairs to compare whole."""
        targets = np.stack([_sample(tensor) for tensor in self.targets])
        energy = np.einsum("ij,ij->i", targets, targets)
        self.magnitudes = np.sqrt(energy / targets.shape[1])
        rounding = np.sum(self.dtype.spacing(targets) ** 2, axis=1) / 12.0
        self.floors = np.sqrt(np.divide(rounding, energy, out=np.zeros_like(energy), where=energy > 0.0))
        if not self.sources:
            return
        # One at a time: casting all of them at once would hold them twice.
        known = np.stack([self._rounded(source) for source in self.sources])
        for index, sample in enumerate(targets):
            self.pairs += _candidates(index, sample, known, self.dtype)

    def may_be_copied(self) -> bool:
        """Tell whether the samples of all targets are samples of sources, rounded to the targets' type."""
        known = np.stack([self._rounded(source) for source in self.sources]) if self.sources else np.zeros((0, 0))
        return len(known) > 0 and all(
            bool((known == _sample(tensor)).all(axis=1).any()) for tensor in self.targets
        )  # fmt: skip

    def _rounded(self, source: _Source) -> FloatArray:
        return Arithmetic(self.dtype.name).round(_sample(source.tensor)).astype(np.float64)

    def compare(self) -> None:
        """Compare the pairs element by element; what belongs together is streamed side by side."""
        for connected in _connected(self.pairs, len(self.targets)):
            self._stream(connected, {pair.target for pair in connected})

    def _stream(self, pairs: Sequence[_Pair], targets: set[int]) -> None:
        rows, columns = matrix_shape(self.targets[0].shape)
        sources = {pair.source for pair in pairs}
        self.energies.update(dict.fromkeys(targets, 0.0))
        step = max(1, HELD_ELEMENTS // (columns * (len(targets) + len(sources))))
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            held = {index: self.targets[index].read(start, stop) for index in targets}
            known = {index: self.sources[index].tensor.read(start, stop) for index in sources}
            with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is near nothing
                self._compare_block(pairs, held, known)

    def _compare_block(
        self, pairs: Sequence[_Pair], held: Mapping[int, RawArray], known: Mapping[int, RawArray]
    ) -> None:
        wide = {index: self.dtype.widen(raw) for index, raw in held.items()}
        for index, block in wide.items():
            self.energies[index] += float(block.ravel() @ block.ravel())
        cast: dict[int, FloatArray] = {}
        for pair in pairs:
            source = self.sources[pair.source].tensor
            if pair.factor == 1.0 and source.dtype is self.dtype and _same(held[pair.target], known[pair.source]):
                pair.equal += wide[pair.target].size
                continue
            if pair.source not in cast:
                cast[pair.source] = _cast(source.dtype.widen(known[pair.source]), self.dtype)
            pair.add(wide[pair.target], cast[pair.source], self.dtype)

    def origins(self, role: Callable[[str], Role]) -> Iterator[Origin]:
        """Return what was found, one for each tensor of the target."""
        for index, tensor in enumerate(self.targets):
            found = [self._copy(pair) for pair in self.pairs if pair.target == index]
            near = sorted((item for item in found if item.distance <= NEAR), key=_goodness)
            best = [item for item in near if _goodness(item) == _goodness(near[0])]
            yield Origin(
                tensor=tensor.name,
                role=role(tensor.name),
                dtype=self.dtype.name,
                elements=math.prod(tensor.shape),
                magnitude=float(self.magnitudes[index]),
                zero=bool(self.magnitudes[index] == 0.0) and self._energy(index) == 0.0,
                floor=float(self.floors[index]),
                copies=tuple(best),
                others=tuple(near[len(best) :]),
            )

    def _energy(self, index: int) -> float:
        if index not in self.energies:
            self._stream([], {index})
        return self.energies[index]

    def _copy(self, pair: _Pair) -> Copy:
        source = self.sources[pair.source]
        stored = source.tensor
        count = math.prod(stored.shape)
        factor, distance = pair.factor, 0.0
        if pair.equal == count:
            kind: Kind = "scaled" if factor != 1.0 else "exact" if stored.dtype is self.dtype else "cast"
        else:
            kind = "near"
            factor, distance = _nearest(pair, self.energies[pair.target])
        equal = pair.equal / count
        return Copy(source.model, stored.name, source.layer, stored.dtype.name, kind, factor, equal, distance)


def _goodness(copy: Copy) -> tuple[int, float]:
    return _KINDS.index(copy.kind), copy.distance


def _nearest(pair: _Pair, energy: float) -> tuple[float, float]:
    """Return the factor of a pair that is not equal, and the relative distance that it leaves."""
    if energy == 0.0:
        return 1.0, math.inf if pair.energy else 0.0
    fitted = pair.product / pair.energy if pair.energy else 0.0
    removed = (fitted - 1.0) ** 2 * pair.energy
    if removed < _MOSTLY * pair.difference:
        return 1.0, math.sqrt(pair.difference / energy)
    return fitted, math.sqrt(max(pair.difference - removed, 0.0) / energy)


def _groups(target: Checkpoint, models: Mapping[str, Checkpoint], role: Callable[[str], Role]) -> Iterator[_Group]:
    known: dict[tuple[str, tuple[int, ...]], list[_Source]] = {}
    for model, checkpoint in models.items():
        for name, tensor in _with_head(checkpoint).items():
            place = role_of(name)
            known.setdefault((place.module, tensor.shape), []).append(_Source(model, tensor, place.layer))
    wanted: dict[tuple[str, tuple[int, ...], str], list[Tensor]] = {}
    for name, tensor in target.tensors.items():
        if math.prod(tensor.shape):
            wanted.setdefault((role(name).module, tensor.shape, tensor.dtype.name), []).append(tensor)
    for (module, shape, _), tensors in wanted.items():
        yield _Group(tensors[0].dtype, tensors, known.get((module, shape), []))


def _with_head(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return a model's tensors; a tied output layer that is not stored is the embedding."""
    tensors = dict(checkpoint.tensors)
    embedding = next((name for name in tensors if has_vocabulary_rows(name)), None)
    if embedding and HEAD not in tensors and checkpoint.ties_embeddings:
        tensors[HEAD] = tensors[embedding]
    return tensors


def _sample(tensor: Tensor) -> FloatArray:
    """Return some values of a tensor, the same places for every tensor of its shape."""
    found = np.concatenate([values(tensor, start, stop).ravel() for start, stop in sampled_rows(tensor)])
    return np.asarray(np.nan_to_num(found[:: -(-found.size // SAMPLED)], nan=0.0, posinf=0.0, neginf=0.0))


def _cast(wide: FloatArray, dtype: DType) -> FloatArray:
    return Arithmetic(dtype.name).round(wide).astype(np.float64)


def _same(one: RawArray, other: RawArray) -> bool:
    # As integers: minus zero is not zero, and a value that is not a number equals itself.
    bits = f"<u{one.dtype.itemsize}"
    return bool(np.array_equal(one.view(bits), other.view(bits)))


def _candidates(index: int, sample: FloatArray, known: FloatArray, dtype: DType) -> list[_Pair]:
    """Return the pairs of one tensor of the target: equal in the sample, or else multiples, or else the nearest."""
    if not sample.any():
        return _zero_candidates(index, sample, known)
    near = _alike(sample, known)
    equal = [item for item in near if np.array_equal(known[item], sample)]
    if equal:
        return [_Pair(index, int(item)) for item in equal]
    # Not as a difference of energies, which would lose what is left of nearly equal ones.
    fitted = known[near] @ sample / np.einsum("ij,ij->i", known[near], known[near])
    gaps = known[near] * fitted[:, np.newaxis] - sample
    left = np.einsum("ij,ij->i", gaps, gaps)
    multiples = []
    for item in near[left <= _SCALED * float(sample @ sample)]:
        bounds = factor_bounds(sample, known[item], dtype)
        if bounds[0] <= bounds[1] and tells_factors(known[item]):
            multiples.append(_Pair(index, int(item), bounds=bounds))
    if multiples:
        return multiples
    about = left <= ABOUT_AS_NEAR * np.min(left, initial=math.inf)
    return [_Pair(index, int(item)) for item in near[about]]


def _alike(sample: FloatArray, known: FloatArray) -> NDArray[np.intp]:
    """Return which rows correlate with a sample, or equal it if it is constant.

    About their means: the weights of norms are all near one, which makes none of them a copy of another.
    """
    centred = sample - sample.mean()
    if np.ptp(sample) == 0.0:
        return np.flatnonzero(np.all(known == sample, axis=1))
    means = known.mean(axis=1)
    energies = np.einsum("ij,ij->i", known, known) - known.shape[1] * means**2
    products = known @ centred
    return np.flatnonzero((energies > 0.0) & (products**2 >= (1.0 - NEAR**2) * (centred @ centred) * energies))


def _zero_candidates(index: int, sample: FloatArray, known: FloatArray) -> list[_Pair]:
    """Return what zeros are copies of: zeros, or what was multiplied with 0, which leaves its signs behind."""
    alike = np.all(np.signbit(known) == np.signbit(sample), axis=1)
    zeros = np.flatnonzero(alike & ~known.any(axis=1))
    if zeros.size:
        return [_Pair(index, int(item)) for item in zeros]
    return [_Pair(index, int(item), factor=0.0) for item in np.flatnonzero(alike)]


def _agree_on_factors(groups: Sequence[_Group]) -> None:
    """Give pairs a factor within their bounds: as few different ones as possible, in as few digits as possible."""
    sought = [(group.dtype, pair, pair.bounds) for group in groups for pair in group.pairs if pair.bounds]
    numbers = common_numbers([bounds for _, _, bounds in sought])
    for (dtype, pair, _), number in zip(sought, numbers, strict=True):
        # Factors are float32 when they are multiplied with, but for tensors of 64 bits.
        pair.factor = number if dtype.name == "F64" else simplest(decimals_of(number))


def _connected(pairs: Sequence[_Pair], targets: int) -> Iterator[list[_Pair]]:
    """Split pairs into sets that share no tensor."""
    if not pairs:
        return
    rows, columns = [pair.target for pair in pairs], [targets + pair.source for pair in pairs]
    size = max(columns) + 1
    graph = coo_array((np.ones(len(pairs)), (rows, columns)), shape=(size, size))
    _, labels = connected_components(graph, directed=False)
    sets: dict[int, list[_Pair]] = {}
    for pair in pairs:
        sets.setdefault(int(labels[pair.target]), []).append(pair)
    yield from sets.values()

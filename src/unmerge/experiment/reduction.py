"""Merge a target, reduce it to statistics, delete it (the paper's second and third phase)."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from unmerge.attribution import open_target
from unmerge.compress import Selection, compressed_statistics, select_top_k
from unmerge.dictionary import Atom, Base, Dictionary, combine, open_atom, open_base
from unmerge.experiment.layout import Place, Target
from unmerge.experiment.mergekit import merge_in_process, write_recipe
from unmerge.experiment.presets import Preset
from unmerge.experiment.world import part_seed
from unmerge.parquet import whole
from unmerge.regression import regress
from unmerge.statistics import Statistics
from unmerge.task_vector import TaskVector

Coordinates = Literal["top_k", "all"]
COORDINATES: tuple[Coordinates, ...] = ("top_k", "all")
"""The paper's coordinates, and all parameters of the modules that were trained."""


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """What the targets of one seed are taken apart into.

    Attributes
    ----------
    base : Base
        The base model.
    dictionary : Dictionary
        The atoms: bf16 checkpoints minus the base, as in the paper, restricted to the trained modules.
    shapes : dict
        The (rows, columns) of each tensor that is compared.
    selection : Selection
        The paper's coordinates.
    """

    base: Base
    dictionary: Dictionary
    shapes: dict[str, tuple[int, int]]
    selection: Selection


@dataclass(frozen=True, slots=True, eq=False)
class Reduced:
    """All that is kept of a target.

    Attributes
    ----------
    atoms : tuple of str
        Names, in the order of the statistics.
    tensors : tuple of str
        Names of the compared tensors.
    top_k, all : tuple of Statistics
        One for each tensor, over the paper's coordinates and over all of its parameters.
    digests : dict of str to str
        Of the target, the selection and the atoms.
    """

    atoms: tuple[str, ...]
    tensors: tuple[str, ...]
    top_k: tuple[Statistics, ...]
    all: tuple[Statistics, ...]
    digests: dict[str, str]

    def over(self, coordinates: Coordinates) -> tuple[Statistics, ...]:
        """Return the statistics of each tensor for a choice of coordinates."""
        return self.top_k if coordinates == "top_k" else self.all


@lru_cache(maxsize=1)
def open_known(base: Path, place: Place, atoms: tuple[str, ...], modules: tuple[str, ...], top_k: int) -> Known:
    """Open the dictionary of a seed and choose the paper's coordinates; remembered for the next target.

    Parameters
    ----------
    base : path
        Checkpoint folder.
    place : Place
        The seed.
    atoms : tuple of str
        Tasks of the dictionary.
    modules : tuple of str
        Modules whose weights are compared.
    top_k : int
        The number of coordinates, over all tensors.
    """
    origin = open_base(str(base))
    shapes = {name: shape for name, shape in sorted(origin.shapes.items()) if _is_trained(name, modules)}
    opened = [open_atom(str(place.checkpoint(task)), origin, name=task) for task in atoms]
    restricted = [Atom(restrict(atom.vector, shapes), atom.source, atom.kind) for atom in opened]
    vectors = [atom.vector for atom in restricted]
    return Known(origin, combine(origin, restricted), shapes, select_top_k(vectors, shapes, top_k))


def _is_trained(name: str, modules: Sequence[str]) -> bool:
    parts = name.split(".")
    return parts[-1] == "weight" and parts[-2] in modules


def restrict(vector: TaskVector, shapes: dict[str, tuple[int, int]]) -> TaskVector:
    """Return a task vector without the tensors that are not compared."""
    return replace(vector, deltas={name: delta for name, delta in vector.deltas.items() if name in shapes})


def reduce(checkpoint: Path, known: Known) -> Reduced:
    """Compute both kinds of statistics of a merged model.

    Parameters
    ----------
    checkpoint : path
        Its folder.
    known : Known
        The atoms and the coordinates.

    Raises
    ------
    UnmergeError
        The model cannot be read, or equals the base.
    """
    target = open_target(str(checkpoint), known.base)
    vector = restrict(target.vector, known.shapes)
    rows = {name: shape[0] for name, shape in known.shapes.items()}
    found = regress(vector, rows, known.dictionary, (), known.base, exact=True)
    by_digest = [atom.name for atom in found.atoms]
    order = np.array([by_digest.index(name) for name in known.dictionary.names])
    exact = {tensor.name: tensor.statistics.select(order) for tensor in found.tensors}
    compressed = compressed_statistics(known.dictionary.vectors, vector, known.selection, known.shapes)
    tensors = tuple(sorted(exact))
    atoms = {f"atom {atom.name}": atom.vector.digest for atom in known.dictionary.atoms}
    return Reduced(
        atoms=known.dictionary.names,
        tensors=tensors,
        top_k=tuple(compressed[name] for name in tensors),
        all=tuple(exact[name] for name in tensors),
        digests={"target": target.reference.digest, "selection": known.selection.digest, **atoms},
    )


def save_reduced(path: Path, reduced: Reduced) -> None:
    """Write what is kept of a target, whole or not at all."""
    arrays = {
        "atoms": np.array(reduced.atoms),
        "tensors": np.array(reduced.tensors),
        "digest_names": np.array(list(reduced.digests)),
        "digests": np.array(list(reduced.digests.values())),
    }
    for coordinates in COORDINATES:
        parts = reduced.over(coordinates)
        for name in ("gram", "correlation", "energy", "rounding", "count"):
            arrays[f"{coordinates}.{name}"] = np.array([getattr(part, name) for part in parts])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # numpy's stub takes its own keyword for one
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def load_reduced(path: Path) -> Reduced:
    """Read what `save_reduced` wrote."""
    with np.load(path, allow_pickle=False) as file:
        digests = dict(zip(file["digest_names"].tolist(), file["digests"].tolist(), strict=True))
        parts = {coordinates: _statistics(file, coordinates) for coordinates in COORDINATES}
        return Reduced(
            tuple(file["atoms"].tolist()),
            tuple(file["tensors"].tolist()),
            parts["top_k"],
            parts["all"],
            digests,
        )


def _statistics(file: np.lib.npyio.NpzFile, coordinates: Coordinates) -> tuple[Statistics, ...]:
    columns = (file[f"{coordinates}.{name}"] for name in ("gram", "correlation", "energy", "rounding", "count"))
    return tuple(
        Statistics(gram, correlation, float(energy), float(rounding), int(count))
        for gram, correlation, energy, rounding, count in zip(*columns, strict=True)
    )


def merge_target(preset: Preset, base: Path, place: Place, target: Target) -> Path:
    """Write the recipe of a target and merge it with mergekit.

    Returns
    -------
    path
        The merged checkpoint's folder.

    Raises
    ------
    UnmergeError
        mergekit failed.
    """
    recipe = write_recipe(
        place.recipe(target.name),
        method=target.method,
        weights={place.checkpoint(task): 1.0 / len(target.tasks) for task in target.tasks},
        base=base,
        **preset.methods[target.method],
    )
    merged = place.merged(target.name)
    shutil.rmtree(merged, ignore_errors=True)  # left by a run that was killed
    merged.parent.mkdir(parents=True, exist_ok=True)
    # A seed of its own for each target: two of them share no mask.
    seed = part_seed(place.seed, target.name)
    return merge_in_process(recipe, merged, seed=seed, threads=preset.threads)


def reduce_target(preset: Preset, base: Path, place: Place, target: Target) -> None:
    """Merge a target, keep its statistics, delete it.

    Raises
    ------
    UnmergeError
        The target cannot be merged or read.
    """
    known = open_known(base, place, preset.dictionary, preset.training.target_modules, preset.top_k)
    try:
        merged = merge_target(preset, base, place, target)
        save_reduced(place.statistics(target.name), reduce(merged, known))
    finally:
        shutil.rmtree(place.merged(target.name), ignore_errors=True)

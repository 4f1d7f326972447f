"""The experiment's merges inverted: each is made again, its recipe recovered from its weights, and scored.

A recovery is told the base and the dictionary's atoms, which are full checkpoints as everywhere in the experiment,
and nothing else. Seeds of random masks are not looked for: mergekit's were drawn from 32 bits.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from unmerge import metrics
from unmerge.attribution import open_target
from unmerge.dictionary import open_base
from unmerge.errors import UnmergeError
from unmerge.experiment import layout
from unmerge.experiment.layout import Place, Target, targets
from unmerge.experiment.mergekit import merge_in_process
from unmerge.experiment.parts import base_folder, merge_part
from unmerge.experiment.presets import PRESETS, Preset
from unmerge.experiment.reduction import load_reduced
from unmerge.experiment.results import Inversion, read_inversions, read_metadata, versions, write_inversions
from unmerge.experiment.run import Start, describe
from unmerge.experiment.world import part_seed
from unmerge.merging.registry import MERGEKIT
from unmerge.recipe.document import parse_recipe
from unmerge.recipe.inversion import inversion_error
from unmerge.recipe.plan import PlannedTensor, plan
from unmerge.recipe.proof import Recovery
from unmerge.recipe.recovery import Search, recover
from unmerge.recipe.sources import open_model


def invert(
    preset: Preset,
    output: Path,
    *,
    groups: Sequence[str] = ("known",),
    seeds: Sequence[int] | None = None,
    start: Start,
) -> Path:
    """Invert the merges of a finished experiment, or those that are not inverted yet.

    The file is written anew after each merge, so what was done before a kill is kept. A merge that cannot be inverted
    becomes a row that says why; the next call tries it again.

    Parameters
    ----------
    preset : Preset
        The experiment's.
    output : path
        Its folder.
    groups : sequence of str
        Of ``known``, ``mixed`` and ``unknown``.
    seeds : sequence of int, optional
        Worlds; by default all that were run.
    start : callable
        Shows progress.

    Returns
    -------
    path
        The file of inversions.

    Raises
    ------
    UnmergeError
        The experiment is not finished, has no such seed, or a file of it cannot be read.
    """
    worlds = _worlds(output, seeds)
    path = output / layout.INVERSIONS
    done = {(one.seed, one.target): one for one in read_inversions(path)}
    wanted = [target for seed in worlds for target in targets(preset, seed) if target.group in groups]
    pending = [one for one in wanted if done.get((one.seed, one.name), _FAILED).failure is not None]
    advance = start("inversions", len(pending))
    for target in pending:
        done[target.seed, target.name] = _inversion(preset, output, target)
        metadata = {"preset": describe(preset), "versions": versions()}
        write_inversions(path, [done[key] for key in sorted(done)], metadata)
        advance()
    return path


_FAILED = Inversion(0, "", 0, "", "", failure="not done")


def preset_of(output: Path) -> Preset:
    """Return the preset that an experiment's folder was made with.

    Raises
    ------
    UnmergeError
        The folder is not an experiment's, or one of other settings than the preset of that name has now.
    """
    path = output / layout.SETTINGS
    if not path.is_file():
        raise UnmergeError(f"{output} is not the folder of an experiment (no {layout.SETTINGS}): run one first")
    found = json.loads(path.read_text(encoding="utf-8"))
    preset = PRESETS.get(found["name"])
    if preset is None or found != json.loads(json.dumps(describe(preset))):
        raise UnmergeError(
            f"{path} is of other settings than the presets {', '.join(PRESETS)}: run the experiment again"
        )
    return preset


def _worlds(output: Path, seeds: Sequence[int] | None) -> list[int]:
    results = output / layout.RESULTS
    if not results.is_file():
        raise UnmergeError(f"{results} is not there: make it with unmerge experiment run --output {output}")
    known: list[int] = read_metadata(results)["seeds"]
    missing = [seed for seed in seeds or () if seed not in known]
    if missing:
        raise UnmergeError(f"seed {missing[0]} was not run: the seeds of {output} are {', '.join(map(str, known))}")
    return known if seeds is None else list(seeds)


def _inversion(preset: Preset, output: Path, target: Target) -> Inversion:
    labels = Inversion(target.seed, target.name, target.composition, target.group, target.method)
    place, base = Place(output, target.seed), base_folder(preset, output)
    try:
        with _made_again(preset, base, place, target) as merged:
            return _scored(labels, preset, base, place, target, merged)
    except UnmergeError as error:
        # Without the folder's own name: where an experiment was run is no part of its results.
        return replace(labels, failure=_placeless(str(error), output))


def _placeless(text: str, output: Path) -> str:
    return text.replace(str(output.resolve()), ".").replace(str(output), ".")


@contextmanager
def _made_again(preset: Preset, base: Path, place: Place, target: Target) -> Iterator[Path]:
    """Make a merge again, bit by bit, from its kept recipe; it is deleted afterwards, as are checkpoints made for it.

    Raises
    ------
    UnmergeError
        The run did not make it, or makes another one now.
    """
    if not place.statistics(target.name).is_file():
        raise UnmergeError("the experiment's run did not make this merge: run it to its end")
    tasks = dict.fromkeys([*preset.dictionary, *target.tasks])
    missing = [task for task in tasks if not place.checkpoint(task).exists()]
    merged = place.merged(target.name)
    try:
        for task in missing:
            merge_part(base, place, task)
        shutil.rmtree(merged, ignore_errors=True)  # left by a call that was killed
        merged.parent.mkdir(parents=True, exist_ok=True)
        seed = part_seed(place.seed, target.name)
        merge_in_process(place.recipe(target.name), merged, seed=seed, threads=preset.threads)
        if open_target(str(merged), open_base(str(base))).reference.digest != _digest(place, target):
            raise UnmergeError("the merge made again is not the one of the results: use the versions that they name")
        yield merged
    finally:
        for folder in (merged, *map(place.checkpoint, missing)):
            shutil.rmtree(folder, ignore_errors=True)


def _digest(place: Place, target: Target) -> str:
    return load_reduced(place.statistics(target.name)).digests["target"]


def _scored(labels: Inversion, preset: Preset, base: Path, place: Place, target: Target, merged: Path) -> Inversion:
    atoms = [f"{task}={place.checkpoint(task)}" for task in preset.dictionary]
    began = time.perf_counter()
    found = recover(str(merged), atoms, base=str(base), search=Search(count=0))
    seconds = time.perf_counter() - began
    weights = found_weights(found)
    truth = dict(zip(preset.dictionary, target.truth(preset.dictionary), strict=True))
    members = tuple(name for name in preset.dictionary if _is_member(weights, name))
    true = {name for name, weight in truth.items() if weight}
    precision, recall = metrics.precision_recall(set(members), true)
    return replace(
        labels,
        status=found.status,
        found_method=found.method,
        method_right=found.method == target.method,
        members=members,
        precision=precision,
        recall=recall,
        weight_error=weight_error(weights, truth),
        equal_share=None if found.proof is None else found.proof.share,
        error=inversion_error(found),
        decoy_error=None if found.decoded is None else found.decoded.decoy_error,
        seconds=seconds,
        recipe=None if found.recipe is None else _placeless(found.recipe, place.output),
    )


Weights = Mapping[str, tuple[float | None, ...]]
"""What each atom goes into each tensor with, None where a method has no weights."""


def found_weights(recovery: Recovery) -> dict[str, tuple[float | None, ...]]:
    """Return what a recovered recipe adds of each atom's change to each tensor; empty where there is no recipe.

    A lambda counts in, and weights that a method divides by their sum are divided by it (TIES does so element by
    element, over those that agree).
    """
    if recovery.recipe is None:
        return {}
    recipe = parse_recipe(recovery.recipe, "the recovered recipe")
    stored = {reference: open_model(reference, Path()).tensors.keys() for reference in recipe.references}
    names = {member.reference: member.name for member in recovery.members}
    planned = plan(recipe, MERGEKIT[recipe.merge_method], stored).tensors
    rows = [
        dict(zip((str(item.model) for item in tensor.models), _effective(tensor), strict=True)) for tensor in planned
    ]
    inside = {reference: name for reference, name in names.items() if any(reference in row for row in rows)}
    return {name: tuple(row.get(reference, 0.0) for row in rows) for reference, name in inside.items()}


def _effective(tensor: PlannedTensor) -> list[float | None]:
    given = tensor.of_models.get("weight")
    if given is None:
        return [None] * len(tensor.models)
    weights = [float(value or 0.0) for value in given]
    # Methods without this switch divide by the sum.
    total = sum(weights) if tensor.shared.get("normalize", True) else 1.0
    factor = float(tensor.shared.get("lambda") or 1.0)
    return [factor * weight / total if total else 0.0 for weight in weights]


def _is_member(weights: Weights, name: str) -> bool:
    return any(weight is None or abs(weight) > metrics.ACTIVE for weight in weights.get(name, ()))


def weight_error(weights: Weights, truth: Mapping[str, float]) -> float | None:
    """Return the largest difference from the true weights over atoms and tensors; None where there are no weights."""
    differences = []
    for name, true in truth.items():
        for weight in weights.get(name, (0.0,)):
            if weight is None:
                return None
            differences.append(abs(weight - true))
    return max(differences)

"""From a regression to the one result object that everything is reported from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from unmerge import metrics
from unmerge._version import __version__
from unmerge.alignment import LAYER, Skipped
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.checkpoint.source import Source
from unmerge.decoys import is_decoy
from unmerge.dictionary import Base
from unmerge.findings import Finding, Findings, Unknown, examine
from unmerge.regression import Regression, TensorStatistics, Unopened, add
from unmerge.result import (
    Attribution,
    BaseCoefficient,
    Component,
    Decoys,
    Evidence,
    LayerWeight,
    Method,
    Metrics,
    ModelReference,
    NotCompared,
    Profile,
    TensorReport,
    Unexplained,
)
from unmerge.solvers import Solution, Solver
from unmerge.statistics import Statistics
from unmerge.task_vector import TaskVector
from unmerge.verdict import verdict

LIKE_A_BASE = 0.05
"""A full checkpoint whose weight is 1 within this is likely the base."""
MOSTLY = 0.5
"""Unexplained share from which another base is thought of."""
SPREAD = 0.1
"""Share of what is unexplained that must lie where no atom reaches, to think of another base."""


def model_reference(source: Source, digest: str, kind: str) -> ModelReference:
    """Describe a model for the result."""
    return ModelReference.model_validate(
        {"reference": source.reference, "commit": source.commit, "digest": digest, "kind": kind}
    )


def summarise(
    regression: Regression,
    solver: Solver,
    target: TaskVector,
    reference: ModelReference,
    base: Base,
    comparable: Collection[str],
    *,
    base_coefficient: BaseCoefficient | None = None,
    notices: Sequence[str] = (),
    refined: bool = True,
    workers: int = 1,
) -> Attribution:
    """Solve a regression and put everything that is known about it in one result.

    Parameters
    ----------
    target : TaskVector
        What is to be explained.
    reference : ModelReference
        Where the target was found.
    comparable : collection of str
        Tensors that the target and the base both have.
    base_coefficient : BaseCoefficient, optional
        What is known of the base's share.
    notices : sequence of str
        Further things to tell the user.
    refined, workers
        As in `unmerge.findings.examine`.
    """
    statistics = regression.total
    solution = solver.solve(statistics)
    found = examine(regression, solution, solver, target, base, refined=refined, workers=workers)
    names = [atom.name for atom in regression.atoms]
    real = [place for place, atom in enumerate(regression.atoms) if not is_decoy(atom)]
    components = _ordered(
        [_component(regression, place, statistics, solution, found.atoms[place]) for place in real]
        + [_unopened(*pair, statistics) for pair in zip(regression.unopened, found.unopened, strict=True)]
    )
    unexplained = _unexplained(regression, statistics, found.unknown)
    return Attribution(
        target=reference,
        base=model_reference(base.source, base.digest, "checkpoint"),
        verdict=verdict(components, unexplained),
        components=components,
        unexplained=unexplained,
        base_coefficient=base_coefficient,
        decoys=_decoys(names, found, real),
        method=_method(regression, solution, solver, names),
        metrics=Metrics(
            reconstruction_error=metrics.reconstruction_error(statistics, solution.coefficients),
            cosine=metrics.cosine(statistics, solution.coefficients),
            sparsity=metrics.sparsity(solution.coefficients),
        ),
        layers=_profiles(regression, solver, names, _layer_of),
        modules=_profiles(regression, solver, names, _module_of),
        tensors=tuple(
            _tensor_report(tensor, found.unknown.weights, statistics)
            for tensor in regression.completed_by(found.unknown.weights).tensors
        ),
        not_compared=_not_compared(regression, target, comparable),
        notices=(*_notices(regression, target, base), *notices, *_base_notices(regression, found, unexplained)),
    )


def _ordered(components: Sequence[Component]) -> tuple[Component, ...]:
    return tuple(sorted(components, key=lambda item: (-abs(item.weight or 0.0), -abs(item.coefficient), item.name)))


def _unopened(atom: Unopened, found: Finding, statistics: Statistics) -> Component:
    return Component(
        name=atom.name,
        coefficient=0.0,
        weight=None,
        interval=found.interval,
        present=found.present,
        evidence=Evidence(
            reason=found.reason,
            p_value=None,
            detectable=found.detectable,
            group=(),
            one_of_group=False,
            energy_share=0.0,
        ),
        profile=None,
        by_layer=(),
        source=model_reference(atom.source, atom.digest, atom.kind),
        relative_norm=float(np.sqrt(atom.energy / statistics.energy)),
    )


def _component(
    regression: Regression, place: int, statistics: Statistics, solution: Solution, found: Finding
) -> Component:
    atom = regression.atoms[place]
    coefficient = float(solution.coefficients[place])
    atom_energy = float(statistics.gram[place, place])
    layers = np.zeros((0, 3)) if found.layers is None else found.layers
    return Component(
        name=atom.name,
        coefficient=coefficient,
        weight=found.weight,
        interval=found.interval,
        present=found.present,
        evidence=Evidence(
            reason=found.reason,
            p_value=found.p_value,
            detectable=found.detectable,
            group=tuple(sorted(regression.atoms[other].name for other in found.group)),
            one_of_group=found.one_of_group,
            energy_share=coefficient**2 * atom_energy / statistics.energy,
        ),
        profile=found.shape.words if found.shape else None,
        by_layer=tuple(
            LayerWeight(layer=int(layer), weight=float(weight), error=float(error)) for layer, weight, error in layers
        ),
        source=model_reference(atom.source, atom.vector.digest, atom.kind),
        relative_norm=float(np.sqrt(atom_energy / statistics.energy)),
    )


def _decoys(names: Sequence[str], found: Findings, real: Sequence[int]) -> Decoys | None:
    made = sorted(set(range(len(names))) - set(real))
    if not made:
        return None
    return Decoys(tested=len(made), accused=tuple(names[place] for place in made if found.atoms[place].present))


def _unexplained(regression: Regression, statistics: Statistics, unknown: Unknown) -> Unexplained:
    untouched = [tensor for tensor in regression.tensors if not tensor.touched]
    energy = sum(tensor.statistics.energy for tensor in untouched)
    error = float(np.sqrt(sum(tensor.energy_error**2 for tensor in untouched)))
    character = unknown.character
    return Unexplained(
        share=unknown.share,
        rounding_floor=unknown.rounding_floor,
        rounding=unknown.way,
        relative_norm=unknown.relative_norm,
        kind=character.kind if character else None,
        rank=character.rank if character else 0,
        untouched_share=energy / statistics.energy,
        untouched_error=error / statistics.energy,
    )


def _method(regression: Regression, solution: Solution, solver: Solver, names: Sequence[str]) -> Method:
    return Method(
        solver=solver.name,
        signed=solver.signed,
        coordinates=regression.coordinates,
        parameters=sum(tensor.statistics.count for tensor in regression.tensors),
        parameters_read=sum(tensor.read for tensor in regression.tensors),
        status=solution.status.name.lower(),
        message=solution.status.value,
        groups=tuple(tuple(sorted(names[index] for index in group)) for group in solution.groups),
        thread_memory=regression.unit_memory,
        version=__version__,
    )


def _layer_of(name: str) -> str:
    match = LAYER.search(name)
    return match["layer"] if match else "other"


def _module_of(name: str) -> str:
    match = LAYER.search(name)
    return (match["module"] if match else name).removesuffix(".weight")


def _profiles(
    regression: Regression, solver: Solver, names: Sequence[str], part_of: Callable[[str], str]
) -> tuple[Profile, ...]:
    parts: dict[str, list[TensorStatistics]] = {}
    for tensor in regression.tensors:
        parts.setdefault(part_of(tensor.name), []).append(tensor)
    ordered = sorted(parts, key=lambda part: (not part.isdigit(), int(part) if part.isdigit() else 0, part))
    energy = regression.total.energy
    return tuple(_profile(part, add(parts[part], len(names)), solver, names, energy) for part in ordered)


def _profile(part: str, statistics: Statistics, solver: Solver, names: Sequence[str], energy: float) -> Profile:
    used = [int(index) for index in np.flatnonzero(np.diag(statistics.gram) > 0.0)]
    own = statistics.select(np.asarray(used, dtype=np.intp))
    coefficients = solver.solve(own).coefficients if len(used) and own.energy > 0.0 else np.zeros(len(used))
    return Profile(
        part=part,
        coefficients={names[index]: float(value) for index, value in zip(used, coefficients, strict=True)},
        energy_share=own.energy / energy,
        unexplained=own.residual_energy(coefficients) / own.energy if own.energy > 0.0 else None,
    )


def _tensor_report(tensor: TensorStatistics, coefficients: FloatArray, total: Statistics) -> TensorReport:
    statistics = tensor.statistics
    changed = statistics.energy > 0.0
    return TensorReport(
        name=tensor.name,
        parameters=statistics.count,
        read=tensor.read,
        energy_share=statistics.energy / total.energy,
        unexplained=statistics.residual_energy(coefficients) / statistics.energy if changed else None,
        touched=tensor.touched,
    )


def _not_compared(regression: Regression, target: TaskVector, comparable: Collection[str]) -> tuple[NotCompared, ...]:
    found: list[Skipped] = list(target.skipped)
    for atom in sorted(regression.atoms, key=lambda atom: atom.name):
        found.extend(item for item in atom.vector.skipped if item.model != "base")
        outside = sorted(atom.vector.deltas.keys() - set(comparable))
        found.extend(Skipped(name, atom.name, "the target has no such tensor") for name in outside)
    return tuple(NotCompared(name=item.name, model=item.model, reason=item.reason) for item in found)


def _base_notices(regression: Regression, found: Findings, unexplained: Unexplained) -> tuple[str, ...]:
    """Tell when what is left looks like another base, and not like a fine-tune that is missing."""
    likely = [
        regression.atoms[place].name
        for place, finding in enumerate(found.atoms)
        if finding.present
        and regression.atoms[place].kind == "checkpoint"
        and finding.interval is not None
        and finding.interval[0] > 1.0 - LIKE_A_BASE
        and finding.interval[1] < 1.0 + LIKE_A_BASE
    ]
    if len(likely) == 1 and sum(finding.present is True for finding in found.atoms) > 1:
        return (f"{likely[0]} is in the target with a weight of 1 beside others: likely the base; try --base with it",)
    beyond = unexplained.share - unexplained.rounding_floor
    spread = unexplained.untouched_share > SPREAD * beyond > 0.0
    if unexplained.kind == "full rank" and beyond > MOSTLY and spread:
        said = "most of the change is of full rank and reaches tensors that no fine-tune touches"
        return (f"{said}: another base, or training of all weights; make sure that the base is the right one",)
    return ()


def _notices(regression: Regression, target: TaskVector, base: Base) -> tuple[str, ...]:
    found = [f"base: {text}" for text in base.checkpoint.notices]
    found.extend(f"target: {text}" for text in target.notices)
    for atom in sorted(regression.atoms, key=lambda atom: atom.name):
        found.extend(f"{atom.name}: {text}" for text in atom.vector.notices)
    return tuple(found)

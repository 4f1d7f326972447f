"""From a regression to the one result object that everything is reported from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from unmerge import metrics
from unmerge._version import __version__
from unmerge.alignment import LAYER, Skipped
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.checkpoint.source import Source
from unmerge.dictionary import Atom, Base
from unmerge.evidence.intervals import jackknife_intervals
from unmerge.regression import Regression, TensorStatistics, add
from unmerge.result import (
    Attribution,
    Component,
    Evidence,
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

PRESENT_ABOVE = 0.01
"""The paper's cut on a coefficient."""


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
) -> Attribution:
    """Solve a regression and put everything that is known about it in one result.

    Parameters
    ----------
    target : TaskVector
        What is to be explained; only its notices are used.
    reference : ModelReference
        Where the target was found.
    comparable : collection of str
        Tensors that the target and the base both have.
    """
    statistics = regression.total
    solution = solver.solve(statistics)
    names = [atom.name for atom in regression.atoms]
    return Attribution(
        target=reference,
        base=model_reference(base.source, base.digest, "checkpoint"),
        components=_components(regression, statistics, solution, solver),
        unexplained=_unexplained(regression, statistics, solution),
        method=_method(regression, solution, solver, names),
        metrics=Metrics(
            reconstruction_error=metrics.reconstruction_error(statistics, solution.coefficients),
            cosine=metrics.cosine(statistics, solution.coefficients),
            sparsity=metrics.sparsity(solution.coefficients),
        ),
        layers=_profiles(regression, solver, names, _layer_of),
        modules=_profiles(regression, solver, names, _module_of),
        tensors=tuple(_tensor_report(tensor, solution.coefficients, statistics) for tensor in regression.tensors),
        not_compared=_not_compared(regression, target, comparable),
        notices=_notices(regression, target, base),
    )


def _components(
    regression: Regression, statistics: Statistics, solution: Solution, solver: Solver
) -> tuple[Component, ...]:
    touched = [tensor.statistics for tensor in regression.tensors if tensor.touched]
    intervals = jackknife_intervals(touched, solver)
    blurred = {index for group in solution.groups for index in group}
    components = [
        _component(atom, index, statistics, solution.coefficients, intervals[index], index in blurred)
        for index, atom in enumerate(regression.atoms)
    ]
    return tuple(sorted(components, key=lambda item: (-abs(item.coefficient), item.name)))


def _component(
    atom: Atom,
    index: int,
    statistics: Statistics,
    coefficients: FloatArray,
    interval: FloatArray,
    blurred: bool,
) -> Component:
    coefficient = float(coefficients[index])
    atom_energy = float(statistics.gram[index, index])
    known = not blurred and bool(np.isfinite(interval).all())
    low, high = (float(bound) for bound in interval)
    rule = f"|coefficient| over {PRESENT_ABOVE} and interval clear of 0: a plain cut, not a test"
    present = None if blurred else abs(coefficient) > PRESENT_ABOVE and (not known or low > 0.0 or high < 0.0)
    return Component(
        name=atom.name,
        coefficient=coefficient,
        interval=(low, high) if known else None,
        present=present,
        evidence=Evidence(
            rule="cannot be told apart from another atom" if blurred else rule,
            energy_share=coefficient**2 * atom_energy / statistics.energy,
        ),
        source=model_reference(atom.source, atom.vector.digest, atom.kind),
        relative_norm=float(np.sqrt(atom_energy / statistics.energy)),
    )


def _unexplained(regression: Regression, statistics: Statistics, solution: Solution) -> Unexplained:
    untouched = [tensor for tensor in regression.tensors if not tensor.touched]
    energy = sum(tensor.statistics.energy for tensor in untouched)
    error = float(np.sqrt(sum(tensor.energy_error**2 for tensor in untouched)))
    return Unexplained(
        share=statistics.residual_energy(solution.coefficients) / statistics.energy,
        rounding_floor=min(1.0, statistics.rounding / statistics.energy),
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


def _notices(regression: Regression, target: TaskVector, base: Base) -> tuple[str, ...]:
    found = [f"base: {text}" for text in base.checkpoint.notices]
    found.extend(f"target: {text}" for text in target.notices)
    for atom in sorted(regression.atoms, key=lambda atom: atom.name):
        found.extend(f"{atom.name}: {text}" for text in atom.vector.notices)
    return tuple(found)

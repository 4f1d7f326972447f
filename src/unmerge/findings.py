"""What a solved regression is evidence of: which atoms are present, with what weights, and what else there is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from unmerge.checkpoint.dtypes import FloatArray
from unmerge.cores import cores
from unmerge.corners import blocks, corners, leading_changes, remainders
from unmerge.dictionary import Base
from unmerge.evidence.beside import beside_stranger
from unmerge.evidence.identifiability import alike_groups
from unmerge.evidence.intervals import jackknife_intervals
from unmerge.evidence.lattice import Block
from unmerge.evidence.presence import FEWEST, Core, Presence, presence
from unmerge.evidence.profile import Shape, describe_profile
from unmerge.evidence.rounding import (
    IN_STORAGE,
    WAYS,
    Corner,
    fitted_weights,
    left_over,
    pinned_weights,
    remaining_of_others,
    rounding_shares,
    simulated_least_squares,
    unbiased_weights,
)
from unmerge.evidence.spectrum import Character, character, spikes
from unmerge.parallel import on_threads
from unmerge.regression import Regression, Unopened
from unmerge.screening import SIGN
from unmerge.solvers import Nnls, Solution, Solver, Status
from unmerge.solvers.problem import unit_gram
from unmerge.task_vector import TaskVector

ERROR_RATE = 1e-3
"""Probability of accusing any absent atom of a dictionary, per target (Bonferroni over its atoms)."""
SUGGESTIVE = 0.01
"""Below this p-value silence is not taken for absence."""
SMALLEST = 0.2
"""A weight that the test must be able to find before its silence is taken for absence."""
POWER = 0.95
"""Probability with which a weight that is called detectable is found."""
RELATED = 0.3
"""Cosine from which the weights of two atoms are estimated together."""
MATERIAL = 0.02
"""Share of the change's energy, beyond what rounding accounts for, from which strangers are reckoned with."""
NEGLIGIBLE = 1e-4
"""The same, up to which nothing is left to look at."""
CLEARLY = 0.1
"""The same where nothing needs to be estimated exactly to see it."""
APART = 0.1
"""Difference between two estimates of a weight from which the interval holds them both."""
WEAK = "signs of it, too weak to be sure"
ONE_OF_GROUP = "it or a version of it is present; which one cannot be told"
LEVEL = 0.95
"""Coverage of intervals."""
REFINEMENTS = 2
"""How often weights are corrected for rounding and rounding is simulated with them."""
SCALES = (0.5, 2.0)
"""How much more may be left of whole tensors than of their corners."""
REMAINING = (0.2, 2.0)
"""What rounding may leave of a coefficient."""
SMALL_WEIGHT = 1e-3
"""Below it, what rounding leaves of a weight is not estimated."""
SHOWN = 0.95
"""What is left of a small weight if rounding does not hide it."""
FEW_CORNERS = 4
"""Corners on which that is looked at."""
SPECTRUM_LINES = 128
"""Rows and columns of a corner whose singular values are computed."""
MOST_INTERVALS = 64
"""Atoms in a dictionary up to which coefficients get an interval where nothing was tested: forty solves."""


@dataclass(frozen=True, slots=True, eq=False)
class Finding:
    """What is known of one atom.

    Attributes
    ----------
    weight : float or None
        Estimate of how much of the atom itself is in the target; None where there is no evidence.
    interval : tuple of float, or None
        Of the weight, at `LEVEL`.
    present : bool or None
        None: cannot tell.
    p_value : float or None
        Of the test; None if it was not made.
    detectable : float or None
        The smallest weight that the test would have found, with probability `POWER`.
    reason : str
        Why the verdict is what it is.
    group : tuple of int
        Other atoms that are versions of it.
    one_of_group : bool
        Whether one of them or the atom is present, and it cannot be told which.
    shape : Shape or None
        How its weight varies over the layers; only if it is present.
    layers : array, shape (L, 3)
        Layer, weight, standard error.
    """

    weight: float | None
    interval: tuple[float, float] | None
    present: bool | None
    p_value: float | None
    detectable: float | None
    reason: str
    group: tuple[int, ...] = ()
    one_of_group: bool = False
    shape: Shape | None = None
    layers: FloatArray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Unknown:
    """What the present atoms leave.

    Attributes
    ----------
    share : float
        Of the energy of the target's change.
    rounding_floor : float
        The share that rounding alone would leave of a merge of the present atoms.
    way : str or None
        How the merge was made if that is the floor; None if it was not simulated.
    character : Character or None
        What kind of change the rest is.
    weights : array, shape (K,)
        What of each atom was taken out.
    relative_norm : float
        Norm of what is beyond rounding over the norm of the base's weights that were looked at; 0 if none were.
    """

    share: float
    rounding_floor: float
    way: str | None
    character: Character | None
    weights: FloatArray
    relative_norm: float


@dataclass(frozen=True, slots=True, eq=False)
class Findings:
    """All that is known: a finding for each atom and each unopened one, in the regression's order, and of the rest."""

    atoms: tuple[Finding, ...]
    unknown: Unknown
    unopened: tuple[Finding, ...] = ()


def examine(
    regression: Regression,
    solution: Solution,
    solver: Solver,
    target: TaskVector,
    base: Base,
    *,
    refined: bool = True,
    workers: int = 1,
) -> Findings:
    """Test every atom, estimate the weights of those that are present, and look at what they leave.

    Parameters
    ----------
    regression : Regression
        With contacts; without them, nothing can be told of presence.
    solution : Solution
        Of the whole regression.
    solver : Solver
        What it was solved with.
    target : TaskVector
        What the regression is of.
    refined : bool
        Whether weights are estimated again with what rounding did to them, and what they leave is looked at; without
        it weights and intervals are the test's own.
    workers : int
        Threads; the result does not depend on it.
    """
    found = _examine(regression, solution, solver, target, base, refined=refined, workers=workers)
    return replace(found, unopened=tuple(_unopened(atom, signed=solver.signed) for atom in regression.unopened))


def _examine(
    regression: Regression,
    solution: Solution,
    solver: Solver,
    target: TaskVector,
    base: Base,
    *,
    refined: bool,
    workers: int,
) -> Findings:
    if solution.status in (Status.NOT_CONVERGED, Status.NOT_FINITE) or not regression.contacts:
        return _untested(regression, solution, _jackknife(regression, solver))
    groups = alike_groups(regression.total.gram)
    tests = presence_tests(regression, solution, groups, signed=solver.signed, workers=workers)
    many = regression.candidates
    findings = [_tested(solution, solver, tests, atom, groups, many) for atom in range(len(regression.atoms))]
    findings = [_in_its_group(findings, tests, solution, atom, many) for atom in range(len(findings))]
    kept = [
        atom
        for atom, finding in enumerate(findings)
        if finding.present or (finding.one_of_group and solution.coefficients[atom] != 0.0)
    ]
    if not refined:
        return Findings(tuple(findings), _rest(regression, solution, kept))
    seen = corners(regression, target, base, kept, workers=workers)
    certain = {atom: tests[atom].own for atom in kept if findings[atom].present}
    estimate = _estimate(regression, kept, seen, certain, signed=solver.signed, workers=workers)
    if estimate.rough and len(certain) == len(kept) and _elements_known(regression, kept):
        met = blocks(regression, target, base, kept)
        estimate = _beside(regression, estimate, met, seen, signed=solver.signed, workers=workers)
    unknown = _unknown(regression, kept, estimate, seen)
    for atom in kept:
        if findings[atom].present:
            findings[atom] = _refined(findings[atom], estimate, atom)
    others = {atom: finding for atom, finding in enumerate(findings) if atom not in kept}
    for atom, finding in _hidden(regression, others, estimate, seen).items():
        findings[atom] = finding
    return Findings(tuple(findings), unknown)


def _rest(regression: Regression, solution: Solution, kept: Sequence[int]) -> Unknown:
    """Return what the coefficients of the kept atoms leave, which nobody looked at."""
    total, weights = regression.total, np.zeros(len(regression.atoms))
    weights[list(kept)] = solution.coefficients[list(kept)]
    share, floor = total.residual_energy(weights) / total.energy, min(1.0, total.rounding / total.energy)
    return Unknown(share, floor, way=None, character=None, weights=weights, relative_norm=0.0)


def _jackknife(regression: Regression, solver: Solver) -> FloatArray | None:
    if len(regression.atoms) > MOST_INTERVALS:
        return None
    return jackknife_intervals([tensor.statistics for tensor in regression.measured if tensor.touched], solver, LEVEL)


def _pair(bounds: FloatArray | None) -> tuple[float, float] | None:
    if bounds is None or not np.isfinite(bounds).all():
        return None
    return float(bounds[0]), float(bounds[1])


def _untested(regression: Regression, solution: Solution, intervals: FloatArray | None) -> Findings:
    reason = "not tested"
    found = [
        Finding(None, _pair(None if intervals is None else intervals[atom]), None, None, None, reason)
        for atom in range(len(regression.atoms))
    ]
    total = regression.total
    return Findings(
        tuple(found),
        Unknown(
            share=total.residual_energy(solution.coefficients) / total.energy,
            rounding_floor=min(1.0, total.rounding / total.energy),
            way=None,
            character=None,
            weights=solution.coefficients,
            relative_norm=0.0,
        ),
    )


@dataclass(frozen=True, slots=True, eq=False)
class AtomTest:
    """The tests of one atom.

    Attributes
    ----------
    own : Presence
        Beside those that are related to it.
    group : Presence or None
        As the one that stands for all that are versions of it; None if there are none.
    """

    own: Presence
    group: Presence | None


def presence_tests(
    regression: Regression, solution: Solution, groups: Sequence[Sequence[int]], *, signed: bool, workers: int = 1
) -> dict[int, AtomTest]:
    """Test every atom.

    Parameters
    ----------
    regression : Regression
        With contacts.
    solution : Solution
        Of it.
    groups : sequence of sequence of int
        Atoms that are versions of one fine-tune.
    workers : int
        Threads; the result does not depend on it.
    """
    # A solver may give 0 to what is present but small, and to the right one of two versions.
    relatives = _relatives(regression.total.gram)
    floor = _noise_floor(regression)
    alike = {atom: set(group) - {atom} for group in groups for atom in group}
    seen = cores(regression, solution.coefficients, relatives, floor, workers=workers)

    def test(atom: int) -> AtomTest:
        own = presence(seen[atom], signed=signed)
        others = [other for other in relatives[atom] if other in alike.get(atom, ())]
        if not others:
            return AtomTest(own, None)
        grouped = [_joined(core, relatives[atom], others, solution.coefficients) for core in seen[atom]]
        return AtomTest(own, presence(grouped, signed=signed) if grouped else None)

    return dict(zip(seen, on_threads(test, seen, workers), strict=True))


def _noise_floor(regression: Regression) -> dict[str, float]:
    """Return the mean square that rounding leaves in each tensor; where nothing changed, that of the others."""
    met = [tensor for tensor in regression.tensors if tensor.name in regression.contacts]
    floor = {tensor.name: tensor.statistics.rounding / tensor.statistics.count for tensor in met}
    usual = float(np.median([value for value in floor.values() if value > 0.0] or [0.0]))
    return {name: value or usual for name, value in floor.items()}


def _relatives(gram: FloatArray) -> dict[int, list[int]]:
    """Return the atoms that each one is related to, closest first; atoms that are zero have no entry."""
    kept, _, cosines = unit_gram(gram)
    near = np.abs(cosines) - np.eye(len(kept))
    return {
        int(atom): [int(kept[place]) for place in np.argsort(-row, kind="stable") if row[place] >= RELATED]
        for atom, row in zip(kept, near, strict=True)
    }


def _joined(core: Core, relatives: Sequence[int], others: Sequence[int], coefficients: FloatArray) -> Core:
    """Give an atom what those alike were credited with, so that it stands for the group."""
    matched = core.matched + sum(coefficients[other] * core.relatives[relatives.index(other)] for other in others)
    rest = [place for place, other in enumerate(relatives) if other not in others]
    return replace(core, matched=matched, relatives=core.relatives[rest])


def _tested(
    solution: Solution,
    solver: Solver,
    tests: Mapping[int, AtomTest],
    atom: int,
    groups: Sequence[Sequence[int]],
    candidates: int,
) -> Finding:
    """Say what the test of one atom means, when so many could be accused."""
    coefficient = float(solution.coefficients[atom])
    tied = next((group for group in solution.groups if atom in group), ())
    if tied:
        others = tuple(other for other in tied if other != atom)
        return Finding(None, None, None, None, None, "cannot be told apart from another atom", others)
    group = next((tuple(other for other in group if other != atom) for group in groups if atom in group), ())
    test = tests.get(atom)
    if test is None or not test.own.decidable:
        return Finding(None, None, None, None, None, "too few matrices for a test")
    present, reason = _verdict(test.own, coefficient, candidates)
    if present and not np.any(solution.coefficients[[atom, *group]]):
        # The solver does without it and its versions: what the filter sees, others explain as well.
        present, reason = None, WEAK
    weight, interval = _drift_free(test.own, 1.0, signed=solver.signed)
    if present is False:
        # What is shared with others leaves a little in the filter; the test has found that it is no weight.
        interval = (min(interval[0], 0.0), max(interval[1], 0.0))
    return Finding(
        weight=weight,
        interval=interval,
        present=present,
        p_value=test.own.p_value,
        detectable=_detectable(test.own, candidates),
        reason=reason,
        group=group,
        layers=test.own.layers,
    )


def _in_its_group(
    findings: Sequence[Finding], tests: Mapping[int, AtomTest], solution: Solution, atom: int, candidates: int
) -> Finding:
    """Leave open which version of a fine-tune is present if one of them is, and none is certain."""
    own = findings[atom]
    members = (atom, *own.group)
    if not own.group or any(findings[member].present for member in members):
        return own
    if not any(_stands_for_present(tests.get(member), solution, member, candidates) for member in members):
        return own
    # Versions of one fine-tune share a weight in ways that nothing determines.
    return replace(own, weight=None, interval=None, present=None, reason=ONE_OF_GROUP, one_of_group=True)


def _stands_for_present(test: AtomTest | None, solution: Solution, atom: int, candidates: int) -> bool:
    if test is None or test.group is None:
        return False
    return _verdict(test.group, float(solution.coefficients[atom]), candidates)[0] is True


def _detectable(test: Presence, atoms: int) -> float:
    """Return the weight that the test finds in 95 of 100 targets like this one."""
    from scipy.special import stdtrit

    needed = stdtrit(test.freedom, 1.0 - ERROR_RATE / atoms) + stdtrit(test.freedom, POWER)
    return float(needed) * max(test.error, test.matched_error)


def _verdict(test: Presence, coefficient: float, atoms: int) -> tuple[bool | None, str]:
    if test.p_value <= ERROR_RATE / atoms:
        return True, "all of its directions are there, in proportion"
    if test.p_value <= SUGGESTIVE:
        return None, WEAK
    return _silent(_detectable(test, atoms), coefficient)


def _silent(detectable: float, coefficient: float) -> tuple[bool | None, str]:
    """Say what it means that nothing was seen of an atom."""
    if detectable > max(SMALLEST, abs(coefficient)):
        return None, f"a weight below {detectable:.2g} could not be seen here"
    return False, f"its own directions are missing; {detectable:.1g} would be seen"


def _unopened(atom: Unopened, *, signed: bool) -> Finding:
    """Say what a sketch in which nothing of an atom was seen means."""
    from scipy.special import stdtrit

    if not np.isfinite(atom.error) or atom.freedom < FEWEST - 1.0:
        return Finding(None, None, None, None, None, "a sketch tells too little of it")
    detectable = float(SIGN + stdtrit(atom.freedom, POWER)) * atom.error
    half = float(stdtrit(atom.freedom, 0.5 + 0.5 * LEVEL)) * atom.error
    least = -np.inf if signed else 0.0
    low, high = min(atom.coefficient - half, 0.0), max(atom.coefficient + half, 0.0)
    present = None if detectable > SMALLEST else False
    reason = f"nothing of it in a sketch of {atom.values:,} parameters; {detectable:.1g} would be seen"
    if present is None:
        reason = f"a weight below {detectable:.2g} could not be seen in a sketch of {atom.values:,} parameters"
    return Finding(None, (max(least, low), high), present, None, detectable, reason)


def _drift_free(test: Presence, kept: float, *, signed: bool) -> tuple[float, tuple[float, float]]:
    """Return the weight that the test estimates and its interval; `kept` is what rounding leaves of a coefficient."""
    from scipy.special import stdtrit

    half = float(stdtrit(test.freedom, 0.5 + 0.5 * LEVEL)) * test.error / kept
    weight = test.weight / kept
    least = -np.inf if signed else 0.0
    return max(least, weight), (max(least, weight - half), max(least, weight + half))


def _remaining(found: FloatArray, weights: FloatArray) -> FloatArray:
    """Return what share of each weight least squares found."""
    shares = np.divide(found, weights, out=np.ones(len(weights)), where=np.abs(weights) > SMALL_WEIGHT)
    return np.asarray(np.clip(shares, *REMAINING))


def _rounded_off(seen: Sequence[Corner], weights: FloatArray) -> FloatArray:
    """Return what rounding leaves of each coefficient, seen on two merges made again with a stranger, shape (2, P)."""
    again = simulated_least_squares(seen, weights, _strangers(seen, weights), np.random.default_rng(0))
    return np.array([_remaining(found, weights) for found in again])


def _corrected(test: Presence, remaining: FloatArray, *, signed: bool) -> tuple[float, tuple[float, float]]:
    """Return the drift-free weight corrected by the first share, and an interval that holds those by all shares."""
    found = [_drift_free(test, float(share), signed=signed) for share in remaining]
    intervals = np.array([interval for _, interval in found])
    return found[0][0], (float(intervals[:, 0].min()), float(intervals[:, 1].max()))


@dataclass(frozen=True, slots=True, eq=False)
class _Estimate:
    """Weights of the kept atoms, in their order, and what they leave; rough if a stranger may have shifted them."""

    weights: FloatArray
    intervals: tuple[tuple[float, float] | None, ...]
    share: float
    floor: float
    way: str | None
    places: Mapping[int, int]
    rough: bool = False


def _estimate(
    regression: Regression,
    kept: Sequence[int],
    seen: Mapping[str, Corner],
    certain: Mapping[int, Presence],
    *,
    signed: bool,
    workers: int,
) -> _Estimate:
    """Estimate the weights of the kept atoms: by least squares if rounding explains the rest, drift-free if not."""
    total, solver = regression.total, Nnls(signed=signed)
    places = {atom: place for place, atom in enumerate(kept)}
    if not kept:
        none = np.zeros(0)
        return _Estimate(none, (), 1.0, min(1.0, total.rounding / total.energy), None, places)
    chosen = np.asarray(kept, dtype=np.intp)
    own, looked_at = total.select(chosen), list(seen.values())
    fitted = solver.solve(own).coefficients
    known = _exact(regression, chosen, looked_at, fitted, places, solver, workers=workers)
    if known is not None:
        return known
    weights, share, floor, way = fitted, 1.0, 0.0, ""
    intervals: tuple[tuple[float, float] | None, ...] = ()
    for _ in range(REFINEMENTS):
        remaining = _rounded_off(looked_at, weights)
        found = {
            place: _corrected(certain[atom], remaining[:, place], signed=signed)
            for atom, place in places.items()
            if atom in certain
        }
        weights = np.array([found[place][0] if place in found else fitted[place] for place in range(len(kept))])
        intervals = tuple(found[place][1] if place in found else None for place in range(len(kept)))
        share = _share(regression, chosen, weights)
        floor, way = _floor(regression, looked_at, weights, share)
    return _Estimate(weights, intervals, share, floor, way, places, rough=True)


def _hidden(
    regression: Regression,
    findings: Mapping[int, Finding],
    estimate: _Estimate,
    seen: Mapping[str, Corner],
) -> dict[int, Finding]:
    """Return what is known of atoms that were not found and of whose small weights rounding leaves little."""
    names = list(seen)[:: max(1, len(seen) // FEW_CORNERS)]
    looked_at = [seen[name] for name in names]
    strangers = _strangers(looked_at, estimate.weights)

    def left_of(changes: Sequence[FloatArray], sizes: FloatArray) -> FloatArray:
        generator = np.random.default_rng(0)
        sizes = np.maximum(np.abs(sizes), SMALL_WEIGHT)
        shares = remaining_of_others(looked_at, estimate.weights, strangers, changes, sizes, generator)
        return np.maximum(shares, REMAINING[0])

    asked = {atom: np.array(_numbers(finding)) for atom, finding in findings.items() if _numbers(finding)}
    if not asked:
        return {}
    changes = leading_changes(regression, list(asked), names)
    smallest = np.array([min(detectable, np.abs(bounds).max()) for _, detectable, *bounds in asked.values()])
    hidden = np.flatnonzero(left_of(changes, smallest)[0] < SHOWN)
    changes = [change[hidden] for change in changes]

    def before(found: FloatArray, way: int) -> FloatArray:
        """Return the weights of which so much is left."""
        weights = found
        for _ in range(REFINEMENTS + 1):
            weights = found / left_of(changes, weights)[way]
        return weights

    weights, detectable, low, high = np.array(list(asked.values()))[hidden].T
    # What rounding may have left all of is no more than was found.
    numbers = before(weights, 1), before(detectable, 0), np.where(low > 0.0, low, before(low, 0)), before(high, 0)
    atoms = [list(asked)[place] for place in hidden]
    return {
        atom: _before_rounding(findings[atom], *map(float, own)) for atom, *own in zip(atoms, *numbers, strict=True)
    }


def _numbers(finding: Finding) -> tuple[float, ...]:
    """Return weight, detectable weight and interval of what was tested and not found; else nothing."""
    if finding.present or finding.weight is None or finding.detectable is None or finding.interval is None:
        return ()
    return finding.weight, finding.detectable, *finding.interval


def _before_rounding(finding: Finding, weight: float, detectable: float, low: float, high: float) -> Finding:
    present, reason = finding.present, finding.reason
    if reason != WEAK:
        present, reason = _silent(detectable, 0.0)
        present = present if finding.present is False else None
    return replace(finding, weight=weight, detectable=detectable, interval=(low, high), present=present, reason=reason)


def _beside(
    regression: Regression,
    estimate: _Estimate,
    kept: Sequence[Block],
    seen: Mapping[str, Corner],
    *,
    signed: bool,
    workers: int,
) -> _Estimate:
    """Improve rough weights if what is beside the atoms is one stored fine-tune of low rank."""
    found = beside_stranger(kept, estimate.weights, workers=workers)
    if found is None:
        return estimate
    share = _share(regression, np.asarray(list(estimate.places), dtype=np.intp), found.weights)
    floor, way = _floor(regression, list(seen.values()), found.weights, share)
    bounds = found.intervals(signed=signed)
    intervals = tuple(
        _spanning(_pair(row), rough) if gap > APART else _pair(row)
        for row, rough, gap in zip(bounds, estimate.intervals, np.abs(found.weights - estimate.weights), strict=True)
    )
    return _Estimate(found.weights, intervals, share, floor, way, estimate.places)


def _spanning(fine: tuple[float, float] | None, rough: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return what holds both intervals, where both are known."""
    if fine is None or rough is None:
        return fine
    return min(fine[0], rough[0]), max(fine[1], rough[1])


def _exact(
    regression: Regression,
    chosen: NDArray[np.intp],
    seen: Sequence[Corner],
    fitted: FloatArray,
    places: Mapping[int, int],
    solver: Solver,
    *,
    workers: int,
) -> _Estimate | None:
    """Estimate the weights if the atoms and rounding are all that there is; None if they are not."""
    share = _share(regression, chosen, fitted)
    if share > CLEARLY and share - _floor(regression, seen, fitted, share)[0] > CLEARLY:
        return None
    if all(corner.target_cell is not None for corner in seen) and _elements_known(regression, chosen):
        ways = _ways(seen)
        fits = on_threads(lambda way: fitted_weights(seen, fitted, way=way), ways, workers)
        fit, way = max(zip(fits, ways, strict=True), key=lambda pair: pair[0].likelihood)
        sharp = pinned_weights(seen, fit.weights, way=way)
        best, rough = sharp or unbiased_weights(seen, fit, way=way), sharp is None
        weights, bounds = best.weights, best.intervals(LEVEL, signed=solver.signed)
    else:
        weights, rough = fitted, False
        parts = [tensor.statistics.select(chosen) for tensor in regression.measured if tensor.touched]
        bounds = jackknife_intervals(parts, solver, LEVEL)
    share = _share(regression, chosen, weights)
    floor, way = _floor(regression, seen, weights, share)
    if share - floor > MATERIAL:
        return None
    # Where rounding leaves much, a small stranger hides below it.
    return _Estimate(weights, tuple(_pair(row) for row in bounds), share, floor, way, places, rough)


def _ways(seen: Sequence[Corner]) -> list[str]:
    """Return the ways to make a merge whose weights are fitted; atoms that are all as stored are merged in one way."""
    ways = [way for way in WAYS if way != IN_STORAGE]
    return ways[:1] if all(corner.stored.all() for corner in seen) else ways


def _elements_known(regression: Regression, atoms: Iterable[int]) -> bool:
    """Tell whether corners show the atoms as they are, not as a dictionary's directions have them."""
    return not any(regression.atoms[atom].lost for atom in atoms)


def _share(regression: Regression, chosen: NDArray[np.intp], weights: FloatArray) -> float:
    """Return the share of the target's energy that the chosen atoms leave with these weights."""
    every = np.zeros(len(regression.atoms))
    every[chosen] = weights
    total = regression.completed_by(every).total
    return total.select(chosen).residual_energy(weights) / total.energy


def _strangers(seen: Sequence[Corner], weights: FloatArray) -> list[float]:
    """Return the root mean square of what neither the atoms nor rounding account for, by corner."""
    found = []
    for corner in seen:
        rest = corner.target - np.tensordot(weights, corner.atoms, 1)
        noise = float(np.mean(corner.spacing**2)) / 12.0
        found.append(float(np.sqrt(max(0.0, float(np.mean(rest**2)) - 2.0 * noise))))
    return found


def _floor(regression: Regression, seen: Sequence[Corner], weights: FloatArray, share: float) -> tuple[float, str]:
    """Return what rounding alone would leave, by the way of merging that comes closest to what is left."""
    shares = rounding_shares(seen, weights, _strangers(seen, weights), np.random.default_rng(0))
    energy = regression.total.energy
    untouched = [tensor.statistics for tensor in regression.tensors if not tensor.touched]
    elsewhere = sum(min(statistics.rounding, statistics.energy) for statistics in untouched) / energy
    untouched_share = sum(statistics.energy for statistics in untouched) / energy
    # A corner is not its tensor, but the same part of both is what rounding left; not where it lacks elements.
    known = _elements_known(regression, range(len(regression.atoms)))
    scale = _ratio(share - untouched_share, left_over(seen, weights)) if known else 1.0
    floors = {words: min(1.0, scale * floor + elsewhere) for words, floor in shares.items()}
    way = min(floors, key=lambda words: abs(floors[words] - share))
    return floors[way], way


def _ratio(share: float, on_corners: float) -> float:
    """Return what is left of touched tensors over what is left of their corners, where both can be seen."""
    return float(np.clip(share / on_corners, *SCALES)) if share > 0.0 and on_corners > 0.0 else 1.0


def _refined(finding: Finding, estimate: _Estimate, atom: int) -> Finding:
    place = estimate.places[atom]
    weight = float(estimate.weights[place])
    shape = None
    if finding.layers is not None and len(finding.layers):
        layers, values, errors = finding.layers.T
        shape = describe_profile(layers, values, errors, np.inf)
        if shape.kind == "constant":  # then it is the weight, which is estimated better than from its layers
            shape = replace(shape, low=weight, high=weight)
    return replace(finding, weight=weight, interval=estimate.intervals[place], shape=shape)


def _unknown(regression: Regression, kept: Sequence[int], estimate: _Estimate, seen: Mapping[str, Corner]) -> Unknown:
    weights = np.zeros(len(regression.atoms))
    weights[list(kept)] = estimate.weights
    beyond = estimate.share - estimate.floor
    return Unknown(
        estimate.share,
        estimate.floor,
        estimate.way,
        _character(regression, weights, seen) if beyond > NEGLIGIBLE else Character("nothing", 0, 0.0),
        weights,
        _relative_norm(regression, weights, estimate, seen),
    )


def _relative_norm(
    regression: Regression, weights: FloatArray, estimate: _Estimate, seen: Mapping[str, Corner]
) -> float:
    base = sum(corner.size * float(np.mean(corner.base**2)) for corner in seen.values())
    if base == 0.0:
        return 0.0
    tensors = regression.completed_by(weights).tensors
    met = [tensor.statistics for tensor in tensors if tensor.name in regression.contacts]
    left = sum(statistics.residual_energy(weights) for statistics in met)
    floor = estimate.floor * sum(statistics.energy for statistics in met)
    return float(np.sqrt(max(0.0, left - floor) / base))


def _character(regression: Regression, weights: FloatArray, seen: Mapping[str, Corner]) -> Character | None:
    """Look at the singular values of what is left, in some tensors."""
    by_name = {tensor.name: tensor.statistics for tensor in regression.tensors}
    spectra, sizes = [], []
    for name, left in remainders(regression, weights, names=seen):
        statistics = by_name[name]
        noise = float(np.sqrt(statistics.rounding / statistics.count))
        corner = left[:SPECTRUM_LINES, :SPECTRUM_LINES]
        spectra.append(spikes(corner, noise))
        sizes.append(statistics.count / corner.size)
    return character(spectra, sizes) if spectra else None

"""How a merge was made, in outline: which changes were kept, whether signs were elected, what it was divided by.

Each structure is the formula of a family of methods in float64, on sharp elements only (`sample`): fast, smooth
enough to search, and too coarse for the last bit. Its parameters are found here; `trial` makes the tensors again.

Formulas: mergekit's ``GeneralizedTaskArithmeticMerge`` and ``sparsify``; TIES (arXiv:2306.01708), Model
Breadcrumbs (arXiv:2312.06795).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from unmerge.checkpoint.dtypes import FloatArray
from unmerge.recipe.sample import Sample

Masks = NDArray[np.bool_]

STARTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Densities from which the search begins, and that it jumps to: where many changes are equal it does not see far."""
STEPS = {"weights": 0.3, "densities": 0.15, "gammas": 0.02}
"""First steps: relative for weights, absolute for the others."""
ROUNDS, SHRINK, EVALUATIONS = 7, 2.5, 500
"""The search ends when the steps were shrunk so often by this factor, or after so many evaluations."""
BEST_STARTS = 2
"""Starts that are searched from, of all that were evaluated."""


@dataclass(frozen=True, slots=True)
class Structure:
    """What a family of methods does to the changes.

    Attributes
    ----------
    name : str
        For people.
    trims : bool
        Whether each change keeps its largest elements only (its density).
    drops_outliers : bool
        Whether the very largest elements are dropped too (its gamma).
    consensus : bool
        Whether signs are elected, and the elements of the other sign left out.
    normalize : bool
        Whether the sum is divided by the weights of what was kept, element by element.
    """

    name: str
    trims: bool
    drops_outliers: bool
    consensus: bool
    normalize: bool


DENSE = Structure("dense", trims=False, drops_outliers=False, consensus=False, normalize=False)
STRUCTURES = (
    Structure("ties", trims=True, drops_outliers=False, consensus=True, normalize=True),
    Structure("ties, not normalized", trims=True, drops_outliers=False, consensus=True, normalize=False),
    Structure("breadcrumbs", trims=True, drops_outliers=True, consensus=False, normalize=False),
    Structure("breadcrumbs_ties", trims=True, drops_outliers=True, consensus=True, normalize=False),
    Structure("breadcrumbs_ties, normalized", trims=True, drops_outliers=True, consensus=True, normalize=True),
)
"""Structures in which the fine-tunes themselves say what is kept."""


@dataclass(frozen=True, slots=True, eq=False)
class Parameters:
    """Parameters of a structure for k models.

    Attributes
    ----------
    weights : array, shape (k,)
        Dimensionless; they sum to 1 in absolute value where only their ratios matter.
    densities, gammas : array, shape (k,)
        Shares of elements kept, and of largest elements dropped.
    scale : float
        What the whole change is multiplied by: lambda.
    """

    weights: FloatArray
    densities: FloatArray
    gammas: FloatArray
    scale: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """A structure's best parameters on a sample.

    Attributes
    ----------
    error : float
        Energy of what is left over the energy of the change; compare with `Sample.floor`.
    """

    structure: Structure
    parameters: Parameters
    error: float


def kept(sample: Sample, structure: Structure, parameters: Parameters) -> Masks:
    """Say which elements trimming keeps, shape (k, m)."""
    if not structure.trims:
        return np.ones(sample.deltas.shape, dtype=np.bool_)
    densities = parameters.densities[:, np.newaxis]
    if not structure.drops_outliers:
        return np.asarray(sample.ranks < densities)
    # mergekit drops fewer of the largest rather than to keep less than the density.
    first = np.minimum(parameters.gammas[:, np.newaxis], np.maximum(0.0, 1.0 - densities))
    return np.asarray((sample.ranks >= first) & (sample.ranks < first + densities))


def combine(
    deltas: FloatArray, masks: Masks, weights: FloatArray, *, consensus: bool, normalize: bool
) -> tuple[FloatArray, Masks]:
    """Combine changes of which some elements are kept, in float64.

    Returns
    -------
    change : array, shape (m,)
    used : array of bool, shape (k, m)
        Elements that were kept and, with `consensus`, have the elected sign.
    """
    weighted = deltas * masks * weights[:, np.newaxis]
    used = masks
    if consensus:
        used = np.sign(weighted) == np.where(weighted.sum(axis=0) >= 0.0, 1.0, -1.0)
        weighted = weighted * used
    change = weighted.sum(axis=0)
    if normalize:
        divisor = weights @ used
        change = change / np.where(divisor == 0.0, 1.0, divisor)
    return change, used


def predict(sample: Sample, structure: Structure, parameters: Parameters) -> FloatArray:
    """Return the change that a structure makes of the fine-tunes' changes, shape (m,)."""
    change, _ = combine(
        sample.deltas,
        kept(sample, structure, parameters),
        parameters.weights,
        consensus=structure.consensus,
        normalize=structure.normalize,
    )
    return parameters.scale * change


def least_squares(columns: FloatArray, values: FloatArray) -> FloatArray:
    """Return the coefficients of the k rows of `columns` that come nearest to `values`."""
    solution, *_ = np.linalg.lstsq(columns @ columns.T, columns @ values, rcond=1e-12)
    return np.asarray(solution)


def fit_dense(sample: Sample) -> Fit:
    """Fit plain weights; exact, without a search."""
    count = len(sample.deltas)
    weights = least_squares(sample.deltas, sample.change)
    parameters = Parameters(weights, np.ones(count), np.zeros(count))
    return Fit(DENSE, parameters, _error(sample, DENSE, parameters))


def fit(sample: Sample, structure: Structure, start: FloatArray, *, evaluations: int = EVALUATIONS) -> Fit:
    """Search a structure's parameters.

    Parameters
    ----------
    start : array, shape (k,)
        Rough weights, of least squares for example.
    evaluations : int
        After so many the search from one start ends.
    """
    candidates = [
        _scaled(sample, structure, Parameters(weights, np.full(len(start), density), np.full(len(start), 0.01)))
        for density in STARTS
        for weights in (start, np.sign(start) * np.abs(start).mean())
    ]
    candidates.sort(key=lambda candidate: candidate.error)
    refined = (refine(sample, candidate, evaluations=evaluations) for candidate in candidates[:BEST_STARTS])
    found = min(refined, key=lambda found: found.error)
    jumped = _jumped(sample, found)
    return refine(sample, jumped, evaluations=evaluations) if jumped.error < found.error else found


def _jumped(sample: Sample, best: Fit) -> Fit:
    """Try the usual densities for each model."""
    for model in range(len(best.parameters.densities) if best.structure.trims else 0):
        for density in STARTS:
            densities = best.parameters.densities.copy()
            densities[model] = density
            tried = _scaled(sample, best.structure, replace(best.parameters, densities=densities))
            best = min(best, tried, key=lambda found: found.error)
    return best


def refine(sample: Sample, found: Fit, *, shrunk: float = 1.0, evaluations: int = EVALUATIONS) -> Fit:
    """Search around a fit, one parameter at a time, with steps that shrink.

    Parameters
    ----------
    shrunk : float
        What to divide the first steps by, near an optimum.
    evaluations : int
        After so many the search ends.
    """
    best = _scaled(sample, found.structure, found.parameters)
    names = ["weights"] + ["densities"] * found.structure.trims + ["gammas"] * found.structure.drops_outliers
    left = evaluations
    for turn in range(ROUNDS):
        improved = True
        while improved and left > 0:
            before = best.error
            for name in names:
                step = STEPS[name] / shrunk / SHRINK**turn
                for model in range(len(best.parameters.weights)):
                    best = _better(sample, best, name, model, step)
                    left -= 2
            improved = best.error < before * (1.0 - 1e-3)
    return best


def _better(sample: Sample, best: Fit, name: str, model: int, step: float) -> Fit:
    for sign in (1.0, -1.0):
        tried = _scaled(sample, best.structure, _moved(best.parameters, name, model, sign * step))
        if tried.error < best.error * (1.0 - 1e-9):
            return tried
    return best


def _moved(parameters: Parameters, name: str, model: int, step: float) -> Parameters:
    values = getattr(parameters, name).copy()
    if name == "weights":
        values[model] *= (1.0 + abs(step)) if step > 0 else 1.0 / (1.0 + abs(step))
    else:
        values[model] = np.clip(values[model] + step, 0.0, 1.0)
    return replace(parameters, **{name: values})


def _scaled(sample: Sample, structure: Structure, parameters: Parameters) -> Fit:
    """Return the parameters with the best scale; it is linear, so it needs no search."""
    plain = predict(sample, structure, replace(parameters, scale=1.0))
    energy = float(plain @ plain)
    scale = float(plain @ sample.change) / energy if energy else 1.0
    left = sample.change - scale * plain
    size = float(np.abs(parameters.weights).sum()) or 1.0
    if structure.normalize:
        scaled = replace(parameters, weights=parameters.weights / size, scale=scale)
    else:
        scaled = replace(parameters, weights=parameters.weights * scale, scale=1.0)
    return Fit(structure, scaled, float(left @ left) / sample.energy)


def _error(sample: Sample, structure: Structure, parameters: Parameters) -> float:
    left = sample.change - predict(sample, structure, parameters)
    return float(left @ left) / sample.energy

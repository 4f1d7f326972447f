"""The original's way of decomposing: dense regressions on materialised vectors, timed on the same data."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from unmerge.attribution import open_target
from unmerge.experiment import layout
from unmerge.experiment.decomposition import solver
from unmerge.experiment.layout import Place, Target, targets, write_json
from unmerge.experiment.paper import Setting, facts, settings
from unmerge.experiment.presets import Preset
from unmerge.experiment.reduction import Known, load_reduced, merge_target, open_known, restrict
from unmerge.statistics import FloatArray, Statistics
from unmerge.task_vector import TaskVector, blocks


def materialise(vector: TaskVector, known: Known) -> FloatArray:
    """Return a task vector on the paper's coordinates, shape (coordinates,), in weight units."""
    parts = []
    for name, chosen in known.selection.indices.items():
        rows, columns = known.shapes[name]
        whole = [vector.deltas[name].block(start, stop)[0].ravel() for start, stop in blocks(0, rows, columns)]
        parts.append(np.concatenate(whole)[chosen])
    return np.concatenate(parts)


def dense(setting: Setting, D: FloatArray, v: FloatArray) -> FloatArray:
    """Decompose by a regression on all coordinates, as the original does.

    Parameters
    ----------
    setting : Setting
        The algorithm and its hyper-parameters.
    D : array, shape (n, K)
        Atoms, in weight units.
    v : array, shape (n,)
        The target, in weight units.

    Returns
    -------
    array, shape (K,)
        The coefficients.
    """
    values = dict(setting.values)
    cut = facts()["conventions"]["nnls_threshold"]
    if setting.algorithm == "nnls":
        from scipy.optimize import nnls

        found = np.asarray(nnls(D, v)[0])
        return np.asarray(np.where(found > cut, found, 0.0))
    if setting.algorithm == "dot_product":
        found = D.T @ v / np.linalg.norm(D, axis=0)
        return np.asarray(np.where(found > cut, found, 0.0))
    if setting.algorithm == "omp":
        return _sparse_coder(D, v, int(values["n_atoms"]))
    return _linear_model(setting.algorithm, values, D, v)


def _linear_model(algorithm: str, values: dict[str, float], D: FloatArray, v: FloatArray) -> FloatArray:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import ElasticNet, Lasso, Ridge

    makers: dict[str, Callable[[], object]] = {
        "lasso": lambda: Lasso(values["lambda"], fit_intercept=False, tol=1e-8),
        "ridge": lambda: Ridge(values["lambda"], fit_intercept=False),
        "elastic_net": lambda: ElasticNet(values["lambda"], l1_ratio=values["l1_ratio"], fit_intercept=False, tol=1e-8),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return np.asarray(makers[algorithm]().fit(D, v).coef_)  # type: ignore[attr-defined]


def _sparse_coder(D: FloatArray, v: FloatArray, n_atoms: int) -> FloatArray:
    from sklearn.decomposition import SparseCoder

    norms = np.linalg.norm(D, axis=0)  # scikit-learn asks for atoms of unit length
    coder = SparseCoder((D / norms).T, transform_algorithm="omp", transform_n_nonzero_coefs=n_atoms)
    return np.asarray(coder.transform(v[None, :])[0] / norms)


def _sample(preset: Preset, place: Place) -> list[Target]:
    """Return one target of each method, the first that was made."""
    made = [one for one in targets(preset, place.seed) if place.statistics(one.name).exists()]
    return list({one.method: one for one in reversed(made)}.values())


def baseline_part(job: tuple[Preset, Path, Path, int]) -> None:
    """Decompose one target of each method both ways and write times, their ratio and the largest difference."""
    preset, base, output, seed = job
    place = Place(output, seed)
    known = open_known(base, place, preset.dictionary, preset.training.target_modules, preset.top_k)
    D = np.column_stack([materialise(vector, known) for vector in known.dictionary.vectors])
    compared = [_compare(preset, base, place, target, known, D) for target in _sample(preset, place)]
    ours, theirs, difference = (list(column) for column in zip(*compared, strict=True)) if compared else ([], [], [])
    cells = len(compared) * len(settings())
    write_json(
        output / layout.BASELINE,
        {
            "coordinates": len(D),
            "atoms": D.shape[1],
            "cells": cells,
            "dense_seconds": sum(theirs),
            "statistics_seconds": sum(ours),
            "ratio": sum(theirs) / sum(ours) if compared else None,
            "largest_coefficient_difference": max(difference, default=None),
        },
    )


def _compare(
    preset: Preset, base: Path, place: Place, target: Target, known: Known, D: FloatArray
) -> tuple[float, float, float]:
    """Return our seconds, the dense ones, and the largest difference between coefficients."""
    from threadpoolctl import threadpool_limits

    try:
        merged = merge_target(preset, base, place, target)
        v = materialise(restrict(open_target(str(merged), known.base).vector, known.shapes), known)
    finally:
        shutil.rmtree(place.merged(target.name), ignore_errors=True)
    statistics = Statistics.zero(D.shape[1])
    for part in load_reduced(place.statistics(target.name)).top_k:
        statistics = statistics + part
    with threadpool_limits(limits=1, user_api="blas"):
        ours, our_seconds = _timed(lambda one: solver(one).solve(statistics).coefficients, settings())
        theirs, their_seconds = _timed(lambda one: dense(one, D, v), settings())
    pairs = zip(ours, theirs, strict=True)
    return our_seconds, their_seconds, max(float(np.abs(one - other).max()) for one, other in pairs)


def _timed(work: Callable[[Setting], FloatArray], every: Sequence[Setting]) -> tuple[list[FloatArray], float]:
    start = time.perf_counter()
    found = [work(one) for one in every]
    return found, time.perf_counter() - start

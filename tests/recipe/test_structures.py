"""Structures: their formulas against mergekit's methods in float64, and their search against planted parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.merging.in_mergekit import mergekit
from tests.recipe.samples import changes, sample_of, stored
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.merging.arithmetic import Arithmetic
from unmerge.merging.registry import MERGEKIT
from unmerge.recipe.structures import (
    DENSE,
    STRUCTURES,
    Parameters,
    Structure,
    combine,
    fit,
    fit_dense,
    kept,
    predict,
    refine,
)

every_structure = pytest.mark.parametrize("structure", STRUCTURES, ids=lambda structure: structure.name)
METHODS = {(False, True): "ties", (True, False): "breadcrumbs", (True, True): "breadcrumbs_ties"}
shares = st.integers(1, 100).map(lambda number: number / 100)
weights = st.lists(st.sampled_from([0.3, 0.5, 1.0, -0.2, 1.5, 0.123]), min_size=1, max_size=4)


def by_mergekit(structure: Structure, deltas: FloatArray, parameters: Parameters) -> FloatArray:
    """What mergekit's method makes of the changes of a base of zeros, in float64."""
    of_models: dict[str, Any] = {"weight": parameters.weights.tolist(), "density": parameters.densities.tolist()}
    if structure.drops_outliers:
        of_models["gamma"] = parameters.gammas.tolist()
    method = MERGEKIT[METHODS[structure.drops_outliers, structure.consensus]]
    told = {"normalize": structure.normalize, "lambda": parameters.scale}
    return np.asarray(
        mergekit(method, np.zeros(deltas.shape[1]), list(deltas), Arithmetic("F64"), of_models, told), dtype=np.float64
    )


@given(weights, st.integers(0, 100), st.booleans())
def test_an_election_is_mergekits(weight: list[float], seed: int, normalize: bool) -> None:
    from mergekit.merge_methods.generalized_task_arithmetic import get_mask

    rng = np.random.default_rng(seed)
    deltas = changes(seed, len(weight), 60)
    masks = rng.random(deltas.shape) < 0.7
    weighted = torch.from_numpy(deltas * masks) * torch.tensor(weight, dtype=torch.float64)[:, None]
    agreeing = get_mask(weighted, "sum", torch.float64)
    change, used = combine(deltas, masks, np.array(weight), consensus=True, normalize=normalize)
    assert np.array_equal(used, agreeing.numpy())
    expected = (weighted * agreeing).sum(dim=0)
    if normalize:
        divisor = (torch.tensor(weight, dtype=torch.float64)[:, None] * agreeing).sum(dim=0)
        divisor[divisor == 0] = 1
        expected /= divisor
    assert change == pytest.approx(expected.numpy(), rel=1e-9, abs=1e-15)


@settings(deadline=None, max_examples=40)
@given(shares, st.floats(0.0, 0.3), st.integers(0, 50))
def test_what_is_kept_is_what_mergekit_keeps(density: float, gamma: float, seed: int) -> None:
    from mergekit.sparsify import magnitude, magnitude_outliers

    delta = changes(seed, 1, 400)
    sample = sample_of(delta, delta[0])
    tensor = torch.from_numpy(delta[0])
    for structure in STRUCTURES[1], STRUCTURES[2]:
        parameters = Parameters(np.ones(1), np.array([density]), np.array([gamma]))
        ours = kept(sample, structure, parameters)[0]
        outliers = structure.drops_outliers
        theirs = (magnitude_outliers(tensor, density, gamma=gamma) if outliers else magnitude(tensor, density)) != 0
        # Whole numbers of elements are kept: the one at each threshold may differ.
        assert np.count_nonzero(ours != theirs.numpy()) <= (2 if outliers else 1)


@every_structure
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_predictions_are_mergekits(structure: Structure, data: st.DataObject) -> None:
    weight = np.array(data.draw(weights))
    count = len(weight)
    densities = np.array(data.draw(st.lists(shares, min_size=count, max_size=count)))
    gammas = np.array(data.draw(st.lists(st.sampled_from([0.0, 0.01, 0.1]), min_size=count, max_size=count)))
    parameters = Parameters(weight, densities, gammas, data.draw(st.sampled_from([1.0, 0.7, 1.3])))
    deltas = changes(data.draw(st.integers(0, 50)), count, 1000)
    theirs = by_mergekit(structure, deltas, parameters)
    ours = predict(sample_of(deltas, theirs), structure, parameters)
    different = np.count_nonzero(np.abs(ours - theirs) > 1e-9 * np.abs(theirs) + 1e-15)
    assert different <= count * (2 if structure.drops_outliers else 1)


def test_without_a_trim_all_is_kept_and_dense_weights_are_least_squares() -> None:
    deltas = changes(0, 3, 500)
    change = np.array([0.5, 0.3, -0.2]) @ deltas + 1e-5 * np.random.default_rng(1).standard_normal(500)
    found = fit_dense(sample_of(deltas, change))
    expected, left, *_ = np.linalg.lstsq(deltas.T, change, rcond=None)
    assert found.parameters.weights == pytest.approx(expected, rel=1e-6)
    assert found.error == pytest.approx(left[0] / (change @ change), rel=1e-4)
    assert kept(sample_of(deltas, change), DENSE, found.parameters).all()


@every_structure
def test_planted_parameters_are_found(structure: Structure) -> None:
    deltas = changes(3, 3, 4000)
    planted = Parameters(
        np.array([0.5, 0.3, 0.2]), np.array([0.7, 0.5, 0.3]), np.full(3, 0.04), 1.2 if structure.normalize else 1.0
    )
    target = stored(by_mergekit(structure, deltas, planted))
    sample = sample_of(deltas, target)
    found = fit(sample, structure, fit_dense(sample).parameters.weights)
    assert found.parameters.weights == pytest.approx(planted.weights, rel=0.01)
    assert found.parameters.densities == pytest.approx(planted.densities, abs=0.005)
    assert found.parameters.scale == pytest.approx(planted.scale, rel=0.01)
    if structure.drops_outliers:
        assert found.parameters.gammas == pytest.approx(planted.gammas, abs=0.002)
    assert found.error < 20.0 * sample.floor + 1e-3


@pytest.mark.parametrize("made_by", STRUCTURES, ids=lambda structure: structure.name)
def test_the_structure_that_made_a_target_leaves_least(made_by: Structure) -> None:
    deltas = changes(4, 2, 3000)
    planted = Parameters(np.array([0.6, 0.4]), np.array([0.7, 0.5]), np.full(2, 0.05))
    sample = sample_of(deltas, stored(by_mergekit(made_by, deltas, planted)))
    start = fit_dense(sample).parameters.weights
    errors = {structure.name: fit(sample, structure, start).error for structure in STRUCTURES}
    # What may drop outliers need not, so it can imitate what never does.
    imitator = {"ties": "breadcrumbs_ties, normalized", "ties, not normalized": "breadcrumbs_ties"}.get(made_by.name)
    others = [error for name, error in errors.items() if name not in {made_by.name, imitator}]
    assert errors[made_by.name] < 0.2 * min(others)


def test_a_search_never_leaves_more_than_its_start() -> None:
    deltas = changes(5, 2, 800)
    planted = Parameters(np.array([0.6, 0.4]), np.array([0.7, 0.5]), np.zeros(2))
    sample = sample_of(deltas, stored(by_mergekit(STRUCTURES[1], deltas, planted)))
    exact = refine(sample, fit(sample, STRUCTURES[1], planted.weights))
    for shrunk in (1.0, 20.0):
        assert refine(sample, exact, shrunk=shrunk).error <= exact.error

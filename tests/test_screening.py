"""Screening: partial coefficients beside dense least squares, and who is kept."""

from __future__ import annotations

import numpy as np
import pytest

from unmerge.screening import ENTER, LEAST, MOST, SIGN, Sketched, screen

PARTS = [slice(start, start + 60) for start in range(0, 1200, 60)]


def problem(
    weights: dict[int, float],
    *,
    atoms: int = 90,
    noise: float = 0.5,
    shared: float = 0.0,
    seed: int = 0,
    base: float = 0.0,
) -> Sketched:
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((atoms, 1200)) + shared * rng.standard_normal(1200)
    beside = 20.0 * rng.standard_normal(1200)
    y = sum((weight * X[atom] for atom, weight in weights.items()), noise * rng.standard_normal(1200)) + base * beside
    return Sketched(X.astype(np.float32), y, beside, PARTS)


@pytest.mark.parametrize("base", [0.0, -0.2])
def test_what_is_in_the_target_is_kept(base: float) -> None:
    found = screen(problem({3: 0.5, 40: 0.3, 77: 0.2}, base=base), 0.3)
    assert {3, 40, 77} <= set(found.kept)
    assert LEAST <= len(found.kept) < 20
    assert not found.crowded
    assert found.values == 1200


def test_coefficients_and_errors_are_those_of_dense_least_squares() -> None:
    given = problem({3: 0.5, 40: 0.3}, shared=0.5)
    found = screen(given, 0.9)
    X = given.atoms.astype(np.float64)
    for atom in (0, 10, 60):
        beside = np.vstack([X[[3, 40]], given.beside])
        columns = np.vstack([beside, X[atom]])
        solution, rest = np.linalg.lstsq(columns.T, given.target)[:2]
        assert found.coefficients[atom] == pytest.approx(solution[-1], rel=1e-3, abs=1e-5)
        each = float(rest[0]) / (1200 - 4) * np.linalg.inv(columns @ columns.T)[-1, -1]
        # Its own part in what is left, without one matrix at a time.
        own = X[atom] - np.linalg.lstsq(beside.T, X[atom])[0] @ beside
        left = given.target - np.linalg.lstsq(beside.T, given.target)[0] @ beside
        kept = [np.delete(np.arange(1200), part) for part in PARTS]
        without = np.array([own[place] @ left[place] / (own[place] @ own[place]) for place in kept])
        assert found.errors[atom] == pytest.approx(max(each, ((without - solution[-1]) ** 2).sum()) ** 0.5, rel=2e-3)
        energies = np.array([own[part] @ own[part] for part in PARTS])
        assert found.freedom[atom] == pytest.approx(energies.sum() ** 2 / (energies**2).sum() - 1.0, rel=1e-3)


def test_errors_hold_where_matrices_disagree() -> None:
    # What is alike within a matrix: without clusters, chance would show ten atoms of ninety.
    rng = np.random.default_rng(5)
    signs = np.repeat(rng.standard_normal(20), 60)
    pattern = rng.standard_normal(1200)
    X = rng.standard_normal((90, 1200)) + np.repeat(rng.standard_normal((90, 20)), 60, axis=1) * pattern
    given = Sketched(X.astype(np.float32), 3.0 * signs * pattern, np.zeros(1200), PARTS)
    found = screen(given, 0.9)
    naive = np.array([np.sqrt((given.target @ given.target) / 1200 / (x @ x)) for x in X])
    assert np.count_nonzero(np.abs(found.coefficients) > ENTER * naive) > 10
    assert np.count_nonzero(np.abs(found.coefficients) > ENTER * found.errors) <= 2


def test_false_signs_are_as_rare_as_they_should_be() -> None:
    counts = [
        np.count_nonzero((found := screen(problem({}, seed=seed), 0.9)).coefficients > SIGN * found.errors)
        for seed in range(20)
    ]
    # 1,800 atoms, of which chance lets 0.6 % to 1.2 % through (normal; Student of 19).
    assert 1 <= sum(counts) <= 40


def test_negative_weights_count_when_they_are_asked_for() -> None:
    given = problem({3: 0.5, 40: -0.5})
    assert 40 not in screen(given, 0.3).kept
    assert 40 in screen(given, 0.3, signed=True).kept


def test_relatives_of_what_shows_are_kept() -> None:
    given = problem({3: 0.5})
    atoms = given.atoms.copy()
    atoms[50] = 0.5 * atoms[3] + 0.8 * atoms[50]
    atoms[51] = atoms[3]
    atoms[52] = -atoms[3]
    found = screen(Sketched(atoms, given.target, given.beside, PARTS), 0.3)
    assert {3, 50, 51, 52} <= set(found.kept)
    assert 50 not in screen(given, 0.3).kept


def test_wanted_atoms_and_those_without_a_sketch_are_kept() -> None:
    given = problem({3: 0.5})
    atoms = given.atoms.copy()
    atoms[70] = 0.0
    found = screen(Sketched(atoms, given.target, given.beside, PARTS), 0.3, wanted=[8, 9])
    assert {3, 8, 9, 70} <= set(found.kept)
    assert np.isinf(found.errors[70])


def test_a_crowd_is_told() -> None:
    found = screen(problem({3: 0.5}, atoms=300, shared=1.5), 0.3)  # all are alike
    assert found.crowded
    assert len(found.kept) == MOST
    assert 3 in found.kept


def test_a_target_of_the_atoms_alone() -> None:
    found = screen(problem({3: 0.5, 40: 0.3}, noise=0.0), 0.3)
    assert {3, 40} <= set(found.kept)
    assert np.isfinite(found.coefficients).all()
    others = [atom for atom in range(90) if atom not in (3, 40)]
    assert np.abs(found.coefficients[others]).max() < 1e-5

"""What directions lack of full checkpoints: exact where it can be, and never more than the target's energy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmerge.completion import Gap, alone, complete, possible, proportions
from unmerge.solvers import Nnls
from unmerge.statistics import FloatArray, Statistics

ROWS, COLUMNS = 40, 24


def truncated(change: FloatArray, rank: int) -> FloatArray:
    """Return the leading directions of a change, shape (ROWS * COLUMNS,)."""
    u, s, w = np.linalg.svd(change.reshape(ROWS, COLUMNS), full_matrices=False)
    return np.asarray((u[:, :rank] * s[:rank]) @ w[:rank]).ravel()


def changes(rng: np.random.Generator, atoms: int, shared: float = 0.0) -> FloatArray:
    common = rng.standard_normal((ROWS * COLUMNS, 1))
    own = rng.standard_normal((ROWS * COLUMNS, atoms))
    return np.asarray(np.sqrt(shared) * common + np.sqrt(1.0 - shared) * own)


def seen_and_gap(atoms: FloatArray, ranks: list[int], target: FloatArray) -> tuple[Statistics, Gap, Statistics]:
    """Return the statistics of directions of these ranks, what is known beyond them, and those of the atoms."""
    directions = np.stack([truncated(atom, rank) for atom, rank in zip(atoms.T, ranks, strict=True)], axis=1)
    seen, exact = Statistics.of(directions, target), Statistics.of(atoms, target)
    return seen, Gap(exact.gram - seen.gram, directions.T @ atoms), exact


def unknown_gap(seen: Statistics, exact: Statistics) -> Gap:
    """Return what is known where no product is kept: energies alone."""
    missing = np.diag(np.diagonal(exact.gram - seen.gram))
    return Gap(possible(seen.gram, missing), seen.gram)


def bordered(statistics: Statistics) -> FloatArray:
    """Return the Gram matrix of the atoms and the target."""
    column = statistics.correlation[:, np.newaxis]
    return np.block([[statistics.gram, column], [column.T, np.array([[statistics.energy]])]])


@given(
    seed=st.integers(0, 10**6),
    shared=st.sampled_from([0.0, 0.5, 0.999, 1.0 - 1e-7]),
    rank=st.sampled_from([1, 4, 12]),
    of=st.sampled_from(["atoms", "directions", "stranger", "nothing"]),
    scale=st.sampled_from([0.0, 0.3, 1.0, 5.0, -2.0]),
)
def test_no_coefficients_leave_less_than_nothing(seed: int, shared: float, rank: int, of: str, scale: float) -> None:
    rng = np.random.default_rng(seed)
    atoms = changes(rng, 4, shared)
    weights = rng.standard_normal(4)
    target = {
        "atoms": atoms @ weights,
        "directions": np.stack([truncated(atom, rank) for atom in atoms.T], axis=1) @ weights,
        "stranger": rng.standard_normal(len(atoms)),
        "nothing": np.zeros(len(atoms)),
    }[of]
    seen, gap, exact = seen_and_gap(atoms, [rank] * 4, target)
    found = complete(seen, gap, scale * weights)
    size = np.sqrt(np.append(np.diag(found.gram), max(found.energy, 1.0)))
    assert np.linalg.eigvalsh(bordered(found) / np.outer(size, size)).min() > -1e-9
    assert found.energy == exact.energy
    np.testing.assert_allclose(found.gram, exact.gram, rtol=1e-12, atol=1e-12 * np.abs(exact.gram).max())


def test_changes_of_low_rank_are_complete_as_they_are() -> None:
    rng = np.random.default_rng(1)
    atoms = np.stack([truncated(atom, 5) for atom in changes(rng, 3).T], axis=1)
    target = atoms @ [0.5, 0.2, 0.0] + 0.1 * rng.standard_normal(len(atoms))
    seen, gap, exact = seen_and_gap(atoms, [8, 8, 8], target)
    found = complete(seen, gap, proportions(seen, gap.shown))
    np.testing.assert_allclose(bordered(found), bordered(exact), rtol=1e-9, atol=1e-9 * exact.energy)


@given(
    seed=st.integers(0, 10**6),
    shared=st.sampled_from([0.0, 0.5, 0.99]),
    rank=st.sampled_from([1, 4, 12]),
    weights=st.lists(st.floats(-1.0, 1.0), min_size=3, max_size=3),
)
def test_a_linear_merge_has_the_statistics_of_the_atoms_as_they_are(
    seed: int, shared: float, rank: int, weights: list[float]
) -> None:
    """What directions lack is known in a merge of the atoms alone, however alike they are there."""
    rng = np.random.default_rng(seed)
    atoms = changes(rng, 3, shared)
    seen, gap, exact = seen_and_gap(atoms, [rank] * 3, atoms @ weights)
    found = complete(seen, gap, proportions(seen, gap.shown))
    np.testing.assert_allclose(found.correlation, exact.correlation, atol=1e-6 * np.abs(exact.gram).max())


def test_where_no_product_is_kept_rests_are_orthogonal() -> None:
    rng = np.random.default_rng(2)
    atoms, target = changes(rng, 3, shared=0.2), rng.standard_normal(ROWS * COLUMNS)
    seen, _, exact = seen_and_gap(atoms, [6] * 3, target)
    found = complete(seen, unknown_gap(seen, exact), np.array([0.4, 0.3, 0.0]))
    np.testing.assert_allclose(np.diagonal(found.gram), np.diagonal(exact.gram), rtol=1e-9)
    size = np.sqrt(np.append(np.diag(found.gram), found.energy))
    assert np.linalg.eigvalsh(bordered(found) / np.outer(size, size)).min() > -1e-9


def test_a_target_of_directions_alone_is_told_from_one_of_the_whole_change() -> None:
    rng = np.random.default_rng(3)
    atoms = changes(rng, 1)
    seen, gap, exact = seen_and_gap(atoms, [6], 0.7 * truncated(atoms[:, 0], 6))
    found = complete(seen, gap, proportions(seen, gap.shown))
    np.testing.assert_allclose(bordered(found), bordered(exact), rtol=1e-9, atol=1e-9 * exact.energy)


@pytest.mark.parametrize("shared", [0.0, 0.2, 0.5])
def test_weights_and_what_is_left_of_changes_of_full_rank(shared: float) -> None:
    """However alike full checkpoints are outside of their directions."""
    rng = np.random.default_rng(4)
    truth = np.array([0.5, 0.3, 0.0])
    parts = []
    for _ in range(24):
        atoms = changes(rng, 3, shared)
        seen, gap, _ = seen_and_gap(atoms, [6] * 3, atoms @ truth)
        parts.append((seen, gap))
    whole = sum((seen for seen, _ in parts[1:]), parts[0][0])
    weights = proportions(whole, sum(gap.shown for _, gap in parts))
    completed = [complete(seen, gap, weights) for seen, gap in parts]
    total = sum(completed[1:], completed[0])
    found = Nnls().solve(total).coefficients
    np.testing.assert_allclose(found, truth, atol=1e-6)
    assert total.residual_energy(found) / total.energy < 1e-6
    # Intervals come from what was seen, freed from what the others' rests show: of the same weights.
    own = [alone(seen, gap, weights) for seen, gap in parts]
    np.testing.assert_allclose(Nnls(signed=True).solve(sum(own[1:], own[0])).coefficients, weights, atol=1e-6)


def test_weights_that_differ_between_tensors_are_followed() -> None:
    rng = np.random.default_rng(5)
    parts, exact = [], []
    for weight in np.linspace(0.2, 0.8, 24):
        atoms = changes(rng, 2)
        seen, gap, true = seen_and_gap(atoms, [6, 6], atoms @ [weight, 0.0])
        parts.append((seen, gap))
        exact.append(true)
    whole = sum((seen for seen, _ in parts[1:]), parts[0][0])
    weights = proportions(whole, sum(gap.shown for _, gap in parts))
    completed = [complete(seen, gap, weights) for seen, gap in parts]
    total, truth = sum(completed[1:], completed[0]), sum(exact[1:], exact[0])
    share, expected = (item.residual_energy(Nnls().solve(item).coefficients) / item.energy for item in (total, truth))
    assert share == pytest.approx(expected, abs=0.03)

"""Weighted factors against dense linear algebra and optimality conditions."""

from __future__ import annotations

import numpy as np
import pytest

from unmerge.evidence.low_rank import Factors, leading, refitted, tangents
from unmerge.statistics import FloatArray


def planted(seed: int, rank: int = 3, shape: tuple[int, int] = (40, 30)) -> tuple[FloatArray, Factors]:
    """Weights that are unequal, and factors."""
    rng = np.random.default_rng(seed)
    factors = Factors(rng.standard_normal((shape[0], rank)), rng.standard_normal((shape[1], rank)))
    return np.exp(rng.standard_normal(shape)), factors


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_leading_directions_are_those_that_were_planted(rank: int) -> None:
    rng = np.random.default_rng(rank)
    _, factors = planted(rank, rank, (200, 120))
    found = leading(factors.product + 0.3 * rng.standard_normal((200, 120)))
    assert found.rank == rank
    assert np.linalg.norm(found.product - factors.product) < 0.35 * np.linalg.norm(factors.product)


def test_noise_has_no_leading_directions() -> None:
    rng = np.random.default_rng(0)
    assert all(leading(rng.standard_normal((160, 100))).rank == 0 for _ in range(10))


def test_refitted_with_equal_weights_are_singular_vectors() -> None:
    rng = np.random.default_rng(1)
    _, start = planted(1)
    values = start.product + 0.1 * rng.standard_normal((40, 30))
    found = start
    for _ in range(30):
        found, _ = refitted(values, np.ones((40, 30)), found)
    left, singular, right = np.linalg.svd(values)
    assert found.product == pytest.approx((left[:, :3] * singular[:3]) @ right[:3], abs=1e-6)


def test_refitted_with_unequal_weights_leave_no_gradient() -> None:
    rng = np.random.default_rng(2)
    precision, start = planted(2)
    values = start.product + 0.1 * rng.standard_normal((40, 30))
    found = start
    for _ in range(60):
        found, _ = refitted(values, precision, found)
    rest = precision * (values - found.product)
    assert np.abs(rest @ found.right).max() < 1e-5
    assert np.abs(rest.T @ found.left).max() < 1e-5
    assert np.sum(precision * (values - found.product) ** 2) < np.sum(precision * (values - start.product) ** 2)


def test_tangent_is_the_dense_least_squares_solution() -> None:
    rng = np.random.default_rng(3)
    precision, at = planted(3, 2, (12, 9))
    force = rng.standard_normal((12, 9))
    [(left, right)] = tangents([force], precision, at)
    basis = [np.outer(np.eye(12)[i], at.right[:, k]) for i in range(12) for k in range(2)]
    basis += [np.outer(at.left[:, k], np.eye(9)[j]) for j in range(9) for k in range(2)]
    dense = np.array([one.ravel() for one in basis]).T
    roots = np.sqrt(precision).ravel()
    expected = dense @ np.linalg.lstsq(roots[:, None] * dense, force.ravel() / roots)[0]
    moved = (left @ at.right.T + at.left @ right.T).ravel()
    # It stops after some turns; what is left is small against the pull.
    assert np.linalg.norm(moved - expected) < 0.05 * np.linalg.norm(expected)


def test_variances_weigh_as_many_elements_as_there_are_parameters() -> None:
    precision, at = planted(4)
    _, variance = refitted(at.product, precision, at)
    assert np.sum(precision * variance) == pytest.approx(3 * (40 + 30), rel=1e-6)


def test_variances_are_those_of_rows_that_are_fitted_again_and_again() -> None:
    rng = np.random.default_rng(5)
    precision, at = planted(5, 2, (4, 60))
    squares = []
    for _ in range(4000):
        noise = rng.standard_normal((4, 60)) / np.sqrt(precision)
        rows = [
            np.linalg.lstsq(np.sqrt(h)[:, None] * at.right, np.sqrt(h) * e)[0]
            for h, e in zip(precision, noise, strict=True)
        ]
        squares.append((np.array(rows) @ at.right.T) ** 2)
    of_rows = np.array([
        np.einsum("ja,ab,jb->j", at.right, np.linalg.inv((at.right.T * h) @ at.right), at.right) for h in precision
    ])  # fmt: skip
    assert np.mean(squares, axis=0) == pytest.approx(of_rows, rel=0.15)
    # They fit their own product as they are.
    found, variance = refitted(at.product, precision, at)
    assert found.product == pytest.approx(at.product, abs=1e-6)
    columns = variance - of_rows
    assert (columns > 0.0).all()

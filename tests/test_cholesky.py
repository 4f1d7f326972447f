"""Triangular roots against numpy's QR decomposition and singular values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmerge.checkpoint.dtypes import FloatArray
from unmerge.cholesky import SOUND, orthonormal, sound_root


def thin(seed: int, rows: int, singular: FloatArray) -> FloatArray:
    generator = np.random.default_rng(seed)
    left, _ = np.linalg.qr(generator.standard_normal((rows, len(singular))))
    right, _ = np.linalg.qr(generator.standard_normal((len(singular), len(singular))))
    return left * singular @ right.T


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rank=st.integers(1, 40),
    decades=st.floats(0.0, 12.0),
    size=st.sampled_from([1e-200, 1.0, 1e200]),
)
def test_columns_are_orthonormal_and_give_the_vectors_back(seed: int, rank: int, decades: float, size: float) -> None:
    vectors = thin(seed, 90, size * np.logspace(0.0, -decades, rank))
    columns, triangle = orthonormal(vectors)
    # A root of products squares the condition number, 1 / SOUND at most; what is worse goes another way.
    assert columns.T @ columns == pytest.approx(np.eye(rank), abs=1e-7)
    assert columns @ triangle == pytest.approx(vectors, abs=1e-13 * size)
    assert triangle == pytest.approx(np.triu(triangle))
    assert np.linalg.svd(triangle, compute_uv=False) == pytest.approx(
        np.linalg.svd(vectors, compute_uv=False), rel=1e-6, abs=1e-13 * size
    )


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), rank=st.integers(2, 40), decades=st.floats(0.0, 8.0))
def test_a_root_is_one_of_products_whose_smallest_eigenvalue_is_sound(seed: int, rank: int, decades: float) -> None:
    vectors = thin(seed, 90, np.logspace(0.0, -decades, rank))
    products = vectors.T @ vectors
    values = np.linalg.eigvalsh(products)
    found = sound_root(products)
    if found is None:
        assert values[0] < 40 * SOUND * values.sum()  # the bound is that of a sum of at most 40 terms
        return
    root, inverse = found
    assert values[0] >= 0.99 * SOUND * values.sum()
    assert root.T @ root == pytest.approx(products, abs=1e-14)
    assert root @ inverse == pytest.approx(np.eye(rank), abs=1e-10)


@pytest.mark.parametrize("vectors", [np.zeros((5, 3)), np.ones((5, 3)), np.eye(5)[:, :3] * [1.0, 1.0, 0.0]])
def test_columns_that_are_alike_have_no_root_but_a_basis(vectors: FloatArray) -> None:
    assert sound_root(vectors.T @ vectors) is None
    columns, triangle = orthonormal(vectors)
    assert columns.T @ columns == pytest.approx(np.eye(3))
    assert columns @ triangle == pytest.approx(vectors)

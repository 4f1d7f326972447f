"""Versions of one fine-tune among the atoms of a dictionary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmerge.evidence.identifiability import ALIKE, alike_groups
from unmerge.statistics import FloatArray


def gram(*columns: FloatArray) -> FloatArray:
    D = np.column_stack(columns)
    return D.T @ D


def turned(cosine: float, first: FloatArray, second: FloatArray) -> FloatArray:
    """Return a vector of a cosine with the first, for two that are orthonormal."""
    return cosine * first + float(np.sqrt(1.0 - cosine**2)) * second


@pytest.mark.parametrize(("cosine", "found"), [(0.9501, ((0, 2),)), (0.9499, ()), (-0.96, ((0, 2),)), (1.0, ((0, 2),))])
def test_atoms_are_alike_from_a_cosine_on(cosine: float, found: tuple[tuple[int, ...], ...]) -> None:
    x, y, z = np.eye(3)
    assert ALIKE == 0.95
    assert alike_groups(gram(x, z, turned(cosine, x, y))) == found


def test_chains_are_one_group() -> None:
    x, y, z, w = np.eye(4)
    second = turned(0.96, x, y)
    third = turned(0.96, second, z)
    assert abs(x @ third) < 0.95
    assert alike_groups(gram(third, w, x, second)) == ((0, 2, 3),)


def test_a_lower_cosine_can_be_asked_for() -> None:
    x, y, _ = np.eye(3)
    assert alike_groups(gram(x, turned(0.5, x, y)), 0.4) == ((0, 1),)


def test_zero_atoms_are_in_none() -> None:
    x, y, _ = np.eye(3)
    assert alike_groups(gram(0.0 * x, x, 0.0 * y, 2.0 * x)) == ((1, 3),)
    assert alike_groups(np.zeros((0, 0))) == ()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.integers(-6, 6))
def test_neither_scale_nor_order_matters(seed: int, scale: int) -> None:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((3, 40))
    atoms = centres[rng.integers(0, 3, 7)] + 0.12 * rng.standard_normal((7, 40))
    order, sizes = rng.permutation(7), 10.0 ** (scale * rng.random(7))
    found = {frozenset(group) for group in alike_groups(gram(*atoms))}
    mixed = alike_groups(gram(*(sizes[place] * atoms[place] for place in order)))
    assert {frozenset(int(order[place]) for place in group) for group in mixed} == found
    assert list(mixed) == sorted(tuple(sorted(group)) for group in mixed)

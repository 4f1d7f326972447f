from __future__ import annotations

import numpy as np
import pytest

from unmerge.evidence.identifiability import coherence, collinear_groups
from unmerge.statistics import FloatArray


def gram(*columns: FloatArray) -> FloatArray:
    D = np.column_stack(columns)
    return D.T @ D


def independent(count: int) -> list[FloatArray]:
    return list(np.random.default_rng(0).standard_normal((count, 50)))


class TestCollinearGroups:
    def test_independent_atoms_are_in_none(self) -> None:
        assert collinear_groups(gram(*independent(6))) == ()

    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
    def test_separate_groups_stay_separate(self, scale: float) -> None:
        a, b, c, d, e = independent(5)
        atoms = [a, b, c, -3.0 * scale * a, d, e, b + c]
        assert collinear_groups(gram(*atoms)) == ((0, 3), (1, 2, 6))

    def test_more_atoms_than_parameters(self) -> None:
        atoms = np.random.default_rng(0).standard_normal((4, 6))
        assert collinear_groups(atoms.T @ atoms) == ((0, 1, 2, 3, 4, 5),)

    def test_zero_atoms_are_in_none(self) -> None:
        a, b = independent(2)
        assert collinear_groups(gram(0.0 * a, a, b, a)) == ((1, 3),)

    def test_a_mean_of_many(self) -> None:
        atoms = list(np.random.default_rng(0).standard_normal((100, 400)))
        assert collinear_groups(gram(*atoms, np.mean(atoms, axis=0))) == (tuple(range(101)),)

    @pytest.mark.parametrize(("angle", "found"), [(1e-6, ((0, 1),)), (3e-5, ((0, 1),)), (1e-4, ())])
    def test_tolerance_is_an_angle(self, angle: float, found: tuple[tuple[int, ...], ...]) -> None:
        x, y, z = np.eye(3)
        assert collinear_groups(gram(x, np.cos(angle) * x + np.sin(angle) * y, z)) == found
        assert collinear_groups(gram(x, np.cos(0.01) * x + np.sin(0.01) * y, z), 1e-4) == ((0, 1),)

    def test_no_atoms(self) -> None:
        assert collinear_groups(np.zeros((0, 0))) == ()


class TestCoherence:
    def test_is_the_largest_cosine(self) -> None:
        x, y, z = np.eye(3)
        assert coherence(gram(x, 5.0 * (0.6 * x - 0.8 * y), z)) == pytest.approx(0.6)
        assert coherence(gram(x, y + 2.0 * x, -7.0 * y)) == pytest.approx(2.0 / np.sqrt(5.0))

    def test_sign_and_scale_do_not_matter(self) -> None:
        (a,) = independent(1)
        assert coherence(gram(a, -1e6 * a)) == pytest.approx(1.0)
        assert coherence(gram(a, -1e6 * a)) <= 1.0

    def test_of_too_few_atoms_is_zero(self) -> None:
        (a,) = independent(1)
        assert coherence(gram(a)) == 0.0
        assert coherence(gram(a, 0.0 * a)) == 0.0

from __future__ import annotations

import numpy as np
import pytest

from unmerge import metrics
from unmerge.solvers import Nnls
from unmerge.statistics import Statistics

D = np.random.default_rng(0).standard_normal((30, 4))
V = np.random.default_rng(1).standard_normal(30) + D[:, 0]
STATISTICS = Statistics.of(D, V)
A = np.array([1.0, -0.5, 0.0, 2.0])


class TestReconstruction:
    def test_cosine_is_that_of_the_vectors(self) -> None:
        expected = V @ (D @ A) / np.linalg.norm(V) / np.linalg.norm(D @ A)
        assert metrics.cosine(STATISTICS, A) == pytest.approx(expected, rel=1e-12)
        assert metrics.cosine(STATISTICS, -3.0 * A) == pytest.approx(-expected, rel=1e-12)

    @pytest.mark.parametrize("scale", [1e-150, 1e-6, 1e6, 1e150])
    def test_length_does_not_matter(self, scale: float) -> None:
        assert metrics.cosine(STATISTICS, scale * A) == pytest.approx(metrics.cosine(STATISTICS, A), rel=1e-12)

    def test_cosine_of_nothing_is_zero(self) -> None:
        assert metrics.cosine(STATISTICS, np.zeros(4)) == 0.0
        assert metrics.cosine(Statistics.of(D, 0.0 * V), A) == 0.0
        assert metrics.cosine(Statistics.of(0.0 * D, V), A) == 0.0
        assert metrics.cosine(Statistics.of(D[:, :0], V), A[:0]) == 0.0

    def test_cosine_never_leaves_its_range(self) -> None:
        assert metrics.cosine(Statistics.of(D, D @ A), A) <= 1.0
        assert metrics.cosine(Statistics.of(D, D @ A), A) == pytest.approx(1.0)

    def test_error_is_equation_6(self) -> None:
        cosine = V @ (D @ A) / np.linalg.norm(V) / np.linalg.norm(D @ A)
        assert cosine > 0.1
        assert metrics.reconstruction_error(STATISTICS, A) == pytest.approx(1.0 - cosine**2)
        assert metrics.reconstruction_error(STATISTICS, -A) == 1.0

    def test_unexplained_share_sees_the_length(self) -> None:
        expected = np.sum((V - D @ A) ** 2) / np.sum(V**2)
        assert metrics.unexplained_share(STATISTICS, A) == pytest.approx(expected)
        assert metrics.unexplained_share(STATISTICS, np.zeros(4)) == 1.0
        assert metrics.unexplained_share(STATISTICS, 10.0 * A) > 1.0
        assert metrics.unexplained_share(Statistics.of(D, 0.0 * V), np.zeros(4)) == 0.0

    def test_for_least_squares_the_two_are_equal(self) -> None:
        best = Nnls().solve(STATISTICS).coefficients
        assert metrics.unexplained_share(STATISTICS, best) == pytest.approx(
            metrics.reconstruction_error(STATISTICS, best)
        )


class TestComponents:
    @pytest.mark.parametrize(
        ("found", "true", "precision", "recall"),
        [
            ({"a", "b", "c"}, {"a", "d"}, 1 / 3, 1 / 2),
            ({"a"}, {"a", "b", "c", "d"}, 1.0, 1 / 4),
            ({"a"}, {"a"}, 1.0, 1.0),
            ({"a"}, {"b"}, 0.0, 0.0),
            (set(), {"a"}, 0.0, 0.0),
            ({"a"}, set(), 0.0, 0.0),
        ],
    )
    def test_precision_and_recall_are_equations_7_and_8(
        self, found: set[str], true: set[str], precision: float, recall: float
    ) -> None:
        assert metrics.precision_recall(found, true) == (precision, recall)

    def test_perfect_match(self) -> None:
        assert metrics.perfect_match({"a", "b"}, frozenset({"b", "a"}))
        assert metrics.perfect_match(set(), set())
        assert not metrics.perfect_match({"a", "b"}, {"a"})
        assert not metrics.perfect_match({"a"}, {"a", "b"})

    def test_sparsity(self) -> None:
        coefficients = np.array([0.5, -0.5, 1e-6, -2e-6, 0.0])
        assert metrics.sparsity(coefficients) == 3
        assert metrics.sparsity(coefficients, threshold=0.5) == 0
        assert metrics.sparsity(coefficients, threshold=0.0) == 4

    def test_mean_absolute_error(self) -> None:
        assert metrics.mean_absolute_error(A, np.array([0.0, 0.5, 0.0, 2.0])) == 0.5
        assert metrics.mean_absolute_error(np.zeros(0), np.zeros(0)) == 0.0

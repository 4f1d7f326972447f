"""The public generators make what they say."""

from __future__ import annotations

import numpy as np
import pytest

from unmerge import SOLVERS
from unmerge.testing import planted_mixture


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_planted_mixtures_hold_their_truth(correlation: float) -> None:
    truth = [0.5, 0.0, 0.25]
    generator = np.random.default_rng(0)
    statistics, atoms, target = planted_mixture(generator, truth, correlation=correlation)
    np.testing.assert_allclose(atoms @ truth, target, rtol=1e-12)
    cosines = np.corrcoef(atoms.T)[np.triu_indices(3, 1)]
    np.testing.assert_allclose(cosines, correlation, atol=0.1)
    np.testing.assert_allclose(SOLVERS["nnls"]().solve(statistics).coefficients, truth, atol=1e-9)


def test_planted_noise_has_the_size_that_was_asked_for() -> None:
    clean = planted_mixture(np.random.default_rng(1), [1.0, 2.0])[2]
    noisy = planted_mixture(np.random.default_rng(1), [1.0, 2.0], noise=0.1)[2]
    assert np.linalg.norm(noisy - clean) == pytest.approx(0.1 * np.linalg.norm(clean))

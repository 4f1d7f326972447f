"""The compiled arithmetic against scipy's, and against sums over all steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtr

from unmerge.evidence.lattice_kernel import STRAY, _normal, see_stepwise


@pytest.mark.parametrize("at", [-34.0, -9.0, -7.0711, -7.07, -3.0, -0.1, 0.0, 0.7, 5.0, 7.5, 30.0])
def test_the_normal_distribution_is_scipys(at: float) -> None:
    below, density = _normal(at)
    assert below == pytest.approx(ndtr(at), rel=1e-7 if at < -7.0 else 1e-13)
    assert density == pytest.approx(np.exp(-0.5 * at**2) / np.sqrt(2.0 * np.pi), rel=1e-14)


@given(
    low=st.floats(-3.0, 3.0),
    middle=st.floats(-3.0, 3.0),
    error=st.floats(0.02, 1.4),
    share=st.floats(0.03, 0.97),
    noise=st.sampled_from([0.01, 0.03, 0.1]),
)
def test_no_step_that_matters_is_left_out(low: float, middle: float, error: float, share: float, noise: float) -> None:
    steps = np.rint(middle) + np.arange(-6, 7)
    chance = ndtr((steps + 0.5 - middle) / error) - ndtr((steps - 0.5 - middle) / error)
    inside = ndtr((low + 1.0 - share * steps) / noise) - ndtr((low - share * steps) / noise)
    total, score, mean, variance = see_stepwise(low, low + 1.0, 1.0, noise, middle, error, share, 6)
    assert total == pytest.approx(float(chance @ inside), abs=1e-12)
    assert np.isfinite([score, mean]).all()
    assert variance >= 0.0
    if chance @ inside > 1e3 * STRAY:
        # Given the element, the change lies between the steps that can have made it.
        possible = steps[chance * inside > 1e-12 * (chance @ inside)]
        assert possible.min() - 0.5 - 1e-3 <= mean <= possible.max() + 0.5 + 1e-3

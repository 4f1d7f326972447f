"""What an element says, against merges that are drawn and rounded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from unmerge.checkpoint.dtypes import DTYPES
from unmerge.evidence.lattice import CONTINUOUS, Block, Stranger, seen
from unmerge.evidence.lattice_kernel import STRAY
from unmerge.evidence.low_rank import Factors
from unmerge.statistics import FloatArray

WEIGHTS, SHARE, FINE = np.array([0.4]), 0.45, 2.0**-7


def one_element(error: float, middle: float, *, known: float = 1.0, bottom: float = -0.5) -> tuple[Block, Stranger]:
    """An element on a grid of steps of 1, far from a power of two, whose cell is one step wide."""
    element = np.ones((1, 1))
    low, weight = bottom * element, 192.0 * element
    block = Block(known * element[None], low, low + 1.0, weight, element, FINE, 2.0**-126)
    return block, Stranger(Factors(middle * element, element), error * element)


def drawn(error: float, middle: float, noise: float, known: float) -> tuple[FloatArray, FloatArray]:
    """Draws of the stranger's change and of the sum that is stored."""
    rng = np.random.default_rng(0)
    change = middle + error * rng.standard_normal(400_000)
    total = WEIGHTS[0] * known + SHARE * np.rint(change) + noise * rng.standard_normal(400_000)
    return change, total


CASES = [
    (error, middle, low) for error in (0.1, 0.3, 0.8, 1.3) for middle in (0.0, 0.45, 2.3) for low in (-0.5, 0.5, 1.5)
]


@pytest.mark.parametrize(("error", "middle", "low"), CASES)
@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_likelihood_mean_and_variance_are_those_of_draws(error: float, middle: float, low: float, noise: float) -> None:
    change, total = drawn(error, middle, noise, 1.0)
    inside = (total > low) & (total < low + 1.0)
    found = seen(*one_element(error, middle, bottom=low), WEIGHTS, SHARE, noise)
    assert np.exp(found.likelihood) == pytest.approx(inside.mean(), abs=0.004)
    if inside.mean() > 0.02:
        # With a small probability something else made the element, which then says nothing.
        told = inside.mean() / (inside.mean() + STRAY)
        mean, square = told * (change[inside].mean() - middle), told * np.mean((change[inside] - middle) ** 2)
        assert found.mean.item() == pytest.approx(middle + mean, abs=0.03 * error + 0.005)
        assert found.variance.item() == pytest.approx(square + (1.0 - told) * error**2 - mean**2, rel=0.1)


@pytest.mark.parametrize("weight", [128.0, 129.5, -129.0, 126.5, -127.5, 255.0, -256.0, 258.0])
@pytest.mark.parametrize(("error", "middle"), [(0.3, 0.2), (0.9, -1.3), (0.7, 2.2)])
def test_steps_are_those_of_the_grid_on_both_sides_of_a_power_of_two(
    weight: float, error: float, middle: float
) -> None:
    rng, grid = np.random.default_rng(1), DTYPES["BF16"]
    change = middle + error * rng.standard_normal(400_000)
    merged = SHARE * (grid.nearest(weight + change) - weight) + 0.02 * rng.standard_normal(400_000)
    block, stranger = one_element(error, middle, known=0.0, bottom=-0.1)
    found = seen(replace(block, weights=np.full((1, 1), weight)), stranger, WEIGHTS, SHARE, 0.02)
    inside = (merged > -0.1) & (merged < 0.9)
    assert np.exp(found.likelihood) == pytest.approx(inside.mean(), abs=0.004)
    if inside.mean() > 0.02:
        assert found.mean.item() == pytest.approx(change[inside].mean(), abs=0.02)
        assert np.sqrt(found.variance.item()) == pytest.approx(change[inside].std(), rel=0.08)


@pytest.mark.parametrize("error", [0.1, 0.8, 1.3, 2.0, 5.0])
@pytest.mark.parametrize("known", [0.3, 1.2, 2.0])
def test_score_is_the_slope_of_the_likelihood(error: float, known: float) -> None:
    block, stranger = one_element(error, 0.4, known=known)
    ends = [
        seen(block, stranger, WEIGHTS + step, SHARE, 0.1).likelihood for step in (1e-5, -1e-5)
    ]  # fmt: skip
    slope = (ends[0] - ends[1]) / 2e-5 / known
    assert seen(block, stranger, WEIGHTS, SHARE, 0.1).score.item() == pytest.approx(slope, rel=1e-3, abs=1e-3)


def test_taking_rounding_for_noise_changes_little() -> None:
    block, _ = one_element(1.0, 0.3)
    below, above = (one_element(CONTINUOUS * factor, 0.3)[1] for factor in (0.999, 1.001))
    one, two = (seen(block, stranger, WEIGHTS, SHARE, 0.1) for stranger in (below, above))
    assert one.likelihood == pytest.approx(two.likelihood, abs=0.1)
    assert one.mean.item() == pytest.approx(two.mean.item(), abs=0.1)


def test_an_element_that_nothing_accounts_for_says_nothing() -> None:
    block, stranger = one_element(0.1, 0.0)
    far = replace(block, low=block.low + 50.0, high=block.high + 50.0)
    found = seen(far, stranger, WEIGHTS, SHARE, 0.01)
    assert found.score.item() == 0.0
    assert found.mean.item() == 0.0
    assert found.variance.item() == pytest.approx(0.01)

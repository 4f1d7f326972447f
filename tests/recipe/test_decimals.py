"""Decimals: against exact fractions, and gradients against mergekit's own evaluation of them."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.recipe.worlds import quiet_mergekit
from unmerge.recipe.decimals import DIGITS, digits, gradient, interpolated, ratio_decimals, simplest

tenths = st.integers(1, 10).map(lambda number: number / 10)
hundredths = st.integers(-200, 200).map(lambda number: number / 100)


@pytest.fixture(scope="module", autouse=True)
def _mergekit() -> None:
    with quiet_mergekit():
        import mergekit.config  # noqa: F401 - its first import warns


def rungs(value: Fraction) -> list[Fraction]:
    """The nearest whole multiple of a tenth, of half a tenth, of a hundredth, and so on."""
    steps = [Fraction(1, 10**count * half) for count in range(1, DIGITS + 1) for half in (1, 2)]
    return [round(value / step) * step for step in steps]


@given(st.floats(-2.0, 2.0), st.floats(1e-5, 0.1))
def test_the_simplest_decimal_is_the_first_that_is_near_enough(value: float, tolerance: float) -> None:
    exact, allowed = Fraction(value), Fraction(tolerance)
    assume(all(abs(abs(rung - exact) - allowed) > 1e-9 for rung in rungs(exact)))
    near = [rung for rung in rungs(exact) if abs(rung - exact) <= allowed]
    found = simplest(value, tolerance)
    assert found == pytest.approx(float(near[0]) if near else value, abs=1e-12)
    assert not (found == 0.0 and math.copysign(1.0, found) < 0.0)


@given(hundredths, st.floats(-0.004, 0.004))
def test_what_people_type_is_found_behind_noise(typed: float, noise: float) -> None:
    found = simplest(typed + noise, 0.0041)
    assert abs(found - typed) <= 0.0082
    assert digits(found) <= digits(typed) or found == pytest.approx(typed)


@given(st.integers(-(10**6), 10**6), st.integers(0, 6))
def test_digits_are_those_of_the_decimal(number: int, places: int) -> None:
    typed = Decimal(number).scaleb(-places)
    exponent = typed.normalize().as_tuple().exponent
    assert isinstance(exponent, int)
    assert digits(float(typed)) == min(max(0, -exponent), DIGITS + 1)


@given(st.lists(tenths, min_size=1, max_size=4), st.floats(0.01, 30.0))
def test_weights_in_tenths_are_among_those_with_their_ratios(typed: list[float], factor: float) -> None:
    found = ratio_decimals(np.array(typed) * factor, 1e-4)
    assert any(np.allclose(weights, typed) for weights in found)


@given(st.lists(st.floats(0.05, 1.0), min_size=2, max_size=4), st.floats(1e-4, 0.02))
def test_decimals_keep_their_ratios(ratios: list[float], tolerance: float) -> None:
    wanted = np.array(ratios)
    found = ratio_decimals(wanted, tolerance)
    assert 0 < len(found) <= 12
    assert len({tuple(weights.tolist()) for weights in found}) == len(found)
    for weights in found:
        quotients = weights / wanted
        assert quotients.max() / quotients.min() <= ((1.0 + tolerance) / (1.0 - tolerance)) * (1.0 + 1e-9)


def test_of_equal_weights_one_is_simplest_and_of_a_third_and_two_thirds_a_half() -> None:
    assert ratio_decimals(np.full(3, 0.2187), 1e-3)[0].tolist() == [1.0, 1.0, 1.0]
    assert ratio_decimals(np.array([2.0, 1.0]) / 3.0, 1e-3)[0].tolist() == [1.0, 0.5]


@given(st.lists(hundredths, min_size=1, max_size=5), st.lists(st.floats(0.0, 1.0), min_size=1, max_size=9))
def test_interpolation_is_mergekits(anchors: list[float], depths: list[float]) -> None:
    from mergekit.config import evaluate_setting

    expected = [evaluate_setting("", list(anchors), depth, validate=float) for depth in depths]
    assert interpolated(anchors, np.array(depths)) == pytest.approx(np.array(expected), abs=1e-12)


@given(st.lists(hundredths, min_size=1, max_size=4), st.integers(2, 12), st.randoms(use_true_random=False))
def test_a_gradient_is_found_from_what_mergekit_makes_of_it(anchors: list[float], layers: int, random: object) -> None:
    from mergekit.config import evaluate_setting

    tolerance = 0.012
    depths = np.linspace(0.0, 1.0, layers)
    exact = [evaluate_setting("", list(anchors), depth, validate=float) for depth in depths]
    noise = [random.uniform(-tolerance, tolerance) for _ in depths]  # type: ignore[attr-defined]
    values = np.array(exact) + noise
    order = np.array(random.sample(range(layers), layers))  # type: ignore[attr-defined]
    found = gradient(depths[order], values[order], tolerance)
    again = [evaluate_setting("", list(found), depth, validate=float) for depth in depths]
    assert len(found) <= max(len(anchors), layers)
    assert np.abs(np.array(again) - values).max() <= 2.0 * tolerance + 1e-12


@pytest.mark.parametrize("anchors", [(0.3,), (0.2, 0.8), (0.0, 0.5, 1.0), (0.0, 1.0, 0.0), (1.0, 0.5, 0.7, 0.3)])
def test_no_more_anchors_than_needed(anchors: tuple[float, ...]) -> None:
    depths = np.linspace(0.0, 1.0, 16)
    found = gradient(depths, np.interp(depths, np.linspace(0, 1, len(anchors)), anchors), 0.004)
    assert found == ((0.0, 1.0) if anchors == (0.0, 0.5, 1.0) else anchors)


@given(st.lists(hundredths, min_size=2, max_size=8), st.sets(st.integers(0, 12), min_size=8, max_size=8))
def test_values_that_follow_no_gradient_lie_on_the_one_that_is_given(values: list[float], layers: set[int]) -> None:
    """Layers may be missing: of some nothing can be said."""
    depths = np.array(sorted(layers)[: len(values)]) / 12.0
    found = gradient(depths, np.array(values), 1e-6)
    assert interpolated(found, depths) == pytest.approx(np.array(values), abs=2.1e-6)


def test_a_zigzag_is_given_as_it_is() -> None:
    assert gradient(np.linspace(0, 1, 5), np.array([0.0, 1.0, 0.0, 1.0, 0.0]), 1e-4) == (0.0, 1.0, 0.0, 1.0, 0.0)

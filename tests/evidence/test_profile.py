from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy import stats

from unmerge.evidence import profile
from unmerge.evidence.profile import Shape, describe_profile
from unmerge.statistics import FloatArray

LAYERS = np.arange(28.0)


def anchored(*anchors: float, layers: int = 28) -> FloatArray:
    return np.interp(np.linspace(0.0, len(anchors) - 1.0, layers), np.arange(len(anchors)), anchors)


def present(*where: int, level: float = 0.5, layers: int = 28) -> FloatArray:
    return np.where(np.isin(np.arange(layers), where), level, 0.0)


TRUE = {
    "constant": np.full(28, 0.4),
    "line": anchored(0.1, 0.7),
    "hill": anchored(0.1, 0.7, 0.2),
    "waves": anchored(0.1, 0.7, 0.2, 0.6, 0.3),
    "block": present(*range(8, 16)),
    "front": present(*range(14)),
    "set": present(3, 8, 9, 20),
    "random": np.random.default_rng(0).uniform(0.0, 0.8, 28),
}
KINDS = {"constant": "constant", "line": "gradient", "hill": "gradient", "waves": "gradient", "random": "varies"}


def draws(true: FloatArray, error: float, freedom: float, count: int, seed: int = 0) -> list[Shape]:
    """Describe measurements whose errors differ between layers and are estimated themselves."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        actual = error * np.exp(0.4 * rng.standard_normal(len(true)))
        estimated = actual * (np.sqrt(rng.chisquare(freedom, len(true)) / freedom) if np.isfinite(freedom) else 1.0)
        values = true + actual * rng.standard_normal(len(true))
        found.append(describe_profile(np.arange(float(len(true))), values, estimated, freedom))
    return found


def exact(true: FloatArray, layers: FloatArray = LAYERS) -> Shape:
    return describe_profile(layers, true, np.zeros(len(true)), np.inf)


class TestErrorRates:
    @pytest.mark.parametrize("freedom", [2, 4, 6, 30, np.inf])
    @pytest.mark.parametrize("layers", [4, 28, 60])
    def test_constants_are_called_something_else_once_in_a_thousand(self, layers: int, freedom: float) -> None:
        kinds = Counter(one.kind for one in draws(np.full(layers, 0.4), 0.05, freedom, 1000))
        # A rate of 0.001 gives more than 5 in 1000 draws with a probability of 0.0006.
        assert 1000 - kinds["constant"] - kinds["unclear"] <= 5

    def test_over_many_draws(self) -> None:
        found = draws(np.full(28, 0.4), 0.1, 30, 5000, seed=1)
        # More than 12 of 5000 have a probability of 0.002; a rate far below would cost power.
        assert 1 <= sum(one.kind not in ("constant", "unclear") for one in found) <= 12

    def test_lines_are_called_lines(self) -> None:
        found = draws(TRUE["line"], 0.05, 6, 1000)
        # Given up at the level 0.001 for more anchors or none at all.
        assert sum(len(one.anchors) != 2 for one in found) <= 5

    @pytest.mark.parametrize("freedom", [2, 6, np.inf])
    @pytest.mark.parametrize("layers", [4, 28])
    @pytest.mark.parametrize("error", [0.05, 0.12, 0.2])
    def test_departures_of_half_the_mean_rarely_pass_for_a_constant(
        self, layers: int, freedom: float, error: float
    ) -> None:
        true = np.where(np.arange(layers) % 2, 0.2, 0.6)
        found = draws(true, error, freedom, 200)
        # A rate of 0.1 with three standard deviations.
        assert sum(one.kind == "constant" for one in found) <= 200 * 0.1 + 13

    @pytest.mark.parametrize("freedom", [1, 2, 6, 50, 1e6])
    def test_deviates_are_as_probable_as_their_t_statistics(self, freedom: float) -> None:
        t = np.linspace(0.5, 8.0, 12)
        one = profile._Profile(t, t, np.ones(12), np.full(12, freedom))
        wanted = stats.norm.isf(stats.t.sf(t, freedom))
        assert np.sqrt(one.normalised(t**2)) == pytest.approx(wanted, rel=0.06 if freedom == 1 else 0.025)


class TestPower:
    @pytest.mark.parametrize("error", [0.002, 0.02, 0.05])
    @pytest.mark.parametrize("name", TRUE)
    def test_finds_the_shape(self, name: str, error: float) -> None:
        found = draws(TRUE[name], error, 6, 100)
        assert sum(one.kind == KINDS.get(name, "some layers") for one in found) >= 97

    @pytest.mark.parametrize("anchors", [(0.1, 0.7), (0.1, 0.7, 0.2), (0.1, 0.7, 0.2, 0.6, 0.3)])
    def test_finds_the_anchors(self, anchors: tuple[float, ...]) -> None:
        found = [one for one in draws(anchored(*anchors), 0.02, 6, 100) if len(one.anchors) == len(anchors)]
        assert len(found) >= 97
        assert np.mean([one.anchors for one in found], axis=0) == pytest.approx(anchors, abs=0.01)
        assert all((one.low, one.high) == (one.anchors[0], one.anchors[-1]) for one in found)

    @pytest.mark.parametrize("name", ["block", "front", "set"])
    def test_finds_the_layers(self, name: str) -> None:
        found = draws(TRUE[name], 0.02, 6, 100)
        wanted = tuple(np.flatnonzero(TRUE[name]).tolist())
        assert sum(one.layers == wanted for one in found) >= 97
        assert np.mean([one.low for one in found]) == pytest.approx(0.5, abs=0.01)

    def test_a_slerp_along_a_gradient_is_a_gradient(self) -> None:
        angle, t = 1.2, np.linspace(0.0, 1.0, 28)
        found = draws(np.sin((1.0 - t) * angle) / np.sin(angle), 0.02, 6, 100)
        assert sum(one.kind == "gradient" for one in found) >= 97


class TestShape:
    @pytest.mark.parametrize("name", TRUE)
    def test_of_exact_coefficients(self, name: str) -> None:
        found = exact(TRUE[name])
        assert found.kind == KINDS.get(name, "some layers")
        if found.kind == "gradient":
            assert found.low == pytest.approx(TRUE[name][0], abs=0.02)
            assert found.high == pytest.approx(TRUE[name][-1], abs=0.02)
        elif found.kind == "some layers":
            assert found.layers == tuple(np.flatnonzero(TRUE[name]).tolist())
            assert found.low == found.high == pytest.approx(0.5)
        else:
            assert (found.low, found.high) == pytest.approx((TRUE[name].min(), TRUE[name].max()))

    @pytest.mark.parametrize("name", TRUE)
    def test_does_not_depend_on_sign_or_on_the_order_of_the_layers(self, name: str) -> None:
        rng = np.random.default_rng(1)
        values = TRUE[name] + 0.02 * rng.standard_normal(28)
        errors, order = np.full(28, 0.02), rng.permutation(28)
        found = describe_profile(LAYERS, values, errors, 6)
        shuffled = describe_profile(LAYERS[order], values[order], errors[order], 6)
        assert shuffled == found
        negative = describe_profile(LAYERS, -values, errors, 6)
        assert (negative.kind, negative.layers) == (found.kind, found.layers)
        assert sorted([negative.low, negative.high]) == pytest.approx(sorted([-found.low, -found.high]))

    @pytest.mark.parametrize("name", ["constant", "line", "block"])
    def test_measurements_of_no_use_change_nothing(self, name: str) -> None:
        layers = np.concatenate([LAYERS, [50.0, 51.0, 52.0]])
        values = np.concatenate([TRUE[name], [9.0, np.nan, 9.0]])
        errors = np.concatenate([np.full(28, 0.01), [np.inf, 0.01, 0.01]])
        freedom = np.concatenate([np.full(30, 6.0), [0.0]])
        wanted = describe_profile(LAYERS, TRUE[name], errors[:28], 6)
        assert describe_profile(layers, values, errors, freedom) == wanted

    @pytest.mark.parametrize(("size", "kind"), [(0.01, "constant"), (0.1, "varies")])
    def test_exact_departures_count_only_if_they_matter(self, size: float, kind: str) -> None:
        values = 0.4 * (1.0 + size * np.random.default_rng(0).standard_normal(28))
        assert exact(values).kind == kind

    def test_an_absent_component_is_a_constant_of_zero(self) -> None:
        found = describe_profile(LAYERS, 0.001 * np.random.default_rng(0).standard_normal(28), np.full(28, 0.001), 6)
        assert found.kind == "constant"
        assert found.low == pytest.approx(0.0, abs=0.001)

    def test_coefficients_of_zero_without_error(self) -> None:
        assert exact(np.zeros(28)) == Shape("constant", 0.0, 0.0)

    def test_layer_numbers_are_kept(self) -> None:
        assert exact(present(2, 3, layers=8), np.arange(10.0, 18.0)).layers == (12, 13)


class TestUnclear:
    @pytest.mark.parametrize("layers", [0, 1, 2])
    def test_too_few_layers(self, layers: int) -> None:
        found = exact(np.full(layers, 0.4), LAYERS[:layers])
        assert found.kind == "unclear"
        assert np.isnan(found.low) == (layers == 0)

    def test_errors_too_large(self) -> None:
        assert {one.kind for one in draws(np.full(28, 0.4), 0.5, 6, 50)} == {"unclear"}

    def test_three_layers_are_enough_for_a_constant(self) -> None:
        assert exact(np.full(3, 0.4), LAYERS[:3]).words == "constant 0.40"
        assert exact(np.array([0.1, 0.4, 0.7]), LAYERS[:3]).kind == "varies"

    def test_bad_arguments(self) -> None:
        with pytest.raises(ValueError, match=r"shapes \(3,\), \(2,\), \(3,\)"):
            describe_profile(np.arange(3.0), np.zeros(2), np.zeros(3), 6)
        with pytest.raises(ValueError, match=r"errors holds -1\.0"):
            describe_profile(np.arange(3.0), np.zeros(3), -np.ones(3), 6)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (Shape("constant", 0.4, 0.4), "constant 0.40"),
        (Shape("constant", -0.001, -0.001), "constant 0.00"),
        (Shape("gradient", 0.1, 0.7, anchors=(0.1, 0.7)), "gradient from 0.10 to 0.70"),
        (Shape("gradient", 0.1, 0.3, anchors=(0.1, 0.7, 0.3)), "gradient from 0.10 through 0.70 to 0.30"),
        (Shape("some layers", 0.5, 0.5, layers=tuple(range(8, 16))), "only layers 8 to 15, at 0.50"),
        (Shape("some layers", 0.5, 0.5, layers=(3,)), "only layer 3, at 0.50"),
        (Shape("some layers", 0.5, 0.5, layers=(3, 8, 9, 20)), "only layers 3, 8 to 9 and 20, at 0.50"),
        (Shape("varies", 0.0, 1.0), "varies between layers"),
        (Shape("unclear", 0.0, 1.0), "unclear between layers"),
    ],
)
def test_words(shape: Shape, words: str) -> None:
    assert shape.words == words

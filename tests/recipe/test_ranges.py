"""Ranges of numbers: both ends make the same bits as the real mergekit's merge, and numbers far beyond do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.recipe.test_trial import drawn_by, trial_of
from tests.recipe.tunes import MERGES, Tunes
from unmerge.errors import RecipeError
from unmerge.merging.draws import TorchDraws
from unmerge.merging.method import Draws
from unmerge.recipe.document import ModelInput, Recipe
from unmerge.recipe.proof import Range
from unmerge.recipe.ranges import ranges_of
from unmerge.recipe.trial import Trial, with_setting

NAMES = ["ties", "task_arithmetic in float32", "linear", "dare_ties", "ties with lambda", "slerp"]
BEYOND = 4.0
"""How many widths of a range a number is away from it that makes other bits."""


def found_in(tunes: Tunes, name: str, draws: Callable[[int], Draws] | None = None) -> tuple[Trial, tuple[Range, ...]]:
    trial, truth = trial_of(tunes, name), tunes.truth(name)
    names = {reference: reference.path.rpartition("/")[2] for reference in truth.references}
    return trial, ranges_of(trial, truth, names, draws or drawn_by(MERGES[name].seed))


def place_of(recipe: Recipe, item: Range) -> int:
    paths = [one.model.path.rpartition("/")[2] for one in recipe.models]
    return -1 if item.model is None else paths.index(item.model)


def every_bit(trial: Trial, recipe: Recipe, draws: Callable[[int], Draws] | None) -> bool:
    tried = trial.attempt(recipe, draws)
    return (tried.share, tried.exact) == (1.0, 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_ends_make_the_same_bits_and_numbers_beyond_do_not(tunes: Tunes, name: str) -> None:
    trial, ranges = found_in(tunes, name)
    truth, draws = tunes.truth(name), drawn_by(MERGES[name].seed)
    shared = [key for key in truth.parameters if key in {"lambda", "t"}]
    told = [(item.model, item.parameter) for item in ranges]
    assert sorted(key for model, key in told if model is None) == shared
    assert len(told) == len(set(told)) == len(shared) + sum(len(item.parameters) for item in truth.models)
    for item in ranges:
        place = place_of(truth, item)
        settings = truth.parameters if place < 0 else truth.models[place].parameters
        assert item.value == settings[item.parameter]
        assert item.low is not None
        assert item.high is not None
        assert item.low <= item.value <= item.high
        for end in (item.low, item.high):
            assert every_bit(trial, with_setting(truth, place, item.parameter, end), draws)
        width = max(item.high - item.low, 1e-6 * item.value)
        for beyond in (item.low - BEYOND * width, item.high + BEYOND * width):
            assert not every_bit(trial, with_setting(truth, place, item.parameter, beyond), draws)


def test_a_weight_of_bfloat16_has_about_its_cell(tunes: Tunes) -> None:
    """A change of the weight that changes its rounding changes many values; one that does not changes none."""
    _, ranges = found_in(tunes, "ties, not normalized")
    weights = [item for item in ranges if item.parameter == "weight"]
    assert len(weights) == 3
    for item in weights:
        assert item.low is not None
        assert item.high is not None
        cell = 2.0**-9 if item.value >= 0.5 else 2.0**-10  # of the spacing, a half to either side
        assert 0.8 * cell < item.high - item.low <= 1.001 * 2 * cell


def test_float32_tells_weights_more_exactly(tunes: Tunes) -> None:
    exact, rough = (
        {(item.model, item.parameter): item for item in found_in(tunes, name)[1]}
        for name in ("task_arithmetic in float32", "ties, not normalized")
    )
    for key in [("math", "weight"), ("code", "weight"), ("chat", "weight")]:
        widths = [(of[key].high or 0.0) - (of[key].low or 0.0) for of in (exact, rough)]
        assert 0.0 <= widths[0] < widths[1] / 20


def test_gradients_have_no_range(tunes: Tunes) -> None:
    _, ranges = found_in(tunes, "task_arithmetic")
    assert [(item.model, item.parameter) for item in ranges] == [("code", "weight")]


def test_what_has_no_effect_has_no_end(tunes: Tunes) -> None:
    """A density of task arithmetic; a density from 1 on."""
    trial, truth = trial_of(tunes, "task_arithmetic in float32"), tunes.truth("task_arithmetic in float32")
    names = {reference: reference.path for reference in truth.references}
    models = tuple(ModelInput(item.model, {**item.parameters, "density": 0.5}) for item in truth.models)
    ranges = ranges_of(trial, replace(truth, models=models), names)
    assert {(item.low, item.high) for item in ranges if item.parameter == "density"} == {(None, None)}
    assert all(item.low is not None and item.high is not None for item in ranges if item.parameter == "weight")


def test_random_numbers_are_drawn_once(tunes: Tunes) -> None:
    asked: list[int] = []

    def counted(drawn: int) -> Draws:
        asked.append(drawn)
        draws = TorchDraws(MERGES["dare_linear"].seed or 0)
        draws.skip(drawn)
        return draws

    trial, ranges = found_in(tunes, "dare_linear", counted)
    assert len(ranges) == 4
    assert len(asked) == len(trial.names)


def test_a_number_that_is_not_possible_is_no_end(tunes: Tunes) -> None:
    """Probabilities of DELLA must stay between 0 and 1, and a model of density 1 draws no masks."""
    trial, truth = trial_of(tunes, "della"), tunes.truth("della")
    with pytest.raises(RecipeError, match="between 0 and 1"):
        trial.attempt(with_setting(truth, 0, "density", 0.95), drawn_by(11))
    for item in found_in(tunes, "della")[1]:
        assert item.high is not None
        assert item.high < 1.0

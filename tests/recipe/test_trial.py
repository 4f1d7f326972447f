"""Recipes tried: on tensors that the real mergekit merged, by recipes that are right, wrong, or nearly right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.recipe.tunes import DRAFTS, KNOWN, MERGES, Tunes
from unmerge.merging.draws import TorchDraws
from unmerge.merging.method import Draws
from unmerge.recipe.document import Recipe
from unmerge.recipe.trial import FAIR, Trial, polish, simplify

TENSORS = ("layers.0.self_attn.q_proj.weight", "layers.2.self_attn.v_proj.weight", "layers.1.mlp.up_proj.weight")


def drawn_by(seed: int | None) -> Callable[[int], Draws] | None:
    def after(count: int) -> Draws:
        draws = TorchDraws(seed or 0)
        draws.skip(count)
        return draws

    return None if seed is None else after


def trial_of(tunes: Tunes, name: str, *tensors: str) -> Trial:
    return tunes.trial(name, tunes.members(*(DRAFTS if name == "model_stock" else KNOWN)), *(tensors or TENSORS))


def with_weights(recipe: Recipe, *weights: Any) -> Recipe:
    models = [
        replace(item, parameters={**item.parameters, "weight": weight})
        for item, weight in zip(recipe.models, weights, strict=True)
    ]
    return replace(recipe, models=tuple(models))


@pytest.mark.parametrize("name", MERGES)
def test_the_right_recipe_makes_every_value(tunes: Tunes, name: str) -> None:
    """Of random masks only if the draws before each tensor are counted as mergekit draws them."""
    tried = trial_of(tunes, name).attempt(tunes.truth(name), drawn_by(MERGES[name].seed))
    assert tried.share == 1.0
    assert tried.exact == 1.0


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della"])
def test_another_seed_makes_few_values(tunes: Tunes, name: str) -> None:
    truth, seed = tunes.truth(name), MERGES[name].seed
    assert seed is not None
    assert trial_of(tunes, name).attempt(truth, drawn_by(seed + 1)).share < 0.8
    other = replace(truth, models=truth.models[::-1])
    assert trial_of(tunes, name).attempt(other, drawn_by(seed)).share < 0.8


def test_tensors_are_made_each_on_its_own(tunes: Tunes) -> None:
    trial = trial_of(tunes, "dare_ties")
    truth = tunes.truth("dare_ties")
    for name in trial.names:
        assert trial.of([name]).attempt(truth, drawn_by(MERGES["dare_ties"].seed)).share == 1.0


def test_a_wrong_weight_costs_values(tunes: Tunes) -> None:
    trial, truth = trial_of(tunes, "linear"), tunes.truth("linear")
    shares = [trial.attempt(with_weights(truth, weight, 0.3, 0.2)).share for weight in (0.5, 0.51, 0.55, 0.7)]
    assert shares == sorted(shares, reverse=True)
    assert len(set(shares)) == 4


def test_the_best_comes_first_and_what_is_written_alike_is_tried_once(tunes: Tunes) -> None:
    trial, truth = trial_of(tunes, "linear"), tunes.truth("linear")
    wrong = [with_weights(truth, 0.3 + 0.02 * number, 0.3, 0.2) for number in range(20)]
    tried = trial.best([*wrong, truth, *wrong])
    assert tried[0].recipe == truth or tried[0].recipe == wrong[10]
    assert [one.share for one in tried] == sorted((one.share for one in tried), reverse=True)
    assert len({repr(one.recipe) for one in tried}) == len(tried)
    assert len(trial.best([truth, truth])) == 1


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("task_arithmetic in float32", (0.69, 0.41, 0.26)),
        ("task_arithmetic", ((0.2, 0.79), 0.61)),
        ("ties, not normalized", (0.5, 0.41, 0.31)),
    ],
)
def test_polishing_finds_numbers_that_were_nearly_right(tunes: Tunes, name: str, start: tuple[Any, ...]) -> None:
    trial, truth = trial_of(tunes, name), tunes.truth(name)
    before = trial.attempt(with_weights(truth, *start))
    found = polish(trial, before)
    assert before.share < FAIR <= found.share
    assert found.recipe == truth


def test_polishing_does_not_touch_what_is_right(tunes: Tunes) -> None:
    trial, truth = trial_of(tunes, "ties"), tunes.truth("ties")
    assert polish(trial, trial.attempt(truth)).recipe == truth


def test_polishing_passes_over_numbers_that_are_not_possible(tunes: Tunes) -> None:
    """A probability of DELLA may not leave 0 to 1."""
    trial, truth = trial_of(tunes, "della", TENSORS[0]), tunes.truth("della")
    models = tuple(replace(item, parameters={**item.parameters, "epsilon": 0.49}) for item in truth.models)
    before = trial.attempt(replace(truth, models=models), drawn_by(11))
    assert polish(trial, before, drawn_by(11)).share >= before.share


@pytest.mark.parametrize(
    ("written", "simpler"),
    [
        (((0.2, 0.8), (0.6, 0.6, 0.6)), ((0.2, 0.8), 0.6)),
        (((0.2, 0.5, 0.8), 0.6004), ((0.2, 0.8), 0.6)),
    ],
)
def test_what_can_be_written_shorter_is(tunes: Tunes, written: tuple[Any, ...], simpler: tuple[Any, ...]) -> None:
    trial, truth = trial_of(tunes, "task_arithmetic"), tunes.truth("task_arithmetic")
    before = trial.attempt(with_weights(truth, *written))
    found = simplify(trial, before)
    assert found.share >= before.share
    assert found.recipe == with_weights(truth, *simpler)


def test_simplifying_costs_no_value(tunes: Tunes) -> None:
    trial, truth = trial_of(tunes, "linear"), tunes.truth("linear")
    odd = trial.attempt(with_weights(truth, 0.5371, 0.3117, 0.2))
    assert simplify(trial, odd).share >= odd.share

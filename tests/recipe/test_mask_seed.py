"""Seeds of random masks: found from the real mergekit's merges, with the order in which it drew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.recipe.tunes import KNOWN, MERGES, Tunes
from unmerge.recipe.mask_seed import find_seed
from unmerge.recipe.masks import MASKINGS, Masking
from unmerge.recipe.trial import Trial

LINEAR, TIES, MEAN = MASKINGS
RANDOM: dict[str, Masking] = {"dare_linear": LINEAR, "dare_ties": TIES, "della": MEAN}
Q_PROJ = ("layers.1.self_attn.q_proj.weight",)
"""Others are drawn for before it."""


def trial_of(tunes: Tunes, name: str, *tensors: str) -> Trial:
    return tunes.trial(name, tunes.members(*KNOWN), *(tensors or Q_PROJ))


@pytest.mark.parametrize("name", RANDOM)
def test_the_seed_and_the_order_are_found_from_any_order(tunes: Tunes, name: str) -> None:
    truth, seed = tunes.truth(name), MERGES[name].seed
    assert seed is not None
    trial = trial_of(tunes, name)
    for models in (truth.models, truth.models[::-1]):
        found = find_seed(trial, replace(truth, models=models), RANDOM[name], first=max(0, seed - 500), count=1000)
        assert found is not None
        assert found.seed == seed
        assert found.recipe == truth
        assert found.expected_by_chance < 1e-9
        assert 0 < found.tested <= 1000


def test_a_seed_outside_of_those_that_are_tested_is_not_found(tunes: Tunes) -> None:
    truth = tunes.truth("dare_linear")
    assert find_seed(trial_of(tunes, "dare_linear"), truth, LINEAR, first=43, count=2000) is None


def test_a_density_that_is_slightly_off_does_not_matter(tunes: Tunes) -> None:
    truth = tunes.truth("dare_linear")
    models = tuple(replace(item, parameters={**item.parameters, "density": 0.52}) for item in truth.models)
    found = find_seed(trial_of(tunes, "dare_linear"), replace(truth, models=models), LINEAR, count=1000)
    assert found is not None
    assert found.seed == MERGES["dare_linear"].seed
    assert found.recipe.models == models


def test_models_that_are_not_in_the_merge_have_no_seed(tunes: Tunes) -> None:
    truth = tunes.truth("dare_linear")
    strangers = tuple(
        replace(item, model=tunes.reference(name)) for item, name in zip(truth.models, ("chat", "law"), strict=True)
    )
    found = find_seed(trial_of(tunes, "dare_linear"), replace(truth, models=strangers), LINEAR, count=1000)
    assert found is None


def test_tensors_that_say_too_little_are_passed_over(tunes: Tunes) -> None:
    """Of a tensor that no model changes nothing can be read; the next one tells."""
    truth = tunes.truth("dare_ties")
    untouched = trial_of(tunes, "dare_ties", "layers.0.mlp.up_proj.weight")
    assert find_seed(untouched, truth, TIES, first=4000, count=500) is None
    both = trial_of(tunes, "dare_ties", "layers.0.mlp.up_proj.weight", *Q_PROJ)
    found = find_seed(both, truth, TIES, first=4000, count=500)
    assert found is not None
    assert found.seed == 4242


def test_a_search_keeps_its_state_for_each_place(tunes: Tunes, tmp_path: Path) -> None:
    truth, state = tunes.truth("dare_linear"), tmp_path / "search"
    done: list[tuple[int, int]] = []
    trial = trial_of(tunes, "dare_linear")
    first = find_seed(trial, truth, LINEAR, count=500, state=state, progress=lambda *told: done.append(told))
    assert first is not None
    assert done[-1] == (500, 500)
    assert {file.name for file in tmp_path.iterdir()} <= {"search.0.0.02", "search.1.0.02"}
    assert (tmp_path / "search.0.0.02").exists()
    again = find_seed(trial, truth, LINEAR, count=500, state=state)
    assert again is not None
    assert (again.seed, again.recipe) == (first.seed, first.recipe)


def test_masks_that_keep_nearly_all_tell_no_seeds_apart(tunes: Tunes) -> None:
    """Where nothing was dropped, most seeds would do at a high density: none is searched."""
    truth = tunes.truth("task_arithmetic in float32")
    models = tuple(replace(item, parameters={**item.parameters, "density": 0.97}) for item in truth.models)
    claimed = replace(truth, merge_method="dare_linear", models=models)
    assert find_seed(trial_of(tunes, "task_arithmetic in float32"), claimed, LINEAR, count=5000) is None

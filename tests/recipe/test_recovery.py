"""Recovery, end to end: what the real mergekit merged is given back as a recipe by which mergekit makes it again."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.recipe.passthrough import bits, random_model, write_model
from tests.recipe.passthrough import merge as run_mergekit
from tests.recipe.tunes import MERGES, SEEDS, Tunes
from tests.recipe.worlds import models
from unmerge.attribution import explain, open_target
from unmerge.checkpoint.reader import open_checkpoint
from unmerge.dictionary import open_base
from unmerge.errors import RecipeError
from unmerge.recipe.document import Recipe, parse_recipe
from unmerge.recipe.recovery import Search, recover
from unmerge.shortlist import Shelf
from unmerge.solvers import SOLVERS

NORMALIZED = {"linear", "linear in float32", "ties", "ties with lambda", "della"}
"""Merges in which only the ratios of weights matter."""
RANDOM = {name for name, made in MERGES.items() if made.seed is not None}
every_merge = pytest.mark.parametrize("name", MERGES)
number = count()


def by_mergekit(tunes: Tunes, text: str, seed: int | None) -> dict[str, Any]:
    return bits(open_checkpoint(tunes.merge(f"again {next(number)}", yaml.safe_load(text), seed=seed)))


def settings(recipe: Recipe, *, ratios: bool) -> dict[str, dict[str, Any]]:
    """Parameters by model; weights over the largest where only their ratios matter."""
    found = {str(item.model): dict(item.parameters) for item in recipe.models}
    if ratios:
        largest = max(own["weight"] for own in found.values())
        found = {model: {**own, "weight": own["weight"] / largest} for model, own in found.items()}
    return found


@every_merge
def test_mergekit_makes_the_same_bits_by_what_was_recovered(tunes: Tunes, name: str) -> None:
    found = tunes.recovered(name)
    assert (found.status, found.exit_code) == ("proven", 0)
    assert found.recipe is not None
    assert by_mergekit(tunes, found.recipe, found.seed) == bits(open_checkpoint(tunes.merged(name)))
    assert found.proof is not None
    assert (found.proof.kind, found.proof.wrong, found.proof.share) == ("bits", 0, 1.0)
    assert found.proof.tensors == len(tunes.base)


@every_merge
def test_the_recipe_is_the_one_that_was_used(tunes: Tunes, name: str) -> None:
    found, truth = tunes.recovered(name), tunes.truth(name)
    assert found.recipe is not None
    recipe = parse_recipe(found.recipe)
    assert (found.method, recipe.merge_method, recipe.base_model) == (
        truth.merge_method, truth.merge_method, truth.base_model,
    )  # fmt: skip
    if found.method != "linear":  # which is computed in float32 in any type
        assert (recipe.dtype, recipe.out_dtype) == (truth.dtype, truth.out_dtype)
    assert recipe.parameters == truth.parameters
    ratios = name in NORMALIZED
    expected = settings(truth, ratios=ratios)
    assert settings(recipe, ratios=ratios) == {
        model: pytest.approx(own) if ratios else own for model, own in expected.items()
    }
    assert {member.reference for member in found.members} == {str(item.model) for item in truth.models}


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_seeds_are_found_and_models_are_in_the_order_of_the_draws(tunes: Tunes, name: str) -> None:
    found = tunes.recovered(name)
    assert found.seed == MERGES[name].seed
    assert [item.model for item in parse_recipe(found.recipe or "").models] == [
        item.model for item in tunes.truth(name).models
    ]
    assert f"--random-seed {found.seed}" in found.to_file()


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_masks_explain_the_target_and_do_not_explain_it_with_decoys(tunes: Tunes, name: str) -> None:
    decoded = tunes.recovered(name).decoded
    assert decoded is not None
    assert decoded.error < 0.001 < 0.1 < decoded.decoy_error


@pytest.mark.parametrize("name", sorted(set(MERGES) - RANDOM))
def test_what_is_not_random_has_no_seed(tunes: Tunes, name: str) -> None:
    found = tunes.recovered(name)
    assert (found.seed, found.decoded) == (None, None)
    assert "seed" not in found.to_file()


def test_without_a_search_masks_are_decoded_only(tunes: Tunes) -> None:
    target = str(tunes.merged("dare_ties"))
    found = recover(target, tunes.known, base=tunes.path("base"), search=Search(0))
    assert (found.status, found.method, found.seed, found.exit_code) == ("decoded", "dare_ties", None, 0)
    assert found.proof is not None
    assert (found.proof.kind, found.proof.unlikely) == ("masks", ())
    assert found.proof.share > 0.99
    assert found.recipe is not None
    truth = settings(tunes.truth("dare_ties"), ratios=False)
    for model, own in settings(parse_recipe(found.recipe), ratios=False).items():
        assert own == pytest.approx(truth[model], abs=0.02)


def test_an_unknown_member_leaves_the_recipe_partial(tunes: Tunes) -> None:
    document = {
        "merge_method": "linear",
        "models": [
            {"model": name, "parameters": {"weight": weight}}
            for name, weight in (("math", 0.4), ("law", 0.3), ("code", 0.3))
        ],
        "dtype": "bfloat16",
    }
    target = tunes.merge("of a stranger", document)
    known = [tunes.path(name) for name in ("chat", "code", "math")]
    found = recover(str(target), known, base=tunes.path("base"))
    assert (found.status, found.exit_code) == ("partial", 1)
    assert {member.name for member in found.members} == {"code", "math"}
    assert found.unexplained is not None
    assert 0.1 < found.unexplained < 0.5
    assert found.proof is not None
    assert found.proof.share < 0.99
    assert found.recipe is not None
    # What is known of it stands in a recipe, and its weights are near those that were used.
    said = settings(parse_recipe(found.recipe), ratios=False)
    assert {path.rpartition("/")[2]: own["weight"] for path, own in said.items()} == pytest.approx(
        {"math": 0.4, "code": 0.3}, abs=0.05
    )
    assert "not listed" in found.to_file()


def test_of_strangers_nothing_is_known(tunes: Tunes) -> None:
    document = {"merge_method": "linear", "models": models("law", "chat", weight=0.5), "dtype": "bfloat16"}
    target = tunes.merge("of strangers", document)
    found = recover(str(target), [tunes.path("code"), tunes.path("math")], base=tunes.path("base"))
    assert (found.status, found.exit_code, found.method, found.members) == ("nothing known", 1, None, ())
    assert (found.recipe, found.proof, found.to_file()) == (None, None, "")


def test_a_stack_of_layers_is_recovered(tmp_path: Path) -> None:
    model, noise = random_model(0, 4), random_model(1, 4)
    tune = {name: value + 0.05 * noise[name] for name, value in model.items()}
    paths = {name: str(write_model(tmp_path / name, one)) for name, one in (("a", model), ("b", tune))}
    parts = [("a", 0, 3), ("b", 1, 4)]
    document = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": paths[name], "layer_range": [i, j]}]} for name, i, j in parts],
        "dtype": "bfloat16",
    }
    target = run_mergekit(document, tmp_path / "stack")
    found = recover(str(tmp_path / "stack"), [paths["b"]], base=paths["a"])
    assert (found.status, found.method, found.exit_code) == ("proven", "passthrough", 0)
    assert found.recipe is not None
    assert bits(run_mergekit(yaml.safe_load(found.recipe), tmp_path / "again")) == bits(target)


@pytest.mark.parametrize("parts", [[("b", 2, 4), ("a", 0, 2)], [("b", 0, 4)]])
def test_copies_at_the_same_depth_are_told_as_copies(tmp_path: Path, parts: list[tuple[str, int, int]]) -> None:
    """Layers in another order are not like the base, and a copy of one model is no mean of models."""
    model, noise = random_model(0, 4), random_model(1, 4)
    tunes = {
        name: {key: value + size * noise[key] for key, value in model.items()}
        for name, size in (("a", 0.05), ("b", 0.08))
    }
    paths = {name: str(write_model(tmp_path / name, one)) for name, one in (("base", model), *tunes.items())}
    document = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": paths[name], "layer_range": [i, j]}]} for name, i, j in parts],
        "dtype": "bfloat16",
    }
    target = run_mergekit(document, tmp_path / "target")
    found = recover(str(tmp_path / "target"), [paths["a"], paths["b"]], base=paths["base"])
    assert (found.status, found.method, found.exit_code) == ("proven", "passthrough", 0)
    assert {member.name for member in found.members} == {name for name, *_ in parts}
    recipe = parse_recipe(found.recipe or "")
    assert (len(recipe.slices), len(recipe.models)) == ((2, 0) if len(parts) == 2 else (0, 1))
    assert bits(run_mergekit(yaml.safe_load(found.recipe or ""), tmp_path / "again")) == bits(target)


def test_who_is_present_does_not_hang_on_exact_weights(tunes: Tunes) -> None:
    base = open_base(tunes.path("base"))
    known = Shelf.of(tunes.known, base).open_all()
    dictionary, extra = known.dictionary, known.extra
    target = open_target(str(tunes.merged("linear")), base)
    exact, rough = (
        explain(target, dictionary, extra, base, SOLVERS["nnls"](signed=False), refined=refined)[0]
        for refined in (True, False)
    )
    assert {one.name: one.present for one in exact.components} == {one.name: one.present for one in rough.components}
    found = {one.name: one.weight for one in rough.components if one.present}
    assert found == pytest.approx({"math": 0.5, "code": 0.3, "chat": 0.2}, abs=0.05)
    assert rough.unexplained.share == pytest.approx(exact.unexplained.share, abs=0.01)


def test_the_same_inputs_give_the_same_bytes_in_any_order(tunes: Tunes) -> None:
    target, base = str(tunes.merged("task_arithmetic")), tunes.path("base")
    first = tunes.recovered("task_arithmetic")
    again = recover(target, tunes.known, base=base, search=Search(SEEDS))
    assert again.to_json() == first.to_json()
    other = recover(target, tunes.known[::-1], base=base, search=Search(SEEDS))
    assert other.recipe is not None
    assert first.recipe is not None
    one, two = parse_recipe(other.recipe), parse_recipe(first.recipe)
    assert settings(one, ratios=False) == settings(two, ratios=False)
    assert (one.merge_method, one.parameters, one.dtype) == (two.merge_method, two.parameters, two.dtype)


def test_changes_far_below_the_grid_are_refused(tunes: Tunes) -> None:
    """A member whose changes are too small against the grid everywhere cannot be looked at."""
    large = {name: value + 1.0 for name, value in tunes.base.items()}
    tunes.write("large", large)
    step = {name: value + 2.0**-7 * (value > 1.0) for name, value in large.items()}
    tunes.write("stepped", step)
    # Not a copy of the member, which would be told as one: its first rows are the base's.
    merged = {name: np.concatenate([large[name][:1], value[1:]]) for name, value in step.items()}
    tunes.write("stepped but for a row", merged)
    with pytest.raises(RecipeError, match="no element differs enough"):
        recover(tunes.path("stepped but for a row"), [tunes.path("stepped")], base=tunes.path("large"))

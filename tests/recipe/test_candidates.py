"""Candidates: mergekit accepts every one of them, and the recipe that was used is among them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import yaml

from tests.recipe.tunes import Tunes
from tests.recipe.worlds import quiet_mergekit
from unmerge.checkpoint.reader import open_checkpoint
from unmerge.recipe.candidates import (
    LAMBDAS,
    MAX_ORDERS,
    Members,
    arc_candidates,
    dense_candidates,
    masked_candidates,
    parameterless_candidates,
    reordered,
    trimmed_candidates,
    with_lambdas,
)
from unmerge.recipe.depth import Level, Part, Parts, part_of
from unmerge.recipe.document import Conditional, ModelInput, ModelReference, Recipe, Setting, to_yaml
from unmerge.recipe.masks import MASKINGS
from unmerge.recipe.recovery import draw_changes
from unmerge.recipe.structures import STRUCTURES, Parameters

BASE = ModelReference("base")
MEMBERS = Members(BASE, (ModelReference("a"), ModelReference("b")))
DEPTH = 4
STRUCTURE = {structure.name: structure for structure in STRUCTURES}
MASKING = {masking.name: masking for masking in MASKINGS}


@pytest.fixture(scope="module", autouse=True)
def _mergekit() -> None:
    with quiet_mergekit():
        import mergekit.config  # noqa: F401 - its first import warns


def whole(weights: list[float], densities: tuple[float, ...] = (), gammas: tuple[float, ...] = (), scale: float = 1.0):
    """Parameters of a whole model, with errors as a search leaves them."""
    count = len(weights)
    own = Parameters(
        np.array(weights) * 1.001,
        np.array(densities or (1.0,) * count) + 0.002,
        np.array(gammas or (0.0,) * count) + 0.0005,
        scale * 0.999,
    )
    return Parts("whole", {Part(): own}, 0.0, DEPTH)


def by_layer(level: Level, weights: Any) -> Parts:
    """Weights that change with depth, or from module to module: a function of (layer, module)."""
    names = [f"model.layers.{n}.{m}.weight" for n in range(DEPTH) for m in ("self_attn.q_proj", "mlp.up_proj")]
    parts = {part_of(name, level): name for name in names}
    found = {
        part: Parameters(np.array(weights(max(part.layer, 0) / (DEPTH - 1), name)), np.ones(2), np.zeros(2))
        for part, name in parts.items()
    }
    return Parts(level, found, 0.0, DEPTH)


def inputs(*settings: dict[str, Setting]) -> tuple[ModelInput, ...]:
    return MEMBERS.inputs(*settings)


def accepted(recipes: Iterable[Recipe]) -> list[Recipe]:
    """Check that mergekit reads them."""
    from mergekit.config import MergeConfiguration

    found = list(recipes)
    for recipe in found:
        document = MergeConfiguration.model_validate(yaml.safe_load(to_yaml(recipe)))
        assert document.merge_method == recipe.merge_method
    return found


def test_plain_weights_are_written_as_sums_and_means() -> None:
    found = accepted(dense_candidates(whole([0.6, 0.4]), MEMBERS))
    pair = inputs({"weight": 0.6}, {"weight": 0.4})
    assert Recipe("task_arithmetic", BASE, pair) in found
    assert Recipe("linear", None, pair) in found
    first, second = MEMBERS.models
    plain = (ModelInput(first), ModelInput(second))
    assert Recipe("slerp", first, plain, parameters={"t": 0.4}) in found
    assert Recipe("slerp", second, plain[::-1], parameters={"t": 0.6}) in found
    assert Recipe("multislerp", None, pair) in found


def test_a_mean_of_any_weights_is_written_in_their_ratios() -> None:
    """mergekit divides by the sum, so 1 and 0.5 are two thirds and a third."""
    found = accepted(dense_candidates(whole([2.0 / 3.0, 1.0 / 3.0]), MEMBERS))
    assert Recipe("linear", None, inputs({"weight": 1.0}, {"weight": 0.5})) in found


def test_weights_that_do_not_sum_to_one_leave_the_rest_to_the_base() -> None:
    found = accepted(dense_candidates(whole([0.5, 0.3]), MEMBERS))
    pair = inputs({"weight": 0.5}, {"weight": 0.3})
    assert Recipe("linear", None, pair, parameters={"normalize": False}) in found
    assert Recipe("linear", None, (*pair, ModelInput(BASE, {"weight": 0.2}))) in found
    assert not [recipe for recipe in found if recipe.merge_method == "slerp"]


def test_negative_weights_follow_no_sphere() -> None:
    found = accepted(dense_candidates(whole([0.5, -0.3]), MEMBERS))
    assert {recipe.merge_method for recipe in found} == {"task_arithmetic", "linear"}


def test_gradients_and_filters_are_written() -> None:
    gradient = accepted(dense_candidates(by_layer("layer", lambda t, _: [0.2 + 0.6 * t, 0.3]), MEMBERS))
    assert Recipe("task_arithmetic", BASE, inputs({"weight": (0.2, 0.8)}, {"weight": 0.3})) in gradient
    module = by_layer("module", lambda _, name: [0.7 if "mlp" in name else 0.4, 0.3])
    filtered = accepted(dense_candidates(module, MEMBERS))
    weight = filtered[0].models[0].parameters["weight"]
    assert weight in (
        (Conditional(0.7, "mlp"), Conditional(0.4)),
        (Conditional(0.4, "self_attn"), Conditional(0.7)),
    )


@pytest.mark.parametrize(
    ("structure", "method", "told"),
    [
        ("ties", "ties", {}),
        ("ties, not normalized", "ties", {"normalize": False}),
        ("breadcrumbs", "breadcrumbs", {}),
        ("breadcrumbs_ties", "breadcrumbs_ties", {}),
        ("breadcrumbs_ties, normalized", "breadcrumbs_ties", {"normalize": True}),
    ],
)
def test_trims_are_written(structure: str, method: str, told: dict[str, Setting]) -> None:
    parts = whole([0.6, 0.4], (0.7, 0.3), (0.02, 0.02), scale=1.3 if STRUCTURE[structure].normalize else 1.0)
    own: list[dict[str, Setting]] = [{"weight": 0.6, "density": 0.7}, {"weight": 0.4, "density": 0.3}]
    if STRUCTURE[structure].drops_outliers:
        own = [{**one, "gamma": 0.02} for one in own]
    if STRUCTURE[structure].normalize:
        told = {**told, "lambda": 1.3}
    assert Recipe(method, BASE, inputs(*own), parameters=told) in accepted(
        trimmed_candidates(parts, STRUCTURE[structure], MEMBERS)
    )


def test_densities_that_are_nearly_equal_are_one() -> None:
    for recipe in trimmed_candidates(whole([0.6, 0.4], (0.505, 0.495)), STRUCTURE["ties"], MEMBERS):
        assert [item.parameters["density"] for item in recipe.models] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("masking", "epsilon", "method", "told"),
    [
        ("linear", 0.0, "dare_linear", {}),
        ("ties", 0.0, "dare_ties", {}),
        ("ties, normalized", 0.0, "dare_ties", {"normalize": True}),
        ("linear", 0.1, "della_linear", {}),
        ("ties", 0.1, "della", {"normalize": False}),
        ("ties, normalized", 0.1, "della", {}),
    ],
)
def test_random_masks_are_written(masking: str, epsilon: float, method: str, told: dict[str, Setting]) -> None:
    parts = whole([0.6, 0.4], (0.5, 0.5), (epsilon, epsilon))
    more: dict[str, Setting] = {"density": 0.5} | ({"epsilon": epsilon} if epsilon else {})
    own: list[dict[str, Setting]] = [{"weight": 0.6, **more}, {"weight": 0.4, **more}]
    found = accepted(masked_candidates(parts, MASKING[masking], MEMBERS))
    assert Recipe(method, BASE, inputs(*own), parameters=told) in found


def test_weights_are_those_beside_the_density_that_is_written() -> None:
    """What is decoded is the quotient of both; a density that is counted is off by chance, and the weight with it."""
    found = accepted(masked_candidates(whole([0.312, 0.104], (0.102, 0.102), (0.0, 0.0)), MASKING["linear"], MEMBERS))
    assert [dict(item.parameters) for item in found[0].models] == [
        {"weight": 0.3, "density": 0.1}, {"weight": 0.1, "density": 0.1}
    ]  # fmt: skip


def test_slopes_beyond_what_della_takes_are_none() -> None:
    """Chances must stay between 0 and 1."""
    found = masked_candidates(whole([0.6, 0.4], (0.9, 0.9), (0.1, 0.1)), MASKING["linear"], MEMBERS)
    assert {recipe.merge_method for recipe in found} == {"dare_linear"}


def test_lambdas_are_factors_of_the_same_weights() -> None:
    recipe = Recipe("ties", BASE, inputs({"weight": 0.6}, {"weight": 0.3}), parameters={"normalize": False})
    found = accepted(with_lambdas(recipe))
    assert len(found) >= 5
    for other in found:
        factor = other.parameters["lambda"]
        assert factor in LAMBDAS
        products = [float(item.parameters["weight"]) * float(factor) for item in other.models]  # type: ignore[arg-type]
        assert products == pytest.approx([0.6, 0.3], rel=0.0121)
    assert not list(with_lambdas(replace(recipe, parameters={"lambda": 0.5})))
    assert not list(with_lambdas(Recipe("linear", None, inputs({"weight": 0.6}, {"weight": 0.3}))))


def test_other_orders_are_all_but_the_one_that_is_written() -> None:
    names = "abcde"
    for count in (1, 2, 3, 5):
        models = tuple(ModelInput(ModelReference(name)) for name in names[:count])
        found = ["".join(map(str, recipe.references)) for recipe in reordered(Recipe("linear", None, models))]
        assert names[:count] not in found
        assert len(set(found)) == len(found) == min(MAX_ORDERS, len(list(permutations(models)))) - 1


def test_methods_without_parameters_are_offered(tunes: Tunes) -> None:
    members = tunes.members("math", "code", "chat")
    found = accepted(parameterless_candidates(tunes.sample("linear", members), members))
    offered = {recipe.merge_method for recipe in found}
    assert offered == {"karcher", "model_stock", "sce", "ram", "ramplus_tl"}


def made_by(tunes: Tunes, name: str, document: dict[str, Any], *members: str) -> tuple[Any, Members]:
    """The sample of another merge by mergekit."""
    folder = tunes.folder / name
    output = folder if folder.exists() else tunes.merge(name, document)
    of = tunes.members(*members)
    return draw_changes(open_checkpoint(output), tunes.models(of), of), of


@pytest.mark.parametrize("moved", [2e-4, 6e-4])
def test_how_far_nearswap_moves_is_read_off(tunes: Tunes, moved: float) -> None:
    document = {
        "merge_method": "nearswap",
        "base_model": "math",
        "models": [{"model": "code"}],
        "parameters": {"t": moved},
        "dtype": "bfloat16",
    }
    sample, members = made_by(tunes, f"swapped {moved}", document, "math", "code")
    found = accepted(parameterless_candidates(sample, members))
    [recipe] = [one for one in found if one.merge_method == "nearswap" and one.base_model == members.models[0]]
    assert recipe.parameters["t"] == pytest.approx(moved, rel=0.05)


def test_sces_share_is_read_off(tunes: Tunes) -> None:
    document = {
        "merge_method": "sce",
        "base_model": "base",
        "models": [{"model": name} for name in ("math", "code", "chat")],
        "parameters": {"select_topk": 0.3},
        "dtype": "bfloat16",
    }
    sample, members = made_by(tunes, "selected", document, "math", "code", "chat")
    found = [one.parameters for one in parameterless_candidates(sample, members) if one.merge_method == "sce"]
    assert found[0] == {}
    assert found[1]["select_topk"] == pytest.approx(0.3, abs=0.021)


def test_shares_of_an_arc_are_read_off_its_sines(tunes: Tunes) -> None:
    document = {
        "merge_method": "nuslerp",
        "base_model": "base",
        "models": [{"model": name, "parameters": {"weight": w}} for name, w in (("math", 0.7), ("code", 0.3))],
        "dtype": "bfloat16",
    }
    sample, members = made_by(tunes, "on an arc", document, "math", "code")
    found = [[item.parameters["weight"] for item in one.models] for one in accepted(arc_candidates(sample, members))]
    assert [0.7, 0.3] in found
    assert not list(arc_candidates(tunes.sample("linear", tunes.members("math")), tunes.members("math")))

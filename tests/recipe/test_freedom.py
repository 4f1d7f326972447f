"""What is said to make the same makes the same: recipes written otherwise, run on small fine-tunes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.recipe.test_trial import drawn_by, with_weights
from tests.recipe.tunes import Tunes
from unmerge.checkpoint.dtypes import DTYPES
from unmerge.checkpoint.reader import open_checkpoint
from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.recipe.document import ModelInput, Recipe, Setting, storage_type
from unmerge.recipe.freedom import freedom
from unmerge.recipe.making import make
from unmerge.recipe.sources import load
from unmerge.recipe.trial import CONVENTIONS, CURRENT, OLDER, Trial

TENSORS = ("layers.0.self_attn.q_proj.weight", "layers.2.self_attn.v_proj.weight")
TUNES = ("math", "code", "chat")
SEED = 7
LAST_BITS = 4.0
"""A product, a sum and a quotient are rounded, each to the last bit of a change that may be twice the base."""
ELECTING = ["ties", "dare_ties", "breadcrumbs_ties", "della"]
ADDING = ["task_arithmetic", "dare_linear", "breadcrumbs", "della_linear"]


@pytest.fixture(scope="module")
def trial(tunes: Tunes) -> Trial:
    stored = open_checkpoint(tunes.folder / "base").tensors
    names = tuple(sorted(name for name in stored if any(text in name for text in TENSORS)))
    return Trial(names, tunes.models(tunes.members(*TUNES)), {name: stored[name] for name in names})


def recipe(
    tunes: Tunes, method: str, *weights: float, shared: Mapping[str, Setting] | None = None, **own: Any
) -> Recipe:
    models = tuple(
        ModelInput(tunes.reference(name), {"weight": weight, **own})
        for name, weight in zip(TUNES, weights, strict=False)
    )
    base = None if method in {"linear", "nuslerp", "multislerp"} else tunes.reference("base")
    return Recipe(method, base, models, parameters=dict(shared or {}), dtype="bfloat16")


def said(tunes: Tunes, of: Recipe, convention: str = CURRENT, seed: int | None = None) -> str:
    names = {tunes.reference(name): name for name in ("base", *TUNES)}
    return "\n".join(freedom(of, names=names, convention=convention, seed=seed))


def made(trial: Trial, of: Recipe, convention: str = CURRENT, seed: int = SEED) -> Array:
    """Return all values that a recipe makes of the trial's tensors."""
    method = CONVENTIONS[convention][of.merge_method]
    draws = drawn_by(seed)
    assert draws is not None
    found = []
    for planned, drawn in replace(trial, convention=convention).planned(of):
        values, _ = make(method, trial.inputs(planned, of), of.out_dtype, draws(drawn))
        found.append(values.ravel())
    return np.concatenate(found)


def different(trial: Trial, one: Recipe, two: Recipe, convention: str = CURRENT) -> float:
    """Return the share of values that two recipes make otherwise."""
    return float(np.mean(made(trial, one, convention) != made(trial, two, convention)))


def off(trial: Trial, one: Recipe, two: Recipe) -> float:
    """Return the largest difference of what two recipes make, in bfloat16's last bits of the base or of the merge.

    Where a change nearly takes the base away, last bits of the change are many of what is left.
    """
    first, second = made(trial, one), made(trial, two)
    arithmetic = Arithmetic("BF16")
    base = np.concatenate([load(trial.target[name], arithmetic).ravel() for name in sorted(trial.names)])
    size = np.maximum(np.abs(base), np.maximum(np.abs(first), np.abs(second)))
    return float(np.max(np.abs(first - second) / DTYPES["BF16"].spacing(size.astype(np.float64))))


def scaled(of: Recipe, factor: float) -> Recipe:
    return with_weights(of, *(factor * float(item.parameters["weight"]) for item in of.models))  # type: ignore[arg-type]


def shared(of: Recipe, **parameters: Setting) -> Recipe:
    return replace(of, parameters={**of.parameters, **parameters})


NORMALIZED = [
    ("linear", {}), ("nuslerp", {}), ("multislerp", {}),
    ("ties", {"density": 0.5}), ("della", {"density": 0.5, "epsilon": 0.1}),
    *((method, {"density": 0.5}) for method in ("dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties")),
]  # fmt: skip


@pytest.mark.parametrize(("method", "own"), NORMALIZED)
def test_only_ratios_matter_where_weights_are_divided_by(
    tunes: Tunes, trial: Trial, method: str, own: dict[str, Any]
) -> None:
    told = {"normalize": True} if method in {*ELECTING, *ADDING} else {}
    weights = (0.5, 0.3) if method == "nuslerp" else (0.5, 0.3, 0.2)
    one = recipe(tunes, method, *weights, shared=told, **own)
    sentences = said(tunes, one)
    assert "Only the ratios of the weights matter" in sentences
    assert "same bits" in sentences
    assert different(trial, one, scaled(one, 2.0)) == 0
    # Another factor is another rounding: of few values, and of most only the last bit.
    assert different(trial, one, scaled(one, 1.3)) < 0.05
    turned = different(trial, one, scaled(one, -2.0))
    if method in ELECTING:
        assert "signs of all weights turned" in sentences
        assert "either sign" not in sentences
        assert turned < 0.1
    else:
        assert "power of 2 of either sign" in sentences
        assert turned == 0


def test_ratios_are_said_to_matter_only_where_they_do(tunes: Tunes, trial: Trial) -> None:
    for one in (
        recipe(tunes, "ties", 0.5, 0.3, density=0.5, shared={"normalize": False}),
        recipe(tunes, "task_arithmetic", 0.5, 0.3),
        recipe(tunes, "linear", 0.5, 0.3, shared={"normalize": False}),
    ):
        assert "Only the ratios" not in said(tunes, one)
        assert different(trial, one, scaled(one, 2.0)) > 0.5


def test_weights_that_cancel_are_no_ratios(tunes: Tunes, trial: Trial) -> None:
    """mergekit does not divide by a sum of zero."""
    ties = recipe(tunes, "ties", 0.5, -0.5)
    arithmetic = recipe(tunes, "task_arithmetic", 0.5, -0.5, shared={"normalize": True})
    for one in (ties, arithmetic):
        assert "Only the ratios" not in said(tunes, one)
        assert different(trial, one, scaled(one, 2.0)) > 0.05
    mixed = recipe(tunes, "ties", 0.5, -0.3)
    assert "Only the ratios" in said(tunes, mixed)
    assert different(trial, mixed, scaled(mixed, 2.0)) == 0


def test_a_factor_of_2_is_a_rounding_in_float16_and_not_said(tunes: Tunes) -> None:
    one = replace(recipe(tunes, "ties", 0.5, 0.3), dtype="float16")
    assert "times any number they make the same up to last bits" in said(tunes, one)
    linear = replace(recipe(tunes, "linear", 0.5, 0.3), dtype="float16")
    assert "same bits" in said(tunes, linear)
    assert "same bits" not in said(tunes, linear, OLDER)


@pytest.mark.parametrize(("method", "weight"), [("ties", -0.7), ("linear", 1.3), ("multislerp", 0.2), ("della", 5.0)])
def test_the_only_models_weight_does_not_matter(tunes: Tunes, trial: Trial, method: str, weight: float) -> None:
    own = {} if method in {"linear", "multislerp"} else {"density": 0.5}
    one = recipe(tunes, method, 0.3, **own)
    assert "The weight of the only model does not matter" in said(tunes, one)
    assert off(trial, one, with_weights(one, weight)) <= LAST_BITS


@pytest.mark.parametrize("method", [*ADDING, *ELECTING])
def test_lambda_and_weights_are_exchanged(tunes: Tunes, trial: Trial, method: str) -> None:
    one = recipe(tunes, method, 0.5, 0.3, 0.2, density=0.6, shared={"normalize": False})
    assert "Lambda times the weights is what matters" in said(tunes, one)
    assert different(trial, one, shared(scaled(one, 2.0), **{"lambda": 0.5})) == 0
    assert different(trial, one, shared(scaled(one, 1.25), **{"lambda": 0.8})) < 0.15
    assert "Lambda" not in said(tunes, shared(one, normalize=True))


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_ties"])
@pytest.mark.parametrize("weights", [(0.5,), (0.5, 0.3)])
def test_models_of_weight_0_change_nothing(tunes: Tunes, trial: Trial, method: str, weights: tuple[float, ...]) -> None:
    density = {"density": 0.5} if method in {"ties", "dare_ties"} else {}
    one = recipe(tunes, method, *weights, **density)
    assert "may be listed last with weight 0" in said(tunes, one)
    more = ModelInput(tunes.reference("chat"), {"weight": 0.0, "density": 1.0})
    assert different(trial, one, replace(one, models=(*one.models, more))) == 0


def test_normalize_is_exchanged_for_weights_over_their_sum(tunes: Tunes, trial: Trial) -> None:
    for method in ("linear", "task_arithmetic"):
        one = recipe(tunes, method, 0.8, 0.7, shared={"normalize": True})
        assert "weights over their sum" in said(tunes, one)
        assert off(trial, one, shared(scaled(one, 1 / 1.5), normalize=False)) <= LAST_BITS


@pytest.mark.parametrize("family", [ELECTING, ADDING])
def test_where_nothing_is_dropped_methods_of_a_family_are_one(tunes: Tunes, trial: Trial, family: list[str]) -> None:
    first = recipe(tunes, family[1], 0.5, 0.3, 0.2, density=1.0, shared={"normalize": True})
    sentences = said(tunes, first)
    assert "Nothing is dropped" in sentences
    assert all(name in sentences for name in family[::2])
    for method in family:
        other = replace(first, merge_method=method)
        assert different(trial, first, other) == 0
        models = tuple(replace(item, parameters={**item.parameters, "density": 1.5}) for item in first.models)
        assert different(trial, first, shared(replace(other, models=models), rescale=False)) == 0


def test_gamma_is_cut_at_what_density_leaves(tunes: Tunes, trial: Trial) -> None:
    one = recipe(tunes, "breadcrumbs", 0.5, 0.3, density=0.6, gamma=0.45)
    assert "Gamma of math: any number from 1 - density (0.4) on" in said(tunes, one)
    for gamma in (0.4, 0.41, 0.9):
        models = tuple(replace(item, parameters={**item.parameters, "gamma": gamma}) for item in one.models)
        first, second = made(trial, one), made(trial, replace(one, models=models))
        # An element at either end of what is kept, of each model and tensor.
        assert np.count_nonzero(first != second) <= 2 * len(one.models) * len(trial.names)
    below = recipe(tunes, "breadcrumbs", 0.5, 0.3, density=0.6, gamma=0.3)
    assert "Gamma" not in said(tunes, below)
    assert different(trial, below, one) > 0.01


@pytest.mark.parametrize(("method", "twin"), [("della", "dare_ties"), ("della_linear", "dare_linear")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_della_with_epsilon_0_is_dare(tunes: Tunes, trial: Trial, method: str, twin: str, dtype: str) -> None:
    one = replace(recipe(tunes, method, 0.5, 0.3, density=0.3, epsilon=0.0), dtype=dtype)
    normalize = method == "della"
    assert f"With epsilon 0, {twin} with normalize: {str(normalize).lower()}" in said(tunes, one)
    assert different(trial, one, shared(replace(one, merge_method=twin), normalize=normalize)) == 0
    assert "epsilon 0" not in said(tunes, recipe(tunes, method, 0.5, 0.3, density=0.3))


@pytest.mark.parametrize("method", ELECTING[1:])
def test_one_model_elects_no_signs(tunes: Tunes, trial: Trial, method: str) -> None:
    one = recipe(tunes, method, 0.3, density=0.5)
    twin = {"dare_ties": "dare_linear", "della": "della_linear", "breadcrumbs_ties": "breadcrumbs"}[method]
    assert f"no signs are elected: {twin} with normalize: {str(method == 'della').lower()}" in said(tunes, one)
    assert different(trial, one, shared(replace(one, merge_method=twin), normalize=method == "della")) == 0


def test_slerp_is_turned_round_and_is_linear(tunes: Tunes, trial: Trial) -> None:
    code, math = tunes.reference("code"), tunes.reference("math")
    pair = (ModelInput(code), ModelInput(math))
    one = Recipe("slerp", code, pair, parameters={"t": 0.35}, dtype="bfloat16")
    assert "With math as the base and t 0.65" in said(tunes, one)
    assert off(trial, one, replace(one, base_model=math, parameters={"t": 0.65})) <= 1.0
    linear = replace(recipe(tunes, "linear", 0.35, 0.65), base_model=None)
    assert "linear with weights 1 - t and t" in said(tunes, one)
    assert off(trial, one, linear) <= 1.0


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "breadcrumbs", "linear", "nuslerp", "multislerp"])
def test_two_models_stand_in_any_order(tunes: Tunes, trial: Trial, method: str) -> None:
    one = recipe(tunes, method, 0.5, 0.3, density=0.6)
    turned = replace(one, models=one.models[::-1])
    sentences = said(tunes, one)
    assert "The models may stand in any order" in sentences
    exact = "The models may stand in any order." in sentences
    assert exact == (method not in {"linear", "nuslerp", "multislerp"})
    assert different(trial, one, turned) == 0 if exact else off(trial, one, turned) <= 1.0


def test_the_order_matters_where_masks_are_drawn(tunes: Tunes, trial: Trial) -> None:
    one = recipe(tunes, "dare_linear", 0.5, 0.3, density=0.6)
    assert "any order" not in said(tunes, one)
    assert different(trial, one, replace(one, models=one.models[::-1])) > 0.1


def test_linear_is_made_in_float32_of_any_type(tunes: Tunes, trial: Trial) -> None:
    one = recipe(tunes, "linear", 0.5, 0.3)
    assert "With dtype: float32 and out_dtype: bfloat16" in said(tunes, one)
    other = replace(one, dtype="float32", out_dtype="bfloat16")
    assert "With dtype: bfloat16 it makes the same" in said(tunes, other)
    assert different(trial, one, other) == 0
    assert "dtype" not in said(tunes, one, OLDER)
    assert "dtype" not in said(tunes, recipe(tunes, "task_arithmetic", 0.5, 0.3))


def test_sce_of_small_changes_is_ties(tunes: Tunes) -> None:
    rng, size = np.random.default_rng(2), 4e-4  # two mean squares of 1.6e-7
    slight = ("slight-1", "slight-2")
    for name in slight:
        tunes.write(name, {key: value + size * rng.standard_normal(value.shape) for key, value in tunes.base.items()})
    stored = open_checkpoint(tunes.folder / "base").tensors
    names = tuple(sorted(name for name in stored if any(text in name for text in TENSORS)))
    trial = Trial(names, tunes.models(tunes.members(*slight)), {name: stored[name] for name in names})
    own = tuple(ModelInput(tunes.reference(name)) for name in slight)
    one = Recipe("sce", tunes.reference("base"), own, dtype="bfloat16")
    assert "ties with density 1 and equal weights" in said(tunes, one)
    weighted = tuple(ModelInput(item.model, {"weight": 1.0}) for item in own)
    ties = replace(one, merge_method="ties", models=weighted)
    assert different(trial, one, ties) < 0.1
    assert different(trial, one, replace(ties, merge_method="task_arithmetic")) > 0.3
    assert "ties with" not in said(tunes, shared(one, select_topk=0.5))


def test_what_has_no_effect_has_none(tunes: Tunes, trial: Trial) -> None:
    one = recipe(tunes, "task_arithmetic", 0.5, 0.3)
    assert "density, rescale and int8_mask have no effect" in said(tunes, one)
    other = shared(recipe(tunes, "task_arithmetic", 0.5, 0.3, density=0.2), rescale=True, int8_mask=True)
    assert different(trial, one, other) == 0
    ties = recipe(tunes, "ties", 0.5, 0.3, density=0.5)
    assert "int8_mask has no effect" in said(tunes, ties)
    assert different(trial, ties, shared(ties, int8_mask=True)) == 0


def test_a_seed_has_32_bits(tunes: Tunes, trial: Trial) -> None:
    one = recipe(tunes, "dare_ties", 0.5, 0.3, density=0.5)
    assert "lower 32 bits" not in said(tunes, one)
    assert "7 and any multiple of 2^32 more" in said(tunes, one, seed=SEED)
    assert np.array_equal(made(trial, one), made(trial, one, seed=SEED + 3 * 2**32))
    assert not np.array_equal(made(trial, one), made(trial, one, seed=SEED + 1))


def test_every_value_is_of_the_working_type(tunes: Tunes, trial: Trial) -> None:
    """Which the tests above rely on: a step of bfloat16 is the smallest difference that can be."""
    values = made(trial, recipe(tunes, "ties", 0.5, 0.3))
    assert np.array_equal(Arithmetic(str(storage_type("bfloat16"))).round(values), values)

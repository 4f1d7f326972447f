from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.merging.in_torch import HALVES_AND_SINGLE, checkpoints, group, mergekit, registry, same_bits
from unmerge.errors import RecipeError
from unmerge.merging import sparsify
from unmerge.merging.arithmetic import Arithmetic
from unmerge.merging.draws import TorchDraws
from unmerge.merging.method import MergeMethod
from unmerge.merging.task_arithmetic import TASK_ARITHMETIC_METHODS, combined, weighted

METHODS = list(TASK_ARITHMETIC_METHODS.values())
SCOPES = {"model": "non_base", "shared": "shared"}
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
WEIGHTS = st.sampled_from([0.3, 0.5, 1.0, -0.2, 0.0, 1.5, 0.123])
OF_MODELS = {
    "weight": WEIGHTS,
    "density": st.sampled_from([0.2, 0.3, 0.5, 0.61, 0.8, 1.0]),
    "gamma": st.sampled_from([0.0, 0.01, 0.1, 0.4]),
    "epsilon": st.sampled_from([0.01, 0.1, 0.19]),
}
SHARED = {
    "normalize": st.booleans(),
    "rescale": st.booleans(),
    "lambda": st.sampled_from([1.0, 0.3, 1.7, -0.5]),
    "int8_mask": st.booleans(),
}
SHAPES = [(2,), (7,), (60,), (33, 40), (128, 300), (3, 4, 50)]


@st.composite
def told(draw: st.DrawFn, method: MergeMethod, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters of a method: all that are needed, and some of those that have defaults."""
    of_models, shared = {}, {}
    for parameter in method.parameters:
        if parameter.default is None or draw(st.booleans()):
            if parameter.scope == "model":
                of_models[parameter.name] = [draw(OF_MODELS[parameter.name]) for _ in range(count)]
            else:
                shared[parameter.name] = draw(SHARED[parameter.name])
    if "epsilon" in [parameter.name for parameter in method.parameters] and "epsilon" not in of_models:
        of_models["density"] = [0.5] * count  # the default asks for a density in between
    return of_models, shared


@every_method
def test_parameters_are_mergekit_s(method: MergeMethod) -> None:
    theirs = registry.get(method.name).spec
    ours = {p.name: (SCOPES[p.scope], p.default) for p in method.parameters}
    expected = {p.name: (p.scope.value, None if p.required else p.default) for p in theirs.parameters}
    assert ours == expected


def test_all_of_mergekit_s_family_is_there() -> None:
    family = [m.spec.name for m in registry.registered_methods() if "GeneralizedTask" in type(m).__name__]
    assert sorted(family) == sorted(TASK_ARITHMETIC_METHODS)


@every_method
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_bits_are_mergekit_s(method: MergeMethod, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**40))
    rng = np.random.default_rng(seed)
    count = data.draw(st.integers(1, 5) | st.sampled_from([6, 9, 17]))
    of_models, shared = data.draw(told(method, count))
    arithmetic = Arithmetic(data.draw(st.sampled_from(HALVES_AND_SINGLE)), torch.get_num_threads())
    stored = data.draw(st.sampled_from(HALVES_AND_SINGLE))
    draws = TorchDraws(seed)
    torch.manual_seed(seed)
    for _ in range(2):  # the second tensor goes on in the stream of the first
        shape = data.draw(st.sampled_from(SHAPES))
        tensors = [arithmetic.round(values) for values in checkpoints(rng, count, shape, stored)]
        ours = method.merge(group(method, tensors, of_models, shared, draws), arithmetic)
        assert same_bits(ours, mergekit(method, tensors, of_models, shared, arithmetic)).all()


@every_method
def test_a_merge_by_several_threads_is_mergekit_s(method: MergeMethod) -> None:
    before = torch.get_num_threads()
    arithmetic = Arithmetic("BF16", 3)
    tensors = checkpoints(np.random.default_rng(2), 2, (300, 400))
    of_models, shared = {"weight": [0.6, 0.4], "density": [0.5, 0.7]}, {"rescale": True}
    try:
        torch.set_num_threads(3)
        torch.manual_seed(5)
        theirs = mergekit(method, tensors, of_models, shared, arithmetic)
    finally:
        torch.set_num_threads(before)
    ours = method.merge(group(method, tensors, of_models, shared, TorchDraws(5)), arithmetic)
    assert same_bits(ours, theirs).all()


def test_pieces_make_the_whole() -> None:
    arithmetic, weights = Arithmetic("BF16"), [0.7, 0.4]
    base, *models = checkpoints(np.random.default_rng(4), 2, (50, 60))
    ties = TASK_ARITHMETIC_METHODS["ties"]
    of_models = {"weight": weights, "density": [0.5, 0.3]}
    deltas = [arithmetic.round(model - base) for model in models]
    masks = [sparsify.magnitude_mask(d, density) for d, density in zip(deltas, of_models["density"], strict=True)]
    kept = [sparsify.masked(d, mask, arithmetic, rescale=False) for d, mask in zip(deltas, masks, strict=True)]
    whole = ties.merge(group(ties, [base, *models], of_models, {"lambda": 0.9}), arithmetic)
    parts = weighted(kept, weights, arithmetic)
    made = combined(base, parts, weights, arithmetic, consensus=True, normalize=True, lambda_=0.9)
    assert same_bits(made, whole).all()


@every_method
def test_nothing_to_merge_is_the_base(method: MergeMethod) -> None:
    (base,) = checkpoints(np.random.default_rng(0), 0, (4, 5))
    assert (method.merge(group(method, [base], {}, {}), Arithmetic("BF16")) == base).all()


def test_memory_order_does_not_matter() -> None:
    method, arithmetic = TASK_ARITHMETIC_METHODS["ties"], Arithmetic("BF16")
    tensors = checkpoints(np.random.default_rng(0), 2, (30, 40))
    told_all = {"weight": [1.0, 0.5], "density": [0.5, 0.5]}
    whole = method.merge(group(method, tensors, told_all, {}), arithmetic)
    turned = [np.asfortranarray(values) for values in tensors]
    assert (method.merge(group(method, turned, told_all, {}), arithmetic) == whole).all()


def test_random_masks_need_draws() -> None:
    method = TASK_ARITHMETIC_METHODS["dare_ties"]
    tensors = checkpoints(np.random.default_rng(0), 2, (4, 5))
    with pytest.raises(RecipeError, match="dare_ties draws random masks, and there are no draws"):
        method.merge(group(method, tensors, {"weight": [1.0, 1.0]}, {}), Arithmetic("BF16"))

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.merging.in_torch import HALVES_AND_SINGLE, array, checkpoints, group, mergekit, registry, same_bits, tensor
from unmerge.errors import RecipeError
from unmerge.merging.arithmetic import Arithmetic
from unmerge.merging.linear import LINEAR, LINEAR_TO_0_1_4

SHAPES = [(), (1,), (9,), (33, 40), (40000,), (3, 4, 50)]
# Weights that float32 cannot hold, and ones whose products are half way between two of its numbers.
WEIGHTS = [0.3, 0.5, 1.0, -0.2, 0.0, 0.123, 1 + 2.0**-12]
settled = settings(deadline=None, max_examples=80)
cases = given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(HALVES_AND_SINGLE),
    shape=st.sampled_from(SHAPES),
    weights=st.lists(st.sampled_from(WEIGHTS), min_size=1, max_size=9),
    normalize=st.booleans(),
    scale=st.sampled_from([1.0, 1e-37, 1e3]),
)


@settled
@cases
def test_bits_are_mergekit_s(
    seed: int, name: str, shape: tuple[int, ...], weights: list[float], normalize: bool, scale: float
) -> None:
    arithmetic = Arithmetic(name)
    drawn = checkpoints(np.random.default_rng(seed), len(weights) - 1, shape)
    tensors = [arithmetic.round(values * np.float32(scale)) for values in drawn]
    told = {"weight": weights}, {"normalize": normalize}
    ours = LINEAR.merge(group(LINEAR, tensors, *told), arithmetic)
    assert same_bits(ours, mergekit(LINEAR, tensors, *told, arithmetic)).all()


@settled
@cases
def test_bits_of_older_versions_are_those_of_their_formula(
    seed: int, name: str, shape: tuple[int, ...], weights: list[float], normalize: bool, scale: float
) -> None:
    arithmetic = Arithmetic(name)
    drawn = checkpoints(np.random.default_rng(seed), len(weights) - 1, shape)
    tensors = [arithmetic.round(values * np.float32(scale)) for values in drawn]
    stacked = torch.stack([tensor(values, arithmetic) for values in tensors])
    factors = torch.tensor(weights, dtype=stacked.dtype).reshape(-1, *[1] * len(shape))
    theirs = (factors * stacked).sum(dim=0)
    if normalize:
        theirs = theirs / factors.sum(dim=0)
    ours = LINEAR_TO_0_1_4.merge(
        group(LINEAR_TO_0_1_4, tensors, {"weight": weights}, {"normalize": normalize}), arithmetic
    )
    assert same_bits(ours, array(theirs)).all()


def test_products_are_added_before_they_are_rounded() -> None:
    # 1 + 2^-12 squared is half way between two float32, and what is added decides to which it is rounded.
    single, half = Arithmetic("F32"), np.float32(1 + 2.0**-12)
    for added in (2.0**-60, -(2.0**-60)):
        tensors = [np.full(3, added, np.float32), np.full(3, half, np.float32)]
        told = {"weight": [1.0, float(half)]}, {"normalize": False}
        theirs = mergekit(LINEAR, tensors, *told, single)
        assert same_bits(LINEAR.merge(group(LINEAR, tensors, *told), single), theirs).all()


def test_versions_differ() -> None:
    tensors = checkpoints(np.random.default_rng(0), 1, (40, 50))
    told = {"weight": [0.6, 0.4]}, {}
    new, old = (m.merge(group(m, tensors, *told), Arithmetic("BF16")) for m in (LINEAR, LINEAR_TO_0_1_4))
    assert 0.05 < (new != old).mean() < 0.6


def test_float64_is_within_a_unit_in_the_last_place() -> None:
    double = Arithmetic("F64")
    tensors = checkpoints(np.random.default_rng(0), 2, (40, 50), "F64")
    told = {"weight": [0.6, 0.4, 0.3]}, {}
    ours, theirs = LINEAR.merge(group(LINEAR, tensors, *told), double), mergekit(LINEAR, tensors, *told, double)
    np.testing.assert_array_max_ulp(ours + 1, theirs + 1, 1)


def test_parameters_are_mergekit_s() -> None:
    theirs = {p.name: None if p.required else p.default for p in registry.get("linear").spec.parameters}
    for method in (LINEAR, LINEAR_TO_0_1_4):
        assert {p.name: p.default for p in method.parameters} == theirs


@pytest.mark.parametrize("method", [LINEAR, LINEAR_TO_0_1_4])
def test_a_model_without_a_weight_is_refused(method: object) -> None:
    tensors = checkpoints(np.random.default_rng(0), 1, (4,))
    with pytest.raises(RecipeError, match="linear needs weight for every model"):
        LINEAR.merge(group(LINEAR, tensors, {}, {}), Arithmetic("F32"))

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.merging.in_torch import TYPES, array, checkpoints, same_bits, tensor
from unmerge.errors import RecipeError
from unmerge.merging import sparsify
from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.draws import TorchDraws

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mergekit import sparsify as mergekit

SHAPES = [(1,), (2,), (99,), (40, 50), (7, 33), (3, 4, 50), (33000,)]
NORMS = {False: None, True: mergekit.RescaleNorm.l1}
seeds = st.integers(0, 2**32 - 1)
types = st.sampled_from(list(TYPES))
shapes = st.sampled_from(SHAPES)
densities = st.sampled_from([-0.5, 0.0, 1e-4, 0.1, 0.3, 0.5, 0.61, 0.9, 0.999, 1.0, 1.5])
gammas = st.sampled_from([0.0, 0.01, 0.1, 0.4, 0.9])
# Sums of absolute values that float16 cannot hold, and ones below what is rescaled.
scales = st.sampled_from([1e-9, 1e-5, 1.0, 1.0, 1e4])
drawing = settings(deadline=None, max_examples=60)


def change(seed: int, shape: tuple[int, ...], arithmetic: Arithmetic, scale: float = 1.0) -> Array:
    """What a fine-tune that is stored in bfloat16 changed, as the working type has it."""
    base, tuned = checkpoints(np.random.default_rng(seed), 1, shape)
    with np.errstate(over="ignore"):
        return arithmetic.round((arithmetic.round(tuned) - arithmetic.round(base)) * scale)


@drawing
@given(seed=seeds, name=types, shape=shapes, density=densities, rescale=st.booleans(), scale=scales)
def test_magnitude_is_mergekit_s(
    seed: int, name: str, shape: tuple[int, ...], density: float, rescale: bool, scale: float
) -> None:
    arithmetic = Arithmetic(name, torch.get_num_threads())
    delta = change(seed, shape, arithmetic, scale)
    ours = sparsify.magnitude(delta, density, arithmetic, rescale=rescale)
    theirs = mergekit.magnitude(tensor(delta, arithmetic), density, NORMS[rescale])
    assert same_bits(ours, array(theirs)).all()


@drawing
@given(
    seed=seeds,
    name=types,
    shape=shapes,
    density=densities.filter(lambda d: d >= 0),
    gamma=gammas,
    rescale=st.booleans(),
)
def test_magnitude_outliers_are_mergekit_s(
    seed: int, name: str, shape: tuple[int, ...], density: float, gamma: float, rescale: bool
) -> None:
    arithmetic = Arithmetic(name, torch.get_num_threads())
    delta = change(seed, shape, arithmetic)
    ours = sparsify.magnitude_outliers(delta, density, gamma, arithmetic, rescale=rescale)
    theirs = mergekit.magnitude_outliers(tensor(delta, arithmetic), density, NORMS[rescale], gamma)
    assert same_bits(ours, array(theirs)).all()


@drawing
@given(seed=seeds, name=types, shape=shapes, density=densities.filter(lambda d: d >= 0), rescale=st.booleans())
def test_bernoulli_is_mergekit_s(seed: int, name: str, shape: tuple[int, ...], density: float, rescale: bool) -> None:
    arithmetic = Arithmetic(name, torch.get_num_threads())
    draws = TorchDraws(seed)
    torch.manual_seed(seed)
    for tensor_of_two in range(2):
        delta = change(seed + tensor_of_two, shape, arithmetic)
        ours = sparsify.bernoulli(delta, density, arithmetic, draws, rescale=rescale)
        theirs = mergekit.bernoulli(tensor(delta, arithmetic), density, NORMS[rescale])
        assert same_bits(ours, array(theirs)).all()


@drawing
@given(
    seed=seeds,
    name=types,
    shape=shapes.filter(lambda shape: shape != (1,)),
    density=st.sampled_from([-0.5, 0.0, 0.2, 0.5, 0.61, 0.79, 1.0]),
    epsilon=st.sampled_from([0.0, 0.05, 0.15, 0.19]),
    rescale=st.booleans(),
)
def test_della_is_mergekit_s(
    seed: int, name: str, shape: tuple[int, ...], density: float, epsilon: float, rescale: bool
) -> None:
    arithmetic = Arithmetic(name, torch.get_num_threads())
    draws = TorchDraws(seed)
    torch.manual_seed(seed)
    for tensor_of_two in range(2):
        delta = change(seed + tensor_of_two, shape, arithmetic)
        ours = sparsify.della_magprune(delta, density, epsilon, arithmetic, draws, rescale=rescale)
        theirs = mergekit.della_magprune(tensor(delta, arithmetic), density, epsilon, NORMS[rescale])
        assert same_bits(ours, array(theirs)).all()


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_other_sorts_than_this_machine_s_differ_in_ties_alone(density: float) -> None:
    delta = change(5, (200, 200), Arithmetic("BF16"))
    keep = int(density * delta.size)
    stable = np.zeros(delta.size, dtype=bool)
    stable[np.argsort(-np.abs(delta), axis=None, kind="stable")[:keep]] = True
    stable = stable.reshape(delta.shape)
    different = stable != sparsify.magnitude_mask(delta, density)
    free = sparsify.magnitude_ties(delta, density)
    assert different.any()
    assert free[different].all()
    assert len(np.unique(np.abs(delta[free]))) == 1


def test_outliers_have_ties_at_both_thresholds() -> None:
    delta = change(5, (200, 200), Arithmetic("BF16"))
    free = sparsify.outlier_ties(delta, 0.5, 0.1)
    assert len(np.unique(np.abs(delta[free]))) == 2
    order = np.argsort(np.abs(delta), axis=None, kind="stable")
    stable = np.zeros(delta.size, dtype=bool)
    stable[order[int(0.4 * delta.size) : int(0.9 * delta.size)]] = True
    different = stable.reshape(delta.shape) != sparsify.outlier_mask(delta, 0.5, 0.1)
    assert different.any()
    assert free[different].all()


def test_without_equal_elements_nothing_is_free() -> None:
    delta = np.random.default_rng(0).permutation(np.arange(1.0, 1001.0)).astype(np.float32)
    assert not sparsify.magnitude_ties(delta, 0.3).any()
    assert not sparsify.outlier_ties(delta, 0.3, 0.1).any()


@pytest.mark.parametrize("name", TYPES)
def test_a_mask_that_was_read_stands_for_one_that_was_drawn(name: str) -> None:
    arithmetic = Arithmetic(name, torch.get_num_threads())
    delta = change(9, (64, 64), arithmetic)
    torch.manual_seed(3)
    theirs = array(mergekit.bernoulli(tensor(delta, arithmetic), 0.4, mergekit.RescaleNorm.l1))
    ours = sparsify.masked_at_random(delta, theirs != 0, arithmetic, rescale=True)
    assert same_bits(ours, theirs)[theirs != 0].all()
    assert (ours[theirs == 0] == 0).all()


def test_della_refuses_what_gives_no_probabilities() -> None:
    single = Arithmetic("F32")
    with pytest.raises(RecipeError, match=r"density 0.9 and epsilon 0.15 give probabilities from 0.75 to 1.05"):
        sparsify.della_probabilities(np.ones((3, 4), np.float32), 0.9, 0.15, single)
    with pytest.raises(RecipeError, match="a row of one element has no ranks"):
        sparsify.della_probabilities(np.ones((3, 1), np.float32), 0.5, 0.15, single)

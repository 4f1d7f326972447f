from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.merging.in_torch import HALVES_AND_SINGLE, checkpoints, group, mergekit, registry, same_bits
from unmerge.merging.arithmetic import Arithmetic
from unmerge.merging.sce import SCE, SMALLEST_ENERGY, energy_weights, variance_mask, variance_ties

SHAPES = [(1,), (9,), (33, 40), (40000,), (3, 4, 50)]


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from([*HALVES_AND_SINGLE, "F64"]),
    stored=st.sampled_from(HALVES_AND_SINGLE),
    shape=st.sampled_from(SHAPES),
    count=st.integers(1, 6),
    share=st.sampled_from([1.0, 0.9, 0.5, 0.1, 0.02, 0.005, 0.0]),
    scale=st.sampled_from([1.0, 0.1, 30.0]),
)
def test_bits_are_mergekit_s(
    seed: int, name: str, stored: str, shape: tuple[int, ...], count: int, share: float, scale: float
) -> None:
    arithmetic = Arithmetic(name, torch.get_num_threads())
    drawn = checkpoints(np.random.default_rng(seed), count, shape, stored)
    tensors = [arithmetic.round(values * np.float32(scale)) for values in drawn]
    ours = SCE.merge(group(SCE, tensors, {}, {"select_topk": share}), arithmetic)
    assert same_bits(ours, mergekit(SCE, tensors, {}, {"select_topk": share}, arithmetic)).all()


def test_ties_are_the_choice_between_equal_variances() -> None:
    arithmetic, share = Arithmetic("BF16"), 0.1
    base, *models = checkpoints(np.random.default_rng(1), 3, (200, 200))
    deltas = np.stack([arithmetic.round(model - base) for model in models])
    free, kept = variance_ties(deltas, share, arithmetic), variance_mask(deltas, share, arithmetic)
    variances = arithmetic.round(deltas.astype(np.float64).var(axis=0))
    assert len(np.unique(variances[free])) == 1
    assert kept.sum() == int(share * np.count_nonzero(variances))
    assert kept[free].any()
    assert not kept[free].all()
    assert variances[kept].min() == variances[free][0]


@pytest.mark.parametrize(("scale", "uniform"), [(1.0, True), (100.0, False)])
def test_weights_are_uniform_for_small_changes(scale: float, uniform: bool) -> None:
    single = Arithmetic("F32")
    deltas = np.random.default_rng(0).standard_normal((3, 5000)).astype(np.float32) * np.float32(1e-4 * scale)
    deltas[0] *= 2
    energies = np.square(deltas.astype(np.float64)).mean(axis=1)
    assert (energies.sum() < SMALLEST_ENERGY) == uniform
    expected = np.full(3, 1 / 3) if uniform else energies / energies.sum()
    np.testing.assert_allclose(energy_weights(deltas, single), expected, rtol=1e-6)


def test_parameters_are_mergekit_s() -> None:
    theirs = {p.name: (p.scope.value, p.default) for p in registry.get("sce").spec.parameters}
    assert {p.name: (p.scope, p.default) for p in SCE.parameters} == theirs

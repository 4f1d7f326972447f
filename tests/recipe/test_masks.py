"""Decoded masks: against masks that were planted, through mergekit's own formula."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.recipe.samples import changes, sample_of, stored
from tests.recipe.worlds import quiet_mergekit
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.recipe.masks import MASKINGS, Decoding, Masking, all_masks, decode, kept_shares, outcomes, unique
from unmerge.recipe.sample import Sample
from unmerge.recipe.structures import fit_dense

WEIGHTS, DENSITIES = np.array([0.5, 0.3, 0.4]), np.array([0.7, 0.5, 0.3])
SIZE = 4000
every_masking = pytest.mark.parametrize("masking", MASKINGS, ids=lambda masking: masking.name)


@pytest.fixture(scope="module", autouse=True)
def _mergekit() -> None:
    with quiet_mergekit():
        import mergekit.merge_methods.generalized_task_arithmetic  # noqa: F401 - its first import warns


def combined(deltas: FloatArray, kept: NDArray[np.bool_], weights: FloatArray, masking: Masking) -> FloatArray:
    """Masked changes, weighed, elected and divided with mergekit's mask."""
    from mergekit.merge_methods.generalized_task_arithmetic import get_mask

    scale = torch.from_numpy(weights)[:, None]
    weighted = torch.from_numpy(deltas * kept) * scale
    agreeing = get_mask(weighted, "sum", torch.float64) if masking.consensus else torch.from_numpy(kept)
    total = (weighted * agreeing).sum(dim=0)
    if masking.normalize:
        divisor = (scale * agreeing).sum(dim=0)
        divisor[divisor == 0] = 1
        total /= divisor
    return total.numpy()


def planted(masking: Masking, slope: float = 0.0) -> tuple[Sample, NDArray[np.bool_], FloatArray]:
    """A sample of a merge with random masks, the masks, and what kept changes were multiplied by."""
    rng = np.random.default_rng(8)
    deltas = changes(7, 3, SIZE)
    row_ranks = sample_of(deltas, deltas[0]).row_ranks
    chance = DENSITIES[:, np.newaxis] + slope * (row_ranks - 0.5)
    kept = rng.random(deltas.shape) < chance
    rescale = np.abs(deltas).sum(axis=1) / np.abs(deltas * kept).sum(axis=1)
    target = combined(deltas * rescale[:, np.newaxis], kept, WEIGHTS, masking)
    return sample_of(deltas, stored(target)), kept, rescale


def decoded(sample: Sample, masking: Masking) -> Decoding:
    return decode(sample, fit_dense(sample).parameters.weights, masking)


def test_all_masks_are_all_subsets() -> None:
    masks = all_masks(4)
    assert masks.shape == (16, 4)
    assert len({tuple(mask) for mask in masks.tolist()}) == 16


@every_masking
def test_outcomes_are_those_of_mergekits_formula(masking: Masking) -> None:
    sample = sample_of(changes(1, 3, 300), np.zeros(300))
    rescale = np.array([1.4, 2.0, 3.1])
    found = outcomes(sample, masking, WEIGHTS, rescale)
    for made, mask in zip(found, all_masks(3), strict=True):
        kept = np.repeat(mask[:, np.newaxis], 300, axis=1)
        assert made == pytest.approx(combined(sample.deltas * rescale[:, np.newaxis], kept, WEIGHTS, masking))


@every_masking
def test_planted_masks_are_decoded(masking: Masking) -> None:
    sample, kept, rescale = planted(masking)
    found = decoded(sample, masking)
    # Where a merge is not normalized, weights and rescaling are one number.
    expected = WEIGHTS / WEIGHTS.sum() if masking.normalize else WEIGHTS * rescale
    assert found.weights == pytest.approx(expected, rel=0.01)
    if masking.normalize:
        assert found.rescale == pytest.approx(rescale, rel=0.01)
    spread = np.sqrt(DENSITIES * (1.0 - DENSITIES) / SIZE)
    assert (np.abs(found.densities - DENSITIES) < 5.0 * spread + 0.01).all()
    assert np.abs(found.slopes).max() < 0.1
    assert found.error < 20.0 * sample.floor + 1e-4
    for model in range(3):
        elements, said = unique(sample, found, model)
        assert len(elements) > SIZE // 4
        assert np.mean(said == kept[model, elements]) > 0.995


@cache
def errors(made_by: Masking) -> dict[str, float]:
    sample, *_ = planted(made_by)
    return {other.name: decoded(sample, other).error for other in MASKINGS}


def test_sums_and_means_cannot_imitate_each_other() -> None:
    for made_by in MASKINGS:
        left = errors(made_by)
        others = [left[other.name] for other in MASKINGS if other.normalize != made_by.normalize]
        assert left[made_by.name] < 0.1 * min(others)


def test_free_masks_imitate_an_election_but_an_election_does_not_imitate_them() -> None:
    """What an election drops may as well have been dropped at random."""
    linear, ties, _ = MASKINGS
    assert errors(ties)[linear.name] < 2.0 * errors(ties)[ties.name]
    assert errors(linear)[linear.name] < 0.1 * errors(linear)[ties.name]


@every_masking
def test_decoys_are_not_explained(masking: Masking) -> None:
    """The same changes at other elements: what a decode can fit by its freedom alone."""
    sample, *_ = planted(masking)
    decoys = sample_of(np.roll(sample.deltas, 101, axis=1), sample.change)
    assert decoded(decoys, masking).error > 100.0 * decoded(sample, masking).error


@pytest.mark.parametrize("masking", MASKINGS[:2], ids=lambda masking: masking.name)
def test_what_is_kept_more_often_where_it_is_large_has_a_slope(masking: Masking) -> None:
    sample, *_ = planted(masking, slope=0.3)
    found = decoded(sample, masking)
    assert found.slopes == pytest.approx(0.3, abs=0.12)
    assert found.densities == pytest.approx(DENSITIES, abs=0.04)


def test_shares_do_not_depend_on_how_many_elements_tell() -> None:
    """Elements that fit several outcomes count by what is likely, so a coarse grid does not move the shares."""
    sample, *_ = planted(MASKINGS[0])
    found = decoded(sample, MASKINGS[0])
    half_cell = 1e-4
    change = np.round(sample.change / (2.0 * half_cell)) * 2.0 * half_cell
    coarse = replace(sample, change=change, half_cell=np.full(SIZE, half_cell))
    assert len(unique(coarse, found, 1)[0]) < 0.7 * len(unique(sample, found, 1)[0])
    densities, _ = kept_shares(coarse, found)
    assert densities == pytest.approx(DENSITIES, abs=0.03)

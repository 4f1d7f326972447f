"""Identification: families from sharp elements of the real mergekit's merges, before seeds and proofs."""

from __future__ import annotations

import numpy as np
import pytest

from tests.recipe.samples import changes, sample_of
from tests.recipe.tunes import MERGES, Tunes
from unmerge.recipe.depth import Part
from unmerge.recipe.identify import DECODED, FLOORS, Identified, decoy_error, identify, parameters_of
from unmerge.recipe.masks import MASKINGS, Decoding
from unmerge.recipe.sample import Sample

TENSORS = ("layers.0.self_attn.q_proj.weight", "layers.2.self_attn.v_proj.weight")
TYPES = (("bfloat16", None), ("float32", "bfloat16"))
LAYERS = 3


def found_in(tunes: Tunes, name: str, *members: str) -> tuple[Identified, Sample]:
    of = tunes.members(*members)
    sample = tunes.sample(name, of)
    return identify(sample, tunes.trial(name, of, *TENSORS), of, TYPES, LAYERS), sample


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("slerp", ("code", "math")),
        ("task_arithmetic", ("math", "code")),
        ("task_arithmetic in float32", ("math", "code", "chat")),
    ],
)
def test_what_decides_for_itself_is_tried_and_the_truth_is_first(
    tunes: Tunes, name: str, members: tuple[str, ...]
) -> None:
    found, _ = found_in(tunes, name, *members)
    assert found.masked is None
    assert found.tried[0].share == 1.0
    shares = [one.share for one in found.tried]
    assert shares == sorted(shares, reverse=True)
    leading = [one.recipe.merge_method for one in found.tried if one.share == 1.0]
    assert tunes.truth(name).merge_method in leading


def test_random_masks_are_told_from_trims_and_decoys(tunes: Tunes) -> None:
    name = "dare_linear"
    truth = {str(item.model): item.parameters for item in tunes.truth(name).models}
    members = tuple(reference.rpartition("/")[2] for reference in truth)
    found, sample = found_in(tunes, name, *members)
    assert found.tried[0].share < 0.9
    assert found.masked is not None
    [recipe, *_] = found.masked.recipes
    assert recipe.merge_method == MERGES[name].document["merge_method"]
    [part] = found.masked.parts.parameters.values()
    assert [*found.masked.parts.parameters] == [Part()]
    assert part.weights == pytest.approx([own["weight"] for own in truth.values()], abs=0.01)
    assert part.densities == pytest.approx([own["density"] for own in truth.values()], abs=0.02)
    # A decode leaves little more than rounding does; of the same changes elsewhere it leaves a hundred times as much.
    assert found.masked.parts.error < FLOORS * sample.floor + 1e-3
    assert decoy_error(sample, found.masked) > max(100.0 * found.masked.parts.error, DECODED)


def test_what_nothing_explains_has_no_masks_and_no_recipe(tunes: Tunes) -> None:
    """Fine-tunes that are not in a merge do not explain it, however free their masks are."""
    found, _ = found_in(tunes, "linear", "law", "math")
    assert found.masked is None
    assert found.tried[0].share < 0.9


def test_rescaling_is_taken_out_of_weights() -> None:
    """Where large elements are kept more often, less of the sum is missing than of the elements."""
    rng = np.random.default_rng(0)
    deltas = changes(0, 2, 20000)
    sample = sample_of(deltas, deltas[0])
    weights, densities, epsilons = np.array([0.6, 0.4]), np.array([0.5, 0.4]), np.array([0.1, 0.2])
    kept = rng.random(deltas.shape) < densities[:, None] + 2.0 * epsilons[:, None] * (sample.row_ranks - 0.5)
    rescale = np.abs(deltas).sum(axis=1) / np.abs(deltas * kept).sum(axis=1)
    assert (np.abs(rescale * densities - 1.0) > 0.05).all()  # the share of elements would not do
    slopes = 2.0 * epsilons
    summed = Decoding(MASKINGS[0], weights * rescale, np.ones(2), densities, slopes, 0.0)
    assert parameters_of(summed, sample).weights == pytest.approx(weights, rel=0.02)
    averaged = Decoding(MASKINGS[2], weights, 1.3 * rescale, densities, slopes, 0.0)
    assert parameters_of(averaged, sample).weights == pytest.approx(weights)
    assert parameters_of(averaged, sample).scale == pytest.approx(1.3, rel=0.02)
    assert parameters_of(averaged, sample).gammas == pytest.approx(epsilons)


def test_epsilons_leave_chances_between_0_and_1() -> None:
    deltas = changes(0, 2, 1000)
    steep = Decoding(MASKINGS[0], np.ones(2), np.ones(2), np.array([0.9, 0.1]), np.array([0.8, -0.3]), 0.0)
    found = parameters_of(steep, sample_of(deltas, deltas[0]))
    assert (found.gammas >= 0.0).all()
    assert (found.densities + found.gammas < 1.0).all()
    assert (found.densities - found.gammas > 0.0).all()

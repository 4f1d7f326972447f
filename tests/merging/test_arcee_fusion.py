"""arcee_fusion against mergekit's."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from mergekit.merge_methods.arcee_fusion import DynamicThresholdFusion, _compute_importance

from tests.merging.in_mergekit import SHAPES, both, checkpoints, stored_alike
from tests.merging.in_torch import HALVES_AND_SINGLE, array, same_bits, tensor
from unmerge.errors import RecipeError
from unmerge.merging.arcee_fusion import ARCEE_FUSION, SAMPLE, merge_arcee_fusion, scores, threshold, with_changes
from unmerge.merging.arithmetic import Arithmetic
from unmerge.merging.method import Group

HERE = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
METHOD = replace(ARCEE_FUSION, merge=partial(merge_arcee_fusion, lanes=HERE))
SHARE = {"BF16": 1.0, "F16": 1.0, "F32": 0.999}


@pytest.mark.parametrize("name", HALVES_AND_SINGLE)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 500)])
@pytest.mark.parametrize("away", [3e-4, 2e-3, 1e-2])
def test_scores_and_threshold_are_mergekits(name: str, shape: tuple[int, ...], away: float) -> None:
    arithmetic = Arithmetic(name)
    base, model = checkpoints(1, shape, arithmetic, away)
    theirs = _compute_importance(tensor(model, arithmetic), tensor(base, arithmetic))
    ours = scores(base, model, arithmetic, lanes=HERE)
    if name == "F32":
        # The divergence is what is left of terms a thousand times as large; logarithms are one unit apart at times.
        assert np.all(np.abs(ours - array(theirs)) <= 1e-4 * np.abs(array(theirs)))
        assert np.mean(ours == array(theirs)) > 0.3
    else:
        assert same_bits(ours, array(theirs)).all()
    limit = DynamicThresholdFusion().calculate_dynamic_threshold(theirs)
    assert threshold(array(theirs), arithmetic) == float(limit)


@pytest.mark.parametrize("name", HALVES_AND_SINGLE)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 500)])
@pytest.mark.parametrize("away", [3e-4, 2e-3, 1e-2])
def test_merges_are_mergekits(name: str, shape: tuple[int, ...], away: float) -> None:
    arithmetic = Arithmetic(name)
    base, model = checkpoints(1, shape, arithmetic, away)
    ours, theirs = both(METHOD, base, [model], arithmetic)
    assert len(shape) == 1 or 0 < np.mean(theirs != base) < 1
    assert stored_alike(ours, theirs) >= SHARE[name]
    assert same_bits(ours, theirs).mean() >= SHARE[name]


def test_a_merge_of_half_precision_is_not_half_precision() -> None:
    arithmetic = Arithmetic("BF16")
    base, model = checkpoints(1, (40, 72), arithmetic)
    ours, _ = both(METHOD, base, [model], arithmetic)
    assert not np.array_equal(ours, arithmetic.round(ours))


def test_a_sampled_threshold_moves_few_elements_and_only_those_next_to_it() -> None:
    arithmetic = Arithmetic("BF16")
    base, model = checkpoints(1, (1100, 1000), arithmetic)
    assert base.size > SAMPLE
    torch.manual_seed(0)
    ours, theirs = both(METHOD, base, [model], arithmetic)
    importance = scores(base, model, arithmetic, lanes=HERE)
    moved = ours != theirs
    assert moved.mean() < 0.005
    limit = threshold(importance, arithmetic)
    assert np.all(np.abs(importance[moved] - limit) <= 0.02 * limit)


def test_where_the_mask_is_known_the_threshold_lies_between_dropped_and_kept() -> None:
    arithmetic = Arithmetic("BF16")
    base, model = checkpoints(1, (200, 300), arithmetic)
    _, theirs = both(METHOD, base, [model], arithmetic)
    changed, importance = model != base, scores(base, model, arithmetic, lanes=HERE)
    kept = changed & (theirs != base)
    largest, smallest = importance[changed & ~kept].max(), importance[kept].min()
    assert largest < threshold(importance, arithmetic) <= smallest
    assert same_bits(with_changes(base, model, kept, arithmetic), theirs).all()


def test_what_cannot_be_merged_is_said() -> None:
    model = np.ones(3, np.float32)
    with pytest.raises(RecipeError, match=r"a: arcee_fusion takes 1 models beside the base, and 2 were given"):
        ARCEE_FUSION.merge(Group("a", model, (model, model)), Arithmetic("F32"))
    with pytest.raises(RecipeError, match=r"a: arcee_fusion needs a base model"):
        ARCEE_FUSION.merge(Group("a", None, (model,)), Arithmetic("F32"))

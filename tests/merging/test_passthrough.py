"""passthrough against mergekit's."""

from __future__ import annotations

import numpy as np
import pytest

from tests.merging.in_mergekit import SHAPES, both, checkpoints
from tests.merging.in_torch import HALVES_AND_SINGLE, same_bits
from unmerge.errors import RecipeError
from unmerge.merging.arithmetic import Arithmetic
from unmerge.merging.method import Group
from unmerge.merging.passthrough import PASSTHROUGH


@pytest.mark.parametrize("name", HALVES_AND_SINGLE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [None, 0.0, 0.77, 1.0, -1.3])
def test_is_mergekits_to_the_bit(name: str, shape: tuple[int, ...], scale: float | None) -> None:
    arithmetic = Arithmetic(name)
    models = checkpoints(0, shape, arithmetic)
    told = {} if scale is None else {"scale": (scale,)}
    ours, theirs = both(PASSTHROUGH, None, models, arithmetic, told)
    assert same_bits(ours, theirs).all()


def test_a_scale_of_none_is_no_scale_and_two_models_are_too_many() -> None:
    model = np.ones(3, np.float32)
    merged = PASSTHROUGH.merge(Group("a", None, (model,), {"scale": (None,)}), Arithmetic("F32"))
    assert np.array_equal(merged, model)
    assert not np.shares_memory(merged, model)
    with pytest.raises(RecipeError, match=r"a: passthrough takes 1 models, and 2 were given"):
        PASSTHROUGH.merge(Group("a", None, (model, model)), Arithmetic("F32"))

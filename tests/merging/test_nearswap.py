"""nearswap against mergekit's."""

from __future__ import annotations

import numpy as np
import pytest

from tests.merging.in_mergekit import SHAPES, both, checkpoints
from tests.merging.in_torch import HALVES_AND_SINGLE, same_bits
from unmerge.errors import RecipeError
from unmerge.merging.arithmetic import Arithmetic
from unmerge.merging.method import Group
from unmerge.merging.nearswap import NEARSWAP


@pytest.mark.parametrize("name", HALVES_AND_SINGLE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [0.0, 1e-4, 2e-3, 0.5, -1e-3])
def test_is_mergekits_to_the_bit(name: str, shape: tuple[int, ...], t: float) -> None:
    arithmetic = Arithmetic(name)
    base, model = checkpoints(1, shape, arithmetic)
    model.flat[::3] = base.flat[::3]  # where a model did not change, float16 makes no number of a t of 0
    ours, theirs = both(NEARSWAP, base, [model], arithmetic, t=t)
    assert same_bits(ours, theirs).all()


def test_moves_the_base_by_t_at_most_and_onto_the_model_where_that_is_nearer() -> None:
    arithmetic = Arithmetic("F64")
    base, model = checkpoints(1, (50, 60), arithmetic)
    merged, t = NEARSWAP.merge(Group("a", base, (model,), shared={"t": 1e-3}), arithmetic), 1e-3
    near = np.abs(model - base) <= t
    assert 0.1 < near.mean() < 0.9
    assert np.allclose(merged[near], model[near], rtol=0, atol=1e-15)
    assert np.allclose(np.abs(merged - base)[~near], t, rtol=1e-9)


def test_what_cannot_be_merged_is_said() -> None:
    model = np.ones(3, np.float32)
    with pytest.raises(RecipeError, match=r"a: nearswap takes 1 models beside the base, and 2 were given"):
        NEARSWAP.merge(Group("a", model, (model, model), shared={"t": 0.5}), Arithmetic("F32"))

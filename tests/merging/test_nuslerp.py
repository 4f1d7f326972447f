"""nuslerp against mergekit's."""

from __future__ import annotations

import numpy as np
import pytest

from tests.merging.in_mergekit import SHAPES, both, checkpoints, stored_alike
from tests.merging.in_torch import HALVES_AND_SINGLE, same_bits
from unmerge.errors import RecipeError
from unmerge.merging.arithmetic import Arithmetic
from unmerge.merging.method import Group
from unmerge.merging.nuslerp import NUSLERP

WAYS = ({}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True})


@pytest.mark.parametrize("name", HALVES_AND_SINGLE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS, ids=["whole", "last axis", "first axis"])
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("away", [5e-4, 1e-2])
def test_is_mergekits(name: str, shape: tuple[int, ...], way: dict[str, bool], with_base: bool, away: float) -> None:
    arithmetic = Arithmetic(name)
    base, *models = checkpoints(2, shape, arithmetic, away)
    of_models = {"weight": (0.6, 0.3)}
    ours, theirs = both(NUSLERP, base if with_base else None, models, arithmetic, of_models, **way)
    assert stored_alike(ours, theirs) >= 0.999
    if name == "F32":
        # Vectors of three elements may be nearly opposite, which costs digits.
        units = 1000 if len(shape) == 3 and "nuslerp_row_wise" in way else 8
        assert np.all(np.abs(ours - theirs) <= units * 2.0**-23 * (np.abs(models[0]) + np.abs(models[1])))
    else:
        assert same_bits(ours, theirs).all()


@pytest.mark.parametrize("weights", [(0.5, -0.5), (1.0, 0.0), (0.0, 1.0), (-0.2, 0.7)])
def test_weights_of_all_signs(weights: tuple[float, float]) -> None:
    arithmetic = Arithmetic("BF16")
    base, *models = checkpoints(2, (30, 40), arithmetic)
    ours, theirs = both(NUSLERP, base, models, arithmetic, {"weight": weights})
    assert same_bits(ours, theirs).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_the_cosine_of_a_large_tensor_depends_on_threads_and_is_followed(threads: int) -> None:
    arithmetic = Arithmetic("BF16", threads)
    _, *models = checkpoints(2, (400, 300), arithmetic, 1e-3)
    ours, theirs = both(NUSLERP, None, models, arithmetic, {"weight": (0.6, 0.3)})
    assert same_bits(ours, theirs).all()


def test_a_model_that_did_not_change() -> None:
    arithmetic = Arithmetic("BF16")
    base, model = checkpoints(1, (30, 40), arithmetic)
    for way in WAYS:
        ours, theirs = both(NUSLERP, base, [base, model], arithmetic, {"weight": (0.6, 0.3)}, **way)
        assert same_bits(ours, theirs).all()


def test_what_cannot_be_merged_is_said() -> None:
    model = np.ones(3, np.float32)
    with pytest.raises(RecipeError, match=r"a: nuslerp takes 2 models, and 1 were given"):
        NUSLERP.merge(Group("a", None, (model,), {"weight": (1.0,)}), Arithmetic("F32"))
    shared = {"nuslerp_flatten": True, "nuslerp_row_wise": False}
    with pytest.raises(
        RecipeError, match=r"nuslerp needs weight for every model, and 1 values were given for 2 models"
    ):
        NUSLERP.merge(Group("a", None, (model, model), {"weight": (1.0, None)}, shared), Arithmetic("F32"))

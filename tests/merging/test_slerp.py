"""slerp against mergekit's."""

from __future__ import annotations

import numpy as np
import pytest

from tests.merging.in_mergekit import SHAPES, both, checkpoints, stored_alike
from tests.merging.in_torch import HALVES_AND_SINGLE, same_bits
from unmerge.errors import RecipeError
from unmerge.merging.arithmetic import Arithmetic
from unmerge.merging.method import Group
from unmerge.merging.slerp import COLLINEAR, SLERP, coefficients

NEAR, FAR = 5e-4, 1e-2


@pytest.mark.parametrize("name", HALVES_AND_SINGLE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [0.0, 0.3, 0.77, 1.0])
def test_nearly_parallel_models_are_interpolated_linearly_to_the_bit(
    name: str, shape: tuple[int, ...], t: float
) -> None:
    arithmetic = Arithmetic(name)
    base, model = checkpoints(1, shape, arithmetic, NEAR)
    ours, theirs = both(SLERP, base, [model], arithmetic, t=t)
    assert same_bits(ours, theirs).all()


@pytest.mark.parametrize("name", HALVES_AND_SINGLE)
@pytest.mark.parametrize("shape", [*SHAPES, (1500, 1000)])
@pytest.mark.parametrize("t", [0.3, 0.77])
def test_other_models_are_interpolated_on_the_sphere(name: str, shape: tuple[int, ...], t: float) -> None:
    arithmetic = Arithmetic(name)
    base, model = checkpoints(1, shape, arithmetic, FAR)
    ours, theirs = both(SLERP, base, [model], arithmetic, t=t)
    if name == "F32":
        assert np.all(np.abs(ours - theirs) <= 2 * 2.0**-23 * (np.abs(base) + np.abs(model)))
    assert np.mean(ours == theirs) >= (0.3 if name == "F32" else 0.999)
    assert stored_alike(ours, theirs) >= 0.999


def test_coefficients_keep_the_norm_of_unit_vectors() -> None:
    rng = np.random.default_rng(0)
    working = Arithmetic("F64")
    base, model = (vector / np.linalg.norm(vector) for vector in rng.standard_normal((2, 500)))
    assert abs(base @ model) < COLLINEAR
    of_base, of_model = coefficients(base, model, 0.3, working)
    merged = of_base * base + of_model * model
    assert np.linalg.norm(merged) == pytest.approx(1, rel=1e-12)
    assert np.arccos(base @ merged) == pytest.approx(0.3 * np.arccos(base @ model), rel=1e-9)


def test_zeros_and_nothing_at_all() -> None:
    arithmetic = Arithmetic("F32")
    (model,) = checkpoints(0, (30,), arithmetic)
    ours, theirs = both(SLERP, np.zeros_like(model), [model], arithmetic, t=0.5)
    assert np.allclose(ours, theirs, rtol=1e-6, atol=0)
    ours, theirs = both(SLERP, model[:0], [model[:0]], arithmetic, t=0.5)
    assert ours.shape == theirs.shape == (0,)


def test_what_cannot_be_merged_is_said() -> None:
    model = np.ones(3, np.float32)
    with pytest.raises(RecipeError, match=r"a: slerp needs a base model, and there is none: give base_model"):
        SLERP.merge(Group("a", None, (model,), shared={"t": 0.5}), Arithmetic("F32"))
    with pytest.raises(RecipeError, match=r"a: slerp takes 1 models beside the base, and 2 were given"):
        SLERP.merge(Group("a", model, (model, model), shared={"t": 0.5}), Arithmetic("F32"))
    with pytest.raises(RecipeError, match=r"a: slerp needs t, and none was given"):
        SLERP.merge(Group("a", model, (model,), shared={"t": None}), Arithmetic("F32"))

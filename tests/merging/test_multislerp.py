"""multislerp against mergekit's."""

from __future__ import annotations

import numpy as np
import pytest

from tests.merging.in_mergekit import SHAPES, both, checkpoints, mergekit, stored_alike
from tests.merging.in_torch import HALVES_AND_SINGLE, same_bits
from unmerge.errors import RecipeError
from unmerge.merging.arithmetic import Arithmetic
from unmerge.merging.method import Group
from unmerge.merging.multislerp import MULTISLERP

WEIGHTS = (0.6, 0.3, 0.8, 0.25)


@pytest.mark.parametrize("name", HALVES_AND_SINGLE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_is_mergekits(name: str, shape: tuple[int, ...], count: int, with_base: bool, normalize: bool) -> None:
    arithmetic = Arithmetic(name)
    base, *models = checkpoints(count, shape, arithmetic)
    told = {"weight": WEIGHTS[:count]}
    chosen = base if with_base else None
    ours, theirs = both(MULTISLERP, chosen, models, arithmetic, told, normalize_weights=normalize)
    if name == "F32":
        assert np.all(np.abs(ours - theirs) <= 4 * 2.0**-23 * np.abs(models).max(axis=0))
        assert stored_alike(ours, theirs) >= 0.999
    else:
        assert same_bits(ours, theirs).all()


@pytest.mark.parametrize("name", HALVES_AND_SINGLE)
@pytest.mark.parametrize("threads", [1, 3])
def test_norms_of_large_tensors_lose_what_mergekits_do(name: str, threads: int) -> None:
    arithmetic = Arithmetic(name, threads)
    _, *models = checkpoints(3, (1100, 1000) if threads == 1 else (300, 400), arithmetic)
    ours, theirs = both(MULTISLERP, None, models, arithmetic, {"weight": WEIGHTS[:3]})
    assert same_bits(ours, theirs).mean() >= (0.3 if name == "F32" else 1)
    assert stored_alike(ours, theirs) >= 0.999


def test_two_opposite_changes_are_interpolated_linearly() -> None:
    arithmetic = Arithmetic("F32")
    base = np.zeros((4, 8), np.float32)
    change = checkpoints(0, (4, 8), arithmetic)[0]
    ours, theirs = both(MULTISLERP, base, [change, -change], arithmetic, {"weight": (0.5, 0.5)})
    assert same_bits(ours, theirs).all()
    ours, theirs = both(MULTISLERP, base, [base, base], arithmetic, {"weight": (0.5, 0.5)})
    assert same_bits(ours, theirs).all()


def test_no_direction_is_refused_as_by_mergekit() -> None:
    arithmetic, weights = Arithmetic("BF16"), {"weight": (1.0, 1.0, 1.0)}
    (base,) = checkpoints(0, (4, 8), arithmetic)
    with pytest.raises(ValueError, match="weighted sum of the input tensors is zero"):
        mergekit(MULTISLERP, base, [base] * 3, arithmetic, weights, {})
    group = Group("a", base, (base,) * 3, weights, {"normalize_weights": True, "eps": 1e-8})
    with pytest.raises(RecipeError, match=r"a: task vectors are zero or cancel, so multislerp has no direction"):
        MULTISLERP.merge(group, arithmetic)


def test_float16_knows_no_eps_and_makes_no_numbers_of_zeros() -> None:
    arithmetic = Arithmetic("F16")
    (base,) = checkpoints(0, (4, 8), arithmetic)
    ours, theirs = both(MULTISLERP, base, [base] * 3, arithmetic, {"weight": (1.0, 1.0, 1.0)})
    assert np.isnan(theirs).all()
    assert np.isnan(ours).all()

"""karcher against mergekit's, and against what a Karcher mean is."""

from __future__ import annotations

import numpy as np
import pytest

from tests.merging.in_mergekit import SHAPES, both, checkpoints, stored_alike
from tests.merging.in_torch import HALVES_AND_SINGLE, same_bits
from unmerge.errors import RecipeError
from unmerge.merging.arithmetic import Arithmetic
from unmerge.merging.karcher import KARCHER
from unmerge.merging.method import Group


@pytest.mark.parametrize("name", HALVES_AND_SINGLE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("away", [5e-4, 2e-2])
def test_is_mergekits(name: str, shape: tuple[int, ...], count: int, away: float) -> None:
    arithmetic = Arithmetic(name)
    models = checkpoints(count - 1, shape, arithmetic, away)
    ours, theirs = both(KARCHER, None, models, arithmetic)
    if name == "F32":
        assert np.all(np.abs(ours - theirs) <= 16 * 2.0**-23 * np.abs(models).max(axis=0))
        assert stored_alike(ours, theirs) >= 0.999
    else:
        assert same_bits(ours, theirs).all()


@pytest.mark.parametrize("name", HALVES_AND_SINGLE)
def test_a_large_tensor(name: str) -> None:
    arithmetic = Arithmetic(name)
    models = checkpoints(1, (500, 300), arithmetic)
    ours, theirs = both(KARCHER, None, models, arithmetic, max_iter=2)
    assert same_bits(ours, theirs).mean() >= (0.05 if name == "F32" else 1)
    assert stored_alike(ours, theirs) >= 0.999


@pytest.mark.parametrize("told", [{"max_iter": 0}, {"max_iter": 1}, {"tol": 0.5}, {"tol": 1e-9}])
def test_parameters_are_mergekits(told: dict[str, float]) -> None:
    arithmetic = Arithmetic("BF16")
    models = checkpoints(2, (40, 72), arithmetic, 2e-2)
    ours, theirs = both(KARCHER, None, models, arithmetic, **told)
    assert same_bits(ours, theirs).all()


def test_is_the_point_where_the_pulls_of_all_models_cancel() -> None:
    arithmetic = Arithmetic("F64")
    models = checkpoints(3, (300,), arithmetic, 1e-2)
    group = Group("a", None, tuple(models), shared={"max_iter": 100, "tol": 1e-12})
    merged = KARCHER.merge(group, arithmetic)
    assert np.linalg.norm(merged) == pytest.approx(np.mean([np.linalg.norm(model) for model in models]), rel=1e-12)
    mean = merged / np.linalg.norm(merged)
    pull = np.zeros_like(mean)
    for model in models:
        unit = model / np.linalg.norm(model)
        away = unit - (unit @ mean) * mean
        pull += np.arccos(unit @ mean) * away / np.linalg.norm(away)
    assert np.linalg.norm(pull) < 1e-9


def test_models_of_zeros_do_not_count_but_for_the_norm() -> None:
    arithmetic = Arithmetic("BF16")
    (model,) = checkpoints(0, (30,), arithmetic)
    zeros = np.zeros_like(model)
    ours, theirs = both(KARCHER, None, [model, zeros], arithmetic)
    assert same_bits(ours, theirs).all()
    ours, theirs = both(KARCHER, None, [zeros, zeros], arithmetic)
    assert same_bits(ours, theirs).all()


def test_opposite_models_have_the_first_one_as_their_mean() -> None:
    arithmetic = Arithmetic("BF16")
    (model,) = checkpoints(0, (30,), arithmetic)
    ours, theirs = both(KARCHER, None, [model, -model], arithmetic, max_iter=0)
    assert same_bits(ours, theirs).all()


def test_nothing_to_merge_is_said() -> None:
    with pytest.raises(RecipeError, match=r"a: karcher takes at least 1 models, and 0 were given"):
        KARCHER.merge(Group("a", None, ()), Arithmetic("F32"))

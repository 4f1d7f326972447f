"""ram and ramplus_tl against mergekit's."""

from __future__ import annotations

import numpy as np
import pytest

from tests.merging.in_mergekit import SHAPES, both, checkpoints
from tests.merging.in_torch import HALVES_AND_SINGLE, same_bits
from unmerge.errors import RecipeError
from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.method import Group
from unmerge.merging.ram import RAM, RAMPLUS_TL, rescaling


def sparse(count: int, shape: tuple[int, ...], arithmetic: Arithmetic) -> list[Array]:
    """Models that changed some elements alone, some together, some not."""
    base, *models = checkpoints(count, shape, arithmetic)
    rng = np.random.default_rng(7)
    return [base, *(np.where(rng.random(shape) < 0.4, model, base) for model in models)]


@pytest.mark.parametrize("name", HALVES_AND_SINGLE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("epsilon", [1e-5, 7e-4, 0.0])
def test_ram_is_mergekits_to_the_bit(name: str, shape: tuple[int, ...], count: int, epsilon: float) -> None:
    arithmetic = Arithmetic(name)
    base, *models = sparse(count, shape, arithmetic)
    ours, theirs = both(RAM, base, models, arithmetic, epsilon=epsilon)
    assert same_bits(ours, theirs).all()


@pytest.mark.parametrize("name", [*HALVES_AND_SINGLE, "F64"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("told", [{}, {"r": 0.7, "alpha": 5.0, "epsilon": 7e-4}, {"alpha": 1e9, "epsilon": 1e-3}])
def test_ramplus_is_mergekits_to_the_bit(name: str, shape: tuple[int, ...], count: int, told: dict[str, float]) -> None:
    arithmetic = Arithmetic(name)
    base, *models = sparse(count, shape, arithmetic)
    ours, theirs = both(RAMPLUS_TL, base, models, arithmetic, **told)
    assert same_bits(ours, theirs).all()


def test_ramplus_of_half_precision_is_not_half_precision() -> None:
    arithmetic = Arithmetic("BF16")
    base, *models = sparse(3, (40, 72), arithmetic)
    ours, _ = both(RAMPLUS_TL, base, models, arithmetic)
    assert not np.array_equal(ours, arithmetic.round(ours))


def test_a_model_that_shares_all_its_changes_is_not_rescaled_beyond_alpha() -> None:
    active = np.array([[True, True, False], [True, True, True]])
    assert rescaling(active, 0.5, 0.2, 1e-5) == pytest.approx([1.1, 1.1])
    assert rescaling(active, 0.5, 10.0, 1e-5)[1] == pytest.approx(1 + 0.5 * 2)
    assert rescaling(active[:1], 0.5, 10.0, 1e-5) == pytest.approx([1.0])


def test_no_models_leave_the_base_and_no_base_is_said() -> None:
    base = np.ones(3, np.float32)
    for method in (RAM, RAMPLUS_TL):
        assert np.array_equal(method.merge(Group("a", base, ()), Arithmetic("F32")), base)
        with pytest.raises(RecipeError, match=rf"a: {method.name} needs a base model"):
            method.merge(Group("a", None, (base,)), Arithmetic("F32"))

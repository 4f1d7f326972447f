"""model_stock against mergekit's, and against what its paper says."""

from __future__ import annotations

import numpy as np
import pytest

from tests.merging.in_mergekit import SHAPES, both, checkpoints, stored_alike
from tests.merging.in_torch import HALVES_AND_SINGLE, same_bits
from unmerge.errors import RecipeError
from unmerge.merging.arithmetic import Arithmetic
from unmerge.merging.method import Group
from unmerge.merging.model_stock import MODEL_STOCK, interpolation


@pytest.mark.parametrize("name", HALVES_AND_SINGLE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("filter_wise", [True, False])
def test_is_mergekits_to_the_bit(name: str, shape: tuple[int, ...], count: int, filter_wise: bool) -> None:
    arithmetic = Arithmetic(name)
    base, *models = checkpoints(count, shape, arithmetic)
    ours, theirs = both(MODEL_STOCK, base, models, arithmetic, filter_wise=filter_wise)
    assert same_bits(ours, theirs).all()


@pytest.mark.parametrize("name", HALVES_AND_SINGLE)
@pytest.mark.parametrize("threads", [1, 3])
def test_large_tensors_and_threads(name: str, threads: int) -> None:
    arithmetic = Arithmetic(name, threads)
    base, *models = checkpoints(3, (700, 300), arithmetic)
    ours, theirs = both(MODEL_STOCK, base, models, arithmetic)
    assert same_bits(ours, theirs).all()
    assert stored_alike(ours, theirs) == 1


@pytest.mark.parametrize("name", HALVES_AND_SINGLE)
def test_models_that_did_not_change_or_are_opposite(name: str) -> None:
    arithmetic = Arithmetic(name)
    base, model = checkpoints(1, (30, 40), arithmetic)
    opposite = arithmetic.round(2 * base - model)
    for models in ([base, model], [base, base], [model, model], [model, opposite]):
        for filter_wise in (True, False):
            ours, theirs = both(MODEL_STOCK, base, models, arithmetic, filter_wise=filter_wise)
            assert same_bits(ours, theirs).all()


def test_the_interpolation_is_the_papers_and_keeps_the_base_where_it_has_none() -> None:
    arithmetic = Arithmetic("F64")
    cosine = np.array([0.0, 0.25, 1.0, -0.5])
    assert interpolation(cosine, 3, arithmetic) == pytest.approx([0, 3 * 0.25 / 1.5, 1, 0])
    assert interpolation(np.array([-1.0]), 2, arithmetic) == 0


def test_what_cannot_be_merged_is_said() -> None:
    model = np.ones(3, np.float32)
    with pytest.raises(RecipeError, match=r"a: model_stock takes at least 2 models beside the base, and 1 were given"):
        MODEL_STOCK.merge(Group("a", model, (model,), shared={"filter_wise": False}), Arithmetic("F32"))
    with pytest.raises(RecipeError, match=r"a: model_stock needs a base model"):
        MODEL_STOCK.merge(Group("a", None, (model,) * 2, shared={"filter_wise": False}), Arithmetic("F32"))

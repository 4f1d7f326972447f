from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.merging.in_torch import HALVES_AND_SINGLE, TYPES
from unmerge.errors import RecipeError
from unmerge.merging.arithmetic import Arithmetic
from unmerge.merging.draws import KeptDraws, TorchDraws, bernoulli

SEEDS = [0, 1, 42, 2**32 - 1, 2**32, 2**40 + 5, -1]
SIZES = [1, 3, 8, 15, 16, 17, 1000]
every_type = pytest.mark.parametrize("name", HALVES_AND_SINGLE)


@pytest.mark.parametrize("seed", SEEDS)
def test_draws_are_uniform_numbers_of_torch(seed: int) -> None:
    torch.manual_seed(seed)
    # Below 16 elements torch takes one output for each.
    theirs = torch.cat([torch.rand(15) for _ in range(100)])
    assert (TorchDraws(seed).take(1500) / 2.0**24 == theirs.numpy()).all()


def test_skipping_and_taking_in_parts_is_one_stream() -> None:
    whole = TorchDraws(7).take(1_500_000)
    draws = TorchDraws(7)
    first = draws.take(3)
    draws.skip(1_200_000)
    assert (first == whole[:3]).all()
    assert (draws.take(299_997) == whole[1_200_003:]).all()


@every_type
@pytest.mark.parametrize("probability", [0.0, 0.1, 0.3, 0.5, 0.7, 0.998, 1.0])
def test_masks_of_one_probability_are_torch_s(name: str, probability: float) -> None:
    torch.manual_seed(11)
    draws = TorchDraws(11)
    for size in SIZES:
        theirs = torch.bernoulli(torch.full((2, size), probability, dtype=TYPES[name]))
        assert (bernoulli(draws, probability, (2, size), Arithmetic(name)) == theirs.bool().numpy()).all()


@every_type
def test_masks_of_many_probabilities_are_torch_s(name: str) -> None:
    arithmetic = Arithmetic(name)
    torch.manual_seed(11)
    draws = TorchDraws(11)
    for size in SIZES:
        probabilities = arithmetic.round(np.random.default_rng(size).random((3, size)))
        theirs = torch.bernoulli(torch.from_numpy(probabilities).to(TYPES[name]))
        assert (bernoulli(draws, probabilities, (3, size), arithmetic) == theirs.bool().numpy()).all()


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_refuses_what_is_no_probability(probability: float) -> None:
    with pytest.raises(RecipeError, match="not between 0 and 1"):
        bernoulli(TorchDraws(0), probability, (3,), Arithmetic("F32"))


def test_kept_draws_are_the_stream_as_often_as_it_is_asked_for() -> None:
    whole, kept = TorchDraws(7).take(100), KeptDraws(TorchDraws(7))
    for parts in ([10, 5], [100], [1, 60, 39]):
        again = kept.again()
        assert (np.concatenate([again.take(count) for count in parts]) == whole[: sum(parts)]).all()

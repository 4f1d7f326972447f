from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from tests.merging.in_torch import TYPES, array, same_bits, tensor
from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.summation import column_blocks, row_means, sum_of_models, whole_sum

SIZES = [1, 2, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 100, 1000, 4097, 32767, 32768, 70001]
COLUMNS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 40, 64, 65, 1000]
every_type = pytest.mark.parametrize("name", TYPES)


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def cancelling(shape: tuple[int, ...], arithmetic: Arithmetic) -> Array:
    """Numbers whose sums along the first axis nearly vanish, so that their bits tell the order of adding."""
    values = np.random.default_rng(sum(shape)).standard_normal(shape)
    values[-1] -= values.sum(axis=0)
    return arithmetic.round(values)


@every_type
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_whole_sums_are_torch_s(name: str, threads: int, torch_threads: Callable[[int], None]) -> None:
    torch_threads(threads)
    arithmetic = Arithmetic(name, threads)
    for size in SIZES:
        for values in (cancelling((size,), arithmetic), np.abs(cancelling((size,), arithmetic))):
            assert same_bits(whole_sum(values, arithmetic), array(tensor(values, arithmetic).sum())).all(), size


def test_the_order_of_adding_matters_here() -> None:
    single = Arithmetic("F32")
    values = [cancelling((size,), single) for size in SIZES]
    assert sum(whole_sum(v, single) != v.sum() for v in values) > len(SIZES) // 2
    assert sum(whole_sum(v, single) != whole_sum(v, Arithmetic("F32", 2)) for v in values if v.size > 32768) > 0


@every_type
@pytest.mark.parametrize("threads", [1, 4])
def test_means_of_rows_are_torch_s(name: str, threads: int, torch_threads: Callable[[int], None]) -> None:
    torch_threads(threads)
    arithmetic = Arithmetic(name, threads)
    for rows in (1, 2, 5):
        for size in SIZES:
            values = np.square(cancelling((rows, size), arithmetic))
            values = arithmetic.round(values)
            assert same_bits(row_means(values, arithmetic), array(tensor(values, arithmetic).mean(dim=1))).all()


@every_type
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 8, 9, 17, 40])
def test_sums_of_models_are_torch_s(name: str, count: int) -> None:
    arithmetic = Arithmetic(name)
    for columns in COLUMNS:
        values = cancelling((count, columns), arithmetic)
        assert same_bits(sum_of_models(values, arithmetic), array(tensor(values, arithmetic).sum(dim=0))).all()


@pytest.mark.parametrize("shape", [(3,), (6,), (20,), (6, 3, 5), (2, 1, 1)])
def test_sums_of_models_have_the_shape_of_one(shape: tuple[int, ...]) -> None:
    single = Arithmetic("F32")
    values = cancelling(shape, single)
    assert same_bits(sum_of_models(values, single), array(tensor(values, single).sum(dim=0))).all()


@pytest.mark.parametrize("columns", [0, 1, 5, 16383, 16384, 16385, 32767, 32768, 32773, 70007])
def test_blocks_of_columns_sum_as_the_whole(columns: int) -> None:
    single = Arithmetic("F32")
    values = cancelling((6, columns), single)
    parts = [sum_of_models(values[:, block], single) for block in column_blocks(columns)]
    assert same_bits(np.concatenate(parts), sum_of_models(values, single)).all()

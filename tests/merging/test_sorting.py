from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmerge.merging.arithmetic import Array
from unmerge.merging.sorting import at_positions, smallest, sorted_order, tied

seeds = st.integers(0, 2**32 - 1)
sizes = st.sampled_from([1, 2, 3, 4, 5, 16, 17, 33, 100, 1000, 20000])
# From all equal to hardly two that are.
spreads = st.sampled_from([1, 2, 5, 50, 10**6])


def magnitudes(seed: int, size: int, spread: int) -> Array:
    return np.random.default_rng(seed).integers(0, spread, size=size).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (40, 17), (3, 3000), (1, 50000), (0, 5)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("descending", [False, True])
def test_rows_are_sorted_as_torch_sorts_them(shape: tuple[int, int], dtype: type, descending: bool) -> None:
    rows = np.random.default_rng(1).integers(0, 40, size=shape).astype(dtype)
    theirs = torch.argsort(torch.from_numpy(rows), dim=1, descending=descending)
    assert (sorted_order(rows, descending=descending) == theirs.numpy()).all()


@settings(deadline=None, max_examples=60)
@given(seed=seeds, size=sizes, spread=spreads, first=st.floats(0, 1), share=st.floats(0, 1), descending=st.booleans())
def test_positions_hold_what_torch_puts_there(
    seed: int, size: int, spread: int, first: float, share: float, descending: bool
) -> None:
    values = magnitudes(seed, size, spread)
    start = int(first * size)
    stop = start + int(share * (size - start))
    theirs = np.zeros(size, dtype=bool)
    theirs[torch.argsort(torch.from_numpy(values), descending=descending).numpy()[start:stop]] = True
    assert (at_positions(values, start, stop, descending=descending) == theirs).all()


@settings(deadline=None, max_examples=100)
@given(seed=seeds, size=sizes, spread=spreads, share=st.floats(0, 1) | st.floats(0, 0.02))
def test_the_smallest_are_those_of_topk(seed: int, size: int, spread: int, share: float) -> None:
    values = magnitudes(seed, size, spread)
    count = int(share * size)
    theirs = np.zeros(size, dtype=bool)
    theirs[torch.topk(torch.from_numpy(values), count, largest=False).indices.numpy()] = True
    assert (smallest(values, count) == theirs).all()


@settings(deadline=None, max_examples=60)
@given(seed=seeds, size=sizes, spread=spreads, first=st.floats(0, 1), share=st.floats(0, 1))
def test_only_ties_are_free(seed: int, size: int, spread: int, first: float, share: float) -> None:
    values = magnitudes(seed, size, spread)
    start = int(first * size)
    stop = start + int(share * (size - start))
    free = tied(values, start, stop)
    orders = np.argsort(values, kind="stable"), size - 1 - np.argsort(values[::-1], kind="stable")
    kept = np.zeros((2, size), dtype=bool)
    for row, order in zip(kept, orders, strict=True):
        row[order[start:stop]] = True
    # Two sorts agree but on ties, and each value that is free is inside as well as outside.
    assert (kept[0] == kept[1])[~free].all()
    for value in np.unique(values[free]):
        inside = kept[0][values == value]
        assert inside.any()
        assert not inside.all()

"""Sharp elements: ranks against scipy's, grids against torch's, and what is read against what is there."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.stats import rankdata

from unmerge.checkpoint.dtypes import DTYPES, FloatArray
from unmerge.recipe import sample
from unmerge.recipe.sample import ELEMENTS, READ, SHARP, ReadRows, Sample, draw_sample, larger, sample_tensor
from unmerge.testing import quantise

BF16 = DTYPES["BF16"]
Tensors = dict[str, FloatArray]


def reader(tensors: Tensors, seen: list[tuple[str, int, int]] | None = None) -> ReadRows:
    def read(name: str, start: int, stop: int) -> FloatArray:
        if seen is not None:
            seen.append((name, start, stop))
        return tensors[name][start:stop]

    return read


def family(shapes: dict[str, tuple[int, int]], changed: Callable[[str], bool] = lambda _: True) -> list[Tensors]:
    """A base, two fine-tunes and their sum, in bfloat16."""
    rng = np.random.default_rng(0)
    base = {name: quantise(0.05 * rng.standard_normal(shape), "BF16") for name, shape in shapes.items()}
    tunes = [
        {name: quantise(v + changed(name) * 4e-4 * rng.standard_t(4, v.shape), "BF16") for name, v in base.items()}
        for _ in range(2)
    ]
    target = {name: quantise(tunes[0][name] + tunes[1][name] - v, "BF16") for name, v in base.items()}
    return [base, target, *tunes]


def drawn(tensors: list[Tensors]) -> Sample:
    base, target, *tunes = tensors
    shapes = {name: (value.shape[0], value.shape[1]) for name, value in base.items()}
    return draw_sample(shapes, dict.fromkeys(shapes, BF16), reader(base), reader(target), [reader(t) for t in tunes])


@given(arrays.arrays(np.float64, st.integers(1, 60), elements=st.integers(0, 9).map(float)))
def test_larger_shares_are_scipys_ranks(magnitudes: FloatArray) -> None:
    count = len(magnitudes)
    assert larger(magnitudes) == pytest.approx((count - (rankdata(magnitudes, method="average") - 0.5)) / count)


def test_elements_and_ranks_are_those_of_the_tensor() -> None:
    tensors = family({"a": (40, 50), "b": (30, 20)})
    base, target, *tunes = tensors
    found = drawn(tensors)
    assert found.names == ("a", "b")
    for number, name in enumerate(found.names):
        own = found.of([number])
        deltas = np.stack([tune[name] - base[name] for tune in tunes])
        magnitudes = np.abs(deltas)
        stored = torch.from_numpy(target[name]).bfloat16().abs()
        half = 0.5 * (torch.nextafter(stored, torch.full_like(stored, torch.inf)) - stored).double().numpy()
        sharp = half < SHARP * magnitudes.max(axis=0)
        assert 0.05 < sharp.mean() < 0.95
        assert np.array_equal(own.change, (target[name] - base[name])[sharp])
        assert np.array_equal(own.deltas, deltas[:, sharp])
        assert np.array_equal(own.half_cell, half[sharp])
        expected = [1.0 - (rankdata(size, axis=None) - 0.5) / size.size for size in magnitudes]
        assert own.ranks == pytest.approx(np.stack([ranks.reshape(half.shape)[sharp] for ranks in expected]))
        spread = 1.0 - (rankdata(deltas.var(axis=0), axis=None) - 0.5) / half.size
        assert own.spread_ranks == pytest.approx(spread.reshape(half.shape)[sharp])
        in_rows = np.stack([(rankdata(size, method="ordinal", axis=1) - 1) for size in magnitudes])
        in_rows = in_rows / (half.shape[1] - 1)
        assert own.row_ranks == pytest.approx(in_rows[:, sharp])
        heavy = [np.average(ranks, weights=size) for ranks, size in zip(in_rows, magnitudes, strict=True)]
        assert found.heavy_ranks[:, number] == pytest.approx(np.array(heavy))


def test_the_floor_is_what_rounding_leaves() -> None:
    """Of a target that was rounded once from a known change, rounding is all that is between the two."""
    rng = np.random.default_rng(1)
    base = {"a": quantise(0.05 * rng.standard_normal((200, 300)), "BF16")}
    tune = {"a": base["a"] + 4e-4 * rng.standard_t(4, (200, 300))}
    target = {"a": torch.from_numpy(tune["a"]).bfloat16().double().numpy()}
    found = drawn([base, target, tune])
    left = found.change - found.deltas[0]
    assert left @ left / found.energy == pytest.approx(found.floor, rel=0.1)


def test_of_large_tensors_some_rows_are_read_and_ranks_are_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "READ", READ // 8)
    monkeypatch.setattr(sample, "ELEMENTS", ELEMENTS // 3)
    base, target, *tunes = family({"a": (900, 200)})
    seen: list[tuple[str, int, int]] = []
    rng = np.random.default_rng(2)
    found = sample_tensor("a", (900, 200), BF16, reader(base, seen), reader(target), [reader(t) for t in tunes], rng)
    assert found is not None
    assert sum(stop - start for _, start, stop in seen) == READ // 8 // 200
    assert all(one[2] < other[1] for one, other in pairwise(seen))  # neighbours at once
    assert len(found.change) == ELEMENTS // 3
    # Changes were drawn from one distribution, so a rank of part of the tensor is one of all of it.
    magnitudes = np.abs(tunes[0]["a"] - base["a"]).ravel()
    order, first = np.unique(magnitudes, return_index=True)
    whole = larger(magnitudes)[first][np.searchsorted(order, np.abs(found.deltas[0]))]
    assert np.abs(found.ranks[0] - whole).max() < 0.02


def test_tensors_that_nothing_changed_are_left_out_and_the_order_of_names_does_not_matter() -> None:
    tensors = family({"b": (20, 30), "a": (20, 30), "c": (5, 40)}, changed=lambda name: name != "a")
    found = drawn(tensors)
    assert found.names == ("b", "c")
    again = drawn([{name: one[name] for name in sorted(one)} for one in tensors])
    assert all(
        np.array_equal(getattr(found, name), getattr(again, name)) for name in Sample.__slots__ if name != "names"
    )


def test_nothing_sharp_is_an_empty_sample() -> None:
    tensors = family({"a": (20, 30)}, changed=lambda _: False)
    found = drawn(tensors)
    assert (found.change.shape, found.deltas.shape, found.names) == ((0,), (2, 0), ())
    assert (found.energy, found.floor) == (0.0, 0.0)


def test_parts_of_a_sample_are_its_elements() -> None:
    found = drawn(family({"a": (40, 50), "b": (30, 20), "c": (20, 20)}))
    parts = [found.of([number]) for number in range(3)]
    assert sum(part.energy for part in parts) == pytest.approx(found.energy)
    assert sum(part.floor * part.energy for part in parts) == pytest.approx(found.floor * found.energy)
    assert np.array_equal(np.concatenate([part.deltas for part in parts], axis=1), found.deltas)
    few = found.thinned(100)
    assert 100 <= len(few.change) <= 200
    assert set(few.tensor.tolist()) == {0, 1, 2}
    assert np.isin(few.change, found.change).all()


def test_a_row_of_one_element_has_no_ranks() -> None:
    found = drawn(family({"a": (400, 1)}))
    assert not found.row_ranks.any()
    assert len(found.change)

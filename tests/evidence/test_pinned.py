"""Weights between walls, against merges that torch made and against linear programming."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.special import ndtr

from unmerge.checkpoint.dtypes import DTYPES
from unmerge.evidence.censored import Cells, censored_fit
from unmerge.evidence.pinned import CUBIC, OUTSIDE, STRAY, Pinned, pinned
from unmerge.statistics import FloatArray
from unmerge.testing import quantise

BF16 = DTYPES["BF16"]
NEAR_FRACTIONS = [(0.4968, 0.5032), (0.2497, 0.7503), (0.3, 0.45, 0.25)]


def merged(base: FloatArray, changes: FloatArray, weights: FloatArray, *, dtype: torch.dtype) -> FloatArray:
    """As mergekit's linear: fine-tunes times weights, summed in one type and stored in bfloat16."""
    total = torch.zeros(base.shape, dtype=dtype)
    for change, weight in zip(changes, weights, strict=True):
        total += torch.from_numpy(base + change).to(dtype) * torch.tensor(weight, dtype=dtype)
    stored: FloatArray = total.bfloat16().double().numpy()
    return stored


def tensors(
    seed: int, weights: FloatArray, *, share: float = 0.01, count: int = 4, dtype: torch.dtype = torch.float32
) -> list[Cells]:
    """Merges of bf16 fine-tunes whose changes are a share of the base's weights."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        base = quantise(0.05 * rng.standard_normal(4000), "BF16")
        changes = np.array([
            quantise(base + 0.05 * share * rng.standard_normal(4000), "BF16") - base for _ in weights
        ])  # fmt: skip
        found.append(cells(base, changes, merged(base, changes, weights, dtype=dtype)))
    return found


def cells(base: FloatArray, changes: FloatArray, merge: FloatArray) -> Cells:
    low, high = BF16.cell(merge)
    return Cells(changes, low - base, high - base, np.maximum(BF16.spacing(base), high - low))


def fit(made: Sequence[Cells], weights: FloatArray) -> Pinned | None:
    return pinned(made, censored_fit(made, weights + 0.01).weights)


@pytest.mark.parametrize("planted", NEAR_FRACTIONS[1:])
def test_intervals_hold_the_weights_as_often_as_they_say(planted: tuple[float, ...]) -> None:
    truth = np.array(planted)
    inside, scores, widths = [], [], []
    for seed in range(12):
        found = fit(tensors(seed, truth), truth)
        assert found is not None
        low, high = found.intervals(0.95, signed=True).T
        inside.append((low <= truth) & (truth <= high))
        scores.append(np.abs(found.weights - truth) / (0.5 * (high - low)))
        widths.append(high - low)
    # Three standard deviations of 12 merges, whose weights err together.
    assert np.mean(inside) >= 0.95 - 3.0 * np.sqrt(0.95 * 0.05 / 12)
    # Too wide would be wrong too: of a normal error the median is a third of half an interval.
    assert 0.15 < np.median(scores) < 0.6
    assert np.mean(widths) < 3e-5


@pytest.mark.parametrize("planted", NEAR_FRACTIONS)
def test_where_the_likelihood_with_noise_is_biased(planted: tuple[float, ...]) -> None:
    truth = np.array(planted)
    made = tensors(0, truth, count=8)
    smooth, sharp = censored_fit(made, truth), fit(made, truth)
    assert sharp is not None
    assert np.abs(sharp.weights - truth).max() < 0.1 * np.abs(smooth.weights - truth).max()


@pytest.mark.parametrize("seed", range(3))
def test_intervals_are_those_of_the_polytope_that_linear_programming_finds(seed: int) -> None:
    truth = np.array([0.4968, 0.5032])
    made = tensors(seed, truth, dtype=torch.float64)
    changes = np.concatenate([one.changes / one.spacing for one in made], axis=1).T
    low, high = (np.concatenate([getattr(one, end) / one.spacing for one in made]) for end in ("low", "high"))
    walls, limits = np.concatenate([changes, -changes]), np.concatenate([high, -low])
    ends = np.array([
        [sign * linprog(sign * axis, A_ub=walls, b_ub=limits, bounds=[(0, 1)] * 2).fun for sign in (1, -1)]
        for axis in np.eye(2)
    ])  # fmt: skip
    found = fit(made, truth)
    assert found is not None
    intervals, width = found.intervals(0.95, signed=True), ends[:, 1] - ends[:, 0]
    assert (intervals[:, 0] >= ends[:, 0] - 0.25 * width).all()
    assert (intervals[:, 1] <= ends[:, 1] + 0.25 * width).all()
    assert (intervals[:, 1] - intervals[:, 0] > 0.4 * width).all()


@pytest.mark.parametrize("planted", NEAR_FRACTIONS)
def test_parabolas_in_place_of_elements_do_not_move_the_weights(
    planted: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = np.array(planted)
    made = tensors(0, truth, count=8)
    some = fit(made, truth)
    monkeypatch.setattr("unmerge.evidence.pinned.NO_MATTER", 0.0)
    none = fit(made, truth)
    assert some is not None
    assert none is not None
    # Draws that were decided otherwise once go other ways from there: a tenth is what chance may do.
    ours, theirs = (found.intervals(0.95, signed=True).T for found in (some, none))
    tenth = 0.1 * (theirs[1] - theirs[0])
    assert (np.abs(some.weights - none.weights) < tenth).all()
    assert (np.abs(ours - theirs) < tenth).all()


@pytest.mark.parametrize("width", [np.inf, 20.0, 6.0, 3.0, 2.0, 1.0, 0.1])
def test_what_parabolas_leave_out_of_a_likelihood_has_the_bound_that_is_said(width: float) -> None:
    """Third differences of the logarithm of a cell's probability, by the depth in the cell over the noise."""
    step, depths = 1e-2, np.linspace(-OUTSIDE, min(10.0, 0.5 * width), 5001)
    found = [
        np.log((1.0 - STRAY) * (ndtr(depths + move) - ndtr(depths + move - width)) + STRAY)
        for move in (2 * step, step, -step, -2 * step)
    ]
    third = (found[0] - 2 * found[1] + 2 * found[2] - found[3]) / (2 * step**3)
    assert np.abs(third).max() < 6 * CUBIC
    assert np.isfinite(width) or np.abs(third).max() > 0.98 * 6 * CUBIC


def test_a_few_elements_that_err_do_not_move_the_weights() -> None:
    truth = np.array([0.4968, 0.5032])
    made = tensors(3, truth)
    rng = np.random.default_rng(0)
    for one in made:
        wrong = rng.choice(one.low.size, 3, replace=False)
        one.low[wrong] += one.spacing[wrong]
        one.high[wrong] += one.spacing[wrong]
    found = fit(made, truth)
    assert found is not None
    low, high = found.intervals(0.95, signed=True).T
    assert np.abs(found.weights - truth).max() < (high - low).max()


def test_arithmetic_in_few_bits_leaves_no_walls() -> None:
    truth = np.array([0.4968, 0.5032])
    assert fit(tensors(0, truth, dtype=torch.bfloat16), truth) is None


def test_weights_that_differ_between_tensors_leave_no_walls() -> None:
    one, other = tensors(0, np.array([0.45, 0.55])), tensors(0, np.array([0.55, 0.45]))
    assert fit([*one[:2], *other[2:]], np.array([0.5, 0.5])) is None


def test_do_not_depend_on_the_run_and_keep_to_bounds() -> None:
    truth = np.array([1.0, 0.0])
    made = tensors(0, truth)
    one, two = fit(made, truth), fit(made, truth)
    assert one is not None
    assert two is not None
    assert np.array_equal(one.draws, two.draws)
    assert (one.intervals(0.95, signed=False) >= 0.0).all()
    assert one.intervals(0.95, signed=True)[1, 0] < 0.0

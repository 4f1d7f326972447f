"""Weights beside a stranger, in merges that torch made of stored fine-tunes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from unmerge.checkpoint.dtypes import DTYPES
from unmerge.evidence import beside
from unmerge.evidence.beside import beside_stranger
from unmerge.evidence.lattice import Block
from unmerge.statistics import FloatArray
from unmerge.testing import quantise

BF16 = DTYPES["BF16"]
TRUTH = np.array([0.35, 0.25])
SHAPE = (120, 100)


def fine_tune(rng: np.random.Generator, base: FloatArray, share: float, rank: int) -> FloatArray:
    """The change of a stored fine-tune whose root mean square is a share of the base's."""
    change = rng.standard_normal((SHAPE[0], rank)) @ rng.standard_normal((rank, SHAPE[1])) / np.sqrt(rank)
    return quantise(base + 0.05 * share * change, "BF16") - base


def merges(
    seed: int,
    share: float,
    *,
    strangers: tuple[float, ...] = (0.4,),
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
    tensors: int = 6,
    truth: FloatArray = TRUTH,
) -> tuple[list[Block], FloatArray]:
    """Blocks, and the weights that least squares finds, which the strangers and rounding shift."""
    rng = np.random.default_rng(seed)
    found, products, pulls = [], np.zeros((len(truth), len(truth))), np.zeros(len(truth))
    for _ in range(tensors):
        base = quantise(0.05 * rng.standard_normal(SHAPE), "BF16")
        known = np.array([fine_tune(rng, base, share, 4) for _ in truth])
        unknown = [fine_tune(rng, base, share, rank) for _ in strangers]
        merge = torch.zeros(SHAPE, dtype=dtype)
        for change, weight in zip([*known, *unknown], [*truth, *strangers], strict=True):
            merge += torch.from_numpy(base + change).to(dtype) * torch.tensor(weight, dtype=dtype)
        stored = merge.bfloat16().double().numpy()
        low, high = BF16.cell(stored)
        coarser = np.maximum(BF16.spacing(base), high - low)
        found.append(Block(known, low - base, high - base, base, coarser, 2.0**-7, 2.0**-126))
        flat = known.reshape(len(truth), -1)
        products += flat @ flat.T
        pulls += flat @ (stored - base).ravel()
    return found, np.asarray(np.linalg.solve(products, pulls))


@pytest.mark.parametrize("share", [0.01, 0.03])
def test_weights_are_in_their_intervals_and_near_the_truth(share: float) -> None:
    """Where changes are some steps of the grid, the likelihood has a cusp at the truth; a step of 1e-3 passes it by."""
    inside, errors, plain = [], [], []
    for seed in range(4):
        blocks, start = merges(seed, share)
        found = beside_stranger(blocks, start)
        assert found is not None
        low, high = found.intervals(signed=False).T
        inside.append((low <= TRUTH) & (high >= TRUTH))
        errors.append(np.abs(found.weights - TRUTH))
        plain.append(np.abs(start - TRUTH))
    # Three standard deviations of four merges.
    assert np.mean(inside) >= 0.95 - 3.0 * np.sqrt(0.95 * 0.05 / 4)
    assert np.mean(errors) < 0.02 * np.mean(plain)
    assert np.median(errors) < 3e-5
    assert np.max(errors) < 3e-4


@pytest.mark.parametrize("near", [0.503, 0.497])
def test_nearly_equal_weights_are_found_and_too_much_is_not_claimed(near: float) -> None:
    truth = np.array([near])
    for seed in range(2):
        blocks, start = merges(seed, 0.01, truth=truth, strangers=(1.0 - near,))
        found = beside_stranger(blocks, start)
        assert found is not None
        # Half of the sums lie at walls; with noise in the arithmetic, weights 0.02 away would be likelier.
        assert found.weights == pytest.approx(truth, abs=0.001)
        assert (np.abs(found.weights - truth) <= found.reach).all()


@pytest.mark.parametrize("truth", [(0.5,), (0.25, 0.25), (0.6, 0.2)], ids=str)
@pytest.mark.parametrize("share", [0.003, 0.01])
def test_weights_that_people_choose_are_found(truth: tuple[float, ...], share: float) -> None:
    blocks, start = merges(1, share, truth=np.array(truth), strangers=(1.0 - sum(truth),))
    found = beside_stranger(blocks, start)
    # Half of the sums lie on walls, and all but these weights are excluded; or none, and those nearby are as likely.
    assert found is not None
    assert found.weights == pytest.approx(truth, abs=0.003 if share < 0.01 else 3e-4)
    assert (np.abs(found.weights - truth) <= found.reach).all()


def test_weights_are_found_where_half_of_the_changes_are_a_step_or_less() -> None:
    blocks, start = merges(0, 0.003, tensors=8)
    assert np.median([np.abs(block.changes / BF16.spacing(block.weights)) for block in blocks]) <= 1.0
    found = beside_stranger(blocks, start)
    assert found is not None
    assert np.abs(found.weights - TRUTH).max() < 0.1 * np.abs(start - TRUTH).max()
    assert (np.abs(found.weights - TRUTH) <= 3.0 * found.reach).all()


def test_do_not_depend_on_the_number_of_threads() -> None:
    blocks, start = merges(3, 0.01)
    one, two = beside_stranger(blocks, start), beside_stranger(blocks, start, workers=3)
    assert one is not None
    assert two is not None
    assert one.weights.tobytes() == two.weights.tobytes()
    assert one.reach.tobytes() == two.reach.tobytes()


def test_do_not_depend_on_the_first_estimate() -> None:
    blocks, start = merges(1, 0.01)
    one, two = beside_stranger(blocks, start), beside_stranger(blocks, TRUTH + np.array([0.02, -0.03]))
    assert one is not None
    assert two is not None
    reach = one.reach + two.reach
    assert (np.abs(one.weights - two.weights) <= reach).all()


@pytest.mark.parametrize(
    "other",
    [{"dtype": torch.bfloat16}, {"rank": 100}, {"strangers": (0.2, 0.2)}],
    ids=["arithmetic in few bits", "full rank", "two strangers"],
)
def test_merges_of_another_kind_are_refused_or_their_weights_hold(other: dict[str, object]) -> None:
    blocks, start = merges(2, 0.01, **other)  # type: ignore[arg-type]  # one of its options
    found = beside_stranger(blocks, start)
    if found is not None:
        assert (np.abs(found.weights - TRUTH) <= 3.0 * found.reach).all()


def test_nothing_is_said_of_weights_that_leave_no_room() -> None:
    blocks, _ = merges(0, 0.01, tensors=2)
    assert beside_stranger(blocks, np.array([0.6, 0.4])) is None
    assert beside_stranger(blocks[:1], TRUTH) is None
    assert beside_stranger(blocks, np.zeros(0)) is None


@pytest.mark.parametrize(("second", "begun"), [(0.4, [0.5, 0.4]), (0.5, [0.5])])
@pytest.mark.parametrize("likelier", [0.5, 0.4])
def test_the_last_search_is_begun_at_both_tops_and_the_likelier_end_counts(
    monkeypatch: pytest.MonkeyPatch, second: float, begun: list[float], likelier: float
) -> None:
    starts: list[float] = []

    def top(weight: float, likelihood: float) -> beside._Top:
        return beside._Top(beside._State(np.array([weight]), ()), likelihood, np.zeros(1), -np.inf)

    def climb(*_: object, near: object = None) -> beside._Top:
        return top(0.5, -100.0) if near is None else top(second, -50.0)

    def refined(_: object, found: beside._Top, __: object) -> beside._Top:
        starts.append(float(found.weights[0]))
        return top(starts[-1], -10.0 if starts[-1] == likelier else -20.0)

    monkeypatch.setattr(beside, "_climb", climb)
    monkeypatch.setattr(beside, "_refined", refined)
    with ThreadPoolExecutor(1) as pool:
        found = beside._climbed([], np.array([0.5]), 8, pool)
    assert starts == begun
    assert found.weights.tolist() == [likelier if likelier in begun else begun[-1]]

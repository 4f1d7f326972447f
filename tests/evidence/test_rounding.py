"""What storing a merge with few bits does to its coefficients, against merges that were really rounded, in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from unmerge.checkpoint.dtypes import DTYPES
from unmerge.evidence.censored import CensoredFit
from unmerge.evidence.rounding import (
    Corner,
    fitted_weights,
    remaining_of_others,
    rounding_shares,
    simulated_least_squares,
    unbiased_weights,
)
from unmerge.statistics import FloatArray
from unmerge.testing import quantise

BF16 = DTYPES["BF16"]


def exact(values: FloatArray) -> FloatArray:
    return values


def stored(values: FloatArray) -> FloatArray:
    """Round to bfloat16 in torch, through single precision."""
    found: FloatArray = torch.from_numpy(values).float().bfloat16().double().numpy()
    return found


def corner(
    target: FloatArray, base: FloatArray, atoms: FloatArray, *, known_as_stored: bool = False, size: int | None = None
) -> Corner:
    return Corner(
        target=target,
        base=base,
        atoms=atoms,
        stored=np.full(len(atoms), known_as_stored),
        spacing=BF16.spacing(base),
        target_grid=BF16.nearest,
        target_cell=BF16.cell,
        base_grid=BF16.nearest,
        size=size or target.size,
    )


def weights(rng: np.random.Generator, shape: tuple[int, int] = (100, 80)) -> FloatArray:
    return quantise(0.05 * rng.standard_normal(shape), "BF16")


def changes(rng: np.random.Generator, share: float, shape: tuple[int, int] = (100, 80), count: int = 2) -> FloatArray:
    """Changes of rank 4, their root mean square the given share of that of `weights`."""
    left, right = rng.standard_normal((count, shape[0], 4)), rng.standard_normal((count, 4, shape[1]))
    return 0.05 * share * (left @ right) / 2.0


Made = Callable[[FloatArray, FloatArray, FloatArray], FloatArray]


def at_once(base: FloatArray, atoms: FloatArray, scales: FloatArray) -> FloatArray:
    return stored(base + np.tensordot(scales, atoms, 1)) - base


def from_checkpoints(base: FloatArray, atoms: FloatArray, scales: FloatArray) -> FloatArray:
    moved = sum(scale * (stored(base + atom) - base) for scale, atom in zip(scales, atoms, strict=True))
    return stored(base + moved) - base


def in_storage_arithmetic(base: FloatArray, atoms: FloatArray, scales: FloatArray) -> FloatArray:
    """As mergekit's linear merge with dtype bfloat16; the base takes what the weights lack to 1."""
    models = [*(base + atom for atom in atoms), base][: len(atoms) + bool(scales.sum() != 1.0)]
    mixed = torch.stack([torch.from_numpy(model).float().bfloat16() for model in models])
    own = torch.from_numpy(np.append(scales, 1.0 - scales.sum())[: len(models)]).bfloat16()
    merged: FloatArray = (mixed * own.reshape(-1, 1, 1)).sum(dim=0).double().numpy()
    return merged - base


WAYS = {
    "applied at once": at_once,
    "from checkpoints": from_checkpoints,
    "in storage arithmetic": in_storage_arithmetic,
}


def merges(seed: int, share: float, planted: FloatArray, *, made: Made = at_once, tensors: int = 6) -> list[Corner]:
    """Merges in bfloat16."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(tensors):
        base, atoms = weights(rng), changes(rng, share, count=len(planted))
        found.append(corner(made(base, atoms, planted), base, atoms))
    return found


def least_squares(corners: Sequence[Corner]) -> tuple[FloatArray, FloatArray]:
    """Coefficients over all elements and their standard errors, from dense matrices."""
    D = np.concatenate([one.atoms.reshape(len(one.atoms), -1).T for one in corners])
    v = np.concatenate([one.target.ravel() for one in corners])
    found = np.linalg.lstsq(D, v)[0]
    variance = float(np.sum((v - D @ found) ** 2)) / (len(v) - len(found))
    return found, np.sqrt(variance * np.diag(np.linalg.inv(D.T @ D)))


def exact_weights(corners: Sequence[Corner], start: FloatArray, *, way: str) -> CensoredFit:
    return unbiased_weights(corners, fitted_weights(corners, start, way=way), way=way)


class TestExactWeights:
    @pytest.mark.parametrize("way", ["applied at once", "from checkpoints"])
    @pytest.mark.parametrize("share", [0.002, 0.005, 0.01])
    @pytest.mark.parametrize("planted", [(0.5, 0.3), (0.9, 0.1), (0.5, 0.5)])
    def test_are_in_their_intervals_where_least_squares_is_not(
        self, planted: tuple[float, ...], share: float, way: str
    ) -> None:
        truth = np.array(planted)
        inside, scores, plain = [], [], []
        for seed in range(40):
            corners = merges(seed, share, truth, made=WAYS[way])
            start, error = least_squares(corners)
            plain.append((start - truth) / error)
            fit = exact_weights(corners, start, way=way)
            bounds = fit.intervals(0.95, signed=False)
            half = 0.5 * (bounds[:, 1] - bounds[:, 0])
            inside.append((bounds[:, 0] <= truth) & (truth <= bounds[:, 1]))
            scores.append((fit.weights - truth) / half)
            assert half.max() < 0.003
        # Three standard deviations of 40 merges: the errors of two weights of one merge go together.
        assert np.mean(inside) >= 0.95 - 3.0 * np.sqrt(0.95 * 0.05 / 40)
        # A half is two standard deviations or more: the mean of 40 has one of 0.08, and a bias of 0.3 shifts coverage
        # by 2 in 100.
        assert np.abs(np.mean(scores, axis=0)).max() < 0.45
        if share < 0.01:
            assert np.abs(np.mean(plain, axis=0)).max() > 3.0

    def test_of_the_right_way_are_the_more_likely(self) -> None:
        truth = np.array([0.6, 0.25])
        for made in (at_once, from_checkpoints):
            corners = merges(1, 0.005, truth, made=made)
            start, _ = least_squares(corners)
            fits = {way: exact_weights(corners, start, way=way) for way in WAYS if way != "in storage arithmetic"}
            best = max(fits, key=lambda way: fits[way].likelihood)
            assert WAYS[best] is made

    def test_do_not_depend_on_the_first_estimate(self) -> None:
        truth = np.array([0.5, 0.3])
        corners = merges(2, 0.005, truth)
        one, two = (exact_weights(corners, np.array(start), way="applied at once").weights
                    for start in ((0.5, 0.3), (0.3, 0.6)))  # fmt: skip
        assert one == pytest.approx(two, abs=2e-4)

    def test_need_the_target_s_cells(self) -> None:
        corners = [replace(one, target_cell=None) for one in merges(0, 0.01, np.array([0.5, 0.3]))]
        with pytest.raises(ValueError, match="the target's cells are not known"):
            exact_weights(corners, np.array([0.5, 0.3]), way="applied at once")


class TestSimulatedLeastSquares:
    @pytest.mark.parametrize("share", [0.002, 0.005])
    @pytest.mark.parametrize("planted", [(0.5, 0.3), (0.7, 0.1)])
    def test_lose_what_least_squares_loses_beside_a_stranger(self, planted: tuple[float, ...], share: float) -> None:
        truth = np.array(planted)
        rng = np.random.default_rng(0)
        corners, plain, spreads = [], [], []
        for _ in range(8):
            base, atoms, stranger = weights(rng), changes(rng, share), changes(rng, share, count=1)[0]
            own = (1.0 - truth.sum()) * (stored(base + stranger) - base)
            merge = from_checkpoints(base, np.array([*atoms, stranger]), np.append(truth, 1.0 - truth.sum()))
            corners.append(corner(merge, base, atoms))
            plain.append(corner(merge - own, base, atoms))
            spreads.append(float(np.sqrt(np.mean(own**2))))
        found, dithered = simulated_least_squares(corners, truth, spreads, np.random.default_rng(0))
        lost, _ = least_squares(plain)
        assert np.abs(lost - truth).max() > 0.015
        assert np.abs(found - lost).max() < 0.4 * np.abs(lost - truth).max()
        assert dithered.shape == (2,)

    def test_without_rounding_are_the_weights(self) -> None:
        truth = np.array([0.5, 0.3])
        corners = [replace(one, target_grid=exact, base_grid=exact) for one in merges(0, 0.01, truth)]
        for found in simulated_least_squares(corners, truth, [0.001] * 6, np.random.default_rng(0)):
            assert found == pytest.approx(truth, abs=1e-9)

    def test_of_a_grid_that_is_fine_are_the_weights(self) -> None:
        truth = np.array([0.5, 0.3])
        for found in simulated_least_squares(merges(0, 0.2, truth), truth, [0.002] * 6, np.random.default_rng(0)):
            assert found == pytest.approx(truth, abs=1e-3)


@pytest.mark.parametrize("ratio", [0.15, 0.2, 0.3, 0.5, 1.0])
def test_least_squares_over_all_elements_loses_what_theory_says(ratio: float) -> None:
    """Of a Gaussian change of deviation s on a grid of spacing s / ratio, by the Fourier series of rounding."""
    k = np.arange(1, 50)
    theory = 1.0 + 2.0 * float(np.sum((-1.0) ** k * np.exp(-2.0 * (np.pi * k * ratio) ** 2)))
    rng = np.random.default_rng(0)
    base = quantise(rng.uniform(2.0**-4, 2.0**-3, (400, 200)), "BF16")  # one binade: a spacing of 2^-11
    change = ratio * 2.0**-11 * rng.standard_normal(base.shape)
    one = corner(BF16.nearest(base + change) - base, base, change[None])
    found, _ = least_squares([one])
    assert found[0] == pytest.approx(theory, abs=0.01)
    again, _ = simulated_least_squares([one], np.ones(1), [0.0], rng)
    stored_first = [replace(one, stored=np.ones(1, dtype=bool))]  # an atom known as stored is not rounded twice
    assert simulated_least_squares(stored_first, np.ones(1), [0.0], rng)[0] == pytest.approx(found, abs=1e-9)
    assert again == pytest.approx(found, abs=0.02)


def left_over(merge: FloatArray, atoms: FloatArray, scales: FloatArray) -> float:
    """The share of a merge's energy that its atoms do not account for, dense."""
    rest = merge - np.tensordot(scales, atoms, 1)
    return float(np.vdot(rest, rest) / np.vdot(merge, merge))


class TestRemainingOfOthers:
    @pytest.mark.parametrize("share", [0.002, 0.005, 0.01, 0.03])
    @pytest.mark.parametrize("weight", [0.1, 0.3])
    def test_it_is_what_real_merges_leave(self, share: float, weight: float) -> None:
        """Merges of a known, another and an unknown checkpoint; or of the first two, and much that dithers the sum."""
        found, left = [], []
        for seed in range(4):
            rng = np.random.default_rng(seed)
            base, (known, other, stranger) = weights(rng), changes(rng, share, count=3)
            own = [stored(base + change) - base for change in (known, other, stranger)]
            unknown = (0.7 - weight) * own[2]
            size = float(np.sqrt(np.mean(unknown**2)))
            for rest in (unknown, size * rng.standard_normal(base.shape)):
                kept = base + 0.3 * own[0] + rest
                moved = stored(kept + weight * own[1]) - stored(kept)
                left.append(float(np.vdot(moved, other) / np.vdot(other, other)) / weight)
            corners = [corner(at_once(base, known[None], np.array([0.3])), base, known[None])]
            sizes, generator = np.array([weight]), np.random.default_rng(9)
            found.append(remaining_of_others(corners, np.array([0.3]), [size], [other[None]], sizes, generator)[:, 0])
        made = np.minimum(1.0, [np.mean(left[::2]), np.mean(left[1::2])])
        np.testing.assert_allclose(np.mean(found, axis=0), np.sort(made), atol=0.08)

    def test_without_rounding_all_is_left(self) -> None:
        rng = np.random.default_rng(3)
        base, atoms = weights(rng), changes(rng, 0.001)
        whole = replace(corner(atoms[0], base, atoms[:1]), target_grid=exact, base_grid=exact)
        found = remaining_of_others([whole], np.array([0.5]), [1e-5], [atoms[1:]], np.array([0.01]), rng)
        np.testing.assert_allclose(found, 1.0, rtol=1e-6)

    def test_alone_on_the_grid_what_is_below_half_a_step_vanishes(self) -> None:
        rng = np.random.default_rng(4)
        base, atoms = np.full((20, 30), 1.0), np.full((1, 20, 30), 2.0**-7)
        nothing = corner(np.zeros_like(base), base, np.zeros((0, 20, 30)))
        for size, left in ((0.4, 0.0), (0.6, 1.0)):
            found = remaining_of_others([nothing], np.zeros(0), [0.0], [atoms], np.array([size]), rng)
            assert found.tolist() == [[left], [left]]


class TestShares:
    WEIGHTS = np.array([0.625, 0.375])  # bfloat16 holds them

    @pytest.mark.parametrize("share", [0.003, 0.01, 0.05])
    @pytest.mark.parametrize("way", WAYS)
    def test_are_those_of_merges_that_were_made(self, way: str, share: float) -> None:
        rng = np.random.default_rng(0)
        base, atoms = weights(rng), changes(rng, share)
        merge = WAYS[way](base, atoms, self.WEIGHTS)
        found = rounding_shares([corner(merge, base, atoms)], self.WEIGHTS, [0.0], np.random.default_rng(0))
        assert found[way] == pytest.approx(left_over(merge, atoms, self.WEIGHTS), rel=1e-9)
        assert list(found) == list(WAYS)

    def test_of_the_ways_differ_and_tell_them_apart(self) -> None:
        rng = np.random.default_rng(1)
        base, atoms = weights(rng), changes(rng, 0.01)
        one = corner(atoms[0], base, atoms)
        values = list(rounding_shares([one], self.WEIGHTS, [0.0], rng).values())
        assert values == sorted(values)
        assert values[1] > 1.2 * values[0]
        assert values[2] > 1.2 * values[1]

    def test_of_atoms_known_as_stored_lose_nothing_before_the_merge(self) -> None:
        rng = np.random.default_rng(2)
        base = weights(rng)
        atoms = np.array([stored(base + atom) - base for atom in changes(rng, 0.01)])
        one = corner(atoms[0], base, atoms, known_as_stored=True)
        found = rounding_shares([one], self.WEIGHTS, [0.0], rng)
        assert found["from checkpoints"] == pytest.approx(found["applied at once"], rel=1e-12)

    def test_are_of_the_model_that_the_corners_stand_for(self) -> None:
        rng = np.random.default_rng(3)
        corners = []
        rest = energy = 0.0
        for times, share in ((1, 0.003), (7, 0.03)):
            base, atoms = weights(rng), changes(rng, share)
            merge = at_once(base, atoms, self.WEIGHTS)
            corners.append(corner(merge, base, atoms, size=times * merge.size))
            own = times * float(np.vdot(merge, merge))
            rest, energy = rest + own * left_over(merge, atoms, self.WEIGHTS), energy + own
        found = rounding_shares(corners, self.WEIGHTS, [0.0, 0.0], rng)
        assert found["applied at once"] == pytest.approx(rest / energy, rel=1e-9)

    def test_beside_a_stranger_are_the_rounding_alone(self) -> None:
        rng = np.random.default_rng(4)
        base, atoms = weights(rng, (200, 160)), changes(rng, 0.005, (200, 160))
        stranger = changes(rng, 0.01, (200, 160), 1)[0]
        merge = stored(base + np.tensordot(self.WEIGHTS, atoms, 1) + stranger) - base
        rest = merge - np.tensordot(self.WEIGHTS, atoms, 1) - stranger
        spread = float(np.sqrt(np.mean(stranger**2)))
        found = rounding_shares([corner(merge, base, atoms)], self.WEIGHTS, [spread], np.random.default_rng(0))
        exact = float(np.vdot(rest, rest) / np.vdot(merge, merge))
        assert found["applied at once"] == pytest.approx(exact, rel=0.05)
        assert found["applied at once"] < 0.5 * left_over(merge, atoms, self.WEIGHTS)

    def test_without_rounding_are_zero(self) -> None:
        rng = np.random.default_rng(5)
        base, atoms = weights(rng), changes(rng, 0.01)
        one = corner(atoms[0], base, atoms)
        fine = replace(one, target_grid=exact, base_grid=exact)
        for share in rounding_shares([fine], self.WEIGHTS, [0.0], rng).values():
            assert 0.0 <= share < 1e-12

    def test_of_weights_of_zero_are_zero(self) -> None:
        rng = np.random.default_rng(6)
        one = corner(0.0 * weights(rng), weights(rng), changes(rng, 0.01))
        assert rounding_shares([one], np.zeros(2), [0.0], rng)["applied at once"] == 0.0

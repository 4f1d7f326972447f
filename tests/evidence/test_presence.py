"""The test of presence in simulation: its errors against what it claims, and what must not change it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import stdtrit

from unmerge.evidence.presence import Core, Presence, presence
from unmerge.statistics import FloatArray

DRAWS = 400
Residual = Callable[[np.random.Generator, FloatArray, FloatArray, FloatArray], FloatArray]


def core(
    R: FloatArray,
    U: FloatArray,
    S: FloatArray,
    W: FloatArray,
    *,
    layer: int | None = 0,
    relatives: Sequence[FloatArray] = (),
    floor: float = 0.0,
) -> Core:
    """What is seen of an atom U S W' in a residual R, dense."""
    matched = U.T @ R @ W
    above, beside = U.T @ R - matched @ W.T, R @ W - U @ matched
    outside = R - U @ (U.T @ R) - beside @ W.T
    least = floor + 1e-14 * float(np.mean(R**2)) + 1e-300
    identity = np.eye(len(S))
    return Core(
        layer,
        S,
        matched,
        above @ above.T / R.shape[1] + least * identity,
        beside.T @ beside / R.shape[0] + least * identity,
        float(np.mean(outside**2)) + least,
        np.array([U.T @ change @ W for change in relatives]).reshape(-1, len(S), len(S)),
    )


def orthonormal(rng: np.random.Generator, rows: int, columns: int) -> FloatArray:
    return np.asarray(np.linalg.qr(rng.standard_normal((rows, columns)))[0])


def cores(
    rng: np.random.Generator, residual: Residual, *, weight: float = 0.0, tensors: int = 12, rank: int = 4
) -> list[Core]:
    """One atom in tensors of 40 x 32: singular values that fall by a factor of about 4."""
    found = []
    for layer in range(tensors):
        U, W = orthonormal(rng, 40, rank), orthonormal(rng, 32, rank)
        S = np.sort(rng.uniform(0.5, 2.0, rank))[::-1] * np.exp(0.2 * rng.standard_normal())
        R = residual(rng, U, S, W) + weight * (U * S) @ W.T
        found.append(core(R, U, S, W, layer=layer))
    return found


def noise(level: float) -> Residual:
    def draw(rng: np.random.Generator, U: FloatArray, S: FloatArray, W: FloatArray) -> FloatArray:
        return level * rng.standard_normal((len(U), len(W)))

    return draw


def strangers(rank: int, level: float = 0.02) -> Residual:
    def draw(rng: np.random.Generator, U: FloatArray, S: FloatArray, W: FloatArray) -> FloatArray:
        m, n = len(U), len(W)
        change = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n)) / np.sqrt(m * n)
        return np.asarray(2.0 * change + level * rng.standard_normal((m, n)))

    return draw


def shared_rows(rng: np.random.Generator, U: FloatArray, S: FloatArray, W: FloatArray) -> FloatArray:
    """Strangers that read the same inputs, strong ones more, and write elsewhere."""
    change = rng.standard_normal((len(U), len(S))) / np.sqrt(len(U)) * S @ W.T
    return np.asarray(change + 0.02 * rng.standard_normal((len(U), len(W))))


def shared_columns(rng: np.random.Generator, U: FloatArray, S: FloatArray, W: FloatArray) -> FloatArray:
    return shared_rows(rng, W, S, U).T


def drift(rng: np.random.Generator, U: FloatArray, S: FloatArray, W: FloatArray) -> FloatArray:
    """What all fine-tunes learn: strong directions, in every tensor with the same sign."""
    common = 0.3 * (U * (S**2 / np.linalg.norm(S))) @ W.T
    return np.asarray(common + 0.02 * rng.standard_normal((len(U), len(W))))


def strongest(rng: np.random.Generator, U: FloatArray, S: FloatArray, W: FloatArray) -> FloatArray:
    """The strongest direction alone, and inputs that are shared."""
    common = 0.3 * S[0] * np.outer(U[:, 0], W[:, 0])
    return np.asarray(common + 0.3 * shared_rows(rng, U, S, W))


def signs(rng: np.random.Generator, U: FloatArray, S: FloatArray, W: FloatArray) -> FloatArray:
    """Decoys: every direction, with a random sign."""
    flipped = (U * (S * rng.choice([-1.0, 1.0], len(S)))) @ W.T
    return np.asarray(0.5 * flipped + 0.02 * rng.standard_normal((len(U), len(W))))


ABSENT: dict[str, Residual] = {
    "white noise": noise(0.02),
    "one stranger": strangers(2),
    "many strangers": strangers(8),
    "strangers of the same inputs": shared_rows,
    "strangers of the same outputs": shared_columns,
    "drift": drift,
    "drift of the strongest direction": strongest,
    "decoys": signs,
}


@cache
def draws(name: str, count: int) -> tuple[tuple[Core, ...], ...]:
    rng = np.random.default_rng(5)
    return tuple(tuple(cores(rng, ABSENT[name])) for _ in range(count))


def outcomes(name: str, count: int = DRAWS, *, signed: bool = False, weight: float = 0.0) -> list[Presence]:
    """Tests of an atom beside one of `ABSENT`; what it adds itself is in its own directions alone."""
    return [
        presence([replace(one, matched=one.matched + weight * np.diag(one.singular)) for one in draw], signed=signed)
        for draw in draws(name, DRAWS)[:count]
    ]


class TestAnAbsentAtom:
    @pytest.mark.parametrize("name", ABSENT)
    def test_is_accused_at_most_as_often_as_claimed(self, name: str) -> None:
        found = outcomes(name)
        assert np.mean([one.decidable for one in found]) > 0.9
        p_values = np.array([one.p_value for one in found])
        for nominal in (0.05, 0.01):
            # Three standard deviations of a binomial.
            assert np.sum(p_values <= nominal) <= DRAWS * nominal + 3.0 * np.sqrt(DRAWS * nominal)
        assert p_values.min() > 1e-5

    @pytest.mark.parametrize("name", ["white noise", "drift", "decoys"])
    def test_is_accused_no_more_often_with_either_sign(self, name: str) -> None:
        p_values = np.array([one.p_value for one in outcomes(name, 200, signed=True)])
        assert np.mean(p_values <= 0.05) <= 0.05 + 3.0 * np.sqrt(0.05 / 200)

    def test_beside_a_relative_is_not_credited_with_it(self) -> None:
        """A relative of cosine 0.7 is in the residual with a weight that the solver missed by 0.2."""
        rng = np.random.default_rng(0)
        accused = []
        for _ in range(200):
            found = []
            for layer in range(12):
                U, W = orthonormal(rng, 40, 4), orthonormal(rng, 32, 4)
                S = np.sort(rng.uniform(0.5, 2.0, 4))[::-1]
                other = 0.7 * (U * S) @ W.T + 0.7 * (orthonormal(rng, 40, 4) * S) @ orthonormal(rng, 32, 4).T
                R = 0.2 * other + 0.02 * rng.standard_normal((40, 32))
                found.append(core(R, U, S, W, layer=layer, relatives=[other]))
            accused.append(presence(found).p_value <= 0.05)
            assert presence([replace(one, relatives=one.relatives[:0]) for one in found]).p_value < 1e-3
        assert np.mean(accused) <= 0.05 + 3.0 * np.sqrt(0.05 / 200)


class TestAPresentAtom:
    @pytest.mark.parametrize(
        "name", ["white noise", "one stranger", "many strangers", "strangers of the same inputs", "drift"]
    )
    def test_s_weight_is_in_its_interval(self, name: str) -> None:
        found = [one for one in outcomes(name, weight=0.5) if one.decidable]
        inside = [abs(one.weight - 0.5) <= stdtrit(one.freedom, 0.975) * one.error for one in found]
        # Three standard deviations; open above, as the larger of two errors is taken.
        assert np.mean(inside) >= 0.95 - 3.0 * np.sqrt(0.05 * 0.95 / DRAWS)
        estimates = np.array([one.weight for one in found])
        spread = float(np.std(estimates))
        assert np.mean(estimates) == pytest.approx(0.5, abs=4.0 * spread / np.sqrt(DRAWS))
        # The error is not far above the truth, or the interval would say nothing.
        assert np.median([one.error for one in found]) < 1.6 * spread

    @pytest.mark.parametrize(
        ("name", "weight"), [("white noise", 0.2), ("one stranger", 0.5), ("strangers of the same inputs", 1.0)]
    )
    def test_is_found(self, name: str, weight: float) -> None:
        assert np.mean([one.p_value < 1e-4 for one in outcomes(name, 100, weight=weight)]) > 0.9

    def test_without_a_stranger_the_plain_filter_is_the_more_precise(self) -> None:
        found = outcomes("white noise", 100, weight=0.5)
        assert np.mean([one.matched_error for one in found]) < 0.7 * np.mean([one.error for one in found])
        assert np.mean([one.matched_weight for one in found]) == pytest.approx(0.5, abs=0.002)

    def test_with_a_negative_weight_counts_only_if_asked(self) -> None:
        for one in outcomes("white noise", 20, weight=-0.5):
            assert one.p_value > 0.99
        for one in outcomes("white noise", 20, weight=-0.5, signed=True):
            assert one.p_value < 1e-5
            assert one.weight == pytest.approx(-0.5, abs=0.1)

    def test_has_its_weight_in_each_layer(self) -> None:
        rng = np.random.default_rng(0)
        planted = np.linspace(0.2, 0.8, 8)
        scores = []
        for _ in range(40):
            found = []
            for layer, weight in enumerate(planted):
                for _ in range(3):
                    (one,) = cores(rng, noise(0.02), weight=weight, tensors=1)
                    found.append(replace(one, layer=layer))
            found.append(replace(found[0], layer=None))
            layers = presence(found).layers
            assert layers[:, 0].tolist() == list(range(8))
            scores.append((layers[:, 1] - planted) / layers[:, 2])
        # Weights that differ make the errors larger than the noise alone would.
        assert np.abs(np.mean(scores, axis=0)).max() < 0.5
        assert np.mean(np.square(scores)) < 1.5

    def test_is_found_beside_a_stranger_of_the_same_rank_without_rounding(self) -> None:
        rng = np.random.default_rng(5)
        found = [presence(cores(rng, strangers(4, 1e-6), weight=0.5)) for _ in range(60)]
        assert np.mean([one.p_value < 1e-5 for one in found]) > 0.8


class TestWhatIsTooLittle:
    @pytest.mark.parametrize("tensors", [0, 1, 2])
    def test_fewer_than_three_tensors(self, tensors: int) -> None:
        found = presence(cores(np.random.default_rng(0), noise(0.01), weight=0.5, tensors=tensors))
        assert not found.decidable
        assert (found.p_value, found.error, found.matched_error) == (1.0, np.inf, np.inf)
        assert found.layers.shape == (0, 3)

    def test_one_tensor_that_outweighs_all_others_does_not_decide_alone(self) -> None:
        others = cores(np.random.default_rng(0), noise(0.01))
        (one,) = cores(np.random.default_rng(1), noise(0.01), weight=0.5, tensors=1)
        heavy = replace(one, singular=1e3 * one.singular, matched=1e3 * one.matched)
        assert presence([heavy, *others]).p_value > 0.01

    def test_three_equal_tensors_are_enough(self) -> None:
        (one,) = cores(np.random.default_rng(0), noise(0.01), weight=0.5, tensors=1)
        assert presence([one] * 3).decidable
        assert presence([one] * 3).freedom == pytest.approx(2.0)


class TestNoNoise:
    def test_at_all(self) -> None:
        found = presence(cores(np.random.default_rng(0), noise(0.0), weight=0.5))
        assert found.weight == pytest.approx(0.5, abs=1e-6)
        assert found.p_value < 1e-5

    def test_in_one_tensor(self) -> None:
        seen = cores(np.random.default_rng(0), noise(0.01), weight=0.5)
        (silent,) = cores(np.random.default_rng(1), noise(0.0), weight=0.5, tensors=1)
        assert np.isfinite(presence([*seen, silent]).p_value)

    def test_and_nothing_else_either(self) -> None:
        found = presence(cores(np.random.default_rng(0), noise(0.0)))
        assert found.weight == 0.0
        assert found.p_value > 0.1


class TestInvariances:
    @staticmethod
    def scaled(one: Core, atom: float, world: float) -> Core:
        """The same with the atom and all that is measured in other units."""
        return Core(
            one.layer,
            atom * world * one.singular,
            world * one.matched,
            world**2 * one.left,
            world**2 * one.right,
            world**2 * one.level,
            world * one.relatives,
        )

    @staticmethod
    def example(seed: int) -> list[Core]:
        rng = np.random.default_rng(seed)
        seen = cores(rng, strangers(3), weight=0.3)
        return [replace(one, relatives=rng.standard_normal((1, 4, 4))) for one in seen]

    @settings(max_examples=10, deadline=None)
    @given(
        atom=st.floats(-3, 3).map(lambda power: 10.0**power),
        world=st.floats(-9, 3).map(lambda power: 10.0**power),
        seed=st.integers(0, 3),
    )
    def test_a_larger_atom_has_a_smaller_weight_and_units_change_nothing(
        self, atom: float, world: float, seed: int
    ) -> None:
        seen = self.example(seed)
        one, two = presence(seen), presence([self.scaled(item, atom, world) for item in seen])
        assert two.p_value == pytest.approx(one.p_value, rel=1e-4)
        assert two.freedom == pytest.approx(one.freedom, rel=1e-6)
        for part in ("weight", "error", "matched_weight", "matched_error"):
            assert getattr(two, part) * atom == pytest.approx(getattr(one, part), rel=1e-5)
        assert two.layers[:, 1:] * atom == pytest.approx(one.layers[:, 1:], rel=1e-5)

    @settings(max_examples=10, deadline=None)
    @given(seed=st.integers(0, 1000))
    def test_neither_order_nor_signs_of_singular_vectors_matter(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        seen = self.example(1)
        turned = []
        for place in rng.permutation(len(seen)):
            one = seen[place]
            flip = np.diag(rng.choice([-1.0, 1.0], 4))
            turned.append(
                replace(
                    one,
                    matched=flip @ one.matched @ flip,
                    left=flip @ one.left @ flip,
                    right=flip @ one.right @ flip,
                    relatives=flip @ one.relatives @ flip,
                )
            )
        one_way, other = presence(seen), presence(turned)
        assert other.p_value == pytest.approx(one_way.p_value, rel=1e-6)
        assert other.weight == pytest.approx(one_way.weight, rel=1e-9)
        assert other.layers == pytest.approx(one_way.layers, rel=1e-9)

    def test_more_of_the_atom_is_as_much_more_weight(self) -> None:
        seen = self.example(2)
        more = [replace(one, matched=one.matched + 0.25 * np.diag(one.singular)) for one in seen]
        one, two = presence(seen), presence(more)
        assert two.weight - one.weight == pytest.approx(0.25)
        assert two.matched_weight - one.matched_weight == pytest.approx(0.25)
        assert two.error == pytest.approx(one.error)

    def test_an_error_falls_as_tensors_grow_in_number(self) -> None:
        errors = [
            np.mean([presence(cores(np.random.default_rng(seed), noise(0.02), tensors=tensors)).error
                     for seed in range(20)])
            for tensors in (8, 32)
        ]  # fmt: skip
        assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.25)

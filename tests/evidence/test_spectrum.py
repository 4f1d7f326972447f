from __future__ import annotations

import numpy as np
import pytest

from unmerge.evidence import spectrum
from unmerge.evidence.spectrum import Spectrum, character, spikes
from unmerge.statistics import FloatArray
from unmerge.testing import quantise

ROUNDING = 1e-4
SHAPE = (128, 128)


def low_rank(rng: np.random.Generator, rank: int, size: float, shape: tuple[int, int] = SHAPE) -> FloatArray:
    """A change of some rank, whose elements have about the standard deviation given."""
    return size / np.sqrt(rank) * rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))


def rounding(rng: np.random.Generator, shape: tuple[int, int] = SHAPE) -> FloatArray:
    return ROUNDING * np.sqrt(12.0) * rng.uniform(-0.5, 0.5, shape)


def sparsified(rng: np.random.Generator, shape: tuple[int, int] = SHAPE) -> FloatArray:
    return 10.0 * ROUNDING * rng.standard_normal(shape) * (rng.random(shape) < 0.1)


def heavy_tailed(rng: np.random.Generator, shape: tuple[int, int] = SHAPE) -> FloatArray:
    return 10.0 * ROUNDING * rng.standard_t(3, shape)


def gaussian(rng: np.random.Generator, shape: tuple[int, int] = SHAPE) -> FloatArray:
    return 10.0 * ROUNDING * rng.standard_normal(shape)


class TestThreshold:
    @pytest.mark.parametrize(("beta", "omega"), [(0.1, 1.60306), (0.3, 1.90562), (0.5, 2.1725), (0.9, 2.70674)])
    def test_is_gavish_and_donohos(self, beta: float, omega: float) -> None:
        # Their polynomial 0.56 b^3 - 0.95 b^2 + 1.82 b + 1.43 is good to 0.02.
        found = spectrum._threshold(round(1000 * beta), 1000) / np.sqrt(1000 * spectrum._median(beta))
        assert found == pytest.approx(omega, abs=0.02)

    def test_of_a_square_matrix(self) -> None:
        assert spectrum._threshold(100, 100) == pytest.approx(4.0 / np.sqrt(3.0) * 10.0)
        assert spectrum._threshold(100, 100) / np.sqrt(100 * spectrum._median(1.0)) == pytest.approx(2.858, abs=1e-3)

    @pytest.mark.parametrize("beta", [0.05, 0.4, 1.0])
    def test_the_median_is_that_of_noise(self, beta: float) -> None:
        noise = np.random.default_rng(0).standard_normal((round(1000 * beta), 1000))
        found = np.median(np.linalg.svd(noise, compute_uv=False)) ** 2 / 1000
        assert spectrum._median(beta) == pytest.approx(found, rel=0.01)


class TestSpikes:
    @pytest.mark.parametrize(
        ("shape", "count"), [((256, 256), 40), ((64, 128), 200), ((100, 64), 200), ((32, 32), 300)]
    )
    @pytest.mark.parametrize("known", [0.0, ROUNDING])
    def test_noise_alone_has_none(self, shape: tuple[int, int], count: int, known: float) -> None:
        rng = np.random.default_rng(0)
        counts = [spikes(rounding(rng, shape), known).rank for _ in range(count)]
        assert np.count_nonzero(counts) <= 1

    @pytest.mark.parametrize("shape", [(160, 160), (64, 200), (200, 100)])
    @pytest.mark.parametrize("rank", [1, 4, 8, 16])
    @pytest.mark.parametrize("size", [3.0, 1000.0])
    def test_rank_is_recovered(self, shape: tuple[int, int], rank: int, size: float) -> None:
        rng = np.random.default_rng(0)
        found = [
            spikes(low_rank(rng, rank, size * ROUNDING, shape) + rounding(rng, shape), ROUNDING) for _ in range(20)
        ]
        assert [one.rank for one in found].count(rank) >= 19
        assert np.mean([one.noise for one in found]) == pytest.approx(ROUNDING, rel=0.02)

    def test_many_spikes_are_not_taken_for_noise(self) -> None:
        rng = np.random.default_rng(0)
        found = spikes(low_rank(rng, 32, 10.0 * ROUNDING) + rounding(rng), 0.0)
        assert found.rank == 32
        assert found.noise == pytest.approx(ROUNDING, rel=0.03)

    @pytest.mark.parametrize("size", [0.5, 1.0, 10.0])
    def test_energies_are_those_before_noise_was_added(self, size: float) -> None:
        rng = np.random.default_rng(0)
        change = low_rank(rng, 4, size * ROUNDING)
        found = spikes(change + rounding(rng), ROUNDING)
        assert found.rank == 4
        assert found.spiked == pytest.approx((change**2).sum(), rel=0.05)
        assert found.energy - found.spiked == pytest.approx(found.rounding, rel=0.02)
        assert found.share == pytest.approx(size**2 / (1.0 + size**2), abs=0.05)

    def test_effective_rank_is_of_what_is_beyond_rounding(self) -> None:
        rng = np.random.default_rng(0)
        equal = 200.0 * ROUNDING * np.linalg.qr(rng.standard_normal((128, 6)))[0] @ np.eye(6, 128)
        assert spikes(equal + rounding(rng), ROUNDING).effective_rank == pytest.approx(6.0, rel=0.01)
        assert spikes(rounding(rng), ROUNDING).effective_rank == 0.0
        assert spikes(gaussian(rng), ROUNDING).effective_rank > 64.0

    def test_the_noise_is_never_below_rounding(self) -> None:
        rng = np.random.default_rng(0)
        assert spikes(low_rank(rng, 4, 0.01), 1.0) == spikes(low_rank(np.random.default_rng(0), 4, 0.01), 1.0)
        assert spikes(low_rank(rng, 4, 0.01), 1.0).rank == 0
        assert spikes(low_rank(rng, 4, 0.01), 1.0).noise == 1.0

    def test_without_noise(self) -> None:
        found = spikes(low_rank(np.random.default_rng(0), 5, 1.0), 0.0)
        assert (found.rank, found.share) == (5, pytest.approx(1.0))
        assert spikes(np.zeros((4, 6)), 0.0) == Spectrum(4, 0, 0.0, 0.0, 0.0, 0.0, 0.0)

    @pytest.mark.parametrize("scale", [1e-12, 1e12])
    def test_does_not_depend_on_unit_or_orientation(self, scale: float) -> None:
        rng = np.random.default_rng(0)
        residual = low_rank(rng, 4, 2.0 * ROUNDING, (64, 256)) + rounding(rng, (64, 256))
        found, other = spikes(residual, ROUNDING), spikes(scale * residual.T, scale * ROUNDING)
        assert other.rank == found.rank
        assert other.effective_rank == pytest.approx(found.effective_rank)
        assert other.noise == pytest.approx(scale * found.noise)
        assert other.share == pytest.approx(found.share)

    @pytest.mark.parametrize(
        ("residual", "noise", "message"),
        [
            (np.zeros(4), 1.0, r"shape \(4,\)"),
            (np.zeros((0, 4)), 1.0, r"shape \(0, 4\)"),
            (np.full((2, 2), np.nan), 1.0, "NaN"),
            (np.zeros((2, 2)), -1.0, r"noise is -1\.0"),
        ],
    )
    def test_bad_arguments(self, residual: FloatArray, noise: float, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            spikes(residual, noise)


class TestCharacter:
    def test_of_rounding_alone(self) -> None:
        rng = np.random.default_rng(0)
        found = character([spikes(rounding(rng), ROUNDING) for _ in range(20)], np.ones(20))
        assert (found.kind, found.rank, found.share) == ("nothing", 0, 0.0)
        assert found.words == "nothing beyond rounding"

    def test_of_bfloat16_storage(self) -> None:
        rng = np.random.default_rng(0)
        spectra = []
        for _ in range(20):
            weights = 0.02 * rng.standard_normal(SHAPE)
            residual = quantise(weights, "BF16") - weights
            ulp = 2.0 ** (np.floor(np.log2(np.abs(weights))) - 7.0)
            spectra.append(spikes(residual, float(np.sqrt((ulp**2).mean() / 12.0))))
        assert character(spectra, np.ones(20)).kind == "nothing"

    @pytest.mark.parametrize("rank", [1, 8, 16])
    @pytest.mark.parametrize("size", [3.0, 100.0])
    def test_of_an_adapter_in_a_few_of_the_modules(self, rank: int, size: float) -> None:
        rng = np.random.default_rng(0)
        changes = [low_rank(rng, rank, size * ROUNDING) if index % 7 < 2 else 0.0 for index in range(14)]
        found = character([spikes(change + rounding(rng), ROUNDING) for change in changes], np.ones(14))
        assert found.kind == "low rank"
        assert found.share > 0.8
        assert rank <= found.rank <= rank + 1
        assert found.words == f"of rank {found.rank} or so: one or a few LoRA-like fine-tunes"

    @pytest.mark.parametrize("change", [gaussian, sparsified, heavy_tailed])
    def test_of_changes_of_all_weights(self, change) -> None:
        rng = np.random.default_rng(0)
        found = character([spikes(change(rng) + rounding(rng), ROUNDING) for _ in range(10)], np.ones(10))
        assert (found.kind, found.rank) == ("full rank", 0)
        assert found.words.startswith("of full rank")

    def test_of_a_change_of_half_the_possible_rank(self) -> None:
        rng = np.random.default_rng(0)
        residual = low_rank(rng, 60, 100.0 * ROUNDING) + rounding(rng)
        assert character([spikes(residual, ROUNDING)], [1.0]).kind == "full rank"

    def test_rounding_twice_is_still_nothing(self) -> None:
        rng = np.random.default_rng(0)
        spectra = [spikes(1.04 * rounding(rng), ROUNDING) for _ in range(20)]
        assert character(spectra, np.ones(20)).kind == "nothing"

    def test_weights_are_numbers_of_parameters(self) -> None:
        rng = np.random.default_rng(0)
        adapter, noise = spikes(low_rank(rng, 4, 0.01), ROUNDING), spikes(gaussian(rng) * 10.0, ROUNDING)
        assert character([adapter, noise], [10.0, 1.0]).kind == "low rank"
        assert character([adapter, noise], [1.0, 10.0]).kind == "full rank"

    def test_bad_arguments(self) -> None:
        with pytest.raises(ValueError, match="0 spectra and 0 weights"):
            character([], [])
        with pytest.raises(ValueError, match="1 spectra and 2 weights"):
            character([spikes(np.eye(3), 0.0)], [1.0, 1.0])

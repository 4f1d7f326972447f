"""Seeds are found as torch draws with them, whatever was planted; parities are those of numpy's generator."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom, hypergeom, poisson

from unmerge.errors import RecipeError
from unmerge.recipe import seed_search
from unmerge.recipe.mersenne import NEAR, SIZE, parity_masks
from unmerge.recipe.seed_search import MISSED, SCALE, search

Seen = tuple[np.ndarray, np.ndarray, np.ndarray]
DENSITIES = {"0.3 in bf16": (0.3, torch.bfloat16), "0.3": (0.3, torch.float32), "0.5": (0.5, torch.bfloat16)}
DENSITIES["0.9"] = (0.9, torch.float32)


def draws(seed: int, count: int, skipped: int = 0) -> np.ndarray:
    twister = np.random.MT19937()
    twister._legacy_seeding(seed)
    twister.random_raw(skipped, output=False)
    return twister.random_raw(count)


def state(seed: int, twists: int = 0) -> np.ndarray:
    twister = np.random.MT19937()
    twister._legacy_seeding(seed)
    twister.random_raw(SIZE * twists, output=False)
    return twister.state["state"]["key"].astype(np.uint32)


def by_parities(words: np.ndarray, index: int) -> int:
    ones = np.bitwise_count(parity_masks(index, range(32)) & words).sum(axis=1)
    return sum((int(count) & 1) << bit for bit, count in enumerate(ones))


@pytest.mark.parametrize("index", [0, 226, 227, 396, 397, 623, 624, 19_937, 6_240_001, 9_999_999, 99_999_999])
def test_a_draw_is_the_parities_of_the_seeded_state(index: int) -> None:
    assert by_parities(state(2_900_000_011), index) == draws(2_900_000_011, 1, index)[0]


def test_draws_at_random_are_parities() -> None:
    rng = np.random.default_rng(0)
    for index, seed in zip(rng.integers(10**6, size=20), rng.integers(2**32, size=20), strict=True):
        assert by_parities(state(int(seed)), int(index)) == draws(int(seed), 1, int(index))[0]


def test_what_numpy_cannot_reach_is_the_same_from_any_state_on_the_way() -> None:
    rng = np.random.default_rng(1)
    for index in (2**32, 2**40, *rng.integers(2**40, size=3).tolist()):
        twists, seed = int(rng.integers(1, 20_000)), int(rng.integers(2**32))
        assert by_parities(state(seed), index) == by_parities(state(seed, twists), index - SIZE * twists)


def from_torch(seed: int, density: str, elements: np.ndarray) -> Seen:
    """Return what a mask shows that torch drew, as mergekit has it drawn."""
    value, dtype = DENSITIES[density]
    torch.manual_seed(seed)
    chances = torch.full((int(elements.max()) + 1,), value, dtype=dtype)
    kept = torch.bernoulli(chances).bool().numpy()[elements]
    return elements, np.full(len(elements), np.ceil(SCALE * float(chances[0])), dtype=np.uint32), kept


def some(rng: np.random.Generator, count: int, first: int, last: int) -> np.ndarray:
    return np.sort(rng.choice(np.arange(first, last), count, replace=False))


def wrong(rng: np.random.Generator, seen: Seen, count: int) -> Seen:
    indices, thresholds, kept = seen
    return indices, thresholds, kept ^ np.isin(np.arange(len(kept)), rng.choice(len(kept), count, replace=False))


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(("first", "last"), [(0, NEAR), (3_000_000, 4_000_000)], ids=["near", "far"])
@pytest.mark.parametrize(("errors", "tolerated"), [(0, 0.0), (2, 0.02), (5, 0.05)])
def test_the_seed_that_torch_drew_with_is_found(
    density: str, first: int, last: int, errors: int, tolerated: float
) -> None:
    rng = np.random.default_rng([errors, first, len(density)])
    seed = int(rng.integers(2**32 - 2**18, 2**32))
    seen = wrong(rng, from_torch(seed, density, some(rng, 150, first, last)), errors)
    result = search(*seen, first=2**32 - 2**18, count=2**18, tolerated=tolerated)
    assert result.seeds == (seed,)
    assert result.tested == 2**18
    assert result.expected_by_chance < 1e-3


def test_the_order_of_observations_does_not_matter_and_near_and_far_ones_mix() -> None:
    rng = np.random.default_rng(3)
    seen = from_torch(12_345, "0.5", np.concatenate([np.arange(6), some(rng, 40, 10_000, 20_000)]))
    order = rng.permutation(46)
    assert search(*(part[order] for part in seen), count=2**16) == search(*seen, count=2**16)
    assert search(*seen, count=2**16).seeds == (12_345,)


def test_a_seed_with_more_contradictions_than_tolerated_is_not_found() -> None:
    rng = np.random.default_rng(4)
    for first, last in ((0, NEAR), (10**6, 2 * 10**6)):
        seen = wrong(rng, from_torch(7, "0.5", some(rng, 100, first, last)), 3)
        assert search(*seen, count=2**12, tolerated=0.029).seeds == ()
        assert search(*seen, count=2**12, tolerated=0.03).seeds == (7,)


@pytest.fixture(scope="module")
def all_draws() -> np.ndarray:
    """The low 24 bits of the first draws of the first seeds."""
    return np.array([draws(seed, 900) & (SCALE - 1) for seed in range(2**13)])


@pytest.mark.parametrize(("last", "seldom"), [(NEAR, 1.0), (NEAR, 0.0), (900, 0.0)], ids=["words", "parities", "far"])
@pytest.mark.parametrize("errors", [0, 1, 3])
def test_seeds_that_agree_by_chance_are_those_of_a_plain_loop(
    all_draws: np.ndarray, monkeypatch: pytest.MonkeyPatch, last: int, seldom: float, errors: int
) -> None:
    monkeypatch.setattr(seed_search, "_SELDOM", seldom)
    rng = np.random.default_rng(errors)
    count = 12 + 4 * errors
    indices = some(rng, count, 0, last)
    thresholds = rng.choice([77 << 16, 1 << 23, 11_744_051, 15_099_495], count)
    kept = rng.random(count) < thresholds / SCALE
    contradictions = ((all_draws[:, indices] < thresholds) != kept).sum(axis=1)
    agreeing = np.flatnonzero(contradictions <= errors).tolist()
    assert 2 < len(agreeing) < 200
    result = search(indices, thresholds, kept, count=len(all_draws), tolerated=errors / count)
    assert list(result.seeds) == agreeing


@pytest.mark.parametrize(("first", "last"), [(0, NEAR), (10**6, 2 * 10**6)], ids=["near", "far"])
def test_no_seed_agrees_with_what_no_generator_drew(first: int, last: int) -> None:
    rng = np.random.default_rng(5)
    indices, kept = some(rng, 64, first, last), rng.random(64) < 0.5
    result = search(indices, np.full(64, SCALE // 2), kept, count=2**20, tolerated=0.05)
    assert result.seeds == ()
    assert result.expected_by_chance == pytest.approx(2**20 * binom.cdf(3, 64, 0.5))


@pytest.mark.parametrize(("first", "last"), [(0, NEAR), (10**6, 2 * 10**6)], ids=["near", "far"])
def test_as_many_agree_by_chance_as_expected(first: int, last: int) -> None:
    rng = np.random.default_rng(6)
    thresholds = rng.choice([SCALE // 10, 77 << 16, SCALE // 2, SCALE * 9 // 10], 27)
    kept = rng.random(27) < thresholds / SCALE
    result = search(some(rng, 27, first, last), thresholds, kept, count=2**20, tolerated=0.1)
    assert 30 < result.expected_by_chance < 250
    low, high = poisson.interval(1.0 - 1e-6, result.expected_by_chance)
    assert low <= len(result.seeds) <= high


def test_a_stage_rejects_as_rarely_as_it_says() -> None:
    for population, allowed in ((64, 1), (192, 15), (96, 15), (10, 15), (1, 3)):
        for drawn in range(population + 1):
            limit = seed_search._limit(population, allowed, drawn)
            contradictions = hypergeom(population, min(allowed, population), drawn)
            assert contradictions.sf(limit) <= MISSED * (1.0 + 1e-9)
            assert limit == 0 or contradictions.sf(limit - 1) > MISSED * (1.0 - 1e-9)


def test_many_wrong_ones_among_many_observations() -> None:
    rng = np.random.default_rng(8)
    found = 0
    for seed in range(40):
        seen = wrong(rng, from_torch(seed, "0.5", some(rng, 192, 1000, 20_000)), 15)
        found += search(*seen, count=64, tolerated=0.08).seeds == (seed,)
    assert found >= 38  # 8 stages may each reject one in a thousand


@pytest.mark.parametrize("density", ["0.3", "0.9"])
def test_several_bits_of_a_far_observation_are_asked_for(density: str) -> None:
    """As many kept as dropped, some of either kind wrong, and a density that tells one kind by its highest bits."""
    rng = np.random.default_rng(9)
    found = 0
    for seed in range(20):
        elements, thresholds, kept = from_torch(seed, density, some(rng, 2000, 5_000, 20_000))
        chosen = np.sort(
            np.concatenate([rng.choice(np.flatnonzero(kept == kind), 96, False) for kind in (True, False)])
        )
        seen = wrong(rng, (elements[chosen], thresholds[chosen], kept[chosen]), 15)
        found += search(*seen, count=64, tolerated=0.08).seeds == (seed,)
    assert found >= 18


def test_leading_bits_are_those_that_all_draws_share() -> None:
    for threshold in (1, SCALE // 8, SCALE // 8 + 1, SCALE // 3, SCALE // 2, SCALE - SCALE // 8, SCALE - 1):
        for kept, (low, high) in ((True, (0, threshold - 1)), (False, (threshold, SCALE - 1))):
            seen = seed_search._checked(np.array([5]), np.array([threshold]), np.array([kept]), 0.0)
            shared = 24 - (low ^ high).bit_length()
            assert seed_search._leading_bits(seen).tolist() == [shared]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seed_search, "BLOCK", 2**10)


def planted(far: bool = True) -> Seen:
    return from_torch(9_001, "0.5", some(np.random.default_rng(7), 14, *((5_000, 9_000) if far else (0, NEAR))))


class StoppedError(Exception):
    pass


def stop_after(count: int) -> Callable[[int, int], None]:
    def progress(tested: int, _: int) -> None:
        if tested >= count:
            raise StoppedError

    return progress


@pytest.mark.usefixtures("small_blocks")
def test_a_search_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    path, whole = tmp_path / "search.json", tmp_path / "whole.json"
    how: dict[str, Any] = {"count": 2**14 + 100, "tolerated": 0.1}
    expected = search(*planted(), **how, state=whole)
    assert 9_001 in expected.seeds
    assert len(expected.seeds) > 1
    for stop in (3_000, 9_500, 16_000):
        with pytest.raises(StoppedError):
            search(*planted(), **how, state=path, progress=stop_after(stop))
        assert stop <= json.loads(path.read_text())["tested"] < stop + 2**10
    seen: list[int] = []
    assert search(*planted(), **how, state=path, progress=lambda tested, _: seen.append(tested)) == expected
    assert seen[0] >= 16_000
    assert seen[-1] == 2**14 + 100
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(tmp_path.iterdir()) == [path, whole]
    assert search(*planted(), **how, state=path) == expected


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("far", [True, False])
def test_the_number_of_threads_changes_nothing(far: bool) -> None:
    results = [search(*planted(far), count=2**14, tolerated=0.1, workers=workers) for workers in (1, 2, 5)]
    assert results[0].seeds
    assert results[0] == results[1] == results[2]


def test_a_state_of_another_search_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    search(*planted(), count=100, state=path)
    indices, thresholds, kept = planted()
    for seen, how in (((indices, thresholds, ~kept), {}), ((indices, thresholds, kept), {"first": 1})):
        with pytest.raises(RecipeError, match="other observations or seeds; delete it"):
            search(*seen, count=100, state=path, **how)
    for text in ("{", "[]", '{"tested": 1}'):
        path.write_text(text)
        with pytest.raises(RecipeError, match="not the state of a seed search"):
            search(*planted(), count=100, state=path)


@pytest.mark.parametrize(
    ("changes", "how", "message"),
    [
        ({"indices": np.array([1, 1])}, {}, "none twice"),
        ({"indices": np.array([-1, 1])}, {}, "each from 0"),
        ({"indices": np.array([1, 2, 3])}, {}, "three arrays of one length"),
        ({"thresholds": np.array([0, 5])}, {}, "thresholds from 0 to 5"),
        ({"thresholds": np.array([5, 2**24])}, {}, "always or never kept"),
        ({}, {"tolerated": 1.0}, "tolerated fraction of 1.0"),
        ({}, {"tolerated": -0.1}, "tolerated fraction of -0.1"),
        ({}, {"first": -1}, "1000 seeds from -1"),
        ({}, {"first": 2**32 - 999}, "within 0 to"),
        ({}, {"count": 0}, "0 seeds from 0"),
        ({}, {"count": 2**32}, "give more observations or fewer seeds"),
    ],
)
def test_what_cannot_be_searched_is_refused(changes: dict[str, Any], how: dict[str, Any], message: str) -> None:
    given = {"indices": np.array([1, 2]), "thresholds": np.array([2**23, 2**23]), "kept": np.array([True, False])}
    with pytest.raises(RecipeError, match=message):
        search(**(given | changes), **({"count": 1000} | how))


def test_nothing_is_compiled_until_a_search() -> None:
    code = "import sys, unmerge.recipe.seed_search; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Samples of row blocks: what they cost, what they say, and how often their intervals hold."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pytest

from tests.conftest import Shelf
from unmerge import anytime, attribute
from unmerge.anytime import Limits, Sample, intervals, limits, sample
from unmerge.attribution import open_target
from unmerge.dictionary import Dictionary, open_atom, open_base
from unmerge.errors import UnmergeError
from unmerge.regression import regress
from unmerge.solvers import Nnls
from unmerge.statistics import Statistics


def draw(shelf: Shelf, bounds: Limits, *names: str, target: str = "merge", seed: int = 0, **options: Any) -> Sample:
    base = open_base(shelf.base)
    goal = open_target(shelf.path(target), base)
    atoms = [open_atom(shelf.path(name), base) for name in names or ("add", "sub", "json")]
    return sample(goal.vector, goal.rows, atoms, base, bounds, np.random.default_rng(seed), **options)


@pytest.fixture
def cut_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anytime, "BLOCK_ELEMENTS", 64)
    monkeypatch.setattr(anytime, "FIRST", 12)


@pytest.mark.usefixtures("cut_small")
@pytest.mark.parametrize("names", [("add", "sub", "json"), ("add", "full")])
def test_all_blocks_give_the_exact_coefficients_and_no_width(shelf: Shelf, names: tuple[str, ...]) -> None:
    found = draw(shelf, Limits(), *names, workers=2)
    base = open_base(shelf.base)
    goal = open_target(shelf.path("merge"), base)
    atoms = [open_atom(shelf.path(name), base) for name in names]
    exact = regress(goal.vector, goal.rows, Dictionary((), {}), atoms, base)
    wanted = Nnls(signed=False).solve(exact.total).coefficients
    np.testing.assert_allclose(Nnls(signed=False).solve(found.regression.total).coefficients, wanted, atol=1e-9)
    np.testing.assert_allclose(found.intervals, np.column_stack([wanted, wanted]), atol=1e-9)
    assert found.blocks == found.population
    assert found.precise


@pytest.mark.usefixtures("cut_small")
def test_the_sample_is_no_larger_than_needed_and_repeatable(shelf: Shelf) -> None:
    shelf.merge("rounded", "BF16", add=0.6, json=0.3)
    first, second = (draw(shelf, Limits(precision=0.2), target="rounded") for _ in range(2))
    assert first.precise
    assert first.blocks < first.population
    np.testing.assert_array_equal(first.intervals, second.intervals)
    assert first.size == second.size
    fine = draw(shelf, Limits(precision=1e-5), target="rounded")
    assert fine.blocks > first.blocks
    other = draw(shelf, Limits(precision=0.2), target="rounded", seed=1)
    assert (other.intervals != first.intervals).any()


@pytest.mark.usefixtures("cut_small")
def test_a_budget_of_bytes_is_kept(shelf: Shelf) -> None:
    whole = draw(shelf, Limits())
    found = draw(shelf, Limits(precision=1e-9, size=whole.size // 3))
    assert whole.size // 4 < found.size <= whole.size // 3
    assert found.blocks < whole.blocks
    assert not found.precise


def test_a_budget_for_nothing_is_told(shelf: Shelf) -> None:
    with pytest.raises(UnmergeError, match="too small for a single block of rows"):
        draw(shelf, Limits(size=10))


@pytest.mark.usefixtures("cut_small")
def test_a_budget_of_no_time_reads_one_piece(shelf: Shelf) -> None:
    found = draw(shelf, Limits(seconds=1e-9))
    assert found.blocks == min(anytime.FIRST, anytime.PIECE)


def population(generator: np.random.Generator, blocks: int, spread: float) -> list[Statistics]:
    """Blocks of different sizes and energies whose coefficients differ, as those of trimmed merges do."""
    found = []
    for _ in range(blocks):
        atoms = generator.standard_normal((30, 3)) * np.exp(0.7 * generator.standard_normal())
        own = np.array([0.6, 0.3, 0.0]) + spread * generator.standard_normal(3)
        found.append(Statistics.of(atoms, atoms @ own + 0.2 * generator.standard_normal(30)))
    return found


@pytest.mark.parametrize("drawn", [48, 160])
@pytest.mark.parametrize("spread", [0.02, 0.3])
def test_intervals_hold_as_often_as_they_say(drawn: int, spread: float) -> None:
    """They are for what all blocks would give; 300 draws, of which 95 % should hold it."""
    generator = np.random.default_rng(7)
    blocks = population(generator, 400, spread)
    truth = Nnls(signed=True).solve(reduce(add, blocks)).coefficients
    held = np.zeros(3)
    for _ in range(300):
        chosen = [blocks[place] for place in generator.permutation(len(blocks))[:drawn]]
        low, high = intervals(chosen, len(blocks), signed=True).T
        held += (low <= truth) & (truth <= high)
    assert (held / 300 >= 0.91).all()
    assert (held / 300 <= 0.99).all()


def test_a_coefficient_at_zero_has_an_interval_that_holds_zero() -> None:
    generator = np.random.default_rng(3)
    atoms = [generator.standard_normal((30, 2)) for _ in range(20)]
    blocks = [Statistics.of(part, part @ np.array([0.5, -0.2]) + generator.standard_normal(30)) for part in atoms]
    low, high = intervals(blocks, 100, signed=False).T
    assert low[1] == 0.0
    assert high[1] >= 0.0
    assert low[0] > 0.0


def test_one_block_says_nothing_of_its_spread() -> None:
    block = Statistics.of(np.random.default_rng(0).standard_normal((9, 2)), np.ones(9))
    assert np.isnan(intervals([block], 10, signed=True)).all()


def test_atoms_that_cannot_be_told_apart_have_no_interval() -> None:
    generator = np.random.default_rng(0)
    blocks = []
    for _ in range(10):
        one = generator.standard_normal((20, 1))
        blocks.append(Statistics.of(np.hstack([one, one, generator.standard_normal((20, 1))]), one[:, 0]))
    found = intervals(blocks, 50, signed=True)
    assert np.isnan(found[:2]).all()
    assert np.isfinite(found[2]).all()


@pytest.mark.parametrize(
    ("precision", "budget", "message"),
    [
        (0.0, None, "precision 0.0: expected a half width between 0 and 1"),
        (2.0, None, "precision 2.0"),
        (None, "lots", "budget 'lots': expected bytes or seconds, as 200MB, 1.5GB or 5s"),
        (None, "0MB", "budget '0MB'"),
        (None, "5 minutes", "budget '5 minutes'"),
    ],
)
def test_limits_that_mean_nothing_are_refused(precision: float | None, budget: str | None, message: str) -> None:
    with pytest.raises(UnmergeError, match=message):
        limits(precision, budget)


def test_limits_are_read() -> None:
    assert limits(0.01, "200MB") == Limits(0.01, size=200_000_000)
    assert limits(None, "1.5GB") == Limits(size=1_500_000_000)
    assert limits(None, "5s") == Limits(seconds=5.0)


@pytest.mark.usefixtures("cut_small")
def test_an_attribution_from_a_sample_says_so(shelf: Shelf) -> None:
    found = attribute(shelf.path("merge"), shelf.paths("add", "json"), base=shelf.base, precision=0.2)
    assert found.method.parameters_read < found.method.parameters
    assert "blocks of rows, at random" in found.method.coordinates
    truth = {"add": 0.6, "json": 0.3}
    for item in found.components:
        assert item.present is None
        assert item.interval is not None
        assert item.interval[0] - 1e-3 <= truth[item.name] <= item.interval[1] + 1e-3
    assert any("bytes of weights were read" in notice for notice in found.notices)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exact": True}, "--exact reads what --precision and --budget leave out"),
        ({"top_k": 100}, "--top-k reads what"),
        ({"solver": "ridge"}, "work with the nnls solver, not with ridge"),
    ],
)
def test_what_does_not_go_with_a_sample_is_refused(shelf: Shelf, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnmergeError, match=message):
        attribute(shelf.path("merge"), shelf.paths("add"), base=shelf.base, budget="1MB", **options)


def test_adapters_are_not_read_whole_for_their_digests(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = attribute(shelf.path("merge"), shelf.paths("add", "json"), base=shelf.base)
    monkeypatch.setattr("unmerge.fingerprint.adapter_digest", None)
    found = attribute(shelf.path("merge"), shelf.paths("add", "json"), base=shelf.base, precision=0.5)
    digests = [{item.name: item.source.digest for item in result.components} for result in (whole, found)]
    assert all(digests[0][name] != digest for name, digest in digests[1].items())

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest

from unmerge.evidence import intervals
from unmerge.evidence.intervals import jackknife_intervals
from unmerge.solvers import SOLVERS, Lasso, Nnls, Omp, Solution, Solver, Status
from unmerge.statistics import FloatArray, Statistics

TRUE = np.array([0.5, 0.2, 0.02, 0.0])


def tensors(
    seed: int, count: int = 30, rows: int = 60, spread: float = 1.0, *, coupled: bool = False
) -> list[Statistics]:
    """A planted mixture plus noise over tensors of unequal energy; `coupled`: with noise to match."""
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(count):
        size = np.exp(0.5 * spread * rng.standard_normal())
        shared = rng.standard_normal((rows, 1))
        D = size * (np.sqrt(0.7) * rng.standard_normal((rows, len(TRUE))) + np.sqrt(0.3) * shared)
        noise = (size if coupled else 1.0) * rng.standard_normal(rows)
        parts.append(Statistics.of(D, D @ TRUE + noise))
    return parts


@dataclass(frozen=True)
class Fragile:
    """Least squares that does not converge on fewer parameters than it needs."""

    name: ClassVar[str] = "fragile"
    needed: int
    signed: bool = False

    def solve(self, statistics: Statistics) -> Solution:
        solution = Nnls().solve(statistics)
        return solution if statistics.count == self.needed else replace(solution, status=Status.NOT_CONVERGED)


def coverage(solver: Solver, seeds: int, **options: float) -> FloatArray:
    found = np.array([jackknife_intervals(tensors(seed, **options), solver) for seed in range(seeds)])
    return ((found[:, :, 0] <= TRUE) & (found[:, :, 1] >= TRUE)).mean(axis=0)


class TestCoverage:
    # 300 seeds of a rate of 0.95 have a standard deviation of 0.013; the bands are three of them wide, and open
    # above for coefficients at the bound, where an interval that holds 0 cannot miss a true 0.

    @pytest.mark.parametrize(
        ("solver", "options"),
        [
            (Nnls(), {"spread": 0.0}),
            (Nnls(), {"spread": 1.0}),
            (Nnls(), {"spread": 1.0, "coupled": True}),
            (Nnls(), {"count": 60, "rows": 20}),
            (Nnls(signed=True), {"spread": 1.0, "coupled": True}),
        ],
        ids=["equal", "unequal", "noise grows with energy", "grouped", "signed"],
    )
    def test_is_what_it_claims(self, solver: Solver, options: dict[str, float]) -> None:
        rates = coverage(solver, 300, **options)
        assert rates.min() >= 0.91
        assert rates[:2].max() <= 0.985

    def test_of_another_level(self) -> None:
        found = np.array([jackknife_intervals(tensors(seed), Nnls(signed=True), 0.5) for seed in range(300)])
        rate = ((found[:, :, 0] <= TRUE) & (found[:, :, 1] >= TRUE)).mean()
        assert 0.44 <= rate <= 0.56

    @pytest.mark.parametrize("solver", [Nnls(threshold=0.01), Omp(n_atoms=2), Lasso(0.001)], ids=lambda s: s.name)
    def test_holds_for_coefficients_that_the_solver_sets_to_zero(self, solver: Solver) -> None:
        assert coverage(solver, 100).min() >= 0.85


class TestShape:
    @pytest.mark.parametrize("name", SOLVERS)
    @pytest.mark.parametrize("signed", [False, True])
    def test_holds_the_coefficient(self, name: str, signed: bool) -> None:
        parts = tensors(1)
        solver = SOLVERS[name](signed=signed)
        found = jackknife_intervals(parts, solver)
        coefficients = solver.solve(sum(parts[1:], parts[0])).coefficients
        assert found.shape == (4, 2)
        assert np.isfinite(found).all()
        assert (found[:, 0] <= coefficients).all()
        assert (found[:, 1] >= coefficients).all()
        assert signed or (found[:, 0] >= 0.0).all()
        assert (found[:, 1] > found[:, 0]).all()

    def test_more_noise_is_a_wider_interval(self) -> None:
        D, noise = np.random.default_rng(0).standard_normal((2, 20, 50, 2))
        widths = []
        for level in (0.01, 0.1, 1.0):
            parts = [Statistics.of(d, d @ [0.5, 0.5] + level * e[:, 0]) for d, e in zip(D, noise, strict=True)]
            widths.append(np.ptp(jackknife_intervals(parts, Nnls(signed=True)), axis=1))
        assert widths[1] / widths[0] == pytest.approx(10.0, rel=1e-3)
        assert widths[2] / widths[1] == pytest.approx(10.0, rel=1e-3)

    def test_a_strongly_negative_projection_is_pinned_to_zero(self) -> None:
        D, noise = np.random.default_rng(0).standard_normal((2, 20, 50, 2))
        parts = [Statistics.of(d, d @ [0.5, -0.5] + 0.1 * e[:, 0]) for d, e in zip(D, noise, strict=True)]
        assert jackknife_intervals(parts, Nnls())[1].tolist() == [0.0, 0.0]

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_of_a_coefficient_that_a_penalty_removes_includes_zero(self, sign: float) -> None:
        D, noise = np.random.default_rng(0).standard_normal((2, 20, 50, 2))
        parts = [Statistics.of(d, d @ [1.0, 0.5 * sign] + 0.1 * e[:, 0]) for d, e in zip(D, noise, strict=True)]
        low, high = sorted(jackknife_intervals(parts, Lasso(0.9))[1] * sign)
        assert low == 0.0
        assert high == pytest.approx(0.5, abs=0.1)

    def test_does_not_depend_on_the_unit(self) -> None:
        parts = tensors(2)
        scaled = [
            Statistics(1e-12 * part.gram, 1e-12 * part.correlation, 1e-12 * part.energy, 0.0, part.count)
            for part in parts
        ]
        assert jackknife_intervals(scaled, Nnls()) == pytest.approx(jackknife_intervals(parts, Nnls()), rel=1e-9)

    def test_parts_without_atoms_change_nothing(self) -> None:
        parts = tensors(3)
        idle = Statistics(np.zeros((4, 4)), np.zeros(4), 5.0, 0.0, 10)
        assert jackknife_intervals([idle, *parts, idle], Nnls()) == pytest.approx(
            jackknife_intervals(parts, Nnls()), rel=1e-12
        )


class TestUnknown:
    @pytest.mark.parametrize(("signed", "low"), [(True, -np.inf), (False, 0.0)])
    def test_one_usable_part(self, signed: bool, low: float) -> None:
        idle = Statistics(np.zeros((4, 4)), np.zeros(4), 5.0, 0.0, 10)
        found = jackknife_intervals([tensors(1)[0], idle], Nnls(signed=signed))
        assert found.tolist() == [[low, np.inf]] * 4

    def test_one_part_that_dominates(self) -> None:
        heavy, *others = tensors(1, spread=0.0)
        factor = 1e4
        heavy = Statistics(heavy.gram * factor, heavy.correlation * factor, heavy.energy * factor, 0.0, 60)
        assert np.isinf(jackknife_intervals([heavy, *others], Nnls())[:, 1]).all()

    def test_two_equal_parts_are_enough(self) -> None:
        D = np.eye(2)
        parts = [Statistics.of(D, np.array([0.4, 0.5])), Statistics.of(D, np.array([0.6, 0.5]))]
        found = jackknife_intervals(parts, Nnls(signed=True))
        # Standard error 0.1, and Student's t with one degree of freedom.
        assert found == pytest.approx(np.array([[0.5 - 1.2706205, 0.5 + 1.2706205], [0.5, 0.5]]))

    def test_collinear_and_zero_atoms(self) -> None:
        rng = np.random.default_rng(0)
        parts = []
        for _ in range(10):
            D = rng.standard_normal((40, 2))
            wide = np.column_stack([D[:, 0], np.zeros(40), D[:, 1], D[:, 0]])
            parts.append(Statistics.of(wide, D @ [0.5, 0.5] + rng.standard_normal(40)))
        found = jackknife_intervals(parts, Nnls())
        assert np.isinf(found[:, 1]).tolist() == [True, True, False, True]

    def test_an_atom_that_lives_in_one_tensor(self) -> None:
        rng = np.random.default_rng(0)
        parts = []
        for index in range(10):
            D = rng.standard_normal((40, 2)) * [1.0, float(index == 0)]
            parts.append(Statistics.of(D, D @ [0.5, 0.5] + rng.standard_normal(40)))
        assert np.isinf(jackknife_intervals(parts, Nnls())[:, 1]).tolist() == [False, True]

    def test_atoms_that_only_one_tensor_tells_apart(self) -> None:
        rng = np.random.default_rng(0)
        parts = []
        for index in range(10):
            D = rng.standard_normal((40, 3))
            D[:, 1] = D[:, 1] if index == 0 else D[:, 0]
            parts.append(Statistics.of(D, D @ [0.5, 0.5, 0.5] + rng.standard_normal(40)))
        assert np.isinf(jackknife_intervals(parts, Nnls())[:, 1]).tolist() == [True, True, False]

    def test_not_finite(self) -> None:
        parts = tensors(1)
        broken = Statistics(parts[0].gram * np.nan, parts[0].correlation, parts[0].energy, 0.0, 60)
        assert np.isinf(jackknife_intervals([broken, *parts], Nnls())[:, 1]).all()

    def test_a_solve_that_fails_without_one_tensor(self) -> None:
        parts = tensors(1)
        found = jackknife_intervals(parts, Fragile(needed=sum(part.count for part in parts)))
        assert np.isinf(found[:, 1]).all()

    def test_zero_target(self) -> None:
        parts = [Statistics.of(np.eye(3), np.zeros(3)) for _ in range(3)]
        assert np.isinf(jackknife_intervals(parts, Nnls())[:, 1]).all()

    def test_bad_arguments(self) -> None:
        with pytest.raises(ValueError, match="parts is empty"):
            jackknife_intervals([], Nnls())
        with pytest.raises(ValueError, match=r"level is 95"):
            jackknife_intervals(tensors(1), Nnls(), 95.0)


class TestFree:
    def test_is_least_squares_beside_the_support(self) -> None:
        rng = np.random.default_rng(0)
        D = (rng.standard_normal((60, 5)) + rng.standard_normal((60, 1))) * 10.0 ** np.arange(-2, 3)
        v = D @ [50.0, 3.0, 0.0, 0.1, 0.0] + rng.standard_normal(60)
        support = np.array([True, False, False, True, False])
        free = intervals._free(Statistics.of(D, v), support)
        for atom in np.flatnonzero(~support):
            columns = [0, 3, atom]
            assert free[atom] == pytest.approx(np.linalg.lstsq(D[:, columns], v)[0][-1], rel=1e-9)


class TestGroups:
    def test_are_balanced_complete_and_repeatable(self) -> None:
        parts = tensors(4, count=300, rows=5, spread=0.5)
        total = sum(parts[1:], parts[0])
        groups = intervals._balanced_groups(parts, total)
        assert len(groups) == intervals.MOST_GROUPS
        assert sum(groups[1:], groups[0]).gram == pytest.approx(total.gram)
        assert sum(group.count for group in groups) == total.count
        loads = intervals._shares(groups, total).sum(axis=1)
        assert loads.max() < 1.1 * loads.min()
        again = intervals._balanced_groups(parts, total)
        assert [group.energy for group in again] == [group.energy for group in groups]

    def test_few_parts_stay_apart(self) -> None:
        parts = tensors(5, count=7)
        groups = intervals._balanced_groups(parts, sum(parts[1:], parts[0]))
        assert sorted(group.energy for group in groups) == sorted(part.energy for part in parts)

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import CASES, DENSE, Case, planted

from unmerge.solvers import SOLVERS, DotProduct, ElasticNet, Lasso, Nnls, Omp, Ridge, Solver, Status, active_set
from unmerge.solvers.problem import Problem
from unmerge.statistics import FloatArray, Statistics

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_problem = pytest.mark.parametrize("problem", DENSE)
seeds = st.integers(0, 2**32 - 1)
rhos = st.sampled_from([0.0, 0.5, 0.99])


def close(left: FloatArray, right: FloatArray, tolerance: float = 1e-9) -> bool:
    """Equal relative to the larger of the two, each taken as a whole."""
    size = max(np.abs(left).max(initial=0.0), np.abs(right).max(initial=0.0))
    return bool(np.abs(left - right).max(initial=0.0) <= tolerance * size)


class TestAnswer:
    @every_case
    @every_problem
    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
    def test_is_optimal(self, case: Case, problem: str, scale: float) -> None:
        D, v = DENSE[problem]
        statistics = Statistics.of(D * scale, v)
        solution = case.solver.solve(statistics)
        assert solution.status in (Status.CONVERGED, Status.COLLINEAR)
        assert case.violation(case.solver, statistics, solution.coefficients) < 1e-9

    @every_case
    @every_problem
    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
    def test_agrees_with_the_dense_oracle(self, case: Case, problem: str, scale: float) -> None:
        D, v = DENSE[problem]
        D, v = D * scale, v / scale
        ours = case.solver.solve(Statistics.of(D, v)).coefficients
        theirs = case.oracle(case.solver, D, v)
        assert close(D @ ours, D @ theirs, 2e-6)
        if D.shape[0] > D.shape[1]:
            assert close(ours, theirs, 2e-6)

    @every_case
    def test_agrees_when_atoms_differ_in_energy(self, case: Case) -> None:
        D, v = planted(11)
        D = D * 10.0 ** np.linspace(-3, 3, D.shape[1])
        ours = case.solver.solve(Statistics.of(D, v)).coefficients
        norms = np.linalg.norm(D, axis=0)
        assert close(norms * ours, norms * case.oracle(case.solver, D, v), 1e-6)

    @every_case
    @given(seed=seeds, rho=rhos, atoms=st.integers(1, 10), n=st.sampled_from([3, 12, 40]), power=st.integers(-6, 6))
    @settings(max_examples=30, deadline=None)
    def test_is_optimal_always(self, case: Case, seed: int, rho: float, atoms: int, n: int, power: int) -> None:
        D, v = planted(seed, n, atoms, rho)
        statistics = Statistics.of(D, v * 10.0**power)
        solution = case.solver.solve(statistics)
        assert solution.status is not Status.NOT_CONVERGED
        assert case.violation(case.solver, statistics, solution.coefficients) < 1e-8

    @every_case
    @given(seed=seeds, rho=rhos, atoms=st.integers(1, 10))
    @settings(max_examples=20, deadline=None)
    def test_follows_the_order_of_atoms(self, case: Case, seed: int, rho: float, atoms: int) -> None:
        statistics = Statistics.of(*planted(seed, 40, atoms, rho))
        order = np.random.default_rng(seed).permutation(atoms)
        turned = case.solver.solve(statistics.select(order)).coefficients
        assert close(turned, case.solver.solve(statistics).coefficients[order], 1e-12 / (1.0 - rho) ** 2)

    @every_case
    @given(seed=seeds, power=st.integers(-6, 6))
    @settings(max_examples=10, deadline=None)
    def test_follows_the_units(self, case: Case, seed: int, power: int) -> None:
        D, v = planted(seed)
        scale = 10.0**power
        plain = case.solver.solve(Statistics.of(D, v)).coefficients
        assert close(case.solver.solve(Statistics.of(D * scale, v * scale)).coefficients, plain)
        if isinstance(case.solver, ElasticNet):
            return  # its two penalties scale differently if the target alone is scaled
        assert close(case.solver.solve(Statistics.of(D, v * scale)).coefficients, plain * scale)
        assert close(case.solver.solve(Statistics.of(D * scale, v)).coefficients, plain / scale)

    @every_case
    @given(seed=seeds, cut=st.integers(1, 59))
    @settings(max_examples=10, deadline=None)
    def test_of_a_sum_of_parts_is_that_of_the_whole(self, case: Case, seed: int, cut: int) -> None:
        D, v = planted(seed)
        parts = Statistics.of(D[:cut], v[:cut]) + Statistics.of(D[cut:], v[cut:])
        whole = Statistics.of(D, v)
        assert close(case.solver.solve(parts).coefficients, case.solver.solve(whole).coefficients, 1e-11)

    @every_case
    def test_does_not_depend_on_the_run(self, case: Case) -> None:
        statistics = Statistics.of(*DENSE["siblings"])
        first, second = case.solver.solve(statistics), case.solver.solve(statistics)
        assert first.coefficients.tobytes() == second.coefficients.tobytes()
        assert first.message == second.message == ""


class TestDegenerate:
    @every_case
    def test_zero_target(self, case: Case) -> None:
        D, v = DENSE["plain"]
        solution = case.solver.solve(Statistics.of(D, 0.0 * v))
        assert solution.status is Status.ZERO_TARGET
        assert not solution.coefficients.any()
        assert "nothing to explain" in solution.message

    @every_case
    def test_zero_atom(self, case: Case) -> None:
        D, v = DENSE["plain"]
        solution = case.solver.solve(Statistics.of(np.insert(D, 2, 0.0, axis=1), v))
        assert solution.status is Status.ZERO_ATOM
        assert solution.groups == ((2,),)
        assert "Atoms: 2." in solution.message
        assert solution.coefficients[2] == 0.0
        without = case.solver.solve(Statistics.of(D, v)).coefficients
        assert close(np.delete(solution.coefficients, 2), without, 1e-12)

    @every_case
    def test_only_zero_atoms(self, case: Case) -> None:
        solution = case.solver.solve(Statistics.of(np.zeros((5, 3)), np.ones(5)))
        assert solution.status is Status.ZERO_ATOM
        assert solution.coefficients.tolist() == [0.0, 0.0, 0.0]

    @every_case
    def test_no_atoms(self, case: Case) -> None:
        solution = case.solver.solve(Statistics.of(np.zeros((5, 0)), np.ones(5)))
        assert solution.coefficients.shape == (0,)

    @every_case
    @pytest.mark.parametrize("stretch", [1.0, 1.0 + 1e-7, 3.0, -1.0])
    def test_copies(self, case: Case, stretch: float) -> None:
        D, v = planted(12, n=80, atoms=4)
        v = v + D[:, 1]
        twice = np.column_stack([D, stretch * D[:, 1]])
        solution = case.solver.solve(Statistics.of(twice, v))
        assert solution.status is Status.COLLINEAR
        assert solution.groups == ((1, 4),)
        assert "Atoms: 1, 4." in solution.message
        if case.shares and stretch == 1.0:
            assert solution.coefficients[1] == pytest.approx(solution.coefficients[4], rel=1e-9)
            assert solution.coefficients[1] > 0.0
        if not case.shares:
            assert (solution.coefficients[1] == 0.0) != (solution.coefficients[4] == 0.0)

    @every_case
    @pytest.mark.parametrize("distance", [0.0, 1e-9, 1e-7, 3e-6])
    def test_near_copies_give_no_noise(self, case: Case, distance: float) -> None:
        D, v = planted(13, n=80, atoms=4)
        rng = np.random.default_rng(0)
        near = np.column_stack([D, D[:, 1] + distance * rng.standard_normal(80)])
        solution = case.solver.solve(Statistics.of(near, v))
        assert solution.status is Status.COLLINEAR
        assert solution.groups == ((1, 4),)
        assert np.abs(solution.coefficients).max() < 2.0

    @every_case
    def test_a_merge_beside_its_ingredients(self, case: Case) -> None:
        D, v = planted(14, n=80, atoms=5)
        D[:, 3] = 0.5 * D[:, 0] + 0.5 * D[:, 2]
        statistics = Statistics.of(D, v)
        solution = case.solver.solve(statistics)
        assert solution.status is Status.COLLINEAR
        assert solution.groups == ((0, 2, 3),)
        assert np.abs(solution.coefficients).max() < 3.0
        assert case.violation(case.solver, statistics, solution.coefficients) < 1e-8

    @every_case
    def test_both_faults_name_all_atoms(self, case: Case) -> None:
        D, v = planted(15, n=80, atoms=3)
        solution = case.solver.solve(Statistics.of(np.column_stack([np.zeros(80), D, D[:, 0]]), v))
        assert solution.status is Status.COLLINEAR
        assert solution.groups == ((1, 4), (0,))

    @every_case
    @pytest.mark.parametrize("fault", [np.nan, np.inf])
    @pytest.mark.parametrize("where", ["gram", "correlation", "energy"])
    def test_not_finite(self, case: Case, fault: float, where: str) -> None:
        good = Statistics.of(*DENSE["plain"])
        bad = dataclasses.replace(good, **{where: getattr(good, where) * fault})
        solution = case.solver.solve(bad)
        assert solution.status is Status.NOT_FINITE
        assert not solution.coefficients.any()
        assert "not results" in solution.message

    @every_case
    @given(
        rows=st.lists(st.lists(st.sampled_from([-1.0, 0.0, 1e-6, 1.0, 1e6]), min_size=4, max_size=4), max_size=6),
        v=st.lists(st.sampled_from([-1e6, 0.0, 1e-6, 1.0]), min_size=6, max_size=6),
    )
    @settings(max_examples=60, deadline=None)
    def test_anything_has_a_finite_answer(self, case: Case, rows: list[list[float]], v: list[float]) -> None:
        D = np.array(rows).reshape(len(rows), 4)
        solution = case.solver.solve(Statistics.of(D, np.array(v[: len(rows)])))
        assert np.isfinite(solution.coefficients).all()
        assert solution.coefficients.shape == (4,)
        assert case.solver.signed or solution.coefficients.min() >= 0.0
        assert (solution.message == "") == (solution.status is Status.CONVERGED)


class TestLeastSquares:
    @given(seed=seeds, atoms=st.integers(2, 6), extra=st.integers(1, 4))
    @settings(max_examples=50, deadline=None)
    def test_takes_the_shortest_minimiser(self, seed: int, atoms: int, extra: int) -> None:
        """Against the limit of ever smaller ridges, which is the shortest minimiser by theory."""
        D, v = planted(seed, 30, atoms)
        rng = np.random.default_rng(seed)
        D = np.column_stack([D, D @ rng.uniform(-1.0, 1.0, (atoms, extra))])
        D /= np.linalg.norm(D, axis=0)
        for signed in (False, True):
            shortest = Nnls(signed=signed).solve(Statistics.of(D, v)).coefficients
            damped = Ridge(1e-8, signed=signed, relative=False).solve(Statistics.of(D, v + 0.0)).coefficients
            assert np.linalg.norm(shortest) <= np.linalg.norm(damped) * 1.01
            assert np.linalg.norm(D @ (shortest - damped)) <= 1e-4 * np.linalg.norm(v)

    def test_threshold_is_the_papers_cut(self) -> None:
        statistics = Statistics.of(np.eye(3), np.array([0.5, 0.01, -0.5]))
        assert Nnls(threshold=0.01).solve(statistics).coefficients.tolist() == [0.5, 0.0, 0.0]
        signed = Nnls(signed=True, threshold=0.01).solve(statistics).coefficients
        assert signed == pytest.approx([0.5, 0.0, -0.5])
        assert signed[1] == 0.0


class TestPenalties:
    @pytest.mark.parametrize("signed", [True, False])
    @pytest.mark.parametrize("make", [Lasso, ElasticNet])
    def test_a_relative_penalty_of_one_is_where_all_is_zero(
        self, make: type[Lasso] | type[ElasticNet], signed: bool
    ) -> None:
        statistics = Statistics.of(*DENSE["plain"])
        assert not make(1.0 + 1e-9, signed=signed).solve(statistics).coefficients.any()
        assert np.count_nonzero(make(1.0 - 1e-6, signed=signed).solve(statistics).coefficients) == 1

    @pytest.mark.parametrize("penalty", [1e-8, 1e-6, 1e-3])
    def test_absolute_penalties_are_scikit_learns(self, penalty: float) -> None:
        from sklearn import linear_model

        D, v = planted(20, n=300)
        D, v = D * 0.05, v * 0.05
        statistics = Statistics.of(D, v)
        options = {"fit_intercept": False, "tol": 1e-14, "max_iter": 10**6}
        pairs = [
            (Lasso(penalty, relative=False), linear_model.Lasso(penalty, **options)),
            (
                ElasticNet(penalty, l1_ratio=0.1, relative=False),
                linear_model.ElasticNet(penalty, l1_ratio=0.1, **options),
            ),
            (Ridge(penalty, relative=False), linear_model.Ridge(penalty, fit_intercept=False)),
        ]
        for ours, theirs in pairs:
            assert close(ours.solve(statistics).coefficients, theirs.fit(D, v).coef_, 1e-7)

    def test_without_a_penalty_they_are_least_squares(self) -> None:
        statistics = Statistics.of(*DENSE["plain"])
        for signed in (False, True):
            expected = Nnls(signed=signed).solve(statistics).coefficients
            for solver in (Lasso(0.0, signed=signed), ElasticNet(0.0, signed=signed), Ridge(0.0, signed=signed)):
                assert close(solver.solve(statistics).coefficients, expected)

    @pytest.mark.parametrize("penalty", [0.0, 1e-18, 1e-14])
    def test_a_vanishing_ridge_over_copies_is_least_squares(self, penalty: float) -> None:
        D, v = planted(21)
        statistics = Statistics.of(np.column_stack([D, D[:, 0]]), v)
        expected = Nnls(signed=True).solve(statistics).coefficients
        assert close(Ridge(penalty).solve(statistics).coefficients, expected)

    def test_rounding_does_not_make_an_atom_active(self) -> None:
        D = np.linalg.qr(planted(22)[0])[0]
        solution = Lasso(0.0).solve(Statistics.of(D, D[:, 0] + D[:, 1]))
        assert np.flatnonzero(solution.coefficients).tolist() == [0, 1]


class TestActiveSet:
    @given(seed=seeds, atoms=st.integers(2, 8))
    @settings(max_examples=200, deadline=None)
    def test_a_walk_never_raises_the_objective(self, seed: int, atoms: int) -> None:
        rng = np.random.default_rng(seed)
        D = rng.standard_normal((atoms + 1, atoms)) + rng.standard_normal((atoms + 1, 1))
        H, c, l1 = D.T @ D, rng.standard_normal(atoms), 0.1 * rng.random(atoms)
        start = np.where(rng.random(atoms) < 0.7, rng.standard_normal(atoms), 0.0)

        def objective(z: FloatArray) -> float:
            return float(0.5 * z @ H @ z - c @ z + l1 @ np.abs(z))

        end = active_set._settle(H, c, l1, start, np.sign(start))
        assert objective(end) <= objective(start) * (1.0 + np.sign(objective(start)) * 1e-12)
        assert (end * start >= 0.0).all()


class TestOmp:
    def test_agrees_with_scikit_learn_on_the_gram_matrix(self) -> None:
        from sklearn.linear_model import orthogonal_mp_gram

        D, v = planted(30, rho=0.5)
        D /= np.linalg.norm(D, axis=0)
        for count in range(1, 9):
            ours = Omp(n_atoms=count, tolerance=0.0).solve(Statistics.of(D, v)).coefficients
            assert close(ours, orthogonal_mp_gram(D.T @ D, D.T @ v, n_nonzero_coefs=count))

    @pytest.mark.parametrize("tolerance", [0.5, 0.2, 0.1])
    def test_tolerance_is_a_share_of_the_energy(self, tolerance: float) -> None:
        from sklearn.linear_model import orthogonal_mp_gram

        D, v = planted(31)
        D /= np.linalg.norm(D, axis=0)
        v = 1e-5 * v
        ours = Omp(tolerance=tolerance).solve(Statistics.of(D, v))
        theirs = orthogonal_mp_gram(D.T @ D, D.T @ v, tol=tolerance * (v @ v), norms_squared=np.array([v @ v]))
        assert close(ours.coefficients, theirs)
        assert 0 < ours.iterations == np.count_nonzero(theirs) < 8

    def test_length_of_an_atom_does_not_matter(self) -> None:
        D = np.array([[100.0, 0.6], [0.0, 0.8]])
        chosen = Omp(n_atoms=1).solve(Statistics.of(D, np.array([0.5, 1.0]))).coefficients
        assert np.flatnonzero(chosen).tolist() == [1]


class TestDotProduct:
    def test_threshold_applies_to_what_is_returned(self) -> None:
        statistics = Statistics.of(np.diag([0.1, 10.0, 1.0]), np.array([0.002, 0.05, -3.0]))
        assert DotProduct(0.01).solve(statistics).coefficients == pytest.approx([0.02, 0.0, 0.0])
        paper = DotProduct(0.01, normalized=False)
        assert paper.solve(statistics).coefficients == pytest.approx([0.0, 0.05, 0.0])
        signed = DotProduct(0.01, normalized=False, signed=True)
        assert signed.solve(statistics).coefficients == pytest.approx([0.0, 0.05, -3.0])


class TestFailure:
    @pytest.mark.parametrize("problem", ["plain", "siblings", "wide"])
    def test_nnls_does_not_depend_on_scipy_succeeding(self, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def give_up(*_: object) -> None:
            raise RuntimeError("Maximum number of iterations reached.")

        statistics = Statistics.of(*DENSE[problem])
        expected = Nnls().solve(statistics)
        monkeypatch.setattr("scipy.optimize.nnls", give_up)
        solution = Nnls().solve(statistics)
        assert solution.status is expected.status
        assert solution.iterations > 0
        assert close(solution.coefficients, expected.coefficients, 1e-6)

    def test_proximal_steps_run_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("unmerge.solvers.active_set.PROXIMAL_STEPS", 1)
        D, v = planted(40)
        solution = Lasso().solve(Statistics.of(np.column_stack([D, D[:, 0]]), v))
        assert solution.status is Status.NOT_CONVERGED
        assert "approximate" in solution.message
        assert solution.groups == ((0, 8),)


class TestMaking:
    @pytest.mark.parametrize(
        ("make", "options", "message"),
        [
            (Nnls, {"threshold": -1.0}, "threshold is -1.0"),
            (DotProduct, {"threshold": np.nan}, "threshold is nan"),
            (Lasso, {"penalty": -1e-9}, "penalty is -1e-09"),
            (Ridge, {"penalty": np.inf}, "penalty is inf"),
            (ElasticNet, {"penalty": -1.0}, "penalty is -1.0"),
            (ElasticNet, {"l1_ratio": 0.0}, "for 0 use Ridge"),
            (ElasticNet, {"l1_ratio": 1.5}, "l1_ratio is 1.5"),
            (Omp, {"n_atoms": 0}, "expected at least 1"),
            (Omp, {"tolerance": 1.0}, "tolerance is 1.0"),
            (Omp, {"tolerance": -1e-9}, "tolerance is -1e-09"),
        ],
    )
    def test_invalid_hyper_parameters(self, make: type, options: dict[str, float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make(**options)

    @pytest.mark.parametrize("name", SOLVERS)
    def test_the_dict_names_them(self, name: str) -> None:
        for signed in (False, True):
            solver = SOLVERS[name](signed=signed)
            assert isinstance(solver, Solver)
            assert (solver.name, solver.signed) == (name, signed)

    def test_every_solver_has_a_row(self) -> None:
        assert {case.solver.name for case in CASES} == set(SOLVERS)

    @every_case
    def test_a_solver_is_frozen(self, case: Case) -> None:
        with pytest.raises((dataclasses.FrozenInstanceError, TypeError)):
            case.solver.signed = True

    def test_importing_them_is_light(self) -> None:
        script = "import sys, unmerge.solvers, unmerge.evidence.intervals; sys.exit('sklearn' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


class TestProblem:
    def test_is_in_unit_vectors(self) -> None:
        D, v = planted(50, atoms=3)
        D = D * np.array([1e-6, 1.0, 1e6])
        problem = Problem.of(Statistics.of(np.insert(D, 1, 0.0, axis=1), v))
        unit = D / np.linalg.norm(D, axis=0)
        assert problem.kept.tolist() == [0, 2, 3]
        assert problem.cosines == pytest.approx(unit.T @ unit)
        assert problem.correlation == pytest.approx(unit.T @ v / np.linalg.norm(v))
        assert problem.solution(np.ones(3)).coefficients[[0, 2, 3]] == pytest.approx(
            np.linalg.norm(v) / np.linalg.norm(D, axis=0)
        )

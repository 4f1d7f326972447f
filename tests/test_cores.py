"""How a target meets the atoms, and what is seen of each, against dense float64 matrices and numpy's SVD."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmerge import accumulate, cores, task_vector
from unmerge.accumulate import Contact, Plan
from unmerge.attribution import open_target
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.compress import materialise
from unmerge.cores import WEAKEST
from unmerge.corners import remainders
from unmerge.dictionary import Atom, Base, Dictionary, combine, open_atom, open_base
from unmerge.evidence.presence import Core
from unmerge.regression import Regression, regress
from unmerge.task_vector import LowRank
from unmerge.testing import quantise, tiny_model, write_adapter, write_checkpoint, write_safetensors

EMPTY = Dictionary((), {})
PARTS = ("cores", "along", "across", "corner")


class World:
    """A base, LoRA adapters of different modules, a full fine-tune, and merges of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(17)
        self.model = {name: quantise(value, "BF16") for name, value in tiny_model(rng).items()}
        write_checkpoint(folder / "base", self.model)
        self.changes = {
            "attention": write_adapter(folder / "attention", rng, self.model),
            "values": write_adapter(folder / "values", rng, self.model, modules=["v_proj", "down_proj"], rank=3),
            "head": write_adapter(folder / "head", rng, self.model, modules=["lm_head", "q_proj"], rank=2, alpha=1.0),
            "deficient": self.deficient(rng),
        }
        tuned = {key: value + 0.003 * rng.standard_normal(value.shape) for key, value in self.model.items()}
        write_checkpoint(folder / "full", tuned, "F32")
        self.changes["full"] = {key: quantise(tuned[key], "F32") - self.model[key] for key in tuned}
        self.merge("merged", {"attention": 0.5, "values": 0.3, "head": 0.4, "deficient": 0.2, "full": 0.1})
        self.merge("planted", {"attention": 0.5, "values": 0.3, "deficient": 0.2}, "F32")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert len(self.model[name]) == 64
        short: dict[str, Any] = {
            name: self.model[name][:50] + 0.01 for name in ("model.embed_tokens.weight", "lm_head.weight")
        }
        self.merge("short", {"attention": 0.5, "values": -0.3}, **short)

    def deficient(self, rng: np.random.Generator) -> dict[str, FloatArray]:
        """Write an adapter of rank 4 that has 3 directions, one of them weak, and none at all in one matrix."""
        folder = self.folder / "deficient"
        folder.mkdir()
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        tensors, changes = {}, {}
        for name in sorted(self.model):
            if "q_proj.weight" in name or "o_proj.weight" in name:
                a, b = 0.02 * rng.standard_normal((4, 32)), 0.02 * rng.standard_normal((32, 4))
                b[:, 3], b[:, 2] = -b[:, 0], 0.1 * b[:, 2]
                b = 0.0 * b if name == "model.layers.1.self_attn.o_proj.weight" else b
                a, b = quantise(a, "F32"), quantise(b, "F32")
                module = f"base_model.model.{name.removesuffix('.weight')}"
                tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = a, b
                changes[name] = 2.0 * b @ a
        write_safetensors(folder / "adapter_model.safetensors", tensors, "F32")
        return changes

    def merge(self, name: str, weights: dict[str, float], dtype: str = "BF16", **more: Any) -> None:
        merged = {
            key: value + sum(weight * self.changes[atom].get(key, 0.0) for atom, weight in weights.items())
            for key, value in self.model.items()
        }
        write_checkpoint(self.folder / name, {**merged, **more}, dtype)

    @property
    def base(self) -> Base:
        return open_base(str(self.folder / "base"))

    def atoms(self, *names: str) -> list[Atom]:
        return [open_atom(str(self.folder / name), self.base) for name in names or self.changes]

    def regress(self, *names: str, target: str = "merged", contacts: bool = True, **options: Any) -> Regression:
        base = self.base
        goal = open_target(str(self.folder / target), base)
        extra = options.pop("extra", None)
        dictionary = options.pop("dictionary", EMPTY)
        extra = self.atoms(*names) if extra is None else extra
        return regress(goal.vector, goal.rows, dictionary, extra, base, contacts=contacts, **options)

    def change(self, target: str, name: str, rows: int) -> FloatArray:
        return materialise(open_target(str(self.folder / target), self.base).vector, name)[:rows]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def factors(regression: Regression, name: str) -> dict[str, tuple[FloatArray, FloatArray]]:
    """The low-rank changes of one tensor by digest, as dense factors."""
    found = {}
    for vector in (*regression.directions, *(atom.vector for atom in regression.atoms)):
        delta = vector.deltas.get(name)
        if isinstance(delta, LowRank):
            found[vector.digest] = (delta.left(0, regression.rows[name]) * delta.scale, delta.right())
    return found


def assert_contacts(world: World, regression: Regression, target: str = "merged") -> None:
    """Every part equals L' V R', V[rows] R', L' V[:, columns] and V[rows][:, columns]."""
    assert regression.contacts
    for name, contact in regression.contacts.items():
        V = world.change(target, name, regression.rows[name])
        dense = factors(regression, name)
        scale = np.abs(V).max()
        start = 0
        assert contact.rows.tolist() == sorted(set(contact.rows.tolist()))
        np.testing.assert_allclose(contact.corner, V[np.ix_(contact.rows, contact.columns)], rtol=1e-6, atol=0)
        for digest, rank in contact.ranks:
            L, R = dense[digest]
            assert L.shape[1] == rank
            own = slice(start, start + rank)
            bound = scale * np.abs(L).max() * np.abs(R).max() * 1e-9
            np.testing.assert_allclose(contact.cores[own, :rank], L.T @ V @ R.T, rtol=1e-9, atol=bound)
            assert not contact.cores[own, rank:].any()
            exact = V[contact.rows] @ R.T
            np.testing.assert_allclose(contact.along[:, own], exact, rtol=1e-6, atol=np.abs(exact).max() * 1e-7)
            np.testing.assert_allclose(contact.across[own], L.T @ V[:, contact.columns], rtol=1e-9, atol=bound)
            start += rank
        assert start == len(contact.cores) == len(contact.across) == contact.along.shape[1]


def same_contacts(first: Regression, second: Regression) -> None:
    assert first.contacts.keys() == second.contacts.keys()
    for name, one in first.contacts.items():
        two = second.contacts[name]
        assert one.ranks == two.ranks
        for part in ("rows", "columns", *PARTS):
            np.testing.assert_array_equal(getattr(one, part), getattr(two, part))


class TestContact:
    def test_of_a_dense_target_equals_dense_products(self, world: World) -> None:
        found = world.regress()
        assert set(found.contacts) == {name for name, value in world.model.items() if value.ndim == 2}
        assert_contacts(world, found)

    @pytest.mark.parametrize("target", ["attention", "head"])
    def test_of_an_adapter_equals_dense_products(self, world: World, target: str) -> None:
        found = world.regress(target=target)  # itself among the atoms
        assert set(found.contacts) == set(world.changes[target])
        assert_contacts(world, found, target)

    @settings(max_examples=10, deadline=None)
    @given(
        block=st.sampled_from([1, 40, 700, 10**6]),
        unit=st.integers(1, 3),
        lines=st.sampled_from([1, 9, 33, 256]),
        target=st.sampled_from(["merged", "attention", "short"]),
    )
    def test_of_blocks_and_lines_of_any_number(
        self, world: World, block: int, unit: int, lines: int, target: str
    ) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(task_vector, "BLOCK_ELEMENTS", block)
            patch.setattr(accumulate, "BLOCK_ELEMENTS", block)
            patch.setattr(accumulate, "UNIT_BLOCKS", unit)
            patch.setattr(accumulate, "LINES", lines)
            found = world.regress("attention", "values", "head", "full", target=target)
        assert_contacts(world, found, target)
        for contact in found.contacts.values():
            assert len(contact.rows) <= lines
            assert len(contact.columns) <= lines

    @pytest.mark.parametrize("known", [0, 1, 3])
    def test_with_a_resized_vocabulary_and_a_dictionary(self, world: World, known: int) -> None:
        atoms = world.atoms("attention", "head", "full")
        dictionary = combine(world.base, atoms[:known]) if known else EMPTY
        found = world.regress(target="short", dictionary=dictionary, extra=atoms[known:])
        assert found.rows["lm_head.weight"] == 50
        assert "lm_head.weight" in found.contacts
        assert_contacts(world, found, "short")
        same_contacts(found, world.regress("attention", "head", "full", target="short"))

    def test_threads_of_our_own_and_joblib_s_make_the_same_bits(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "joblib", joblib)
        theirs = world.regress(workers=2)
        monkeypatch.delitem(sys.modules, "joblib")
        ours = world.regress(workers=2)
        assert "joblib" not in sys.modules
        same_contacts(ours, theirs)
        np.testing.assert_array_equal(ours.total.gram, theirs.total.gram)

    def test_lines_are_different_ones_in_each_tensor_and_the_same_again(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(accumulate, "LINES", 10)
            rows, columns = accumulate.lines("a", (100, 50))
            again, _ = accumulate.lines("a", (100, 50))
            others, _ = accumulate.lines("b", (100, 50))
        assert len(set(rows.tolist())) == len(set(columns.tolist())) == 10
        assert rows.max() < 100
        assert columns.max() < 50
        assert rows.tolist() == again.tolist() != others.tolist()

    @pytest.mark.parametrize("target", ["merged", "attention"])
    def test_neither_workers_nor_the_order_of_atoms_change_a_bit(self, world: World, target: str) -> None:
        names = list(world.changes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(task_vector, "BLOCK_ELEMENTS", 300)
            patch.setattr(accumulate, "BLOCK_ELEMENTS", 300)
            patch.setattr(accumulate, "UNIT_BLOCKS", 2)
            reference = world.regress(*names, target=target, workers=1)
            same_contacts(reference, world.regress(*names[::-1], target=target, workers=4))

    def test_of_an_atom_given_twice_is_there_twice(self, world: World) -> None:
        base = world.base
        twice = [open_atom(f"{name}={world.folder / 'values'}", base) for name in ("one", "two")]
        found = world.regress(extra=twice)
        assert_contacts(world, found)
        for contact in found.contacts.values():
            assert len(contact.ranks) == len({*contact.ranks}) + 1
            assert (contact.across[:3] == contact.across[3:]).all()

    def test_of_no_low_rank_change_is_none(self, world: World, tmp_path: Path) -> None:
        tuned = {name: value + 0.1 * (value.ndim == 1) for name, value in world.model.items()}
        atom = open_atom(str(write_checkpoint(tmp_path / "norms", tuned, "F32")), world.base)
        assert not world.regress(extra=[atom]).contacts

    def test_is_not_kept_unless_asked_for(self, world: World) -> None:
        found = world.regress(contacts=False)
        assert not found.contacts
        assert not found.directions


class TestStatistics:
    @pytest.mark.parametrize("target", ["merged", "attention", "short"])
    def test_of_adapters_are_the_same_bits_with_contacts(self, world: World, target: str) -> None:
        names = ["attention", "values", "head", "deficient"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(task_vector, "BLOCK_ELEMENTS", 700)
            patch.setattr(accumulate, "BLOCK_ELEMENTS", 700)
            one, two = (world.regress(*names, target=target, contacts=asked) for asked in (False, True))
        for first, second in zip(one.tensors, two.tensors, strict=True):
            assert (first.name, first.read, first.touched) == (second.name, second.read, second.touched)
            for part in ("gram", "correlation", "energy", "rounding", "count"):
                np.testing.assert_array_equal(getattr(first.statistics, part), getattr(second.statistics, part))

    @pytest.mark.parametrize("target", ["merged", "attention"])
    def test_of_full_checkpoints_are_the_same_with_contacts(self, world: World, target: str) -> None:
        one, two = (world.regress(target=target, contacts=asked).total for asked in (False, True))
        np.testing.assert_allclose(two.gram, one.gram, rtol=1e-12, atol=1e-16)
        np.testing.assert_allclose(two.correlation, one.correlation, rtol=1e-12, atol=1e-16)
        assert two.energy == pytest.approx(one.energy, rel=1e-14)
        assert two.count == one.count


class TestMemory:
    @staticmethod
    def plans(world: World, **options: Any) -> tuple[Plan, Regression]:
        seen: list[Plan] = []

        def start(plan: Plan) -> Callable[[int], None]:
            seen.append(plan)
            return lambda _: None

        regression = world.regress(start=start, **options)
        assert len(seen) == 1
        return seen[0], regression

    def nbytes(self, contacts: Mapping[str, Contact]) -> int:
        return sum(getattr(contact, part).nbytes for contact in contacts.values() for part in PARTS)

    @pytest.mark.parametrize("workers", [1, 3])
    @pytest.mark.parametrize("target", ["merged", "attention"])
    def test_of_a_plan_holds_the_contacts(self, world: World, workers: int, target: str) -> None:
        plan, regression = self.plans(world, workers=workers, target=target)
        assert plan.kept_memory >= self.nbytes(regression.contacts) > 0
        assert plan.memory == workers * plan.unit_memory + plan.kept_memory

    def test_of_a_plan_without_contacts_is_that_of_the_workers(self, world: World) -> None:
        plan, _ = self.plans(world, contacts=False, workers=2)
        assert plan.kept_memory == 0
        assert plan.memory == 2 * plan.unit_memory

    def test_hardly_depends_on_what_a_dictionary_knows(self, world: World) -> None:
        atoms = world.atoms("attention", "head")
        kept = [
            self.plans(world, target="short", dictionary=dictionary, extra=extra)[0].kept_memory
            for dictionary, extra in ((EMPTY, atoms), (combine(world.base, atoms), []))
        ]
        # The tensors that are planned apart have a largest one each.
        assert kept[0] == pytest.approx(kept[1], rel=0.01)


@dataclass(frozen=True)
class Dense:
    """One tensor in full: the target's change and the atoms', as matrices."""

    V: FloatArray
    atoms: dict[int, FloatArray]

    @classmethod
    def of(cls, world: World, regression: Regression, name: str, target: str) -> Dense:
        dense = factors(regression, name)
        atoms = {
            place: dense[vector.digest][0] @ dense[vector.digest][1]
            for place, vector in enumerate(regression.directions)
            if name in vector.deltas and vector.digest in dense
        }
        return cls(world.change(target, name, regression.rows[name]), atoms)

    def remainder(self, coefficients: FloatArray) -> FloatArray:
        return np.asarray(self.V - sum(coefficients[atom] * change for atom, change in self.atoms.items()))

    def core(
        self, contact: Contact, atom: int, coefficients: FloatArray, relatives: Sequence[int], floor: float
    ) -> Core | None:
        U, S, Wt = np.linalg.svd(self.atoms[atom], full_matrices=False)
        k = min(int(np.count_nonzero(WEAKEST * S[0] < S)), min(len(contact.rows), len(contact.columns)) // 3)
        if not k or S[0] == 0.0:
            return None
        U, S, W = U[:, :k], S[:k], Wt[:k].T
        R = self.remainder(coefficients)
        outside_w, outside_u = R - R @ W @ W.T, R - U @ U.T @ R
        above, beside = (U.T @ outside_w)[:, contact.columns], (outside_u @ W)[contact.rows]
        n = cores.LEVEL_LINES
        outside = (outside_u - outside_u @ W @ W.T)[np.ix_(contact.rows[:n], contact.columns[:n])]
        changes = [self.atoms.get(other, np.zeros_like(R)) for other in relatives]
        return Core(
            None,
            S,
            U.T @ R @ W + coefficients[atom] * np.diag(S),
            above @ above.T / above.shape[1] + floor * np.eye(k),
            beside.T @ beside / beside.shape[0] + floor * np.eye(k),
            float(np.mean(outside**2)) + floor,
            np.array([U.T @ change @ W for change in changes]).reshape(-1, k, k),
        )


def assert_core(found: Core, dense: Core, scale: float) -> None:
    """Equal but for the signs of singular vectors: each pair may be turned, and both turn together."""
    assert found.singular == pytest.approx(dense.singular, rel=1e-6)
    assert np.diag(found.matched) == pytest.approx(np.diag(dense.matched), abs=scale)
    signs = np.ones(len(found.singular))
    for first in range(len(signs) - 1):  # taken from `left`, whose elements turn in the same way
        signs[first + 1] = signs[first] * np.sign(found.left[first, first + 1] * dense.left[first, first + 1])
    turn = np.outer(signs, signs)
    assert found.matched * turn == pytest.approx(dense.matched, abs=scale)
    assert found.left * turn == pytest.approx(dense.left, abs=scale**2 + 1e-5 * np.abs(dense.left).max())
    assert found.right * turn == pytest.approx(dense.right, abs=scale**2 + 1e-5 * np.abs(dense.right).max())
    assert found.level == pytest.approx(dense.level, rel=1e-4)
    assert found.relatives.shape == dense.relatives.shape
    assert found.relatives * turn == pytest.approx(dense.relatives, abs=scale)


class TestCores:
    @pytest.mark.parametrize("target", ["merged", "planted", "short"])
    @pytest.mark.parametrize("lines", [21, 256])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_equal_a_dense_computation(self, world: World, target: str, lines: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(accumulate, "LINES", lines)
            patch.setattr(cores, "LEVEL_LINES", 13)
            regression = world.regress(target=target)
            coefficients = rng.uniform(0.1, 1.0, len(regression.atoms)) * rng.choice([-1.0, 1.0])
            relatives = {0: [1, 3], 2: [0], 3: [2, 4, 0], 4: []}
            floor = dict.fromkeys(regression.contacts, 1e-9)
            found = cores.cores(regression, coefficients, relatives, floor)
            expected: dict[int, list[Core]] = {atom: [] for atom in range(len(regression.atoms))}
            for name, contact in regression.contacts.items():
                dense = Dense.of(world, regression, name, target)
                for atom in dense.atoms:
                    core = dense.core(contact, atom, coefficients, relatives.get(atom, ()), 1e-9)
                    expected[atom].extend([core] if core else [])
        assert found.keys() == expected.keys()
        for atom, ours in found.items():
            assert len(ours) == len(expected[atom]) > 0
            for one, two in zip(ours, expected[atom], strict=True):
                assert_core(one, two, 1e-6 * float(two.singular[0] + np.abs(two.matched).max()))

    def test_of_what_was_planted_are_its_weights(self, world: World) -> None:
        regression = world.regress("attention", "values", "deficient", target="planted")
        planted = {"attention": 0.5, "values": 0.3, "deficient": 0.2}
        weights = np.array([planted[atom.name] for atom in regression.atoms])
        for atom, seen in cores.cores(regression, weights, {}, {}).items():
            for core in seen:
                exact = weights[atom] * np.diag(core.singular)
                assert core.matched == pytest.approx(exact, abs=2e-6 * core.singular[0])
                assert core.level < 1e-6 * float(core.singular[0] ** 2)

    def test_are_of_the_tensors_that_an_atom_changes(self, world: World) -> None:
        regression = world.regress()
        found = cores.cores(regression, np.ones(len(regression.atoms)), {}, {})
        counts = {regression.atoms[atom].name: len(seen) for atom, seen in found.items()}
        assert counts == {"attention": 8, "values": 4, "head": 3, "deficient": 3, "full": 16}
        head = next(atom for atom in found if regression.atoms[atom].name == "head")
        assert sorted(core.layer is None for core in found[head]) == [False, False, True]

    def test_of_a_deficient_adapter_have_its_real_rank(self, world: World) -> None:
        regression = world.regress("deficient", "attention")
        place = [atom.name for atom in regression.atoms].index("deficient")
        found = cores.cores(regression, np.ones(2), {}, {})[place]
        assert [len(core.singular) for core in found] == [3, 3, 3]

    def test_are_of_atoms_with_a_coefficient_alone(self, world: World) -> None:
        regression = world.regress()
        coefficients = np.array([0.0, 0.5, 0.0, -0.5, 0.0])
        assert sorted(cores.cores(regression, coefficients, {}, {})) == [1, 3]
        assert cores.cores(regression, np.zeros(5), {}, {}) == {}

    def test_of_copies_are_the_same(self, world: World) -> None:
        base = world.base
        names = ("one", "two")
        regression = world.regress(extra=[open_atom(f"{name}={world.folder / 'values'}", base) for name in names])
        first, second = cores.cores(regression, np.array([0.1, 0.1]), {0: [1], 1: [0]}, {}).values()
        for one, two in zip(first, second, strict=True):
            assert one.matched == pytest.approx(two.matched, rel=1e-6, abs=1e-12)
            assert one.relatives[0] == pytest.approx(np.diag(one.singular), abs=1e-9 * one.singular[0])

    def test_see_at_most_a_third_of_the_lines(self, world: World) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(accumulate, "LINES", 8)
            regression = world.regress("attention", "head")
            found = cores.cores(regression, np.ones(2), {}, {})
        assert {len(core.singular) for seen in found.values() for core in seen} == {2}

    def test_without_room_for_one_direction_are_none(self, world: World) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(accumulate, "LINES", 2)
            regression = world.regress("attention", "head")
            assert cores.cores(regression, np.ones(2), {}, {}) == {0: [], 1: []}

    def test_of_a_higher_floor_are_noisier_by_it(self, world: World) -> None:
        regression = world.regress("attention", target="planted")
        low, high = (
            cores.cores(regression, np.array([0.5]), {}, dict.fromkeys(regression.contacts, floor))[0]
            for floor in (1e-8, 3e-8)
        )
        for one, two in zip(low, high, strict=True):
            assert two.level - one.level == pytest.approx(2e-8)
            assert two.left - one.left == pytest.approx(2e-8 * np.eye(4), abs=1e-15)
            assert two.right - one.right == pytest.approx(2e-8 * np.eye(4), abs=1e-15)


class TestRemainders:
    @pytest.mark.parametrize("target", ["merged", "short", "attention"])
    def test_corners_are_what_the_atoms_leave(self, world: World, target: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(accumulate, "LINES", 20)
            regression = world.regress(target=target)
        coefficients = np.array([0.5, 0.0, -0.3, 0.2, 0.7])
        names = []
        for name, corner in remainders(regression, coefficients, names=regression.contacts):
            contact = regression.contacts[name]
            exact = Dense.of(world, regression, name, target).remainder(coefficients)
            kept = exact[np.ix_(contact.rows, contact.columns)]
            assert corner == pytest.approx(kept, abs=1e-6 * np.abs(exact).max())
            names.append(name)
        assert names == list(regression.contacts)
        assert [name for name, _ in remainders(regression, coefficients, names=names[:2])] == names[:2]

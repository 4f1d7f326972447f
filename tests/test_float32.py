"""Large tensors in float32 against the same pass in float64, and what must not change a bit of them."""

from __future__ import annotations

import threading
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unmerge import accumulate, float32
from unmerge.attribution import open_target
from unmerge.checkpoint import tensor
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.dictionary import Atom, Dictionary, combine, open_atom, open_base
from unmerge.errors import TargetError
from unmerge.regression import Regression, regress
from unmerge.testing import quantise, tiny_model, write_adapter, write_checkpoint

EMPTY = Dictionary((), {})


class World:
    """Models of 96 columns, of which the test calls every matrix large; adapters, full fine-tunes and merges."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(3)
        model = tiny_model(rng, layers=1, hidden=96, vocabulary=200)
        self.model = {name: quantise(value, "BF16") for name, value in model.items()}
        write_checkpoint(folder / "base", self.model)
        self.changes: dict[str, dict[str, FloatArray]] = {
            "one": write_adapter(folder / "one", rng, self.model, rank=8),
            "halves": write_adapter(folder / "halves", rng, self.model, rank=3, alpha=5.0, dtype="BF16"),
            "head": write_adapter(folder / "head", rng, self.model, modules=["lm_head", "up_proj"], rank=5),
        }
        for name, dtype in (("full", "BF16"), ("full16", "F16"), ("full32", "F32")):
            tuned = {
                key: quantise(value + 0.003 * rng.standard_normal(value.shape), dtype)
                for key, value in self.model.items()
            }
            write_checkpoint(folder / name, tuned, dtype)
            self.changes[name] = {key: tuned[key] - self.model[key] for key in tuned}
        for dtype in ("BF16", "F16", "F32"):
            self.merge(f"merge{dtype}", {"one": 0.5, "halves": 0.3, "full16": 0.2}, dtype)

    def merge(self, name: str, weights: dict[str, float], dtype: str, **more: FloatArray) -> None:
        merged = {
            key: value + sum(weight * self.changes[atom].get(key, 0.0) for atom, weight in weights.items())
            for key, value in self.model.items()
        }
        write_checkpoint(self.folder / name, {**merged, **more}, dtype)

    def regress(self, target: str, names: tuple[str, ...] = (), known: int = 0, **options: Any) -> Regression:
        base = open_base(str(self.folder / "base"))
        atoms: list[Atom] = [open_atom(str(self.folder / name), base) for name in names or self.changes]
        dictionary = combine(base, atoms[:known]) if known else EMPTY
        goal = open_target(str(self.folder / target), base)
        return regress(goal.vector, goal.rows, dictionary, atoms[known:], base, contacts=True, **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32, "LEAST_ELEMENTS", 1000)
    monkeypatch.setattr(float32, "BLOCK_ELEMENTS", 3_000)  # several blocks a tensor, the last one smaller
    monkeypatch.setattr(tensor, "LEAST_MAPPED", 2_000)


def assert_close(found: Regression, exact: Regression, tolerance: float) -> None:
    """Equal to a tolerance, relative to the norms that each inner product is bounded by."""
    one, two = found.total, exact.total
    norms = np.sqrt(np.diag(two.gram))
    bounds = np.outer(norms, norms)
    np.testing.assert_allclose(one.gram / bounds, two.gram / bounds, rtol=0, atol=tolerance)
    bound = norms * np.sqrt(two.energy)
    np.testing.assert_allclose(one.correlation / bound, two.correlation / bound, rtol=0, atol=tolerance)
    assert one.energy == pytest.approx(two.energy, rel=tolerance)
    assert one.rounding == pytest.approx(two.rounding, rel=1e-5)
    assert one.count == two.count


@pytest.mark.parametrize("known", [0, 3, 6])
@pytest.mark.parametrize("target", ["mergeBF16", "mergeF16", "mergeF32", "one"])
def test_statistics_and_contacts_equal_those_in_float64(world: World, target: str, known: int) -> None:
    names = tuple(name for name in world.changes if name != target)
    found = world.regress(target, names, known=min(known, len(names)))
    exact = world.regress(target, names, known=min(known, len(names)), float64=True)
    assert_close(found, exact, 3e-8)  # of matrices far smaller than those that float32 is for
    assert found.contacts.keys() == exact.contacts.keys()
    for name, contact in found.contacts.items():
        other = exact.contacts[name]
        assert contact.ranks == other.ranks
        np.testing.assert_array_equal(contact.rows, other.rows)
        np.testing.assert_array_equal(contact.columns, other.columns)
        for mine, theirs in (
            (contact.cores, other.cores),
            (contact.along, other.along),
            (contact.across, other.across),
            (contact.corner, other.corner),
        ):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


def test_memory_is_lent_again_but_never_twice_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32, "_SPARE", threading.local())
    with float32.lent("a", 10) as first, float32.lent("a", 10) as beside, float32.lent("b", 10) as other:
        assert not any(np.shares_memory(one, two) for one, two in combinations((first, beside, other), 2))
    with float32.lent("a", 5) as again:
        assert len(again) == 5
        assert np.shares_memory(again, first)
    with pytest.raises(KeyError), float32.lent("a", 20):
        raise KeyError
    monkeypatch.setattr(float32, "MOST_KEPT", 30)
    with float32.lent("a", 31) as large:
        pass
    with float32.lent("a", 31) as next_:
        assert not np.shares_memory(large, next_)


def test_float32_is_used(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = float32.meet

    def watched(*arguments: Any) -> float32.Meeting:
        asked.append(1)
        return real(*arguments)

    monkeypatch.setattr(float32, "meet", watched)
    world.regress("mergeBF16", float64=True)
    assert not asked
    world.regress("mergeBF16")
    assert asked


def test_a_merge_of_large_tensors_is_equal_to_1e_8_of_the_norms(tmp_path: Path) -> None:
    """At the size from which float32 is used by default."""
    rng = np.random.default_rng(5)
    model = {f"model.layers.0.self_attn.{name}.weight": 0.02 * rng.standard_normal((1024, 1024)) for name in "qk"}
    model = {
        name.replace(".q.", ".q_proj.").replace(".k.", ".k_proj."): quantise(v, "BF16") for name, v in model.items()
    }
    write_checkpoint(tmp_path / "base", model)
    changes = [write_adapter(tmp_path / str(number), rng, model, rank=16, size=0.012) for number in range(4)]
    merged = {name: value + 0.5 * changes[0][name] + 0.3 * changes[1][name] for name, value in model.items()}
    write_checkpoint(tmp_path / "merge", merged)
    base = open_base(str(tmp_path / "base"))
    dictionary = combine(base, [open_atom(str(tmp_path / str(number)), base) for number in range(4)])
    goal = open_target(str(tmp_path / "merge"), base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(float32, "LEAST_ELEMENTS", 1 << 20)
        patch.setattr(float32, "BLOCK_ELEMENTS", 1 << 21)
        found = regress(goal.vector, goal.rows, dictionary, (), base)
        exact = regress(goal.vector, goal.rows, dictionary, (), base, float64=True)
    assert found.total.correlation[0] != exact.total.correlation[0]
    assert_close(found, exact, 1e-8)


def test_threads_and_the_order_of_atoms_change_no_bit(world: World) -> None:
    names = tuple(world.changes)
    first = world.regress("mergeBF16", names)
    for other in (world.regress("mergeBF16", names, workers=3), world.regress("mergeBF16", names[::-1])):
        for one, two in zip(first.tensors, other.tensors, strict=True):
            np.testing.assert_array_equal(one.statistics.gram, two.statistics.gram)
            np.testing.assert_array_equal(one.statistics.correlation, two.statistics.correlation)
            assert one.statistics.energy == two.statistics.energy
        for name, contact in first.contacts.items():
            np.testing.assert_array_equal(contact.cores, other.contacts[name].cores)
            np.testing.assert_array_equal(contact.across, other.contacts[name].across)


@pytest.mark.parametrize("rows", [180, 220])
def test_a_resized_vocabulary_is_compared_in_common_rows(world: World, rows: int) -> None:
    more = {
        name: np.resize(world.model[name], (rows, 96)) + 0.01
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    world.merge(f"resized{rows}", {"one": 0.5, "head": 0.4}, "BF16", **more)
    for known in (0, 3):
        found, exact = (world.regress(f"resized{rows}", known=known, float64=choice) for choice in (False, True))
        assert_close(found, exact, 1e-8)


def test_values_that_are_not_finite_are_located(world: World) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    for dtype in ("BF16", "F32"):
        broken = world.model[name].copy()
        broken[200, 13] = np.inf
        world.merge("broken", {"one": 0.5}, dtype, **{name: broken})
        with pytest.raises(TargetError, match=rf"target: tensor '{name}' has Inf at row 200, column 13"):
            world.regress("broken")


def test_a_file_that_ends_too_early_is_told(world: World, tmp_path: Path) -> None:
    world.merge("cut", {"one": 0.5}, "BF16")
    base = open_base(str(world.folder / "base"))
    goal = open_target(str(world.folder / "cut"), base)
    file = world.folder / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    atom = open_atom(str(world.folder / "one"), base)
    with pytest.raises(Exception, match="ended too early"):
        regress(goal.vector, goal.rows, EMPTY, [atom], base)


def test_the_plan_counts_what_float32_holds(world: World) -> None:
    base = open_base(str(world.folder / "base"))
    vectors = [open_atom(str(world.folder / name), base).vector for name in ("one", "full")]
    name = "model.layers.0.self_attn.q_proj.weight"
    single = accumulate.plan({name: base.shapes[name]}, vectors)
    double = accumulate.plan({name: base.shapes[name]}, vectors, float64=True)
    block = 4 * 3_000
    assert single.unit_memory >= 3 * block
    assert single.unit_memory != double.unit_memory

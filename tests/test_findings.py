"""What is found in merges that were really made and stored: presence, weights, and what is left."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import unmerge
from tests.conftest import Shelf
from unmerge.attribution import open_target
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.compress import materialise
from unmerge.dictionary import build, open_base
from unmerge.errors import UnmergeError
from unmerge.evidence.presence import Presence
from unmerge.findings import AtomTest, _tested
from unmerge.result import Attribution, Component
from unmerge.solvers import Nnls, Solution, Status
from unmerge.testing import quantise, tiny_model, write_adapter, write_checkpoint, write_safetensors

KNOWN = ("add", "sub", "json", "xml")
UNTOUCHED = "model.layers.0.mlp.up_proj.weight"


class World:
    """A base of four layers, adapters of its attention, and merges of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rng = np.random.default_rng(23)
        shapes = tiny_model(self.rng, layers=4, hidden=64)
        self.model = {name: quantise(value, "BF16") for name, value in shapes.items()}
        self.base = str(write_checkpoint(folder / "base", self.model))
        self.changes: dict[str, dict[str, FloatArray]] = {}
        for name in (*KNOWN, "stranger"):
            self.adapter(name)
        for name in ("fine", "finer", "finest"):  # about 1 % of the weights
            self.adapter(name, size=0.011)
        self.versions("add", near=0.1, nearer=0.001)
        self.twins("twin", "sibling")
        shutil.copytree(folder / "add", folder / "copy")
        self.made = 0

    def adapter(self, name: str, **options: Any) -> None:
        self.changes[name] = write_adapter(self.folder / name, self.rng, self.model, **options)

    def rewrite(self, name: str, source: str, change: Callable[[str, FloatArray], FloatArray]) -> None:
        """Write a copy of an adapter with other factors."""
        shutil.copytree(self.folder / source, self.folder / name)
        stored = load_file(self.folder / source / "adapter_model.safetensors")
        changed = {key: change(key, value.astype(np.float64)) for key, value in stored.items()}
        write_safetensors(self.folder / name / "adapter_model.safetensors", changed, "F32")

    def versions(self, of: str, **distances: float) -> None:
        """Write adapters whose factors differ a little from those of another one."""
        for name, distance in distances.items():

            def moved(_: str, value: FloatArray, distance: float = distance) -> FloatArray:
                return np.asarray(value + distance * value.std() * self.rng.standard_normal(value.shape))

            self.rewrite(name, of, moved)

    def twins(self, first: str, second: str) -> None:
        """Write two adapters of one task, begun alike: the same inputs, and a strong output that both learned."""
        for name in (first, second):
            self.adapter(name)
        inputs = load_file(self.folder / first / "adapter_model.safetensors")
        for name in (first, second):
            stored = load_file(self.folder / name / "adapter_model.safetensors")
            for key, value in stored.items():
                if "lora_A" in key:
                    stored[key] = inputs[key]
                else:
                    value[:, 0] = 3.0 * (0.9 * inputs[key][:, 0] + 0.44 * value[:, 0])
            path = self.folder / name / "adapter_model.safetensors"
            tensors = {key: value.astype(np.float64) for key, value in stored.items()}
            write_safetensors(path, tensors, "F32")
            for key in self.changes[name]:
                module = f"base_model.model.{key.removesuffix('.weight')}"
                self.changes[name][key] = 2.0 * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]

    def write(self, merged: dict[str, FloatArray], dtype: str = "BF16") -> str:
        self.made += 1
        return str(write_checkpoint(self.folder / f"merge{self.made}", merged, dtype))

    def merge(self, dtype: str = "BF16", /, **weights: float) -> str:
        merged = {
            key: value + sum(weight * self.changes[atom].get(key, 0.0) for atom, weight in weights.items())
            for key, value in self.model.items()
        }
        return self.write(merged, dtype)

    def attribute(self, target: str, *names: str, **options: Any) -> Attribution:
        paths = [str(self.folder / name) for name in names or KNOWN]
        return unmerge.attribute(target, paths, base=self.base, workers=1, **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def by_name(result: Attribution) -> dict[str, Component]:
    return {component.name: component for component in result.components}


def present(result: Attribution) -> set[str]:
    return {component.name for component in result.components if component.present}


def holds(component: Component, weight: float) -> bool:
    assert component.interval is not None
    return component.interval[0] <= weight <= component.interval[1]


class TestPresent:
    @pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
    def test_atoms_are_found_with_their_weights(self, world: World, dtype: str) -> None:
        result = world.attribute(world.merge(dtype, add=0.6, json=0.3))
        assert present(result) == {"add", "json"}
        found = by_name(result)
        for name, weight in (("add", 0.6), ("json", 0.3)):
            assert found[name].weight == pytest.approx(weight, abs=2e-3)
            assert (found[name].evidence.p_value or 0.0) < 1e-6
            assert found[name].profile == f"constant {weight:.2f}"
        assert {found["sub"].present, found["xml"].present} == {False}
        assert result.unexplained.share == pytest.approx(result.unexplained.rounding_floor, abs=1e-3)
        assert result.verdict.startswith("2 components present: add, json. ")
        assert result.verdict.endswith("rounding accounts for all of it.")

    @pytest.mark.parametrize(
        "dtype",
        [
            "BF16",
            "F16",
            "F32",
        ],
    )
    def test_atoms_that_explain_everything_leave_nothing(self, world: World, dtype: str) -> None:
        left = world.attribute(world.merge(dtype, add=0.6, json=0.3)).unexplained
        assert (left.kind, left.rank) == ("nothing", 0)
        assert left.relative_norm < 1e-4

    def test_a_merge_of_stored_checkpoints(self, world: World) -> None:
        planted = {"add": 0.55, "json": 0.3}
        merged = {
            name: value
            + sum(
                weight * (quantise(value + world.changes[atom].get(name, 0.0), "BF16") - value)
                for atom, weight in planted.items()
            )
            for name, value in world.model.items()
        }
        result = world.attribute(world.write(merged))
        assert present(result) == set(planted)
        for name, weight in planted.items():
            assert by_name(result)[name].weight == pytest.approx(weight, abs=1e-3)
        assert result.unexplained.rounding == "from checkpoints"
        assert result.unexplained.share == pytest.approx(result.unexplained.rounding_floor, abs=1e-3)

    def test_intervals_hold_the_weights_of_merges_in_storage_arithmetic(self, world: World) -> None:
        """As mergekit's linear merge with dtype bfloat16."""
        rng = np.random.default_rng(5)
        inside: list[bool] = []
        for _ in range(8):
            planted = dict(zip(("fine", "finer"), quantise(rng.uniform(0.25, 0.5, 2), "BF16"), strict=True))
            planted["none"] = 1.0 - sum(planted.values())
            merged = {}
            for name, value in world.model.items():
                models = [quantise(value + world.changes.get(atom, {}).get(name, 0.0), "BF16") for atom in planted]
                products = [
                    quantise(weight * model, "BF16") for weight, model in zip(planted.values(), models, strict=True)
                ]
                merged[name] = np.asarray(sum(products))
            result = world.attribute(world.write(merged), "fine", "finer", "sub")
            assert present(result) == {"fine", "finer"}
            inside.extend(holds(by_name(result)[name], planted[name]) for name in ("fine", "finer"))
        assert np.mean(inside) >= 0.95 - 3.0 * np.sqrt(0.95 * 0.05 / 16)

    @pytest.mark.parametrize(
        ("dtype", "atoms", "stranger"),
        [
            ("BF16", ("add", "json"), None),
            ("BF16", ("add", "json"), "stranger"),
            ("BF16", ("fine", "finer"), None),
            ("BF16", ("fine", "finer"), "finest"),
        ],
        ids=["clean", "stranger", "small", "small beside a stranger"],
    )
    def test_intervals_hold_the_weights(
        self, world: World, dtype: str, atoms: tuple[str, str], stranger: str | None
    ) -> None:
        rng = np.random.default_rng(1)
        seen: list[bool] = []
        inside, ratios = [], []
        for _ in range(12):
            weights = dict(zip(atoms, rng.uniform(0.3, 1.0, 2), strict=True))
            planted = {**weights, **({stranger: 0.5} if stranger else {})}
            result = world.attribute(world.merge(dtype, **planted), *atoms, "sub", "xml")
            assert present(result) <= set(atoms)
            seen.extend(name in present(result) for name in atoms)
            for name in sorted(present(result)):
                weight, found = weights[name], by_name(result)[name]
                inside.append(holds(found, weight))
                ratios.append((found.weight or 0.0) / weight)
                assert not str(found.profile).startswith("constant") or found.profile == f"constant {found.weight:.2f}"
        assert np.mean(seen) > (0.7 if stranger else 0.99)
        # Three standard deviations.
        assert np.mean(inside) >= 0.95 - 3.0 * np.sqrt(0.95 * 0.05 / len(inside))
        assert np.mean(ratios) == pytest.approx(1.0, abs=0.01)

    @pytest.mark.parametrize("dtype", ["F16", "F32"])
    def test_beside_a_stranger_of_their_rank_without_much_rounding(self, world: World, dtype: str) -> None:
        result = world.attribute(world.merge(dtype, add=0.6, json=0.3, stranger=0.5))
        assert present(result) == {"add", "json"}

    def test_small_changes_are_not_shrunk_by_rounding(self, world: World) -> None:
        for name in ("fine", "finer"):
            world.adapter(f"{name}-small", size=0.006)
        result = world.attribute(
            world.merge(**{"fine-small": 0.7, "finer-small": 0.5}), "fine-small", "finer-small", "sub"
        )
        found = by_name(result)
        for name, weight in (("fine-small", 0.7), ("finer-small", 0.5)):
            assert found[name].present
            assert found[name].coefficient < 0.9 * weight
            assert found[name].weight == pytest.approx(weight, abs=0.01)

    def test_negative_weights_are_found_if_asked_for(self, world: World) -> None:
        target = world.merge(add=0.6, json=-0.4)
        found = by_name(world.attribute(target, signed=True))
        assert found["json"].present
        assert holds(found["json"], -0.4)
        assert not by_name(world.attribute(target))["json"].present

    def test_weights_that_rise_through_the_layers(self, world: World) -> None:
        def weight(name: str) -> float:
            layer = re.search(r"layers\.(\d+)", name)
            return 0.3 + 0.15 * int(layer[1]) if layer else 0.3

        change = world.changes["add"]
        merged = {name: value + weight(name) * change.get(name, 0.0) for name, value in world.model.items()}
        found = by_name(world.attribute(world.write(merged)))["add"]
        assert found.present
        assert found.profile == "gradient from 0.30 to 0.75"
        for layer in found.by_layer:
            assert layer.weight == pytest.approx(0.3 + 0.15 * layer.layer, abs=0.01)

    @pytest.mark.parametrize("dtype", ["BF16", "F32"])
    def test_an_atom_in_half_of_the_layers_is_not_called_absent(self, world: World, dtype: str) -> None:
        merged = {
            name: value + 0.6 * world.changes["add"].get(name, 0.0) * bool(re.search(r"layers\.[01]\.", name))
            for name, value in world.model.items()
        }
        found = by_name(world.attribute(world.write(merged, dtype)))["add"]
        assert found.coefficient > 0.2
        assert found.present is not False

    def test_neither_workers_nor_the_order_of_atoms_change_the_document(self, world: World) -> None:
        target = world.merge(add=0.6, json=0.3, stranger=0.5)
        paths = [str(world.folder / name) for name in KNOWN]
        one = unmerge.attribute(target, paths, base=world.base, workers=1)
        two = unmerge.attribute(target, paths[::-1], base=world.base, workers=3)
        assert one.to_json() == two.to_json()

    def test_a_dictionary_finds_the_same(self, world: World, tmp_path: Path) -> None:
        build(tmp_path / "d", [str(world.folder / name) for name in KNOWN[:3]], world.base)
        target = world.merge(add=0.6, json=0.3, stranger=0.5)
        mixed = unmerge.attribute(target, [tmp_path / "d", world.folder / "xml"], base=world.base, workers=1)
        plain = world.attribute(target)
        for name, component in by_name(mixed).items():
            assert component.present == by_name(plain)[name].present
            assert component.weight == pytest.approx(by_name(plain)[name].weight, rel=1e-9)


class TestAbsent:
    def test_the_sibling_of_a_stranger_is_not_accused(self, world: World) -> None:
        rng = np.random.default_rng(2)
        for _ in range(8):
            add, twin = rng.uniform(0.3, 1.0, 2)
            result = world.attribute(world.merge(add=add, twin=twin), "add", "sibling", "sub")
            found = by_name(result)
            assert not present(result) - {"add"}
            assert found["sibling"].coefficient > 0.4 * twin  # by which it would have been accused

    def test_nothing_is_found_in_a_merge_of_strangers(self, world: World) -> None:
        result = world.attribute(world.merge(stranger=0.8))
        assert not present(result)
        assert result.unexplained.share == 1.0

    def test_what_was_taken_away_is_not_there(self, world: World) -> None:
        result = world.attribute(world.merge("F32", add=0.6, xml=-0.3), "add", "xml")
        found = by_name(result)["xml"]
        assert (found.coefficient, found.weight, found.present) == (0.0, 0.0, False)
        assert found.evidence.reason.startswith("its own directions are missing")

    @pytest.mark.parametrize(
        "size",
        [
            0.001,
            0.003,
            0.006,
        ],
    )
    def test_what_is_there_is_not_called_absent_because_it_is_small(self, world: World, size: float) -> None:
        name = f"size{size}"
        world.adapter(name, size=size)
        found = by_name(world.attribute(world.merge(add=0.6, stranger=1.0, **{name: 0.5}), "add", name, "sub"))[name]
        assert found.present is not False
        if found.present is None:
            assert (found.evidence.detectable or np.inf) > 0.1

    @pytest.mark.parametrize("weight", [0.05, 0.1, 0.2, 0.25])
    def test_what_rounding_hides_beside_a_stored_stranger_is_not_called_absent(
        self, world: World, weight: float
    ) -> None:
        """Changes of 0.3 % of the weights, as in real adapters of 7B models: most of a fifth of one is rounded away."""
        if "tiny" not in world.changes:
            world.adapter("tiny", size=0.003)
            world.adapter("tiny stranger", size=0.003)
        stored = {
            name: {
                key: quantise(value + world.changes[name].get(key, 0.0), "BF16") for key, value in world.model.items()
            }
            for name in ("tiny", "tiny stranger")
        }
        merged = {
            key: weight * stored["tiny"][key] + (1.0 - weight) * stored["tiny stranger"][key] for key in world.model
        }
        found = by_name(world.attribute(world.write(merged), "tiny", "sub", "json"))["tiny"]
        assert found.present is not False
        assert holds(found, weight)
        assert (found.evidence.detectable or np.inf) > weight


class TestCopies:
    @pytest.mark.parametrize("dtype", ["F32", "BF16"])
    def test_near_copies_are_a_group(self, world: World, dtype: str) -> None:
        found = by_name(world.attribute(world.merge(dtype, add=0.6, json=0.3), "add", "near", "json", "sub"))
        assert found["add"].present
        assert found["add"].evidence.group == ("near",)
        assert found["near"].evidence.group == ("add",)
        assert found["json"].evidence.group == ()
        assert not found["near"].present

    def test_of_versions_the_wrong_one_is_not_accused(self, world: World) -> None:
        rng = np.random.default_rng(8)
        for place, distance in enumerate([0.03, 0.01, 0.003, 0.001] * 2):
            name = f"version{place}"
            world.versions("add", **{name: distance})
            add, json = rng.uniform(0.4, 1.0, 2)
            found = by_name(world.attribute(world.merge(add=add, json=json), "add", name, "json"))
            assert found["json"].present
            assert not found[name].present
            assert found["add"].present is not False

    def test_of_versions_that_rounding_hides_the_wrong_one_is_not_accused(self, world: World) -> None:
        rng = np.random.default_rng(8)
        for place in range(12):
            name = f"hidden{place}"
            world.versions("add", **{name: 1e-4})
            add, json = rng.uniform(0.4, 1.0, 2)
            found = by_name(world.attribute(world.merge(add=add, json=json), "add", name, "json"))
            assert not found[name].present
            assert found["add"].present is not False

    @pytest.mark.parametrize("dtype", ["F32", "BF16"])
    def test_exact_copies_cannot_be_told_apart(self, world: World, dtype: str) -> None:
        result = world.attribute(world.merge(dtype, add=0.6, json=0.3), "add", "copy", "json", "sub")
        found = by_name(result)
        assert present(result) == {"json"}
        for name, other in (("add", "copy"), ("copy", "add")):
            assert found[name].present is None
            assert found[name].evidence.one_of_group
            assert found[name].evidence.reason == "it or a version of it is present; which one cannot be told"
            assert found[name].evidence.group == (other,)
        assert result.unexplained.share < 0.01
        assert result.verdict.startswith(
            "1 component present: json. One of add, copy is present; it cannot be told which. "
        )

    def test_exact_copies_of_what_is_absent_are_not_called_one_of_them(self, world: World) -> None:
        found = by_name(world.attribute(world.merge(json=0.6, sub=0.5), "add", "copy", "json"))
        for name in ("add", "copy"):
            assert not found[name].present
            assert not found[name].evidence.one_of_group

    def test_of_copies_beside_a_stranger_the_stranger_is_left(self, world: World) -> None:
        target = world.merge(add=0.6, stranger=0.5)
        alone = world.attribute(target, "add", "sub").unexplained
        copies = world.attribute(target, "add", "copy", "sub").unexplained
        assert copies.share == pytest.approx(alone.share, rel=0.05)
        assert copies.rank == alone.rank


class TestNotTested:
    def test_with_top_k_presence_is_unknown(self, world: World) -> None:
        result = world.attribute(world.merge(add=0.6, json=0.3), top_k=4000)
        assert {component.present for component in result.components} == {None}
        assert {component.evidence.p_value for component in result.components} == {None}
        assert {component.evidence.reason for component in result.components} == {"not tested"}
        assert result.verdict.startswith("Presence was not tested. ")
        assert by_name(result)["add"].interval is not None
        assert (result.unexplained.kind, result.base_coefficient) == (None, None)

    def test_two_matrices_are_too_few(self, world: World) -> None:
        world.adapter("narrow", modules=["lm_head"])
        found = by_name(world.attribute(world.merge(add=0.6, narrow=0.5), "add", "narrow"))
        assert found["add"].present
        assert found["narrow"].present is None
        assert found["narrow"].evidence.reason == "too few matrices for a test"


class TestDecoys:
    def test_are_counted_and_none_is_accused(self, world: World) -> None:
        rng = np.random.default_rng(3)
        for _ in range(4):
            add, json, stranger = rng.uniform(0.2, 1.0, 3)
            result = world.attribute(world.merge(add=add, json=json, stranger=stranger), decoys=8)
            assert result.decoys is not None
            assert (result.decoys.tested, result.decoys.accused) == (8, ())
            assert set(by_name(result)) == set(KNOWN)
            assert present(result) <= {"add", "json"}

    def test_of_a_full_checkpoint(self, shelf: Shelf) -> None:
        paths = shelf.paths("add", "full")
        result = unmerge.attribute(shelf.path("merge"), paths, base=shelf.base, decoys=3, workers=1)
        assert result.decoys is not None
        assert (result.decoys.tested, result.decoys.accused) == (3, ())

    def test_none_are_made_unless_asked_for(self, world: World) -> None:
        assert world.attribute(world.merge(add=0.6)).decoys is None

    def test_an_atom_of_such_a_name_is_refused(self, world: World) -> None:
        with pytest.raises(UnmergeError, match="atom 'decoy-1' has a decoy's name"):
            unmerge.attribute(
                world.merge(add=0.6), [f"decoy-1={world.folder / 'add'}"], base=world.base, decoys=2, workers=1
            )

    def test_an_atom_of_such_a_name_is_no_decoy_where_none_were_made(self, world: World) -> None:
        atoms = [f"decoy-1={world.folder / 'add'}", str(world.folder / "json")]
        try:
            result = unmerge.attribute(world.merge(add=0.6, json=0.3), atoms, base=world.base, workers=1)
        except UnmergeError:
            return
        assert set(by_name(result)) == {"decoy-1", "json"}
        assert result.decoys is None


class TestBase:
    @pytest.mark.parametrize("factor", [1.1, 0.8])
    @pytest.mark.parametrize("dtype", ["F32", "BF16"])
    def test_a_merge_that_holds_it_more_or_less_than_once(self, world: World, factor: float, dtype: str) -> None:
        planted = {"add": 0.6, "json": 0.3}
        merged = {
            name: factor * value + sum(weight * world.changes[atom].get(name, 0.0) for atom, weight in planted.items())
            for name, value in world.model.items()
        }
        result = world.attribute(world.write(merged, dtype))
        assert result.base_coefficient is not None
        assert result.base_coefficient.removed
        assert result.base_coefficient.coefficient == pytest.approx(factor, abs=1e-3)
        assert present(result) == set(planted)
        for name, weight in planted.items():
            assert by_name(result)[name].weight == pytest.approx(weight, abs=0.01)

    def test_rounding_of_what_no_atom_changes_is_rounding(self, world: World) -> None:
        merged = {name: 1.1 * value + 0.6 * world.changes["add"].get(name, 0.0) for name, value in world.model.items()}
        left = world.attribute(world.write(merged)).unexplained
        assert left.untouched_share > 0.02
        assert left.share - left.rounding_floor < 0.01

    def test_a_plain_merge_leaves_it_alone(self, world: World) -> None:
        result = world.attribute(world.merge(add=0.6, json=0.4))
        assert result.base_coefficient is not None
        assert not result.base_coefficient.removed
        assert result.base_coefficient.coefficient == pytest.approx(1.0, abs=1e-3)

    def test_another_base_that_is_nearer_is_named(self, world: World) -> None:
        rng = np.random.default_rng(4)
        real = {name: value + 0.01 * rng.standard_normal(value.shape) for name, value in world.model.items()}
        other = world.write(real)
        merged = {name: value + 0.6 * world.changes["add"].get(name, 0.0) for name, value in real.items()}
        result = world.attribute(world.write(merged), other_bases=[world.base, other])
        (notice,) = (text for text in result.notices if "nearer" in text)
        assert f"likely it was made from {other}" in notice
        near = world.attribute(world.merge(add=0.6), other_bases=[other])
        assert not any("nearer" in text for text in near.notices)


@pytest.fixture(scope="module")
def tuned(world: World) -> dict[str, dict[str, FloatArray]]:
    """Write fine-tunes of all weights; most of a change is of low rank, as trained ones are."""
    rng = np.random.default_rng(6)
    found = {}
    for name in ("first", "second", "third"):
        change = {
            key: 0.002 * rng.standard_normal((len(value), 6)) @ rng.standard_normal((6, value.shape[1]))
            + 0.0005 * rng.standard_normal(value.shape)
            for key, value in world.model.items()
            if value.ndim == 2
        }
        stored = {key: quantise(value + change.get(key, 0.0), "BF16") for key, value in world.model.items()}
        write_checkpoint(world.folder / name, stored)
        found[name] = {key: stored[key] - world.model[key] for key in stored}
    return found


class TestFullCheckpoints:
    @pytest.mark.parametrize("dtype", ["F32", "BF16"])
    def test_are_found_and_told_from_absent_ones(
        self, world: World, tuned: dict[str, dict[str, FloatArray]], dtype: str
    ) -> None:
        merged = {
            key: value + 0.5 * tuned["first"][key] + 0.3 * world.changes["add"].get(key, 0.0)
            for key, value in world.model.items()
        }
        result = world.attribute(world.write(merged, dtype), "first", "second", "add", "json")
        assert present(result) == {"first", "add"}
        found = by_name(result)
        assert found["first"].weight == pytest.approx(0.5, abs=0.01)
        assert found["add"].weight == pytest.approx(0.3, abs=0.01)
        assert found["second"].present is False
        assert found["first"].source.kind == "checkpoint"

    def test_beside_a_stranger(self, world: World, tuned: dict[str, dict[str, FloatArray]]) -> None:
        merged = {
            key: value + 0.5 * tuned["first"][key] + 0.5 * tuned["third"][key] for key, value in world.model.items()
        }
        result = world.attribute(world.write(merged), "first", "second")
        found = by_name(result)["first"]
        assert present(result) == {"first"}
        assert found.weight == pytest.approx(0.5, abs=0.03)
        assert result.unexplained.share == pytest.approx(0.5, abs=0.1)

    def test_the_target_itself_as_an_atom_is_likely_the_base(
        self, world: World, tuned: dict[str, dict[str, FloatArray]]
    ) -> None:
        merged = {key: world.model[key] + tuned["first"][key] for key in world.model}
        merged = {key: value + 0.6 * world.changes["add"].get(key, 0.0) for key, value in merged.items()}
        result = world.attribute(world.write(merged, "F32"), "first", "add")
        assert present(result) == {"first", "add"}
        assert any(text.startswith("first is in the target with a weight of 1 beside") for text in result.notices)


class TestUnknown:
    def test_a_stranger_is_of_low_rank(self, world: World) -> None:
        left = world.attribute(world.merge(add=0.6, stranger=0.5)).unexplained
        planted = [sum(float(np.vdot(part, part)) for part in world.changes[name].values())
                   for name in ("add", "stranger")]  # fmt: skip
        share = 0.25 * planted[1] / (0.36 * planted[0] + 0.25 * planted[1])
        assert left.share == pytest.approx(share, abs=0.03)
        assert (left.kind, left.rank) == ("low rank", 4)
        base = sum(float(np.vdot(world.model[name], world.model[name])) for name in world.changes["add"])
        assert left.relative_norm == pytest.approx(np.sqrt(0.25 * planted[1] / base), rel=0.05)

    def test_noise_is_of_full_rank(self, world: World) -> None:
        rng = np.random.default_rng(0)
        merged = {
            name: value
            + 0.6 * world.changes["add"].get(name, 0.0)
            + 0.0005 * rng.standard_normal(value.shape) * (value.ndim == 2)
            for name, value in world.model.items()
        }
        result = world.attribute(world.write(merged))
        assert present(result) == {"add"}
        assert (result.unexplained.kind, result.unexplained.rank) == ("full rank", 0)
        assert result.verdict.endswith("The rest is of full rank: a sparsified merge (TIES, DARE), or training of all "
                                       "weights.")  # fmt: skip


class TestExtraction:
    def test_what_is_extracted_explains_the_rest(self, world: World, tmp_path: Path) -> None:
        target = world.merge("BF16", add=0.6, stranger=0.5)
        before = world.attribute(target, extract_to=tmp_path / "out")
        assert before.unexplained.share > 0.2
        paths = [*(world.folder / name for name in KNOWN), tmp_path / "out"]
        after = unmerge.attribute(target, paths, base=world.base, workers=1)
        found = by_name(after)
        assert present(after) == {"add", "out"}
        assert found["out"].weight == pytest.approx(1.0, abs=0.02)
        assert found["add"].weight == pytest.approx(0.6, abs=0.02)
        assert after.unexplained.share < 0.03
        extracted = open_target(str(tmp_path / "out"), open_base(world.base)).vector
        for name, change in world.changes["stranger"].items():
            ours = materialise(extracted, name)
            cosine = float(np.vdot(ours, change)) / float(np.linalg.norm(ours) * np.linalg.norm(change))
            assert cosine > 0.98

    def test_a_rank_can_be_asked_for(self, world: World, tmp_path: Path) -> None:
        world.attribute(world.merge(add=0.6, stranger=0.5), extract_to=tmp_path / "out", extract_rank=2)
        weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert {value.shape[0] for key, value in weights.items() if "lora_A" in key} == {2}

    def test_what_is_not_of_low_rank_is_refused_in_one_line(self, world: World, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        merged = {
            name: value + 0.6 * world.changes["add"].get(name, 0.0) + 0.001 * rng.standard_normal(value.shape)
            for name, value in world.model.items()
        }
        target = world.write(merged)
        with pytest.raises(UnmergeError, match=r"what is unexplained is not of low rank \(full rank\)") as caught:
            world.attribute(target, extract_to=tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
        world.attribute(target, extract_to=tmp_path / "out", extract_rank=3)
        assert (tmp_path / "out").is_dir()

    def test_a_folder_in_use_is_refused_before_anything_is_read(self, tmp_path: Path) -> None:
        with pytest.raises(UnmergeError, match=r"already exists; choose another folder for what is extracted$"):
            unmerge.attribute("no/target", ["no/atom"], base="no/base", extract_to=tmp_path)


class TestWhatTheSolverDoesWithout:
    def test_is_not_called_present_on_directions_alone(self) -> None:
        seen = Presence(0.1, 0.001, 0.1, 0.001, 15.0, 1e-12, np.zeros((0, 3)))
        solver = Nnls(signed=False)
        for credited, present in (((0.0, 0.3), None), ((0.2, 0.3), True)):
            solution = Solution(np.array(credited), Status.CONVERGED, (), 0)
            assert _tested(solution, solver, {0: AtomTest(seen, None)}, 0, [], 2).present is present

    def test_is_present_if_a_version_of_it_was_credited(self) -> None:
        seen = Presence(0.1, 0.001, 0.1, 0.001, 15.0, 1e-12, np.zeros((0, 3)))
        solution = Solution(np.array([0.0, 0.3]), Status.CONVERGED, (), 0)
        assert _tested(solution, Nnls(signed=False), {0: AtomTest(seen, None)}, 0, [(0, 1)], 2).present is True

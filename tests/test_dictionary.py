"""Dictionaries on disk: build, add, open, verify; what is damaged or of another base is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import unmerge
from tests.conftest import Shelf
from unmerge import accumulate, dictionary, fingerprint
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.checkpoint.reader import open_checkpoint
from unmerge.checkpoint.tensor import FileTensor, values
from unmerge.compress import materialise
from unmerge.dictionary import MANIFEST, add, build, open_atom, open_base, open_dictionary, read_manifest, verify
from unmerge.directions import DIRECTIONS, directions
from unmerge.errors import DictionaryError, UnmergeError
from unmerge.task_vector import LowRank, TaskVector
from unmerge.testing import quantise, tiny_model, write_checkpoint


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_attribution_with_a_dictionary_equals_attribution_with_its_atoms(shelf: Shelf, tmp_path: Path) -> None:
    build(tmp_path / "d", shelf.paths("xml", "add", "json"), shelf.base)
    direct = unmerge.attribute(shelf.path("merge"), shelf.paths("add", "json", "xml", "sub"), base=shelf.base)
    stored = unmerge.attribute(shelf.path("merge"), [str(tmp_path / "d"), shelf.path("sub")], base=shelf.base)
    assert stored.model_copy(update={"method": direct.method}) == direct


def test_what_a_dictionary_holds_is_not_hashed_again(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "d", shelf.paths("xml", "add"), shelf.base)
    hashed = [atom.vector.digest for atom in open_dictionary(tmp_path / "d", open_base(shelf.base)).atoms]
    assert hashed == [open_atom(path, open_base(shelf.base)).vector.digest for path in shelf.paths("xml", "add")]
    monkeypatch.setattr("unmerge.fingerprint.adapter_digest", None)
    opened = open_dictionary(tmp_path / "d", open_base(shelf.base))
    assert [atom.vector.digest for atom in opened.atoms] == hashed


def test_adding_gives_the_gram_matrix_of_building_at_once(shelf: Shelf, tmp_path: Path) -> None:
    assert build(tmp_path / "whole", shelf.paths("add", "full", "sub", "xml"), shelf.base)[1] == "full"
    build(tmp_path / "grown", shelf.paths("add", "full"), shelf.base)
    add(tmp_path / "grown", [shelf.path("sub")], shelf.base)
    add(tmp_path / "grown", [shelf.path("xml")], shelf.base)
    whole, grown = (open_dictionary(tmp_path / name, open_base(shelf.base)) for name in ("whole", "grown"))
    assert grown.names == whole.names
    assert grown.gram.keys() == whole.gram.keys()
    assert grown.shown.keys() == whole.shown.keys() == whole.gram.keys()
    for name, gram in whole.gram.items():
        np.testing.assert_allclose(grown.gram[name], gram, rtol=1e-12, atol=1e-15 * np.abs(gram).max())
        np.testing.assert_allclose(grown.shown[name], whole.shown[name], rtol=1e-9, atol=1e-12 * np.abs(gram).max())


def test_adding_computes_only_the_new_row(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "d", shelf.paths("add", "sub", "json"), shelf.base)
    before = everything(tmp_path / "d")
    shapes: list[tuple[int, int]] = []
    real = accumulate.unit_products

    def watched(unit: accumulate.Unit, *rest: object, **options: object) -> accumulate.Products:
        result = real(unit, *rest, **options)  # type: ignore[arg-type]
        shapes.append(result.gram.shape)
        return result

    monkeypatch.setattr(accumulate, "unit_products", watched)
    add(tmp_path / "d", [shelf.path("xml")], shelf.base)
    assert set(shapes) == {(1, 4)}
    after = everything(tmp_path / "d")
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {MANIFEST}


def test_the_same_atoms_give_the_same_bytes(shelf: Shelf, tmp_path: Path) -> None:
    for name in ("one", "two"):
        build(tmp_path / name, shelf.paths("add", "full"), shelf.base, workers=2)
    assert everything(tmp_path / "one") == everything(tmp_path / "two")


def test_a_dictionary_outlives_its_adapters(shelf: Shelf, tmp_path: Path) -> None:
    build(tmp_path / "d", shelf.paths("add", "json"), shelf.base)
    shutil.rmtree(shelf.folder / "add")
    result = unmerge.attribute(shelf.path("merge"), [str(tmp_path / "d")], base=shelf.base)
    assert result.components[0].coefficient == pytest.approx(0.6, abs=1e-5)


def test_a_dictionary_of_another_base_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    build(tmp_path / "d", shelf.paths("add"), shelf.base)
    rng = np.random.default_rng(5)
    near = {
        name: quantise(value * (1 + 0.01 * rng.standard_normal(value.shape)), "BF16")
        for name, value in shelf.model.items()
    }
    other = write_checkpoint(tmp_path / "other", near)
    with pytest.raises(DictionaryError, match=r"built on another base .* their fingerprints differ"):
        unmerge.attribute(shelf.path("merge"), [str(tmp_path / "d")], base=other)
    assert any("its fingerprint is not that" in fault for fault in verify(tmp_path / "d", str(other)))


def test_a_resharded_base_is_the_same_base(shelf: Shelf, tmp_path: Path) -> None:
    build(tmp_path / "d", shelf.paths("add"), shelf.base)
    copy = write_checkpoint(tmp_path / "copy", shelf.model, shards=4)
    unmerge.attribute(shelf.path("merge"), [str(tmp_path / "d")], base=copy)
    assert verify(tmp_path / "d", str(copy)) == []


class TestBeyondProducts:
    """Atoms after the first ones have no inner products."""

    @pytest.fixture(autouse=True)
    def two_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dictionary, "PRODUCTS", 2)

    def test_the_first_keep_theirs(self, shelf: Shelf, tmp_path: Path) -> None:
        build(tmp_path / "d", shelf.paths("full", "add", "sub", "xml"), shelf.base)
        assert {path.stem for path in (tmp_path / "d" / "gram").iterdir()} == {"full", "add"}
        opened = open_dictionary(tmp_path / "d", open_base(shelf.base))
        assert (opened.names, [atom.name for atom in opened.beyond]) == (("full", "add"), ["sub", "xml"])
        assert verify(tmp_path / "d") == []

    def test_one_more_is_added_without_reading_the_others(self, shelf: Shelf, tmp_path: Path) -> None:
        build(tmp_path / "d", shelf.paths("add", "sub", "json"), shelf.base)
        manifest = read_manifest(tmp_path / "d")
        for part in ("atoms", "gram", "sketch"):
            shutil.rmtree(tmp_path / "d" / part)
        assert add(tmp_path / "d", [shelf.path("xml"), shelf.path("full")], shelf.base) == ("xml", "full")
        grown = read_manifest(tmp_path / "d")
        assert grown["atoms"][:3] == manifest["atoms"]
        kept = {str(path.relative_to(tmp_path / "d")) for path in (tmp_path / "d").rglob("*.safetensors")}
        copy = "atoms/xml/adapter_model.safetensors"
        assert kept == {copy, "sketch/xml.safetensors", "sketch/full.safetensors", "directions/full.safetensors"}

    def test_the_answer_is_the_same(self, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        names = ("full", "add", "sub", "json", "xml")
        build(tmp_path / "two", shelf.paths(*names), shelf.base)
        monkeypatch.setattr(dictionary, "PRODUCTS", len(names))
        build(tmp_path / "all", shelf.paths(*names), shelf.base)
        two, every = (
            # Exact: inner products of full checkpoints that are not kept are those of their directions by default.
            unmerge.attribute(shelf.path("merge"), [str(tmp_path / name)], base=shelf.base, exact=True)
            for name in ("two", "all")
        )
        assert two.model_copy(update={"method": every.method}) == every

    def test_a_gap_in_the_rows_is_damage(self, shelf: Shelf, tmp_path: Path) -> None:
        build(tmp_path / "d", shelf.paths("add", "sub"), shelf.base)
        manifest = read_manifest(tmp_path / "d")
        manifest["atoms"][0]["gram_sha256"] = None
        (tmp_path / "d" / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(DictionaryError, match="damaged: an atom without inner products is before one with them"):
            read_manifest(tmp_path / "d")

    def test_what_is_no_fine_tune_is_refused(self, shelf: Shelf, tmp_path: Path) -> None:
        build(tmp_path / "d", shelf.paths("add", "sub"), shelf.base)
        weights = shelf.folder / "json" / "adapter_model.safetensors"
        for value, message in ((0.0, "json: changes nothing: a zero adapter"), (np.nan, "json: has NaN or Inf")):
            save_file({name: np.full_like(factor, value) for name, factor in load_file(weights).items()}, weights)
            with pytest.raises(DictionaryError, match=message):
                add(tmp_path / "d", [shelf.path("json")], shelf.base)
            assert not (tmp_path / "d" / "atoms" / "json").exists()
        assert verify(tmp_path / "d") == []


class TestLikeness:
    @pytest.mark.parametrize("products", [0, 2, 9])
    def test_cosines_are_those_of_the_changes(
        self, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, products: int
    ) -> None:
        monkeypatch.setattr(dictionary, "PRODUCTS", products)
        names = ("add", "full", "sub", "merge")
        build(tmp_path / "d", shelf.paths(*names), shelf.base)
        base = open_base(shelf.base)
        vectors = [open_atom(shelf.path(name), base).vector for name in names]
        tensors = sorted({tensor for vector in vectors for tensor in vector.deltas})
        dense = np.array([
            np.concatenate([
                materialise(vector, tensor).ravel()
                if tensor in vector.deltas
                else np.zeros(np.prod(base.shapes[tensor]))
                for tensor in tensors
            ])
            for vector in vectors
        ])  # fmt: skip
        norms = np.linalg.norm(dense, axis=1)
        found = dictionary.likeness(tmp_path / "d", base)
        exact = dense @ dense.T / np.outer(norms, norms)
        np.testing.assert_allclose(found.norms, norms, rtol=1e-9)
        np.testing.assert_allclose(found.cosines, exact, atol=0.05)
        known = slice(0, products)
        np.testing.assert_allclose(found.cosines[known, known], exact[known, known], rtol=1e-9, atol=1e-12)

    def test_of_some_atoms(self, shelf: Shelf, tmp_path: Path) -> None:
        build(tmp_path / "d", shelf.paths("add", "sub", "json"), shelf.base)
        base = open_base(shelf.base)
        every, some = dictionary.likeness(tmp_path / "d", base), dictionary.likeness(tmp_path / "d", base, ["json"])
        assert some.shown == (2,)
        np.testing.assert_array_equal(some.cosines, every.cosines[2:])


class TestDirections:
    def test_a_full_checkpoint_keeps_its_leading_directions(self, shelf: Shelf, tmp_path: Path) -> None:
        build(tmp_path / "d", shelf.paths("add", "full"), shelf.base)
        full = open_dictionary(tmp_path / "d", open_base(shelf.base)).atoms[1]
        assert full.directions is not None
        assert (full.directions.name, full.directions.digest) == ("full", full.vector.digest)
        expected = directions(full.vector)
        assert full.directions.deltas.keys() == expected.deltas.keys()
        for name, delta in full.directions.deltas.items():
            assert isinstance(delta, LowRank)
            assert delta.rank == min(DIRECTIONS, *delta.shape)
            # Kept in F32, and read when asked for, as every stored tensor.
            assert isinstance(delta.left_factor, FileTensor)
            assert delta.left_factor.dtype.name == "F32"
            assert delta.left_factor.origin == tmp_path / "d" / "directions" / "full.safetensors"
            np.testing.assert_array_equal(materialise(full.directions, name), materialise(expected, name))

    def test_an_adapter_serves_as_its_own(self, shelf: Shelf, tmp_path: Path) -> None:
        build(tmp_path / "d", shelf.paths("add"), shelf.base)
        found = open_dictionary(tmp_path / "d", open_base(shelf.base))
        assert found.atoms[0].directions is found.atoms[0].vector
        assert not (tmp_path / "d" / "directions").exists()
        assert read_manifest(tmp_path / "d")["atoms"][0]["directions_sha256"] is None

    def test_an_adapter_with_a_whole_matrix_does_not(self, shelf: Shelf, tmp_path: Path) -> None:
        weights = shelf.folder / "add" / "adapter_model.safetensors"
        head = (shelf.model["lm_head.weight"] + 0.1).astype(np.float32)
        save_file({**load_file(weights), "base_model.model.lm_head.weight": head}, weights)
        build(tmp_path / "d", shelf.paths("add"), shelf.base)
        assert open_dictionary(tmp_path / "d", open_base(shelf.base)).atoms[0].directions is None

    def test_an_atom_outside_of_a_dictionary_has_none(self, shelf: Shelf) -> None:
        assert open_atom(shelf.path("full"), open_base(shelf.base)).directions is None

    def test_they_are_computed_once(self, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[str] = []

        def watched(vector: TaskVector, *, workers: int) -> TaskVector:
            asked.append(vector.name)
            return directions(vector, workers=workers)

        monkeypatch.setattr(dictionary, "directions", watched)
        build(tmp_path / "d", shelf.paths("full"), shelf.base)
        before = everything(tmp_path / "d")
        add(tmp_path / "d", shelf.paths("add", "merge"), shelf.base)
        grown = open_dictionary(tmp_path / "d", open_base(shelf.base))
        assert asked == ["full", "merge"]
        assert all(atom.directions is not None for atom in grown.atoms)
        after = everything(tmp_path / "d")
        assert {name for name in before if after[name] != before[name]} == {MANIFEST}

    def test_a_checkpoint_of_changed_norms_alone_has_no_directions(self, shelf: Shelf, tmp_path: Path) -> None:
        tuned = {name: value + 0.1 * (value.ndim == 1) for name, value in shelf.model.items()}
        write_checkpoint(tmp_path / "norms", tuned, "F32")
        build(tmp_path / "d", [str(tmp_path / "norms")], shelf.base)
        found = open_dictionary(tmp_path / "d", open_base(shelf.base)).atoms[0].directions
        assert found is not None
        assert not found.deltas
        assert verify(tmp_path / "d") == []

    @pytest.mark.parametrize(
        "change",
        [
            {"lm_head.weight.left": np.zeros((64, 2), np.float32)},
            {"lm_head.weight.right": np.zeros((2, 32), np.float32)},
            {
                "lm_head.weight.left": np.zeros((64, 2), np.float32),
                "lm_head.weight.right": np.zeros((3, 32), np.float32),
            },
            {
                "lm_head.weight.left": np.zeros((63, 2), np.float32),
                "lm_head.weight.right": np.zeros((2, 32), np.float32),
            },
            {
                "no_such.weight.left": np.zeros((64, 2), np.float32),
                "no_such.weight.right": np.zeros((2, 32), np.float32),
            },
        ],
        ids=["no right", "no left", "ranks", "rows", "name"],
    )
    def test_incomplete_factors_are_refused(
        self, shelf: Shelf, tmp_path: Path, change: dict[str, NDArray[np.float32]]
    ) -> None:
        build(tmp_path / "d", shelf.paths("full"), shelf.base)
        save_file(change, tmp_path / "d" / "directions" / "full.safetensors")
        with pytest.raises(DictionaryError, match=r"the directions of 'full' in tensor '.*' are incomplete; build"):
            open_dictionary(tmp_path / "d", open_base(shelf.base))

    def test_missing_ones_are_refused(self, shelf: Shelf, tmp_path: Path) -> None:
        build(tmp_path / "d", shelf.paths("full"), shelf.base)
        (tmp_path / "d" / "directions" / "full.safetensors").unlink()
        assert verify(tmp_path / "d") == ["atom full: its leading directions are missing or changed"]
        with pytest.raises(UnmergeError, match="cannot be read"):
            open_dictionary(tmp_path / "d", open_base(shelf.base))


class TestAnswersFromDirections:
    """Full checkpoints of a dictionary are compared in what it keeps of them, if they are not asked for."""

    @pytest.fixture
    def merge(self, shelf: Shelf) -> str:
        tuned = open_checkpoint(shelf.folder / "full").tensors
        shelf.changes["full"] = {name: values(tuned[name]).reshape(shelf.model[name].shape) for name in shelf.model}
        for name, value in shelf.model.items():
            shelf.changes["full"][name] -= value
        return shelf.merge("mixed", "BF16", full=0.5, add=0.6)

    @pytest.fixture
    def few(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Keep so few directions that they hold a part of a full-rank change only."""

        def leading(vector: TaskVector, *, workers: int) -> TaskVector:
            return directions(vector, 12, workers=workers)

        monkeypatch.setattr(dictionary, "directions", leading)

    def ask(self, shelf: Shelf, folder: Path, target: str, **options: Any) -> unmerge.Attribution:
        return unmerge.attribute(target, [str(folder)], base=shelf.base, **options)

    def relatives(self, shelf: Shelf, folder: Path) -> tuple[list[str], dict[str, FloatArray]]:
        """Write two full checkpoints that have much in common, in all directions, and norms of their own."""
        rng = np.random.default_rng(8)
        common = {name: rng.standard_normal(value.shape) for name, value in shelf.model.items()}
        changes: dict[str, FloatArray] = {}
        for number in (1, 2):
            tuned = {
                name: quantise(value + 0.002 * (common[name] + rng.standard_normal(value.shape)), "F32")
                for name, value in shelf.model.items()
            }
            write_checkpoint(folder / f"full{number}", tuned, "F32")
            changes |= {f"full{number}/{name}": tuned[name] - value for name, value in shelf.model.items()}
        return [str(folder / "full1"), shelf.path("add"), str(folder / "full2")], changes

    @pytest.mark.usefixtures("few")
    def test_products_of_directions_are_those_of_a_dense_computation(self, shelf: Shelf, tmp_path: Path) -> None:
        paths, changes = self.relatives(shelf, tmp_path)
        build(tmp_path / "d", paths, shelf.base)
        opened = open_dictionary(tmp_path / "d", open_base(shelf.base))
        assert opened.names == ("full1", "add", "full2")
        for name, shown in opened.shown.items():
            shape = shelf.model[name].shape
            dense = [
                changes[f"full1/{name}"],
                shelf.changes["add"].get(name, np.zeros(shape)),
                changes[f"full2/{name}"],
            ]
            for row, atom in enumerate(opened.atoms):
                assert atom.directions is not None
                change = atom.directions.deltas.get(name)
                rows, columns = (1, shape[0]) if len(shape) == 1 else shape
                own = np.zeros((rows, columns)) if change is None else change.block(0, rows)[0]
                if change is not None and row == 1:
                    own = dense[1].reshape(rows, columns)
                expected = [float(np.vdot(own, other.reshape(rows, columns))) for other in dense]
                np.testing.assert_allclose(shown[row], expected, rtol=1e-6, atol=1e-8)

    @pytest.mark.usefixtures("few")
    def test_relatives_are_told_apart_as_by_reading_them(self, shelf: Shelf, tmp_path: Path) -> None:
        paths, changes = self.relatives(shelf, tmp_path)
        build(tmp_path / "d", paths, shelf.base)
        merged = {
            name: value + 0.5 * changes[f"full1/{name}"] + 0.4 * shelf.changes["add"].get(name, 0.0)
            for name, value in shelf.model.items()
        }
        target = str(write_checkpoint(tmp_path / "merged", merged, "F32"))
        found, exact = (self.ask(shelf, tmp_path / "d", target, exact=exact) for exact in (False, True))
        coefficients = {item.name: item.coefficient for item in found.components}
        assert coefficients == pytest.approx({"full1": 0.5, "add": 0.4, "full2": 0.0}, abs=1e-4)
        assert found.unexplained.share == pytest.approx(exact.unexplained.share, abs=1e-4)

    def test_damaged_products_of_directions_are_found(self, shelf: Shelf, tmp_path: Path) -> None:
        build(tmp_path / "d", shelf.paths("add", "full"), shelf.base)
        (tmp_path / "d" / "shown" / "full.safetensors").unlink()
        assert verify(tmp_path / "d") == ["atom full: the products of directions are missing or changed"]
        with pytest.raises(UnmergeError, match="cannot be read"):
            open_dictionary(tmp_path / "d", open_base(shelf.base))

    @pytest.mark.usefixtures("few")
    @pytest.mark.parametrize("products", [0, 9])
    def test_the_answer_is_near_the_exact_one(
        self, shelf: Shelf, tmp_path: Path, merge: str, monkeypatch: pytest.MonkeyPatch, products: int
    ) -> None:
        monkeypatch.setattr(dictionary, "PRODUCTS", products)
        build(tmp_path / "d", shelf.paths("add", "full", "sub"), shelf.base)
        found, exact = (self.ask(shelf, tmp_path / "d", merge, exact=exact) for exact in (False, True))
        for item in found.components:
            other = next(one for one in exact.components if one.name == item.name)
            assert item.present == other.present
            assert item.coefficient == pytest.approx(other.coefficient, abs=0.02)
        assert found.unexplained.share == pytest.approx(exact.unexplained.share, abs=0.02)
        assert [notice for notice in found.notices if "full checkpoint" in notice] == [
            "1 full checkpoint was compared in the leading directions that a dictionary keeps; --exact reads all"
        ]
        assert not any("directions" in notice for notice in exact.notices)

    def test_asked_for_they_are_read_as_if_given_alone(self, shelf: Shelf, tmp_path: Path, merge: str) -> None:
        build(tmp_path / "d", shelf.paths("full", "add"), shelf.base)
        stored = self.ask(shelf, tmp_path / "d", merge, exact=True)
        direct = unmerge.attribute(merge, shelf.paths("full", "add"), base=shelf.base, exact=True)
        for item in stored.components:
            other = next(one for one in direct.components if one.name == item.name)
            assert item.coefficient == pytest.approx(other.coefficient, abs=1e-9)
            assert (item.weight, item.interval, item.present) == (
                pytest.approx(other.weight, abs=1e-6), pytest.approx(other.interval, abs=1e-6), other.present,
            )  # fmt: skip

    @pytest.mark.parametrize("change", ["removed", "moved", "written anew"])
    def test_a_checkpoint_that_is_not_there_is_not_needed(
        self, shelf: Shelf, tmp_path: Path, merge: str, change: str
    ) -> None:
        build(tmp_path / "d", shelf.paths("full", "add"), shelf.base)
        before = self.ask(shelf, tmp_path / "d", merge)
        if change == "removed":
            shutil.rmtree(shelf.folder / "full")
        elif change == "moved":
            (shelf.folder / "full").rename(shelf.folder / "elsewhere")
        else:
            write_checkpoint(shelf.folder / "full", shelf.model, "F32")
        found = self.ask(shelf, tmp_path / "d", merge)
        assert set(found.notices) - set(before.notices) == {
            "not there as added to the dictionary, which answered alone: full"
        }
        for item in found.components:
            other = next(one for one in before.components if one.name == item.name)
            assert (item.coefficient, item.present, item.source) == (other.coefficient, other.present, other.source)
            assert item.weight == pytest.approx(other.weight, abs=0.01)
        assert len(verify(tmp_path / "d")) == 1
        with pytest.raises(DictionaryError, match=r"--exact.* need the checkpoints of a dictionary\)$") as caught:
            self.ask(shelf, tmp_path / "d", merge, exact=True)
        assert "\n" not in str(caught.value)
        for options in ({"top_k": 1000}, {"precision": 0.1}, {"extract_to": tmp_path / "rest"}):
            with pytest.raises(DictionaryError, match="need the checkpoints"):
                self.ask(shelf, tmp_path / "d", merge, **options)

    @pytest.mark.usefixtures("few")
    def test_the_same_files_give_the_same_answer(self, shelf: Shelf, tmp_path: Path, merge: str) -> None:
        build(tmp_path / "d", shelf.paths("full", "add"), shelf.base)
        one, two = (self.ask(shelf, tmp_path / "d", merge, workers=workers) for workers in (1, 3))
        assert one == two
        kept = self.ask(shelf, tmp_path / "d", merge, state=tmp_path / "state")
        assert kept == one

    def test_of_a_second_dictionary(self, shelf: Shelf, tmp_path: Path, merge: str) -> None:
        build(tmp_path / "d", shelf.paths("add"), shelf.base)
        build(tmp_path / "e", shelf.paths("full", "sub"), shelf.base)
        atoms = [str(tmp_path / "d"), str(tmp_path / "e"), shelf.path("json")]
        found = unmerge.attribute(merge, atoms, base=shelf.base)
        coefficients = {item.name: item.coefficient for item in found.components}
        assert coefficients["full"] == pytest.approx(0.5, abs=0.01)
        assert coefficients["add"] == pytest.approx(0.6, abs=0.01)

    def test_a_checkpoint_of_changed_norms_alone_is_read(self, shelf: Shelf, tmp_path: Path) -> None:
        tuned = {name: value + 0.1 * (value.ndim == 1) for name, value in shelf.model.items()}
        write_checkpoint(tmp_path / "norms", tuned, "F32")
        build(tmp_path / "d", [str(tmp_path / "norms")], shelf.base)
        merged = {name: 0.4 * tuned[name] + 0.6 * value for name, value in shelf.model.items()}
        target = str(write_checkpoint(tmp_path / "merged", merged, "F32"))
        found = self.ask(shelf, tmp_path / "d", target)
        assert found.components[0].coefficient == pytest.approx(0.4, abs=1e-5)
        shutil.rmtree(tmp_path / "norms")
        with pytest.raises(UnmergeError, match="no such file or folder"):
            self.ask(shelf, tmp_path / "d", target)


class TestVerify:
    def test_sound(self, shelf: Shelf, tmp_path: Path) -> None:
        build(tmp_path / "d", shelf.paths("add", "full"), shelf.base)
        assert verify(tmp_path / "d") == []

    @pytest.mark.parametrize(
        ("file", "atom"),
        [
            ("atoms/add/adapter_model.safetensors", "add"),
            ("gram/add.safetensors", "add"),
            ("sketch/add.safetensors", "add"),
            ("directions/full.safetensors", "full"),
        ],
    )
    def test_one_flipped_bit_is_found(self, shelf: Shelf, tmp_path: Path, file: str, atom: str) -> None:
        build(tmp_path / "d", shelf.paths("sub", "add", "full"), shelf.base)
        path = tmp_path / "d" / file
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
        faults = verify(tmp_path / "d")
        assert len(faults) == 1
        assert faults[0].startswith(f"atom {atom}: ")

    def test_an_adapter_where_a_checkpoint_was_is_found_and_refused(self, shelf: Shelf, tmp_path: Path) -> None:
        full = tmp_path / "full"
        shutil.copytree(shelf.folder / "full", full)
        build(tmp_path / "d", [str(full)], shelf.base)
        shutil.rmtree(full)
        shutil.copytree(shelf.folder / "add", full)
        with pytest.raises(DictionaryError, match="has changed since it was added"):
            open_dictionary(tmp_path / "d", open_base(shelf.base))

    def test_a_checkpoint_that_is_as_it_was_is_not_compared_with_the_base_again(
        self, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build(tmp_path / "d", shelf.paths("full"), shelf.base)
        base = open_base(shelf.base)
        monkeypatch.setattr(fingerprint, "check_same_base", lambda *_: pytest.fail("compared"))
        [atom] = open_dictionary(tmp_path / "d", base).atoms
        assert atom.kind == "checkpoint"

    def test_a_changed_checkpoint_is_found_and_refused(self, shelf: Shelf, tmp_path: Path) -> None:
        build(tmp_path / "d", shelf.paths("full"), shelf.base)
        write_checkpoint(shelf.folder / "full", shelf.model, "F32")
        assert "has changed since it was added" in verify(tmp_path / "d")[0]
        # By default the dictionary answers without it: see TestAnswersFromDirections.
        with pytest.raises(DictionaryError, match=r"has changed since it was added.*--exact.* need the checkpoints"):
            unmerge.attribute(shelf.path("merge"), [str(tmp_path / "d")], base=shelf.base, exact=True)

    def test_missing_parts_are_found(self, shelf: Shelf, tmp_path: Path) -> None:
        build(tmp_path / "d", shelf.paths("add", "full"), shelf.base)
        shutil.rmtree(shelf.folder / "full")
        (tmp_path / "d/gram/add.safetensors").unlink()
        faults = verify(tmp_path / "d")
        assert [fault.split(":")[0] for fault in faults] == ["atom add", "atom full"]


class TestCrash:
    def test_a_build_that_fails_leaves_nothing(self, shelf: Shelf, tmp_path: Path) -> None:
        with pytest.raises(UnmergeError):
            build(tmp_path / "d", [*shelf.paths("add"), "./missing"], shelf.base)
        assert list(tmp_path.iterdir()) == [shelf.folder]

    def test_a_stopped_build_leaves_nothing(
        self, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(dictionary, "_entry", stop)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "d", shelf.paths("add"), shelf.base)
        assert list(tmp_path.iterdir()) == [shelf.folder]

    @pytest.mark.parametrize("atom", ["sub", "full"])
    def test_a_stopped_addition_is_as_if_it_never_began(
        self, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, atom: str
    ) -> None:
        build(tmp_path / "d", shelf.paths("add"), shelf.base)
        with monkeypatch.context() as patch:
            patch.setattr(dictionary, "_entry", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                add(tmp_path / "d", shelf.paths(atom), shelf.base)
        assert [entry["name"] for entry in read_manifest(tmp_path / "d")["atoms"]] == ["add"]
        assert verify(tmp_path / "d") == []
        add(tmp_path / "d", shelf.paths(atom), shelf.base)
        assert verify(tmp_path / "d") == []


class TestRefusals:
    def test_two_atoms_of_one_name(self, shelf: Shelf, tmp_path: Path) -> None:
        with pytest.raises(DictionaryError, match=r"two atoms are called 'add'; .* NAME=PATH"):
            build(tmp_path / "d", [shelf.path("add"), f"add={shelf.path('sub')}"], shelf.base)
        build(tmp_path / "d", shelf.paths("add"), shelf.base)
        with pytest.raises(DictionaryError, match="two atoms are called 'add'"):
            add(tmp_path / "d", [f"add={shelf.path('sub')}"], shelf.base)

    @pytest.mark.parametrize("name", ["..", ".hidden", "a b"])
    def test_names_that_are_no_file_names(self, shelf: Shelf, tmp_path: Path, name: str) -> None:
        with pytest.raises(UnmergeError, match=r"cannot be an atom's name|no such file or folder"):
            build(tmp_path / "d", [f"{name}={shelf.path('add')}"], shelf.base)

    def test_a_folder_in_use(self, shelf: Shelf, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "notes.txt").write_text("mine")
        with pytest.raises(DictionaryError, match="already exists"):
            build(tmp_path / "d", shelf.paths("add"), shelf.base)
        assert everything(tmp_path / "d") == {"notes.txt": b"mine"}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"schema": "unmerge/dictionary/99"}, "schema 'unmerge/dictionary/99'; this version reads"),
            ({"schema": "unmerge/dictionary/2"}, "schema 'unmerge/dictionary/2'; .*/4; build it again$"),
            ({"atoms": [{"name": "../../etc", "kind": "adapter"}]}, "damaged: one of its atoms"),
            ({"atoms": [{"name": "a", "kind": "pickle"}]}, "damaged: one of its atoms"),
            ({"base": {}}, "damaged: its base"),
        ],
    )
    def test_damaged_manifests(self, shelf: Shelf, tmp_path: Path, change: dict[str, object], message: str) -> None:
        build(tmp_path / "d", shelf.paths("add"), shelf.base)
        manifest = read_manifest(tmp_path / "d")
        (tmp_path / "d" / MANIFEST).write_text(json.dumps({**manifest, **change}))
        with pytest.raises(DictionaryError, match=message):
            read_manifest(tmp_path / "d")

    @pytest.mark.parametrize(("name", "value"), [("full", None), ("add", "0" * 64)])
    def test_directions_are_of_checkpoints_alone(
        self, shelf: Shelf, tmp_path: Path, name: str, value: str | None
    ) -> None:
        build(tmp_path / "d", shelf.paths(name), shelf.base)
        manifest = read_manifest(tmp_path / "d")
        manifest["atoms"][0]["directions_sha256"] = value
        (tmp_path / "d" / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(DictionaryError, match="damaged: one of its atoms is incomplete"):
            read_manifest(tmp_path / "d")

    def test_not_a_dictionary(self, tmp_path: Path) -> None:
        with pytest.raises(DictionaryError, match="not a dictionary"):
            read_manifest(tmp_path)

    def test_a_full_model_as_base_only(self, shelf: Shelf, tmp_path: Path) -> None:
        with pytest.raises(UnmergeError, match="an adapter, not a base model"):
            build(tmp_path / "d", shelf.paths("sub"), shelf.path("add"))

    def test_an_adapter_of_a_deeper_model(self, shelf: Shelf, tmp_path: Path) -> None:
        shallow = write_checkpoint(tmp_path / "one", tiny_model(np.random.default_rng(0), layers=1))
        with pytest.raises(UnmergeError, match=r"add: adapts 'model\.layers\.1.* an adapter of another model"):
            build(tmp_path / "d", shelf.paths("add"), str(shallow))


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (None, False),
        ("base", False),
        ("/home/me/models/Base/", False),
        ("org/base@main", False),
        ("org/base-instruct", True),
    ],
)
def test_an_adapter_that_names_another_base_is_told(shelf: Shelf, said: str | None, told: bool) -> None:
    config = shelf.folder / "add" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": said}))
    result = unmerge.attribute(shelf.path("merge"), shelf.paths("add", "json"), base=shelf.base)
    assert [f"trained on {said!r}" in notice for notice in result.notices] == [True] * told


def test_what_a_killed_build_left_is_removed_by_the_next_and_what_a_running_one_fills_is_not(
    shelf: Shelf, tmp_path: Path
) -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    left, filled, other = (
        tmp_path / name for name in (f".d.{int(done.stdout)}.tmp", f".d.{os.getppid()}.tmp", ".e.999999999.tmp")
    )
    for folder in (left, filled, other):
        folder.mkdir()
        (folder / MANIFEST).write_text("half of a")
    build(tmp_path / "d", shelf.paths("add"), shelf.base)
    assert [folder.exists() for folder in (left, filled, other)] == [False, True, True]

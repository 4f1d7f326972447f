"""Some rows and columns of each tensor, against the dense matrices that they are cut from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.conftest import Shelf
from unmerge import accumulate
from unmerge.attribution import open_target
from unmerge.base_share import without_base
from unmerge.checkpoint.dtypes import DTYPES, RawArray
from unmerge.checkpoint.reader import open_checkpoint
from unmerge.checkpoint.tensor import ArrayTensor, lines
from unmerge.compress import materialise
from unmerge.corners import blocks, corners
from unmerge.dictionary import Dictionary, open_atom, open_base
from unmerge.regression import Regression, regress
from unmerge.task_vector import TaskVector
from unmerge.testing import quantise, write_adapter, write_checkpoint

LINES = 20


@pytest.fixture(autouse=True)
def few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulate, "LINES", LINES)


def met(shelf: Shelf, target: str, *names: str) -> tuple[Regression, TaskVector]:
    base = open_base(shelf.base)
    goal = open_target(target, base)
    atoms = [open_atom(shelf.path(name), base) for name in names]
    return regress(goal.vector, goal.rows, Dictionary((), {}), atoms, base, contacts=True), goal.vector


def cut(dense: NDArray[np.float64], regression: Regression, name: str) -> NDArray[np.float64]:
    """Return the two halves of a corner from a dense matrix: they share no row and no column."""
    contact = regression.contacts[name]
    rows, columns = len(contact.rows) // 2, len(contact.columns) // 2
    parts = [
        dense[np.ix_(contact.rows[place * rows :][:rows], contact.columns[place * columns :][:columns])]
        for place in (0, 1)
    ]
    return np.concatenate(parts)


class Counted(ArrayTensor):
    """A tensor that remembers which rows were read."""

    asked: list[tuple[int, int]]

    def read(self, start: int, stop: int) -> RawArray:
        self.asked.append((start, stop))
        return super().read(start, stop)


@pytest.mark.parametrize("rows", [[0], [39], [3, 4, 5, 9, 20, 21, 39], list(range(40))])
def test_lines_of_a_file_are_those_of_the_dense_matrix(tmp_path: Path, rows: list[int]) -> None:
    dense = quantise(np.random.default_rng(0).standard_normal((40, 30)), "BF16")
    write_checkpoint(tmp_path / "model", {"first": dense[:3], "w": dense})
    tensor = open_checkpoint(tmp_path / "model").tensors["w"]
    columns = np.array([1, 7, 8, 29])
    np.testing.assert_array_equal(lines(tensor, np.array(rows), columns), dense[rows][:, columns])


@pytest.mark.parametrize("rows", [[0], [39], [3, 4, 5, 9, 20, 21, 39], list(range(40))])
def test_only_the_rows_of_a_corner_are_read(rows: list[int]) -> None:
    dense = quantise(np.random.default_rng(0).standard_normal((40, 30)), "F32")
    tensor = Counted("w", DTYPES["F32"], dense.shape, Path("w"), dense.astype("<f4"))
    object.__setattr__(tensor, "asked", [])
    columns = np.array([1, 7, 8, 29])
    np.testing.assert_array_equal(lines(tensor, np.array(rows), columns), dense[rows][:, columns])
    assert [row for start, stop in tensor.asked for row in range(start, stop)] == rows
    assert all(two[0] > one[1] for one, two in zip(tensor.asked, tensor.asked[1:], strict=False))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_every_part_is_cut_from_the_dense_matrices(shelf: Shelf, dtype: str) -> None:
    base = open_base(shelf.base)
    regression, target = met(shelf, shelf.merge("other", dtype, add=0.6, json=0.3), "add", "sub", "full")
    names = [atom.name for atom in regression.atoms]
    chosen = [names.index("full"), names.index("sub")]
    found = corners(regression, target, base, chosen)
    full = open_atom(shelf.path("full"), base).vector
    assert list(found) == list(regression.contacts)
    assert set(found) == {name for name, value in shelf.model.items() if value.ndim == 2}
    for name, corner in found.items():
        weights = shelf.model[name]
        kept = cut(weights, regression, name)
        rows, columns = (min(LINES, extent) for extent in weights.shape)
        assert corner.target.shape == (2 * (rows // 2), columns // 2)
        assert corner.size == weights.size
        np.testing.assert_array_equal(corner.base, kept)
        np.testing.assert_allclose(corner.target, cut(materialise(target, name), regression, name), rtol=1e-6)
        changes = [materialise(full, name), shelf.changes["sub"].get(name, np.zeros(weights.shape))]
        expected = [cut(change, regression, name) for change in changes]
        np.testing.assert_allclose(corner.atoms, expected, rtol=1e-9, atol=1e-15)
        assert corner.stored.tolist()[0] is True
        assert name not in shelf.changes["sub"] or corner.stored.tolist()[1] is False
        # The base is kept in BF16; F16 is finer, but not around zero.
        coarser = np.maximum(DTYPES["BF16"].spacing(kept), DTYPES[dtype].spacing(kept))
        np.testing.assert_array_equal(corner.spacing, coarser)
        values = kept + 1e-4
        np.testing.assert_array_equal(corner.target_grid(values), quantise(values, dtype))
        np.testing.assert_array_equal(corner.base_grid(values), quantise(values, "BF16"))
        assert corner.target_cell is not None
        low, high = corner.target_cell(corner.base + corner.target)
        np.testing.assert_array_equal(corner.target_grid(low + 0.6 * (high - low)), corner.base + corner.target)


def test_blocks_hold_all_kept_lines_and_the_atoms_as_stored(shelf: Shelf) -> None:
    base = open_base(shelf.base)
    regression, target = met(shelf, shelf.merge("other", "BF16", add=0.6, json=0.3), "add", "full")
    names = [atom.name for atom in regression.atoms]
    found = blocks(regression, target, base, [names.index("add"), names.index("full")])
    full = open_atom(shelf.path("full"), base).vector
    for block, (name, contact) in zip(found, regression.contacts.items(), strict=True):
        lines = np.ix_(contact.rows, contact.columns)
        weights = shelf.model[name]
        added = quantise(weights + shelf.changes["add"].get(name, np.zeros(weights.shape)), "BF16") - weights
        np.testing.assert_array_equal(block.changes, [added[lines], materialise(full, name)[lines]])
        merged = (weights + materialise(target, name))[lines]
        low, high = DTYPES["BF16"].cell(merged)
        np.testing.assert_allclose([block.low, block.high], [low - weights[lines], high - weights[lines]], atol=1e-12)
        np.testing.assert_array_equal(block.weights, weights[lines])
        assert (block.coarser >= DTYPES["BF16"].spacing(block.weights)).all()


def test_an_adapter_has_no_blocks(shelf: Shelf) -> None:
    regression, target = met(shelf, shelf.path("json"), "add", "json")
    assert blocks(regression, target, open_base(shelf.base), [0, 1]) == []


def test_an_adapter_adds_without_rounding(shelf: Shelf) -> None:
    regression, target = met(shelf, shelf.path("json"), "add", "json")
    for name, corner in corners(regression, target, open_base(shelf.base), [0, 1]).items():
        values = shelf.model[name] + 1e-5
        np.testing.assert_array_equal(corner.target_grid(values), values)
        assert corner.target_cell is None
        np.testing.assert_array_equal(
            corner.spacing, DTYPES["BF16"].spacing(corner.base), err_msg="its weights are the base's"
        )


def test_a_target_without_its_base_is_stored_as_before(shelf: Shelf) -> None:
    base = open_base(shelf.base)
    merged = {name: 1.1 * value + 0.6 * shelf.changes["add"].get(name, 0.0) for name, value in shelf.model.items()}
    goal = open_target(str(write_checkpoint(shelf.folder / "more", merged, "F16")), base)
    vector, _ = without_base(goal.vector, base)
    atoms = [open_atom(shelf.path("add"), base)]
    regression = regress(vector, goal.rows, Dictionary((), {}), atoms, base, contacts=True)
    found = corners(regression, vector, base, [0])
    assert found
    for name, corner in found.items():
        values = shelf.model[name] + 1e-4
        np.testing.assert_array_equal(corner.target_grid(values), quantise(values, "F16"))
        assert corner.target_cell is None  # what was stored is not what is left
        np.testing.assert_allclose(corner.target, cut(materialise(vector, name), regression, name), rtol=1e-6)


def test_of_a_short_vocabulary_are_the_rows_that_both_have(shelf: Shelf) -> None:
    change = write_adapter(shelf.folder / "head", np.random.default_rng(2), shelf.model, modules=["lm_head"])
    shelf.changes["head"] = change
    merged = {name: value + 0.5 * change.get(name, 0.0) for name, value in shelf.model.items()}
    merged = {name: value[:50] if len(value) == 64 else value for name, value in merged.items()}
    path = str(write_checkpoint(shelf.folder / "short", merged, "F32"))
    regression, target = met(shelf, path, "head")
    (corner,) = corners(regression, target, open_base(shelf.base), [0]).values()
    assert corner.size == 50 * 32
    np.testing.assert_allclose(corner.target, 0.5 * corner.atoms[0], atol=1e-8)
    assert corner.target.any()


def test_of_no_atoms_are_corners_too(shelf: Shelf) -> None:
    regression, target = met(shelf, shelf.path("merge"), "add")
    found = corners(regression, target, open_base(shelf.base), [])
    assert {corner.atoms.shape for corner in found.values()} == {(0, 20, 10), (0, 16, 10)}


def test_of_many_tensors_some_stand_for_all(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    regression, target = met(shelf, shelf.path("merge"), "add")
    everything = corners(regression, target, open_base(shelf.base), [0])
    assert len(everything) == 8
    monkeypatch.setattr("unmerge.corners.CORNERS", 4)
    found = corners(regression, target, open_base(shelf.base), [0])
    names = list(everything)
    assert len(found) == 4
    assert set(found) <= set(names)
    assert {names[0], names[-1]} <= set(found)
    for name, corner in found.items():
        assert corner.size == 2 * shelf.model[name].size
        np.testing.assert_array_equal(corner.target, everything[name].target)


@pytest.mark.parametrize(("base_dtype", "dtype", "coarser"), [("F32", "BF16", "BF16"), ("BF16", "F32", "BF16")])
def test_the_spacing_is_that_of_the_coarser_grid(shelf: Shelf, base_dtype: str, dtype: str, coarser: str) -> None:
    shelf.base = str(write_checkpoint(shelf.folder / "other-base", shelf.model, base_dtype))
    regression, target = met(shelf, shelf.merge("other", dtype, add=0.6), "add")
    for corner in corners(regression, target, open_base(shelf.base), [0]).values():
        np.testing.assert_array_equal(corner.spacing, DTYPES[coarser].spacing(corner.base))

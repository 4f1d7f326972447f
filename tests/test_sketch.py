"""Sketches: values of a change at fixed places, and its energies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.conftest import Shelf
from unmerge import sketch as sketches
from unmerge.checkpoint.tensor import values
from unmerge.compress import materialise
from unmerge.dictionary import Base, open_atom, open_base
from unmerge.errors import DictionaryError
from unmerge.sketch import COLUMNS, ROWS, Layout, grid, sketch, stack
from unmerge.testing import write_checkpoint


def on_grid(dense: np.ndarray, name: str) -> np.ndarray:
    rows, columns = grid(name, dense.shape)
    return dense[np.ix_(rows, columns)].ravel() * np.sqrt(dense.size / (len(rows) * len(columns)))


def matrices(base: Base, changed: set[str]) -> list[str]:
    return [name for name, shape in sorted(base.shapes.items()) if name in changed and min(shape) > 1]


def test_the_grid_is_fixed() -> None:
    # What is on disk must mean the same for ever.
    rows, columns = grid("model.layers.0.self_attn.q_proj.weight", (3584, 512))
    assert rows.tolist()[:4] == [191, 388, 636, 672]
    assert columns.tolist()[:4] == [0, 23, 34, 52]


@pytest.mark.parametrize("shape", [(2, 3), (16, 32), (17, 33), (152_064, 3584)])
def test_a_grid_has_one_line_in_each_stratum(shape: tuple[int, int]) -> None:
    for lines, extent, most in zip(grid("any", shape), shape, (ROWS, COLUMNS), strict=True):
        count = min(extent, most)
        edges = np.arange(count + 1) * extent // count
        assert len(lines) == count
        assert ((edges[:-1] <= lines) & (lines < edges[1:])).all()


@pytest.mark.parametrize("name", ["add", "full"])
def test_a_sketch_holds_the_change_and_its_energies(shelf: Shelf, name: str) -> None:
    base = open_base(shelf.base)
    vector = open_atom(shelf.path(name), base).vector
    dense = {tensor: materialise(vector, tensor).reshape(base.shapes[tensor]) for tensor in vector.deltas}
    expected = np.concatenate([on_grid(dense[tensor], tensor) for tensor in matrices(base, set(dense))])
    for found in (sketch(vector, Layout.of(base.shapes)), sketch(vector, Layout.of(base.shapes), workers=3)):
        np.testing.assert_allclose(found.values, expected, rtol=1e-6, atol=1e-9)
        energies = [np.sum(dense[tensor] ** 2) if tensor in dense else 0.0 for tensor in sorted(base.shapes)]
        np.testing.assert_allclose(found.energies, [*energies, 0.0], rtol=1e-10)


def test_factors_of_large_tensors_are_multiplied_in_float32(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_base(shelf.base)
    vector, layout = open_atom(shelf.path("add"), base).vector, Layout.of(base.shapes)
    exact = sketch(vector, layout)
    monkeypatch.setattr(sketches.float32, "LEAST_ELEMENTS", 1)
    found = sketch(vector, layout)
    assert (found.energies != exact.energies).any()
    np.testing.assert_allclose(found.energies, exact.energies, rtol=1e-6)
    np.testing.assert_allclose(found.values, exact.values, rtol=1e-5, atol=1e-9)


class TestStack:
    @pytest.mark.parametrize("most", [1 << 29, 9000])
    def test_every_change_in_the_places_of_all(
        self, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
    ) -> None:
        monkeypatch.setattr(sketches, "MOST_BYTES", most)
        base = open_base(shelf.base)
        layout = Layout.of(base.shapes)
        half = {name: value * (1.0 + 0.1 * name.endswith("up_proj.weight")) for name, value in shelf.model.items()}
        write_checkpoint(tmp_path / "half", half, "F32")
        vectors = [open_atom(path, base).vector for path in (shelf.path("add"), str(tmp_path / "half"))]
        made = [sketch(vector, layout) for vector in vectors]
        save_file(dict(made[0].tensors), tmp_path / "stored.safetensors")
        found = stack([tmp_path / "stored.safetensors", made[1]], layout)
        held = matrices(base, {name for vector in vectors for name in vector.deltas if "_proj" in name})
        held = [name for name in held if "attn" in name or "up_proj" in name]
        dense = [
            np.concatenate([
                on_grid(materialise(vector, name).reshape(base.shapes[name]), name) if name in vector.deltas
                else np.zeros(min(ROWS, base.shapes[name][0]) * min(COLUMNS, base.shapes[name][1]))
                for name in held
            ])
            for vector in vectors
        ]  # fmt: skip
        expected = np.array(dense)[:, :: found.step]
        assert (found.step > 1) == (most == 9000)
        assert found.values.nbytes <= max(most, 1)
        np.testing.assert_allclose(found.values, expected, rtol=1e-5, atol=1e-8)
        parts = found.parts
        assert (parts[0].start, parts[-1].stop) == (0, found.values.shape[1])
        target, seen = found.target(vectors[0].deltas, {name: shape[0] for name, shape in base.shapes.items()})
        np.testing.assert_allclose(target, expected[0], rtol=1e-5, atol=1e-8)
        assert seen.all()
        weights = [on_grid(values(base.checkpoint.tensors[name]), name) for name in held]
        np.testing.assert_allclose(found.base(base.checkpoint.tensors), np.concatenate(weights)[:: found.step])

    def test_rows_that_the_target_lacks_are_told(self, shelf: Shelf) -> None:
        base = open_base(shelf.base)
        layout = Layout.of(base.shapes)
        full = open_atom(shelf.path("full"), base).vector
        found = stack([sketch(full, layout)], layout)
        rows = {name: shape[0] for name, shape in base.shapes.items()} | {"lm_head.weight": 20}
        _, seen = found.target(full.deltas, rows)
        count = np.count_nonzero(grid("lm_head.weight", (64, 32))[0] >= 20) * COLUMNS
        assert np.count_nonzero(~seen) == count > 0
        del rows["lm_head.weight"]
        assert np.count_nonzero(~found.target(full.deltas, rows)[1]) == ROWS * COLUMNS

    @pytest.mark.parametrize(
        "change",
        [
            {"values": None},
            {"energies": np.zeros(3)},
            {"values": np.zeros(7, np.float32)},
            {"values": np.zeros(7)},
        ],
        ids=["no values", "another base", "size", "type"],
    )
    def test_what_is_no_sketch_of_the_base_is_refused(
        self, shelf: Shelf, tmp_path: Path, change: dict[str, np.ndarray | None]
    ) -> None:
        base = open_base(shelf.base)
        layout = Layout.of(base.shapes)
        stored = {**sketch(open_atom(shelf.path("add"), base).vector, layout).tensors, **change}
        save_file({name: array for name, array in stored.items() if array is not None}, tmp_path / "s.safetensors")
        with pytest.raises(DictionaryError, match="build the dictionary again"):
            stack([tmp_path / "s.safetensors"], layout)

"""Large tensors by torch, here on its ``cpu``: against the path without torch, and against dense float64."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.test_float32 import World, assert_close
from unmerge import accumulate, attribute, float32
from unmerge.errors import MissingExtraError, TargetError, UnmergeError
from unmerge.torch_blocks import TorchKernel, check_device

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32, "LEAST_ELEMENTS", 1000)
    monkeypatch.setattr(float32, "BLOCK_ELEMENTS", 3_000)  # several blocks a tensor, the last one smaller


@pytest.mark.parametrize("known", [0, 3])
@pytest.mark.parametrize("target", ["mergeBF16", "mergeF16", "mergeF32"])
def test_statistics_and_contacts_equal_those_without_torch_and_those_in_float64(
    world: World, target: str, known: int
) -> None:
    found = world.regress(target, known=known, device="cpu")
    assert_close(found, world.regress(target, known=known), 1e-8)
    exact = world.regress(target, known=known, float64=True)
    assert_close(found, exact, 3e-8)  # of matrices far smaller than those that float32 is for
    assert found.contacts.keys() == exact.contacts.keys()
    for name, contact in found.contacts.items():
        other = exact.contacts[name]
        np.testing.assert_array_equal(contact.rows, other.rows)
        for part in ("cores", "along", "across", "corner"):
            one, two = getattr(contact, part), getattr(other, part)
            np.testing.assert_allclose(one, two, rtol=0, atol=1e-5 * np.abs(two).max())


def test_energies_equal_those_of_dense_arrays(world: World) -> None:
    found = world.regress("full", ("one", "head"), device="cpu", exact=True)
    change = world.changes["full"]
    dense = {name: values for name, values in change.items() if values.size >= 1000}
    for tensor in found.tensors:
        if tensor.name in dense:
            assert tensor.statistics.energy == pytest.approx(np.vdot(dense[tensor.name], dense[tensor.name]), rel=1e-12)
    for atom, vector in enumerate(found.atoms):
        adapter = world.changes[vector.name]
        product = sum(float(np.vdot(values, change[name])) for name, values in adapter.items())
        bound = np.sqrt(found.total.gram[atom, atom] * found.total.energy)
        assert abs(found.total.correlation[atom] - product) < 3e-8 * bound


def test_large_tensors_are_computed_by_torch_and_small_ones_are_not(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(accumulate, "TorchKernel", lambda device: calls.append(device) or TorchKernel(device))
    world.regress("mergeBF16", device="cpu")
    assert calls
    assert set(calls) == {"cpu"}
    calls.clear()
    world.regress("mergeBF16")
    monkeypatch.setattr(float32, "LEAST_ELEMENTS", 1 << 20)
    world.regress("mergeBF16", device="cpu")
    assert calls == []


@pytest.mark.parametrize("rows", [180, 220])
def test_a_resized_vocabulary_is_compared_in_common_rows(world: World, rows: int) -> None:
    more = {
        name: np.resize(world.model[name], (rows, 96)) + 0.01
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    world.merge(f"resized{rows}", {"one": 0.5, "head": 0.4}, "BF16", **more)
    for known in (0, 3):
        found = world.regress(f"resized{rows}", known=known, device="cpu")
        assert_close(found, world.regress(f"resized{rows}", known=known), 1e-8)


def test_values_that_are_not_finite_are_located(world: World) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    broken = world.model[name].copy()
    broken[200, 13] = np.inf
    world.merge("broken", {"one": 0.5}, "BF16", **{name: broken})
    with pytest.raises(TargetError, match=rf"target: tensor '{name}' has Inf at row 200, column 13"):
        world.regress("broken", device="cpu")


def test_an_answer_says_the_same_on_a_device(world: World) -> None:
    atoms = [world.folder / name for name in ("one", "halves", "head")]
    with_torch, without = (
        attribute(world.folder / "mergeBF16", atoms, base=world.folder / "base", device=device)
        for device in ("cpu", None)
    )
    assert [item.present for item in with_torch.components] == [item.present for item in without.components]
    for one, two in zip(with_torch.components, without.components, strict=True):
        assert one.coefficient == pytest.approx(two.coefficient, abs=1e-7)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cpu:1", "meta"])
def test_a_name_that_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(UnmergeError, match=rf"device '{name}': expected cpu, cuda"):
        check_device(name)


def test_a_device_that_torch_does_not_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_device("cuda:0")
    with pytest.raises(UnmergeError, match=r"device 'cuda:1': torch .* sees 1 of this kind; leave it out"):
        check_device("cuda:1")


def test_products_of_less_than_float32_are_refused() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(UnmergeError, match="'high' precision"):
            check_device("cpu")
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_missing_torch_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"^device 'cuda' needs torch: pip install 'unmerge\[torch\]'$"):
        check_device("cuda")


@pytest.mark.parametrize(
    ("more", "named"),
    [({"float64": True}, "--float64"), ({"precision": 0.01}, "--precision"), ({"top_k": 9}, "--top-k")],
)
def test_what_does_not_go_with_a_device_is_refused(tmp_path: Path, more: dict[str, float], named: str) -> None:
    with pytest.raises(UnmergeError, match=named):
        attribute(tmp_path, [tmp_path], base=tmp_path, device="cpu", **more)  # type: ignore[arg-type]

"""The statistics of the streaming pass against a dense float64 computation, and what must not change a bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmerge import accumulate, task_vector
from unmerge import dictionary as dictionaries
from unmerge.attribution import open_target
from unmerge.checkpoint.tensor import FileTensor
from unmerge.compress import materialise
from unmerge.dictionary import Atom, Base, Dictionary, build, combine, open_atom, open_base, open_dictionary
from unmerge.directions import directions
from unmerge.errors import AlignmentError, DictionaryError, TargetError
from unmerge.regression import Regression, regress
from unmerge.statistics import Statistics
from unmerge.task_vector import TaskVector
from unmerge.testing import quantise, tiny_model, write_adapter, write_checkpoint

EMPTY = Dictionary((), {})


class World:
    """A base, three LoRA adapters of different modules, two full fine-tunes, and merges of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(7)
        self.model = {name: quantise(value, "BF16") for name, value in tiny_model(rng, layers=3).items()}
        write_checkpoint(folder / "base", self.model)
        self.changes = {
            "attention": write_adapter(folder / "attention", rng, self.model),
            "values": write_adapter(folder / "values", rng, self.model, modules=["v_proj", "down_proj"], rank=3),
            "halves": write_adapter(folder / "halves", rng, self.model, dtype="BF16"),
        }
        for name, dtype in (("full16", "F16"), ("full32", "F32")):
            tuned = {
                key: quantise(value + 0.003 * rng.standard_normal(value.shape), dtype)
                for key, value in self.model.items()
            }
            write_checkpoint(folder / name, tuned, dtype)
            self.changes[name] = {key: tuned[key] - self.model[key] for key in tuned}
        self.merge("merged", {"attention": 0.5, "values": 0.3, "full16": 0.2})

    def merge(self, name: str, weights: dict[str, float], dtype: str = "BF16", shards: int = 1, **more: Any) -> Path:
        merged = {
            key: value + sum(weight * self.changes[atom].get(key, 0.0) for atom, weight in weights.items())
            for key, value in self.model.items()
        }
        return write_checkpoint(self.folder / name, {**merged, **more}, dtype, shards=shards)

    @property
    def base(self) -> Base:
        return open_base(str(self.folder / "base"))

    def atoms(self, base: Base, *names: str) -> list[Atom]:
        return [open_atom(str(self.folder / name), base) for name in names or self.changes]

    def regress(self, atoms: Sequence[str] = (), target: str = "merged", **options: Any) -> Regression:
        base = self.base
        goal = open_target(str(self.folder / target), base)
        dictionary = options.pop("dictionary", EMPTY)
        extra = options.pop("extra", None)
        chosen = self.atoms(base, *atoms) if extra is None else extra
        return regress(goal.vector, goal.rows, dictionary, chosen, base, **options)

    def dense(self, regression: Regression, target: str = "merged") -> Statistics:
        base = self.base
        goal = open_target(str(self.folder / target), base)
        vectors = [*(atom.vector for atom in regression.atoms), goal.vector]
        columns = []
        for vector in vectors:
            parts = []
            for name, rows in sorted(goal.rows.items()):
                shape = (rows, base.shapes[name][1])
                change = materialise(vector, name)[:rows] if name in vector.deltas else np.zeros(shape)
                parts.append(change.ravel())
            columns.append(np.concatenate(parts))
        stacked = np.stack(columns, axis=1)
        return Statistics.of(stacked[:, :-1], stacked[:, -1])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def assert_close(found: Statistics, dense: Statistics) -> None:
    """Equal to 1e-9, relative to the norms that each inner product is bounded by."""
    norms = np.sqrt(np.diag(dense.gram))
    np.testing.assert_allclose(
        found.gram / np.outer(norms, norms), dense.gram / np.outer(norms, norms), rtol=0, atol=1e-9
    )
    bound = norms * np.sqrt(dense.energy)
    np.testing.assert_allclose(found.correlation / bound, dense.correlation / bound, rtol=0, atol=1e-9)
    assert found.energy == pytest.approx(dense.energy, rel=1e-9)
    assert found.count == dense.count


def test_statistics_equal_a_dense_computation(world: World) -> None:
    found = world.regress()
    assert_close(found.total, world.dense(found))


@settings(max_examples=15, deadline=None)
@given(block=st.sampled_from([1, 40, 700, 10**6]), unit=st.integers(1, 3), workers=st.integers(1, 3))
def test_blocks_of_any_size_give_the_same_statistics(world: World, block: int, unit: int, workers: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_vector, "BLOCK_ELEMENTS", block)
        patch.setattr(accumulate, "BLOCK_ELEMENTS", block)
        patch.setattr(accumulate, "UNIT_BLOCKS", unit)
        found = world.regress(workers=workers)
    assert_close(found.total, world.dense(found))


def test_per_tensor_statistics_add_up_and_name_every_tensor(world: World) -> None:
    found = world.regress(["attention", "values"])
    assert [tensor.name for tensor in found.tensors] == sorted(world.model)
    assert sum(tensor.statistics.energy for tensor in found.tensors) == pytest.approx(found.total.energy)
    untouched = {tensor.name for tensor in found.tensors if not tensor.touched}
    assert untouched == set(world.model) - set(world.changes["attention"]) - set(world.changes["values"])


def test_an_adapter_can_be_the_target(world: World) -> None:
    found = world.regress(["values", "halves", "full16"], target="attention")
    assert_close(found.total, world.dense(found, "attention"))


def same_bits(first: Regression, second: Regression) -> None:
    assert [atom.name for atom in first.atoms] == [atom.name for atom in second.atoms]
    for one, two in zip(first.tensors, second.tensors, strict=True):
        assert one.name == two.name
        np.testing.assert_array_equal(one.statistics.gram, two.statistics.gram)
        np.testing.assert_array_equal(one.statistics.correlation, two.statistics.correlation)
        assert one.statistics.energy == two.statistics.energy
        assert one.statistics.rounding == two.statistics.rounding


def test_the_order_of_atoms_changes_no_bit(world: World) -> None:
    names = list(world.changes)
    reference = world.regress(names)
    for seed in range(4):
        same_bits(reference, world.regress(list(np.random.default_rng(seed).permutation(names))))


@pytest.mark.parametrize("shards", [2, 5])
def test_shards_change_no_bit(world: World, shards: int) -> None:
    world.merge(f"merged{shards}", {"attention": 0.5, "values": 0.3, "full16": 0.2}, shards=shards)
    same_bits(world.regress(), world.regress(target=f"merged{shards}"))


def test_the_order_of_tensors_in_a_file_changes_no_bit(world: World) -> None:
    merged = {name: quantise(value, "BF16") for name, value in reversed(world.model.items())}
    for atom, weight in {"attention": 0.5, "values": 0.3, "full16": 0.2}.items():
        merged = {name: value + weight * world.changes[atom].get(name, 0.0) for name, value in merged.items()}
    write_checkpoint(world.folder / "reversed", merged)
    first, second = world.regress(), world.regress(target="reversed")
    same_bits(first, second)


def test_threads_change_no_bit(world: World) -> None:
    same_bits(world.regress(workers=1), world.regress(workers=4))


@pytest.mark.parametrize("known", [1, 3, 5])
def test_known_products_change_nothing(world: World, known: int) -> None:
    base = world.base
    atoms = world.atoms(base)
    dictionary = combine(base, atoms[:known])
    found = world.regress(dictionary=dictionary, extra=atoms[known:])
    assert_close(found.total, world.dense(found))
    reference = world.regress()
    np.testing.assert_allclose(found.total.gram, reference.total.gram, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("target", ["merged", "attention"])
def test_low_rank_dictionaries_change_no_bit(world: World, target: str) -> None:
    base = world.base
    names = [name for name in ("attention", "values", "halves") if name != target]
    atoms = world.atoms(base, *names)
    reference = world.regress(names, target=target)
    one_by_one = EMPTY
    for atom in atoms:
        one_by_one = combine(base, [atom], known=one_by_one)
    backwards = combine(base, atoms[::-1])
    for dictionary in (one_by_one, backwards, combine(base, atoms)):
        same_bits(reference, world.regress(dictionary=dictionary, extra=[], target=target))


@pytest.mark.parametrize("known", [0, 2, 5])
@pytest.mark.parametrize("rows", [50, 80])
def test_resized_vocabulary_is_compared_in_common_rows(world: World, rows: int, known: int) -> None:
    more = {
        name: np.resize(world.model[name], (rows, 32)) + 0.01
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    world.merge(f"resized{rows}", {"attention": 0.5, "full16": 0.3}, **more)
    base = world.base
    atoms = world.atoms(base)
    dictionary = combine(base, atoms[:known]) if known else EMPTY
    found = world.regress(dictionary=dictionary, extra=atoms[known:], target=f"resized{rows}")
    assert_close(found.total, world.dense(found, f"resized{rows}"))


class TestFromDirections:
    """Full checkpoints of a dictionary, seen through the directions that it keeps."""

    def opened(self, world: World, folder: Path, *names: str) -> Dictionary:
        if not folder.exists():
            build(folder, [str(world.folder / name) for name in names], str(world.folder / "base"))
        return open_dictionary(folder, world.base, kept=True)

    def test_changes_of_low_rank_have_the_statistics_of_a_dense_computation(self, world: World, tmp_path: Path) -> None:
        rng = np.random.default_rng(17)
        for name in ("low1", "low2"):
            tuned = {
                key: value + 1e-3 * rng.standard_normal((value.shape[0], 5)) @ rng.standard_normal((5, value.shape[1]))
                for key, value in world.model.items()
                if value.ndim == 2
            }
            write_checkpoint(world.folder / name, {**world.model, **tuned}, "F64")
            world.changes[name] = {key: value - world.model[key] for key, value in tuned.items()}
        world.merge("of low rank", {"low1": 0.5, "attention": 0.4}, "F32")
        for name in ("low1", "low2"):
            del world.changes[name]  # other tests take all of them
        dictionary = self.opened(world, tmp_path / "d", "low1", "attention", "low2")
        found = world.regress(dictionary=dictionary, extra=[], target="of low rank")
        dense = world.dense(found, "of low rank")
        size = np.sqrt(np.append(np.diag(dense.gram), dense.energy))
        bound = np.outer(size[:-1], size[:-1])
        np.testing.assert_allclose(found.total.gram / bound, dense.gram / bound, rtol=0, atol=1e-6)
        bound = size[:-1] * size[-1]
        np.testing.assert_allclose(found.total.correlation / bound, dense.correlation / bound, rtol=0, atol=1e-6)
        assert (found.total.energy, found.total.count) == (pytest.approx(dense.energy, rel=1e-9), dense.count)

    def test_the_gram_matrix_is_exact_and_no_weights_are_read(
        self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def leading(vector: TaskVector, *, workers: int) -> TaskVector:
            return directions(vector, 8, workers=workers)

        monkeypatch.setattr(dictionaries, "directions", leading)
        dictionary = self.opened(world, tmp_path / "d", "full16", "attention", "full32")
        read: list[Path] = []
        real = FileTensor._read

        def watched(tensor: FileTensor, runs: Any, out: Any) -> None:
            read.append(tensor.origin)
            real(tensor, runs, out)

        with monkeypatch.context() as patch:
            patch.setattr(FileTensor, "_read", watched)
            found = world.regress(dictionary=dictionary, extra=[], contacts=True)
        assert tmp_path / "d" / "directions" / "full16.safetensors" in read
        assert not {file for file in read if file.parent.name in {"full16", "full32"}}
        dense = world.dense(found)
        np.testing.assert_allclose(found.total.gram, dense.gram, rtol=1e-9, atol=1e-12 * np.abs(dense.gram).max())
        truth, mine = (np.linalg.solve(item.gram, item.correlation) for item in (dense, found.total))
        np.testing.assert_allclose(mine, truth, atol=0.02)
        for tensor in found.tensors:
            statistics = tensor.statistics
            left = statistics.energy - float(
                statistics.correlation @ np.linalg.lstsq(statistics.gram, statistics.correlation, rcond=1e-9)[0]
            )
            assert left >= -1e-9 * statistics.energy

    def test_a_resized_vocabulary_takes_a_part_of_the_energies(self, world: World, tmp_path: Path) -> None:
        more = {name: world.model[name][:50] for name in ("model.embed_tokens.weight", "lm_head.weight")}
        world.merge("fewer", {"full16": 0.3}, **more)
        dictionary = self.opened(world, tmp_path / "d", "full16", "attention")
        found = world.regress(dictionary=dictionary, extra=[], target="fewer")
        dense = world.dense(found, "fewer")
        np.testing.assert_allclose(np.diag(found.total.gram), np.diag(dense.gram), rtol=1e-6)


def test_sampling_estimates_the_energy_of_untouched_tensors(world: World) -> None:
    rng = np.random.default_rng(3)
    heights = {name: 0.01 * np.exp(rng.standard_normal((96, 1))) for name in world.model if "gate_proj" in name}
    more = {name: world.model[name] + scale * rng.standard_normal((96, 32)) for name, scale in heights.items()}
    world.merge("hidden", {"attention": 0.5}, "F32", **more)
    exact = world.regress(["attention", "halves"], target="hidden", exact=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accumulate, "SAMPLE_ELEMENTS", 32)
        patch.setattr(accumulate, "SAMPLE_RUNS", 16)
        sampled = world.regress(["attention", "halves"], target="hidden")
    by_name = {tensor.name: tensor for tensor in exact.tensors}
    inexact = [tensor for tensor in sampled.tensors if tensor.read < tensor.statistics.count]
    assert {tensor.name for tensor in inexact} >= set(heights)
    for tensor in inexact:
        truth = by_name[tensor.name].statistics
        assert tensor.statistics.count == truth.count
        assert abs(tensor.statistics.energy - truth.energy) <= 5.0 * tensor.energy_error
    touched = [tensor for tensor in sampled.tensors if tensor.touched]
    assert all(tensor.read == tensor.statistics.count for tensor in touched)


def test_a_merge_that_did_nothing_is_told(world: World) -> None:
    with pytest.raises(TargetError, match=r"equal to the base in every one of the .* parameters compared"):
        world.regress(target="base")


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "Inf"), (-np.inf, "Inf")])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_values_that_are_not_finite_are_located(world: World, value: float, word: str, dtype: str) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    broken = world.model[name].copy()
    broken[5, 7] = value
    world.merge("broken", {"attention": 0.5}, dtype, **{name: broken})
    with pytest.raises(TargetError, match=rf"target: tensor '{name}' has {word} at row 5, column 7"):
        world.regress(target="broken")
    with pytest.raises(TargetError, match=rf"broken: tensor '{name}' has {word} at row 5, column 7"):
        world.regress(["broken"])


def test_a_zero_adapter_is_refused(world: World) -> None:
    write_adapter(world.folder / "zero", np.random.default_rng(0), world.model, size=0.0)
    with pytest.raises(DictionaryError, match="zero: changes nothing in the tensors compared: a zero adapter"):
        world.regress(["attention", "zero"])
    base = world.base
    with pytest.raises(DictionaryError, match="zero: changes nothing: a zero adapter"):
        combine(base, world.atoms(base, "zero"))


def test_unrelated_weights_are_refused(world: World) -> None:
    write_checkpoint(world.folder / "stranger", tiny_model(np.random.default_rng(99), layers=3))
    with pytest.raises(AlignmentError, match="target: wrong base: the weights have a cosine of"):
        world.regress(target="stranger")


def test_top_k_statistics_equal_the_dense_ones_on_the_paper_s_mask(world: World) -> None:
    """Against the paper's construction on dense vectors: max |d_i|, top-k per tensor, k spread evenly."""
    names = ["attention", "values", "full16"]
    found = world.regress(names, top_k=2000)
    base = world.base
    goal = open_target(str(world.folder / "merged"), base)
    vectors = [atom.vector for atom in found.atoms]
    touched = sorted({name for vector in vectors for name in vector.deltas})
    total = Statistics.zero(len(vectors))
    for name in touched:
        dense = [
            materialise(v, name).ravel() if name in v.deltas else np.zeros(world.model[name].size) for v in vectors
        ]
        importance = np.max(np.abs(dense), axis=0)
        mask = np.argsort(-importance, kind="stable")[: 2000 // len(touched)]
        total = total + Statistics.of(np.stack(dense, axis=1)[mask], materialise(goal.vector, name).ravel()[mask])
    assert_close(found.total, total)
    assert found.coordinates.startswith(f"top {total.count:,} by max |d_i|, digest ")


def test_top_k_does_not_depend_on_blocks(world: World) -> None:
    reference = world.regress(["attention", "full16"], top_k=3000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_vector, "BLOCK_ELEMENTS", 64)
        assert world.regress(["attention", "full16"], top_k=3000).coordinates == reference.coordinates


def test_too_small_a_top_k_is_refused(world: World) -> None:
    with pytest.raises(DictionaryError, match="fewer than one coordinate for each of"):
        world.regress(top_k=3)

"""Leading directions against numpy's SVD, and what must not change them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import Shelf
from unmerge import directions as directions_module
from unmerge import float32, task_vector
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.compress import materialise
from unmerge.dictionary import open_atom, open_base
from unmerge.directions import DIRECTIONS, SMALLEST, directions, is_low_rank, leading
from unmerge.errors import TargetError
from unmerge.task_vector import Delta, LowRank, TaskVector
from unmerge.testing import quantise, write_checkpoint


@dataclass
class Dense:
    """A change in memory that remembers which rows were asked for."""

    values: FloatArray
    asked: list[tuple[int, int]] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape  # type: ignore[return-value]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def block(self, start: int, stop: int) -> tuple[FloatArray, float]:
        self.asked.append((start, stop))
        return self.values[start:stop].copy(), 0.0


def matrix(seed: int, rows: int, columns: int, singular: FloatArray) -> FloatArray:
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.standard_normal((rows, len(singular))))
    right, _ = np.linalg.qr(rng.standard_normal((columns, len(singular))))
    return left * singular @ right.T


def find(values: FloatArray, rank: int, seed: int = 0) -> LowRank:
    found = leading(Dense(values), rank, np.random.default_rng(seed))
    assert found is not None
    return found


def parts(found: LowRank) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return U, s and W' of a change that leading() found."""
    left = found.left(0, found.shape[0])
    singular = np.linalg.norm(left, axis=0)
    return left / singular, singular, found.right()


def product(found: LowRank) -> FloatArray:
    return found.block(0, found.shape[0])[0]


class TestAgainstNumpy:
    @pytest.mark.parametrize(("rows", "columns"), [(300, 120), (120, 300), (200, 200)])
    @pytest.mark.parametrize("decay", [0.5, 0.8, 0.9])
    def test_decaying_spectra(self, rows: int, columns: int, decay: float) -> None:
        values = matrix(1, rows, columns, 0.01 * decay ** np.arange(100))
        u, s, wt = np.linalg.svd(values, full_matrices=False)
        rank = 10
        ours_u, ours_s, ours_wt = parts(find(values, rank))
        np.testing.assert_allclose(ours_s, s[:rank], rtol=1e-4)
        # Cosines of the principal angles between the subspaces: all are 1 where they are one.
        for ours, theirs in ((ours_u, u[:, :rank]), (ours_wt.T, wt[:rank].T)):
            assert np.linalg.svd(theirs.T @ ours, compute_uv=False).min() > 1 - 1e-3

    def test_the_first_directions_of_a_steep_spectrum_are_numpys(self) -> None:
        values = matrix(2, 150, 90, 0.3 ** np.arange(20.0))
        u, s, wt = np.linalg.svd(values, full_matrices=False)
        ours_u, ours_s, ours_wt = parts(find(values, 6))
        np.testing.assert_allclose(ours_s, s[:6], rtol=1e-12)
        np.testing.assert_allclose(np.abs(np.sum(ours_u * u[:, :6], axis=0)), 1.0, rtol=1e-10)
        np.testing.assert_allclose(np.abs(np.sum(ours_wt * wt[:6], axis=1)), 1.0, rtol=1e-10)

    def test_noise_has_no_leading_directions_but_nearly_the_best_are_found(self) -> None:
        values = np.random.default_rng(3).standard_normal((250, 180))
        best = np.linalg.svd(values, compute_uv=False)[:16]
        _, ours, _ = parts(find(values, 16))
        assert np.sum(ours**2) > 0.9 * np.sum(best**2)

    @pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
    @pytest.mark.parametrize("rank", [1, 3, 8])
    def test_a_low_rank_change_is_found_exactly(self, rank: int, size: float) -> None:
        rng = np.random.default_rng(rank)
        values = size * (rng.standard_normal((70, rank)) @ rng.standard_normal((rank, 110)))
        found = find(values, 8)
        assert found.rank == rank
        np.testing.assert_allclose(product(found), values, rtol=0, atol=1e-13 * np.abs(values).max())

    def test_small_directions_are_found_down_to_what_is_kept(self) -> None:
        singular = np.array([1.0, 1e-3, 2 * SMALLEST, 0.5 * SMALLEST])
        _, ours, _ = parts(find(matrix(4, 60, 50, singular), 32))
        np.testing.assert_allclose(ours, singular[:3], rtol=1e-6)

    @pytest.mark.parametrize("shape", [(2, 2), (3, 40), (40, 3)])
    def test_small_matrices_are_found_whole(self, shape: tuple[int, int]) -> None:
        values = np.random.default_rng(5).standard_normal(shape)
        found = find(values, DIRECTIONS)
        assert found.rank == min(shape)
        np.testing.assert_allclose(product(found), values, atol=1e-13)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 60),
    columns=st.integers(1, 60),
    true_rank=st.integers(1, 60),
    rank=st.integers(1, 20),
)
def test_what_is_found_is_a_truncated_svd(seed: int, rows: int, columns: int, true_rank: int, rank: int) -> None:
    rng = np.random.default_rng(seed)
    inner = min(true_rank, rows, columns)
    values = rng.standard_normal((rows, inner)) @ rng.standard_normal((inner, columns))
    found = find(values, rank)
    u, s, wt = parts(found)
    assert found.shape == values.shape
    assert not found.transposed
    assert found.scale == 1.0
    assert found.rank == len(s) <= min(rank, inner)
    np.testing.assert_allclose(wt @ wt.T, np.eye(len(s)), atol=1e-10)
    np.testing.assert_allclose(u.T @ u, np.eye(len(s)), atol=1e-8)
    assert np.all(np.diff(s) <= 1e-12 * s[0])
    assert np.all(s > SMALLEST * s[0])
    # No approximation of this rank has more energy, and direction by direction none has a larger singular value.
    assert np.all(s <= np.linalg.svd(values, compute_uv=False)[: len(s)] * (1 + 1e-10))
    assert np.all(wt[np.arange(len(wt)), np.argmax(np.abs(wt), axis=1)] > 0)


class TestStreaming:
    @pytest.mark.parametrize("elements", [1, 1000, 7777])
    def test_the_size_of_blocks_does_not_matter(self, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
        values = matrix(6, 120, 80, 0.7 ** np.arange(60))
        whole = find(values, 8)
        monkeypatch.setattr(task_vector, "BLOCK_ELEMENTS", elements)
        delta = Dense(values)
        cut = leading(delta, 8, np.random.default_rng(0))
        assert cut is not None
        np.testing.assert_allclose(cut.left(0, 120), whole.left(0, 120), atol=1e-10)
        np.testing.assert_allclose(cut.right(), whole.right(), atol=1e-10)
        assert max(stop - start for start, stop in delta.asked) == max(1, elements // 80)

    @pytest.mark.parametrize(
        ("values", "passes"),
        [
            (np.zeros((20, 10)), 1),
            (np.ones((20, 10)), 3),
            (np.random.default_rng(0).standard_normal((20, 10)), 5),
        ],
        ids=["nothing", "few directions", "many"],
    )
    def test_it_reads_a_change_of_several_blocks_the_more_often_the_more_directions_it_has(
        self, values: FloatArray, passes: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(task_vector, "BLOCK_ELEMENTS", 100)
        monkeypatch.setattr(directions_module, "OVERSAMPLING", 2)
        delta = Dense(values)
        leading(delta, 2, np.random.default_rng(0))
        assert delta.asked == [(0, 10), (10, 20)] * passes

    @pytest.mark.parametrize("value", [1.0, 0.0])
    def test_it_reads_a_change_of_one_block_once(self, value: float) -> None:
        delta = Dense(np.full((20, 10), value))
        leading(delta, 2, np.random.default_rng(0))
        assert delta.asked == [(0, 20)]

    def test_what_is_kept_is_no_larger_than_asked_for(self) -> None:
        found = find(matrix(7, 200, 100, np.ones(100)), 4)
        assert found.rank == 4
        assert found.nbytes == 8 * 4 * (200 + 100)


class TestTaskVectors:
    def test_a_full_fine_tune_keeps_its_matrices(self, shelf: Shelf) -> None:
        vector = open_atom(shelf.path("full"), open_base(shelf.base)).vector
        found = directions(vector, 4)
        assert (found.name, found.digest) == (vector.name, vector.digest)
        assert set(found.deltas) == {name for name, value in shelf.model.items() if value.ndim == 2}
        for name, delta in found.deltas.items():
            assert isinstance(delta, LowRank)
            assert delta.rank == 4
            assert delta.shape == vector.deltas[name].shape
            ours, left = materialise(found, name), materialise(vector, name) - materialise(found, name)
            # A projection: what is left is orthogonal to what was found.
            assert abs(np.vdot(ours, left)) < 1e-7 * np.vdot(ours, ours)
            assert delta.left_factor.dtype.name == delta.right_factor.dtype.name == "F32"

    def test_all_directions_give_the_change_back(self, shelf: Shelf) -> None:
        vector = open_atom(shelf.path("full"), open_base(shelf.base)).vector
        found = directions(vector)
        for name in found.deltas:
            if min(vector.deltas[name].shape) <= DIRECTIONS:
                np.testing.assert_allclose(materialise(found, name), materialise(vector, name), atol=1e-8)

    def test_low_rank_changes_pass_through(self, shelf: Shelf) -> None:
        vector = open_atom(shelf.path("add"), open_base(shelf.base)).vector
        found = directions(vector)
        assert found.deltas.keys() == vector.deltas.keys()
        assert all(found.deltas[name] is vector.deltas[name] for name in vector.deltas)

    def test_what_needs_no_directions_is_told(self, shelf: Shelf) -> None:
        base = open_base(shelf.base)
        assert is_low_rank(open_atom(shelf.path("add"), base).vector)
        assert not is_low_rank(open_atom(shelf.path("full"), base).vector)
        assert is_low_rank(TaskVector("bias", "", {"bias": Dense(np.ones((1, 9)))}))

    def test_a_merge_of_adapters_has_their_ranks(self, shelf: Shelf) -> None:
        vector = open_atom(shelf.path("merge"), open_base(shelf.base)).vector
        found = directions(vector, 10)
        assert set(found.deltas) == set(shelf.changes["add"])  # the others are equal to the base
        for name, delta in found.deltas.items():
            truth = 0.6 * shelf.changes["add"][name] + 0.3 * shelf.changes["json"][name]
            np.testing.assert_allclose(materialise(found, name), truth, atol=1e-7)
            assert isinstance(delta, LowRank)
            assert delta.rank >= 8

    @pytest.mark.parametrize("workers", [1, 3])
    def test_the_same_input_gives_the_same_bytes(self, shelf: Shelf, workers: int) -> None:
        vector = open_atom(shelf.path("full"), open_base(shelf.base)).vector
        one = directions(vector, 5)
        again = directions(TaskVector("other", "", dict(reversed(vector.deltas.items()))), 5, workers=workers)
        assert list(one.deltas) == list(again.deltas)
        for name, delta in one.deltas.items():
            other = again.deltas[name]
            assert isinstance(delta, LowRank)
            assert isinstance(other, LowRank)
            assert delta.left_factor.read(0, delta.shape[0]).tobytes() == (
                other.left_factor.read(0, delta.shape[0]).tobytes()
            )
            assert delta.right().tobytes() == other.right().tobytes()

    @pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
    def test_lines_are_left_out(self, shape: tuple[int, int]) -> None:
        deltas: dict[str, Delta] = {"bias": Dense(np.ones(shape)), "weight": Dense(np.ones((3, 9)))}
        assert list(directions(TaskVector("a", "", deltas)).deltas) == ["weight"]

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200])
    def test_what_is_not_finite_is_refused(self, bad: float) -> None:
        values = np.ones((5, 6))
        values[2, 3] = bad
        with pytest.raises(TargetError, match=r"^tuned: tensor 'w': it has NaN or Inf .* not a usable model$"):
            directions(TaskVector("tuned", "", {"w": Dense(values)}))


def test_zero_has_no_directions() -> None:
    assert leading(Dense(np.zeros((30, 20))), 4, np.random.default_rng(0)) is None


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_that_is_none_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=r"expected at least one direction"):
        leading(Dense(np.ones((3, 3))), rank, np.random.default_rng(0))


def test_factors_say_that_no_file_holds_them() -> None:
    found = find(np.ones((3, 3)), 1)
    assert found.left_factor.origin == Path("(computed)")


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_large_tensors_have_the_directions_of_a_dense_svd(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float32, "LEAST_ELEMENTS", 1000)
    monkeypatch.setattr(float32, "BLOCK_ELEMENTS", 3_000)
    rng = np.random.default_rng(8)
    model = {"model.layers.0.mlp.up_proj.weight": quantise(0.02 * rng.standard_normal((200, 96)), dtype)}
    tuned = {
        name: quantise(value + matrix(9, 200, 96, 0.1 * 0.5 ** np.arange(6)), dtype) for name, value in model.items()
    }
    for folder, tensors in (("base", model), ("tuned", tuned)):
        write_checkpoint(tmp_path / folder, tensors, dtype)
    name, change = next((name, tuned[name] - model[name]) for name in model)
    base = open_base(str(tmp_path / "base"))
    delta = open_atom(str(tmp_path / "tuned"), base).vector.deltas[name]
    found = leading(delta, 6, np.random.default_rng(0))
    assert found is not None
    u, s, wt = np.linalg.svd(change, full_matrices=False)
    _, ours, _ = parts(found)
    np.testing.assert_allclose(ours, s[:6], rtol=1e-4)
    kept = u[:, :6] * s[:6] @ wt[:6]
    assert np.linalg.norm(product(found) - kept) < 1e-2 * np.linalg.norm(kept)
    monkeypatch.setattr(float32, "LEAST_ELEMENTS", 1 << 20)
    exact = leading(delta, 6, np.random.default_rng(0))
    assert exact is not None
    np.testing.assert_allclose(product(found), product(exact), rtol=0, atol=1e-5 * np.abs(product(exact)).max())

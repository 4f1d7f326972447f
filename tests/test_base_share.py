"""How much of the base itself is in a target: estimated from corners, taken out of whole tensors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from tests.conftest import Shelf
from unmerge import accumulate, base_share, task_vector
from unmerge.attribution import open_target
from unmerge.base_share import BaseShare, nearer_bases, without_base
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.compress import materialise
from unmerge.dictionary import Base, Dictionary, open_atom, open_base
from unmerge.errors import AlignmentError
from unmerge.regression import Regression, regress
from unmerge.task_vector import TaskVector
from unmerge.testing import tiny_model, write_checkpoint

NAME = "model.layers.0.self_attn.q_proj.weight"


def write(shelf: Shelf, name: str, tensors: Mapping[str, FloatArray]) -> str:
    return str(write_checkpoint(shelf.folder / name, tensors, "F32"))


def scaled(shelf: Shelf, factor: float, *, noise: float = 0.0, seed: int = 0) -> str:
    """A merge that holds the base `factor` times and an adapter 0.6 times."""
    rng = np.random.default_rng(1000 + seed)
    merged = {
        name: factor * value
        + 0.6 * shelf.changes["add"].get(name, 0.0)
        + (noise * rng.standard_normal(value.shape) if value.ndim == 2 else 0.0)
        for name, value in shelf.model.items()
    }
    return write(shelf, f"scaled{factor}{noise}{seed}", merged)


def read(path: str, base: Base) -> TaskVector:
    return open_target(path, base).vector


def met(shelf: Shelf, path: str, *atoms: str) -> tuple[Regression, Base]:
    base = open_base(shelf.base)
    goal = open_target(path, base)
    known = [open_atom(shelf.path(name), base) for name in atoms or ("add", "sub")]
    return regress(goal.vector, goal.rows, Dictionary((), {}), known, base, contacts=True), base


class TestEstimate:
    @pytest.mark.parametrize("lines", [12, 256])
    @pytest.mark.parametrize("factor", [0.5, 0.9, 1.02, 1.1, 2.0])
    def test_is_what_was_planted(self, shelf: Shelf, factor: float, lines: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(accumulate, "LINES", lines)
            found = base_share.base_share(*met(shelf, scaled(shelf, factor)))
        assert found.matters
        assert found.coefficient == pytest.approx(factor - 1.0, abs=4.0 * found.error)
        assert found.error < 0.01

    @pytest.mark.parametrize("weights", [{"add": 0.6, "json": 0.4}, {"add": 1.0}, {"add": 2.0, "sub": 1.5}])
    def test_of_a_plain_merge_does_not_matter(self, shelf: Shelf, weights: dict[str, float]) -> None:
        found = base_share.base_share(*met(shelf, shelf.merge("plain", "F32", **weights)))
        assert not found.matters
        assert abs(found.coefficient) < 0.005

    def test_error_is_that_of_repetitions(self, shelf: Shelf) -> None:
        scores = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(accumulate, "LINES", 16)
            for seed in range(40):
                found = base_share.base_share(*met(shelf, scaled(shelf, 1.1, noise=0.05, seed=seed)))
                scores.append((found.coefficient - 0.1) / found.error)
        # 40 squares of standard normal deviates have a mean within these bounds in 999 of 1000 cases.
        assert 0.4 < np.mean(np.square(scores)) < 1.9

    def test_share_is_the_energy_of_the_base_s_part(self, shelf: Shelf) -> None:
        regression, base = met(shelf, scaled(shelf, 1.1), "full")
        matrices = [value for value in shelf.model.values() if value.ndim == 2]
        energy = sum(tensor.statistics.energy for tensor in regression.tensors if tensor.name in regression.contacts)
        found = base_share.base_share(regression, base)
        exact = 0.01 * sum(float(np.vdot(value, value)) for value in matrices) / energy
        assert found.energy_share == pytest.approx(exact, rel=0.05)
        assert 0.5 < found.energy_share < 1.0

    def test_of_small_or_uncertain_shares_is_left_alone(self) -> None:
        assert BaseShare(0.1, 0.01, 0.5).matters
        assert BaseShare(-0.1, 0.01, 0.5).matters
        assert not BaseShare(0.1, 0.02, 0.5).matters
        assert not BaseShare(0.1, 0.001, 0.004).matters

    def test_of_a_target_that_is_equal_where_it_was_met_is_zero(self, shelf: Shelf) -> None:
        change = {name: value + 0.1 * ("lm_head" in name) for name, value in shelf.model.items()}
        found = base_share.base_share(*met(shelf, write(shelf, "elsewhere", change)))
        assert (found.coefficient, found.matters) == (0.0, False)


class TestWithoutBase:
    @pytest.mark.parametrize("block", [100, 1 << 19])
    def test_one_coefficient_leaves_the_fine_tunes(self, shelf: Shelf, block: int) -> None:
        base = open_base(shelf.base)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(task_vector, "BLOCK_ELEMENTS", block)
            left, found = without_base(read(scaled(shelf, 1.1), base), base)
        assert found == pytest.approx(0.1, abs=1e-4)
        change, weights = materialise(left, NAME), shelf.model[NAME]
        exact = 0.6 * shelf.changes["add"][NAME] + (0.1 - found) * weights
        np.testing.assert_allclose(change, exact, atol=1e-7)
        assert left.deltas.keys() == base.checkpoint.tensors.keys()

    def test_coefficients_that_differ_are_taken_out_tensor_by_tensor(self, shelf: Shelf) -> None:
        base = open_base(shelf.base)
        factors = dict(zip(shelf.model, np.linspace(-0.2, 0.3, len(shelf.model)), strict=True))
        merged = {name: (1.0 + factors[name]) * value for name, value in shelf.model.items()}
        target = read(write(shelf, "slerp", merged), base)
        left, found = without_base(target, base)
        for name, value in shelf.model.items():
            np.testing.assert_allclose(materialise(left, name), 0.0, atol=1e-6 * np.abs(value).max())
        energies = {name: float(np.vdot(value, value)) for name, value in shelf.model.items()}
        mean = sum(factors[name] * energies[name] for name in factors) / sum(energies.values())
        assert found == pytest.approx(mean, abs=1e-6)

    def test_what_is_left_of_each_tensor_is_orthogonal_to_the_base(self, shelf: Shelf) -> None:
        base = open_base(shelf.base)
        rng = np.random.default_rng(0)
        merged = {name: rng.uniform(0.5, 1.5) * value + 0.01 * rng.standard_normal(value.shape)
                  for name, value in shelf.model.items()}  # fmt: skip
        left, _ = without_base(read(write(shelf, "mixed", merged), base), base)
        for name, value in shelf.model.items():
            change = materialise(left, name).reshape(value.shape)
            assert abs(np.vdot(change, value)) < 1e-9 * float(np.linalg.norm(change) * np.linalg.norm(value))

    def test_a_target_of_fewer_rows(self, shelf: Shelf) -> None:
        base = open_base(shelf.base)
        merged = {name: 1.1 * (value[:50] if len(value) == 64 else value) for name, value in shelf.model.items()}
        left, found = without_base(read(write(shelf, "short", merged), base), base)
        assert found == pytest.approx(0.1, abs=1e-6)
        assert left.deltas["lm_head.weight"].shape == (50, 32)
        np.testing.assert_allclose(materialise(left, "lm_head.weight")[:50], 0.0, atol=1e-7)


class TestNearerBases:
    def test_the_model_that_the_target_was_made_from_is_named(self, shelf: Shelf) -> None:
        base = open_base(shelf.base)
        full = open_base(shelf.path("full"))
        merged = {
            name: value + materialise(read(shelf.path("full"), base), name).reshape(value.shape)
            + 0.1 * shelf.changes["add"].get(name, 0.0)
            for name, value in shelf.model.items()
        }  # fmt: skip
        target = read(write(shelf, "of-full", merged), base)
        assert full.source.reference == shelf.path("full")
        (notice,) = nearer_bases(target, base, [shelf.path("full")])
        assert notice.startswith(f"the target is nearer to {shelf.path('full')} (")
        assert notice.endswith(f"likely it was made from {shelf.path('full')}")

    def test_the_distances_are_shares_of_the_base_s_norm(self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(base_share, "ROWS", 10)
        base, other = open_base(shelf.base), open_base(shelf.path("full"))
        target = read(shelf.path("merge"), base)
        found = base_share._distances(target, base, other)
        matrices = [name for name, value in shelf.model.items() if value.ndim == 2]
        change = [materialise(target, name)[:10] for name in matrices]
        apart = [
            materialise(target, name)[:10] - materialise(read(shelf.path("full"), base), name)[:10]
            for name in matrices
        ]  # fmt: skip
        norm = np.sqrt(sum(float(np.vdot(w, w)) for w in (shelf.model[name][:10] for name in matrices)))
        exact = [np.sqrt(sum(float(np.vdot(part, part)) for part in parts)) / norm for parts in (change, apart)]
        assert found == pytest.approx(exact)

    def test_neither_the_base_itself_nor_a_farther_one_is(self, shelf: Shelf) -> None:
        base = open_base(shelf.base)
        target = read(shelf.path("merge"), base)
        assert nearer_bases(target, base, [shelf.base, shelf.path("full")]) == ()
        assert nearer_bases(target, base, []) == ()

    def test_a_model_of_another_architecture_is_refused(self, shelf: Shelf) -> None:
        base = open_base(shelf.base)
        wide = write(shelf, "wide", tiny_model(np.random.default_rng(0), hidden=48))
        with pytest.raises(AlignmentError, match="wide: shares no matrix with the base; give a model of its arch"):
            nearer_bases(read(shelf.path("merge"), base), base, [wide])

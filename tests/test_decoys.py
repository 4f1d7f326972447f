"""Decoys have the directions and the strengths of real atoms, and are none of them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import Shelf
from unmerge.compress import materialise
from unmerge.decoys import make_decoys
from unmerge.dictionary import Atom, Base, combine, open_atom, open_base
from unmerge.directions import directions
from unmerge.errors import DictionaryError
from unmerge.task_vector import LowRank, TaskVector


@pytest.fixture
def base(shelf: Shelf) -> Base:
    return open_base(shelf.base)


def atoms(shelf: Shelf, base: Base, *names: str) -> list[Atom]:
    return [open_atom(shelf.path(name), base) for name in names]


def decoys(made_of: list[Atom], count: int, seed: int = 0) -> tuple[Atom, ...]:
    return make_decoys(made_of, count, np.random.default_rng(seed))


def matrices(vector: TaskVector) -> list[str]:
    return [name for name, delta in sorted(vector.deltas.items()) if isinstance(delta, LowRank)]


@pytest.mark.parametrize("name", ["add", "full"])
def test_every_direction_is_kept_with_a_sign(shelf: Shelf, base: Base, name: str) -> None:
    (atom,) = atoms(shelf, base, name)
    (decoy,) = decoys([atom], 1)
    leading = directions(atom.vector)
    assert matrices(decoy.vector) == matrices(leading)
    flipped = []
    for tensor in matrices(leading):
        delta = leading.deltas[tensor]
        assert isinstance(delta, LowRank)
        u, s, w = np.linalg.svd(materialise(leading, tensor), full_matrices=False)
        u, s, w = u[:, : delta.rank], s[: delta.rank], w[: delta.rank]
        seen = u.T @ materialise(decoy.vector, tensor) @ w.T
        np.testing.assert_allclose(np.abs(seen), np.diag(s), atol=1e-6 * s[0])
        np.testing.assert_allclose(np.linalg.norm(materialise(decoy.vector, tensor)), np.linalg.norm(s))
        flipped.extend((np.diag(seen) < 0.0).tolist())
    assert 0.2 < np.mean(flipped) < 0.8


def test_a_decoy_is_far_from_every_atom(shelf: Shelf, base: Base) -> None:
    real = atoms(shelf, base, "add", "sub", "json", "xml")
    made = decoys(real, 12)
    gram = combine(base, [*real, *made]).total_gram
    norms = np.sqrt(np.diag(gram))
    cosines = gram / np.outer(norms, norms) - np.eye(len(gram))
    assert np.abs(cosines[:, len(real) :]).max() < 0.8


def test_they_are_named_and_counted(shelf: Shelf, base: Base) -> None:
    real = atoms(shelf, base, "add", "sub")
    made = decoys(real, 5)
    assert [decoy.name for decoy in made] == [f"decoy-{number}" for number in range(1, 6)]
    assert len({decoy.vector.digest for decoy in made}) == 5
    sources = [decoy.source.reference for decoy in made]
    assert sources[0] == sources[2] == sources[4] != sources[1] == sources[3]
    assert set(sources) == {"made of add", "made of sub"}
    assert decoys(real, 0) == ()


def test_the_order_of_atoms_does_not_change_them(shelf: Shelf, base: Base) -> None:
    real = atoms(shelf, base, "add", "sub", "full")
    for one, two in zip(decoys(real, 4), decoys(real[::-1], 4), strict=True):
        assert (one.name, one.vector.digest) == (two.name, two.vector.digest)
        for tensor in matrices(one.vector):
            np.testing.assert_array_equal(materialise(one.vector, tensor), materialise(two.vector, tensor))


def test_a_generator_gives_the_same_again_and_another_others(shelf: Shelf, base: Base) -> None:
    real = atoms(shelf, base, "add")
    tensor = matrices(real[0].vector)[0]
    first, again, other = (materialise(decoys(real, 2, seed)[1].vector, tensor) for seed in (0, 0, 1))
    assert (first == again).all()
    assert not np.allclose(first, other)


def test_directions_of_a_dictionary_are_used(shelf: Shelf, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    (full,) = atoms(shelf, base, "full")
    known = Atom(full.vector, full.source, full.kind, directions(full.vector, 3))
    monkeypatch.setattr("unmerge.decoys.directions", lambda _: pytest.fail("computed again"))
    (decoy,) = decoys([known], 1)
    assert {delta.rank for delta in decoy.vector.deltas.values() if isinstance(delta, LowRank)} == {3}


def test_without_an_atom_none_can_be_made() -> None:
    with pytest.raises(DictionaryError, match="decoys are made of atoms, and none were given"):
        decoys([], 1)


def test_an_atom_with_a_decoy_s_name_is_refused(shelf: Shelf, base: Base) -> None:
    named = open_atom(f"decoy-7={shelf.path('add')}", base)
    with pytest.raises(DictionaryError, match=r"^atom 'decoy-7' has a decoy's name; rename it: NAME=PATH$"):
        decoys([named], 1)

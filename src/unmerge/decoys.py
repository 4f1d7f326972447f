"""Atoms that cannot be in any target: a check on the test of presence that users can run themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from unmerge.dictionary import Atom
from unmerge.directions import computed_low_rank, directions
from unmerge.errors import DictionaryError
from unmerge.task_vector import LowRank, TaskVector

PREFIX = "decoy-"
"""Begins the names of decoys."""


def is_decoy(atom: Atom) -> bool:
    """Tell whether an atom was made here, whatever it is called."""
    return f"/{PREFIX}" in atom.vector.digest


def make_decoys(atoms: Sequence[Atom], count: int, generator: np.random.Generator) -> tuple[Atom, ...]:
    """Make decoys of atoms, one after the other and around again.

    A decoy has the singular vectors and the singular values of a real atom, and a random sign before each of them:
    the hardest fine-tune that nobody trained. It shares every direction with the real one, and what is common to all
    fine-tunes of the base, so a test that looks for resemblance would accuse it.

    Parameters
    ----------
    atoms : sequence of Atom
        At least one.
    count : int
        How many to make.

    Returns
    -------
    tuple of Atom
        Named ``decoy-1``, ``decoy-2``, ...

    Raises
    ------
    DictionaryError
        If there is no atom, or an atom already has such a name.
    """
    if not atoms:
        raise DictionaryError("decoys are made of atoms, and none were given")
    taken = sorted(atom.name for atom in atoms if atom.name.startswith(PREFIX))
    if taken:
        raise DictionaryError(f"atom {taken[0]!r} has a decoy's name; rename it: NAME=PATH")
    ordered = sorted(atoms, key=lambda atom: (atom.vector.digest, atom.name))
    return tuple(_decoy(ordered[number % len(ordered)], number + 1, generator) for number in range(count))


def _decoy(atom: Atom, number: int, generator: np.random.Generator) -> Atom:
    name = f"{PREFIX}{number}"
    leading = atom.directions or directions(atom.vector)
    deltas = {
        tensor: _flipped(delta, generator)
        for tensor, delta in sorted(leading.deltas.items())
        if isinstance(delta, LowRank)
    }
    vector = TaskVector(name, f"{atom.vector.digest}/{name}", dict(deltas))
    source = replace(atom.source, reference=f"made of {atom.name}", commit=None)
    return Atom(vector, source, "adapter")


def _flipped(delta: LowRank, generator: np.random.Generator) -> LowRank:
    """Return a low-rank change with a random sign before each of its singular values."""
    left, right = delta.left(0, delta.shape[0]) * delta.scale, delta.right()
    before, before_factor = np.linalg.qr(left)
    after, after_factor = np.linalg.qr(right.T)
    u, singular, w = np.linalg.svd(before_factor @ after_factor.T)
    signs = generator.choice([-1.0, 1.0], size=len(singular))
    return computed_low_rank(before @ (u * (singular * signs)), w @ after.T, "F64")

"""What a stopped run left is gone on from, to the same bits, or refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Shelf
from unmerge import accumulate, attribute, dictionary
from unmerge.accumulate import Contact, Products, Unit, plan_units
from unmerge.errors import StateError, UnmergeError
from unmerge.journal import StateFolder, UnitJournal
from unmerge.task_vector import TaskVector

WORK = plan_units([Unit("a", start, start + 2, 3) for start in range(0, 8, 2)], [])
ARRAYS = ("rows", "columns", "cores", "along", "across", "corner")


def journal(folder: Path) -> UnitJournal:
    return StateFolder(folder).journal(WORK, [TaskVector("target", "digest", {})], [], [])


def products(seed: int, *, contact: bool = False) -> Products:
    rng = np.random.default_rng(seed)
    met = Contact(
        (("x", 1), ("y", 2)), np.arange(2), np.arange(3), rng.random((3, 2)),
        rng.random((2, 3)).astype(np.float32), rng.random((3, 3)), rng.random((2, 3)).astype(np.float32),
    )  # fmt: skip
    return Products(rng.random((1, 4)), rng.random(1), seed, met if contact else None)


def assert_equal(found: Products, kept: Products) -> None:
    assert found.count == kept.count
    for one, other in ((found.gram, kept.gram), (found.rounding, kept.rounding)):
        assert one.dtype == other.dtype
        assert one.tobytes() == other.tobytes()
    assert (found.contact is None) == (kept.contact is None)
    if found.contact is not None and kept.contact is not None:
        assert found.contact.ranks == kept.contact.ranks
        for name in ARRAYS:
            one, other = getattr(found.contact, name), getattr(kept.contact, name)
            assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def test_what_is_kept_is_found_to_the_bit(tmp_path: Path) -> None:
    kept = {2: products(7, contact=True), 0: products(8), 3: products(9, contact=True)}
    first = journal(tmp_path)
    for place, item in kept.items():
        first.keep(place, item)
    found = journal(tmp_path).finished
    assert found.keys() == kept.keys()
    for place, item in kept.items():
        assert_equal(found[place], item)


def test_a_record_that_was_torn_at_any_byte_is_left_out_and_the_next_one_follows_the_whole_ones(tmp_path: Path) -> None:
    first = journal(tmp_path)
    first.keep(0, products(1))
    whole = first.file.stat().st_size
    first.keep(1, products(2))
    content = first.file.read_bytes()
    assert len(content) > whole + 100
    for length in range(whole, len(content)):
        first.file.write_bytes(content[:length])
        again = journal(tmp_path)
        assert list(again.finished) == [0]
        again.keep(1, products(2))
        assert first.file.read_bytes() == content
    for place in range(whole, len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1
        first.file.write_bytes(damaged)
        assert list(journal(tmp_path).finished) == [0]


class Stopped(BaseException):
    """As a kill: nothing catches it."""


def stop_after(monkeypatch: pytest.MonkeyPatch, units: int | None) -> list[Unit]:
    seen: list[Unit] = []
    real = accumulate.unit_products

    def watched(unit: Unit, *rest: object, **options: object) -> Products:
        if units is not None and len(seen) == units:
            raise Stopped
        seen.append(unit)
        return real(unit, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(accumulate, "unit_products", watched)
    return seen


def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    atoms = shelf.paths("add", "json", "full")
    with monkeypatch.context() as patch:
        every = stop_after(patch, None)
        peace = attribute(shelf.path("merge"), atoms, base=shelf.base, workers=1).to_json()
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        with pytest.raises(Stopped):
            attribute(shelf.path("merge"), atoms, base=shelf.base, workers=1, state=state)
    (file,) = state.iterdir()
    os.truncate(file, file.stat().st_size - 5)
    with monkeypatch.context() as patch:
        rest = stop_after(patch, None)
        found = attribute(shelf.path("merge"), atoms, base=shelf.base, workers=2, state=state).to_json()
    assert found == peace
    assert len(every) == len(rest) + 8
    assert not state.exists()


@pytest.mark.parametrize("change", ["target", "atoms", "file", "options"])
def test_what_another_run_left_is_refused(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    arguments = {"target": shelf.path("merge"), "atoms": shelf.paths("add", "json"), "exact": False}
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            attribute(**arguments, base=shelf.base, workers=1, state=tmp_path / "state")  # type: ignore[arg-type]
    if change == "target":
        arguments["target"] = shelf.merge("other", add=0.5)
    elif change == "atoms":
        arguments["atoms"] = shelf.paths("add", "json", "xml")
    elif change == "file":
        os.utime(shelf.folder / "merge" / "model.safetensors", ns=(0, 0))
    else:
        arguments["float64"] = True
    with pytest.raises(StateError, match="holds what another run accumulated"):
        attribute(**arguments, base=shelf.base, state=tmp_path / "state")  # type: ignore[arg-type]


def test_a_sample_has_no_state(shelf: Shelf, tmp_path: Path) -> None:
    with pytest.raises(UnmergeError, match="--state keeps sums over all parameters"):
        attribute(shelf.path("merge"), [shelf.path("add")], base=shelf.base, precision=0.1, state=tmp_path / "state")


def test_a_state_that_cannot_be_written_is_told(shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with pytest.raises(StateError, match="cannot be written"):
        attribute(shelf.path("merge"), [shelf.path("add")], base=shelf.base, state=tmp_path / "state")


def written_atoms(monkeypatch: pytest.MonkeyPatch, stop: int | None) -> list[str]:
    """Note each atom that is written to a dictionary, and stop before one of them."""
    written: list[str] = []
    real = dictionary._write_atom

    def watched(path: Path, atom: dictionary.Atom, *rest: Any, **options: Any) -> dict[str, Any]:
        if len(written) == stop:
            raise Stopped
        written.append(atom.name)
        return real(path, atom, *rest, **options)

    monkeypatch.setattr(dictionary, "_write_atom", watched)
    return written


@pytest.mark.parametrize("verb", ["build", "add"])
@pytest.mark.parametrize("place", ["in the pass", "while atoms are written"])
def test_a_dictionary_that_was_stopped_goes_on_and_ends_in_the_same_bytes(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, place: str
) -> None:
    peace, known, state = (tmp_path / name for name in ("peace", "known", "state"))
    names = ["add", "json", "xml", "whole"]
    references = [*shelf.paths(*names[:3]), f"whole={shelf.path('full')}"]
    run = getattr(dictionary, verb)
    for folder in (peace, known) if verb == "add" else ():
        dictionary.build(folder, shelf.paths("sub"), shelf.base)
    run(peace, references, shelf.base)
    with monkeypatch.context() as patch:
        before = written_atoms(patch, stop=2)
        if place == "in the pass":
            stop_after(patch, 2)
        with pytest.raises(Stopped):
            run(known, references, shelf.base, state=state)
    assert before == ([] if place == "in the pass" else names[:2])
    if verb == "build":
        assert not known.exists()
    else:
        assert dictionary.verify(known) == []
    for name in before[:1]:
        # Spoilt by a power failure, say: it is written again.
        os.truncate((state / "dictionary" if verb == "build" else known) / "sketch" / f"{name}.safetensors", 10)
    with monkeypatch.context() as patch:
        after = written_atoms(patch, stop=None)
        run(known, references, shelf.base, state=state)
    assert after == [name for name in names if name not in before[1:]]
    assert contents(known) == contents(peace)
    assert not state.exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_an_atom_that_changed_since_is_written_again(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(dictionary, "MANIFEST", "no/folder")
        with pytest.raises(FileNotFoundError):
            dictionary.build(tmp_path / "known", shelf.paths("add"), shelf.base, state=tmp_path / "state")
    note = "\n"
    configuration = shelf.folder / "add" / "adapter_config.json"
    configuration.write_text(configuration.read_text() + note)
    dictionary.build(tmp_path / "known", shelf.paths("add"), shelf.base, state=tmp_path / "state")
    assert (tmp_path / "known" / "atoms" / "add" / configuration.name).read_text().endswith(note)

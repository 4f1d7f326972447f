"""Large dictionaries: the screened answer is that of all atoms compared on all parameters."""

from __future__ import annotations

import shutil
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import unmerge
from unmerge import dictionary, shortlist
from unmerge.attribution import explain, open_target
from unmerge.compress import materialise
from unmerge.dictionary import open_atom, open_base
from unmerge.errors import DictionaryError
from unmerge.findings import SMALLEST
from unmerge.result import Attribution, Component
from unmerge.shortlist import Shelf
from unmerge.solvers import SOLVERS
from unmerge.testing import quantise, tiny_model, write_adapter, write_checkpoint

ATOMS, LARGE = 40, 32  # small ones, to be quick


class Library:
    """A base, a dictionary of many adapters, two of which resemble another one, and merges of them and a stranger."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(7)
        self.model = {name: quantise(value, "BF16") for name, value in tiny_model(rng, layers=3).items()}
        self.base = str(write_checkpoint(folder / "base", self.model))
        names = [f"a{number:02d}" for number in range(ATOMS - 2)]
        self.changes = {name: write_adapter(folder / name, rng, self.model) for name in (*names, "stranger")}
        self._resemble("version", 0.1, rng)
        self._resemble("cousin", 1.0, rng)
        self.names = [*names, "version", "cousin"]
        dictionary.build(folder / "many", [str(folder / name) for name in self.names], self.base)
        self.merge("mix", a10=0.5, a30=0.3, a35=0.2)
        self.merge("beside", a10=0.5, a30=0.3, stranger=0.5)
        self.merge("unknown", stranger=0.7)
        self.merge("negative", a10=0.5, a30=-0.4)
        self.merge("kin", a03=0.5, a30=0.3)

    def _resemble(self, name: str, noise: float, rng: np.random.Generator) -> None:
        """Write an adapter whose factors are those of a03 and as much noise."""
        shutil.copytree(self.folder / "a03", self.folder / name)
        file = self.folder / name / "adapter_model.safetensors"
        factors = load_file(file)
        moved = {
            key: factor + np.float32(noise * factor.std()) * rng.standard_normal(factor.shape, dtype=np.float32)
            for key, factor in factors.items()
        }
        save_file(moved, file)

    def merge(self, name: str, dtype: str = "BF16", **weights: float) -> None:
        merged = {
            key: value + sum(weight * self.changes[atom].get(key, 0.0) for atom, weight in weights.items())
            for key, value in self.model.items()
        }
        write_checkpoint(self.folder / name, merged, dtype)

    @cached_property
    def plain(self) -> Attribution:
        """The answer to the known mix."""
        return self.attribute("mix")

    def attribute(self, target: str, *beside: str, **options: object) -> Attribution:
        atoms = [self.folder / "many", *(self.folder / name for name in beside)]
        return unmerge.attribute(self.folder / target, atoms, base=self.base, **options)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortlist, "LARGE", LARGE)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("library"))


def by_name(result: Attribution) -> dict[str, Component]:
    return {component.name: component for component in result.components}


@pytest.mark.parametrize(
    ("target", "present", "options"),
    [
        ("mix", {"a10", "a30", "a35"}, {}),
        ("beside", {"a10", "a30"}, {"solver": "omp"}),
        ("unknown", set(), {}),
        ("negative", {"a10", "a30"}, {"signed": True}),
        ("kin", {"a30"}, {}),  # and a03 or its version
    ],
)
def test_the_answer_is_that_of_all_atoms(
    library: Library, target: str, present: set[str], options: dict[str, object]
) -> None:
    screened = library.attribute(target, **options) if target != "mix" else library.plain
    full = library.attribute(target, exact=True, **options)
    found, expected = by_name(screened), by_name(full)
    assert found.keys() == expected.keys() == set(library.names)
    assert {name for name, item in found.items() if item.present} == present
    assert {name for name, item in expected.items() if item.present} == present
    for name in present:
        one, other = found[name], expected[name]
        assert one.interval is not None
        assert other.interval is not None
        # Beside a stranger, the test's noise is what all fitted atoms leave of it.
        width = other.interval[1] - other.interval[0] if target == "beside" else 0.0
        assert one.weight == pytest.approx(other.weight, abs=1e-9 + 0.25 * width)
        assert one.interval == pytest.approx(other.interval, abs=1e-9 + width)
    # Where all atoms are fitted, those that are not there get a little of the rest each.
    least = 0.02 if target in {"beside", "unknown"} else 0.005
    for name, item in found.items():
        assert item.coefficient == pytest.approx(expected[name].coefficient, abs=least)
        assert item.evidence.one_of_group == expected[name].evidence.one_of_group
        assert item.relative_norm == pytest.approx(expected[name].relative_norm, rel=1e-6)
    assert screened.unexplained.share == pytest.approx(full.unexplained.share, abs=1e-3)


def test_what_is_said_of_those_that_were_not_opened(library: Library) -> None:
    result = library.plain
    unopened = [item for item in result.components if "nothing of it in a sketch" in item.evidence.reason]
    assert len(unopened) > ATOMS / 2
    for item in unopened:
        assert (item.coefficient, item.weight, item.present, item.evidence.p_value) == (0.0, None, False, None)
        assert item.evidence.detectable is not None
        assert 0.0 < item.evidence.detectable < SMALLEST
        assert item.interval is not None
        assert item.interval[0] == 0.0 <= item.interval[1] < 0.1
    opened = ATOMS - len(unopened)
    assert any(f"of {ATOMS} atoms, {opened} were compared on all parameters" in notice for notice in result.notices)


def test_no_file_of_theirs_is_read(library: Library, tmp_path: Path) -> None:
    expected = library.plain
    shutil.copytree(library.folder / "many", tmp_path / "many")
    for item in expected.components:
        if "nothing of it in a sketch" in item.evidence.reason:
            shutil.rmtree(tmp_path / "many" / "atoms" / item.name)
            (tmp_path / "many" / "gram" / f"{item.name}.safetensors").unlink()
    assert unmerge.attribute(library.folder / "mix", [tmp_path / "many"], base=library.base) == expected


def test_relatives_of_what_is_inside_are_looked_at(library: Library) -> None:
    found = by_name(library.attribute("kin"))
    for name in ("version", "cousin"):
        assert "sketch" not in found[name].evidence.reason
    assert found["a03"].evidence.group == ("version",)


def test_atoms_beside_the_dictionary_are_always_looked_at(library: Library) -> None:
    found = by_name(library.attribute("beside", "stranger"))
    assert {name for name, item in found.items() if item.present} == {"a10", "a30", "stranger"}
    assert "sketch" not in by_name(library.attribute("mix", "stranger"))["stranger"].evidence.reason


def test_errors_are_counted_over_all_atoms(library: Library) -> None:
    base = open_base(library.base)
    goal = open_target(str(library.folder / "beside"), base)
    chosen = Shelf.of([str(library.folder / "many")], base).choose(goal.vector, goal.rows)
    assert len(chosen.atoms) + len(chosen.unopened) == ATOMS
    counted, alone = (
        by_name(
            explain(
                goal, chosen.dictionary, chosen.extra, base, SOLVERS["nnls"](), unopened=unopened, refined=False
            )[0]
        )["a10"].evidence.detectable
        for unopened in (chosen.unopened, ())
    )  # fmt: skip
    assert counted is not None
    assert alone is not None
    assert counted > alone


def test_the_order_of_atoms_changes_nothing(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortlist, "LARGE", 8)
    names = [str(library.folder / name) for name in ("a30", *library.names[5:17])]
    dictionary.build(tmp_path / "one", names, library.base)
    dictionary.build(tmp_path / "turned", names[::-1], library.base)
    one, turned = (
        unmerge.attribute(library.folder / "beside", [tmp_path / name], base=library.base) for name in ("one", "turned")
    )
    assert any("sketch" in item.evidence.reason for item in one.components)
    assert turned == one


def test_a_weight_that_a_sketch_cannot_see_is_not_denied(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmerge.sketch.MOST_BYTES", 1 << 17)  # some five hundred values of each
    library.merge("loud", stranger=2.5)
    found = [item for item in library.attribute("loud").components if "in a sketch of" in item.evidence.reason]
    assert len(found) > ATOMS / 2
    assert {item.present for item in found} == {None}


def test_small_dictionaries_are_opened_whole(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_base(library.base)
    references = [str(library.folder / "many")]
    assert Shelf.of(references, base).large is not None
    assert Shelf.of(references, base, whole=True).large is None
    monkeypatch.setattr(shortlist, "LARGE", ATOMS)
    assert Shelf.of(references, base).large is None


def test_one_name_twice_is_refused_without_opening(library: Library) -> None:
    with pytest.raises(DictionaryError, match="two atoms are called 'a03'"):
        library.attribute("mix", "a03")


def test_resemblance_is_as_meant(library: Library) -> None:
    base = open_base(library.base)
    vectors = [open_atom(str(library.folder / name), base).vector for name in ("a03", "version", "cousin")]
    dense = np.array([np.concatenate([materialise(v, t).ravel() for t in sorted(v.deltas)]) for v in vectors])
    cosines = np.corrcoef(dense)[0, 1:]
    assert cosines[0] > 0.97
    assert 0.4 < cosines[1] < 0.6
